"""GGUF files of the three architectures: unpacked into a folder like a published one, dequantised by the `gguf` library.

transformers reads config and tokenizer. Its newer reader of headers holds every length against the file, and is run first: the
older one, which it uses too, goes on for ever on some files. Left out: rotary scaling, which transformers does not read.
"""

import functools
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.integrations.gguf import read_gguf_metadata

from plumbing.files import UserError, raising, shown, write_json

NAME = ".unpacked.gguf"  # a link to the file, in its folder
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MOST_LAYERS = 1000  # each takes time to build, however small it is
folders, files = [], {}  # the folders that were made, removed at the end; {folder: its .gguf file}


def made_of(read, path):
    """What a function makes of a file. Raises UserError."""
    with np.errstate(all="ignore"):
        return raising(path, lambda: read(path), "not a GGUF file that is read here: ")


@functools.cache
def read_file(path):
    """(metadata, tensors) of a file; only what is read from it later takes memory. Raises UserError."""
    metadata, _ = made_of(read_gguf_metadata, path)
    kind = metadata["general.architecture"]
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {shown(kind)} is not supported, only {', '.join(ARCHITECTURES)}")
    layers = metadata.get(f"{kind}.block_count")
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise UserError(f"{path}: block_count is {shown(layers)}, not a whole number from 1 to {MOST_LAYERS:,}")
    if (scaling := metadata.get(f"{kind}.rope.scaling.type", "none")) != "none":
        raise UserError(f"{path}: rotary scaling {shown(scaling)} is not supported")
    return metadata, made_of(gguf.GGUFReader, path).tensors


@functools.cache
def unpacked(path):
    """A folder with a file's config, tokenizer and chat template as transformers reads them, and a link to the file."""
    metadata, _ = read_file(path)
    folders.append(tempfile.TemporaryDirectory(prefix="gguf-"))
    folder = Path(folders[-1].name)
    files[str(folder)] = path
    (folder / NAME).symlink_to(path)  # alone, so that transformers finds no other files beside it

    def read(_):
        config = AutoConfig.from_pretrained(folder, gguf_file=NAME, local_files_only=True, trust_remote_code=False).to_dict()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=NAME, local_files_only=True)
        tokenizer.save_pretrained(folder)
        return config, tokenizer

    config, tokenizer = made_of(read, path)
    for name in ("transformers_version", "_name_or_path"):  # neither a newer one nor the folder makes it another checkpoint
        config.pop(name, None)
    architecture = ARCHITECTURES[metadata["general.architecture"]]
    write_json(folder / "config.json", {**config, "architectures": [architecture], "eos_token_id": tokenizer.eos_token_id})
    return folder


def packed(folder):
    """The .gguf file that `unpacked` made a folder of; None of another folder, whatever links it holds."""
    return files.get(str(folder))


def named(folder):
    """What an error about a folder's config names: its config.json, or the .gguf file that it was unpacked from."""
    return packed(folder) or folder / "config.json"


def stored(path, wanted):
    """{published name, or the file's own where no published one is wanted: tensor in the file} and the metadata."""
    metadata, entries = read_file(path)
    kind = metadata["general.architecture"]
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, metadata[f"{kind}.block_count"])
    published = {names.get_name(name, (".weight", ".bias")): name for name in wanted}
    return {published.get(entry.name, entry.name): entry for entry in entries}, metadata


def headers(path, wanted):
    """{published name: (shape, type)} of a file. Raises UserError where a type cannot be dequantised."""
    entries, _ = stored(path, wanted)
    for entry in entries.values():
        made_of(lambda _: gguf.dequantize(entry.data[: len(entry.shape) - 1], entry.tensor_type), path)  # a row
    return {name: (entry.shape.tolist()[::-1], entry.tensor_type) for name, entry in entries.items()}


def tensors(path, wanted):
    """The wanted tensors of a file, dequantised to float32 -> pairs (published name, tensor). Raises UserError."""
    entries, metadata = stored(path, wanted)
    kind, (query, key) = metadata["general.architecture"], ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
    count = metadata.get(f"{kind}.attention.head_count")
    heads = {query: count, key: metadata.get(f"{kind}.attention.head_count_kv", count)}
    for name in wanted:
        values = made_of(lambda _: gguf.dequantize(entries[name].data, entries[name].tensor_type), path)
        tensor, layer = torch.from_numpy(np.array(values, np.float32)), name.split(".", 3)[-1]
        if kind == "llama" and layer in heads:  # there dimension 2 i turns with 2 i + 1, here i with i + D/2
            tensor = tensor.unflatten(0, (heads[layer], -1, 2)).transpose(1, 2).flatten(0, 2)
        yield name, tensor
