"""What every run starts from, made once and cached: base model -> rollouts -> the reference policy's logits.

A stage's file is named by a digest of its settings and of the files that it starts from, so that no stale one is ever taken up.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import random
import time
from dataclasses import asdict

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from losses import optimal_value, prompt_mean, token_logps
from model import GPT, GPTConfig
from results import FORMAT
from toy_math.problems import draw_problems
from toy_math.rollouts import corpus_rows, overlap, pack, read_rows, rollout_rows, sample
from toy_math.tokenizer import VOCAB_SIZE

CONFIG = GPTConfig(vocab_size=VOCAB_SIZE)
BASE_BATCH, BASE_LR, BASE_WARMUP = 32, 3e-3, 100
EVAL_PROBLEMS = 256
progress = functools.partial(tqdm, disable=None, leave=False)  # disable=None: a bar on a terminal only


class UserError(Exception):
    """Something the user can mend; shown as one line, exit code 2."""


class NonFiniteError(Exception):
    """The loss or the gradient is no longer a number; shown as one line, exit code 3."""


# --- files


def digest(settings, *paths):
    """Of settings and of the files' contents: the key of whatever they determine."""
    contents = [json.dumps(settings, sort_keys=True).encode(), *(path.read_bytes() for path in paths)]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:8]


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write to, renamed to `path` once it is whole: no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield temporary
    os.replace(temporary, path)


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def save_model(model, path):
    with replacing(path) as temporary:
        save_file(model.state_dict(), temporary)


def seeded(device, *parts):
    """A torch generator of its own for every use, so that no stage depends on how much another has drawn."""
    return torch.Generator(device).manual_seed(int(digest(parts), 16))


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def warmup_cosine(step, warmup, steps):
    """The factor of a learning rate that rises linearly over `warmup` steps and falls as a cosine to 0 at the end."""
    return min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def completion_logps(model, tokens, mask, start):
    """Logits (B, T - start, V) and token log-probabilities (B, T - start - 1) of the positions from `start` on."""
    logits = model(tokens, start)
    return logits, token_logps(logits, tokens[:, start:], mask[:, start:])


# --- stages


def stage_settings(args, seed, prompts):
    """What determines the base model, and what determines its rollouts."""
    base = {
        "format": FORMAT,
        "seed": seed,
        "model": {name: value for name, value in asdict(CONFIG).items() if value is not None},
        "ops": args.ops,
        "slip": args.slip,
        "base_steps": args.base_steps,
        "base_batch_size": BASE_BATCH,
        "base_lr": BASE_LR,
        "base_warmup": BASE_WARMUP,
    }
    return base, {**base, "prompts": prompts, "rollouts": args.rollouts}


def base_model(args, seed, path):
    """A GPT that has learned the slipping corpus: each trace is new, and only its completion is predicted."""
    torch.manual_seed(seed)
    model = GPT(CONFIG).to(args.device)
    if path.exists():
        print(f"base model    cached       {path}")
        model.load_state_dict(load_file(path))
        return model
    rows = corpus_rows(args.base_steps * BASE_BATCH, args.ops, args.slip, random.Random(f"{seed}/corpus"))
    tokens, mask = (x.to(args.device).split(BASE_BATCH) for x in pack(rows))

    optimizer = adamw(model, BASE_LR)
    warmup = min(BASE_WARMUP, args.base_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, args.base_steps))
    began, losses = time.time(), []
    for batch, batch_mask in progress(zip(tokens, mask), total=args.base_steps, desc="base model"):
        loss = -token_logps(model(batch), batch, batch_mask).sum() / batch_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    bad = (~torch.isfinite(torch.stack(losses))).nonzero()
    if len(bad):
        raise NonFiniteError(f"base model, step {bad[0].item() + 1}: loss {losses[bad[0]].item():g}")
    save_model(model, path)
    print(f"base model    {time.time() - began:6.1f} s     {path}   last loss {loss.item():.3f} nats/token")
    return model


def draw_splits(args, seed, prompts):
    """The training problems that are rolled out and the test problems of the evaluations."""
    return (
        draw_problems(prompts, args.ops, "train", random.Random(f"{seed}/train")),
        draw_problems(EVAL_PROBLEMS, args.ops, "test", random.Random(f"{seed}/test")),
    )


def rollouts(args, seed, model, problems, path):
    """`--rollouts` samples at temperature 1 for each training problem, verified: rows as in toy_math/rollouts.py.

    What they are, and the seconds that they took, goes into a JSON file beside them.
    """
    if path.exists():
        print(f"rollouts      cached       {path}")
        return read_rows(path)
    began = time.time()
    bar = functools.partial(progress, desc="rollouts")
    samples = sample(model, problems, args.rollouts, 1.0, seeded(args.device, seed, "rollouts"), bar)
    rows, seconds = rollout_rows(samples), time.time() - began
    share = sum(row["label"] for row in rows) / len(rows)
    write_json(path.with_suffix(".json"), {"sampling_seconds": seconds, "share_correct": share, **overlap(rows)})
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"rollouts      {seconds:6.1f} s     {path}   {len(rows)} rollouts, {share:.1%} correct")
    return rows


@torch.no_grad()
def reference_logits(args, model, tokens, start, path):
    """The reference policy's logits (N, T - start, V), computed once: a training step then costs no reference forward."""
    if path.exists():
        print(f"reference     cached       {path}")
        return load_file(path, device=args.device)["logits"]
    began = time.time()
    batches = progress(tokens.split(512), desc="reference")
    logits = torch.cat([model(batch, start) for batch in batches])
    seconds = time.time() - began
    write_json(path.with_suffix(".json"), {"reference_seconds": seconds})
    with replacing(path) as temporary:
        save_file({"logits": logits}, temporary)
    print(f"reference     {seconds:6.1f} s     {path}")
    return logits


def prepare(args, seed, prompts):
    """The stages, from the caches where they are: base model, training data, training problems, test problems.

    The data are tensors over N rollouts of T tokens: tokens and mask (N, T), ref_logits (N, T - start, V), and (N,) each
    length, ref_logp_sum, reward, problem_ids, clean (no step is wrong), and, over the rows of its problem, value (A*-PO's V*)
    and mean_reward; and `measured`, what the stages' JSON files say.
    Raises UserError where all rollouts are correct, or none is.
    """
    train_problems, test_problems = draw_splits(args, seed, prompts)
    base_settings, rollout_settings = stage_settings(args, seed, prompts)
    cache = args.out / "cache"
    base_path = cache / f"base-{digest(base_settings)}.safetensors"
    base = base_model(args, seed, base_path)
    write_json(base_path.with_suffix(".json"), base_settings)
    rollouts_path = cache / f"rollouts-{digest(rollout_settings, base_path)}.jsonl"
    rows = rollouts(args, seed, base, train_problems, rollouts_path)
    if len({row["label"] for row in rows}) < 2:
        missing = "incorrect" if rows[0]["label"] else "correct"
        raise UserError(f"none of the {len(rows)} rollouts is {missing}: change --slip, --base-steps, --prompts or --rollouts")
    tokens, mask = (x.to(args.device) for x in pack(rows))
    start = len(rows[0]["prompt"])  # after BOS, the last prompt token: it predicts the first completion token
    reference_path = cache / f"reference-{digest(rollout_settings, base_path, rollouts_path)}.safetensors"
    ref_logits = reference_logits(args, base, tokens, start, reference_path)
    data = {
        "tokens": tokens,
        "mask": mask,
        "start": start,
        "length": mask.sum(-1),
        "ref_logits": ref_logits,
        "ref_logp_sum": token_logps(ref_logits, tokens[:, start:], mask[:, start:]).sum(-1),
        "reward": torch.tensor([1.0 if row["label"] else -1.0 for row in rows], device=args.device),
        "problem_ids": torch.tensor([row["problem_id"] for row in rows], device=args.device),
        "clean": torch.tensor([row["first_wrong_step"] is None for row in rows], device=args.device),
    }
    data["value"] = optimal_value(data["reward"], data["problem_ids"])
    data["mean_reward"] = prompt_mean(data["reward"], data["problem_ids"])
    data["measured"] = {}
    for path in (rollouts_path, reference_path):
        data["measured"] |= json.loads(path.with_suffix(".json").read_text())
    return base, data, train_problems, test_problems
