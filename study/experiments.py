"""The experiments behind results/: their commands, and what results/ lacks of them.

    python -m study.experiments               # lists them: runs, how many of them results/ holds, hours
    python -m study.experiments pilot main    # runs what is missing of two, then gathers all finished runs into results/

An interrupted experiment goes on with the same command: train.py keeps the finished runs and the checkpoints of the others.
An experiment at tuned settings has only the runs whose tuning results/ holds already. study/verdicts.py says what is read from
which experiment.
"""

import functools
import math

import train
from plumbing.files import digest
from study import tune
from study.results import SEEDS
from study.tables import BASES, copy_stages, gather, held, identity, run_names
from study.tune import command_of
from toy_math.stages import stage_settings

FIVE, PILOT = range(5), range(2000, 2005)
RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)  # of the grids, which tune one number alone
GRID_SEEDS = (1000, 1001)
TWO = ("off_rl", "fpa")
ENDS = "--eval-every 5000"  # evaluations before the first step and after the last one alone, where no curve is asked for
OFTEN = "--eval-every 20"
LAMBDAS = {0: "--loss off_rl", **{lam: f"--loss fpa --lam {lam}" for lam in (0.5, 1, 2, 5, 10)}}
CASES = {  # {grid: {case: its flags}}; each case is then run at its own best rate
    "lambda": {f"λ = {lam}": flags for lam, flags in LAMBDAS.items()},
    "targets": {target: f"--loss fpa --lam 2 --target {target}" for target in ("correct", "incorrect")},
    "sizes": {  # equal passes over the rollouts
        f"{loss}, {prompts} prompts": f"--loss {loss} --prompts {prompts} --steps {prompts * 1000 // 1024}"
        for prompts in (256, 1024, 4096)
        for loss in ("fpa", "sft")
    },
}


# --- which runs: an experiment is {case: flags of train.py}, of some seeds


def pilot(runs):
    """docs/task.md has the rule that was written before these runs."""
    return {
        f"{habit}, {slip}": f"--task habit --habit {habit} --slip {slip}"
        for habit, slip in ((0.6, 0.03), (0.6, 0.06), (0.8, 0.03))
    }


def short(runs):
    """The pilot's first setting on base models of half as many steps, which docs/task.md tells of."""
    return {"short": "--base-steps 1500"}


def main(runs):
    """The figures of README.md and docs/task.md."""
    return {"off_rl and fpa": "--diagnostics", "incorrect": "--loss fpa --target incorrect", "sft": "--loss sft"}


def tuned(runs, more="", families=tune.FAMILIES):
    """Families at the settings that their tuning chose, with more flags."""
    found = {name: tune.search(name, tune.scores(name, runs)).chosen for name in families}
    return {name: f"{tune.words(name, chosen)}{more}" for name, chosen in found.items() if chosen}


def final(runs):
    """Every family; Off-RL and FPA with their diagnostics.

    C14b compares FPA's seconds with GRPO's. So GRPO comes right after FPA, and both are evaluated more often.
    """
    cases, more = tuned(runs), {"off_rl": "--diagnostics", "fpa": f"--diagnostics {OFTEN}", "grpo": OFTEN}
    return {name: f"{cases[name]} {more.get(name, '')}" for name in dict.fromkeys([*more, *cases]) if name in cases}


def slips(runs):
    """The same settings on the second task."""
    return tuned(runs, f" --task slips {ENDS}")


def prolonged(runs):
    """Off-RL and FPA, four times as long."""
    return tuned(runs, " --steps 4000", TWO)


def rates(runs):
    """Off-RL at every rate of the grids."""
    return {f"{lr:g}": on_grid("--loss off_rl", lr) for lr in RATES}


def extrapolation(runs):
    """FPA at two rates, the lower of which bends its path less, and Off-RL at the higher one."""
    cases = {f"{lr:g}": f"--loss fpa --lam 2 --lr {lr:g} --diagnostics" for lr in (2e-5, 2e-4)}
    return {**cases, "off_rl, 0.0002": "--loss off_rl --lr 2e-4 --diagnostics"}


def on_grid(flags, lr):
    """The flags of a case at a rate of the grid."""
    return f"{flags} --lr {lr:g} {ENDS}"


def grid(name, runs):
    """Every case at every rate."""
    return {f"{case}, {lr:g}": on_grid(flags, lr) for case, flags in CASES[name].items() for lr in RATES}


def best_rates(name, runs):
    """{case: the rate with the best mean over the grid's seeds, by pass@1 at temperature 0.7 on validation problems}."""
    found = {
        case: best_rate({lr: settings_of(on_grid(flags, lr), GRID_SEEDS) for lr in RATES}, runs)
        for case, flags in CASES[name].items()
    }
    return {case: lr for case, lr in found.items() if lr}


def best_rate(grid, runs):
    """The rate with the best mean over the runs of {rate: their settings}; None where a run is not held."""
    ids = {lr: [identity(settings) for settings in some] for lr, some in grid.items()}
    if all(run in runs for some in ids.values() for run in some):
        return max(ids, key=lambda lr: sum(tune.score_of(runs[run]) for run in ids[lr]))


def at_best(name, runs):
    """Every case at its best rate."""
    return {case: on_grid(CASES[name][case], lr) for case, lr in best_rates(name, runs).items()}


def settings_of(flags, seeds, **more):
    """The settings of the runs of some flags and seeds, with what train.py has no flag for."""
    return [{**settings, **more} for settings in train.run_settings(command_of(flags, seeds)).values()]


# {name: (its cases, from the runs that are held; seeds)}
EXPERIMENTS = {
    "pilot": (pilot, PILOT),
    "short": (short, PILOT),
    "main": (main, FIVE),
    **{f"{name}-grid": (functools.partial(grid, name), GRID_SEEDS) for name in CASES},
    "final": (final, SEEDS),
    "extrapolation": (extrapolation, SEEDS),
    "rates": (rates, SEEDS),
    "prolonged": (prolonged, SEEDS),
    **{name: (functools.partial(at_best, name), SEEDS) for name in CASES},
    "slips": (slips, SEEDS),
}


def commands(name, runs, out="runs", jobs=0):
    """{case: its parsed command}."""
    cases, seeds = EXPERIMENTS[name]
    return {case: command_of(flags, seeds, out, jobs) for case, flags in cases(runs).items()}


def members(runs):
    """{name of an experiment: {case: {id: settings}}}."""
    return {
        name: {
            case: {identity(settings): settings for settings in train.run_settings(args).values()}
            for case, args in commands(name, runs).items()
        }
        for name in EXPERIMENTS
    }


def missing(args, runs):
    """Of a parsed command: the settings of the runs that are not held, or not with the diagnostics that it asks for."""

    def is_held(run):
        return run in runs and (not args.diagnostics or "entanglement" in runs[run].tables)

    return {name: settings for name, settings in train.run_settings(args).items() if not is_held(identity(settings))}


# --- what they take


def seconds_of(settings, runs):
    """How long a run takes: the mean of the runs that are most like it, or, of other lengths, by their seconds a step."""
    for names in (("loss", "steps", "prompts", "eval_every"), ("loss", "steps"), ("steps",), ()):
        like = [run for run in runs if all(run.get(name) == settings[name] for name in names)]
        if like:
            return sum(run.log["seconds"][-1] / run.config["steps"] for run in like) / len(like) * settings["steps"]
    return math.nan


def hours(experiment, runs):
    """Of one CPU thread: what the runs {id: settings} took, and what those that are not held would."""
    seconds = [
        runs[run].log["seconds"][-1] if run in runs else seconds_of(settings, runs.values())
        for run, settings in experiment.items()
    ]
    return sum(seconds) / 3600


def listing(folder):
    """The experiments, a line each: its runs, how many of them a folder of tables holds, and its hours."""
    runs = held(folder)
    lines = [f"{'experiment':16}{'runs':>6}{'held':>6}{'hours':>8}"]
    for name, cases in members(runs).items():
        experiment = {run: settings for some in cases.values() for run, settings in some.items()}
        count, time = sum(run in runs for run in experiment), hours(experiment, runs)
        lines.append(f"{name:16}{len(experiment):>6}{count:>6}{'?' if math.isnan(time) else f'{time:.1f}':>8}")
    return "\n".join([*lines, f"held: runs that {folder} has already. hours: on one CPU thread; two threads take half."])


# --- the command


def gather_known(out, folder):
    """Gather the finished runs of every experiment; the number of new ones."""
    known = members(held(folder))
    return gather(out, folder, {name: [run for some in cases.values() for run in some] for name, cases in known.items()})


def run_experiment(name, args):
    """Train what is missing of an experiment, and gather what is finished, after an error too.

    Cases of the same stages are trained together, so that no core waits for the last run of a case.
    """
    copy_stages(BASES, args.out)
    together = {}  # {what train.py takes from a command beside its runs: (the command, the runs)}
    runs = held(args.to)
    for case in commands(name, runs, args.out, args.jobs).values():
        if todo := missing(case, runs):
            same = digest([stage_settings(case, 0, 0), case.diagnostics])
            together.setdefault(same, (case, {}))[1].update(todo)
    try:
        for case, todo in together.values():
            train.main(case, todo)
    finally:
        count = gather_known(args.out, args.to)
    print(f"gathered      {count} new runs into {args.to}, from {args.out}")


def run(argv=None):
    """The command: list, or train and gather."""
    run_names(argv, "python -m study.experiments", __doc__.splitlines()[0], "experiments", EXPERIMENTS, run_experiment, listing)


if __name__ == "__main__":
    run()
