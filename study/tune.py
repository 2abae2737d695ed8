"""The tuning of every family of methods alike: random settings, the best ones on more seeds, ranges that grow, one choice.

    python -m study.tune              # lists the families: runs held, ranges, the setting that was chosen
    python -m study.tune fpa topr     # runs what is missing of two families' searches, and gathers it into results/

The search is a function of the runs that results/ holds: it asks for the next runs until the choice is made. So an interrupted
search goes on with the same command, and anybody can replay it from the tables. A round of the search:

1. SETTINGS settings are drawn, the learning rate and the family's own numbers log-uniform in their ranges.
2. Each is trained on the first two SEEDS. The best KEPT by their mean are trained on the other three.
3. The best of these by the mean of five seeds is chosen, among all rounds so far.
4. Where one of its numbers is within a factor of MARGIN of an end of its range, the range grows by a factor of GROWTH at this
   end, and a new round begins, up to ROUNDS.

A run's score is pass@1 at temperature 0.7 on validation problems after the last step. Left out: early stopping.
"""

import argparse
import functools
import random
from pathlib import Path
from typing import NamedTuple

import train
from plumbing.flags import SCHEDULES

from .tables import BASES, copy_stages, gather, held, identity, run_names

SEEDS, SETTINGS, KEPT, MARGIN, GROWTH, ROUNDS = (1000, 1001, 1002, 1003, 1004), 12, 3, 2.0, 8.0, 3
LR, LAM, BETA, ALPHA, WEIGHT = (5e-6, 5e-3), (0.25, 10.0), (1e-3, 1.0), (0.1, 10.0), (0.01, 1.0)
TARGETS = ("both", "incorrect")
BUDGET = "--steps 1000 --eval-every 1000"


class Family(NamedTuple):
    """A family's loss, the ranges of its numbers, and its choices; each family has a learning rate and a schedule too."""

    loss: str
    ranges: dict = {}
    choices: dict = {}


FORM = {"lam": LAM}, {"target": TARGETS}  # of a loss at the future policy
FAMILIES = {
    "fpa": Family("fpa", *FORM),
    "off_rl": Family("off_rl"),
    "topr": Family("topr"),
    "sft": Family("sft"),
    "power": Family("power", *FORM),
    "future_topr": Family("future_topr", {"lam": LAM}),
    "sharpened": Family("sharpened", *FORM),
    "constant": Family("constant", {"weight": WEIGHT}),
    "asymre": Family("asymre", {"shift": WEIGHT}),
    "nsr": Family("nsr", {"weight": WEIGHT}),
    "kto": Family("kto", {"beta": BETA}),
    "dpo": Family("dpo", {"beta": BETA}),
    "dpo_fpa": Family("dpo", {"beta": BETA, "lam": LAM}, {"target": TARGETS}),
    "rpo": Family("rpo", {"beta": BETA, "alpha": ALPHA}),
    "rpo_fpa": Family("rpo", {"beta": BETA, "alpha": ALPHA, "lam": LAM}, {"target": TARGETS}),
    "simper": Family("simper"),
    "a_star_po": Family("a_star_po", {"beta": BETA}),
    "pessimistic": Family("pessimistic", {"beta": BETA}),
    "reinforce": Family("reinforce"),
    "grpo": Family("grpo"),
}


class Search(NamedTuple):
    """How far a family's search is."""

    asked: list  # the settings that it has asked for, each {flag: value}, by round
    missing: list  # runs that it needs next: (settings, seed)
    ranges: dict  # of the present round
    chosen: dict | None  # once nothing is missing
    score: float | None  # mean of the chosen settings' scores


# --- the search


def draw(name, number, ranges):
    """The settings of a family's round, from its ranges."""
    rng, drawn = random.Random(f"{name}/{number}"), []
    for _ in range(SETTINGS):
        numbers = {flag: float(f"{low * (high / low) ** rng.random():.2g}") for flag, (low, high) in ranges.items()}
        choices = {"schedule": SCHEDULES, **FAMILIES[name].choices}
        drawn.append({**numbers, **{flag: rng.choice(values) for flag, values in choices.items()}})
    return drawn


def grown(settings, ranges):
    """The ranges, grown at each end that the settings are near."""
    new = {}
    for flag, (low, high) in ranges.items():
        near_low, near_high = settings[flag] <= low * MARGIN, settings[flag] >= high / MARGIN
        new[flag] = low / GROWTH if near_low else low, high * GROWTH if near_high else high
    return new


def search(name, score):
    """A family's search as far as the known runs carry it. score(settings, seed): of a run, or None where it is not there."""
    ranges, asked, finalists = {"lr": LR, **FAMILIES[name].ranges}, [], []

    def mean(settings, seeds):
        return sum(score(settings, seed) for seed in seeds) / len(seeds)

    def lacking(some, seeds):
        return [(settings, seed) for seed in seeds for settings in some if score(settings, seed) is None]

    while True:
        asked.append(draw(name, len(asked), ranges))
        if missing := lacking(asked[-1], SEEDS[:2]):
            return Search(asked, missing, ranges, None, None)
        best = sorted(asked[-1], key=lambda settings: -mean(settings, SEEDS[:2]))[:KEPT]
        if missing := lacking(best, SEEDS[2:]):
            return Search(asked, missing, ranges, None, None)
        finalists += best
        chosen = max(finalists, key=lambda settings: mean(settings, SEEDS))
        larger = grown(chosen, ranges)
        if larger == ranges or len(asked) == ROUNDS:
            return Search(asked, [], ranges, chosen, mean(chosen, SEEDS))
        ranges = larger


# --- its runs


def words(name, settings):
    """The flags of train.py for a family's settings."""
    return f"--loss {FAMILIES[name].loss} " + " ".join(f"--{flag} {value}" for flag, value in settings.items())


@functools.cache
def parsed(flags):
    return vars(train.parse_args(flags.split()))


def command_of(flags, seeds, out="runs", jobs=0):
    """The parsed command of some flags and seeds. A run that diverges ends with a low score and stops no other."""
    return argparse.Namespace(**{**parsed(flags), "seed": list(seeds), "out": Path(out), "jobs": jobs, "skip_nonfinite": 10**6})


def runs_of(name, settings, *seeds):
    """{folder name: settings of train.py} of a family's settings."""
    return train.run_settings(command_of(f"{words(name, settings)} {BUDGET}", seeds))


def score_of(run):
    """A run's score."""
    return float(run.log["accuracy_0.7"][-1])


def scores(name, runs):
    """score(settings, seed) from the runs that are held, by their ids."""

    def score(settings, seed):
        (config,) = runs_of(name, settings, seed).values()
        run = runs.get(identity(config))
        return None if run is None else score_of(run)

    return score


def tune(name, args):
    """Run a family's search to its end; its runs are gathered into `args.to` after each of its stages."""
    copy_stages(BASES, args.out)
    while (found := search(name, scores(name, held(args.to)))).missing:
        runs = {key: value for missing in found.missing for key, value in runs_of(name, *missing).items()}
        print(f"{name}: round {len(found.asked)}, {len(runs)} runs")
        try:
            train.main(command_of(f"{words(name, found.missing[0][0])} {BUDGET}", SEEDS, args.out, args.jobs), runs)
        finally:  # after an error too
            asked = [config for some in found.asked for drawn in some for config in runs_of(name, drawn, *SEEDS).values()]
            gather(args.out, args.to, {f"tune-{name}": [identity(config) for config in asked]})
    print(line(name, held(args.to)))


# --- the command


def line(name, runs):
    """A line of the list: the family, its runs among those that are held, and its choice."""
    score = scores(name, runs)
    found = search(name, score)
    count = sum(score(drawn, seed) is not None for some in found.asked for drawn in some for seed in SEEDS)
    ends = ", ".join(f"{flag} {low:g} to {high:g}" for flag, (low, high) in found.ranges.items())
    came = f"{found.score:.3f}   {words(name, found.chosen)}" if found.chosen else f"round {len(found.asked)}: {ends}"
    return f"{name:14}{count:>5}   {came}"


def listing(folder):
    """The families, a line each."""
    runs = held(folder)
    return "\n".join(
        [f"{'family':14}{'runs':>5}   score and choice, or the present round", *(line(name, runs) for name in FAMILIES)]
    )


def run(argv=None):
    """The command: list, or search."""
    run_names(argv, "python -m study.tune", __doc__.splitlines()[0], "families", FAMILIES, tune, listing)


if __name__ == "__main__":
    run()
