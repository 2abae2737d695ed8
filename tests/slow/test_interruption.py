"""Nothing is lost: kills at any moment, Ctrl-C and SIGTERM, locks, full disks, torn and edited files; then the same command."""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from test_train import TINY, command, edit_cache, folders, read_log, refusal, without_seconds

import losses
import plots
import train
from plumbing import files, keeper, log
from study import diagnostics, results
from toy_math import stages

KILLS = 25
# Everything that a run can write, on steps where evaluations, snapshots and checkpoints meet and do not.
FULL = ["--loss", "fpa", *TINY, "--steps", "45", "--eval-every", "10", "--save-every", "7", "--diagnostics"]
FULL += ["--schedule", "linear"]
# The same as a command, in less time.
COMMAND = ["--loss", "fpa", *TINY, "--steps", "45", "--eval-every", "20", "--save-every", "7"]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and locks")


def contents(out):
    """{path: content} of all that a run must repeat byte for byte: not what holds seconds, which are left out of log.csv."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if path.name == "log.csv":
            found[path.relative_to(out)] = without_seconds(path.parent)
        elif path.suffix in (".csv", ".txt", ".jsonl") or (path.suffix == ".safetensors" and path.name[0] != "c"):
            found[path.relative_to(out)] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def few():
    """Evaluations of 8 problems and no figures, in this process: what is tested is what is kept, not what is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_figures", lambda *_: None)
        patch.setattr(diagnostics, "PAIRS", 4)
        patch.setattr(stages, "VALIDATION_PROBLEMS", 8)
        patch.setattr(stages, "TEST_PROBLEMS", 8)
        yield


@pytest.fixture(scope="module")
def whole(few, finished, tmp_path_factory):
    """The output folder of an uninterrupted FULL in this process."""
    out = tmp_path_factory.mktemp("whole")
    shutil.copytree(finished[0] / "cache", out / "cache")
    train.run([*FULL, "--out", str(out)])
    assert len(contents(out)) == 10
    return out


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """The output folder of an uninterrupted COMMAND that began with nothing, its text, and its seconds without the imports."""
    folder = tmp_path_factory.mktemp("commanded")
    with Forked("train", "plots") as forked:
        code, seconds = forked.run([*COMMAND, "--out", folder / "runs"], folder / "printed.txt")
    printed = (folder / "printed.txt").read_text()
    assert code == 0, printed
    return folder / "runs", printed, seconds


@pytest.fixture
def out(finished, tmp_path):
    """A folder with the cached stages, and nothing else."""
    shutil.copytree(finished[0] / "cache", tmp_path / "runs" / "cache")
    return tmp_path / "runs"


class Killed(BaseException):
    pass


def killed_before(call, monkeypatch, module, name, words):
    """Run the command in this process, and end it before the call-th call of a function."""
    original, calls = getattr(module, name), iter(range(1, 10**6))

    def until(*arguments, **words):
        if next(calls) == call:
            raise Killed
        return original(*arguments, **words)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, until)
        with pytest.raises(Killed):
            train.run(words)


# --- a run that goes on


@pytest.mark.parametrize("call", [1, 8, 11, 45])
def test_a_killed_run_goes_on_as_if_it_had_not_been(call, whole, out, monkeypatch, capsys):
    words = [*FULL, "--out", str(out)]
    killed_before(call, monkeypatch, train, "clip_grad_norm_", words)
    (folder,) = folders(out)
    assert not (folder / "samples.txt").exists() and not (folder / "model.safetensors").exists()
    capsys.readouterr()
    train.run(words)
    saved = (call - 1) // 7 * 7
    assert (f"resuming from step {saved}\n" in capsys.readouterr().out) == (saved > 0)
    assert contents(out) == contents(whole) and not (folder / "checkpoint.safetensors").exists()


# before a row of log.csv, a checkpoint, and samples.txt
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(log, "write_csv", 3), (keeper, "save_checkpoint", 1), (keeper, "save_checkpoint", 3), (train, "write_text", 1)],
)
def test_a_run_killed_while_it_writes_goes_on(module, name, call, whole, out, monkeypatch):
    killed_before(call, monkeypatch, module, name, [*FULL, "--out", str(out)])
    train.run([*FULL, "--out", str(out)])
    assert contents(out) == contents(whole)


def test_a_run_killed_twice_goes_on(whole, out, monkeypatch):
    for call in (10, 10, 10):
        killed_before(call, monkeypatch, train, "clip_grad_norm_", [*FULL, "--out", str(out)])
    train.run([*FULL, "--out", str(out)])
    assert contents(out) == contents(whole)


def test_an_online_run_goes_on_with_its_random_numbers(few, out, monkeypatch, tmp_path):
    words = ["--loss", "grpo", *TINY, "--save-every", "3", "--out"]
    shutil.copytree(out, tmp_path / "other")
    killed_before(6, monkeypatch, train, "clip_grad_norm_", [*words, str(out)])
    for folder in (out, tmp_path / "other"):
        train.run([*words, str(folder)])
    assert contents(out) == contents(tmp_path / "other")


def test_the_base_model_goes_on(few, finished, tmp_path, monkeypatch, capsys):
    words = [*TINY, "--save-every", "40", "--out", str(tmp_path)]
    killed_before(150, monkeypatch, stages, "warmup_cosine", words)
    killed_before(100, monkeypatch, stages, "warmup_cosine", words)
    train.run(words)
    assert "base model    resuming from step 200\n" in capsys.readouterr().out
    (ours,), (theirs,) = ((out / "cache").glob("base-*.safetensors") for out in (tmp_path, finished[0]))
    assert ours.read_bytes() == theirs.read_bytes() and not list(tmp_path.glob("cache/*.checkpoint"))


@pytest.mark.parametrize("name", ["sample", "token_logps", "write_beside"])
def test_stages_that_were_killed_are_made_anew(name, whole, tmp_path, monkeypatch):
    if name == "sample":  # which the base model has no part in
        (tmp_path / "cache").mkdir()
        for path in (whole / "cache").glob("base-*"):
            shutil.copy(path, tmp_path / "cache")
    for call in (1, 2, 3):
        try:
            killed_before(call, monkeypatch, stages, name, [*FULL, "--out", str(tmp_path)])
        except pytest.fail.Exception:
            assert call > 1  # it is called less often, but at least once
            break
    train.run([*FULL, "--out", str(tmp_path)])
    assert contents(tmp_path) == contents(whole)


def test_no_resume_and_force_begin_anew(whole, out, monkeypatch, capsys):
    words = [*FULL, "--out", str(out)]
    killed_before(20, monkeypatch, train, "clip_grad_norm_", words)
    capsys.readouterr()
    train.run([*words, "--no-resume"])
    assert "resuming" not in capsys.readouterr().out and contents(out) == contents(whole)
    killed_before(20, monkeypatch, train, "clip_grad_norm_", [*words, "--force"])
    train.run([*words, "--force"])  # a run that was interrupted is not a finished one
    assert "resuming from step 14" in capsys.readouterr().out and contents(out) == contents(whole)


def test_a_checkpoint_of_other_data_or_diagnostics_is_not_taken_up(whole, out, monkeypatch, capsys):
    words = [*FULL, "--out", str(out)]
    killed_before(9, monkeypatch, train, "clip_grad_norm_", [word for word in words if word != "--diagnostics"])
    capsys.readouterr()
    killed_before(9, monkeypatch, train, "clip_grad_norm_", words)
    assert "resuming" not in capsys.readouterr().out
    (path,) = (out / "cache").glob("rollouts-*.jsonl")
    edit_cache(out, lambda text: "".join(reversed(text.splitlines(keepends=True))))
    train.run(words)
    assert "resuming" not in capsys.readouterr().out
    ours, theirs = (next(folder.glob("*/model.safetensors")).read_bytes() for folder in (out, whole))
    assert ours != theirs


def test_a_torn_log_is_repaired(whole, out, monkeypatch):
    killed_before(25, monkeypatch, train, "clip_grad_norm_", [*FULL, "--out", str(out)])
    (folder,) = folders(out)
    for name in ("log.csv", "tokens.csv", "entanglement.csv", "extrapolation.csv", "batch.csv"):
        os.truncate(folder / name, (folder / name).stat().st_size - 3)
    with pytest.raises(ValueError, match="torn"):
        results.read_csv(folder / "log.csv")
    train.run([*FULL, "--out", str(out)])
    assert contents(out) == contents(whole)


def test_a_finished_run_whose_log_is_torn_is_not_taken_for_one(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "runs")
    (folder,) = folders(tmp_path / "runs")
    os.truncate(folder / "log.csv", (folder / "log.csv").stat().st_size - 3)
    train.run([*FULL, "--out", str(tmp_path / "runs")])
    assert "already finished" not in capsys.readouterr().out and contents(tmp_path / "runs") == contents(whole)


def test_a_checkpoint_is_all_of_model_and_optimizer(tmp_path):
    torch.manual_seed(0)
    model, other = stages.GPT(stages.CONFIG), stages.GPT(stages.CONFIG)
    optimizer, others = (keeper.adamw(m.parameters(), 1e-3) for m in (model, other))
    tokens = torch.randint(stages.CONFIG.vocab_size, (2, 9))

    def step(m, o):
        o.zero_grad()
        m(tokens).logsumexp(-1).sum().backward()
        o.step()

    for _ in range(3):
        step(model, optimizer)
    keeper.save_checkpoint(tmp_path / "c", model, optimizer, {"step": 3, "loss": float("nan")}, {"x": torch.arange(3)})
    state, tensors = keeper.load_checkpoint(tmp_path / "c", other, others)
    assert state["step"] == 3 and state["loss"] != state["loss"] and tensors["x"].tolist() == [0, 1, 2]
    for _ in range(2):
        step(model, optimizer)
        step(other, others)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert keeper.load_checkpoint(tmp_path / "c", other, others, step=4) is None
    assert keeper.load_checkpoint(tmp_path / "none", other, others) is None


@pytest.mark.parametrize("damage", ["cut", "noise", "one bit", "no state", "other sizes", "other device"])
def test_a_damaged_checkpoint_is_one_line(damage, few, out, monkeypatch, capsys):
    words = ["--loss", "fpa", *TINY, "--save-every", "7", "--out", str(out)]
    killed_before(8, monkeypatch, train, "clip_grad_norm_", words)
    (path,) = out.glob("*/checkpoint.safetensors")
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "noise":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif damage == "one bit":
        content = bytearray(path.read_bytes())
        content[-2000] ^= 1
        path.write_bytes(content)
    elif damage == "no state":
        files.write_tensors(path, load_file(path))
    else:
        with safe_open(path, "pt") as file:
            state = file.metadata()["state"]
        tensors = load_file(path)
        if damage == "other sizes":
            tensors["weight.norm.weight"] = torch.ones(3)
        else:
            state = state.replace('"device": "cpu"', '"device": "cuda"')
        files.write_tensors(path, tensors, {"state": state, "sha256": keeper.content_checksum(state, tensors)})
    code, error = refusal(train.run, words, capsys)
    assert code == 2 and str(path) in error and error.count("\n") == 1
    train.run([*words, "--no-resume"])


# --- Ctrl-C and SIGTERM


def start(*words):
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process, condition):
    deadline = time.time() + 100
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(("jobs", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_finishes_the_step_and_saves(jobs, number, out):
    lams = ["2", "1"][:jobs]
    words = [*COMMAND, "--lam", *lams, "--jobs", jobs, "--steps", 200, "--eval-every", 100, "--save-every", 10**6, "--out"]
    process = start(*words, out)
    wait_for(process, lambda: len(folders(out)) == jobs and all(len(read_log(folder)) > 1 for folder in folders(out)))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the workers too
    else:
        process.send_signal(number)
    printed, error = process.communicate(timeout=100)
    assert process.returncode == 128 + number, error
    assert error.startswith("interrupted: ") and "the same command goes on from there" in error and error.count("\n") == 1
    saved = len(list(out.glob("*/checkpoint.safetensors")))
    assert 1 <= saved <= jobs and not list(out.rglob("*.part"))  # one of two may have ended before the other was signalled
    again = command(*words, out)
    assert again.returncode == 0 and again.stdout.count("resuming from step ") == saved
    reference = out.parent / "reference"
    shutil.copytree(out / "cache", reference / "cache")
    assert command(*words, reference).returncode == 0
    assert contents(out) == contents(reference)


def test_a_signal_while_the_base_model_trains(tmp_path):
    words = [*TINY, "--base-steps", 3000, "--save-every", 50, "--out", tmp_path]
    process = start(*words)
    wait_for(process, lambda: list(tmp_path.glob("cache/*.checkpoint")))
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and error.count("\n") == 1, error
    (checkpoint,) = tmp_path.glob("cache/*.checkpoint")
    model = stages.GPT(stages.CONFIG)
    state, _ = keeper.load_checkpoint(checkpoint, model, keeper.adamw(model.parameters(), 1e-3))
    assert 50 <= state["step"] < 3000


def test_the_first_signal_waits_and_the_second_ctrl_c_does_not():
    with keeper.interruptible():
        with keeper.finishing_step() as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, after the terminal's
            assert caught == [signal.SIGTERM] * 2
            with pytest.raises(files.Interrupted) as second:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert second.value.args == (signal.SIGINT,)
        with pytest.raises(files.Interrupted) as outside:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert outside.value.args == (signal.SIGTERM,)


def test_bars_are_hidden_in_workers_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    store = SimpleNamespace(load=lambda: None, remove=lambda: None)
    with keeper.Keeper(store, {}, total=1, every=1) as kept:
        assert not kept.bar.disable
    monkeypatch.setitem(log.progress.keywords, "disable", True)  # as plumbing.jobs.start_worker does
    with keeper.Keeper(store, {}, total=1, every=1) as kept:
        assert kept.bar.disable


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job, and in the workers
    try:
        with keeper.interruptible(), keeper.finishing_step() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            assert caught == [] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# --- two at once


def test_a_second_run_is_refused_with_the_pid_of_the_first(out):
    words = [*FULL, "--steps", "100000", "--out", str(out)]
    process = start(*words)
    wait_for(process, lambda: folders(out))
    (folder,) = folders(out)
    second = command(*words)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert second.stderr.endswith(f"{folder} is being worked on by process {process.pid}\n")
    assert folders(out) == [folder] and process.poll() is None
    process.kill()
    process.communicate()
    with files.locked(out / "cache" / f"{folder.name}.lock", folder):  # the dead one's lock is free
        pass


def test_a_stage_that_another_process_makes_is_waited_for(tmp_path, capsys):
    path, order = tmp_path / "base.lock", []

    def hold():
        with files.locked(path, "the base model"):
            order.append("held")
            time.sleep(0.5)
            order.append("left")

    with ThreadPoolExecutor(1) as other:
        holding = other.submit(hold)
        while not order:
            time.sleep(0.01)
        with files.locked(path, "the base model", wait=True):
            order.append("ours")
            assert path.exists()
        holding.result()
    assert order == ["held", "left", "ours"] and not path.exists()
    assert capsys.readouterr().out == f"waiting: the base model is being worked on by process {os.getpid()}\n"


def test_two_commands_at_once_share_their_stages(tmp_path):
    both = [start(*TINY, "--loss", loss, "--out", tmp_path) for loss in ("fpa", "sft")]
    printed = []
    for process in both:
        printed.append(process.communicate(timeout=100)[0])
        assert process.returncode == 0
    assert sum(line.startswith("base model") and "cached" in line for text in printed for line in text.splitlines()) == 1
    assert all(float(read_log(folder)[0]["logratio_correct"]) == 0 for folder in folders(tmp_path))


# --- disks and folders


def limit_files(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [1000, 700_000])
def test_a_disk_that_is_full_is_one_line(size, commanded, tmp_path):
    """No file may grow beyond a size: the base model's checkpoint is beyond 1 kB, and that of a run beyond 700 kB."""
    whole, *_ = commanded
    if size > 1000:
        shutil.copytree(whole / "cache", tmp_path / "cache")
    words = [sys.executable, "train.py", *COMMAND, "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit_files(size))
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "too large" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.rglob("*.part"))
    if size == 1000:  # the same command begins with nothing, as `commanded` did
        assert [path.name for path in tmp_path.rglob("*")] == ["cache"]
    else:
        assert command(*COMMAND, "--out", tmp_path).returncode == 0
        assert contents(tmp_path) == contents(whole)


def test_a_full_tmpfs_is_one_line(tmp_path):
    script = f"mount -t tmpfs -o size=1200k none {tmp_path} && {sys.executable} train.py {' '.join(FULL)} --out {tmp_path}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("no namespaces here; the test above stands for this one")
    assert done.returncode == 2 and "No space left on device" in done.stderr and str(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("target", ["folder", "cache"])
def test_a_folder_that_is_removed_under_a_run_is_named(target, few, out, monkeypatch, capsys):
    original, calls = train.clip_grad_norm_, iter(range(1, 100))

    def removing(*arguments, **words):
        if next(calls) == 12:
            shutil.rmtree(folders(out)[0] if target == "folder" else out)
        return original(*arguments, **words)

    monkeypatch.setattr(train, "clip_grad_norm_", removing)
    code, error = refusal(train.run, [*FULL, "--out", out], capsys)
    assert code == 2 and "No such file or directory" in error and str(out) in error and error.count("\n") == 1


def test_a_config_that_is_removed_under_a_run_is_named(few, out, monkeypatch, capsys):
    original = train.write_text

    def removing(*arguments):
        (folders(out)[0] / "config.json").unlink()
        return original(*arguments)

    monkeypatch.setattr(train, "write_text", removing)
    code, error = refusal(train.run, ["--loss", "fpa", *TINY, "--out", out], capsys)
    assert code == 2 and "config.json is missing" in error and "1 of 1 runs are gone or damaged" in error


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(files.UserError, match=f"^{tmp_path / 'none' / 'file'}: No such file or directory"):
        files.write_text(tmp_path / "none" / "file", "new")


def test_what_dead_processes_leave_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "run").mkdir()
    left = [tmp_path / "run" / f"log.csv.{pid}.part" for pid in (dead.pid, os.getpid())]
    for path in left:
        path.write_text("")
    (tmp_path / "run" / "checkpoint.part").mkdir()
    odd = [tmp_path / f"log.csv.{name}.part" for name in ("9" * 20, "²³")]
    for path in odd:
        path.write_text("")
    files.remove_leftovers(tmp_path)
    assert (
        all(path.exists() for path in odd)
        and [path.exists() for path in left] == [False, True]
        and (tmp_path / "run" / "checkpoint.part").exists()
    )


# --- caches


def test_a_damaged_cache_is_never_taken_up(whole, out, capsys):
    for pattern in ("reference-*.safetensors", "rollouts-*.jsonl", "base-*.safetensors"):  # the stage that is read last first
        (path,) = (out / "cache").glob(pattern)
        content = bytearray(path.read_bytes())
        content[-2000] ^= 1
        path.write_bytes(content)
        code, error = refusal(train.run, [*FULL, "--out", out], capsys)
        assert code == 2 and error.startswith(f"train.py: error: {path}: damaged or edited") and error.count("\n") == 1
        assert not folders(out)
        path.unlink()
    shutil.copy(whole / "cache" / path.name, path)  # the base model, which takes longest; the test below makes it anew
    train.run([*FULL, "--out", str(out)])
    assert contents(out) == contents(whole)


def test_a_cache_without_its_checksum_is_made_anew(whole, out):
    for path in (out / "cache").glob("*.json"):
        path.unlink()
    train.run([*FULL, "--out", str(out)])
    assert contents(out) == contents(whole)


# --- numbers that are not finite


def broken_at(monkeypatch, *calls):
    """Make the loss of some of the steps not a number."""
    numbers = iter(range(1, 10**6))

    def off_rl(logp_sum, length, reward):
        values, coefficient = losses.off_rl(logp_sum, length, reward)
        broken = torch.is_grad_enabled() and next(numbers) in calls  # the diagnostics ask for coefficients too; that is no step
        return values * (float("nan") if broken else 1.0), coefficient

    monkeypatch.setitem(losses.LOSSES, "off_rl", dataclasses.replace(losses.LOSSES["off_rl"], function=off_rl))


def test_steps_that_are_not_finite_may_be_skipped(few, out, monkeypatch):
    broken_at(monkeypatch, 8, 23)
    words = ["--loss", "off_rl", *FULL[2:], "--out", str(out)]
    with pytest.raises(
        files.NonFiniteError, match="^step 23: loss nan.*; 1 such steps before it were skipped; the last checkp"
    ):
        train.main(train.parse_args([*words, "--skip-nonfinite", "1"]))
    (path,) = out.glob("*/checkpoint.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in load_file(path).items() if "numbers" not in name)
    broken_at(monkeypatch)  # from the checkpoint of step 21 on, all is well
    train.run([*words, "--skip-nonfinite", "1"])
    rows = read_log(folders(out)[0])
    assert [row["skipped"] for row in rows] == ["0", "1", "1", "1", "1", "1"]
    tokens = [int(row["tokens_trained"]) for row in rows]
    first, *others = [b - a for a, b in zip(tokens, tokens[1:-1])]  # of ten steps each, one of which was skipped
    assert all(0.85 < first / other < 0.95 for other in others)
    assert all(float(row["loss"]) == float(row["loss"]) for row in rows[1:])


def test_a_skipped_step_changes_nothing(few, out, monkeypatch):
    words = ["--loss", "off_rl", *TINY, "--steps", "1", "--eval-every", "1", "--out", str(out)]
    for broken in ((1,), ()):
        broken_at(monkeypatch, *broken)
        train.run([*words, "--skip-nonfinite", "1", "--force"])
        (base,) = (out / "cache").glob("base-*.safetensors")
        before, after = load_file(base), load_file(folders(out)[0] / "model.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in after) == bool(broken)


# --- kills from outside, through every stage

FORKS = """
import importlib, json, os, sys, traceback
run = [importlib.import_module(name) for name in sys.argv[1:]][0].run
print("ready", flush=True)
for line in sys.stdin:
    words, printed = json.loads(line)
    if child := os.fork():
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    file, code = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0
    os.dup2(file, 1), os.dup2(file, 2)
    try:
        run(words)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""


class Forked:
    """A command in processes that are forked from one that has imported it. So a kill meets the work, and not the imports."""

    def __init__(self, *modules):
        words = [sys.executable, "-c", FORKS, *modules]
        self.server = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def run(self, words, printed, seconds=None):
        """Run it, kill it after some seconds if it has not ended -> its exit code and its seconds; it prints into a file."""
        began = time.time()
        print(json.dumps([[*map(str, words)], str(printed)]), file=self.server.stdin, flush=True)
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            child = psutil.Process(int(self.server.stdout.readline()))
            with contextlib.suppress(psutil.TimeoutExpired):
                child.wait(seconds)
            child.kill()
        return int(self.server.stdout.readline()), time.time() - began


def killed_again_and_again(cache, kills, longest, expected, tmp_path):
    """Kill COMMAND at random moments, up to four times a run, and let it end, until all kills are done -> where they met it.

    A run begins with a folder of cached stages, or, where it is None, with nothing.
    """
    rng, left, run, met = random.Random(bool(cache)), kills, 0, []
    with Forked("train", "plots") as forked:
        while left > 0:
            until, code, run = max(left - 4, 0), None, run + 1
            out = tmp_path / f"{bool(cache)}-{run}"
            if cache:
                shutil.copytree(cache, out / "cache")
            while code != 0:
                printed = out.with_name(f"{out.name}-{left}.txt")
                seconds = rng.uniform(0, longest / 2) if left > until else None
                code, _ = forked.run([*COMMAND, "--out", out], printed, seconds)
                text = printed.read_text()
                assert code in (0, -signal.SIGKILL), text
                if code:
                    left -= 1
                    met.append(next((stage for stage in STAGES if f"\n{stage}" in f"\n{text}"), "nothing"))
                for path in out.rglob("*.json"):
                    json.loads(path.read_text())
                for path in [*out.rglob("*.safetensors"), *out.rglob("*.checkpoint")]:
                    load_file(path)
            assert contents(out) == expected and not list(out.rglob("*.part"))
    return met


STAGES = ("step", "reference", "rollouts", "base model")  # as they are printed, the last one first


def test_kills_at_random_moments_lose_nothing(commanded, tmp_path):
    """SIGKILL the command KILLS times, in two lanes, and compare what each ends with to `commanded`."""
    whole, printed, longest = commanded
    assert all(f"\n{stage}" in f"\n{printed}" for stage in (*STAGES, "figure"))
    with ThreadPoolExecutor(2) as lanes:
        shares = {None: KILLS - KILLS // 2, whole / "cache": KILLS // 2}.items()
        runs = [lanes.submit(killed_again_and_again, *share, longest, contents(whole), tmp_path) for share in shares]
        met = [stage for some in runs for stage in some.result()]
    assert len(met) == KILLS and {"base model", "step"} <= {*met}, met
