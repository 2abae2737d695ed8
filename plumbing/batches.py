"""Which rows each step is trained on, fixed before the first step, and the random generators behind it."""

import torch

from .files import UserError, digest


def seeded(device, *parts):
    """A torch generator of its own for every use, so that no use depends on how much another has drawn."""
    return torch.Generator(device).manual_seed(int(digest(parts), 16))


def walk(rows, count, generator):
    """The first `count` of some rows in epochs, each shuffled anew."""
    epochs = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-count // len(rows)))]
    return torch.cat(epochs)[:count]


def batch_order(reward, steps, batch_size, seed):
    """Row numbers (steps, batch_size): half correct, half incorrect, each half walking through its own shuffled epochs."""
    halves = []
    for label in (True, False):
        rows, generator = ((reward.cpu() > 0) == label).nonzero()[:, 0], seeded("cpu", seed, "order", label)
        halves.append(walk(rows, steps * batch_size // 2, generator).view(steps, -1))
    return torch.cat(halves, dim=1)


def pair_order(reward, problem_ids, steps, batch_size, seed):
    """Row numbers (steps, batch_size): correct rows, then, in the same order, an incorrect row of each one's problem.

    The incorrect rows walk through shuffled epochs, and each has a correct row of its problem drawn for it. Raises UserError
    where no problem has both.
    """
    correct, ids, generator = {}, problem_ids.tolist(), seeded("cpu", seed, "pairs")
    for row in (reward > 0).nonzero()[:, 0].tolist():
        correct.setdefault(ids[row], []).append(row)
    paired = [row for row in (reward < 0).nonzero()[:, 0].tolist() if ids[row] in correct]
    if not paired:
        raise UserError(f"no pairs: none of the {len(reward)} rollouts is incorrect to a problem that another is correct to")
    incorrect = walk(torch.tensor(paired), steps * batch_size // 2, generator)
    draws = torch.rand(len(incorrect), generator=generator).tolist()
    partners = [correct[ids[row]] for row in incorrect.tolist()]
    partners = torch.tensor([rows[int(draw * len(rows))] for rows, draw in zip(partners, draws)])
    return torch.cat([partners.view(steps, -1), incorrect.view(steps, -1)], dim=1)


def draw_order(run, reward, problem_ids, n_problems, *, pairs, online):
    """What each step is trained on, and each step's problem ids, both (steps, …).

    The order holds row numbers, or problem numbers of an online loss. run holds steps, batch_size, seed and rollouts.
    """
    if online:
        wanted = run.steps * (run.batch_size // run.rollouts)
        order = walk(torch.arange(n_problems), wanted, seeded("cpu", run.seed, "order")).view(run.steps, -1)
        return order, order
    if pairs:
        order = pair_order(reward, problem_ids, run.steps, run.batch_size, run.seed)
    else:
        order = batch_order(reward, run.steps, run.batch_size, run.seed)
    order = order.to(reward.device)
    return order, problem_ids[order]
