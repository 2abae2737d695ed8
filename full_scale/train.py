"""Offline RL of a published checkpoint on rollouts, by the toy's losses: on one GPU, or on several behind torchrun.

    python -m full_scale.train --init Qwen/Qwen2.5-Math-1.5B --data rollouts.jsonl --loss fpa --lam 2
    python -m full_scale.train --init Qwen/Qwen2.5-Math-1.5B --data rollouts.jsonl --loss off_rl fpa --lr 1e-6 1e-5 --seed 0 1 2
    torchrun --nproc-per-node 8 -m full_scale.train --init Qwen/Qwen2.5-Math-7B --data rollouts.jsonl

Several values of a flag are as many runs, one after another. FSDP2 shards weights, gradients and optimizer over the GPUs, all
of them in fp32. The reference policy costs no second model and one pass for all runs (reference.py), and no (B, T, V) tensor
exists (chunked.py). log.csv has the toy's columns; exam.py measures the accuracies where --eval-problems is given. Left out:
losses that sample at every step, and packing of several rows into one sequence.
"""

import argparse
import collections
import gc
import itertools
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from losses import HYPERPARAMETERS, LOSSES, future_lam, objective
from plumbing.batches import batch_order, draw_order
from plumbing.files import (
    Interrupted,
    NonFiniteError,
    UserError,
    digest,
    locked_runs,
    one_line,
    printable_path,
    read_json,
    remove_leftovers,
    write_json,
)
from plumbing.flags import (
    NO_DEFAULT,
    add_method_flags,
    check_method_flags,
    check_rows,
    command_line,
    count,
    count_up_to,
    learning_rate,
    method_words,
    methods,
    natural,
    reinterpreted,
)
from plumbing.keeper import Keeper, adamw, interruptible, warmup_cosine
from plumbing.log import FORMAT, environment, monitored_columns

from . import gguf_file
from .data import batch_of, first_date, micro_batches, pack, read_data
from .exam import MOST_SAMPLES, Exam
from .load_hf import checkpoint_key, save_pretrained
from .log import Log, Steps
from .policy import build, completion_hidden, head_of, logp_sums
from .processes import by_first, is_first, say, start_processes, stopped, summed, summed_by_name
from .prompts import ChatTokenizer
from .published import checkpoint_name, fetch
from .reference import Reference
from .rollouts import beside_of
from .store import ShardedStore

FLAGS = {name: flag for name, flag in HYPERPARAMETERS.items() if name != "dapo"}  # GRPO's, which samples at every step
MONITORED = 32  # correct, and as many incorrect, rows whose log-probabilities are logged


# --- one step


def training_step(model, optimizer, data, reference, rows, run, size):
    """One optimizer step on some rows, `size` at once, none where it is not finite -> its numbers for the log.

    The numbers are the same in every process.
    """
    batches, sums = micro_batches(data, rows, size, LOSSES[run.loss].pairs), collections.Counter()
    z0 = kto_z0(model, data, reference, batches) if "z0" in LOSSES[run.loss].inputs else None
    optimizer.zero_grad()
    for some in batches:
        b = batch_of(data, some, reference.device)
        b.z0 = z0
        b.logp_sum, b.future_logp_sum = score(model, data, reference, some, future_lam(run))
        b.logratio = b.logp_sum - reference.logp_sum[some].to(reference.device)
        loss, coefficient = objective(b, run)
        (loss / len(batches)).backward()  # FSDP2 takes the mean over processes
        sums.update(loss=loss.detach() / len(batches) / dist.get_world_size(), **batch_numbers(b, coefficient))
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    sums = {name: value.item() for name, value in summed_by_name(sums).items()}
    numbers = {"loss": sums["loss"], "grad_norm": grad_norm.item()}
    numbers |= {f"coefficient_{group}": sums[f"weight_{group}"] / sums[f"rows_{group}"] for group in ("correct", "incorrect")}
    if math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"]):
        optimizer.step()
    return numbers | {name: sums[name] for name in ("below_0.2_pi", "below_0.2_pihat", "tokens_trained")}


def score(model, data, reference, rows, lam=0.0, prompts=None):
    """logp_sum (B,) of some rows, after their own prompts or those of other rows, under the present and the future policy."""
    tokens, mask = pack(data, rows, reference.device, prompts)
    hidden, targets = completion_hidden(model, tokens, mask)
    future = (reference.hidden(rows, tokens, mask), reference.head, lam) if lam else ()
    return logp_sums(hidden, head_of(model), targets, mask, *future)


@torch.no_grad()
def kto_z0(model, data, reference, batches):
    """KTO's z0 over all of a step's rows: the mean log-ratio, at least 0, after prompts of other problems."""
    total = torch.zeros(2, device=reference.device)
    for rows in batches:
        logp_sum, _ = score(model, data, reference, rows, prompts=data.other_prompt[rows])
        logratio = logp_sum - reference.mismatched_logp_sum[rows].to(reference.device)
        total += torch.stack([logratio.sum(), torch.tensor(float(len(rows)), device=reference.device)])
    total = summed(total)
    return (total[0] / total[1]).clamp(min=0)


def batch_numbers(b, coefficient):
    """What the log needs of a micro-batch, as sums; a weight is the coefficient of grad logp_mean."""
    weight, wrong = coefficient * b.length, b.reward < 0
    below = [(wrong & ((logp_sum.detach() / b.length).exp() < 0.2)).sum() for logp_sum in (b.logp_sum, b.future_logp_sum)]
    numbers = {"weight_correct": weight[~wrong].sum(), "weight_incorrect": weight[wrong].sum()}
    numbers |= {"rows_correct": (~wrong).sum(), "rows_incorrect": wrong.sum()}
    return numbers | dict(zip(("below_0.2_pi", "below_0.2_pihat"), below)) | {"tokens_trained": b.length.sum()}


@torch.no_grad()
def monitor(model, data, reference, rows, run, size):
    """The toy's log-ratio and probability columns, over the monitored correct and incorrect rows."""
    names = ("logratio", "pi", "pihat")
    values = torch.zeros(1 + len(names), len(data.reward), device=reference.device)  # how often a row came, and sums over these
    for some in micro_batches(data, rows, size):
        b = batch_of(data, some, reference.device)
        logp_sum, future_logp_sum = score(model, data, reference, some, future_lam(run))
        ratio = logp_sum - reference.logp_sum[some].to(reference.device)
        measured = [torch.ones_like(ratio), ratio, (logp_sum / b.length).exp(), (future_logp_sum / b.length).exp()]
        values.index_add_(1, some.to(reference.device), torch.stack(measured))
    model.reshard()
    counts, *values = summed(values).cpu()
    seen = counts > 0
    return monitored_columns({name: (value / counts)[seen] for name, value in zip(names, values)}, data.reward[seen])


# --- one run


def run_settings(args, data, folder, exam):
    """{a run's name: its config.json but for what is measured}. Checkpoint and data are named by content, not by place."""
    name, prompts = checkpoint_name(args.init), data.prompt_length
    problems = sorted({tuple(ids[:start].tolist()) for ids, start in zip(data.tokens, prompts.tolist())})
    key = by_first(lambda: checkpoint_key(folder))
    shared = {"format": FORMAT, "init": name, "checkpoint": key, "problems": digest(problems)}
    shared |= {"prompts": len(problems), "rows": len(data.reward), "rollouts": round(len(data.reward) / len(problems))}
    names = ("steps", "batch_size", "eval_every", "warmup", "max_length", "precision")
    shared |= {"monitored": MONITORED, **{name: getattr(args, name) for name in names}, **(exam.settings if exam else {})}
    runs = {}
    for method, lr, seed in itertools.product(methods(args, LOSSES, FLAGS), args.lr, args.seed):
        settings = {**shared, "lr": lr, "seed": seed, **method}
        words = [Path(name).name, *method_words(method, FLAGS), f"steps{args.steps}", f"lr{lr:g}", f"seed{seed}"]
        runs["-".join([*words, digest([settings, data.key])])] = settings
    return runs


def train(args, mesh):
    """The command: every run that is not finished. Raises UserError, and what `fit` raises.

    A loss that is not finite ends its run and no other; it is raised last.
    """
    for line in reinterpreted(args, LOSSES, FLAGS):
        say(line)
    folder, files = by_first(lambda: (fetch(args.init), gguf_file.files))
    gguf_file.files.update(files)  # of the first process, which alone unpacks a .gguf file
    tokenizer = ChatTokenizer(folder)
    tokenizer.use_template({}, by_first(lambda: first_date(tokenizer, args.out)))
    data = read_data(args, tokenizer, mismatched=any("z0" in LOSSES[name].inputs for name in args.loss))
    exam = Exam(args, folder, data) if args.eval_problems else None
    runs = run_settings(args, data, folder, exam)
    warn_of_others(args, next(iter(runs.values()))["checkpoint"], len(data.reward))
    finished = by_first(lambda: [name for name in runs if is_finished(args.out / name, args)])
    for name in finished:
        say(f"already finished: {args.out / name}")
        shutil.rmtree(args.out / name / "checkpoint", ignore_errors=True)  # left by an end just after the result was written
    todo = {name: SimpleNamespace(**settings) for name, settings in runs.items() if name not in finished}
    for run in todo.values():
        rows_of(run, data)  # which refuses what has no pairs, before anything is trained
    with locked_runs(args.out, todo if is_first() else ()):
        train_all(args, todo, data, folder, exam, mesh)


def warn_of_others(args, checkpoint, rows):
    """Print a line where the file beside the rollouts tells of another checkpoint, which is no reference, or of more rows."""
    path = beside_of(args.data)
    made = by_first(lambda: read_json(path) if path.exists() else {})
    if made.get("checkpoint", checkpoint) != checkpoint:
        say(f"warning: {args.data} was sampled by another checkpoint than {args.init}, as {path} says")
    told = made.get("rows")
    if isinstance(told, int) and rows < told:
        say(f"warning: {rows:,} of the {told:,} rows that {path} tells of are used; others are missing or left out")


def is_finished(run_folder, args):
    """Whether a run's last file is there: its model, or, without --save-model, its whole log."""
    log, whole = run_folder / "log.csv", (run_folder / "model" / "config.json").exists()
    return whole or (not args.save_model and log.exists() and f"\n{args.steps}," in log.read_text())


def train_all(args, todo, data, folder, exam, mesh):
    """Train the runs of `todo`, {name: settings}, one after another, beside one reference. Raises what `fit` raises."""
    reference, error = None, None
    for name, run in todo.items():
        model = build(args, folder, mesh)
        if reference is None:
            reference = Reference(args, todo.values(), model, data, f"{run.checkpoint} {data.key}", mesh)
        try:
            fit(args, run, data, reference, model, args.out / name, exam)
        except NonFiniteError as found:
            say(f"failed: {args.out / name}: {found}")
            error = error or found.with_traceback(None)  # whose frames would keep the model
        del model
        gc.collect()  # a sharded model refers to itself, and the next one needs its memory
    if error:
        raise error


def rows_of(run, data):
    """Each step's rows and their problem ids. Raises UserError."""
    return draw_order(run, data.reward, data.problem_ids, 0, pairs=LOSSES[run.loss].pairs, online=False)


def fit(args, run, data, reference, model, run_folder, exam):
    """Train a model, which is the checkpoint, or go on where its run was interrupted, and write the result.

    Raises UserError, NonFiniteError, and Interrupted once a checkpoint of the last step is saved.
    """
    order, ids = rows_of(run, data)
    at_once = args.micro_batch * dist.get_world_size()
    monitored = batch_order(data.reward, 1, math.ceil(2 * MONITORED / at_once) * at_once, run.seed)[0]
    optimizer = adamw(model.parameters(), run.lr)
    run_folder.mkdir(parents=True, exist_ok=True)
    say(f"training      {run_folder}")
    if is_first():
        write_config(run_folder, vars(run), data, reference)

    def measure(step, model):
        columns = monitor(model, data, reference, monitored, run, args.micro_batch)
        return columns | (exam(step, model, run, reference.device) if exam else {})

    steps = Steps("", args.skip_nonfinite, ids, f"; the last checkpoint, if there was one, is kept in {run_folder}")
    log = Log(run_folder, measure, args.steps, args.eval_every, steps, sampled=int(data.length.sum()))
    store = ShardedStore(run_folder, model, optimizer)
    words = {"total": args.steps, "every": args.save_every, "resume": args.resume, "desc": run_folder.name}
    words |= {"stopping": lambda caught: stopped(caught, reference.device), "say": say, "bar": is_first()}
    with Keeper(store, {"log": log}, **words) as keeper:
        for step in keeper.steps():
            log.look(step, model)
            with log.timed():
                for group in optimizer.param_groups:
                    group["lr"] = run.lr * warmup_cosine(step, args.warmup, args.steps)
                numbers = training_step(model, optimizer, data, reference, order[step], run, args.micro_batch)
            log.add(**numbers)
        if keeper.first < args.steps:  # so that a failure to write the result costs no step
            store.save({"step": args.steps, "log": log.state()})
        log.look(args.steps, model)
        if args.save_model:
            save_pretrained(model, run_folder / "model", torch.bfloat16 if args.precision == "bf16" else torch.float32)
            say(f"checkpoint    {run_folder / 'model'}")


def write_config(run_folder, settings, data, reference):
    """config.json: the settings, what is measured, and the machine."""
    share, seconds = (data.reward > 0).float().mean().item(), reference.seconds.item()
    measured = {"data": data.key, "sampling_seconds": None, "reference_seconds": seconds, "share_correct": share}
    machine = {**environment(reference.device), "processes": dist.get_world_size()}
    write_json(run_folder / "config.json", {**settings, "measured": measured, "environment": machine})


# --- the command


def add_flags(parser):
    """All flags but the method's."""
    add = parser.add_argument_group("checkpoint and data").add_argument
    add("--init", required=True, metavar="NAME", help="hub name, folder or .gguf file of the checkpoint, or a Python package "
        f"that holds one .gguf file; it is the reference policy too{NO_DEFAULT}")  # fmt: skip
    add("--data", required=True, type=printable_path, metavar="FILE", help="rollouts of it, JSON lines: prompt, completion, "
        f"label, or prompt, chosen, rejected{NO_DEFAULT}")  # fmt: skip
    add("--max-length", default=2560, type=count, metavar="N", help="tokens; a longer row is a bad line")
    add("--skip-bad-lines", action="store_true", help="go on without the bad lines of rollouts and problems")
    add = parser.add_argument_group("training").add_argument
    add("--steps", default=500, type=count, metavar="N", help="optimizer steps")
    add("--lr", nargs="+", default=[1e-6], type=learning_rate, metavar="X", help="AdamW's highest learning rate")
    add("--warmup", default=10, type=natural, metavar="N", help="steps of linear warm-up, before a cosine to 0")
    add("--batch-size", default=64, type=count, metavar="N", help="rows a step over all GPUs, half of them correct")
    add("--micro-batch", default=2, type=count, metavar="N", help="rows that a GPU takes at once; gradients accumulate")
    add("--seed", nargs="+", default=[0], type=natural, metavar="N", help="of the rows' order and of evaluations")
    add("--skip-nonfinite", default=0, type=natural, metavar="N", help="leave out the updates of at most N steps whose loss or "
        "gradient is not finite; one more stops the run")  # fmt: skip
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", default=10, type=count, metavar="N", help="steps between rows of log.csv")
    add("--eval-problems", type=printable_path, metavar="FILE", help="held-out problems, asked as the rollouts of --data were; "
        f"without them log.csv has no accuracies{NO_DEFAULT}")  # fmt: skip
    add("--eval-samples", default=8, type=count_up_to(MOST_SAMPLES), metavar="N", help="samples of each at temperature 1; a "
        "quarter as many are drawn at 0.7, and one greedily")  # fmt: skip
    add = parser.add_argument_group("machine").add_argument
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of the products; weights, gradients and moments "
        "are fp32. auto: bf16 on GPUs")  # fmt: skip
    add("--reference", default="cached", choices=["cached", "live"], help="where the reference's hidden states come from: the "
        "disk, or a second model in memory")  # fmt: skip
    add("--recompute", default=True, action=argparse.BooleanOptionalAction, help="activations in backward: less memory")
    add("--save-every", default=100, type=count, metavar="N", help="steps between checkpoints")
    add("--save-model", default=True, action=argparse.BooleanOptionalAction, help="write the trained checkpoint; without it "
        "a run keeps only its log")  # fmt: skip
    add("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on with an interrupted run from its last "
        "checkpoint, or begin it anew")  # fmt: skip
    add("--out", default="runs", type=printable_path, metavar="FOLDER", help="folder of the runs and of the reference's cache")


def parse_args(argv=None):
    """The flags, every one checked before any process group is there; a wrong one is one line and exit code 2."""
    description = "Offline RL of a published checkpoint on rollouts; behind torchrun, on several GPUs."
    epilog = "Flags shown with several values take several, and then the runs are their product."
    parser = command_line(description, prog="python -m full_scale.train", epilog=epilog)
    add_method_flags(parser, LOSSES, FLAGS, ["fpa"])
    add_flags(parser)
    args = parser.parse_args(argv)
    check_rows(parser, args)
    check_method_flags(parser, args, LOSSES, FLAGS)
    if online := [name for name in args.loss if LOSSES[name].online]:
        parser.error(f"argument --loss: {online[0]} samples at every step, which only the toy does")
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
        if is_first():
            remove_leftovers(args.out)
        with interruptible():
            train(args, mesh)
    except BrokenPipeError:  # output that is cut off, as by head, is no error; but other processes end only at an exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0 if dist.get_world_size() == 1 else 128 + signal.SIGPIPE
    except (UserError, NonFiniteError, OSError, torch.OutOfMemoryError) as error:
        code = 3 if isinstance(error, NonFiniteError) else 2
        if is_first() or not isinstance(error, (UserError, NonFiniteError)):  # these are the same in every process
            print(f"python -m full_scale.train: error: {one_line(error, args.out)}", file=sys.stderr, flush=True)
    except Interrupted as signalled:
        code = 128 + signalled.args[0]
        if is_first():
            again = "goes on from there" if args.resume else "begins its run anew"
            kept = f"what is saved in {args.out} stays; the same command {again}"
            print(f"interrupted: {kept}", file=sys.stderr, flush=True)
    if dist.get_world_size() > 1:  # a usual exit waits for the others after an error, and gloo's threads sometimes abort in it
        if not code:
            dist.barrier()
        sys.stdout.flush()
        for folder in gguf_file.folders:
            folder.cleanup()
        os._exit(code)
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    run()
