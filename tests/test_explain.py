"""explain.py: the numbers on the screen are those of a step, and the marks are where they say."""

import re
import subprocess
import sys

import pytest
import torch
from test_train import TINY

import explain
from options import WITH_FPA_FORM


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


@pytest.mark.slow
@pytest.mark.parametrize("loss", WITH_FPA_FORM)
def test_the_screen_adds_up(loss, out):
    screen = screen_of(out, loss)
    gained = {"π": 0.0, "π̂": 0.0}  # what the step is for, to first order: r C times the change of logp_sum
    for name, reward in (("correct", 1), ("incorrect", -1)):
        ((length, pi, pi_hat, present, future, ratio),) = numbers(screen, name)
        assert 0 < pi < 1 and 0 <= pi_hat < 1 and length > 5
        assert ratio == pytest.approx(future / present, abs=0.01 + 1e-5 / present)
        if loss in ("off_rl", "fpa", "simper"):
            assert present == pytest.approx(pi / length, abs=1e-4) and future == pytest.approx(pi_hat / length, abs=1e-4)
        (text,) = re.findall(rf"^{name} +(\d\S*)$", screen, flags=re.M)
        for symbol, coefficient in (("π", present), ("π̂", future)):
            ((before, at, after, total),) = numbers(screen, name, rf"C\({symbol}\)")
            assert before + at + after == pytest.approx(total, abs=2e-4)
            gained[symbol] += reward * coefficient * total
            marks = re.findall(rf"^  C\({symbol}\) +(\S+)$", screen, flags=re.M)
            assert len(marks) == 2 and len(text) in map(len, marks)
    assert gained["π"] > 0 and gained["π̂"] >= 0
    assert ("off_rl" if loss == "fpa" else loss) in screen.splitlines()[-1]


@pytest.mark.slow
def test_lambda_0_is_the_plain_loss(out):
    screen = screen_of(out, "fpa", "--lam", "0")
    for name in ("correct", "incorrect"):
        assert numbers(screen, name)[0][-1] == 1
        assert numbers(screen, name, r"C\(π\)") == numbers(screen, name, r"C\(π̂\)")


def test_marks_are_shares_of_the_largest_change():
    assert explain.strip([1.0, -0.2, 0.1, -0.02, 0.01, 0.0], 1.0) == "↑↓+-··"


def test_the_caret_is_under_the_first_wrong_token():
    change = torch.zeros(2, 4)
    step = (torch.ones(2), torch.ones(2), torch.ones(2), change)
    lines = explain.screen("1+1+1?", ["12=3", "12=4"], 3, [5, 5], {"C(π)": step, "C(π̂)": step}).splitlines()
    carets = [line.index("^") for line in lines if line.strip() == "^"]
    texts = [line.index("=") + 1 for line in lines if line.startswith(("correct     12", "incorrect   12"))]
    assert carets == texts
