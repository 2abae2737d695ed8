"""losses.py against hand-worked numbers, closed forms, each other and TRL."""

import inspect
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import losses
from losses import LOSSES, fpa, fpa_form, fpa_loss, future_logits, objective, off_rl, off_rl_loss, token_logps

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


def test_a_token_that_lost_loses_more():
    """And of two that gained, the one that gained less may lose."""
    logits, ref_logits, *_ = random_case()
    for lam in (0.5, 2.0):
        pi, ref, future = (h.softmax(-1) for h in (logits, ref_logits, future_logits(logits, ref_logits, lam)))
        lost = pi < ref
        assert lost.any() and (future[lost] < pi[lost]).all() and (future[~lost] < pi[~lost]).any()


def test_future_of_linear_drift():
    # Logits that drift linearly from the reference: the extrapolation at time t is the policy of time (1 + lam) t.
    ref_logits, velocity = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    t, lam = 0.7, 2.0
    torch.testing.assert_close(future_logits(ref_logits + t * velocity, ref_logits, lam), ref_logits + (1 + lam) * t * velocity)


SETTINGS = {"beta": 0.7, "alpha": 1.3, "weight": 0.25, "shift": 0.5, "lam": 1.5, "target": "both"}
OFFLINE = [name for name, row in LOSSES.items() if not row.online]
WITH_FPA_FORM = [name for name, row in LOSSES.items() if row.has_fpa_form or row.form_of]
PAIRED = [name for name, row in LOSSES.items() if row.pairs]


def run_of(name, **settings):
    own = LOSSES[name].defaults if name in LOSSES else {}
    return SimpleNamespace(**{**own, **SETTINGS, "loss": name, **settings})


def batch_of(logp_sum, length=None, scale=1.0):
    """A batch that every loss takes: correct rows first, then as many incorrect ones; four prompts of both kinds."""
    half, dtype = len(logp_sum) // 2, logp_sum.dtype
    g = torch.Generator().manual_seed(1)
    reward = torch.tensor([1.0] * half + [-1.0] * half, dtype=dtype)
    prompts = torch.arange(2 * half) % 4
    reference = logp_sum.detach() + scale * torch.randn(2 * half, generator=g, dtype=dtype)
    return SimpleNamespace(
        logp_sum=logp_sum,
        future_logp_sum=logp_sum.detach(),
        logratio=logp_sum - reference,
        length=torch.randint(3, 9, (2 * half,), generator=g).to(dtype) if length is None else length,
        reward=reward,
        value=losses.optimal_value(reward, prompts),
        mean_reward=losses.prompt_mean(reward, prompts),
        z0=torch.tensor(0.3, dtype=dtype),
    )


def changed(batch, **values):
    return SimpleNamespace(**{**vars(batch), **values})


def random_logp_sum(dtype=torch.float64):
    return -6 * torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("name", OFFLINE)
def test_the_coefficient_is_the_gradient_of_the_loss(name):
    leaf = random_logp_sum().requires_grad_()
    batch = batch_of(leaf)
    values, coefficient = LOSSES[name](batch, run_of(name))
    assert values.shape == ((6,) if name in PAIRED else (12,)) and not coefficient.requires_grad
    values.sum().backward()
    torch.testing.assert_close(-batch.reward * coefficient, leaf.grad, rtol=1e-9, atol=0)


def test_coefficients_by_hand():
    # two rows, y_w of 2 tokens and y_l of 4, so pi_bar = 1/2 and 1/4; log-ratios ln 2 and ln 8
    logp_sum, length = torch.tensor([-2 * LN2, -4 * LN4]), torch.tensor([2, 4])
    batch = SimpleNamespace(
        logp_sum=logp_sum,
        future_logp_sum=2 * logp_sum,  # so the future pi_bar = 1/4 and 1/16
        logratio=torch.tensor([LN2, 3 * LN2]),
        length=length,
        reward=torch.tensor([1.0, -1.0]),
        value=torch.tensor([0.5, 0.5]),
        mean_reward=torch.tensor([0.0, 0.0]),
        z0=torch.tensor(LN2),
    )
    settings = {"beta": 1.0, "alpha": 3.0, "weight": 0.25, "shift": 2.0, "lam": 1.0, "target": "both"}
    dpo = 4 / 5  # sigmoid(ln 8 - ln 2) = 4 / (4 + 1)
    expected = {
        "off_rl": ([-1 / 2, 1 / 4], [1 / 4, 1 / 16]),
        "fpa": ([LN2 / 4, -LN4 / 16], [1 / 8, 1 / 64]),
        "simper": ([-1 / 4], [1 / 4, 1 / 16]),
        "dpo": ([math.log(5)], [dpo, dpo]),
        "rpo": ([math.log(5) + 3 * LN2], [dpo + 3 / 2, dpo]),
        "kto": ([1 / 2, 4 / 5], [1 / 4, 4 / 25]),  # s = sigmoid(0) and sigmoid(ln 2 - ln 8) = 1/5
        "a_star_po": ([(LN2 - 0.5) ** 2, (3 * LN2 + 0.5) ** 2], [2 * (0.5 - LN2), 2 * (3 * LN2 + 0.5)]),
        "pessimistic": ([(LN2 - 3) ** 2, (3 * LN2 - 1) ** 2], [2 * (3 - LN2), 2 * (3 * LN2 - 1)]),  # A = 1 + 2 and -1 + 2
        "sft": ([LN2, 0], [1 / 2, 0]),
        "reinforce": ([LN2, -LN4], [1 / 2, 1 / 4]),
        "constant": ([LN2 / 2, -LN4 / 4], [1 / 4, 1 / 16]),
        "sharpened": ([LN2 / 4, -LN4 / 16], [1 / 8, 1 / 64]),  # pi_bar^2
        "power": ([LN2 * 2**-0.5, -LN4 * 2**-1.25], [2**-0.5 / 2, 2**-1.25 / 4]),  # pi_bar^2 / pi_bar_ref
        "nsr": ([LN2 / 4, -LN4], [1 / 8, 1 / 4]),
        "asymre": ([3 * LN2, LN4], [3 / 2, -1 / 4]),  # V = -2 is below both rewards
        "topr": ([LN2, -LN4], [1 / 2, 1 / 4]),  # rho = 8 counts as 1
    }
    assert all(name in expected or f"test_{name}_by_hand" in globals() for name in OFFLINE)  # a new loss has its own test
    for name, (values, coefficient) in expected.items():
        got_values, got_coefficient = LOSSES[name](batch, SimpleNamespace(**settings))
        assert got_values.tolist() == pytest.approx(values, abs=1e-6), name
        assert got_coefficient.tolist() == pytest.approx(coefficient, rel=1e-5), name


def test_simper_is_off_rl_on_pairs():  # Proposition A.1
    length, gradients = torch.arange(3.0, 15.0, dtype=torch.float64), []
    for loss in ("simper", "off_rl"):
        leaf = random_logp_sum().requires_grad_()
        LOSSES[loss](batch_of(leaf, length), run_of(loss))[0].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WITH_FPA_FORM)
def test_at_lambda_zero_the_fpa_form_is_the_loss(name):
    gradients, coefficients = [], []
    plain = LOSSES[name].form_of or name
    for one in (run_of(plain, lam=0.0), run_of(name, lam=2.0)):  # future_logp_sum is the present one, as at lambda 0
        leaf = random_logp_sum().requires_grad_()
        loss, coefficient = objective(batch_of(leaf), one)
        loss.backward()
        gradients.append(leaf.grad), coefficients.append(coefficient)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)
    torch.testing.assert_close(*coefficients)


@pytest.mark.parametrize("target", ["both", "correct", "incorrect"])
@pytest.mark.parametrize("name", WITH_FPA_FORM)
def test_the_fpa_form_has_the_future_coefficient_and_the_present_score(name, target):
    leaf, future = random_logp_sum().requires_grad_(), random_logp_sum().flip(0)
    batch = changed(batch_of(leaf), future_logp_sum=future)
    loss, returned = objective(batch, run_of(name, target=target))
    loss.backward()

    plain = LOSSES[LOSSES[name].form_of or name]
    present = SimpleNamespace(**{key: value.detach() for key, value in vars(batch).items()})
    at_future = changed(present, logp_sum=future, logratio=future - (present.logp_sum - present.logratio))
    expected, other = (plain(b, run_of(name))[1] for b in (at_future, present))
    if target != "both":
        expected = torch.where((batch.reward > 0) == (target == "correct"), expected, other)
    torch.testing.assert_close(returned, expected)
    torch.testing.assert_close(leaf.grad, -batch.reward * expected / (6 if name in PAIRED else 12))


def test_topr_pushes_an_incorrect_row_by_its_importance_weight_up_to_one():
    """Le Roux et al. 2025: E_mu[min(rho, 1) r grad log pi] on incorrect rows, and SFT's gradient on correct ones."""
    leaf = random_logp_sum().requires_grad_()
    batch = batch_of(leaf)
    LOSSES["topr"](batch, run_of("topr"))[0].sum().backward()
    rho, again = batch.logratio.detach().exp(), random_logp_sum().requires_grad_()
    assert ((rho < 1) & (batch.reward < 0)).any() and ((rho > 1) & (batch.reward < 0)).any()
    weighted = (again - (leaf - batch.logratio).detach()).exp() / batch.length  # rho / |y|, with its own gradient
    published = torch.where(batch.reward > 0, -again / batch.length, torch.where(rho < 1, weighted, again / batch.length))
    published.sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-9, atol=0)


def test_future_topr_by_hand():
    # two rows of 2 tokens; the future policy gives each a quarter of its present probability, which is half of the reference's
    leaf = torch.tensor([-2.0, -2.0], requires_grad=True)
    batch = batch_of(leaf, length=torch.tensor([2.0, 2.0]))
    batch = changed(batch, logratio=leaf - (leaf.detach() + LN2), future_logp_sum=leaf.detach() - 2 * LN2)
    loss, coefficient = objective(batch, run_of("future_topr"))
    loss.backward()
    assert coefficient.tolist() == pytest.approx([1 / 2, 1 / 16])  # rho at the future policy is 1/8
    assert leaf.grad.tolist() == pytest.approx([-1 / 4, 1 / 32])


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_power_is_fpa_without_the_normalisation_over_the_vocabulary(lam):
    """The future policy of a token is pi (pi / pi_ref)^lam / Z, so power's C is FPA's times the geometric mean of Z."""
    logits, ref_logits, tokens, mask, reward = random_case()
    length = mask[:, 1:].sum(-1)
    logp_sum, ref_logp_sum = sum_logp(logits, tokens, mask), sum_logp(ref_logits, tokens, mask)
    future = sum_logp(future_logits(logits.float(), ref_logits.float(), lam), tokens, mask)
    expected = fpa(logp_sum, future, length, reward)[1]
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    log_z = (logp + lam * (logp - ref_logp)).logsumexp(-1)[:, :-1].masked_fill(~mask[:, 1:], 0).sum(-1)
    got = losses.power(logp_sum, logp_sum - ref_logp_sum, length, reward, lam)[1]
    assert (log_z > 0.01).all()  # so power is never below FPA
    torch.testing.assert_close(got, (expected * (log_z / length).exp()).to(got.dtype), rtol=1e-4, atol=0)


def test_powers_weight_is_at_most_one():
    logp_sum, logratio, length = torch.tensor([-2 * LN2, -2 * LN2]), torch.tensor([10.0, -LN2]), torch.tensor([2.0, 2.0])
    coefficient = losses.power(logp_sum, logratio, length, torch.tensor([1.0, -1.0]), lam=2.0)[1]
    assert (coefficient * length).tolist() == pytest.approx([1.0, 1 / 4])


GAINS = {  # of grad log pi
    "asymre": lambda reward, mean: reward - (mean - SETTINGS["shift"]),  # Arnal et al. 2025: r - V, V below the mean reward
    "nsr": lambda reward, mean: torch.where(reward > 0, SETTINGS["weight"], -1.0),  # Zhu et al. 2025: weighted REINFORCE
}


@pytest.mark.parametrize("name", GAINS)
def test_reinforces_relatives_have_the_published_gradient(name):
    """Their papers sum over tokens; here the sum is divided by |y|."""
    leaf, again = random_logp_sum().requires_grad_(), random_logp_sum().requires_grad_()
    batch = batch_of(leaf)
    LOSSES[name](batch, run_of(name))[0].sum().backward()
    (-GAINS[name](batch.reward, batch.mean_reward) * again / batch.length).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-6, atol=0)
    assert leaf.grad.abs().min() > 0 and batch.mean_reward.unique().numel() > 1


def test_asymre_at_shift_zero_is_centred_and_a_shift_favours_correct_rows():
    batch = batch_of(random_logp_sum(), length=torch.ones(12, dtype=torch.float64))
    signed = [(batch.reward * LOSSES["asymre"](batch, run_of("asymre", shift=shift))[1]).sum() for shift in (0.0, 0.1)]
    assert signed[0] == pytest.approx(0, abs=1e-12) and signed[1] == pytest.approx(1.2)


@pytest.mark.parametrize("target", ["correct", "incorrect"])
@pytest.mark.parametrize("name", ["sharpened", "power"])
def test_a_controls_target_leaves_the_other_rows_to_off_rl(name, target):
    batch = batch_of(random_logp_sum())
    got, everywhere = (LOSSES[name](batch, run_of(name, target=rows))[1] for rows in (target, "both"))
    plain = (batch.logp_sum / batch.length).exp() / batch.length
    torch.testing.assert_close(got, torch.where((batch.reward > 0) == (target == "correct"), everywhere, plain))


def test_the_sharpened_coefficient_is_a_power_of_off_rls():
    batch = batch_of(random_logp_sum())
    expected = (batch.logp_sum / batch.length * 2.5).exp() / batch.length
    torch.testing.assert_close(LOSSES["sharpened"](batch, run_of("sharpened"))[1], expected)


# --- the heart: fpa_loss and off_rl_loss, whole


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0, 10.0])
def test_fpa_loss_is_the_general_form_in_value_and_gradient(lam):
    logits, other, tokens, mask, reward = random_case(dtype=torch.float32)
    ref_logits = logits + other / 20  # so near that no coefficient vanishes at lambda 10
    leaves = [logits.clone().requires_grad_() for _ in range(4)]
    length = mask.sum(-1)
    present, future = (sum_logp(h, tokens, mask) for h in (leaves[1], future_logits(logits, ref_logits, lam)))
    general, _ = fpa_form(present, reward, off_rl(present, length, reward)[1], off_rl(future, length, reward)[1])
    by_table = []
    for leaf, name in ((leaves[2], "fpa"), (leaves[3], "off_rl")):  # its own row, and Off-RL's general form
        batch = SimpleNamespace(logp_sum=sum_logp(leaf, tokens, mask), future_logp_sum=future, length=length, reward=reward)
        batch.logratio = batch.logp_sum - sum_logp(ref_logits, tokens, mask)
        by_table.append(objective(batch, SimpleNamespace(loss=name, lam=max(lam, 1e-9), target="both"))[0])
    values = [fpa_loss(leaves[0], ref_logits, tokens, mask, reward, lam), general, *by_table]
    for leaf, value in zip(leaves, values):
        value.backward()
        torch.testing.assert_close(value, values[0])
        torch.testing.assert_close(leaf.grad, leaves[0].grad, rtol=1e-4, atol=1e-9)
    assert leaves[0].grad.abs().max() > 1e-3


def test_at_lambda_zero_fpa_loss_is_off_rl_loss_and_its_gradient_off_rls():
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    gradients, values = [], []
    length = mask.sum(-1)
    for loss in (
        lambda leaf: fpa_loss(leaf, ref_logits, tokens, mask, reward, lam=0.0),
        lambda leaf: off_rl_loss(leaf, tokens, mask, reward),
        lambda leaf: off_rl(sum_logp(leaf, tokens, mask), length, reward)[0].mean(),
    ):
        leaf = logits.clone().requires_grad_()
        values.append(loss(leaf))
        values[-1].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[2])


def test_fpa_loss_by_hand():
    # one correct and one incorrect row of one token, p = 1/2 each; the reference gave 1/4: pi_hat odds are 1 * (1 / (1/3))^lam
    logits, ref_logits = torch.zeros(2, 2, 2), torch.tensor([0.0, math.log(3)]).expand(2, 2, 2)
    tokens, mask = torch.zeros(2, 2, dtype=torch.long), torch.tensor([[False, True]] * 2)
    leaf = logits.clone().requires_grad_()
    loss = fpa_loss(leaf, ref_logits, tokens, mask, torch.tensor([1.0, -1.0]), lam=1.0)
    loss.backward()
    assert loss.item() == 0  # the rows cancel: the value measures nothing
    weight = 3 / 4  # odds of 3
    assert leaf.grad[:, 0].flatten().tolist() == pytest.approx([-weight / 4, weight / 4, weight / 4, -weight / 4])


@pytest.mark.parametrize("reward", [[1.0, 0.0] * 3, [1, 0] * 3, [0.5, -1.0] * 3, [float("nan")] * 6])
def test_rewards_other_than_plus_and_minus_one_are_refused_with_the_mend(reward):
    logits, ref_logits, tokens, mask, _ = random_case()
    for loss in (lambda r: fpa_loss(logits, ref_logits, tokens, mask, r), lambda r: off_rl_loss(logits, tokens, mask, r)):
        with pytest.raises(ValueError, match=r"must be \+1 or -1.*2 \* reward - 1"):
            loss(torch.tensor(reward))


def test_a_row_without_a_completion_is_refused_and_integer_masks_and_rewards_are_taken():
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    expected = fpa_loss(logits, ref_logits, tokens, mask, reward)
    assert fpa_loss(logits, ref_logits, tokens, mask.long(), reward.long()) == expected
    mask[2] = False
    mask[2, 0] = True  # no logits predict the first token
    with pytest.raises(ValueError, match="no completion token"):
        fpa_loss(logits, ref_logits, tokens, mask, reward)


def test_ignored_tokens_may_be_anything_and_scored_ones_may_not():
    """Labels are often padded with -100, where no token is scored."""
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    padded = tokens.masked_fill(~mask, -100)
    assert fpa_loss(logits, ref_logits, padded, mask, reward) == fpa_loss(logits, ref_logits, tokens, mask, reward)
    padded[0, 3] = -100
    with pytest.raises(RuntimeError, match="out of bounds"):
        fpa_loss(logits, ref_logits, padded, mask, reward)


def test_shapes_that_broadcast_are_refused():
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    with pytest.raises(AssertionError, match="reward.*mask"):
        fpa_loss(logits, ref_logits, tokens, mask, reward[:, None])
    with pytest.raises(AssertionError, match="ref_logits"):
        fpa_loss(logits, ref_logits[:1], tokens, mask, reward)
    with pytest.raises(RuntimeError):
        losses.dpo(torch.zeros(3))  # no pairs


@pytest.mark.parametrize("beta1", [1e-3, 0.5])
def test_the_optimal_value_of_a_problem_that_nobody_solved_is_zero(beta1):
    value = losses.optimal_value(torch.tensor([-1.0, -1.0, 1.0, -1.0]), torch.tensor([0, 0, 1, 1]), beta1)
    assert value[:2].tolist() == pytest.approx([0, 0], abs=1e-6) and 1 - beta1 < value[2].item() == value[3].item() < 1


def test_fpa_loss_teaches_the_present_policy_only():
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    leaf, reference = logits.clone().requires_grad_(), ref_logits.clone().requires_grad_()
    fpa_loss(leaf, reference, tokens, mask, reward).backward()
    assert reference.grad is None and leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("pairs", [False, True])
def test_the_general_form_takes_the_mean_over_rows_or_pairs(pairs):
    """DPO's own mean is over pairs: with `pairs` its FPA form at the present policy has DPO's gradient, not half of it."""
    leaf = random_logp_sum().requires_grad_()
    batch = batch_of(leaf)
    values, coefficient = losses.dpo(batch.logratio, 0.3)
    (expected,) = torch.autograd.grad(values.mean(), leaf, retain_graph=True)
    loss, _ = fpa_form(batch.logp_sum, batch.reward, coefficient, coefficient, pairs=pairs)
    (got,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(got, expected if pairs else expected / 2)
    assert loss.shape == ()


def test_log_probabilities_where_coefficients_belong_are_refused():
    logp_sum, reward = torch.tensor([-3.0, -4.0]), torch.tensor([1.0, -1.0])
    good = torch.tensor([0.1, 0.2])
    for present, future in ((logp_sum, good), (good, logp_sum), (logp_sum, logp_sum)):
        with pytest.raises(ValueError, match="coefficients C >= 0.*not log-probabilities"):
            fpa_form(logp_sum, reward, present, future)


# --- the table


def test_rows_have_the_defaults_of_their_functions_and_a_flag_for_each():
    for row in LOSSES.values():
        arguments = inspect.signature(row.function).parameters
        for name, value in row.defaults.items():
            assert name in losses.HYPERPARAMETERS and (name not in arguments or arguments[name].default == value)
        assert row.label and row.idea
        assert not row.form_of or LOSSES[row.form_of].has_fpa_form


def test_an_unknown_loss_names_the_known_ones():
    with pytest.raises(KeyError, match="unknown loss 'ppo'.*off_rl, fpa"):
        objective(batch_of(random_logp_sum()), run_of("ppo"))


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
    surrogate, returned = fpa(logp_sum, future_logp_sum, length, reward, target)
    surrogate.sum().backward()
    torch.testing.assert_close(returned, coefficient)
    torch.testing.assert_close(leaf.grad, closed_form(logits, coefficient, tokens, mask, reward))


def test_stop_gradient_stops():
    logits, ref_logits, tokens, mask, reward = random_case(dtype=torch.float32)
    # The coefficients may carry a graph; none of it may reach the parameters, in logits or in log-probabilities.
    leaf = logits.clone().requires_grad_()
    assert not future_logits(leaf, ref_logits, 2.0).requires_grad
    attached = sum_logp(leaf, tokens, mask).exp()
    surrogate, coefficient = fpa_form(torch.full((len(reward),), -0.5), reward, attached, attached)
    assert not surrogate.requires_grad and not coefficient.requires_grad
    surrogate, coefficient = fpa(torch.full((len(reward),), -0.5), attached.log(), mask.sum(-1), reward)
    assert not surrogate.requires_grad and not coefficient.requires_grad


@pytest.mark.parametrize("name", OFFLINE)
def test_one_step_moves_the_way_the_sign_says(name):
    leaf = torch.full((2,), -3.0, requires_grad=True)
    batch = changed(batch_of(leaf), logratio=leaf + 3.0, mean_reward=torch.zeros(2), value=torch.full((2,), 0.5))
    LOSSES[name](batch, run_of(name, shift=0.0))[0].sum().backward()
    assert leaf.grad[0] < 0 and (leaf.grad[1] == 0 if name == "sft" else leaf.grad[1] > 0)  # descent raises the correct one


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_finite_at_extreme_log_probabilities(name, scale):
    for present in (-scale, 0.0):
        for future in (-scale, 0.0):
            for lam in (0.0, *([2.0] if name in WITH_FPA_FORM or "lam" in LOSSES[name].defaults else [])):
                leaf = torch.full((12,), present, requires_grad=True)
                batch = changed(batch_of(leaf, scale=scale), future_logp_sum=torch.full((12,), future))
                loss, coefficient = objective(batch, run_of(name, lam=lam))
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
            for values, coefficient in (off_rl(present, length, reward), fpa(present, future, length, reward)):
                (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
                assert torch.isfinite(values).all() and torch.isfinite(coefficient).all() and torch.isfinite(gradient).all()


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match="'wrong'.*both, correct, incorrect"):
        fpa(torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2), "wrong")
    with pytest.raises(ValueError, match="'wrong'.*both, correct, incorrect"):
        fpa_form(torch.zeros(2), torch.ones(2), torch.zeros(2), torch.zeros(2), "wrong")


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
def test_the_recorded_losses_are_those_of_trl(name):
    trl = pytest.importorskip("trl")
    trainer = trl.KTOTrainer if name == "kto" else trl.DPOTrainer
    kinds = {"dpo": ["sigmoid"], "rpo": ["sigmoid", "sft"], "kto": []}[name]
    assert trl_loss(trainer, loss_types=kinds, loss_weights=[1.0] * len(kinds)) == pytest.approx(RECORDED[name], rel=1e-9)


@pytest.mark.parametrize("name", RECORDED)
def test_losses_are_those_of_trl(name):
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
    """The solution that docs/method.md derives, and its c: c is where the probabilities add up to one."""

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
    leaf = torch.tensor([[-1.0, -0.5], [-2.0, -9.0]], requires_grad=True)
    rows, coefficient = losses.grpo(leaf, torch.tensor([2.0, -1.0]), mask)
    assert rows.tolist() == [-2, 1] and coefficient.tolist() == [1, 1]  # the ratio is 1, whatever the probability
    rows.sum().backward()
    assert leaf.grad.tolist() == [[-1, -1], [1, 0]]
    rows, coefficient = losses.grpo(leaf, torch.tensor([2.0, -1.0]), mask, dapo=True)
    assert rows.mean().item() == pytest.approx(-(2 + 2 - 1) / 3)  # three tokens in the batch
    assert coefficient.tolist() == pytest.approx([2 / 1.5, 1 / 1.5])
    assert losses.grpo(leaf, torch.tensor([2.0, -1.0]), torch.zeros_like(mask))[0].tolist() == [0, 0]


def test_grpo_on_its_own_samples_is_reinforce_with_the_advantage():
    logits, _, tokens, mask, _ = random_case(dtype=torch.float32)
    advantage = torch.tensor([1.2, -0.3, 0.4, -2.0, 0.1, 0.6])
    leaf = logits.clone().requires_grad_()
    logps = token_logps(leaf, tokens, mask)
    losses.grpo(logps, advantage, mask)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, closed_form(logits, 1 / mask.sum(-1), tokens, mask, advantage))
