"""study/rule.py by hand, study/verdicts.py on made-up runs, and docs/protocol.md, which does not change."""

import csv
import hashlib
import math
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from losses import LOSSES
from study import experiments, real, results, rule, scale, sections, tune, verdicts
from study.rule import Claim, Measured

PAGE = Path("docs/protocol.md").read_text()


def number(values, side="", bound=0.0, ratio=False):
    return Measured("x", np.array(values, dtype=float), side, bound, ratio)


# --- the rule


def rules_table(found):
    """What is claimed and measured, without any run: a table of docs/protocol.md."""
    rows = [(name, claim.text, "<br>".join(map(str, claim.measured)), claim.experiments) for name, claim in found.items()]
    return sections.table(["id", "claim", "measured", "runs"], rows)


def test_the_rule_and_the_claims_are_those_that_were_committed_before_the_runs():
    assert rule.__doc__.partition("\n\n")[2].strip() in PAGE and rules_table(verdicts.claims({}, {})) in PAGE
    text = rule.__doc__.partition("\n\n")[2] + rules_table(verdicts.claims({}, {}))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9b917feb6631451d", "the rule has moved"
    assert len(verdicts.claims({}, {})) == rule.COUNT
    of_real = rules_table(real.claims({}))
    assert of_real in PAGE and len(real.claims({})) == real.COUNT
    assert hashlib.sha256(of_real.encode()).hexdigest()[:16] == "439caefeec17a58e", "the rule has moved"


def test_the_protocol_is_that_commits_and_the_code_has_its_numbers():
    """docs/contributing.md names the commit; where the history is there, its page is compared, elsewhere the page's digest."""
    (commit,) = re.findall(
        r"protocol\.md\]\(protocol\.md\) is that of commit `(\w+)`", Path("docs/contributing.md").read_text()
    )
    page = PAGE.partition("## The real model")[0]
    assert hashlib.sha256(page.encode()).hexdigest()[:16] == "4c3e30362792018f", "the protocol has moved"
    shown = subprocess.run(["git", "show", f"{commit}:docs/protocol.md"], capture_output=True, text=True)
    assert shown.returncode or shown.stdout.strip() == page.strip()
    text = " ".join(page.split())
    lr = " to ".join(f"{end:.0e}".replace("e-0", "e-") for end in tune.LR)
    assert f"draws {tune.SETTINGS} settings: the learning rate log-uniform from {lr}," in text
    first, rest, rounds = "two", {3: "three"}[tune.KEPT], {3: "three"}[tune.ROUNDS]
    assert f"trained on {first} seeds, and the best {rest} on {rest} more. The best mean over five seeds" in text
    assert len(tune.SEEDS) == 5 and tune.SEEDS[:2] == experiments.GRID_SEEDS
    assert f"within a factor of {tune.MARGIN:g} of an end of its range, this end moves by a factor of {tune.GROWTH:g}." in text
    assert f"Then {tune.SETTINGS} more settings are drawn. There are at most {rounds} rounds." in text
    assert experiments.RATES == pytest.approx([5e-5 * 2**i for i in range(7)])
    assert "the same grid: seven rates from 5e-5 to 3.2e-3, a factor of 2 apart, on the seeds 1000 and 1001" in text
    assert f"eight seeds {results.SEEDS[0]} to {results.SEEDS[-1]} serve the claims" in text and len(results.SEEDS) == 8
    assert f"seeds {tune.SEEDS[0]} to {tune.SEEDS[-1]} tune" in text and f"At {rule.ALPHA} a claim" in text
    assert text.count(f"within {rule.LEVEL} of the bound") == 2


@pytest.mark.parametrize(
    "values, side, bound, p_for, p_flip",
    [
        ([1, 2, 3], ">", 0, 0.03709, 1 / 8),  # t = 2 / (1 / √3) = 3.464, two degrees of freedom
        ([1, 2, 3], "<", 0, 1 - 0.03709, 1),
        ([1, 2, 3], "<", 4, 0.03709, 1 / 8),
        ([-1, 1], ">", 0, 0.5, 3 / 4),
        ([2, 2, 2], ">", 1, 0.0, 1 / 8),
        ([2, 2, 2], ">", 2, 1.0, 1),
        ([1, 2, 3, 4, 5, 6, 7, 8], ">", 0, 0.00063, 1 / 256),  # t = 4.5 / (2.449 / √8) = 5.196, seven degrees of freedom
    ],
)
def test_p_by_hand(values, side, bound, p_for, p_flip):
    made = number(values, side, bound)
    assert made.p_for == pytest.approx(p_for, abs=1e-5) and made.p_flip == pytest.approx(p_flip)
    assert made.p_against == pytest.approx(1 - p_for, abs=1e-5) or len(set(values)) == 1


def test_a_ratio_is_tested_by_its_logarithm():
    assert str(Measured("x", np.array([2.0]), ratio=True)) == "x: 2.00"  # of one seed there is no interval
    made, logs = number([0.5, 0.25, 0.125], "<", 1, ratio=True), np.log([0.5, 0.25, 0.125])
    assert made.p_for == pytest.approx(stats.ttest_1samp(logs, 0, alternative="less").pvalue)
    mean, half = results.mean_and_interval(logs)
    assert str(made).startswith(f"x: 0.250, {math.exp(mean - half):#.3g} to {math.exp(mean + half):#.3g} (claim: < 1)")
    assert made.p_flip == 1 / 8 and str(made).endswith(f", p {made.p_for:.2g}, exact 0.12")


def test_a_number_that_a_seed_lacks_is_said():
    assert str(number([0.1, np.nan, 0.2], ">")) == "x: not finite on 1 of 3 seeds (claim: > 0)"
    assert str(number([0.1, np.inf, np.nan], ratio=True)) == "x: not finite on 2 of 3 seeds"


def test_equivalence_is_two_one_sided_tests():
    near, far = [0.001, -0.001, 0.002, 0.0], [0.4, 0.41, 0.39, 0.4]
    for values, side, holds in ((near, "≈", True), (far, "≈", False), (near, "≉", False), (far, "≉", True)):
        made = number(values, side)
        assert (made.p_for < 1e-3) == holds and (made.p_against < 1e-3) != holds
    upper = stats.ttest_1samp(near, 0.03, alternative="less").pvalue
    lower = stats.ttest_1samp(near, -0.03, alternative="greater").pvalue
    assert number(near, "≈").p_for == pytest.approx(max(upper, lower))
    assert str(number(near, "≈")).endswith(f"(claim: ≈ 0), p {max(upper, lower):.2g}")


@pytest.mark.parametrize("spread", [0.01, 0.02, 0.03, 0.05, 0.1])
def test_level_is_a_90_percent_interval_within_the_margin(spread):
    values = spread * (np.arange(8) - 3.5)
    for made, logs in ((number(values, ">"), values), (number(np.exp(values), "<", 1, ratio=True), values)):
        half = stats.t.ppf(0.95, 7) * logs.std(ddof=1) / np.sqrt(8)
        assert made.is_level == (half <= 0.03)


def test_a_claim_holds_where_all_its_numbers_do_and_fails_where_one_fails():
    good, bad, said = number([1, 1.1, 1.2], ">"), number([-1, -1.1, -1.2], ">"), number([5.0, 6.0, 7.0])
    for_both = Claim("", [good, number([1, 2, 3], ">"), said], "").p
    assert for_both[0] == pytest.approx(0.03709, abs=1e-5)
    p_for, p_against = Claim("", [good, bad], "").p
    assert p_for > 0.99 and p_against == pytest.approx(2 * bad.p_against)
    diverged = number([1.0, np.nan, 1.2], ">")
    assert Claim("", [good, diverged], "").p[0] == Claim("", [diverged, good], "").p[0] == 1.0
    assert Claim("", [bad, diverged], "").p[1] == Claim("", [diverged, bad], "").p[1] == pytest.approx(2 * bad.p_against)
    assert Claim("", [good, number([], ">")], "").p is None and Claim("", [good, number([1.0], ">")], "").p is None


def test_holm_counts_all_claims_and_never_falls():
    def of(p):  # a claim whose p, both sides together, is this
        return type("Fixed", (), {"p": (p / 2, 1.0)})()

    adjusted = rule.holm({"a": of(0.001), "b": of(0.002), "c": of(0.5), "d": type("Fixed", (), {"p": None})()})
    assert adjusted == pytest.approx({"a": 0.017, "b": 0.032, "c": 1.0})
    adjusted = rule.holm({"a": of(0.001), "b": of(0.00101)})
    assert adjusted["b"] == adjusted["a"] == pytest.approx(0.017)


def test_the_five_verdicts():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(8)
    made = {
        "supported": number(1 + 0.01 * noise, ">"),
        "contradicted": number(-1 + 0.01 * noise, ">"),
        "level": number(0.001 * noise - 0.001 * noise.mean(), ">"),
        "undecided": number(noise - noise.mean(), ">"),
        "not run": number([], ">"),
    }
    assert rule.verdicts({name: Claim("", [m], "") for name, m in made.items()}) == {name: name for name in made}
    both = Claim("", [made["level"], made["undecided"]], "")  # one level number of two makes no level claim
    assert rule.verdicts({"x": both}) == {"x": "undecided"}


# --- the claims on made-up runs


def run_of(accuracy, **more):
    """A run with two evaluations, or as many as `more` has, and tables whose every number can be worked out by hand."""
    values = {"test_accuracy": accuracy, "test_accuracy_0.7": accuracy, "test_accuracy_greedy": accuracy, "test_pass@16": 0.9,
              "test_entropy": 0.1, "accuracy_0.7": accuracy, "logratio_correct_p5": -1.0, "tokens_sampled": 100.0,
              "tokens_trained": 200.0, "seconds": 10.0}  # fmt: skip
    steps, at = np.arange(300), more.get("at", 200)
    batch = {"step": steps, "up": np.ones(300), "down": np.where(steps < more.get("lowered", 60), 2.0, 0.5)}
    below = np.select([steps < at - 20, steps < at, steps < at + 20], [1, 0.6, 0.4], 0.1)  # of 0.5, from `at` on
    batch |= {"coefficient_correct": np.ones(300), "coefficient_incorrect": below}
    log = {"step": np.array([0.0, 1000.0])}
    for name, value in {**values, **more}.items():
        log[name] = np.array(value if isinstance(value, list) else [value, value], dtype=float)
    rows = [(t, (1 + lam) * t, lam, 0.1 * (1 if lam == 0 else 0.5)) for t in (10, 40, 80, 320) for lam in (1, 2)]
    rows += [(t, (1 + lam) * t, 0, 0.1) for t in (10, 40, 80, 320) for lam in (1, 2)] + [(10, 960, 0, 0.1)]
    table = dict(zip(("t", "later", "lam", "kl"), map(np.array, zip(*rows)))) | {"linear_r2": np.full(len(rows), 0.75)}
    return results.Run(Path("x"), {"steps": 1000}, log, {"batch": batch, "extrapolation": table})


def made_up():
    """{(experiment, case): {seed: Run}}, and the tuning scores."""
    final = {name: 0.5 for name in tune.FAMILIES}
    final |= {"fpa": 0.8, "off_rl": 0.2, "sft": 0.7, "topr": 0.9, "dpo": 0.4, "rpo": 0.65, "grpo": 0.75, "kto": 0.35}
    runs = {("final", name): accuracy for name, accuracy in final.items()}
    runs |= {("rates", f"{lr:g}"): 0.1 * i for i, lr in enumerate(experiments.RATES)}
    runs |= {("extrapolation", case): 0.5 for case in ("2e-05", "0.0002", "off_rl, 0.0002")}
    runs |= {("prolonged", "fpa"): 0.8, ("prolonged", "off_rl"): 0.3}
    runs |= {("lambda", f"λ = {lam}"): 0.6 - 0.05 * abs(lam - 2) for lam in experiments.LAMBDAS}
    runs |= {("targets", "incorrect"): 0.58, ("targets", "correct"): 0.1}
    runs |= {("sizes", "sft, 256 prompts"): 0.5, ("sizes", "fpa, 256 prompts"): 0.3, ("sizes", "sft, 4096 prompts"): 0.7}
    runs |= {("sizes", "fpa, 4096 prompts"): 0.75, ("scale", "AdamW"): 0.6, ("scale", "AdamW, mean 1"): 0.6}
    runs |= {("scale", "SGD"): 0.5, ("scale", "SGD, mean 1"): 0.6}
    more = {
        ("final", "fpa"): {"at": 99, "tokens_sampled": [225.0] * 3, "accuracy_0.7": [0.4, 0.8, 0.8],
                           "seconds": [5.0, 15.0, 45.0], "tokens_trained": [0.0, 300.0, 900.0],
                           "test_pass@16": 0.8, "test_entropy": 0.05},
        ("final", "grpo"): {"tokens_sampled": [50.0, 400.0], "accuracy_0.7": [0.4, 0.75], "tokens_trained": [1.0, 600.0],
                            "seconds": [1.0, 60.0]},
        ("final", "off_rl"): {"at": 199, "lowered": 120},
        ("extrapolation", "off_rl, 0.0002"): {"lowered": 150},
        ("final", "topr"): {"test_pass@16": 0.95},
        ("prolonged", "off_rl"): {"accuracy_0.7": [0.5, 0.6, 0.2]},
        ("prolonged", "fpa"): {"accuracy_0.7": [0.4, 0.82, 0.8]},
    }  # fmt: skip
    for i, lr in enumerate(experiments.RATES):
        more["rates", f"{lr:g}"] = {"logratio_correct_p5": -10.0 + i}
    made = {
        key: {seed: run_of(accuracy + 1e-4 * seed, **more.get(key, {})) for seed in range(8)} for key, accuracy in runs.items()
    }
    return made, {name: final[name] for name in tune.FAMILIES} | {"grpo": 1.0, "sft": 0.95}  # which C16 leaves out


EXPECTED = {  # means over seeds, by hand
    "N1": [0.75, 0.6],
    "N2": [1.0],
    "N3": [100 / 200],
    "C10": [0.5, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75],
    "N5": [0.0, 0.1],
    "C6": [0.02 - 0.4, 0.02],
    "C7": [0.6, 0.3, 0.4, 0.15, 0.45],
    "C11": [0.1, -0.15],
    "C12": [0.2],
    "C15": [-0.1, 0.3, 0.3, 0.3, 0.3],
    "C8": [0.1, 0.4, 0.5, 0.525, 0.55, 0.6, 0.45, 0.2],
    "C9": [0.08, -0.02, -0.4],
    "C14a": [0.8 - (0.4 + 0.75) / 2, 0.05],
    "C14b": [15 / 60, 300 / 600],
    "C16": [0.2, 0.05],
    "C17": [0.2, 0.05],
    "N4": [-0.1, -0.05],
}


def test_every_claim_measures_what_it_says():
    found = verdicts.claims(*made_up())
    assert found.keys() == EXPECTED.keys()
    for name, claim in found.items():
        assert [m.values.mean() for m in claim.measured] == pytest.approx(EXPECTED[name], abs=4e-4), name
        assert claim.seeds == [8] and set(claim.experiments.split()) <= {*experiments.EXPERIMENTS, "scale"}
    never = run_of(0.5, seconds=[1.0, 2.0, 3.0], **{"accuracy_0.7": [0.4, 0.6, 0.5]})
    slow = run_of(0.8, seconds=[1.0, 2.0, 9.0], **{"accuracy_0.7": [0.4, 0.6, 0.8]})
    assert verdicts.cost(never, "seconds") == 3
    # a run of ours that never gets there is not cheaper, though it ended sooner
    assert verdicts.costs({0: never, 1: slow, 2: slow}, {0: slow, 1: never, 3: slow}, "seconds").tolist() == [1, 3]
    assert verdicts.costs({0: slow}, {0: slow}, "seconds") == [1] and verdicts.costs({0: never}, {0: never}, "seconds") == [1]
    words = rule.verdicts(found)
    assert {name for name, word in words.items() if word == "contradicted"} == {"C11", "C15", "N4"}
    assert {word for word in words.values()} == {"supported", "contradicted"}


def test_one_seed_less_is_said_and_a_family_without_a_choice_is_not_run():
    runs, scores = made_up()
    del runs["final", "dpo"][7]
    del scores["kto"]
    found = verdicts.claims(runs, scores)
    assert found["C7"].seeds == [7, 8] and "| 7–8 |" in verdicts.claims_table({"C7": found["C7"]})
    assert rule.verdicts(found)["C16"] == "not run"
    text = verdicts.families_table(runs, "slips")
    assert text.count("not run") == len(tune.FAMILIES)


def test_the_best_rate_is_chosen_on_the_seeds_that_all_rates_have():
    made, _ = made_up()
    first, *_, last = (made["rates", f"{lr:g}"] for lr in experiments.RATES)
    first[8] = run_of(9.0)  # a seed of one rate alone
    assert verdicts.best_of_rates(verdicts.Runs(made)) == 0.0032
    first.clear()
    assert verdicts.best_of_rates(verdicts.Runs(made)) is None


def test_the_tables_of_what_was_chosen_by_hand():
    """From the CSV files: FPA's chosen setting on the tuning seeds, and what the base models of the claims' seeds are."""
    rows, curves = (list(csv.DictReader(open(f"results/{name}.csv"))) for name in ("runs", "curves"))
    by_id = {}
    for row in curves:
        by_id.setdefault(row["id"], []).append(row)
    same = {"loss": "fpa", "lr": "2.1e-05", "lam": "5.9", "target": "incorrect", "schedule": "", "task": "habit"}
    chosen = [by_id[row["id"]] for row in rows if same.items() <= row.items() and "tune-fpa" in row["experiments"].split()]
    assert len(chosen) == 5
    ratios = [
        np.mean([float(row["coefficient_incorrect"]) / float(row["coefficient_correct"]) for row in log[1:]]) for log in chosen
    ]
    names = "accuracy_0.7", "accuracy", "accuracy_greedy", "pass@16", "entropy", "logratio_correct_p5"
    cells = [*([float(log[-1][name]) for log in chosen] for name in names), ratios]
    text = Path("results/results.md").read_text()
    shown = " | ".join("{:.3f} ± {:.3f}".format(*results.mean_and_interval(values)) for values in cells)
    assert f"| `fpa` | {shown} |" in text
    bases = [row for row in rows if "rates" in row["experiments"].split() and float(row["lr"]) == 5e-5]
    cells = [[float(by_id[row["id"]][0][f"test_{name}"]) for row in bases] for name in names[:-1]]
    cells += [[float(row[f"measured.{name}"]) for row in bases] for name in ("share_correct", "shared_tokens", "common_prefix")]
    shown = " | ".join("{:.3f} ± {:.3f}".format(*results.mean_and_interval(values)) for values in cells)
    assert f"| `habit` | {shown} |" in text and len(bases) == 8


def test_runs_that_never_get_there_are_counted():
    runs, _ = made_up()
    runs["final", "off_rl"] = {seed: run_of(0.2, at=300 if seed < 3 else 100) for seed in range(8)}
    runs["final", "grpo"][5] = run_of(0.5)
    said = "3 of 8 of off_rl (N3), 0 of 8 of fpa (N3), 0 of 8 of fpa (C14b), 1 of 8 of grpo (C14b)."
    rule_of = "They count with their last step. In C14b such a run of FPA counts with GRPO's cost if this is larger."
    assert verdicts.never(runs) == f"Runs that never reach what N3 and C14b wait for: {said} {rule_of}\n\n"
    assert verdicts.never({}) == ""


def test_which_machines_made_a_claims_runs_is_said():
    def of(cpu, *experiments):
        return SimpleNamespace(config={"environment": {"cpu": cpu}}, experiments=experiments)

    made = {("final", "fpa"): "aab", ("final", "sft"): "b", ("slips", "fpa"): "a", ("slips", "sft"): "", ("rates", "1"): "a"}
    made = {case: dict(enumerate(map(of, kinds))) for case, kinds in made.items()}
    searched = {"1": of("b", "tune-fpa"), "2": of("a", "tune-fpa"), "3": of("a", "tune-sft", "final")}
    rows = ["final | 2 a: fpa; 2 b: fpa, sft", "slips | 1 a", "rates | 1 a", "tune-fpa | 1 a; 1 b", "tune-sft | 1 a"]
    assert sections.machines_table(made, searched).splitlines()[2:] == [f"| {row} |" for row in rows]
    claims = {"A": "final rates", "B": "slips rates", "C": "slips"}
    claims = {name: Claim("", [number([1.0])], experiments) for name, experiments in claims.items()}
    assert sections.of_several_kinds(claims, made) == ["A"]
    assert sections.of_several_kinds({"D": Claim("", [number([])], "final")}, made) == []  # a claim without numbers


def test_names_of_cases_are_those_of_the_experiments(monkeypatch):
    """Every (experiment, case) that a claim asks for is one of the experiments', or of scale's."""
    asked = set()
    monkeypatch.setattr(verdicts.Runs, "__call__", lambda self, *key: asked.add(key) or {})
    verdicts.claims({}, {})
    monkeypatch.setattr(tune, "search", lambda name, score: tune.Search([], [], {}, {"lr": 1e-4}, 0.5))
    monkeypatch.setattr(experiments, "best_rate", lambda grid, runs: min(grid))
    known = {(name, case) for name, (cases, _) in experiments.EXPERIMENTS.items() for case in cases({})}
    known |= {("scale", case) for case in scale.members({})}
    assert {"final", "scale"} <= {name for name, _ in asked} and asked <= known
    assert len(LOSSES) - 1 <= len(tune.FAMILIES)


def test_results_md_of_an_empty_folder_says_what_is_missing(tmp_path, capsys):
    verdicts.run([str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert text.count("**not run**") == rule.COUNT and "missing: 24 runs of this round" in text
    with pytest.raises(SystemExit) as stop:
        verdicts.run([str(tmp_path), "x"])
    assert stop.value.code == 2


def test_results_md_is_that_of_the_tables():
    assert Path("results/results.md").read_text() == verdicts.results(Path("results"))


def test_the_program_in_the_docs_finds_the_same_p_and_verdicts(capsys):
    (program,) = re.findall(r"```python\n(import csv.*?)```", Path("docs/contributing.md").read_text(), flags=re.S)
    exec(compile(program, "contributing.md", "exec"), {})
    text = Path("results/results.md").read_text()
    stated = {line[2:4]: re.findall(r", p ([^,]+), exact", line) for line in text.splitlines() if line[:3] in ("| C", "| N")}
    verdict = {line[2:4]: re.search(r"\*\*(.*?)\*\*", line)[1] for line in text.splitlines() if line[:3] in ("| C", "| N")}
    printed = {claim: (p, word) for claim, *p, word in map(str.split, capsys.readouterr().out.splitlines())}
    assert printed == {claim: (stated[claim], verdict[claim]) for claim in ("C8", "C9", "N2")}
    assert f"multiplies p by {rule.COUNT}, the number of claims" in Path("docs/contributing.md").read_text()
