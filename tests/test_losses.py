"""losses.py against hand-worked numbers, closed forms, each other and TRL."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import losses
from losses import fpa, future_logits, off_rl, token_logps
from options import WITH_FPA_FORM
from train import LOSSES, PAIRED, objective

LN2, LN4 = math.log(2), math.log(4)


def random_case(seed=0, B=6, T=9, V=11, dtype=torch.float64):
    """Logits of the present and the reference policy, tokens, a ragged completion mask and rewards of both signs."""
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = (torch.randn(B, T, V, generator=g, dtype=dtype) for _ in range(2))
    tokens = torch.randint(V, (B, T), generator=g)
    ends = torch.randint(5, T + 1, (B, 1), generator=g)
    mask = (torch.arange(T) >= 3) & (torch.arange(T) < ends)
    return logits, ref_logits, tokens, mask, torch.tensor([1.0, -1.0] * (B // 2))


def sum_logp(logits, tokens, mask):
    return token_logps(logits, tokens, mask).sum(-1)


def test_token_logps_by_hand():
    # Two tokens of vocabulary, logits log 3 and 0: probabilities 3/4 and 1/4; all zeros: 1/2 and 1/2.
    skewed, even = [math.log(3), 0.0], [0.0, 0.0]
    logits = torch.tensor([[skewed, even, skewed, even]])
    tokens = torch.tensor([[0, 1, 1, 0]])
    mask = torch.tensor([[False, False, True, True]])  # completion: tokens 2 and 3, predicted at positions 1 and 2
    logps = token_logps(logits, tokens, mask)
    assert logps.tolist() == [pytest.approx([0.0, -LN2, math.log(3 / 4)])]


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


SETTINGS = {"beta": 0.7, "alpha": 1.3, "weight": 0.25, "shift": 0.5, "lam": 1.5, "target": None}
OFFLINE = [name for name, loss in LOSSES.items() if loss]


def batch_of(logp_sum, length=None, scale=1.0):
    """A batch that every loss takes: correct rows first, then as many incorrect ones; four prompts of both kinds."""
    half, dtype = len(logp_sum) // 2, logp_sum.dtype
    g = torch.Generator().manual_seed(1)
    reward = torch.tensor([1.0] * half + [-1.0] * half, dtype=dtype)
    prompts = torch.arange(2 * half) % 4
    reference = logp_sum.detach() + scale * torch.randn(2 * half, generator=g, dtype=dtype)
    return {
        "logp_sum": logp_sum,
        "logratio": logp_sum - reference,
        "length": torch.randint(3, 9, (2 * half,), generator=g).to(dtype) if length is None else length,
        "reward": reward,
        "value": losses.optimal_value(reward, prompts),
        "mean_reward": losses.prompt_mean(reward, prompts),
        "z0": torch.tensor(0.3, dtype=dtype),
    }


def random_logp_sum(dtype=torch.float64):
    return -6 * torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("name", OFFLINE)
def test_the_coefficient_is_the_gradient_of_the_published_loss(name):
    leaf = random_logp_sum().requires_grad_()
    batch = batch_of(leaf)
    values, coefficient = LOSSES[name](batch, SETTINGS)
    assert values.shape == ((6,) if name in PAIRED else (12,)) and not coefficient.requires_grad
    values.sum().backward()
    torch.testing.assert_close(-batch["reward"] * coefficient, leaf.grad, rtol=1e-9, atol=0)


def test_coefficients_by_hand():
    # two rows, y_w of 2 tokens and y_l of 4, so pi_bar = 1/2 and 1/4; log-ratios ln 2 and ln 8
    logp_sum, length = torch.tensor([-2 * LN2, -4 * LN4]), torch.tensor([2, 4])
    batch = {
        "logp_sum": logp_sum,
        "logratio": torch.tensor([LN2, 3 * LN2]),
        "length": length,
        "reward": torch.tensor([1.0, -1.0]),
        "value": torch.tensor([0.5, 0.5]),
        "mean_reward": torch.tensor([0.0, 0.0]),
        "z0": torch.tensor(LN2),
    }
    settings = {"beta": 1.0, "alpha": 3.0, "weight": 0.25, "shift": 2.0, "lam": 1.0}
    dpo = 4 / 5  # sigmoid(ln 8 - ln 2) = 4 / (4 + 1)
    expected = {
        "off_rl": ([-1 / 2, 1 / 4], [1 / 4, 1 / 16]),
        "fpa": ([-1 / 2, 1 / 4], [1 / 4, 1 / 16]),
        "simper": ([-1 / 4], [1 / 4, 1 / 16]),
        "dpo": ([math.log(5)], [dpo, dpo]),
        "rpo": ([math.log(5) + 3 * LN2], [dpo + 3 / 2, dpo]),
        "kto": ([1 / 2, 4 / 5], [1 / 4, 4 / 25]),  # s = sigmoid(0) and sigmoid(ln 2 - ln 8) = 1/5
        "a_star_po": ([(LN2 - 0.5) ** 2, (3 * LN2 + 0.5) ** 2], [2 * (0.5 - LN2), 2 * (3 * LN2 + 0.5)]),
        "pessimistic": ([(LN2 - 3) ** 2, (3 * LN2 - 1) ** 2], [2 * (3 - LN2), 2 * (3 * LN2 - 1)]),  # A = 1 + 2 and -1 + 2
        "sft": ([LN2, 0], [1 / 2, 0]),
        "reinforce": ([LN2, -LN4], [1 / 2, 1 / 4]),
        "constant": ([LN2 / 4, -LN4 / 4], [1 / 8, 1 / 16]),
        "sharpened": ([-1 / 8, 1 / 32], [1 / 8, 1 / 64]),  # pi_bar^2 / 2
    }
    assert expected.keys() == set(OFFLINE)
    for name, (values, coefficient) in expected.items():
        got_values, got_coefficient = LOSSES[name](batch, settings)
        assert got_values.tolist() == pytest.approx(values, abs=1e-6), name
        assert got_coefficient.tolist() == pytest.approx(coefficient, rel=1e-5), name


def test_simper_is_off_rl_on_pairs():  # Proposition A.1
    length, gradients = torch.arange(3.0, 15.0, dtype=torch.float64), []
    for loss in ("simper", "off_rl"):
        leaf = random_logp_sum().requires_grad_()
        LOSSES[loss](batch_of(leaf, length), SETTINGS)[0].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WITH_FPA_FORM)
def test_at_lambda_zero_the_fpa_form_is_the_loss(name):
    gradients, coefficients = [], []
    for target in (None, "both"):
        leaf = random_logp_sum().requires_grad_()
        loss, coefficient = objective(batch_of(leaf), leaf.detach(), {**SETTINGS, "loss": name, "target": target})
        loss.backward()
        gradients.append(leaf.grad), coefficients.append(coefficient)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)
    torch.testing.assert_close(*coefficients)


@pytest.mark.parametrize("target", ["both", "correct", "incorrect"])
@pytest.mark.parametrize("name", [*WITH_FPA_FORM, "sharpened", "constant"])
def test_the_fpa_form_has_the_future_coefficient_and_the_present_score(name, target):
    leaf, future = random_logp_sum().requires_grad_(), random_logp_sum().flip(0)
    batch = batch_of(leaf)
    loss, returned = objective(batch, future, {**SETTINGS, "loss": name, "target": target})
    loss.backward()

    present = {key: value.detach() for key, value in batch.items()}
    at_future = {**present, "logp_sum": future, "logratio": future - (present["logp_sum"] - present["logratio"])}
    control = name in ("sharpened", "constant")  # in the place of Off-RL's coefficient at the future policy
    expected = LOSSES[name](present if control else at_future, SETTINGS)[1]
    other = LOSSES["off_rl" if control else name](present, SETTINGS)[1]
    reward = batch["reward"]
    if target != "both":
        expected = torch.where((reward > 0) == (target == "correct"), expected, other)
    torch.testing.assert_close(returned, expected)
    torch.testing.assert_close(leaf.grad, -reward * expected / (6 if name in PAIRED else 12))


def closed_form(logits, coefficient, tokens, mask, reward):
    """d loss / d logits of a surrogate -r c logp_sum: -r c (onehot(y_t) - pi(.|x, y_<t)) where y_t is scored."""
    gradient = torch.zeros_like(logits)
    for b in range(logits.shape[0]):
        for t in range(logits.shape[1] - 1):
            if mask[b, t + 1]:
                score = -logits[b, t].softmax(-1)
                score[tokens[b, t + 1]] += 1
                gradient[b, t] = -reward[b] * coefficient[b] * score
    return gradient


@pytest.mark.parametrize("target", ["both", "correct", "incorrect"])
def test_fpa_from_logits_is_the_closed_form(target):
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    lam, length = 1.5, mask.sum(-1)
    pi, ref = logits.softmax(-1), ref_logits.softmax(-1)
    future = pi * (pi / ref) ** lam
    future = (future / future.sum(-1, keepdim=True)).log()
    coefficient = torch.zeros(len(reward))
    for b in range(len(reward)):  # geometric means by hand, over the completion only
        policy = future if target == "both" or (target == "correct") == (reward[b] > 0) else pi.log()
        scored = [policy[b, t - 1, tokens[b, t]] for t in range(tokens.shape[1]) if mask[b, t]]
        coefficient[b] = torch.stack(scored).mean().exp() / len(scored)

    leaf = logits.clone().requires_grad_()
    logp_sum, future_logp_sum = sum_logp(leaf, tokens, mask), sum_logp(future_logits(leaf, ref_logits, lam), tokens, mask)
    present, at_future = (off_rl(values, length, reward)[1] for values in (logp_sum, future_logp_sum))
    surrogate, returned = fpa(logp_sum, reward, present, at_future, target)
    surrogate.sum().backward()
    torch.testing.assert_close(returned, coefficient)
    torch.testing.assert_close(leaf.grad, closed_form(logits, coefficient, tokens, mask, reward))


def test_stop_gradient_stops():
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    # The coefficients may carry a graph; none of it may reach the parameters, in logits or in log-probabilities.
    leaf = logits.clone().requires_grad_()
    assert not future_logits(leaf, ref_logits, 2.0).requires_grad
    attached = sum_logp(leaf, tokens, mask).exp()
    surrogate, coefficient = fpa(torch.full((len(reward),), -0.5), reward, attached, attached)
    assert not surrogate.requires_grad and not coefficient.requires_grad


@pytest.mark.parametrize("name", OFFLINE)
def test_one_step_moves_the_way_the_sign_says(name):
    leaf = torch.full((2,), -3.0, requires_grad=True)
    batch = {**batch_of(leaf), "logratio": leaf + 3.0, "mean_reward": torch.zeros(2), "value": torch.full((2,), 0.5)}
    LOSSES[name](batch, {**SETTINGS, "shift": 0.0})[0].sum().backward()
    assert leaf.grad[0] < 0 and (leaf.grad[1] == 0 if name == "sft" else leaf.grad[1] > 0)  # descent raises the correct one


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_finite_at_extreme_log_probabilities(name, scale):
    for present in (-scale, 0.0):
        for future in (-scale, 0.0):
            for target in (None, *(["both"] if name in WITH_FPA_FORM else [])):
                leaf = torch.full((12,), present, requires_grad=True)
                batch = batch_of(leaf, scale=scale)
                loss, coefficient = objective(batch, torch.full((12,), future), {**SETTINGS, "loss": name, "target": target})
                loss.backward()
                assert torch.isfinite(loss) and torch.isfinite(coefficient).all() and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("lam", [0.0, 2.0, 10.0])
@pytest.mark.parametrize("scale", [1e4, 3e4])
@pytest.mark.parametrize(("V", "dtype", "T"), [(7, torch.float32, 4), (7, torch.bfloat16, 2), (151_936, torch.bfloat16, 2)])
def test_finite_at_extreme_logits(lam, scale, V, dtype, T):
    """T = 2: completions of one token. 151,936: Qwen's vocabulary."""
    logits = torch.zeros(2, T, V, dtype=dtype)
    logits[..., 0] = scale  # tokens other than 0 have log-probability -scale
    tokens = torch.tensor([[1] * T, [0] * T])
    mask = torch.tensor([[False] + [True] * (T - 1)] * 2)
    leaf, length = logits.requires_grad_(), mask.sum(-1)
    present = sum_logp(leaf, tokens, mask)
    assert present[0].item() == pytest.approx(-(T - 1) * scale, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    for ref_logits in (torch.zeros_like(logits), -logits.detach()):
        future = sum_logp(future_logits(leaf, ref_logits, lam), tokens, mask)
        for reward in (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])):
            coefficients = [off_rl(values, length, reward)[1] for values in (present, future)]
            for values, coefficient in (off_rl(present, length, reward), fpa(present, reward, *coefficients)):
                (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
                assert torch.isfinite(values).all() and torch.isfinite(coefficient).all() and torch.isfinite(gradient).all()


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match="'wrong'.*both, correct, incorrect"):
        fpa(torch.zeros(2), torch.ones(2), torch.zeros(2), torch.zeros(2), "wrong")


# --- against TRL

# What TRL 1.16.0's `_compute_loss` gave for `trl_case()`; the test below checks them where TRL is installed.
RECORDED = {"dpo": 0.7017993264545224, "rpo": 2.335680829611471, "kto": 0.5012735539313571}


def trl_case():
    """Token log-probabilities (8, 6) of the policy and the reference, a ragged mask, and KTO's mismatched log-ratios."""
    g = torch.Generator().manual_seed(7)
    logps, ref_logps = -3 * torch.rand(2, 8, 6, generator=g, dtype=torch.float64)
    mask = torch.arange(7) >= torch.tensor([1, 2, 3, 4, 4, 3, 2, 1])[:, None]
    mismatched = torch.rand(8, generator=g, dtype=torch.float64)
    return logps.masked_fill(~mask[:, 1:], 0), ref_logps.masked_fill(~mask[:, 1:], 0), mask, mismatched


def trl_loss(trainer, **attributes):
    """TRL's own loss of `trl_case()`, with a model that returns its numbers and everything that is only logged left empty."""
    logps, ref_logps, mask, mismatched = trl_case()
    numbers = SimpleNamespace(
        log_probs=logps, entropy=torch.zeros(8, 6), mean_logits=torch.zeros(8, 6), is_top1=torch.zeros(8, 6, dtype=torch.bool)
    )
    same = lambda values: values  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, beta=0.1,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)), calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0,
        _compute_kl_logps=lambda model, batch: mismatched, loss_type="kto", **attributes,
    )  # fmt: skip
    chosen, rejected = ref_logps.sum(-1).chunk(2)
    inputs = {
        "input_ids": torch.zeros(8, 7, dtype=torch.long), "completion_mask": mask.long(), "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected, "ref_logps": ref_logps.sum(-1), "ref_KL_logps": torch.zeros(8),
        "label": torch.arange(8) < 4,
    }  # fmt: skip
    return trainer._compute_loss(stub, lambda **_: numbers, inputs, False).item()


@pytest.mark.parametrize("name", RECORDED)
def test_losses_are_those_of_trl(name):
    try:
        import trl

        trainer = trl.KTOTrainer if name == "kto" else trl.DPOTrainer
        kinds = {"dpo": ["sigmoid"], "rpo": ["sigmoid", "sft"], "kto": []}[name]
        assert trl_loss(trainer, loss_types=kinds, loss_weights=[1.0] * len(kinds)) == pytest.approx(RECORDED[name], rel=1e-9)
    except ImportError:
        pass
    logps, ref_logps, mask, mismatched = trl_case()
    logp_sum, logratio, length = logps.sum(-1), (logps - ref_logps).sum(-1), mask[:, 1:].sum(-1)
    reward = torch.tensor([1.0] * 4 + [-1.0] * 4)
    if name == "dpo":
        ours = losses.dpo(logratio, 0.1)[0].mean()
    elif name == "rpo":  # TRL averages over all correct tokens: the same with every length the mean one
        ours = losses.rpo(logratio, logp_sum, torch.full((8,), length[:4].double().mean()), 0.1, 1.0)[0].mean()
    else:
        ours = losses.kto(logratio, reward, mismatched.mean().clamp(min=0), 0.1)[0].mean()
    assert ours.item() == pytest.approx(RECORDED[name], rel=1e-9)


# --- what the regressions aim at: a bandit of four answers, two of them correct

REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
ANSWERS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)


def minimiser(loss):
    """The policy over the four answers that minimises E_ref[loss(log-ratio)]."""
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        total = (REFERENCE * loss(logits.log_softmax(-1) - REFERENCE.log())[0]).sum()
        total.backward()
        return total

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def lambert_w(z):
    """The principal branch, by Newton's steps on w e^w = z, for z > -1/e."""
    w = torch.log1p(z.clamp(min=-0.3))
    for _ in range(100):
        w = w - (w * w.exp() - z) / (w.exp() * (1 + w))
    return w


def lambert_policy(advantage, beta):
    """The solution that the docstring of `pessimistic` derives, and its c: c is where the probabilities add up to one."""

    def policy(c):
        return REFERENCE * beta / c * lambert_w(c / beta * (advantage / beta).exp())

    optimistic = (REFERENCE * (advantage / beta).exp()).sum() < 1
    low, high = (-beta * math.exp(-1.2 - (advantage / beta).max()), -1e-9) if optimistic else (1e-9, 1e3)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy(middle).sum() > 1 else (low, middle)
    return policy(low), low


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_pessimistic_minimiser_is_the_lambert_w_policy(shift):
    beta, mean_reward = 0.5, (REFERENCE * ANSWERS).sum()
    found = minimiser(lambda logratio: losses.pessimistic(logratio, ANSWERS, mean_reward, beta, shift))
    advantage = ANSWERS - mean_reward + shift * beta
    expected, c = lambert_policy(advantage, beta)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    kl = (REFERENCE * (REFERENCE / found).log()).sum().item()
    assert c == pytest.approx((shift + kl) * beta, abs=1e-6) and c > 0  # E[A] = shift beta
    assert (found < REFERENCE * (advantage / beta).exp()).all()


@pytest.mark.parametrize("shift, optimistic", [(-1.4, False), (-1.6, True)])
def test_shifting_far_down_makes_it_optimistic(shift, optimistic):
    beta, mean_reward = 0.5, (REFERENCE * ANSWERS).sum()
    assert (shift < -(REFERENCE * ((ANSWERS - mean_reward) / beta).exp()).sum().log()) == optimistic
    found = minimiser(lambda logratio: losses.pessimistic(logratio, ANSWERS, mean_reward, beta, shift))
    advantage = ANSWERS - mean_reward + shift * beta
    kl = (REFERENCE * (REFERENCE / found).log()).sum().item()
    c = (shift + kl) * beta
    torch.testing.assert_close(beta * (found / REFERENCE).log() + c * found / REFERENCE, advantage, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, lambert_policy(advantage, beta)[0], rtol=0, atol=1e-6)
    above = found > REFERENCE * (advantage / beta).exp()
    assert (c < 0) == optimistic and above.all() == optimistic and above.any() == optimistic


def test_the_a_star_po_minimiser_is_the_gibbs_policy():
    beta, correct = 0.5, (1 + ANSWERS) / 2
    value = beta * (REFERENCE * (correct / beta).exp()).sum().log()
    found = minimiser(lambda logratio: losses.a_star_po(logratio, ANSWERS, value, beta))
    gibbs = REFERENCE * (correct / beta).exp()
    torch.testing.assert_close(found, gibbs / gibbs.sum(), rtol=0, atol=1e-6)
    # with other betas the same regression is no longer at c = 0, and aims at Lambert's policy
    value = 0.8 * (REFERENCE * (correct / 0.8).exp()).sum().log()
    found = minimiser(lambda logratio: losses.a_star_po(logratio, ANSWERS, value, beta))
    torch.testing.assert_close(found, lambert_policy(correct - value, beta)[0], rtol=0, atol=1e-6)


def test_means_and_values_of_a_prompt():
    reward, prompts = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]), torch.tensor([1, 0, 1, 1, 0])
    assert losses.prompt_mean(reward, prompts).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 0])
    value = losses.optimal_value(reward, prompts, beta1=0.5)
    assert value[0].item() == pytest.approx(0.5 * math.log((2 * math.exp(2) + 1) / 3), rel=1e-6)
    assert value[1].item() == pytest.approx(0.5 * math.log((math.exp(2) + 1) / 2), rel=1e-6)
    assert torch.isfinite(losses.optimal_value(reward, prompts, beta1=1e-3)).all()


# --- GRPO


def test_group_advantage_by_hand():
    advantage = losses.group_advantage(torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]), 4)
    assert advantage.tolist() == pytest.approx([1.5 / 1.0001, *[-0.5 / 1.0001] * 3, 0, 0, 0, 0], abs=1e-6)  # std of 4 over 3: 1


def test_grpo_by_hand():
    mask = torch.tensor([[False, True, True], [False, True, False]])
    ratio = torch.tensor([[1.5, 0.5], [1.5, 9.0]])
    old = torch.full((2, 2), -1.0)
    leaf = (old + ratio.log()).requires_grad_()
    rows = losses.grpo(leaf, old, torch.tensor([2.0, -1.0]), mask)
    assert rows.tolist() == pytest.approx([-(2 * 1.2 + 2 * 0.5) / 2, 1.5])  # 1.5 is clipped to 1.2 where A > 0 only
    rows.sum().backward()
    assert leaf.grad.tolist() == [pytest.approx([0, -0.5]), pytest.approx([1.5, 0])]
    small = losses.grpo(old + math.log(0.5), old, torch.tensor([2.0, -1.0]), mask)
    assert small.tolist() == pytest.approx([-2 * 0.5, 0.8])  # 0.5 is clipped to 0.8 where A < 0 only
    per_token = losses.grpo(leaf, old, torch.tensor([2.0, -1.0]), mask, token_level=True).mean()
    assert per_token.item() == pytest.approx(-(2 * 1.2 + 2 * 0.5 - 1.5) / 3)  # three tokens in the batch
    assert losses.grpo(leaf, old, torch.tensor([2.0, -1.0]), torch.zeros_like(mask)).tolist() == [0, 0]


def test_grpo_on_its_own_samples_is_reinforce_with_the_advantage():
    logits, _, tokens, mask, _ = random_case(dtype=torch.float32)
    advantage = torch.tensor([1.2, -0.3, 0.4, -2.0, 0.1, 0.6])
    leaf = logits.clone().requires_grad_()
    logps = token_logps(leaf, tokens, mask)
    losses.grpo(logps, logps.detach(), advantage, mask).sum().backward()
    torch.testing.assert_close(leaf.grad, closed_form(logits, 1 / mask.sum(-1), tokens, mask, advantage))
