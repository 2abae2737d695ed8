"""The method on one terminal screen: a pair of rollouts, its coefficients, and what one step does to every token.

    python train.py --explain fpa    # or off_rl, simper, dpo, rpo, kto: each beside its FPA form

The pair is a correct and an incorrect rollout of the same problem. The policy has taken some steps of the plain loss from the
base model, where the future policy would be the present one. The step explained is of plain gradient descent, on this pair
alone, and of one learning rate, so that the two forms differ in their coefficients only.
"""

import copy

import torch

from files import NonFiniteError, UserError
from model import GPT
from options import method_settings
from stages import CONFIG, adamw, completion_logps, prepare
from toy_math.tokenizer import decode
from train import PAIRED, batch_order, kto_z0, objective, pair_order, training_step, trajectory_logps

WALK = 100  # steps of the plain loss before the one that is explained
STEP = 5e-4  # the learning rate of that one
MARKS = ((0.2, "↑", "↓"), (0.02, "+", "-"), (0.0, "·", "·"))  # for changes of at least this share of the largest


def one_step(policy, data, pair, z0, settings, rows=None):
    """One step on the pair (2,), or on some of its rows: what moves it, and the change of the pair's log-probabilities.

    Of the R rows C, π̄ and π̄̂, (R,) each, and of the pair's tokens (2, T). z0 is kto's, None for the others.
    """
    rows = pair if rows is None else rows
    model, start, length = copy.deepcopy(policy), data["start"], data["length"][rows]
    tokens, mask = data["tokens"][pair], data["mask"][pair]
    logp_sum, future_logp_sum = trajectory_logps(model, data, rows, settings["lam"])
    batch = {"logp_sum": logp_sum, "logratio": logp_sum - data["ref_logp_sum"][rows], "z0": z0}
    batch |= {"reward": data["reward"][rows], "length": length}
    loss, coefficient = objective(batch, future_logp_sum, settings)
    loss.backward()
    with torch.no_grad():
        before = completion_logps(model, tokens, mask, start)[1]
        for parameter in model.parameters():
            parameter -= STEP * parameter.grad
        change = completion_logps(model, tokens, mask, start)[1] - before
    return coefficient, (logp_sum.detach() / length).exp(), (future_logp_sum / length).exp(), change


def strip(change, largest):
    """A mark a token: how far its log-probability rises or falls."""
    marks = [next(mark for mark in MARKS if abs(x) >= mark[0] * largest) for x in change]
    return "".join(up if x > 0 else down for (_, up, down), x in zip(marks, change))


def wide(symbol, width):
    """Padded to columns of a terminal, where the hat of π̂ takes none."""
    return symbol + " " * (width - len(symbol) + symbol.count("\u0302"))


def explain(args):
    """Print the screen for the loss args.explain, at the first --lam and --seed. Raises UserError, NonFiniteError."""
    seed, lam = args.seed[0], args.lam[0]
    beta, alpha = (args.beta or [None])[0], args.alpha[0]
    present, future = (method_settings(args, args.explain, x, args.target[0], beta, alpha, None, None) for x in (0.0, lam))
    base, data, _, _ = prepare(args, seed, args.prompts[0])
    data = {**data, "reference": base}
    policy = GPT(CONFIG).to(args.device)
    policy.load_state_dict(base.state_dict())
    optimizer = adamw(policy, args.lr[0])
    pairs = pair_order(data["reward"], data["problem_ids"], WALK, args.batch_size, seed).to(args.device)
    rows = batch_order(data["reward"], WALK, args.batch_size, seed).to(args.device)
    for some in pairs if present["loss"] in PAIRED else rows:
        training_step(policy, optimizer, data, some, present)

    candidates = pairs.view(WALK, 2, -1).mT.flatten(0, 1)
    clean = candidates[data["clean"][candidates[:, 0]]]  # so that they part at the first wrong token
    if not len(clean):
        raise UserError("no correct rollout without a wrong step: change --slip, --base-steps, --prompts or --rollouts")
    pair = clean[0]
    z0 = kto_z0(policy, data, rows[0])
    steps = {"C(π)": one_step(policy, data, pair, z0, present), "C(π̂)": one_step(policy, data, pair, z0, future)}
    if not all(change.isfinite().all() for *_, change in steps.values()):
        raise NonFiniteError(f"the step at λ = {lam:g} is not finite")
    texts = [decode(row[data["start"] + 1 :].tolist())[0] for row in data["tokens"][pair]]
    first = next((i for i, (one, other) in enumerate(zip(*texts)) if one != other), min(map(len, texts)))
    problem = decode(data["tokens"][pair[0], 1 : data["start"] + 1].tolist())[0]
    print(screen(problem, texts, first, data["length"][pair].tolist(), steps))
    print(f"\nThe policy is {WALK} steps of {present['loss']} away from the base model of seed {seed}; λ = {lam:g}.")


def screen(problem, texts, first, length, steps):
    """The lines: coefficients and their factors, a mark for every token's change, and the changes' sums."""
    (c_present, pi, _, change), (c_future, _, pi_hat, future_change) = steps.values()
    largest = max(change.abs().max().item(), future_change.abs().max().item())
    lines = [f"\n{problem}\n", f"{'':12}  |y|      π̄       π̄̂      C(π)      C(π̂)   C(π̂) / C(π)"]
    for side, name in enumerate(("correct", "incorrect")):
        factors = f"{length[side]:5d}{pi[side]:9.3f}{pi_hat[side]:9.3f}"
        ratio = c_future[side] / c_present[side]
        lines.append(f"{name:12}{factors}{c_present[side]:10.5f}{c_future[side]:10.5f}{ratio:10.2f}")
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
