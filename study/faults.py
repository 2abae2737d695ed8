"""The lesson's lab "find the bug": four runs of FPA, each with one silent fault, and the command that made their logs.

    python -m study.faults   # trains them and a right one -> docs/lesson/faults.csv

Each fault changes one thing of losses.fpa_loss. None raises an error, and no loss becomes NaN. The runs have letters, in the
order of a digest, which tells nothing.
"""

import ast
import csv
import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path

from losses import fpa_loss, future_logits, token_logps
from plumbing.files import printable_path, write_csv
from plumbing.flags import check_folder, command, command_line, count
from study import lesson

STEPS, EVERY = 200, 50
LOGS = Path(__file__).resolve().parents[1] / "docs/lesson/faults.csv"
RIGHT = "right"  # the run without a fault
SHOWN = "loss grad_norm accuracy accuracy_greedy logratio_correct logratio_incorrect pi_incorrect pihat_incorrect".split()


# --- the faults


def not_detached(logits, ref_logits, tokens, mask, reward, lam=2.0):
    length = mask.sum(-1)
    logp_sum = token_logps(logits, tokens, mask).sum(-1)
    future = logits + lam * (logits - ref_logits)
    weight = (token_logps(future, tokens, mask).sum(-1) / length).exp()
    return -(reward * weight * logp_sum / length).mean()


def no_length(logits, ref_logits, tokens, mask, reward, lam=2.0):
    length = mask.sum(-1)
    logp_sum = token_logps(logits, tokens, mask).sum(-1)
    future = future_logits(logits, ref_logits, lam)
    weight = token_logps(future, tokens, mask).sum(-1).exp().detach()
    return -(reward * weight * logp_sum / length).mean()


def wrong_sign(logits, ref_logits, tokens, mask, reward, lam=2.0):
    length = mask.sum(-1)
    logp_sum = token_logps(logits, tokens, mask).sum(-1)
    future = future_logits(logits, ref_logits, lam)
    weight = (token_logps(future, tokens, mask).sum(-1) / length).exp().detach()
    return -(reward.abs() * weight * logp_sum / length).mean()


def zero_one(logits, ref_logits, tokens, mask, reward, lam=2.0):
    reward = (reward + 1) / 2
    length = mask.sum(-1)
    logp_sum = token_logps(logits, tokens, mask).sum(-1)
    future = future_logits(logits, ref_logits, lam)
    weight = (token_logps(future, tokens, mask).sum(-1) / length).exp().detach()
    return -(reward * weight * logp_sum / length).mean()


@dataclass(frozen=True)
class Fault:
    loss: callable
    look: str  # where a log shows it


FAULTS = {
    "not_detached": Fault(not_detached,
        "whose loss falls on and on, as a value does that is really minimised?"),
    "no_length": Fault(no_length,
        "how large are the loss and the gradient's norm beside the right run's?"),
    "wrong_sign": Fault(wrong_sign,
        "which way does the incorrect rows' log-ratio go in the first 50 steps?"),
    "zero_one": Fault(zero_one,
        "do the incorrect rows fall by themselves, or are they pushed?"),
}  # fmt: skip
KEY = dict(zip("abcd", sorted(FAULTS, key=lambda name: hashlib.sha256(name.encode()).hexdigest())))


def code(letter):
    """The loss of a run, as it was trained, under the right one's name."""
    tree = ast.parse(inspect.getsource(FAULTS[KEY[letter]].loss))
    tree.body[0].name = fpa_loss.__name__
    return ast.unparse(tree)


# --- their logs


def logs(path=LOGS):
    """{letter, or RIGHT: {column: list of numbers}}."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        for name, text in row.items():
            if name != "run":
                found.setdefault(row["run"], {}).setdefault(name, []).append(float(text))
    return found


def table(log):
    """A log as text, a line a row."""
    lines = ["  ".join(f"{name:>18}" for name in log)]
    return "\n".join([*lines, *("  ".join(f"{value:18.4g}" for value in row) for row in zip(*log.values()))])


def make(out, steps, to):
    """Train the right run and the faulty ones on the lesson's rollouts, and write their logs."""
    world, rows = lesson.world(out), []
    for run, loss in {RIGHT: fpa_loss, **{letter: FAULTS[name].loss for letter, name in KEY.items()}}.items():
        print(f"run {run}")
        log = lesson.train_with(loss, world, steps, min(EVERY, steps))
        rows += [{"run": run, **dict(zip(log, row))} for row in zip(*log.values())]
    write_csv(to, [{name: row[name] for name in ("run", "step", *SHOWN)} for row in rows])


def run(argv=None):
    """The command."""
    parser = command_line(__doc__.splitlines()[0], prog="python -m study.faults")
    add = parser.add_argument
    add("--steps", default=STEPS, type=count, metavar="N", help="steps of each run")
    add("--out", default="runs", type=printable_path, metavar="FOLDER", help="folder of the cached stages")
    add("--to", default=LOGS, type=printable_path, metavar="FILE", help="file of the logs")
    args = parser.parse_args(argv)
    for flag, folder in (("--out", args.out), ("--to", args.to.parent)):
        check_folder(parser, flag, folder)
    with command("python -m study.faults", "nothing is kept", args.out):
        make(args.out, args.steps, args.to)


if __name__ == "__main__":
    run()
