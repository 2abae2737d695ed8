"""model.py: causality, padding, the KV cache, sampling, and its parts against plain formulas."""

import itertools

import pytest
import torch

import model as model_py
from losses import token_logps
from model import GPT, GPTConfig, rotary_table, rotate

VARIANTS = {
    "default": {},
    "untied": {"tied_head": False},
    "bias, no groups": {"qkv_bias": True, "n_kv_heads": 4},
    "one kv head, wide theta": {"n_kv_heads": 1, "rope_theta": 500_000.0},
    "normalised heads of their own width": {"qk_norm": True, "own_head_dim": 12},
    "longer context": {"rope_scaling": (8.0, 1.0, 4.0, 16), "rope_theta": 100.0},
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=13, **options)).double()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_future_tokens_and_padding_change_nothing(options):
    model = make(**options)
    tokens = torch.randint(13, (3, 10))
    changed = tokens.clone()
    changed[:, 6:] = 12
    with torch.no_grad():
        a, b, short = model(tokens), model(changed), model(tokens[:, :6])
    torch.testing.assert_close(a[:, :6], b[:, :6])
    torch.testing.assert_close(a[:, :6], short)
    assert not torch.allclose(a[:, 6:], b[:, 6:])
    mask = (torch.arange(10) >= 3) & (torch.arange(10) < 6) & torch.ones(3, 1, dtype=bool)
    torch.testing.assert_close(token_logps(a, tokens, mask), token_logps(b, changed, mask))


def plain_forward(model, tokens):
    """One sequence (T,) -> logits (T, V), by the published formulas, a head and a position at a time."""
    c, weights = model.config, model.state_dict()

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weights[name + ".weight"]

    def project(x, name):
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0)

    def turn(vectors):  # dimensions i and i + half are one complex number, rotated by position x theta^(-i / half)
        half = c.head_dim // 2
        frequencies = c.rope_theta ** (-torch.arange(half) / half)
        if c.rope_scaling:  # as published: by wavelength, kept below one bound, slowed above the other, mixed between
            factor, low, high, original = c.rope_scaling
            for i, wavelength in enumerate((2 * torch.pi / frequencies).tolist()):
                mix = min(max((original / wavelength - low) / (high - low), 0), 1)
                frequencies[i] *= (1 - mix) / factor + mix
        angles = torch.arange(len(vectors))[:, None] * frequencies
        turned = torch.complex(vectors[:, :half], vectors[:, half:]) * torch.polar(torch.ones(()), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    x = weights["embed_tokens.weight"][tokens]
    for i in range(c.n_layers):
        layer = f"layers.{i}."
        y = norm(x, layer + "input_layernorm")
        q, k, v = (project(y, f"{layer}self_attn.{name}_proj").split(c.head_dim, dim=-1) for name in "qkv")
        if c.qk_norm:
            q = [norm(head, layer + "self_attn.q_norm") for head in q]
            k = [norm(head, layer + "self_attn.k_norm") for head in k]
        heads = []
        for h in range(c.n_heads):
            group = h // (c.n_heads // c.n_kv_heads)  # neighbouring query heads share a key/value head
            scores = turn(q[h]) @ turn(k[group]).T / c.head_dim**0.5
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[group])
        x = x + project(torch.cat(heads, dim=-1), layer + "self_attn.o_proj")
        y = norm(x, layer + "post_attention_layernorm")
        gate, up = project(y, layer + "mlp.gate_proj"), project(y, layer + "mlp.up_proj")
        x = x + project(gate * gate.sigmoid() * up, layer + "mlp.down_proj")
    return norm(x, "norm") @ weights["embed_tokens.weight" if c.tied_head else "lm_head.weight"].T


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_forward_is_the_plain_formulas(options):
    model = make(**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # away from the ones and zeros they start at
                parameter += 0.3 * torch.randn_like(parameter)
        tokens = torch.randint(13, (2, 9))
        expected = torch.stack([plain_forward(model, row) for row in tokens])
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)  # the rotary table is fp32


def test_bfloat16_runs():
    model = make().bfloat16()
    tokens = torch.randint(13, (2, 6))
    assert torch.isfinite(model(tokens)).all()
    assert model.generate(tokens, 3, eos=-1, pad=12).shape == (2, 3)


@pytest.mark.parametrize("T, S", [(6, 6), (3, 6), (1, 6), (1, 1)])
def test_explicit_attention_is_the_fused_one(T, S):
    shapes = (2, 6, T, 8), (2, 2, S, 8), (2, 2, S, 8)
    results = []
    for function in (model_py.attend, model_py.fused):
        torch.manual_seed(0)
        q, k, v = (torch.randn(shape).requires_grad_() for shape in shapes)
        y = function(q, k, v)
        y.backward(torch.randn(y.shape))
        results.append((y, q.grad, k.grad, v.grad))
    for explicit, fused in zip(*results):
        torch.testing.assert_close(explicit, fused)
    # and against the formula, query by query: head h reads keys of group h // 3, and no position after its own
    for h in range(6):
        for t in range(T):
            keys, values = k[1, h // 3, : S - T + t + 1], v[1, h // 3, : S - T + t + 1]
            expected = (keys @ q[1, h, t] / 8**0.5).softmax(0) @ values
            torch.testing.assert_close(results[0][0][1, h, t], expected)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_cached_decoding_equals_full_forward(options):
    model = make(**options)
    prompts = torch.randint(13, (5, 4))
    completions = model.generate(prompts, 12, eos=-1, pad=12, temperature=0)
    twice = model.generate(prompts, 12, eos=-1, pad=12, temperature=0, samples=2)
    assert torch.equal(twice, completions.repeat_interleave(2, dim=0))
    tokens = prompts
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(completions, tokens[:, 4:])


def test_sampling_follows_the_policy():
    """Frequencies of the first sampled token against the softmax, at one temperature and at several at once."""
    model, n = make(), 20_000
    prompts = torch.tensor([[1, 2, 3], [7, 5, 0]])
    with torch.no_grad():
        logits = model(prompts)[:, -1]
    for temperatures in ([1.0], [0.5], [1.0, 0.5], [0.0, 0.5, 1.0]):
        given = torch.tensor(temperatures * n) if len(temperatures) > 1 else temperatures[0]
        generator = torch.Generator().manual_seed(0)
        sampled = model.generate(prompts, 1, -1, 12, given, generator, n * len(temperatures)).view(2, n, -1)
        for prompt, (i, temperature) in itertools.product(range(2), enumerate(temperatures)):
            frequency = torch.bincount(sampled[prompt, :, i], minlength=13) / n
            if temperature:
                expected = (logits[prompt] / temperature).softmax(-1)
                assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()
            else:
                assert frequency[logits[prompt].argmax()] == 1


def test_samples_of_temperature_0_beside_others_are_the_most_likely_tokens():
    model = make()
    prompts = torch.randint(13, (5, 4))
    greedy = model.generate(prompts, 12, eos=-1, pad=12, temperature=0)
    temperatures = torch.tensor([2.0, 0.0, 1.0, 0.0])
    mixed = model.generate(prompts, 12, -1, 12, temperatures, torch.Generator().manual_seed(0), 4).view(5, 4, 12)
    assert torch.equal(mixed[:, 1], greedy) and torch.equal(mixed[:, 3], greedy)
    assert (mixed[:, 0] != greedy).any() and (mixed[:, 2] != greedy).any() and (mixed[:, 0] != mixed[:, 2]).any()
    zeros = model.generate(prompts, 12, -1, 12, torch.zeros(4), None, 4)
    assert torch.equal(zeros, greedy.repeat_interleave(4, dim=0))


def test_generation_pads_after_eos_and_repeats_with_its_seed():
    model = make()
    prompts = torch.randint(11, (64, 4))
    first, second = (model.generate(prompts, 20, eos=5, pad=12, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    ended = 0
    for row in first.tolist():
        if 5 in row:
            ended += 1
            assert set(row[row.index(5) + 1 :]) <= {12}
    assert ended > 10


def test_rotary_embedding_sees_only_distance():
    config = GPTConfig(vocab_size=13)
    q, k = torch.randn(2, 1, 1, 1, config.head_dim, dtype=torch.float64)

    def score(i, j):
        turn = lambda x, at: rotate(x, rotary_table(torch.tensor([at]), config))  # noqa: E731
        return (turn(q, i) * turn(k, j)).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(score(7, 3), score(7, 4))


def test_head_is_separate_and_tied():
    model = make()
    tokens = torch.randint(13, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, 3), model(tokens)[:, 3:])
    assert "lm_head.weight" not in model.state_dict() and "lm_head.weight" in make(tied_head=False).state_dict()
    assert 1e5 * 0.9 < sum(p.numel() for p in model.parameters()) < 4e5


def test_impossible_config_is_refused():
    with pytest.raises(ValueError, match="n_kv_heads 3"):
        GPTConfig(vocab_size=13, n_kv_heads=3)


def test_weights_begin_by_fan_in_and_the_embedding_at_a_fifth():
    torch.manual_seed(0)
    made = GPT(GPTConfig(vocab_size=500, qkv_bias=True))
    assert made.embed_tokens.weight.std().item() == pytest.approx(0.2, rel=0.02)
    for module in made.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(module.in_features**-0.5, rel=0.05)
            assert module.bias is None or not module.bias.any()
