"""full_scale/gym.py: problems of reasoning-gym, its verifiers as judges, and what is refused."""

import json
import re
import shlex
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_full_scale import write
from test_full_scale_training import run_module, sample

from full_scale import evaluate, gym
from full_scale.exam import Exam
from full_scale.rollouts import read_problems
from full_scale.verdict import number
from plumbing.files import UserError
from study import real

here = pytest.mark.skipif(not find_spec("reasoning_gym"), reason="pip install reasoning-gym")
SUMS = ["chain_sum", "--config", "min_terms=3", "max_terms=3", "min_digits=1", "max_digits=1"]


def problems(folder, *flags, task=SUMS, to=("problems.jsonl",)):
    done = run_module("gym", *task, *flags, "--to", *(folder / name for name in to))
    assert done.returncode == 0, done.stderr
    return [[json.loads(line) for line in (folder / name).read_text().splitlines()] for name in to]


@here
def test_the_files_of_a_command_share_no_problem(tmp_path):
    one, other = problems(tmp_path, "--count", 20, 8, to=("train.jsonl", "deep/held_out.jsonl"))
    texts = [line["problem"] for line in one + other]
    assert (len(one), len(other), len(set(texts))) == (20, 8, 28)
    for line in one:
        expression = line["problem"].split(": ")[1].rstrip(" =")
        terms = expression.replace("- ", "-").replace("+ ", "").split()
        assert len(terms) == 3 and int(line["answer"]) == sum(map(int, terms))
    assert problems(tmp_path, "--count", 28) == [one + other]
    assert problems(tmp_path, "--count", 28) == [one + other]  # the same again
    write(tmp_path / "mine.jsonl", {"problem": "1", "answer": "1"})
    words = ["--count", 20, 8, "--to", tmp_path / "new.jsonl", tmp_path / "mine.jsonl"]
    done = run_module("gym", "chain_sum", *words)
    assert done.returncode == 2 and "mine.jsonl holds something else" in done.stderr and not (tmp_path / "new.jsonl").exists()
    assert problems(tmp_path, "--count", 28, "--seed", 1, to=("another.jsonl",))[0] != one + other


@here
def test_its_own_verifier_is_the_judge(tmp_path):
    problems(tmp_path, "--count", 3)
    for problem, gold in read_problems(tmp_path / "problems.jsonl"):
        value = int(gold["answer"])
        right = [f"\\boxed{{{value}}}", f"so. Answer: {value}", f"It is {value}.", f"<answer>\n {value}.0 </answer>"]
        wrong = [f"\\boxed{{{value + 1}}}", "no", "", f"Answer: {value}{value or 1}", f"<answer>{value} or 5</answer>"]
        assert [gym.is_right(gold, text, finished=True) for text in (*right, *wrong)] == [True] * 4 + [False] * 5, problem
        assert gym.is_right(gold, right[0], strict=True) and not gym.is_right(gold, right[1], strict=True)
        assert not gym.is_right(gold, right[3], strict=True)


@here
def test_answers_in_words_are_judged(tmp_path):
    """A task whose answers are sentences."""
    problems(tmp_path, "--count", 2, task=["knights_knaves"])
    for _, gold in read_problems(tmp_path / "problems.jsonl"):
        assert " is a " in gold["answer"] and gym.is_right(gold, f"I think:\n<answer>\n{gold['answer']}\n</answer>")
        assert not gym.is_right(gold, "<answer>Zoey is a knight.</answer>") and not gym.is_right(gold, "no")


@here
def test_equal_answers_in_words_vote_together(tmp_path):
    """Of a right answer and seven equal wrong ones the wrong one wins, and no answer is malformed."""
    problems(tmp_path, "--count", 1, task=["knights_knaves"])
    ((problem, gold),) = read_problems(tmp_path / "problems.jsonl")
    wrong = ["Zo is a knight, and Ann a knave", " zo is a  knight,\nand Ann a knave ", "ZO IS A KNIGHT, AND ANN A KNAVE"]
    said = [gold["answer"], *3 * wrong[:2], wrong[2]]
    texts = [*(f"<answer>{text}</answer>" for text in said), "Well", "<answer></answer>"]
    rows = [{"completion": a, "finished": True, "label": gym.is_right(gold, a), "problem_id": 0} for a in texts]
    votes = [gym.vote(gold, row) for row in rows]
    assert rows[0]["label"] and not rows[1]["label"] and len({*votes[1:8]}) == 1 and votes[8] is None and votes[0] != votes[1]
    assert "maj@8 0.0000" in evaluate.report(rows[:8], votes[:8]) and "pass@8 1.0000" in evaluate.report(rows[:8], votes[:8])
    assert gym.vote(gold, rows[9]) is None  # an empty answer wins nothing
    assert gym.vote("7", rows[0]) is None and gym.vote("7", {"completion": "It is 7.0", "finished": True}) == number("7")
    exam = SimpleNamespace(asked=SimpleNamespace(strict=False), problems=[(problem, gold)], samples=8)
    columns = Exam.columns(exam, [[*rows[:8], rows[0], rows[0]]])
    assert (columns["accuracy"], columns["accuracy_greedy"], columns["malformed"]) == (1 / 8, 1.0, 0.0)
    assert Exam.columns(exam, [[*7 * [rows[8]], *3 * [rows[0]]]])["malformed"] == 7 / 8


@here
def test_no_verifier_writes_an_endless_number_out(tmp_path):
    problems(tmp_path, "--count", 1, task=["coin_flip"])
    ((_, gold),) = read_problems(tmp_path / "problems.jsonl")
    began = time.monotonic()
    assert not any(gym.is_right(gold, f"<answer>{text}</answer>") for text in ("1e99999999", "1E+99999999", "2 + 1e-99999999"))
    assert time.monotonic() - began < 1 and gym.is_right(gold, f"<answer>{gold['answer']}</answer>")


@here
def test_no_verifier_runs_an_answer(tmp_path, monkeypatch):
    """A task of the library evaluates a list that it is given as an answer; such an answer never gets there."""
    assert [bool(gym.HARMLESS.fullmatch(text)) for text in ("-1.5, a b", "[print(1)]", "9**9")] == [True, False, False]
    problems(tmp_path, "--count", 1, task=["spiral_matrix"])
    ((_, gold),) = read_problems(tmp_path / "problems.jsonl")
    generator = gym.dataset(gold["task"], json.dumps(gold["config"], sort_keys=True))
    seen, original = [], type(generator).score_answer

    def watched(self, answer, entry):
        seen.append(answer)
        return original(self, answer, entry)

    monkeypatch.setattr(type(generator), "score_answer", watched)
    code = f"[open({str(tmp_path / 'written')!r}, 'w')]"
    assert not gym.is_right(gold, f"<answer>{code}</answer>") and not seen and not (tmp_path / "written").exists()
    assert gym.is_right(gold, f"<answer>{gold['answer']}</answer>") and seen
    original(generator, code, gym.problem_of(**{name: gold[name] for name in ("task", "config", "index")}))
    assert (tmp_path / "written").exists()  # what it would have done


BAD_GYM = {
    "no such task": (["chain_sun"], 'reasoning-gym has no task "chain_sun"; did you mean chain_sum?'),
    "no such setting": (["chain_sum", "--config", "terms=3"], "chain_sum has no setting terms, only min_terms, "),
    "settings at odds": (["chain_sum", "--config", "min_terms=3", "max_terms=2"], "chain_sum: max_terms must be >= min_terms"),
    "a text for a number": (["chain_sum", "--config", "min_terms=x"], "chain_sum: "),
    "no name": (["chain_sum", "--config", "3"], "argument --config: must be NAME=VALUE, not '3'"),
    "answers that would run": (["simple_integration"], "simple_integration has no verifier that can be asked here: of its "),
    "too few": (["chain_sum", "--config", "max_digits=1", "min_terms=1", "max_terms=1", "--count", "11"],
                "chain_sum has only 10 different problems in 220 draws, and 11 are wanted"),
    "counts without files": (["chain_sum", "--count", "1", "2"], "argument --to: needs 2 different files, one for each"),
}  # fmt: skip


@here
@pytest.mark.parametrize(("words", "message"), BAD_GYM.values(), ids=BAD_GYM)
def test_what_cannot_be_asked_is_one_line(words, message, tmp_path):
    done = run_module("gym", *words, "--to", tmp_path / "problems.jsonl")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


@here
def test_lines_of_others_are_checked(tmp_path):
    ((line,),) = problems(tmp_path, "--count", 1)
    damages = {
        'gym is {"task": "chain_sum"}, not a task, its config and': {"gym": {"task": "chain_sum"}},
        "gym is 3, not a task": {"gym": 3},
        'has no task "chain"': {"gym": {**line["gym"], "task": "chain"}},
        "this version of reasoning-gym has another problem there": {"problem": "1 + 1 ="},
        "chain_sum has no setting x": {"gym": {**line["gym"], "config": {"x": 1}}},
        "no problem": {"problem": None},
    }
    for message, change in damages.items():
        bad = {name: value for name, value in {**line, **change}.items() if value is not None}
        with pytest.raises(UserError, match="1 of 2 lines are bad: line 2: ") as error:
            read_problems(write(tmp_path / "bad.jsonl", line, bad))
        assert message in str(error.value) and "\n" not in str(error.value)
    assert read_problems(write(tmp_path / "bad.jsonl", line, {**line, "answer": "7777"}))[1][1]["answer"] == line["answer"]


def test_without_the_library_it_says_what_to_install(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    gym.dataset.cache_clear()
    line = {"problem": "1 + 1 =", "answer": "2", "gym": {"task": "chain_sum", "config": {}, "index": 0}}
    path = write(tmp_path / "problems.jsonl", line)
    flags = ["--model", checkpoint, "--problems", path, "--out", tmp_path / "out.jsonl"]
    for module, words in (("gym", ["chain_sum", "--to", tmp_path / "new.jsonl"]), ("rollouts", flags)):
        done = run_module(module, *words)
        assert done.returncode == 2 and "pip install reasoning-gym" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert list(tmp_path.iterdir()) == [path]


@here
def test_a_checkpoint_is_asked_and_judged(checkpoint, tmp_path):
    """From the library's problems to rollouts, behind the worked examples that are shipped."""
    problems(tmp_path, "--count", 3)
    shots = ROOT / "full_scale" / "sums.jsonl"
    done = sample(checkpoint, tmp_path / "problems.jsonl", tmp_path / "rollouts.jsonl", "--n", 2, "--shots", shots, 8)
    assert done.returncode == 0, done.stderr
    golds = dict(read_problems(tmp_path / "problems.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        (asked,) = [text for text in golds if text in row["prompt"]]
        assert row["label"] == gym.is_right(golds[asked], row["completion"], row["finished"])


@here
def test_the_documented_command_makes_the_studys_problems_but_for_their_number():
    page = (ROOT / "docs" / "full_scale.md").read_text()
    (command,) = re.findall(r"^python -m full_scale\.gym (basic_arithmetic .*)$", page, flags=re.M)
    documented, studied = (dict(split(words)) for words in (command, real.PROBLEMS["sums"]))
    assert documented["--config"] == studied["--config"] and set(documented) == {*studied, "--to"}


@here
@pytest.mark.parametrize("task", real.PROBLEMS)
def test_worked_examples_are_right_asked_alike_and_not_held_out(task, tmp_path):
    shots = [json.loads(line) for line in (ROOT / "full_scale" / f"{task}.jsonl").read_text().splitlines()]
    words = shlex.split(real.PROBLEMS[task])
    asked, held_out = problems(tmp_path, *words[1:], task=words[:1], to=("problems.jsonl", "held_out.jsonl"))
    assert (len(asked), len(held_out), len(shots)) == (96, 48, 8)
    assert not {shot["problem"] for shot in shots} & {line["problem"] for line in held_out}
    for problem in (*asked, *shots):
        assert re.fullmatch(r"Calculate \d+ [+-] \d+ [+-] \d+\.", problem["problem"])
    for shot in shots:
        a, sign, b, other, c = re.findall(r"\d+|[+-]", shot["problem"])
        first = int(a) + int(sign + b)
        second = first + int(other + c)
        steps = f"{a} {sign} {b} = {first}, {first} {other} {c} = {second}"
        assert shot["solution"] == f"{steps}. Answer: {second}" and shot["answer"] == str(second)


def split(command):
    """(flag, its values) of a command's words; the task is the value of none."""
    flag, values = None, []
    for word in [*shlex.split(command), "--"]:
        if word.startswith("--"):
            yield flag, values
            flag, values = word, []
        else:
            values.append(word)
