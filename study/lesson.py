"""What lesson.ipynb needs beside the method: its cached rollouts, training with a loss of one's own, guesses, and its figures.

The base model of seed 0 ships in results/bases and its rollouts in docs/lesson/cache. They are what train.py makes with its
default flags, so that a class does not wait.
Left out: checkpoints, since the steps of a run take less than a minute.
"""

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import torch

import losses
import plots
import train
from losses import token_logps
from plumbing.batches import batch_order, pair_order
from plumbing.keeper import adamw, update
from study import diagnostics, drawing, explain
from study.results import by, by_method, label, main_runs, read_folder, where
from study.tables import BASES, copy_stages
from toy_math import stages
from toy_math.tokenizer import decode

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/lesson"
SEED, LR, BATCH, SAMPLES = 0, 2e-4, 64, 16  # train.py's defaults
BETA = losses.LOSSES["dpo"].defaults["beta"]
NAMED = ("logratio_correct", "logratio_incorrect")


# --- the data


def ship(out):
    """Put the stored base models, and the rollouts of seed 0, where train.py looks for them."""
    for folder in (BASES, FOLDER / "cache"):
        copy_stages(folder, out)


def world(out="runs"):
    """The World (toy_math/stages.py) of train.py's default flags at seed 0, on the CPU."""
    args = train.parse_args(["--out", str(out), "--device", "cpu"])
    ship(args.out)
    return stages.prepare(args, SEED, args.prompts[0])


def stored():
    """The committed runs of train.py's default setting: Off-RL, FPA, FPA on incorrect rows only, and SFT, five seeds each."""
    return main_runs(read_folder(ROOT / "results"))


def some_pairs(world, count=32):
    """Row numbers (count, 2) of a correct and an incorrect answer to one problem; no step of the correct one is wrong.

    So the two part at the incorrect one's first wrong token.
    """
    rollouts = world.rollouts
    pairs = pair_order(rollouts.reward, rollouts.problem_ids, 1, 8 * count, SEED).view(2, -1).T
    return pairs[rollouts.clean[pairs[:, 0]]][:count]


def pair_of(world):
    """The pair (2,) of `some_pairs` whose shared prefix is nearest to half of its longer answer."""
    pairs = some_pairs(world)
    return pairs[(explain.shared_share(world.rollouts, pairs) - 0.5).abs().argmin()]


def texts_of(world, pair):
    """The problem, the two answers, and the place at which they part."""
    rows = world.rollouts[pair]
    problem, *answers = (decode(row)[0] for row in (rows.inputs[0, 1 : rows.start + 1].tolist(), *rows.tokens[:, 1:].tolist()))
    return problem, answers, diagnostics.parting(world.rollouts, pair[None]).item()


# --- a guess


def guessed(*guesses):
    """Whether all of some guesses are written down; says so where one is not."""
    missing = any(guess is None or guess is ... for guess in guesses)
    if missing:
        print("Write your guess down first: fill in the cell above, run it, then run this one again.")
    return not missing


def solved(right):
    """Whether an exercise is solved; says so where it is not."""
    if not right:
        print("Solve the exercise first, then run this cell again.")
    return right


def compare(guess, measured, what):
    """Print a guess beside what came out."""
    if isinstance(measured, str):
        print(f"{what}: your guess {guess!r}, it is {measured!r}" + ("" if guess == measured else "   <- say why"))
    else:
        print(f"{what}: your guess {guess}, measured {measured:.3g}")


# --- training with a loss of one's own


def train_with(loss, world, steps=200, every=50):
    """Train a copy of the base model with loss(logits, ref_logits, tokens, mask, reward): {column: list}.

    The rows of each step, the optimizer and the evaluations are those of train.py's run of seed 0. So the log can lie over its
    curves. A loss with off_rl_loss's arguments is to be wrapped: lambda logits, ref_logits, *rest: off_rl_loss(logits, *rest).
    """
    model = copy.deepcopy(world.base)
    optimizer = adamw(model.parameters(), LR)
    order = batch_order(world.rollouts.reward, steps, BATCH, SEED)
    asked = dataclasses.replace(world, test=world.test[:1])  # the validation problems are enough
    exam = train.Exam(SimpleNamespace(loss="fpa", seed=SEED, lam=2.0, eval_samples=SAMPLES, steps=steps), asked)
    rows, since = [], []  # since: loss and norm of each step since the last row
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            loss_mean, norm_mean = torch.tensor(since).mean(0).tolist() if since else (math.nan, math.nan)
            rows.append({"step": step, "loss": loss_mean, "grad_norm": norm_mean, **exam(step, model)})
            since.clear()
            means = "   ".join(f"{name} {rows[-1][name]:+7.2f}" for name in NAMED)
            print(f"step {step:4}   accuracy {rows[-1]['accuracy']:.3f}   {means}")
        if step < steps:
            b = world.rollouts[order[step]]
            value = loss(model(b.inputs, b.start), b.ref_logits, b.tokens, b.mask, b.reward)
            since.append((value.item(), update(model, optimizer, value).item()))
    return {name: [row[name] for row in rows] for name in rows[0] if not name.startswith("test_")}


def walk(world, steps=300, measured=(*range(0, 60, 4), 60, 80, 100), others=32):
    """Off-RL from the base model: (its policy after these steps, {column: list} of what happened at the measured ones).

    Of each measured step: what the batch's correct rows add (`up`) to the mean logp_sum of some correct rows of other problems
    and what its incorrect rows take away from it (`down`), as in batch.csv, and the `change` that the optimizer's step
    made, in nats.
    """
    policy, rollouts, run = copy.deepcopy(world.base), world.rollouts, SimpleNamespace(loss="off_rl", lam=0.0)
    order, rows = batch_order(rollouts.reward, steps, BATCH, SEED), []
    chosen = unseen(rollouts, order, measured, others)
    optimizer = adamw(policy.parameters(), LR)
    for step in range(steps):
        b = rollouts[order[step]]
        if step in measured:
            before, pairs = mean_logp(policy, rollouts[chosen]).item(), order[step].view(2, -1).T
            push = diagnostics.batch_gradients(policy, rollouts, pairs, chosen, run, train.add_logps)
        train.add_logps(policy, b)
        update(policy, optimizer, train.objective(b, run)[0])
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:4} of {steps}")
        if step in measured:
            change = mean_logp(policy, rollouts[chosen]).item() - before
            rows.append({"step": step, "up": push["up_others"], "down": push["down_others"], "change": change})
    return policy, {name: [row[name] for row in rows] for name in rows[0]}


def unseen(rollouts, order, measured, count):
    """Correct rows (count,) of no batch up to the last measured step; no measured batch has an answer to their problems."""
    ids = rollouts.problem_ids
    new = ~torch.isin(torch.arange(len(ids)), order[: max(measured) + 1])
    new &= ~torch.isin(ids, ids[order[list(measured)]])
    chosen = (new & (rollouts.reward > 0)).nonzero()[:count, 0]
    assert len(chosen) == count
    return chosen


def fastest_fall(batches):
    """The step of `walk` after which the other correct rows fell most."""
    return min(zip(batches["change"], batches["step"]))[1]


def print_batches(batches):
    """A line for each measured step of `walk`."""
    for step, up, down, change in zip(*batches.values()):
        wins = "   <- down wins" if down > up else ""
        print(f"step {step:3}   up {up:8.3f}   down {down:8.3f}   change {change:+.3f} nats{wins}")


def mean_logp(policy, b):
    """The mean logp_sum of a batch's rows."""
    return token_logps(policy(b.inputs, b.start), b.tokens, b.mask).sum(-1).mean()


# --- figures


def figure_own(runs, own, losses=("off_rl", "fpa")):
    """The stored seeds, a thin line each, and one's own runs {name: log} in black on the same axes."""
    figure, axes = drawing.canvas(1, 3, row_height=3.8)
    panels = {"accuracy": "accuracy, validation problems", "logratio_correct": "log-ratio of correct rows [nats]",
              "logratio_incorrect": "log-ratio of incorrect rows [nats]"}  # fmt: skip
    methods = by_method([run for run in where(runs, loss=losses) if run.get("target") in (None, "both")])
    styles = ("-", "--", ":", "-.")
    for axis, (name, title) in zip(axes, panels.items()):
        for colour, _, some in drawing.coloured(methods):
            for run in some:
                axis.plot(run.log["step"], run.log[name], color=colour, linewidth=0.9, alpha=0.7)
        for style, log in zip(styles, own.values()):
            axis.plot(log["step"], log[name], color="black", linestyle=style, linewidth=2.5)
        axis.set(title=title, xlabel="training step")
        if name != "accuracy":
            plots.symlog(axis)
    mine = [drawing.Line2D([], [], color="black", linestyle=style, label=name) for style, name in zip(styles, own)]
    drawing.legend(figure, methods, mine)
    return figure


def push(world, policy, pair):
    """What a small step of Off-RL on the incorrect row of a pair does to each token of the correct one (T-1,), in nats."""
    run = SimpleNamespace(loss="off_rl", lam=0.0)
    return explain.one_step(policy, world.rollouts, pair, None, run, rows=pair[1:])[-1][0]


def figure_step(world, policies, pair):
    """`push` for each of {name: policy}, a panel each: what the shared tokens lose, and what the others gain or lose."""
    _, (text, other), _ = texts_of(world, pair)
    shared = torch.tensor([token == other[i : i + 1] for i, token in enumerate(text)])  # at the same place
    figure, axes = drawing.canvas(len(policies), 1, row_height=2.4)
    for axis, (name, policy) in zip(axes, policies.items()):
        change = push(world, policy, pair)[: len(text)]
        colours = ["0.6" if same else drawing.colour_of("off_rl") for same in shared]
        axis.bar(range(len(text)), change.tolist(), color=colours)
        axis.set_xticks(range(len(text)), text, family="monospace")
        axis.set_yscale("symlog", linthresh=1e-5)
        axis.axhline(0, color="0.3", linewidth=0.8)
        sums = f"shared tokens (grey) {change[shared].sum():+.5f}, others {change[~shared].sum():+.5f}"
        axis.set(title=f"correct row, from {name}: {sums}", ylabel="Δ log π [nats]")
    return figure


def figure_batch(found):
    """Left: how a batch of Off-RL pushes correct rows of other problems. Right: what the optimizer's step then did to these."""
    figure, (left, right) = drawing.canvas(1, 2, row_height=3.6)
    net = [up - down for up, down in zip(found["up"], found["down"])]
    colours = [drawing.colour_of("sft" if value > 0 else "off_rl") for value in net]
    left.bar(range(len(net)), net, color=colours)
    left.set_xticks(range(len(net)), found["step"], fontsize=7)
    left.set_yscale("symlog", linthresh=1)
    left.axhline(0, color="0.3", linewidth=0.8)
    left.set(xlabel="step of Off-RL", ylabel="up − down [nats per unit of learning rate]", title="push on other correct rows")
    right.plot(found["step"], found["change"], color="black", marker="o")
    right.axhline(0, color="0.6", linewidth=0.8)
    right.set(xlabel="step of Off-RL", ylabel="Δ logp_sum of correct rows [nats]", title="what the step did to them")
    return figure


def figure_ratio(runs):
    """The mean weight of incorrect rows, C_l |y|, over that of correct ones, as means of each run's batches."""
    methods = by_method(where(runs, loss=("off_rl", "fpa")))
    figure, (axis, *_) = drawing.canvas(1, 1, row_height=3.6)
    for colour, _, some in drawing.coloured(methods):
        drawing.draw(axis, some, lambda log: log["coefficient_incorrect"] / log["coefficient_correct"], colour)
    axis.set(xlabel="training step", ylabel="mean C_l·|y| / mean C_w·|y|", ylim=(0, 1))
    drawing.legend(figure, methods)
    return figure


def sums_of(run):
    """Of a run's tokens.csv: {step: [(log-ratio of the correct row, of the incorrect one, π̄ and future π̄ of the latter)]}."""
    table = run.tables["tokens"]
    rows = [dict(zip(table, values)) for values in zip(*table.values())]
    found = {}
    for (step, _), (w, x) in by(rows, lambda row: (row["step"], row["pair"])).items():
        ratio_w, ratio_l, ref, future = (
            [float(x) for x in text.split()] for text in (w["logratios"], x["logratios"], x["ref_logps"], x["future_logps_2"])
        )
        present = (sum(ratio_l) + sum(ref)) / len(ref)
        row = sum(ratio_w), sum(ratio_l), math.exp(present), math.exp(sum(future) / len(future))
        found.setdefault(int(step), []).append(row)
    return found


def figure_brakes(run, dpo_brake):
    """DPO's brake, Off-RL's and FPA's on incorrect rows of one run, means over its pairs as a share of their start."""
    found = sums_of(run)
    brakes = {"DPO": [], "Off-RL": [], "FPA": []}
    for rows in found.values():
        count = len(rows)
        brakes["DPO"].append(sum(float(dpo_brake(w, x, BETA)) for w, x, _, _ in rows) / count)
        brakes["Off-RL"].append(sum(present for *_, present, _ in rows) / count)
        brakes["FPA"].append(sum(future for *_, future in rows) / count)
    figure, (axis, *_) = drawing.canvas(1, 1, row_height=3.6)
    brakes = {name: [value / values[0] for value in values] for name, values in brakes.items()}
    for (name, values), loss in zip(brakes.items(), ("dpo", "off_rl", "fpa")):
        said = f"{name}, β = {BETA:g}" if name == "DPO" else name
        axis.plot(list(found), values, color=drawing.colour_of(loss), label=said)
    axis.set(xlabel=f"training step of {label(run.method)}", ylabel="brake, as a share of its start", ylim=(0, 1.05))
    axis.legend()
    return figure, brakes


def figure_logs(logs):
    """The lab's runs {name: log} on shared axes: accuracy, the log-ratios of both kinds of rows, and the gradient's norm."""
    figure, axes = drawing.canvas(2, 2)
    colours = dict(zip(logs, ("black", *(drawing.COLOURS[loss] for loss in ("off_rl", "fpa", "sft", "constant")))))
    panels = {"accuracy": "linear", "logratio_correct": "symlog", "logratio_incorrect": "symlog", "grad_norm": "log"}
    for axis, (column, scale) in zip(axes, panels.items()):
        for name, log in logs.items():
            axis.plot(log["step"], log[column], color=colours[name], linestyle="--" if name == next(iter(logs)) else "-")
        axis.set(title=column, xlabel="training step", yscale=scale)
    lines = [drawing.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    return figure


# --- a number


def ends(runs):
    """{method: the mean accuracy of its runs at their last step}."""
    return {label(method): sum(run.log["accuracy"][-1] for run in some) / len(some) for method, some in by_method(runs).items()}
