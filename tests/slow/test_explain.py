"""explain.py: the numbers on the screen are those of a step, and the marks are where they say."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_train import TINY, refusal

from losses import LOSSES
from study import explain

WITH_FPA_FORM = [name for name, row in LOSSES.items() if row.has_fpa_form or row.form_of]


@pytest.fixture(scope="module")
def out(finished, tmp_path_factory):
    """A folder with the cached stages."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished[0] / "cache", folder / "cache")
    return folder


def screen_of(out, loss, *words):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        explain.run([loss, *TINY, "--out", str(out), *words])
    return printed.getvalue()


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
        if loss in ("off_rl", "fpa", "simper"):  # the weight of grad logp_mean is the answer's probability
            assert present == pytest.approx(pi, abs=1e-3) and future == pytest.approx(pi_hat, abs=1e-3)
        (text,) = re.findall(rf"^{name} +(\d\S*)$", screen, flags=re.M)
        for symbol, coefficient in (("π", present), ("π̂", future)):
            ((*parts, total, mean_before, mean_at, mean_after, mean),) = numbers(screen, name, rf"C\({symbol}\)")
            assert sum(parts) == pytest.approx(total, abs=2e-4)
            assert mean_before + mean_at + mean_after == pytest.approx(mean, abs=2e-4)
            if name == "correct":
                assert f"{'plain step changes the correct rollouts' if symbol == 'π' else 'FPA step'} by {mean:+.4f}" in screen
            gained[symbol] += reward * coefficient * total
            marks = re.findall(rf"^  C\({symbol}\) +(\S+)$", screen, flags=re.M)
            assert len(marks) == 2 and len(text) in map(len, marks)
    assert ratios != [1, 1] and gained["π"] > 0 and gained["π̂"] >= 0
    assert f"steps of {LOSSES[loss].form_of or loss} away from the base model" in screen.splitlines()[-3]
    assert re.fullmatch(
        r"and the FPA step by .*; (\d+) of \d+ fall under the plain step, \d+ under FPA's\.", screen.splitlines()[-1]
    )


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
    assert "--explain shows the first --lam alone: 2\n" in door.stdout and "λ = 2." in door.stdout


def test_marks_are_shares_of_the_largest_change():
    assert explain.strip([1.0, -0.2, 0.1, -0.02, 0.01, 0.0], 1.0) == "↑↓+-··"


def test_a_strip_is_of_its_own_answer_and_its_own_form():
    change = torch.tensor([[1.0, -0.1, 0.0, 0.0], [-1.0, 0.1, 0.0, 0.0]])
    future = torch.tensor([[-0.3, 0.3, 0.0, 0.0], [0.3, -0.3, 0.0, 0.0]])
    one = torch.ones(2)
    steps = {explain.PRESENT: (one, one, one, change), explain.FUTURE: (one, one, one, future)}
    screen = explain.screen("1+1?", ["123", "124"], 2, [4, 4], steps, torch.zeros(3, 2, 2, 4))
    assert re.findall(r"^  C\(.+?\) +([↑↓+·-]+)$", screen, flags=re.M) == ["↑-·", "↓↑·", "↓+·", "↑↓·"]


def test_the_caret_is_under_the_first_wrong_token():
    change = torch.zeros(2, 4)
    step, tables = (torch.ones(2), torch.ones(2), torch.ones(2), change), torch.zeros(3, 2, 2, 4)
    steps = {"C(π)": step, "C(π̂)": step}
    lines = explain.screen("1+1+1?", ["12=3", "12=4"], 3, [5, 5], steps, tables).splitlines()
    carets = [line.index("^") for line in lines if line.strip() == "^"]
    texts = [line.index("=") + 1 for line in lines if line.startswith(("correct     12", "incorrect   12"))]
    assert carets == texts


def made_rollouts():
    """Three pairs. They part at the third of five tokens, at the fourth of four and five, and at the fourth of six."""
    texts = ["1234x", "12y4x", "123a", "123bx", "123456", "123c56"]
    tokens = torch.tensor([[0, *map(ord, text), *[1] * (6 - len(text))] for text in texts])
    return SimpleNamespace(tokens=tokens, length=torch.tensor([len(text) for text in texts]))


def test_pairs_part_at_their_first_difference_and_the_longest_shared_prefix_counts():
    rollouts, pairs = made_rollouts(), torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert explain.parting(rollouts, pairs).tolist() == [2, 3, 3]
    shares = explain.shared_share(rollouts, pairs)
    assert shares.tolist() == pytest.approx([2 / 5, 3 / 5, 3 / 6])  # of the longer rollout
    assert (shares < 1).all() and shares.argmax() == 1


def test_the_pair_shown_shares_most_and_the_means_are_over_the_others_too(out, monkeypatch, capsys):
    seen, took = [], []
    screen, one_step, share = explain.screen, explain.one_step, explain.shared_share
    monkeypatch.setattr(explain, "screen", lambda *a: seen.append(a) or screen(*a))
    monkeypatch.setattr(
        explain,
        "one_step",
        lambda policy, rollouts, pair, *a: took.append(pair.tolist()) or one_step(policy, rollouts, pair, *a),
    )
    shares = []
    monkeypatch.setattr(
        explain, "shared_share", lambda rollouts, pairs: shares.append((rollouts, pairs)) or share(rollouts, pairs)
    )
    explain.run(["fpa", *TINY, "--out", str(out)])
    (rollouts, candidates), ((_, texts, first, _, steps, tables),) = shares[0], seen
    best = max(candidates.tolist(), key=lambda pair: share(rollouts, torch.tensor([pair])).item())
    assert took[:2] == [best] * 2 and all(rollouts.clean[pair[0]] for pair in took)
    assert took[2::2] == candidates[: explain.PAIRS].tolist() and len(tables) == explain.PAIRS == 64
    assert texts[0][:first] == texts[1][:first] and texts[0][first : first + 1] != texts[1][first : first + 1]
    assert steps[explain.PRESENT][3][0].sum().item() == pytest.approx(explain.sums(steps, first)[0, 0, 3].item())
    assert f"Over {len(tables)} pairs" in capsys.readouterr().out


def test_the_sums_and_the_sentence_are_those_of_the_numbers():
    change = torch.tensor([[1.0, 2.0, 4.0, 8.0], [-1.0, -2.0, -4.0, -8.0]])
    steps = {explain.PRESENT: (None, None, None, change), explain.FUTURE: (None, None, None, change / 10)}
    found = explain.sums(steps, 1)
    assert found[0, 0].tolist() == [1, 2, 12, 15] and found[1, 1].tolist() == pytest.approx([-0.1, -0.2, -1.2, -1.5])
    tables = torch.zeros(4, 2, 2, 4)
    tables[:, 0, 0, -1], tables[:, 0, 1, -1] = torch.tensor([-0.4, -0.2, -0.2, 0.4]), torch.tensor([0.1, -0.1, 0.2, 0.0])
    tables[:, 1] = -9  # the incorrect rollouts have no part in it
    words = "the plain step changes the correct rollouts by -0.1000 nats on average, and the FPA step by +0.0500; 3 of 4 fall"
    assert explain.reading(tables).replace("\n", " ") == f"Over 4 pairs, {words} under the plain step, 1 under FPA's."


def test_the_screen_is_a_terminal():
    """Forty lines of a hundred columns, at the default number of operations and at large numbers."""
    text, tables = "07*9=63;63*2=26;26+3=29;29+6=35;35*5=75;75+6=81;#81", torch.full((64, 2, 2, 4), -123.4567)
    step = (torch.ones(2), torch.ones(2), torch.ones(2), torch.full((2, len(text) + 1), -10.0))
    steps = {explain.PRESENT: step, explain.FUTURE: step}
    lines = explain.screen("07*9*2+3+6*5+6?", [text] * 2, 46, [52, 52], steps, tables).splitlines()
    lines += explain.reading(tables).splitlines()
    assert len(lines) <= 34 and max(len(line.replace("\u0302", "")) for line in lines) <= 100
