"""The losses: Off-RL, its neighbours in the literature, and Future Policy Approximation (FPA, arXiv 2509.19893) for them.

Every loss is a pure function of log-probabilities: tensors in, per-example losses and detached coefficients out. No model,
tokenizer, config or device. With reward r = +1 (correct) or -1 (incorrect), every offline loss's gradient has one form,

    grad loss = - r C grad logp_sum        summed over the rows; C >= 0 (mostly): raise correct, lower incorrect ones

and the methods differ in the coefficient C alone, which each function returns beside its losses. FPA is what `fpa` does with
any of them: the same C, evaluated at the future policy. A test holds every C against autograd.

Names: `logp_sum` is log pi(y|x) summed over a completion's tokens, `length` their number |y|, logp_mean = logp_sum / length,
and exp(logp_mean), in (0, 1], is the length-normalised trajectory probability that the paper calls pi_bar. `logratio` is
logp_sum under pi_theta minus logp_sum under pi_ref. Losses on pairs take the correct rows first, then, in the same order, an
incorrect row for each, and return a loss a pair.
Shapes: B rows (trajectories), T tokens, V vocabulary.

Left out: label smoothing and other variants of the neighbours, and GRPO's penalty towards the reference policy.
"""

import torch
import torch.nn.functional as F

TARGETS = ("both", "correct", "incorrect")


# --- from logits to log-probabilities, and the future policy


def token_logps(logits, tokens, mask):
    """Log-probability of every completion token; the one place that shifts and masks.

    logits (B, T, V) as the model gave them for tokens (B, T); mask (B, T) is True on completion tokens (EOS included).
    Returns (B, T-1) float32: entry t is log pi(tokens[t+1] | tokens[:t+1]), and 0 where the mask is False.
    """
    assert logits.shape[:2] == tokens.shape == mask.shape, (logits.shape, tokens.shape, mask.shape)
    logps = logits[:, :-1].float().log_softmax(-1)  # (B, T-1, V)
    logps = logps.gather(-1, tokens[:, 1:, None])[..., 0]  # (B, T-1)
    return logps.masked_fill(~mask[:, 1:], 0.0)


def future_logits(logits, ref_logits, lam):
    """h_hat = (1 + lam) h_theta - lam h_ref, the logits of the future policy (paper's logit-space extrapolation).

    Any shape; detached, because the future policy only ever weights gradients. Computed as h_theta + lam (h_theta - h_ref),
    so that lam = 0 gives h_theta back exactly.
    """
    logits = logits.detach().float()
    return logits + lam * (logits - ref_logits.float())


def fpa(logp_sum, reward, present, future, target="both"):
    """The FPA form of a loss, from its coefficients at pi_theta and at pi_hat. All (B,) -> losses (B,), coefficients (B,).

    grad J = E[r sg[C(pi_hat)] grad logp_sum]; with Off-RL's coefficient that is the paper's FPA. The loss is a surrogate: its
    gradient is the method's, its value is no objective. `target` limits the future coefficient to "correct" or "incorrect"
    rows; the others keep the present one (the paper's targeted FPA). Raises ValueError on an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: one of {', '.join(TARGETS)}")
    use_future = {"both": reward != 0, "correct": reward > 0, "incorrect": reward < 0}[target]
    coefficient = torch.where(use_future, future, present).detach()
    return -reward * coefficient * logp_sum, coefficient


# --- losses on rows: each (B,) tensors -> losses (B,), coefficients (B,)


def off_rl(logp_sum, length, reward):
    """Vanilla offline RL: maximise E[r pi_bar], so the loss is -r pi_bar. C = pi_bar / |y|.

    Autograd supplies the coefficient: grad pi_bar = pi_bar grad logp_mean.
    """
    pi_bar = (logp_sum / length).exp()
    return -reward * pi_bar, (pi_bar / length).detach()


def sharpened(logp_sum, length, reward, lam):
    """A control for FPA: the present policy's coefficient to a power, C = pi_bar^(1 + lam) / |y|, with no reference policy."""
    power = (logp_sum / length * (1 + lam)).exp()
    return -reward * power / (1 + lam), (power / length).detach()


def constant(logp_sum, length, reward, weight):
    """Another control: every row weighs the same, C = weight / |y|; train.py uses it on incorrect rows. 1 is `reinforce`."""
    return -reward * weight * logp_sum / length, weight / length


def reinforce(logp_sum, length, reward):
    """REINFORCE on the fixed rows, without importance weights: maximise E[r logp_mean]. C = 1 / |y|."""
    return constant(logp_sum, length, reward, weight=1.0)


def sft(logp_sum, length, reward):
    """Supervised fine-tuning on the correct rows only (rejection fine-tuning). C = 1 / |y| on correct rows, else 0."""
    return constant(logp_sum, length, reward, weight=(reward > 0).to(logp_sum.dtype))


def kto(logratio, reward, z0, beta, weight_correct=1.0, weight_incorrect=1.0):
    """KTO (Ethayarajh et al. 2024): w (1 - s), s = sigmoid(r beta (logratio - z0)). C = w beta s (1 - s).

    z0, a detached scalar of at least 0: the mean log-ratio of mismatched prompts and completions (the present policy's, in
    the FPA form too). The weights 1 and 1 are
    in the recommended range for as many correct as incorrect rows.
    """
    s = torch.sigmoid(reward * beta * (logratio - z0))
    weight = torch.where(reward > 0, weight_correct, weight_incorrect).to(logratio.dtype)
    return weight * (1 - s), (weight * beta * s * (1 - s)).detach()


def pessimistic(logratio, reward, mean_reward, beta, shift=0.0):
    """Regression of the log-ratio on a shifted advantage (Sakhi et al., arXiv 2605.28150).

    (beta logratio - A)^2 with A = r - mean_reward + shift beta, mean_reward (B,) over the rows of the same prompt; the shift
    as an argument of its own is our reading of the paper's shifted mean. C = 2 beta r (A - beta logratio) turns negative once
    beta logratio has passed A. By Lagrange the minimiser over all policies, rho = pi/pi_ref, solves beta log rho + c rho = A
    with c = beta (shift + KL(pi_ref|pi)), so rho = (beta/c) W((c/beta) e^(A/beta)), W Lambert's function (derived, with the
    mean and the KL over the rows that the loss is averaged over).

    c > 0   pessimistic: rho stays below e^(A/beta). So with shift >= 0, and somewhat below
    c = 0   the Gibbs policy itself, pi_ref e^(A/beta), where shift = -log E[e^((r - mean_reward)/beta)]
    c < 0   optimistic: rho passes e^(A/beta); fragile, because c cannot fall below -(beta/e) e^(-max A/beta), where W's two
            branches meet and answers of the same reward may part
    """
    return regression(logratio, reward - mean_reward + shift * beta, reward, beta)


def a_star_po(logratio, reward, value, beta):
    """A*-PO's regression (and OAPL's, whose reference lags behind): (beta logratio + V* - r01)^2, r01 = 1 if correct, else 0.

    value (B,) is `optimal_value` of each row's prompt. With the same beta there as here this is `pessimistic` at c = 0.
    """
    return regression(logratio, (1 + reward) / 2 - value, reward, beta)


def regression(logratio, advantage, reward, beta):
    """(beta logratio - advantage)^2. C = 2 beta r (advantage - beta logratio)."""
    error = advantage - beta * logratio
    return error**2, (2 * beta * reward * error).detach()


def optimal_value(reward, prompts, beta1=0.5):
    """A*-PO's V* = beta1 log mean exp(r01 / beta1) over the rows of a prompt, whose number prompts (B,) holds: (B,)."""
    return 1 + beta1 * prompt_mean(((reward - 1) / 2 / beta1).exp(), prompts).log()  # less 1 in the exponent: no overflow


def prompt_mean(values, prompts):
    """Each row's mean over the rows of its prompt: values (B,), prompts (B,) whole numbers from 0 -> (B,)."""
    sums = torch.zeros(int(prompts.max()) + 1, dtype=values.dtype, device=values.device)
    return (sums.index_add(0, prompts, values) / torch.bincount(prompts))[prompts]


# --- losses on pairs: losses (B/2,), coefficients (B,)


def simper(logp_sum, length):
    """SimPER (Xiao et al. 2025): -pi_bar(y_w) + pi_bar(y_l). C = pi_bar / |y|, Off-RL's (the paper's Proposition A.1)."""
    pi_bar = (logp_sum / length).exp()
    correct, incorrect = pi_bar.chunk(2)
    return incorrect - correct, (pi_bar / length).detach()


def dpo(logratio, beta):
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(beta (D_w - D_l)), D log-ratios. C = beta sigmoid(beta (D_l - D_w))."""
    correct, incorrect = logratio.chunk(2)
    margin = beta * (correct - incorrect)
    return -F.logsigmoid(margin), (beta * torch.sigmoid(-margin)).repeat(2).detach()


def rpo(logratio, logp_sum, length, beta, alpha):
    """RPO (Pang et al. 2024, eq. 1): DPO + alpha times the negative logp_mean of y_w. C_w = DPO's + alpha / |y_w|, C_l = DPO's.

    The negative log-likelihood is divided by each sequence's own length, as in the paper; TRL's "sft" term averages over
    all correct tokens of the batch instead.
    """
    losses, coefficient = dpo(logratio, beta)
    pairs = len(losses)
    nll = -(logp_sum / length)[:pairs]
    return losses + alpha * nll, coefficient + torch.cat([alpha / length[:pairs], torch.zeros_like(nll)])


# --- online


def grpo(logps, old_logps, advantage, mask, clip=0.2, token_level=False):
    """GRPO (Shao et al. 2024, eq. 3, without its KL term): -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) a token.

    logps, old_logps (B, T-1) as `token_logps` gives them, under pi_theta and under the policy that sampled; mask (B, T).
    Returns losses (B,), whose mean is the objective: each row's mean over its tokens, or, token_level, its sum over the
    batch's mean number of tokens, so that every token of the batch weighs the same (DAPO, Yu et al. 2025, eq. 8).
    """
    ratio = (logps - old_logps).exp()
    advantage = advantage[:, None]
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)  # (B, T-1)
    length = mask[:, 1:].sum(-1)
    tokens = length.float().mean() if token_level else length.clamp(min=1)  # a collapsed policy may sample PAD at once
    return -objective.masked_fill(~mask[:, 1:], 0.0).sum(-1) / tokens


def group_advantage(reward, group_size):
    """GRPO's A = (r - mean) / (std + 1e-4) over groups of consecutive rows, std over group_size - 1: (B,) -> (B,)."""
    groups = reward.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
