"""The curves of the method, from logs: divergence and brake, prolonged training, targets, λ. No model is loaded.

    python plots.py runs/     # every finished run below runs/ -> runs/figures/*.png
    python plots.py results/slips   # the committed runs -> results/slips/figures/*.png

The command also draws the figures of study/figures.py. `python -m study.claims` writes the numbers, results.md.
"""

import os
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from losses import LOSSES
from plumbing.files import printable_path
from plumbing.flags import NO_DEFAULT, command, command_line
from study import drawing, figures, page
from study.drawing import (
    CORRECTNESS,
    LAST_OR_BEST,
    PI,
    PIHAT,
    Line2D,
    canvas,
    colour_of,
    coloured,
    draw,
    few,
    kinds_for,
    legend,
    over_steps,
    panel_accuracy,
)
from study.results import by, by_method, label, main_runs, mean_and_interval, read_folder, summary, where

CORRECT = "logratio_correct"
SPREAD = {(5, 95): 0.22, (25, 75): 0.45}  # percentiles of the correct rows between which a band lies: its opacity

# --- panels


def panel_logratios(axis, methods):
    for colour, _, runs in coloured(methods):
        for kind, style in kinds_for(methods).items():
            draw(axis, runs, lambda log: log[f"logratio_{kind}"], colour, style)
    symlog(axis)
    axis.set(title=f"Log-ratio, {whose(methods)}")


def whose(methods):
    """For a panel's title: the answers that `kinds_for` lets it show."""
    return " and ".join(kinds_for(methods)) + " answers"


def symlog(axis):
    """An axis of log-ratios on which -0.5 and -50 can both be read."""
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.set_yscale("symlog", linthresh=1, subs=range(2, 10))
    axis.set_ylabel("log-ratio [nats], symlog")
    axis.yaxis.set_major_formatter("{x:g}")


def panel_spread(axis, colour, runs):
    """The distribution of correct rows' log-ratios over steps: each percentile's mean over seeds."""

    def mean(name):
        return np.mean([run.log[name] for run in runs], axis=0)

    steps = mean("step")
    for (low, high), alpha in SPREAD.items():
        axis.fill_between(steps, mean(f"{CORRECT}_p{low}"), mean(f"{CORRECT}_p{high}"), color=colour, alpha=alpha, linewidth=0)
    axis.plot(steps, mean(f"{CORRECT}_p50"), color=colour, linewidth=1.8)
    symlog(axis)
    lowest, below = mean(f"{CORRECT}_p5")[-1], mean(f"{CORRECT}_below_0")[-1]
    ends = f"{100 * below:.0f} % of correct rows end\nbelow 0, and 5 % below {lowest:.3g} nats"
    axis.set(title=f"{label(runs[0].method)}: {ends}", xlabel="training step")


def panel_coefficient(axis, methods):
    for colour, _, runs in coloured(methods):
        for kind, style in kinds_for(methods).items():
            draw(axis, runs, lambda log: log[f"coefficient_{kind}"], colour, style)
    axis.set(title=f"Weight C·|y|, {whose(methods)}", ylabel=r"weight of $\nabla$ logp_mean", ylim=(0, None))


def panel_ratio(axis, methods):
    def ratio(log):
        return log["pihat_incorrect"] / np.maximum(log["pi_incorrect"], 1e-300)  # a collapsed policy's is 0

    for colour, _, runs in coloured(methods):
        draw(axis, runs, ratio, colour, CORRECTNESS["incorrect"])
    axis.set(title="Brake on incorrect answers", ylabel=f"mean {PIHAT} / mean {PI}", ylim=(0, 1.1))


def panel_below(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["below_0.2_pi"] / 1000, colour, "-")
        if runs[0].get("lam"):
            draw(axis, runs, lambda log: log["below_0.2_pihat"] / 1000, colour, ":")
    axis.set(title=f"Incorrect rows with {PI} below 0.2", ylabel="running count [thousands]")
    axis.legend(handles=[Line2D([], [], color="0.3", linestyle=s, label=n) for n, s in ((PI, "-"), (PIHAT, ":"))], fontsize=10)


def panel_grad_norm(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["grad_norm"], colour)
    axis.set(title="Gradient norm before clipping at 1", ylabel="norm, log scale", yscale="log")


# --- figures: each returns (figure, the runs behind it), or None


def figure_drag(runs):
    """Left: accuracy. Right: how the log-ratios to the base model of correct training rows are distributed. They should rise. A
    row below 0 lost probability though it is correct: it was dragged down. Each percentile is the mean over seeds.
    """
    chosen = [run for run in few(main_runs(runs), most=2) if f"{CORRECT}_below_0" in run.log]
    if not chosen:
        return None
    methods = by_method(chosen)
    figure, (left, *others) = canvas(1, 1 + len(methods), row_height=4.2)
    panel_accuracy(left, methods)
    left.set_xlabel("training step")
    for axis, (colour, _, some) in zip(others, coloured(methods)):
        draw(left, some, lambda log: log["accuracy_0.7"], colour, ":", band=False)
        panel_spread(axis, colour, some)
        if axis is not others[0]:
            axis.sharey(others[0])
            axis.set_ylabel("")
    styles = [Line2D([], [], color="0.3", linestyle=s, label=f"sampled at T = {t}") for s, t in (("-", 1), (":", 0.7))]
    bands = [
        Patch(color="0.3", alpha=a, linewidth=0, label=f"{low} % to {high} % of rows") for (low, high), a in SPREAD.items()
    ]
    legend(figure, methods, [*styles, *bands, Line2D([], [], color="0.3", label="median row")])
    return figure, chosen


def figure_dynamics(runs):
    """Log-ratios are to the base model: below 0 an answer lost probability. C·|y| is the weight of an answer in
    the gradient. A brake below 1: the future policy weights incorrect answers less than the present one does. A loss
    without a future policy stays at 1.
    """
    chosen = few(main_runs(runs))
    return over_steps([panel_accuracy, panel_logratios, panel_coefficient, panel_ratio], 2, 2, by_method(chosen)), chosen


def figure_prolonged(runs):
    """The longest training. Right: how many incorrect rows so far had a π̄ below 0.2, where their weight is small."""
    most = max(run.config["steps"] for run in runs)
    chosen = few(main_runs(where(runs, steps=most)), most=3)
    return over_steps([panel_logratios, panel_accuracy, panel_below], 1, 3, by_method(chosen)), chosen


def figure_targets(runs):
    """Targeted FPA: the future policy's coefficient on correct rows only, on incorrect rows only, and on both. Log-ratios below
    0: the correct rows lost probability on average.
    """
    main = main_runs(runs)
    targeted = where(main, loss="fpa", target=("correct", "incorrect"))
    if not targeted:
        return None
    chosen = where(main, loss="off_rl") + where(main, loss="fpa", lam=targeted[0].get("lam"))
    return over_steps([panel_logratios, panel_accuracy, panel_grad_norm], 1, 3, by_method(chosen)), chosen


def figure_lambda(runs):
    """Accuracy against how far the coefficient extrapolates. λ = 0 is Off-RL. A dot is a seed; the line joins the means, with
    their intervals.
    """
    chosen = [run for run in where(main_runs(runs), loss=("off_rl", "fpa")) if run.get("target") in (None, "both")]
    lams = by(sorted(chosen, key=lambda run: run.get("lam")), lambda run: run.get("lam"))
    if len(lams) < 3:
        return None
    figure, axes = canvas(1, 2)
    for axis, (title, value) in zip(axes, LAST_OR_BEST.items()):
        table = [[value(run) for run in some] for some in lams.values()]
        means, halves = zip(*(mean_and_interval(numbers) for numbers in table))
        axis.plot(range(len(lams)), means, color="0.6", linewidth=1, zorder=0)
        for x, (some, numbers, mean, half) in enumerate(zip(lams.values(), table, means, halves)):
            colour = colour_of(some[0].config["loss"])
            axis.plot([x] * len(numbers), numbers, "o", color=colour, alpha=0.35, markeredgewidth=0)
            axis.errorbar(x, mean, None if np.isnan(half) else half, fmt="_", color=colour, capsize=3, linewidth=1.8)
        axis.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams])
        axis.set(title=title, xlabel="λ (not to scale)", ylabel="pass@1", ylim=(0, 1))
    handles = [
        Line2D([], [], color=colour_of(loss), label=LOSSES[loss].label)
        for loss in dict.fromkeys(run.config["loss"] for run in chosen)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure, chosen


FIGURES = {**drawing.figures_of(globals()), **figures.FIGURES}


def draw_figures(runs, to):
    """Draw every figure that the runs have something for into the folder `to`; prints what was drawn from what."""
    drawing.draw_all(FIGURES, runs, to, figures.MEANS_ONLY)


# --- the command


def run(argv=None):
    """The command: print the summary and draw the figures, or one line on stderr and exit code 2."""
    parser = command_line(__doc__.splitlines()[0], prog="plots.py")
    add = parser.add_argument
    add("runs", nargs="?", default=Path("runs"), type=printable_path, help="folder whose runs are drawn")
    add("--to", type=printable_path, metavar="FOLDER", help=f"folder of the figures (default: RUNS/figures){NO_DEFAULT}")
    add(
        "--html",
        action="store_true",
        help=f"also write report.html, the playground of these runs; it needs runs with --diagnostics{NO_DEFAULT}",
    )
    args = parser.parse_args(argv)
    to = args.to or args.runs / "figures"
    if os.path.lexists(to) and not os.path.isdir(to):
        parser.error(f"argument --to: {to} is not a folder")
    with command(parser.prog, f"the figures in {to} are whole, some of them may be of before", to):
        runs = read_folder(args.runs)
        print(summary(runs))
        draw_figures(runs, to)
        if args.html:
            page.write_page([runs], page.judged(runs), to / "report.html")
            print(f"page          {to / 'report.html'}")


if __name__ == "__main__":
    run()
