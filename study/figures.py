"""The figures beyond the method's own curves: entanglement, other losses, prompts, cost, extrapolation, diversity, tokens.

`python plots.py results` draws them beside its own.
"""

import itertools

import numpy as np
from matplotlib.lines import Line2D

from losses import LOSSES
from study.drawing import (
    HIT,
    LAST_OR_BEST,
    MEDIAN,
    MOST_LINES,
    by_drag,
    canvas,
    colour_of,
    coloured,
    draw,
    few,
    figures_of,
    legend,
    pair_at,
    plt,
    styled,
    texts,
)
from study.results import (
    METRIC,
    Run,
    by,
    by_method,
    extrapolated,
    final,
    fpa_runs,
    label,
    main_runs,
    mean_and_interval,
    metric,
    of_experiment,
    ratio_of_coefficients,
    tokens,
    tuned,
    varying,
    where,
    with_table,
)  # fmt: skip

ONLINE_OR_NOT = (("off_rl", False), ("fpa", True), ("grpo", False))
SHOWN = {  # what a figure shows of several seeds, where this is not the mean and its interval
    **dict.fromkeys(("extrapolation", "extrapolation_map", "forecast", "push"), "mean"),
    "ratio": "each run",
}


# --- gradients


def figure_entanglement(runs):
    """These are gradients of a correct answer w and an incorrect one l of one problem: their squared norms a and b, and their
    inner product g. A small step on the pair drags the correct answer down where C_l·g is above C_w·a.
    """
    chosen = few(with_table(main_runs(runs), "entanglement"), most=2)
    if not chosen:
        return None
    tables = {
        method: [Run(run.folder, run.config, run.tables["entanglement"]) for run in some]
        for method, some in by_method(chosen).items()
    }
    decides = all("net" in run.log for some in tables.values() for run in some)  # the first study has the parts alone
    figure, axes = canvas(2, 2) if decides else canvas(1, 3)
    parts, cosine, share = axes[:3]
    for colour, _, some in coloured(tables):
        for column, style in (("a", "-"), ("b", "--"), ("g", ":")):
            draw(parts, some, lambda log: log[column], colour, style, band=False)  # which would hide the curves
        draw(cosine, some, lambda log: log["cosine"], colour)
        draw(share, some, lambda log: log["share_g_above_a"], colour, "--" if decides else "-")
        if decides:
            draw(share, some, lambda log: log["share_net_below_0"], colour)
            draw(axes[3], some, lambda log: log["net"], colour)
    symbols = {r"$a=\|\nabla\log\pi(y_w)\|^2$": "-", r"$b=\|\nabla\log\pi(y_l)\|^2$": "--", r"$g$, their inner product": ":"}
    styled(parts, symbols)
    parts.set(title="Squared norms and inner product", ylabel="mean over pairs, symlog")
    parts.set_yscale("symlog", linthresh=100)
    cosine.set(title="Cosine of the two gradients", ylabel="mean over pairs", ylim=(-1, 1))
    share.set(title="Pairs whose correct answer a small step lowers", ylabel="share of pairs", ylim=(0, 1))
    if decides:
        styled(share, {r"by the loss's own weights: $C_w\,a < C_l\,g$": "-", r"by equal weights: $a < g$": "--"})
        axes[3].set(title=r"What decides: $C_w\,a-C_l\,g$", ylabel="nats per unit of learning rate,\nmean over pairs, symlog")
        axes[3].set_yscale("symlog", linthresh=1)
    else:
        share.set_title("Pairs that equal weights lower: g > a")
    for axis in axes:
        axis.set_xlabel("training step")
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    legend(figure, tables)
    return figure, chosen


EDGES = np.array([0, 10, 20, 30, 40, 60, 80, 100, 140, 200, 400, 700, 1000])  # narrow early, where batch.csv has every step


def figure_push(runs):
    """The correct rows of a batch push correct answers up, and its incorrect rows push them down. A line is the share of steps
    and seeds at which the push down is the stronger one, for a small step along the loss's gradient.
    """
    chosen = with_table(of_experiment(runs, "extrapolation") or main_runs(runs), "batch")
    chosen = [run for run in chosen if "up_others" in run.tables["batch"]]
    if not chosen:
        return None
    chosen = where(chosen, lr=max(run.config["lr"] for run in chosen))
    methods = by_method(chosen)
    figure, axes = canvas(1, 2, row_height=3.6)
    for axis, (group, title) in zip(axes, {"": "the batch's own correct rows", "_others": "those of other problems"}.items()):
        for colour, _, some in coloured(methods):
            names = ("step", f"up{group}", f"down{group}")
            step, up, down = (np.concatenate([run.tables["batch"][name] for run in some]) for name in names)
            edges = [*EDGES[EDGES < step.max()], step.max() + 1]
            all_steps, won = (np.histogram(steps, edges)[0] for steps in (step, step[down > up]))
            axis.stairs(won / all_steps, edges, color=colour, linewidth=2)
        axis.set(title=title, xlabel="training step, log scale from 10 on", ylabel="share of steps", ylim=(0, 1))
        axis.set_xscale("symlog", linthresh=10)
        ticks = (0, 10, 30, 100, 300, 1000)
        axis.set_xticks(ticks, map(str, ticks))
        axis.set_xlim(0, edges[-1])
    legend(figure, methods)
    return figure, chosen


# --- losses beside each other


def panel_dots(axis, methods, values=final, before=lambda run: run.log["accuracy"][0], what="accuracy, T = 1"):
    """A row a method: a dot a seed, and the mean with its interval. Grey: `before` training."""
    rows = list(coloured(methods))[::-1]
    for y, (colour, _, runs) in enumerate(rows):
        numbers = [values(run) for run in runs]
        mean, half = mean_and_interval(numbers)
        axis.plot(numbers, [y] * len(numbers), "o", color=colour, alpha=0.6, markersize=5, markeredgewidth=0, zorder=3)
        axis.errorbar(mean, y, xerr=half, fmt="|", color=colour, markersize=14, capsize=3, linewidth=1.8)
    axis.axvline(np.mean([before(run) for _, _, runs in rows for run in runs]), color="0.6", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(rows)), [label(method) for _, method, _ in rows], fontsize=8)
    axis.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4), xlabel=f"{what} (grey: before training)")
    axis.grid(axis="x", alpha=0.3)


def figure_losses(runs):
    """These are the losses that were run, at the learning rate beside each name. A dot is a seed. The tick is the mean, and the
    bar is its interval. The best accuracy is that of any evaluation after the first step.
    """
    chosen = [run for some in tuned(runs).values() for run in some] or main_runs(runs)
    if len(by(chosen, lambda run: run.config["loss"])) < 3:
        return None
    figure, axes = canvas(1, 2, row_height=0.4 * len(by_method(chosen)) + 1)
    for axis, (title, value) in zip(axes, LAST_OR_BEST.items()):
        panel_dots(axis, by_method(chosen), value)
        axis.set_title(title)
    names = [f"{label(method)}  (lr {some[0].config['lr']:g})" for method, some in by_method(chosen).items()]
    axes[0].set_yticks(range(len(names)), names[::-1], fontsize=8)
    axes[1].set_yticklabels([])
    return figure, chosen


def figure_controls(runs):
    """FPA stands beside what it might be mistaken for: a constant weight, a sharpened present weight, correct rows alone. A
    dot is a seed. The tick is the mean, and the bar is its interval.
    """
    main = main_runs(runs)
    controls = where(main, loss=("constant", "sharpened", "sft"))
    if not where(controls, loss=("constant", "sharpened")):
        return None
    lams = {run.get("lam") for run in where(controls, loss="sharpened")} or {2.0}
    chosen = where(main, loss="off_rl") + where(main, loss="fpa", lam=tuple(lams), target=("both", "incorrect")) + controls
    methods = by_method(chosen)
    figure, (axis,) = canvas(1, 1, row_height=0.4 * len(methods) + 1)
    panel_dots(axis, methods)
    axis.set_title("Final accuracy")
    return figure, chosen


def figure_prompts(runs):
    """The final accuracy stands against the number of training prompts. All runs have as many steps, so fewer prompts are seen
    more often. A dot is a seed. The line joins the means, with their intervals.
    """
    methods = by_method(varying(runs, "prompts"))
    methods = {m: some for m, some in methods.items() if len({run.config["prompts"] for run in some}) > 1}
    if not methods:
        return None
    figure, (axis,) = canvas(1, 1, row_height=4)
    for colour, method, some in coloured(dict(list(methods.items())[:MOST_LINES])):
        numbers = by(sorted(some, key=lambda run: run.config["prompts"]), lambda run: run.config["prompts"])
        means, halves = zip(*(mean_and_interval([final(run) for run in seeds]) for seeds in numbers.values()))
        axis.errorbar(list(numbers), means, halves, color=colour, capsize=3, linewidth=1.8, label=label(method))
        for prompts, seeds in numbers.items():
            axis.plot([prompts] * len(seeds), [final(run) for run in seeds], "o", color=colour, alpha=0.35, markeredgewidth=0)
    ticks = sorted({run.config["prompts"] for some in methods.values() for run in some})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick}" for tick in ticks])
    rollouts = next(iter(methods.values()))[0].config["rollouts"]
    axis.set(xlabel=f"training prompts ({rollouts} rollouts each)", ylabel="final accuracy, T = 1", ylim=(0, 1))
    axis.legend(loc="lower right")
    return figure, [run for some in methods.values() for run in some]


def figure_cost(runs):
    """The accuracy stands against its cost in tokens, each loss at its best learning rate where other seeds chose one. Higher
    and further left is better. A dot is the end. Offline losses sample everything before the first step.
    """
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
        "millions of completion tokens sampled\n(offline: all before the first step)": lambda log: log["tokens_sampled"] / 1e6,
    }
    for axis, (title, x) in zip(axes, costs.items()):
        for colour, _, some in coloured(by_method(chosen)):
            draw(axis, some, lambda log: log["accuracy"], colour, x=x)
            axis.plot(np.mean([x(run.log)[-1] for run in some]), np.mean([*map(final, some)]), "o", color=colour)
        axis.set(xlabel=title, ylabel="accuracy, T = 1", ylim=(0, 1))
    legend(figure, by_method(chosen))
    return figure, chosen


# --- does the extrapolation predict the future?

VIRIDIS = {lam: plt.get_cmap("viridis")(index / 3.5) for index, lam in enumerate((0.5, 1, 2, 5))}


def diagnosed(runs):
    """{lr: [run]} of the runs that the extrapolation figures show: FPA's at λ = 2, or the first method's where it has none.

    They are those of the experiment `extrapolation`, or, where there are none, the reported ones.
    """
    chosen = with_table(of_experiment(runs, "extrapolation") or varying(runs, "lr"), "extrapolation")
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
        axis.sharey(axes[0])
    return figure, [run for some in groups.values() for run in some], panels


def figure_extrapolation(runs):
    """A curve is the distance of the future policy of step t from the policy of step t′, over the present policy's. Below 1 it
    is a forecast. A ring marks t′ = (1 + λ) t, the step that a straight line would reach.
    """
    if not (made := extrapolation_panels(runs)):
        return None
    figure, chosen, panels = made
    for axis, t, laters, _, means in panels:
        for lam, colour in VIRIDIS.items():
            curve = [2 ** means[later, lam] for later in laters]
            axis.plot([later / t for later in laters], curve, color=colour, marker=".", label=f"λ = {lam:g}")
            if (1 + lam) * t in laters:
                axis.plot(1 + lam, curve[laters.index((1 + lam) * t)], "o", color=colour, markerfacecolor="none", markersize=11)
        axis.axhline(1, color="0.3", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=(1.2, 50))
        axis.set_xticks([1.5, 3, 6, 12, 24, 48], ["1.5", "3", "6", "12", "24", "48"])
        axis.minorticks_off()
    for axis, t, *_ in panels:
        if t == panels[0][1]:
            axis.set_ylabel("KL from π at t′, log scale:\nfuture / present policy")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, chosen


def figure_extrapolation_map(runs):
    """Blue: the future policy of step t is nearer to the policy of the later step t′ than the present one is, a forecast. Red:
    farther. The black line marks t′ = (1 + λ) t, the step that a straight line would reach.
    """
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
        if t == panels[0][1]:
            axis.set_ylabel("λ")
    axes = [panel[0] for panel in panels]
    said = "log₂ of KL from π at t′,\nfuture / present policy, cut at ±4"
    figure.colorbar(image, ax=axes, label=said, extend="both", shrink=0.8)
    return figure, chosen


def figure_forecast(runs):
    """Does the future policy of step t forecast the policy of t′ = (1 + λ) t? Below 1 it is nearer than the present policy; in
    the last panel, above 0 it orders the answers better.
    """
    groups = diagnosed(runs)
    kinds = {
        "kl": "KL",
        "tv": "Total variation",
        "token_error": "Sampled tokens' |Δ logp|",
        "coefficient_error": "π̄",
    }
    lams, styles = (0.5, 1, 2), dict(zip(groups, ("-", "--", ":", "-.")))
    if not groups or len(groups) > len(styles):
        return None
    figure, axes = canvas(2, 3)
    for axis, column in zip(axes, [*kinds, "coefficient_rank"]):
        difference = column == "coefficient_rank"
        all_tables = {lr: [extrapolated(run, column) for run in some] for lr, some in groups.items()}
        for (lr, style), lam in itertools.product(styles.items(), lams):
            tables = all_tables[lr]
            starts = [t for t, later, at in tables[0] if at == lam and later == (1 + lam) * t]
            if not starts:
                continue
            pairs = np.array([[table[t, (1 + lam) * t, lam] for t in starts] for table in tables])  # (seeds, starts, 2)
            future, present = np.moveaxis(pairs, -1, 0)
            curve = (future - present).mean(0) if difference else np.exp(np.log(future / present).mean(0))
            axis.plot(starts, curve, style, color=VIRIDIS[lam], marker=".")
        axis.set(xscale="log", xlabel="t", title=kinds.get(column, "Rank correlation of π̄"))
        axis.set_xticks([10, 30, 100, 300], ["10", "30", "100", "300"])
        axis.axhline(0 if difference else 1, color="0.3", linewidth=0.8)
        axis.set_ylabel("future − present" if difference else "future / present, log scale")
        if not difference:
            axis.set_yscale("log")
            axis.set_yticks([0.1, 0.3, 1, 3, 10, 30, 100], ["0.1", "0.3", "1", "3", "10", "30", "100"])
        axis.minorticks_off()
    axes[5].set_visible(False)
    handles = [Line2D([], [], color=VIRIDIS[lam], label=f"λ = {lam:g}") for lam in lams]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=f"lr {lr:g}") for lr, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure, [run for some in groups.values() for run in some]


# --- every run of the study


def figure_ratio(runs):
    """A coloured dot is a run of the panel's loss, at any learning rate, and a grey one is any other run. To the right,
    incorrect rows weigh more beside correct ones over the whole training. A ratio below 0.01 is drawn at 0.01.
    """
    chosen = [run for run in runs if not LOSSES[run.config["loss"]].online and METRIC in run.log]
    chosen = [run for run in chosen if run.config["steps"] == 1000 and np.isfinite(ratio_of_coefficients(run))]
    chosen = [run for run in chosen if not {"pilot", "short", "slips"} & {*run.experiments}]  # other tasks and base models
    losses = by(chosen, lambda run: run.config["loss"])
    if len(losses) < 7:  # too few for a cloud
        return None
    base = np.mean([run.log[METRIC][0] for run in chosen])
    dots = {name: [(max(ratio_of_coefficients(run), 0.01), metric(run)) for run in some] for name, some in losses.items()}
    every = [dot for some in dots.values() for dot in some]
    figure, axes = canvas(-(-len(losses) // 4), 4, row_height=2.6)
    for axis, name in zip(axes, [name for name in LOSSES if name in losses]):
        for some, colour in ((every, "0.85"), (dots[name], colour_of(name))):
            axis.plot(*zip(*some), "o", markersize=3, markeredgewidth=0, color=colour)
        axis.axhline(base, color="black", linestyle=":", linewidth=1, label="base model, mean")
        axis.set(title=LOSSES[name].label, xscale="log", xlabel="$C_l|y|/C_w|y|$, log scale", ylabel="accuracy, T = 0.7")
        axis.set_ylim(-0.02, 1.02)
    for axis in axes[len(losses) :]:
        axis.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
    return figure, chosen


def figure_diversity(runs):
    """Each loss at its tuned setting: accuracy at T = 0.7 against pass@16. A dot is a seed. The tick is the mean, and the bar
    is its interval. A loss whose pass@16 lies to the left of the grey line has given up other answers.
    """
    chosen = of_experiment(runs, "final")
    methods = sorted(by_method(chosen).items(), key=lambda item: -np.mean([*map(metric, item[1])]))
    if len(methods) < 2:
        return None
    figure, axes = canvas(1, 2, row_height=0.3 * len(methods) + 1)
    for axis, (name, what) in zip(axes, {METRIC: "accuracy, T = 0.7", "test_pass@16": "pass@16"}.items()):
        panel_dots(axis, dict(methods), lambda run: run.log[name][-1], lambda run: run.log[name][0], what)
        axis.set_xlim(0, 1.02)
    axes[0].set_yticks(range(len(methods)), [label(method).split(",")[0] for method, _ in methods[::-1]], fontsize=8)
    axes[1].set_yticklabels([])
    return figure, chosen


# --- single tokens


def token_lines(run, pair, side):
    """Of one trace in one run: log-ratios at each of a few steps, a name for each, the tokens, the first wrong one."""
    table = run.tables["tokens"]
    at = np.flatnonzero((table["pair"] == pair) & (table["side"] == side))
    steps = table["step"][at]
    shown = dict.fromkeys(np.abs(steps - share * steps[-1]).argmin() for share in (0.1, 0.5, 1))
    lines = [[float(ratio) for ratio in table["logratios"][at[i]].split()] for i in shown]
    characters = texts(table["tokens"][at[0]])
    return lines, [f"{label(run.method)}  step {steps[i]:.0f}" for i in shown], characters, table["first_wrong"][at[0]]


def panel_tokens(axis, runs, pair, side):
    """A trace's tokens, a column each, and the runs' lines below each other."""
    lines, names, colours = [], [], []
    for run in runs:
        more, more_names, characters, first = token_lines(run, pair, side)
        if lines:
            axis.axhline(len(lines) - 0.5, color="black", linewidth=1)
        lines, names = lines + more, names + more_names
        colours += [colour_of(run.config["loss"])] * len(more)
    image = axis.imshow(lines, aspect="auto", cmap="RdBu", vmin=-4, vmax=4)
    axis.set_xticks(range(len(characters)), characters, fontsize=8, family="monospace")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    for text, colour in zip(axis.get_yticklabels(), colours):
        text.set_color(colour)
    if side == "incorrect":
        box = {"fill": False, "edgecolor": "black", "linewidth": 2, "clip_on": False}
        axis.add_patch(plt.Rectangle((first - 0.5, -0.5), 1, len(names), **box))
    axis.tick_params(length=0)
    return image


def figure_tokens(runs):
    """Red tokens lost probability, and blue ones gained. Pairs of a correct and an incorrect answer are ranked by the correct
    answer's log-ratio under the first method at the last step. Shown are the pair near the 10th percentile and the median pair.
    """
    chosen = few([run for run in with_table(main_runs(runs), "tokens") if run.config["loss"] in ("off_rl", "fpa")], most=2)
    chosen = [run for run in chosen if run.config["seed"] == chosen[0].config["seed"]]
    if len(chosen) < 2:
        return None
    pairs = {
        pair_at(share, chosen[0].tables["tokens"]): name
        for name, share in (("median pair", MEDIAN), ("10th-percentile pair", HIT))
    }
    drags = [by_drag(run.tables["tokens"]) for run in chosen]
    figure, axes = canvas(2 * len(pairs), 1, row_height=1.8)
    for axis, ((pair, name), side) in zip(axes, itertools.product(list(pairs.items())[::-1], ("correct", "incorrect"))):
        image = panel_tokens(axis, chosen, pair, side)
        title = f"{name}, {side} answer"
        if side == "correct":
            title += ": in all " + ", ".join(
                f"{drag[pair]:+.1f} nats under {label(run.method)}" for run, drag in zip(chosen, drags)
            )
        axis.set_title(title if side == "correct" else f"{title}: its first wrong token outlined")
    figure.colorbar(image, ax=list(axes), label="log-ratio of the token [nats], cut at ±4", shrink=0.5)
    return figure, chosen


FIGURES = figures_of(globals())
