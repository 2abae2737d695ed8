"""The log of a run: its rows in log.csv, the line that it prints, and the numbers of every step by name.

docs/log_columns.md explains every column. The numbers of a step stay on the device until a row or a checkpoint needs them, so
that a GPU never waits for them at a step.
"""

import contextlib
import functools
import math
import platform
import time

import torch
from tqdm import tqdm

from .files import NonFiniteError, write_csv

FORMAT = 4  # of logs and cached stages, part of every digest: raise it when the meaning of one changes
PERCENTILES = (5, 25, 50, 75, 95)  # of the monitored rows' log-ratios
ASKED = "accuracy accuracy_0.7 accuracy_greedy pass@4 pass@16 entropy".split()  # on validation and on test problems
COLUMNS = [
    *"step loss grad_norm".split(),
    *ASKED,
    *"malformed logratio_correct logratio_incorrect pi_correct pi_incorrect pihat_correct pihat_incorrect".split(),
    *"coefficient_correct coefficient_incorrect below_0.2_pi below_0.2_pihat skipped seconds".split(),
    *"tokens_trained tokens_sampled".split(),
    *(f"logratio_{kind}_{part}" for kind in ("correct", "incorrect") for part in (*(f"p{p}" for p in PERCENTILES), "below_0")),
    *(f"test_{name}" for name in ASKED),
]
MEANS = ("loss", "grad_norm", "coefficient_correct", "coefficient_incorrect")  # of a row, over the steps since the last one
COUNTS = ("below_0.2_pi", "below_0.2_pihat", "tokens_trained", "tokens_sampled")  # running sums over all steps
progress = functools.partial(tqdm, disable=None, leave=False)  # disable=None: a bar on a terminal only


def monitored_columns(values, reward):
    """Columns of log.csv from {"logratio", "pi", "pihat": (N,)} of monitored rows: means of each kind, log-ratios' spread."""
    columns = {}
    for kind, rows in {"correct": reward > 0, "incorrect": reward < 0}.items():
        columns |= {f"{name}_{kind}": value[rows].mean().item() for name, value in values.items()}
        logratio = values["logratio"][rows]  # the drag is a heavy tail, which a mean does not show
        quantiles = logratio.quantile(torch.tensor(PERCENTILES, device=logratio.device) / 100).tolist()
        columns |= {f"logratio_{kind}_p{percent}": value for percent, value in zip(PERCENTILES, quantiles)}
        columns[f"logratio_{kind}_below_0"] = (logratio < 0).float().mean().item()
    return columns


class Steps:
    """The numbers of the steps since the last row, each a scalar on the device, by name.

    `raise_if_not_finite` allows `tolerated` steps whose loss or gradient norm is not finite, over the whole run.
    """

    def __init__(self, what, tolerated=0, ids=None, kept=""):
        self.what, self.tolerated, self.ids, self.kept = what, tolerated, ids, kept
        self.numbers, self.first, self.skipped = {}, 0, 0

    def add(self, **numbers):
        for name, number in numbers.items():
            self.numbers.setdefault(name, []).append(number.detach() if isinstance(number, torch.Tensor) else number)

    def columns(self):
        """{name: (steps,) float32 on the CPU}; a device is read here, once for each number."""
        self.numbers = {name: [float(x) for x in values] for name, values in self.numbers.items()}
        return {name: torch.tensor(values) for name, values in self.numbers.items()}

    def finite(self, columns):
        """Which of the steps are finite (steps,)."""
        return torch.stack([columns[name].isfinite() for name in ("loss", "grad_norm")]).all(dim=0)

    def raise_if_not_finite(self):
        """Raises NonFiniteError that names the first step beyond those that are tolerated, and its problems."""
        if not self.numbers:
            return
        columns = self.columns()
        bad = (~self.finite(columns)).nonzero()[:, 0].tolist()
        if self.skipped + len(bad) > self.tolerated:
            at = bad[self.tolerated - self.skipped]
            loss, norm = columns["loss"][at], columns["grad_norm"][at]
            said = f"{self.what}step {self.first + at + 1}: loss {loss:g}, gradient norm {norm:g}"
            if self.ids is not None:
                said += f"; problem ids of its batch: {self.ids[self.first + at].unique().tolist()}"
            if self.tolerated:
                said += f"; {self.tolerated} such steps before it were skipped"
            raise NonFiniteError(said + self.kept)

    def clear(self):
        """Forget the numbers, and count the steps that were not finite."""
        if self.numbers:
            finite = self.finite(self.columns())
            self.first, self.skipped, self.numbers = self.first + len(finite), self.skipped + (~finite).sum().item(), {}

    def state(self):
        """A part of a checkpoint (keeper.py). Raises NonFiniteError: what is not finite is not saved."""
        self.raise_if_not_finite()
        return {"first": self.first, "skipped": self.skipped, "numbers": self.columns()}

    def restore(self, state):
        self.first, self.skipped = state["first"], state["skipped"]
        self.numbers = {name: list(values) for name, values in state["numbers"].items()}


class Log:
    """log.csv of one run, a row every `every` steps.

    `measure(step, model)` gives the columns that an evaluation measures. `observer` is called before every step with the step
    and whether a row is due; what it keeps is kept with the log. seconds and sampled were spent before the first step. `title`
    opens each line that is printed.
    """

    def __init__(self, folder, measure, total, every, steps, observer=None, title="", seconds=0.0, sampled=0):
        self.path, self.measure, self.total, self.every = folder / "log.csv", measure, total, every
        self.steps, self.observer, self.title = steps, observer, title
        self.rows, self.counts = [], {**dict.fromkeys(COUNTS, 0), "tokens_sampled": sampled}
        self.seconds, self.began, self.paused_for = seconds, time.time(), 0.0
        self.first = None  # the step and the time of this process's first row

    def add(self, **numbers):
        """Keep the numbers of a step."""
        self.steps.add(**numbers)

    def spent(self):
        """Seconds of sampling and training so far."""
        return self.seconds + time.time() - self.began - self.paused_for

    @contextlib.contextmanager
    def paused(self):
        """Time that the column `seconds` leaves out."""
        paused = time.time()
        try:
            yield
        finally:
            self.paused_for += time.time() - paused

    def look(self, step, model):
        """Before a step, and after the last one: evaluate where a row is due, and call the observer. Raises as `evaluate`."""
        due = step % self.every == 0 or step == self.total
        if due:
            self.evaluate(step, model)
        if self.observer:
            with self.paused():
                self.observer(step, due)

    def evaluate(self, step, model):
        """Measure, append a row to log.csv, and print a line. Raises NonFiniteError, and UserError where the disk is full."""
        self.steps.raise_if_not_finite()
        seconds = self.spent()
        with self.paused():
            self.rows.append(self.row(step, seconds, self.measure(step, model)))
            write_csv(self.path, self.rows)
            self.first = self.first or (step, time.time())
            done, began = step - self.first[0], self.first[1]
            eta = (time.time() - began) / done * (self.total - step) if done else math.nan
            tqdm.write(self.title + progress_line(self.rows[-1], self.total, eta))

    def row(self, step, seconds, measured):
        """A row of log.csv from what was measured now and from the steps since the last row, whose numbers it forgets."""
        values = dict.fromkeys(COLUMNS, math.nan) | measured | {"step": step, "seconds": seconds}
        if self.steps.numbers:
            columns = self.steps.columns()
            finite = self.steps.finite(columns)
            means = torch.stack([columns[name] for name in MEANS], dim=1)[finite].nanmean(0)
            values |= dict(zip(MEANS, means.tolist()))
            for name in COUNTS:
                if name in columns:
                    counted = columns[name] if name == "tokens_sampled" else columns[name][finite]  # of updates that were taken
                    self.counts[name] += int(counted.double().sum())
        self.steps.clear()
        values |= {**self.counts, "skipped": self.steps.skipped}
        return {name: values[name] for name in COLUMNS}

    def state(self):
        """A part of a checkpoint (keeper.py)."""
        return {"rows": self.rows, "counts": self.counts, "seconds": self.spent(), "steps": self.steps.state(),
                "observer": self.observer.state() if self.observer else {}}  # fmt: skip

    def restore(self, state):
        self.rows, self.counts, self.seconds = state["rows"], state["counts"], state["seconds"]
        self.steps.restore(state["steps"])
        if self.observer:
            self.observer.restore(state["observer"])


def step_numbers(b, loss=0.0, grad_norm=0.0, coefficient=None):
    """A step's numbers for `Log.add`, from its batch; coefficients are logged as C |y|, the weight of grad logp_mean.

    Without a coefficient nothing was trained on.
    """
    values = {"loss": loss, "grad_norm": grad_norm}
    values |= {"tokens_trained": b.length.sum(), "tokens_sampled": getattr(b, "sampled", 0)}
    if coefficient is None:
        return values | dict.fromkeys(MEANS[2:], math.nan) | dict.fromkeys(COUNTS[:2], 0)
    weight, wrong = coefficient * b.length, b.reward < 0
    values |= {"coefficient_correct": weight[b.reward > 0].mean(), "coefficient_incorrect": weight[wrong].mean()}
    for name, logp_sum in (("below_0.2_pi", b.logp_sum), ("below_0.2_pihat", b.future_logp_sum)):
        values[name] = (wrong & ((logp_sum.detach() / b.length).exp() < 0.2)).sum()
    return values


def progress_line(row, steps, eta):
    """The line that training prints for a row of log.csv; eta in seconds."""
    eta = "--:--" if math.isnan(eta) else f"{int(eta) // 60:2d}:{int(eta) % 60:02d}"
    loss = f"{row['loss']:+.4f}" if row["step"] else "   --  "
    return (
        f"step {row['step']:5d}/{steps}  loss {loss}  accuracy {row['accuracy']:.3f}  "
        f"greedy {row['accuracy_greedy']:.3f}  log-ratio correct {row['logratio_correct']:+8.2f} "
        f"incorrect {row['logratio_incorrect']:+8.2f}  ETA {eta}"
    )


def environment(device):
    """What fixes the last digits of a run, for config.json: the device, threads, torch, and the processor."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, KeyError), open("/proc/cpuinfo") as file:
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in file)}
        cpu = f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"  # one name has several models
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": cpu}


def pass_at(k, n, correct):
    """The chance that one of k samples is correct, unbiased from n samples of a problem of which some are correct.

    1 - C(n - correct, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374). Raises ValueError where k is above n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
