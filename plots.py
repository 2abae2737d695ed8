"""The curves of the method, from logs: the drag, the brake, prolonged training, targets, λ. No model is loaded.

    python plots.py runs/           # every finished run below runs/ -> runs/figures/*.png
    python plots.py results/slips   # the committed runs -> results/slips/figures/*.png

The command also draws the figures of study/figures.py. `python -m study.verdicts` writes results/results.md, and
`python -m study.claims` that of results/slips.
"""

import functools
import os
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from losses import LOSSES
from plumbing.files import printable_path
from plumbing.flags import NO_DEFAULT, check_folder, command, command_line
from study import drawing, figures, page
from study.drawing import (
    LAST_OR_BEST,
    PI,
    PIHAT,
    Line2D,
    canvas,
    colour_of,
    coloured,
    draw,
    few,
    legend,
    over_steps,
    panel_accuracy,
    styled,
)
from study.results import (
    by,
    by_method,
    label,
    main_runs,
    mean_and_interval,
    metric,
    of_experiment,
    read_folder,
    summary,
    where,
)

CORRECT = "logratio_correct"
SPREAD = {(5, 95): 0.22, (25, 75): 0.45}  # percentiles of the correct rows between which a band lies: its opacity

# --- panels


def panel_logratio(axis, methods, kind):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log[f"logratio_{kind}"], colour)
    symlog(axis)
    axis.set(title=f"Mean log-ratio, {kind} answers")


LOGRATIOS = [functools.partial(panel_logratio, kind=kind) for kind in ("correct", "incorrect")]


def symlog(axis):
    """An axis of log-ratios on which -0.5 and -50 can both be read."""
    axis.set_yscale("symlog", linthresh=1, subs=range(2, 10))  # before a line asks for the limits
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
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
    ends = f"{100 * below:.0f} % of answers\nend below 0, 5 % below {lowest:.3g} nats"
    axis.set(title=f"{label(runs[0].method)}: {ends}", xlabel="training step")


def panel_coefficient(axis, methods, kind):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log[f"coefficient_{kind}"], colour)
    axis.set(title=f"Weight C·|y|, {kind} answers", ylabel="mean since the last evaluation", ylim=(0, None))


COEFFICIENTS = [functools.partial(panel_coefficient, kind=kind) for kind in ("correct", "incorrect")]


def panel_ratio(axis, methods):
    def ratio(log):
        return log["pihat_incorrect"] / np.maximum(log["pi_incorrect"], 1e-300)  # a collapsed policy's is 0

    for colour, _, runs in coloured(methods):
        if any((run.log["coefficient_incorrect"][1:] > 0).any() for run in runs):  # SFT pushes none
            draw(axis, runs, ratio, colour)
    axis.set(title="Brake on incorrect answers", ylabel=f"mean {PIHAT} / mean {PI}", ylim=(0, 1.1))


def panel_below(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["below_0.2_pi"], colour, "-")
        if runs[0].get("lam"):
            draw(axis, runs, lambda log: log["below_0.2_pihat"], colour, ":")
    axis.set(title=f"Incorrect answers trained on with {PI} below 0.2", ylabel="running count")
    styled(axis, {PI: "-", PIHAT: ":"}, fontsize=10)


def panel_grad_norm(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["grad_norm"], colour, band=False)  # which may go below 0
    axis.set(title="Gradient norm before clipping at 1", ylabel="norm, log scale", yscale="log")


# --- figures: each returns (figure, the runs behind it), or None


def figure_drag(runs):
    """The left panel shows the accuracy. The others show how the log-ratios of correct training answers to the base model are
    distributed. They should rise. An answer below 0 lost probability: it was dragged down. Percentiles are means over seeds.
    """
    chosen = [run for run in few(main_runs(runs), most=2) if f"{CORRECT}_below_0" in run.log]
    if not chosen:
        return None
    methods = by_method(chosen)
    figure, (left, *others) = canvas(1, 1 + len(methods), row_height=4.2)
    panel_accuracy(left, methods)
    left.set(xlabel="training step", ylabel="accuracy")
    for axis, (colour, _, some) in zip(others, coloured(methods)):
        draw(left, some, lambda log: log["accuracy_0.7"], colour, ":", band=False)
        if axis is not others[0]:
            axis.sharey(others[0])
        panel_spread(axis, colour, some)
    for axis in others[1:]:
        axis.set_ylabel("")
    styles = [Line2D([], [], color="0.3", linestyle=s, label=f"sampled at T = {t}") for s, t in (("-", 1), (":", 0.7))]
    bands = [
        Patch(color="0.3", alpha=a, linewidth=0, label=f"{low} % to {high} % of answers") for (low, high), a in SPREAD.items()
    ]
    lines = [Line2D([], [], color=c, label=name) for c, name in (("0.3", "median answer"), ("0.6", "base model"))]
    legend(figure, methods, [*styles, *bands, *lines])
    return figure, chosen


def figure_dynamics(runs):
    """Log-ratios are to the base model. A few answers that fall far pull a mean below 0. C·|y| is the weight of ∇ logp_mean. A
    brake below 1 says that the future policy weights incorrect answers less than the present one does. Otherwise it is 1.
    """
    chosen = few(main_runs(runs))
    panels = [panel_accuracy, *LOGRATIOS, panel_ratio, *COEFFICIENTS]
    return over_steps(panels, 2, 3, by_method(chosen)), chosen


def figure_prolonged(runs):
    """These are the longest runs. The last panel counts incorrect answers that were trained on with a π̄ below 0.2, a small
    weight.
    """
    lengths = by(runs, lambda run: run.config["steps"])
    most = max((steps for steps, some in lengths.items() if len(by_method(some)) > 1), default=0)
    if most <= main_runs(runs)[0].config["steps"]:
        return None  # figure_dynamics shows them
    chosen = few(of_experiment(runs, "prolonged") or main_runs(lengths[most]), most=3)
    return over_steps([panel_accuracy, *LOGRATIOS, panel_below], 2, 2, by_method(chosen)), chosen


def figure_targets(runs):
    """Targeted FPA takes its weight from the future policy on one kind of answers only, and FPA on both. A mean log-ratio below
    0 can come from a few answers that fall far.
    """
    main = main_runs(runs)
    targeted = where(main, loss="fpa", target=("correct", "incorrect"))
    if not targeted:
        return None
    chosen = where(main, loss="off_rl") + where(main, loss="fpa", lam=targeted[0].get("lam"))
    return over_steps([panel_accuracy, *LOGRATIOS, panel_grad_norm], 2, 2, by_method(chosen)), chosen


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
            axis.errorbar(x, mean, half, fmt="_", color=colour, capsize=3, linewidth=1.8)
        axis.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams])
        axis.set(title=title, xlabel="λ (not to scale)", ylabel="accuracy, T = 1", ylim=(0, 1))
    handles = [
        Line2D([], [], color=colour_of(loss), label=LOSSES[loss].label)
        for loss in dict.fromkeys(run.config["loss"] for run in chosen)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure, chosen


def figure_rates(runs):
    """A line shows the final accuracy at each learning rate, the mean of two seeds. A dot, moved a little aside, is the mean of
    eight other seeds at the best rate, and the bar is its interval. The right panel has λ = 2 on some rows, and Off-RL.
    """
    names = ("lambda-grid", "targets-grid"), ("lambda", "targets")
    grid, best = ([run for name in some for run in of_experiment(runs, name)] for some in names)
    if not grid:
        return None
    figure, axes = canvas(1, 2, row_height=4)
    panels = {
        "FPA's λ, on both kinds of rows": lambda run: run.get("target") in (None, "both"),
        "rows that take the future policy's weight": lambda run: run.get("lam") in (0, 2),
    }
    for axis, (title, shown) in zip(axes, panels.items()):
        methods = by_method(filter(shown, grid))
        for shift, (colour, method, some) in enumerate(coloured(methods)):
            if len(methods) > 4 and some[0].get("lam"):  # in order, where the shades of one loss are not
                colour = drawing.plt.get_cmap("viridis")(shift / len(methods))
            rates = by(some, lambda run: run.config["lr"])
            means = [np.mean([*map(metric, two)]) for two in rates.values()]
            axis.plot(list(rates), means, color=colour, label=label(method))
            if ends := [run for run in best if run.method == method]:
                mean, half = mean_and_interval([*map(metric, ends)])
                axis.errorbar(ends[0].config["lr"] * 1.04**shift, mean, half, fmt="o", color=colour, capsize=3)
        axis.set(title=title, xscale="log", xlabel="learning rate, log scale", ylabel="accuracy, T = 0.7", ylim=(-0.02, 1))
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    return figure, [*grid, *best]


FIGURES = {**drawing.figures_of(globals()), **figures.FIGURES}


def draw_figures(runs, to):
    """Draw every figure that the runs have something for into the folder `to`; prints what was drawn from what."""
    drawing.draw_all(FIGURES, runs, to, figures.SHOWN)


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
    if args.to or os.path.exists(to):  # otherwise the runs are looked at first
        check_folder(parser, "--to", to)
    with command(parser.prog, f"the figures in {to} are whole, some of them may be of before", to):
        runs = read_folder(args.runs)
        print(summary(runs))
        draw_figures(runs, to)
        if args.html:
            page.write_page([runs], page.judged(runs), to / "report.html")
            print(f"page          {to / 'report.html'}")


if __name__ == "__main__":
    run()
