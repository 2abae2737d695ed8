"""README.md and docs/ against the code and results/: commands, links, numbers, pasted output, tables, sentences."""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import full_scale.train
import losses
import train
from full_scale.load_hf import training_gib
from full_scale.prompts import PROMPT
from full_scale.published import empty_model, parameter_count
from losses import LOSSES
from model import GPTConfig
from plumbing.log import COLUMNS, progress_line
from study import claims, drawing, experiments, figures, real, results, rule, scale, sections, tables, tune, verdicts

ROOT, RESULTS = Path(__file__).resolve().parents[2], Path("results/slips")
README, PAGES = Path("README.md"), sorted(Path("docs").glob("*.md"))
TEXTS = {path: path.read_text() for path in (README, *PAGES)}
OURS = [path for path in TEXTS if path.name != "bench.md"]  # study/bench.py writes that one
ROUNDED = r"(\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)"


def blocks(path, language=""):
    return [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[path], flags=re.M | re.S) if kind == language]


def prose(path):
    """A page without its blocks and tables."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", TEXTS[path], flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def flowing(path):
    """Its prose in one line."""
    return " ".join(prose(path).split())


def table(path, heading):
    """The rows of the table whose first row begins so, lists of cells as they are written."""
    (found,) = re.findall(rf"^\|? ?{re.escape(heading)}.*\n\| ?-.*\n((?:\|.*\n)+)", path.read_text(), flags=re.M)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found.splitlines()]


def listed():
    """The files of the repository, those that are not committed yet among them."""
    if not (shutil.which("git") and Path(".git").exists()):
        pytest.skip("not a git checkout")
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if Path(name).is_file()]


# --- size and sentences


def test_the_readme_is_short():
    assert TEXTS[README].count("\n") <= 170 and len(TEXTS[README].split()) <= 2200


@pytest.mark.parametrize("path", OURS, ids=str)
def test_sentences_are_short(path):
    assert [found for found in re.split(r"(?<=[.!?:])\s+", prose(path)) if len(found.split()) > 32] == []


# --- commands and flags


def commands(path):
    """Every command of a page, in a block or in the text."""
    lines = [line for block in blocks(path) for line in block.splitlines()]
    lines += re.findall(r"`((?:pip|python|torchrun) [^`]+)`", TEXTS[path])
    return [line for line in lines if re.match("(pip|python|torchrun) ", line) and "tilted" not in line]  # a loss to add


COMMANDS = sorted({(str(path), command) for path in TEXTS for command in commands(path)})


def test_the_two_commands_are_there_and_ci_runs_the_second():
    second = "pip install -r tests/requirements.txt && python -m pytest -n 2 --dist worksteal"
    assert blocks(README)[0].splitlines() == [
        "pip install -r requirements.txt && python train.py",
        "python train.py --loss fpa --lam 5",
    ]
    assert second in commands(README) and second in Path(".ci/run").read_text()
    assert train.parse_args([]).loss == ["off_rl", "fpa"]


@functools.cache
def help_of(*words):
    printed, module = io.StringIO(), importlib.import_module(words[-1].removesuffix(".py").replace("/", "."))
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.run(["--help"])
    assert "usage:" in printed.getvalue() or module.__doc__.strip() in printed.getvalue(), words
    return printed.getvalue()


NAMED = {  # what these commands take beside flags
    "study.experiments": {*experiments.EXPERIMENTS},
    "study.tune": {*tune.FAMILIES},
    "study.scale": {"all"},
    "study.real": {*real.CASES},
}


def flags_of(*words):
    return set(re.findall(r"--[a-z-]+", help_of(*words)))


@pytest.mark.parametrize("path, command", COMMANDS)
def test_commands_parse(path, command):
    for part in command.split("&&"):
        words = shlex.split(part, comments=True)
        if words[:2] == ["pip", "install"]:
            assert words[2] != "-r" or Path(words[3]).is_file()
            continue
        program = words[words.index("-m") :] if "-m" in words else words[1:]
        flags = {word for word in program if word.startswith("--")}
        if program[0] == "train.py" and "--help" not in flags:
            train.parse_args(program[1:])
        elif program[:2] == ["-m", "full_scale.train"]:
            full_scale.train.parse_args(program[2:])
        elif program[0] == "-m":
            assert {*program[2:]} <= NAMED.get(program[1], {*program[2:]}) | {"NAME"}
            assert all(Path(word).is_file() for word in program[2:] if word.endswith(".py"))
            assert importlib.util.find_spec(program[1])
            assert not flags or program[1] == "pytest" or flags <= flags_of(*program[:2])
        else:
            assert Path(program[0]).is_file() and flags <= {"--help"} | flags_of(program[0])


def test_flags_in_the_text_exist():
    modules = ("study.bench", "full_scale.rollouts", "full_scale.train")
    known = flags_of("train.py") | flags_of("plots.py") | set().union(*(flags_of("-m", name) for name in modules))
    for path in TEXTS:
        assert set(re.findall(r"`(--[a-z-]+)", TEXTS[path])) - {"--gamma"} <= known, path


# --- links, paths and the map


def anchors(path):
    titles = re.findall("^#+ (.*)$", re.sub(r"```.*?```", "", TEXTS[path], flags=re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_links_exist(path):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXTS[path]):
        target, _, anchor = link.partition("#")
        target = (path.parent / target) if target else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(Path(*target.resolve().relative_to(ROOT).parts)), link


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_paths_in_the_text_exist(path):
    names = re.findall(r"`?\b((?:toy_math|plumbing|study|full_scale|docs|tests|results)/[\w./-]*\w)", TEXTS[path])
    names += re.findall(r"(?<![\w/.…-])(\w+\.(?:py|ipynb|toml))\b", TEXTS[path])
    assert [name for name in names if not Path(name).exists() and not list(Path().glob(f"*/{name}"))] == []


def test_every_file_is_in_the_map():
    (tree,) = [block for block in blocks(README) if block.startswith("model.py ")]
    names = [line.split()[0] for line in tree.splitlines()]
    assert all(Path(name).exists() for name in names)
    top = {path.split("/")[0] + "/" * ("/" in path) for path in listed() if not path.startswith(".")}
    assert top - {"README.md"} == set(names)
    for page in PAGES:
        assert f"({page})" in TEXTS[README] or f"({page}#" in TEXTS[README]


def test_no_file_names_a_personal_path():
    for name in listed():
        if Path(name).suffix not in (".png", ".safetensors"):
            assert not re.search(r"/(?:home|Users|root|work)/\w", Path(name).read_text()), name


def test_named_tests_exist():
    code = "\n".join(path.read_text() for path in Path("tests").rglob("test_*.py"))
    for path in TEXTS:
        for name in re.findall(r"`(test_\w+)`", TEXTS[path]):
            assert f"def {name}(" in code or name in COLUMNS, name


# --- code and tables that are pasted


def test_the_readmes_function_is_the_shipped_one():
    lines = inspect.getsource(losses.fpa_loss).splitlines()
    text = ast.parse("\n".join(lines)).body[0].body[0]
    assert blocks(README, "python") == ["\n".join(lines[: text.lineno - 1] + lines[text.end_lineno :]) + "\n"]


def test_the_table_of_losses_is_that_of_the_code():
    rows = [[f"`--loss {name}`", row.label.replace("*", r"\*"), row.idea] for name, row in LOSSES.items()]
    assert table(README, "flag | name") == rows, "README.md's table of losses needs these rows:\n" + "\n".join(map(str, rows))


def test_the_table_of_coefficients_has_a_row_a_loss():
    forms = {f"`{name}`": "yes" if row.has_fpa_form or row.form_of else "no" for name, row in LOSSES.items()}
    rows = table(Path("docs/method.md"), "`--loss`")
    assert [(name, form) for name, _, _, form in rows] == [*forms.items()]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    assert digest == "02d70f14e0f5a4fc", "docs/method.md's coefficients have changed: compare them with losses.py"


def test_the_glossary_is_the_log():
    text = TEXTS[Path("docs/log_columns.md")].split("## The columns of log.csv")[1].split("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1] for line in text.splitlines() if line.startswith("| `")]
    assert re.findall(r"`([\w.@]+)`", " ".join(cells)) == COLUMNS


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
    rows = [row for row in table(Path("docs/full_scale.md"), "checkpoint") if row[0] == name]
    for row, products in zip(rows, ("bf16", "fp32"), strict=True):
        cells = [f"{training_gib(config, parameters, gpus, products):.0f}" for gpus in (1, 2, 4, 8)]
        assert row == [name, f"{parameters / 1e9:.2f} B", products, *cells]
    flags = full_scale.train.parse_args(["--init", name, "--data", "x"])
    assert flags.micro_batch * flags.max_length == 5120


def test_the_prompt_of_full_scale_is_the_one_that_is_asked():
    assert PROMPT in " ".join(TEXTS[Path("docs/full_scale.md")].split())


# --- output and numbers


def test_pasted_task_is_what_the_command_prints():
    printed = subprocess.run([sys.executable, "-m", "toy_math"], capture_output=True, text=True, check=True).stdout
    (pasted,) = [block for path in TEXTS for block in blocks(path) if "habit in step" in block]
    assert pasted in printed


@functools.cache
def runs():
    return results.read_folder(RESULTS)


@functools.cache
def claimed():
    """{id of a claim: its numbers}."""
    return {name: measured for name, (_, measured, _) in claims.claims(runs()).items()}


def piloted(name):
    """[(parsed command, its cells of docs/task.md, whether it passes, the standard deviation of FPA's ends)]."""
    found, all_runs = [], results.read_folder(Path("results"))
    for args in experiments.commands(name, {}).values():
        pilot = results.where(all_runs, habit=args.habit, slip=args.slip, base_steps=args.base_steps)
        cells, passes = [], True
        for loss, sign in (("off_rl", -1), ("fpa", 1)):
            logs = [results.where(pilot, loss=loss, seed=seed)[0].log["test_accuracy"] for seed in range(2000, 2005)]
            passes &= all(sign * (log[-1] - log[0]) > 0 for log in logs)
            cells.append(", ".join(f"{log[0]:.2f} → {log[-1]:.2f}" for log in logs))
        deviation = statistics.stdev(log[-1] for log in logs)
        found.append((args, [*cells, "yes" if passes else "no", f"{deviation:.3f}"], passes, deviation))
    return found


def test_the_default_task_is_the_one_that_the_rule_chose():
    """docs/task.md's rule, applied to the pilot's runs in results/; its table; and the default of the command."""
    pilot = piloted("pilot")
    rows = [[f"`--habit {args.habit} --slip {args.slip}`", *cells] for args, cells, *_ in pilot]
    assert table(Path("docs/task.md"), "setting") == rows
    spread = {(args.habit, args.slip): deviation for args, _, passes, deviation in pilot if passes}
    chosen = train.parse_args([])
    assert chosen.task == "habit" and (chosen.habit, chosen.slip) == min(spread, key=spread.get)


def test_what_is_said_of_the_base_models():
    text = flowing(Path("docs/task.md"))
    default, ((args, cells, passes, _),) = train.parse_args([]), piloted("short")
    assert table(Path("docs/task.md"), "`--base-steps`") == [[str(args.base_steps), *cells]] and not passes
    gains = sorted(round(float(end) - float(start), 2) for start, end in re.findall(r"(\S+) → ([\d.]+)", cells[1]))
    assert gains[0] < gains[1] == 0 < gains[2]  # below its start, at its start
    same = {name: getattr(default, name) for name in ("habit", "slip", "base_steps")}
    starts = [run.log["accuracy"][0] for run in results.where(results.read_folder(Path("results")), **same)]
    assert f"answer {min(starts):.2f} to {max(starts):.2f} of the validation problems" in text
    assert f"AdamW for {default.base_steps:,} steps" in text


@functools.cache
def main_runs():
    return results.main_runs(results.read_folder(Path("results")))


def test_pasted_output_is_the_committed_runs():
    (pasted,) = [block.splitlines() for block in blocks(README) if block.startswith("step ")]
    (off_rl,), (fpa,) = results.where(main_runs(), loss="off_rl", seed=0), results.where(results.fpa_runs(main_runs()), seed=0)
    rows = [{name: column[i] for name, column in fpa.log.items()} for i in range(len(fpa.log["step"]))]
    lines = [progress_line({**row, "step": int(row["step"])}, 1000, 0) for row in rows]
    lines += results.summary([off_rl, fpa]).splitlines() + Path("results/samples/fpa.txt").read_text().splitlines()
    assert len(pasted) == 6 and set(pasted) <= set(lines)


ASKED = "test_accuracy test_accuracy_0.7 test_accuracy_greedy test_pass@16".split()
LOGRATIOS = {"": ".1f", "_p5": ".1f", "_below_0": ".2f"}  # of correct rows, and the mean of incorrect ones


def test_the_tables_of_the_main_runs_are_those_of_the_logs():
    """README.md's table of accuracies, and docs/task.md's of log-ratios."""
    methods, rows = results.by_method(main_runs()), []
    for name, some in {"base model": next(iter(methods.values())), **{results.label(m): r for m, r in methods.items()}}.items():
        assert [run.config["seed"] for run in some] == [0, 1, 2, 3, 4]
        base = name == "base model"

        def cell(column, form):
            mean, half = results.mean_and_interval([run.log[column][0 if base else -1] for run in some])
            return f"{mean:{form}} ± {half:{form}}"

        formats = {f"logratio_correct{part}": form for part, form in LOGRATIOS.items()} | {"logratio_incorrect": ".1f"}
        rows.append([name, *[cell(column, ".2f") for column in ASKED], *(cell(*column) for column in formats.items())])
    assert table(Path("docs/task.md"), "| | correct") == [[row[0], *row[1 + len(ASKED) :]] for row in rows[1:]]
    assert table(README, "| T = 1") == [row[: 1 + len(ASKED)] for row in rows]
    untuned = {name.strip("`"): cells for name, seeds, *cells in table(Path("results/results.md"), "| loss | seeds")}
    assert [*untuned] == [row[0] for row in rows]
    for name, some in methods.items():
        columns = [[run.log[column][-1] for run in some] for column in sections.SHOWN.values()]
        assert untuned[results.label(name)] == ["{:.3f} ± {:.3f}".format(*results.mean_and_interval(c)) for c in columns]


def test_what_is_said_of_the_main_runs():
    methods = results.by_method(main_runs())
    off_rl, fpa, incorrect, sft = (
        {name: [column[-1] for column in (run.log[name] for run in some)] for name in some[0].log} for some in methods.values()
    )
    base = [run.log[name][0] for run in main_runs() for name in ("test_accuracy_greedy",)]
    assert max(base) < 0.5  # the most likely answers are mostly wrong
    for column in ASKED[:3]:
        assert all(
            end < start for end, start in zip(off_rl[column], [run.log[column][0] for run in methods[next(iter(methods))]])
        )
        means = [statistics.mean(some[column]) for some in (off_rl, fpa, incorrect, sft)]
        assert means.index(max(means)) == 2 and means.index(min(means)) == 0
    below = [statistics.mean(some["logratio_correct_below_0"]) for some in (off_rl, fpa)]
    assert below[0] == pytest.approx(0.7, abs=0.05) and below[1] == pytest.approx(0.2, abs=0.05)
    margins = [np.mean(np.subtract(some["logratio_correct"], some["logratio_incorrect"])) for some in (fpa, off_rl)]
    assert "On `habit`, untuned, it is smaller, {:.0f} nats against {:.0f}.".format(*margins) in TEXTS[Path("docs/findings.md")]
    tails = [statistics.mean(some["logratio_correct_p5"]) for some in (fpa, incorrect)]
    assert 0.4 < tails[1] / tails[0] < 0.6 and statistics.mean(sft["test_pass@16"]) > 0.99


def test_the_readmes_numbers_are_those_of_the_results():
    """`N ± M above` or `below`, or `times`, up to the claim's name in brackets: one of that claim's numbers, with that sign."""
    text = flowing(README)
    numbers = re.findall(rf"{ROUNDED} (?:nats )?(above|below|times)\b[^±()]*\((C\d+|R\d\w?)\)", text)
    assert len(numbers) == text.count("±") > 5
    for mean, half, word, name in numbers:
        places, sign = len(mean.partition(".")[2]), -1 if word == "below" else 1
        on_habit = studied()[1] if name in ("C8", "C9") else real_claims()
        measured = on_habit[name].measured if name in on_habit else claimed()[name]
        found = [results.mean_and_interval(number.values) for number in measured if len(number.values)]
        assert (mean, half) in [(f"{sign * m:.{places}f}", f"{h:.{places}f}") for m, h in found], (mean, half, name)
    assert all("lr 2e-05" in number.text and number.supports() for number in claimed()["C10"][:2])  # a forecast there
    prolonged = results.fpa_runs(results.where(runs(), loss="fpa", steps=4000, lr=2e-4))
    greedy = [[run.log["accuracy_greedy"][at] for run in prolonged if run.config["prompts"] == 1024] for at in (0, -1)]
    assert "greedy accuracy falls from {:.2f} to {:.2f}".format(*map(statistics.mean, greedy)) in text


def test_the_findings_numbers_are_those_of_results_md():
    written = "".join(path.read_text() for path in (RESULTS / "results.md", *Path("results").glob("**/results.md")))
    numbers = re.findall(r"-?[\d.]+ ± [\d.]*\d", prose(Path("docs/findings.md")))
    written += slips_at_ten()[1]
    assert len(numbers) > 15
    for number in numbers:
        assert re.search(rf" -?{re.escape(number)}(?![\d.]*\d)", written), number


@functools.cache
def held():
    """{id: Run} of results/."""
    return tables.held(Path("results"))


@functools.cache
def studied():
    """Of the study on `habit`: ({(experiment, case): [run of a seed]}, {id: Claim})."""
    found = verdicts.study(held())
    return {case: [run for _, run in sorted(some.items())] for case, some in found.items()}, verdicts.claims(found, {})


def extrapolated(case):
    return studied()[0]["extrapolation", case]


@functools.cache
def unclaimed():
    """{text: (mean ± interval, values)} of results.md's numbers without a claim."""
    found = sections.unclaimed(verdicts.study(held()), held())
    written = dict(re.findall(r"(?m)^- (.*): (\S+ ± \S+)$", Path("results/results.md").read_text()))
    assert written.keys() == found.keys()
    return {text: (written[text], values) for text, values in found.items()}


PUSHED = "share of the first {} steps in which an Off-RL batch pushes {} correct rows down more than up, lr 2e-4"
RANK = "rank correlation of Off-RL's accuracy and the correct rows' {}, over seven learning rates"
FALLEN = "fall of FPA on validation problems from {} to the end, lr {}"
SAID = {  # {text of a number without a claim: what docs/findings.md says of it}
    PUSHED.format(200, "other problems'"): "Their share is {}.",
    PUSHED.format(50, "other problems'"): "In the first 50 steps it is {},",
    PUSHED.format(50, "its own"): "where that of the own rows is {}.",
    "share of correct rows below 0 after 100 steps of Off-RL, lr 2e-4": "After 100 steps a share of {} of",
    RANK.format("median log-ratio"): "The rank correlation of the accuracy is {} with the median log-ratio, and",
    RANK.format("share below 0"): "and {} with the share of log-ratios below 0.",
    "accuracy of Off-RL, end − start, lr 0.0032": "it ends above its start, by {}.",
    "accuracy of FPA, lr 2e-4 − lr 2e-5": "The difference is {}, and it is above 0 for every seed.",
    FALLEN.format("step 300", "2e-5"): "to the end it falls by {} at 2e-5, on every seed.",
    FALLEN.format("the best evaluation", "2e-5"): "and by {} at 2e-5. At nearly this rate",
    FALLEN.format("the best evaluation", "2e-4"): "from its best evaluation by {} at 2e-4,",
    "accuracy, λ = 5 − λ = 2": "λ = 5 ends {} above λ = 2.",
    "accuracy at T = 1, λ = 5 − λ = 10": "λ = 10 ends {} below λ = 5.",
    "accuracy of FPA untuned, incorrect rows only − both kinds": "incorrect rows only ends {} above. - With",
}


def test_what_is_said_without_a_claim():
    page = flowing(Path("docs/findings.md"))
    assert unclaimed().keys() == SAID.keys()
    for text, (shown, values) in unclaimed().items():
        assert SAID[text].format(shown) in page, text
        assert min(values) > 0 or "every seed" not in SAID[text], text


def test_what_is_said_of_the_drag_on_habit():
    page, text = (flowing(path) for path in (Path("docs/findings.md"), README))
    by_seed = [[results.share_down(run, 200, rows) for run in extrapolated("off_rl, 0.0002")] for rows in ("", "_others")]
    assert all(other > own for own, other in zip(*by_seed))  # more often, on every seed
    (measured, _), said = studied()[1]["N1"].measured, "0.148 ± 0.0769"
    assert measured.values.tolist() == by_seed[0] and f": {said} (claim" in str(measured)
    assert f"N1 is contradicted. In {said} of the first 200 steps" in page
    own, others = (round(100 * np.mean(values)) for values in by_seed)
    assert f"It does so in {own} % of them, and it lowers the correct rows of other problems in {others} %." in text
    runs, found = extrapolated("off_rl, 0.0002"), rule.verdicts(studied()[1])
    assert found["N1"] == found["C10"] == "contradicted" and len(runs) == 8 and {run.log["step"][1] for run in runs} == {100}
    means = [np.mean([run.log["logratio_correct"][at] for run in runs]) for at in (1, -1)]
    assert "goes on from {:.1f} to {:.1f} nats".format(*means) in page
    quarter, median = ([np.mean([run.log[f"logratio_correct_p{n}"][at] for run in runs]) for at in (1, -1)] for n in (25, 50))
    said = "25th percentile goes from {:.1f} to {:.1f} nats, and the median from {:.1f} to {:.1f}.".format(*quarter, *median)
    assert said in page and {*np.diff(runs[0].tables["batch"]["step"][200:])} == {20}
    batches = 1024 * 8 * np.mean([run.config["measured"]["share_correct"] for run in runs]) / 32
    assert batches == pytest.approx(120, rel=0.05) and "in one of about 120 batches" in page
    for table, group in itertools.product([run.tables["batch"] for run in runs], ("", "_others")):
        assert (table[f"up{group}"] > table[f"down{group}"])[table["step"] >= 100].mean() > 0.5


def test_what_is_said_of_the_learning_rates_on_habit():
    page = flowing(Path("docs/findings.md"))
    runs = {lr: studied()[0]["rates", f"{lr:g}"] for lr in experiments.RATES}
    assert {len(some) for some in runs.values()} == {8} and "on eight fresh seeds (N2)" in page

    def cells(some, at=-1):
        return [[run.log[column][at] for run in some] for column in ("test_accuracy_0.7", "logratio_correct_p5")]

    def shown(some):
        accuracy, percentile = map(results.mean_and_interval, cells(some))
        return ["{:.3f} ± {:.3f}".format(*accuracy), "{:.1f} ± {:.1f}".format(*percentile)]

    base = "{:.3f} ± {:.3f}".format(*results.mean_and_interval(cells(runs[5e-5], 0)[0]))
    expected = [["base model", base, "0"], *([f"{lr:g}", *shown(some)] for lr, some in runs.items())]
    assert table(Path("docs/findings.md"), "learning rate | accuracy") == expected
    accuracy, percentile = np.mean([cells(some) for some in runs.values()], axis=2).T
    assert {*accuracy.argsort()[:2]} == {1, 2} and accuracy.argmax() == len(runs) - 1 == percentile.argmin()
    start, fpa = np.mean(cells(runs[5e-5], 0)[0]), np.mean(cells(extrapolated("0.0002"))[0])
    assert max(accuracy[:-2]) < start - 0.1 and min(accuracy[-2:]) > start
    assert max(accuracy) < fpa and f"FPA's mean ends at {fpa:.3f} at 2e-4, above" in page
    (number,) = studied()[1]["N2"].measured
    correlation = "{:.3f} ± {:.3f}".format(*results.mean_and_interval(number.values))
    assert f"rank correlation of the two columns is {correlation}." in page
    ends = (runs[lr] for lr in (experiments.RATES[0], experiments.RATES[-1]))
    shares = [np.mean([run.log["logratio_correct_below_0"][-1] for run in some]) for some in ends]
    assert "from {:.2f} at the smallest rate to {:.2f} at the largest".format(*shares) in page
    text = flowing(README)
    assert f"The rank correlation is {np.mean(number.values):.2f}, and N2 claims one above {number.bound:g}." in text
    assert "at the largest of seven learning rates, Off-RL ends above its start." in text  # asserted above
    assert rule.verdicts(studied()[1])["N2"] == "contradicted"


@pytest.mark.parametrize(
    "heading, head, names",
    [
        ("λ | learning rate", "λ of FPA", {f"{lam:g}": f"λ = {lam}" for lam in experiments.LAMBDAS}),
        ("FPA's weight on | learning rate", "rows", {"incorrect rows only": "incorrect", "correct rows only": "correct"}),
    ],
)
def test_the_tables_of_cases_at_their_own_rates_are_those_of_results_md(heading, head, names):
    page, shown = Path("results/results.md"), table(Path("docs/findings.md"), heading)
    found = {name: cells for name, seeds, *cells in table(page, f"| {head} | seeds") if seeds == "8"}
    found |= {name: cells for name, seeds, *cells in table(page, "| λ of FPA | seeds") if seeds == "8"}
    rates = dict(table(page, "| case | learning rate"))
    names = names if head != "rows" else {"no rows (Off-RL)": "λ = 0", "both kinds": "λ = 2"} | names
    assert [row[0] for row in shown] == [*names]
    for name, rate, *cells in shown:
        cooler, warm, _, most, _ = found[f"`{names[name]}`"]
        assert (rate, cells) == (rates[names[name]], [cooler, warm, most])


def test_what_is_said_of_the_coefficients_scale():
    page, (adamw, sgd) = flowing(Path("docs/findings.md")), studied()[1]["N5"].measured
    said = [str(number).split(": ")[1].split(" (")[0] for number in (adamw, sgd)]
    assert f"changes the final accuracy by {said[0]}. Clipping" in page and f"it changes the accuracy by {said[1]}. The" in page
    assert max(map(verdicts.metric, studied()[0]["scale", "SGD, mean 1"])) == 0 and len(sgd.values) == 8
    ranges = [
        f"{min(norms):.3f} to {max(norms):.3f}"
        for case in ("AdamW, mean 1", "AdamW")
        for norms in [[run.log["grad_norm"][-1] for run in studied()[0]["scale", case]]]
    ]
    assert "norm is {} in the mean of a run there, and {} without the division.".format(*ranges) in page
    assert rule.verdicts(studied()[1])["N5"] == "supported" and "N5 is supported" in page
    skipped = min(run.log["skipped"][-1] for run in studied()[0]["scale", "SGD, mean 1"])
    assert f"at least {skipped:.0f} of 1,000 steps are skipped" in page
    kinds = [[run.log[f"coefficient_{kind}"][-1] for kind in ("correct", "incorrect")] for run in studied()[0]["scale", "SGD"]]
    assert np.mean(kinds) == pytest.approx(1 / 3, rel=0.1)  # of FPA as it is, over training; divided by their mean they are 1
    assert {run.config["lr"] for run in studied()[0]["scale", "SGD"]} == {1.0} == {max(scale.RATES)}


def slips_at_ten():
    """What docs/findings.md says of λ = 10 on `slips`, and the number."""
    slips = results.where(runs(), loss="fpa", steps=1000, lr=2e-4, prompts=1024, target="both")
    five, ten = ([run.log["accuracy"][-1] for run in results.where(slips, lam=lam)] for lam in (5.0, 10.0))
    number = " {:.3f} ± {:.3f} ".format(*results.mean_and_interval(np.subtract(five, ten)))
    return f"highest mean, and λ = 10 ends{number}below it.", number


def test_what_is_said_of_lam_and_of_targets_on_habit():
    page = flowing(Path("docs/findings.md"))
    grid, targeted = (results.of_experiment(held().values(), f"{name}-grid") for name in ("lambda", "targets"))
    correct, incorrect = (results.where(targeted, target=target) for target in ("correct", "incorrect"))
    own = [run for run in grid if run.get("lam") > 0]
    collapsed = [run for run in own if verdicts.metric(run) < 0.02]
    assert f"Of the {len(own)} runs of the grid with λ above 0, {len(collapsed)} end with" in page
    large = [run for run in own if run.config["lr"] >= 8e-4 and run.get("lam") >= 1]
    assert len(large) == 24 and all(run in large and run.log["pihat_correct"][-1] < 1e-8 for run in collapsed)
    assert {run.config["lr"] for run in collapsed if run.get("lam") < 5} == {3.2e-3}
    assert [run.get("lam") for run in collapsed].count(2) == 2 and {run.get("lam") for run in incorrect} == {2}
    assert len(incorrect) == len(correct) == 14 and min(verdicts.metric(run) for run in incorrect) > 0.6
    both = {lr: np.mean([verdicts.metric(run) for run in results.where(grid, lr=lr, lam=2.0)]) for lr in experiments.RATES}
    only = {lr: np.mean([verdicts.metric(run) for run in results.where(incorrect, lr=lr)]) for lr in experiments.RATES}
    assert [lr for lr in experiments.RATES if only[lr] > both[lr]] == [5e-5, 1e-4, 3.2e-3]
    assert slips_at_ten()[0] in page
    half, one = (np.mean([*map(verdicts.metric, studied()[0]["lambda", f"λ = {lam}"])]) for lam in (0.5, 1))
    assert one < half
    assert max(verdicts.metric(run) for run in correct) == 0
    ends = [run.log[f"logratio_{kind}"][-1] for run in studied()[0]["targets", "correct"] for kind in ("correct", "incorrect")]
    assert np.allclose(ends, -900, atol=50) and "rows end some 900 nats below" in page
    for lr in experiments.RATES[:4]:
        means = results.by(results.where(grid, lr=lr), lambda run: run.get("lam"))
        means = {lam: np.mean([verdicts.metric(run) for run in some]) for lam, some in means.items()}
        assert sorted(means) == [*experiments.LAMBDAS] and np.all(np.diff([means[lam] for lam in sorted(means)[:5]]) > 0)
    found = rule.verdicts(studied()[1])
    assert (found["C8"], found["C9"]) == ("undecided", "supported")
    assert "C9 is supported." in page and "so C8 is undecided." in page


def best_of_rounds(name):
    """Of each round of a search: the best setting over the five seeds, and its mean."""
    of_seed = tune.scores(name, held())
    means = [
        [(drawn, np.mean([of_seed(drawn, seed) or 0 for seed in tune.SEEDS])) for drawn in some]
        for some in tune.search(name, of_seed).asked
    ]
    return [max(some, key=lambda pair: pair[1]) for some in means]


def test_what_is_said_of_the_searches():
    page, text = flowing(Path("docs/findings.md")), Path("results/results.md").read_text()

    def score(name):
        found = tune.search(name, tune.scores(name, held()))
        assert f"| `{name}` | {len(found.asked)} | {found.score:.3f} | `{tune.words(name, found.chosen)}` |" in text
        return found.chosen, found.score

    of_seed, (chosen, off_rl) = tune.scores("off_rl", held()), score("off_rl")
    first_two = np.mean([of_seed(chosen, seed) for seed in experiments.GRID_SEEDS])
    assert experiments.GRID_SEEDS == tune.SEEDS[:2] and chosen["schedule"] == "linear"
    assert f"On two of the five seeds Off-RL scores {first_two:.3f} at its best setting." in page
    plain = results.where(results.of_experiment(held().values(), "lambda-grid"), loss="off_rl")
    on_grid = {lr: np.mean([*map(tune.score_of, results.where(plain, lr=lr))]) for lr in experiments.RATES}
    best = max(on_grid, key=on_grid.get)
    assert f"At {best:g}, the best of the seven rates, it scores {on_grid[best]:.3f} on these two." in page
    assert chosen["lr"] < min(experiments.RATES) and on_grid[best] < first_two
    smaller = [drawn for drawn in tune.draw("off_rl", 0, {"lr": tune.LR}) if drawn["lr"] < chosen["lr"]]
    assert smaller == [{"lr": lr, "schedule": "constant"} for lr in (7e-6, 8.3e-6)]
    seven, eight = ([of_seed(drawn, seed) for seed in experiments.GRID_SEEDS] for drawn in smaller)
    said = "smaller, constant rates score between {:.3f} and {:.3f} on the two seeds."
    assert said.format(min(seven + eight), max(seven + eight)) in page
    sums = [sum(chosen["lr"] * (1 - step / 1000) for step in range(1000)), 1000 * 7e-6, 1000 * 8.3e-6]
    assert "sum to less, {:.4f} against {:.4f} and {:.4f}.".format(*sums) in page
    assert max(np.mean(eight), np.mean(seven)) < on_grid[best]
    chosen, mean = score("fpa")
    assert chosen["lr"] < min(experiments.RATES)
    shown = table(Path("docs/findings.md"), "family | score")
    found = {name[1:-1]: score(name[1:-1]) for name, *_ in shown}
    above = {name: found[name][1] for name in ("sharpened", "power", "kto")}
    assert min(above.values()) > mean and "KTO, `power` and `sharpened` score above FPA" in page
    assert [name for name, (_, score) in found.items() if score > mean] == ["grpo", "kto", "power", "sharpened"]
    (best,) = {f"{score:.2f}" for score in above.values()}
    said = f"reaches {off_rl:.2f} with Off-RL, {mean:.2f} with FPA, and {best} with KTO, `power` and `sharpened`, on seeds that"
    assert said in flowing(README)
    scored = {name: f"{mean:.3f}" for name, (_, mean) in found.items()}
    assert scored["future_topr"] < scored["topr"]
    first, of_seed = tune.draw("nsr", 0, {"lr": tune.LR, **tune.FAMILIES["nsr"].ranges}), tune.scores("nsr", held())
    others = [settings for settings in first if settings != found["nsr"][0]]
    assert len(others) == 11 and not any(of_seed(settings, seed) for settings in others for seed in tune.SEEDS)
    beta = found["a_star_po"][0]["beta"]
    marks = [
        f"*Weakened*: tuned on `habit`, the constant scores {{constant}}, and FPA {mean:.3f}.",
        f"*Weakened*: tuned on `habit`, FPA scores {mean:.3f}, and SFT {{sft}}.",
        "On `habit` plain DPO scores {dpo} at a tenth of this rate.",
        f"β was 1e-3. Tuned on `habit`, A\\*-PO scores {{a_star_po}}, at β = {beta:g}.",
    ]
    assert all(mark.format(**scored) in page for mark in marks) and page.count("*Weakened*:") == 4
    assert claims.claims(runs())["C7"] and found["dpo"][0]["lr"] == pytest.approx(5e-5 / 10, rel=0.05)
    first, later = best_of_rounds("dpo_fpa")
    assert first == found["dpo_fpa"] and tune.search("dpo_fpa", tune.scores("dpo_fpa", held())).ranges["lam"] == (0.25, 80)
    assert f"chose λ = {first[0]['lam']:g} in its first round" in page and f"its best one scores {later[1]:.3f}." in page
    rpo, _ = best_of_rounds("rpo_fpa")
    said = f"goes on. Its first round's best setting scores {rpo[1]:.3f}, with λ = {rpo[0]['lam']:g}, near the lower end"
    assert said in page and not tune.search("rpo_fpa", tune.scores("rpo_fpa", held())).chosen and rpo[0]["lam"] <= 2 * 0.25

    (first, mean), later = best_of_rounds("dpo")
    assert f"DPO's first round had chosen {first['lr']:g} and scored {mean:.3f}. " in page and first["lr"] == 2 * tune.LR[0]
    assert later == found["dpo"]


def test_the_table_of_searches_is_that_of_results_md():
    page, text = Path("results/results.md"), Path("results/results.md").read_text()
    chosen = dict(re.findall(r"(?m)^\| (`\w+`) \| \d \| [\d.]+ \| `--loss \w+ (--lr .*)` \|$", text))
    rows = [
        [name, score, most, ratio, f"`{chosen[name].replace(' --schedule constant', '')}`"]
        for name, score, _, _, most, *_, ratio in table(page, "family | pass@1")
    ]
    assert table(Path("docs/findings.md"), "family | score") == rows and len(rows) == len(chosen)


def test_what_is_said_of_slips_beside_its_claims():
    page, some = flowing(Path("docs/findings.md")), results.where(runs(), lr=2e-4, steps=1000, seed=(0, 1, 2, 3, 4))
    few, middle, many = (np.mean([*map(results.final, results.where(some, loss="sft", prompts=n))]) for n in (256, 1024, 4096))
    assert f"which ends at {few:.3f} there, and at {middle:.3f} with 1,024 prompts." in page
    assert f"SFT gains {many - middle:.3f} there over 1,024 prompts." in page
    tuning = results.where(runs(), loss="off_rl", seed=results.TUNING_SEEDS, prompts=1024, steps=1000)
    large, middle = (np.mean([*map(results.final, results.where(tuning, lr=lr))]) for lr in (3.2e-3, 8e-4))
    assert f"mean there is {large - middle:.3f} higher than at 8e-4." in page
    (step,) = re.findall(r"10 M: step time, FPA / Off-RL \| ([\d.]+) ", TEXTS[Path("docs/bench.md")])
    assert f"With 10 M parameters the step takes {step} times, and memory is level" in page


def test_what_is_said_of_pairs_of_one_problem():
    page = flowing(Path("docs/findings.md"))
    of_seed = {name: tune.scores(name, held()) for name in ("simper", "off_rl")}
    found = tune.search("simper", of_seed["simper"])
    assert found.chosen["schedule"] == "constant"
    drawn = [settings for some in found.asked for settings in some if settings["lr"] <= 2.9e-3]
    means = [np.mean([of_seed["simper"](settings, seed) for seed in experiments.GRID_SEEDS]) for settings in drawn]
    rates = sorted(settings["lr"] for settings in drawn)
    said = f"At the {len(drawn)} rates from {rates[0]:g} to {rates[-1]:g} the mean of two seeds stays above 0.46. At 0.0048 one"
    assert said in page and min(means) > 0.46
    ends = [of_seed["simper"]({"lr": 4.8e-3, "schedule": "constant"}, seed) for seed in experiments.GRID_SEEDS]
    assert min(ends) == 0 < max(ends)
    at_rate = [
        of_seed[name]({"lr": lr, "schedule": "constant"}, seed)
        for name, lr in (("simper", 2.1e-4), ("off_rl", 1.9e-4))
        for seed in experiments.GRID_SEEDS
    ]
    said = "At 0.00021 it scores {:.3f} and {:.3f} on two seeds. Off-RL at 0.00019 scores {:.3f} and {:.3f} on these."
    assert said.format(*at_rate) in page


def test_what_is_said_of_the_chosen_settings():
    page = flowing(Path("docs/findings.md"))
    searches = {name: tune.search(name, tune.scores(name, held())) for name in tune.FAMILIES}
    chosen = {name: some for name, some in sections.chosen_runs(searches, held()).items() if name != "grpo"}
    ratio = {name: np.mean([results.ratio_of_coefficients(run) for run in some]) for name, some in chosen.items()}
    tail = {name: np.mean([run.log["logratio_correct_p5"][-1] for run in some]) for name, some in chosen.items()}

    def rank(names):
        return stats.spearmanr([ratio[name] for name in names], [searches[name].score for name in names])[0]

    said = f"Over the {len(chosen)} offline families the rank correlation of ratio and score is {rank([*chosen]):.2f}, and"
    assert said in page
    without = rank([name for name in chosen if name != "sft"])
    assert f"{without:.2f} without SFT, whose ratio is 0." in page and ratio["sft"] == 0
    assert min(ratio["dpo"], ratio["a_star_po"]) > ratio["off_rl"] and ratio["kto"] < ratio["future_topr"]
    assert "Off-RL's ratio is {off_rl:.3f} over training, so".format(**ratio) in page
    assert min(searches[name].score for name in ("dpo", "a_star_po")) > searches["off_rl"].score
    said = "log-ratios is {kto:.1f} nats under KTO and {sharpened:.1f} under `sharpened`."
    assert said.format(**tail) in page and {"kto", "sharpened"} == {*sorted(tail, key=tail.get)[:2]} <= {*[*chosen][:3]}
    assert "is {future_topr:.3f} nats under future TOPR, and {sft:.3f} under SFT.".format(**tail) in page


def test_what_is_said_of_claims_that_are_yet_to_run():
    page, words = flowing(Path("docs/findings.md")), rule.verdicts(studied()[1])
    assert {words[name] for name in ("C6", "C12", "N3")} == {"not run"}
    fpa, off_rl = (tune.search(name, tune.scores(name, held())).chosen for name in ("fpa", "off_rl"))
    best = verdicts.best_of_rates(verdicts.Runs(verdicts.study(held())))
    assert "rate from 5e-5 to 3.2e-3. This is 3.2e-3, and" in page and best == 3.2e-3
    assert f"own rate is {fpa['lr']:g}. So C12" in page and off_rl["lr"] < min(experiments.RATES) and best > fpa["lr"]
    assert (off_rl["schedule"], fpa["schedule"]) == ("linear", "constant")


def test_other_machines_made_the_same_rollouts_for_c8_and_c9():
    text, by_seed = Path("results/results.md").read_text(), {}
    assert "The runs of C8, C9 come from several kinds of CPU." in text
    assert re.search(r"(?m)^\| lambda \| 8 [^;]*: λ = 0; 40 ", text)
    for case in (*(("lambda", f"λ = {lam}") for lam in experiments.LAMBDAS), ("targets", "correct"), ("targets", "incorrect")):
        for run in studied()[0][case]:
            by_seed.setdefault(run.config["seed"], set()).add(run.config["measured"]["share_correct"])
    assert len(by_seed) == 8 and all(len(shares) == 1 for shares in by_seed.values())


def test_what_is_said_of_the_ratio_of_the_weights():
    chosen, counts = figures.figure_ratio([*held().values()])[1], []
    drawing.plt.close("all")
    middle = [run for run in chosen if 0.1 <= figures.ratio_of_coefficients(run) < 0.5]
    rises = {
        loss: [run.log["test_accuracy_0.7"][-1] > run.log["test_accuracy_0.7"][0] for run in results.where(middle, loss=loss)]
        for loss in ("fpa", "off_rl")
    }
    said = "{} of {} runs of FPA end above their start, and {} of {} runs of Off-RL."
    numbers = [number for some in rises.values() for number in (sum(some), len(some))]
    assert said.format(*numbers) in flowing(Path("docs/findings.md"))
    for low, high in ((0, 0.1), (0.1, 0.5), (0.5, 1), (1, np.inf)):
        some = [run.log["test_accuracy_0.7"] for run in chosen if low <= figures.ratio_of_coefficients(run) < high]
        counts.append([str(len(some)), str(sum(accuracy[-1] > accuracy[0] for accuracy in some))])
    rows = table(Path("docs/findings.md"), r"mean C_l·\|y\| / C_w·\|y\| over training")
    assert [row[1:] for row in rows] == counts
    assert [row[0] for row in rows] == ["below 0.1", "0.1 to 0.5", "0.5 to 1", "1 or more"]


def test_what_is_said_of_the_forecast_on_habit():
    page = flowing(Path("docs/findings.md"))
    numbers = [str(number).split(": ")[1].split(" (claim")[0] for number in studied()[1]["C10"].measured]
    straight = [number.split()[0] for number in numbers[4:]]
    assert f"up to step 960 is {straight[3]}, and {straight[1]} at 2e-5" in page
    ends = [np.mean([run.log["test_accuracy_0.7"][-1] for run in extrapolated(lr)]) for lr in ("0.0002", "2e-05")]
    assert "ends at {:.3f} at 2e-4 and at {:.3f} at 2e-5".format(*ends) in page
    at_300 = [np.mean([run.log["accuracy_0.7"][3] for run in extrapolated(lr)]) for lr in ("2e-05", "0.0002")]
    assert "is {:.3f} at 2e-5 and {:.3f} at 2e-4 then".format(*at_300) in page
    assert {run.log["step"][3] for lr in ("2e-05", "0.0002") for run in extrapolated(lr)} == {300}
    rises = np.mean([run.log["accuracy_0.7"][[1, -1]] for run in extrapolated("0.0002")], axis=0)
    assert "rises from {:.3f} at step 100 to {:.3f} at the end".format(*rises) in page and rises[0] < rises[1]
    on_slips = results.with_table(results.fpa_runs(runs()), "extrapolation")
    ratios = {(lr, lam): results.forecast_by_step(extrapolated(lr), lam) for lr in ("2e-05", "0.0002") for lam in (1, 2)}
    others = {(lr, lam): results.forecast_by_step(results.where(on_slips, lr=lr), lam) for lr in (2e-5, 2e-4) for lam in (1, 2)}
    shown = [[row[0], *(float(cell or "nan") for cell in row[1:])] for row in table(Path("results/results.md"), "t | lr")]
    for i, of_t in enumerate(ratios.values(), 1):
        assert {int(row[0]): row[i] for row in shown if row[i] > 0} == pytest.approx(of_t, rel=5e-3)
    last = {
        key: max((t for t in of_t if all(of_t[i] < 1 for i in of_t if i <= t)), default="none")
        for key, of_t in {**ratios, **others}.items()
    }
    of_slips = re.findall(r"KL, lr [^:]*: (\S+ ± \S+) ", (RESULTS / "results.md").read_text())
    rows = []
    for i, (task, lr) in enumerate((("habit", "2e-05"), ("habit", "0.0002"), ("slips", 2e-5), ("slips", 2e-4))):
        own = numbers[2 * i : 2 * i + 2] if task == "habit" else of_slips[2 * i - 4 : 2 * i - 2]
        rows.append([f"`{task}`, {('2e-5', '2e-4')[i % 2]}", str(last[lr, 1]), str(last[lr, 2]), *own])
    assert table(Path("docs/findings.md"), "task, learning rate | a forecast") == rows
    assert others[2e-4, 2][320] == pytest.approx(100, rel=0.1) and "λ = 2, π̂ is a hundred times farther" in page
    slow, fast = ([last[lr, lam] for lam in (2, 1)] for lr in ("2e-05", "0.0002"))
    assert min(slow) == 160
    text, lesson = flowing(README), " ".join(Path("docs/lesson/source.py").read_text().replace("\n# ", " ").split())
    assert f"is a forecast only in the first {min(fast)} to {max(fast)} steps, so C10 is contradicted." in text
    assert all("At 2e-5 π̂ is a forecast up to step 160." in some for some in (text, lesson))


def test_the_verdicts_beside_the_paper_are_those_of_results_md():
    verdicts = dict(re.findall(r"(?m)^\| (C\d+): .*\*\*([a-z ]+)\*\*", (RESULTS / "results.md").read_text()))
    rows = table(Path("docs/findings.md"), "the paper reports")
    assert len(rows) == 5
    for _, names, here in rows:
        assert {verdicts[name] for name in names.split(", ")} == {here.split(",")[0]}, names


@functools.cache
def real_claims():
    """{name: Claim} of the published model."""
    return real.claims(real.study(Path("results/smollm2")))


def test_the_findings_show_every_figure():
    shown = re.findall(r"\(\.\./results/slips/figures/(\w+)\.png\)", TEXTS[Path("docs/findings.md")])
    assert sorted(shown) == sorted(path.stem for path in (RESULTS / "figures").glob("*.png"))


# --- adding a loss


def insert(path, after, mark, text):
    """Put a text into a file, in front of the first `mark` behind `after`."""
    code = path.read_text()
    at = code.index(mark, code.index(after))
    path.write_text(code[:at] + text + code[at:])


RECOGNISED = """
from study import experiments
print(sorted(run for cases in experiments.members({}).values() for runs in cases.values() for run in runs))
"""  # a new loss or flag renames no run


def test_the_three_steps_add_a_loss(tmp_path):
    copy = tmp_path / "copy"
    for name in listed():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, copy / name)
    function, entry, row, test, *_ = blocks(Path("docs/contributing.md"), "python")  # the last one is not of the steps
    insert(copy / "losses.py", "", "\nHYPERPARAMETERS = {", f"\n{function}\n")
    insert(copy / "losses.py", "\nHYPERPARAMETERS = {", "}\n\nLOSSES", entry)
    insert(copy / "losses.py", "\nLOSSES = {", "}  # fmt: skip", row)
    with open(copy / "tests/test_losses.py", "a") as file:
        file.write(f"\n\n{test}")

    def python(*words):
        done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    printed = python("-m", "pytest", "-vv", "tests/test_losses.py", "tests/test_house.py", "-k", "not ls_shows")
    assert printed.count("[tilted") > 3 and "test_tilted_by_hand PASSED" in printed
    tiny = "--ops 1 --base-steps 600 --slip 0.3 --prompts 24 --rollouts 4 --steps 10 --batch-size 8 --device cpu".split()
    printed = python("train.py", "--loss", "tilted", "--gamma", "0.25", "--lam", "0", "2", *tiny)
    assert "tilted with FPA, λ = 2, γ = 0.25" in printed
    names = [path.parent.name for path in (copy / "runs").glob("*/log.csv")]
    assert len(names) == 2 and all("tilted" in name and "gamma0.25" in name for name in names)
    before = subprocess.run([sys.executable, "-c", RECOGNISED], capture_output=True, text=True, check=True).stdout
    assert before.count("'") > 50 and python("-c", RECOGNISED) == before
