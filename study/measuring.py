"""What study/bench.py and study/bench_full_scale.py share: functions timed in turn, ratios, goals, transformers as a peer."""

import functools
import re
import time
from pathlib import Path

import numpy as np
import torch

from model import GPT
from plumbing.keeper import adamw
from toy_math.tokenizer import BOS, EOS, PAD

NO_GOAL = ("", "")


def in_turn(rounds, **functions):
    """{name: seconds (rounds,)} of functions called one after the other, after one round that does not count."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def ratio(over, under):
    """Median of the rounds' ratios, and the same in words with the range of their middle half."""
    low, middle, high = np.quantile(over / under, [0.25, 0.5, 0.75])
    return round(middle, 2), f"{middle:.2f} ({low:.2f}–{high:.2f})"


def goal(value, sign, bound):
    """The last two columns: the goal, and whether a figure, rounded as it is printed, meets it."""
    return f"{sign} {bound}", "yes" if (value >= bound if sign == "≥" else value <= bound) else "**no**"


def peak_resident():
    """This process's peak resident memory so far, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def make(config):
    """A model with random weights, and its optimizer."""
    torch.manual_seed(0)
    model = GPT(config)
    return model, adamw(model.parameters(), 1e-4)


# --- transformers as a peer


def llama(model, attention="sdpa"):
    """transformers' LlamaForCausalLM with this model's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads, intermediate_size=c.d_ff, rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tied_head, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
            attn_implementation=attention,
        )
    )  # fmt: skip
    missing, unexpected = peer.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    return peer


def against_generate(model, prompts, width, samples, rounds, at_once):
    """Seconds of so many samples of each prompt, `width` tokens long. `at_once`: of the prompts that we sample together."""
    split = prompts.split(at_once)

    def peer_samples(peer, batches):
        for some in batches:
            tokens = peer.generate(
                some, attention_mask=torch.ones_like(some), max_new_tokens=width, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, eos_token_id=None, num_return_sequences=samples,
            )  # fmt: skip
            assert tokens.shape == (len(some) * samples, some.shape[1] + width)

    def our_samples():
        for some in split:
            model.generate(some, width, eos=-1, pad=PAD, samples=samples)

    contestants = {"ours": our_samples}
    for attention in ("sdpa", "eager"):
        peer = llama(model, attention).eval()
        contestants[f"{attention}, at once"] = functools.partial(peer_samples, peer, [prompts])
        if len(split) > 1:
            contestants[f"{attention}, split"] = functools.partial(peer_samples, peer, split)
    return in_turn(rounds, **contestants)


def against_best(what, seconds, bound):
    """A row: the time of the fastest peer over ours, from {name: seconds}; `bound`: the goal, or None."""
    ours = seconds.pop("ours")
    best = min(seconds, key=lambda peer: np.median(seconds[peer]))
    value, words = ratio(seconds[best], ours)
    words += f": {np.median(seconds[best]) * 1000:.0f} ms ({best}) / {np.median(ours) * 1000:.0f} ms"
    return what, words, *(goal(value, "≥", bound) if bound else NO_GOAL)
