"""Figures and the summary table, drawn from the runs' logs alone (config.json and log.csv; no model is loaded).

    python plots.py runs/          # every finished run below runs/ -> figures/*.png

dynamics.png: accuracy, log-ratios, the probability that weights the gradient, and pi_hat/pi on incorrect trajectories.
prolonged.png: log-ratios, accuracy, and how often pi and pi_hat fell below 0.2 on incorrect training rows.
Where the runs have several settings, the first shows the one with the fewest steps, and the second the one with the most
(and, of those, with the fewest prompts).
Several seeds become their mean and a band, its 95 % confidence interval (Student's t).
"""

import argparse
import csv
import hashlib
import json
import sys
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, so that it draws on a server too
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

METHOD = ("loss", "lam", "target")
PI, PIHAT = r"$\bar{\pi}$", r"$\hat{\bar{\pi}}$"  # trajectory probability under the present and under the future policy
CORRECTNESS = {"correct": "-", "incorrect": "--"}  # line styles
# Okabe and Ito's palette, safe for colour-blind readers
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
T_QUANTILE = [np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 %, by degrees of freedom


def read_run(folder):
    """One run's config and its log as {column: array}. Raises ValueError that names what is missing or half-written."""
    for name in ("config.json", "log.csv"):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    try:
        config = json.loads((folder / "config.json").read_text())
        text = (folder / "log.csv").read_text()
        rows = list(csv.DictReader(text.splitlines()))
        if not text.endswith("\n"):
            raise ValueError("its last line is torn")
        log = {column: np.array([float(row[column]) for row in rows]) for column in rows[0]}
        last, steps = int(log["step"][-1]), config["steps"]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"config.json or log.csv is half-written ({error})") from None
    if last < steps:
        raise ValueError(f"log.csv ends at step {last} of {steps}")
    return config, log


def run_folders(root):
    return sorted(path.parent for path in root.glob("**/config.json"))


def read_runs(folders):
    """{setting: {method: [(config, log) of each seed]}}; names on stderr what it leaves out."""
    runs = {}
    for folder in folders:
        try:
            config, log = read_run(folder)
            setting = json.dumps({k: v for k, v in config.items() if k not in (*METHOD, "seed", "environment")}, sort_keys=True)
            key = setting, tuple(config[name] for name in METHOD), config["seed"]
            if key in runs:
                raise ValueError("another folder holds a run of the same settings and seed")
            runs[key] = config, log
        except ValueError as error:
            print(f"plots.py: left out {folder}: {error}", file=sys.stderr)
    groups = {}
    for (setting, method, _), run in sorted(runs.items(), key=order):
        groups.setdefault(setting, {}).setdefault(method, []).append(run)
    return groups


def order(item):
    """Settings with few steps first, then those with many prompts; Off-RL, then the others by name and λ; then by seed."""
    (setting, (loss, lam, target), seed), (config, _) = item
    return config["steps"], -config["prompts"], setting, loss != "off_rl", loss, lam, target or "", seed


def label(method):
    loss, lam, target = method
    if loss == "off_rl":
        return "Off-RL"
    return f"FPA, λ = {lam:g}" + ("" if target == "both" else f", {target} only")


def mean_and_interval(values):
    """(seeds, ...) -> mean over seeds and half-width of its 95 % confidence interval (NaN for one seed)."""
    values = np.asarray(values, dtype=float)
    freedom = len(values) - 1
    t = T_QUANTILE[freedom] if freedom < len(T_QUANTILE) else 1.96 + 2.5 / freedom  # the latter within 1 %
    spread = values.std(axis=0, ddof=1) if freedom else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), t * spread / np.sqrt(len(values))


def summary(groups):
    """Accuracy at the start, the best and the last evaluation of every run, and its mean and 95 % interval, as text."""
    lines = []
    for setting, methods in groups.items():
        heads = ("start", "best", "final", "greedy start", "greedy final")
        lines += [describe(setting), f"{'':20}{'seed':>5}" + "".join(f"{head:>15}" for head in heads)]
        for method, runs in methods.items():
            columns = [(log["accuracy"], log["accuracy_greedy"]) for _, log in runs]
            table = np.array([[a[0], a.max(), a[-1], greedy[0], greedy[-1]] for a, greedy in columns])
            for (config, _), values in zip(runs, table):
                lines.append(f"{label(method):20}{config['seed']:>5}" + "".join(f"{v:>15.3f}" for v in values))
            if len(runs) > 1:
                cells = "".join(f"{f'{m:.3f} ± {h:.3f}':>15}" for m, h in zip(*mean_and_interval(table)))
                lines.append(f"{label(method):20}{'mean':>5}{cells}")
        lines.append("")
    return "\n".join(lines)


def describe(setting):
    c = json.loads(setting)
    return (
        f"{c['prompts']} prompts × {c['rollouts']} rollouts, {c['ops']} operations, {c['steps']} steps, lr {c['lr']:g}, "
        f"accuracy at T = {c['eval_temperature']:g}"
    )


def coloured(methods):
    """(colour, method, runs) of every method; Off-RL's colour is its own, also where it is missing."""
    others = cycle(COLOURS[1:])
    return [(COLOURS[0] if method[0] == "off_rl" else next(others), method, runs) for method, runs in methods.items()]


def draw(axis, runs, values, colour, style="-"):
    """One curve: the mean over seeds of values(log), with its band."""
    steps = runs[0][1]["step"]
    mean, half = mean_and_interval([values(log) for _, log in runs])
    axis.plot(steps, mean, color=colour, linestyle=style, linewidth=1.8)
    if len(runs) > 1:
        axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)


def panel_accuracy(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["accuracy"], colour)
        axis.axhline(np.mean([log["accuracy"][0] for _, log in runs]), color="0.6", linewidth=0.8, zorder=0)
    axis.set(title="Accuracy on test problems", ylabel="pass@1", ylim=(0, 1))


def panel_logratios(axis, methods):
    for colour, _, runs in coloured(methods):
        for kind, style in CORRECTNESS.items():
            draw(axis, runs, lambda log: log[f"logratio_{kind}"], colour, style)
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.set(title="Log-ratio of training trajectories", ylabel=r"$\log\,\pi_\theta(y|x)-\log\,\pi_{ref}(y|x)$  [nats]")
    axis.set_yscale("symlog", linthresh=1)  # so that -0.5 and -50 can both be read
    axis.yaxis.set_major_formatter("{x:g}")


def panel_coefficient(axis, methods):
    for colour, (_, _, target), runs in coloured(methods):
        for kind, style in CORRECTNESS.items():
            policy = "pihat" if target in ("both", kind) else "pi"  # Off-RL's target is None
            draw(axis, runs, lambda log: log[f"{policy}_{kind}"], colour, style)
    axis.set(title="Probability that weights the gradient", ylabel=f"{PI} (Off-RL), {PIHAT} (FPA)", ylim=(0, 1))


def panel_ratio(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["pihat_incorrect"] / log["pi_incorrect"], colour, CORRECTNESS["incorrect"])
    axis.set(title="Brake on incorrect trajectories", ylabel=f"mean {PIHAT} / mean {PI}", ylim=(0, 1.1))


def panel_below(axis, methods):
    for colour, method, runs in coloured(methods):
        draw(axis, runs, lambda log: log["below_0.2_pi"] / 1000, colour, "-")
        if method[0] != "off_rl":
            draw(axis, runs, lambda log: log["below_0.2_pihat"] / 1000, colour, ":")
    axis.set(title="Incorrect training rows below 0.2", ylabel="running count [thousands]")
    axis.legend(handles=[Line2D([], [], color="0.3", linestyle=s, label=n) for n, s in ((PI, "-"), (PIHAT, ":"))], fontsize=10)


FIGURES = {
    "dynamics.png": (0, (2, 2), [panel_accuracy, panel_logratios, panel_coefficient, panel_ratio]),
    "prolonged.png": (-1, (1, 3), [panel_logratios, panel_accuracy, panel_below]),
}


def fingerprint(methods):
    """Of the logs behind a figure; stored in the PNG, so that a test can tell whether a committed figure is theirs."""
    rows = [
        (config, {name: column.tolist() for name, column in log.items()}) for runs in methods.values() for config, log in runs
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def draw_figures(groups, to):
    """Draw every figure from what `read_runs` gave into the folder `to`; prints what was drawn from what."""
    groups = list(groups.items())
    to.mkdir(parents=True, exist_ok=True)
    for name, (which, (height, width), panels) in FIGURES.items():
        setting, methods = groups[which]
        figure, axes = plt.subplots(height, width, figsize=(10, 3.4 * height), layout="constrained")
        for axis, panel in zip(axes.flat, panels):
            panel(axis, methods)
            axis.title.set_fontsize(11)
            axis.set_xlabel("training step")
            axis.locator_params(axis="x", nbins=5)
            axis.spines[["top", "right"]].set_visible(False)
        seeds = sorted({len(runs) for runs in methods.values()})
        counted = f"{'–'.join(map(str, seeds))} seed{'s: mean and 95 % interval' if seeds[-1] > 1 else ''}"
        colours = [Line2D([], [], color=c, label=label(m)) for c, m, _ in coloured(methods)]
        styles = [Line2D([], [], color="0.3", linestyle=s, label=f"{kind} trajectories") for kind, s in CORRECTNESS.items()]
        figure.legend(handles=colours + styles, loc="outside lower center", ncols=4)
        figure.suptitle(f"{describe(setting)}\n{counted}", fontsize=10)
        figure.savefig(to / name, dpi=110, metadata={"Description": fingerprint(methods)})
        plt.close(figure)
        print(f"figure        {to / name}   ({counted}; {describe(setting)})")


def run(argv=None):
    """The command: print the summary and draw the figures, or one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, no usage
    parser.add_argument("runs", nargs="?", default=Path("runs"), type=Path, help="folder whose runs are drawn")
    parser.add_argument("--to", default=Path("figures"), type=Path, help="folder that the figures are written to")
    args = parser.parse_args(argv)
    if not args.runs.is_dir():
        parser.error(f"{args.runs} is not a folder")
    groups = read_runs(run_folders(args.runs))
    if not groups:
        parser.error(f"no finished run below {args.runs}")
    print(summary(groups))
    try:
        draw_figures(groups, args.to)
    except OSError as error:
        parser.error(f"argument --to: {error}")


if __name__ == "__main__":
    run()
