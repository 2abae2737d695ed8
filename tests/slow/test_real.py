"""study/real.py: the study of a published model, on a tiny checkpoint that was taught its problems."""

import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats
from test_docs import flowing, table
from test_full_scale import write
from test_full_scale_gym import here
from test_full_scale_training import taught  # noqa: F401 (a fixture)
from test_interruption import Forked
from test_model import make

from losses import token_logps
from plumbing.files import UserError
from plumbing.keeper import warmup_cosine
from study import forecast, page, real, rule, sections, tune
from study.results import Run, read_folder
from study.tables import held


@pytest.fixture
def small(taught, tmp_path, monkeypatch):  # noqa: F811
    """A function that runs the command; the study's settings are those of a tiny checkpoint, four steps and two seeds."""
    folder, problems = taught
    lines = problems.read_text().splitlines()
    for task in real.PROBLEMS:
        place = tmp_path / "runs" / task
        place.mkdir(parents=True)
        write(place / "problems.jsonl", *lines[:4])
        write(place / "held_out.jsonl", *lines[4:])
    training = f"--init {folder} --batch-size 8 --micro-batch 8 --eval-samples 8 --no-save-model"
    short = {name: case for name, case in real.CASES.items() if case["lr"] == 2e-5 and "long" not in name}
    cases = {name: {**case, "lr": 1e-3, "steps": 4, "eval_every": 2} for name, case in short.items()}
    cases |= {name: {**real.CASES[name], "lr": 2e-3 if "slow" in name else 1e-3} for name in real.FORECASTS}
    monkeypatch.setattr(real, "TRAINING", training)
    monkeypatch.setattr(real, "ROLLOUTS", f"--model {folder} --n 6 --max-tokens 24")
    monkeypatch.setattr(real, "SEEDS", (0, 1))
    monkeypatch.setattr(real, "CASES", cases)

    def run(*names):
        real.run([*names, "--out", str(tmp_path / "runs"), "--to", str(tmp_path / "results"), "--jobs", "2"])
        return tmp_path / "results"

    return run


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """`real.call`, which forks what samples and trains from processes that have imported it, one at a time."""
    plain, lock, printed = real.call, threading.Lock(), tmp_path_factory.mktemp("forked") / "printed.txt"
    modules = ("full_scale.rollouts", "full_scale.train")
    with Forked(modules[0]) as sampling, Forked(modules[1]) as training:

        def call(module, *words):
            if module not in modules:
                return plain(module, *words)
            with lock:
                code, _ = (sampling if module == modules[0] else training).run(words, printed)
                if code:
                    raise UserError(printed.read_text())

        yield call


@pytest.fixture
def quick(small, forked, monkeypatch):
    """`small`, whose processes are forked."""
    monkeypatch.setattr(real, "call", forked)
    return small


def test_cases_are_trained_gathered_and_judged(small, capsys):
    folder = small("off_rl", "fpa")
    cases = real.study(folder)
    assert [list(cases[name]) for name in ("off_rl", "fpa", "sft")] == [[0, 1], [0, 1], []]
    text = (folder / "results.md").read_text()
    for run in cases["fpa"].values():
        assert run.config["loss"] == "fpa" and run.config["steps"] == 4 and run.log["step"][-1] == 4
        assert not np.isnan([run.log[column][-1] for column in real.SHOWN.values()]).any()
    lower = np.mean([run.log["logratio_correct"][-1] for run in cases["off_rl"].values()])
    cell = sections.numbers_of(cases["off_rl"], -1, real.SHOWN)[0]
    assert f"| `off_rl` | 2 | {cell} |" in text and f"[nats]: {lower:#.3g}" in text
    assert "| `topr` | 0 | not run |" in text and text.count("**not run**") == 3  # R2, R3, R4
    capsys.readouterr()
    small()
    assert capsys.readouterr().out.splitlines()[:3] == ["off_rl            2 of 2 seeds", "fpa               2 of 2 seeds",
                                                       "topr              0 of 2 seeds"]  # fmt: skip


def test_the_second_task_has_tables_of_its_own(quick):
    folder = quick("off_rl", "differences_off_rl")
    cases = real.study(folder)
    assert [list(cases[name]) for name in ("off_rl", "differences_off_rl", "differences_fpa")] == [[0, 1], [0, 1], []]
    assert {run.experiments for run in read_folder(folder)} == {("sums",)}
    assert {run.experiments for run in read_folder(folder / "differences")} == {("differences",)}
    sums, others = (folder / "results.md").read_text().split("\n## ")[2:4]
    assert "| `off_rl` | 2 |" in sums and "differences" not in sums and "| `differences_off_rl` | 2 |" in others


def test_a_second_command_repeats_nothing(quick, tmp_path):
    folder = quick("off_rl")
    held = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("log.csv")}
    before = (folder / "curves.csv").read_text()
    quick("off_rl")
    assert held == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("log.csv")} and len(held) == 2
    assert (folder / "curves.csv").read_text() == before
    assert {run.experiments for run in read_folder(folder)} == {("sums",)}  # whose runs are in both places now
    shutil.rmtree(tmp_path / "runs" / "sums" / "runs")
    quick("off_rl")  # the tables hold its runs
    assert not list((tmp_path / "runs").rglob("log.csv")) and (folder / "curves.csv").read_text() == before
    assert {run.experiments for run in read_folder(folder)} == {("sums",)}  # of which these runs stay


def test_a_forecast_is_measured_against_the_later_policy(quick):
    folder = quick("forecast")
    ratios = []
    for run in real.study(folder)["forecast"].values():
        table = run.tables["extrapolation"]
        assert set(zip(table["t"], table["later"])) == {(10, 20), (10, 30), (20, 30), (10, 40), (20, 40), (30, 40)}
        assert (table["kl"] > 0).all() and np.isnan(run.log["accuracy"]).all()
        (present,) = table["kl"][(table["t"] == 10) & (table["later"] == 20) & (table["lam"] == 0)]
        (future,) = table["kl"][(table["t"] == 10) & (table["later"] == 20) & (table["lam"] == 1)]
        (present_30,) = table["kl"][(table["t"] == 10) & (table["later"] == 30) & (table["lam"] == 0)]
        (future_30,) = table["kl"][(table["t"] == 10) & (table["later"] == 30) & (table["lam"] == 2)]
        ratios.append((future / present, future_30 / present_30))
        assert real.forecast(lambda t: t == 10)(run) == pytest.approx(np.prod(ratios[-1]) ** 0.5)
    text = (folder / "results.md").read_text()
    stated = re.search(r"\| `forecast` \| 0.001 \| 10 \| 2 \| (\S+), .* \| (\S+), ", text).groups()
    assert [float(x) for x in stated] == pytest.approx(np.exp(np.log(ratios).mean(0)), rel=0.01)
    assert text.count("| `forecast` |") == 2 and "| `slow_forecast` | 0.002 | 10 | 0 | not run |" in text


def test_a_forecast_without_problems_is_one_line(tmp_path):
    words = ["-m", "study.forecast", "--init", "x", "--data", "y", "--out", str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "--eval-problems: needed" in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run([sys.executable, *words, "--eval-problems", "none.jsonl"], capture_output=True, text=True)
    assert done.returncode == 2 and "none.jsonl: no such file" in done.stderr and done.stderr.count("\n") == 1


def test_a_signal_ends_the_trainings_too(small, tmp_path, monkeypatch):
    """SIGTERM reaches this process alone. The module that trains is here one that only waits."""
    write(tmp_path / "waits.py", "import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    original, before = real.call, len(real.CHILDREN)
    monkeypatch.setattr(real, "call", lambda *_: original("waits"))

    def signal_once_two_wait():
        while len(real.CHILDREN) < before + 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=signal_once_two_wait, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        small("off_rl")
    assert stop.value.code == 128 + signal.SIGTERM
    assert [child.poll() for child in real.CHILDREN[before:]] == [-signal.SIGTERM] * 2


def test_logits_are_kept_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast.full_scale.train, "run_settings", lambda *_: {"seed 0": {}, "seed 1": {}})
    with pytest.raises(UserError, match="2 runs, and logits are kept of one"):
        forecast.Snapshots(SimpleNamespace(out=tmp_path), None, None)


def test_single_tokens_are_on_the_page(quick):
    """Of an Off-RL and an FPA run without accuracies, which other runs of the same settings have."""
    folder = quick("forecast", "tokens")
    (pair, *_) = page.set_data(read_folder(folder))["pairs"]
    assert [len(some) for some in pair["tokens"]] == [len(text.split(",")) for text in pair["ref"]]
    correct, incorrect = ("".join(some) for some in pair["tokens"])
    assert correct != incorrect and pair["tokens"][0][: pair["first"]] == pair["tokens"][1][: pair["first"]]
    assert set(pair["ratios"][0][0][0]) == {","} and set(pair["ratios"][0][0][-1]) > {","}  # at first all are 0
    runs = real.study(folder)["tokens"]
    run = runs[0]
    cosines = [some.tables["entanglement"]["cosine"] for some in runs.values()]
    assert [len(some) for some in cosines] == [3, 3] and (np.abs(cosines) < 1).all()
    start, whole = (np.mean([pick(some) for some in cosines]) for pick in (lambda cosine: cosine[0], np.mean))
    row = re.search(r"cosine of the two gradients \| 2 \| (\S+) ± \S+ \| (\S+) ± ", (folder / "results.md").read_text())
    assert [*map(float, row.groups())] == pytest.approx([start, whole], rel=0.01) and start != whole
    off_rl = {**run.log, "accuracy": np.array([0.1, 0.2, 0.3, 0.4, 0.55])}
    assert page.accuracies(run, [run]) == ([], [])
    assert page.accuracies(run, [run, run._replace(log=off_rl)])[1][-1] == 0.55


def test_a_command_that_fails_is_one_line(small, monkeypatch, capfd):
    monkeypatch.setattr(real, "TRAINING", f"{real.TRAINING} --lr -1")
    with pytest.raises(SystemExit) as stopped:
        small("off_rl")
    assert stopped.value.code == 2 and "argument --lr" in capfd.readouterr().err.splitlines()[-1]


def test_a_seed_that_fails_leaves_the_others_in_the_tables(quick, monkeypatch, tmp_path, capsys):
    plain = real.call

    def failing(module, *words):
        if module == "full_scale.train" and words[words.index("--seed") + 1] == 1:
            raise UserError("no seed 1")
        plain(module, *words)

    monkeypatch.setattr(real, "call", failing)
    with pytest.raises(SystemExit):
        quick("off_rl")
    assert "no seed 1" in capsys.readouterr().err and list(real.study(tmp_path / "results")["off_rl"]) == [0]
    assert "| `off_rl` |" in (tmp_path / "results" / "results.md").read_text()


def test_verdicts_of_made_up_runs():
    """Differences that are the same in all seeds, up to a little noise, decide; three seeds of nothing do not."""

    def runs(level, accuracy):
        log = {"logratio_correct": level, "logratio_correct_p5": level - 5, "logratio_incorrect": 3 * level}
        log |= {"accuracy_0.7": accuracy, "logratio_correct_below_0": 0.9}
        noise = np.random.default_rng(0).normal(size=(3, len(log)))
        noisy = [{name: np.array([0.1, log[name] + 1e-3 * x]) for name, x in zip(log, row)} for row in noise]
        return {seed: Run(Path(), {}, values) for seed, values in enumerate(noisy)}

    cases = {"off_rl": runs(-10.0, 0.4), "fpa": runs(-5.0, 0.8), "topr": runs(0.0, 0.7), "power": runs(0.0, 0.9)}
    found = real.claims(cases)
    words = rule.verdicts(found, real.COUNT)
    # R1b: the correct rows are 5 nats higher, the margin is 10 smaller; R4: FPA is above TOPR and below power
    assert words == {"R1a": "supported", "R1b": "contradicted", "R2": "not run", "R3": "not run", "R4": "contradicted"}
    assert sorted(rule.holm(found, real.COUNT)) == ["R1a", "R1b", "R4"]


# --- what came out


def test_results_are_those_of_the_tables():
    assert (ROOT / "results" / "smollm2" / "results.md").read_text() == real.results(Path("results/smollm2"))


LABELS = {"before training": "before training", "`dpo`": "DPO", "`kto`": "KTO", "`off_rl`": "Off-RL", "`fpa`": "FPA"}
LABELS |= {"`power`": "`power`", "`fpa_incorrect`": "FPA, incorrect only", "`sft`": "SFT", "`topr`": "TOPR"}


def test_the_texts_state_its_numbers():
    text = (ROOT / "results" / "smollm2" / "results.md").read_text()
    page, readme = ((ROOT / name).read_text() for name in ("docs/findings.md", "README.md"))
    section = page.split("## Does the method hold on a published model?")[1].split("\n## ")[0]
    bullet = readme.split("- [A published model]")[1].split("\n- ")[0]
    numbers, prose = re.findall(r"-?\d+\.\d+ ± \d+\.\d+", section), " ".join(section.split())
    assert len(numbers) == 64 and all(number in text for number in numbers), numbers
    for claim, verdict in re.findall(r"(R\d[ab]?) is\s+(?:\w+\s+)?(undecided|supported|contradicted)", section):
        assert re.search(rf"^\| {claim}: .*\*\*{verdict}\*\*", text, flags=re.M), claim
    assert "5.92, 3.29 to 10.7 (claim: < 1)" in text and "geometric mean is 5.92, from 3.29 to 10.7. " in prose
    words = rule.verdicts(real.claims(real.study(Path("results/smollm2"))), real.COUNT)
    assert words == dict.fromkeys(("R1a", "R1b", "R2"), "undecided") | dict.fromkeys(("R3", "R4"), "contradicted")
    assert "None of the five claims is supported. R1a, R1b and R2 are undecided, and R3 and R4 are contradicted." in prose
    assert "R1, that Off-RL lowers correct rollouts and FPA less, and R2, that FPA stays stable, are undecided." in bullet
    assert "R3, that π̂ is a forecast, and R4, that the extrapolation matters, are contradicted." in bullet
    assert re.search(r"R1b: .* \| 0\.15 \| \*\*undecided", text) and "The corrected p is 0.15, so" in prose
    cases = real.study(Path("results/smollm2"))
    logs = {name: [run.log for run in cases[name].values()] for name in cases}
    accuracies, ratio, sums = [], {}, text.split("## Sums and differences")[0]
    shown = table(Path("docs/findings.md"), "| seeds | T = 0.7")
    for (name, label), (said, seeds, *cells) in zip(LABELS.items(), shown, strict=True):
        (row,) = (line.split(" | ") for line in sums.splitlines() if line.startswith(f"| {name} |"))
        assert (said, seeds, *cells[:3]) == (label, row[1], row[2], row[4], row[5])
        accuracies.append(float(row[2].split()[0]))
        if name != "before training":
            ratios = [log["coefficient_incorrect"][1] / log["coefficient_correct"][1] for log in logs[name.strip("`")]]
            ratio[label] = statistics.mean(ratios)
            assert cells[3] == f"{ratio[label]:.2f}"
    assert sorted(accuracies[1:]) == accuracies[1:] and len(accuracies) == len(LABELS)
    rank = stats.spearmanr(list(ratio.values()), accuracies[1:])[0]
    assert f"Over the eight losses the rank correlation of the two is {rank:.2f}." in prose and len(ratio) == 8
    swapped = [label for label, other in zip(ratio, sorted(ratio, key=ratio.get, reverse=True)) if label != other]
    assert swapped == ["SFT", "TOPR"] and "Only SFT and TOPR break this order." in prose
    assert {round(96 * log["accuracy_0.7"][-1]) for log in logs["fpa"]} == {62} and "62 of 96 answers" in prose

    def mean(name, value):
        return statistics.mean(map(value, logs[name]))

    lower = [[log[name][-1] < log[name][0] for log in logs["off_rl"]] for name in ("accuracy_greedy", "pass@4")]
    assert [*map(sum, lower)] == [2, 2] and "pass@4 end below their start after 40 steps on two seeds of three. |" in section
    assert all(log["logratio_correct"][-1] < 0 for log in logs["off_rl"]) and "nats, below 0 on each seed. " in prose
    greedy = {log["accuracy_greedy"][0] for some in ("off_rl", "fpa", "topr") for log in logs[some]}
    assert len(greedy) == 1 and "the greedy answers are the same on every seed." in prose


def test_what_is_said_of_margins_and_weights():
    cases, prose = real.study(Path("results/smollm2")), flowing(Path("docs/findings.md"))
    runs = {label: cases[name.strip("`")] for name, label in LABELS.items() if name != "before training"}
    margins = {label: real.each(some, real.margin).mean() for label, some in runs.items()}
    lowest, best = (
        sorted(runs, key=key)[:3] for key in (margins.get, lambda label: -real.each(runs[label], real.metric).mean())
    )
    assert lowest == ["SFT", "TOPR", "FPA, incorrect only"] and set(lowest) == set(best)
    assert "margins, {:.1f}, {:.1f} and {:.1f} nats. These three".format(*map(margins.get, lowest)) in prose
    assert f"The margin is {margins['FPA']:.1f} nats under FPA and {margins['Off-RL']:.1f} under Off-RL." in prose

    def weight(label, at):
        return real.each(runs[label], lambda run: run.log["coefficient_correct"][at]).mean()

    first, last, other = weight("FPA", 1), weight("FPA", 2), weight("Off-RL", 2)
    assert f"{first:.2f} over the first 20 steps and {last:.2f} over the last 20. Off-RL's is {other:.2f} over" in prose
    assert f"only keeps a weight of {weight('FPA, incorrect only', 2):.2f}, and its" in prose
    for loss in real.THREE:
        assert (
            real.each(cases[f"differences_{loss}"], real.last("logratio_correct_p50")) > 0
        ).all() and "The medians rise." in prose


def test_what_is_said_of_three_learning_rates():
    text, cases = (ROOT / "results" / "smollm2" / "results.md").read_text(), real.study(Path("results/smollm2"))
    prose = flowing(Path("docs/findings.md"))
    for label, *said in table(Path("docs/findings.md"), "| 5e-6 |"):
        (name,) = (name for name, shown in LABELS.items() if shown == label)
        rows = (re.search(rf"^\| `{name[1:-1]}{end}` \| 3 \| (\S+ ± \S+) ", text, flags=re.M) for end in real.RATES.values())
        assert said == [row[1] for row in rows]
    at = {name: [run.log for run in some.values()] for name, some in cases.items()}
    for end in real.RATES.values():
        behind = real.paired(cases["fpa" + end], cases["topr" + end], real.metric)
        assert len(behind) == 3 and (behind < 0).all()
    assert all(log["accuracy_0.7"][-1] < log["accuracy_0.7"][0] for log in at["fpa_5e-05"])
    median = {name: [log["logratio_correct_p50"][-1] < 0 for log in at[f"{name}_5e-05"]] for name in real.THREE}
    assert median == {"fpa": [True] * 3, "off_rl": [False] * 3, "topr": [False] * 3}
    weights = {name: np.mean([log["coefficient_correct"][1:] for log in at[f"{name}_5e-05"]], axis=0) for name in real.THREE}
    first, last = weights["fpa"]
    assert f"correct rollouts is {first:.2f} over the first 20 steps there and {last:.2f} over the last 20. " in prose
    assert "Off-RL's is {:.2f} and {:.2f}. So FPA hardly".format(*weights["off_rl"]) in prose
    ratios = [np.mean([log["coefficient_incorrect"][1] / log["coefficient_correct"][1] for log in at[name]])
              for name in ("fpa_5e-05", "off_rl_5e-05")]  # fmt: skip
    assert "Off-RL's in the first 20 steps, {:.2f} against {:.2f}.".format(*ratios) in prose
    best = {
        name: max(real.RATES.values(), key=lambda end: real.each(cases[name + end], real.metric).mean()) for name in real.THREE
    }
    assert set(best.values()) == {"_5e-06"} and "Off-RL, FPA and TOPR have their highest mean at 5e-6" in prose
    found = {name: tune.search(name, tune.scores(name, held(Path("results")))) for name in ("fpa", "kto", "topr", "sft")}
    scores, chosen = [search.score for search in found.values()], found["fpa"].chosen
    said = "scores FPA {:.3f}, with λ = {lam:g} on incorrect rows only. KTO has {:.3f}, TOPR {:.3f}, and SFT {:.3f}. |"
    assert said.format(*scores, **chosen) in Path("docs/findings.md").read_text() and chosen["target"] == "incorrect"


def test_what_is_said_of_the_gradients():
    cosines = [run.tables["entanglement"]["cosine"] for run in real.study(Path("results/smollm2"))["tokens"].values()]
    said = "It is {:.2f} and {:.2f} before training, and {:.2f} and {:.2f} after it."
    assert said.format(*(some[at] for at in (0, -1) for some in cosines)) in flowing(Path("docs/findings.md"))
    assert len(cosines) == 2 and all(some[0] < 0 < some[-1] for some in cosines)


def test_what_is_said_of_its_forecasts():
    text, cases = (ROOT / "results" / "smollm2" / "results.md").read_text(), real.study(Path("results/smollm2"))
    prose, bullet = (flowing(Path(name)) for name in ("docs/findings.md", "README.md"))
    rows = re.findall(r"^\| `(\w*forecast)` \| \S+ \| (\d+) \| (\d) \| (.*) \|$", text, flags=re.M)
    found = {(name, int(t)): cells.split(" | ") for name, t, _, cells in rows}
    mean = {key: [cell.split(",")[0] for cell in cells] for key, cells in found.items()}
    rates = {"forecast": "2e-5, 40", "slow_forecast": "1e-6, 40", "slow_long_forecast": "1e-6, 300"}
    shown = {
        (name, t): [rate, str(t), *(found if (name, t) == ("slow_long_forecast", 50) else mean)[name, t][:4]]
        for name, rate in rates.items()
        for t in real.FORECASTS[name]
    }
    assert table(Path("docs/findings.md"), "learning rate, steps | t") == [*shown.values()]
    first, _, slow, later, long = ([float(x.split(",")[0] or "nan") for x in cells[2:]] for cells in [*shown.values()][:5])
    assert min(first[0], first[2]) > 1 > max(slow[0], slow[2]) and later[0] < later[1]
    near, _, far, _, _ = found["slow_long_forecast", 50]
    (low, high), lowest = (float(x) for x in near.split(", ")[1].split(" to ")), float(far.split(", ")[1].split(" to ")[0])
    assert low < 1 < high and lowest > 1 > max(long[1], long[3]) and len(cases["slow_long_forecast"]) == 3
    straight = mean["slow_forecast", 10][-1], mean["slow_long_forecast", 50][-1]
    assert "It is {} up to step 30 of the 40 steps at 1e-6, and {} up to step 150".format(*straight) in prose
    assert "At 5e-5 FPA's accuracy ends below its start." in bullet


def test_a_policy_on_a_straight_line_is_forecast_where_its_rate_stays():
    """π̂ of a constant rate is the later policy itself; where the rate has fallen to nothing, π̂ is λ times too far."""
    flat = {"steps": 10**6}  # whose cosine is all but 1 at first
    assert real.on_a_line(flat, 1000, 3000) < 1e-3  # the warm-up's 10 steps are all that bends it
    moved = [0, *np.cumsum([warmup_cosine(step, real.WARMUP, 40) for step in range(40)])]
    assert {run.config["warmup"] for run in read_folder(Path("results/smollm2"))} == {real.WARMUP}
    assert real.on_a_line({"steps": 40}, 20, 40) == pytest.approx(((2 * moved[20] - moved[40]) / (moved[40] - moved[20])) ** 2)


def test_what_is_said_of_the_runs():
    """Passes over the rollouts, the second task's share of right rollouts, and the time on one core."""
    findings, protocol = (flowing(Path("docs") / name) for name in ("findings.md", "protocol.md"))
    runs = {task: held(real.tables_of("results/smollm2", task)).values() for task in real.PROBLEMS}
    passes = {run.config["steps"] * run.config["batch_size"] / run.config["rows"] for run in runs["sums"]}
    assert {0.83, 2.5} <= {round(share, 2) for share in passes}
    assert "This is 0.83 of a pass over the rollouts." in findings and "120 steps, or 2.5 passes." in findings
    (share,) = {round(run.config["measured"]["share_correct"], 2) for run in runs["differences"]}
    assert f"the model is right in {share} of its rollouts there" in protocol
    minutes = [run.log["seconds"][-1] / 60 for some in runs.values() for run in some if run.config["steps"] == real.SHORT]
    assert f"A run of 40 steps trains for {min(minutes):.0f} to {max(minutes):.0f} minutes on one core" in protocol


@here
def test_how_many_held_out_problems_are_a_training_sum_in_another_order(tmp_path):
    files = tmp_path / "problems.jsonl", tmp_path / "held_out.jsonl"
    real.call("full_scale.gym", *shlex.split(real.PROBLEMS["sums"]), "--to", *files)
    train, held_out = ([sorted(re.findall(r"\d+", line["problem"])) for line in map(json.loads, open(file))] for file in files)
    assert (len(train), len(held_out)) == (96, 48) and sum(numbers in train for numbers in held_out) == 16
    for name in ("findings.md", "protocol.md"):
        assert "Of the 48, 16 are a training sum in another order." in flowing(Path("docs") / name)


@pytest.mark.parametrize("prefix", [0, 40])
def test_snapshots_are_the_logits_of_the_completions(prefix, monkeypatch, tmp_path):
    """With worked examples that all rows share, and without."""
    monkeypatch.setattr(forecast, "ROWS", 4)
    generator, start = torch.Generator().manual_seed(0), torch.arange(prefix) % 13
    prompts = torch.tensor([prefix + 2, prefix + 1, prefix + 2, prefix + 1])
    tokens = [torch.cat([start, torch.randint(13, (n - prefix + 3,), generator=generator)]) for n in prompts.tolist()]
    names = ("length", "value", "mean_reward")
    data = SimpleNamespace(tokens=tokens, prompt_length=prompts, reward=torch.tensor([1.0, -1.0, 1.0, -1.0]))
    data.problem_ids = torch.tensor([0, 0, 1, 1])
    vars(data).update({name: torch.full((4,), 3.0) for name in names})
    model, later = make(), make()
    later.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})
    snapshots = forecast.Snapshots.__new__(forecast.Snapshots)
    snapshots.data, snapshots.kept, snapshots.first, snapshots.out = data, {}, None, tmp_path
    snapshots.tables, snapshots.decode = {"extrapolation": [], "tokens": [], "entanglement": []}, str
    for step, policy in ((0, model), (1, model), (2, later)):
        snapshots(step, policy, SimpleNamespace(seed=0), "cpu")
    p, q = ([policy(ids[None])[0, n - 1 : -1].log_softmax(-1) for ids, n in zip(tokens, prompts)] for policy in (later, model))
    kl = sum((x.exp() * (x - y)).sum() for x, y in zip(p, q)) / 12
    present = [row for row in snapshots.tables["extrapolation"] if row["lam"] == 0]
    assert [(row["t"], row["later"]) for row in present] == [(1, 2)] and present[0]["kl"] == pytest.approx(kl.item(), rel=1e-4)
    rows = snapshots.tables["tokens"]
    assert len(rows) == 3 * 2 * forecast.PAIRS and {row["side"] for row in rows} == {"correct", "incorrect"}
    of_first = [row for row in rows if row["step"] == 2 and row["tokens"] == json.dumps([f"[{i}]" for i in tokens[0][-3:]])]
    ratios = (p[0] - q[0])[torch.arange(3), tokens[0][-3:]].tolist()
    assert of_first and [float(x) for x in of_first[0]["logratios"].split()] == pytest.approx(ratios, abs=1e-3)
    gradients = []  # of the four rollouts, under the first policy; two pairs, each of them several times
    for ids, n in zip(tokens, prompts):
        model.zero_grad()
        token_logps(model(ids[None]), ids[None], torch.arange(len(ids))[None] >= n).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    cosines = [torch.cosine_similarity(*gradients[i : i + 2], dim=0).item() for i in (0, 2)]
    first, _, last = snapshots.tables["entanglement"]
    share = (first["cosine"] - cosines[1]) / (cosines[0] - cosines[1])  # of the pairs that are the first one
    count = share * forecast.GRADIENTS
    assert count == pytest.approx(round(count), abs=1e-2) and 0 <= round(count) <= forecast.GRADIENTS
    norms = [(gradient @ gradient).item() for gradient in gradients]
    assert first["a"] == pytest.approx(share * norms[0] + (1 - share) * norms[2], rel=1e-3) and last["a"] != first["a"]
