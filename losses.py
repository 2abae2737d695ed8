"""The losses: vanilla offline RL (Off-RL) and Future Policy Approximation (FPA, arXiv 2509.19893).

Every loss is a pure function of log-probabilities: tensors in, per-example losses and detached coefficients out. No model,
tokenizer, config or device. Both losses raise the log-probability of correct trajectories (reward r = +1) and lower that
of incorrect ones (r = -1); they differ only in the coefficient that weights each trajectory's gradient:

    grad J = E[ r * coefficient * grad logp_mean ]      Off-RL: the present policy's probability  pi_bar  = exp(logp_mean)
                                                        FPA:    the future policy's probability   pi_hat  (stop-gradient)

Left out against the paper: the other losses that v1 adds FPA to (DPO, RPO, KTO).

Names: `logp_sum` is log pi(y|x) summed over a completion's tokens, `logp_mean` the same divided by their number, and
exp(logp_mean), in (0, 1], is the length-normalised trajectory probability that the paper calls pi_bar.
Shapes: B trajectories, T tokens, V vocabulary.
"""

import torch

TARGETS = ("both", "correct", "incorrect")


def token_logps(logits, tokens, mask):
    """Log-probability of every completion token; the one place that shifts and masks.

    logits (B, T, V) as the model gave them for tokens (B, T); mask (B, T) is True on completion tokens (EOS included).
    Returns (B, T-1) float32: entry t is log pi(tokens[t+1] | tokens[:t+1]), and 0 where the mask is False.
    """
    assert logits.shape[:2] == tokens.shape == mask.shape, (logits.shape, tokens.shape, mask.shape)
    logps = logits[:, :-1].float().log_softmax(-1)  # (B, T-1, V)
    logps = logps.gather(-1, tokens[:, 1:, None])[..., 0]  # (B, T-1)
    return logps.masked_fill(~mask[:, 1:], 0.0)


def logp_sum_and_mean(logps, mask):
    """Token log-probabilities (B, T-1) and their mask (B, T) -> logp_sum (B,), logp_mean (B,)."""
    logp_sum = logps.sum(-1)
    return logp_sum, logp_sum / mask[:, 1:].sum(-1).clamp(min=1)


def future_logits(logits, ref_logits, lam):
    """h_hat = (1 + lam) h_theta - lam h_ref, the logits of the future policy (paper's logit-space extrapolation).

    Any shape; detached, because the future policy only ever weights gradients. Computed as h_theta + lam (h_theta - h_ref),
    so that lam = 0 gives h_theta back exactly.
    """
    logits = logits.detach().float()
    return logits + lam * (logits - ref_logits.float())


def off_rl(logp_mean, reward):
    """Vanilla offline RL: maximise E[r pi_bar], so the loss is -r pi_bar. logp_mean, reward (B,) -> losses (B,), pi_bar (B,).

    Autograd supplies the coefficient: grad pi_bar = pi_bar grad logp_mean.
    """
    pi_bar = logp_mean.exp()
    return -reward * pi_bar, pi_bar.detach()


def fpa(logp_mean, future_logp_mean, reward, target="both"):
    """FPA: grad J = E[r sg[pi_hat_bar] grad logp_mean]. All (B,) -> losses (B,), coefficients (B,).

    The loss is a surrogate: its gradient is the method's, its value is no objective. `target` limits the future policy's
    coefficient to "correct" or "incorrect" rows; the others keep the present policy's (the paper's targeted FPA).
    Raises ValueError on an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: one of {', '.join(TARGETS)}")
    coefficient = future_logp_mean.detach().exp()  # pi_hat_bar
    if target != "both":
        use_future = reward > 0 if target == "correct" else reward < 0
        coefficient = torch.where(use_future, coefficient, logp_mean.detach().exp())
    return -reward * coefficient * logp_mean, coefficient
