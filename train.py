"""Train a small GPT on slipping arithmetic, then improve it by offline reinforcement learning on its own rollouts.

    python train.py --loss fpa --lam 2                  # one run
    python train.py --loss off_rl fpa --seed 0 1 2 3 4  # several values per flag: their product

Stages, each cached under --out: base model -> rollouts -> reference logits -> offline RL with periodic evaluation ->
final evaluation. Left out against the paper: real checkpoints and benchmarks, the other losses, online RL.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import plots
from losses import TARGETS, fpa, future_logits, logp_sum_and_mean, off_rl, token_logps
from model import GPT, GPTConfig
from toy_math.problems import draw_problems
from toy_math.rollouts import corpus_rows, evaluate, pack, read_rows, rollout_rows, sample, samples_text
from toy_math.tokenizer import VOCAB_SIZE

LOSSES = {
    "off_rl": lambda logp_mean, future_logp_mean, reward, target: off_rl(logp_mean, reward),
    "fpa": fpa,
}
COLUMNS = (
    "step loss grad_norm accuracy accuracy_greedy malformed logratio_correct logratio_incorrect pi_correct pi_incorrect "
    "pihat_correct pihat_incorrect below_0.2_pi below_0.2_pihat seconds tokens"
).split()
CONFIG = GPTConfig(vocab_size=VOCAB_SIZE)
BASE_BATCH, BASE_LR, BASE_WARMUP = 32, 3e-3, 100
EVAL_PROBLEMS, EVAL_SAMPLES = 256, 8
MONITORED = 128  # correct, and as many incorrect, training rollouts whose log-probabilities are logged
progress = functools.partial(tqdm, disable=None, leave=False)  # disable=None: a bar on a terminal only
FORMAT = 2  # part of every cache key: raise it when a stage's meaning changes


class UserError(Exception):
    """Something the user can mend; shown as one line, exit code 2."""


class NonFiniteError(Exception):
    """The loss or the gradient is no longer a number; shown as one line, exit code 3."""


# --- command line


def checked(kind, accepts, described):
    """An argparse type: int or float, finite and within its range, or a message that says what it must be."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {described}, not {text!r}")
        return value

    return parse


def parse_args(argv=None):
    """The flags, every one checked before anything is written; a wrong one is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Offline RL on synthetic arithmetic: Off-RL against Future Policy Approximation (FPA).",
        epilog="--loss, --lam, --target and --seed take several values and then run their product.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, no usage
    count = checked(int, lambda value: 1 <= value < 2**31, "a whole number of at least 1")
    natural = checked(int, lambda value: 0 <= value < 2**31, "a whole number of at least 0 and below 2^31")
    positive = checked(float, lambda value: value > 0, "a finite number above 0")
    lam = checked(float, lambda value: value >= 0, "a finite number of at least 0")
    share = checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")

    add = parser.add_argument_group("method").add_argument
    add("--loss", nargs="+", default=["off_rl", "fpa"], choices=LOSSES, help="loss of the offline RL stage")
    add("--lam", nargs="+", default=[2.0], type=lam, metavar="X", help="how far fpa extrapolates (off_rl does not)")
    add("--target", nargs="+", default=["both"], choices=TARGETS, help="rows that fpa weights by the future policy")
    add("--seed", nargs="+", default=[0], type=natural, metavar="N", help="seed of the whole pipeline, base model included")

    add = parser.add_argument_group("offline RL").add_argument
    add("--steps", default=1000, type=count, metavar="N", help="optimizer steps")
    add("--lr", default=2e-4, type=positive, metavar="X", help="AdamW's learning rate, constant")
    add("--batch-size", default=64, type=count, metavar="N", help="trajectories a step, half correct and half incorrect")

    add = parser.add_argument_group("task").add_argument
    add("--prompts", default=1024, type=count, metavar="N", help="training problems that are rolled out")
    add("--rollouts", default=8, type=count, metavar="N", help="samples per training problem")
    add("--ops", default=6, type=count, metavar="N", help="operations per problem")
    add("--slip", default=0.12, type=share, metavar="X", help="probability that a step of the base model's corpus is wrong")
    add("--base-steps", default=3000, type=count, metavar="N", help="training steps of the base model")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", default=50, type=count, metavar="N", help="steps between evaluations")
    add("--eval-temperature", default=1.0, type=positive, metavar="X", help="sampling temperature of the column `accuracy`")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto takes a GPU where there is one")
    add("--jobs", default=0, type=natural, metavar="N", help="runs at once, a thread each; 0: one a CPU thread, one on a GPU")
    add("--out", default="runs", type=Path, metavar="FOLDER", help="folder of the runs and of the cached stages")
    add("--force", action="store_true", help="train finished runs anew; cached stages stay")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """What no single flag shows: flags at odds, too few problems, the output folder; settles `--device auto`."""
    if args.batch_size % 2:
        parser.error(f"argument --batch-size: must be even, half correct and half incorrect, not {args.batch_size}")
    for flag in ("lam", "target"):
        if "fpa" not in args.loss and getattr(args, flag) is not parser.get_default(flag):
            parser.error(f"argument --{flag}: only fpa has it, and --loss is {' '.join(args.loss)}")
    try:  # too few problems of this length are noticed before anything is trained
        for seed in args.seed:
            draw_splits(args, seed)
    except ValueError as error:
        parser.error(f"argument --ops or --prompts: {error}")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if args.device == "auto":
        args.device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[args.device]:
        parser.error(f"argument --device: there is no {args.device} device on this machine")
    existing = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        parser.error(f"argument --out: {existing} is not a folder that can be written to")


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


# --- stages before offline RL


def stage_settings(args, seed):
    """What determines the base model, and what determines its rollouts."""
    base = {
        "format": FORMAT,
        "seed": seed,
        "model": asdict(CONFIG),
        "ops": args.ops,
        "slip": args.slip,
        "base_steps": args.base_steps,
        "base_batch_size": BASE_BATCH,
        "base_lr": BASE_LR,
        "base_warmup": BASE_WARMUP,
    }
    return base, {**base, "prompts": args.prompts, "rollouts": args.rollouts}


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
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / args.base_steps)),
    )
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


def draw_splits(args, seed):
    """The training problems that are rolled out and the test problems of the evaluations."""
    return (
        draw_problems(args.prompts, args.ops, "train", random.Random(f"{seed}/train")),
        draw_problems(EVAL_PROBLEMS, args.ops, "test", random.Random(f"{seed}/test")),
    )


def rollouts(args, seed, model, problems, path):
    """`--rollouts` samples at temperature 1 for each training problem, verified: rows as in toy_math/rollouts.py."""
    if path.exists():
        print(f"rollouts      cached       {path}")
        return read_rows(path)
    began = time.time()
    bar = functools.partial(progress, desc="rollouts")
    samples = sample(model, problems, args.rollouts, 1.0, seeded(args.device, seed, "rollouts"), bar)
    rows = rollout_rows(samples)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    share = sum(row["label"] for row in rows) / len(rows)
    print(f"rollouts      {time.time() - began:6.1f} s     {path}   {len(rows)} rollouts, {share:.1%} correct")
    return rows


@torch.no_grad()
def reference_logits(args, model, tokens, start, path):
    """The reference policy's logits (N, T - start, V), computed once: a training step then costs no reference forward."""
    if path.exists():
        print(f"reference     cached       {path}")
        return load_file(path, device=args.device)["logits"]
    began = time.time()
    batches = progress(tokens.split(512), desc="reference")
    logits = torch.cat([model.head(model.hidden(batch)[:, start:]) for batch in batches])
    with replacing(path) as temporary:
        save_file({"logits": logits}, temporary)
    print(f"reference     {time.time() - began:6.1f} s     {path}")
    return logits


# --- offline RL


def batch_order(labels, steps, batch_size, seed):
    """Row indices (steps, batch_size): half correct, half incorrect, each half walking through its own shuffled epochs."""
    halves = []
    for label in (True, False):
        rows, generator = (labels.cpu() == label).nonzero()[:, 0], seeded("cpu", seed, "order", label)
        needed = steps * batch_size // 2
        epochs = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-needed // len(rows)))]
        halves.append(torch.cat(epochs)[:needed].view(steps, -1))
    return torch.cat(halves, dim=1)


def trajectory_logps(model, data, rows, lam):
    """(logp_sum, logp_mean, future_logp_mean) of some rows, (B,) each; the head sees completion positions only."""
    tokens, mask, start = data["tokens"][rows], data["mask"][rows], data["start"]
    logits = model.head(model.hidden(tokens)[:, start:])  # (B, T - start, V)
    tokens, mask = tokens[:, start:], mask[:, start:]
    logp_sum, logp_mean = logp_sum_and_mean(token_logps(logits, tokens, mask), mask)
    if lam == 0:
        return logp_sum, logp_mean, logp_mean.detach()
    future = future_logits(logits, data["ref_logits"][rows], lam)
    return logp_sum, logp_mean, logp_sum_and_mean(token_logps(future, tokens, mask), mask)[1]


@torch.no_grad()
def monitor(model, data, rows, lam):
    """Log-ratio and probability columns, means over the monitored correct and incorrect training rollouts."""
    logp_sum, logp_mean, future_logp_mean = trajectory_logps(model, data, rows, lam)
    values = {
        "logratio": logp_sum - data["ref_logp_sum"][rows],
        "pi": logp_mean.exp(),
        "pihat": future_logp_mean.exp(),
    }
    groups = {"correct": data["reward"][rows] > 0, "incorrect": data["reward"][rows] < 0}
    return {f"{name}_{g}": value[members].mean().item() for name, value in values.items() for g, members in groups.items()}


def training_step(model, optimizer, data, rows, loss_name, lam, target):
    """One optimizer step on some rows -> (5,): loss, grad_norm, rows below pi, rows below pihat, tokens, as in the log."""
    reward = data["reward"][rows]
    _, logp_mean, future_logp_mean = trajectory_logps(model, data, rows, lam)
    loss = LOSSES[loss_name](logp_mean, future_logp_mean, reward, target)[0].mean()
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    below = [((reward < 0) & (logp.detach().exp() < 0.2)).sum() for logp in (logp_mean, future_logp_mean)]
    return torch.stack([loss.detach(), grad_norm, *below, data["mask"][rows].sum()])


def raise_if_not_finite(stats, order, problem_ids, first, folder):
    """Look for a loss or gradient that is not finite among the steps since `first`, and name the first one's problems."""
    bad = (~torch.isfinite(stats[first:, :2]).all(dim=1)).nonzero()
    if len(bad):
        step = first + bad[0].item()
        ids = sorted({problem_ids[row] for row in order[step].tolist()})
        raise NonFiniteError(
            f"step {step + 1}: loss {stats[step, 0]:g}, gradient norm {stats[step, 1]:g}; problem ids of its batch: {ids}; "
            f"the weights of step {first} are kept in {folder}"
        )


def offline_rl(args, settings, folder, base, data, problems, title=""):
    """Train one policy on the fixed rollouts with one loss; writes config.json, log.csv, model.safetensors, samples.txt.

    `title` opens each line that it prints.
    """
    loss_name, lam, target, seed = (settings[key] for key in ("loss", "lam", "target", "seed"))
    model = GPT(CONFIG).to(args.device)
    model.load_state_dict(base.state_dict())
    optimizer = adamw(model, args.lr)
    order = batch_order(data["reward"] > 0, args.steps, args.batch_size, seed).to(args.device)
    # the first rows of the same order, so that they are fixed and among those trained on soonest
    monitored = batch_order(data["reward"] > 0, 1, 2 * MONITORED, seed)[0].unique().to(args.device)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.txt").unlink(missing_ok=True)
    environment = {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(folder / "config.json", {**settings, "environment": environment})

    stats = torch.zeros(args.steps, 5, device=args.device)  # read at evaluations only: a device need not wait at every step
    began, evaluating, logged = time.time(), 0.0, 0
    bar = progress(total=args.steps, desc=folder.name)
    with bar, open(folder / "log.csv", "w", newline="") as file:
        log = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        log.writeheader()
        for step in range(args.steps + 1):
            if step % args.eval_every == 0 or step == args.steps:
                measured = stats[:step].cpu()  # waits for the device, so that `seconds` is the training's time
                seconds = time.time() - began - evaluating
                raise_if_not_finite(measured, order, data["problem_ids"], logged, folder)
                accuracies, samples = evaluate(
                    model, problems, EVAL_SAMPLES, args.eval_temperature, seeded(args.device, seed, "evaluation", step)
                )
                loss, grad_norm = measured[logged:, :2].mean(0).tolist()
                below_pi, below_pihat, tokens = measured[:, 2:].double().sum(0).long().tolist()
                row = {"step": step, "loss": loss, "grad_norm": grad_norm, **accuracies}
                row |= monitor(model, data, monitored, lam)
                row |= {"below_0.2_pi": below_pi, "below_0.2_pihat": below_pihat, "seconds": seconds, "tokens": tokens}
                log.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
                file.flush()
                save_model(model, folder / "model.safetensors")
                evaluating = time.time() - began - seconds
                eta = (time.time() - began) * (args.steps / step - 1) if step else math.nan
                tqdm.write(title + progress_line(row, args.steps, eta))
                logged = step
            if step == args.steps:
                break

            stats[step] = training_step(model, optimizer, data, order[step], loss_name, lam, target)
            bar.update()
    with replacing(folder / "samples.txt") as temporary:
        temporary.write_text(samples_text(samples))


def progress_line(row, steps, eta):
    eta = "--:--" if math.isnan(eta) else f"{int(eta) // 60:2d}:{int(eta) % 60:02d}"
    loss = f"{row['loss']:+.4f}" if row["step"] else "   --  "
    return (
        f"step {row['step']:5d}/{steps}  loss {loss}  accuracy {row['accuracy']:.3f}  "
        f"greedy {row['accuracy_greedy']:.3f}  log-ratio correct {row['logratio_correct']:+8.2f} "
        f"incorrect {row['logratio_incorrect']:+8.2f}  ETA {eta}"
    )


# --- the product of runs


def run_settings(args):
    """Settings of every run that the flags ask for, by folder name. off_rl has neither λ nor target, so it runs once a seed."""
    runs = {}
    for seed, loss, lam, target in itertools.product(args.seed, args.loss, args.lam, args.target):
        _, settings = stage_settings(args, seed)
        settings |= {key: getattr(args, key) for key in ("steps", "lr", "batch_size", "eval_every", "eval_temperature")}
        settings |= {"eval_problems": EVAL_PROBLEMS, "eval_samples": EVAL_SAMPLES, "monitored": MONITORED, "loss": loss}
        settings |= {"lam": lam, "target": target} if loss == "fpa" else {"lam": 0.0, "target": None}
        name = f"fpa-lam{lam:g}-{target}" if loss == "fpa" else loss
        runs[f"{name}-seed{seed}-{digest(settings)}"] = settings
    return runs


def prepare(args, seed):
    """The stages before offline RL, from the caches where they are: base model, training data, test problems."""
    train_problems, test_problems = draw_splits(args, seed)
    # A stage's key holds its settings and the files that it starts from, so that no stale file is ever taken up.
    base_settings, rollout_settings = stage_settings(args, seed)
    cache = args.out / "cache"
    base_path = cache / f"base-{digest(base_settings)}.safetensors"
    base = base_model(args, seed, base_path)
    rollouts_path = cache / f"rollouts-{digest(rollout_settings, base_path)}.jsonl"
    rows = rollouts(args, seed, base, train_problems, rollouts_path)
    write_json(base_path.with_suffix(".json"), base_settings)
    write_json(rollouts_path.with_suffix(".json"), rollout_settings)
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
        "ref_logits": ref_logits,
        "ref_logp_sum": token_logps(ref_logits, tokens[:, start:], mask[:, start:]).sum(-1),
        "reward": torch.tensor([1.0 if row["label"] else -1.0 for row in rows], device=args.device),
        "problem_ids": [row["problem_id"] for row in rows],
    }
    return base, data, test_problems


def is_finished(folder):
    """Whether a run's config and log are whole and its samples, which are written last, are there."""
    try:
        plots.read_run(folder)
    except ValueError:
        return False
    return (folder / "samples.txt").exists()


def start_worker():
    """One thread, lines at once, no bars, and an end when the parent ends."""
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    progress.keywords["disable"] = True
    tqdm.set_lock(threading.RLock())  # the default one is shared between processes, and a terminated worker would leak it
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def cache_stages(args, seed):
    prepare(args, seed)  # and send none of it back


def train_one(args, name, settings):
    with contextlib.redirect_stdout(io.StringIO()):  # the stages are cached, and said so once
        prepared = prepare(args, settings["seed"])
    offline_rl(args, settings, args.out / name, *prepared, title=f"{name}  ")


def train_together(args, todo, jobs):
    """Train runs in processes of one thread each. One that fails stops no other; the first error is raised last."""
    errors = {}  # by seed, for its stages, or by run

    def finished(futures):
        for future in as_completed(futures):
            if error := future.exception():
                errors[futures[future]] = error
                print(f"failed: {futures[future]}: {error}")
            yield futures[future]

    print(f"{jobs} runs at once, one thread each")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker) as pool:
        handler = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # as the workers inherit it: Ctrl-C is the parent's, who ends them
        pool.submit(int)  # starts them
        signal.signal(signal.SIGINT, handler)
        try:
            seeds = {settings["seed"] for settings in todo.values()}
            if len(seeds) == 1:
                prepare(args, *seeds)  # here, on all threads
            else:
                list(finished({pool.submit(cache_stages, args, seed): f"seed {seed}" for seed in seeds}))
            todo = {name: settings for name, settings in todo.items() if f"seed {settings['seed']}" not in errors}
            began = time.time()
            runs = finished({pool.submit(train_one, args, name, settings): name for name, settings in todo.items()})
            for done, name in enumerate(runs, start=1):
                turns, turns_done = math.ceil(len(todo) / jobs), math.ceil(done / jobs)
                left = (time.time() - began) / turns_done * (turns - turns_done) / 60
                print(f"\n{args.out / name}   {done} of {len(todo)} runs, about {left:.0f} min left")
                if name not in errors:
                    print((args.out / name / "samples.txt").read_text())
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    if errors:
        raise next(iter(errors.values()))


def main(args):
    """Every run that the flags ask for, seed by seed, then their summary and figures. Raises UserError, NonFiniteError."""
    began = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = run_settings(args)
    finished = [name for name in runs if is_finished(args.out / name) and not args.force]
    for name in finished:
        print(f"already finished: {args.out / name}   (--force runs it anew)")
    todo = {name: settings for name, settings in runs.items() if name not in finished}
    # from all runs, so that the last ones of an interrupted command have the threads that they would have had
    jobs = min(args.jobs or (torch.get_num_threads() if args.device == "cpu" else 1), len(runs))
    if jobs > 1 and todo:
        train_together(args, todo, jobs)
    else:
        for seed, names in itertools.groupby(todo, key=lambda name: todo[name]["seed"]):
            prepared = prepare(args, seed)
            for name in names:
                print(f"\noffline RL    {args.out / name}")
                offline_rl(args, todo[name], args.out / name, *prepared)
                print((args.out / name / "samples.txt").read_text())
    groups = plots.read_runs([args.out / name for name in runs])
    print(plots.summary(groups))
    plots.draw_figures(groups, args.out / "figures")
    minutes, seconds = divmod(int(time.time() - began), 60)
    print(f"finished in   {minutes} min {seconds} s")


def run(argv=None):
    """The command: parse, train, and turn what goes wrong into one line and an exit code."""
    args = parse_args(argv)
    try:
        main(args)
    except KeyboardInterrupt:
        kept = f"finished stages and runs, and the weights and log of the last evaluation, are kept in {args.out}"
        print(f"interrupted: {kept}; the same command reuses what is finished", file=sys.stderr)
        sys.exit(130)
    except (UserError, NonFiniteError, OSError, BrokenProcessPool) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NonFiniteError) else 2)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # each line at once, into a pipe or a file too
    run()
