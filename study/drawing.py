"""What the figures share: colours, curves, legends, and the loop that draws figures into a folder.

A figure is a function `figure_…` of runs. It returns (figure, the runs that it shows), or None where it has no runs to show.
Its docstring is the caption. Several seeds become their mean and its 95 % confidence interval (Student's t).
"""

import hashlib
import json

import matplotlib

matplotlib.use("Agg")  # no window, so that it draws on a server too
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D

from plumbing.files import replacing
from study.results import by, by_method, describe, final, fpa_runs, label, mean_and_interval, where

PI, PIHAT = r"$\bar{\pi}$", r"future $\bar{\pi}$"  # trajectory probability under the present and under the future policy
CORRECTNESS = {"correct": "-", "incorrect": "--"}  # line styles
LAST_OR_BEST = {"Final accuracy": final, "Best accuracy": lambda run: run.log["accuracy"].max()}
COLOURS = {  # Okabe and Ito's palette and some of Paul Tol's colours, safe for colour-blind readers
    "off_rl": "#D55E00", "fpa": "#0072B2", "sft": "#009E73", "constant": "#CC79A7", "sharpened": "#E69F00", "grpo": "#333333",
    "simper": "#56B4E9", "dpo": "#882255", "rpo": "#999933", "kto": "#AA4499", "a_star_po": "#332288", "pessimistic": "#999999",
    "reinforce": "#8C6D1F",
}  # fmt: skip
OTHER = "#44AA99"  # of a loss without a colour of its own


def colour_of(loss, index=0):
    """A loss's colour. Further methods of one loss, by their index, take darker and lighter shades of it."""
    rgb = np.array(to_rgb(COLOURS.get(loss, OTHER)))
    ends = [rgb, 0.5 * rgb, 0.5 * rgb + 0.5, 0.75 * rgb + 0.25, 0.25 * rgb, 0.25 * rgb + 0.75]  # white is 1, black 0
    return to_hex(ends[index % len(ends)]).upper()


def coloured(methods):
    """(colour, method, runs) of every method."""
    triples, seen = [], {}
    for method, runs in methods.items():
        index = seen[method[0]] = seen.get(method[0], -1) + 1
        triples.append((colour_of(method[0], index), method, runs))
    return triples


def draw(axis, runs, values, colour, style="-", x=lambda log: log["step"], band=True):
    """One curve: the mean over seeds of values(log), with the band of its interval."""
    mean, half = mean_and_interval([values(run.log) for run in runs])
    at = np.mean([x(run.log) for run in runs], axis=0)
    axis.plot(at, mean, color=colour, linestyle=style, linewidth=1.8)
    if len(runs) > 1 and band:
        axis.fill_between(at, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)


def panel_accuracy(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["accuracy"], colour)
        axis.axhline(np.mean([run.log["accuracy"][0] for run in runs]), color="0.6", linewidth=0.8, zorder=0)
    axis.set(title="Accuracy on test problems", ylabel="pass@1", ylim=(0, 1))


def canvas(height, width, row_height=3.4):
    figure, axes = plt.subplots(height, width, figsize=(10, row_height * height), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def legend(figure, methods, others=()):
    """A line a method, and others, below all panels."""
    colours = [Line2D([], [], color=colour, label=label(method)) for colour, method, _ in coloured(methods)]
    figure.legend(handles=[*colours, *others], loc="outside lower center", ncols=4)


def over_steps(panels, height, width, methods):
    """Panels over training steps, with one legend."""
    figure, axes = canvas(height, width)
    for axis, panel in zip(axes, panels):
        panel(axis, methods)
        axis.set_xlabel("training step")
        axis.locator_params(axis="x", nbins=5)
    styles = [Line2D([], [], color="0.3", linestyle=s, label=f"{kind} trajectories") for kind, s in CORRECTNESS.items()]
    legend(figure, methods, styles)
    return figure


def few(runs, most=6):
    """At most so many methods: all, or Off-RL and FPA at λ = 2 where there are more."""
    if len(by_method(runs)) > most:
        runs = where(runs, loss="off_rl") + fpa_runs(runs) or where(runs, loss=runs[0].config["loss"])
    return runs


# --- a folder of figures


def fingerprint(runs):
    """Of the logs behind a figure; stored in the PNG, so that a test can tell whether a committed figure is theirs."""
    rows = [(run.config, {name: column.tolist() for name, column in run.log.items()}) for run in runs]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def draw_all(figures, runs, to, means_only=()):
    """Draw {name: figure} into the folder `to`, where the runs have something for it; prints what was drawn from what."""
    to.mkdir(parents=True, exist_ok=True)
    for name, function in figures.items():
        if not (drawn := function(runs)):
            continue
        figure, chosen = drawn
        for axis in figure.axes:
            axis.title.set_fontsize(10)
            axis.spines[["top", "right"]].set_visible(False)
        seeds = sorted({len(some) for some in by(chosen, lambda run: (run.setting, run.method)).values()})
        counted = f"{'–'.join(map(str, seeds))} seed{'s' if seeds[-1] > 1 else ''}"
        if seeds[-1] > 1:
            counted += ": mean" if name in means_only else ": mean and 95 % interval"
        settings = by(chosen, lambda run: run.setting)
        setting = describe(chosen[0].config) if len(settings) == 1 else f"{len(settings)} settings"
        figure.suptitle(f"{function.__doc__.splitlines()[0]}\n{setting}; {counted}", fontsize=9)
        with replacing(to / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Description": fingerprint(chosen)})
        plt.close(figure)
        print(f"figure        {to / name}.png   ({counted}; {setting})")


def figures_of(names):
    """{name without `figure_`: function} of a module's globals."""
    return {name.removeprefix("figure_"): value for name, value in names.items() if name.startswith("figure_")}
