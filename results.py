"""Reading the runs' logs and choosing among them; means with their intervals. No model is loaded."""

import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

METHOD = ("loss", "lam", "target", "beta", "alpha", "weight", "shift", "dapo")
NOT_A_SETTING = (*METHOD, "seed", "measured", "environment")
FORMAT = 3  # of logs and cached stages, part of every digest: raise it when the meaning of one changes
NEEDED = set(
    "step accuracy accuracy_greedy logratio_correct logratio_incorrect pi_correct pi_incorrect coefficient_correct "
    "coefficient_incorrect below_0.2_pi below_0.2_pihat seconds tokens_trained tokens_sampled".split()
)  # columns of that format
TABLES = ("entanglement.csv", "extrapolation.csv", "tokens.csv")  # of diagnostics.py
NAMES = {
    "off_rl": "Off-RL", "fpa": "FPA", "simper": "SimPER", "dpo": "DPO", "rpo": "RPO", "kto": "KTO", "a_star_po": "A*-PO",
    "pessimistic": "pessimistic", "sft": "SFT", "reinforce": "REINFORCE", "constant": "constant", "sharpened": "sharpened",
    "grpo": "GRPO",
}  # fmt: skip
T_QUANTILE = [np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 %, by degrees of freedom


# --- reading


class Run(NamedTuple):
    folder: Path
    config: dict
    log: dict  # {column: array}

    @property
    def method(self):
        return tuple(self.config[name] for name in METHOD)

    @property
    def setting(self):
        """Everything but the method and the seed, as text."""
        return json.dumps({k: v for k, v in self.config.items() if k not in NOT_A_SETTING}, sort_keys=True)


class VersionError(Exception):
    """The log is another version's; shown as one line, exit code 2."""


def read_csv(path):
    """{column: array}, of numbers where all of a column are. Raises ValueError where the file is torn."""
    text = path.read_text()
    rows = list(csv.DictReader(text.splitlines()))
    if not text.endswith("\n") or not rows or any(None in row.values() or None in row for row in rows):
        raise ValueError("its last line is torn")
    columns = {}
    for name in rows[0]:
        try:
            columns[name] = np.array([float(row[name]) for row in rows])
        except ValueError:
            columns[name] = np.array([row[name] for row in rows])
    return columns


def read_run(folder):
    """One run. Raises ValueError that names what is missing or half-written, VersionError on the logs of another version."""
    for name in ("config.json", "log.csv"):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("format") != FORMAT:
            raise VersionError(f"{folder} was written by another version: format {config.get('format')}, not {FORMAT}")
        log = read_csv(folder / "log.csv")
        if missing := {*METHOD, "seed", "prompts", "rollouts", "lr"} - config.keys() | NEEDED - log.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        if words := [name for name, values in log.items() if values.dtype.kind != "f"]:
            raise ValueError(f"{words[0]} is no number")
        run, last, unfinished = Run(folder, config, log), int(log["step"][-1]), log["step"][-1] < config["steps"]
        hash((run.method, label(run.method), describe(config), order(run)[-1] + 0))  # what another kind of value would break
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, csv.Error) as error:
        raise ValueError(f"config.json or log.csv is half-written or damaged ({error})") from None
    if unfinished:
        raise ValueError(f"log.csv ends at step {last} of {config['steps']}")
    for name in TABLES:
        try:
            if (folder / name).exists():
                read_csv(folder / name)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{name} is damaged ({error})") from None
    return run


def run_folders(root):
    """Folders with a config.json, but for those inside of one, such as the checkpoints of full_scale/."""
    folders = {path.parent for path in root.glob("**/config.json")}
    return sorted(folder for folder in folders if folder.parent not in folders)


def read_runs(folders):
    """[Run], sorted; names on stderr what it leaves out."""
    runs = {}
    for folder in folders:
        try:
            run = read_run(folder)
            key = run.setting, run.method, run.config["seed"]
            if key in runs:
                raise ValueError("another folder holds a run of the same settings and seed")
            runs[key] = run
        except ValueError as error:
            print(f"plots.py: left out {folder}: {error}", file=sys.stderr)
    return sorted(runs.values(), key=order)


def order(run):
    """Few steps first, many prompts, the default learning rate, then Off-RL, FPA, the others as in NAMES; then by seed."""
    c = run.config
    method = [list(NAMES).index(c["loss"]), c["lam"], str(c["target"]), *(str(c[name]) for name in METHOD[3:])]
    return c["steps"], -c["prompts"], -c["lr"], run.setting, method, c["seed"]


def where(runs, **values):
    """The runs whose configuration has these values; a tuple stands for any of its members."""
    return [r for r in runs if all(r.config[k] in (v if isinstance(v, tuple) else (v,)) for k, v in values.items())]


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


TUNING_SEEDS = (1000, 1001)  # of the runs that chose the learning rates, and that no other number comes from


def reported(runs):
    """The runs of the other seeds; all, where there are no others."""
    return [run for run in runs if run.config["seed"] not in TUNING_SEEDS] or runs


def main_runs(runs):
    """The reported runs of the setting with the most methods, the first of those that tie."""
    return max(by(reported(runs), lambda run: run.setting).values(), key=lambda some: len(by_method(some)))


def varying(runs, *names):
    """The reported runs that share all of the main runs' setting but the values of these names."""
    main = main_runs(runs)[0].config
    same = [key for key in main if key not in (*NOT_A_SETTING, *names)]
    return [run for run in reported(runs) if all(run.config.get(key) == main[key] for key in same)]


def with_file(runs, name):
    return [run for run in runs if (run.folder / name).is_file()]


# --- numbers


def mean_and_interval(values):
    """(seeds, ...) -> mean over seeds and half-width of its 95 % confidence interval (NaN for one seed)."""
    values = np.asarray(values, dtype=float)
    freedom = len(values) - 1
    t = T_QUANTILE[freedom] if freedom < len(T_QUANTILE) else 1.96 + 2.5 / freedom  # the latter within 1 %
    spread = values.std(axis=0, ddof=1) if freedom else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), t * spread / np.sqrt(len(values))


def final(run):
    return run.log["accuracy"][-1]


def tokens(log):
    """Completion tokens sampled or trained on so far."""
    return log["tokens_sampled"] + log["tokens_trained"]


def label(method):
    loss, lam, target, beta, alpha, weight, shift, dapo = method
    words = [NAMES[loss] + (" with FPA" if lam and loss not in ("fpa", "sharpened") else "") + (" (DAPO)" if dapo else "")]
    words += [f"λ = {lam:g}"] if lam else []
    words += [f"{value:g}" for value in (weight, shift) if value]
    words += [f"β = {beta:g}"] if beta not in (None, 1e-3 if loss == "a_star_po" else 0.1) else []
    words += [f"α = {alpha:g}"] if alpha not in (None, 1.0) else []
    return ", ".join(words) + (f", {target} only" if target not in (None, "both") else "")


def describe(config):
    task = f"{config['ops']} operations" if "ops" in config else config["init"]  # the toy's, or of full_scale/
    measured = f", accuracy at T = {config['eval_temperature']:g}" if "ops" in config else ""
    size = f"{config['prompts']} prompts × {config['rollouts']} rollouts"
    return f"{size}, {task}, {config['steps']} steps, lr {config['lr']:g}{measured}"


def summary(runs):
    """Accuracy at the start, the best and the last evaluation: a line a method, mean and 95 % interval over seeds, as text."""
    lines = []
    for some in by(runs, lambda run: run.setting).values():
        heads = ("start", "best", "final", "greedy start", "greedy final")
        lines += [describe(some[0].config), f"{'':32}{'seeds':>6}" + "".join(f"{head:>15}" for head in heads)]
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
    return run.config["loss"], run.config["lam"] > 0


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
    """{(t, later, lam): (the future policy's, the present one's)}: a column of extrapolation.csv beside its value at lam 0."""
    table = read_csv(run.folder / "extrapolation.csv")
    rows = list(zip(table["t"].astype(int).tolist(), table["later"].astype(int).tolist(), table["lam"].tolist(), table[column]))
    present = {(t, later): value for t, later, lam, value in rows if lam == 0}
    return {(t, later, lam): (value, present[t, later]) for t, later, lam, value in rows if lam}
