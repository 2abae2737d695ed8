"""explain.py: the numbers on the screen are those of a step, and the marks are where they say."""

import re
import subprocess
import sys

import pytest
import torch
from test_train import TINY, refusal

from losses import LOSSES
from study import explain

WITH_FPA_FORM = [name for name, row in LOSSES.items() if row.has_fpa_form or row.form_of]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def screen_of(out, loss, *words):
    command = [sys.executable, "train.py", "--explain", loss, *TINY, "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(screen, name, start=""):
    """The numbers of the lines that begin with a name and a symbol."""
    lines = re.findall(rf"^{name} +{start}((?: +[-+]?\d+(?:\.\d+)?)+)$", screen, flags=re.M)
    return [[float(number) for number in line.split()] for line in lines]


@pytest.mark.parametrize("loss", WITH_FPA_FORM)
def test_the_screen_adds_up(loss, out):
    screen = screen_of(out, loss)
    ratios, gained = (
        [],
        {"π": 0.0, "π̂": 0.0},
    )  # the latter: what the step is for, to first order: r C times the change of logp_sum
    for name, reward in (("correct", 1), ("incorrect", -1)):
        ((length, pi, pi_hat, present, future, ratio),) = numbers(screen, name)
        assert 0 < pi < 1 and 0 <= pi_hat < 1 and length > 5
        ratios.append(ratio)
        assert ratio == pytest.approx(future / present, abs=0.01 + 1e-4 / present)
        if loss in ("off_rl", "fpa", "simper"):  # the weight of grad logp_mean is the trajectory's probability
            assert present == pytest.approx(pi, abs=1e-3) and future == pytest.approx(pi_hat, abs=1e-3)
        (text,) = re.findall(rf"^{name} +(\d\S*)$", screen, flags=re.M)
        for symbol, coefficient in (("π", present), ("π̂", future)):
            ((before, at, after, total),) = numbers(screen, name, rf"C\({symbol}\)")
            assert before + at + after == pytest.approx(total, abs=2e-4)
            gained[symbol] += reward * coefficient * total
            marks = re.findall(rf"^  C\({symbol}\) +(\S+)$", screen, flags=re.M)
            assert len(marks) == 2 and len(text) in map(len, marks)
    assert ratios != [1, 1] and gained["π"] > 0 and gained["π̂"] >= 0
    assert ("off_rl" if loss == "fpa" else loss) in screen.splitlines()[-1]


def test_lambda_0_is_the_plain_loss(out):
    screen = screen_of(out, "fpa", "--lam", "0")
    for name in ("correct", "incorrect"):
        assert numbers(screen, name)[0][-1] == 1
        assert numbers(screen, name, r"C\(π\)") == numbers(screen, name, r"C\(π̂\)")


def test_what_cannot_be_explained_is_one_line(out, monkeypatch, capsys):
    words = ["fpa", *TINY, "--out", out]
    code, error = refusal(explain.run, [*words, "--lam", "1e300"], capsys)
    assert code == 3 and error == "python -m study.explain: error: the step at λ = 1e+300 is not finite\n"
    prepare = explain.prepare

    def none_clean(*arguments):
        world = prepare(*arguments)
        world.rollouts.columns["clean"] = torch.zeros_like(world.rollouts.clean)
        return world

    monkeypatch.setattr(explain, "prepare", none_clean)
    code, error = refusal(explain.run, words, capsys)
    assert code == 2 and "no correct rollout without a wrong step" in error and error.count("\n") == 1
    code, error = refusal(explain.run, [], capsys)
    assert code == 2 and "name a loss" in error and error.count("\n") == 1


def test_the_door_and_the_command_print_the_same_screen(out):
    door, command = (
        subprocess.run([sys.executable, *words, *TINY, "--out", str(out), "--lam", "2", "5"], capture_output=True, text=True)
        for words in (["train.py", "--explain", "DPO"], ["-m", "study.explain", "DPO"])
    )
    assert door.returncode == command.returncode == 0 and door.stdout[-500:] == command.stdout[-500:]
    assert "--explain takes one --lam: 2\n" in door.stdout and "λ = 2." in door.stdout


def test_marks_are_shares_of_the_largest_change():
    assert explain.strip([1.0, -0.2, 0.1, -0.02, 0.01, 0.0], 1.0) == "↑↓+-··"


def test_the_caret_is_under_the_first_wrong_token():
    change = torch.zeros(2, 4)
    step = (torch.ones(2), torch.ones(2), torch.ones(2), change)
    lines = explain.screen("1+1+1?", ["12=3", "12=4"], 3, [5, 5], {"C(π)": step, "C(π̂)": step}).splitlines()
    carets = [line.index("^") for line in lines if line.strip() == "^"]
    texts = [line.index("=") + 1 for line in lines if line.startswith(("correct     12", "incorrect   12"))]
    assert carets == texts
