"""A decoder-only transformer of the Llama/Qwen family, from scratch, with batched sampling.

RMSNorm, rotary embeddings, grouped-query attention, SwiGLU, tied or untied output head, optional Q/K/V bias, normalised
queries and keys, and Llama 3's longer context. Module names follow the published checkpoints, which full_scale/ loads. Left
out: dropout (none is used after pre-training), attention masks for left-padded prompts (those sampled together are of one
width), and sliding windows. Tokens that all rows begin with, such as worked examples, can be computed once.

Shapes: B sequences, T tokens, P tokens of a shared prefix, V vocabulary, D model width, H query heads, K key/value heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# Up to this many positions a CPU writes the attention weights out: its fused kernel gains nothing from a second thread there
# (`python -m study.bench` times both). Beyond it written-out weights are slower, and their memory grows with positions squared.
SHORT = 128


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the architecture. Raises ValueError where the widths do not divide."""

    vocab_size: int
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    d_ff: int = 192
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2.5 has it, Llama does not
    tied_head: bool = True
    # a new field must default to None: None is left out of the hash of a run's settings, so old hashes stay valid
    own_head_dim: int | None = None  # where it is not d_model / n_heads: Qwen3
    qk_norm: bool | None = None  # Qwen3 normalises queries and keys
    rope_scaling: tuple | None = None  # Llama 3.1's factor, low and high frequency factor, and original number of positions

    def __post_init__(self):
        undivided = self.own_head_dim is None and self.d_model % self.n_heads
        if undivided or self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"d_model {self.d_model} must split into n_heads {self.n_heads} of even width, "
                f"and n_heads into n_kv_heads {self.n_kv_heads} groups"
            )

    @property
    def head_dim(self):
        return self.own_head_dim or self.d_model // self.n_heads


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, `width` wide (Zhang and Sennrich 2019). (..., D) -> (..., D)."""

    def __init__(self, config, width=None):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(width or config.d_model))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(positions, config):
    """cos and sin of every position's rotation angles, (T, head_dim) each, the two halves alike (Su et al. 2021)."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    frequency = config.rope_theta**-exponent
    if config.rope_scaling:  # low frequencies are divided, so that positions beyond the original context give no new angles
        factor, low, high, original = config.rope_scaling
        turns = original * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angles = positions[:, None] * frequency  # (T, head_dim/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Rotary position embedding of x (B, heads, T, head_dim); dimension i turns together with i + head_dim/2."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)  # the table is fp32, x may be bf16


def attend(q, k, v):
    """softmax(q kᵀ / sqrt(head_dim)) v. q (B, H, T, head_dim), k and v (B, K, S, head_dim) -> (B, H, T, head_dim).

    The queries are the last T of the S positions, and each sees no later one.
    """
    B, H, T, head_dim = q.shape
    K, S = k.shape[1:3]
    if q.device.type != "cpu" or (S > SHORT and T > 1):
        return fused(q, k, v)
    mask = torch.full((T, S), -torch.inf, dtype=q.dtype).triu(1 + S - T).repeat(H // K, 1)  # (H/K T, S)
    q = q.reshape(B * K, H // K * T, head_dim)  # the queries of a group one after the other, beside their keys
    k, v = k.reshape(B * K, S, head_dim), v.reshape(B * K, S, head_dim)
    weights = torch.baddbmm(mask, q, k.mT, alpha=head_dim**-0.5).softmax(-1)  # (B K, H/K T, S)
    return (weights @ v).view(B, H, T, head_dim)


def fused(q, k, v):
    """`attend` by torch's kernel. With fewer queries than keys, is_causal would show the first query the first key alone."""
    T, S = q.shape[2], k.shape[2]
    mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=True)


def shared_prefix(tokens, most):
    """How many first tokens of tokens (B, T) all rows share, at most `most`; 0 where computing them once would save little."""
    B, T = tokens.shape
    shared = min(int((tokens == tokens[:1]).all(0).cumprod(0).sum()), most)
    return shared if shared >= 16 and 4 * shared * (B - 1) >= B * T else 0


def split_rows(x, B, P):
    """x (1, heads, P + B T, head_dim) -> the prefix (1, heads, P, head_dim) and the rows behind it (B, heads, T, head_dim)."""
    return x[:, :, :P], x[0, :, P:].unflatten(1, (B, -1)).transpose(0, 1)


class Attention(nn.Module):
    """Causal self-attention whose query heads share key/value heads in groups (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(config, config.head_dim), RMSNorm(config, config.head_dim)

    def forward(self, x, rope, cache=None, start=0, rows=None):
        """x (B, T, D) -> (B, T, D). A cache (2, B, K, capacity, head_dim), keys then values, is filled from position `start`,
        which x begins at. With rows = (B, P), x (1, P + B T, D) is one prefix of P tokens, and B rows that go on from it."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, H or K, T, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        if rows:
            prefix, (q, k, v) = zip(*(split_rows(y, *rows) for y in (q, k, v)))
            k, v = (torch.cat([y.expand(len(z), -1, -1, -1), z], dim=2) for y, z in zip(prefix[1:], (k, v)))
        if cache is not None:
            cache[:, :, :, start : start + k.shape[2]] = torch.stack([k, v])
            k, v = cache[:, :, :, : start + k.shape[2]]
        y = attend(q, k, v).transpose(1, 2).flatten(2)  # (B, T, H head_dim)
        if rows:
            y = torch.cat([attend(*prefix).transpose(1, 2).flatten(2), y.flatten(0, 1)[None]], dim=1)
        return self.o_proj(y)


class SwiGLU(nn.Module):
    """Feed-forward layer with a SiLU gate (Shazeer 2020). (..., D) -> (..., D)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy of the residual stream (B, T, D) and added back to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, cache=None, start=0, rows=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, start, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """The whole network: tokens (B, T) -> `hidden` (B, T, D) -> `head` -> logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config)
        if not config.tied_head:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.2)
            elif isinstance(module, nn.Linear):  # by fan-in: at this small width a fixed 0.02 learns much more slowly
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def hidden(self, tokens, cache=None, start=0, shared=0):
        """Tokens (B, T) at positions start..start+T-1 -> final hidden states (B, T, D).

        The first `shared` tokens, the same in every row, are computed once and not returned: (B, T - shared, D).
        """
        B, T = tokens.shape
        positions = torch.arange(start, start + T, device=tokens.device)
        if shared:
            tokens = torch.cat([tokens[0, :shared], tokens[:, shared:].flatten()])[None]  # (1, P + B (T - P))
            positions = torch.cat([positions[:shared], positions[shared:].repeat(B)])
        x = self.embed_tokens(tokens)  # (B, T, D)
        rope = rotary_table(positions, self.config)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, None if cache is None else cache[i], start, (B, shared) if shared else None)
        return self.norm(x[0, shared:].unflatten(0, (B, -1)) if shared else x)

    def head(self, hidden):
        """Hidden states (..., D) -> logits (..., V)."""
        return F.linear(hidden, self.embed_tokens.weight if self.config.tied_head else self.lm_head.weight)

    def forward(self, tokens, first=0):
        """Tokens (B, T) -> logits (B, T - first, V) of the positions from `first` on; the head skips those before."""
        return self.head(self.hidden(tokens)[:, first:])

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, eos, pad, temperature=1.0, generator=None, samples=1):
        """Sample completions of prompts (B, P) -> (B * samples, max_new_tokens), EOS kept and PAD after it, prompt by prompt.

        `temperature` is a number, or one for each of a prompt's samples, (samples,); 0 takes the most likely token.
        `eos` is a token, a tensor of several, or a function from what is sampled so far (B * samples, t) to which rows end.
        `generator` is a torch.Generator on the prompts' device.
        """
        B, P = prompts.shape
        c, weight = self.config, self.embed_tokens.weight
        asked = weight.new_empty(c.n_layers, 2, B, c.n_kv_heads, P, c.head_dim)  # 2: keys and values
        hidden = self.hidden(prompts, asked, shared=shared_prefix(prompts, P - 1))[:, -1]  # once for all samples of a prompt
        cache = weight.new_empty(c.n_layers, 2, B * samples, c.n_kv_heads, P + max_new_tokens, c.head_dim)
        cache[..., :P, :].unflatten(2, (B, samples)).copy_(asked[:, :, :, None])
        hidden = hidden.repeat_interleave(samples, dim=0)
        completions = torch.full((B * samples, max_new_tokens), pad, device=prompts.device)
        done = torch.zeros(B * samples, dtype=torch.bool, device=prompts.device)
        temperatures = torch.as_tensor(temperature, dtype=torch.float, device=prompts.device).expand(samples).repeat(B)[:, None]
        greedy = not temperatures.any()
        for t in range(max_new_tokens):
            logits = self.head(hidden).float()  # (B * samples, V)
            if not greedy:  # argmax(logits - T log E), E ~ Exp(1), is a sample of softmax(logits / T)
                noise = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30).log_()
                logits = logits - temperatures * noise
            token = logits.argmax(-1)
            completions[:, t] = token.masked_fill(done, pad)
            done |= eos(completions[:, : t + 1]) if callable(eos) else torch.isin(token, eos)
            if t == max_new_tokens - 1 or done.all():
                break
            hidden = self.hidden(token[:, None], cache, P + t)[:, -1]
        return completions
