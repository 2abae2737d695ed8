"""full_scale/: published checkpoints in and out, rollouts, training in one and two processes, evaluation; all offline."""

import contextlib
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file

import full_scale.evaluate
import full_scale.load_hf
import full_scale.rollouts
from full_scale.load_hf import ChatTokenizer, load_pretrained, save_pretrained
from full_scale.rollouts import is_correct, read_problems, read_rollouts
from full_scale.train import CHUNK, HeadLogps
from losses import future_logits, token_logps
from stages import UserError

ROLLOUTS = ROOT / "tests" / "rollouts.jsonl"
SMALL = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 512, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CHECKPOINTS = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama, tied, long": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, no groups": ("Llama", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
}
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {{- message['content'] | trim + '<|im_end|>\\n' }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_checkpoint(folder, architecture="Qwen2", seed=0, dtype=torch.float32, **options):
    """A random checkpoint as transformers saves it, with a tokenizer trained on the rollouts' text -> transformers' model."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms are not random by themselves
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "embed" in name:
                parameter *= 20  # far from uniform predictions
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model


def make_tokenizer(folder):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|bos|>", "<|im_end|>", "<|im_start|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ROLLOUTS.read_text().splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    make_checkpoint(folder)
    return folder


# --- load_hf.py


@pytest.mark.parametrize(("architecture", "options"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_computes_what_transformers_does(architecture, options, tmp_path):
    theirs = make_checkpoint(tmp_path, architecture, **options)
    ours, _ = load_pretrained(tmp_path)
    tokens = torch.randint(300, (3, 150), generator=torch.Generator().manual_seed(1))  # beyond model.py's SHORT
    real = torch.arange(150) < torch.tensor([[150], [40], [97]])
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real.long()).logits
        torch.testing.assert_close(ours(tokens)[real], expected[real], atol=1e-5, rtol=1e-5)
    prompt = tokens[:1, :7]
    greedy = theirs.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(prompt, 32, -1, -1, temperature=0).tolist() == greedy[:, 7:].tolist()


@pytest.mark.parametrize(("architecture", "options"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_saved_checkpoint_is_the_loaded_one_bit_for_bit(architecture, options, tmp_path, monkeypatch):
    monkeypatch.setattr(full_scale.load_hf, "SHARD_BYTES", 20_000)
    theirs = make_checkpoint(tmp_path / "in", architecture, **options)
    model, _ = load_pretrained(tmp_path / "in")
    save_pretrained(model, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(again) is type(theirs)
    for (name, ours), (_, expected) in zip(again.state_dict().items(), theirs.state_dict().items()):
        assert torch.equal(ours, expected), name
    config = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("in", "out"))
    first, second = ({k: v for k, v in c.items() if k != "_name_or_path"} for c in config)
    assert first == second
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()


def test_a_checkpoint_replaces_a_larger_one(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    model, _ = load_pretrained(tmp_path)
    monkeypatch.setattr(full_scale.load_hf, "SHARD_BYTES", 20_000)
    save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    with torch.no_grad():
        model.norm.weight.fill_(7)
    save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (load_pretrained(tmp_path)[0].norm.weight == 7).all()


def test_weights_are_cast_on_the_way(tmp_path):
    theirs = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    wide, _ = load_pretrained(tmp_path)
    narrow, _ = load_pretrained(tmp_path, torch.bfloat16)
    expected = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(wide.layers[1].mlp.up_proj.weight, expected.float())
    assert torch.equal(narrow.layers[1].mlp.up_proj.weight, expected)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder, **places):
    """An index that puts every tensor into model.safetensors but those of `places`."""
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, **places}}))


DAMAGES = {
    "architecture": (lambda f: change_config(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel is not supported, only L"),
    "no architecture": (lambda f: change_config(f, architectures=None), "architecture none is not supported"),
    "rope": (lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), "rotary scaling 'yarn'"),
    "window": (lambda f: change_config(f, use_sliding_window=True), "sliding windows"),
    "activation": (lambda f: change_config(f, hidden_act="gelu"), "activation 'gelu'"),
    "heads": (lambda f: change_config(f, num_attention_heads=5, head_dim=None), "d_model 32 must split"),
    "text for a number": (lambda f: change_config(f, num_attention_heads="4"), 'num_attention_heads is "4", not a whole'),
    "no width": (lambda f: change_config(f, hidden_size=None), "hidden_size is null, not a whole number"),
    "negative": (lambda f: change_config(f, vocab_size=-1), "vocab_size is -1, not a whole number of at least 1"),
    "no epsilon": (lambda f: change_config(f, rms_norm_eps=None), "rms_norm_eps is null, not a number above 0"),
    "rope of another kind": (lambda f: change_config(f, rope_parameters=[1]), "rope_parameters is [1], not an object"),
    "rope without factor": (lambda f: change_config(f, rope_parameters={"rope_type": "llama3"}), "factor is null, not a"),
    "text for architectures": (lambda f: change_config(f, architectures="Qwen"), "architecture Qwen is not supported"),
    "eos of another kind": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'), "eos_token_id is"),
    "eos token of another kind": (lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": 5}'), "eos_token is 5"),
    "torn config": (lambda f: (f / "config.json").write_text('{"archi'), "config.json: not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "(.bin, .pt) are refused"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 9000), "model.safetensors: not a whole safetensors file"),
    "outside": (lambda f: shard(f, **{"model.norm.weight": "../x.safetensors"}), "model.norm.weight is in '../x.safetensors'"),
    "absolute": (lambda f: shard(f, **{"model.norm.weight": "/x.safetensors"}), "model.norm.weight is in '/x.safetensors'"),
    "missing shard": (lambda f: shard(f, **{"model.norm.weight": "x.safetensors"}), "x.safetensors: this shard is missing"),
    "index of nothing": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "missing tensor": (lambda f: change_tensor(f, lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
    "strange tensor": (lambda f: change_tensor(f, lambda t: t.update(x=torch.ones(1))), "tensor x has no place"),
    "shape": (lambda f: change_tensor(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
              "model.safetensors: tensor model.norm.weight is of shape [31], not [32]"),
    "type": (lambda f: change_tensor(f, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
             "model.safetensors: tensor model.norm.weight is of type I8"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
    "template": (lambda f: (f / "chat_template.jinja").write_text("{% if %}"), "the chat template"),
    "no end": (lambda f: (change_config(f, eos_token_id=None), (f / "tokenizer_config.json").unlink(),
                          (f / "generation_config.json").unlink()), "no eos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_line(damage, message, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(SystemExit) as caught:
        full_scale.load_hf.run([str(folder)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises(UserError):
        load_pretrained(folder)


def test_the_tokenizer_is_transformers_own(checkpoint):
    ours, theirs = ChatTokenizer(checkpoint), transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    text = "48+7=55; “ü” \\boxed{5}\n"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    for messages in (
        [{"role": "user", "content": " 1+1? "}],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "é"}],
    ):
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == rendered
    assert ours.eos == 1
    assert ours.stops == {1}


def test_a_text_that_has_its_bos_gets_no_second_one(tmp_path):
    make_checkpoint(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = ChatTokenizer(tmp_path)
    assert ours.encode("1")[0] == 0
    assert ours.encode("<|bos|>1") == ours.encode("1")
    assert ours.encode("1", special=False) == ours.encode("1")[1:]


def test_the_loader_says_what_a_checkpoint_is(checkpoint, capsys):
    full_scale.load_hf.run([str(checkpoint), "--tokens", "3"])
    out = capsys.readouterr().out
    parameters = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    assert f"Qwen2ForCausalLM, {parameters / 1e9:.2f} billion parameters" in out
    assert "fp32" in out
    assert "bf16" in out


@pytest.mark.parametrize("module", ["load_hf", "rollouts", "train", "evaluate"])
def test_without_the_extra_packages_it_says_what_to_install(module):
    code = (
        "import importlib.util, runpy, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *rest: None if name == 'math_verify' else find(name, *rest); "
        f"runpy.run_module('full_scale.{module}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "full_scale: error: math_verify not installed: pip install -r full_scale/requirements.txt\n"


# --- train.py: log-probabilities in chunks


@pytest.mark.parametrize("positions", [1, CHUNK, 2 * CHUNK + 3])
def test_chunked_log_probabilities_and_their_gradient_are_the_plain_ones(positions):
    torch.manual_seed(0)
    hidden, head, ref_hidden, ref_head = (torch.randn(n, 16) for n in (positions, 50, positions, 50))
    targets, upstream = torch.randint(50, (positions,)), torch.randn(positions)
    hidden.requires_grad_(), head.requires_grad_()

    present, future = HeadLogps.apply(hidden, head, targets, ref_hidden, ref_head, 2.0)
    gradients = torch.autograd.grad(present @ upstream, (hidden, head))

    logits, ref_logits = hidden @ head.T, ref_hidden @ ref_head.T
    tokens, mask = torch.cat([targets[:1], targets])[None], torch.arange(positions + 1)[None] > 0
    pad = torch.nn.functional.pad
    expected = token_logps(pad(logits, (0, 0, 0, 1))[None], tokens, mask)[0]
    expected_future = token_logps(pad(future_logits(logits, ref_logits, 2.0), (0, 0, 0, 1))[None], tokens, mask)[0]
    torch.testing.assert_close(present, expected)
    torch.testing.assert_close(future, expected_future)
    assert not future.requires_grad
    for ours, plain in zip(gradients, torch.autograd.grad(expected @ upstream, (hidden, head))):
        torch.testing.assert_close(ours, plain)


def test_log_probabilities_are_finite_at_the_extremes():
    hidden, head = torch.tensor([[1e4], [-1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    present, future = HeadLogps.apply(hidden, head, torch.tensor([1, 1]), torch.zeros(2, 1), torch.zeros(3, 1), 10.0)
    present.sum().backward()
    for values in (present, future, hidden.grad, head.grad):
        assert values.isfinite().all()
    assert present[0] == -2e4


# --- rollouts.py and evaluate.py


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_rollouts_of_every_form_are_read(checkpoint, tmp_path):
    tokenizer = ChatTokenizer(checkpoint)
    question = [{"role": "user", "content": "1+1?"}]
    path = write(
        tmp_path / "rollouts.jsonl",
        {"prompt": "2+2?", "completion": "4", "label": True, "finished": False},
        {"prompt": question, "chosen": [{"role": "assistant", "content": "2"}], "rejected": "3"},
        "",
        {"prompt": "2+2?", "completion": "5", "label": False},
        {"prompt": "2+2?", "completion": "", "label": False, "finished": True},  # as rollouts.py writes an end at once
    )
    rendered = tokenizer.render(question)
    assert rendered.endswith("<|im_start|>assistant\n")
    rows = [tuple(row.values()) for row in read_rollouts(path, tokenizer)]
    assert rows == [
        (1, "2+2?", "4", True, False, 0),
        (2, rendered, "2", True, True, 1),
        (2, rendered, "3", False, True, 1),
        (4, "2+2?", "5", False, True, 0),
        (5, "2+2?", "", False, True, 0),
    ]


BAD_LINES = {
    "not JSON": ('{"prompt": ', "line 2: "),
    "not an object": ("[1]", "line 2: not a JSON object"),
    "no label": ({"prompt": "a", "completion": "b"}, "line 2: no label"),
    "no prompt": ({"completion": "b", "label": True}, "line 2: no prompt"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "line 2: no rejected"),
    "label": ({"prompt": "a", "completion": "b", "label": 1}, "line 2: label is 1, neither true nor false"),
    "empty": ({"prompt": "a", "completion": "", "label": True}, "line 2: completion is empty"),
    "number": ({"prompt": 3, "completion": "b", "label": True}, "line 2: neither a text nor a list of messages"),
    "messages": ({"prompt": [{"role": "user"}], "completion": "b", "label": True}, "line 2: neither a text nor a list"),
    "two answers": (
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}] * 2, "label": True},
        "line 2: neither a text",
    ),
    "answer of another kind": ({"prompt": "a", "completion": [{"role": "x", "content": 5}], "label": True}, "line 2: neither"),
    "finished": ({"prompt": "a", "completion": "b", "label": True, "finished": "no"}, 'line 2: finished is "no"'),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(line, message, checkpoint, tmp_path):
    path = write(tmp_path / "rollouts.jsonl", {"prompt": "a", "completion": "b", "label": True}, line)
    with pytest.raises(UserError, match=f"^{path}, {message}"):
        read_rollouts(path, ChatTokenizer(checkpoint))


def test_problems_of_the_usual_dumps_are_read(tmp_path):
    path = write(
        tmp_path / "problems.jsonl",
        {"question": "Half of 3?", "answer": "3/2 is 1.5\n#### 1.5"},
        {"question": "1+1?", "answer": 2},
        {"question": "x?", "answer": ["\\frac{1}{2}"]},
    )
    assert read_problems(path, ("question", "answer")) == [("Half of 3?", "1.5"), ("1+1?", "2"), ("x?", "\\frac{1}{2}")]
    with pytest.raises(UserError, match="line 1: no problem, only question, answer: map the fields by --fields"):
        read_problems(path)
    with pytest.raises(UserError, match=r"line 1: answer is \[\"1\", \"2\"\], not a text or a number"):
        read_problems(write(path, {"problem": "x?", "answer": ["1", "2"]}))
    with pytest.raises(UserError, match="empty"):
        read_problems(write(path, ""))
    with pytest.raises(UserError, match="nowhere.jsonl: No such file"):
        read_problems(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("answer", "completion", "correct"),
    [
        ("73", "7*2=14; 59+14=73; \\boxed{73}", True),
        ("73", "59+14=73, so \\boxed{74}", False),
        ("\\frac{1}{2}", "It is $\\boxed{0.5}$.", True),
        ("(1,2)", "\\boxed{(2,1)}", False),
        ("4", "first \\boxed{3}, no: \\boxed{4}", True),
        ("3", "first \\boxed{3}, no: \\boxed{4}", False),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}} and an unfinished \\boxed{\\frac{1", True),
        ("5", "no answer", False),
        ("5", "", False),
    ],
)
def test_answers_are_verified(answer, completion, correct):
    assert is_correct(answer, completion) is correct


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


def test_from_problems_to_rollouts_to_training_to_evaluation(taught, tmp_path):
    folder, problems = taught
    done = sample(folder, problems, tmp_path / "rollouts.jsonl", "--n", 4)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 32
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
    mean, error, count = full_scale.evaluate.pass_at_1(rows)
    assert (count, len(rows)) == (8, 64)
    assert f"pass@1 {mean:.4f} ± {error:.4f} (standard error over 8 problems, 8 samples each)" in done.stdout


def test_pass_at_1_averages_problems():
    labels = [[1, 1], [0, 1], [0, 0]]
    rows = [{"problem_id": i, "label": bool(label)} for i, some in enumerate(labels) for label in some]
    mean, error, problems = full_scale.evaluate.pass_at_1(rows)
    assert (mean, problems) == (0.5, 3)
    assert error == pytest.approx(0.5 / math.sqrt(3))


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
        ("--model", str(tmp_path)): "no *.safetensors",
        ("--n", "0"): "argument --n: must be a whole number of at least 1",
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


def train(checkpoint, out, *flags, data=ROLLOUTS, processes=1):
    """Train on the shipped rollouts -> the log's columns but for the times."""
    done = run_module("train", "--init", checkpoint, "--data", data, "--out", out, *QUICK, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    return log_of(out)


def log_of(out):
    (path,) = out.glob("*/log.csv")
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


def test_two_processes_train_as_one_does(checkpoint, alone, tmp_path):
    assert_logs_agree(train(checkpoint, tmp_path, processes=2), alone[1], rtol=1e-4)
    weights = [load_file(next(out.glob("*/model/model.safetensors"))) for out in (alone[0], tmp_path)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-4)


def test_a_live_reference_is_the_cached_one(checkpoint, alone, tmp_path):
    assert_logs_agree(train(checkpoint, tmp_path, "--reference", "live"), alone[1], rtol=1e-5)
    assert list(alone[0].glob("cache/*/hidden-*"))
    assert not list(tmp_path.glob("cache/*/hidden-*"))


def test_recomputing_activations_changes_nothing(checkpoint, alone, tmp_path):
    assert_logs_agree(train(checkpoint, tmp_path, "--no-recompute"), alone[1], rtol=1e-5)


def test_micro_batches_add_up(checkpoint, alone, tmp_path):
    assert_logs_agree(train(checkpoint, tmp_path, "--micro-batch", 8), alone[1], rtol=1e-4)


def test_the_log_starts_at_the_reference(alone):
    log = alone[1]
    assert abs(log[0]["logratio_correct"]) < 1e-4
    assert log[0]["pi_incorrect"] == pytest.approx(log[0]["pihat_incorrect"], rel=1e-5)
    assert log[-1]["logratio_correct"] - log[-1]["logratio_incorrect"] > 0.1
    assert log[-1]["coefficient_incorrect"] < log[-1]["pi_incorrect"] * 1.5


@pytest.mark.parametrize(
    "loss", ["off_rl", "simper", "dpo", "rpo", "kto", "a_star_po", "pessimistic", "sft", "constant", "sharpened"]
)
def test_every_loss_trains(loss, checkpoint, tmp_path):
    log = train(checkpoint, tmp_path, "--loss", loss, "--steps", 6)
    assert log[-1]["logratio_correct"] > log[-1]["logratio_incorrect"]


@pytest.mark.parametrize("flags", [("--loss", "kto", "--lam", 2), ("--loss", "dpo")], ids=["rows", "pairs"])
def test_two_processes_share_z0_and_pairs(flags, checkpoint, tmp_path):
    logs = [train(checkpoint, tmp_path / str(n), *flags, processes=n) for n in (1, 2)]
    assert_logs_agree(logs[1], logs[0], rtol=1e-4)


def test_bfloat16_products_change_little(checkpoint, alone, tmp_path):
    log = train(checkpoint, tmp_path, "--precision", "bf16")
    assert log != alone[1]
    assert_logs_agree(log, alone[1], rtol=0.05)


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


def saved_step(out):
    return max((json.loads(path.read_text())["step"] for path in out.glob("*/checkpoint/state.json")), default=0)


@pytest.mark.parametrize("flags", [(), ("--eval-every", 4, "--save-every", 3)], ids=["each step", "off the grid"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(flags, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(full_scale.train, "SHARD_BYTES", 20_000)  # so that a checkpoint is of several files
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


def test_a_run_killed_from_outside_goes_on(checkpoint, alone, tmp_path):
    flags = ["--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK]
    command = [sys.executable, "-m", "full_scale.train", *map(str, flags)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if line.startswith("step     4/"):  # the checkpoint of step 2 is there, that of 4 perhaps
            os.kill(running.pid, signal.SIGKILL)
            break
    running.wait()
    done = run_module("train", *flags)
    assert "from step " in done.stdout
    assert_logs_agree(log_of(tmp_path), alone[1], rtol=1e-6)


@pytest.mark.parametrize("moment", ["part is whole", "old is moved", "old is half gone", "part is half written"])
def test_a_checkpoint_that_was_being_replaced_is_taken_up(moment, checkpoint, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, lambda: saved_step(tmp_path) == 4)
        interrupt(checkpoint, tmp_path)
    (whole,) = tmp_path.glob("*/checkpoint")
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
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "from step 4" in done.stdout
    assert_logs_agree(log_of(tmp_path), alone[1], rtol=1e-6)


def test_a_checkpoint_without_one_of_its_files_is_not_taken_up(checkpoint, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, lambda: saved_step(tmp_path) == 4)
        interrupt(checkpoint, tmp_path)
    next(tmp_path.glob("*/checkpoint/*.safetensors")).unlink()
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK)
    assert "resuming" not in done.stdout
    assert_logs_agree(log_of(tmp_path), alone[1], rtol=1e-6)


def test_a_run_goes_on_in_another_number_of_processes(checkpoint, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, lambda: saved_step(tmp_path) == 2)
        interrupt(checkpoint, tmp_path)
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK, processes=2)
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stdout
    assert_logs_agree(log_of(tmp_path), alone[1], rtol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves(number, checkpoint, tmp_path, monkeypatch):
    expected = train(checkpoint, tmp_path / "whole", "--save-every", 100)
    original, steps = full_scale.train.training_step, iter(range(10))

    def signalled(*arguments):
        if next(steps) == 2:
            os.kill(os.getpid(), number)
        return original(*arguments)

    flags = ["--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path / "stopped", *QUICK, "--save-every", 100]
    with monkeypatch.context() as patch:
        patch.setattr(full_scale.train, "training_step", signalled)
        done = run_module("train", *flags)
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted: what is saved in ") and done.stderr.count("\n") == 1
    done = run_module("train", *flags)
    assert "from step 3" in done.stdout
    same(log_of(tmp_path / "stopped"), expected)


def test_other_data_or_weights_are_another_run(checkpoint, tmp_path):
    folder, data = shutil.copytree(checkpoint, tmp_path / "checkpoint"), tmp_path / "rollouts.jsonl"
    data.write_text(ROLLOUTS.read_text())
    first = train(folder, tmp_path / "1", data=data)
    data.write_text(ROLLOUTS.read_text().replace("First", "Now"))
    train(folder, tmp_path / "2", data=data)
    data.write_text(ROLLOUTS.read_text())
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 30.0})
    train(folder, tmp_path / "3", data=data)
    change_tensor(folder, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    train(folder, tmp_path / "4", data=data)
    names = {name: {path.name for path in tmp_path.glob(name)} for name in ("*/checkpoint-*", "*/cache/*")}
    assert [len(some) for some in names.values()] == [4, 4]
    assert abs(first[0]["logratio_correct"]) < 1e-4


def test_a_prompt_of_no_token_is_named(checkpoint, tmp_path):
    lines = ROLLOUTS.read_text().splitlines()
    data = write(tmp_path / "rollouts.jsonl", *lines, {"prompt": "", "completion": "1", "label": True})
    done = run_module("train", "--init", checkpoint, "--data", data, "--out", tmp_path, *QUICK)
    assert done.returncode == 2
    assert f"{data}, line 33: a prompt of no token" in done.stderr


def test_the_end_is_trained_once(checkpoint, tmp_path):
    lines = [json.loads(line) for line in ROLLOUTS.read_text().splitlines()]
    ended = [{**line, "completion": line["completion"] + "<|im_end|>"} for line in lines]
    cut = [{**line, "finished": False} for line in lines]
    tokens = []
    for name, rows in (("plain", lines), ("ended", ended), ("cut", cut)):
        log = train(checkpoint, tmp_path / name, data=write(tmp_path / f"{name}.jsonl", *rows))
        tokens.append(log[-1]["tokens_sampled"])
    assert tokens[0] == tokens[1] == tokens[2] + 32


def test_plots_draws_the_log(alone, tmp_path):
    command = [sys.executable, "plots.py", str(alone[0]), "--to", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dynamics.png").exists()
    assert "8 prompts × 4 rollouts" in (tmp_path / "results.md").read_text()
    (toy,) = (ROOT / "logs").glob("fpa-lam2-both-prompts1024-steps1000-lr0.0002-seed0-*")
    both = shutil.copytree(alone[0], tmp_path / "both")
    shutil.copytree(toy, both / toy.name)
    done = subprocess.run([*command[:2], str(both), *command[3:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


BAD_COMMANDS = {
    "--loss grpo": "grpo samples at every step",
    "--loss dpo fpa": "one method a run",
    "--lam 1 2": "one method a run",
    "--loss sft --lam 1": "argument --lam: sft has none",
    "--micro-batch 3": "argument --micro-batch: must be even",
    "--micro-batch 16 --batch-size 8": "divide --batch-size 8",
    "--lr 0": "argument --lr: must be a finite number above 0",
    "--init nowhere/at all": "nowhere/at all: no such folder, nor from the hub",
    "--data nowhere.jsonl": "nowhere.jsonl: No such file",
    "--max-length 3": "needs correct and incorrect rows, and has 0",
}


def test_a_disk_too_small_for_the_reference_is_one_line(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *QUICK)
    assert done.returncode == 2
    assert "the reference takes 0.0 GB, and 0.0 GB are free" in done.stderr
    assert not list(tmp_path.glob("cache/*/*"))
    assert train(checkpoint, tmp_path, "--loss", "off_rl")  # needs none


@pytest.mark.parametrize(("flags", "message"), BAD_COMMANDS.items(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_line(flags, message, checkpoint, tmp_path):
    words = flags.replace("nowhere/at all", "nowhere/at~all").split()
    words = [word.replace("~", " ") for word in words]
    done = run_module("train", "--init", checkpoint, "--data", ROLLOUTS, "--out", tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("*/log.csv"))
