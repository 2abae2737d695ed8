"""full_scale/ as commands: rollouts, training in one and two processes, interruption, evaluation; all offline."""

import contextlib
import functools
import importlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file
from test_full_scale import ROLLOUTS, change_config, change_tensor, make_checkpoint, write

import full_scale.evaluate
import full_scale.load_hf
import full_scale.log
import full_scale.reference
import full_scale.rollouts
import full_scale.store
import full_scale.train
import plots
from full_scale.data import micro_batches, other_prompts, read_data
from full_scale.load_hf import load_pretrained, save_pretrained
from full_scale.policy import build
from full_scale.processes import start_processes
from full_scale.prompts import ChatTokenizer
from full_scale.reference import Reference
from full_scale.rollouts import read_problems
from full_scale.verdict import is_correct
from losses import LOSSES, token_logps
from model import SwiGLU
from plumbing import files
from plumbing.batches import batch_order
from plumbing.log import PERCENTILES
from study import claims


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A checkpoint that answers tests/rollouts.jsonl's problems, right about half of the time, and the problems."""
    folder = tmp_path_factory.mktemp("taught")
    make_checkpoint(folder, hidden_size=64, intermediate_size=128)
    model, tokenizer = load_pretrained(folder)
    rows = [json.loads(line) for line in ROLLOUTS.read_text().splitlines()]
    problems = {row["prompt"]: row["completion"].split("{")[-1].rstrip("}") for row in rows if row["label"]}
    prompts = [tokenizer.encode(tokenizer.ask(row["prompt"])) for row in rows]
    answers = [tokenizer.encode("\\boxed{" + row["completion"].split("{")[-1]) + [tokenizer.eos] for row in rows]
    tokens = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers)]
    mask = [torch.arange(len(ids)) >= len(prompt) for ids, prompt in zip(tokens, prompts)]
    tokens, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (tokens, mask))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = -token_logps(model(tokens), tokens, mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_pretrained(model, folder)
    return folder, write(folder / "problems.jsonl", *({"problem": q, "answer": a} for q, a in problems.items()))


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_module(module, *flags, processes=1):
    """`python -m full_scale.MODULE`, in this process, or behind torchrun."""
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, "-m", f"full_scale.{module}", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            importlib.import_module(f"full_scale.{module}").run([str(flag) for flag in flags])
        except SystemExit as stop:
            code = stop.code
    return Done(code, out.getvalue(), error.getvalue())


def sample(folder, problems, out, *flags, module="rollouts"):
    return run_module(module, "--model", folder, "--problems", problems, "--out", out, "--max-tokens", 24, *flags)


def test_from_problems_to_rollouts_to_training_to_evaluation(taught, tmp_path, monkeypatch):
    folder, problems = taught
    asked, original = [], full_scale.rollouts.sample_each
    monkeypatch.setattr(full_scale.rollouts, "sample_each", lambda *words: asked.append(words[5]) or original(*words))
    done = sample(folder, problems, tmp_path / "rollouts.jsonl", "--n", 4)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert sample(folder, problems, tmp_path / "others.jsonl", "--n", 4, "--seed", 1).returncode == 0
    others = [json.loads(line) for line in (tmp_path / "others.jsonl").read_text().splitlines()]
    assert [row["completion_ids"] for row in rows] != [row["completion_ids"] for row in others]  # another seed's
    assert len(rows) == 32
    assert json.loads((tmp_path / "rollouts.jsonl.json").read_text())["temperature"] == 1  # training's reference sampled them
    assert {row["label"] for row in rows} == {True, False}
    gold = [answer for _, answer in read_problems(problems)]
    assert all(row["label"] == is_correct(gold[row["problem_id"]], row["completion"]) for row in rows)
    assert f"{sum(row['label'] for row in rows) / 32:.1%} correct" in done.stdout

    flags = ["--init", folder, "--data", tmp_path / "rollouts.jsonl", "--out", tmp_path / "runs", "--steps", 12, "--lr", 1e-3]
    done = run_module("train", *flags, "--batch-size", 8, "--loss", "fpa", "--lam", 2)
    assert done.returncode == 0, done.stderr
    (trained,) = (tmp_path / "runs").glob("*/model")
    done = sample(trained, problems, tmp_path / "answers.jsonl", module="evaluate")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "answers.jsonl.json").read_text())["temperature"] == 0.7 and asked == [1.0, 1.0, 0.7]
    shares = np.array([row["label"] for row in rows]).reshape(8, 8).mean(1)  # the rows come problem by problem
    assert [row["problem_id"] for row in rows] == np.repeat(range(8), 8).tolist()
    mean, error = shares.mean(), shares.std(ddof=1) / 8**0.5
    assert f"pass@1 {mean:.4f} ± {error:.4f} (standard error over 8 problems, 8 samples each)" in done.stdout


def test_sampling_goes_on_where_it_stopped(taught, tmp_path):
    folder, problems = taught
    out = tmp_path / "rollouts.jsonl"
    assert sample(folder, problems, out, "--n", 2).returncode == 0
    whole = out.read_text()
    kept = whole.splitlines(keepends=True)[:5]
    kept[1] = json.dumps({**json.loads(kept[1]), "completion": "a\u2028b\x85"}, ensure_ascii=False) + "\n"
    out.write_text("".join(kept) + '{"prompt": "torn')
    done = sample(folder, problems, out, "--n", 2)
    assert done.returncode == 0, done.stderr
    assert "5 of 16 rollouts are there" in done.stdout
    rows = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert out.read_text().startswith("".join(kept))
    assert sorted(row["problem_id"] for row in rows) == [i for i in range(8) for _ in range(2)]
    done = sample(folder, problems, out, "--n", 2, "--temperature", 0.5)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"{out} was made with other settings or problems: name another --out, or remove it")
    problems.write_text(problems.read_text().replace("What is", "How much is"))
    assert sample(folder, problems, out, "--n", 2).returncode == 2
    problems.write_text(problems.read_text().replace("How much is", "What is"))
    assert len(out.read_text().split("\n")[:-1]) == 16


def test_what_cannot_be_sampled_leaves_nothing(taught, tmp_path):
    folder, problems = taught
    cases = {
        ("--problems", "nowhere.jsonl"): "nowhere.jsonl: No such file",
        ("--model", str(tmp_path)): "no model.safetensors",
        ("--n", "0"): "argument --n: must be a whole number from 1 to ",
    }
    if not find_spec("vllm"):
        cases["--engine", "vllm"] = "--engine vllm: No module named 'vllm'; pip install vllm"
    for flags, message in cases.items():
        done = sample(folder, problems, tmp_path / "rollouts.jsonl", *flags)
        assert done.returncode == 2
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not list(tmp_path.iterdir())


# --- train.py

QUICK = ["--steps", 6, "--batch-size", 8, "--micro-batch", 2, "--eval-every", 1, "--save-every", 2, "--lr", 1e-3, "--warmup", 2]


def train(checkpoint, out, *flags, data=ROLLOUTS):
    """Train on the shipped rollouts -> the log's columns but for the times."""
    done = run_module("train", "--init", checkpoint, "--data", data, "--out", out, *QUICK, *flags)
    assert done.returncode == 0, done.stderr
    return log_of(out)


def log_of(out, loss="*"):
    (path,) = out.glob(f"*-{loss}-*/log.csv")
    header, *lines = path.read_text().splitlines()
    rows = [dict(zip(header.split(","), map(float, line.split(",")))) for line in lines]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_logs_agree(ours, expected, rtol):
    assert [row["step"] for row in ours] == [row["step"] for row in expected] == list(range(7))
    for row, other in zip(ours, expected):
        assert row == pytest.approx(other, rel=rtol, abs=rtol, nan_ok=True)


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return out, train(checkpoint, out)


def test_two_processes_train_as_one_does(checkpoint, tmp_path):
    """They share the future policy, KTO's z0 and DPO's pairs. Off-RL has no future policy, since FPA stands beside it."""
    losses = ["off_rl", "fpa", "kto", "dpo"]
    for processes in (1, 2):
        words = ["--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path / str(processes), *QUICK, "--lam", 2]
        done = run_module("train", *words, "--loss", *losses, processes=processes)
        assert done.returncode == 0, done.stderr
    for loss in losses:
        assert_logs_agree(log_of(tmp_path / "2", loss), log_of(tmp_path / "1", loss), rtol=1e-4)
    weights = [load_file(next((tmp_path / n).glob("*-fpa-*/model/model.safetensors"))) for n in "12"]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-4)


def test_hidden_states_of_several_files_are_those_of_one(checkpoint, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(full_scale.reference, "SHARD_BYTES", 5_000)
    same(train(checkpoint, tmp_path), alone[1])
    assert len(list(tmp_path.glob("cache/*/hidden-*.safetensors"))) > 2


def test_the_rate_warms_up_and_falls(checkpoint, tmp_path, monkeypatch):
    rates, original = [], full_scale.train.training_step

    def watched(model, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(model, optimizer, *rest)

    monkeypatch.setattr(full_scale.train, "training_step", watched)
    train(checkpoint, tmp_path)
    falling = [0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(2, 6)]  # QUICK has 6 steps, 2 of warm-up
    assert rates == pytest.approx([1e-3 * share for share in (1 / 3, 2 / 3, *falling)])


def test_a_live_reference_is_the_cached_one(checkpoint, alone, tmp_path):
    assert_logs_agree(train(checkpoint, tmp_path, "--reference", "live"), alone[1], rtol=1e-5)
    assert list(alone[0].glob("cache/*/hidden-*"))
    assert not list(tmp_path.glob("cache/*/hidden-*"))


def test_recomputing_activations_changes_nothing_but_forwards(checkpoint, alone, tmp_path, monkeypatch):
    calls, original = [], SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda *some: calls.append(0) or original(*some))
    assert_logs_agree(train(checkpoint, tmp_path, "--no-recompute"), alone[1], rtol=1e-5)
    once = len(calls)
    train(checkpoint, tmp_path / "recomputed")
    layers = load_pretrained(checkpoint)[0].config.n_layers
    assert len(calls) - 2 * once == 6 * (8 // 2) * layers  # QUICK: 6 steps of 8 rows, 2 at once


def test_seconds_are_those_of_the_steps_alone(checkpoint, tmp_path, monkeypatch):
    passed, step, evaluate = [], full_scale.train.training_step, full_scale.train.Log.evaluate
    monkeypatch.setattr(full_scale.log, "time", SimpleNamespace(time=lambda: sum(passed)))
    monkeypatch.setattr(full_scale.train, "training_step", lambda *some: passed.append(1) or step(*some))
    monkeypatch.setattr(full_scale.train.Log, "evaluate", lambda *some: passed.append(100) or evaluate(*some))
    train(checkpoint, tmp_path, "--eval-every", 3)
    log = np.genfromtxt(next(tmp_path.glob("*/log.csv")), delimiter=",", names=True)
    assert log["seconds"].tolist() == [0, 3, 6]


def data_of(checkpoint, path=ROLLOUTS):
    """The rollouts as they are trained on."""
    args = full_scale.train.parse_args(["--init", str(checkpoint), "--data", str(path)])
    return read_data(args, ChatTokenizer(checkpoint))


def test_the_last_row_of_the_log_is_that_of_the_two_checkpoints(checkpoint, alone):
    """Log-ratio, π̄ and future π̄ from transformers' logits, by the formulas."""
    data = data_of(checkpoint)
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = [load(folder, dtype=torch.float32) for folder in (next(alone[0].glob("*/model")), checkpoint)]
    measured, ref_pi = [], []
    for ids, start in zip(data.tokens, data.prompt_length.tolist()):
        with torch.no_grad():
            logits, ref_logits = (model(ids[None]).logits[0, start - 1 : -1] for model in models)
        policies = logits, ref_logits, 3 * logits - 2 * ref_logits  # λ = 2
        present, ref, future = (h.log_softmax(-1).gather(1, ids[start:, None]).sum() for h in policies)
        measured.append([present - ref, (present / len(ids[start:])).exp(), (future / len(ids[start:])).exp()])
        ref_pi.append((ref / len(ids[start:])).exp())
    measured, last, ahead = torch.tensor(measured), alone[1][-1], []
    for kind, members in {"correct": data.reward > 0, "incorrect": data.reward < 0}.items():
        assert 0 < members.sum() <= full_scale.train.MONITORED  # so that all of them are monitored
        expected = measured[members].mean(0).tolist()
        assert [last[f"{name}_{kind}"] for name in ("logratio", "pi", "pihat")] == pytest.approx(expected, rel=1e-3)
        ratios = measured[members][:, 0].numpy()
        for p in PERCENTILES:
            assert last[f"logratio_{kind}_p{p}"] == pytest.approx(np.percentile(ratios, p), rel=1e-3, abs=1e-5)
        assert last[f"logratio_{kind}_below_0"] == np.mean(ratios < 0)
        ahead.append(abs(expected[2] / expected[1] - 1))
    assert max(ahead) > 0.01  # so that another λ would show
    rows, first, ref_pi = batch_order(data.reward, 6, 8, 0)[0], alone[1][1], torch.stack(ref_pi)
    for kind, sign in (("correct", 1), ("incorrect", -1)):  # at the first step, which this row is of, π̂ is π
        assert first[f"coefficient_{kind}"] == pytest.approx(ref_pi[rows[data.reward[rows] == sign]].mean().item(), rel=1e-3)
    assert first["tokens_trained"] == data.length[rows].sum() and first["below_0.2_pi"] == 4
    assert first["tokens_sampled"] == last["tokens_sampled"] == data.length.sum()


def test_values_and_means_are_those_of_a_row_s_problem(checkpoint, tmp_path):
    lines = ROLLOUTS.read_text().splitlines()[1:]  # without the first, its problem has more incorrect rows
    data = data_of(checkpoint, write(tmp_path / "rows.jsonl", *lines))
    for i, problem in enumerate(data.problem_ids):
        reward = data.reward[data.problem_ids == problem]
        assert data.mean_reward[i] == reward.mean()
        torch.testing.assert_close(data.value[i], 0.5 * ((reward > 0) / 0.5).exp().mean().log())
    assert len(data.mean_reward.unique()) > 1


@pytest.fixture
def mesh():
    """Of this process alone."""
    yield start_processes()
    torch.distributed.destroy_process_group()


def test_z0_is_the_mean_log_ratio_after_prompts_of_other_problems(checkpoint, tmp_path, mesh):
    """Of the policy over the reference, from whole sequences of the plain models."""
    assert other_prompts([0, 0, 1, 1, 2]).tolist() == [2, 2, 4, 4, 0]
    make_checkpoint(tmp_path / "moved", seed=1)
    (tmp_path / "cache").mkdir()
    words = ["--init", str(checkpoint), "--data", str(ROLLOUTS), "--out", str(tmp_path), "--micro-batch", "2"]
    args, run = full_scale.train.parse_args(words), SimpleNamespace(loss="kto", lam=0.0)
    data = read_data(args, ChatTokenizer(checkpoint), mismatched=True)
    folders = {"moved": tmp_path / "moved", "reference": checkpoint}
    built = {name: build(args, folder, mesh) for name, folder in folders.items()}
    plain = {name: load_pretrained(folder)[0] for name, folder in folders.items()}
    rows, total = torch.arange(8), {}
    for name, other in (("moved", "reference"), ("reference", "moved")):
        reference = Reference(args, [run], built[other], data, other, mesh)
        z0 = full_scale.train.kto_z0(built[name], data, reference, micro_batches(data, rows, 2))
        ratios = []
        for row in rows.tolist():
            prompt = data.other_prompt[row].item()
            assert data.problem_ids[prompt] != data.problem_ids[row]
            start = data.prompt_length[prompt].item()
            ids = torch.cat([data.tokens[prompt][:start], data.tokens[row][data.prompt_length[row] :]])[None]
            mask = torch.arange(ids.shape[1])[None] >= start
            with torch.no_grad():
                present, ref = (token_logps(plain[policy](ids), ids, mask).sum() for policy in (name, other))
            ratios.append((present - ref).item())
        total[name] = np.mean(ratios)
        assert z0.item() == pytest.approx(max(total[name], 0), abs=1e-4)
    assert total["moved"] == pytest.approx(-total["reference"]) and abs(total["moved"]) > 0.01


def test_the_precision_and_the_rate_by_default(monkeypatch):
    words = ["--init", "x", "--data", "y"]
    assert full_scale.train.parse_args(words).precision == "fp32" and full_scale.train.parse_args(words).lr == [1e-6]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert full_scale.train.parse_args(words).precision == "bf16"


def test_micro_batches_add_up(checkpoint, alone, tmp_path):
    assert_logs_agree(train(checkpoint, tmp_path, "--micro-batch", 8), alone[1], rtol=1e-4)


def test_the_log_starts_at_the_reference(alone):
    log = alone[1]
    parts = ["", *(f"_p{p}" for p in PERCENTILES)]
    assert all(abs(log[0][f"logratio_{kind}{part}"]) < 1e-4 for kind in ("correct", "incorrect") for part in parts)
    assert log[0]["pi_incorrect"] == pytest.approx(log[0]["pihat_incorrect"], rel=1e-5)
    assert log[-1]["logratio_correct"] - log[-1]["logratio_incorrect"] > 0.1
    assert log[-1]["coefficient_incorrect"] < log[-1]["pi_incorrect"] * 1.5


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("fpa", "grpo")])  # fpa: above; grpo: refused
def test_every_loss_trains(loss, checkpoint, tmp_path):
    log = train(checkpoint, tmp_path, "--loss", loss, "--eval-every", 6, "--save-every", 6, "--no-save-model")
    assert log[-1]["logratio_correct"] > log[-1]["logratio_incorrect"]


def test_bfloat16_products_change_little(checkpoint, alone, tmp_path):
    log = train(checkpoint, tmp_path, "--precision", "bf16")
    assert log != alone[1]
    assert_logs_agree(log, alone[1], rtol=0.05)
    for name in ("pi_correct", "pihat_correct", "pihat_incorrect", "coefficient_correct", "coefficient_incorrect"):  # small
        assert log[-1][name] == pytest.approx(alone[1][-1][name], rel=2e-3, abs=0), name
    assert abs(log[-1]["pihat_correct"] / log[-1]["pi_correct"] - 1) > 0.02  # the future policy is another one


def test_the_trained_checkpoint_loads_in_transformers(checkpoint, alone):
    (folder,) = alone[0].glob("*/model")
    theirs, (ours, _) = transformers.AutoModelForCausalLM.from_pretrained(folder), load_pretrained(folder)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-5, rtol=1e-5)
    before = load_file(checkpoint / "model.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in load_file(folder / "model.safetensors").items())
    assert transformers.PreTrainedTokenizerFast.from_pretrained(folder).eos_token == "<|im_end|>"


class Killed(Exception):
    pass


def kill_at(monkeypatch, condition):
    """Make training_step raise where a condition is met: a kill at that moment, in this process."""
    original = full_scale.train.training_step

    def until(*arguments):
        if condition():
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(full_scale.train, "training_step", until)


def interrupt(checkpoint, out, *flags):
    with pytest.raises(Killed):
        train(checkpoint, out, *flags)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def interrupted(checkpoint, tmp_path_factory):
    """The output folder of a run that was killed after step 4, whose checkpoint is saved."""
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, lambda: saved_step(out) == 4)
        interrupt(checkpoint, out)
    return out


def saved_step(out):
    return max((json.loads(path.read_text())["step"] for path in out.glob("*/checkpoint/state.json")), default=0)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(full_scale.store, "SHARD_BYTES", 20_000)  # so that a checkpoint is of several files
    flags = ["--eval-every", 4, "--save-every", 3]
    expected = train(checkpoint, tmp_path / "whole", *flags)
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        step = iter(range(10))
        kill_at(patch, lambda: next(step) == 5)
        interrupt(checkpoint, killed, *flags)
    assert 0 < saved_step(killed) < 5 and len(list(killed.glob("*/checkpoint/*.safetensors"))) > 5
    assert not list(killed.glob("*/model"))
    same(train(checkpoint, killed, *flags), expected)
    weights = [load_file(next(out.glob("*/model/model.safetensors"))) for out in (tmp_path / "whole", killed)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    assert not list(killed.glob("*/checkpoint*"))
    again = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", killed, *QUICK, *flags)
    assert "already finished" in again.stdout


def same(ours, expected):
    """Equal to the last digit that the log has; a NaN is equal to itself."""
    assert str(ours) == str(expected)


def test_a_kill_between_new_sums_and_their_checksum_blocks_nothing(checkpoint, tmp_path, monkeypatch):
    train(checkpoint, tmp_path, "--loss", "off_rl", "--steps", 1)  # which keeps sums alone
    original = full_scale.reference.write_beside

    def killed(path, facts):
        if path.name == "sums.safetensors":
            raise Killed
        original(path, facts)

    with monkeypatch.context() as patch:
        patch.setattr(full_scale.reference, "write_beside", killed)
        interrupt(checkpoint, tmp_path, "--steps", 1)
    flags = ["--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, "--steps", 1]
    assert run_module("train", *flags).returncode == 0


@pytest.mark.parametrize("moment", ["part is whole", "old is moved", "old is half gone", "part is half written"])
def test_a_checkpoint_that_was_being_replaced_is_taken_up(moment, checkpoint, alone, interrupted, tmp_path):
    out = shutil.copytree(interrupted, tmp_path / "out")
    (whole,) = out.glob("*/checkpoint")
    part, old = (whole.with_name(f"checkpoint.{name}") for name in ("part", "old"))
    if moment == "part is whole":
        whole.rename(part)
    elif moment == "old is moved":
        whole.rename(old)
    elif moment == "old is half gone":
        shutil.copytree(whole, old)
        next(old.glob("*.safetensors")).unlink()
    else:
        shutil.copytree(whole, part)
        (part / "state.json").unlink()
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", out, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "from step 4" in done.stdout
    assert_logs_agree(log_of(out), alone[1], rtol=1e-6)


def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint, alone, interrupted, tmp_path):
    out = shutil.copytree(interrupted, tmp_path / "out")
    (folder,) = out.glob("*/checkpoint")
    next(folder.glob("*.safetensors")).unlink()
    flags = ["--init", checkpoint, "--data", ROLLOUTS, "--out", out, *QUICK]
    done = run_module("train", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: {folder}: damaged; --no-resume begins anew" in done.stderr
    done = run_module("train", *flags, "--no-resume")
    assert done.returncode == 0 and "resuming" not in done.stdout
    assert_logs_agree(log_of(out), alone[1], rtol=1e-6)


def test_a_run_goes_on_in_another_number_of_processes(checkpoint, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, lambda: saved_step(tmp_path) == 2)
        interrupt(checkpoint, tmp_path)
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, processes=2)
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stdout
    assert_logs_agree(log_of(tmp_path), alone[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("number", "flags", "again"),
    [(signal.SIGINT, [], "goes on from there"), (signal.SIGTERM, ["--no-resume"], "begins its run anew")],
)
def test_ctrl_c_finishes_the_step_and_saves(number, flags, again, checkpoint, alone, tmp_path, monkeypatch):
    original, steps = full_scale.train.training_step, iter(range(10))

    def signalled(*arguments):
        if next(steps) == 2:
            os.kill(os.getpid(), number)
        return original(*arguments)

    words = ["train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, "--save-every", 100]
    with monkeypatch.context() as patch:
        patch.setattr(full_scale.train, "training_step", signalled)
        done = run_module(*words, *flags)
    assert done.returncode == 128 + number
    assert done.stderr.startswith("interrupted: what is saved in ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"; the same command {again}\n")
    assert "from step 3" in run_module(*words).stdout
    same(log_of(tmp_path), alone[1])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the worker is found in /proc")
def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(checkpoint, tmp_path):
    flags = ["--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, "--steps", 60, "--save-every", 1000]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "full_scale.train", *map(str, flags)]
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not any(path.read_text().count("\n") > 3 for path in tmp_path.glob("*/log.csv")):
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        worker = next(pid for pid in children if b"full_scale.train" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(int(worker), signal.SIGTERM)
        try:
            assert process.wait(timeout=120) != 0
        finally:
            process.kill()
    step = saved_step(tmp_path)
    assert 0 < step < 60
    done = run_module("train", *flags)
    assert done.returncode == 0 and f"from step {step}" in done.stdout


def test_a_signal_in_the_last_step_is_not_lost(checkpoint, tmp_path, monkeypatch):
    original, steps = full_scale.train.Log.evaluate, int(QUICK[QUICK.index("--steps") + 1])

    def signalled(log, step, model):
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(log, step, model)

    flags = ["--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sums.safetensors.99999999999999999999.part").touch()  # no process has this number
    with monkeypatch.context() as patch:
        patch.setattr(full_scale.train.Log, "evaluate", signalled)
        done = run_module("train", *flags)
    assert done.returncode == 143 and done.stderr.count("\n") == 1, done.stderr
    (folder,) = tmp_path.glob("*/model")
    (folder.parent / "checkpoint").mkdir()  # as a kill just before its removal leaves it
    done = run_module("train", *flags)
    assert done.returncode == 0 and "already finished" in done.stdout and not (folder.parent / "checkpoint").exists()


def test_a_result_that_cannot_be_written_costs_no_step(checkpoint, alone, tmp_path, monkeypatch):
    def full(*arguments, **words):
        raise files.UserError("no space")

    flags = ["--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, "--save-every", 100]
    with monkeypatch.context() as patch:
        patch.setattr(full_scale.load_hf, "save_file", full)
        assert run_module("train", *flags).returncode == 2
    done = run_module("train", *flags)
    assert done.returncode == 0 and "from step 6" in done.stdout
    same(log_of(tmp_path), alone[1])


def test_other_data_or_weights_are_another_run(checkpoint, tmp_path):
    folder, data = shutil.copytree(checkpoint, tmp_path / "checkpoint"), tmp_path / "rollouts.jsonl"
    data.write_text(ROLLOUTS.read_text())
    first = train(folder, tmp_path / "1", "--steps", 1, data=data)
    data.write_text(ROLLOUTS.read_text().replace("First", "Now"))
    train(folder, tmp_path / "2", "--steps", 1, data=data)
    data.write_text(ROLLOUTS.read_text())
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 30.0})
    train(folder, tmp_path / "3", "--steps", 1, data=data)
    change_tensor(folder, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    train(folder, tmp_path / "4", "--steps", 1, data=data)
    names = {name: {path.name for path in tmp_path.glob(name)} for name in ("*/checkpoint-*", "*/cache/*")}
    assert [len(some) for some in names.values()] == [4, 4]
    assert abs(first[0]["logratio_correct"]) < 1e-4


def test_a_prompt_of_no_token_is_named(checkpoint, tmp_path):
    lines = ROLLOUTS.read_text().splitlines()
    data = write(tmp_path / "rollouts.jsonl", *lines, {"prompt": "", "completion": "1", "label": True})
    done = run_module("train", "--init", checkpoint, "--data", data, "--out", tmp_path, *QUICK)
    assert done.returncode == 2
    assert f"{data}: 1 of 33 lines are bad: line 33: a prompt of no token" in done.stderr


def test_the_end_is_trained_once(checkpoint, tmp_path):
    lines = [json.loads(line) for line in ROLLOUTS.read_text().splitlines()]
    ended = [{**line, "completion": line["completion"] + "<|im_end|>"} for line in lines]
    cut = [{**line, "finished": False} for line in lines]
    tokens = [data_of(checkpoint, write(tmp_path / "rows.jsonl", *rows)).length.sum() for rows in (lines, ended, cut)]
    assert tokens[0] == tokens[1] == tokens[2] + 32


def test_plots_draws_the_log(checkpoint, alone, finished, tmp_path):
    plots.run([str(alone[0]), "--to", str(tmp_path)])
    assert (tmp_path / "dynamics.png").exists()
    claims.run([str(alone[0])])
    assert "8 prompts × 4 rollouts" in (alone[0] / "results.md").read_text()
    toy = next(finished[0].glob("fpa-*"))
    both = shutil.copytree(alone[0], tmp_path / "both")
    shutil.copytree(toy, both / toy.name)
    plots.run([str(both), "--to", str(tmp_path)])
    train(checkpoint, tmp_path / "off_rl", "--loss", "off_rl")  # whose rollouts no overlap was measured of
    plots.run([str(tmp_path / "off_rl"), "--to", str(tmp_path)])


BAD_COMMANDS = {
    "--loss grpo": "grpo samples at every step",
    "--loss dpo grpo": "grpo samples at every step",
    "--eval-samples 49": "argument --eval-samples: must be a whole number from 1 to 48",
    "--loss sft --lam 1": "argument --lam: sft has none",
    "--loss off_rl --dapo": "unrecognized arguments: --dapo",
    "--micro-batch 3": "argument --micro-batch: must be even",
    "--micro-batch 16 --batch-size 8": "divide --batch-size 8",
    "--lr 0": "argument --lr: must be a number above 0 and at most 1",
    "--init nowhere/at all": "nowhere/at all: no such folder or file, nor from the hub",
    "--data nowhere.jsonl": "nowhere.jsonl: No such file",
    "--max-length 3": "32 of 32 lines are bad: line 1: ",
    "--max-length 3 --skip-bad-lines": "32 of 32 lines are bad: line 1: ",
    "--skip-nonfinite x": "argument --skip-nonfinite: must be a whole number",
    "--save-every 0": "argument --save-every: must be a whole number",
    "--steps 1000000000": "argument --steps: times --batch-size must be at most 100,000,000",
    "--lr 1e300": "argument --lr: must be a number above 0 and at most 1",
}


def test_bad_lines_are_left_out_if_asked(checkpoint, alone, tmp_path):
    lines = ROLLOUTS.read_text().splitlines()
    data = write(tmp_path / "rollouts.jsonl", "{", *lines[:5], {"prompt": "1"}, *lines[5:])
    flags = ["--init", checkpoint, "--data", data, *QUICK]
    refused = run_module("train", *flags, "--out", tmp_path / "refused")
    said = f"{data}: 2 of 34 lines are bad: line 1: not JSON"
    assert refused.returncode == 2 and said in refused.stderr and not list(tmp_path.glob("refused/*/*"))
    done = run_module("train", *flags, "--skip-bad-lines", "--out", tmp_path / "runs")
    assert done.returncode == 0 and done.stdout.count(said) == 1
    same(log_of(tmp_path / "runs"), alone[1])


@pytest.mark.parametrize("what", ["loss nan, gradient norm nan", "gradient norm nan"])
def test_a_step_that_is_not_finite_stops_or_is_skipped(what, checkpoint, tmp_path, monkeypatch):
    original = full_scale.train.objective

    def broken(batch, *words):
        loss, coefficient = original(batch, *words)
        if next(calls) in (4, 5):  # micro-batches of the second step
            loss = loss * math.nan if what.startswith("loss") else loss + (loss - loss).sqrt()  # whose gradient is not finite
        return loss, coefficient

    monkeypatch.setattr(full_scale.train, "objective", broken)
    flags = ["--init", checkpoint, "--data", ROLLOUTS, *QUICK, "--out"]
    calls = iter(range(10**6))
    done = run_module("train", *flags, tmp_path / "stopped")
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert re.search(f"step 2: (loss -?[0-9.e-]+, )?{what};", done.stderr) and "problem ids of its batch: [" in done.stderr
    calls = iter(range(10**6))
    done = run_module("train", *flags, tmp_path / "skipped", "--skip-nonfinite", 1)
    assert done.returncode == 0 and [row["skipped"] for row in log_of(tmp_path / "skipped")][:3] == [0, 0, 1]
    assert all(t.isfinite().all() for t in load_file(next(tmp_path.glob("skipped/*/model/model.safetensors"))).values())


def test_a_second_training_of_a_run_is_refused(checkpoint, interrupted, tmp_path):
    out = shutil.copytree(interrupted, tmp_path / "out")
    (folder,) = out.glob("*-fpa-*")
    with files.locked(out / "cache" / f"{folder.name}.lock", "it"):
        done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", out, *QUICK)
    assert done.returncode == 2 and f"is being worked on by process {os.getpid()}" in done.stderr


def test_a_reference_that_another_command_computes_is_waited_for(checkpoint, tmp_path, monkeypatch):
    words = ["train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, "--steps", 1]
    assert run_module(*words).returncode == 0
    (cache,) = tmp_path.glob("cache/reference-*")
    held, waiting = threading.Event(), threading.Event()

    def hold():
        with files.locked(cache.with_suffix(".lock"), cache):
            held.set()
            assert waiting.wait(60)

    monkeypatch.setattr(files, "print", lambda text: print(text) or waiting.set(), raising=False)
    with ThreadPoolExecutor(1) as other:
        holding = other.submit(hold)
        assert held.wait(60)
        done = run_module(*words, "--seed", 1)
        holding.result()
    assert done.returncode == 0
    first, second = [line for line in done.stdout.splitlines() if "reference" in line][:2]
    assert first.startswith("waiting: ") and second.startswith("reference     cached")


def test_an_interrupted_references_files_are_removed(checkpoint, tmp_path):
    words = ["train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, "--steps", 1, "--no-save-model"]
    assert run_module(*words).returncode == 0
    (cache,) = tmp_path.glob("cache/reference-*")
    (cache / "sums.safetensors").unlink()
    stale = shutil.copy(cache / "hidden-000-00000.safetensors", cache / "hidden-001-00000.safetensors")  # no checksum yet
    for seed in (1, 2):
        done = run_module(*words, "--seed", seed)
        assert done.returncode == 0, done.stderr
    assert not stale.exists() and "reference     cached" in done.stdout


def test_a_damaged_reference_is_one_line(checkpoint, tmp_path):
    train(checkpoint, tmp_path, "--steps", 1)
    shutil.rmtree(next(tmp_path.glob("*-fpa-*")))
    hidden = next(tmp_path.glob("cache/*/hidden-*.safetensors"))
    content = bytearray(hidden.read_bytes())
    content[-100] ^= 1
    for damage in (lambda: hidden.write_bytes(content), hidden.unlink):
        damage()
        done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, "--steps", 1)
        assert done.returncode == 2 and str(hidden) in done.stderr and done.stderr.count("\n") == 1


def test_a_full_disk_leaves_the_last_checkpoint(checkpoint, alone, tmp_path, monkeypatch):
    """No file may grow beyond 150 kB, and a checkpoint does."""
    with monkeypatch.context() as patch:
        kill_at(patch, lambda: saved_step(tmp_path) == 2)
        interrupt(checkpoint, tmp_path)
    flags = ["--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK]
    command = [sys.executable, "-m", "full_scale.train", *map(str, flags)]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (150_000, 150_000))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"error: {tmp_path}" in done.stderr and "checkpoint.part: " in done.stderr and "File too large" in done.stderr
    assert saved_step(tmp_path) == 2
    assert "from step 2" in run_module("train", *flags).stdout
    assert_logs_agree(log_of(tmp_path), alone[1], rtol=1e-6)


def test_a_disk_too_small_for_the_reference_is_one_line(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    needed = data_of(checkpoint).length.sum().item() * load_pretrained(checkpoint)[0].config.d_model * 4  # bytes of float32
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK)
    assert done.returncode == 2
    assert "the reference takes 0.0 GB, and 0.0 GB are free" in done.stderr
    assert not list(tmp_path.glob("cache/*/*"))
    assert train(checkpoint, tmp_path, "--loss", "off_rl", "--steps", 1)  # needs none


@pytest.mark.parametrize(("flags", "message"), BAD_COMMANDS.items(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_line(flags, message, checkpoint, tmp_path):
    words = flags.replace("nowhere/at all", "nowhere/at~all").split()
    words = [word.replace("~", " ") for word in words]
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
