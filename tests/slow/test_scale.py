"""study/scale.py: what it changes in train.py, its runs from the grid to the tables, and the theory that it asks about."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_train import TINY

from losses import LOSSES, objective
from plumbing.files import UserError
from plumbing.keeper import adamw
from study import experiments, results, scale, tables, tune


def batch_of(rows=6):
    torch.manual_seed(0)
    logp_sum = -torch.rand(rows) * 5 - 1
    length = torch.full((rows,), 4.0)
    values = {"logp_sum": logp_sum.requires_grad_(), "future_logp_sum": logp_sum.detach() - 1, "length": length}
    return SimpleNamespace(**values, logratio=torch.zeros(rows), reward=torch.tensor([1.0, -1.0] * (rows // 2)))


def test_rescaled_weights_have_mean_1_and_the_same_ratios():
    b, run = batch_of(), SimpleNamespace(loss="fpa", lam=2.0, target="both")
    (plain,) = torch.autograd.grad(objective(b, run)[0], b.logp_sum)
    loss, coefficient = scale.rescaled(b, run)
    (got,) = torch.autograd.grad(loss, b.logp_sum)
    assert (got * len(got) * b.length).abs().mean() == pytest.approx(1)
    assert torch.allclose(got / got[0], plain / plain[0]) and torch.equal(coefficient, objective(b, run)[1])


def steps(make, scales):
    """A tiny regression's weights after a few steps, its loss multiplied by each scale."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 1), torch.randn(8, 3)
    optimizer = make(model.parameters(), 0.01)
    for factor in scales:
        optimizer.zero_grad()
        (factor * (model(x) - 1).square().mean()).backward()
        scale.unclipped(list(model.parameters()), 1.0)
        optimizer.step()
    return model.weight.detach()


def test_adamw_divides_a_constant_scale_out():
    """And SGD does not. Nothing is clipped, so that the clip does not decide."""
    plain, scaled = (steps(adamw, [factor] * 20) for factor in (1.0, 100.0))
    assert torch.allclose(plain, scaled, atol=1e-5)
    plain, scaled = (steps(torch.optim.SGD, [factor] * 20) for factor in (1.0, 10.0))
    assert not torch.allclose(plain, scaled, atol=1e-2)


def test_a_common_shrinking_brakes_only_where_adamw_remembers_longer():
    """Of a gradient that falls by a factor of e in 300 steps: the size of the last step beside that of an early one."""
    left = {}
    for name, make in {"here": adamw, "torch": torch.optim.Adam}.items():
        weight, sizes = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), []
        optimizer = make([weight], 1.0)
        for step in range(900):
            weight.grad, before = torch.full_like(weight, math.exp(-max(step - 300, 0) / 300)), weight.item()
            optimizer.step()
            sizes.append(weight.item() - before)
        left[name] = sizes[-1] / sizes[299]
    assert left["here"] > 0.9 and left["torch"] < 0.4


def test_topr_brakes_at_a_seventeenth_of_powers_distance():
    length = torch.tensor([52.0])

    def weight(loss, logratio):
        batch = SimpleNamespace(logp_sum=torch.tensor([logratio]), logratio=torch.tensor([logratio]), length=length)
        batch.reward = torch.tensor([-1.0])
        return (LOSSES[loss](batch, SimpleNamespace(lam=2.0, target="both"))[1] * length).item()

    assert weight("topr", -0.7) == pytest.approx(0.5, abs=0.01)  # of 1, where π_ref gives the answer a probability of 1
    assert weight("power", -12.0) == pytest.approx(0.5, abs=0.01) and 52 * math.log(2) / 3 == pytest.approx(12, abs=0.1)


def test_every_kind_of_run_changes_what_its_settings_name(monkeypatch):
    asked = []
    monkeypatch.setattr(scale.changed, "train_one", lambda args, name, settings, changes: asked.append(changes))
    for settings in ({}, {"scale": "mean1"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "scale": "mean1"}):
        scale.train_one(None, "", settings)
    rescaled, sgd = {"objective": scale.rescaled}, {"adamw": torch.optim.SGD, "clip_grad_norm_": scale.unclipped}
    assert asked == [{}, rescaled, sgd, rescaled | sgd]


def test_the_runs_go_from_the_grid_to_the_cases_and_into_the_tables(tmp_path, monkeypatch, capsys):
    flags = " ".join(TINY)
    plain = experiments.command_of

    def tiny(words, seeds, out="runs", jobs=0):
        rate = f" --lr {words.split('--lr ')[1].split()[0]}" if "--lr" in words else ""
        return plain(f"--loss fpa --lam 2{rate} {flags}", seeds, out, jobs)

    monkeypatch.setattr(experiments, "command_of", tiny)
    monkeypatch.setattr(experiments, "at_best", lambda name, runs: {scale.CASE: "--loss fpa --lam 2 --lr 1e-3"})
    monkeypatch.setattr(scale, "RATES", (0.01, 0.1))
    monkeypatch.setattr(scale, "SEEDS", (3000,))
    where = ["--out", str(tmp_path / "runs"), "--to", str(tmp_path / "tables"), "--jobs", "2"]
    with monkeypatch.context() as without_grid, pytest.raises(SystemExit) as stopped:
        without_grid.setattr(experiments, "at_best", lambda name, runs: {})
        scale.run(["all", *where])
    assert stopped.value.code == 2 and "python -m study.experiments lambda-grid" in capsys.readouterr().err
    with monkeypatch.context() as broken, pytest.raises(SystemExit):
        train_all = scale.changed.train_all

        def failing(*some):
            train_all(*some)
            raise UserError("after its runs")

        broken.setattr(scale.changed, "train_all", failing)
        scale.run(["all", *where])
    assert len(tables.held(tmp_path / "tables")) == 6 + 2  # AdamW's two are gathered all the same
    scale.run(["all", *where])
    runs = results.read_folder(tmp_path / "tables")
    assert len(runs) == 2 * 2 + 4 and all(run.config["loss"] == "fpa" for run in runs)
    kinds = {(run.config.get("optimizer"), run.config.get("scale")) for run in runs if run.config["seed"] == 3000}
    assert kinds == {(None, None), (None, "mean1"), ("sgd", None), ("sgd", "mean1")}
    finals = {run.log["pi_correct"][-1] for run in runs if run.config["seed"] == 3000}
    assert len(finals) == 4  # four different policies
    held = tables.held(tmp_path / "tables")
    by_rate = {lr: sum(tune.score_of(held[tables.identity(settings)]) for settings in scale.grid(lr)) for lr in (0.01, 0.1)}
    assert scale.best_rate(held) == max(by_rate, key=by_rate.get) and scale.best_rate({}) is None
    capsys.readouterr()
    scale.run(["all", *where])
    assert "all of its 8 runs are in" in capsys.readouterr().out
