"""The section "Full scale" of study/bench.py: the loss's memory, few-shot rows of a published shape, and what needs a GPU.

All weights are random, so nothing is downloaded.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from full_scale import policy
from full_scale.chunked import chunked_logps
from full_scale.load_hf import parameter_count, save_pretrained
from losses import future_logits
from model import GPT, GPTConfig
from plumbing import jobs
from study.measuring import NO_GOAL, against_best, against_generate, goal, in_turn, make, peak_resident, ratio

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = GPTConfig(vocab_size=49_152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536)
SHOTS, PROMPT, COMPLETION = 386, 14, 26  # tokens of the study's worked examples, of a problem and of a mean answer
REAL = {
    "Qwen2.5-0.5B": {"vocab_size": 151_936, "d_model": 896, "n_layers": 24, "n_heads": 14, "n_kv_heads": 2, "d_ff": 4864,
                     "rope_theta": 1e6, "qkv_bias": True},
    "Qwen2.5-Math-1.5B": {"vocab_size": 151_936, "d_model": 1536, "n_layers": 28, "n_heads": 12, "n_kv_heads": 2, "d_ff": 8960,
                          "qkv_bias": True},
}  # fmt: skip


# --- memory of the loss


def loss_memory(chunked, positions, vocab=151_936, width=64):
    """Peak MiB of FPA's log-probabilities and gradient beyond hidden states, heads and gradients. For a process of its own.

    The width plays no part in it, and is small to save time.
    """
    hidden, ref_hidden = torch.randn(2, positions, width).unbind()
    head, ref_head = torch.randn(2, vocab, width).unbind()
    targets = torch.randint(vocab, (positions,))
    hidden.requires_grad_()
    head.requires_grad_()
    before = peak_resident()
    if chunked:
        present, future = chunked_logps(hidden, head, targets, ref_hidden, ref_head, 2.0)
    else:
        logits = hidden @ head.T
        present = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        future = future_logits(logits, ref_hidden @ ref_head.T, 2.0).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (-future.exp() * present).sum().backward()
    return peak_resident() - before - (hidden.grad.nbytes + head.grad.nbytes) / 2**20


# --- few-shot rows of SmolLM2's shape


def few_shot_tokens(config, rows, length):
    """Random tokens (rows, SHOTS + length); the first SHOTS are the same in every row."""
    shots = torch.randint(config.vocab_size, (1, SHOTS))
    return torch.cat([shots.expand(rows, -1), torch.randint(config.vocab_size, (rows, length))], dim=1)


def few_shot_step(model, optimizer, rows):
    """A function that takes an FPA step on random few-shot rows."""
    config = model.config
    tokens = few_shot_tokens(config, rows, PROMPT + COMPLETION)
    mask = torch.arange(tokens.shape[1]).expand_as(tokens) >= SHOTS + PROMPT
    reference = torch.randn(rows * COMPLETION, config.d_model), policy.head_of(model).detach().clone(), 2.0

    def step():
        hidden, targets = policy.completion_hidden(model, tokens, mask)
        present, future = policy.logp_sums(hidden, policy.head_of(model), targets, mask, *reference)
        optimizer.zero_grad()
        ((future.detach() / COMPLETION).exp() * present).mean().backward()
        optimizer.step()

    return step


def few_shot(config=SMOLLM2, rows=16, prompts=4):
    """Rows: a step with what all rows begin with computed once, its rate, and sampling against transformers' generate.

    A token takes 6 operations a parameter of the layers, one of the completion 8 for the head, the reference's included.
    """
    model, optimizer = make(config)
    step, square = few_shot_step(model, optimizer, rows), torch.randn(2048, 2048)

    def whole():
        with mock.patch.object(policy, "shared_prefix", lambda tokens, most: 0):
            step()

    seconds = in_turn(3, whole=whole, once=step, squares=lambda: [square @ square for _ in range(8)])
    value, words = ratio(seconds["whole"], seconds["once"])
    rates = [rows * COMPLETION / np.median(seconds[name]) for name in ("once", "whole")]
    words += f": {rates[0]:.0f} / {rates[1]:.0f} completion tokens/s"
    found = [("few-shot step, each row whole / what rows share once", words, *goal(value, "≥", 4))]
    layers = sum(p.numel() for p in model.layers.parameters())
    flops = 6 * layers * (SHOTS + rows * (PROMPT + COMPLETION)) + 8 * rows * COMPLETION * config.vocab_size * config.d_model
    value, words = ratio(flops / seconds["once"], 8 * 2 * 2048**3 / seconds["squares"])
    found.append(("its rate / a large product's", words, *goal(value, "≥", 0.6)))
    try:
        sampling = against_generate(model, few_shot_tokens(config, prompts, PROMPT), COMPLETION, 8, 3, prompts)
    except ImportError:
        return found
    return [*found, against_best(f"8 samples of {prompts} few-shot prompts, transformers / ours", sampling, 1.5)]


# --- steps on a GPU


def random_checkpoint(folder, config):
    """A checkpoint of a Qwen2 shape with random weights in its published form, and a tokenizer of the ten digits."""
    folder.mkdir()
    raw = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
    }
    raw |= {"num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "intermediate_size": config.d_ff}
    raw |= {"num_key_value_heads": config.n_kv_heads, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied_head}
    raw |= {"rope_theta": config.rope_theta, "eos_token_id": 0, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(10)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = GPT(config)
    model.folder = folder
    save_pretrained(model, folder, torch.bfloat16)
    return parameter_count(model)


def full_scale_steps(out, config, prompt=128, completion=384, rows=64, steps=20):
    """FPA steps of full_scale/train.py on a random checkpoint: completion tokens/s, model FLOP/s, and the line that it printed.

    A token takes 6 operations a parameter of the layers, one of the completion as many for the head; attention has 12 · layers
    · D · T a token. Those of recomputed activations do not count.
    """
    parameters = random_checkpoint(out / "checkpoint", config)
    words = ["".join(map(str, torch.randint(1, 10, (count,)).tolist())) for count in (prompt, completion - 1) * rows]
    lines = [{"prompt": words[2 * i], "completion": words[2 * i + 1], "label": i % 2 == 0} for i in range(rows)]
    (out / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--init", out / "checkpoint", "--data", out / "rollouts.jsonl", "--out", out / "runs", "--batch-size", 16]
    flags += ["--micro-batch", 8, "--steps", steps, "--eval-every", steps]
    command = [sys.executable, "-m", "full_scale.train", *map(str, flags)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    line = next(line for line in printed.splitlines()[::-1] if line.startswith("step"))
    rate = float(re.search(r"([\d,]+) completion tokens/s", line)[1].replace(",", ""))
    head, length = config.vocab_size * config.d_model, prompt + completion
    layers = 6 * (parameters - head * (1 if config.tied_head else 2)) + 12 * config.n_layers * config.d_model * length
    return rate, rate * (layers * length / completion + 6 * head), line


def on_a_gpu(out):
    """Rows: full_scale/train.py on real shapes with random weights."""
    if not torch.cuda.is_available():
        return [(f"{name}'s shape, 20 steps on a GPU", "not measured: no GPU here", *NO_GOAL) for name in REAL]
    square, rows = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), []
    seconds = in_turn(5, square=lambda: (square @ square, torch.cuda.synchronize()))["square"]
    for name, shape in REAL.items():
        folder = out / name
        folder.mkdir()
        rate, flops, line = full_scale_steps(folder, GPTConfig(**shape))
        share = flops / (2 * 8192**3 / np.median(seconds))
        memory = re.search(r"[\d.]+ GiB", line)[0]
        words = f"{rate:,.0f} completion tokens/s, {memory}, {share:.2f} of what a large product reaches"
        rows.append((f"{name}'s shape, 20 steps on {torch.cuda.get_device_name()}", words, *NO_GOAL))
    return rows


# --- the section


def full_scale(out, quick):
    """Rows: memory of the loss at Qwen2.5's vocabulary, plain and in chunks, over positions; `few_shot`; what needs a GPU."""
    counts, memory, rows = (256, 512) if quick else (1024, 4096, 16_384), {}, []
    for chunked, count in itertools.product((True, False), counts):
        if chunked or count <= 4096:
            with jobs.workers(1) as pool:
                memory[chunked, count] = pool.submit(loss_memory, chunked, count).result()
    for count in counts:
        what, words, bound = f"memory of the loss, {count:,} positions, chunked", f"{memory[True, count]:,.0f} MiB", NO_GOAL
        if (False, count) in memory:
            value = round(memory[True, count] / memory[False, count], 2)
            what, words = f"{what} / plain", f"{value:.2f}: {words} / {memory[False, count]:,.0f} MiB"
            bound = goal(value, "≤", 0.1) if count == 4096 else NO_GOAL
        rows.append((what, words, *bound))
    value = round(memory[True, counts[-1]] / memory[True, counts[0]], 2)
    rows.append((f"chunked, {counts[-1]:,} / {counts[0]:,} positions", f"{value:.2f}", *goal(value, "≤", 1.1)))
    rows += [] if quick else few_shot()
    return rows + on_a_gpu(out) + [("a step on a GPU against TRL's DPO", "not measured", *NO_GOAL)]
