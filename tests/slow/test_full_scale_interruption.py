"""Nothing of full_scale/ is lost: kills from outside at random moments, damaged checkpoints, and what their checksum costs."""

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT
from test_full_scale import ROLLOUTS, change_json, write
from test_full_scale_training import QUICK, interrupted, log_of, run_module  # noqa: F401 (a fixture)
from test_interruption import KILLS, Forked

from full_scale.processes import start_processes
from full_scale.store import ShardedStore, block_checksum
from plumbing.keeper import adamw

TRAIN = [*QUICK, "--steps", 24, "--eval-every", 4]  # saved at every second step
SAMPLE = ["--n", 2, "--temperature", 0, "--max-tokens", 24, "--at-once", 2]


def kill(process, chance):
    """SIGKILL a command and all that it started; of several processes sometimes one alone, whose end ends the others."""
    started = psutil.Process(process.pid).children(recursive=True)
    alone = len(started) > 1 and chance.random() < 0.3
    for one in [chance.choice(started)] if alone else [process, *started]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            one.kill()
    process.wait(timeout=100)
    psutil.wait_procs(started, timeout=100)


def two_processes(words, out, printed, seconds, chance):
    """full_scale.train behind torchrun, killed some seconds after its work has begun -> as `command` below."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "full_scale.train"]
    with printed.open("w") as file:
        process = subprocess.Popen([sys.executable, *launch, *map(str, words)], cwd=ROOT, stdout=file, stderr=file)
    while process.poll() is None and not (printed.read_text() and (out / "cache").exists()):
        time.sleep(0.01)
    began = time.time()
    try:
        return process.wait(timeout=200 if seconds is None else seconds), time.time() - began
    except subprocess.TimeoutExpired:
        kill(process, chance)
        return -signal.SIGKILL, seconds


def killed_again_and_again(kills, command, finished, tmp_path):
    """Kill a command at random moments, up to four times a run, until all kills are done -> how often it went on.

    command(run, printed, seconds, chance) runs it, and kills it after some seconds of its work, if there are any -> its exit
    code, -9 if it was killed, and the seconds of its work. finished(run) looks at what it left. The run "whole" comes first,
    and is not killed: it says how long one takes.
    """
    code, seconds = command("whole", tmp_path / "whole.txt", None, None)
    assert code == 0, (tmp_path / "whole.txt").read_text()
    chance, left, run, resumed = random.Random(0), kills, 0, 0
    while left > 0:
        until, code, run = max(left - 4, 0), None, run + 1
        while code != 0:
            printed = tmp_path / f"{run}-{left}.txt"
            code, _ = command(run, printed, chance.uniform(0, seconds) if left > until else None, chance)
            assert code in (0, -signal.SIGKILL), printed.read_text()
            left, resumed = left - (code != 0), resumed + ("resuming " in printed.read_text())
        finished(run)
    return resumed


@pytest.mark.parametrize(("processes", "kills"), [(1, KILLS - KILLS // 5), (2, KILLS // 5)])
def test_kills_of_training_at_random_moments_lose_nothing(processes, kills, checkpoint, tmp_path):
    def content(run):
        """What a run must repeat byte for byte."""
        return str(log_of(tmp_path / str(run))), next(tmp_path.glob(f"{run}/*/model/model.safetensors")).read_bytes()

    def finished(run):
        assert content(run) == content("whole")
        assert not list(tmp_path.glob(f"{run}/*/checkpoint*")) and not list((tmp_path / str(run)).rglob("*.part"))

    with Forked("full_scale.train") as forked:

        def command(run, printed, seconds, chance):
            out = tmp_path / str(run)
            words = ["--init", checkpoint, "--data", ROLLOUTS, "--out", out, *TRAIN]
            if processes > 1:
                return two_processes(words, out, printed, seconds, chance)
            return forked.run(words, printed, seconds)

        assert killed_again_and_again(kills, command, finished, tmp_path) > kills // 4


def test_kills_of_sampling_at_random_moments_lose_nothing(checkpoint, tmp_path):
    problems = write(tmp_path / "problems.jsonl", *({"problem": f"{i}+{i}?", "answer": 2 * i} for i in range(60)))

    def finished(run):
        lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in (run, "whole")]
        assert len(lines[0]) == 120 and sorted(lines[0]) == sorted(lines[1])

    with Forked("full_scale.rollouts") as forked:

        def command(run, printed, seconds, chance):
            words = ["--model", checkpoint, "--problems", problems, "--out", tmp_path / f"{run}.jsonl", *SAMPLE]
            return forked.run(words, printed, seconds)

        assert killed_again_and_again(KILLS, command, finished, tmp_path) > KILLS // 4


# --- checkpoints


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def swap(path):
    """Two blocks of 4 KiB in each other's place."""
    content = path.read_bytes()
    path.write_bytes(content[:4096] + content[8192:12288] + content[4096:8192] + content[12288:])


DAMAGES = {
    "one bit of the weights": lambda folder, file: flip(file, -9),
    "one bit of a header": lambda folder, file: flip(file, 30),
    "two blocks in each other's place": lambda folder, file: swap(file),
    "a longer file": lambda folder, file: file.write_bytes(file.read_bytes() + b"\0"),
    "another step": lambda folder, file: change_json(folder / "state.json", step=2),
    "no files": lambda folder, file: change_json(folder / "state.json", files={}),
    "torn state": lambda folder, file: (folder / "state.json").write_text("{"),
    "empty state": lambda folder, file: (folder / "state.json").write_text('{"files": {}}'),
    "zeros": lambda folder, file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_of_other_bytes_is_refused(damage, checkpoint, interrupted, tmp_path):  # noqa: F811
    out = shutil.copytree(interrupted, tmp_path / "out")
    (folder,) = out.glob("*/checkpoint")
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
