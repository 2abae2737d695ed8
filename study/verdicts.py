"""The claims of the study on `habit`, the rule that judges them, and results/results.md.

    python -m study.verdicts   # results/ -> results/results.md

The claims and the rule were committed before the first run of SEEDS. A test holds them to docs/protocol.md, which does not
change. study/rule.py is the rule, and study/experiments.py has the runs: a claim takes them by (experiment, case). Every number
of a claim has one value a seed.
"""

import math
from pathlib import Path

import numpy as np

from losses import LOSSES
from plumbing.files import printable_path, write_text
from plumbing.flags import command, command_line
from study import rule, scale, tune
from study.experiments import LAMBDAS, RATES, members
from study.results import SEEDS, each, fall, forecast, last, metric, paired, share_down
from study.rule import COUNT, Claim, Measured, holm, verdicts
from study.sections import (
    chosen_table,
    experiment_tables,
    facts_table,
    families_table,
    forecasts_table,
    machines_table,
    of_several_kinds,
    rank_over_rates,
    rates_table,
    searches_table,
    shared_seeds,
    table,
    unclaimed_list,
    untuned_table,
)
from study.tables import held
from study.tune import FAMILIES

TARGET = 0.7  # of C14b: pass@1 at temperature 0.7 on validation problems


# --- the runs, and numbers of them


def study(runs):
    """{(experiment, case): {seed: Run}} of the runs {id: Run} of a folder of tables."""
    return {
        (name, case): {settings["seed"]: runs[run] for run, settings in ids.items() if run in runs}
        for name, cases in {**members(runs), "scale": scale.members(runs)}.items()
        for case, ids in cases.items()
    }


def ratios(ours, theirs, value):
    return np.exp(paired(ours, theirs, lambda run: math.log(value(run))))


def braked(run):
    """The first step at which C_l / C_w is below 0.5; the number of steps where it never is."""
    table = run.tables["batch"]
    below = table["coefficient_incorrect"] < 0.5 * table["coefficient_correct"]
    return table["step"][below][0] if below.any() else run.config["steps"]


def straight(later):
    """R² of linear drift up to a step."""

    def of(run):
        table = run.tables["extrapolation"]
        return table["linear_r2"][table["later"] == later][0]

    return of


def reaches(run):
    return run.log["accuracy_0.7"] >= TARGET


def cost(run, column):
    """A running sum at the first evaluation that reaches TARGET; at the end where none does."""
    good = reaches(run)
    return run.log[column][good.argmax() if good.any() else -1]


def costs(ours, theirs, column):
    """Our cost over theirs, of the seeds that both have. If ours never reaches TARGET, it costs no less than theirs."""
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        own, other = cost(ours[seed], column), cost(theirs[seed], column)
        found.append((own if reaches(ours[seed]).any() else max(own, other)) / other)
    return np.array(found)


def best_of_rates(runs):
    """Off-RL's rate with the best mean on those of the claims' seeds that every rate has; None where there are none."""
    cases = {lr: runs("rates", f"{lr:g}") for lr in RATES}
    seeds = shared_seeds(cases.values())
    return max(cases, key=lambda lr: sum(metric(cases[lr][seed]) for seed in seeds)) if seeds else None


def at_tokens(run, sampled):
    """Pass@1 at temperature 0.7 on validation problems once that many tokens were sampled, on lines between evaluations."""
    return np.interp(sampled, run.log["tokens_sampled"], run.log["accuracy_0.7"])


# --- the claims


class Runs:
    """The runs of a study as the claims name them: of an experiment, by case."""

    def __init__(self, runs):
        self.runs = runs

    def __call__(self, experiment, case):
        return self.runs.get((experiment, case), {})

    def accuracy(self, text, ours, theirs, side=">", bound=0.0, experiment="final"):
        """The commonest number: one case's final METRIC less another's."""
        return Measured(text, paired(self(experiment, ours), self(experiment, theirs)), side, bound)


def about_the_mechanism(runs):
    """N1 to N3, C10, N5: what pulls correct rows down, and what brakes."""
    off_rl, fpa = runs("final", "off_rl"), runs("final", "fpa")
    plain = runs("extrapolation", "off_rl, 0.0002")
    yield "N1", "an Off-RL step lowers its correct rows", [
        Measured("share of the first 200 steps in which a batch's incorrect rows push its correct rows down more than these "
                 "push up, lr 2e-4", each(plain, share_down), ">", 0.5),
        Measured("the same at the tuned setting", each(off_rl, share_down)),
    ], "extrapolation final"  # fmt: skip
    yield "N2", "the drag explains the accuracy that Off-RL loses", [
        Measured("rank correlation of accuracy and the 5th percentile of correct rows' log-ratios, over seven learning rates",
                 rank_over_rates(runs.runs, "logratio_correct_p5"), ">", 0.5),
    ], "rates"  # fmt: skip
    yield "N3", "FPA's relative brake comes earlier", [
        Measured("step at which C_l / C_w falls below 0.5, FPA / Off-RL, each tuned",
                 ratios(fpa, off_rl, lambda run: braked(run) + 1), "<", 1, ratio=True),
    ], "final"  # fmt: skip
    yield "C10", "the extrapolation forecasts", [
        *[Measured(f"KL of π̂ from the policy of step (1 + λ) t, λ of 1 and 2, over the present policy's, lr {lr}, t from "
                   f"{first} to {end}",
                   each(runs("extrapolation", lr), forecast(lambda t: first <= t <= end)), "<", 1, ratio=True)
          for lr in ("2e-05", "0.0002") for first, end in ((10, 40), (80, 320))],
        *[Measured(f"R² of linear drift to step {step}, lr {lr}", each(runs("extrapolation", lr), straight(step)))
          for lr in ("2e-05", "0.0002") for step in (80, 960)],
    ], "extrapolation"  # fmt: skip
    cases = {name: runs("scale", name) for name in ("AdamW", "AdamW, mean 1", "SGD", "SGD, mean 1")}
    yield "N5", "under AdamW the coefficients' scale does not matter, only their ratio", [
        Measured("accuracy with weights of mean 1 in each batch − with FPA's own, AdamW",
                 paired(cases["AdamW, mean 1"], cases["AdamW"]), "≈"),
        Measured("the same, SGD at one learning rate", paired(cases["SGD, mean 1"], cases["SGD"]), "≉"),
    ], "scale"  # fmt: skip


def about_stability(runs):
    """C6: prolonged training."""
    long = {name: runs("prolonged", name) for name in ("fpa", "off_rl")}
    yield "C6", "FPA is stable in prolonged training, Off-RL is not", [
        Measured("fall from the peak on validation problems over 4,000 steps, FPA − Off-RL",
                 paired(long["fpa"], long["off_rl"], fall), "<"),
        Measured("fall of FPA", each(long["fpa"], fall), "<", 0.05),
    ], "prolonged"  # fmt: skip


def about_others(runs):
    """C7, C11, C12, C15: FPA beside its neighbours and its controls."""
    yield "C7", "FPA beats its neighbours, all tuned alike", [
        runs.accuracy(f"FPA − {LOSSES[loss].label}", "fpa", loss) for loss in ("off_rl", "simper", "dpo", "rpo", "kto")
    ], "final"  # fmt: skip
    yield "C11", "the FPA form helps DPO and RPO", [
        runs.accuracy(f"{LOSSES[loss].label} with FPA − {LOSSES[loss].label}", f"{loss}_fpa", loss) for loss in ("dpo", "rpo")
    ], "final"  # fmt: skip
    best = runs("rates", f"{lr:g}") if (lr := best_of_rates(runs)) else {}
    yield "C12", "FPA is not just slower training", [
        Measured("FPA − Off-RL at the rate that is best on these seeds", paired(runs("final", "fpa"), best), ">"),
    ], "final rates"  # fmt: skip
    controls = ("topr", "sharpened", "power", "constant", "asymre")
    yield "C15", "the extrapolation matters", [
        runs.accuracy(f"FPA − {LOSSES[loss].label}", "fpa", loss) for loss in controls
    ], "final"  # fmt: skip


def about_its_parts(runs):
    """C8, C9: λ, and the rows that FPA's coefficient is used on."""
    yield "C8", "the middle of λ is best, each at its own learning rate", [
        *[runs.accuracy(f"λ = 2 − λ = {end}", "λ = 2", f"λ = {end}", experiment="lambda") for end in (0, 10)],
        *[Measured(f"accuracy at λ = {lam}", each(runs("lambda", f"λ = {lam}"), metric)) for lam in LAMBDAS],
    ], "lambda"  # fmt: skip
    both, base = runs("lambda", "λ = 2"), runs("lambda", "λ = 0")
    only = {target: runs("targets", target) for target in ("incorrect", "correct")}
    yield "C9", "FPA's gain comes from the incorrect rows, each at its own learning rate", [
        Measured("FPA's coefficient on incorrect rows only − Off-RL", paired(only["incorrect"], base), ">"),
        Measured("on incorrect rows only − on both", paired(only["incorrect"], both), ">", -0.05),
        Measured("on correct rows only − Off-RL", paired(only["correct"], base), "<", 0.05),
    ], "targets lambda"  # fmt: skip


def about_data(runs, chosen):
    """C14, C16, C17, N4: samples, incorrect rows, the number of prompts, diversity."""
    fpa, grpo, sft = (runs("final", name) for name in ("fpa", "grpo", "sft"))
    equal = [
        run.log["accuracy_0.7"][-1] - at_tokens(grpo[seed], run.log["tokens_sampled"][-1])
        for seed, run in sorted(fpa.items())
        if seed in grpo
    ]
    yield "C14a", "FPA needs fewer samples than GRPO", [
        Measured("accuracy on validation problems at as many sampled tokens, FPA − GRPO", np.array(equal), ">"),
        runs.accuracy("at the end, FPA − GRPO", "fpa", "grpo", side=""),
    ], "final"  # fmt: skip
    yield "C14b", f"FPA is cheaper to an accuracy of {TARGET} than GRPO", [
        Measured(f"{words}, FPA / GRPO", costs(fpa, grpo, column), "<", 1, ratio=True)
        for words, column in (("seconds", "seconds"), ("tokens trained on", "tokens_trained"))
    ], "final"  # fmt: skip
    using = {name: score for name, score in chosen.items() if name not in ("sft", "grpo")}
    best = runs("final", max(using, key=using.get)) if len(using) == len(FAMILIES) - 2 else {}
    yield "C16", "incorrect rows are worth having: the offline loss that tuning put first among those that use them", [
        Measured("accuracy, this loss − SFT", paired(best, sft), ">"),
        Measured("pass@16, this loss − SFT", paired(best, sft, last("test_pass@16")), ">", -0.02),
    ], "final"  # fmt: skip
    yield "C17", "who wins depends on how much data there is, at equal passes, each at its own learning rate", [
        runs.accuracy("SFT − FPA, 256 prompts", "sft, 256 prompts", "fpa, 256 prompts", experiment="sizes"),
        runs.accuracy("FPA − SFT, 4,096 prompts", "fpa, 4096 prompts", "sft, 4096 prompts", experiment="sizes"),
    ], "sizes"  # fmt: skip
    yield "N4", "FPA does not reduce diversity", [
        Measured("pass@16, FPA − SFT", paired(fpa, sft, last("test_pass@16")), ">", -0.02),
        Measured("entropy, FPA − SFT [nats a token]", paired(fpa, sft, last("test_entropy"))),
    ], "final"  # fmt: skip


def claims(runs, chosen):
    """{id: Claim}, from `study` and the families' tuning scores {name: score}; numbers without runs have no values."""
    runs = Runs(runs)
    parts = (
        about_the_mechanism(runs),
        about_stability(runs),
        about_others(runs),
        about_its_parts(runs),
        about_data(runs, chosen),
    )
    return {name: Claim(text, measured, experiments) for part in parts for name, text, measured, experiments in part}


# --- results.md


def claims_table(found, count=COUNT):
    """The claims with their numbers, adjusted p and verdicts; `count` claims are made."""
    adjusted, words = holm(found, count), verdicts(found, count)
    rows = []
    for name, claim in found.items():
        numbers = "<br>".join(map(str, claim.measured))
        p = f"{adjusted[name]:.2g}" if name in adjusted else ""
        rows.append(
            (f"{name}: {claim.text}", numbers, "–".join(map(str, claim.seeds)), p, f"**{words[name]}**", claim.experiments)
        )
    header = ["claim", "measured: mean over seeds ± 95 % interval", "seeds", "p, Holm", "verdict", "runs"]
    return table(header, rows)


def never(runs):
    """How many runs of `final` never get to what N3 and C14b wait for: a sentence, or nothing without these runs."""
    asked = {
        "N3": (("off_rl", "fpa"), lambda run: braked(run) == run.config["steps"]),
        "C14b": (("fpa", "grpo"), lambda run: not reaches(run).any()),
    }
    counts = [
        f"{sum(map(missed, some.values()))} of {len(some)} of {name} ({claim})"
        for claim, (names, missed) in asked.items()
        for name in names
        if (some := runs.get(("final", name)))
    ]
    said = "They count with their last step. In C14b such a run of FPA counts with GRPO's cost if this is larger."
    return f"Runs that never reach what N3 and C14b wait for: {', '.join(counts)}. {said}\n\n" if counts else ""


LEAST = 2 ** -len(SEEDS)  # of an exact p
EXACT = f"""The exact p is that of all signs of the seeds' differences. With {len(SEEDS)} seeds it is {LEAST:.2g} or more.
Doubled and times the {COUNT} claims it is {2 * COUNT * LEAST:.2g}. So no claim could be supported by exact tests, and the
verdicts rest on the t test."""
TASKS = """The base models and their rollouts, of the claims' seeds. The last two columns are of incorrect rollouts whose
problem has a correct one. They are the share of tokens that some correct one has at the same position, and the longest
beginning shared with one, as a share of the length."""
FORECAST = """KL of π̂ from the policy of step (1 + λ) t, over that of the policy of step t, along FPA's path. It is the
geometric mean over the claims' seeds. Below 1, π̂ is a forecast."""


def results(folder):
    """results.md of a folder of tables."""
    runs_held = held(folder)
    runs = study(runs_held)
    searches = {name: tune.search(name, tune.scores(name, runs_held)) for name in FAMILIES}
    found = claims(runs, {name: some.score for name, some in searches.items() if some.chosen})
    text, mixed = rule.__doc__.partition("\n\n")[2].strip(), of_several_kinds(found, runs)
    best = [("Off-RL, best on the claims' seeds (C12)", lr, RATES) for lr in [best_of_rates(Runs(runs))] if lr]
    best += [("SGD", lr, scale.RATES) for lr in [scale.best_rate(runs_held)] if lr]
    return (
        "# Results of the study on `habit`\n\nWritten by `python -m study.verdicts`.\n\n"
        f"## Claims\n\n{text}\n\n{claims_table(found)}\n{EXACT}\n\n{never(runs)}"
        f"## The two tasks (P0)\n\n{TASKS}\n\n{facts_table(runs)}\n"
        f"## Untuned, task `habit`\n\nTest problems, after the last step, seeds 0 to 4.\n\n{untuned_table(runs_held)}\n"
        f"## One thing changed, task `habit`\n\nThe claims' seeds.\n\n{experiment_tables(runs)}\n"
        f"## Numbers without a claim\n\nThey were looked at after the runs.\n\n{unclaimed_list(runs, runs_held)}\n"
        f"{FORECAST}\n\n{forecasts_table(runs)}\n"
        f"## Every family at its tuned setting, task `habit`\n\n{families_table(runs, 'final')}\n"
        f"## Every family at the same setting, task `slips`\n\n{families_table(runs, 'slips')}\n"
        f"## Tuning\n\nBy `python -m study.tune`, on seeds that no claim's number comes from.\n\n{searches_table(searches)}\n"
        f"The chosen settings on validation problems, the five tuning seeds:\n\n"
        f"{chosen_table(searches, runs_held)}\n{rates_table(runs_held, best)}\n"
        f"## Machines\n\nThe runs of {', '.join(mixed) or 'no claim'} come from several kinds of CPU.\n\n"
        f"{machines_table(runs, runs_held)}"
    )


# --- the command


def run(argv=None):
    """The command: write results.md, or one line on stderr and exit code 2."""
    parser = command_line(__doc__.splitlines()[0], prog="python -m study.verdicts")
    parser.add_argument("folder", nargs="?", default=Path("results"), type=printable_path, help="folder of tables")
    args = parser.parse_args(argv)
    path = args.folder / "results.md"
    with command(parser.prog, f"{path} is whole, and may be of before", path):
        write_text(path, results(args.folder))
        print(f"results       {path}")


if __name__ == "__main__":
    run()
