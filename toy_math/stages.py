"""What every run starts from, made once and cached: base model -> rollouts -> the reference policy's logits.

A stage's file is named by a digest of its settings and of the files that it starts from. So a stale file is never taken up. A
JSON file beside it holds its checksum, so that a torn or edited file is refused.
"""

import functools
import json
import random
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from losses import optimal_value, prompt_mean, token_logps
from model import GPT, GPTConfig
from plumbing.batches import seeded
from plumbing.files import UserError, digest, locked, read_beside, write_beside, write_tensors, write_text
from plumbing.flags import NO_DEFAULT, count, count_up_to, one_of, share
from plumbing.keeper import Keeper, OneFile, adamw, update, warmup_cosine
from plumbing.log import FORMAT, Steps, progress

from .problems import draw_problems
from .rollouts import PASS_AT, corpus_rows, overlap, pack, read_rows, rollout_rows, sample
from .tokenizer import VOCAB_SIZE

CONFIG = GPTConfig(vocab_size=VOCAB_SIZE)
TASKS = {"habit": {"habit": 0.6, "slip": 0.03}, "slips": {"habit": 0.0, "slip": 0.12}}  # the error rates of a task's corpus
DEFAULT_TASK = "habit"  # docs/task.md says how it was chosen
BASE_BATCH, BASE_LR, BASE_WARMUP = 32, 3e-3, 100
VALIDATION_PROBLEMS, TEST_PROBLEMS = 128, 256


# --- what a run gets


@dataclass
class World:
    """All that a run starts from: the base model, its rollouts, the problems of each split, and what was measured of them."""

    base: GPT  # the reference policy, frozen
    rollouts: "Rollouts"
    problems: list  # of training
    validation: list  # problems of the evaluations during training
    test: list  # problems of the first and the last evaluation
    measured: dict  # seconds, share of correct rollouts, overlap
    key: str  # a name for all of it

    def spent(self):
        """What the rollouts and the reference logits cost: seconds, and completion tokens sampled."""
        seconds = self.measured["sampling_seconds"] + self.measured["reference_seconds"]
        return {"seconds": seconds, "sampled": int(self.rollouts.length.sum())}


class Rollouts:
    """Verified answers of the base model, N rows; rollouts[rows] is a batch of them.

    inputs (N, L) holds whole rows, BOS first. `start` is the position that predicts the first completion token. tokens and mask
    (N, T) are cut from `start` on, and ref_logits (N, T, V) are of these positions. Of shape (N,) are length, ref_logp_sum,
    reward, problem_ids, clean (no step is wrong), and value (A*-PO's V*) and mean_reward of the row's problem.
    """

    def __init__(self, inputs, mask, start, ref_logits, **columns):
        tokens, mask = inputs[:, start:], mask[:, start:]
        self.start = start
        self.columns = {"inputs": inputs, "tokens": tokens, "mask": mask, "ref_logits": ref_logits, **columns}
        self.columns["length"] = mask.sum(-1)
        self.columns["ref_logp_sum"] = token_logps(ref_logits, tokens, mask).sum(-1)

    def __getattr__(self, name):
        if name == "columns" or name not in self.columns:
            raise AttributeError(name)
        return self.columns[name]

    def __len__(self):
        return len(self.columns["reward"])

    def __getitem__(self, rows):
        """A batch: the same tensors of some rows (B,), as attributes, and `start`."""
        return SimpleNamespace(start=self.start, **{name: values[rows] for name, values in self.columns.items()})


# --- stages


def stage_settings(args, seed, prompts):
    """What determines the base model, and what determines its rollouts."""
    base = {
        "format": FORMAT,
        "seed": seed,
        "model": {name: value for name, value in asdict(CONFIG).items() if value is not None},
        "task": args.task,
        "ops": args.ops,
        "slip": args.slip,
        **({"habit": args.habit} if args.task == "habit" else {}),
        "base_steps": args.base_steps,
        "base_batch_size": BASE_BATCH,
        "base_lr": BASE_LR,
        "base_warmup": BASE_WARMUP,
    }
    return base, {**base, "prompts": prompts, "rollouts": args.rollouts}


def evaluation_settings(args):
    """What determines the evaluations of a run, beside its base model."""
    settings = {"eval_every": args.eval_every, "eval_samples": args.eval_samples}
    settings |= {"validation": VALIDATION_PROBLEMS, "test": TEST_PROBLEMS}
    return settings | ({"eval_ops": args.eval_ops} if args.eval_ops != args.ops else {})


def base_model(args, seed, settings, path):
    """A GPT that has learned the corpus and its errors: each trace is new, and only its completion is predicted.

    Goes on from a checkpoint beside `path` where there is one. Raises UserError, NonFiniteError, Interrupted.
    """
    torch.manual_seed(seed)
    model = GPT(CONFIG).to(args.device)
    if read_beside(path):
        print(f"base model    cached       {path}")
        model.load_state_dict(load_file(path))
        return model
    rng = random.Random(f"{seed}/corpus")
    rows = corpus_rows(args.base_steps * BASE_BATCH, args.ops, args.slip, rng, args.habit)
    print(f"base model    training     {path}   {args.base_steps} steps")
    tokens, mask = (x.to(args.device).split(BASE_BATCH) for x in pack(rows))
    optimizer, warmup = adamw(model.parameters(), BASE_LR), min(BASE_WARMUP, args.base_steps // 10)
    steps, began = Steps("base model, "), time.time()
    store = OneFile(path.with_suffix(".checkpoint"), model, optimizer, args.device)
    saving = {"total": args.base_steps, "every": args.save_every, "resume": args.resume}
    with Keeper(store, {"steps": steps}, desc="base model", title="base model    ", **saving) as keeper:
        for step in keeper.steps():
            optimizer.param_groups[0]["lr"] = BASE_LR * warmup_cosine(step, warmup, args.base_steps)
            loss = -token_logps(model(tokens[step]), tokens[step], mask[step]).sum() / mask[step].sum()
            steps.add(loss=loss, grad_norm=update(model, optimizer, loss))
        steps.raise_if_not_finite()
        write_tensors(path, model.state_dict())
        write_beside(path, settings)
    print(f"base model    {time.time() - began:6.1f} s     {path}   last loss {steps.columns()['loss'][-1]:.3f} nats/token")
    return model


def draw_splits(args, seed, prompts):
    """The training problems that are rolled out, and the validation and test problems of the evaluations."""
    counts = {
        "train": (prompts, args.ops),
        "validation": (VALIDATION_PROBLEMS, args.eval_ops),
        "test": (TEST_PROBLEMS, args.eval_ops),
    }
    return tuple(drawn(*asked, split, seed) for split, asked in counts.items())


@functools.cache
def drawn(count, ops, split, seed):
    """The problems of a split, kept: the check of the flags draws them first."""
    return draw_problems(count, ops, split, random.Random(f"{seed}/{split}"))


def sampled_rollouts(args, seed, model, problems, path):
    """`--rollouts` samples at temperature 1 for each training problem, verified: rows as in toy_math/rollouts.py.

    Returns (rows, facts): what they are, and the seconds that they took.
    """
    if facts := read_beside(path):
        print(f"rollouts      cached       {path}")
        return read_rows(path), facts
    began = time.time()
    bar = functools.partial(progress, desc="rollouts")
    samples = sample(model, problems, args.rollouts, 1.0, seeded(args.device, seed, "rollouts"), bar)
    # one that begins with BOS or PAD has no token to train on
    rows = [row for row in rollout_rows(samples) if row["completion"] or row["finished"]]
    if not rows:
        raise UserError("no rollout has a token: change --base-steps, --prompts or --rollouts")
    seconds = time.time() - began
    facts = {"sampling_seconds": seconds, "share_correct": sum(row["label"] for row in rows) / len(rows), **overlap(rows)}
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    write_beside(path, facts)
    print(f"rollouts      {seconds:6.1f} s     {path}   {len(rows)} rollouts, {facts['share_correct']:.1%} correct")
    return rows, facts


@torch.no_grad()
def reference_logits(args, model, tokens, start, path):
    """The reference policy's logits (N, T - start, V), computed once: a training step then costs no reference forward.

    Returns (logits, facts): the facts hold the seconds that they took.
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
    """The World of a seed, from the caches where they are.

    Raises UserError where all rollouts are correct, or none is, and what the stages raise.
    """
    problems, validation, test = draw_splits(args, seed, prompts)
    base_settings, rollout_settings = stage_settings(args, seed, prompts)
    cache = args.out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    base_path = cache / f"base-{digest(base_settings)}.safetensors"
    with locked(base_path.with_suffix(".lock"), base_path, wait=True):
        base = base_model(args, seed, base_settings, base_path)
        rollouts_path = cache / f"rollouts-{digest(rollout_settings, base_path)}.jsonl"
        rows, rollout_facts = sampled_rollouts(args, seed, base, problems, rollouts_path)
        if len({row["label"] for row in rows}) < 2:
            missing = "incorrect" if rows[0]["label"] else "correct"
            raise UserError(
                f"none of the {len(rows)} rollouts is {missing}: change --habit, --slip, --base-steps, --prompts or --rollouts"
            )
        tokens, mask = (x.to(args.device) for x in pack(rows))
        start = len(rows[0]["prompt"])  # after BOS, the last prompt token: it predicts the first completion token
        reference_path = cache / f"reference-{digest(rollout_settings, base_path, rollouts_path)}.safetensors"
        ref_logits, reference_facts = reference_logits(args, base, tokens, start, reference_path)
    reward = torch.tensor([1.0 if row["label"] else -1.0 for row in rows], device=args.device)
    ids = torch.tensor([row["problem_id"] for row in rows], device=args.device)
    made = Rollouts(
        tokens,
        mask,
        start,
        ref_logits,
        reward=reward,
        problem_ids=ids,
        clean=torch.tensor([row["first_wrong_step"] is None for row in rows], device=args.device),
        value=optimal_value(reward, ids),
        mean_reward=prompt_mean(reward, ids),
    )
    return World(base, made, problems, validation, test, rollout_facts | reference_facts, reference_path.stem)


def add_task_flags(parser):
    """The flags of the task and of the stages."""
    add = parser.add_argument_group("task").add_argument
    add("--prompts", nargs="+", default=[1024], type=count_up_to(10**6), metavar="N", help="training problems to roll out")
    add("--rollouts", default=8, type=count_up_to(1000), metavar="N", help="samples for each training problem, "
        "and in a group of grpo's")  # fmt: skip
    add("--task", default=DEFAULT_TASK, type=one_of(TASKS), metavar="NAME", help="errors of the base model's corpus: habit, "
        "systematic and random ones, or slips, random ones alone")  # fmt: skip
    add("--ops", default=6, type=count_up_to(50), metavar="N", help="operations in a problem")
    add("--habit", type=share, metavar="X", help="habit: probability that a step forgets its carry or borrow with a digit of "
        f"7, 8 or 9 (default: {TASKS['habit']['habit']}){NO_DEFAULT}")  # fmt: skip
    defaults = ", ".join(f"{task} {rates['slip']}" for task, rates in TASKS.items())
    add("--slip", type=share, metavar="X", help=f"probability that a step is wrong at random (default: {defaults}){NO_DEFAULT}")
    add("--base-steps", default=3000, type=count_up_to(200_000), metavar="N", help="training steps of the base model")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", default=100, type=count, metavar="N", help="steps between evaluations")
    add("--eval-samples", default=16, type=count_up_to(1000), metavar="N", help="samples at temperature 1 of each problem")
    add("--eval-ops", type=count_up_to(50), metavar="N", help=f"operations in a problem of the evaluations (default: --ops)"
        f"{NO_DEFAULT}")  # fmt: skip


def settle_task_flags(parser, args):
    """Fill in the task's error rates, and refuse flags at odds. Raises nothing: a wrong flag ends the command."""
    if args.habit is not None and args.task != "habit":
        parser.error(f"argument --habit: --task {args.task} has none; only habit")
    for name, rate in TASKS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, rate)
    if not args.habit and not args.slip:
        parser.error("argument --slip: no step of the corpus would be wrong; --habit or --slip must be above 0")
    args.eval_ops = args.eval_ops or args.ops
    if args.eval_samples < max(PASS_AT):
        parser.error(f"argument --eval-samples: pass@{max(PASS_AT)} needs at least {max(PASS_AT)}, not {args.eval_samples}")
