"""study/leaderboard.py: a brake from a file is trained as a loss would be; its row, the verdict, and what is refused."""

import shutil
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import TINY, read_log, refusal

import train
from losses import objective
from plumbing.files import UserError, locked
from study import leaderboard, lesson
from study.results import Run, fpa_runs, where

EXAMPLE = ROOT / "docs/lesson/my_brake.py"


def batch():
    """Rows of both kinds, and their log-probabilities under the base model."""
    logp_sum = -torch.rand(6, generator=torch.Generator().manual_seed(0)) * 8 - 1
    b = SimpleNamespace(logp_sum=logp_sum.requires_grad_(), ref_logp_sum=logp_sum.detach() + 1, length=torch.full((6,), 5.0))
    b.reward, b.logratio = torch.tensor([1.0, -1.0] * 3), b.logp_sum - b.ref_logp_sum
    b.future_logp_sum = b.logp_sum.detach()
    return b


def gradient(function, b, run=None):
    loss, coefficient = function(b, run)
    return torch.autograd.grad(loss, b.logp_sum)[0], coefficient


def test_the_example_is_the_power_control_on_incorrect_rows():
    b, run = batch(), SimpleNamespace(loss="power", lam=2.0, target="incorrect")
    brake = leaderboard.load(EXAMPLE.read_text(), EXAMPLE)
    for got, expected in zip(gradient(leaderboard.braked(brake), b), gradient(objective, b, run)):
        assert torch.allclose(got, expected)


def test_returning_pi_is_off_rl_and_no_gradient_goes_through_a_brake():
    b = batch()
    expected, _ = gradient(objective, b, SimpleNamespace(loss="off_rl", lam=0.0))
    assert torch.allclose(gradient(leaderboard.braked(lambda pi, pi_ref: pi), b)[0], expected)
    pull = torch.ones((), requires_grad=True)
    loss, _ = leaderboard.braked(lambda pi, pi_ref: pull * pi)(b, None)
    assert torch.autograd.grad(loss, pull, allow_unused=True)[0] is None


WRONG = {
    "def brake(pi, pi_ref: return pi": "SyntaxError",
    "def stop(pi, pi_ref): return pi": "defines no function brake(pi, pi_ref)",
    "def brake(pi): return pi": "TypeError",
    "def brake(pi, pi_ref): return {}[0]": "KeyError: 0",
    "def brake(pi, pi_ref): return 0.5": "must return a tensor like pi, (4,), not float",
    "def brake(pi, pi_ref): return pi.mean()": "not ()",
    "def brake(pi, pi_ref): return pi - 2": "finite weights of at least 0",
    "def brake(pi, pi_ref): return pi.log()": "finite weights of at least 0",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_one_line_and_nothing_is_written(text, tmp_path, capsys):
    (tmp_path / "wrong.py").write_text(text)
    code, said = refusal(leaderboard.run, [tmp_path / "wrong.py", *TINY, "--out", tmp_path / "runs"], capsys)
    assert code == 2 and WRONG[text] in said and said.count("\n") == 1 and "wrong.py" in said
    assert not (tmp_path / "runs").exists()


def test_wrong_words_are_one_line(tmp_path, capsys):
    for words, part in (
        ([], "name a file first"),
        ([""], "'' is no path"),
        (["~no_such_user/x.py"], "'~no_such_user/x.py' is no path"),
        ([tmp_path / "none.py"], "No such file"),
        ([EXAMPLE, "--stepz", "3"], "--steps"),
    ):
        code, said = refusal(leaderboard.run, words, capsys)
        assert code == 2 and part in said and said.count("\n") == 1
    code, said = refusal(leaderboard.run, [EXAMPLE, "--steps", "150", "--out", tmp_path / "runs"], capsys)
    assert code == 2 and "must be one of 100, 200" in said and not (tmp_path / "runs").exists()
    for more in (["--lam", "2"], ["--lr", "1e-4", "2e-4"], ["--loss", "sft"], ["--diagnostics"]):
        code, said = refusal(leaderboard.run, [EXAMPLE, *more, "--out", tmp_path / "runs"], capsys)
        assert code == 2 and "the file is the loss" in said and not (tmp_path / "runs").exists()
    leaderboard.run(["--help"])
    assert "def brake(pi, pi_ref)" in capsys.readouterr().out


def test_a_brake_is_trained_over_seeds_and_reused(finished, tmp_path, capsys):
    """Off-RL as a brake trains what --loss off_rl trains, in processes of their own; the second time nothing is trained."""
    (tmp_path / "same.py").write_text("def brake(pi, pi_ref):\n    return pi\n")
    shutil.copytree(finished[0] / "cache", tmp_path / "runs" / "cache")
    words = [str(tmp_path / "same.py"), *TINY, "--seed", "0", "1", "--out", str(tmp_path / "runs"), "--jobs", "2"]
    leaderboard.run(words)
    printed = capsys.readouterr().out
    assert "> same" in printed and "nothing to compare with" in printed
    train.run(["--loss", "off_rl", *TINY, "--seed", "0", "1", "--out", str(tmp_path / "runs"), "--jobs", "1"])
    for seed in (0, 1):
        ours, theirs = (next((tmp_path / "runs").glob(f"{name}*seed{seed}-*")) for name in ("same", "off_rl"))
        for a, b in zip(read_log(ours), read_log(theirs), strict=True):
            assert a["logratio_correct"] == b["logratio_correct"] and a["coefficient_incorrect"] == b["coefficient_incorrect"]
    capsys.readouterr()
    leaderboard.run(words)
    again = capsys.readouterr().out
    assert "step" not in again.replace("step 10 ", "") and again.splitlines()[-3:] == printed.splitlines()[-3:]
    mine = next((tmp_path / "runs").glob("same*seed1-*"))
    (mine / "log.csv").unlink()
    with locked(tmp_path / "runs" / "cache" / f"{mine.name}.lock", mine):
        code, said = refusal(leaderboard.run, words, capsys)
    assert code == 2 and "is being worked on by process" in said
    (tmp_path / "same.py").write_text("def brake(pi, pi_ref):\n    return pi / 2\n")
    leaderboard.run([*words[:-4], "--seed", "0", "--out", str(tmp_path / "runs")])
    assert len(list((tmp_path / "runs").glob("same-seed0-*"))) == 2  # another text is another run


def test_stored_runs_of_another_setting_are_no_comparison():
    stored = lesson.stored()
    (settings,) = train.run_settings(train.parse_args(["--loss", "off_rl", "--steps", "200"])).values()
    for change in ({"prompts": 512}, {"task": "slips"}, {"batch_size": 32}, {"ops": 5}, {"schedule": "linear"}):
        assert leaderboard.comparable(stored, {**settings, **change}, 200) == [], change
    assert leaderboard.comparable(stored, {**settings, "eval_every": 50, "seed": 9}, 200) == stored


# --- the table


def own_runs(gains, stored):
    """Runs of a brake whose accuracies are FPA's and something, seed by seed."""
    return [
        Run(run.folder, run.config, {**run.log, "accuracy": run.log["accuracy"] + gain})
        for gain, run in zip(gains, fpa_runs(stored, target="incorrect"))
    ]


@pytest.mark.parametrize(
    "gains, says",
    [
        ([0.05] * 5, "beats FPA, λ = 2, incorrect only: +0.050 ± 0.000 over 5 seeds"),
        ([-0.05] * 5, "does not beat FPA, λ = 2, incorrect only: -0.050 ± 0.000 over 5 seeds"),
        ([0.0] * 5, "does not beat FPA, λ = 2, incorrect only: +0.000 ± 0.000 over 5 seeds"),
        ([0.3, -0.2, 0.2, -0.1, 0.05], "does not beat FPA, λ = 2, incorrect only: +0.050 ± 0.256 over 5 seeds"),
    ],
)
def test_the_verdict_is_of_the_difference_seed_by_seed(gains, says):
    stored = lesson.stored()
    board = leaderboard.board("mine", own_runs(gains, stored), stored, 1000).splitlines()
    assert board[-1] == f"mine {says}"
    rows = {line[:34].strip(): float(line[40:].split()[0]) for line in board[1:-1]}
    assert list(rows.values()) == sorted(rows.values(), reverse=True) and len(rows) == 5
    off_rl = statistics.mean(run.log["accuracy"][-1] for run in where(stored, loss="off_rl"))
    assert rows["Off-RL"] == pytest.approx(off_rl, abs=6e-4)


def test_one_seed_has_no_verdict_and_no_stored_run_has_another():
    stored = lesson.stored()
    own = own_runs([0.05] * 5, stored)
    assert leaderboard.verdict("mine", own[:1], stored, 200) == "One seed has no interval: give two or more."
    assert "over 2 seeds" in leaderboard.verdict("mine", own[:2], stored, 200)
    assert "nothing to compare with" in leaderboard.verdict("mine", own, [], 200)


def test_stored_runs_are_compared_at_the_same_step_of_the_same_setting():
    stored, args = lesson.stored(), train.parse_args(["--loss", "off_rl", "--steps", "200"])
    (settings,) = train.run_settings(args).values()
    found = leaderboard.comparable(stored, {**settings, "brake": ""}, 200)
    assert found == stored
    assert leaderboard.at(found[0], 200, "accuracy") == found[0].log["accuracy"][np.flatnonzero(found[0].log["step"] == 200)[0]]
    assert leaderboard.comparable(stored, {**settings, "lr": 1e-3}, 200) == []
    with pytest.raises(UserError, match="must be one of 100, 200"):
        leaderboard.comparable(stored, settings, 150)
