"""train.py: the real command on a tiny setting, its files, its caches, its refusals."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import files
import losses
import options
import plots
import results
import stages
import train
from toy_math.problems import verify
from toy_math.rollouts import read_rows

# One operation, so that a base model of a few seconds already gets answers right and wrong.
TINY = "--ops 1 --base-steps 300 --slip 0.3 --prompts 24 --rollouts 4 --steps 10 --eval-every 5 --batch-size 8".split()
TINY += ["--device", "cpu"]


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
        assert list(rows[0]) == train.COLUMNS and [int(row["step"]) for row in rows] == [0, 5, 10]
        assert all(0 <= float(row["accuracy"]) <= 1 and 0 < float(row["pi_incorrect"]) <= 1 for row in rows)
        assert float(rows[0]["logratio_correct"]) == pytest.approx(0, abs=1e-4)  # the run starts at the reference policy
        assert (
            rows[0]["loss"] == "nan"
            and float(rows[1]["grad_norm"]) > 0
            and int(rows[2]["tokens_trained"]) > int(rows[1]["tokens_trained"]) > 0
        )
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == train.GPT(train.CONFIG).state_dict().keys()
        assert json.loads((folder / "config.json").read_text())["steps"] == 10
        samples = (folder / "samples.txt").read_text()
        assert samples.count("right  ") == 5 and samples.count("wrong  ") == 5 and samples in printed
    assert "step    10/10" in printed and "ETA" in printed
    for name in ("dynamics", "prolonged"):
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


@pytest.mark.slow
def test_the_whole_pipeline_repeats_with_its_seed(finished, tmp_path):
    train.run(["--loss", "fpa", *TINY, "--out", str(tmp_path)])
    assert without_seconds(folders(tmp_path, "fpa")[0]) == without_seconds(folders(finished[0], "fpa")[0])


def test_training_moves_the_way_the_reward_says(finished):
    for folder in folders(finished[0]):
        last = read_log(folder)[-1]
        assert float(last["logratio_correct"]) > float(last["logratio_incorrect"]) and float(last["logratio_incorrect"]) < 0


def run_with_cache(finished, tmp_path, *words):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    train.run([*TINY, *words, "--out", str(tmp_path)])
    return folders(tmp_path)


@pytest.mark.slow
def test_targets_in_the_real_loop(finished, tmp_path):
    words = ["--loss", "fpa", "--lam", "8", "--target", "both", "correct", "incorrect"]
    logs = {f.name.split("-prompts")[0]: read_log(f)[-1] for f in run_with_cache(finished, tmp_path, *words)}
    assert len({logs[f"fpa-lam8-{target}"]["logratio_incorrect"] for target in ("both", "correct", "incorrect")}) == 3


@pytest.mark.slow
def test_every_loss_in_the_real_loop(finished, tmp_path):
    assert list(train.LOSSES) == list(results.NAMES)
    words = ["--loss", *train.LOSSES, "--lam", "3", "--jobs", "1", "--eval-every", "10", "--prompts", "24"]
    logs = {f.name.split("-prompts")[0]: read_log(f)[-1] for f in run_with_cache(finished, tmp_path, *words)}
    names = ["off_rl", "fpa-lam3-both", "simper-lam3-both", "dpo-lam3-both-beta0.1", "rpo-lam3-both-beta0.1-alpha1", "sft"]
    names += ["kto-lam3-both-beta0.1", "a_star_po-beta0.001", "pessimistic-beta0.1-shift0", "reinforce", "grpo"]
    assert set(logs) == {*names, "constant-incorrect-weight0.25", "sharpened-lam3-both"}
    assert len({log["logratio_incorrect"] for log in logs.values()}) == 13  # no two are the same
    for name, log in logs.items():
        assert float(log["grad_norm"]) > 0 and float(log["loss"]) != 0
        assert (float(log["coefficient_incorrect"]) == 0) == (name == "sft") and float(log["coefficient_correct"]) > 0
    assert float(logs["reinforce"]["coefficient_correct"]) == float(logs["sft"]["coefficient_correct"]) == 1
    assert float(logs["constant-incorrect-weight0.25"]["coefficient_incorrect"]) == 0.25


@pytest.mark.slow
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


@pytest.mark.slow
def test_grpo_samples_what_it_trains_on(finished, tmp_path):
    words = ["--loss", "grpo", "--steps", "4", "--eval-every", "1"]
    rows = read_log(run_with_cache(finished, tmp_path / "grpo", *words)[0])
    offline = read_log(folders(finished[0], "fpa")[0])
    assert rows[0]["tokens_sampled"] == "0" and rows[4]["tokens_sampled"] == rows[4]["tokens_trained"]
    assert len({row["tokens_sampled"] for row in offline}) == 1 and int(offline[0]["tokens_sampled"]) > 24 * 4 * 5
    assert float(rows[0]["seconds"]) < 0.01 < float(offline[0]["seconds"])  # the latter took rollouts before its first step
    dapo = read_log(run_with_cache(finished, tmp_path / "dapo", *words, "--dapo")[0])
    assert int(dapo[4]["tokens_trained"]) < int(dapo[4]["tokens_sampled"])  # some group had one reward only


@pytest.mark.slow
def test_coefficients_are_averaged_over_the_steps_that_have_them(finished, tmp_path):
    words = ["--loss", "grpo", "--dapo", "--steps", "8", "--batch-size", "4"]  # one group a step, often all of one reward
    every = read_log(run_with_cache(finished, tmp_path / "every", *words, "--eval-every", "1")[0])[1:]
    last = read_log(run_with_cache(finished, tmp_path / "last", *words, "--eval-every", "8")[0])[-1]
    values = [float(row["coefficient_correct"]) for row in every]
    there = [value for value in values if value == value]
    assert 0 < len(there) < len(values) and float(last["coefficient_correct"]) == pytest.approx(
        sum(there) / len(there), rel=1e-4
    )


def test_grpo_step_is_the_loss_on_its_own_samples(monkeypatch):
    torch.manual_seed(0)
    model = train.GPT(train.CONFIG)
    problems = stages.draw_problems(2, 1, "train", random.Random(0))
    texts = ["1+1=2;#2", "0", "0", "0"] + ["0"] * 4  # the second problem's samples all have one reward
    rows = [
        {"prompt": problems[i // 4].prompt, "completion": text, "label": text != "0", "finished": True}
        for i, text in enumerate(texts)
    ]
    monkeypatch.setattr(train, "sample", lambda *_: None)
    monkeypatch.setattr(train, "rollout_rows", lambda _: rows)
    taken = []
    monkeypatch.setattr(train, "update", lambda model, optimizer, loss, may_skip: taken.append(loss) or torch.tensor(1.0))
    tokens, mask = train.pack(rows)
    advantage = torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]) / (1 + 1e-4)  # of rewards of +-1, whose std is 1
    lengths = torch.tensor([9, 2, 2, 2, 2, 2, 2, 2])
    for dapo, count in ((False, 8), (True, 4)):
        settings = {"rollouts": 4, "dapo": dapo}
        stats = train.grpo_step(model, None, problems, settings, torch.Generator().manual_seed(0))
        weights = advantage / (lengths[:4].sum() if dapo else 8 * lengths)
        loss = -(weights * train.token_logps(model(tokens), tokens, mask).sum(-1)).sum()
        for ours, expected in zip(*(torch.autograd.grad(value, model.parameters()) for value in (taken[-1], loss))):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
        assert stats[6:].tolist() == [lengths[:count].sum(), lengths.sum()]
    rows[0]["label"] = False
    stats = train.grpo_step(model, None, problems, {"rollouts": 4, "dapo": True}, torch.Generator().manual_seed(0))
    assert stats[7] == lengths.sum() and stats[6] == 0 and len(taken) == 2  # nothing is left to train on


def test_pairs_are_of_one_problem_and_walk_through_the_incorrect_rows():
    reward = torch.tensor([1.0, -1, -1, 1, 1, -1, -1, -1])
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])  # problem 2 has no correct rollout
    order = train.pair_order(reward, ids, 30, 4, seed=0)
    correct, incorrect = order.chunk(2, dim=1)
    assert order.shape == (30, 4) and (reward[correct] > 0).all() and (reward[incorrect] < 0).all()
    assert torch.equal(ids[correct], ids[incorrect])
    assert torch.bincount(incorrect.flatten(), minlength=8).tolist() == [0, 20, 20, 0, 0, 20, 0, 0]
    assert set(correct.flatten().tolist()) == {0, 3, 4}
    assert not torch.equal(train.pair_order(reward, ids, 30, 4, seed=1), order)


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


def test_z0_of_kto_is_of_mismatched_prompts():
    torch.manual_seed(0)
    model, reference = train.GPT(train.CONFIG), train.GPT(train.CONFIG)
    tokens, mask = train.pack(stages.corpus_rows(5, 2, 0.5, random.Random(0)))
    start = mask[0].int().argmax().item() - 1
    data = {"tokens": tokens, "mask": mask, "start": start, "reference": reference}
    rows, total = torch.tensor([3, 0, 4]), 0.0
    for row, other in ((3, 4), (0, 3), (4, 0)):
        mixed = torch.cat([tokens[other, : start + 1], tokens[row, start + 1 :]])[None]
        with torch.no_grad():
            total += sum(
                s * train.token_logps(m(mixed), mixed, mask[row][None]).sum() for s, m in ((1, model), (-1, reference))
            )
    assert train.kto_z0(model, data, rows).item() == pytest.approx(max(total.item() / 3, 0), rel=1e-4)
    flipped = train.kto_z0(reference, {**data, "reference": model}, rows).item()
    assert flipped == pytest.approx(max(-total.item() / 3, 0), rel=1e-4)
    assert torch.equal(tokens, data["tokens"]) and total != 0


@pytest.mark.slow
def test_evaluation_temperature_is_used(finished, tmp_path):
    (cold,) = run_with_cache(finished, tmp_path, "--loss", "off_rl", "--eval-temperature", "0.001")
    warm = read_log(folders(finished[0], "off_rl")[0])
    assert [row["accuracy_greedy"] for row in read_log(cold)] == [row["accuracy_greedy"] for row in warm]
    for row, other in zip(read_log(cold), warm):
        assert float(row["accuracy"]) == pytest.approx(float(row["accuracy_greedy"]), abs=0.02)
        assert row["accuracy"] != other["accuracy"]


def test_trajectory_logps_are_those_of_the_whole_sequence():
    torch.manual_seed(0)
    model, reference = train.GPT(train.CONFIG), train.GPT(train.CONFIG)
    tokens, mask = train.pack(stages.corpus_rows(6, 3, 0.5, random.Random(0)))
    start = mask[0].int().argmax().item() - 1
    with torch.no_grad():
        ref_logits = reference(tokens)
        data = {"tokens": tokens, "mask": mask, "start": start, "ref_logits": ref_logits[:, start:]}
        rows = torch.tensor([4, 1, 2])
        for lam in (0, 2):
            logits = model(tokens)
            expected = [train.token_logps(h, tokens, mask).sum(-1) for h in (logits, (1 + lam) * logits - lam * ref_logits)]
            for value, whole in zip(train.trajectory_logps(model, data, rows, lam), expected):
                torch.testing.assert_close(value, whole[rows], rtol=1e-4, atol=1e-4)


def test_training_data_start_at_the_first_completion_token(finished, tmp_path):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    base, data, problems, tests = stages.prepare(options.parse_args([*TINY, "--out", str(tmp_path)]), 0, 24)
    assert not data["mask"][:, : data["start"] + 1].any() and data["mask"][:, data["start"] + 1].all()
    with torch.no_grad():
        whole = train.token_logps(base(data["tokens"]), data["tokens"], data["mask"]).sum(-1)
    torch.testing.assert_close(data["ref_logp_sum"], whole, rtol=1e-4, atol=1e-4)
    assert len(problems) == 24 and not {p.prompt for p in problems} & {p.prompt for p in tests}
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert data["reward"].tolist() == [1 if row["label"] else -1 for row in rows]
    assert data["clean"].tolist() == [row["first_wrong_step"] is None for row in rows]
    assert torch.equal(data["length"], data["mask"].sum(-1)) and 0 < data["measured"]["share_correct"] < 1


@pytest.mark.slow
def test_gradient_is_clipped_and_coefficients_and_counts_are_logged(finished, tmp_path, monkeypatch):
    seen = []

    def recording(b, s):
        seen.append(((b["logp_sum"].detach() / b["length"]).exp(), b["reward"], b["length"]))
        return -1e6 * b["reward"] * b["logp_sum"], torch.where(b["reward"] > 0, 3.0, 5.0) / b["length"]

    monkeypatch.setitem(train.LOSSES, "fpa", recording)
    clipped = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: clipped.append(limit) or clip(p, limit))
    monkeypatch.setattr(losses, "fpa", lambda logp_sum, reward, present, future, target: (-1e6 * reward * logp_sum, future))
    (folder,) = run_with_cache(finished, tmp_path, "--loss", "fpa", "--lr", "0.05")
    last = read_log(folder)[-1]
    for column, turn in (("below_0.2_pi", 0), ("below_0.2_pihat", 1)):  # the loss is called at the present, then at the future
        assert int(last[column]) == sum(((r < 0) & (policy < 0.2)).sum().item() for policy, r, _ in seen[turn::2]) > 0
    assert clipped == [1.0] * 10 and float(last["grad_norm"]) > 1e3
    assert float(last["coefficient_correct"]) == pytest.approx(3) and float(last["coefficient_incorrect"]) == pytest.approx(5)
    assert int(last["tokens_trained"]) == sum(length.sum().item() for *_, length in seen[::2])


@pytest.mark.parametrize("flag", ["--ops 2", "--slip 0.2", "--base-steps 7", "--seed 1", "--prompts 9", "--rollouts 3"])
def test_every_setting_of_a_stage_is_in_its_key(flag, tmp_path):
    plain, changed = (options.parse_args(words + ["--out", str(tmp_path)]) for words in ([], flag.split()))
    before, after = (stages.stage_settings(args, args.seed[0], args.prompts[0]) for args in (plain, changed))
    assert before[1] != after[1] and (before[0] != after[0]) == (flag.split()[0] not in ("--prompts", "--rollouts"))
    path = tmp_path / "file"
    path.write_text("one")
    one = stages.digest({}, path)
    path.write_text("two")
    assert stages.digest({}, path) != one


def test_a_rollout_without_a_token_is_left_out(finished, tmp_path, monkeypatch):
    """The policy may sample BOS or PAD at once; its mean log-probability would be 0/0."""
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    for path in (tmp_path / "cache").glob("ro*"):
        path.unlink()
    original = stages.sample

    def sample(model, problems, *words):
        (problem, *_), *others = original(model, problems, *words)
        return [(problem, "", False, verify(problem, "", False)), *others]

    monkeypatch.setattr(stages, "sample", sample)
    _, data, *_ = stages.prepare(options.parse_args([*TINY, "--out", str(tmp_path)]), 0, 24)
    assert len(data["length"]) == 24 * 4 - 1 and data["length"].min() > 0 and data["ref_logp_sum"].isfinite().all()
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    assert len(read_rows(path)) == 24 * 4 - 1


def test_a_stale_reference_is_never_taken_up(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    edit_cache(tmp_path, lambda text: "".join(reversed(text.splitlines(keepends=True))))
    train.run(["--loss", "fpa", *TINY, "--out", str(tmp_path)])
    assert "reference     cached" not in capsys.readouterr().out
    assert float(read_log(folders(tmp_path)[0])[0]["logratio_correct"]) == pytest.approx(0, abs=1e-4)


def names_of(words, tmp_path):
    return [
        name.rsplit("-", 1)[0] for name in options.run_settings(options.parse_args([*words.split(), "--out", str(tmp_path)]))
    ]


def test_several_values_run_their_product(tmp_path):
    words = "--loss off_rl fpa --lam 0.5 2 --target both incorrect --seed 0 1 --prompts 64 128 --lr 1e-3 1e-4"
    names = names_of(words, tmp_path)
    assert len(names) == len(set(names)) == 8 * (1 + 2 * 2)  # off_rl has neither λ nor target
    assert "fpa-lam0.5-incorrect-prompts128-steps1000-lr0.0001-seed1" in names
    tail = "-prompts1024-steps1000-lr0.0002-seed0"
    assert names_of("--loss off_rl --lam 0 2", tmp_path) == [f"off_rl{tail}", f"fpa-lam2-both{tail}"]
    assert names_of("--loss fpa --lam 0", tmp_path) == [f"off_rl{tail}"]
    names = [f"dpo-beta0.5{tail}", f"dpo-lam1-both-beta0.5{tail}", f"sft{tail}"]
    assert names_of("--loss dpo sft --lam 0 1 --beta 0.5", tmp_path) == names
    words = "--loss a_star_po pessimistic constant grpo --dapo --shift -1 --weight 0"
    names = ["a_star_po-beta0.001", "pessimistic-beta0.1-shift-1", "constant-incorrect-weight0", "grpo-dapo"]
    assert names_of(words, tmp_path) == [name + tail for name in names]


def test_batches_are_half_correct_and_walk_through_every_row():
    labels = torch.tensor([1.0] * 5 + [-1.0] * 7)
    order = train.batch_order(labels, 35, 4, seed=0)
    assert order.shape == (35, 4) and (labels[order[:, :2]] > 0).all() and (labels[order[:, 2:]] < 0).all()
    assert torch.bincount(order[:, :2].flatten(), minlength=12)[:5].tolist() == [14] * 5  # 70 draws of 5 rows
    assert torch.bincount(order[:, 2:].flatten(), minlength=12)[5:].tolist() == [10] * 7
    assert torch.equal(train.batch_order(labels, 20, 4, seed=0), order[:20])  # a longer run begins like a shorter one
    assert not torch.equal(train.batch_order(labels, 35, 4, seed=1), order)


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
    ("--lr 0", "--lr"),
    ("--lr inf", "--lr"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"),
    ("--eval-temperature 0", "--eval-temperature"),
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
    ("--weight -1", "--weight"),
    ("--loss rpo --alpha nan", "--alpha"),
    ("--explain sft", "--explain"),
    ("--explain dpo --alpha 2", "--alpha"),
    ("--lr 1e300", "--lr"),
    ("--eval-temperature 1e-40", "--eval-temperature"),
    ("fpa", "fpa"),  # without its flag
    ("--seed ٣x", "--seed"),
]


@pytest.mark.parametrize("words, culprit", BAD_FLAGS)
def test_bad_flags_are_one_line(words, culprit, tmp_path, capsys):
    code, error = refusal(train.run, [*words.split(), "--out", tmp_path / "out"], capsys)
    assert code == 2 and culprit in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


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
    assert str(options.parse_args(["--lam", "0", "-0.0"]).lam) == "[0.0, 0.0]"


@pytest.mark.parametrize("label, missing", [(True, "incorrect"), (False, "correct")])
def test_rollouts_of_one_kind_only(label, missing, finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    edit_cache(tmp_path, lambda text: text.replace('"label": ' + json.dumps(not label), '"label": ' + json.dumps(label)))
    code, error = refusal(train.run, ["--loss", "fpa", *TINY, "--out", tmp_path], capsys)
    assert code == 2 and f"is {missing}" in error and error.count("\n") == 1
    assert not folders(tmp_path)


@pytest.mark.slow
def test_a_seed_that_fails_beside_another(finished, tmp_path):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    edit_cache(tmp_path, lambda text: text.replace('"label": false', '"label": true'))
    result = command("--loss", "fpa", "--seed", 0, 1, *TINY, "--jobs", 2, "--out", tmp_path)
    assert result.returncode == 2 and "is incorrect" in result.stderr and "failed: seed 0" in result.stdout
    assert ["seed1" in folder.name and (folder / "samples.txt").exists() for folder in folders(tmp_path)] == [True]


def test_a_gradient_that_is_not_finite_stops_the_run(finished, tmp_path, monkeypatch):
    out = tmp_path / "runs"
    shutil.copytree(finished[0] / "cache", out / "cache")
    calls = []

    def breaks_at_step_8(b, s):
        calls.append(1)
        return b["logp_sum"] * (float("nan") if len(calls) == 8 else 1.0), b["reward"]

    monkeypatch.setitem(train.LOSSES, "sft", breaks_at_step_8)
    with pytest.raises(train.NonFiniteError, match=r"step 8: loss nan.*problem ids.*\[\d+.*the last checkpoint"):
        train.main(options.parse_args(["--loss", "sft", *TINY, "--save-every", "4", "--out", str(out)]))
    (folder,) = folders(out)
    assert [row["step"] for row in read_log(folder)] == ["0", "5"]
    saved = load_file(folder / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values()) and saved["stats"][4:].eq(0).all()
    assert not (folder / "model.safetensors").exists() and not (folder / "samples.txt").exists()


@pytest.mark.slow
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


@pytest.mark.slow
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
