"""The lesson: its notebooks from their source, run from a bare copy; checks, hints, grading, and what the text says."""

import contextlib
import io
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import ROOT
from test_docs import table

import losses
import train
from study import exercises, explain, faults, lesson, notebooks
from study.exercises import EXERCISES, MISTAKES
from study.results import forecast_by_step, fpa_runs, mean_and_interval, where

FOLDER = ROOT / "docs/lesson"
SOLUTIONS, STUDENT = nbformat.read(FOLDER / "solutions.ipynb", 4), nbformat.read(ROOT / "lesson.ipynb", 4)
SOURCE = (FOLDER / "source.py").read_text()
TRAINS = ("train_with", "lesson.walk")  # cells whose numbers another machine's rounding changes
RIGHT = {
    "pi_bar": exercises.pi_bar, "off_rl_loss": losses.off_rl_loss, "change_of_correct": exercises.change_of_correct,
    "future_logits": losses.future_logits, "fpa_loss": losses.fpa_loss, "dpo_brake": exercises.dpo_brake,
    "find_the_bug": faults.KEY,
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository without anything trained."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (folder / path.name).symlink_to(path)
    return folder


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def said(name, answer):
    """Whether check() accepts an answer, and what it prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        right = exercises.check(name, answer)
    return right, text.getvalue()


# --- the notebooks


@pytest.mark.parametrize("solved", [True, False])
def test_both_notebooks_are_those_of_the_source(solved):
    committed = SOLUTIONS if solved else STUDENT
    (address,) = re.findall(r"github/([\w.-]+/[\w.-]+)/blob", committed.cells[0].source)  # a teacher's copy may have its own
    assert [cell.source for cell in notebooks.notebook(solved, address).cells] == [c.source for c in committed.cells]


def test_the_students_has_no_answers_and_no_output():
    assert not any(cell.get("outputs") for cell in STUDENT.cells)
    student = "\n".join(cell.source for cell in STUDENT.cells)
    answers = [answer for _, answer, _ in notebooks.BLOCK.findall(SOURCE)]
    assert len(answers) > 15 and "SOLUTION" not in student
    assert not any(re.sub("(?m)^# ", "", answer) in student for answer in answers)


def test_the_badge_opens_the_named_repository():
    made = notebooks.notebook(False, "someone/fpa")
    text = "\n".join(cell.source for cell in made.cells)
    assert "colab.research.google.com/github/someone/fpa/blob/main/lesson.ipynb" in made.cells[0].source
    assert "https://github.com/someone/fpa" in text and "OWNER" not in text
    with pytest.raises(SystemExit) as stop:
        notebooks.run(["--repository", "no slash"])
    assert stop.value.code == 2


@pytest.fixture(scope="module")
def solved(copy):
    return notebooks.executed(notebooks.notebook(True, "OWNER/REPOSITORY"), copy)


def test_the_solutions_run_and_print_what_was_committed(solved):
    compared = 0
    for cell, committed in zip(code(solved), code(SOLUTIONS), strict=True):
        if not any(word in cell.source for word in (*TRAINS, "lesson.world", "batches")):
            assert printed(cell) == printed(committed)
            compared += bool(printed(cell))
    assert compared >= 12
    points = re.findall(r"^right: (\d+) points$", "\n".join(map(printed, code(solved))), flags=re.M)
    assert len(points) == len(EXERCISES) and sum(map(int, points)) == 100


def trained(notebook):
    """The printed rows of each training: [[(step, accuracy)]]."""
    rows = r"^step +(\d+)   accuracy ([\d.]+) "
    cells = [re.findall(rows, printed(cell), flags=re.M) for cell in code(notebook)]
    return [[(int(step), float(accuracy)) for step, accuracy in some] for some in cells if some]


def test_training_takes_less_than_a_minute_and_follows_the_stored_seed(solved):
    for run in lesson.stored():  # on one thread of a CPU, side by side with others, without the evaluations
        seconds = dict(zip(run.log["step"], run.log["seconds"]))
        assert seconds[200] - seconds[0] < 60
    for notebook in (solved, SOLUTIONS):
        off_rl, fpa = trained(notebook)
        for some, run in ((off_rl, where(lesson.stored(), loss="off_rl")[0]), (fpa, fpa_runs(lesson.stored())[0])):
            assert [step for step, _ in some] == [0, 50, 100, 150, 200] and run.config["seed"] == lesson.SEED
            stored = dict(zip(run.log["step"], run.log["accuracy"]))
            assert all(accuracy == pytest.approx(stored[step], abs=0.1) for step, accuracy in some if step in stored)


def test_the_unsolved_notebook_runs_and_tells_nothing(copy):
    made = notebooks.executed(notebooks.notebook(False, "OWNER/REPOSITORY"), copy)
    text = "\n".join(map(printed, code(made)))
    assert text.count("not yet: ") == len(EXERCISES) and "right: " not in text and "measured" not in text
    assert text.count("Write your guess down first") == 8 and text.count("Solve the exercise first") == 2
    assert not any(output.output_type == "display_data" for cell in code(made) if "figure_logs" not in cell.source
                   for output in cell.outputs)  # fmt: skip
    assert "not filled in yet" in text and "Ellipsis" not in text


def test_every_question_has_something_to_do_and_something_to_see():
    parts, number = {}, 0
    for cell in SOLUTIONS.cells:
        if heading := re.match(r"## (\d+)\. .*", cell.source):
            number = int(heading[1])
        parts.setdefault(number, []).append(cell)
    assert list(parts) == list(range(8))
    for number in range(1, 7):
        text = "\n".join(cell.source for cell in parts[number])
        shown = [output for cell in code(parts_of(parts[number])) for output in cell.outputs]
        assert "**Exercise" in text and shown and ("**Guess" in text or number == 6), number
        assert number == 1 or any(output.output_type == "display_data" for output in shown), number
    assert sum("**Say why**" in cell.source for cell in SOLUTIONS.cells) >= 5


def parts_of(cells):
    return nbformat.v4.new_notebook(cells=cells)


# --- points and minutes


def test_points_minutes_and_difficulty_are_those_of_the_table():
    found = re.findall(r"\*\*Exercise `(\w+)`\*\* · (\w+) · (\d+) min · (\d+) points", SOURCE)
    rows = [(name, e.difficulty, str(e.minutes), str(e.points)) for name, e in EXERCISES.items()]
    assert found == rows and sum(e.points for e in EXERCISES.values()) == 100
    written = table(Path("docs/teaching.md"), "exercise")
    assert written == [[f"`{name}`", points, minutes, difficulty] for name, difficulty, minutes, points in rows]


def test_the_plan_is_the_lessons_and_takes_90_minutes():
    spans = [row[0].split("–") for row in table(Path("docs/teaching.md"), "minutes")]
    assert spans[0][0] == "0" and spans[-1][1] == "90"
    assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
    assert re.findall(r"## \d\. .* \((\d+) min\)", SOURCE) == [str(int(end) - int(begin)) for begin, end in spans[1:]]


# --- the checks


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_passes_and_no_constant_does(name):
    for _ in range(3):
        assert said(name, RIGHT[name]) == (True, f"right: {EXERCISES[name].points} points\n")
    for constant in (None, 0.0, lambda *_: ..., lambda *_: 0.0, lambda x, *_: x, lambda *_: torch.zeros(6)):
        right, text = said(name, constant)
        assert not right and text.startswith("not yet: ") and "Traceback" not in text


@pytest.mark.parametrize("name, hint", [(name, hint) for name, mistakes in MISTAKES.items() for hint in mistakes])
def test_a_usual_mistake_gets_its_hint_and_one_row(name, hint):
    right, text = said(name, MISTAKES[name][hint])
    assert not right and text.endswith(f"\nhint: {hint}\n")
    assert re.match(r"not yet: .+: expected -?[\d.]+, got -?[\d.]+\n", text)


def test_a_surrogate_of_the_future_and_swapped_logits_are_told_apart():
    """As a student writes them, with the functions of the exercises before."""

    def ahead(logits, ref_logits, tokens, mask, reward, lam=2.0):
        future = logits + lam * (logits - ref_logits)
        return -(reward * exercises.pi_bar(losses.token_logps(future, tokens, mask), mask)).mean()

    def swapped(logits, ref_logits, tokens, mask, reward, lam=2.0):
        future = losses.future_logits(ref_logits, logits, lam)
        weight = exercises.pi_bar(losses.token_logps(future, tokens, mask), mask).detach()
        return -(reward * weight * losses.token_logps(logits, tokens, mask).sum(-1) / mask.sum(-1)).mean()

    assert "only the weight looks ahead; logp_mean stays the present policy's" in said("fpa_loss", ahead)[1]
    assert "h and h_ref are swapped: future_logits(logits, ref_logits, lam)" in said("fpa_loss", swapped)[1]


def test_an_answer_that_raises_is_told_so():
    assert said("fpa_loss", lambda *_: 1 / 0) == (False, "not yet: the function raises ZeroDivisionError: division by zero\n")
    assert "no gradient" in said("off_rl_loss", lambda logits, *_: logits.detach().mean())[1]


def test_the_lab_says_of_one_run_where_to_look():
    letters = list(faults.KEY)
    swapped = {**faults.KEY, letters[0]: faults.KEY[letters[1]], letters[1]: faults.KEY[letters[0]]}
    right, text = said("find_the_bug", swapped)
    assert not right and text.endswith(f"hint: {faults.FAULTS[faults.KEY[letters[0]]].look}\n")
    assert "run a is not filled in yet" in said("find_the_bug", dict.fromkeys(letters, ...))[1]
    assert "none of not_detached" in said("find_the_bug", dict.fromkeys(letters, "typo"))[1]
    assert len(set(faults.KEY.values())) == 4 == len(faults.FAULTS)


def test_the_code_of_a_run_is_its_fault_under_the_right_name():
    for letter, name in faults.KEY.items():
        names = {"token_logps": losses.token_logps, "future_logits": losses.future_logits}
        exec(faults.code(letter), names)
        torch.manual_seed(0)
        b = exercises.random_batch()
        given = b.logits, b.ref_logits, b.tokens, b.mask, b.reward
        assert names["fpa_loss"](*given) == faults.FAULTS[name].loss(*given)
        assert name not in faults.code(letter) and not said("fpa_loss", names["fpa_loss"])[0]


# --- grading


def grade(*words):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "docs/lesson/grade.py", *words],
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_grading_gives_the_points(tmp_path):
    assert "points: 100 of 100" in grade()
    assert "points: 0 of 100" in grade("--notebook", "lesson.ipynb")
    submission = nbformat.from_dict(SOLUTIONS)
    (cell,) = [cell for cell in submission.cells if "def fpa_loss" in cell.source]
    cell.source = cell.source.replace(".detach()", "")
    submission.cells.insert(0, nbformat.v4.new_code_cell("this is no Python"))
    nbformat.write(submission, tmp_path / "submission.ipynb")
    printed = grade("--notebook", str(tmp_path / "submission.ipynb"))
    assert "points: 80 of 100" in printed and "the weight is not detached" in printed


def test_grading_runs_a_constant_beside_the_function_and_nothing_else(tmp_path):
    submission, touched = nbformat.from_dict(SOLUTIONS), tmp_path / "touched"
    (imports,) = [cell for cell in submission.cells if "%matplotlib inline" in cell.source]
    (answer,) = [cell for cell in submission.cells if "def dpo_brake" in cell.source]
    imports.source += "\nimport torch.nn.functional as F"  # runs too, beside a magic command
    brake = "def dpo_brake(w, x, beta):\n    return ONE * beta * F.sigmoid(torch.tensor(beta * (x - w))).item()\n"
    for constant, points in (("EPS = ONE = 1.0", 100), (f"ONE = open({str(touched)!r}, 'w') and 1.0", 90)):
        answer.source = f"{constant}\n{brake}"
        nbformat.write(submission, tmp_path / "submission.ipynb")
        printed = grade("--notebook", str(tmp_path / "submission.ipynb"))
        assert f"points: {points} of 100" in printed
    assert "ONE" in printed and not touched.exists()


# --- the data


def test_the_cache_is_the_one_that_train_looks_for(tmp_path, capsys):
    assert sum(path.stat().st_size for path in (FOLDER / "cache").iterdir()) < 5e6
    world = lesson.world(tmp_path)
    text = capsys.readouterr().out
    assert "base model    cached" in text and "rollouts      cached" in text and "training" not in text
    config = where(lesson.stored(), seed=lesson.SEED)[0].config
    assert config["measured"]["share_correct"] == world.measured["share_correct"]
    assert (config["lr"], config["batch_size"]) == (lesson.LR, lesson.BATCH)


def test_the_faults_command_makes_the_committed_columns(tmp_path):
    faults.run(["--steps", "2", "--out", str(tmp_path), "--to", str(tmp_path / "faults.csv")])
    made, committed = faults.logs(tmp_path / "faults.csv"), faults.logs()
    assert list(made) == list(committed) == [faults.RIGHT, *faults.KEY]
    assert all(list(log) == ["step", *faults.SHOWN] and log["step"] == [0, 2] for log in made.values())
    assert len({tuple(log["loss"][1:]) for log in made.values()}) > 3  # each has another loss
    assert all(log["step"] == list(range(0, 201, 50)) for log in committed.values())
    assert {log["accuracy"][0] for log in committed.values()} == {made["a"]["accuracy"][0]}


# --- what the text says


def test_what_the_lesson_says_of_the_stored_runs():
    off_rl, fpa = where(lesson.stored(), loss="off_rl"), fpa_runs(lesson.stored())
    only = fpa_runs(lesson.stored(), target="incorrect")
    start, *later = (off_rl[0].log["accuracy"][i] for i in (0, 1, 2))
    assert start == pytest.approx(0.46, abs=0.005) and later[1] < start / 2
    at_200 = fpa[0].log["accuracy"][2]
    assert at_200 > 1.5 * start and fpa[0].log["accuracy"][-1] == pytest.approx(0.91, abs=0.005)
    below = [run.log["logratio_correct_below_0"] for run in fpa]
    for at, lowest, highest in ((1, 0.34, 0.67), (-1, 0.12, 0.24)):
        assert [round(edge(shares[at] for shares in below), 2) for edge in (min, max)] == [lowest, highest]
    ends = [statistics.mean(run.log["accuracy"][-1] for run in some) for some in (only, fpa, off_rl)]
    assert ends == sorted(ends, reverse=True) == pytest.approx(list(lesson.ends(only + fpa + off_rl).values()))
    told = "".join(printed(cell) for cell in code(SOLUTIONS) if "lesson.ends" in cell.source)
    assert all(f"accuracy at the end: {end:.2f}" in told for end in ends)
    ratios = forecast_by_step(fpa)
    assert ratios[10] < 1 < ratios[80]
    assert all((run.tables["entanglement"]["share_net_below_0"] < 0.5).all() for run in off_rl)  # "at every evaluation"
    dragged = [[run.log["logratio_correct_below_0"][1] for run in some] for some in (only, fpa)]
    assert [round(edge(dragged[0]), 2) for edge in (min, max)] == [0.23, 0.39] and all(a < b for a, b in zip(*dragged))
    mean, half = mean_and_interval([a.log["accuracy"][-1] - b.log["accuracy"][-1] for a, b in zip(only, fpa)])
    assert f"is higher by {mean:.2f} ± {half:.2f}, seed by seed" in SOURCE
    ratios = [[run.log["coefficient_incorrect"] / run.log["coefficient_correct"] for run in some] for some in (only, fpa)]
    assert all((a[1:5] < b[1:5]).all() and a[-1] > b[-1] for a, b in zip(*ratios))  # "until about step 500"
    args = train.parse_args([])
    assert (args.prompts, args.rollouts, args.eval_samples) == ([1024], 8, lesson.SAMPLES)
    assert "answered each of 1,024 problems eight times" in SOURCE


def test_what_the_lesson_says_of_the_brakes():
    _, brakes = lesson.figure_brakes(fpa_runs(lesson.stored())[0], exercises.dpo_brake)
    assert brakes["FPA"][1] < 0.3 < 0.4 < brakes["DPO"][1] < brakes["Off-RL"][1]
    run, found = fpa_runs(lesson.stored())[0], {}
    _, found["twice"] = lesson.figure_brakes(run, lambda w, x, beta: exercises.dpo_brake(w, x, 2 * beta))
    _, found["alone"] = lesson.figure_brakes(run, lambda w, x, beta: exercises.dpo_brake(0, x, beta))
    said = [brakes["DPO"][1], found["alone"]["DPO"][1], found["twice"]["DPO"][1], brakes["FPA"][1]]
    assert [f"{value:.2f}" for value in said] == ["0.44", "0.46", "0.21", "0.29"] and all(f"{x:.2f}" in SOURCE for x in said)
    assert statistics.mean(correct >= 0 for correct, *_ in lesson.sums_of(run)[100]) > 0.5  # "most of them rise"


def test_the_rows_that_are_watched_share_no_problem_with_a_measured_batch():
    ids, reward = torch.arange(40) // 4, torch.tensor([1.0, 1.0, -1.0, 1.0] * 10)
    rollouts, order = SimpleNamespace(problem_ids=ids, reward=reward), torch.tensor([[0, 5], [9, 14], [17, 22], [26, 31]])
    chosen = lesson.unseen(rollouts, order, (0, 2), 6)
    assert chosen.tolist() == [8, 11, 12, 13, 15, 24]  # 9 is in a batch; of problems 0, 1, 4 and 5 an answer is measured


def test_a_step_is_drawn_by_what_the_two_answers_share(tmp_path):
    world = lesson.world(tmp_path)
    (axis,) = lesson.figure_step(world, {"the base model": world.base}, lesson.pair_of(world)).axes
    _, (correct, incorrect), _ = lesson.texts_of(world, lesson.pair_of(world))
    grey = [bar.get_facecolor()[0] == pytest.approx(0.6) for bar in axis.patches]
    assert grey == [a == b for a, b in zip(correct, incorrect)] and 0 < sum(grey) < len(grey)
    assert sum(bar.get_height() for bar, same in zip(axis.patches, grey) if not same) > 0  # the push helps at first


def test_the_push_is_that_of_the_incorrect_row_alone(tmp_path):
    world = lesson.world(tmp_path)
    pair, run = lesson.pair_of(world), SimpleNamespace(loss="off_rl", lam=0.0)
    alone, both = (explain.one_step(world.base, world.rollouts, pair, None, run, rows=rows)[-1][0] for rows in (pair[1:], None))
    made = lesson.push(world, world.base, pair)
    assert torch.equal(made, alone) and not torch.allclose(made, both)


def test_the_brakes_are_numbers_with_torch_too_and_the_legend_says_beta():
    def brake(w, x, beta):
        return beta * torch.sigmoid(torch.as_tensor(beta * (x - w)))

    figure, brakes = lesson.figure_brakes(fpa_runs(lesson.stored())[0], brake)
    assert all(isinstance(value, float) for values in brakes.values() for value in values)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["DPO, β = 0.1", "Off-RL", "FPA"]


def test_the_longest_cell_says_how_far_it_is(solved):
    text = "\n".join(map(printed, code(solved)))
    assert all(f"step {step:4} of 300\n" in text for step in (100, 200, 300))


def test_what_the_lesson_says_of_its_own_run(solved):
    for notebook in (solved, SOLUTIONS):
        text = "\n".join(map(printed, code(notebook)))
        at_first, later = map(int, re.findall(r"of 32 pairs, the correct answer rises in (\d+)", text))
        assert at_first > 16 > later
        rows = re.findall(r"^step +(\d+)   up +([-\d.]+)   down +([-\d.]+)   change ([-+\d.]+) nats", text, flags=re.M)
        up, down, change = ({int(row[0]): float(row[i]) for row in rows} for i in (1, 2, 3))
        assert all(down[step] < 0 for step in (0, 4, 8)) and all(down[step] > up[step] > 0 for step in range(20, 41, 4))
        assert 20 <= min(change, key=change.get) <= 48 and change[0] > 0 > min(change.values())


def test_what_the_lab_says_of_the_faults():
    logs = faults.logs()
    named = {faults.KEY.get(letter, faults.RIGHT): log for letter, log in logs.items()}
    incorrect = {name: log["logratio_incorrect"] for name, log in named.items()}
    assert incorrect["wrong_sign"][1] > 0 > incorrect["right"][1]
    assert -5 < incorrect["zero_one"][-1] < 0 and incorrect["right"][-1] < -10
    falls = {name: log["loss"][1] - log["loss"][-1] for name, log in named.items()}
    assert max(falls, key=falls.get) == "not_detached" and named["not_detached"]["loss"][-1] < named["right"]["loss"][-1]
    norms = {name: log["grad_norm"][-1] for name, log in named.items()}
    assert norms["no_length"] < 0.1 * min(norm for name, norm in norms.items() if name != "no_length")
    ends = {name: log["accuracy"][-1] for name, log in named.items()}
    letters = {letter: logs[letter]["accuracy"][-1] for letter in "ab"}
    stored = [run.log["accuracy"][2] for target in ("both", "incorrect") for run in fpa_runs(lesson.stored(), target=target)]
    assert [round(value, 2) for value in letters.values()] == [0.97, 0.99] and max(stored) < 0.96 and ends["right"] < 0.9
    assert ends["wrong_sign"] == pytest.approx(named["right"]["accuracy"][0], abs=0.05)  # it hardly moves
