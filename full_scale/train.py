"""Offline RL of a published checkpoint on rollouts, by the toy's losses: on one GPU, or on several behind torchrun.

    python -m full_scale.train --init Qwen/Qwen2.5-Math-1.5B --data rollouts.jsonl --loss fpa --lam 2
    torchrun --nproc-per-node 8 -m full_scale.train --init Qwen/Qwen2.5-Math-7B --data rollouts.jsonl

FSDP2 shards weights, gradients and optimizer, fp32 all of them, over the GPUs. The reference policy costs no second model:
its last hidden states are computed once and kept on disk, and only its output head stays. No (B, T, V) tensor exists: the
head is applied to a chunk of positions at a time. log.csv has the toy's columns, accuracies left to full_scale/evaluate.py.
Left out: grpo, which samples at every step; packing of several rows into one (batches are of similar lengths instead).
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from files import (
    Interrupted,
    NonFiniteError,
    UserError,
    finishing_step,
    interruptible,
    locked,
    one_line,
    printable_path,
    read_beside,
    read_json,
    remove_leftovers,
    set_updates,
    training_tensors,
    updates,
    write_beside,
    write_csv,
    write_json,
    write_tensors,
)
from losses import future_logits, optimal_value, prompt_mean
from options import (
    NO_DEFAULT,
    add_method_flags,
    check_method_flags,
    check_rows,
    command_line,
    count,
    learning_rate,
    method_words,
    methods,
    natural,
)
from results import FORMAT
from stages import adamw, digest, progress, warmup_cosine
from train import COLUMNS, PAIRED, batch_order, objective, pair_order

from .load_hf import (
    ChatTokenizer,
    checkpoint_key,
    empty_model,
    fetch,
    fill,
    find_tensors,
    gpt_config,
    save_pretrained,
)  # fmt: skip
from .rollouts import read_rollouts

CHUNK = 256  # positions whose logits exist at once
MONITORED = 32  # correct, and as many incorrect, rows whose log-probabilities are logged
SHARD_BYTES = 2**30
BEGINNING = {"step": 0, "seconds": 0.0, "trained": 0, "below": [0, 0], "skipped": 0, "interval": [], "log": []}  # of a run
CHECKPOINTS = ("checkpoint", "checkpoint.part", "checkpoint.old")


# --- log-probabilities without a (B, T, V) tensor


class HeadLogps(torch.autograd.Function):
    """Log-probabilities of targets (N,) from hidden states (N, D) and a head (V, D), CHUNK positions at a time.

    Returns them (N,) under the policy, whose gradient flows, and under the future policy, detached; the latter needs the
    reference's hidden states and head, and is the former where they are None. Backward computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, ref_hidden, ref_head, lam):
        """Both log-probabilities (N,), in nats; ref_hidden (N, D) and ref_head (V, D) as hidden and head."""
        present, future, normalisers = [], [], []
        for rows in chunks(len(hidden)):
            logits, chosen = head_logits(hidden[rows], head), targets[rows, None]  # (CHUNK, V)
            normalisers.append(logits.logsumexp(-1))
            present.append(logits.gather(-1, chosen)[:, 0] - normalisers[-1])
            if ref_hidden is not None:
                logits = future_logits(logits, head_logits(ref_hidden[rows], ref_head), lam)
                future.append(logits.gather(-1, chosen)[:, 0] - logits.logsumexp(-1))
        present = torch.cat(present)
        future = torch.cat(future) if future else present.clone()
        ctx.save_for_backward(hidden, head, targets, torch.cat(normalisers))
        ctx.mark_non_differentiable(future)
        return present, future

    @staticmethod
    def backward(ctx, upstream, _):
        hidden, head, targets, normalisers = ctx.saved_tensors
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        for rows in chunks(len(hidden)):
            grad = -(head_logits(hidden[rows], head) - normalisers[rows, None]).exp_()  # of logits: 1[target] - softmax
            grad.scatter_add_(-1, targets[rows, None], torch.ones_like(grad[:, :1]))
            grad = (grad * upstream[rows, None]).to(head.dtype)
            hidden_grad[rows] = grad @ head
            head_grad += grad.T @ hidden[rows]
        return hidden_grad, head_grad.to(head.dtype), None, None, None, None


def chunks(count):
    return [slice(first, first + CHUNK) for first in range(0, count, CHUNK)]


def head_logits(hidden, head):
    """Logits (N, V) in fp32 from hidden states (N, D) and a head (V, D) of any type; the extrapolation magnifies rounding."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return hidden.float() @ head.float().T


def head_of(model):
    return model.embed_tokens.weight if model.config.tied_head else model.lm_head.weight


def completion_hidden(model, tokens, mask):
    """Hidden states (N, D) that predict the completion tokens of tokens (B, T), row by row, and these tokens (N,)."""
    return model.hidden(tokens)[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]]


def row_sums(values, mask):
    """(N,) values of completion tokens, row by row -> their sums (B,)."""
    rows = mask[:, 1:].nonzero()[:, 0]
    return torch.zeros(len(mask), device=values.device).index_add(0, rows, values)


# --- data


def read_data(args, tokenizer):
    """The rollouts as token ids and the toy's tensors (N,) over rows. Raises UserError."""
    encoded = functools.cache(tokenizer.encode)  # prompts repeat

    def tokenized(row):
        prompt, completion = encoded(row["prompt"]), tokenizer.encode(row["completion"], special=False)
        if row["finished"] and not (completion and completion[-1] in tokenizer.stops):
            completion.append(tokenizer.eos)
        if len(prompt) + len(completion) > args.max_length:
            raise ValueError(f"{len(prompt) + len(completion)} tokens, more than --max-length {args.max_length}")
        return {**row, "tokens": torch.tensor(prompt + completion), "prompt_length": len(prompt)}

    rows = read_rollouts(args.data, tokenizer, tokenized, skip_bad=args.skip_bad_lines, say=say)
    if len({row["label"] for row in rows}) < 2:
        raise UserError(f"{args.data}: needs correct and incorrect rows, and has {len(rows)} of one kind only")
    tokens, prompt_length = ([row[name] for row in rows] for name in ("tokens", "prompt_length"))
    data = {
        "tokens": tokens,
        "prompt_length": torch.tensor(prompt_length),
        "length": torch.tensor([len(ids) for ids in tokens]) - torch.tensor(prompt_length),
        "reward": torch.tensor([1.0 if row["label"] else -1.0 for row in rows]),
        "problem_ids": torch.tensor([row["problem_id"] for row in rows]),
    }
    ids = data["problem_ids"].unique(return_inverse=True)[1]
    data["value"], data["mean_reward"] = optimal_value(data["reward"], ids), prompt_mean(data["reward"], ids)
    return data


def other_prompts(data):
    """For KTO's z0, the row (N,) whose prompt a row's completion is put after: the next one of another problem."""
    ids = data["problem_ids"].tolist()
    if len(set(ids)) < 2:
        raise UserError("kto needs rows of at least two prompts: its z0 puts completions after others' prompts")
    other = [0] * len(ids)
    following = next(i for i in range(len(ids)) if ids[i] != ids[-1])
    for i in reversed(range(len(ids))):
        following = i + 1 if i + 1 < len(ids) and ids[i + 1] != ids[i] else following
        other[i] = following
    return torch.tensor(other)


def pack(data, rows, device, prompts=None):
    """Some rows -> tokens (B, T) padded right, mask (B, T) True on completion tokens; `prompts`: the rows of their prompts."""
    prompts = rows if prompts is None else prompts
    sequences, starts = [], []
    for row, prompt in zip(rows.tolist(), prompts.tolist()):
        start = data["prompt_length"][prompt].item()
        completion = data["tokens"][row][data["prompt_length"][row] :]
        sequences.append(torch.cat([data["tokens"][prompt][:start], completion]))
        starts.append(start)
    lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    positions = torch.arange(tokens.shape[1])
    mask = (positions >= torch.tensor(starts)[:, None]) & (positions < lengths)
    return tokens.to(device), mask.to(device)


def micro_batches(data, rows, args, paired=False):
    """This process's share of some rows, in micro-batches of similar lengths; a pair stays together, correct rows first."""
    units = rows.view(2, -1).T if paired else rows[:, None]  # (units, rows of each)
    total = data["prompt_length"] + data["length"]
    units = units[total[units].amax(1).argsort()]
    return [unit.T.flatten() for unit in units.split(args.micro_batch // units.shape[1])][
        dist.get_rank() :: dist.get_world_size()
    ]


# --- processes


def start_processes():
    """Join torchrun's processes, or be the only one -> their mesh."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend, mine = "gloo", None
    if device == "cuda":
        backend, mine = "nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(mine)
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=mine)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=mine)
    return init_device_mesh(device, (dist.get_world_size(),))


def say(text):
    if dist.get_rank() == 0:
        print(text, flush=True)


def agreed(value):
    """The first process's value, in all of them."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def summed(values):
    """A tensor's sum over processes, in place."""
    dist.all_reduce(values)
    return values


def build(args, folder, mesh):
    """The checkpoint's GPT, its parameters sharded over the processes, each of which reads its own part."""
    model = empty_model(gpt_config(read_json(folder / "config.json"), folder / "config.json"))
    places = find_tensors(folder, model)
    lower = torch.bfloat16 if args.precision == "bf16" else None
    # inputs are not cast: the rotary table stays fp32, and the embedding's output has the parameters' type already
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        if args.recompute:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=mesh.device_type)
    fill(model, places)
    model.folder = folder
    return model


# --- the reference policy


def read_cache(folder):
    """Whether the reference's files are there, and whole. Raises UserError where one is damaged or gone."""
    facts = read_beside(folder / "sums.safetensors")
    for name in facts["files"] if facts else ():
        if read_beside(folder / name) is None:
            raise UserError(f"{folder / name}: gone; remove {folder} to make it anew")
    return facts is not None


class Reference:
    """The reference policy: every row's logp_sum, its output head, and its hidden states from disk or from a live model."""

    def __init__(self, args, model, data, key, mesh):
        """The model is still the reference policy itself; key: what it and the data are. Raises UserError: a full disk."""
        self.data, self.device, self.live = data, mesh.device_type, None
        with torch.no_grad():
            head = head_of(model)
            head = head.full_tensor() if isinstance(head, DTensor) else head
            self.head = head.to(torch.bfloat16 if args.precision == "bf16" else torch.float32, copy=True)
        needs_hidden = methods(args)[0]["lam"] > 0 and args.loss != ["sharpened"]
        stored = needs_hidden and args.reference == "cached"
        if needs_hidden and args.reference == "live":
            self.live = build(args, model.folder, mesh).requires_grad_(False)
        key = digest([key, args.precision, stored, args.loss == ["kto"], dist.get_world_size()])
        self.cache = args.out / "cache" / f"reference-{key}"
        began, size = time.time(), data["length"].sum().item() * self.head.element_size() * self.head.shape[1] * stored
        free, there = agreed((shutil.disk_usage(args.out).free, read_cache(self.cache)) if dist.get_rank() == 0 else None)
        if not there:
            if size > free:
                raise UserError(f"{args.out}: the reference takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
            self.compute(args, model, stored, other_prompts(data) if args.loss == ["kto"] else None)
        say(f"reference     {'cached  ' if there else f'{time.time() - began:6.1f} s'}     {self.cache}   {size / 1e9:.1f} GB")
        sums = load_file(self.cache / "sums.safetensors")
        self.logp_sum, self.mismatched_logp_sum, self.seconds = (sums[name] for name in ("logp_sum", "mismatched", "seconds"))
        self.places = {}
        for path in sorted(self.cache.glob("hidden-*.safetensors")):
            file = safe_open(path, "pt")
            rows = file.get_tensor("rows")
            ends = data["length"][rows].cumsum(0).tolist()
            self.places |= {row: (file, begin, end) for row, begin, end in zip(rows.tolist(), [0, *ends], ends)}

    @torch.no_grad()
    def compute(self, args, model, stored, prompts):
        """Run every row through the model once; the hidden states go to this process's files, the sums to one of all."""
        data, began = self.data, time.time()
        self.cache.mkdir(parents=True, exist_ok=True)
        sums, mismatched = torch.zeros(len(data["reward"])), torch.zeros(len(data["reward"]))
        rank, world = dist.get_rank(), dist.get_world_size()
        waiting, files = [], 0
        by_length = (data["prompt_length"] + data["length"]).argsort()
        batches = by_length.split(args.micro_batch * world)
        for batch in progress(batches, desc="reference", disable=rank > 0 or None):
            rows = batch[rank::world] if len(batch) > rank else batch[:1]  # every process takes part in every forward
            tokens, mask = pack(data, rows, self.device)
            hidden, targets = completion_hidden(model, tokens, mask)
            logps, _ = HeadLogps.apply(hidden, self.head, targets, None, None, 0.0)
            if prompts is not None:
                moved, moved_mask = pack(data, rows, self.device, prompts[rows])
                moved_hidden, moved_targets = completion_hidden(model, moved, moved_mask)
                moved_logps, _ = HeadLogps.apply(moved_hidden, self.head, moved_targets, None, None, 0.0)
            if len(batch) > rank:
                sums[rows] = row_sums(logps, mask).cpu()
                if prompts is not None:
                    mismatched[rows] = row_sums(moved_logps, moved_mask).cpu()
                waiting += [(rows, hidden.to(self.head.dtype).cpu())] * stored
            if sum(hidden.nbytes for _, hidden in waiting) > SHARD_BYTES:
                self.write(waiting, rank, files)
                waiting, files = [], files + 1
        if waiting:
            self.write(waiting, rank, files)
        model.reshard()  # FSDP2 does so in backward only, and the optimizer wants the shards
        sums, mismatched = summed(sums.to(self.device)).cpu(), summed(mismatched.to(self.device)).cpu()
        if rank == 0:  # after every process's files, and last: it says that they are whole
            seconds, names = torch.tensor(time.time() - began), sorted(x.name for x in self.cache.glob("hidden-*.safetensors"))
            write_tensors(self.cache / "sums.safetensors", {"logp_sum": sums, "mismatched": mismatched, "seconds": seconds})
            write_beside(self.cache / "sums.safetensors", {"files": names})
        dist.barrier()

    def write(self, waiting, rank, number):
        rows, hidden = zip(*waiting)
        path = self.cache / f"hidden-{rank:03}-{number:05}.safetensors"
        write_tensors(path, {"rows": torch.cat(rows), "hidden": torch.cat(hidden)})
        write_beside(path, {})

    def hidden(self, rows, tokens, mask):
        """The reference's hidden states (N, D) of some rows' completions; None where the method needs none."""
        if self.live is not None:
            with torch.no_grad():
                return completion_hidden(self.live, tokens, mask)[0]
        if not self.places:
            return None
        places = [self.places[row] for row in rows.tolist()]
        return torch.cat([file.get_slice("hidden")[begin:end] for file, begin, end in places]).to(self.device)


# --- training


def score(model, data, reference, rows, lam):
    """logp_sum (B,) of some rows under the present and the future policy."""
    tokens, mask = pack(data, rows, reference.device)
    hidden, targets = completion_hidden(model, tokens, mask)
    ref_hidden = reference.hidden(rows, tokens, mask) if lam else None
    present, future = HeadLogps.apply(hidden, head_of(model), targets, ref_hidden, reference.head, lam)
    return row_sums(present, mask), row_sums(future, mask)


@torch.no_grad()
def kto_z0(model, data, reference, batches, prompts):
    """KTO's z0 over all of a step's rows: the mean log-ratio, at least 0, after prompts of other problems."""
    total = torch.zeros(2, device=reference.device)
    for rows in batches:
        tokens, mask = pack(data, rows, reference.device, prompts[rows])
        hidden, targets = completion_hidden(model, tokens, mask)
        present, _ = HeadLogps.apply(hidden, head_of(model), targets, None, None, 0.0)
        logratio = row_sums(present, mask) - reference.mismatched_logp_sum[rows].to(reference.device)
        total += torch.stack([logratio.sum(), torch.tensor(float(len(rows)), device=reference.device)])
    total = summed(total)
    return (total[0] / total[1]).clamp(min=0)


def training_step(model, optimizer, data, reference, rows, settings, args, prompts):
    """One optimizer step on some rows, none where it is not finite -> numbers for the log (9,), the same in every process.

    The loss; the weights of grad logp_mean summed over correct rows, and these rows' number; the same of incorrect rows; how
    many incorrect rows are below 0.2 under the present and under the future policy; completion tokens; the gradient's norm.
    """
    batches, sums = micro_batches(data, rows, args, settings["loss"] in PAIRED), torch.zeros(9, device=reference.device)
    z0 = kto_z0(model, data, reference, batches, prompts) if settings["loss"] == "kto" else None
    optimizer.zero_grad()
    for some in batches:
        batch = {name: data[name][some].to(reference.device) for name in ("reward", "length", "value", "mean_reward")}
        logp_sum, future_logp_sum = score(model, data, reference, some, settings["lam"])
        batch |= {"logp_sum": logp_sum, "logratio": logp_sum - reference.logp_sum[some].to(reference.device), "z0": z0}
        loss, coefficient = objective(batch, future_logp_sum, settings)
        (loss / len(batches)).backward()  # FSDP2 takes the mean over processes
        length, wrong, weight = batch["length"], batch["reward"] < 0, coefficient * batch["length"]
        below = [(wrong & ((value.detach() / length).exp() < 0.2)).sum() for value in (logp_sum, future_logp_sum)]
        share = loss.detach() / len(batches) / dist.get_world_size()
        sums += torch.stack(
            [share, weight[~wrong].sum(), (~wrong).sum(), weight[wrong].sum(), wrong.sum(), *below, length.sum(), share * 0]
        )
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    sums = summed(sums)
    sums[8] = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    sums = sums.double().cpu()
    if sums[[0, 8]].isfinite().all():
        optimizer.step()
    return sums


@torch.no_grad()
def monitor(model, data, reference, rows, args, lam):
    """The toy's log-ratio and probability columns: means over the monitored correct and incorrect rows."""
    sums = torch.zeros(2, 4, device=reference.device)
    for some in micro_batches(data, rows, args):
        logp_sum, future_logp_sum = score(model, data, reference, some, lam)
        length, reward = (data[name][some].to(reference.device) for name in ("length", "reward"))
        ratio = logp_sum - reference.logp_sum[some].to(reference.device)
        values = torch.stack([ratio, (logp_sum / length).exp(), (future_logp_sum / length).exp(), torch.ones_like(ratio)])
        sums += torch.stack([values[:, reward > 0].sum(1), values[:, reward < 0].sum(1)])
    model.reshard()
    means = (summed(sums)[:, :3] / sums[:, 3:]).tolist()
    groups = zip(("correct", "incorrect"), means)
    return {f"{name}_{group}": value for group, row in groups for name, value in zip(("logratio", "pi", "pihat"), row)}


def settings_of(args, method, data, folder):
    """The run's config.json but for what is measured, with what results.py reads; it names checkpoint and data by content."""
    tokens = [*data["tokens"], data["prompt_length"], data["reward"]]
    content = hashlib.sha256(b"".join(values.numpy().tobytes() for values in tokens)).hexdigest()[:16]
    problems = len(data["problem_ids"].unique())
    settings = {"format": FORMAT, "init": args.init, "checkpoint": agreed(checkpoint_key(folder)), "data": content}
    settings |= {"prompts": problems, "rows": len(data["reward"]), "rollouts": round(len(data["reward"]) / problems)}
    names = ("steps", "batch_size", "eval_every", "lr", "warmup", "max_length", "precision", "seed")
    return settings | {name: getattr(args, name) for name in names} | method


def read_state(folder):
    """state.json of a checkpoint all of whose files are there, else None; UserError where it should be whole and is not."""
    with contextlib.suppress(UserError, OSError, KeyError):
        state = read_json(folder / "state.json")
        whole = all((folder / name).stat().st_size == size for name, size in state["files"].items())
        if whole and state.keys() >= BEGINNING.keys() | {"updates"}:
            return state
    if folder.name == "checkpoint" and folder.exists():  # the other two may be half-written or half-removed
        raise UserError(f"{folder}: damaged; --no-resume begins anew")
    return None


def resume(args, model, optimizer, folder):
    """Load the checkpoint of an interrupted run, if there is one -> its state, or that of a run's beginning.

    An interruption while one took the other's place leaves it under its temporary name, or the old one under its own. Raises
    UserError.
    """
    states, first = {}, dist.get_rank() == 0
    if first and args.resume:
        states = {name: state for name in CHECKPOINTS if (state := read_state(folder / name))}
    states = agreed(states)
    name = max(states, key=lambda name: states[name]["step"]) if states else None
    if first:
        for other in set(CHECKPOINTS) - {name}:
            shutil.rmtree(folder / other, ignore_errors=True)
    if not states:
        return copy.deepcopy(BEGINNING)
    if first:
        (folder / name).rename(folder / "checkpoint")
    dist.barrier()
    tensors = training_tensors(model, optimizer)
    with one_line_of(folder / "checkpoint"):
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "checkpoint")))
    set_updates(optimizer, states[name]["updates"])
    say(f"resuming      {folder} from step {states[name]['step']}")
    return states[name]


@contextlib.contextmanager
def one_line_of(path):
    """Make what torch raises where a checkpoint cannot be written or read a UserError that names its path."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{path}: {getattr(cause, 'strerror', None) or str(cause).splitlines()[0]}") from None


def save_checkpoint(model, optimizer, folder, state):
    """Put this step's checkpoint in the place of the last; at every moment one of them is whole."""
    new, old, first = folder / "checkpoint.part", folder / "checkpoint", dist.get_rank() == 0
    if first:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    dist.barrier()
    tensors = training_tensors(model, optimizer)
    sizes = torch.tensor([tensor.nbytes for tensor in tensors.values()]).cumsum(0) // SHARD_BYTES
    shards = dict(zip(tensors, (sizes + 1).tolist()))
    with one_line_of(new):
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(new), shards, save_distributed=True))
    dist.barrier()
    if first:
        state = {**state, "updates": updates(optimizer)}
        write_json(new / "state.json", {**state, "files": {path.name: path.stat().st_size for path in new.iterdir()}})
        if old.exists():
            old.rename(folder / "checkpoint.old")
        new.rename(old)
        shutil.rmtree(folder / "checkpoint.old", ignore_errors=True)


def train(args, mesh):
    """The command. Raises UserError, and what `fit` raises."""
    folder = agreed(fetch(args.init)) if dist.get_rank() == 0 else agreed(None)
    data = read_data(args, ChatTokenizer(folder))
    (method,) = methods(args)
    settings = settings_of(args, method, data, folder)
    words = [Path(args.init).name, *method_words(method), f"steps{args.steps}", f"lr{args.lr:g}", f"seed{args.seed}"]
    run_folder = args.out / "-".join([*words, digest(settings)])
    if agreed((run_folder / "model" / "config.json").exists()):
        say(f"already finished: {run_folder}")
        shutil.rmtree(run_folder / "checkpoint", ignore_errors=True)  # left by an end just after the result was written
        return

    lock = locked(args.out / "cache" / f"{run_folder.name}.lock", run_folder)
    with lock if dist.get_rank() == 0 else contextlib.nullcontext():
        fit(args, settings, data, folder, run_folder, mesh)


def fit(args, settings, data, folder, run_folder, mesh):
    """Train the checkpoint in `folder`, from the run's own last one where it was interrupted, and write the result.

    Raises UserError, NonFiniteError, and Interrupted once a checkpoint of the last step is saved.
    """
    loss, reward, ids = settings["loss"], data["reward"], data["problem_ids"]
    if loss in PAIRED:
        order = pair_order(reward, ids, args.steps, args.batch_size, args.seed)
    else:
        order = batch_order(reward, args.steps, args.batch_size, args.seed)
    prompts = other_prompts(data) if loss == "kto" else None
    per_process = args.micro_batch * dist.get_world_size()
    monitored = batch_order(reward, 1, math.ceil(2 * MONITORED / per_process) * per_process, args.seed)[0]
    model = build(args, folder, mesh)
    reference = Reference(args, model, data, f"{settings['checkpoint']} {settings['data']}", mesh)
    optimizer = adamw(model, args.lr)
    run_folder.mkdir(parents=True, exist_ok=True)
    state = resume(args, model, optimizer, run_folder)
    say(f"training      {run_folder}")
    resumed, first = state["step"], dist.get_rank() == 0
    if first:
        share, seconds = (reward > 0).float().mean().item(), reference.seconds.item()
        measured = {"sampling_seconds": None, "reference_seconds": seconds, "share_correct": share}
        environment = {"device": mesh.device_type, "processes": dist.get_world_size(), "torch": torch.__version__}
        write_json(run_folder / "config.json", {**settings, "measured": measured, "environment": environment})

    bar = progress(total=args.steps, initial=resumed, desc=run_folder.name, disable=not first or None)
    with bar, finishing_step() as interrupted:
        for step in range(resumed, args.steps + 1):
            evaluating = step % args.eval_every == 0 or step == args.steps
            if evaluating and (step > resumed or step == 0):
                log_row(args, model, data, reference, monitored, settings["lam"], state, step)
                if first:
                    write_csv(run_folder / "log.csv", state["log"])
                state["interval"] = []
            stopping = step < args.steps and stopped(interrupted, reference.device)
            if step > resumed and (step % args.save_every == 0 or step == args.steps or stopping):
                save_checkpoint(model, optimizer, run_folder, {**state, "step": step})
            if stopping:
                raise Interrupted(stopping)
            if step == args.steps:
                break
            began = time.time()
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warmup_cosine(step, args.warmup, args.steps)
            sums = training_step(model, optimizer, data, reference, order[step], settings, args, prompts)
            state["seconds"] += time.time() - began
            if sums[[0, 8]].isfinite().all():
                state["interval"].append(sums.tolist())
                state["below"] = [int(before + now) for before, now in zip(state["below"], sums[5:7])]
                state["trained"] += int(sums[7])
            elif state["skipped"] < args.skip_nonfinite:
                state["skipped"] += 1
            else:
                raise NonFiniteError(
                    f"step {step + 1}: loss {sums[0]:g}, gradient norm {sums[8]:g}; problem ids of its batch: "
                    f"{ids[order[step]].unique().tolist()}; the last checkpoint, if there was one, is kept in {run_folder}"
                )
            bar.update()
    save_pretrained(model, run_folder / "model", torch.bfloat16 if args.precision == "bf16" else torch.float32)
    if first:
        shutil.rmtree(run_folder / "checkpoint")
    say(f"checkpoint    {run_folder / 'model'}")
    if stopping := stopped(interrupted, reference.device):
        raise Interrupted(stopping)


def stopped(interrupted, device):
    """The signal that some process caught, the same in every one, or None."""
    if summed(torch.tensor(len(interrupted), device=device)) > 0:
        return agreed(interrupted[0] if interrupted else signal.SIGTERM)
    return None


def log_row(args, model, data, reference, monitored, lam, state, step):
    """Append a row, of the steps since the last one, to the log in `state`, and print a line."""
    interval = state["interval"]
    row = {name: math.nan for name in COLUMNS} | {"step": step} | monitor(model, data, reference, monitored, args, lam)
    if interval:
        sums = torch.tensor(interval, dtype=torch.float64).sum(0)
        row |= {"loss": sums[0].item() / len(interval), "grad_norm": sums[8].item() / len(interval)}
        row |= {"coefficient_correct": (sums[1] / sums[2]).item(), "coefficient_incorrect": (sums[3] / sums[4]).item()}
    row |= dict(zip(("below_0.2_pi", "below_0.2_pihat"), state["below"]))
    row |= {"skipped": state["skipped"], "seconds": state["seconds"]}
    row |= {"tokens_trained": state["trained"], "tokens_sampled": int(data["length"].sum())}
    state["log"].append(row)
    loss = f"{row['loss']:+.4f}" if interval else "   --  "
    rate = state["trained"] / max(state["seconds"], 1e-9)
    memory = f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    say(
        f"step {step:5d}/{args.steps}  loss {loss}  log-ratio correct {row['logratio_correct']:+8.2f} "
        f"incorrect {row['logratio_incorrect']:+8.2f}  {rate:,.0f} completion tokens/s{memory}"
    )


# --- the command


def parse_args(argv=None):
    """The flags, every one checked before any process group is there; a wrong one is one line and exit code 2."""
    description = "Offline RL of a published checkpoint on rollouts; behind torchrun, on several GPUs."
    parser = command_line(description, prog="python -m full_scale.train")
    add_method_flags(parser)
    parser.set_defaults(loss=["fpa"])
    add = parser.add_argument_group("checkpoint and data").add_argument
    add("--init", required=True, metavar="NAME", help="hub name or folder of the checkpoint, which is the "
        f"reference policy too{NO_DEFAULT}")  # fmt: skip
    add("--data", required=True, type=printable_path, metavar="FILE", help="rollouts of it, JSON lines: prompt, completion, "
        f"label, or prompt, chosen, rejected{NO_DEFAULT}")  # fmt: skip
    add("--max-length", default=2560, type=count, metavar="N", help="tokens; a longer row is a bad line")
    add("--skip-bad-lines", action="store_true", help="go on without the rollouts' bad lines")
    add = parser.add_argument_group("training").add_argument
    add("--steps", default=500, type=count, metavar="N", help="optimizer steps")
    add("--lr", default=1e-6, type=learning_rate, metavar="X", help="AdamW's highest learning rate")
    add("--warmup", default=10, type=natural, metavar="N", help="steps of linear warm-up, before a cosine to 0")
    add("--batch-size", default=64, type=count, metavar="N", help="rows a step over all GPUs, half of them correct")
    add("--micro-batch", default=2, type=count, metavar="N", help="rows that a GPU takes at once; gradients accumulate")
    add("--seed", default=0, type=natural, metavar="N", help="of the order of the rows")
    add("--skip-nonfinite", default=0, type=natural, metavar="N", help="leave out the updates of at most N steps whose loss or "
        "gradient is not finite; one more stops the run")  # fmt: skip
    add = parser.add_argument_group("machine").add_argument
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of the products; weights, gradients and moments "
        "are fp32. auto: bf16 on GPUs")  # fmt: skip
    add("--reference", default="cached", choices=["cached", "live"], help="its hidden states, from disk or from a second model")
    add("--recompute", default=True, action=argparse.BooleanOptionalAction, help="activations in backward: less memory")
    add("--eval-every", default=10, type=count, metavar="N", help="steps between rows of log.csv")
    add("--save-every", default=100, type=count, metavar="N", help="steps between checkpoints")
    add("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on with an interrupted run from its last "
        "checkpoint, or begin it anew")  # fmt: skip
    add("--out", default="runs", type=printable_path, metavar="FOLDER", help="folder of the runs and of the reference's cache")
    args = parser.parse_args(argv)
    check_rows(parser, args)
    check_method_flags(parser, args)
    if len(methods(args)) > 1:
        parser.error("one method a run: one value for each of its flags")
    if args.loss == ["grpo"]:
        parser.error("argument --loss: grpo samples at every step, which only the toy does")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.micro_batch % 2 or args.batch_size % (args.micro_batch * processes):
        parser.error(f"argument --micro-batch: must be even, and {processes} times it divide --batch-size {args.batch_size}")
    if args.precision == "auto":
        args.precision = "bf16" if torch.cuda.is_available() else "fp32"
    return args


def run(argv=None):
    """The command in each process; the first one says what goes wrong, in one line."""
    args = parse_args(argv)
    mesh, code = start_processes(), 0
    try:
        (args.out / "cache").mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            remove_leftovers(args.out)
        with interruptible():
            train(args, mesh)
    except (UserError, NonFiniteError, OSError, torch.OutOfMemoryError) as error:
        code = 3 if isinstance(error, NonFiniteError) else 2
        if dist.get_rank() == 0:
            print(f"python -m full_scale.train: error: {one_line(error, args.out)}", file=sys.stderr, flush=True)
    except Interrupted as signalled:
        code = 128 + signalled.args[0]
        if dist.get_rank() == 0:
            kept = f"what is saved in {args.out} stays; the same command goes on from there"
            print(f"interrupted: {kept}", file=sys.stderr, flush=True)
    if dist.get_world_size() > 1:  # a usual exit waits for the others after an error, and gloo's threads sometimes abort in it
        if not code:
            dist.barrier()
        sys.stdout.flush()
        os._exit(code)
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    run()
