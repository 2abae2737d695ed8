"""The weights of a checkpoint are those that transformers would read, or it is refused; never another number."""

import fnmatch
import functools
import json
import shutil
import struct
import tempfile
from pathlib import Path
from unittest import mock

import gguf
import hypothesis
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_docs import table
from test_full_scale import LLAMA3, ROLLOUTS, change_config, change_tensor, make_checkpoint
from test_full_scale_training import QUICK, run_module, write

import full_scale.load_hf
from full_scale import published
from full_scale.load_hf import checkpoint_key, fetch, load_pretrained, save_pretrained
from full_scale.published import gpt_config
from plumbing.files import UserError

TOKENS = torch.randint(290, (2, 40), generator=torch.Generator().manual_seed(1))
ARCHITECTURES = ("Llama", "Qwen2", "Qwen3")
transformers.utils.logging.disable_progress_bar()


def logits(folder, **words):
    """transformers' of a checkpoint."""
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **words).eval()(TOKENS).logits


def assert_same_or_refused(folder):
    """Read as transformers does -> True, or refused -> False."""
    try:
        with mock.patch.object(full_scale.load_hf, "ChatTokenizer"):  # another matter, and slow
            model, _ = load_pretrained(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return False
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), logits(folder), atol=1e-4, rtol=1e-4)
    return True


# --- config.json


THETA = {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}
SCALED = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
SPELLINGS = {
    "theta alone": ({"rope_parameters": None, "rope_theta": 1e6}, 1e6),
    "theta beside rope_parameters": (THETA, 1e6),
    "theta in both": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 1e6}, 500.0),
    "theta beside llama3": ({"rope_parameters": SCALED, "rope_theta": 5e5}, 5e5),
    "rope_scaling, the old name": ({"rope_parameters": None, "rope_scaling": SCALED, "rope_theta": 5e5}, 5e5),
    "rope_scaling beside rope_parameters": ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": SCALED}, 1e4),
    "type, the old name": ({"rope_parameters": None, "rope_scaling": {"type": "default"}, "rope_theta": 1e6}, 1e6),
    "no theta": ({"rope_parameters": None}, 1e4),
    "swish": ({"hidden_act": "swish"}, None),
    "no head_dim": ({"head_dim": None}, None),
}


@pytest.mark.parametrize(("changes", "theta"), SPELLINGS.values(), ids=SPELLINGS)
def test_a_config_is_read_as_transformers_reads_it(changes, theta, tmp_path):
    make_checkpoint(tmp_path, "Llama")
    change_config(tmp_path, **changes)
    assert theta is None or gpt_config(tmp_path).rope_theta == theta
    assert assert_same_or_refused(tmp_path)


def test_what_a_config_leaves_out_is_transformers_default(tmp_path):
    make_checkpoint(tmp_path, "Qwen3", head_dim=128, num_attention_heads=2, rms_norm_eps=1e-6, num_key_value_heads=2)
    raw = json.loads((tmp_path / "config.json").read_text())
    for name in ("head_dim", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_parameters"):
        del raw[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert gpt_config(tmp_path).own_head_dim == 128
    assert assert_same_or_refused(tmp_path)


STRANGE = {
    "two architectures": ({"model_type": "llama"}, 'architecture Qwen2ForCausalLM and model_type "llama" differ'),
    "no model_type": ({"model_type": None}, "architecture Qwen2ForCausalLM and model_type null differ"),
    "other weights": ({"transformers_weights": "other.safetensors"}, "transformers_weights is not supported"),
    "layers of their own": ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config is not supported"),
    "a part of a head": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "a part of a head"),
    "nested rope": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary scaling None"),
    "llama3 upside down": ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor must be below"),
    "labels without end": ({"num_labels": 10**12}, "num_labels is 1000000000000, not a whole number from 1 to 1,000"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is not supported"),
}


@pytest.mark.parametrize(("changes", "message"), STRANGE.values(), ids=STRANGE)
def test_a_config_that_says_other_than_the_weights_is_refused(changes, message, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    change_config(folder, **changes)
    with pytest.raises(UserError, match=message.replace("(", "\\(")):
        load_pretrained(folder)


ROPE = {
    "rope_theta": st.sampled_from([1e4, 5e5, 1000, None]),
    "rope_parameters": st.none() | st.fixed_dictionaries(
        {}, optional={"rope_type": st.sampled_from(["default", "llama3", "linear"]), "type": st.just("default"),
                      "rope_theta": st.sampled_from([500.0, 1e6]), "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
                      **{name: st.just(value) for name, value in SCALED.items() if name != "rope_type"}}),
    "rope_scaling": st.none() | st.just(SCALED) | st.fixed_dictionaries(
        {"type": st.sampled_from(["default", "llama3", "linear", "dynamic"])}, optional={"factor": st.sampled_from([1.0, 2])}),
    "partial_rotary_factor": st.sampled_from([None, 0.5]),
    "tie_word_embeddings": st.booleans(),
    "head_dim": st.sampled_from([None, 8]),
    "num_key_value_heads": st.sampled_from([None, 2]),
    "rms_norm_eps": st.sampled_from([1e-6, 1e-5]),
    "use_sliding_window": st.booleans(),
    "sliding_window": st.sampled_from([None, 8]),
    "layer_types": st.sampled_from([None, ["full_attention"] * 2, ["full_attention", "sliding_attention"]]),
    "max_window_layers": st.sampled_from([0, 1, 28]),
}  # fmt: skip


@functools.cache
def saved(architecture, **options):
    """A checkpoint of a kind, made once."""
    folder = Path(tempfile.mkdtemp(dir=saved.place))
    make_checkpoint(folder, architecture, **options)
    return folder


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory):
    saved.place = tmp_path_factory.mktemp("saved")
    return saved.place


@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(st.sampled_from(ARCHITECTURES), st.fixed_dictionaries({}, optional=ROPE))
def test_a_config_in_any_spelling_is_read_as_transformers_does_or_refused(place, architecture, changes):
    folder = place / "spelt"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved(architecture, head_dim=8), folder)
    raw = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types"):
        raw.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    hypothesis.event(f"read: {assert_same_or_refused(folder)}")


# --- files


def test_a_folder_saved_twice_is_read_as_the_second(tmp_path):
    theirs = make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    old = {path.name: path.read_bytes() for path in tmp_path.glob("model-*")}
    with torch.no_grad():
        theirs.model.norm.weight.fill_(7)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and len(old) > 2
    assert (load_pretrained(tmp_path)[0].norm.weight == 7).all()
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    assert (load_pretrained(tmp_path)[0].norm.weight == 7).all()
    assert assert_same_or_refused(tmp_path)


def test_a_tied_head_that_is_another_is_refused_by_both_names(tmp_path):
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    change_tensor(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert assert_same_or_refused(tmp_path)
    change_tensor(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight, and .*config.json ties them"):
        load_pretrained(tmp_path)


def test_an_adapter_of_the_hub_is_downloaded_and_refused(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "hub")
    (tmp_path / "hub" / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')

    def download(name, allow_patterns):
        shutil.copytree(tmp_path / name, tmp_path / "copy", ignore=lambda _, names: {
            name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
        })  # fmt: skip
        return tmp_path / "copy"

    def cut_off(name, allow_patterns):
        raise cut_off.error

    for cut_off.error, said in ((RuntimeError("peer closed\nconnection"), "peer closed"), (EOFError(), "EOFError")):
        monkeypatch.setattr(published, "snapshot_download", cut_off)
        with pytest.raises(UserError, match=f"hub/x: no such folder or file, nor from the hub: {said}$"):
            load_pretrained("hub/x")
    monkeypatch.setattr(published, "snapshot_download", download)
    with pytest.raises(UserError, match=r"adapter_config.json: adapters are not supported; merge it"):
        load_pretrained("hub")


SAVING = {
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "size": st.sampled_from(["5GB", "20KB", "60KB"]),
    "norm": st.sampled_from([0.5, 2.0]),
    "left": st.sampled_from(["all", "none", "whole", "index", "shards"]),  # of what was there before
}
DAMAGE = st.sampled_from(
    ["", "", "", "head", "tie", "untie", "drop a tensor", "one in two", "cast one", "shard gone", "other base"]
)


def damage(folder, kind):
    """What a hand or another program does to a folder."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = load_file(files[0])
    if kind == "head":
        tensors["lm_head.weight"] = load_file(files[-1]).get("lm_head.weight", torch.ones(300, 32)) * 2
    elif kind == "drop a tensor":
        tensors.pop(sorted(tensors)[0])
    elif kind == "one in two":
        tensors |= {name: tensor + 1 for name, tensor in list(load_file(files[-1]).items())[:1]}
    elif kind == "cast one":
        tensors = {name: tensor.to(torch.float16 if i else torch.float32) for i, (name, tensor) in enumerate(tensors.items())}
    elif kind == "other base":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    elif kind in ("tie", "untie"):
        return change_config(folder, tie_word_embeddings=kind == "tie")
    elif kind == "shard gone":
        return files[-1].unlink()
    return save_file(tensors, files[0], metadata={"format": "pt"}) if kind and tensors else None


@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    st.sampled_from(ARCHITECTURES), st.booleans(), st.lists(st.fixed_dictionaries(SAVING), min_size=1, max_size=3), DAMAGE
)
def test_a_checkpoint_saved_in_any_way_is_read_as_transformers_does_or_refused(place, architecture, tied, ways, kind):
    folder = place / "any"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved(architecture, tie_word_embeddings=tied), folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for way in ways:
        before = {path.name: path.read_bytes() for path in folder.glob("model*")}
        with torch.no_grad():
            theirs.model.norm.weight.fill_(way["norm"])
        theirs.to(way["dtype"]).save_pretrained(folder, max_shard_size=way["size"])
        for name, content in before.items():
            form = "index" if name.endswith("json") else "whole" if name == "model.safetensors" else "shards"
            if way["left"] in ("all", form) and not (folder / name).exists():
                (folder / name).write_bytes(content)
    damage(folder, kind)
    try:
        logits(folder)
    except Exception:  # what transformers cannot read either
        with pytest.raises(UserError):
            load_pretrained(folder)
        return
    read = assert_same_or_refused(folder)
    hypothesis.event(f"read: {read}")
    assert read or kind or any(way["left"] != "none" for way in ways)


# --- GGUF files


CHAT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
KINDS = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}


def write_gguf(path, architecture="Llama", stored=gguf.GGMLQuantizationType.Q8_0, change=None, **options):
    """A random checkpoint as llama.cpp writes it. change(writer, tensors) may add to it."""
    folder = path.parent / "published"
    model = make_checkpoint(folder, architecture, **{**WIDE, **options})
    config, kind = model.config, KINDS[architecture]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)
    tokens += [f"unused{i}" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names, tensors = gguf.get_tensor_name_map(arch, config.num_hidden_layers), {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if kind == "llama" and heads:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        tensors[names.get_name(name, (".weight", ".bias"))] = tensor.numpy()
    if change:
        change(writer, tensors)
    for name, values in tensors.items():
        as_it_is = values.ndim == 1 or stored == gguf.GGMLQuantizationType.F32
        kept = gguf.GGMLQuantizationType.F32 if as_it_is else stored
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.rmtree(folder)
    return path


STORED = ["Q8_0", "BF16", "F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


GGUF = [("Llama", stored, False) for stored in STORED]  # architecture, how tensors are stored, whether the head is tied
GGUF += [(name, stored, False) for name in ("Qwen2", "Qwen3") for stored in STORED[:2]]
GGUF += [(name, STORED[0], True) for name in ARCHITECTURES]


@pytest.mark.parametrize(("architecture", "stored", "tied"), GGUF)
def test_a_gguf_file_is_read_as_transformers_reads_it(architecture, stored, tied, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", architecture, gguf.GGMLQuantizationType[stored], tie_word_embeddings=tied)
    model, tokenizer = load_pretrained(path)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), logits(tmp_path, gguf_file=path.name), atol=1e-4, rtol=1e-4)
    assert model.config.tied_head is tied
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "What is 48+7? <|im_end|>\n “ü”"
    assert tokenizer.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": "1+1?"}]
    assert tokenizer.render(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.eos == theirs.eos_token_id == 1


def test_a_gguf_file_without_a_number_of_key_heads_has_as_many_as_queries(tmp_path, monkeypatch):
    words = {"stored": gguf.GGMLQuantizationType.F32, "num_key_value_heads": WIDE["num_attention_heads"]}
    told = load_pretrained(write_gguf(tmp_path / "told.gguf", **words))[0]
    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count_kv", lambda writer, count: None)
    path = write_gguf(tmp_path / "m.gguf", **words)
    assert "llama.attention.head_count_kv" not in gguf.GGUFReader(path).fields
    assert torch.equal(load_pretrained(path)[0](TOKENS), told(TOKENS))


def test_a_gguf_file_is_saved_as_a_published_checkpoint(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    model, tokenizer = load_pretrained(path)
    save_pretrained(model, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path, gguf_file=path.name), atol=1e-4, rtol=1e-4)
    again, its = load_pretrained(tmp_path / "out")
    assert its.encode("1+1?") == tokenizer.encode("1+1?") and its.eos == tokenizer.eos
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters()))


def test_a_gguf_file_behind_the_hubs_link_is_read_and_a_file_of_another_name_is_not(file, tmp_path):
    blob = Path(shutil.copy(file, tmp_path / "0123"))
    (tmp_path / "m.gguf").symlink_to(blob)
    assert load_pretrained(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="0123: neither a folder nor a .gguf file"):
        load_pretrained(blob)


def test_files_beside_a_gguf_file_are_not_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    _, alone = load_pretrained(path)
    expected = alone.encode("1+1?"), alone.ask("1+1?")
    full_scale.gguf_file.unpacked.cache_clear()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "AutoModelForCausalLM", "eos_token": "x"}')
    (tmp_path / "tokenizer.json").write_bytes(b"noise")
    (tmp_path / "config.json").write_text("{")
    _, beside = load_pretrained(path)
    assert (beside.encode("1+1?"), beside.ask("1+1?")) == expected


def test_training_and_sampling_begin_from_a_gguf_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    problems = write(tmp_path / "problems.jsonl", {"problem": "1+1?", "answer": 2})
    done = run_module(
        "rollouts", "--model", path, "--problems", problems, "--n", 2, "--max-tokens", 3, "--out", tmp_path / "r.jsonl"
    )
    assert done.returncode == 0, done.stderr
    more = ["--n", 3, "--out", tmp_path / "v.jsonl", "--engine", "vllm"]
    done = run_module("rollouts", "--model", path, "--problems", problems, *more)
    assert done.returncode == 2 and "m.gguf: vLLM does not sample from a .gguf file here; --engine own does\n" in done.stderr
    words = ["--init", path, "--data", ROLLOUTS, "--out", tmp_path / "runs", *QUICK, "--steps", 1]
    done = run_module("train", *words, processes=2)  # the first of which unpacks the file
    assert done.returncode == 0, done.stderr
    (trained,) = tmp_path.glob("runs/*/model")
    assert trained.parent.name.startswith("m-")
    assert load_pretrained(trained)[1].eos == 1


def test_a_gguf_file_is_one_checkpoint_wherever_it_is_unpacked(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    folders, keys = [], set()
    for _ in range(2):
        folders.append(fetch(path))
        keys.add(checkpoint_key(folders[-1]))
        full_scale.gguf_file.unpacked.cache_clear()
    assert folders[0] != folders[1] and len(keys) == 1


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def patched(path, old, new):
    """Other bytes of the same number in the place of the first of some."""
    content = path.read_bytes()
    assert content.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


def header(path, *fields):
    """A file of no tensor and of some metadata fields, given as bytes."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields))


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def typed(path, number):
    """The type of the first tensor, after its name and two dimensions."""
    content = path.read_bytes()
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(content[:place] + struct.pack("<I", number) + content[place + 4 :])


LLAMA = entry(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")
BAD_GGUF = {
    "another architecture": (lambda p: patched(p, b"llama", b"gemma"), 'architecture "gemma" is not supported, only llama'),
    "no metadata": (lambda p: header(p), "has no `general.architecture`"),
    "an empty file": (lambda p: p.write_bytes(b""), "not a GGUF file"),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 40), "does not start with the GGUF magic bytes"),
    "version 1": (lambda p: patched(p, b"GGUF\3", b"GGUF\1"), "is GGUF v1"),
    "cut in the header": (lambda p: cut(p, 3000), "not a GGUF file that is read here: unpack_from"),
    "cut in the weights": (lambda p: cut(p, p.stat().st_size - 4096), "cannot reshape array"),
    "a type of no quantisation": (lambda p: typed(p, 99), "is not a valid GGMLQuantizationType"),
    "whole numbers": (lambda p: typed(p, 24), "Dequantization for I8 is not yet implemented"),
    "an array without end": (
        lambda p: header(p, LLAMA, entry(b"x", 9, struct.pack("<IQ", 0, 2**60))), "not a GGUF file that is read here"),
    "strings without end": (
        lambda p: header(p, LLAMA, entry(b"x", 9, struct.pack("<IQ", 8, 2**60))), "not a GGUF file that is read here"),
    "a key without end": (lambda p: header(p, struct.pack("<Q", 2**63)), "not a GGUF file that is read here"),
    "more fields than bytes": (
        lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)), "not a GGUF file that is read here"),
    "no layers": (lambda p: header(p, LLAMA), "block_count is null, not a whole number from 1 to 1,000"),
    "layers without end": (
        lambda p: header(p, LLAMA, entry(b"llama.block_count", 10, struct.pack("<Q", 2**40))), "block_count is 1099511627776"),
    "several architectures": (
        lambda p: header(p, entry(b"general.architecture", 9, struct.pack("<IQI", 4, 1, 7))), "architecture [7] is not"),
    "no tensors": (
        lambda p: header(p, LLAMA, entry(b"llama.block_count", 4, struct.pack("<I", 2))), "not a GGUF file that is read here"),
}  # fmt: skip


@pytest.fixture(scope="module")
def file(place):
    return write_gguf(place / "good.gguf")


@pytest.mark.parametrize(("change", "message"), BAD_GGUF.values(), ids=BAD_GGUF)
def test_a_bad_gguf_file_is_one_line(change, message, file, tmp_path):
    path = Path(shutil.copy(file, tmp_path / "bad.gguf"))
    change(path)
    done = run_module("load_hf", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert str(path) in done.stderr
    done = run_module("train", "--init", path, "--data", ROLLOUTS, "--out", tmp_path / "runs")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert [place for place in tmp_path.rglob("*") if place.is_file()] == [path]


BAD_TENSORS = {
    "one more": (lambda w, t: t.update({"blk.0.ffn_gate_exps.weight": t["blk.0.ffn_gate.weight"]}), "_exps.weight has no p"),
    "rotary frequencies": (lambda w, t: t.update({"rope_freqs.weight": np.ones(64, np.float32)}), "rope_freqs.weight has no"),
    "one fewer": (lambda w, t: t.pop("blk.1.attn_q.weight"), "tensor model.layers.1.self_attn.q_proj.weight is missing"),
    "another shape": (
        lambda w, t: t.update({"output_norm.weight": np.ones(96, np.float32)}), "norm.weight is of shape [96], not [256]"),
    "not finite": (
        lambda w, t: t.update({"output_norm.weight": np.full(256, np.nan, np.float32)}), "norm.weight has values that are not"),
    "rotary scaling": (lambda w, t: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), 'rotary scaling "yarn" is not'),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_gguf_file_of_other_tensors_is_one_line(change, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", change=change)
    with pytest.raises(UserError) as error:
        load_pretrained(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(st.data())
def test_a_gguf_file_of_changed_bytes_is_read_or_refused(place, file, data):
    content = file.read_bytes()
    at = data.draw(st.integers(0, 12_000))
    new = data.draw(st.binary(min_size=1, max_size=12))
    path = place / f"{at}-{new.hex()}.gguf"
    path.write_bytes(content[:at] + new + content[at + len(new) :])
    try:
        load_pretrained(path)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        path.unlink()


PROPERTIES = [name for name, function in list(globals().items()) if hasattr(function, "hypothesis")]


# --- docs/full_scale.md


def changed(change):
    return lambda folder: change_tensor(folder, change)


TIED = {"tie_word_embeddings": True}
FORMS = {  # a row's first words: (the checkpoint's options, what is done to it, and whether it is read)
    "Llama, Qwen2, Qwen3 in": ({"dtype": torch.bfloat16}, lambda f: None, True),
    "another architecture": ({}, lambda f: change_config(f, architectures=["LlamaForCausalLM"]), False),
    "model.safetensors beside": ({}, lambda f: (f / "model.safetensors.index.json").write_text("{}"), True),
    "an index and": ({}, lambda f: resaved(f, "20KB"), True),
    "a pickle": ({}, lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), False),
    "an adapter": ({}, lambda f: (f / "adapter_config.json").write_text("{}"), False),
    "tied embeddings, with an equal": (TIED, changed(lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()})), True),
    "tied embeddings, with another": (TIED, changed(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})), False),
    "rotary embedding: plain": ({"rope_parameters": LLAMA3}, lambda f: None, True),
    "rotary embedding: other": ({}, lambda f: change_config(f, rope_scaling={"type": "linear", "factor": 2.0}), False),
    "sliding windows": ({}, lambda f: change_config(f, hidden_act="gelu"), False),
    "quantised weights": ({}, lambda f: change_config(f, quantization_config={"quant_method": "awq"}), False),
    "tokenizer.json": ({}, lambda f: None, True),
    "a tokenizer without": ({}, lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), False),
}
EMBEDDING = "model.embed_tokens.weight"


def resaved(folder, size):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)


@pytest.mark.parametrize("row", FORMS)
def test_the_page_says_which_checkpoints_are_read(row, tmp_path):
    (said,) = [result for form, result in table(Path("docs/full_scale.md"), "form | what") if form.startswith(row)]
    options, change, read = FORMS[row]
    make_checkpoint(tmp_path, **options)
    change(tmp_path)
    assert said.startswith("refused") is not read
    if read:
        assert load_pretrained(tmp_path) and assert_same_or_refused(tmp_path)
    else:
        with pytest.raises(UserError):
            load_pretrained(tmp_path)


def test_the_page_says_which_gguf_files_are_read():
    rows = [row for row in table(Path("docs/full_scale.md"), "form | what") if not row[0].startswith(tuple(FORMS))]
    assert sorted(rows[0][0].removeprefix("GGUF: ").split(", ")) == sorted(STORED) and rows[0][1] == "dequantised"
    assert rows[1] == ["GGUF: other quantisations, such as Q4_K", "dequantised where the package `gguf` can, and not tested"]
    assert rows[2][0].startswith("GGUF with rotary scaling, by name or by `rope_freqs.weight`") and len(rows) == 3
