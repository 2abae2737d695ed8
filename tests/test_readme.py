"""README.md against the code and the committed logs: its commands, paths, pasted output, code, table and findings."""

import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import claims
import full_scale.train
import options
import plots
import results
import stages
import train
from full_scale.load_hf import PROMPT, empty_model, parameter_count, training_gib
from model import GPTConfig

README = Path("README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
COMMANDS = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if re.match("(pip|python|torchrun) ", line)
]
RUNS = results.read_runs(results.run_folders(Path("logs")))
MAIN = results.main_runs(RUNS)


def block_with(text):
    (block,) = [block for _, block in BLOCKS if text in block]
    return block


def test_the_two_commands_are_there_and_ci_runs_the_second():
    main, tests = (
        "requirements.txt && python train.py --loss fpa --lam 2",
        "tests/requirements.txt && python -m pytest -n 2 --dist worksteal",
    )
    assert f"pip install -r {main}" in COMMANDS and f"pip install -r {tests}" in COMMANDS
    assert f"pip install -r {tests}" in Path(".ci/run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path):
    for part in command.split("&&"):
        words = shlex.split(part, comments=True)
        if words[:2] == ["python", "train.py"]:
            options.parse_args(words[2:])
        elif "-m" in words and words[words.index("-m") + 1].startswith("full_scale."):
            name, *flags = words[words.index("-m") + 1 :]
            flags = {word for word in flags if word.startswith("--")}
            assert flags <= set(re.findall(r"--[a-z-]+", help_of("-m", name)))
        elif words[:2] == ["pip", "install"]:
            assert Path(words[3]).is_file()
        else:
            assert words[1] == "-m" or Path(words[1]).is_file()


@functools.cache
def help_of(*words):
    return subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, check=True).stdout


def file_tree():
    return [line.split()[0] for line in block_with("losses.py   ").splitlines()]


@pytest.mark.skipif(not (shutil.which("git") and Path(".git").exists()), reason="not a git checkout")
def test_every_file_is_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    concepts = {path.split("/")[0] + ("/" if "/" in path else "") for path in listed if not path.startswith(".")}
    assert concepts - {"LICENSE", "README.md", "ruff.toml", "pytest.ini"} == set(file_tree())


def test_paths_exist():
    assert all(Path(path).exists() for path in file_tree())
    titles = re.findall("^#+ (.*)$", README, flags=re.M)
    headings = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert link in headings or Path(link).is_file()


@pytest.mark.slow
def test_flags_in_the_text_exist():
    helps = [help_of(name) for name in ("train.py", "bench.py", "plots.py")] + [
        help_of("-m", f"full_scale.{name}") for name in ("rollouts", "train")
    ]
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert any(flag in text for text in helps)


def first_cells(heading):
    """The names in the first cells of the table below a heading."""
    table = re.search(rf"{re.escape(heading)}[\s\S]*?((?:^\|.*\n)+)", README, flags=re.M)[1]
    cells = [re.split(r"(?<!\\)\|", line)[1] for line in table.splitlines()[2:]]
    return re.findall(r"`([\w.]+)`", " ".join(cells))


def test_the_glossary_is_the_log():
    assert first_cells("## What the columns of log.csv mean") == train.COLUMNS


def test_the_table_of_coefficients_has_every_loss():
    assert first_cells("and r01 = 1 if correct") == list(train.LOSSES)
    rows = [line for line in README.splitlines() if line.startswith("| `") and line.endswith((" yes |", " no |"))]
    for name in train.LOSSES:
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        assert row.endswith(" yes |") == (name in options.WITH_FPA_FORM)


def test_code_is_the_shipped_code():
    shipped = Path("losses.py").read_text().splitlines()
    (block,) = [block for language, block in BLOCKS if language == "python"]
    assert all(line in shipped for line in block.splitlines())


def test_pasted_task_is_what_the_command_prints():
    printed = subprocess.run([sys.executable, "-m", "toy_math"], capture_output=True, text=True, check=True).stdout
    assert block_with("clean and slipped") in printed


def test_pasted_output_is_the_committed_run():
    (run,) = results.where(MAIN, loss="fpa", lam=2.0, target="both", seed=0)
    rows = [{name: column[i] for name, column in run.log.items()} for i in range(len(run.log["step"]))]
    expected = [train.progress_line({**row, "step": int(row["step"])}, 1000, 0).split("ETA")[0] for row in rows]
    pasted = [line.split("ETA")[0] for line in block_with("ETA").splitlines() if line.startswith("step")]
    assert len(pasted) > 5 and all(line in expected for line in pasted)
    assert results.summary([run]).strip() in block_with("ETA") and run.folder.name in block_with("ETA")


SHAPES = {  # as published
    "Qwen/Qwen2.5-Math-7B": {"vocab_size": 152064, "d_model": 3584, "n_layers": 28, "n_heads": 28, "n_kv_heads": 4,
                             "d_ff": 18944, "qkv_bias": True, "tied_head": False},
    "deepseek-ai/deepseek-math-7b-instruct": {"vocab_size": 102400, "d_model": 4096, "n_layers": 30, "n_heads": 32,
                                              "n_kv_heads": 32, "d_ff": 11008, "tied_head": False},
    "meta-llama/Llama-3.2-3B-Instruct": {"vocab_size": 128256, "d_model": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8,
                                         "d_ff": 8192},
    "Qwen/Qwen2.5-Math-1.5B": {"vocab_size": 151936, "d_model": 1536, "n_layers": 28, "n_heads": 12, "n_kv_heads": 2,
                               "d_ff": 8960, "qkv_bias": True},
    "Qwen/Qwen2.5-0.5B": {"vocab_size": 151936, "d_model": 896, "n_layers": 24, "n_heads": 14, "n_kv_heads": 2, "d_ff": 4864,
                          "qkv_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_table_is_the_loaders(name):
    config = GPTConfig(**SHAPES[name])
    parameters = parameter_count(empty_model(config))
    for products in ("bf16", "fp32"):
        cells = [f"{training_gib(config, parameters, gpus, products):.0f}" for gpus in (1, 2, 4, 8)]
        assert f"| {name} | {parameters / 1e9:.2f} B | {products} | {' | '.join(cells)} |" in README
    flags = full_scale.train.parse_args(["--init", name, "--data", "x"])
    assert flags.micro_batch * flags.max_length == 5120


def test_the_prompt_of_full_scale_is_the_one_that_is_asked():
    assert PROMPT in " ".join(README.split())


# --- the runs


def test_the_logs_are_those_of_the_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "draw_splits", lambda *_: None)  # which takes long, and names no run
    names = {
        name
        for commands in claims.EXPERIMENTS.values()
        for words in commands
        for name in options.run_settings(options.parse_args([*words.split(), "--out", str(tmp_path)]))
    }
    assert names == {run.folder.name for run in RUNS}


def on_another_cpu(run):
    c = run.config
    if c["seed"] in results.TUNING_SEEDS:
        return False
    return (
        c["loss"] in ("a_star_po", "reinforce")
        or c["eval_every"] == 1000
        or (c["loss"] in ("off_rl", "constant") and c["prompts"] != 1024)
    )


def test_which_runs_are_of_another_cpu():
    """A CPU's rounding shows in the rollouts of its base models."""
    for some in results.by(RUNS, lambda run: (run.config["seed"], run.config["prompts"])).values():
        shares = [{run.config["measured"]["share_correct"] for run in some if on_another_cpu(run) == other} for other in (0, 1)]
        assert len(shares[0]) == 1 and len(shares[1]) <= 1 and not shares[0] & shares[1]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.folder.name)
def test_a_run_is_named_by_its_settings(run):
    settings = {k: v for k, v in run.config.items() if k not in ("measured", "environment")}
    assert run.folder.name.endswith("-" + stages.digest(settings)) and run.config["environment"]["threads"] == 1


def test_each_loss_ran_at_its_best_learning_rate():
    tuned = results.tuned(RUNS)
    assert tuned.keys() >= {(loss, False) for loss in ("off_rl", "simper", "dpo", "rpo", "kto", "sft", "grpo")}
    assert tuned.keys() == results.best_settings(RUNS).keys()
    for runs in tuned.values():
        assert [run.config["seed"] for run in runs] == [0, 1, 2, 3, 4]


def test_the_constant_is_the_average_coefficient_of_fpa():
    runs = results.where(MAIN, loss="fpa", lam=2.0, target="incorrect")
    assert claims.WEIGHT == float(f"{claims.per_seed(runs, claims.average_coefficient).mean():.2g}")


def test_the_claims_table_is_that_of_the_committed_logs():
    written = Path("logs/figures/results.md").read_text()
    assert written == claims.results(RUNS)
    table = written.split("## Claims\n")[1].split("## Commands")[0].strip()
    assert table in README and table.count("\n| C") == 17


@pytest.mark.parametrize("name", plots.FIGURES)
def test_figures_are_those_of_the_committed_logs(name):
    if not (drawn := plots.FIGURES[name](RUNS)):
        pytest.skip("its runs are not there yet")
    figure, chosen = drawn
    plots.plt.close(figure)
    assert Image.open(f"logs/figures/{name}.png").text["Description"] == plots.fingerprint(chosen)
    assert f"(logs/figures/{name}.png)" in README


# --- the findings


def log_ratios(lr, column="kl"):
    """{(t, lam): log of a distance's ratio, future over present policy, at t' = (1 + lam) t (seeds,)}."""
    runs = results.where(results.varying(RUNS, "lr"), loss="fpa", lam=2.0, target="both", lr=lr)
    tables = [results.extrapolated(run, column) for run in results.with_file(runs, "extrapolation.csv")]
    assert len(tables) == 5
    keys = [(t, later, lam) for t, later, lam in tables[0] if later == (1 + lam) * t]
    return {(t, lam): np.log([np.divide(*table[t, later, lam]) for table in tables]).mean() for t, later, lam in keys}


def test_where_the_extrapolation_is_a_forecast():
    slow, fast = log_ratios(2e-5), log_ratios(2e-4)
    assert all(value < 0 for (t, lam), value in slow.items() if t <= 160 and lam <= 2)
    assert all(value < 0 for (t, lam), value in fast.items() if t == 10 and lam < 2)
    assert all((value < 0) <= (t <= 20 and lam < 2) for (t, lam), value in fast.items())
    assert all(value > 0 for (t, _), value in fast.items() if t >= 40)
    sampled = log_ratios(2e-4, "token_error")
    assert sampled[30, 1.0] < 0 < fast[30, 1.0]
    assert any(value < 0 for (t, lam), value in sampled.items() if t >= 40 and lam == 0.5)
    assert 80 < np.exp(fast[320, 2]) < 130


GRID = (5e-5, 2e-4, 8e-4, 3.2e-3)


def clear(ours, theirs):
    """Whether the final accuracies differ by more than their interval."""
    mean, half = results.mean_and_interval(claims.paired(ours, theirs, results.final))
    return abs(mean) > half


TABLE = {name: measured for name, (_, measured, _) in claims.claims(RUNS).items()}


def side_of_zero(name, number):
    """+1 or -1 where the whole interval of a claim's number is on one side of zero, else 0."""
    mean, half = results.mean_and_interval(TABLE[name][number].values)
    return np.sign(mean) * (abs(mean) > half)


def test_the_controls():
    assert [side_of_zero("C15", i) for i in range(3)] == [1, -1, 1]
    assert all(abs(TABLE["C15"][i].values.mean()) < 0.05 < TABLE["C15"][0].values.mean() for i in (1, 2))
    for run in results.where(MAIN, loss="constant"):
        assert run.log["accuracy"].max() > results.final(run) + 0.05


def test_rows_and_lambda():
    assert TABLE["C9"][1].values.mean() > 0 and TABLE["C9"][1].supports()
    runs = {lam: results.where(MAIN, loss="fpa", lam=lam, target="both") for lam in (0.5, 1.0, 2.0, 5.0, 10.0)}
    finals = {lam: claims.per_seed(some, results.final) for lam, some in runs.items()}
    assert max(finals, key=lambda lam: finals[lam].mean()) == 5
    for lam, worse in ((0.5, True), (1.0, True), (5.0, False), (10.0, False)):
        assert clear(runs[lam], runs[2.0]) == worse and (not worse or finals[lam].mean() < finals[2.0].mean())
    for run in results.where(MAIN, loss="fpa", target="correct"):
        assert results.final(run) == 0 and run.log["grad_norm"][-1] < 1e-6


def test_greedy_accuracy():
    for run in MAIN:
        start, end = run.log["accuracy_greedy"][0], run.log["accuracy_greedy"][-1]
        assert start == 1 and end > {"sft": 0.97, "grpo": 0.99}.get(run.config["loss"], -1)
        assert end < 0.98 or run.config["loss"] not in ("off_rl", "fpa", "constant", "sharpened")
    assert side_of_zero("C16", 0) == -1


def test_each_at_its_best_learning_rate():
    assert [side_of_zero("C7", i) for i in range(5)] == [1, 1, 1, 0, 1]  # Off-RL, DPO, RPO, KTO, SimPER
    assert [side_of_zero("C11", i) for i in range(2)] == [1, 1] and side_of_zero("C16", 1) == 0
    finals = {family: claims.per_seed(runs, results.final).mean() for family, runs in results.tuned(RUNS).items()}
    del finals["grpo", False]
    best = max(finals, key=finals.get)
    assert best == ("rpo", True)
    for other in (("pessimistic", False), ("sft", False), ("kto", False), ("fpa", True)):
        assert not clear(results.tuned(RUNS)[best], results.tuned(RUNS)[other])
    tuning = results.by(results.where(RUNS, seed=results.TUNING_SEEDS), lambda run: (results.family(run), run.config["lr"]))
    assert all(results.final(run) == 0 for lr in GRID for run in tuning[("a_star_po", False), lr])
    final = results.tuned(RUNS)["a_star_po", False], results.tuned(RUNS)["reinforce", False]
    assert all(results.final(run) == 0 for run in final[0]) and all(results.final(run) < 0.15 for run in final[1])
    assert {results.best_settings(RUNS)["dpo", form][1] for form in (False, True)} == {min(GRID)}
    off_rl = results.by(results.where(results.varying(RUNS, "lr"), loss="off_rl"), lambda run: run.config["lr"])
    assert results.best_settings(RUNS)["off_rl", False][1] == 3.2e-3
    means = {lr: claims.per_seed(runs, results.final).mean() for lr, runs in off_rl.items()}
    assert min(means, key=means.get) == 2e-4 and max(means, key=means.get) == 8e-4
    assert {lr for lr in off_rl if clear(off_rl[lr], off_rl[2e-4])} == {5e-5, 2.5e-5, 8e-4}
    assert claims.per_seed(off_rl[3.2e-3], results.final).std(ddof=1) > 0.2
    difference = claims.paired(results.tuned(RUNS)["fpa", True], off_rl[8e-4], results.final)
    assert results.mean_and_interval(difference)[0] - results.mean_and_interval(difference)[1] > 0.1


def test_online():
    best = results.tuned(RUNS)
    curves = []
    for family in (("fpa", True), ("grpo", False)):
        costs, accuracies = zip(*((results.tokens(run.log), run.log["accuracy"]) for run in best[family]))
        curves.append((np.mean(costs, 0), np.mean(accuracies, 0)))
    (cost, fpa), grpo = curves
    assert (np.interp(cost, *grpo) > fpa - 0.005).all()
    assert 0.45 < TABLE["C14"][2].values.mean() < 0.55
    assert side_of_zero("C14", 0) == -1 and not TABLE["C14"][0].supports() and TABLE["C14"][1].supports()


def test_the_number_of_prompts():
    assert [side_of_zero("C17", i) for i in range(2)] == [-1, 1]
    few, many = (results.where(results.varying(RUNS, "prompts"), prompts=prompts) for prompts in (256, 4096))
    assert all(results.final(run) < run.log["accuracy"][0] - 0.1 for run in claims.fpa_runs(few))
    for run, other in zip(claims.fpa_runs(few), results.where(few, loss="sft")):
        assert run.log["accuracy"][0] < run.log["accuracy"].max() < other.log["accuracy"].max()
    sft = [claims.per_seed(results.where(runs, loss="sft"), results.final).mean() for runs in (few, MAIN, many)]
    assert 0 < sft[1] - sft[0] < 0.05 and 0 < sft[2] - sft[1] < 0.02
    for runs in (few, MAIN, many):
        off_rl, constant = (claims.per_seed(results.where(runs, loss=loss), results.final) for loss in ("off_rl", "constant"))
        fpa, others = claims.per_seed(claims.fpa_runs(runs), results.final), results.where(runs, loss=("fpa", "sft"))
        assert off_rl.mean() < constant.mean() < fpa.mean() <= max(map(results.final, others))


def test_prolonged_training():
    longest = results.where(RUNS, steps=4000)
    off_rl, fpa = (results.where(longest, loss=loss) for loss in ("off_rl", "fpa"))
    assert [run.config["seed"] for run in off_rl] == [run.config["seed"] for run in fpa] == [0, 1, 2, 3, 4]
    for baseline, ours in zip(off_rl, fpa):
        best, start, end = baseline.log["accuracy"].max(), baseline.log["accuracy"][0], results.final(baseline)
        assert best > start > end and 0 < claims.fall(ours) < claims.fall(baseline)
