"""Whole runs of train.py: every loss, online sampling, several at once, failures beside others, all on a tiny setting."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_train import TINY, command, edit_cache, folders, read_log, run_with_cache, without_seconds

import train
from losses import LOSSES
from plumbing import log
from study import results
from toy_math import rollouts, stages
from toy_math.problems import Verdict, read_problem


def test_targets_in_the_real_loop(finished, tmp_path):
    words = ["--loss", "fpa", "--lam", "8", "--target", "both", "correct", "incorrect"]
    logs = {f.name.split("-prompts")[0]: read_log(f)[-1] for f in run_with_cache(finished, tmp_path, *words)}
    assert len({logs[f"fpa-lam8-{target}"]["logratio_incorrect"] for target in ("both", "correct", "incorrect")}) == 3


def test_every_loss_in_the_real_loop(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "VALIDATION_PROBLEMS", 8)  # what is tested is the loop, not what is measured
    monkeypatch.setattr(stages, "TEST_PROBLEMS", 8)
    words = ["--loss", *LOSSES, "--lam", "3", "--jobs", "1", "--eval-every", "10", "--prompts", "24"]
    logs = {f.name.split("-prompts")[0]: read_log(f)[-1] for f in run_with_cache(finished, tmp_path, *words)}
    names = ["off_rl", "fpa-lam3-both", "simper-lam3-both", "dpo-lam3-both-beta0.1", "rpo-lam3-both-beta0.1-alpha1", "sft"]
    names += ["kto-lam3-both-beta0.1", "a_star_po-beta0.001", "pessimistic-beta0.1-shift0", "reinforce", "grpo"]
    names += ["nsr-weight0.1", "asymre-shift0.1", "topr", "future_topr-lam3-both", "power-lam3-both"]
    assert set(logs) == {*names, "constant-weight0.25", "sharpened-lam3-both"}
    assert len({last["logratio_incorrect"] for last in logs.values()}) == len(LOSSES)  # no two are the same
    for name, last in logs.items():
        assert float(last["grad_norm"]) > 0 and float(last["loss"]) != 0
        assert (float(last["coefficient_incorrect"]) == 0) == (name == "sft") and float(last["coefficient_correct"]) > 0
        ahead = "lam" in name and name.split("-")[0] not in ("sharpened", "power")  # whose lam extrapolates no logits
        assert (last["pihat_incorrect"] != last["pi_incorrect"]) == ahead, name
    assert float(logs["reinforce"]["coefficient_correct"]) == float(logs["sft"]["coefficient_correct"]) == 1
    assert float(logs["constant-weight0.25"]["coefficient_incorrect"]) == 0.25


def test_diagnostics_in_the_real_loop(finished, tmp_path, capsys):
    words = ["--loss", "fpa", "--steps", "30", "--eval-every", "10"]
    (folder,) = run_with_cache(finished, tmp_path, *words)
    plain = without_seconds(folder)
    train.run([*TINY, *words, "--out", str(tmp_path), "--diagnostics"])  # the finished run lacks them
    assert "already finished" not in capsys.readouterr().out and without_seconds(folder) == plain
    entangled, tokens = results.read_csv(folder / "entanglement.csv"), results.read_csv(folder / "tokens.csv")
    assert entangled["step"].tolist() == [0, 10, 20, 30] and len(set(entangled["b"])) == 4
    assert set(tokens["step"]) == {0, 10, 20, 30} and set(tokens["side"]) == {"correct", "incorrect"}
    for texts, first in zip(zip(tokens["tokens"][::2], tokens["tokens"][1::2]), tokens["first_wrong"][::2]):
        correct, incorrect = (text.split() for text in texts)
        prefix = int(first)
        assert correct[:prefix] == incorrect[:prefix] and correct[prefix] != incorrect[prefix]
    later = {step for _, step, _ in results.extrapolated(results.read_run(folder))}
    assert later == {15, 20, 30}
    train.run([*TINY, *words, "--out", str(tmp_path), "--diagnostics"])
    assert "already finished" in capsys.readouterr().out
    assert not (tmp_path / "figures" / "extrapolation.png").exists()  # too short for it, and no reason to stop
    assert (tmp_path / "figures" / "entanglement.png").exists()


def test_grpo_samples_what_it_trains_on(finished, tmp_path):
    words = ["--loss", "grpo", "--steps", "4", "--eval-every", "1"]
    rows = read_log(run_with_cache(finished, tmp_path / "grpo", *words)[0])
    offline = read_log(folders(finished[0], "fpa")[0])
    assert rows[0]["tokens_sampled"] == "0" and rows[4]["tokens_sampled"] == rows[4]["tokens_trained"]
    assert len({row["tokens_sampled"] for row in offline}) == 1 and int(offline[0]["tokens_sampled"]) > 24 * 4 * 5
    assert float(rows[0]["seconds"]) < 0.01 < float(offline[0]["seconds"])  # the latter took rollouts before its first step
    dapo = read_log(run_with_cache(finished, tmp_path / "dapo", *words, "--dapo")[0])
    assert int(dapo[4]["tokens_trained"]) < int(dapo[4]["tokens_sampled"])  # some group had one reward only


def test_seconds_leave_out_evaluations(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(time=lambda: clock[0]))

    def measure(step, model):
        clock[0] += 30.0
        return {}

    kept = log.Log(tmp_path, measure, 2, 1, log.Steps(""), seconds=5.0)
    for step in range(3):
        kept.look(step, None)
        clock[0] += 2.0  # the step itself
    assert [row["seconds"] for row in kept.rows] == [5.0, 7.0, 9.0]
    again = log.Log(tmp_path, measure, 2, 1, log.Steps(""))
    again.restore(kept.state())
    assert again.spent() == 11.0


def test_coefficients_are_averaged_over_the_steps_that_have_them(finished, tmp_path):
    words = ["--loss", "grpo", "--dapo", "--steps", "8", "--batch-size", "4"]  # one group a step, often all of one reward
    every = read_log(run_with_cache(finished, tmp_path / "every", *words, "--eval-every", "1")[0])[1:]
    last = read_log(run_with_cache(finished, tmp_path / "last", *words, "--eval-every", "8")[0])[-1]
    values = [float(row["coefficient_correct"]) for row in every]
    there = [value for value in values if value == value]
    assert 0 < len(there) < len(values) and float(last["coefficient_correct"]) == pytest.approx(
        sum(there) / len(there), rel=1e-4
    )


def test_a_step_whose_groups_all_have_one_reward_changes_nothing(finished, tmp_path, monkeypatch):
    """DAPO drops every group of a policy that is always wrong; the weights stay those of the base model."""
    monkeypatch.setattr(rollouts, "verify", lambda *_: Verdict(False, False, 1))
    (folder,) = run_with_cache(finished, tmp_path, "--loss", "grpo", "--dapo")
    weights, (base,) = load_file(folder / "model.safetensors"), (tmp_path / "cache").glob("base-*.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in load_file(base).items())
    last = read_log(folder)[-1]
    assert last["tokens_trained"] == "0" and int(last["tokens_sampled"]) > 0 and last["coefficient_correct"] == "nan"


def test_evaluations_may_ask_longer_problems(finished, tmp_path, capsys):
    (folder,) = run_with_cache(finished, tmp_path, "--loss", "off_rl", "--eval-ops", "2")
    printed, (short,) = capsys.readouterr().out, folders(finished[0], "off_rl")
    assert all(f"{stage} cached" in printed for stage in ("base model   ", "rollouts     ", "reference    "))
    prompts = [line.split()[1] for line in (folder / "samples.txt").read_text().splitlines()]
    assert prompts and {len(read_problem(prompt).ops) for prompt in prompts} == {2}
    config, plain = (json.loads((one / "config.json").read_text()) for one in (folder, short))
    assert (config["ops"], config["eval_ops"]) == (1, 2) and "eval_ops" not in plain and folder.name != short.name
    rows, others = read_log(folder), read_log(short)
    for name in ("loss", "logratio_correct", "logratio_incorrect_p5"):  # the training is the same
        assert [row[name] for row in rows] == [row[name] for row in others]
    assert float(rows[0]["accuracy"]) < float(others[0]["accuracy"])  # it has never seen a second operation


def test_a_base_model_of_the_task_slips(tmp_path):
    train.run([*TINY, "--task", "slips", "--loss", "off_rl", "--out", str(tmp_path)])
    (folder,) = folders(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["task"] == "slips" and config["slip"] == 0.3 and "habit" not in config
    assert 0 < config["measured"]["share_correct"] < 1


def test_gradient_is_clipped_and_coefficients_and_counts_are_logged(finished, tmp_path, monkeypatch):
    seen = []

    def recording(logp_sum, future_logp_sum, length, reward):
        seen.append([(values.detach() / length).exp() for values in (logp_sum, future_logp_sum)] + [reward, length])
        return -1e6 * reward * logp_sum, torch.where(reward > 0, 3.0, 5.0) / length

    monkeypatch.setitem(LOSSES, "fpa", dataclasses.replace(LOSSES["fpa"], function=recording))
    clipped = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(train, "clip_grad_norm_", lambda p, limit: clipped.append(limit) or clip(p, limit))
    (folder,) = run_with_cache(finished, tmp_path, "--loss", "fpa", "--lr", "0.05")
    last = read_log(folder)[-1]
    for column, policy in (("below_0.2_pi", 0), ("below_0.2_pihat", 1)):
        assert int(last[column]) == sum(((step[2] < 0) & (step[policy] < 0.2)).sum().item() for step in seen) > 0
    assert clipped == [1.0] * 10 and float(last["grad_norm"]) > 1e3
    assert float(last["coefficient_correct"]) == pytest.approx(3) and float(last["coefficient_incorrect"]) == pytest.approx(5)
    assert int(last["tokens_trained"]) == sum(length.sum().item() for *_, length in seen)


def test_a_seed_that_fails_beside_another(finished, tmp_path):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    edit_cache(tmp_path, lambda text: text.replace('"label": false', '"label": true'))
    result = command("--loss", "fpa", "--seed", 0, 1, *TINY, "--jobs", 2, "--out", tmp_path)
    assert result.returncode == 2 and "is incorrect" in result.stderr and "failed: seed 0" in result.stdout
    assert ["seed1" in folder.name and (folder / "samples.txt").exists() for folder in folders(tmp_path)] == [True]


def test_runs_side_by_side_are_the_runs_one_by_one_and_go_on_where_one_fails(finished, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(finished[0] / "cache", out / "cache")
    words = ["--loss", "fpa", "off_rl", "--lam", "1e300", 2, "--seed", 0, 1, *TINY]
    result = command(*words, "--jobs", 2, "--out", out)
    assert result.returncode == 3 and "step 1: loss nan" in result.stderr and result.stderr.count("\n") == 1
    assert "2 runs at once" in result.stdout and "6 of 6 runs" in result.stdout
    assert [(folder / "samples.txt").exists() for folder in folders(out)] == [False] * 2 + [True] * 4  # fpa-lam1e+300 first
    for folder in folders(finished[0]):
        assert without_seconds(out / folder.name) == without_seconds(folder)
        assert f"{folder.name}  step    10/10" in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_no_worker_outlives_a_parent_that_is_killed(finished, tmp_path):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    words = ["--loss", "fpa", "--lam", "1", "2", *TINY, "--steps", "100000", "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "train.py", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (len(folders(tmp_path)) == 2 and all(len(read_log(folder)) > 2 for folder in folders(tmp_path))):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)  # waits for the workers too, who hold its pipes
