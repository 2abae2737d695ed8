"""What the figures share: colours, curves, legends, and the loop that draws figures into a folder.

A figure is a function `figure_…` of runs. It returns (figure, the runs that it shows), or None where it has no runs to show.
The first paragraph of its docstring is the caption, which says how to read it. Several seeds become their mean and its 95 %
confidence interval (Student's t).
"""

import hashlib
import json
import textwrap

import matplotlib

matplotlib.use("Agg")  # no window, so that it draws on a server too
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D

from plumbing.files import replacing
from study.results import by, by_method, describe, final, fpa_runs, label, mean_and_interval, where
from toy_math.tokenizer import ALPHABET

PI, PIHAT = r"$\bar{\pi}$", r"future $\bar{\pi}$"  # under the present and the future policy
CHARACTERS = ALPHABET + "▪▪▪"  # ▪: EOS
MOST_LINES = 7  # in a panel; more cannot be told apart
LAST_OR_BEST = {"Final accuracy": final, "Best accuracy": lambda run: run.log["accuracy"][1:].max()}
COLOURS = {  # Okabe and Ito's palette and some of Paul Tol's colours; any few can be told apart, all of them cannot
    "off_rl": "#D55E00", "fpa": "#0072B2", "sft": "#009E73", "constant": "#CC79A7", "sharpened": "#E69F00", "grpo": "#333333",
    "simper": "#56B4E9", "dpo": "#882255", "rpo": "#999933", "kto": "#AA4499", "a_star_po": "#332288", "pessimistic": "#999999",
    "reinforce": "#8C6D1F", "topr": "#117733", "future_topr": "#88CCEE", "power": "#CC3311", "asymre": "#DDAA33",
    "nsr": "#661100",
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
    split = "validation" if "test_accuracy" in runs[0].log else "test"  # the first study's accuracies are on test problems
    split = "held-out" if "init" in runs[0].config else split  # at full scale
    axis.set(title=f"Accuracy on {split} problems", ylabel="accuracy, T = 1", ylim=(0, 1))


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
    legend(figure, methods)
    return figure


def styled(axis, names, fontsize=8):
    """A panel's own legend of its line styles: {name: style}."""
    axis.legend(handles=[Line2D([], [], color="0.3", linestyle=s, label=n) for n, s in names.items()], fontsize=fontsize)


def few(runs, most=6):
    """At most so many methods: Off-RL and FPA at λ = 2 where there are more, or the first ones where both are absent."""
    if len(by_method(runs)) > most:
        runs = where(runs, loss="off_rl") + fpa_runs(runs) or runs
    return [run for some in list(by_method(runs).values())[:most] for run in some]


# --- single tokens

HIT, MEDIAN = 0.1, 0.5  # shares of the recorded pairs that are dragged down more than the one shown


def texts(tokens):
    """The texts of a trace's tokens, as tokens.csv holds them: ids of the toy's tokenizer, or a JSON list of texts."""
    return json.loads(tokens) if tokens.startswith("[") else [CHARACTERS[int(token)] for token in tokens.split()]


def by_drag(table):
    """{pair: its correct trace's summed log-ratio at the last step} of a run's tokens, the pair dragged down most first."""
    at = (table["side"] == "correct") & (table["step"] == table["step"].max())
    sums = {int(pair): sum(map(float, text.split())) for pair, text in zip(table["pair"][at], table["logratios"][at])}
    return dict(sorted(sums.items(), key=lambda item: item[1]))


def pair_at(share, table):
    """The pair that this share of a table's pairs is dragged down more than."""
    pairs = list(by_drag(table))
    return pairs[int(share * len(pairs))]


# --- a folder of figures


def fingerprint(runs):
    """Of the logs and tables behind a figure; stored in the PNG, so that a test can tell whether a committed one is theirs."""
    rows = [(run.config, [{k: v.tolist() for k, v in log.items()} for log in (run.log, *run.tables.values())]) for run in runs]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def caption(function):
    """A figure's: the first paragraph of its docstring."""
    return " ".join(function.__doc__.split("\n\n")[0].split())


def draw_all(figures, runs, to, shown):
    """Draw {name: figure} into the folder `to`, where the runs have something for it; prints what was drawn from what.

    shown: {name: what the figure shows of several seeds}, where this is not the mean and its interval
    """
    to.mkdir(parents=True, exist_ok=True)
    for name, function in figures.items():
        if not (drawn := function(runs)):
            continue
        figure, chosen = drawn
        for axis in figure.axes:
            axis.title.set_fontsize(10)
            axis.spines[["top", "right"]].set_visible(False)
        seeds = sorted({len(some) for some in by(chosen, lambda run: (run.setting, run.method)).values()})
        counted = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}"
        if seeds[-1] > 1:
            counted += f": {shown.get(name, 'mean and 95 % interval')}"
        settings = by(chosen, lambda run: run.setting)
        setting = describe(chosen[0].config) if len(settings) == 1 else f"{len(settings)} settings"
        figure.suptitle(f"{textwrap.fill(caption(function), 140)}\n{setting}; {counted}", fontsize=9)
        with replacing(to / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Description": fingerprint(chosen)})
        plt.close(figure)
        print(f"figure        {to / name}.png   ({counted}; {setting})")


def figures_of(names):
    """{name without `figure_`: function} of a module's globals."""
    return {name.removeprefix("figure_"): value for name, value in names.items() if name.startswith("figure_")}
