"""Train a small GPT on arithmetic with errors, then improve it by reinforcement learning, offline on its rollouts or online.

    python train.py                                     # Off-RL and FPA, side by side
    python train.py --loss fpa --lam 2                  # one run
    python train.py --loss off_rl fpa --seed 0 1 2 3 4  # several values of a flag: their product

Stages: base model -> rollouts -> reference logits (toy_math/stages.py, cached under --out) -> training with evaluations.
full_scale/ trains published checkpoints, as the paper does. This file does not.
"""

import contextlib
import copy
import itertools
import runpy
import sys
import time
from types import SimpleNamespace

import torch
from torch.nn.utils import clip_grad_norm_

from losses import HYPERPARAMETERS, LOSSES, future_lam, future_logits, objective, token_logps
from plumbing import flags, jobs
from plumbing.batches import batch_order, draw_order, seeded
from plumbing.files import UserError, digest, locked_runs, remove_leftovers, write_tensors, write_text
from plumbing.keeper import Keeper, OneFile, Random, adamw, begin
from plumbing.log import Log, Steps, environment, monitored_columns, step_numbers
from study.results import is_finished, read_runs, summary
from toy_math.rollouts import evaluate, sample_groups, samples_text
from toy_math.stages import add_task_flags, draw_splits, evaluation_settings, prepare, settle_task_flags, stage_settings

MONITORED = 128  # training rollouts of each kind whose log-probabilities are logged


# --- the method


def add_logps(model, b, lam=0.0):
    """Add to a batch of answers what the losses need of the policy: logps (B, T-1), logp_sum, future_logp_sum, logratio (B,).

    b holds inputs (B, L), prompts and answers; start, the position that predicts an answer's first token; tokens (B, T), the
    inputs from there on; mask (B, T), True on the answer; ref_logits (B, T, V) and ref_logp_sum (B,) of the base model. What
    else the losses take, such as reward and length (B,), stays as it is.
    """
    logits = model(b.inputs, b.start)  # (B, T, V), what the policy thinks of these answers now
    b.logps = token_logps(logits, b.tokens, b.mask)  # (B, T-1)
    b.logp_sum = b.logps.sum(-1)
    b.future_logp_sum = b.logp_sum.detach()
    if lam > 0:  # and the future policy, whose logits are h + lam (h - h_ref)
        future = future_logits(logits, b.ref_logits, lam)
        b.future_logp_sum = token_logps(future, b.tokens, b.mask).sum(-1)
    b.logratio = b.logp_sum - b.ref_logp_sum


def train_policy(args, settings, folder, world, title=""):
    """Train one policy with one loss, from its last checkpoint if it was interrupted. The method is between the dashed lines.

    Writes config.json, log.csv, model.safetensors and, last, samples.txt; with --diagnostics study/diagnostics.py's tables too.
    `title` opens each line that it prints. Raises UserError, NonFiniteError, and Interrupted once a checkpoint is saved.
    """
    run = SimpleNamespace(**{"lam": 0.0, "schedule": "constant", **settings})
    online, rollouts = LOSSES[run.loss].online, world.rollouts
    model = copy.deepcopy(world.base)
    optimizer = adamw(model.parameters(), run.lr)
    # each step's rollouts (online: problems), fixed before the first step: half correct, pairs where the loss wants them
    order, ids = draw_order(
        run, rollouts.reward, rollouts.problem_ids, len(world.problems), pairs=LOSSES[run.loss].pairs, online=online
    )
    generator = seeded(args.device, run.seed, "online")
    observer = None
    if args.diagnostics:
        from study.diagnostics import Observer

        observer = Observer(model, rollouts, run, folder, add_logps)
    # from here to the loop: the folder, the log and the checkpoints
    begin(folder, {**settings, "measured": world.measured, "environment": environment(args.device)}, args.resume)
    exam = Exam(run, world)
    spent = {} if online else world.spent()  # seconds and tokens that sampling the rollouts took
    kept = f"; the last checkpoint, if there was one, is kept in {folder}"
    steps = Steps(what="", tolerated=args.skip_nonfinite, ids=ids, kept=kept)
    log = Log(folder, exam, run.steps, run.eval_every, steps, observer, title, **spent)

    parts = {"log": log, "random": Random(generator)}
    same = {"data": world.key, "diagnostics": args.diagnostics}  # a checkpoint in which these differ is not taken up
    store = OneFile(folder / "checkpoint.safetensors", model, optimizer, args.device, **same)
    with Keeper(store, parts, total=run.steps, every=args.save_every, desc=folder.name, title=title) as keeper:
        for step in keeper.steps():  # from the last checkpoint on
            log.look(step, model)  # evaluates every --eval-every steps
            # ------------------------------------------------------------------
            if online:  # fresh samples of the present policy
                b = sample_groups(model, [world.problems[i] for i in order[step].tolist()], run, generator)
            else:  # fixed rollouts of the base model, with its logits
                b = rollouts[order[step]]
            if not len(b.reward):  # DAPO has dropped every group
                log.add(**step_numbers(b))
                continue
            add_logps(model, b, future_lam(run))
            if "z0" in LOSSES[run.loss].inputs:  # KTO
                b.z0 = kto_z0(model, world.base, b)
            if run.schedule == "linear":
                optimizer.param_groups[0]["lr"] = run.lr * (1 - step / run.steps)
            loss, coefficient = objective(b, run)  # --loss fpa: the gradient of losses.fpa_loss
            optimizer.zero_grad()
            loss.backward()
            grad_norm = clip_grad_norm_(model.parameters(), 1.0)
            if not args.skip_nonfinite or torch.isfinite(loss + grad_norm):  # isfinite would wait for a GPU
                optimizer.step()  # AdamW's
            # ------------------------------------------------------------------
            log.add(**step_numbers(b, loss, grad_norm, coefficient))
        log.look(run.steps, model)
        write_tensors(folder / "model.safetensors", model.state_dict())
        write_text(folder / "samples.txt", samples_text(exam.samples))


@torch.no_grad()
def kto_z0(model, reference, b):
    """KTO's z0: the mean log-ratio, at least 0, of each row's completion after the previous row's prompt."""
    mismatched = b.inputs.clone()
    mismatched[:, : b.start + 1] = b.inputs[:, : b.start + 1].roll(1, dims=0)
    present, ref = (token_logps(policy(mismatched, b.start), b.tokens, b.mask).sum(-1) for policy in (model, reference))
    return (present - ref).mean().clamp(min=0)


# --- what is logged beside each step


class Exam:
    """What an evaluation measures: accuracies on validation problems, and log-ratios of training rollouts that are monitored.

    The first and the last evaluation measure the accuracies on test problems too. `samples` are the last evaluation's answers
    to them.
    """

    def __init__(self, run, world):
        self.run, self.world, self.samples = run, world, []
        reward = world.rollouts.reward
        # the first MONITORED rows of each kind in the order of training
        self.monitored = batch_order(reward, 1, 2 * MONITORED, run.seed)[0].unique().to(reward.device)

    @torch.no_grad()
    def __call__(self, step, model):
        """Columns of log.csv."""
        run, b = self.run, self.world.rollouts[self.monitored]
        generator = seeded(b.reward.device, run.seed, "evaluation", step)
        columns, _ = evaluate(model, self.world.validation, run.eval_samples, generator)
        if step in (0, run.steps):
            test, self.samples = evaluate(model, self.world.test, run.eval_samples, generator)
            columns |= {f"test_{name}": value for name, value in test.items() if name != "malformed"}
        add_logps(model, b, future_lam(run))
        values = {"logratio": b.logratio, "pi": (b.logp_sum / b.length).exp(), "pihat": (b.future_logp_sum / b.length).exp()}
        return columns | monitored_columns(values, b.reward)


# --- the product of runs


def run_settings(args):
    """Settings of every run that the flags ask for, by folder name; a run's name is built from the values that it uses."""
    runs, methods = {}, flags.methods(args, LOSSES, HYPERPARAMETERS)
    for seed, prompts, lr, schedule, method in itertools.product(args.seed, args.prompts, args.lr, args.schedule, methods):
        _, settings = stage_settings(args, seed, prompts)
        settings |= {"lr": lr, "steps": args.steps, "batch_size": args.batch_size}
        settings |= {**evaluation_settings(args), "monitored": MONITORED, **method}
        words, falling = flags.method_words(method, HYPERPARAMETERS), schedule == "linear"
        settings |= {"schedule": schedule} if falling else {}
        words += [f"prompts{prompts}", f"steps{args.steps}", f"lr{lr:g}{'-linear' * falling}", f"seed{seed}", digest(settings)]
        runs["-".join(words)] = settings
    return runs


def cache_stages(args, seed, todo):
    for prompts in dict.fromkeys(settings["prompts"] for settings in todo.values() if settings["seed"] == seed):
        prepare(args, seed, prompts)


def train_one(args, name, settings):
    with contextlib.redirect_stdout(None):  # the stages are cached, and said so once
        world = prepare(args, settings["seed"], settings["prompts"])
    train_policy(args, settings, args.out / name, world, title=f"{name}  ")


def show_samples(folder):
    print((folder / "samples.txt").read_text())


def main(args, runs=None):
    """Every run that the flags ask for, or those of `runs` alone, seed by seed, then their summary and figures.

    Raises UserError, NonFiniteError, Interrupted.
    """
    began = time.time()
    (args.out / "cache").mkdir(parents=True, exist_ok=True)
    remove_leftovers(args.out)
    runs = run_settings(args) if runs is None else runs
    finished = [name for name in runs if is_finished(args.out / name, args.diagnostics) and not args.force]
    for name in finished:
        print(f"already finished: {args.out / name}   (--force runs it anew)")
    todo = {name: settings for name, settings in runs.items() if name not in finished}
    # of all runs, finished ones too, so that a resumed command gives each run as many threads as before
    count = min(args.jobs or (torch.get_num_threads() if args.device == "cpu" else 1), len(runs))
    with locked_runs(args.out, todo):
        if count > 1 and todo:
            stages = {f"seed {seed}": (args, seed, todo) for seed in dict.fromkeys(s["seed"] for s in todo.values())}
            runs_of = {args.out / name: (f"seed {s['seed']}", (args, name, s)) for name, s in todo.items()}
            jobs.side_by_side(count, cache_stages, stages, train_one, runs_of, after=show_samples)
        else:
            for (seed, prompts), names in itertools.groupby(todo, key=lambda x: (todo[x]["seed"], todo[x]["prompts"])):
                world = prepare(args, seed, prompts)
                for name in names:
                    print(f"\ntraining      {args.out / name}")
                    train_policy(args, todo[name], args.out / name, world)
                    show_samples(args.out / name)
    report([args.out / name for name in runs], args.out)
    minutes, seconds = divmod(int(time.time() - began), 60)
    print(f"finished in   {minutes} min {seconds} s")


def report(folders, out):
    """Print the runs' summary and draw their figures. Raises UserError where runs are gone or damaged."""
    import plots  # after training: matplotlib takes a second to load

    trained = read_runs(folders)
    if len(trained) < len(folders):
        raise UserError(f"{out}: {len(folders) - len(trained)} of {len(folders)} runs are gone or damaged, as said above")
    print(summary(trained))
    plots.draw_figures(trained, out / "figures")


# --- the command


def parse_args(argv=None):
    """The flags, every one checked before anything is written; a wrong one is one line on stderr and exit code 2."""
    parser = flags.command_line(
        "Offline RL on synthetic arithmetic: Off-RL, Future Policy Approximation (FPA) and their neighbours.",
        prog="train.py",
        epilog="Flags shown with several values take several, and then the runs are their product.",
    )
    flags.add_method_flags(parser, LOSSES, HYPERPARAMETERS, default=["off_rl", "fpa"])
    flags.add_training_flags(parser)
    add_task_flags(parser)
    flags.add_machine_flags(parser)
    with_form = {name: row for name, row in LOSSES.items() if row.has_fpa_form or row.form_of}
    parser.add_argument("--explain", type=flags.one_of(with_form), metavar="NAME", help="no run: show what one step of this "
        f"loss and one of its FPA form do to a pair of rollouts, token by token{flags.NO_DEFAULT}")  # fmt: skip
    args = parser.parse_args(argv)
    if args.explain:
        if args.loss is not parser.get_default("loss"):
            parser.error(f"argument --loss: --explain {args.explain} names the loss already; leave --loss out")
        args.loss, args.lam = [args.explain], args.lam or [2.0]
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Conflicts between flags, and too few problems of a length."""
    if args.batch_size % 2:
        parser.error(f"argument --batch-size: must be even, half correct and half incorrect, not {args.batch_size}")
    flags.check_rows(parser, args)
    flags.check_method_flags(parser, args, LOSSES, HYPERPARAMETERS)
    flags.check_groups(parser, args, LOSSES)
    settle_task_flags(parser, args)
    try:  # too few problems of this length are noticed before anything is trained
        for seed, prompts in itertools.product(args.seed, args.prompts):
            draw_splits(args, seed, prompts)
    except ValueError as error:
        parser.error(f"argument --ops or --prompts: {error}")
    flags.check_machine_flags(parser, args)


def run(argv=None):
    """The command: parse, train, and turn what goes wrong into one line and an exit code."""
    kept = "finished stages and runs, and checkpoints of the others, are kept; the same command goes on from there"
    with flags.command("train.py", kept):
        args = parse_args(argv)
    if args.force or not args.resume:
        kept = kept.replace("same command", "same command without --force and --no-resume")
    if args.explain:  # study/explain.py takes over
        sys.argv[1:] = sys.argv[1:] if argv is None else argv
        return runpy.run_module("study.explain", run_name="__main__")
    with flags.command("train.py", kept, args.out):
        for line in flags.reinterpreted(args, LOSSES, HYPERPARAMETERS):
            print(line)
        main(args)


if __name__ == "__main__":
    run()
