"""The curves of the method, from logs: divergence and brake, prolonged training, targets, λ. No model is loaded.

    python plots.py runs/     # every finished run below runs/ -> runs/figures/*.png
    python plots.py results/slips   # the committed runs -> results/slips/figures/*.png

The command also draws the figures of study/figures.py. `python -m study.claims` writes the numbers, results.md.
"""

import os
from pathlib import Path

import numpy as np

from plumbing.files import printable_path
from plumbing.flags import NO_DEFAULT, command, command_line
from study import drawing, figures
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
    over_steps,
    panel_accuracy,
)
from study.results import by, by_method, main_runs, mean_and_interval, read_folder, summary, where

# --- panels


def panel_logratios(axis, methods):
    for colour, _, runs in coloured(methods):
        for kind, style in CORRECTNESS.items():
            draw(axis, runs, lambda log: log[f"logratio_{kind}"], colour, style)
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.set(title="Log-ratio of training trajectories", ylabel=r"$\log\,\pi_\theta(y|x)-\log\,\pi_{ref}(y|x)$  [nats]")
    axis.set_yscale("symlog", linthresh=1)  # so that -0.5 and -50 can both be read
    axis.yaxis.set_major_formatter("{x:g}")


def panel_coefficient(axis, methods):
    for colour, _, runs in coloured(methods):
        for kind, style in CORRECTNESS.items():
            draw(axis, runs, lambda log: log[f"coefficient_{kind}"], colour, style)
    axis.set(title="Coefficient of the gradient", ylabel=r"weight of $\nabla$ logp_mean", ylim=(0, None))


def panel_ratio(axis, methods):
    def ratio(log):
        return log["pihat_incorrect"] / np.maximum(log["pi_incorrect"], 1e-300)  # a collapsed policy's is 0

    for colour, _, runs in coloured(methods):
        draw(axis, runs, ratio, colour, CORRECTNESS["incorrect"])
    axis.set(title="Brake on incorrect trajectories", ylabel=f"mean {PIHAT} / mean {PI}", ylim=(0, 1.1))


def panel_below(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["below_0.2_pi"] / 1000, colour, "-")
        if runs[0].get("lam"):
            draw(axis, runs, lambda log: log["below_0.2_pihat"] / 1000, colour, ":")
    axis.set(title="Incorrect training rows below 0.2", ylabel="running count [thousands]")
    axis.legend(handles=[Line2D([], [], color="0.3", linestyle=s, label=n) for n, s in ((PI, "-"), (PIHAT, ":"))], fontsize=10)


def panel_grad_norm(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["grad_norm"], colour)
    axis.set(title="Gradient norm before clipping at 1", ylabel="mean since the last evaluation", yscale="log")


# --- figures: each returns (figure, the runs behind it), or None


def figure_dynamics(runs):
    """Accuracy, log-ratios, the coefficient that weights the gradient, and the brake, over training steps."""
    chosen = few(main_runs(runs))
    return over_steps([panel_accuracy, panel_logratios, panel_coefficient, panel_ratio], 2, 2, by_method(chosen)), chosen


def figure_prolonged(runs):
    """Log-ratios, accuracy and running counts over the longest training."""
    most = max(run.config["steps"] for run in runs)
    chosen = few(main_runs(where(runs, steps=most)))
    return over_steps([panel_logratios, panel_accuracy, panel_below], 1, 3, by_method(chosen)), chosen


def figure_targets(runs):
    """Targeted FPA: the future policy's coefficient on correct rows only, on incorrect rows only, and on both."""
    main = main_runs(runs)
    targeted = where(main, loss="fpa", target=("correct", "incorrect"))
    if not targeted:
        return None
    chosen = where(main, loss="off_rl") + where(main, loss="fpa", lam=targeted[0].get("lam"))
    return over_steps([panel_logratios, panel_accuracy, panel_grad_norm], 1, 3, by_method(chosen)), chosen


def figure_lambda(runs):
    """Accuracy against how far the coefficient extrapolates; λ = 0 is Off-RL."""
    chosen = [run for run in where(main_runs(runs), loss=("off_rl", "fpa")) if run.get("target") in (None, "both")]
    lams = by(sorted(chosen, key=lambda run: run.get("lam")), lambda run: run.get("lam"))
    if len(lams) < 3:
        return None
    figure, axes = canvas(1, 2)
    for axis, (title, value) in zip(axes, LAST_OR_BEST.items()):
        table = [[value(run) for run in some] for some in lams.values()]
        means, halves = zip(*(mean_and_interval(numbers) for numbers in table))
        for x, numbers in enumerate(table):
            axis.plot([x] * len(numbers), numbers, "o", color=colour_of("fpa"), alpha=0.35, markeredgewidth=0)
        axis.errorbar(range(len(lams)), means, halves, color=colour_of("fpa"), capsize=3, linewidth=1.8)
        axis.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams])
        axis.set(title=title, xlabel="λ (not to scale)", ylabel="pass@1", ylim=(0, 1))
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
        help=f"also write report.html, a page to explore; needs plotly, and runs trained with --diagnostics{NO_DEFAULT}",
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
            from study import page  # which needs plotly

            page.write_page(runs, to / "report.html")
            print(f"page          {to / 'report.html'}")


if __name__ == "__main__":
    run()
