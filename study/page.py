"""docs/playground.html: the method to play with in a browser, in one file that needs no server and no network.

    python -m study.page             # results/ and the claims of results/slips -> docs/playground.html
    python plots.py runs --html      # own runs, trained with --diagnostics -> runs/figures/report.html

study/page.html and study/page.js are the page without its data. Their arithmetic is that of losses.py, and a test holds the two
together. The data are claims as cards, and of the toy and of a published model the single tokens of two methods.

Left out: π̂ of real tokens at every λ. It needs the whole vocabulary's logits, and tokens.csv holds it at four λ.
"""

import json
import re
from pathlib import Path

import numpy as np

from losses import LOSSES
from plumbing.files import UserError, write_text
from plumbing.flags import command, command_line
from study import claims
from study.diagnostics import TOKEN_LAMS
from study.drawing import HIT, by_drag, colour_of, coloured, few, texts
from study.results import by_method, describe, label, main_runs, mean_and_interval, read_folder, with_table

PARTS = Path(__file__).parent  # where page.html and page.js are
TO = Path("docs/playground.html")
SETS = ("results", "results/smollm2")  # the folders whose tokens it shows
SIMULATED = ("off_rl", "fpa", "topr", "constant")  # the losses that page.js computes
SAME = ("seed", "lr", "steps", "prompts", "init")  # of the runs that accuracies are taken from


def thousandths(text):
    """A list of numbers of tokens.csv as whole thousandths, as precise as they are there; of 0, which is frequent, nothing."""
    return ",".join(str(round(1000 * float(number)) or "") for number in text.split())


def interval(number):
    """(low, mean, high) of a number of study/claims.py or of study/rule.py; a ratio's is that of its logarithm."""
    scale, back = (np.log, np.exp) if getattr(number, "ratio", False) else (np.asarray, np.asarray)
    mean, half = mean_and_interval(scale(number.values))
    return [float(f"{end:.4g}") for end in back(mean + np.nan_to_num(half) * np.array([-1, 0, 1]))]  # of one value: the value


def clearance(number):
    """How far a number's mean is on the claimed side of its bound, in half-widths of its interval."""
    low, mean, high = interval(number)
    beyond = mean - number.bound
    return {">": beyond, "<": -beyond, "≈": -abs(beyond), "≉": abs(beyond)}[number.side] / max((high - low) / 2, 1e-12)


def card(name, text, measured, verdict):
    """A claim as a card: its sentence and verdict, the interval and bound of its weakest number, and all numbers as text."""
    made = {"id": name, "sentence": text, "verdict": verdict, "measured": "", "interval": None, "bound": None, "numbers": []}
    if verdict == "not run":
        return made
    claimed = [number for number in measured if number.side]
    weakest = min(claimed, key=clearance)  # it decides, because a claim holds where all of its numbers do
    words = f"{weakest.text} (claim: {weakest.side} {weakest.bound:g})"
    return made | {
        "measured": words if len(claimed) == 1 else f"the weakest of {len(claimed)}: {words}",
        "interval": interval(weakest),
        "bound": weakest.bound,
        "numbers": [str(number) for number in measured],
    }


def judged(runs):
    """The first study's claims, from its runs: {"about": where they come from, "cards": [dict]}."""
    cards = [card(name, text, some, claims.verdict(some)) for name, (text, some, _) in claims.claims(runs).items()]
    return {"about": f"Means over seeds with 95 % intervals, {describe(main_runs(runs)[0].config)}.", "cards": cards}


def pair_data(runs, pair):
    """A pair of rollouts in the runs of one seed, a run a method: logs as [method][side][step], and futures also [λ]."""
    made = {"seed": runs[0].config["seed"], "ratios": [], "future": []}
    for run in runs:
        table = run.tables["tokens"]
        at = [np.flatnonzero((table["pair"] == pair) & (table["side"] == side)) for side in ("correct", "incorrect")]
        made["ratios"].append([[thousandths(table["logratios"][row]) for row in rows] for rows in at])
        columns = [table[f"future_logps_{lam:g}"] for lam in TOKEN_LAMS]
        made["future"].append([[[thousandths(column[row]) for column in columns] for row in rows] for rows in at])
    firsts = [rows[0] for rows in at]  # what no run and no step changes
    return made | {
        "first": int(table["first_wrong"][firsts[0]]),
        "tokens": [texts(table["tokens"][row]) for row in firsts],
        "ref": [thousandths(table["ref_logps"][row]) for row in firsts],
    }


def accuracies(run, runs):
    """(steps, accuracies) of a run, or of another one of runs that differs in its evaluations alone; ([], []) without any."""
    alike = [other for other in runs if (*other.method, *map(other.get, SAME)) == (*run.method, *map(run.get, SAME))]
    for other in (run, *alike):
        if np.isfinite(other.log["accuracy"]).all():
            return [[float(f"{x:.4g}") for x in other.log[name]] for name in ("step", "accuracy")]
    return [], []


def set_data(runs):
    """The single tokens of two methods. Pairs are in order of their drag under the first method, the most dragged one first.

    Raises UserError without single tokens.
    """
    known = [run for run in with_table(runs, "tokens") if f"future_logps_{TOKEN_LAMS[0]}" in run.tables["tokens"]]
    if not known:
        raise UserError("the page needs runs with their single tokens; try: python train.py --diagnostics")
    methods = by_method(few(main_runs(known), most=2))
    seeds = {}  # {seed: a run a method}
    for some in methods.values():
        for run in some:
            seeds.setdefault(run.config["seed"], []).append(run)
    seeds = {seed: some for seed, some in seeds.items() if len(some) == len(methods)}
    if not seeds:
        raise UserError(f"the page needs a seed of both {' and '.join(map(label, methods))}")
    drags = [(drag, seed, pair) for seed, some in seeds.items() for pair, drag in by_drag(some[0].tables["tokens"]).items()]
    first, *_ = next(iter(seeds.values()))
    several = "seeds" if len(seeds) > 1 else "seed"
    return {
        "name": re.sub(r"\.Q\w+$", "", first.config.get("init", f"the toy, task {first.config.get('task')}")),
        "methods": [
            {"label": label(method), "colour": colour, "lam": some[0].get("lam")} for colour, method, some in coloured(methods)
        ],
        "steps": sorted({int(step) for step in first.tables["tokens"]["step"]}),
        "accuracy": {seed: [accuracies(run, runs) for run in some] for seed, some in seeds.items()},
        "pairs": [pair_data(seeds[seed], pair) for _, seed, pair in sorted(drags)],
        "about": f"Runs of {describe(first.config)}; {several} {', '.join(map(str, seeds))}, {len(drags)} pairs",
    }


def write_page(folders, shown_claims, path):
    """Write the page of lists of runs with single tokens, and of cards.

    Raises UserError where tokens lack, or the disk is full.
    """
    data = {
        "colours": {loss: colour_of(loss) for loss in SIMULATED},
        "names": {loss: LOSSES[loss].label for loss in SIMULATED},
        "hit": HIT,
        "lams": [0, *TOKEN_LAMS],
        "sets": [set_data(runs) for runs in folders],
        "claims": shown_claims,
    }
    data = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    page, script = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    write_text(path, page.replace("SCRIPT", script, 1).replace("DATA", data, 1))


# --- the command


def run(argv=None):
    """The command: write docs/playground.html, or one line on stderr and exit code 2."""
    parser = command_line(__doc__.splitlines()[0], prog="python -m study.page")
    parser.parse_args(argv)
    with command(parser.prog, f"{TO} is whole, and may be of before", TO):
        write_page([read_folder(Path(name)) for name in SETS], judged(read_folder(Path("results/slips"))), TO)
        print(f"page          {TO}")


if __name__ == "__main__":
    run()
