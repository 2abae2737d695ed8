"""full_scale/ in this process: published checkpoints in and out, rollouts and problems read."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file

import full_scale.load_hf
import full_scale.rollouts
from full_scale.load_hf import ChatTokenizer, load_pretrained, save_pretrained
from full_scale.rollouts import read_problems
from full_scale.rows import read_rollouts
from plumbing.files import UserError

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
    "{% for message in messages %}{% if message['role'] == 'refused' %}{{ raise_exception('no such role') }}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
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
    named = "additional_chat_templates/rag.jinja"
    (tmp_path / "in" / named).parent.mkdir()
    (tmp_path / "in" / named).write_text("{{ messages[0].content }}")
    save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / named).read_text() == "{{ messages[0].content }}"
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


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_config(folder, **changes):
    change_json(folder / "config.json", **changes)


def change_tensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder, **places):
    """An index that puts every tensor into one file but those of `places`."""
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "one.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, **places}}))


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": 1}
DAMAGES = {
    "architecture": (lambda f: change_config(f, architectures=["GPT2LMHeadModel"]), '"GPT2LMHeadModel" is not supported'),
    "no architecture": (lambda f: change_config(f, architectures=None), 'architecture "none" is not supported'),
    "rope": (lambda f: change_config(f, rope_scaling={"type": "yarn", "factor": 4.0}), "rotary scaling 'yarn'"),
    "window": (lambda f: change_config(f, **WINDOW), "sliding windows"),
    "activation": (lambda f: change_config(f, hidden_act="gelu"), "activation 'gelu'"),
    "heads": (lambda f: change_config(f, num_attention_heads=5), "d_model 32 must split"),
    "text for a number": (lambda f: change_config(f, num_attention_heads="4"), "'num_attention_heads' expected int, got str"),
    "no width": (lambda f: change_config(f, hidden_size=None), "'hidden_size' expected int, got NoneType"),
    "negative": (lambda f: change_config(f, vocab_size=-1), "vocab_size is -1, not a whole number from 1 to 2,147,483,647"),
    "no epsilon": (lambda f: change_config(f, rms_norm_eps=None), "'rms_norm_eps' expected float, got NoneType"),
    "rope of another kind": (lambda f: change_config(f, rope_parameters=[1]), "Field 'rope_parameters' with value [1]"),
    "rope without factor": (lambda f: change_config(f, rope_parameters={"rope_type": "llama3"}), "Missing required keys"),
    "text for architectures": (lambda f: change_config(f, architectures="Qwen"), 'architecture "Qwen" is not supported'),
    "eos of another kind": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'), "eos_token_id is"),
    "eos token of another kind": (lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": 5}'), "eos_token is 5"),
    "torn config": (lambda f: (f / "config.json").write_text('{"archi'), "config.json: not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "(.bin, .pt) are refused"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 9000), "model.safetensors: not a whole safetensors file"),
    "outside": (lambda f: shard(f, **{"model.norm.weight": "../x.safetensors"}), "model.norm.weight is in '../x.safetensors'"),
    "absolute": (lambda f: shard(f, **{"model.norm.weight": "/x.safetensors"}), "model.norm.weight is in '/x.safetensors'"),
    "missing shard": (lambda f: shard(f, **{"model.norm.weight": "x.safetensors"}), "x.safetensors: this shard is missing"),
    "index of nothing": (lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{}")), "no weight_map"),
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


def sparse(folder, size):
    """A file that claims to be of a size, and takes no room."""
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def link(folder, name, target):
    target.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def header(folder, text):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


HOSTILE = {
    "header beyond the file": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x00{}"), "not a whole s"),
    "data beyond the file": (
        lambda f: header(f, {"x": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}), "not a whole s"),
    "shape beyond the data": (
        lambda f: header(f, {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}}), "not a whole s"),
    "shape that overflows": (
        lambda f: header(f, {"x": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 64]}}), "not a whole s"),
    "overlapping tensors": (
        lambda f: header(f, {n: {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]} for n in "ab"}), "not a whole s"),
    "header of noise": (lambda f: header(f, b"\x80\x04\x95pickle"), "not a whole s"),
    "sparse terabytes": (lambda f: sparse(f, 2**42), "model.safetensors: "),  # its shape, or that it cannot be mapped
    "more layers than memory": (
        lambda f: change_config(f, num_hidden_layers=1000, layer_types=None, intermediate_size=2**31 - 1), "fp32, and this m"),
    "layers without end": (lambda f: change_config(f, num_hidden_layers=10**8), "not a whole number from 1 to 1,000"),
    "number beyond floats": (lambda f: change_config(f, rms_norm_eps=10**400), "'rms_norm_eps' "),
    "angle beyond floats": (
        lambda f: change_config(f, rope_parameters={"rope_type": "default", "rope_theta": 10**400}), "…, not a number above 0"),
    "end beyond the vocabulary": (
        lambda f: (f / "generation_config.json").write_text(f'{{"eos_token_id": {2**70}}}'), "eos_token_id is [1180591620717"),
    "weights that are not finite": (
        lambda f: change_tensor(f, lambda t: t["model.norm.weight"].fill_(math.nan)), "model.norm.weight has values that are"),
    "more words than memory": (lambda f: change_config(f, vocab_size=2**31 - 1, hidden_size=2**20), "fp32, and this machine"),
    "sizes that overflow": (
        lambda f: change_config(f, vocab_size=2**31 - 1, hidden_size=2**30, intermediate_size=2**31 - 1, num_attention_heads=2,
                                num_key_value_heads=2), "fp32, and this machine"),
    "no whole number": (lambda f: change_config(f, vocab_size=1e300), "'vocab_size' expected int, got float (value: 1e+300)"),
    "weights linked out": (lambda f: link(f, "model.safetensors", f.parent / "out"), "a link out of the folder"),
    "config linked out": (lambda f: link(f, "config.json", f.parent / "out"), "a link out of the folder"),
    "tokenizer linked out": (lambda f: link(f, "tokenizer.json", f.parent / "out"), "a link out of the folder"),
    "shard in a folder": (lambda f: shard(f, **{"model.norm.weight": "x/y.safetensors"}), "outside the folder"),
    "shard in the parent": (lambda f: shard(f, **{"model.norm.weight": ".."}), "is in '..', "),
    "shard of nothing": (lambda f: shard(f, **{"model.norm.weight": ""}), "is in '', "),
    "shard that is a pickle": (
        lambda f: shard(f, **{"model.norm.weight": "pytorch_model.bin"}), "not a safetensors file"),
    "index of numbers": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')), "no weight_map"),
    "config of brackets": (lambda f: (f / "config.json").write_text("[" * 10**5), "nested too deep"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: not UTF-8"),
    "config that is a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), "config.json: not a file"),
    "template that reaches for classes": (
        lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1] }}"), "refuses these messages: access to"),
    "template that divides by zero": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "the chat template refuses these messages: division"),
    "template without end": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 'a' * 10**15 }}"), "the chat template refuses these messages"),
    "template of brackets": (
        lambda f: (f / "chat_template.jinja").write_text("{{" + "(" * 5000), "the chat template refuses these messages"),
    "weights that are a link to themselves": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to("model.safetensors")),
        "model.safetensors: "),
    "template of bytes": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "the chat template: 'utf-8' codec"),
    "templates without names": (
        lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": [{}]}'), "the chat template: 'name'"),
    "tokenizer of noise": (lambda f: (f / "tokenizer.json").write_bytes(b"\x00\xff"), "tokenizer.json"),
    "remote code": (
        lambda f: change_config(f, auto_map={"AutoModelForCausalLM": "x.Y"}, architectures=["Y"]), 'architecture "Y" is not'),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), {**DAMAGES, **HOSTILE}.values(), ids=[*DAMAGES, *HOSTILE])
def test_a_damaged_or_hostile_checkpoint_is_one_line(damage, message, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(SystemExit) as caught:
        full_scale.load_hf.run([str(folder)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises(UserError):
        load_pretrained(folder)[1].ask("1+1?")


def test_the_hubs_own_links_are_followed_and_no_others(checkpoint, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(checkpoint, snapshot)
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    load_pretrained(snapshot)
    (blobs / "config.json").rename(tmp_path / "config.json")
    (blobs / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UserError, match=f"config.json: a link out of the folder, to {tmp_path / 'config.json'}"):
        load_pretrained(snapshot)


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


def test_a_text_that_the_checkpoint_has_no_tokens_for_is_refused(tmp_path):
    make_checkpoint(tmp_path, "Llama")
    path = tmp_path / "tokenizer.json"
    larger = tokenizers.Tokenizer.from_file(str(path))
    larger.add_tokens(["<|more|>"] + [f"<|{i}|>" for i in range(1000)])
    larger.save(str(path))
    ours = ChatTokenizer(tmp_path)
    assert ours.encode("1+1")
    with pytest.raises(UserError, match=r"the tokenizer makes token \d+ of \"1<\|999\|>\", and the vocabulary is of "):
        ours.encode("1<|999|>")
    with pytest.raises(UserError, match="a prompt of no token"):
        ours.encode("")
    assert ours.encode("", special=False) == []
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|im_end|>": 1}, unk_token="?")).save(str(path))
    with pytest.raises(UserError, match='the tokenizer refuses "b": '):
        ChatTokenizer(tmp_path).encode("b")


def test_the_loader_says_what_a_checkpoint_is(checkpoint, capsys, monkeypatch):
    full_scale.load_hf.run([str(checkpoint), "--tokens", "3"])
    out = capsys.readouterr().out
    parameters = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    model = load_pretrained(checkpoint)[0]
    assert full_scale.load_hf.parameter_count(model) == parameters and "Qwen2ForCausalLM, 0.00 billion parameters" in out
    monkeypatch.setattr(full_scale.load_hf, "parameter_count", lambda model: 1_540_000_000)
    lines = full_scale.load_hf.describe("x", checkpoint, model).splitlines()
    assert "1.54 billion" in lines[0]
    for line, precision in zip(lines[-2:], ("fp32", "bf16"), strict=True):
        cells = [full_scale.load_hf.training_gib(model.config, 1_540_000_000, gpus, precision) for gpus in (1, 2, 4, 8)]
        assert line.split() == [precision, *(f"{cell:.0f}" for cell in cells)]


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


# --- rollouts.py and evaluate.py


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **others):
    return {"role": "assistant", "content": text, **others}


def test_rollouts_of_every_form_are_read(checkpoint, tmp_path):
    tokenizer = ChatTokenizer(checkpoint)
    question = [user("1+1?")]
    path = write(
        tmp_path / "rollouts.jsonl",
        {"prompt": "2+2?", "completion": "4", "label": True, "finished": False},
        {"prompt": question, "chosen": [assistant("2")], "rejected": "3"},
        "",
        {"prompt": "2+2?", "completion": "5", "label": False},
        {"prompt": "2+2?", "completion": "", "label": False, "finished": True},  # as rollouts.py writes an end at once
    )
    rendered = tokenizer.render(question)
    assert rendered.endswith("<|im_start|>assistant\n")
    names = ("prompt", "completion", "label", "finished", "problem_id")
    rows = [tuple(row[name] for name in names) for row in read_rollouts(path, tokenizer)]
    assert rows == [
        ("2+2?", "4", True, False, 0),
        (rendered, "2", True, True, 1),
        (rendered, "3", False, True, 1),
        ("2+2?", "5", False, True, 0),
        ("2+2?", "", False, True, 0),
    ]


BAD_LINES = {
    "not JSON": ('{"prompt": ', "line 2: "),
    "not an object": ("[1]", "line 2: not a JSON object"),
    "no label": ({"prompt": "a", "completion": "b"}, "line 2: no label"),
    "no prompt": ({"completion": "b", "label": True}, "line 2: no prompt"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "line 2: no rejected"),
    "label": ({"prompt": "a", "completion": "b", "label": 2}, "line 2: label is 2, not true or false"),
    "empty": ({"prompt": "a", "completion": "", "label": True}, "line 2: completion is empty"),
    "no token": (
        {"prompt": "a", "completion": "", "label": True, "finished": True, "stop_reason": "Q:"},
        "line 2: completion is empty",
    ),
    "number": ({"prompt": 3, "completion": "b", "label": True}, "line 2: prompt is 3, neither a text nor a list of messages"),
    "messages": (
        {"prompt": [{"role": "user"}], "completion": "b", "label": True},
        'line 2: prompt is [{"role": "user"}], neither',
    ),
    "two answers": (
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}] * 2, "label": True},
        'line 2: completion is [{"role": "assistant"',
    ),
    "answer of another kind": (
        {"prompt": "a", "completion": [{"role": "x", "content": 5}], "label": True},
        "line 2: completion",
    ),
    "messages that the template refuses": (
        {"prompt": [{"role": "user", "content": "b"}, {"role": "refused", "content": ""}], "completion": "b", "label": True},
        "line 2: the chat template refuses these messages: no such role",
    ),
    "finished": ({"prompt": "a", "completion": "b", "label": True, "finished": "no"}, 'line 2: finished is "no"'),
    "nested": ('{"prompt": "a", "completion": "b", "label": ' + "[" * 985 + "]" * 985 + "}", "line 2: "),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(line, message, checkpoint, tmp_path):
    path = write(tmp_path / "rollouts.jsonl", {"prompt": "a", "completion": "b", "label": True}, line)
    with pytest.raises(UserError) as error:
        read_rollouts(path, ChatTokenizer(checkpoint))
    assert str(error.value).startswith(f"{path}: 1 of 2 lines are bad: {message}")


def test_problems_of_the_usual_dumps_are_read(tmp_path):
    path = write(
        tmp_path / "problems.jsonl",
        {"question": "Half of 3?", "answer": "3/2 is 1.5\n#### 1.5"},
        {"question": "1+1?", "answer": 2},
        {"question": "x?", "answer": ["\\frac{1}{2}"]},
    )
    assert read_problems(path, ("question", "answer")) == [("Half of 3?", "1.5"), ("1+1?", "2"), ("x?", "\\frac{1}{2}")]


BAD_PROBLEMS = {
    "other fields": ({"question": "x", "answer": 1}, "no problem, only question, answer: map the fields by --fields"),
    "two answers": ({"problem": "x?", "answer": ["1", "2"]}, 'answer is ["1", "2"], not a text or a number'),
    "no answer": ({"problem": "x?", "answer": None}, "answer is null, not a text or a number"),
    "blank": ({"problem": " ", "answer": 1}, 'problem is " ", not a text or a number'),
    "not JSON": ("{", "not JSON: "),
    "not an object": ("3", "not a JSON object"),
}


@pytest.mark.parametrize(("line", "message"), BAD_PROBLEMS.values(), ids=BAD_PROBLEMS)
def test_a_bad_problem_is_named(line, message, tmp_path, capsys):
    path = write(tmp_path / "problems.jsonl", {"problem": "1+1?", "answer": 2}, line)
    with pytest.raises(UserError) as error:
        read_problems(path)
    assert str(error.value).startswith(f"{path}: 1 of 2 lines are bad: line 2: {message}")
    assert read_problems(path, skip_bad=True) == [("1+1?", "2")]
    assert str(error.value) in capsys.readouterr().out
