"""README.md against the code and the committed logs: its commands, paths, pasted output, code, table and findings."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import plots
import train

README = Path("README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
COMMANDS = [
    line for language, block in BLOCKS if not language for line in block.splitlines() if re.match(r"(pip|python) ", line)
]
GROUPS = plots.read_runs(plots.run_folders(Path("logs")))


def block_with(text):
    (block,) = [block for _, block in BLOCKS if text in block]
    return block


def test_the_two_commands_are_there_and_ci_runs_the_second():
    install = "pip install -r requirements.txt && python "
    assert install + "train.py --loss fpa --lam 2" in COMMANDS and install + "-m pytest" in COMMANDS
    assert install + "-m pytest" in Path(".ci/run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path):
    for part in command.split("&&"):
        words = shlex.split(part, comments=True)
        if words[:2] == ["python", "train.py"]:
            train.parse_args(words[2:])
        else:
            assert words[0] == "pip" or words[1] == "-m" or Path(words[1]).is_file()
    assert command.startswith(("pip", "python"))


def file_tree():
    return [line.split()[0] for line in block_with("losses.py   ").splitlines()]


@pytest.mark.skipif(not (shutil.which("git") and Path(".git").exists()), reason="not a git checkout")
def test_every_file_is_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    concepts = {path.split("/")[0] + ("/" if "/" in path else "") for path in listed if not path.startswith(".")}
    assert concepts - {"LICENSE", "README.md", "ruff.toml", "pytest.ini"} == set(file_tree())


def test_paths_exist():
    assert all(Path(path).exists() for path in file_tree())
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert Path(link).is_file()


def test_flags_in_the_text_exist():
    programs = ("train.py", "bench.py", "plots.py")
    helps = [subprocess.run([sys.executable, name, "--help"], capture_output=True, text=True).stdout for name in programs]
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert any(flag in text for text in helps)


def test_the_glossary_is_the_log():
    named = re.findall(r"`([\w.]+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", README, flags=re.M)))
    assert named == train.COLUMNS


def test_code_is_the_shipped_code():
    shipped = Path("losses.py").read_text().splitlines()
    (block,) = [block for language, block in BLOCKS if language == "python"]
    assert all(line in shipped for line in block.splitlines())


def test_pasted_task_is_what_the_command_prints():
    printed = subprocess.run([sys.executable, "-m", "toy_math"], capture_output=True, text=True, check=True).stdout
    assert block_with("clean and slipped") in printed


def test_pasted_output_is_the_committed_run():
    (default,) = [methods for setting, methods in GROUPS.items() if '"steps": 1000' in setting]
    ((_, log),) = [run for run in default["fpa", 2.0, "both"] if run[0]["seed"] == 0]
    rows = [{name: column[i] for name, column in log.items()} for i in range(len(log["step"]))]
    expected = [train.progress_line({**row, "step": int(row["step"])}, 1000, 0).split("ETA")[0] for row in rows]
    pasted = [line.split("ETA")[0] for line in block_with("ETA").splitlines() if line.startswith("step")]
    assert len(pasted) > 5 and all(line in expected for line in pasted)


def test_the_table_is_the_committed_logs():
    table = README.split("<!-- results: python plots.py logs/ -->\n```\n")[1].split("```")[0]
    assert table.strip() == plots.summary(GROUPS).strip()


@pytest.mark.parametrize("name", plots.FIGURES)
def test_figures_are_those_of_the_committed_logs(name):
    drawn_from = list(GROUPS.values())[plots.FIGURES[name][0]]
    assert Image.open(f"logs/figures/{name}").text["Description"] == plots.fingerprint(drawn_from)


@pytest.mark.parametrize("setting", GROUPS)
def test_the_claims_in_the_text_hold_on_the_committed_logs(setting):
    config, methods = json.loads(setting), GROUPS[setting]
    off_rl, fpa = (methods[method] for method in (("off_rl", 0.0, None), ("fpa", 2.0, "both")))
    assert [c["seed"] for c, _ in off_rl] == [c["seed"] for c, _ in fpa] == [0, 1, 2, 3, 4]
    for (_, baseline), (_, ours) in zip(off_rl, fpa):
        start, off_rl_ends, fpa_ends = ours["accuracy"][0], baseline["accuracy"][-1], ours["accuracy"][-1]
        assert baseline["accuracy"][0] == start and fpa_ends > off_rl_ends
        assert ours["logratio_correct"][-1] > baseline["logratio_correct"][-1]
        for log in (baseline, ours):
            assert log["accuracy_greedy"][0] == 1 > log["accuracy_greedy"][-1]
        assert (
            ours["pihat_correct"].min() < 0.6 * ours["pihat_correct"][0]
            and ours["pihat_correct"][-1] > ours["pihat_correct"].min()
        )
        assert ours["accuracy"].max() > baseline["accuracy"].max()
        if config["prompts"] == 1024:
            assert baseline["accuracy"].max() > start + 0.05
        if config["steps"] == 4000:
            assert (
                fpa_ends > start > off_rl_ends
                and 0 < ours["accuracy"].max() - fpa_ends < baseline["accuracy"].max() - off_rl_ends
            )
        if config["prompts"] == 768:
            assert off_rl_ends < start / 2
