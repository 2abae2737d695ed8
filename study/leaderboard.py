"""The lesson's open task: a brake of your own, trained on five seeds, in a table with the stored runs.

    python -m study.leaderboard docs/lesson/my_brake.py      # or a file of yours; then train.py's flags, such as --steps 200

The file defines one function. It says how much an incorrect row weighs in the gradient, from its probability per token:

    def brake(pi, pi_ref):                  # (B,) π̄ of incorrect rows under the policy and the base model, detached
        return pi * (pi / pi_ref) ** 2      # (B,) their weights C |y|, at least 0

Correct rows keep Off-RL's weight π̄. So `return pi` is Off-RL. The brake to beat is FPA at λ = 2 on incorrect rows only, which
keeps this weight too: the difference of accuracies, seed by seed, has to have its 95 % interval above 0. One seed has no
interval. Finished runs of the same text are reused.
Left out: accuracy on test problems, which are not for choosing a brake by.
"""

import math
import sys

import torch

import train
from plumbing import flags
from plumbing.files import UserError, digest, one_line, printable_path
from study import changed, lesson
from study.results import NOT_A_SETTING, by_method, by_seed, label, mean_and_interval, read_runs, where

SEEDS = range(5)  # the stored runs'
TO_BEAT = {"loss": "fpa", "lam": 2.0, "target": "incorrect"}
PROGRAM = "python -m study.leaderboard"
COLUMNS = {"accuracy": "accuracy", "accuracy_greedy": "greedy", "logratio_correct_below_0": "dragged down"}
NOT_COMPARED = (*NOT_A_SETTING, "steps", "eval_every", "brake")


# --- the brake


def load(text, path):
    """The function `brake` of a file's text, tried on some rows. Raises UserError that says what is wrong with it."""
    names = {"torch": torch}
    try:
        exec(compile(text, str(path), "exec"), names)
        if "brake" not in names:
            raise NameError("defines no function brake(pi, pi_ref)")
        brake = names["brake"]
        pi, pi_ref = torch.tensor([1.0, 0.5, 1e-3, 0.0]), torch.tensor([0.9, 0.6, 0.9, 1e-3])
        weight = brake(pi, pi_ref)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {one_line(error, path)}") from None
    if not isinstance(weight, torch.Tensor) or weight.shape != pi.shape:
        found = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise UserError(f"{path}: brake must return a tensor like pi, {tuple(pi.shape)}, not {found}")
    if not (weight.isfinite() & (weight >= 0)).all():
        raise UserError(f"{path}: brake must return finite weights of at least 0, not {weight.tolist()} at pi {pi.tolist()}")
    return brake


def braked(brake):
    """An `objective` for train.py: Off-RL, with the brake's weight on incorrect rows. A surrogate, as FPA's is."""

    def objective(b, run):
        pi, pi_ref = ((logp_sum.detach() / b.length).exp() for logp_sum in (b.logp_sum, b.ref_logp_sum))
        coefficient = torch.where(b.reward > 0, pi, brake(pi, pi_ref).detach()) / b.length
        return (-b.reward * coefficient * b.logp_sum).mean(), coefficient

    return objective


def train_one(args, name, settings):
    """train.py's, with the brake that the settings hold. For a process of its own."""
    changed.train_one(args, name, settings, {"objective": braked(load(settings["brake"], name))})


def settings_of(args, path):
    """{folder name: settings} of a file's brake on every seed. Raises UserError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not a text'}") from None
    load(text, path)
    settings = [{**one, "brake": text} for one in train.run_settings(args).values()]
    if len(settings) > len(set(args.seed)) or settings[0]["loss"] != "off_rl" or args.diagnostics:
        raise UserError("the file is the loss: leave out --loss, --lam and --diagnostics, and give other flags one value")
    return {f"{path.stem}-seed{one['seed']}-{digest(one)}": one for one in settings}


def train_all(args, runs):
    """Train those of the runs that are not finished; [Run] of all. Raises UserError, NonFiniteError, Interrupted."""
    lesson.ship(args.out)
    changed.train_all(args, runs, train_one)
    return read_runs([args.out / name for name in runs])


# --- the table


def at(run, step, column):
    """A column at an evaluation."""
    return run.log[column][run.log["step"] == step][0]


def comparable(stored, settings, step):
    """The stored runs that differ from a run in the method, the seed and the number of steps alone.

    Raises UserError where they were not evaluated at this step.
    """

    def rest(config):
        return {name: value for name, value in config.items() if name not in NOT_COMPARED}

    found = [run for run in stored if rest(run.config) == rest(settings)]
    if found and step not in found[0].log["step"]:
        steps = [int(step) for step in found[0].log["step"][1:]]
        raise UserError(f"the stored runs have no row of step {step}: --steps must be one of {', '.join(map(str, steps))}")
    return found


def board(name, own, stored, step):
    """The table at a step, the highest accuracy first, and below it whether the brake beats the one to beat: text."""
    rows = {label(method): some for method, some in by_method(stored).items()} | {f"> {name}": own}
    table = {
        who: [mean_and_interval([at(run, step, column) for run in some]) for column in COLUMNS] for who, some in rows.items()
    }

    def cell(mean, half):
        return f"{f'{mean:.3f}' if math.isnan(half) else f'{mean:.3f} ± {half:.3f}':>16}"

    lines = [f"{f'validation problems, step {step}':34}{'seeds':>6}" + "".join(f"{head:>16}" for head in COLUMNS.values())]
    for who, cells in sorted(table.items(), key=lambda row: -row[1][0][0]):
        lines.append(f"{who:34}{len(rows[who]):>6}" + "".join(cell(*values) for values in cells))
    return "\n".join([*lines, verdict(name, own, stored, step)])


def verdict(name, own, stored, step):
    """The difference to the brake to beat, over the seeds that both have."""
    theirs = by_seed(where(stored, **TO_BEAT))
    both = [(run, theirs[run.config["seed"]]) for run in own if run.config["seed"] in theirs]
    if len(both) == 1:
        return "One seed has no interval: give two or more."
    if not both:
        return "No stored runs of this setting and these seeds: there is nothing to compare with."
    mean, half = mean_and_interval([at(run, step, "accuracy") - at(other, step, "accuracy") for run, other in both])
    says = "beats" if mean - half > 0 else "does not beat"
    return f"{name} {says} {label(both[0][1].method)}: {mean:+.3f} ± {half:.3f} over {len(both)} seeds"


def run(argv=None):
    """The command: a file, then train.py's flags."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        return print(__doc__.strip())
    with flags.command(PROGRAM):
        if not argv or argv[0].startswith("-"):
            raise UserError(f"name a file first: {PROGRAM} my_brake.py")
        try:
            path = printable_path(argv[0])
        except ValueError:
            raise UserError(f"{argv[0]!r} is no path: {PROGRAM} my_brake.py") from None
        args = train.parse_args(["--loss", "off_rl", "--device", "cpu", "--seed", *map(str, SEEDS), *argv[1:]])
    with flags.command(PROGRAM, "finished runs, and checkpoints of the others, are kept; the same command goes on", args.out):
        runs = settings_of(args, path)
        stored = comparable(lesson.stored(), next(iter(runs.values())), args.steps)
        own = train_all(args, runs)
        print(board(path.stem, own, stored, args.steps))


if __name__ == "__main__":
    run()
