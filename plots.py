"""Figures and results.md from the runs' logs alone (config.json and CSV files; no model is loaded).

    python plots.py runs/          # every finished run below runs/ -> figures/*.png and figures/results.md

Each function named `figure_…` draws one figure from those runs that it is about, and says nothing where there are none; its
docstring is the figure's caption. Several seeds become their mean and its 95 % confidence interval (Student's t).
"""

import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, so that it draws on a server too
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

import claims
import page
from files import Interrupted, UserError, interruptible, printable_path, replacing, write_text
from options import command_line
from results import (
    NAMES,
    Run,
    VersionError,
    by,
    by_method,
    describe,
    extrapolated,
    final,
    fpa_runs,
    label,
    main_runs,
    mean_and_interval,
    read_csv,
    read_runs,
    run_folders,
    summary,
    tokens,
    tuned,
    varying,
    where,
    with_file,
)  # fmt: skip
from toy_math.tokenizer import ALPHABET

PI, PIHAT = r"$\bar{\pi}$", r"$\hat{\bar{\pi}}$"  # trajectory probability under the present and under the future policy
CORRECTNESS = {"correct": "-", "incorrect": "--"}  # line styles
# Okabe and Ito's palette, safe for colour-blind readers
COLOURS = {
    "off_rl": "#D55E00", "fpa": "#0072B2", "sft": "#009E73", "constant": "#CC79A7", "sharpened": "#E69F00", "grpo": "#000000",
    "simper": "#56B4E9", "dpo": "#009E73", "rpo": "#CC79A7", "kto": "#E69F00", "a_star_po": "#56B4E9", "pessimistic": "#999999",
    "reinforce": "#8C6D1F",
}  # fmt: skip


# --- panels


def draw(axis, runs, values, colour, style="-", x=lambda log: log["step"], band=True):
    """One curve: the mean over seeds of values(log), with the band of its interval."""
    mean, half = mean_and_interval([values(run.log) for run in runs])
    at = np.mean([x(run.log) for run in runs], axis=0)
    axis.plot(at, mean, color=colour, linestyle=style, linewidth=1.8)
    if len(runs) > 1 and band:
        axis.fill_between(at, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)


def coloured(methods):
    """(colour, method, runs) of every method; where two have one loss, the later ones take colours that are still free."""
    free = [colour for colour in dict.fromkeys(COLOURS.values()) if colour not in {COLOURS[method[0]] for method in methods}]
    taken, triples = set(), []
    for method, runs in methods.items():
        colour = COLOURS[method[0]]
        if colour in taken:
            colour = free.pop(0) if free else "#777777"
        taken.add(colour)
        triples.append((colour, method, runs))
    return triples


def panel_accuracy(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["accuracy"], colour)
        axis.axhline(np.mean([run.log["accuracy"][0] for run in runs]), color="0.6", linewidth=0.8, zorder=0)
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
    for colour, _, runs in coloured(methods):
        for kind, style in CORRECTNESS.items():
            draw(axis, runs, lambda log: log[f"coefficient_{kind}"], colour, style)
    axis.set(title="Coefficient of the gradient", ylabel=r"weight of $\nabla$ logp_mean", ylim=(0, None))


def panel_ratio(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["pihat_incorrect"] / log["pi_incorrect"], colour, CORRECTNESS["incorrect"])
    axis.set(title="Brake on incorrect trajectories", ylabel=f"mean {PIHAT} / mean {PI}", ylim=(0, 1.1))


def panel_below(axis, methods):
    for colour, method, runs in coloured(methods):
        draw(axis, runs, lambda log: log["below_0.2_pi"] / 1000, colour, "-")
        if method[1]:
            draw(axis, runs, lambda log: log["below_0.2_pihat"] / 1000, colour, ":")
    axis.set(title="Incorrect training rows below 0.2", ylabel="running count [thousands]")
    axis.legend(handles=[Line2D([], [], color="0.3", linestyle=s, label=n) for n, s in ((PI, "-"), (PIHAT, ":"))], fontsize=10)


def panel_grad_norm(axis, methods):
    for colour, _, runs in coloured(methods):
        draw(axis, runs, lambda log: log["grad_norm"], colour)
    axis.set(title="Gradient norm before clipping at 1", ylabel="mean since the last evaluation", yscale="log")


def panel_dots(axis, methods, values=final):
    """A row a method: a dot a seed, and the mean with its interval."""
    rows = list(coloured(methods))[::-1]
    for y, (colour, _, runs) in enumerate(rows):
        numbers = [values(run) for run in runs]
        mean, half = mean_and_interval(numbers)
        axis.plot(numbers, [y] * len(numbers), "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0)
        axis.errorbar(
            mean, y, xerr=None if np.isnan(half) else half, fmt="|", color=colour, markersize=14, capsize=3, linewidth=1.8
        )
    axis.set_yticks(range(len(rows)), [label(method) for _, method, _ in rows], fontsize=8)
    axis.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4), xlabel="pass@1")
    axis.grid(axis="x", alpha=0.3)


# --- figures: each returns (figure, the runs behind it), or None


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
    chosen = where(main, loss="off_rl") + where(main, loss="fpa", lam=targeted[0].config["lam"])
    return over_steps([panel_logratios, panel_accuracy, panel_grad_norm], 1, 3, by_method(chosen)), chosen


LAST_OR_BEST = {"Final accuracy": final, "Best accuracy": lambda run: run.log["accuracy"].max()}


def figure_lambda(runs):
    """Accuracy against how far the coefficient extrapolates; λ = 0 is Off-RL."""
    chosen = [run for run in where(main_runs(runs), loss=("off_rl", "fpa")) if run.config["target"] in (None, "both")]
    lams = by(sorted(chosen, key=lambda run: run.config["lam"]), lambda run: run.config["lam"])
    if len(lams) < 3:
        return None
    figure, axes = canvas(1, 2)
    for axis, (title, value) in zip(axes, LAST_OR_BEST.items()):
        table = [[value(run) for run in some] for some in lams.values()]
        means, halves = zip(*(mean_and_interval(numbers) for numbers in table))
        for x, numbers in enumerate(table):
            axis.plot([x] * len(numbers), numbers, "o", color=COLOURS["fpa"], alpha=0.35, markeredgewidth=0)
        axis.errorbar(range(len(lams)), means, halves, color=COLOURS["fpa"], capsize=3, linewidth=1.8)
        axis.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams])
        axis.set(title=title, xlabel="λ (not to scale)", ylabel="pass@1", ylim=(0, 1))
    return figure, chosen


def figure_entanglement(runs):
    """Gradients of a correct and an incorrect trajectory of one problem: norms, inner product, cosine, share with g > a."""
    chosen = few(with_file(main_runs(runs), "entanglement.csv"), most=2)
    if not chosen:
        return None
    methods = by_method(chosen)
    figure, axes = canvas(1, 3)
    for colour, _, some in coloured(methods):
        tables = [Run(run.folder, run.config, read_csv(run.folder / "entanglement.csv")) for run in some]
        for column, style in (("a", "-"), ("b", "--"), ("g", ":")):
            draw(axes[0], tables, lambda log: log[column], colour, style, band=False)  # which would hide the curves
        draw(axes[1], tables, lambda log: log["cosine"], colour)
        draw(axes[2], tables, lambda log: log["share_g_above_a"], colour)
    symbols = {r"$a=\|\nabla\log\pi(y_w)\|^2$": "-", r"$b=\|\nabla\log\pi(y_l)\|^2$": "--", r"$g$, their inner product": ":"}
    axes[0].legend(handles=[Line2D([], [], color="0.3", linestyle=s, label=n) for n, s in symbols.items()], fontsize=8)
    axes[0].set(title="Squared norms and inner product", ylabel="mean over pairs")
    axes[0].set_yscale("symlog", linthresh=100)
    axes[1].set(title="Cosine of the two gradients", ylabel="mean over pairs", ylim=(-0.3, 1))
    axes[2].set(title="Pairs with g > a", ylabel="share", ylim=(0, 1))
    for axis in axes:
        axis.set_xlabel("training step")
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    legend(figure, methods)
    return figure, chosen


def figure_losses(runs):
    """Every loss, at its own best learning rate where other seeds chose one: a dot a seed, the mean and its interval."""
    chosen = [run for some in tuned(runs).values() for run in some] or main_runs(runs)
    if len(by(chosen, lambda run: run.config["loss"])) < 3:
        return None
    figure, axes = canvas(1, 2, row_height=0.4 * len(by_method(chosen)) + 1)
    for axis, (title, value) in zip(axes, LAST_OR_BEST.items()):
        panel_dots(axis, by_method(chosen), value)
        axis.set_title(title)
    lrs = {method: some[0].config["lr"] for method, some in by_method(chosen).items()}
    axes[0].set_yticks(range(len(lrs)), [f"{label(m)}  (lr {lr:g})" for m, lr in list(lrs.items())[::-1]], fontsize=8)
    axes[1].set_yticklabels([])
    return figure, chosen


def figure_controls(runs):
    """FPA beside what it might be mistaken for: a constant weight, a sharpened present coefficient, correct rows alone."""
    main = main_runs(runs)
    controls = where(main, loss=("constant", "sharpened", "sft"))
    if not where(controls, loss=("constant", "sharpened")):
        return None
    lams = {run.config["lam"] for run in where(controls, loss="sharpened")} or {2.0}
    chosen = where(main, loss="off_rl") + where(main, loss="fpa", lam=tuple(lams), target=("both", "incorrect")) + controls
    figure, (left, right) = canvas(1, 2)
    panel_accuracy(left, by_method(chosen))
    left.set_xlabel("training step")
    panel_dots(right, by_method(chosen))
    right.set_title("Final accuracy")
    return figure, chosen


def figure_prompts(runs):
    """Final accuracy against the number of training prompts, the same number of steps each."""
    methods = by_method(varying(runs, "prompts"))
    methods = {m: some for m, some in methods.items() if len({run.config["prompts"] for run in some}) > 1}
    if not methods:
        return None
    figure, (axis,) = canvas(1, 1, row_height=4)
    for colour, method, some in coloured(methods):
        numbers = by(sorted(some, key=lambda run: run.config["prompts"]), lambda run: run.config["prompts"])
        means, halves = zip(*(mean_and_interval([final(run) for run in seeds]) for seeds in numbers.values()))
        axis.errorbar(list(numbers), means, halves, color=colour, capsize=3, linewidth=1.8, label=label(method))
        for prompts, seeds in numbers.items():
            axis.plot([prompts] * len(seeds), [final(run) for run in seeds], "o", color=colour, alpha=0.35, markeredgewidth=0)
    ticks = sorted({run.config["prompts"] for some in methods.values() for run in some})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axis.set(xlabel="training prompts (8 rollouts each)", ylabel="final pass@1", ylim=(0, 1))
    axis.legend(loc="lower right")
    return figure, [run for some in methods.values() for run in some]


def figure_cost(runs):
    """Accuracy against its cost in tokens, each loss at its best learning rate where other seeds chose one."""
    main, best = main_runs(runs), tuned(runs)
    if not where(main, loss="grpo"):
        return None
    if all(family in best for family in ONLINE_OR_NOT):
        chosen = [run for family in ONLINE_OR_NOT for run in best[family]]
    else:
        chosen = where(main, loss=("off_rl", "grpo")) + fpa_runs(main)
    figure, axes = canvas(1, 2)
    costs = {
        "millions of completion tokens sampled or trained on": lambda log: tokens(log) / 1e6,
        "millions of completion tokens sampled: offline, all of them before the first step": lambda log: (
            log["tokens_sampled"] / 1e6
        ),
    }
    for axis, (title, x) in zip(axes, costs.items()):
        for colour, _, some in coloured(by_method(chosen)):
            draw(axis, some, lambda log: log["accuracy"], colour, x=x)
        axis.set(xlabel=title, ylabel="pass@1", ylim=(0, 1))
    legend(figure, by_method(chosen))
    return figure, chosen


def diagnosed(runs):
    """{lr: [run]} of the runs that the extrapolation figures show: FPA's at λ = 2, or the first method's where it has none."""
    chosen = with_file(varying(runs, "lr"), "extrapolation.csv")
    chosen = fpa_runs(chosen) or [run for run in chosen if run.method == chosen[0].method]
    return by(chosen, lambda run: run.config["lr"])


def extrapolation_panels(runs):
    """Figure, runs, and for each panel (axis, t, [later], [lam], {(later, lam): log2 of the KL ratio, mean over seeds})."""
    groups = diagnosed(runs)
    tables = {lr: [extrapolated(run) for run in some] for lr, some in groups.items()}
    starts = [t for t in (20, 40, 80, 320) if all((t, 2 * t, 1) in table for some in tables.values() for table in some)]
    if not groups or not starts:
        return None
    figure, axes = canvas(len(groups), len(starts), row_height=3)
    panels = []
    for axis, ((lr, some), t) in zip(axes, itertools.product(tables.items(), starts)):
        means = {key[1:]: np.mean([np.log2(np.divide(*table[key])) for table in some]) for key in some[0] if key[0] == t}
        laters, lams = (sorted({key[i] for key in means}) for i in range(2))
        axis.set(title=f"lr {lr:g}, t = {t}", xlabel="look-ahead t′/t")
        panels.append((axis, t, laters, lams, means))
    return figure, [run for some in groups.values() for run in some], panels


def figure_extrapolation(runs):
    """Distance of the future policy of step t from the policy of t′, over the present one's; a ring marks t′ = (1 + λ) t."""
    if not (made := extrapolation_panels(runs)):
        return None
    figure, chosen, panels = made
    for axis, t, laters, _, means in panels:
        for index, lam in enumerate((0.5, 1, 2, 5)):
            colour, curve = plt.get_cmap("viridis")(index / 3.5), [2 ** means[later, lam] for later in laters]
            axis.plot([later / t for later in laters], curve, color=colour, marker=".", label=f"λ = {lam:g}")
            if (1 + lam) * t in laters:
                axis.plot(1 + lam, curve[laters.index((1 + lam) * t)], "o", color=colour, markerfacecolor="none", markersize=11)
        axis.axhline(1, color="0.3", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=(1.2, 50))
        axis.set_xticks([1.5, 3, 6, 12, 24, 48], ["1.5", "3", "6", "12", "24", "48"])
        axis.minorticks_off()
    panels[0][0].set_ylabel("KL from π at t′:\nfuture policy / present policy")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, chosen


def figure_extrapolation_map(runs):
    """Blue: the future policy of step t is nearer to the policy of t′ than the present one is, a forecast. Red: farther."""
    if not (made := extrapolation_panels(runs)):
        return None
    figure, chosen, panels = made
    for axis, t, laters, lams, means in panels:
        grid = [[means[later, lam] for later in laters] for lam in lams]
        image = axis.pcolormesh(range(len(laters) + 1), range(len(lams) + 1), grid, cmap="RdBu_r", vmin=-4, vmax=4)
        axis.set_xticks(np.arange(len(laters)) + 0.5, [f"{later / t:.3g}" for later in laters], fontsize=7, rotation=90)
        axis.set_yticks(np.arange(len(lams)) + 0.5, [f"{lam:g}" for lam in lams])
        hits = [(laters.index((1 + lam) * t) + 0.5, i + 0.5) for i, lam in enumerate(lams) if (1 + lam) * t in laters]
        axis.plot(*zip(*hits), "k.-", linewidth=1)  # t' = (1 + lam) t
    panels[0][0].set_ylabel("λ")
    axes = [panel[0] for panel in panels]
    figure.colorbar(image, ax=axes, label="log₂ of KL from π at t′,\nfuture / present policy", shrink=0.8)
    return figure, chosen


def figure_forecast(runs):
    """Does π̂ of step t forecast π of t′ = (1 + λ) t? By whole distributions, sampled tokens and trajectories' coefficients."""
    groups = diagnosed(runs)
    kinds = {
        "kl": "KL",
        "tv": "Total variation",
        "token_error": "Sampled tokens' |Δ logp|",
        "coefficient_error": "Coefficients",
    }
    lams, styles = (0.5, 1, 2), dict(zip(groups, ("-", "--", ":", "-.")))
    if not groups or len(groups) > len(styles):
        return None
    figure, axes = canvas(2, 3)
    for axis, column in zip(axes, [*kinds, "coefficient_rank"]):
        all_tables = {lr: [extrapolated(run, column) for run in some] for lr, some in groups.items()}
        for (lr, style), (index, lam) in itertools.product(styles.items(), enumerate(lams)):
            tables = all_tables[lr]
            starts = [t for t, later, at in tables[0] if at == lam and later == (1 + lam) * t]
            if not starts:
                continue
            pairs = np.array([[table[t, (1 + lam) * t, lam] for t in starts] for table in tables])  # (seeds, starts, 2)
            future, present = np.moveaxis(pairs, -1, 0)
            difference = column == "coefficient_rank"
            curve = (future - present).mean(0) if difference else np.exp(np.log(future / present).mean(0))
            axis.plot(starts, curve, style, color=plt.get_cmap("viridis")(index / 2.5), marker=".")
        axis.set(xscale="log", xlabel="t", title=kinds.get(column, "Rank correlation of coefficients"))
        axis.set_xticks([10, 30, 100, 300], ["10", "30", "100", "300"])
        axis.axhline(0 if column == "coefficient_rank" else 1, color="0.3", linewidth=0.8)
        axis.set_ylabel("future − present" if column == "coefficient_rank" else "future / present")
        if column != "coefficient_rank":
            axis.set_yscale("log")
            axis.set_yticks([0.1, 0.3, 1, 3, 10, 30, 100], ["0.1", "0.3", "1", "3", "10", "30", "100"])
        axis.minorticks_off()
    axes[5].set_visible(False)
    handles = [Line2D([], [], color=plt.get_cmap("viridis")(i / 2.5), label=f"λ = {lam:g}") for i, lam in enumerate(lams)]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=f"lr {lr:g}") for lr, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure, [run for some in groups.values() for run in some]


def figure_tokens(runs):
    """Each token's log-ratio in a correct and an incorrect trace of one problem, under Off-RL and FPA, at several steps."""
    chosen = few([run for run in with_file(main_runs(runs), "tokens.csv") if run.config["loss"] in ("off_rl", "fpa")], most=2)
    chosen = [run for run in chosen if run.config["seed"] == chosen[0].config["seed"]]
    if len(chosen) < 2:
        return None
    figure, axes = canvas(2, 1, row_height=3)
    for axis, side in zip(axes, CORRECTNESS):
        lines, names = [], []
        for run in chosen:
            table = read_csv(run.folder / "tokens.csv")
            at = (table["pair"] == 0) & (table["side"] == side)
            steps = table["step"][at]
            shown = [steps[np.abs(steps - share * steps[-1]).argmin()] for share in (0.05, 0.1, 0.2, 0.5, 1)]
            for step in dict.fromkeys(shown):
                (i,) = np.flatnonzero(at & (table["step"] == step))
                lines.append([float(ratio) for ratio in table["logratios"][i].split()])
                names.append(f"{NAMES[run.config['loss']]}  step {step:.0f}")
        image = axis.imshow(lines, aspect="auto", cmap="RdBu", vmin=-4, vmax=4)
        characters = [(ALPHABET + "▪▪▪")[int(token)] for token in table["tokens"][i].split()]  # ▪: EOS
        axis.set_xticks(range(len(characters)), characters, fontsize=8, family="monospace")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.axhline(len(names) / 2 - 0.5, color="black", linewidth=1)
        if side == "incorrect":
            first = table["first_wrong"][i]
            axis.add_patch(plt.Rectangle((first - 0.5, -0.5), 1, len(names), fill=False, edgecolor="black", linewidth=2))
        axis.set_title(f"{side} trace" + (", its first wrong token outlined" if side == "incorrect" else ""))
        axis.tick_params(length=0)
    figure.colorbar(image, ax=list(axes), label="log-ratio of the token [nats], cut at ±4", shrink=0.8)
    return figure, chosen


ONLINE_OR_NOT = (("off_rl", False), ("fpa", True), ("grpo", False))
MEANS_ONLY = ("extrapolation", "extrapolation_map", "forecast")  # and no intervals
FIGURES = {name.removeprefix("figure_"): function for name, function in list(globals().items()) if name.startswith("figure_")}


def fingerprint(runs):
    """Of the logs behind a figure; stored in the PNG, so that a test can tell whether a committed figure is theirs."""
    rows = [(run.config, {name: column.tolist() for name, column in run.log.items()}) for run in runs]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def draw_figures(runs, to):
    """Draw every figure that the runs have something for into the folder `to`; prints what was drawn from what."""
    to.mkdir(parents=True, exist_ok=True)
    for name, function in FIGURES.items():
        if not (drawn := function(runs)):
            continue
        figure, chosen = drawn
        for axis in figure.axes:
            axis.title.set_fontsize(10)
            axis.spines[["top", "right"]].set_visible(False)
        seeds = sorted({len(some) for some in by(chosen, lambda run: (run.setting, run.method)).values()})
        counted = f"{'–'.join(map(str, seeds))} seed{'s' if seeds[-1] > 1 else ''}"
        if seeds[-1] > 1:
            counted += ": mean" if name in MEANS_ONLY else ": mean and 95 % interval"
        settings = by(chosen, lambda run: run.setting)
        setting = describe(chosen[0].config) if len(settings) == 1 else f"{len(settings)} settings"
        figure.suptitle(f"{function.__doc__.splitlines()[0]}\n{setting}; {counted}", fontsize=9)
        with replacing(to / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Description": fingerprint(chosen)})
        plt.close(figure)
        print(f"figure        {to / name}.png   ({counted}; {setting})")


def run(argv=None):
    """The command: print the summary, draw the figures, write results.md, or one line on stderr and exit code 2."""
    parser = command_line(__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="?", default=Path("runs"), type=printable_path, help="folder whose runs are drawn")
    parser.add_argument(
        "--to", default=Path("figures"), type=printable_path, help="folder that the figures and results.md go to"
    )
    parser.add_argument("--html", action="store_true", help="also write report.html there, a page to explore; needs plotly")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.runs):
        parser.error(f"{args.runs} is not a folder")
    try:
        with interruptible():
            runs = read_runs(run_folders(args.runs))
            if not runs:
                parser.error(f"no finished run below {args.runs}")
            print(summary(runs))
            draw_figures(runs, args.to)
            write_text(args.to / "results.md", claims.results(runs))
            print(f"results       {args.to / 'results.md'}")
            if args.html:
                page.write_page(runs, args.to / "report.html")
                print(f"page          {args.to / 'report.html'}")
    except OSError as error:
        parser.error(f"argument --to: {error}")
    except (UserError, VersionError) as error:
        parser.error(str(error))
    except Interrupted as signalled:
        print(f"interrupted: the figures in {args.to} are whole, some of them may be of before", file=sys.stderr)
        sys.exit(128 + signalled.args[0])


if __name__ == "__main__":
    run()
