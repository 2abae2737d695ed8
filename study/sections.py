"""The tables of results/results.md beside its claims, in Markdown: cases, settings, what no claim is about, machines."""

import math
from collections import Counter

import numpy as np
from scipy import stats

from study.experiments import CASES, RATES, best_rates
from study.results import (
    METRIC,
    by_method,
    by_seed,
    each,
    fall,
    forecast_by_step,
    fpa_runs,
    label,
    last,
    mean_and_interval,
    metric,
    of_experiment,
    paired,
    ratio_of_coefficients,
    share_down,
)
from study.rule import digits
from study.tables import identity
from study.tune import FAMILIES, SEEDS, runs_of, words

ONE_THING = {  # {experiment: (title, what its cases are)}
    "rates": ("Off-RL at each learning rate", "learning rate"),
    "lambda": ("Each λ at its own learning rate", "λ of FPA"),
    "targets": ("FPA's coefficient on one kind of rows, each at its own learning rate", "rows"),
    "sizes": ("Equal passes over the rollouts, each at its own learning rate", "loss and prompts"),
}
SHOWN = {
    "pass@1, T = 0.7": METRIC,
    "T = 1": "test_accuracy",
    "greedy": "test_accuracy_greedy",
    "pass@16": "test_pass@16",
    "entropy [nats]": "test_entropy",
}
ON_VALIDATION = {title: column.removeprefix("test_") for title, column in SHOWN.items()}
ON_VALIDATION["log-ratio, correct, 5th percentile [nats]"] = "logratio_correct_p5"
FACTS = {"right rollouts": "share_correct", "shared tokens": "shared_tokens", "common beginning": "common_prefix"}


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines)


def cell(values):
    """Mean ± 95 % interval of a number a seed."""
    mean, half = mean_and_interval(values)
    return f"{round(mean, 3) + 0.0:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def numbers_of(runs, index=-1, shown=SHOWN):
    """Cells of some columns at an evaluation, mean ± 95 % interval over seeds."""
    return [cell(each(runs, lambda run: run.log[column][index])) for column in shown.values()]


# --- cases


def cases_table(cases, head="family", base="base model", shown=SHOWN):
    """Every case after its last step, the model before training first; fewer seeds, or none, are said."""
    first, rows = next((some for some in cases.values() if some), {}), []
    if first:
        rows.append([base, len(first), *numbers_of(first, 0, shown)])
    for name, some in cases.items():
        numbers = numbers_of(some, -1, shown) if some else ["not run"] + [""] * (len(shown) - 1)
        rows.append([f"`{name}`", len(some), *numbers])
    return table([head, "seeds", *shown], rows)


def families_table(runs, experiment):
    """Every family at its tuned setting."""
    return cases_table({name: runs.get((experiment, name), {}) for name in FAMILIES})


def untuned_table(runs_held):
    """Every method of the experiment `main`, at default settings."""
    methods = by_method(of_experiment(runs_held.values(), "main"))
    return cases_table({label(m): by_seed(some) for m, some in methods.items()}, "loss")


def experiment_tables(runs):
    """Every case of the experiments whose cases differ in one thing, a table each, of those that have runs."""
    tables = []
    for name, (title, head) in ONE_THING.items():
        cases = {case: some for (experiment, case), some in runs.items() if experiment == name and some}
        if len(cases) > 1:
            tables.append(f"### {title}\n\n{cases_table(cases, head)}")
    return "\n".join(tables)


def facts_table(runs):
    """P0: what the two tasks are, from the rollouts and the base models of the claims' seeds."""
    rows = []
    for task, some in {"habit": runs.get(("rates", f"{RATES[0]:g}")), "slips": runs.get(("slips", "fpa"))}.items():
        measured = [cell(each(some, lambda run: run.config["measured"][name])) for name in FACTS.values()] if some else []
        rows.append([f"`{task}`", *(numbers_of(some, 0) + measured if some else ["not run"])])
    return table(["task", *SHOWN, *FACTS], rows)


# --- settings


def searches_table(searches):
    """How far the search of every family is, and what it chose."""
    rows = []
    for name, some in searches.items():
        came = f"`{words(name, some.chosen)}`" if some.chosen else f"missing: {len(some.missing)} runs of this round"
        rows.append([f"`{name}`", len(some.asked), f"{some.score:.3f}" if some.chosen else "", came])
    return table(["family", "rounds", "validation pass@1, T = 0.7", "chosen"], rows)


def chosen_runs(searches, runs_held):
    """{family: [its tuning runs at the setting that was chosen]}, the highest score first."""
    names = sorted((name for name, some in searches.items() if some.chosen), key=lambda name: -searches[name].score)
    chosen = {name: map(identity, runs_of(name, searches[name].chosen, *SEEDS).values()) for name in names}
    return {name: [runs_held[run] for run in ids] for name, ids in chosen.items()}


def chosen_table(searches, runs_held):
    """What the chosen settings reach on the tuning seeds, and which weights they train with."""
    rows = []
    for name, some in chosen_runs(searches, runs_held).items():
        runs = by_seed(some)
        rows.append([f"`{name}`", *numbers_of(runs, shown=ON_VALIDATION), cell(each(runs, ratio_of_coefficients))])
    return table(["family", *ON_VALIDATION, "mean C_l·\\|y\\| / C_w·\\|y\\|"], rows)


def rates_table(runs_held, best):
    """The learning rates of the cases of CASES, and those of `best`: (case, rate, grid)."""
    found = [(case, lr, RATES) for name in CASES for case, lr in best_rates(name, runs_held).items()] + best
    rows = [(case, f"{lr:g}{', an end of the grid' * (lr in (grid[0], grid[-1]))}") for case, lr, grid in found]
    return table(["case", "learning rate"], rows)


# --- numbers that no claim is about


def rank_over_rates(runs, column):
    """Rank correlation of Off-RL's accuracy and a column over the learning rates, of the seeds that every rate has (seeds,)."""
    by_rate = [runs.get(("rates", f"{lr:g}"), {}) for lr in RATES]
    ends = [[[value(some[seed]) for some in by_rate] for value in (last(column), metric)] for seed in shared_seeds(by_rate)]
    return np.array([stats.spearmanr(*pair)[0] for pair in ends])


def shared_seeds(cases):
    """The seeds that every one of several {seed: run} has."""
    return sorted(set.intersection(*map(set, cases)))


def unclaimed(runs, runs_held):
    """{text: values (seeds,)}: numbers that docs/findings.md names, of `study`'s runs and of those held."""
    off_rl, fast, slow = (runs.get(("extrapolation", case), {}) for case in ("off_rl, 0.0002", "0.0002", "2e-05"))
    two, five, ten = (runs.get(("lambda", f"λ = {lam}"), {}) for lam in (2, 5, 10))
    largest = runs.get(("rates", f"{RATES[-1]:g}"), {})
    main = of_experiment(runs_held.values(), "main")
    incorrect, both = (by_seed(fpa_runs(main, target=target)) for target in ("incorrect", "both"))

    def lowered(steps, rows):
        return each(off_rl, lambda run: share_down(run, steps, rows))

    pushed = "share of the first {} steps in which an Off-RL batch pushes {} correct rows down more than up, lr 2e-4"
    rank = "rank correlation of Off-RL's accuracy and the correct rows' {}, over seven learning rates"
    fallen = "fall of FPA on validation problems from {} to the end, lr {}"
    return {
        pushed.format(200, "other problems'"): lowered(200, "_others"),
        pushed.format(50, "other problems'"): lowered(50, "_others"),
        pushed.format(50, "its own"): lowered(50, ""),
        "share of correct rows below 0 after 100 steps of Off-RL, lr 2e-4": each(
            off_rl, lambda run: run.log["logratio_correct_below_0"][run.log["step"] == 100].item()
        ),
        rank.format("median log-ratio"): rank_over_rates(runs, "logratio_correct_p50"),
        rank.format("share below 0"): rank_over_rates(runs, "logratio_correct_below_0"),
        f"accuracy of Off-RL, end − start, lr {RATES[-1]:g}": each(largest, lambda run: metric(run) - run.log[METRIC][0]),
        "accuracy of FPA, lr 2e-4 − lr 2e-5": paired(fast, slow),
        fallen.format("step 300", "2e-5"): each(
            slow, lambda run: run.log["accuracy_0.7"][run.log["step"] == 300].item() - run.log["accuracy_0.7"][-1]
        ),
        fallen.format("the best evaluation", "2e-5"): each(slow, fall),
        fallen.format("the best evaluation", "2e-4"): each(fast, fall),
        "accuracy, λ = 5 − λ = 2": paired(five, two),
        "accuracy at T = 1, λ = 5 − λ = 10": paired(five, ten, last("test_accuracy")),
        "accuracy of FPA untuned, incorrect rows only − both kinds": paired(incorrect, both),
    }


def unclaimed_list(runs, runs_held):
    return "".join(f"- {text}: {cell(values)}\n" for text, values in unclaimed(runs, runs_held).items() if len(values))


def forecasts_table(runs):
    """KL of π̂ from the policy of step (1 + λ) t over that of the policy of step t, by t: geometric mean over seeds."""
    columns = {
        f"lr {lr}, λ = {lam}": forecast_by_step(runs.get(("extrapolation", lr), {}).values(), lam)
        for lr in ("2e-05", "0.0002")
        for lam in (1, 2)
    }
    at = sorted(set().union(*columns.values()))
    return table(["t", *columns], [[t, *(digits(some[t]) if t in some else "" for some in columns.values())] for t in at])


# --- machines


def kinds_of(runs):
    """How many runs each kind of CPU made."""
    return Counter(run.config["environment"]["cpu"] for run in runs)


def machines_table(runs, runs_held):
    """Which kinds of CPU made the runs of an experiment, and which of its cases where there are several kinds."""
    rows = []
    for name in dict.fromkeys(name for name, _ in runs):
        cases = {case: kinds_of(some.values()) for (experiment, case), some in runs.items() if experiment == name}
        total = sum(cases.values(), Counter())
        by_kind = [
            f"{count} {kind}" + (f": {', '.join(case for case in cases if kind in cases[case])}" if len(total) > 1 else "")
            for kind, count in sorted(total.items())
        ]
        rows += [[name, "; ".join(by_kind)]] if total else []
    for name in [f"tune-{family}" for family in FAMILIES]:
        total = kinds_of(of_experiment(runs_held.values(), name))
        rows += [[name, "; ".join(f"{count} {kind}" for kind, count in sorted(total.items()))]] if total else []
    return table(["experiment", "runs by CPU"], rows)


def of_several_kinds(found, runs):
    """The claims whose experiments have runs of several kinds of CPU."""

    def kinds(claim):
        names = claim.experiments.split()
        return kinds_of(run for (name, _), some in runs.items() if name in names for run in some.values())

    return [name for name, claim in found.items() if any(len(m.values) for m in claim.measured) and len(kinds(claim)) > 1]
