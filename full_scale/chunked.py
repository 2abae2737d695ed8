"""Log-probabilities of tokens at a large vocabulary, without the logits of all positions in memory.

This file needs only torch: copy it. Plain code keeps logits (N, V) for backward, and V = 151,936 and N = 4,096 make that
gigabytes. This code applies the head to CHUNK positions at a time, and computes the logits again in backward. FPA's future
policy comes along:

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> hidden, ref_hidden = torch.randn(2, 5, 4)              # N = 5 positions, D = 4; the second is the reference policy's
    >>> head, ref_head = torch.randn(2, 7, 4)                  # V = 7
    >>> targets = torch.tensor([0, 6, 2, 2, 5])
    >>> present, future = chunked_logps(hidden, head, targets, ref_hidden, ref_head, lam=2.0)

    >>> logits, ref_logits = hidden @ head.T, ref_hidden @ ref_head.T
    >>> torch.allclose(present, logits.log_softmax(-1)[range(5), targets], atol=1e-5)
    True
    >>> future_logits = logits + 2.0 * (logits - ref_logits)
    >>> torch.allclose(future, future_logits.log_softmax(-1)[range(5), targets], atol=1e-5)
    True

Sum `present` over a completion's tokens for logp_sum, and `future` for future_logp_sum; losses.py takes both.
"""

import torch

CHUNK = 256  # positions whose logits exist at once


def chunked_logps(hidden, head, targets, ref_hidden=None, ref_head=None, lam=0.0):
    """Log-probabilities (N,) of targets under the present and the future policy, in nats and float32.

    hidden (N, D): the states that predict the targets (N,), token ids below V. head (V, D): the output weights, of logits
    hidden @ head.T without a bias, a scale or a cap. ref_hidden and ref_head: the same of the reference policy, of any width.
    The gradient flows from the first result to hidden and head; the second result is detached. Without a reference the second
    result is the first one.
    Raises ValueError where shapes disagree, where there is no position, or where lam is not 0 and the reference is missing.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("hidden", hidden), ("head", head), ("targets", targets)))
        raise ValueError(f"hidden must be (N, D), head (V, D) and targets (N,), not {shapes}")
    if not len(hidden):
        raise ValueError("hidden and targets hold no position")
    if (ref_hidden is None) != (ref_head is None) or (lam and ref_hidden is None):
        raise ValueError("the future policy needs ref_hidden and ref_head; leave both out, with lam=0, where it is not wanted")
    if ref_hidden is not None:
        expected, found = [(len(hidden), ref_hidden.shape[-1]), (len(head), ref_hidden.shape[-1])], [ref_hidden, ref_head]
        if [tuple(x.shape) for x in found] != expected:
            shapes = f"ref_hidden {list(ref_hidden.shape)}, ref_head {list(ref_head.shape)}"
            raise ValueError(f"ref_hidden must have hidden's N and ref_head head's V, not {shapes}")
    return HeadLogps.apply(hidden, head, targets, ref_hidden, ref_head, lam)


class HeadLogps(torch.autograd.Function):
    """What `chunked_logps` calls, without its checks."""

    @staticmethod
    def forward(ctx, hidden, head, targets, ref_hidden, ref_head, lam):
        """Both log-probabilities (N,), and what backward needs: a normaliser (N,) each instead of the logits (N, V)."""
        present, future, normalisers = [], [], []
        for rows in chunks(len(hidden)):
            logits, chosen = head_logits(hidden[rows], head), targets[rows, None]  # (CHUNK, V), (CHUNK, 1)
            normalisers.append(logits.logsumexp(-1))
            present.append(logits.gather(-1, chosen)[:, 0] - normalisers[-1])
            if ref_hidden is not None:
                logits = extrapolated(logits, head_logits(ref_hidden[rows], ref_head), lam)
                future.append(logits.gather(-1, chosen)[:, 0] - logits.logsumexp(-1))
        present = torch.cat(present)
        future = torch.cat(future) if future else present.clone()
        ctx.save_for_backward(hidden, head, targets, torch.cat(normalisers))
        ctx.mark_non_differentiable(future)
        return present, future

    @staticmethod
    def backward(ctx, upstream, _):
        hidden, head, targets, normalisers = ctx.saved_tensors
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        for rows in chunks(len(hidden)):
            grad = -(head_logits(hidden[rows], head) - normalisers[rows, None]).exp_()  # of logits: 1[target] - softmax
            grad.scatter_add_(-1, targets[rows, None], torch.ones_like(grad[:, :1]))
            grad = (grad * upstream[rows, None]).to(head.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                hidden_grad[rows] = (grad @ head).to(hidden.dtype)
                head_grad += grad.T @ hidden[rows].to(head.dtype)
        return hidden_grad, head_grad.to(head.dtype), None, None, None, None


def chunks(count):
    """Slices of CHUNK positions that cover `count`."""
    return [slice(first, first + CHUNK) for first in range(0, count, CHUNK)]


def head_logits(hidden, head):
    """Logits (N, V) in float32 from hidden states (N, D) and a head (V, D) of any type; FPA magnifies their rounding."""
    with torch.autocast(hidden.device.type, enabled=False):  # which would round them to bfloat16
        if hidden.is_cuda and hidden.dtype == head.dtype != torch.float32:
            return torch.mm(hidden, head.T, out_dtype=torch.float32)
        return hidden.float() @ head.float().T


def extrapolated(logits, ref_logits, lam):
    """FPA's future logits, as losses.future_logits computes them from float32."""
    return logits + lam * (logits - ref_logits)
