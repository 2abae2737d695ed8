"""train.py: the real command on a tiny setting, its files, its caches, its refusals."""

import argparse
import csv
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import losses
import plots
import train
from losses import LOSSES
from plumbing import batches, files, flags, keeper, log
from plumbing.log import COLUMNS
from study import results
from toy_math import rollouts, stages
from toy_math.problems import read_problem, verify
from toy_math.rollouts import read_rows

# One operation, so that a base model of a few seconds already gets answers right and wrong.
TINY = "--task habit --ops 1 --base-steps 600 --slip 0.3 --prompts 24 --rollouts 4 --steps 10 --eval-every 5".split()
TINY += "--batch-size 8 --device cpu".split()


def edit_cache(out, change):
    """Change the cached rollouts' text, and their checksum with it."""
    (path,) = (out / "cache").glob("rollouts-*.jsonl")
    path.write_text(change(path.read_text()))
    files.write_beside(path, {k: v for k, v in files.read_json(path.with_suffix(".json")).items() if k != "sha256"})


def command(*words, program="train.py"):
    """The real command in a process of its own."""
    return subprocess.run([sys.executable, program, *map(str, words)], capture_output=True, text=True)


def refusal(run, words, capsys):
    """Exit code and stderr of a command that refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        run([str(word) for word in words])
    return stop.value.code, capsys.readouterr().err


def folders(out, prefix=""):
    return sorted(path for path in out.iterdir() if (path / "log.csv").exists() and path.name.startswith(prefix))


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(folder)]


def test_a_ten_step_run_writes_its_files_and_columns(finished):
    out, printed = finished
    assert len(folders(out)) == 2
    for folder in folders(out):
        assert {"config.json", "log.csv", "model.safetensors", "samples.txt"} == {path.name for path in folder.iterdir()}
        rows = read_log(folder)
        assert list(rows[0]) == COLUMNS and [int(row["step"]) for row in rows] == [0, 5, 10]
        assert all(0 <= float(row["accuracy"]) <= 1 and 0 < float(row["pi_incorrect"]) <= 1 for row in rows)
        assert float(rows[0]["logratio_correct"]) == pytest.approx(0, abs=1e-4)  # the run starts at the reference policy
        assert (
            rows[0]["loss"] == "nan"
            and float(rows[1]["grad_norm"]) > 0
            and int(rows[2]["tokens_trained"]) > int(rows[1]["tokens_trained"]) > 0
        )
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == stages.GPT(stages.CONFIG).state_dict().keys()
        assert json.loads((folder / "config.json").read_text())["steps"] == 10
        samples = (folder / "samples.txt").read_text()
        assert samples.count("right  ") == 5 and samples.count("wrong  ") == 5 and samples in printed
    assert "step    10/10" in printed and "ETA" in printed
    for name in ("drag", "dynamics"):
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.part"))


def test_the_two_losses_train_differently_from_one_start(finished):
    off_rl, fpa = read_log(folders(finished[0], "off_rl")[0]), read_log(folders(finished[0], "fpa")[0])
    assert off_rl[0]["accuracy"] == fpa[0]["accuracy"] and off_rl[2]["logratio_incorrect"] != fpa[2]["logratio_incorrect"]
    assert off_rl[2]["pihat_incorrect"] == off_rl[2]["pi_incorrect"] and fpa[2]["pihat_incorrect"] != fpa[2]["pi_incorrect"]


def test_rollouts_are_readable_json_lines(finished):
    (path,) = (finished[0] / "cache").glob("rollouts-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert (
        len(rows) == 24 * 4
        and {type(row["label"]) for row in rows} == {bool}
        and {row["label"] for row in rows} == {True, False}
    )
    assert all(row["prompt"].endswith("?") and isinstance(row["completion"], str) for row in rows)
    assert len({row["problem_id"] for row in rows}) == 24


def test_a_finished_run_is_not_repeated_and_force_gives_the_same_log(finished, capsys):
    out, _ = finished
    (folder,) = folders(out, "fpa")
    before, changed = without_seconds(folder), (folder / "log.csv").stat().st_mtime_ns
    train.run(["--loss", "fpa", *TINY, "--out", str(out)])
    assert f"already finished: {folder}" in capsys.readouterr().out
    assert (folder / "log.csv").stat().st_mtime_ns == changed
    weights = load_file(folder / "model.safetensors")
    train.run(["--loss", "fpa", *TINY, "--out", str(out), "--force"])
    assert "cached" in capsys.readouterr().out and (folder / "log.csv").stat().st_mtime_ns > changed
    assert without_seconds(folder) == before
    assert all(torch.equal(weights[name], weight) for name, weight in load_file(folder / "model.safetensors").items())


def tiny_world(finished, tmp_path):
    """The World that the `finished` runs started from."""
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    return stages.prepare(train.parse_args([*TINY, "--out", str(tmp_path)]), 0, 24)


@pytest.mark.parametrize("loss", ["off_rl", "fpa"])
def test_the_loop_is_a_plain_one_over_the_copyable_losses(loss, finished, tmp_path):
    """--loss fpa against fpa_loss on logits of whole sequences, step after step."""
    world, (folder,) = tiny_world(finished, tmp_path), folders(finished[0], loss)
    data, model = world.rollouts, stages.GPT(stages.CONFIG)
    model.load_state_dict(world.base.state_dict())
    mask = torch.cat([torch.zeros(len(data), data.start, dtype=torch.bool), data.mask], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for rows in batches.batch_order(data.reward, 10, 8, 0):
        logits, tokens, scored, reward = model(data.inputs[rows]), data.inputs[rows], mask[rows], data.reward[rows]
        with torch.no_grad():
            ref_logits = world.base(tokens)
        plain = losses.off_rl_loss(logits, tokens, scored, reward)
        value = losses.fpa_loss(logits, ref_logits, tokens, scored, reward, lam=2.0) if loss == "fpa" else plain
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    trained, base = load_file(folder / "model.safetensors"), world.base.state_dict()
    moved = max((trained[name] - base[name]).abs().max().item() for name in trained)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=0.02 * moved)


def test_kto_gets_its_z0_from_the_policy_and_the_base_model(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "VALIDATION_PROBLEMS", 8)
    monkeypatch.setattr(stages, "TEST_PROBLEMS", 8)
    moved, taken = [], []

    def z0(model, reference, b):
        ours, theirs = (policy(b.inputs, b.start) for policy in (model, reference))
        torch.testing.assert_close(theirs, b.ref_logits, rtol=1e-4, atol=1e-4)
        moved.append((ours - theirs).abs().max().item())
        return torch.tensor(0.7)

    @functools.wraps(losses.kto)
    def kto(logratio, reward, z0, beta=0.1):
        taken.append(z0.item())
        return losses.kto(logratio, reward, z0, beta)

    monkeypatch.setattr(train, "kto_z0", z0)
    monkeypatch.setitem(losses.LOSSES, "kto", dataclasses.replace(losses.LOSSES["kto"], function=kto))
    run_with_cache(finished, tmp_path, "--loss", "kto", "--steps", "3")
    assert taken == [pytest.approx(0.7)] * 3 and moved[0] < 1e-4 < moved[-1]


def test_percentiles_are_those_of_the_monitored_rows(finished, tmp_path):
    world, (folder,) = tiny_world(finished, tmp_path), folders(finished[0], "fpa")
    data, model = world.rollouts, stages.GPT(stages.CONFIG)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    mask = torch.cat([torch.zeros(len(data), data.start, dtype=torch.bool), data.mask], dim=1)
    with torch.no_grad():
        logits, ref_logits = model(data.inputs), world.base(data.inputs)
    policies = logits, ref_logits, 3 * logits - 2 * ref_logits  # λ = 2
    present, ref, future = (losses.token_logps(h, data.inputs, mask).sum(-1) for h in policies)
    pi, pihat = ((logp_sum / mask.sum(-1)).exp().numpy() for logp_sum in (present, future))
    logratio, reward = (present - ref).numpy(), data.reward.numpy()  # all rows: of each kind there are fewer than MONITORED
    assert max((reward > 0).sum(), (reward < 0).sum()) < train.MONITORED
    first, last = read_log(folder)[0], read_log(folder)[-1]
    for kind, members in {"correct": reward > 0, "incorrect": reward < 0}.items():
        rows = logratio[members]
        for percent in (5, 25, 50, 75, 95):
            logged = float(last[f"logratio_{kind}_p{percent}"])
            assert logged == pytest.approx(np.percentile(rows, percent), rel=1e-3, abs=1e-4)
            assert float(first[f"logratio_{kind}_p{percent}"]) == pytest.approx(0, abs=1e-4)
        assert float(last[f"logratio_{kind}_below_0"]) == pytest.approx((rows < 0).mean(), abs=1e-6)
        assert float(last[f"logratio_{kind}"]) == pytest.approx(rows.mean(), rel=1e-3)
        assert float(last[f"pi_{kind}"]) == pytest.approx(pi[members].mean(), rel=1e-4)
        assert float(last[f"pihat_{kind}"]) == pytest.approx(pihat[members].mean(), rel=1e-4)
    assert 0 < float(last["logratio_incorrect_below_0"]) < 1 and abs(pihat / pi - 1).max() > 0.01


def test_test_problems_are_measured_in_the_first_and_the_last_row_only(finished, tmp_path):
    world = tiny_world(finished, tmp_path)
    names = [name for name in COLUMNS if name.startswith("test_")]
    assert names == [f"test_{name}" for name in "accuracy accuracy_0.7 accuracy_greedy pass@4 pass@16 entropy".split()]
    for folder in folders(finished[0]):
        rows = read_log(folder)
        for row, there in zip(rows, (True, False, True), strict=True):
            assert [row[name] != "nan" for name in names] == [there] * len(names)
            assert "nan" not in [row[name.removeprefix("test_")] for name in names]
        model = stages.GPT(stages.CONFIG)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        for column, problems in (("accuracy_greedy", world.validation), ("test_accuracy_greedy", world.test)):
            answers = rollouts.sample(model, problems, 1, 0.0, torch.Generator())
            share = sum(verdict.correct for *_, verdict in answers) / len(problems)
            assert float(rows[-1][column]) == pytest.approx(share, abs=1e-6)
        prompts = [line.split()[1] for line in (folder / "samples.txt").read_text().splitlines()]
        assert {read_problem(prompt).split for prompt in prompts} == {"test"}


def test_best_is_that_of_the_validation_problems(finished):
    (folder,) = folders(finished[0], "fpa")
    run = results.read_run(folder)
    run.log["accuracy"], run.log["test_accuracy"] = np.array([0.1, 0.3, 0.2]), np.array([0.9, np.nan, 0.8])
    assert results.summary([run]).splitlines()[2].split()[-5:-2] == ["0.100", "0.300", "0.200"]


def test_training_moves_the_way_the_reward_says(finished):
    for folder in folders(finished[0]):
        last = read_log(folder)[-1]
        assert float(last["logratio_correct"]) > float(last["logratio_incorrect"]) and float(last["logratio_incorrect"]) < 0


def run_with_cache(finished, tmp_path, *words):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    train.run([*TINY, *words, "--out", str(tmp_path)])
    return folders(tmp_path)


def online_batch(monkeypatch, texts, dapo, group=4):
    """The batch of two problems whose sampled answers are `texts`; "0" is the incorrect one."""
    problems = stages.draw_problems(2, 1, "train", random.Random(0))
    rows = [
        {"prompt": problems[i // group].prompt, "completion": text, "label": text != "0", "finished": True}
        for i, text in enumerate(texts)
    ]
    monkeypatch.setattr(rollouts, "sample", lambda *_: None)
    monkeypatch.setattr(rollouts, "rollout_rows", lambda _: rows)
    run = SimpleNamespace(rollouts=group, dapo=dapo, loss="grpo")
    b = rollouts.sample_groups(None, problems, run, torch.Generator().manual_seed(0))
    return b, run, rollouts.pack(rows)


def test_grpo_is_the_loss_on_its_own_samples(monkeypatch):
    torch.manual_seed(0)
    model = stages.GPT(stages.CONFIG)
    texts = ["1+1=2;#2", "0", "0", "0"] + ["0"] * 4  # the second problem's samples all have one reward
    advantage = torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]) / (1 + 1e-4)  # of rewards of +-1, whose std is 1
    lengths = torch.tensor([9, 2, 2, 2, 2, 2, 2, 2])
    for dapo, count in ((False, 8), (True, 4)):
        b, run, (tokens, mask) = online_batch(monkeypatch, texts, dapo)
        train.add_logps(model, b)
        ours, coefficient = losses.objective(b, run)
        weights = advantage / (lengths[:4].sum() if dapo else 8 * lengths)
        loss = -(weights * losses.token_logps(model(tokens), tokens, mask).sum(-1)).sum()
        for got, expected in zip(*(torch.autograd.grad(value, model.parameters()) for value in (ours, loss))):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
        numbers = log.step_numbers(b, ours, torch.tensor(1.0), coefficient)
        assert numbers["tokens_trained"] == lengths[:count].sum() and numbers["tokens_sampled"] == lengths.sum()
        assert numbers["coefficient_correct"] == pytest.approx(1.5 * (9 / (15 / 4) if dapo else 1), rel=1e-3)
    b, *_ = online_batch(monkeypatch, ["0"] * 8, True)
    assert not len(b.reward) and log.step_numbers(b)["tokens_sampled"] == 16 and log.step_numbers(b)["tokens_trained"] == 0


def test_pairs_are_of_one_problem_and_walk_through_the_incorrect_rows():
    reward = torch.tensor([1.0, -1, -1, 1, 1, -1, -1, -1])
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])  # problem 2 has no correct rollout
    order = batches.pair_order(reward, ids, 30, 4, seed=0)
    correct, incorrect = order.chunk(2, dim=1)
    assert order.shape == (30, 4) and (reward[correct] > 0).all() and (reward[incorrect] < 0).all()
    assert torch.equal(ids[correct], ids[incorrect])
    assert torch.bincount(incorrect.flatten(), minlength=8).tolist() == [0, 20, 20, 0, 0, 20, 0, 0]
    assert set(correct.flatten().tolist()) == {0, 3, 4}
    assert not torch.equal(batches.pair_order(reward, ids, 30, 4, seed=1), order)


@pytest.mark.parametrize("words", ["--loss dpo", "--loss off_rl --diagnostics"])
def test_no_pairs_is_one_line(words, finished, tmp_path, capsys):
    def by_problem(text):  # a problem's rollouts are all correct, or none is
        rows = [json.loads(line) for line in text.splitlines()]
        return "".join(json.dumps({**row, "label": row["problem_id"] % 2 == 0}) + "\n" for row in rows)

    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    edit_cache(tmp_path, by_problem)
    code, error = refusal(train.run, [*words.split(), *TINY, "--out", tmp_path], capsys)
    assert code == 2 and "no pairs" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def random_rollouts(count, ops):
    """Two models of random weights, and rollouts whose reference is the second one."""
    torch.manual_seed(0)
    model, reference = stages.GPT(stages.CONFIG), stages.GPT(stages.CONFIG)
    inputs, mask = rollouts.pack(rollouts.corpus_rows(count, ops, 0.5, random.Random(0)))
    start = mask[0].int().argmax().item() - 1
    with torch.no_grad():
        ref_logits = reference(inputs)
    return model, reference, stages.Rollouts(inputs, mask, start, ref_logits[:, start:]), mask


def test_z0_of_kto_is_of_mismatched_prompts():
    model, reference, rows, mask = random_rollouts(5, 2)
    inputs, start, total = rows.inputs, rows.start, 0.0
    before = inputs.clone()
    for row, other in ((3, 4), (0, 3), (4, 0)):
        mixed = torch.cat([inputs[other, : start + 1], inputs[row, start + 1 :]])[None]
        with torch.no_grad():
            total += sum(
                s * losses.token_logps(m(mixed), mixed, mask[row][None]).sum() for s, m in ((1, model), (-1, reference))
            )
    batch = rows[torch.tensor([3, 0, 4])]
    assert train.kto_z0(model, reference, batch).item() == pytest.approx(max(total.item() / 3, 0), rel=1e-4)
    assert train.kto_z0(reference, model, batch).item() == pytest.approx(max(-total.item() / 3, 0), rel=1e-4)
    assert torch.equal(inputs, before) and torch.equal(batch.inputs, before[[3, 0, 4]]) and total != 0


def test_scores_are_those_of_the_whole_sequence():
    model, reference, rows, mask = random_rollouts(6, 3)
    some = torch.tensor([4, 1, 2])
    with torch.no_grad():
        logits, ref_logits = model(rows.inputs), reference(rows.inputs)
        ref_logp_sum = losses.token_logps(ref_logits, rows.inputs, mask).sum(-1)
        for lam in (0, 2):
            b = rows[some]
            train.add_logps(model, b, lam)
            present, future = (
                losses.token_logps(h, rows.inputs, mask).sum(-1) for h in (logits, (1 + lam) * logits - lam * ref_logits)
            )
            for got, whole in ((b.logp_sum, present), (b.future_logp_sum, future), (b.logratio, present - ref_logp_sum)):
                torch.testing.assert_close(got, whole[some], rtol=1e-4, atol=1e-4)


def test_training_data_start_at_the_first_completion_token(finished, tmp_path):
    world = tiny_world(finished, tmp_path)
    data = world.rollouts
    assert not data.mask[:, 0].any() and data.mask[:, 1].all() and torch.equal(data.tokens, data.inputs[:, data.start :])
    mask = torch.cat([torch.zeros(len(data), data.start, dtype=torch.bool), data.mask], dim=1)
    with torch.no_grad():
        whole = losses.token_logps(world.base(data.inputs), data.inputs, mask).sum(-1)
    torch.testing.assert_close(data.ref_logp_sum, whole, rtol=1e-4, atol=1e-4)
    splits = {"train": (world.problems, 24), "validation": (world.validation, 128), "test": (world.test, 256)}
    for split, (problems, count) in splits.items():
        assert len(set(problems)) == count and {problem.split for problem in problems} == {split}
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert data.reward.tolist() == [1 if row["label"] else -1 for row in rows]
    assert data.clean.tolist() == [row["first_wrong_step"] is None for row in rows]
    assert torch.equal(data.length, data.mask.sum(-1)) and 0 < world.measured["share_correct"] < 1
    for row, mean, value in zip(rows, data.mean_reward.tolist(), data.value.tolist()):  # A*-PO's V*, and the pessimistic loss'
        right = [float(other["label"]) for other in rows if other["problem_id"] == row["problem_id"]]
        assert mean == pytest.approx(2 * np.mean(right) - 1, abs=1e-6)
        assert value == pytest.approx(0.5 * np.log(np.mean(np.exp(np.divide(right, 0.5)))), abs=1e-5)
    assert len(data.mean_reward.unique()) > 2


@pytest.mark.parametrize("flag", ["--ops 2", "--slip 0.2", "--habit 0.5", "--task slips", "--base-steps 7", "--seed 1",
    "--prompts 9", "--rollouts 3"])  # fmt: skip
def test_every_setting_of_a_stage_is_in_its_key(flag, tmp_path):
    plain, changed = (train.parse_args(["--task", "habit", *words, "--out", str(tmp_path)]) for words in ([], flag.split()))
    before, after = (stages.stage_settings(args, args.seed[0], args.prompts[0]) for args in (plain, changed))
    assert before[1] != after[1] and (before[0] != after[0]) == (flag.split()[0] not in ("--prompts", "--rollouts"))


def test_a_stage_is_made_anew_after_another_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    one = stages.digest({}, path)
    path.write_text("two")
    assert stages.digest({}, path) != one


@pytest.mark.parametrize("every", [False, True])
def test_a_rollout_without_a_token_is_left_out(every, finished, tmp_path, monkeypatch):
    """The policy may sample BOS or PAD at once; its mean log-probability would be 0/0."""
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    for path in (tmp_path / "cache").glob("ro*"):
        path.unlink()
    original = stages.sample

    def sample(model, problems, *words):
        sampled = original(model, problems, *words)
        empty = [(problem, "", False, verify(problem, "", False)) for problem, *_ in sampled]
        return empty if every else [empty[0], *sampled[1:]]

    monkeypatch.setattr(stages, "sample", sample)
    if every:
        with pytest.raises(files.UserError, match="no rollout has a token: change --base-steps"):
            stages.prepare(train.parse_args([*TINY, "--out", str(tmp_path)]), 0, 24)
        return
    data = stages.prepare(train.parse_args([*TINY, "--out", str(tmp_path)]), 0, 24).rollouts
    assert len(data) == 24 * 4 - 1 and data.length.min() > 0 and data.ref_logp_sum.isfinite().all()
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    assert len(read_rows(path)) == 24 * 4 - 1


def test_a_stale_reference_is_never_taken_up(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    edit_cache(tmp_path, lambda text: "".join(reversed(text.splitlines(keepends=True))))
    train.run(["--loss", "fpa", *TINY, "--out", str(tmp_path)])
    assert "reference     cached" not in capsys.readouterr().out
    assert float(read_log(folders(tmp_path)[0])[0]["logratio_correct"]) == pytest.approx(0, abs=1e-4)


def names_of(words, tmp_path):
    return [name.rsplit("-", 1)[0] for name in train.run_settings(train.parse_args([*words.split(), "--out", str(tmp_path)]))]


def test_several_values_run_their_product(tmp_path):
    words = "--loss off_rl fpa --lam 0.5 2 --target both incorrect --seed 0 1 --prompts 64 128 --lr 1e-3 1e-4"
    names = names_of(words, tmp_path)
    assert len(names) == len(set(names)) == 8 * (1 + 2 * 2)  # off_rl has neither λ nor target
    assert "fpa-lam0.5-incorrect-prompts128-steps1000-lr0.0001-seed1" in names
    tail = "-prompts1024-steps1000-lr0.0002-seed0"
    assert names_of("--loss off_rl --lam 0 2", tmp_path) == [f"off_rl{tail}", f"fpa-lam2-both{tail}"]
    assert names_of("--loss fpa --lam 0", tmp_path) == [f"off_rl{tail}"]
    assert names_of("--loss topr --lam 0 2", tmp_path) == [f"topr{tail}", f"future_topr-lam2-both{tail}"]
    linear = f"sft{tail}".replace("lr0.0002", "lr0.0002-linear")
    assert names_of("--loss sft --schedule constant linear", tmp_path) == [f"sft{tail}", linear]
    names = [f"dpo-beta0.5{tail}", f"dpo-lam1-both-beta0.5{tail}", f"sft{tail}"]
    assert names_of("--loss dpo sft --lam 0 1 --beta 0.5", tmp_path) == names
    words = "--loss a_star_po pessimistic constant grpo --dapo --shift -1 --weight 0"
    names = ["a_star_po-beta0.001", "pessimistic-beta0.1-shift-1", "constant-weight0", "grpo-dapo"]
    assert names_of(words, tmp_path) == [name + tail for name in names]


def test_the_linear_schedule_falls_evenly_to_zero(finished, tmp_path, monkeypatch):
    rates, optimizers, clip = [], [], train.clip_grad_norm_
    monkeypatch.setattr(train, "adamw", lambda *words: optimizers.append(keeper.adamw(*words)) or optimizers[-1])
    monkeypatch.setattr(
        train, "clip_grad_norm_", lambda *words: rates.append(optimizers[-1].param_groups[0]["lr"]) or clip(*words)
    )
    run_with_cache(finished, tmp_path, "--loss", "sft", "--schedule", "linear", "constant", "--lr", "1e-3", "--jobs", "1")
    assert rates == pytest.approx([1e-3 * (1 - step / 10) for step in range(10)] + [1e-3] * 10)


def test_batches_are_half_correct_and_walk_through_every_row():
    labels = torch.tensor([1.0] * 5 + [-1.0] * 7)
    order = batches.batch_order(labels, 35, 4, seed=0)
    assert order.shape == (35, 4) and (labels[order[:, :2]] > 0).all() and (labels[order[:, 2:]] < 0).all()
    assert torch.bincount(order[:, :2].flatten(), minlength=12)[:5].tolist() == [14] * 5  # 70 draws of 5 rows
    assert torch.bincount(order[:, 2:].flatten(), minlength=12)[5:].tolist() == [10] * 7
    assert torch.equal(batches.batch_order(labels, 20, 4, seed=0), order[:20])  # a longer run begins like a shorter one
    assert not torch.equal(batches.batch_order(labels, 35, 4, seed=1), order)


BAD_FLAGS = [
    ("--loss ppo", "off_rl"),  # the error lists the known losses
    ("--lam -1", "--lam"),
    ("--lam nan", "--lam"),
    ("--lam inf", "--lam"),
    ("--lam two", "--lam"),
    ("--target wrong", "incorrect"),
    ("--steps 0", "--steps"),
    ("--steps -5", "--steps"),
    ("--steps 1.5", "--steps"),
    ("--prompts 0", "--prompts"),
    ("--rollouts -1", "--rollouts"),
    ("--ops 0", "--ops"),
    ("--base-steps 0", "--base-steps"),
    ("--eval-every 0", "--eval-every"),
    ("--batch-size 7", "--batch-size"),
    ("--batch-size 0", "--batch-size"),
    ("--slip 1.5", "--slip"),
    ("--slip nan", "--slip"),
    ("--habit 1.5", "--habit"),
    ("--habit -0.1", "--habit"),
    ("--habit often", "--habit"),
    ("--task foo", "habit, slips"),
    ("--task slips --habit 0.5", "only habit"),
    ("--task habit --habit 0 --slip 0", "no step of the corpus would be wrong"),
    ("--slip 0 --task slips", "no step of the corpus would be wrong"),
    ("--eval-samples 8", "pass@16 needs at least 16, not 8"),
    ("--eval-samples 0", "--eval-samples"),
    ("--eval-ops 0", "--eval-ops"),
    ("--lr 0", "--lr"),
    ("--lr inf", "--lr"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"),
    ("--seed " + "9" * 400, "--seed"),
    ("--eval-temperature 1", "--eval-temperature"),  # there was such a flag
    ("--device tpu", "cpu"),
    ("--nonsense", "--nonsense"),
    ("--loss sft --lam 1", "--lam"),
    ("--loss grpo a_star_po pessimistic --target incorrect", "--target"),
    ("--loss fpa --beta 0.1", "--beta"),
    ("--loss dpo --beta 0", "--beta"),
    ("--loss dpo --beta -0.1", "--beta"),
    ("--loss pessimistic --shift inf", "--shift"),
    ("--loss pessimistic --shift nan", "--shift"),
    ("--loss dpo --shift 1", "--shift"),
    ("--loss dpo --target incorrect", "--target"),  # without --lam it has no future coefficient
    ("--loss off_rl constant --target both", "--target"),
    ("--loss fpa --dapo", "--dapo"),
    ("--loss grpo --rollouts 1", "--rollouts"),
    ("--loss grpo --batch-size 62", "--rollouts"),
    ("--ops 1 --prompts 2300", "2300"),
    ("--steps 1e3", "--steps"),
    ("--steps 2000000", "--steps"),  # times --batch-size
    ("--steps 99999999999", "--steps"),
    ("--prompts 99999999", "--prompts"),
    ("--rollouts 5000", "--rollouts"),
    ("--ops 100000", "--ops"),
    ("--base-steps 1000000", "--base-steps"),
    ("--save-every 0", "--save-every"),
    ("--skip-nonfinite -1", "--skip-nonfinite"),
    ("--jobs -1", "--jobs"),
    ("--jobs many", "--jobs"),
    ("--loss", "--loss"),
    ("--lr", "--lr"),
    ("--lr 1e-3 fast", "--lr"),
    ("--schedule cosine", "--schedule"),
    ("--loss constant --weight -1", "--weight"),
    ("--loss rpo --alpha -1", "--alpha"),
    ("--loss rpo --alpha nan", "--alpha"),
    ("--explain sft", "--explain"),
    ("--explain dpo --alpha 2", "--alpha"),
    ("--lr 1e300", "--lr"),
    ("fpa", "fpa"),  # without its flag
    ("--seed ٣x", "--seed"),
]


@pytest.mark.parametrize("words, culprit", BAD_FLAGS)
def test_bad_flags_are_one_line(words, culprit, tmp_path, capsys):
    code, error = refusal(train.run, [*words.split(), "--out", tmp_path / "out"], capsys)
    assert code == 2 and culprit in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


SPELLINGS = [  # what somebody types first, and what the one line of the answer says
    ("--loss offrl", "did you mean off_rl?"),
    ("--loss A*-PO", "did you mean a_star_po?"),
    ("--loss dpo,fpa", "write dpo fpa"),
    ("--lambda 2", "did you mean --lam?"),
    ("--losss fpa", "did you mean --loss?"),
    ("FPA", "did you mean --loss FPA?"),
    ("--device gpu", "did you mean cuda?"),
    ("--task slip", "did you mean slips?"),
    ("--task Habits", "did you mean habit?"),
    ("--habbit 0.5", "did you mean --habit?"),
    ("--seed 0-4", "write 0 1 2 3 4"),
    ("--seed 0,1", "write 0 1"),
    ("--lr 1e-3,1e-4", "write 1e-3 1e-4"),
    ("--steps 1e3", "write 1000"),
    ("--steps 1,000", "write 1000"),
    ("--prompts 4,096", "write 4096"),
    ("--target both,incorrect", "write both incorrect"),
    ("--explain grpo", "off_rl, fpa"),
    ("--explain fpa --loss dpo", "leave --loss out"),
    ("--out=", "--out"),
    ("--loss dpo --target incorrect", "try: python train.py --loss dpo --target incorrect --out OUT --lam 2"),
    ("--loss grpo --rollouts 1", "try: python train.py --loss grpo --out OUT --rollouts 8"),
]


@pytest.mark.parametrize("words, hint", SPELLINGS)
def test_a_wrong_spelling_gets_the_one_that_works(words, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    code, error = refusal(train.run, [*words.split(), "--out", tmp_path / "out"], capsys)
    assert code == 2 and hint.replace("OUT", str(tmp_path / "out")) in error and error.count("\n") == 1
    if "try: " in error:
        train.parse_args(error.strip().split("try: python train.py ")[1].split())  # it works


@pytest.mark.parametrize("cuda, mps, expected", [(0, 0, "cpu"), (0, 1, "mps"), (1, 0, "cuda"), (1, 1, "cuda")])
def test_auto_takes_a_gpu_where_there_is_one(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert train.parse_args(TINY[:-2]).device == expected and train.parse_args(TINY).device == "cpu"


def test_the_rollouts_are_those_of_the_base_model_at_temperature_1(finished, tmp_path):
    world = tiny_world(finished, tmp_path)
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    again = rollouts.sample(world.base, world.problems, 4, 1.0, batches.seeded("cpu", 0, "rollouts"))
    assert read_rows(path) == [row for row in rollouts.rollout_rows(again) if row["completion"] or row["finished"]]
    spent = world.spent()
    assert spent["sampled"] == sum(len(row["completion"]) + row["finished"] for row in read_rows(path))
    assert spent["seconds"] == world.measured["sampling_seconds"] + world.measured["reference_seconds"]


def test_the_seed_reaches_every_draw():
    """An interval over seeds is one only if the order of the batches and the problems are drawn by the seed."""
    reward, ids = torch.tensor([1.0, -1.0] * 8), torch.arange(16) // 2

    def order(seed, pairs, online):
        run = SimpleNamespace(steps=6, batch_size=8, rollouts=4, seed=seed)
        return batches.draw_order(run, reward, ids, 8, pairs=pairs, online=online)[0]

    for kind in ((False, False), (True, False), (False, True)):
        assert torch.equal(order(1, *kind), order(1, *kind)) and not torch.equal(order(1, *kind), order(2, *kind))
    problems = order(1, False, True)  # two a step, each once before any comes again
    assert problems.shape == (6, 2) and torch.bincount(problems.flatten()[:8], minlength=8).tolist() == [1] * 8
    for split in ("train", "validation", "test"):
        assert set(stages.drawn(32, 6, split, 0)) != set(stages.drawn(32, 6, split, 1))


def test_the_monitored_rows_are_the_first_of_each_kind_in_the_seeds_order(monkeypatch):
    monkeypatch.setattr(train, "MONITORED", 4)
    reward = torch.tensor([1.0, -1.0, -1.0] * 20)
    exam = train.Exam(SimpleNamespace(seed=5), SimpleNamespace(rollouts=SimpleNamespace(reward=reward)))
    assert exam.monitored.tolist() == sorted(batches.batch_order(reward, 1, 8, 5)[0].tolist())


def test_the_eta_is_that_of_the_steps_that_are_left(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log.time, "time", lambda: clock[0])
    kept = log.Log(tmp_path, lambda *_: dict.fromkeys(COLUMNS, 0.0), 10, 5, log.Steps(""))
    for step in (0, 5, 10):
        clock[0] = 20.0 * step
        kept.look(step, None)
    assert [line.split("ETA")[1].strip() for line in capsys.readouterr().out.splitlines()] == ["--:--", "1:40", "0:00"]


def test_the_command_that_works_can_be_pasted():
    parser = flags.command_line("", prog="train.py")
    parser.parse_known_args(["--out", "my runs", "--lam", "0"])
    assert parser.typed("--lam", 2) == "python train.py --out 'my runs' --lam 2"


@pytest.mark.parametrize("words", ["--lam=-1", "--jobs -1", "--lr 1e9", "--steps 1e300", "--seed 5-2", "--lr 1,x", "extra"])
def test_no_hint_is_better_than_one_that_is_refused_again(words, tmp_path, capsys):
    code, error = refusal(train.run, [*words.split(), "--out", tmp_path / "out"], capsys)
    assert code == 2 and "write" not in error and "did you mean" not in error


def test_a_bound_is_at_least_or_above():
    for at_least, above, good, bad in ((1, None, 1.0, 0.9), (None, 3, 3.1, 3.0), (0, 0, 0.1, 0.0), (None, None, -5.0, None)):
        parse = flags.bounded(at_least, above)
        assert parse(str(good)) == good
        if bad is not None:
            with pytest.raises(argparse.ArgumentTypeError, match="must be a finite number (of at least|above)"):
                parse(str(bad))


def test_help_shows_defaults_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        train.run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    shown = ("(default: off_rl fpa)", "(default: 1024)", "(default: 0)", "fpa 2,", "(default: runs)")
    for default in (*shown, "(default: 0.6)", "(default: habit 0.03, slips 0.12)", "(default: --ops)"):
        assert default in text
    assert "None" not in text and "[" not in text.split("options:")[1].replace("[X ...]", "").replace("[N ...]", "").replace(
        "[NAME ...]", ""
    ).replace("[ROWS ...]", "")


def test_loss_names_in_any_case_and_with_hyphens():
    words = "--loss FPA Off-RL off_rl SimPER a-star-po --target Incorrect --explain Off-RL".split()
    assert train.parse_args(words[:6]).loss == ["fpa", "off_rl", "off_rl", "simper", "a_star_po"]
    args = train.parse_args(words[6:])
    assert args.explain == "off_rl" and args.target == ["incorrect"]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--loss fpa --lam 0", ["--loss fpa with --lam 0 is off_rl"]),
        ("--loss off_rl --lam 0 2", ["--loss off_rl with --lam 2 is fpa"]),
        ("--loss off_rl fpa --lam 2", []),
        ("--loss dpo --lam 0 2", ["--loss dpo with --lam 2 is its FPA form"]),
        ("--loss topr future_topr kto", []),
        ("", []),
    ],
)
def test_what_is_reinterpreted_is_said(words, said):
    assert flags.reinterpreted(train.parse_args(words.split()), LOSSES, losses.HYPERPARAMETERS) == said


def test_a_task_sets_the_error_rates():
    def rates(words):
        args = train.parse_args(words.split())
        return args.task, args.habit, args.slip

    assert rates("--task habit") == ("habit", 0.6, 0.03) and rates("--task slips") == ("slips", 0, 0.12)
    assert rates("--task habit --habit 0.5 --slip 0") == ("habit", 0.5, 0)
    assert rates("--task slips --slip 0.3") == ("slips", 0, 0.3) and rates("") == rates("--task habit")


def test_the_flags_of_an_evaluation_change_the_run_but_no_stage():
    def settings(words):
        args = train.parse_args(words.split())
        return stages.stage_settings(args, 0, 1024), list(train.run_settings(args))

    stage, names = settings("--loss fpa")
    for words in ("--eval-ops 8", "--eval-samples 32", "--eval-every 77"):
        assert settings(f"--loss fpa {words}")[0] == stage and settings(f"--loss fpa {words}")[1] != names
    assert settings("--loss fpa --eval-ops 6") == (stage, names)


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.parse_args(["--out=~/x"]).out == tmp_path / "x"


def test_a_setting_that_a_method_does_not_use_is_absent():
    def settings(*words):
        (one,) = train.run_settings(train.parse_args(words)).values()
        return one

    method = {name: settings("--loss", name).keys() & {*losses.HYPERPARAMETERS} for name in LOSSES}
    assert method["off_rl"] == method["sft"] == method["dpo"] - {"beta"} == set()
    assert method["fpa"] == {"lam", "target"} and method["rpo"] == {"beta", "alpha"} and method["grpo"] == {"dapo"}
    assert settings("--loss", "dpo", "--lam", "2").keys() & {*losses.HYPERPARAMETERS} == {"lam", "target", "beta"}


def test_output_cut_off_by_head_is_no_error(finished):
    out, _ = finished
    words = [sys.executable, "train.py", "--loss", "off_rl", "fpa", "--lam", "2", *TINY, "--out", str(out)]
    done = subprocess.run(f"{' '.join(words)} | head -n 1", shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("already finished") and not done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path, capsys):
    code, error = refusal(train.run, ["--device", "cuda", "--out", tmp_path], capsys)
    assert code == 2 and "no cuda device" in error


def test_an_output_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, error = refusal(train.run, [*TINY, "--out", out], capsys)
        assert code == 2 and error.count("\n") == 1 and str(tmp_path / "file") in error
    if os.path.isdir("/proc"):  # where nobody, not even root, can make a folder
        code, error = refusal(train.run, [*TINY, "--out", "/proc/runs"], capsys)
        assert code == 2 and error.count("\n") == 1 and "/proc" in error
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["a\nb", "x" * 300, "\udcff"])
def test_an_output_folder_that_no_line_can_name(name, tmp_path, capsys):
    for run, words in ((train.run, ["--out", tmp_path / name]), (plots.run, [tmp_path / name])):
        code, error = refusal(run, words, capsys)
        assert code == 2 and error.count("\n") == 1 and repr(name)[1:-1] in error
    assert not list(tmp_path.iterdir())


def test_minus_zero_is_zero():
    assert str(train.parse_args(["--lam", "0", "-0.0"]).lam) == "[0.0, 0.0]"


@pytest.mark.parametrize("label, missing", [(True, "incorrect"), (False, "correct")])
def test_rollouts_of_one_kind_only(label, missing, finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    edit_cache(tmp_path, lambda text: text.replace('"label": ' + json.dumps(not label), '"label": ' + json.dumps(label)))
    code, error = refusal(train.run, ["--loss", "fpa", *TINY, "--out", tmp_path], capsys)
    assert code == 2 and f"is {missing}" in error and error.count("\n") == 1
    assert not folders(tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run(finished, tmp_path, monkeypatch):
    out = tmp_path / "runs"
    shutil.copytree(finished[0] / "cache", out / "cache")
    calls = []

    def breaks_at_step_8(logp_sum, length, reward):
        calls.append(1)
        return logp_sum * (float("nan") if len(calls) == 8 else 1.0), reward

    monkeypatch.setitem(LOSSES, "sft", dataclasses.replace(LOSSES["sft"], function=breaks_at_step_8))
    with pytest.raises(files.NonFiniteError, match=r"step 8: loss nan.*problem ids.*\[\d+.*the last checkpoint"):
        train.main(train.parse_args(["--loss", "sft", *TINY, "--save-every", "4", "--out", str(out)]))
    (folder,) = folders(out)
    assert [row["step"] for row in read_log(folder)] == ["0", "5"]
    saved = load_file(folder / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for name, tensor in saved.items() if "coefficient" not in name)
    assert not (folder / "model.safetensors").exists() and not (folder / "samples.txt").exists()


def test_adamw_takes_a_common_scale_out():
    """What README says of the weights: only their ratio counts, as long as no gradient is clipped."""
    weights = []
    for scale in (1.0, 0.01):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 3)
        optimizer, start = keeper.adamw(model.parameters(), 0.01), model.weight.detach().clone()
        for _ in range(20):
            loss = scale * (model(torch.randn(16, 8)).tanh() ** 2).mean()
            assert keeper.update(model, optimizer, loss) < 1  # below the clip
        weights.append(model.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    assert (weights[0] - start).abs().max() > 0.05


def test_the_base_model_is_trained_by_adamw_with_a_warm_up_and_a_cosine(tmp_path):
    """stages.base_model against a plain loop over torch.optim.AdamW."""
    args = train.parse_args([*TINY, "--base-steps", "40", "--out", str(tmp_path)])
    made = stages.base_model(args, 3, stages.stage_settings(args, 3, 24)[0], tmp_path / "base.safetensors")
    torch.manual_seed(3)
    model = stages.GPT(stages.CONFIG)
    rows = rollouts.corpus_rows(40 * 32, args.ops, args.slip, random.Random("3/corpus"), args.habit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    for step, (tokens, mask) in enumerate(zip(*(x.split(32) for x in rollouts.pack(rows)))):
        rising, falling = (step + 1) / 5, (1 + math.cos(math.pi * step / 40)) / 2  # a tenth of the steps warms up
        optimizer.param_groups[0]["lr"] = 3e-3 * min(rising, falling)
        optimizer.zero_grad()
        (-losses.token_logps(model(tokens), tokens, mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for ours, theirs in zip(made.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
