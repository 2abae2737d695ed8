"""full_scale/train.py: several runs a command beside one reference, and accuracies on held-out problems during training."""

import csv
import json
import math
import shutil
import warnings
import weakref

import pytest
import torch
from test_full_scale import ROLLOUTS, write
from test_full_scale_training import QUICK, Killed, kill_at, run_module, same, sample, taught  # noqa: F401 (a fixture)

import full_scale.exam
import full_scale.policy
import full_scale.train
from full_scale.data import read_data
from full_scale.exam import Exam
from full_scale.load_hf import load_pretrained
from full_scale.reference import Reference
from study.results import describe, read_run

ACCURACIES = "accuracy accuracy_0.7 accuracy_greedy malformed entropy pass@4".split()


def train(checkpoint, out, *flags, data=ROLLOUTS, processes=1):
    return run_module("train", "--init", checkpoint, "--data", data, "--out", out, *QUICK, *flags, processes=processes)


def logs_of(out):
    """{the run's settings that the flags chose: rows of its log, without the times}."""
    found = {}
    for path in sorted(out.glob("*/log.csv")):
        config = json.loads((path.parent / "config.json").read_text())
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(path.read_text().splitlines())]
        found[config["loss"], config["lr"], config["seed"]] = rows
    return found


@pytest.fixture
def passes(monkeypatch):
    """What is counted of the passes of the reference: (after other prompts, hidden states kept)."""
    seen, original = [], Reference.sums

    def counted(self, size, model, prompts=None, stored=False):
        seen.append((prompts is not None, stored))
        return original(self, size, model, prompts, stored)

    monkeypatch.setattr(Reference, "sums", counted)
    return seen


def test_several_values_are_as_many_runs_beside_one_reference(checkpoint, tmp_path, passes):
    flags = ["--loss", "off_rl", "fpa", "kto", "--lr", 1e-3, 1e-4, "--seed", 0, 1, "--steps", 3]
    done = train(checkpoint, tmp_path / "all", *flags)
    assert done.returncode == 0, done.stderr
    logs = logs_of(tmp_path / "all")
    assert logs.keys() == {(loss, lr, seed) for loss in ("off_rl", "fpa", "kto") for lr in (1e-3, 1e-4) for seed in (0, 1)}
    assert passes == [(False, True), (True, False)] and done.stdout.count("training  ") == 12
    for loss, lr, seed in [("fpa", 1e-3, 0), ("kto", 1e-4, 1)]:
        alone = train(checkpoint, tmp_path / loss, "--loss", loss, "--lr", lr, "--seed", seed, "--steps", 3)
        assert alone.returncode == 0, alone.stderr
        same(logs_of(tmp_path / loss)[loss, lr, seed], logs[loss, lr, seed])
    assert len({str(rows) for rows in logs.values()}) == 12
    again = train(checkpoint, tmp_path / "all", *flags)
    assert again.stdout.count("already finished") == 12 and "training  " not in again.stdout


def test_a_later_command_takes_the_reference_that_is_there(checkpoint, tmp_path, passes):
    for words, expected in (
        (["--loss", "off_rl"], [(False, False)]),
        (["--loss", "sft"], []),
        (["--loss", "fpa"], [(False, True)]),  # whose hidden states nobody has kept
        (["--loss", "topr"], []),
        (["--loss", "kto"], [(True, False)]),
        (["--loss", "kto", "fpa", "--lam", 1], []),
    ):
        passes.clear()
        done = train(checkpoint, tmp_path, *words, "--steps", 1)
        assert done.returncode == 0 and passes == expected, (words, done.stderr)


def test_a_product_that_was_killed_goes_on(checkpoint, tmp_path, monkeypatch):
    flags = ["--loss", "off_rl", "fpa"]
    assert train(checkpoint, tmp_path / "whole", *flags).returncode == 0
    with monkeypatch.context() as patch:
        step = iter(range(100))
        kill_at(patch, lambda: next(step) == 9)  # the fourth of the second run
        with pytest.raises(Killed):
            train(checkpoint, tmp_path / "killed", *flags)
        torch.distributed.destroy_process_group()
    assert len(list(tmp_path.glob("killed/*/model"))) == 1
    done = train(checkpoint, tmp_path / "killed", *flags)
    assert done.returncode == 0 and done.stdout.count("already finished") == done.stdout.count("resuming from step 2") == 1
    same(logs_of(tmp_path / "killed"), logs_of(tmp_path / "whole"))


def test_a_run_that_is_not_finite_ends_no_other(checkpoint, tmp_path, monkeypatch):
    original = full_scale.train.objective

    def broken(batch, run):
        loss, coefficient = original(batch, run)
        return loss * (math.nan if run.loss == "off_rl" else 1.0), coefficient

    built, models = full_scale.train.build, []

    def watched(*words):
        assert not [model for model in models if model()]  # the failed run's is gone, and its memory with it
        model = built(*words)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(full_scale.train, "objective", broken)
    monkeypatch.setattr(full_scale.train, "build", watched)
    done = train(checkpoint, tmp_path, "--loss", "off_rl", "fpa")
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "step 1: loss nan" in done.stderr and len(models) == 2
    assert [path.parent.name.split("-")[1] for path in tmp_path.glob("*/model")] == ["fpa"]


def test_a_log_alone_is_a_finished_run(checkpoint, tmp_path):
    flags = ["--steps", 1, "--no-save-model"]
    assert train(checkpoint, tmp_path, *flags).returncode == 0
    (log,), expected = tmp_path.glob("*/log.csv"), logs_of(tmp_path)
    assert not list(tmp_path.glob("*/model")) and not list(tmp_path.glob("*/checkpoint"))
    assert "already finished" in train(checkpoint, tmp_path, *flags).stdout
    log.write_text("")
    again = train(checkpoint, tmp_path, *flags)
    assert again.returncode == 0 and "already finished" not in again.stdout and logs_of(tmp_path) == expected
    assert "already finished" not in train(checkpoint, tmp_path, "--steps", 1).stdout and list(tmp_path.glob("*/model"))


def test_a_loss_on_pairs_without_pairs_is_refused_before_anything_is_trained(checkpoint, tmp_path):
    lines = [json.loads(line) for line in ROLLOUTS.read_text().splitlines()]
    alone = [{**line, "prompt": f"{line['prompt']} {i}"} for i, line in enumerate(lines)]
    done = train(checkpoint, tmp_path, "--loss", "fpa", "dpo", data=write(tmp_path / "rollouts.jsonl", *alone))
    assert done.returncode == 2 and "no pairs" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*/log.csv"))


# --- held-out problems


@pytest.fixture(scope="module")
def asked(taught, tmp_path_factory):  # noqa: F811
    """The taught checkpoint, rollouts of half of its problems, and the other half as held-out ones."""
    folder, problems = taught
    place, lines = tmp_path_factory.mktemp("asked"), problems.read_text().splitlines()
    train_problems, held_out = write(place / "train.jsonl", *lines[:4]), write(place / "held_out.jsonl", *lines[4:])
    done = sample(folder, train_problems, place / "rollouts.jsonl", "--n", 6)
    assert done.returncode == 0, done.stderr
    return folder, place / "rollouts.jsonl", held_out


EXAM = ["--eval-every", 3, "--eval-samples", 4, "--loss", "fpa", "off_rl", "--lr", 1e-3]


def examined(asked, out, *flags, **words):
    folder, data, held_out = asked
    done = train(folder, out, "--eval-problems", held_out, *EXAM, *flags, data=data, **words)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def exams(asked, tmp_path_factory):
    """The output folder and the result of a training of two losses with exams."""
    out = tmp_path_factory.mktemp("exams")
    return out, examined(asked, out)


def test_held_out_problems_fill_the_accuracies(asked, exams, tmp_path):
    (folder, _, held_out), (out, done) = asked, exams
    assert "accuracy 0." in done.stdout and "greedy 0." in done.stdout
    logs = logs_of(out)
    assert len(logs) == 2
    for rows in logs.values():
        assert [row["step"] for row in rows] == ["0", "3", "6"]
        assert all(0 <= float(row[name]) < 10 for row in rows for name in ACCURACIES) and rows[0]["pass@16"] == "nan"
    first, other = ([rows[0][name] for name in ACCURACIES] for rows in logs.values())
    assert first == other and float(first[0]) > 0  # the same checkpoint answers
    assert len({rows[-1]["entropy"] for rows in logs.values()}) == 2

    # the first row is what the other commands measure of the checkpoint
    greedy = sample(folder, held_out, tmp_path / "greedy.jsonl", "--n", 1, "--temperature", 0)
    lines = [json.loads(line) for line in (tmp_path / "greedy.jsonl").read_text().splitlines()]
    assert greedy.returncode == 0 and float(first[2]) == sum(line["label"] for line in lines) / len(lines)
    run = read_run(next(out.glob("*-fpa-*")))
    assert describe(run.config).startswith(folder.name + ",")
    assert str(out) not in json.dumps(run.config) and run.config["eval_problems"] == 4


def test_the_checkpoint_answers_once_a_seed(asked, tmp_path, monkeypatch):
    taken, original = [], Exam.measure
    monkeypatch.setattr(Exam, "measure", lambda exam, step, *rest: taken.append(step) or original(exam, step, *rest))
    examined(asked, tmp_path, "--seed", 0, 1)
    assert sorted(taken) == [0, 0, *[3] * 4, *[6] * 4]  # of two losses and two seeds


@torch.no_grad()
def plain_entropy(model, prompts, completions):
    values = []
    for prompt, ids in zip(prompts, completions):
        logps = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        values += (-(logps.exp() * logps).sum(-1)).tolist()
    return sum(values) / len(values)


def test_what_an_exam_measures(asked):
    folder, data, held_out = asked
    words = ["--init", folder, "--data", data, "--eval-problems", held_out, "--eval-samples", 4]
    args, (model, tokenizer) = full_scale.train.parse_args([str(word) for word in words]), load_pretrained(folder)
    exam = Exam(args, folder, read_data(args, tokenizer))
    right, wrong, silent = ([{"completion": text.format(gold), "finished": True} for _, gold in exam.problems]
                            for text in ("\\boxed{{{}}}", "\\boxed{{{}0}}", "no"))  # fmt: skip
    marks = ["rwww w r", "rrww r w", "swww w w", "rrrr r r"]  # four at temperature 1, one at 0.7, the greedy one
    kinds = {"r": right, "w": wrong, "s": silent}
    columns = exam.columns([[kinds[mark][i] for mark in row.replace(" ", "")] for i, row in enumerate(marks)])
    assert columns == {
        "accuracy": 7 / 16, "accuracy_0.7": 0.5, "accuracy_greedy": 0.5, "malformed": 1 / 16, "pass@4": 0.75
    }  # fmt: skip
    completions = [tokenizer.encode(f"First {i}.", special=False)[: 2 + i] for i in range(4)]
    with torch.no_grad():
        entropy = exam.entropy(model, completions, "cpu")
    assert entropy == pytest.approx(plain_entropy(model, exam.prompts, completions), rel=1e-5) and entropy > 0


def test_an_exam_asks_as_the_rollouts_were_asked(taught, tmp_path, monkeypatch):  # noqa: F811
    folder, problems = taught
    rows = [{"q": row["problem"], "a": row["answer"]} for row in map(json.loads, problems.read_text().splitlines())]
    (tmp_path / "shots").mkdir()
    shots = write(tmp_path / "shots" / "shots.jsonl", {"q": "1+1?", "a": "2"})
    first, second = write(tmp_path / "train.jsonl", *rows[:4]), write(tmp_path / "held_out.jsonl", *rows[4:])
    words = ["--fields", "q", "a", "--shots", shots, 1, "--system", "Be brief.", "--stop", "Q:", "--strict", "--n", 6]
    for path in (first, second):
        done = sample(folder, path, tmp_path / f"asked-{path.name}", *words)
        assert done.returncode == 0, done.stderr
    flags = ["--init", folder, "--data", tmp_path / "asked-train.jsonl", "--eval-problems", second, "--eval-samples", 8]
    args = full_scale.train.parse_args([str(flag) for flag in flags])
    exam = Exam(args, folder, read_data(args, load_pretrained(folder)[1]))
    asked = [json.loads(line) for line in (tmp_path / "asked-held_out.jsonl").read_text().splitlines()]
    assert exam.prompts == [row["prompt_ids"] for row in asked[::6]] and exam.asked.strict and exam.texts == ["Q:"]
    seen, original = [], full_scale.exam.sample_each
    monkeypatch.setattr(full_scale.exam, "sample_each", lambda *words: seen.append(words[5].tolist()) or original(*words))
    train(folder, tmp_path / "runs", *flags[4:], "--loss", "off_rl", "--eval-every", 6, data=flags[3])
    assert len(seen) == 2 and all(some == pytest.approx([1.0] * 8 + [0.7] * 2 + [0.0]) for some in seen)


def test_an_exam_changes_nothing_of_a_run_and_is_repeated(asked, exams, tmp_path, monkeypatch):
    expected = logs_of(exams[0])
    with monkeypatch.context() as patch:
        step = iter(range(100))
        kill_at(patch, lambda: next(step) == 5)
        with pytest.raises(Killed):
            examined(asked, tmp_path / "killed")
        torch.distributed.destroy_process_group()
    examined(asked, tmp_path / "killed")
    same(logs_of(tmp_path / "killed"), expected)
    folder, data, _ = asked
    assert train(folder, tmp_path / "without", *EXAM, data=data).returncode == 0
    for key, rows in logs_of(tmp_path / "without").items():
        for row, other in zip(rows, expected[key], strict=True):
            assert {name: row[name] for name in row if name not in ACCURACIES}.items() <= other.items()


def test_two_processes_take_the_same_exam(asked, exams, tmp_path):
    examined(asked, tmp_path, processes=2)
    for rows, others in zip(logs_of(exams[0]).values(), logs_of(tmp_path).values(), strict=True):
        assert len(rows) == len(others) == 3
        assert [float(rows[0][name]) for name in ACCURACIES] == pytest.approx([float(others[0][name]) for name in ACCURACIES])
        assert float(rows[-1]["entropy"]) == pytest.approx(float(others[-1]["entropy"]), rel=0.2)


def test_bfloat16_products_take_the_exam(asked, tmp_path):
    examined(asked, tmp_path, "--precision", "bf16", "--loss", "off_rl")
    (rows,) = logs_of(tmp_path).values()
    assert all(0 <= float(row["accuracy"]) <= 1 and 0 < float(row["entropy"]) < 10 for row in rows)


def without(made, name):
    return {**made, "asked": {key: value for key, value in made["asked"].items() if key != name}}


def test_an_exam_that_cannot_be_held_is_one_line(asked, tmp_path):
    folder, data, held_out = asked
    made = json.loads(data.with_name("rollouts.jsonl.json").read_text())
    cases = {
        "rollouts of others": ({}, None, "rollouts.jsonl.json: not there; --eval-problems asks as"),
        "without how they were asked": ({}, {"date": made["date"]}, "rollouts.jsonl.json: does not say how these"),
        "without the shots": ({}, {**made, "asked": {"fields": ["problem", "answer"]}}, "does not say how these rollouts were"),
        "without a length": ({}, without(made, "max_tokens"), "does not say how these rollouts were"),
        "without strict": ({}, without(made, "strict"), "does not say how these rollouts were asked"),
        "a length in words": ({}, {**made, "asked": {**made["asked"], "max_tokens": "24"}}, "does not say how these"),
        "no date": ({}, {**made, "date": 3}, "rollouts.jsonl.json: does not say how these rollouts were asked"),
        "problems of the training": ({"eval": data.with_name("train.jsonl")}, made, "4 of 4 problems are in "),
        "bad problems": ({"eval": write(tmp_path / "bad", '{"problem": "1"}')}, made, "1 of 1 lines are bad: line 1: no "),
        "no problems": ({"eval": tmp_path / "none"}, made, "none: No such file"),
    }
    for name, (words, beside, message) in cases.items():
        place = tmp_path / name
        place.mkdir()
        shutil.copy(data, place / "rollouts.jsonl")
        if beside:
            (place / "rollouts.jsonl.json").write_text(json.dumps(beside))
        flags = ["--eval-problems", words.get("eval", held_out)]
        done = train(folder, place / "runs", *flags, data=place / "rollouts.jsonl")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (name, done.stderr)
        assert not list(place.glob("runs/*/*")), name


def test_rollouts_do_not_replace_the_problems_that_they_are_asked_from(asked, tmp_path):
    folder, _, held_out = asked
    problems, text = tmp_path / "new.jsonl.json", held_out.read_text().splitlines(keepends=True)[0]
    problems.write_text(text)
    words = ["--model", folder, "--problems", problems, "--n", 1, "--max-tokens", 2]
    done = run_module("rollouts", *words, "--out", tmp_path / "new.jsonl")
    assert done.returncode == 2 and "new.jsonl.json would be written beside" in done.stderr and done.stderr.count("\n") == 1
    assert problems.read_text() == text and not (tmp_path / "new.jsonl").exists()


def test_rollouts_that_were_cut_short_get_a_warning(asked, tmp_path):
    folder, data, _ = asked
    made, lines = json.loads(data.with_name("rollouts.jsonl.json").read_text()), data.read_text().splitlines()
    assert made["rows"] == len(lines)
    for kept in (len(lines), len(lines) - 4):
        (tmp_path / str(kept)).mkdir()
        path = write(tmp_path / str(kept) / "rollouts.jsonl", *lines[:kept])
        path.with_name("rollouts.jsonl.json").write_text(json.dumps(made))
        done = train(folder, tmp_path / str(kept) / "runs", "--steps", 1, data=path)
        said = f"warning: {kept} of the {len(lines)} rows that {path}.json tells of are used"
        assert done.returncode == 0 and (said in done.stdout) == (kept < len(lines)), done.stdout


def test_another_gold_answer_is_another_exam(asked, tmp_path):
    folder, data, held_out = asked
    lines = [json.loads(line) for line in held_out.read_text().splitlines()]
    mended = write(tmp_path / "mended.jsonl", {**lines[0], "answer": "12345"}, *lines[1:])
    exams = []
    for problems in (held_out, held_out, mended):
        args = full_scale.train.parse_args(
            ["--init", str(folder), "--data", str(data), "--eval-problems", str(problems), "--eval-samples", "8"]
        )
        exams.append(Exam(args, folder, read_data(args, load_pretrained(folder)[1])).settings["exam"])
    assert exams[0] == exams[1] != exams[2]


def test_rollouts_of_another_checkpoint_get_a_warning(asked, tmp_path):
    folder, data, _ = asked
    made = json.loads(data.with_name("rollouts.jsonl.json").read_text())
    for place, key in (("own", made["checkpoint"]), ("other", "0123456789abcdef")):
        (tmp_path / place).mkdir()
        shutil.copy(data, tmp_path / place / "rollouts.jsonl")
        (tmp_path / place / "rollouts.jsonl.json").write_text(json.dumps({**made, "checkpoint": key}))
        done = train(folder, tmp_path / place / "runs", "--steps", 1, data=tmp_path / place / "rollouts.jsonl")
        assert done.returncode == 0 and ("was sampled by another checkpoint than" in done.stdout) == (place == "other")


# --- worked examples before each problem


def test_what_prompts_begin_with_changes_no_log(checkpoint, tmp_path, monkeypatch):
    examples = "What is 5+6*2? 6*2=12; 5+12=17; \\boxed{17}\n" * 3
    lines = [json.loads(line) for line in ROLLOUTS.read_text().splitlines()]
    data = write(tmp_path / "rollouts.jsonl", *({**line, "prompt": examples + line["prompt"]} for line in lines))
    flags, shared = ["--loss", "fpa", "dpo", "kto", "--micro-batch", 8], []
    original = full_scale.policy.shared_prefix

    def seen(tokens, most):
        shared.append(original(tokens, most))
        return shared[-1]

    monkeypatch.setattr(full_scale.policy, "shared_prefix", seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch has one for forwards that return a view
        assert train(checkpoint, tmp_path / "shared", *flags, data=data).returncode == 0
    assert len(shared) > 50 and min(shared) > 40
    monkeypatch.setattr(full_scale.policy, "shared_prefix", lambda tokens, most: 0)
    assert train(checkpoint, tmp_path / "whole", *flags, data=data).returncode == 0
    logs, expected = logs_of(tmp_path / "shared"), logs_of(tmp_path / "whole")
    for key, rows in expected.items():
        for row, other in zip(logs[key], rows, strict=True):
            numbers = [{name: float(value) for name, value in some.items()} for some in (row, other)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-3, nan_ok=True)
