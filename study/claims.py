"""The claims that are checked, as numbers from the runs' logs with a verdict, and results.md.

    python -m study.claims        # results/slips -> results/slips/results.md
    python -m study.claims runs   # the runs below runs/ -> runs/results.md

`claims` says by which numbers a claim is measured and on which side of which bound it puts them. `verdict` is the rule. Both
were written before the runs. The last column of the claims table names a run's experiments as runs.csv does.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from losses import LOSSES
from plumbing.files import printable_path, write_text
from plumbing.flags import command, command_line
from study.results import (
    TUNING_SEEDS,
    best_settings,
    by,
    final,
    forecast,
    forecasts,
    fpa_runs,
    label,
    last,
    main_runs,
    mean_and_interval,
    read_folder,
    reported,
    summary,
    tokens,
    tuned,
    varying,
    where,
    with_table,
)  # fmt: skip


class Measured(NamedTuple):
    """One number a seed, and the side of a bound that the claim puts it on: ">" or "<", or "" where it is only reported."""

    text: str
    values: np.ndarray
    side: str = ""
    bound: float = 0.0
    seeded: bool = True  # False for what study/bench.py measured once

    def supports(self):
        mean, half = mean_and_interval(self.values)
        half = 0.0 if np.isnan(half) else half
        return mean - half > self.bound if self.side == ">" else mean + half < self.bound

    def __str__(self):
        mean, half = (f"{x:#.3g}" if abs(x) < 100 else f"{x:.0f}" for x in mean_and_interval(self.values))
        claimed = f" (claim: {self.side} {self.bound:g})" if self.side else ""
        return f"{self.text}: {mean}" + (f" ± {half}" if half != "nan" else "") + claimed


def verdict(measured):
    """A claimed number is supported if its whole 95 % interval is on the claimed side of the bound.

    All of a claim's numbers supported: reproduced. None: not reproduced. Some: mixed. Without two seeds of each: not run.
    """
    if any(len(m.values) < 1 + m.seeded for m in measured):
        return "not run"
    supported = [m.supports() for m in measured if m.side]
    return "reproduced" if all(supported) else "mixed" if any(supported) else "not reproduced"


def per_seed(runs, value):
    return np.array([value(run) for run in runs])


def paired(ours, theirs, value):
    """value(run) of one method minus that of another, seed by seed."""
    theirs = {run.config["seed"]: value(run) for run in theirs}
    return np.array([value(run) - theirs[run.config["seed"]] for run in ours if run.config["seed"] in theirs])


def ratio(ours, theirs, value):
    """value(run) of one method over that of another, seed by seed."""
    return np.exp(paired(ours, theirs, lambda run: np.log(value(run))))


def training_seconds(run):
    return run.log["seconds"][-1] - run.log["seconds"][0]


def start(run):
    return run.log["accuracy"][0]


def fall(run):
    """From the best evaluation to the last."""
    return run.log["accuracy"].max() - final(run)


def margin(run):
    """Mean log-ratio of correct rows less that of incorrect ones, after the last step."""
    return run.log["logratio_correct"][-1] - run.log["logratio_incorrect"][-1]


def accuracy(name, ours, theirs, side=">", bound=0.0):
    """The commonest number: one method's final accuracy less another's."""
    return Measured(f"final accuracy, {name}", paired(ours, theirs, final), side, bound)


def entanglement(column, index=slice(None)):
    return lambda run: np.mean(run.tables["entanglement"][column][index])


def early(t):
    return t <= 40


def late(t):
    return 80 <= t <= 320


def compared(runs):
    """Off-RL's and FPA's runs of the main setting."""
    main = main_runs(runs)
    return where(main, loss="off_rl"), fpa_runs(main)


def targeted(runs):
    """FPA's runs of the main setting with its coefficient on one kind of rows."""
    return {side: fpa_runs(main_runs(runs), target=side) for side in ("correct", "incorrect")}


def facts(name):
    return lambda run: run.config["measured"][name]


def average_coefficient(run):
    """On incorrect rows, over the whole training."""
    return np.mean(run.log["coefficient_incorrect"][1:])


def memory_ratio():
    """The toy's, as study/bench.py measured and wrote it: one number."""
    text = (Path(__file__).parent.parent / "docs" / "bench.md").read_text()
    return np.array([float(value) for value in re.findall(r"toy: peak memory, FPA / Off-RL \| ([\d.]+)", text)])


# --- the claims: {id: (claim, [Measured], names of experiments)}, groups in order


def shared_tokens(runs):
    """C1, C2: correct and incorrect answers are alike."""
    table = {}
    off_rl, _ = compared(runs)
    of_toy = [run for run in off_rl if "shared_tokens" in run.config.get("measured", {})]
    entangled = with_table(off_rl, "entanglement")
    table["C1"] = "correct and incorrect answers share most tokens", [
        Measured("share of incorrect tokens also in some correct rollout", per_seed(of_toy, facts("shared_tokens")), ">", 0.5),
        Measured("longest common prefix, share of the length", per_seed(of_toy, facts("common_prefix"))),
    ], ["main"]  # fmt: skip
    table["C2"] = "the gradients of correct and incorrect answers are entangled", [
        Measured("cosine, mean over Off-RL's run", per_seed(entangled, entanglement("cosine")), ">"),
        Measured("cosine before training", per_seed(entangled, entanglement("cosine", 0))),
        Measured("share of pairs with g > a, mean over Off-RL's run", per_seed(entangled, entanglement("share_g_above_a"))),
        Measured("share before training", per_seed(entangled, entanglement("share_g_above_a", 0))),
    ], ["main"]  # fmt: skip
    return table


def divergence(runs):
    """C3 to C5: what Off-RL does to correct answers, and FPA's brake."""
    table = {}
    off_rl, fpa = compared(runs)
    table["C3"] = "Off-RL drags correct answers down", [
        Measured("final log-ratio of correct ones [nats]", per_seed(off_rl, last("logratio_correct")), "<"),
        Measured("of incorrect ones [nats]", per_seed(off_rl, last("logratio_incorrect"))),
    ], ["main"]  # fmt: skip
    table["C4"] = "FPA keeps correct answers higher than Off-RL does, at a larger margin", [
        Measured("final log-ratio of correct ones, FPA − Off-RL [nats]", paired(fpa, off_rl, last("logratio_correct")), ">"),
        Measured("correct − incorrect log-ratio, FPA − Off-RL [nats]", paired(fpa, off_rl, margin), ">"),
        Measured("the same, FPA alone [nats]", per_seed(fpa, margin), ">"),
    ], ["main"]  # fmt: skip
    brake = per_seed(fpa, lambda run: np.mean(run.log["pihat_incorrect"] / run.log["pi_incorrect"]))
    counts = per_seed(fpa, lambda run: (run.log["below_0.2_pihat"][-1] - run.log["below_0.2_pi"][-1]) / 1000)
    table["C5"] = "FPA brakes earlier", [
        Measured("future π̄ / π̄ of incorrect answers, mean over FPA's run", brake, "<", 1),
        Measured("thousands of incorrect rows with future π̄ below 0.2, more than with π̄", counts, ">"),
    ], ["main"]  # fmt: skip
    return table


def collapse(runs):
    """C6: prolonged training."""
    table = {}
    long = by(varying(runs, "steps", "eval_every"), lambda run: run.config["steps"])
    long = long[max(long)] if len(long) > 1 else []
    long_off_rl, long_fpa = where(long, loss="off_rl"), fpa_runs(long)
    table["C6"] = "prolonged training collapses Off-RL, not FPA", [
        Measured("final − start accuracy, Off-RL", per_seed(long_off_rl, lambda run: final(run) - start(run)), "<"),
        Measured("final − start accuracy, FPA", per_seed(long_fpa, lambda run: final(run) - start(run)), ">"),
        Measured("best − final accuracy, Off-RL", per_seed(long_off_rl, fall)),
        Measured("best − final accuracy, FPA", per_seed(long_fpa, fall)),
        Measured("best − final accuracy, FPA − Off-RL", paired(long_fpa, long_off_rl, fall), "<"),
    ], ["prolonged"]  # fmt: skip
    return table


def beside_others(runs):
    """C7: FPA and other losses."""
    table = {}
    best = tuned(runs)
    best_fpa = best.get(("fpa", True), [])
    table["C7"] = "FPA beats Off-RL, DPO, RPO, KTO and SimPER, each at its own best learning rate", [
        accuracy(f"FPA − {LOSSES[loss].label}", best_fpa, best.get((loss, False), []))
        for loss in ("off_rl", "dpo", "rpo", "kto", "simper")
    ], ["tuning", "losses"]  # fmt: skip
    return table


def how_far_and_where(runs):
    """C8, C9: λ, and the rows that FPA's coefficient is used on."""
    table = {}
    main = main_runs(runs)
    off_rl, fpa = compared(runs)
    only = targeted(runs)
    lams = {lam: fpa_runs(main, lam) for lam in (0.5, 1.0, 5.0, 10.0)} | {0.0: off_rl, 2.0: fpa}
    table["C8"] = "λ from 0.5 to 2 is good, 0 and 10 are worse", [
        accuracy(f"λ = {middle:g} − λ = {end:g}", lams[middle], lams[end]) for end in (0.0, 10.0) for middle in (0.5, 1.0, 2.0)
    ], ["lambda"]  # fmt: skip
    table["C9"] = "FPA's gain comes from the incorrect rows", [
        accuracy("FPA's coefficient on incorrect rows only − Off-RL", only["incorrect"], off_rl),
        accuracy("on incorrect rows only − on both, at most a little worse", only["incorrect"], fpa, ">", -0.05),
        accuracy("FPA's coefficient on correct rows only − Off-RL", only["correct"], off_rl, "<", 0.05),
        Measured("gradient norm at the end, Off-RL", per_seed(off_rl, last("grad_norm"))),
        *[Measured(f"the same, FPA's coefficient on {side} rows only", per_seed(some, last("grad_norm")))
          for side, some in only.items()],
    ], ["targets"]  # fmt: skip
    return table


def forecasting(runs):
    """C10: does the extrapolation predict the future?"""
    table = {}
    diagnosed = with_table(fpa_runs(varying(runs, "lr")), "extrapolation")
    diagnosed = by([r for r in diagnosed if all(forecasts(r, t).size for t in (early, late))], lambda run: run.config["lr"])
    slow = diagnosed.get(2e-5, [])
    table["C10"] = "the extrapolation predicts the future: distance of π̂ from π at t′ = (1 + λ) t, over π's, λ of 1 and 2", [
        *[Measured(f"KL, lr {lr:g}, t {words}", per_seed(diagnosed.get(lr, []), forecast(accepts)), "<", 1)
          for lr in (2e-5, 2e-4) for words, accepts in (("from 10 to 40", early), ("from 80 to 320", late))],
        *[Measured(f"{words}, lr 2e-05, t from 10 to 40", per_seed(slow, forecast(early, column)))
          for words, column in (("log-probability of sampled tokens", "token_error"), ("coefficients", "coefficient_error"))],
        Measured("rank correlation of coefficients with the later ones, π̂'s − π's, lr 2e-05, t from 10 to 40",
                 per_seed(slow, lambda run: -np.diff(forecasts(run, early, "coefficient_rank"), axis=0).mean())),
    ], ["extrapolation"]  # fmt: skip
    return table


def fpa_forms(runs):
    """C11: FPA's form of other losses."""
    table = {}
    best = tuned(runs)
    table["C11"] = "FPA also improves DPO and RPO, each at its own best learning rate and λ", [
        accuracy(f"{name} with FPA − {name}", best.get((loss, True), []), best.get((loss, False), []))
        for loss, name in ((loss, LOSSES[loss].label) for loss in ("dpo", "rpo"))
    ], ["tuning", "losses"]  # fmt: skip
    return table


def slower_training(runs):
    """C12: Off-RL at smaller learning rates."""
    table = {}
    off_rl, fpa = compared(runs)
    slower = by(where(varying(runs, "lr"), loss="off_rl"), lambda run: run.config["lr"])
    slower = {lr: some for lr, some in slower.items() if lr < main_runs(runs)[0].config["lr"]}
    target = np.mean(per_seed(fpa, last("logratio_incorrect"))) if fpa else 0.0
    nearest = min(slower, key=lambda lr: abs(np.mean(per_seed(slower[lr], last("logratio_incorrect"))) - target), default=None)
    table["C12"] = "FPA is not just slower training", [
        *[accuracy(f"FPA − Off-RL at lr {lr:g}", fpa, some) for lr, some in slower.items()],
        Measured(
            f"final log-ratio of incorrect ones, FPA − Off-RL at lr {nearest or 0:g}, the nearest [nats]",
            paired(fpa, slower.get(nearest, []), last("logratio_incorrect")),
        ),
    ], ["slower"]  # fmt: skip
    return table


def overhead(runs):
    """C13: time and memory."""
    table = {}
    off_rl, fpa = compared(runs)
    table["C13"] = "FPA's overhead is negligible", [
        Measured("training time, FPA / Off-RL, two runs at once", ratio(fpa, off_rl, training_seconds), "<", 1.1),
        Measured("peak memory, FPA / Off-RL, by study/bench.py, once", memory_ratio(), "<", 1.02, seeded=False),
    ], ["main"]  # fmt: skip
    return table


def online(runs):
    """C14: GRPO."""
    table = {}
    best = tuned(runs)
    best_fpa = best.get(("fpa", True), [])
    best_grpo = best.get(("grpo", False), [])
    timed = [run for run in varying(runs, "lr", "eval_every") if run.config["eval_every"] == run.config["steps"]]
    table["C14"] = "FPA is near online RLVR at a fraction of the cost, each at its own best learning rate", [
        accuracy("FPA − GRPO", best_fpa, best_grpo, ">", -0.05),
        Measured("tokens sampled, FPA / GRPO", ratio(best_fpa, best_grpo, last("tokens_sampled")), "<", 0.5),
        Measured("seconds of sampling and training, FPA / GRPO, two runs at once",
                 ratio(fpa_runs(timed), where(timed, loss="grpo"), last("seconds")), "<", 0.5),
        Measured("tokens sampled or trained on, FPA / GRPO", ratio(best_fpa, best_grpo, lambda run: tokens(run.log)[-1])),
    ], ["tuning", "losses", "cost"]  # fmt: skip
    return table


def controls(runs):
    """C15, C16: what FPA might be mistaken for."""
    table = {}
    main, best, only = main_runs(runs), tuned(runs), targeted(runs)
    _, fpa = compared(runs)
    sft, constant, sharpened = (where(main, loss=loss) for loss in ("sft", "constant", "sharpened"))
    best_fpa = best.get(("fpa", True), [])
    table["C15"] = "the future matters, not just a weaker push on incorrect rows", [
        accuracy("FPA's coefficient on incorrect rows only − a constant there", only["incorrect"], constant),
        accuracy("FPA − sharpened", fpa, where(sharpened, lam=2.0, target="both")),
        accuracy("the same, each on incorrect rows only", only["incorrect"], where(sharpened, lam=2.0, target="incorrect")),
        Measured("the constant", per_seed(constant, lambda run: run.config["weight"])),
        Measured("FPA's average weight of ∇ logp_mean on incorrect rows", per_seed(only["incorrect"], average_coefficient)),
    ], ["controls"]  # fmt: skip
    table["C16"] = "incorrect rows are worth having", [
        accuracy("FPA − SFT", fpa, sft),
        accuracy("each at its own best learning rate", best_fpa, best.get(("sft", False), [])),
    ], ["controls", "tuning", "losses"]  # fmt: skip
    return table


def amount_of_data(runs):
    """C17: few prompts and many."""
    table = {}
    sizes = by(varying(runs, "prompts"), lambda run: run.config["prompts"])
    sizes = sizes if len(sizes) > 1 else {0: []}
    ends = {size: [fpa_runs(sizes[size]), where(sizes[size], loss="sft")] for size in sizes}
    table["C17"] = "who wins depends on how much data there is: SFT with few prompts, FPA with many", [
        accuracy(f"FPA − SFT, {min(sizes)} prompts", *ends[min(sizes)], "<"),
        accuracy(f"FPA − SFT, {max(sizes)} prompts", *ends[max(sizes)], ">"),
    ], ["prompts"]  # fmt: skip
    return table


GROUPS = (
    shared_tokens,
    divergence,
    collapse,
    beside_others,
    how_far_and_where,
    forecasting,
    fpa_forms,
    slower_training,
    overhead,
    online,
    controls,
    amount_of_data,
)


def claims(runs):
    """{id: (claim, [Measured], names of experiments)}; numbers whose runs are missing have no values."""
    return {name: claim for group in GROUPS for name, claim in group(runs).items()}


# --- results.md


def claims_table(table):
    """`claims` as a Markdown table."""
    lines = ["| claim | measured: mean over seeds ± 95 % interval | seeds | verdict | runs |", "|---|---|---|---|---|"]
    for name, (text, measured, experiments) in table.items():
        seeds, words = sorted({len(m.values) for m in measured if m.seeded}), verdict(measured)
        numbers = "" if words == "not run" else "<br>".join(map(str, measured))
        cells = [f"{name}: {text}", numbers, "–".join(map(str, seeds)), f"**{words}**", ", ".join(experiments)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning_part(runs):
    """The learning rates that tuning chose, and the runs that chose them; empty without such runs."""
    tuning = where(runs, seed=TUNING_SEEDS)
    if not tuning:
        return ""
    seeds, grid = (sorted({run.config[name] for run in tuning}) for name in ("seed", "lr"))
    chosen = "".join(
        f"{label(method):32}{lr:g}{', an end of the grid' if lr in (grid[0], grid[-1]) else ''}\n"
        for method, lr in best_settings(runs).values()
    )
    return (
        f"\n## Tuning\n\nSeeds {tuple(seeds)}, used for nothing else. Best learning rates, by final accuracy:\n\n"
        f"```\n{chosen}```\n\n```\n{summary(tuning)}```\n"
    )


def results(runs):
    """results.md: the claims table, the learning rates that tuning chose, and every method of every setting."""
    table = claims(runs)
    return (
        "# Results\n\nWritten by `python -m study.claims`.\n\n## Claims\n\n"
        f"{verdict.__doc__.strip()}\n\n{claims_table(table)}\n\n"
        f"## Every setting\n\n```\n{summary(reported(runs))}```\n{tuning_part(runs)}"
    )


# --- the command


def run(argv=None):
    """The command: write results.md, or one line on stderr and exit code 2."""
    parser = command_line(__doc__.splitlines()[0], prog="python -m study.claims")
    parser.add_argument(
        "folder", nargs="?", default=Path("results/slips"), type=printable_path, help="folder of tables or of runs"
    )
    args = parser.parse_args(argv)
    path = args.folder / "results.md"
    with command(parser.prog, f"{path} is whole, and may be of before", path):
        write_text(path, results(read_folder(args.folder)))
        print(f"results       {path}")


if __name__ == "__main__":
    run()
