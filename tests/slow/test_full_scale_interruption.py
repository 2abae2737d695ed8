"""Nothing of full_scale/ is lost: kills from outside at random moments, damaged checkpoints, and what their checksum costs."""

import contextlib
import json
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT
from test_full_scale import ROLLOUTS, write
from test_full_scale_training import QUICK, interrupt, kill_at, log_of, run_module, saved_step
from test_interruption import KILLS

from full_scale.processes import start_processes
from full_scale.store import ShardedStore, block_checksum
from plumbing.keeper import adamw

TRAIN = [*QUICK, "--steps", 24, "--eval-every", 4]  # saved at every second step
SAMPLE = ["--n", 2, "--temperature", 0, "--max-tokens", 24, "--at-once", 2]


def start(module, *flags, processes=1):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    words = [sys.executable, *launch, "-m", f"full_scale.{module}", *map(str, flags)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.01)


def kill(process, chance):
    """SIGKILL a command and all that it started; of several processes sometimes one alone, whose end ends the others."""
    started = psutil.Process(process.pid).children(recursive=True)
    alone = len(started) > 1 and chance.random() < 0.3
    for one in [chance.choice(started)] if alone else [process, *started]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            one.kill()
    process.communicate(timeout=100)
    psutil.wait_procs(started, timeout=100)


def killed_again_and_again(kills, begin, began, finished):
    """Kill a command at random moments, up to four times a run, until all kills are done -> how often a run went on.

    begin(run) starts the command, began(run) says that its work has begun, finished(run) looks at what it left. The run "whole"
    comes first, and is not killed: it says how long one takes.
    """
    whole = begin("whole")
    wait_for(whole, lambda: began("whole"))
    start_of_work = time.time()
    assert whole.wait(timeout=200) == 0, whole.communicate()[0]
    seconds = time.time() - start_of_work
    chance, left, run, resumed = random.Random(0), kills, 0, 0
    while left > 0:
        until, code, run = max(left - 4, 0), None, run + 1
        while code is None:
            process = begin(run)
            wait_for(process, lambda: began(run))  # noqa: B023
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=chance.uniform(0, seconds) if left > until else 200)
            if code is None:
                kill(process, chance)
                left -= 1
        text = process.communicate()[0]
        assert code == 0, text
        resumed += "resuming " in text
        finished(run)
    return resumed


@pytest.mark.parametrize(("processes", "kills"), [(1, KILLS - KILLS // 2), (2, KILLS // 2)])
def test_kills_of_training_at_random_moments_lose_nothing(processes, kills, checkpoint, tmp_path):
    def begin(run):
        return start(
            "train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path / str(run), *TRAIN, processes=processes
        )

    def began(run):
        return (tmp_path / str(run) / "cache").exists()

    def content(run):
        """What a run must repeat byte for byte."""
        return str(log_of(tmp_path / str(run))), next(tmp_path.glob(f"{run}/*/model/model.safetensors")).read_bytes()

    def finished(run):
        assert content(run) == content("whole")
        assert not list(tmp_path.glob(f"{run}/*/checkpoint*")) and not list((tmp_path / str(run)).rglob("*.part"))

    assert killed_again_and_again(kills, begin, began, finished) > 0


def test_kills_of_sampling_at_random_moments_lose_nothing(checkpoint, tmp_path):
    problems = write(tmp_path / "problems.jsonl", *({"problem": f"{i}+{i}?", "answer": 2 * i} for i in range(60)))

    def begin(run):
        return start("rollouts", "--model", checkpoint, "--problems", problems, "--out", tmp_path / f"{run}.jsonl", *SAMPLE)

    def began(run):
        return (tmp_path / f"{run}.jsonl.lock").exists() or (tmp_path / f"{run}.jsonl").exists()

    def finished(run):
        lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in (run, "whole")]
        assert len(lines[0]) == 120 and sorted(lines[0]) == sorted(lines[1])

    assert killed_again_and_again(KILLS, begin, began, finished) > 0


# --- checkpoints


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def swap(path):
    """Two blocks of 4 KiB in each other's place."""
    content = path.read_bytes()
    path.write_bytes(content[:4096] + content[8192:12288] + content[4096:8192] + content[12288:])


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
    "one bit of the weights": lambda folder, file: flip(file, -9),
    "one bit of a header": lambda folder, file: flip(file, 30),
    "two blocks in each other's place": lambda folder, file: swap(file),
    "a longer file": lambda folder, file: file.write_bytes(file.read_bytes() + b"\0"),
    "another step": lambda folder, file: change(folder / "state.json", step=2),
    "no files": lambda folder, file: change(folder / "state.json", files={}),
}


@pytest.fixture(scope="module")
def interrupted(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, lambda: saved_step(out) == 4)
        interrupt(checkpoint, out)
    (folder,) = out.glob("*/checkpoint")
    return out, folder, {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_of_other_bytes_is_refused(damage, checkpoint, interrupted):
    out, folder, whole = interrupted
    for path, content in whole.items():
        path.write_bytes(content)
    damage(folder, max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size))
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", out, *QUICK)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: {folder}: damaged; --no-resume begins anew" in done.stderr


def test_a_checkpoints_checksum_takes_less_than_a_twentieth_of_its_saving(tmp_path):
    """At 100 MB; the least of several times of each, because other work on the machine only adds to them."""
    start_processes()
    model = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in range(8))
    optimizer = adamw(model.parameters(), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    store, saving, summing = ShardedStore(tmp_path, model, optimizer), [], []
    for _ in range(4):
        began = time.perf_counter()
        store.save({"step": 1, "log": {}})
        saving.append(time.perf_counter() - began)
        files = list((tmp_path / "checkpoint").glob("*.safetensors"))
        began = time.perf_counter()
        for path in files:
            block_checksum(path)
        summing.append(time.perf_counter() - began)
    torch.distributed.destroy_process_group()
    assert sum(path.stat().st_size for path in files) > 10**8
    assert min(summing) < 0.05 * min(saving), (summing, saving)
