"""losses.py against hand-worked numbers, closed forms and each other."""

import math

import pytest
import torch

from losses import fpa, future_logits, logp_sum_and_mean, off_rl, token_logps

LN2, LN4 = math.log(2), math.log(4)


def random_case(seed=0, B=6, T=9, V=11, dtype=torch.float64):
    """Logits of the present and the reference policy, tokens, a ragged completion mask and rewards of both signs."""
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = (torch.randn(B, T, V, generator=g, dtype=dtype) for _ in range(2))
    tokens = torch.randint(V, (B, T), generator=g)
    ends = torch.randint(5, T + 1, (B, 1), generator=g)
    mask = (torch.arange(T) >= 3) & (torch.arange(T) < ends)
    return logits, ref_logits, tokens, mask, torch.tensor([1.0, -1.0] * (B // 2))


def mean_logp(logits, tokens, mask):
    return logp_sum_and_mean(token_logps(logits, tokens, mask), mask)[1]


def test_token_logps_by_hand():
    # Two tokens of vocabulary, logits log 3 and 0: probabilities 3/4 and 1/4; all zeros: 1/2 and 1/2.
    skewed, even = [math.log(3), 0.0], [0.0, 0.0]
    logits = torch.tensor([[skewed, even, skewed, even]])
    tokens = torch.tensor([[0, 1, 1, 0]])
    mask = torch.tensor([[False, False, True, True]])  # completion: tokens 2 and 3, predicted at positions 1 and 2
    logps = token_logps(logits, tokens, mask)
    assert logps.tolist() == [pytest.approx([0.0, -LN2, math.log(3 / 4)])]
    logp_sum, logp_mean = logp_sum_and_mean(logps, mask)
    assert logp_sum.item() == pytest.approx(math.log(3 / 8))
    assert logp_mean.item() == pytest.approx(math.log(3 / 8) / 2)


def test_token_logps_refuses_wrong_shapes():
    logits, _, tokens, mask, _ = random_case()
    with pytest.raises(AssertionError):
        token_logps(logits[:, 1:], tokens, mask)


def test_padding_and_prompt_do_not_count():
    logits, _, tokens, mask, _ = random_case()
    expected = token_logps(logits, tokens, mask)
    wild_logits, wild_tokens = logits.clone(), tokens.clone()
    scored = torch.zeros_like(mask)
    scored[:, :-1] = mask[:, 1:]  # positions whose logits predict a completion token
    wild_logits[~scored] = 1e4 * torch.randn_like(wild_logits[~scored])
    wild_tokens[~mask] = 0
    assert torch.equal(token_logps(wild_logits, wild_tokens, mask), expected)
    assert (expected[~mask[:, 1:]] == 0).all() and (expected[mask[:, 1:]] < 0).all()


def test_future_policy_is_the_explicit_form():
    logits, ref_logits, *_ = random_case(dtype=torch.float32)
    pi, ref = logits.softmax(-1), ref_logits.softmax(-1)
    for lam in (0.0, 0.5, 2.0):
        explicit = pi * (pi / ref) ** lam
        explicit = explicit / explicit.sum(-1, keepdim=True)
        torch.testing.assert_close(future_logits(logits, ref_logits, lam).softmax(-1), explicit)


def test_future_of_linear_drift():
    # Logits that drift linearly from the reference: the extrapolation at time t is the policy of time (1 + lam) t.
    ref_logits, velocity = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    t, lam = 0.7, 2.0
    torch.testing.assert_close(future_logits(ref_logits + t * velocity, ref_logits, lam), ref_logits + (1 + lam) * t * velocity)


def test_off_rl_gradient_is_the_closed_form():
    logp_mean = torch.tensor([-0.1, -1.0, -3.0], requires_grad=True)
    reward = torch.tensor([1.0, -1.0, 1.0])
    losses, pi_bar = off_rl(logp_mean, reward)
    losses.sum().backward()
    torch.testing.assert_close(pi_bar, logp_mean.detach().exp())
    torch.testing.assert_close(logp_mean.grad, -reward * logp_mean.detach().exp())


def closed_form(logits, coefficient, tokens, mask, reward):
    """d loss / d logits of a surrogate -r c logp_mean: -(r c / |y|) (onehot(y_t) - pi(.|x, y_<t)) where y_t is scored."""
    gradient = torch.zeros_like(logits)
    for b in range(logits.shape[0]):
        for t in range(logits.shape[1] - 1):
            if mask[b, t + 1]:
                score = -logits[b, t].softmax(-1)
                score[tokens[b, t + 1]] += 1
                gradient[b, t] = -reward[b] * coefficient[b] / mask[b].sum() * score
    return gradient


@pytest.mark.parametrize("target", ["both", "correct", "incorrect"])
def test_fpa_gradient_is_the_closed_form(target):
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    lam = 1.5
    pi, ref = logits.softmax(-1), ref_logits.softmax(-1)
    future = pi * (pi / ref) ** lam
    future = (future / future.sum(-1, keepdim=True)).log()
    coefficient = torch.zeros(len(reward))
    for b in range(len(reward)):  # geometric means by hand, over the completion only
        policy = future if target == "both" or (target == "correct") == (reward[b] > 0) else pi.log()
        scored = [policy[b, t - 1, tokens[b, t]] for t in range(tokens.shape[1]) if mask[b, t]]
        coefficient[b] = torch.stack(scored).mean().exp()

    leaf = logits.clone().requires_grad_()
    losses, returned = fpa(
        mean_logp(leaf, tokens, mask), mean_logp(future_logits(leaf, ref_logits, lam), tokens, mask), reward, target
    )
    losses.sum().backward()
    torch.testing.assert_close(returned, coefficient)
    torch.testing.assert_close(leaf.grad, closed_form(logits, coefficient, tokens, mask, reward))


def test_fpa_at_lambda_zero_is_off_rl():
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    gradients = []
    for loss in ("off_rl", "fpa"):
        leaf = logits.clone().requires_grad_()
        present, future = mean_logp(leaf, tokens, mask), mean_logp(future_logits(leaf, ref_logits, 0.0), tokens, mask)
        losses, coefficient = off_rl(present, reward) if loss == "off_rl" else fpa(present, future, reward)
        losses.mean().backward()
        gradients.append((leaf.grad, coefficient))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_stop_gradient_stops():
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    # The coefficient's input may carry a graph; none of it may reach the parameters, in logits or in log-probabilities.
    leaf = logits.clone().requires_grad_()
    assert not future_logits(leaf, ref_logits, 2.0).requires_grad
    future_logp_mean = mean_logp(leaf, tokens, mask)
    losses, coefficient = fpa(torch.full((len(reward),), -0.5), future_logp_mean, reward)
    assert not losses.requires_grad and not coefficient.requires_grad


def test_one_step_moves_the_way_the_sign_says():
    logp_mean = torch.tensor([-1.0, -1.0], requires_grad=True)
    fpa(logp_mean, torch.tensor([-2.0, -2.0]), torch.tensor([1.0, -1.0]))[0].sum().backward()
    assert logp_mean.grad[0] < 0 < logp_mean.grad[1]  # descent raises the correct one and lowers the incorrect one


@pytest.mark.parametrize("lam", [0.0, 2.0, 10.0])
@pytest.mark.parametrize("scale", [1e4, 3e4])
def test_finite_at_extreme_log_probabilities(lam, scale):
    V = 7
    logits = torch.zeros(2, 4, V)
    logits[..., 0] = scale  # tokens other than 0 have log-probability -scale
    tokens = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    mask = torch.tensor([[False, True, True, True]] * 2)
    leaf = logits.requires_grad_()
    present = mean_logp(leaf, tokens, mask)
    assert present[0].item() == pytest.approx(-scale)
    for ref_logits in (torch.zeros_like(logits), -logits.detach()):
        future = mean_logp(future_logits(leaf, ref_logits, lam), tokens, mask)
        for reward in (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])):
            for losses, coefficient in (off_rl(present, reward), fpa(present, future, reward)):
                (gradient,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
                assert torch.isfinite(losses).all() and torch.isfinite(coefficient).all() and torch.isfinite(gradient).all()


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match="'wrong'.*both, correct, incorrect"):
        fpa(torch.zeros(2), torch.zeros(2), torch.ones(2), "wrong")
