"""What every run starts from, made once and cached: base model -> rollouts -> the reference policy's logits.

A stage's file is named by a digest of its settings and of the files that it starts from, so that no stale one is ever taken up,
and has a JSON file beside it with its checksum, so that no torn or edited one is.
"""

import functools
import hashlib
import json
import math
import random
import time
from dataclasses import asdict

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from files import (
    Interrupted,
    NonFiniteError,
    UserError,
    finishing_step,
    load_checkpoint,
    locked,
    read_beside,
    save_checkpoint,
    write_beside,
    write_tensors,
    write_text,
)
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


def digest(settings, *paths):
    """Of settings and of the files' contents: the key of whatever they determine."""
    contents = [json.dumps(settings, sort_keys=True).encode(), *(path.read_bytes() for path in paths)]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:8]


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


def base_model(args, seed, settings, path):
    """A GPT that has learned the slipping corpus: each trace is new, and only its completion is predicted.

    Goes on from a checkpoint beside `path` where there is one. Raises UserError, NonFiniteError, Interrupted.
    """
    torch.manual_seed(seed)
    model = GPT(CONFIG).to(args.device)
    if read_beside(path):
        print(f"base model    cached       {path}")
        model.load_state_dict(load_file(path))
        return model
    rows = corpus_rows(args.base_steps * BASE_BATCH, args.ops, args.slip, random.Random(f"{seed}/corpus"))
    tokens, mask = (x.to(args.device).split(BASE_BATCH) for x in pack(rows))

    optimizer = adamw(model, BASE_LR)
    warmup = min(BASE_WARMUP, args.base_steps // 10)
    checkpoint = path.with_suffix(".checkpoint")
    state, _ = (args.resume and load_checkpoint(checkpoint, model, optimizer)) or ({"step": 0, "seconds": 0.0}, None)
    began, first, losses = time.time() - state["seconds"], state["step"], []
    if first:
        print(f"base model    resuming     {checkpoint} from step {first}")
    bar = progress(total=args.base_steps, initial=first, desc="base model")
    with bar, finishing_step() as interrupted:
        for step in range(first, args.base_steps):
            for group in optimizer.param_groups:
                group["lr"] = BASE_LR * warmup_cosine(step, warmup, args.base_steps)
            loss = -token_logps(model(tokens[step]), tokens[step], mask[step]).sum() / mask[step].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            bar.update()
            done = step + 1
            if interrupted or done % args.save_every == 0 or done == args.base_steps:
                bad = (~torch.isfinite(torch.stack(losses))).nonzero()
                if len(bad):
                    at = bad[0].item()
                    raise NonFiniteError(f"base model, step {first + at + 1}: loss {losses[at].item():g}")
                if done < args.base_steps:
                    state = {"step": done, "seconds": time.time() - began}
                    save_checkpoint(checkpoint, model, optimizer, state, {})
            if interrupted:
                raise Interrupted(interrupted[0])
    write_tensors(path, model.state_dict())
    write_beside(path, settings)
    checkpoint.unlink(missing_ok=True)
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

    And what they are, with the seconds that they took.
    """
    if facts := read_beside(path):
        print(f"rollouts      cached       {path}")
        return read_rows(path), facts
    began = time.time()
    bar = functools.partial(progress, desc="rollouts")
    samples = sample(model, problems, args.rollouts, 1.0, seeded(args.device, seed, "rollouts"), bar)
    # one that begins with BOS or PAD has no token to train on
    rows = [row for row in rollout_rows(samples) if row["completion"] or row["finished"]]
    seconds = time.time() - began
    facts = {"sampling_seconds": seconds, "share_correct": sum(row["label"] for row in rows) / len(rows), **overlap(rows)}
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    write_beside(path, facts)
    print(f"rollouts      {seconds:6.1f} s     {path}   {len(rows)} rollouts, {facts['share_correct']:.1%} correct")
    return rows, facts


@torch.no_grad()
def reference_logits(args, model, tokens, start, path):
    """The reference policy's logits (N, T - start, V), computed once: a training step then costs no reference forward.

    And the seconds that they took.
    """
    if facts := read_beside(path):
        print(f"reference     cached       {path}")
        return load_file(path, device=args.device)["logits"], facts
    began = time.time()
    batches = progress(tokens.split(512), desc="reference")
    logits = torch.cat([model(batch, start) for batch in batches])
    facts = {"reference_seconds": time.time() - began}
    write_tensors(path, {"logits": logits})
    write_beside(path, facts)
    print(f"reference     {facts['reference_seconds']:6.1f} s     {path}")
    return logits, facts


def prepare(args, seed, prompts):
    """The stages, from the caches where they are: base model, training data, training problems, test problems.

    The data are tensors over N rollouts of T tokens: tokens and mask (N, T), ref_logits (N, T - start, V), and (N,) each
    length, ref_logp_sum, reward, problem_ids, clean (no step is wrong), and, over the rows of its problem, value (A*-PO's V*)
    and mean_reward; `measured`, what the stages' JSON files say; and `key`, a name for all of it.
    Raises UserError where all rollouts are correct, or none is, and what the stages raise.
    """
    train_problems, test_problems = draw_splits(args, seed, prompts)
    base_settings, rollout_settings = stage_settings(args, seed, prompts)
    cache = args.out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    base_path = cache / f"base-{digest(base_settings)}.safetensors"
    with locked(base_path.with_suffix(".lock"), base_path, wait=True):
        base = base_model(args, seed, base_settings, base_path)
        rollouts_path = cache / f"rollouts-{digest(rollout_settings, base_path)}.jsonl"
        rows, rollout_facts = rollouts(args, seed, base, train_problems, rollouts_path)
        if len({row["label"] for row in rows}) < 2:
            missing = "incorrect" if rows[0]["label"] else "correct"
            raise UserError(
                f"none of the {len(rows)} rollouts is {missing}: change --slip, --base-steps, --prompts or --rollouts"
            )
        tokens, mask = (x.to(args.device) for x in pack(rows))
        start = len(rows[0]["prompt"])  # after BOS, the last prompt token: it predicts the first completion token
        reference_path = cache / f"reference-{digest(rollout_settings, base_path, rollouts_path)}.safetensors"
        ref_logits, reference_facts = reference_logits(args, base, tokens, start, reference_path)
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
    data |= {"measured": rollout_facts | reference_facts, "key": reference_path.stem}
    return base, data, train_problems, test_problems
