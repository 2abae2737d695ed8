"""The method on one terminal screen: a pair of rollouts, its coefficients, and what one step does to every token.

    python -m study.explain fpa      # or off_rl, simper, dpo, rpo, kto, topr: each beside its FPA form; flags as train.py's

First the policy takes some steps of the plain loss from the base model, where the future policy would be the present one. The
pair is a correct and an incorrect rollout of the same problem, from these steps' batches. It is the one that shares most before
it parts: the longest prefix, as a share of the longer rollout, the first of ties, where the correct rollout has no wrong step.
The step explained is of plain gradient descent, on this pair alone. Both forms take it with one learning rate, so that they
differ in their coefficients only. Beside the pair's sums stand their means over the first 64 such pairs, each of which takes
its own step.
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
from study.diagnostics import parting
from toy_math.stages import prepare
from toy_math.tokenizer import decode

WALK = 100  # steps of the plain loss before the one that is explained
STEP = 5e-4  # the learning rate of that one
PAIRS = 64  # whose means are printed beside it
PRESENT, FUTURE = "C(π)", "C(π̂)"  # the two forms
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
        print(f"--explain shows the first --lam alone: {lam:g}")
    present, future = plain_and_fpa(args)
    world = prepare(args, seed, args.prompts[0])
    rollouts, policy = world.rollouts, copy.deepcopy(world.base)
    pairs = pair_order(rollouts.reward, rollouts.problem_ids, WALK, args.batch_size, seed).to(args.device)
    rows = batch_order(rollouts.reward, WALK, args.batch_size, seed).to(args.device)
    walk(policy, rollouts, pairs if LOSSES[present.loss].pairs else rows, present, args.lr[0], world.base)

    candidates = pairs.view(WALK, 2, -1).mT.flatten(0, 1)
    clean = candidates[rollouts.clean[candidates[:, 0]]]  # so that they part at the first wrong token
    if not len(clean):
        raise UserError("no correct rollout without a wrong step: change --habit, --slip, --base-steps or --prompts")
    pair = clean[shared_share(rollouts, clean).argmax()]  # the first of ties
    z0 = train.kto_z0(policy, world.base, rollouts[rows[0]])

    def both_steps(pair):
        return {name: one_step(policy, rollouts, pair, z0, run) for name, run in ((PRESENT, present), (FUTURE, future))}

    steps, several = both_steps(pair), clean[:PAIRS]
    if not all(change.isfinite().all() for *_, change in steps.values()):
        raise NonFiniteError(f"the step at λ = {lam:g} is not finite")
    tables = torch.stack([sums(both_steps(one), parting(rollouts, one[None]).item()) for one in several])  # (P, 2, 2, 4)
    both = rollouts[pair]
    texts = [decode(row[1:].tolist())[0] for row in both.tokens]
    problem = decode(both.inputs[0, 1 : both.start + 1].tolist())[0]
    print(screen(problem, texts, parting(rollouts, pair[None]).item(), both.length.tolist(), steps, tables))
    print(f"\nThe policy is {WALK} steps of {present.loss} away from the base model of seed {seed}; λ = {lam:g}.")
    print(reading(tables))


def shared_share(rollouts, pairs):
    """The shared prefix of each pair (P, 2) as a share of its longer rollout: (P,), below 1."""
    return parting(rollouts, pairs) / rollouts.length[pairs].amax(-1)


def sums(steps, first):
    """Changes in nats: (2 sides, 2 forms, before, at and after the token where the sides part, and in all)."""
    changes = torch.stack([change for *_, change in steps.values()], dim=1)  # (2 sides, 2 forms, T - 1)
    parts = changes[..., :first].sum(-1), changes[..., first], changes[..., first + 1 :].sum(-1), changes.sum(-1)
    return torch.stack(parts, dim=-1)


def reading(tables):
    """What the means say, in a sentence, from (P pairs, 2 sides, 2 forms, 4 sums)."""
    correct = tables[:, 0, :, -1]  # (P, 2)
    (plain, fpa), (falls, fpa_falls) = correct.mean(0).tolist(), (correct < 0).sum(0).tolist()
    pairs = len(tables)
    return (
        f"Over {pairs} pairs, the plain step changes the correct rollouts by {plain:+.4f} nats on average,\n"
        f"and the FPA step by {fpa:+.4f}; {falls} of {pairs} fall under the plain step, {fpa_falls} under FPA's."
    )


def screen(problem, texts, first, length, steps, tables):
    """The lines: each form's weight of ∇ logp_mean, C·|y|, a mark for every token's change, and the changes' sums.

    Beside these sums stand the means of `tables`, as `reading` takes them.
    """
    (c_present, pi, _, change), (c_future, _, pi_hat, future_change) = steps.values()
    largest = max(change.abs().max().item(), future_change.abs().max().item())
    lines = [f"\n{problem}\n", f"{'':12}  |y|        π̄  future π̄  C(π)·|y|  C(π̂)·|y|     ratio"]
    for side, name in enumerate(("correct", "incorrect")):
        weights = f"{c_present[side] * length[side]:10.4f}{c_future[side] * length[side]:10.4f}"
        ratio = c_future[side] / c_present[side]
        lines.append(f"{name:12}{length[side]:5d}{pi[side]:10.3f}{pi_hat[side]:10.3f}{weights}{ratio:10.2f}")
    lines.append("\nOne step with each coefficient: ↑ ↓ far, + - a little, · hardly; ^ the first wrong token")
    for side, name in enumerate(("correct", "incorrect")):
        lines.append(f"\n{name:12}{texts[side]}")
        lines += [
            f"  {wide(symbol, 10)}{strip(x[3][side, : len(texts[side])].tolist(), largest)}" for symbol, x in steps.items()
        ]
        lines.append(" " * (12 + first) + "^")
    heads = "".join(f"{head:>9}" for head in ("before ^", "at ^", "after ^", "sum"))
    lines += [f"\n{'':18}{'this pair':>36}   {f'mean of {len(tables)} pairs':>36}", f"{'change, nats':18}{heads}   {heads}"]
    means = tables.mean(0)
    for side, name in enumerate(("correct", "incorrect")):
        for form, symbol in enumerate(steps):
            cells = ("".join(f"{value:+9.4f}" for value in some[side, form]) for some in (sums(steps, first), means))
            lines.append(f"{name:11}{wide(symbol, 7)}" + "   ".join(cells))
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
