"""The losses: Future Policy Approximation (FPA, arXiv 2509.19893) whole and copyable, then its neighbours, then one table.

`fpa_loss` is for you to copy, with `future_logits`, `token_logps` and `checked_length` below it. train.py gets its gradient
from `objective`, which calls `fpa`, and `surrogate` for the other losses' FPA forms.

Names: `logp_sum` is log pi(y|x) summed over a completion's tokens, `length` is their number |y|, logp_mean = logp_sum / length.
exp(logp_mean), in (0, 1], is the paper's pi_bar. `logratio` is logp_sum under pi_theta minus logp_sum under pi_ref. pi_hat is
the future policy. A row is an answer in a batch, w a correct one, l an incorrect one. Of pairs all correct rows come
first, then their incorrect partners. A surrogate has the method's gradient, and its value means nothing. Shapes: B rows, T
tokens, V vocabulary.

With reward r = +1 (correct) or -1 (incorrect) every offline loss has a gradient of one form,

    grad loss = - r C grad logp_sum

and the methods differ in the coefficient C. Only asymre, pessimistic and a_star_po can have a negative C. FPA replaces C(pi) by
C(pi_hat). Since grad logp_sum = |y| grad logp_mean, C |y| is the weight of grad logp_mean.

Left out: label smoothing and other variants of the neighbours, and GRPO's clipping and KL penalty.
"""

import copy
import functools
import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


def fpa_loss(logits, ref_logits, tokens, mask, reward, lam=2.0):
    """Future Policy Approximation: Off-RL, which maximises E[r pi_bar], with the gradient's weight from the future policy.

        grad J = E[ r sg[pi_bar of pi_hat] grad logp_mean ],    pi_hat = softmax(h + lam (h - h_ref))     (arXiv 2509.19893)

    sg[] stops the gradient.
    logits, ref_logits (B, T, V): what the trained model and the frozen model that sampled the rows say of tokens (B, T).
    mask (B, T): True on the completion's tokens, EOS included. reward (B,): +1 for a correct row, -1 for an incorrect one.
    Returns a scalar to minimise. Its gradient is the method's; its value measures nothing, because the weight is detached.
    Raises ValueError for other rewards and for a row without a completion token, AssertionError for shapes that differ.

    To use it: start the training at the frozen model, so that the first step is Off-RL's. Let half of each batch be correct.
    Compute ref_logits under torch.no_grad(), and both in float32, since lam magnifies rounding. Watch the accuracy and the
    log-ratio of correct rows, not the loss. FPA on incorrect rows only keeps Off-RL's weight, logp_mean.exp(), on correct rows.
    """
    length = checked_length(mask, reward)
    logp_mean = token_logps(logits, tokens, mask).sum(-1) / length  # what the policy thinks of each answer now
    future = future_logits(logits, ref_logits, lam)  # h + lam (h - h_ref)
    weight = (token_logps(future, tokens, mask).sum(-1) / length).exp().detach()  # the future pi_bar
    return -(reward * weight * logp_mean).mean()


def off_rl_loss(logits, tokens, mask, reward):
    """Vanilla offline RL: grad J = E[ r pi_bar grad logp_mean ], the present policy's weight. FPA at lam = 0.

    Shapes, return value and errors as in `fpa_loss`.
    """
    logp_mean = token_logps(logits, tokens, mask).sum(-1) / checked_length(mask, reward)
    weight = logp_mean.exp().detach()  # pi_bar itself; FPA's weight falls faster
    return -(reward * weight * logp_mean).mean()


def future_logits(logits, ref_logits, lam):
    """h_hat = (1 + lam) h_theta - lam h_ref: the logits of the future policy, the paper's extrapolation. Any shape, detached.

    It is computed as h_theta + lam (h_theta - h_ref), so that lam = 0 gives h_theta back exactly.
    """
    assert logits.shape == ref_logits.shape, {"logits": tuple(logits.shape), "ref_logits": tuple(ref_logits.shape)}
    logits, ref_logits = logits.detach().float(), ref_logits.detach().float()
    return logits + lam * (logits - ref_logits)


def token_logps(logits, tokens, mask):
    """Log-probability of every completion token; the one place that shifts logits against tokens.

    logits (B, T, V) as the model gave them for tokens (B, T); mask (B, T) is True on completion tokens (EOS included).
    Returns (B, T-1) float32: entry t is log pi(tokens[t+1] | tokens[:t+1]), and 0 where the mask is False.
    """
    shapes = {"logits": tuple(logits.shape), "tokens": tuple(tokens.shape), "mask": tuple(mask.shape)}
    assert logits.shape[:2] == tokens.shape == mask.shape, shapes
    ignored = ~mask[:, 1:].bool()
    logps = logits[:, :-1].float().log_softmax(-1)  # (B, T-1, V)
    logps = logps.gather(-1, tokens[:, 1:].masked_fill(ignored, 0)[..., None])[..., 0]  # (B, T-1)
    return logps.masked_fill(ignored, 0.0)


def checked_length(mask, reward):
    """|y| (B,), once the rewards are checked: a reward of 0 would silently drop its row. Raises ValueError."""
    assert reward.shape == mask.shape[:1], {"reward": tuple(reward.shape), "mask": tuple(mask.shape)}
    length = mask[:, 1:].sum(-1)
    if not (reward * reward == 1).all():
        raise ValueError(f"every reward must be +1 or -1; turn rewards of 0 and 1 into 2 * reward - 1: {reward.tolist()}")
    if not length.all():
        raise ValueError("a row has no completion token: mask must be True somewhere after the first position")
    return length


# --- from log-probabilities: every loss of the table takes (B,) tensors and returns losses and coefficients C (B,)

TARGETS = ("both", "correct", "incorrect")


def off_rl(logp_sum, length, reward):
    """Vanilla offline RL: maximise E[r pi_bar], so the loss is -r pi_bar. Autograd supplies C = pi_bar / |y|."""
    pi_bar = (logp_sum / length).exp()
    return -reward * pi_bar, (pi_bar / length).detach()


def fpa(logp_sum, future_logp_sum, length, reward, target="both"):
    """FPA: `fpa_loss` from log-probabilities. C = pi_bar / |y|, pi_bar at the future policy on the target's rows.

    The paper's targeted FPA: target "correct" or "incorrect" keeps the present coefficient on the other rows.
    """
    deciding = torch.where(target_rows(reward, target), future_logp_sum, logp_sum)
    coefficient = ((deciding / length).exp() / length).detach()
    return -reward * coefficient * logp_sum, coefficient


def fpa_form(logp_sum, reward, present, future, target="both", pairs=False):
    """A loss of C >= 0 with C at the future policy. Takes (B,) tensors, returns a scalar and the coefficients used (B,).

    The scalar, to be minimised, is a surrogate, as `fpa_loss` is. present and future are the loss's coefficients C at pi_theta
    and at pi_hat. With `off_rl`'s C this is FPA. `pairs`: the rows are pairs, and the mean is over pairs, as in DPO. Raises
    ValueError where the target is unknown or a coefficient is negative, for example where you pass log-probabilities.
    """
    if (present < 0).any() or (future < 0).any():
        raise ValueError("present and future must be coefficients C >= 0, as the losses return them, not log-probabilities")
    return surrogate(logp_sum, reward, present, future, target, pairs)


def surrogate(logp_sum, reward, present, future, target, pairs):
    """`fpa_form` without its check, which would synchronise a GPU at every step."""
    coefficient = torch.where(target_rows(reward, target), future, present).detach()
    return (-reward * coefficient * logp_sum).sum() / (len(reward) // 2 if pairs else len(reward)), coefficient


def target_rows(reward, target):
    """Which rows (B,) take the future policy's coefficient. Raises ValueError on an unknown target."""
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: one of {', '.join(TARGETS)}")
    return {"both": torch.ones_like(reward, dtype=torch.bool), "correct": reward > 0, "incorrect": reward < 0}[target]


def sharpened(logp_sum, length, reward, lam=2.0, target="both"):
    """A control for FPA that sees no future and no reference: the present coefficient to a power, C = pi_bar^(1 + lam) / |y|.

    On rows outside the target C is Off-RL's. A surrogate, as FPA's is.
    """
    exponent = 1 + lam * target_rows(reward, target).to(logp_sum.dtype)
    coefficient = ((logp_sum / length * exponent).exp() / length).detach()
    return -reward * coefficient * logp_sum, coefficient


def power(logp_sum, logratio, length, reward, lam=2.0, target="both"):
    """A control for FPA without extrapolated logits: C = min(pi_bar (pi_bar / pi_bar_ref)^lam, 1) / |y|.

    FPA's future policy is this product, token by token and normalised over the vocabulary. Target as in `sharpened`.
    """
    lam = lam * target_rows(reward, target).to(logp_sum.dtype)
    coefficient = (((logp_sum + lam * logratio) / length).clamp(max=0).exp() / length).detach()
    return -reward * coefficient * logp_sum, coefficient


def constant(logp_sum, length, reward, weight=0.25):
    """A control for FPA: Off-RL's C on correct rows, and a constant on incorrect ones, C_l = weight / |y|. A surrogate too."""
    coefficient = torch.where(reward > 0, (logp_sum / length).exp() / length, weight / length).detach()
    return -reward * coefficient * logp_sum, coefficient


def reinforce(logp_sum, length, reward):
    """REINFORCE on the fixed rows, without importance weights: maximise E[r logp_mean]. C = 1 / |y|."""
    return -reward * logp_sum / length, 1 / length


def nsr(logp_sum, length, reward, weight=0.1):
    """Weighted REINFORCE (Zhu et al., arXiv 2506.01347): C_w = weight / |y|, C_l = 1 / |y|. NSR has weight 0."""
    coefficient = torch.where(reward > 0, weight, 1.0).to(logp_sum.dtype) / length
    return -reward * coefficient * logp_sum, coefficient


def asymre(logp_sum, length, reward, mean_reward, shift=0.1):
    """AsymRE (Arnal et al., arXiv 2506.20520): maximise E[(r - V) logp_mean], V a little below the mean reward of the prompt.

    V = mean_reward - shift, mean_reward (B,) as in `pessimistic`. C = r (r - V) / |y|, which is negative where V passes r.
    """
    coefficient = reward * (reward - mean_reward + shift) / length
    return -reward * coefficient * logp_sum, coefficient


def topr(logp_sum, logratio, length, reward):
    """Tapered off-policy REINFORCE, TOPR (Le Roux et al., arXiv 2503.14286): C_w = 1 / |y|, C_l = min(rho, 1) / |y|.

    rho = exp(logratio), so it brakes by the distance from the reference policy. A surrogate too. The papers of NSR, AsymRE and
    TOPR sum over tokens. Here the sum is divided by |y|. Otherwise clipping the gradient's norm would set the step.
    """
    coefficient = (torch.where(reward > 0, 0.0, logratio.clamp(max=0)).exp() / length).detach()
    return -reward * coefficient * logp_sum, coefficient


def sft(logp_sum, length, reward):
    """Supervised fine-tuning on the correct rows only (rejection fine-tuning). C = 1 / |y| on correct rows, else 0."""
    correct = (reward > 0).to(logp_sum.dtype)
    return -reward * correct * logp_sum / length, correct / length


def kto(logratio, reward, z0, beta=0.1):
    """KTO (Ethayarajh et al. 2024): 1 - s, s = sigmoid(r beta (logratio - z0)). C = beta s (1 - s).

    z0 is a detached scalar of at least 0: the mean log-ratio of mismatched prompts and completions. It is the present
    policy's in the FPA form too. Both kinds of rows weigh the same, which the paper recommends where there are as many of each.
    """
    s = torch.sigmoid(reward * beta * (logratio - z0))
    return 1 - s, (beta * s * (1 - s)).detach()


def pessimistic(logratio, reward, mean_reward, beta=0.1, shift=0.0):
    """Regression of the log-ratio on a shifted advantage (Sakhi et al., arXiv 2605.28150): (beta logratio - A)^2.

    A = r - mean_reward + shift beta; mean_reward (B,) is over the rows of the same prompt. The shift as an argument of its own
    is our reading of the paper. C turns negative once beta logratio has passed A. docs/method.md derives the minimiser, and for
    which shifts it is pessimistic.
    """
    return regression(logratio, reward - mean_reward + shift * beta, reward, beta)


def a_star_po(logratio, reward, value, beta=1e-3):
    """A*-PO's regression (and OAPL's, whose reference lags behind): (beta logratio + V* - r01)^2, r01 = 1 if correct, else 0.

    value (B,) is `optimal_value` of each row's prompt. The minimiser is the Gibbs policy if `optimal_value`'s beta1
    equals beta. The defaults differ.
    """
    return regression(logratio, (1 + reward) / 2 - value, reward, beta)


def regression(logratio, advantage, reward, beta):
    """(beta logratio - advantage)^2. C = 2 beta r (advantage - beta logratio)."""
    error = advantage - beta * logratio
    return error**2, (2 * beta * reward * error).detach()


def optimal_value(reward, prompts, beta1=0.5):
    """A*-PO's V* = beta1 log mean exp(r01 / beta1) over the rows of a prompt, whose number prompts (B,) holds: (B,)."""
    mean = prompt_mean(((reward - 1) / 2 / beta1).exp(), prompts)  # less 1 in the exponent, so that it cannot overflow
    return 1 + beta1 * mean.log().clamp(min=-1 / beta1)  # where it underflows no row is correct, and V* is 0


def prompt_mean(values, prompts):
    """Each row's mean over the rows of its prompt: values (B,), prompts (B,) whole numbers from 0 -> (B,)."""
    sums = torch.zeros(int(prompts.max()) + 1, dtype=values.dtype, device=values.device)
    return (sums.index_add(0, prompts, values) / torch.bincount(prompts))[prompts]


# --- losses on pairs: losses (B/2,), coefficients (B,)


def simper(logp_sum, length):
    """SimPER (Xiao et al. 2025): -pi_bar(y_w) + pi_bar(y_l). C = pi_bar / |y|, Off-RL's (Proposition A.1 of FPA's paper)."""
    pi_bar = (logp_sum / length).exp()
    correct, incorrect = pi_bar.view(2, -1)
    return incorrect - correct, (pi_bar / length).detach()


def dpo(logratio, beta=0.1):
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(beta (D_w - D_l)), D log-ratios. C = beta sigmoid(beta (D_l - D_w))."""
    correct, incorrect = logratio.view(2, -1)  # an odd number of rows raises
    margin = beta * (correct - incorrect)
    return -F.logsigmoid(margin), (beta * torch.sigmoid(-margin)).repeat(2).detach()


def rpo(logratio, logp_sum, length, beta=0.1, alpha=1.0):
    """RPO (Pang et al. 2024, eq. 1): DPO + alpha times the negative logp_mean of y_w. C_w = DPO's + alpha / |y_w|, C_l = DPO's.

    The log-likelihood is divided by each sequence's own length, as in the paper; TRL averages over the batch's correct tokens.
    """
    losses, coefficient = dpo(logratio, beta)
    nll = -(logp_sum / length)[: len(losses)]
    return losses + alpha * nll, coefficient + torch.cat([alpha / length[: len(nll)], torch.zeros_like(nll)])


# --- online


def grpo(logps, advantage, mask, dapo=False):
    """GRPO (Shao et al. 2024, eq. 3, without clipping and KL): -A pi_theta / sg[pi_theta], the mean over a row's tokens.

    The policy that sampled is pi_theta itself, because each sample serves one step. So the ratio is 1, and clipping never acts.
    logps (B, T-1) as `token_logps` gives them; advantage (B,); mask (B, T). Returns losses (B,), whose mean is the objective,
    and C = |A| / |y|. With dapo the batch's mean |y| takes the place of |y|, in C too: every token of the batch weighs the
    same (DAPO, Yu et al. 2025, eq. 8).
    """
    gain = (logps - logps.detach()).exp() * advantage[:, None]  # (B, T-1)
    length = mask[:, 1:].sum(-1).float()
    length = (length.mean() if dapo else length).clamp(min=1)  # a collapsed policy may sample PAD at once
    return -gain.masked_fill(~mask[:, 1:].bool(), 0.0).sum(-1) / length, advantage.abs() / length


def group_advantage(reward, group_size):
    """GRPO's A = (r - mean) / (std + 1e-4) over groups of consecutive rows, std over group_size - 1: (B,) -> (B,)."""
    groups = reward.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


# --- the table: a loss is one row. Flags, their checks, help, labels and run names derive from it.


@dataclass(frozen=True)
class Loss:
    """A loss of the command line. Its function's arguments name the batch's tensors and the hyperparameters that it takes."""

    function: callable
    label: str  # in figures and tables
    idea: str  # one line
    defaults: dict = field(default_factory=dict)  # its hyperparameters, each with an entry in HYPERPARAMETERS
    pairs: bool = False  # its rows are pairs
    has_fpa_form: bool = False  # lam > 0 evaluates its coefficient at the future policy; `fpa`'s function does so itself
    form_of: str | None = None  # the loss that this one is at lam = 0
    online: bool = False  # it samples its own rows

    @functools.cached_property
    def inputs(self):
        """The names of the batch's tensors that it takes."""
        arguments = inspect.signature(self.function).parameters.values()
        return [argument.name for argument in arguments if argument.default is argument.empty]

    @functools.cached_property
    def own(self):
        """The hyperparameters that its function takes. FPA's takes no lam: `future_logits` does."""
        return [name for name in self.defaults if name in inspect.signature(self.function).parameters]

    def __call__(self, batch, run):
        """Losses and coefficients of a batch, for a run's hyperparameters; both are objects with attributes."""
        tensors = {name: getattr(batch, name) for name in self.inputs}
        return self.function(**tensors, **{name: getattr(run, name) for name in self.own})


@dataclass(frozen=True)
class Hyperparameter:
    """A flag that some losses have. A bool as default makes it a switch."""

    help: str
    symbol: str
    at_least: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | None = None


HYPERPARAMETERS = {
    "lam": Hyperparameter("how far to extrapolate to the future policy (sharpened, power: a power)", "λ", at_least=0),
    "target": Hyperparameter("rows that take the coefficient of the future policy or control", "target", choices=TARGETS),
    "beta": Hyperparameter("weight of the log-ratio", "β", above=0),
    "alpha": Hyperparameter("weight of the log-likelihood term", "α", at_least=0),
    "weight": Hyperparameter("weight of grad logp_mean on incorrect rows (nsr: on correct rows)", "weight", at_least=0),
    "shift": Hyperparameter("shift of the advantage, in units of beta; asymre: of the reward", "shift"),
    "dapo": Hyperparameter("DAPO: average over all tokens of the batch, and drop groups whose rewards are all equal", "DAPO"),
}

LOSSES = {
    "off_rl": Loss(off_rl, "Off-RL", "raise π̄ of correct rows, lower π̄ of incorrect ones", has_fpa_form=True),
    "fpa": Loss(fpa, "FPA", "Off-RL with its weight from the future policy", {"lam": 2.0, "target": "both"}, form_of="off_rl"),
    "simper": Loss(simper, "SimPER", "Off-RL on pairs of one problem", pairs=True, has_fpa_form=True),
    "dpo": Loss(dpo, "DPO", "widen the margin between the log-ratios of a pair", {"beta": 0.1}, pairs=True, has_fpa_form=True),
    "rpo": Loss(rpo, "RPO", "DPO, and raise the correct row", {"beta": 0.1, "alpha": 1.0}, pairs=True, has_fpa_form=True),
    "kto": Loss(kto, "KTO", "DPO without pairs: each row against z0, the mean log-ratio of mismatched answers", {"beta": 0.1},
        has_fpa_form=True),
    "a_star_po": Loss(a_star_po, "A*-PO", "regress β·log-ratio on r01 − the problem's optimal value", {"beta": 1e-3}),
    "pessimistic": Loss(pessimistic, "pessimistic", "regress β·log-ratio on r − the problem's mean r, shifted",
        {"beta": 0.1, "shift": 0.0}),
    "sft": Loss(sft, "SFT", "fine-tune on the correct rows alone"),
    "reinforce": Loss(reinforce, "REINFORCE", "Off-RL with a weight of 1 on every row"),
    "nsr": Loss(nsr, "NSR", "REINFORCE with a small weight on correct rows, or none", {"weight": 0.1}),
    "asymre": Loss(asymre, "AsymRE", "REINFORCE against a baseline a little below the mean reward", {"shift": 0.1}),
    "topr": Loss(topr, "TOPR", "SFT, and incorrect rows pushed down with weight min(π / π_ref, 1)", has_fpa_form=True),
    "future_topr": Loss(topr, "future TOPR", "TOPR with its weight from the future policy", {"lam": 2.0, "target": "both"},
        has_fpa_form=True, form_of="topr"),
    "constant": Loss(constant, "constant", "a control: a constant weight on incorrect rows", {"weight": 0.25}),
    "sharpened": Loss(sharpened, "sharpened", "a control: Off-RL's weight to a power, without a reference",
        {"lam": 2.0, "target": "both"}),
    "power": Loss(power, "power", "a control: FPA's weight as a product of probabilities, without extrapolated logits",
        {"lam": 2.0, "target": "both"}),
    "grpo": Loss(grpo, "GRPO", "online: sample groups, and push by the advantage in the group", {"dapo": False}, online=True),
}  # fmt: skip


def future_lam(run):
    """How far a run's loss extrapolates the logits: 0 where it never looks at the future policy, though it may have a lam."""
    loss = LOSSES[run.loss]
    return getattr(run, "lam", 0.0) if loss.has_fpa_form or "future_logp_sum" in loss.inputs else 0.0


def objective(batch, run):
    """The scalar that a step minimises, and its rows' coefficients (B,): as published, or in the FPA form where run.lam > 0.

    batch holds the tensors of `Loss.inputs` as attributes, and for the FPA form logp_sum, future_logp_sum and logratio (B,).
    run holds `loss` and its hyperparameters, and for the FPA form `target`. KeyError on an unknown loss, with the known ones.
    """
    if run.loss not in LOSSES:
        raise KeyError(f"unknown loss {run.loss!r}: one of {', '.join(LOSSES)}")
    loss = LOSSES[run.loss]
    losses, coefficient = loss(batch, run)
    if not (loss.has_fpa_form and getattr(run, "lam", 0.0) > 0):
        return losses.mean(), coefficient
    at_future = copy.copy(batch)
    at_future.logp_sum = batch.future_logp_sum
    at_future.logratio = batch.logratio.detach() + (batch.future_logp_sum - batch.logp_sum.detach())
    return surrogate(batch.logp_sum, batch.reward, coefficient, loss(at_future, run)[1], run.target, loss.pairs)
