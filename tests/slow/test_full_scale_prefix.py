"""What rows begin with is computed once, in training and in sampling, and nothing else changes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_model import VARIANTS, make

import full_scale.policy
import model as model_py
from full_scale.data import padded
from full_scale.policy import completion_hidden, head_of, logp_sums
from full_scale.rollouts import sample_each
from losses import objective

PREFIX = torch.randint(13, (40,), generator=torch.Generator().manual_seed(0)).tolist()
ROWS = {  # prompt and completion, behind the prefix
    "one problem": [([1], [2, 3, 4]), ([1], [2, 5]), ([1], [6])],
    "problems of several lengths": [([1, 2], [3, 4]), ([5], [6, 7, 8]), ([1, 2, 9], [3])],
    "no more than the prefix": [([], [2, 3, 4]), ([], [2, 3]), ([], [5, 6, 7, 8])],  # which begin alike beyond the prompt
    "a row inside of another": [([1, 2], [3, 4]), ([1, 2, 3, 4], [5, 6])],
}


def batch(rows, prefix=PREFIX):
    sequences = [torch.tensor([*prefix, *prompt, *completion]) for prompt, completion in rows]
    return padded(sequences, [len(prefix) + len(prompt) for prompt, _ in rows], "cpu")


def never(monkeypatch):
    """No prefix is shared any more."""
    for module in (model_py, full_scale.policy):
        monkeypatch.setattr(module, "shared_prefix", lambda tokens, most: 0)


def step(model, rows, prefix):
    """FPA's loss and its gradient on some rows, half of them correct; the reference policy is a little flatter."""
    tokens, mask = batch(rows, prefix)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.norm.weight.mul_(0.9)
        ref_hidden, _ = completion_hidden(reference, tokens, mask)
    hidden, targets = completion_hidden(model, tokens, mask)
    logp_sum, future_logp_sum = logp_sums(hidden, head_of(model), targets, mask, ref_hidden, head_of(reference), 2.0)
    reward = torch.where(torch.arange(len(rows)) % 2 == 0, 1.0, -1.0)
    b = SimpleNamespace(logp_sum=logp_sum, future_logp_sum=future_logp_sum, logratio=logp_sum)
    b.length, b.reward = mask.sum(-1), reward
    model.zero_grad()
    loss, _ = objective(b, SimpleNamespace(loss="fpa", lam=2.0, target="both"))
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def counted(model):
    """A list of how many tokens each forward goes through the layers with."""
    sizes = []
    model.layers[0].mlp.register_forward_hook(lambda module, args, result: sizes.append(args[0].shape[:2].numel()))
    return sizes


@pytest.mark.parametrize("short", [0, model_py.SHORT], ids=["fused", "written out"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_shared_prefix_changes_neither_loss_nor_gradient(options, rows, short, monkeypatch):
    monkeypatch.setattr(model_py, "SHORT", short)
    model = make(**options).float()
    sizes = counted(model)  # the reference's, then the model's own
    loss, gradient = step(model, rows, PREFIX)
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    whole = len(rows) * (len(PREFIX) + longest)
    assert sizes[0] < 0.7 * whole and sizes[0] >= len(PREFIX) + longest
    never(monkeypatch)
    expected_loss, expected = step(model, rows, PREFIX)
    assert sizes[2:] == [whole, whole]
    torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=1e-7)
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=1e-5 * scale + 1e-8, msg=name)
    assert any(value.abs().max() > 1e-3 for value in expected.values())


def test_little_in_common_is_not_shared():
    tokens = torch.zeros(2, 30, dtype=torch.long)
    tokens[1, 15:] = 1
    assert model_py.shared_prefix(tokens, 29) == 0  # 15 tokens, though they are half of all
    tokens[1, 15] = 0
    assert model_py.shared_prefix(tokens, 29) == 16 and model_py.shared_prefix(tokens, 15) == 0
    assert model_py.shared_prefix(tokens[:1], 29) == 0
    long = torch.cat([tokens, torch.arange(400).view(2, 200)], dim=1)
    assert model_py.shared_prefix(long, 229) == 0  # a fourteenth of all


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("short", [0, model_py.SHORT], ids=["fused", "written out"])
def test_answers_to_prompts_with_a_shared_prefix_are_the_same(short, options, monkeypatch):
    """Greedy and sampled, from prompts of two widths and several numbers of samples, in the order of the prompts."""
    monkeypatch.setattr(model_py, "SHORT", short)
    model = make(**options)
    prompts = [[*PREFIX, 1, 2], [*PREFIX, 3], [*PREFIX, 4, 5], [*PREFIX, 6], [*PREFIX, 7, 8]]
    counts, sizes = [2, 3, 2, 3, 1], counted(model)

    def sampled(temperature):
        generator = torch.Generator().manual_seed(0)
        return sample_each(model, prompts, counts, 6, torch.tensor([12]), temperature, generator)

    shared, positions = [sampled(0), sampled(1.0)], sum(sizes)
    assert sizes[0] == len(PREFIX) + 2 * 2 and [len(some) for some in shared[1]] == counts
    assert all(answers[0] == answers[-1] for answers in shared[0])
    never(monkeypatch)
    assert [sampled(0), sampled(1.0)] == shared and sum(sizes) - positions > positions
    alone = [sample_each(model, [p], [1], 6, torch.tensor([12]), 0, torch.Generator())[0][0] for p in prompts]
    assert alone == [answers[0] for answers in shared[0]]


def test_more_samples_than_go_at_once(monkeypatch):
    model = make()
    monkeypatch.setattr("full_scale.rollouts.AT_ONCE", 4)
    widths, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *words: (widths.append(len(words[0]) * words[-1]), generate(*words))[1])
    answers = sample_each(model, [[1, 2], [3, 4], [5, 6]], [9, 2, 2], 3, -1, 1.0, torch.Generator().manual_seed(0))
    assert [len(some) for some in answers] == [9, 2, 2] and widths == [4, 4, 1, 4]
    assert len({tuple(ids) for ids in answers[0]}) > 4
