"""train.py and plots.py: the real command on a tiny setting, its files, its caches, its refusals."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import plots
import train

# One operation, so that a base model of a few seconds already gets answers right and wrong.
TINY = "--ops 1 --base-steps 300 --slip 0.3 --prompts 24 --rollouts 4 --steps 10 --eval-every 5 --batch-size 8".split()
TINY += ["--device", "cpu"]


def command(*words, program="train.py"):
    """The real command in a process of its own."""
    return subprocess.run([sys.executable, program, *map(str, words)], capture_output=True, text=True)


def refusal(run, words, capsys):
    """Exit code and stderr of a command that refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        run([str(word) for word in words])
    return stop.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder and the printed text of a ten-step run of both losses."""
    out = tmp_path_factory.mktemp("runs") / "new" / "runs"
    result = command("--loss", "off_rl", "fpa", "--lam", "2", *TINY, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


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
            rows[0]["loss"] == "nan" and float(rows[1]["grad_norm"]) > 0 and int(rows[2]["tokens"]) > int(rows[1]["tokens"]) > 0
        )
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == train.GPT(train.CONFIG).state_dict().keys()
        assert json.loads((folder / "config.json").read_text())["steps"] == 10
        samples = (folder / "samples.txt").read_text()
        assert samples.count("right  ") == 5 and samples.count("wrong  ") == 5 and samples in printed
    assert "step    10/10" in printed and "ETA" in printed
    for name in plots.FIGURES:
        assert (out / "figures" / name).read_bytes().startswith(b"\x89PNG")
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


def test_lambda_zero_and_targets_in_the_real_loop(finished, tmp_path):
    words = ["--loss", "fpa", "--lam", "0", "8", "--target", "both", "correct", "incorrect"]
    logs = {f.name.rsplit("-", 2)[0]: without_seconds(f) for f in run_with_cache(finished, tmp_path, *words)}
    off_rl = without_seconds(folders(finished[0], "off_rl")[0])
    for target in ("both", "correct", "incorrect"):
        for row, expected in zip(logs[f"fpa-lam0-{target}"], off_rl):
            for column in set(train.COLUMNS) - {"seconds", "loss"}:  # fpa's loss is a surrogate
                assert float(row[column]) == pytest.approx(float(expected[column]), rel=1e-3, abs=1e-5, nan_ok=True)
    ends = [logs[f"fpa-lam8-{target}"][-1]["logratio_incorrect"] for target in ("both", "correct", "incorrect")]
    assert len(set(ends)) == 3


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
    tokens, mask = train.pack(train.corpus_rows(6, 3, 0.5, random.Random(0)))
    start = mask[0].int().argmax().item() - 1
    with torch.no_grad():
        ref_logits = reference(tokens)
        data = {"tokens": tokens, "mask": mask, "start": start, "ref_logits": ref_logits[:, start:]}
        rows = torch.tensor([4, 1, 2])
        for lam in (0, 2):
            logits = model(tokens)
            expected = train.logp_sum_and_mean(train.token_logps(logits, tokens, mask), mask)
            future = train.token_logps((1 + lam) * logits - lam * ref_logits, tokens, mask)
            expected = *expected, train.logp_sum_and_mean(future, mask)[1]
            for value, whole in zip(train.trajectory_logps(model, data, rows, lam), expected):
                torch.testing.assert_close(value, whole[rows], rtol=1e-4, atol=1e-4)


def test_training_data_start_at_the_first_completion_token(finished, tmp_path):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    base, data, _ = train.prepare(train.parse_args([*TINY, "--out", str(tmp_path)]), seed=0)
    assert not data["mask"][:, : data["start"] + 1].any() and data["mask"][:, data["start"] + 1].all()
    with torch.no_grad():
        whole = train.token_logps(base(data["tokens"]), data["tokens"], data["mask"]).sum(-1)
    torch.testing.assert_close(data["ref_logp_sum"], whole, rtol=1e-4, atol=1e-4)


def test_gradient_is_clipped_and_below_is_counted(finished, tmp_path, monkeypatch):
    seen = []

    def recording(logp_mean, future_logp_mean, reward, target):
        seen.append((logp_mean.detach().exp(), future_logp_mean.exp(), reward))
        return -1e6 * reward * logp_mean, None

    monkeypatch.setitem(train.LOSSES, "fpa", recording)
    clipped = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: clipped.append(limit) or clip(p, limit))
    (folder,) = run_with_cache(finished, tmp_path, "--loss", "fpa", "--lr", "0.05")
    last = read_log(folder)[-1]
    for column, policy in (("below_0.2_pi", 0), ("below_0.2_pihat", 1)):
        assert int(last[column]) == sum(((step[2] < 0) & (step[policy] < 0.2)).sum().item() for step in seen) > 0
    assert clipped == [1.0] * 10 and float(last["grad_norm"]) > 1e3


@pytest.mark.parametrize("flag", ["--ops 2", "--slip 0.2", "--base-steps 7", "--seed 1", "--prompts 9", "--rollouts 3"])
def test_every_setting_of_a_stage_is_in_its_key(flag, tmp_path):
    plain, changed = (train.parse_args(words + ["--out", str(tmp_path)]) for words in ([], flag.split()))
    before, after = (train.stage_settings(args, args.seed[0]) for args in (plain, changed))
    assert before[1] != after[1] and (before[0] != after[0]) == (flag.split()[0] not in ("--prompts", "--rollouts"))
    path = tmp_path / "file"
    path.write_text("one")
    one = train.digest({}, path)
    path.write_text("two")
    assert train.digest({}, path) != one


def test_a_stale_reference_is_never_taken_up(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    train.run(["--loss", "fpa", *TINY, "--out", str(tmp_path)])
    assert "reference     cached" not in capsys.readouterr().out
    assert float(read_log(folders(tmp_path)[0])[0]["logratio_correct"]) == pytest.approx(0, abs=1e-4)


def test_several_values_run_their_product(tmp_path):
    args = train.parse_args("--loss off_rl fpa --lam 0.5 2 --target both incorrect --seed 0 1 --out".split() + [str(tmp_path)])
    runs = train.run_settings(args)
    assert len(runs) == 2 * (1 + 2 * 2)  # off_rl has neither λ nor target
    assert sum(name.startswith("fpa-lam0.5-incorrect-seed1-") for name in runs) == 1
    other = train.parse_args(["--lr", "1e-4", "--out", str(tmp_path)])
    assert not set(train.run_settings(other)) & set(runs)


def test_batches_are_half_correct_and_walk_through_every_row():
    labels = torch.tensor([True] * 5 + [False] * 7)
    order = train.batch_order(labels, 35, 4, seed=0)
    assert order.shape == (35, 4) and labels[order[:, :2]].all() and not labels[order[:, 2:]].any()
    assert torch.bincount(order[:, :2].flatten(), minlength=12)[:5].tolist() == [14] * 5  # 70 draws of 5 rows
    assert torch.bincount(order[:, 2:].flatten(), minlength=12)[5:].tolist() == [10] * 7
    assert torch.equal(train.batch_order(labels, 20, 4, seed=0), order[:20])  # a longer run begins like a shorter one
    assert not torch.equal(train.batch_order(labels, 35, 4, seed=1), order)


@pytest.mark.parametrize(
    "words, culprit",
    [
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
        ("--loss off_rl --lam 1", "--lam"),
        ("--ops 1 --prompts 5000", "5000"),
    ],
)
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


@pytest.mark.parametrize("label, missing", [(True, "incorrect"), (False, "correct")])
def test_rollouts_of_one_kind_only(label, missing, finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    path.write_text("".join(json.dumps({**json.loads(line), "label": label}) + "\n" for line in path.read_text().splitlines()))
    code, error = refusal(train.run, ["--loss", "fpa", *TINY, "--out", tmp_path], capsys)
    assert code == 2 and f"is {missing}" in error and error.count("\n") == 1
    assert not folders(tmp_path)


def test_a_seed_that_fails_beside_another(finished, tmp_path):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    path.write_text(path.read_text().replace('"label": false', '"label": true'))
    result = command("--loss", "fpa", "--seed", 0, 1, *TINY, "--jobs", 2, "--out", tmp_path)
    assert result.returncode == 2 and "is incorrect" in result.stderr and "failed: seed 0" in result.stdout
    assert ["seed1" in folder.name and (folder / "samples.txt").exists() for folder in folders(tmp_path)] == [True]


def test_a_gradient_that_is_not_finite_stops_the_run(finished, tmp_path, monkeypatch):
    out = tmp_path / "runs"
    shutil.copytree(finished[0] / "cache", out / "cache")
    calls = []

    def breaks_at_step_8(logp_mean, future_logp_mean, reward, target):
        calls.append(1)
        return logp_mean * (float("nan") if len(calls) == 8 else 1.0), None

    monkeypatch.setitem(train.LOSSES, "fpa", breaks_at_step_8)
    with pytest.raises(train.NonFiniteError, match=r"step 8: loss nan.*problem ids.*\[\d+.*weights of step 5"):
        train.main(train.parse_args(["--loss", "fpa", *TINY, "--out", str(out)]))
    (folder,) = folders(out)
    assert [row["step"] for row in read_log(folder)] == ["0", "5"]
    assert all(torch.isfinite(weight).all() for weight in load_file(folder / "model.safetensors").values())
    assert not (folder / "samples.txt").exists()


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
@pytest.mark.parametrize("jobs, stop", [(1, "SIGINT"), (2, "SIGINT"), (2, "SIGKILL")])
def test_what_there_is_is_kept_and_no_worker_stays(jobs, stop, finished, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(finished[0] / "cache", out / "cache")
    words = ["--loss", "fpa", "--lam", *"12"[:jobs], *TINY, "--steps", "100000", "--jobs", str(jobs), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "train.py", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.time() + 60
    while not (len(folders(out)) == jobs and all(len(read_log(folder)) > 2 for folder in folders(out))):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    if stop == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    else:
        process.kill()
    _, error = process.communicate(timeout=60)  # waits for the workers too, who hold its pipes
    if stop == "SIGINT":
        assert process.returncode == 130 and "interrupted" in error and error.count("\n") == 1
    for folder in folders(out):
        assert load_file(folder / "model.safetensors") and not (folder / "samples.txt").exists()


def test_plots_names_missing_and_half_written_logs(finished, tmp_path, capsys):
    for folder in folders(finished[0]):
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    torn, whole = folders(tmp_path / "runs")
    text = (torn / "log.csv").read_text()
    damages = [(text[:-3], "half-written"), (text[:-20], "half-written"), (text.split("\n10,")[0] + "\n", "step 5 of 10")]
    for damage, message in [*damages, ("", "half-written"), (None, "missing")]:
        (torn / "log.csv").unlink(missing_ok=True)
        if damage is not None:
            (torn / "log.csv").write_text(damage)
        plots.run([str(tmp_path / "runs"), "--to", str(tmp_path / "figures")])
        error = capsys.readouterr().err
        assert torn.name in error and message in error and whole.name not in error and error.count("\n") == 1
        assert len(list((tmp_path / "figures").glob("*.png"))) == len(plots.FIGURES)
    assert refusal(plots.run, [tmp_path / "none"], capsys)[0] == 2
    shutil.rmtree(whole)
    code, error = refusal(plots.run, [tmp_path / "runs"], capsys)
    assert code == 2 and "no finished run" in error


def test_a_seed_counts_once(finished, tmp_path, capsys):
    for copy in ("a", "b"):
        shutil.copytree(folders(finished[0], "fpa")[0], tmp_path / copy)
    (methods,) = plots.read_runs(plots.run_folders(tmp_path)).values()
    assert len(methods["fpa", 2.0, "both"]) == 1 and f"left out {tmp_path / 'b'}" in capsys.readouterr().err


def test_panels_draw_the_columns_they_name(finished):
    def lines(panel, methods):
        _, axis = plots.plt.subplots()
        panel(axis, methods)
        drawn = [(line.get_color(), line.get_linestyle(), list(line.get_ydata())) for line in axis.lines]
        plots.plt.close("all")
        return drawn

    assert "hat" in plots.PIHAT and "hat" not in plots.PI
    (methods,) = plots.read_runs(folders(finished[0])).values()
    fpa = methods["fpa", 2.0, "both"]
    log = fpa[0][1]
    colour = plots.COLOURS[1]  # Off-RL takes the first
    assert (colour, "-", log["accuracy"].tolist()) in lines(plots.panel_accuracy, methods)
    for kind, style in plots.CORRECTNESS.items():
        assert (colour, style, log[f"logratio_{kind}"].tolist()) in lines(plots.panel_logratios, methods)
        for target in ("both", "correct", "incorrect"):  # rows outside the target are weighted by the present policy
            column = f"{'pihat' if target in ('both', kind) else 'pi'}_{kind}"
            expected = colour, style, log[column].tolist()
            assert expected in lines(plots.panel_coefficient, {("fpa", 2.0, target): fpa})
    ratio = (log["pihat_incorrect"] / log["pi_incorrect"]).tolist()
    assert (colour, "--", ratio) in lines(plots.panel_ratio, methods)
    assert (colour, ":", (log["below_0.2_pihat"] / 1000).tolist()) in lines(plots.panel_below, methods)


def test_mean_and_interval_by_hand():
    mean, half = plots.mean_and_interval([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert mean.tolist() == [2.0, 5.0]
    assert half.tolist() == pytest.approx([4.303 * 1.0 / 3**0.5, 0.0])  # t of 2 degrees of freedom, deviation 1
