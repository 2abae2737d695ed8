"""The method on one terminal screen: a pair of rollouts, its coefficients, and what one step does to every token.

    python -m study.explain fpa      # or off_rl, simper, dpo, rpo, kto: each beside its FPA form; flags as train.py's

The pair is a correct and an incorrect rollout of the same problem. First the policy takes some steps of the plain loss from the
base model, where the future policy would be the present one. The step explained is of plain gradient descent, on this pair
alone. Both forms take it with one learning rate, so that they differ in their coefficients only.
"""

import copy
import sys
from types import SimpleNamespace

import torch

import train
from losses import HYPERPARAMETERS, LOSSES, objective, token_logps
from plumbing import flags
from plumbing.batches import batch_order, pair_order
from plumbing.files import NonFiniteError, UserError
from plumbing.keeper import adamw, update
from toy_math.stages import prepare
from toy_math.tokenizer import decode

WALK = 100  # steps of the plain loss before the one that is explained
STEP = 5e-4  # the learning rate of that one
MARKS = ((0.2, "↑", "↓"), (0.02, "+", "-"), (0.0, "·", "·"))  # for changes of at least this share of the largest


def one_step(policy, rollouts, pair, z0, run, rows=None):
    """One step on the pair (2,), or on some of its rows: what moves it, and the change of the pair's log-probabilities.

    Of the R rows it returns C, π̄ and the future π̄, (R,) each, and of the pair's tokens the change (2, T-1). z0 is kto's, None
    for the others.
    """
    model, both = copy.deepcopy(policy), rollouts[pair]
    b = rollouts[pair if rows is None else rows]
    train.add_logps(model, b, run.lam)
    b.z0 = z0
    loss, coefficient = objective(b, run)
    loss.backward()
    with torch.no_grad():
        before = token_logps(model(both.inputs, both.start), both.tokens, both.mask)
        for parameter in model.parameters():
            parameter -= STEP * parameter.grad
        change = token_logps(model(both.inputs, both.start), both.tokens, both.mask) - before
    return coefficient, (b.logp_sum.detach() / b.length).exp(), (b.future_logp_sum / b.length).exp(), change


def strip(change, largest):
    """A mark a token: how far its log-probability rises or falls."""
    marks = [next(mark for mark in MARKS if abs(x) >= mark[0] * largest) for x in change]
    return "".join(up if x > 0 else down for (_, up, down), x in zip(marks, change))


def wide(symbol, width):
    """Padded to columns of a terminal, where the hat of π̂ takes none."""
    return symbol + " " * (width - len(symbol) + symbol.count("\u0302"))


def plain_and_fpa(args):
    """The two runs to compare: the loss args.explain as published, and its FPA form at the first value of each flag."""
    settings = []
    for lam in (0.0, args.lam[0]):
        first = {name: value[:1] for name, value in vars(args).items() if name in HYPERPARAMETERS and isinstance(value, list)}
        one = SimpleNamespace(**{**vars(args), **first, "loss": [args.explain], "lam": [lam]})
        settings.append(SimpleNamespace(**{"lam": 0.0, **flags.methods(one, LOSSES, HYPERPARAMETERS)[0]}))
    return settings


def walk(policy, rollouts, order, run, lr, reference):
    """Train the policy, in place, on the rows of each step."""
    optimizer = adamw(policy.parameters(), lr)
    for rows in order:
        b = rollouts[rows]
        train.add_logps(policy, b)
        if "z0" in LOSSES[run.loss].inputs:
            b.z0 = train.kto_z0(policy, reference, b)
        update(policy, optimizer, objective(b, run)[0])


def explain(args):
    """Print the screen for the loss args.explain, at the first --lam and --seed. Raises UserError, NonFiniteError."""
    seed, lam = args.seed[0], args.lam[0]
    if len(args.lam) > 1:
        print(f"--explain takes one --lam: {lam:g}")
    present, future = plain_and_fpa(args)
    world = prepare(args, seed, args.prompts[0])
    rollouts, policy = world.rollouts, copy.deepcopy(world.base)
    pairs = pair_order(rollouts.reward, rollouts.problem_ids, WALK, args.batch_size, seed).to(args.device)
    rows = batch_order(rollouts.reward, WALK, args.batch_size, seed).to(args.device)
    walk(policy, rollouts, pairs if LOSSES[present.loss].pairs else rows, present, args.lr[0], world.base)

    candidates = pairs.view(WALK, 2, -1).mT.flatten(0, 1)
    clean = candidates[rollouts.clean[candidates[:, 0]]]  # so that they part at the first wrong token
    if not len(clean):
        raise UserError("no correct rollout without a wrong step: change --slip, --base-steps, --prompts or --rollouts")
    pair = clean[0]
    z0 = train.kto_z0(policy, world.base, rollouts[rows[0]])
    steps = {name: one_step(policy, rollouts, pair, z0, run) for name, run in (("C(π)", present), ("C(π̂)", future))}
    if not all(change.isfinite().all() for *_, change in steps.values()):
        raise NonFiniteError(f"the step at λ = {lam:g} is not finite")
    both = rollouts[pair]
    texts = [decode(row[1:].tolist())[0] for row in both.tokens]
    first = next((i for i, (one, other) in enumerate(zip(*texts)) if one != other), min(map(len, texts)))
    problem = decode(both.inputs[0, 1 : both.start + 1].tolist())[0]
    print(screen(problem, texts, first, both.length.tolist(), steps))
    print(f"\nThe policy is {WALK} steps of {present.loss} away from the base model of seed {seed}; λ = {lam:g}.")


def screen(problem, texts, first, length, steps):
    """The lines: each form's weight of ∇ logp_mean, C·|y|, a mark for every token's change, and the changes' sums."""
    (c_present, pi, _, change), (c_future, _, pi_hat, future_change) = steps.values()
    largest = max(change.abs().max().item(), future_change.abs().max().item())
    lines = [f"\n{problem}\n", f"{'':12}  |y|        π̄  future π̄  C(π)·|y|  C(π̂)·|y|     ratio"]
    for side, name in enumerate(("correct", "incorrect")):
        weights = f"{c_present[side] * length[side]:10.4f}{c_future[side] * length[side]:10.4f}"
        ratio = c_future[side] / c_present[side]
        lines.append(f"{name:12}{length[side]:5d}{pi[side]:10.3f}{pi_hat[side]:10.3f}{weights}{ratio:10.2f}")
    lines.append("\nOne step with each coefficient, token by token: ↑ ↓ far, + - a little, · hardly; ^ the first wrong token")
    for side, name in enumerate(("correct", "incorrect")):
        lines.append(f"\n{name:12}{texts[side]}")
        lines += [
            f"  {wide(symbol, 10)}{strip(x[3][side, : len(texts[side])].tolist(), largest)}" for symbol, x in steps.items()
        ]
        lines.append(" " * (12 + first) + "^")
    lines.append(f"\n{'log-probability, nats':24}{'before ^':>10}{'at ^':>10}{'after ^':>10}{'sum':>10}")
    for side, name in enumerate(("correct", "incorrect")):
        for symbol, x in steps.items():
            row = x[3][side]
            sums = (row[:first].sum(), row[first], row[first + 1 :].sum(), row.sum())
            lines.append(f"{name:12}{wide(symbol, 12)}" + "".join(f"{value:+10.4f}" for value in sums))
    return "\n".join(lines)


def run(argv=None):
    """The command: a loss's name, then train.py's flags; or these flags with --explain among them, from train.py's door."""
    argv = sys.argv[1:] if argv is None else argv
    with flags.command("python -m study.explain"):
        named = argv and not argv[0].startswith("-")
        args = train.parse_args(["--explain", *argv] if named else argv)
        if not args.explain:
            raise UserError("name a loss: python -m study.explain fpa")
        explain(args)


if __name__ == "__main__":
    run()
