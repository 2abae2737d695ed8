"""Reading the runs' logs and choosing among them; means with their intervals. No model is loaded.

A folder holds runs in one of two forms. train.py writes a folder a run: config.json, log.csv and, with --diagnostics, the
tables of study/diagnostics.py. The folder results/ is one set of tables: runs.csv has a row a run with its settings, and
curves.csv and the tables of study/diagnostics.py have the rows of all runs, each with its run's id. Both give the same `Run`s.
"""

import csv
import functools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from losses import HYPERPARAMETERS, LOSSES
from plumbing.files import UserError
from plumbing.log import FORMAT

READABLE = (3, FORMAT)  # 3: the runs of results/slips, with fewer columns, whose accuracy is that on test problems
METHOD = ("loss", *HYPERPARAMETERS)
NOT_A_SETTING = (*METHOD, "seed", "measured", "environment")
NEEDED = set(
    "step accuracy accuracy_greedy logratio_correct logratio_incorrect pi_correct pi_incorrect coefficient_correct "
    "coefficient_incorrect below_0.2_pi below_0.2_pihat seconds tokens_trained tokens_sampled".split()
)  # columns of that format
TABLES = ("entanglement", "extrapolation", "tokens", "batch")  # of study/diagnostics.py
RENAMED = {"environment.cpu": "machine"}  # the settings whose column in runs.csv has another name
T_QUANTILE = [np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 %, by degrees of freedom


# --- reading


class Run(NamedTuple):
    folder: Path  # in results/ there is no such folder; its name is the run's id
    config: dict
    log: dict  # {column: array}
    tables: dict = {}  # {name in TABLES: {column: array}}, of the tables that the run has
    experiments: tuple = ()  # that it is of, in results/

    def get(self, name):
        """A setting. A setting that the run does not have is None, and `lam` is 0."""
        value = self.config.get(name)
        return 0.0 if name == "lam" and value is None else value

    @property
    def method(self):
        return tuple(self.get(name) for name in METHOD)

    @property
    def setting(self):
        """Everything but the method and the seed, as text."""
        return json.dumps({k: v for k, v in self.config.items() if k not in NOT_A_SETTING}, sort_keys=True)


def read_rows(path):
    """A CSV file's rows, dicts of text. Raises ValueError where the file is torn."""
    text = path.read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    if not text.endswith("\n") or not rows or any(None in row.values() or None in row for row in rows):
        raise ValueError("its last line is torn")
    return rows


def columns(rows):
    """Rows of text -> {column: array}, of numbers where all of a column are."""
    arrays = {}
    for name in rows[0]:
        try:
            arrays[name] = np.array([float(row[name]) for row in rows])
        except ValueError:
            arrays[name] = np.array([row[name] for row in rows])
    return arrays


def read_csv(path):
    """{column: array}, of numbers where all of a column are. Raises ValueError where the file is torn."""
    return columns(read_rows(path))


def check_version(folder, config):
    if config.get("format") not in READABLE:
        raise UserError(f"{folder} was written by another version: format {config.get('format')}, not {FORMAT}")


DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, csv.Error)


def checked(run, what):
    """The run, where it is whole and finished. Raises ValueError that says what is wrong; `what` names the files."""
    try:
        if missing := {"loss", "seed", "prompts", "rollouts", "lr"} - run.config.keys() | NEEDED - run.log.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        if words := [name for name, values in run.log.items() if values.dtype.kind != "f"]:
            raise ValueError(f"{words[0]} is not a number")
        # a damaged config raises here, and not where it is used
        hash((run.method, label(run.method), describe(run.config), order(run)[-1] + 0, int(run.log["step"][-1])))
        unfinished = run.log["step"][-1] < run.config["steps"]
    except DAMAGE as error:
        raise ValueError(f"{what} is half-written or damaged ({error})") from None
    if unfinished:
        raise ValueError(f"log.csv ends at step {int(run.log['step'][-1])} of {run.config['steps']}")
    return run


def read_run(folder):
    """One run. Raises ValueError that names what is missing or half-written, UserError on the logs of another version."""
    for name in ("config.json", "log.csv"):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    what = "config.json or log.csv"
    try:
        config = json.loads((folder / "config.json").read_text())
        check_version(folder, config)
        log = read_csv(folder / "log.csv")
    except DAMAGE as error:
        raise ValueError(f"{what} is half-written or damaged ({error})") from None
    run = checked(Run(folder, config, log, {}), what)
    for name in TABLES:
        try:
            if (folder / f"{name}.csv").exists():
                run.tables[name] = read_csv(folder / f"{name}.csv")
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{name}.csv is damaged ({error})") from None
    return run


def is_finished(folder, diagnostics=False):
    """Whether a run's config and log are whole, its samples, which are written last, there, and diagnostics, if asked for."""
    try:
        run = read_run(folder)
        measured = not diagnostics or run.tables["entanglement"]["step"][-1] == run.config["steps"]
    except (ValueError, KeyError, OSError, UserError):
        return False
    return measured and (folder / "samples.txt").exists()


def run_folders(root):
    """Folders with a config.json, but for those inside of one, such as the checkpoints of full_scale/."""
    folders = {path.parent for path in root.glob("**/config.json")}
    return sorted(folder for folder in folders if folder.parent not in folders)


def distinct(readers):
    """{folder: function that reads its run} -> [Run], sorted; names on stderr what it leaves out."""
    runs = {}
    for folder, read in readers.items():
        try:
            run = read()
            key = run.setting, run.method, run.config["seed"]
            if key in runs:
                raise ValueError("another folder holds a run of the same settings and seed")
            runs[key] = run
        except ValueError as error:
            print(f"left out {folder}: {error}", file=sys.stderr)
    return sorted(runs.values(), key=order)


def read_runs(folders):
    """[Run] of folders of a run each, sorted; names on stderr what it leaves out."""
    return distinct({folder: functools.partial(read_run, folder) for folder in folders})


def config_of(row):
    """A row of runs.csv -> the run's config. A name with dots stands for a value in dicts; an empty cell for no value."""
    config, names = {}, {column: name for name, column in RENAMED.items()}
    for column, text in row.items():
        if text and column not in ("id", "experiments"):
            *parents, name = names.get(column, column).split(".")
            place = config
            for parent in parents:
                place = place.setdefault(parent, {})
            try:
                place[name] = json.loads(text)
            except ValueError:
                place[name] = text
    return config


def table_rows(path):
    """The rows of a table, dicts of text; none where there is no file. Raises UserError where it is torn."""
    try:
        return read_rows(path) if path.exists() else []
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def read_table(path):
    """{id: the rows of that run}, dicts of text, without the columns that the run does not have."""
    rows = table_rows(path)
    if rows and "id" not in rows[0]:
        raise UserError(f"{path}: damaged (no id)")
    runs = by(rows, lambda row: row.pop("id"))  # no column of the run's own
    for some in runs.values():
        for name in [name for name in some[0] if not any(row[name] for row in some)]:
            for row in some:
                del row[name]
    return runs


def read_tables(root):
    """[Run] of a folder of tables, such as results/. Raises UserError where a table is torn."""
    try:
        rows = table_rows(root / "runs.csv")
        configs = {row["id"]: (config_of(row), tuple(row["experiments"].split())) for row in rows}
    except DAMAGE as error:
        raise UserError(f"{root / 'runs.csv'}: damaged ({error})") from None
    if not (root / "curves.csv").is_file():
        raise UserError(f"{root / 'curves.csv'}: no such file")
    curves, *tables = (
        {run: columns(rows) for run, rows in read_table(root / f"{name}.csv").items()} for name in ("curves", *TABLES)
    )
    readers = {}
    for run, (config, experiments) in configs.items():
        check_version(root / run, config)
        own = {name: table[run] for name, table in zip(TABLES, tables) if run in table}
        made = Run(root / run, config, curves.get(run, {}), own, experiments)
        readers[made.folder] = functools.partial(checked, made, "its row of runs.csv or its rows of curves.csv")
    return distinct(readers)


def read_folder(root):
    """[Run] of a folder in either form. Raises UserError where it holds no finished run."""
    if not os.path.isdir(root):
        raise UserError(f"{root} is not a folder")
    runs = read_tables(root) if (root / "runs.csv").is_file() else read_runs(run_folders(root))
    if not runs:
        raise UserError(f"no finished run below {root}")
    return runs


def order(run):
    """Few steps first, many prompts, the default learning rate, then the losses as in LOSSES; then by seed."""
    c = run.config
    method = [list(LOSSES).index(c["loss"]), run.get("lam"), *(str(run.get(name)) for name in METHOD if name != "lam")]
    return c["steps"], -c["prompts"], -c["lr"], run.setting, method, c["seed"]


def where(runs, **values):
    """The runs whose configuration has these values; a tuple stands for any of its members."""
    return [r for r in runs if all(r.get(k) in (v if isinstance(v, tuple) else (v,)) for k, v in values.items())]


def by(runs, key):
    """{key(run): [Run]}, in order."""
    groups = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def fpa_runs(runs, lam=2.0, target="both"):
    return where(runs, loss="fpa", lam=lam, target=target)


def by_method(runs):
    return by(runs, lambda run: run.method)


def by_seed(runs):
    """{seed: Run} of one method."""
    return {run.config["seed"]: run for run in runs}


def of_experiment(runs, name):
    """The runs of an experiment of study/experiments.py or a search of study/tune.py, where they come from tables."""
    return [run for run in runs if name in run.experiments]


# Of the runs that chose settings (1000 to 1004) and the default task (2000 to 2004). No claim is measured on these seeds.
TUNING_SEEDS = (*range(1000, 1005), *range(2000, 2005))
SEEDS = range(3000, 3008)  # of the claims' runs, and of nothing else
METRIC = "test_accuracy_0.7"  # the primary one of docs/protocol.md


def reported(runs):
    """The runs of the other seeds; all, where there are no others."""
    return [run for run in runs if run.config["seed"] not in (*TUNING_SEEDS, *SEEDS)] or runs


def main_runs(runs):
    """The reported runs of the setting with the most methods, of those that tie with the most runs, then the first."""
    return max(by(reported(runs), lambda run: run.setting).values(), key=lambda some: (len(by_method(some)), len(some)))


def varying(runs, *names):
    """The reported runs that share all of the main runs' setting but the values of these names."""
    main = main_runs(runs)[0].config
    same = [key for key in main if key not in (*NOT_A_SETTING, *names)]
    return [run for run in reported(runs) if all(run.config.get(key) == main[key] for key in same)]


def with_table(runs, name):
    return [run for run in runs if name in run.tables]


# --- numbers


def mean_and_interval(values):
    """(seeds, ...) -> mean over seeds and half-width of its 95 % confidence interval (NaN for one seed)."""
    values = np.asarray(values, dtype=float)
    freedom = len(values) - 1
    t = T_QUANTILE[freedom] if freedom < len(T_QUANTILE) else 1.96 + 2.5 / freedom  # the latter within 1 %
    spread = values.std(axis=0, ddof=1) if freedom else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), t * spread / np.sqrt(len(values))


def last(column):
    """run -> a column's value at the last evaluation."""
    return lambda run: run.log[column][-1]


final, metric = last("accuracy"), last(METRIC)


def each(runs, value):
    """value(run) of every seed of {seed: run} (seeds,)."""
    return np.array([value(run) for _, run in sorted(runs.items())])


def paired(ours, theirs, value=metric):
    """value(run) of one method minus that of another, of the seeds that both have (seeds,)."""
    return np.array([value(ours[seed]) - value(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())])


def fall(run):
    """Of pass@1 at temperature 0.7 on validation problems, from its peak to the last evaluation."""
    return run.log["accuracy_0.7"].max() - run.log["accuracy_0.7"][-1]


def share_down(run, steps=200, rows=""):
    """Of the first steps, those whose batch lowers its correct rows; with rows "_others", correct rows of other problems."""
    table = run.tables["batch"]
    return np.mean((table[f"down{rows}"] > table[f"up{rows}"])[table["step"] < steps])


def ratio_of_coefficients(run):
    """C_l |y| / C_w |y|, mean over training; NaN where a loss's coefficients change their sign, or where nothing is logged."""
    correct, incorrect = (run.log[f"coefficient_{kind}"][1:] for kind in ("correct", "incorrect"))
    return np.mean(incorrect / correct) if (correct > 0).all() and (incorrect >= 0).all() else np.nan


def tokens(log):
    """Completion tokens sampled or trained on so far."""
    return log["tokens_sampled"] + log["tokens_trained"]


def label(method):
    """A method's name in legends and tables: its loss, and the hyperparameters that differ from the loss's defaults."""
    values = dict(zip(METHOD, method))
    row, lam, target = LOSSES[values.pop("loss")], values.pop("lam"), values.pop("target")
    name = row.label + (" with FPA" if lam and row.has_fpa_form and not row.form_of else "")
    words = [f"λ = {lam:g}"] if lam else []
    for key, value in values.items():
        if value is True:
            name += f" ({HYPERPARAMETERS[key].symbol})"
        elif value is not None and value != row.defaults.get(key):
            words.append(f"{HYPERPARAMETERS[key].symbol} = {value if isinstance(row.defaults.get(key), str) else f'{value:g}'}")
    return ", ".join([name, *words]) + (f", {target} only" if target not in (None, "both") else "")


def describe(config):
    if "ops" in config:  # the toy's
        task = f"task {config.get('task', 'slips')}, {config['ops']} operations"
        task += f" ({config['eval_ops']} in evaluations)" if "eval_ops" in config else ""
    else:  # of full_scale/
        task = config["init"]
    size = f"{config['prompts']} prompts × {config['rollouts']} rollouts"
    return f"{task}, {size}, {config['steps']} steps, lr {config['lr']:g}"


def summary(runs):
    """Accuracy at the start, the best and the last evaluation: a line a method, mean and 95 % interval over seeds, as text."""
    lines, settings = [], list(by(runs, lambda run: run.setting).values())
    titles = [describe(some[0].config) for some in settings]
    for title, some in zip(titles, settings):
        if titles.count(title) > 1:
            title += f", evaluated every {some[0].config['eval_every']} steps"
        heads = ("start", "best", "final", "greedy start", "greedy final")
        lines += [title, f"{'':32}{'seeds':>6}" + "".join(f"{head:>15}" for head in heads)]
        for method, seeds in by_method(some).items():
            columns = [(run.log["accuracy"], run.log["accuracy_greedy"]) for run in seeds]
            table = np.array([[a[0], a.max(), a[-1], greedy[0], greedy[-1]] for a, greedy in columns])
            cells = [f"{m:.3f} ± {h:.3f}" if len(seeds) > 1 else f"{m:.3f}" for m, h in zip(*mean_and_interval(table))]
            lines.append(f"{label(method):32}{len(seeds):>6}" + "".join(f"{cell:>15}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


# --- tuning


def family(run):
    """What is tuned as one: a loss as published, or in its FPA form, whose λ may be tuned too."""
    return run.config["loss"], run.get("lam") > 0


def best_settings(runs):
    """{family: (method, lr)} of the highest mean final accuracy over the tuning seeds, of families that were tuned."""
    chosen = {}
    for name, some in by(where(runs, seed=TUNING_SEEDS), family).items():
        tried = by(some, lambda run: (run.method, run.config["lr"]))
        if len(tried) > 1:
            chosen[name] = max(tried, key=lambda key: np.mean([final(run) for run in tried[key]]))
    return chosen


def tuned(runs):
    """{family: [run]} at its best settings, on the other seeds; empty where nothing was tuned."""
    others = by(varying(runs, "lr"), lambda run: (run.method, run.config["lr"]))
    return {name: others[best] for name, best in best_settings(runs).items() if best in others}


# --- diagnostics


def extrapolated(run, column="kl"):
    """{(t, later, lam): (the future policy's, the present one's)}: a column of the table beside its value at lam 0."""
    table = run.tables["extrapolation"]
    rows = list(zip(table["t"].astype(int).tolist(), table["later"].astype(int).tolist(), table["lam"].tolist(), table[column]))
    present = {(t, later): value for t, later, lam, value in rows if lam == 0}
    return {(t, later, lam): (value, present[t, later]) for t, later, lam, value in rows if lam}


def forecasts(run, accepts, column="kl"):
    """(future's, present's) of a column at t' = (1 + lam) t for the λ of 1 and 2, over the t that are accepted: (2, …)."""
    pairs = extrapolated(run, column).items()
    return np.array([pair for (t, later, lam), pair in pairs if lam in (1, 2) and later == (1 + lam) * t and accepts(t)]).T


def forecast(accepts, column="kl"):
    """The future policy's distance over the present one's, geometric mean: a function of a run."""
    return lambda run: np.exp(np.mean(np.log(np.divide(*forecasts(run, accepts, column)))))


def forecast_by_step(runs, lam=2):
    """{t: KL of the future policy of step t from the policy of step (1 + λ) t, over the present policy's}: geometric means.

    A value below 1 says that the future policy is nearer to the policy that it is meant to be.
    """
    logs = {}
    for run in runs:
        for (t, later, at), pair in extrapolated(run).items():
            if at == lam and later == (1 + lam) * t:
                logs.setdefault(t, []).append(np.log(np.divide(*pair)))
    return {t: np.exp(np.mean(values)) for t, values in sorted(logs.items())}
