"""study/real.py: the study of a published model, on a tiny checkpoint that was taught its problems."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats
from test_docs import table
from test_full_scale import write
from test_full_scale_training import taught  # noqa: F401 (a fixture)
from test_model import make

from plumbing.files import UserError
from plumbing.keeper import warmup_cosine
from study import forecast, page, real, rule, verdicts
from study.results import Run, read_folder


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


def test_cases_are_trained_gathered_and_judged(small, capsys):
    folder = small("off_rl", "fpa")
    cases = real.study(folder)
    assert [list(cases[name]) for name in ("off_rl", "fpa", "sft")] == [[0, 1], [0, 1], []]
    text = (folder / "results.md").read_text()
    for run in cases["fpa"].values():
        assert run.config["loss"] == "fpa" and run.config["steps"] == 4 and run.log["step"][-1] == 4
        assert not np.isnan([run.log[column][-1] for column in real.SHOWN.values()]).any()
    lower = np.mean([run.log["logratio_correct"][-1] for run in cases["off_rl"].values()])
    cell = verdicts.numbers_of(cases["off_rl"], -1, real.SHOWN)[0]
    assert f"| `off_rl` | 2 | {cell} |" in text and f"[nats]: {lower:#.3g}" in text
    assert "| `topr` | 0 | not run |" in text and text.count("**not run**") == 3  # R2, R3, R4
    capsys.readouterr()
    small()
    assert capsys.readouterr().out.splitlines()[:3] == ["off_rl            2 of 2 seeds", "fpa               2 of 2 seeds",
                                                       "topr              0 of 2 seeds"]  # fmt: skip


def test_the_second_task_has_tables_of_its_own(small):
    folder = small("off_rl", "differences_off_rl")
    cases = real.study(folder)
    assert [list(cases[name]) for name in ("off_rl", "differences_off_rl", "differences_fpa")] == [[0, 1], [0, 1], []]
    assert {run.experiments for run in read_folder(folder)} == {("sums",)}
    assert {run.experiments for run in read_folder(folder / "differences")} == {("differences",)}
    sums, others, _ = (folder / "results.md").read_text().split("\n## ")[2:]
    assert "| `off_rl` | 2 |" in sums and "differences" not in sums and "| `differences_off_rl` | 2 |" in others


def test_a_second_command_repeats_nothing(small, tmp_path):
    folder = small("off_rl")
    held = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("log.csv")}
    before = (folder / "curves.csv").read_text()
    small("off_rl")
    assert held == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("log.csv")} and len(held) == 2
    assert (folder / "curves.csv").read_text() == before
    shutil.rmtree(tmp_path / "runs" / "sums" / "runs")
    small("off_rl")  # the tables hold its runs
    assert not list((tmp_path / "runs").rglob("log.csv")) and (folder / "curves.csv").read_text() == before


def test_a_forecast_is_measured_against_the_later_policy(small):
    folder = small("forecast")
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
    assert text.count("| `forecast` |") == 1 and "| `slow_forecast` | 0.002 | 10 | 0 | not run |" in text


def test_a_forecast_without_problems_is_one_line(tmp_path):
    words = ["-m", "study.forecast", "--init", "x", "--data", "y", "--out", str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "--eval-problems: needed" in done.stderr and done.stderr.count("\n") == 1


def test_logits_are_kept_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast.full_scale.train, "run_settings", lambda *_: {"seed 0": {}, "seed 1": {}})
    with pytest.raises(UserError, match="2 runs, and logits are kept of one"):
        forecast.Snapshots(SimpleNamespace(out=tmp_path), None, None)


def test_single_tokens_are_on_the_page(small):
    """Of an Off-RL and an FPA run without accuracies, which other runs of the same settings have."""
    folder = small("forecast", "tokens")
    (pair, *_) = page.set_data(read_folder(folder))["pairs"]
    assert [len(some) for some in pair["tokens"]] == [len(text.split(",")) for text in pair["ref"]]
    correct, incorrect = ("".join(some) for some in pair["tokens"])
    assert correct != incorrect and pair["tokens"][0][: pair["first"]] == pair["tokens"][1][: pair["first"]]
    assert set(pair["ratios"][0][0][0]) == {","} and set(pair["ratios"][0][0][-1]) > {","}  # at first all are 0
    run = real.study(folder)["tokens"][0]
    off_rl = {**run.log, "accuracy": np.array([0.1, 0.2, 0.3, 0.4, 0.55])}
    assert page.accuracies(run, [run]) == ([], [])
    assert page.accuracies(run, [run, run._replace(log=off_rl)])[1][-1] == 0.55


def test_a_command_that_fails_is_one_line(small, monkeypatch, capfd):
    monkeypatch.setattr(real, "TRAINING", f"{real.TRAINING} --lr -1")
    with pytest.raises(SystemExit) as stopped:
        small("off_rl")
    assert stopped.value.code == 2 and "argument --lr" in capfd.readouterr().err.splitlines()[-1]


def test_a_seed_that_fails_leaves_the_others_in_the_tables(small, monkeypatch, tmp_path, capsys):
    plain = real.call

    def failing(module, *words):
        if module == "full_scale.train" and words[words.index("--seed") + 1] == 1:
            raise UserError("no seed 1")
        plain(module, *words)

    monkeypatch.setattr(real, "call", failing)
    with pytest.raises(SystemExit):
        small("off_rl")
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
    assert len(numbers) == 43 and all(number in text for number in numbers), numbers
    for claim, verdict in re.findall(r"(R\d[ab]?) is\s+(?:\w+\s+)?(undecided|supported|contradicted)", section):
        assert re.search(rf"^\| {claim}: .*\*\*{verdict}\*\*", text, flags=re.M), claim
    assert "5.92, 3.29 to 10.7 (claim: < 1)" in text and "is 5.92, and the interval goes from 3.29 to 10.7." in prose
    assert section.count("undecided") == 3 and bullet.count("undecided") == 1
    assert re.search(r"R1b: .* \| 0\.15 \| \*\*undecided", text) and "claims, p is 0.15, so" in prose
    cases = real.study(Path("results/smollm2"))
    logs = {name: [run.log for run in cases[name].values()] for name in cases}
    rates = [name for name in cases if name.endswith("e-06") or name.endswith("e-05")]
    assert len(rates) == 6 and (not any(logs[name] for name in rates)) == ("at 5e-6 and 5e-5 are prepared and not run" in prose)
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
    assert swapped == ["SFT", "TOPR"] and "Of all eight, SFT and TOPR alone have changed places." in prose
    forecasts = [[cell.split()[0].strip(",") for cell in row.split(" | ")[4:]] for row in text.splitlines()[-3:]]
    (near, far, straight), (slow_near, slow_far, slow_straight), (long_near, long_far, long_straight) = forecasts
    assert {round(96 * log["accuracy_0.7"][-1]) for log in logs["fpa"]} == {62} and "62 of 96 answers" in prose

    def mean(name, value):
        return statistics.mean(map(value, logs[name]))

    lower = [[log[name][-1] < log[name][0] for log in logs["off_rl"]] for name in ("accuracy_greedy", "pass@4")]
    assert [*map(sum, lower)] == [2, 2] and "pass@4 end below their start after 40 steps on two seeds of three." in prose
    first, last = (mean("fpa", lambda log: log["coefficient_correct"][i]) for i in (1, 2))
    other = mean("off_rl", lambda log: log["coefficient_correct"][2])
    assert f"{first:.2f} over the first 20 steps and {last:.2f} over the last 20. Off-RL's is {other:.2f} over" in prose
    assert f"policy of step 20 is {near} times" in prose and f"step 30 it is {far} times" in prose
    assert f"the two numbers are {slow_near} and {slow_far}. " in prose
    assert f"up to step 30 is {slow_straight} at 1e-6, and {straight} at 2e-5." in prose
    assert f"The two numbers are {long_near} and {long_far}, for the" in prose and len(logs["slow_long_forecast"]) == 1
    assert float(slow_near) < 1 > float(slow_far) and float(long_near) > 1 < float(long_far)
    assert "At a learning rate of 1e-6 it was one at step 10. At step 100, on one seed, it was none." in bullet
    moved = np.cumsum([0, *(warmup_cosine(step, 10, 300) for step in range(300))])  # on a straight line
    on_line = [((moved[later] - later / 100 * moved[100]) / (moved[later] - moved[100])) ** 2 for later in (200, 300)]
    assert f"would have {on_line[0]:.2f} and {on_line[1]:.1f}. R² up to step 300 is {long_straight}." in prose


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
    snapshots.tables, snapshots.decode = {"extrapolation": [], "tokens": []}, str
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
