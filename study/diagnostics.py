"""What `--diagnostics` measures beside the log, on the first pairs of a correct and an incorrect rollout of the same problem.

entanglement.csv   (claim C2): norms and inner products of the answers' gradients, and what a step of the run's own loss on
                   a pair does to its correct answer, an evaluation a row
tokens.csv         every token of some pairs: its log-ratio, and its log-probability under π_ref and under π̂ of four λ
extrapolation.csv  (claim C10): how far the future policy of step t is from the policy of a later step t', against the present's
batch.csv          (claims N1, N3): what a step of the run's own loss on all of the pairs does to their correct rows, and to
                   correct rows of other problems, and its coefficients, a step a row

Left out: the entanglement of single answers to different problems, and the covariances of Yuan et al. (2024).
"""

import numpy as np
import torch

from losses import LOSSES, future_lam, future_logits, objective, token_logps
from plumbing.batches import pair_order
from plumbing.files import write_csv

PAIRS, GRADIENTS = 32, 8  # GRADIENTS: the pairs of study/forecast.py, whose models are large
TOKEN_LAMS = (1, 2, 5, 10)  # of tokens.csv
SNAPSHOTS = [10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640, 960]  # so that t' = (1 + lam) t is among them
LAMS = [0.5, 1, 2, 3, 5, 7]
EARLY, LATER = 200, 20  # batch.csv has each of the first EARLY steps, then every LATER-th


@torch.no_grad()
def coefficients(model, rollouts, pairs, run, add_logps):
    """The run's own coefficients C (P, 2) of pairs (P, 2); NaN of a loss that takes what only its training step has, as kto.

    add_logps is train.py's, which imports this file.
    """
    b = rollouts[pairs.T.flatten()]  # the correct rows first
    add_logps(model, b, future_lam(run))
    if not all(hasattr(b, name) for name in LOSSES[run.loss].inputs):
        return torch.full(pairs.shape, torch.nan, device=pairs.device)
    return objective(b, run)[1].view(2, -1).T


def gradient(scalar, model):
    """A scalar's gradient by all of the model's parameters, flat. The graph is kept for the next one."""
    parts = torch.autograd.grad(scalar, model.parameters(), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def batch_gradients(model, rollouts, pairs, others, run, add_logps):
    """A row of batch.csv: as `net` of `entanglement`, of one batch instead of a mean over pairs: pairs (P, 2) hold
    its correct and its incorrect rows.

    `up` and `down` are what the loss's correct and its incorrect rows do to the mean logp_sum of the correct ones, the slopes
    along their parts of -grad loss, in nats per unit of learning rate. `up_others` and `down_others` are what they do to the
    correct rows `others`, of other problems. The coefficients C |y| are means over rows.
    """
    weights = coefficients(model, rollouts, pairs, run, add_logps).T  # (2, P)
    batches = [rollouts[rows] for rows in (*pairs.T, others)]
    *sides, other = (token_logps(model(b.inputs, b.start), b.tokens, b.mask).sum(-1) for b in batches)
    parts = [gradient((some * logp_sum).sum() / pairs.numel(), model) for some, logp_sum in zip(weights, sides)]
    targets = [gradient(logp_sum.mean(), model) for logp_sum in (sides[0], other)]
    slopes = [(target @ part).item() for target in targets for part in parts]
    means = (weights * rollouts.length[pairs.T]).mean(1).tolist()
    names = ("up", "down", "up_others", "down_others", "coefficient_correct", "coefficient_incorrect")
    return dict(zip(names, slopes + means))


def parting(rollouts, pairs):
    """The first token at which the rollouts of each pair (P, 2) differ, counted from the completion's first: (P,)."""
    correct, incorrect = (rollouts.tokens[rows] for rows in pairs.T)
    return (correct != incorrect).int().argmax(-1) - 1  # position 0 holds the last token of the prompt


def entangled(pairs):
    """{column: values (P,)} of pairs (correct, incorrect) of the flat gradients of two answers' logp_sum.

    a = |grad logp_w|^2, b = |grad logp_l|^2, g their inner product, cosine = g / sqrt(a b), and the share of pairs with g > a,
    whose correct answer loses probability in a small step that weights both alike (Yuan et al., arXiv 2410.13828).
    """
    a, b, g = torch.stack([torch.stack([w @ w, x @ x, w @ x]) for w, x in pairs]).T
    return {"a": a, "b": b, "g": g, "cosine": g / (a * b).sqrt(), "share_g_above_a": (g > a).float()}


def entanglement(model, rollouts, pairs, run, add_logps):
    """Means of `entangled` over pairs (P, 2) of row numbers, a correct and an incorrect one, and of net = C_w a - C_l g.

    net decides for the run's loss, which weights the two answers by its own C. It is the slope of logp_w, in nats per unit
    of learning rate, along -grad of the pair's summed loss, -C_w logp_w + C_l logp_l. Below 0 a small step on the pair lowers
    its correct answer.
    """

    def gradient_of(row):
        b = rollouts[row]
        return gradient(token_logps(model(b.inputs, b.start), b.tokens, b.mask).sum(), model)

    values = entangled([gradient_of(row) for row in pair.split(1)] for pair in pairs)
    weight_w, weight_l = coefficients(model, rollouts, pairs, run, add_logps).T
    net = weight_w * values["a"] - weight_l * values["g"]
    values |= {"net": net, "share_net_below_0": (net < 0).float().masked_fill(net.isnan(), torch.nan)}
    return {name: value.mean().item() for name, value in values.items()}


@torch.no_grad()
def token_rows(logits, b, written):
    """Rows of tokens.csv, of logits (2P, T, V) of a batch: a correct and an incorrect rollout of each pair in turn.

    first_wrong is the first token at which the two sides differ. It is the incorrect side's first wrong token where no step of
    the correct side is wrong. written: a list of token ids -> text.
    """
    start = b.mask[::2].int().argmax(-1)  # of a pair's completions, whose prompt is the same
    first = ((b.tokens[::2] != b.tokens[1::2]).int().argmax(-1) - start).tolist()
    logps, ref_logps = (token_logps(some, b.tokens, b.mask) for some in (logits, b.ref_logits))
    columns, rows = {"logratios": (logps - ref_logps, 3), "ref_logps": (ref_logps, 3)}, []  # and how many decimals
    for lam in TOKEN_LAMS:
        columns[f"future_logps_{lam}"] = token_logps(future_logits(logits, b.ref_logits, lam), b.tokens, b.mask), 2
    for row, kept in enumerate(b.mask[:, 1:]):
        texts = {
            name: " ".join(f"{round(x, decimals) + 0.0:g}" for x in values[row, kept].tolist())  # + 0.0: no "-0"
            for name, (values, decimals) in columns.items()
        }
        names = {"pair": row // 2, "side": ("correct", "incorrect")[row % 2], "first_wrong": first[row // 2]}
        rows.append({**names, "tokens": written(b.tokens[row, 1:][kept].tolist()), **texts})
    return rows


def straightness(snapshots, later, b):
    """R² of a line through the log-probabilities of sampled tokens over the snapshots up to a step, all tokens' lines together.

    NaN below three snapshots. (Linear drift in RLVR: arXiv 2601.04537.)
    """
    steps = [step for step in snapshots if step <= later]
    if len(steps) < 3:
        return float("nan")
    y = torch.stack([token_logps(snapshots[step], b.tokens, b.mask)[b.mask[:, 1:]] for step in steps]).double()  # (S, N)
    x = torch.tensor(steps, dtype=y.dtype, device=y.device)[:, None]
    x, y = x - x.mean(), y - y.mean(0)
    slope = (x * y).sum(0) / (x * x).sum()
    return (1 - ((y - slope * x) ** 2).sum() / (y**2).sum()).item()


def distances(future, later, tokens, mask, length):
    """How far one policy is from a later one, both as logits (B, T, V): the columns of extrapolation.csv.

    kl, KL(later | future), and tv, total variation, of the whole distributions, and token_error, |log pi - log pi'| of the
    sampled token only, are means over completion tokens; coefficient_error, |pi_bar - pi_bar'|, and coefficient_rank,
    Spearman's correlation of the two, are over answers.
    """
    scored = mask[:, 1:]
    log_p, log_q = (logits[:, :-1].log_softmax(-1) for logits in (later, future))  # (B, T - 1, V)
    p, q = (token_logps(logits, tokens, mask) for logits in (later, future))  # (B, T - 1)
    p_bar, q_bar = ((logps.sum(-1) / length).exp() for logps in (p, q))
    ranks = [values.argsort().argsort().cpu().numpy() for values in (p_bar, q_bar)]
    return {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1)[scored].mean().item(),
        "tv": (log_p.exp() - log_q.exp()).abs().sum(-1)[scored].mean().item() / 2,
        "token_error": (p - q)[scored].abs().mean().item(),
        "coefficient_error": (p_bar - q_bar).abs().mean().item(),
        "coefficient_rank": np.corrcoef(*ranks)[0, 1],
    }


def extrapolation(snapshots, later, b):
    """Rows of extrapolation.csv to a later step, from {step: completion logits of a batch b}; lam 0 is the present policy."""
    linear = straightness(snapshots, later, b)
    for t in snapshots:
        if t < later:
            for lam in [0, *LAMS]:
                future = future_logits(snapshots[t], b.ref_logits, lam)
                measured = distances(future, snapshots[later], b.tokens, b.mask, b.length)
                yield {"t": t, "later": later, "lam": lam, **measured, "linear_r2": linear}


class Observer:
    """Call it before every step and after the last one; it measures and writes the tables. A part of a checkpoint.

    It observes the first pairs that a loss on pairs would train on. `run` holds the loss, whose C it takes. add_logps is
    train.py's. Raises UserError where there are no pairs.
    """

    def __init__(self, model, rollouts, run, folder, add_logps):
        self.model, self.rollouts, self.run, self.folder, self.add_logps = model, rollouts, run, folder, add_logps
        pairs = pair_order(rollouts.reward, rollouts.problem_ids, 1, 2 * PAIRS, run.seed).view(2, -1).T  # (P, 2)
        self.pairs = pairs.to(rollouts.reward.device)
        ids = rollouts.problem_ids
        others = ((rollouts.reward > 0) & ~torch.isin(ids, ids[self.pairs[:, 0]])).nonzero()[:, 0]
        self.others = others[:: max(len(others) // PAIRS, 1)][:PAIRS]  # spread over the other problems
        self.token_pairs = self.pairs[rollouts.clean[self.pairs[:, 0]]]
        self.snapshots, self.tables = {}, {}  # {step: completion logits}, {file name without .csv: rows}

    def __call__(self, step, at_evaluation):
        """Measure what this step asks for, and write the tables that it adds to."""
        added = {}
        if step in SNAPSHOTS:
            b = self.rollouts[self.pairs.flatten()]
            with torch.no_grad():
                self.snapshots[step] = self.model(b.inputs, b.start)
            added["extrapolation"] = list(extrapolation(self.snapshots, step, b))
        if at_evaluation:
            measured = entanglement(self.model, self.rollouts, self.pairs, self.run, self.add_logps)
            added["entanglement"] = [{"step": step, **measured}]
            added["tokens"] = [{"step": step, **row} for row in self.tokens()]
        if step < EARLY or step % LATER == 0:
            measured = batch_gradients(self.model, self.rollouts, self.pairs, self.others, self.run, self.add_logps)
            added["batch"] = [{"step": step, **measured}]
        for name, new in added.items():
            if new:
                self.tables[name] = [*self.tables.get(name, []), *new]
                write_csv(self.folder / f"{name}.csv", self.tables[name])

    @torch.no_grad()
    def tokens(self):
        b = self.rollouts[self.token_pairs.flatten()]
        return token_rows(self.model(b.inputs, b.start), b, lambda ids: " ".join(map(str, ids)))

    def state(self):
        return {"tables": self.tables, "snapshots": {str(step): logits for step, logits in self.snapshots.items()}}

    def restore(self, state):
        self.tables = state["tables"]
        device = self.rollouts.reward.device
        self.snapshots = {int(step): logits.to(device) for step, logits in state["snapshots"].items()}
