"""Train a small GPT on slipping arithmetic, then improve it by reinforcement learning, offline on its own rollouts or online.

    python train.py --loss fpa --lam 2                  # one run
    python train.py --loss off_rl fpa --seed 0 1 2 3 4  # several values per flag: their product

Stages: base model -> rollouts -> reference logits (stages.py, cached under --out) -> training with periodic evaluation.
Left out against the paper: real checkpoints and benchmarks.
"""

import contextlib
import io
import itertools
import math
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm

import diagnostics
import jobs
import losses
import plots
import results
from files import (
    Interrupted,
    NonFiniteError,
    UserError,
    finishing_step,
    interruptible,
    load_checkpoint,
    locked,
    one_line,
    remove_leftovers,
    save_checkpoint,
    write_csv,
    write_json,
    write_tensors,
    write_text,
)
from losses import future_logits, token_logps
from model import GPT
from options import EVAL_SAMPLES, MONITORED, parse_args, run_settings
from stages import CONFIG, adamw, completion_logps, prepare, progress, seeded
from toy_math.rollouts import evaluate, pack, rollout_rows, sample, samples_text

# Each takes a batch b of rows (tensors) and a run's settings s; grpo samples its own rows, in `grpo_step`.
LOSSES = {
    "off_rl": lambda b, s: losses.off_rl(b["logp_sum"], b["length"], b["reward"]),
    "fpa": lambda b, s: losses.off_rl(b["logp_sum"], b["length"], b["reward"]),
    "simper": lambda b, s: losses.simper(b["logp_sum"], b["length"]),
    "dpo": lambda b, s: losses.dpo(b["logratio"], s["beta"]),
    "rpo": lambda b, s: losses.rpo(b["logratio"], b["logp_sum"], b["length"], s["beta"], s["alpha"]),
    "kto": lambda b, s: losses.kto(b["logratio"], b["reward"], b["z0"], s["beta"]),
    "a_star_po": lambda b, s: losses.a_star_po(b["logratio"], b["reward"], b["value"], s["beta"]),
    "pessimistic": lambda b, s: losses.pessimistic(b["logratio"], b["reward"], b["mean_reward"], s["beta"], s["shift"]),
    "sft": lambda b, s: losses.sft(b["logp_sum"], b["length"], b["reward"]),
    "reinforce": lambda b, s: losses.reinforce(b["logp_sum"], b["length"], b["reward"]),
    "constant": lambda b, s: losses.constant(b["logp_sum"], b["length"], b["reward"], s["weight"]),
    "sharpened": lambda b, s: losses.sharpened(b["logp_sum"], b["length"], b["reward"], s["lam"]),
    "grpo": None,
}
PAIRED = ("simper", "dpo", "rpo")
COLUMNS = (
    "step loss grad_norm accuracy accuracy_greedy malformed logratio_correct logratio_incorrect pi_correct pi_incorrect "
    "pihat_correct pihat_incorrect coefficient_correct coefficient_incorrect below_0.2_pi below_0.2_pihat skipped seconds "
    "tokens_trained tokens_sampled"
).split()


# --- batches


def walk(rows, count, generator):
    """The first `count` of some rows in epochs, each shuffled anew."""
    epochs = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-count // len(rows)))]
    return torch.cat(epochs)[:count]


def batch_order(reward, steps, batch_size, seed):
    """Row numbers (steps, batch_size): half correct, half incorrect, each half walking through its own shuffled epochs."""
    halves = []
    for label in (True, False):
        rows, generator = ((reward.cpu() > 0) == label).nonzero()[:, 0], seeded("cpu", seed, "order", label)
        halves.append(walk(rows, steps * batch_size // 2, generator).view(steps, -1))
    return torch.cat(halves, dim=1)


def pair_order(reward, problem_ids, steps, batch_size, seed):
    """Row numbers (steps, batch_size): correct rows, then, in the same order, an incorrect one of each one's problem.

    The incorrect ones walk through shuffled epochs, and each has a correct one of its problem drawn for it. Raises UserError
    where no problem has both.
    """
    correct, ids, generator = {}, problem_ids.tolist(), seeded("cpu", seed, "pairs")
    for row in (reward > 0).nonzero()[:, 0].tolist():
        correct.setdefault(ids[row], []).append(row)
    paired = [row for row in (reward < 0).nonzero()[:, 0].tolist() if ids[row] in correct]
    if not paired:
        raise UserError(f"no pairs: none of the {len(reward)} rollouts is incorrect to a problem that another is correct to")
    incorrect = walk(torch.tensor(paired), steps * batch_size // 2, generator)
    draws = torch.rand(len(incorrect), generator=generator).tolist()
    partners = [correct[ids[row]] for row in incorrect.tolist()]
    partners = torch.tensor([rows[int(draw * len(rows))] for rows, draw in zip(partners, draws)])
    return torch.cat([partners.view(steps, -1), incorrect.view(steps, -1)], dim=1)


def problem_order(n_problems, steps, groups, seed):
    """Problem numbers (steps, groups) for grpo, in shuffled epochs."""
    return walk(torch.arange(n_problems), steps * groups, seeded("cpu", seed, "order")).view(steps, -1)


# --- one step


def trajectory_logps(model, data, rows, lam):
    """logp_sum (B,) of some rows under the present and the future policy."""
    tokens, mask, start = data["tokens"][rows], data["mask"][rows], data["start"]
    logits, logps = completion_logps(model, tokens, mask, start)
    if lam == 0:
        return logps.sum(-1), logps.sum(-1).detach()
    future = future_logits(logits, data["ref_logits"][rows], lam)
    return logps.sum(-1), token_logps(future, tokens[:, start:], mask[:, start:]).sum(-1)


@torch.no_grad()
def kto_z0(model, data, rows):
    """KTO's z0: the mean log-ratio, at least 0, of each row's completion after the previous row's prompt."""
    tokens, mask, start = data["tokens"][rows], data["mask"][rows], data["start"]
    tokens[:, : start + 1] = tokens[:, : start + 1].roll(1, dims=0)
    present, reference = (completion_logps(policy, tokens, mask, start)[1].sum(-1) for policy in (model, data["reference"]))
    return (present - reference).mean().clamp(min=0)


def objective(batch, future_logp_sum, settings):
    """The loss, a scalar, and its rows' coefficients (B,): as published, or the FPA form where the settings have a target."""
    loss, target = LOSSES[settings["loss"]], settings["target"]
    values, coefficient = loss(batch, settings)
    if target is None:
        return values.mean(), coefficient
    if settings["loss"] in ("constant", "sharpened"):  # the controls: another coefficient in the place of the future's
        present, future = LOSSES["off_rl"](batch, settings)[1], coefficient
    else:
        moved = future_logp_sum - batch["logp_sum"].detach()
        at_future = {**batch, "logp_sum": future_logp_sum, "logratio": batch["logratio"].detach() + moved}
        present, future = coefficient, loss(at_future, settings)[1]
    surrogate, coefficient = losses.fpa(batch["logp_sum"], batch["reward"], present, future, target)
    return surrogate.sum() / len(values), coefficient


def update(model, optimizer, loss, may_skip):
    """One optimizer step, none where it may be skipped and is not finite; returns the gradient's norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not may_skip or torch.isfinite(loss + grad_norm):  # a device waits here only where it may be skipped
        optimizer.step()
    return grad_norm


def statistics(loss, grad_norm, reward, weight, pi, pihat, tokens_trained, tokens_sampled):
    """A step's numbers for the log (8,); weight (B,) is the coefficient of grad logp_mean."""
    means = [weight[reward > 0].mean(), weight[reward < 0].mean()]
    below = [((reward < 0) & (policy < 0.2)).sum() for policy in (pi, pihat)]
    return torch.stack([loss.detach(), grad_norm, *means, *below, tokens_trained, tokens_sampled])


def training_step(model, optimizer, data, rows, settings, may_skip=False):
    """One offline step on some rows -> its `statistics`."""
    logp_sum, future_logp_sum = trajectory_logps(model, data, rows, settings["lam"])
    batch = {name: data[name][rows] for name in ("reward", "length", "value", "mean_reward")}
    batch |= {"logp_sum": logp_sum, "logratio": logp_sum - data["ref_logp_sum"][rows]}
    if settings["loss"] == "kto":
        batch["z0"] = kto_z0(model, data, rows)
    loss, coefficient = objective(batch, future_logp_sum, settings)
    grad_norm = update(model, optimizer, loss, may_skip)
    length = batch["length"]
    pi, pihat = ((value.detach() / length).exp() for value in (logp_sum, future_logp_sum))
    return statistics(loss, grad_norm, batch["reward"], coefficient * length, pi, pihat, length.sum(), torch.zeros_like(loss))


def grpo_step(model, optimizer, problems, settings, generator, may_skip=False):
    """One online step: sample a group for each problem from the present policy, verify, and update once -> `statistics`.

    One update a batch, so the ratio is 1 and its clipping never acts. With `dapo` the groups of one reward only are dropped,
    not sampled anew.
    """
    samples = rollout_rows(sample(model, problems, settings["rollouts"], 1.0, generator))
    tokens, mask = (x.to(generator.device) for x in pack(samples))
    reward = torch.tensor([1.0 if row["label"] else -1.0 for row in samples], device=generator.device)
    advantage, sampled = losses.group_advantage(reward, settings["rollouts"]), mask.sum()
    if settings["dapo"]:
        kept = advantage != 0
        tokens, mask, reward, advantage = tokens[kept], mask[kept], reward[kept], advantage[kept]
        if len(tokens) == 0:
            return torch.tensor([0, 0, math.nan, math.nan, 0, 0, 0, sampled], device=generator.device)
    _, logps = completion_logps(model, tokens, mask, len(samples[0]["prompt"]))
    mask = mask[:, len(samples[0]["prompt"]) :]
    loss = losses.grpo(logps, logps.detach(), advantage, mask, token_level=settings["dapo"]).mean()
    grad_norm = update(model, optimizer, loss, may_skip)
    pi = (logps.detach().sum(-1) / mask.sum(-1)).exp()
    return statistics(loss, grad_norm, reward, advantage.abs(), pi, pi, mask.sum(), sampled)


# --- one run


@torch.no_grad()
def monitor(model, data, rows, lam):
    """Log-ratio and probability columns, means over the monitored correct and incorrect training rollouts."""
    logp_sum, future_logp_sum = trajectory_logps(model, data, rows, lam)
    values = {
        "logratio": logp_sum - data["ref_logp_sum"][rows],
        "pi": (logp_sum / data["length"][rows]).exp(),
        "pihat": (future_logp_sum / data["length"][rows]).exp(),
    }
    groups = {"correct": data["reward"][rows] > 0, "incorrect": data["reward"][rows] < 0}
    return {f"{name}_{g}": value[members].mean().item() for name, value in values.items() for g, members in groups.items()}


def finite(stats):
    """Which steps' loss and gradient norm are numbers (steps,), from their statistics (steps, 8)."""
    return torch.isfinite(stats[:, :2]).all(dim=1)


def raise_if_not_finite(stats, problem_ids, tolerated, folder):
    """Name the first step whose loss or gradient is not finite, and its problems, where there are more than are tolerated."""
    bad = (~finite(stats)).nonzero()[:, 0].tolist()
    if len(bad) > tolerated:
        step = bad[tolerated]
        skipped = f"; {tolerated} such steps before it were skipped" if tolerated else ""
        raise NonFiniteError(
            f"step {step + 1}: loss {stats[step, 0]:g}, gradient norm {stats[step, 1]:g}; problem ids of its batch: "
            f"{problem_ids[step].unique().tolist()}{skipped}; the last checkpoint, if there was one, is kept in {folder}"
        )


def log_row(step, stats, since, columns, sampled_before):
    """A row of log.csv: columns measured now, and the statistics (step, 8) so far, means over the finite steps `since`."""
    interval = stats[since:]
    loss, grad_norm, coefficient_correct, coefficient_incorrect = interval[finite(interval), :4].nanmean(0).tolist()
    below_pi, below_pihat, trained, sampled = stats[:, 4:].double().sum(0).long().tolist()
    values = {"step": step, "loss": loss, "grad_norm": grad_norm, **columns}
    values |= {"coefficient_correct": coefficient_correct, "coefficient_incorrect": coefficient_incorrect}
    values |= {"below_0.2_pi": below_pi, "below_0.2_pihat": below_pihat}
    values |= {"skipped": (~finite(stats)).sum().item()}
    values |= {"tokens_trained": trained, "tokens_sampled": sampled_before + sampled}
    return {name: values[name] for name in COLUMNS}


def orders(settings, data, train_problems):
    """What each step is trained on (steps, …), row numbers, or problem numbers for grpo; and the problem ids of each step's."""
    loss, seed, steps, batch_size = (settings[key] for key in ("loss", "seed", "steps", "batch_size"))
    if loss == "grpo":
        order = problem_order(len(train_problems), steps, batch_size // settings["rollouts"], seed)
        return order, order
    if loss in PAIRED:
        order = pair_order(data["reward"], data["problem_ids"], steps, batch_size, seed)
    else:
        order = batch_order(data["reward"], steps, batch_size, seed)
    order = order.to(data["reward"].device)
    return order, data["problem_ids"][order]


def resume(args, checkpoint, model, optimizer, generator, data, steps):
    """Fill model, optimizer and generator from a checkpoint of the same data, if there is one.

    Returns what else it holds, or a beginning: the state, as JSON holds it, the statistics of each step (steps, 8), and
    diagnostics.py's snapshots. Raises UserError.
    """
    same = {"data": data["key"], "diagnostics": args.diagnostics}
    state = {"step": 0, "seconds": 0.0, "log": [], "tables": {}, "device": args.device, **same}
    stats, snapshots = torch.zeros(steps, 8, device=args.device), {}
    if saved := load_checkpoint(checkpoint, model, optimizer, **same):
        state, tensors = saved
        if state["device"] != args.device:
            raise UserError(f"{checkpoint}: of a run with --device {state['device']}; --no-resume begins anew")
        stats.copy_(tensors["stats"])
        generator.set_state(tensors["generator"])
        snapshots = {int(name.removeprefix("at.")): x.to(args.device) for name, x in tensors.items() if name.startswith("at.")}
    return state, stats, snapshots


def train_policy(args, settings, folder, base, data, train_problems, test_problems, title=""):
    """Train one policy with one loss, from its last checkpoint where it was interrupted.

    Writes config.json, log.csv, model.safetensors, samples.txt, and diagnostics.py's files; `title` opens each line that it
    prints. Raises UserError, NonFiniteError, and Interrupted once its checkpoint is saved.
    """
    lam, seed, steps = (settings[key] for key in ("lam", "seed", "steps"))
    reward, measured, online = data["reward"], data["measured"], settings["loss"] == "grpo"
    data = {**data, "reference": base}
    generator = seeded(args.device, seed, "online")
    order, problem_ids = orders(settings, data, train_problems)
    # the first rows of the rows' own order, so that they are fixed and among those trained on soonest
    monitored = batch_order(reward, 1, 2 * MONITORED, seed)[0].unique().to(args.device)
    model = GPT(CONFIG).to(args.device)
    model.load_state_dict(base.state_dict())
    optimizer = adamw(model, settings["lr"])
    if args.diagnostics:
        pairs = pair_order(reward, data["problem_ids"], 1, 2 * diagnostics.PAIRS, seed).view(2, -1).T

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, samples_path = folder / "checkpoint.safetensors", folder / "samples.txt"
    if not args.resume or samples_path.exists():  # the last file of a finished run
        checkpoint.unlink(missing_ok=True)
        samples_path.unlink(missing_ok=True)
    state, stats, snapshots = resume(args, checkpoint, model, optimizer, generator, data, steps)
    first, resumed = state["step"], state["step"] > 0
    if resumed:
        print(f"{title}resuming from step {first}")
    elif not online:
        state["seconds"] = measured["sampling_seconds"] + measured["reference_seconds"]
    observe = None
    if args.diagnostics:
        observe = diagnostics.observer(model, data, pairs.to(args.device), lam, folder, snapshots, state["tables"])
    environment = {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(folder / "config.json", {**settings, "measured": measured, "environment": environment})

    began, not_training = time.time(), 0.0
    bar = progress(total=steps, initial=first, desc=folder.name)
    with bar, finishing_step() as interrupted:
        for step in range(first, steps + 1):
            paused, stopping = time.time(), bool(interrupted) and step < steps
            new = step > first or not resumed  # a checkpoint comes last at its step
            evaluating = new and (step % args.eval_every == 0 or step == steps)
            saving = new and 0 < step < steps and (stopping or step % args.save_every == 0)
            if evaluating or saving:  # the statistics are read here only: a device need not wait at every step
                so_far = stats[:step].cpu()
                paused = time.time()
                raise_if_not_finite(so_far, problem_ids, args.skip_nonfinite, folder)
                seconds = state["seconds"] + paused - began - not_training
            if evaluating:
                accuracies, samples = evaluate(
                    model, test_problems, EVAL_SAMPLES, args.eval_temperature, seeded(args.device, seed, "evaluation", step)
                )
                columns = {**accuracies, **monitor(model, data, monitored, lam), "seconds": seconds}
                since = state["log"][-1]["step"] if state["log"] else 0
                state["log"].append(log_row(step, so_far, since, columns, 0 if online else data["length"].sum().item()))
                write_csv(folder / "log.csv", state["log"])
                eta = (time.time() - began) / (step - first) * (steps - step) if step > first else math.nan
                tqdm.write(title + progress_line(state["log"][-1], steps, eta))
            if observe and new:
                observe(step, evaluating)
            if saving:
                tensors = {"stats": stats, "generator": generator.get_state(), **{f"at.{t}": x for t, x in snapshots.items()}}
                save_checkpoint(checkpoint, model, optimizer, {**state, "step": step, "seconds": seconds}, tensors)
            not_training += time.time() - paused
            if stopping:
                raise Interrupted(interrupted[0])
            if step == steps:
                break

            may_skip = args.skip_nonfinite > 0
            if online:
                problems = [train_problems[i] for i in order[step].tolist()]
                stats[step] = grpo_step(model, optimizer, problems, settings, generator, may_skip)
            else:
                stats[step] = training_step(model, optimizer, data, order[step], settings, may_skip)
            bar.update()
    write_tensors(folder / "model.safetensors", model.state_dict())
    write_text(samples_path, samples_text(samples))
    checkpoint.unlink(missing_ok=True)
    if interrupted:
        raise Interrupted(interrupted[0])


def progress_line(row, steps, eta):
    eta = "--:--" if math.isnan(eta) else f"{int(eta) // 60:2d}:{int(eta) % 60:02d}"
    loss = f"{row['loss']:+.4f}" if row["step"] else "   --  "
    return (
        f"step {row['step']:5d}/{steps}  loss {loss}  accuracy {row['accuracy']:.3f}  "
        f"greedy {row['accuracy_greedy']:.3f}  log-ratio correct {row['logratio_correct']:+8.2f} "
        f"incorrect {row['logratio_incorrect']:+8.2f}  ETA {eta}"
    )


# --- the product of runs


def is_finished(args, folder):
    """Whether a run's config and log are whole, its samples, which are written last, there, and diagnostics, if asked for."""
    try:
        run = results.read_run(folder)
        measured = not args.diagnostics or results.read_csv(folder / "entanglement.csv")["step"][-1] == run.config["steps"]
    except (ValueError, KeyError, OSError, results.VersionError):
        return False
    return measured and (folder / "samples.txt").exists()


def cache_stages(args, seed, all_prompts):
    for prompts in all_prompts:
        prepare(args, seed, prompts)


def train_one(args, name, settings):
    with contextlib.redirect_stdout(io.StringIO()):  # the stages are cached, and said so once
        prepared = prepare(args, settings["seed"], settings["prompts"])
    train_policy(args, settings, args.out / name, *prepared, title=f"{name}  ")


def train_together(args, todo, count):
    """Train runs in processes of one thread each. One that fails stops no other; the first error is raised last."""
    errors, stages = {}, {}  # errors by seed, for its stages, or by run
    for settings in todo.values():
        stages.setdefault(settings["seed"], {})[settings["prompts"]] = None
    print(f"{count} runs at once, one thread each")
    with jobs.workers(count) as pool:
        if len(stages) == 1:
            ((seed, all_prompts),) = stages.items()
            cache_stages(args, seed, all_prompts)  # here, on all threads
        else:
            arguments = {f"seed {seed}": (args, seed, list(all_prompts)) for seed, all_prompts in stages.items()}
            list(jobs.finished(pool, cache_stages, arguments, errors))
        todo = {name: settings for name, settings in todo.items() if f"seed {settings['seed']}" not in errors}
        began = time.time()
        arguments = {name: (args, name, settings) for name, settings in todo.items()}
        for done, name in enumerate(jobs.finished(pool, train_one, arguments, errors), start=1):
            turns, turns_done = math.ceil(len(todo) / count), math.ceil(done / count)
            left = (time.time() - began) / turns_done * (turns - turns_done) / 60
            print(f"\n{args.out / name}   {done} of {len(todo)} runs, about {left:.0f} min left")
            if name not in errors:
                print((args.out / name / "samples.txt").read_text())
    if errors:
        raise next(iter(errors.values()))


def main(args):
    """Every run that the flags ask for, seed by seed, then their summary and figures.

    Raises UserError, NonFiniteError, Interrupted.
    """
    began = time.time()
    cache = args.out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    remove_leftovers(args.out)
    runs = run_settings(args)
    finished = [name for name in runs if is_finished(args, args.out / name) and not args.force]
    for name in finished:
        print(f"already finished: {args.out / name}   (--force runs it anew)")
    todo = {name: settings for name, settings in runs.items() if name not in finished}
    # from all runs, so that the last ones of an interrupted command have the threads that they would have had
    count = min(args.jobs or (torch.get_num_threads() if args.device == "cpu" else 1), len(runs))
    with contextlib.ExitStack() as locks:
        for name in todo:
            locks.enter_context(locked(cache / f"{name}.lock", args.out / name))
        if count > 1 and todo:
            train_together(args, todo, count)
        else:
            for (seed, prompts), names in itertools.groupby(todo, key=lambda x: (todo[x]["seed"], todo[x]["prompts"])):
                prepared = prepare(args, seed, prompts)
                for name in names:
                    print(f"\ntraining      {args.out / name}")
                    train_policy(args, todo[name], args.out / name, *prepared)
                    print((args.out / name / "samples.txt").read_text())
    trained = results.read_runs([args.out / name for name in runs])
    if len(trained) < len(runs):
        raise UserError(f"{args.out}: {len(runs) - len(trained)} of {len(runs)} runs are gone or damaged, as said above")
    print(results.summary(trained))
    plots.draw_figures(trained, args.out / "figures")
    minutes, seconds = divmod(int(time.time() - began), 60)
    print(f"finished in   {minutes} min {seconds} s")


def run(argv=None):
    """The command: parse, train, and turn what goes wrong into one line and an exit code."""
    try:
        with interruptible():
            args = parse_args(argv)
            if args.explain:
                from explain import explain  # which imports this file

                explain(args)
            else:
                main(args)
    except Interrupted as signalled:
        kept = "finished stages and runs, and checkpoints of the others, are kept"
        print(f"interrupted: {kept}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signalled.args[0])
    except (UserError, NonFiniteError, OSError, BrokenProcessPool, torch.OutOfMemoryError) as error:
        print(f"train.py: error: {one_line(error, args.out)}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NonFiniteError) else 2)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # each line at once, into a pipe or a file too
    run()
