"""Published checkpoints in model.py, and back into their own form: config.json, *.safetensors, tokenizer.json.

    python -m full_scale.load_hf Qwen/Qwen2.5-Math-1.5B   # what it is, the memory that training takes, a greedy answer

Architectures: Llama (Llama 2 and 3, DeepSeekMath), Qwen2, Qwen3. The weights are those that transformers would read, or the
checkpoint is refused. Pickle checkpoints (.bin, .pt) are refused: reading one can run any code. Left out: quantised checkpoints
but GGUF files, sliding windows, other rotary scalings than Llama 3's.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing.files import UserError, checksum, read_json, replacing, write_json
from plumbing.flags import answer_length, command, command_line

from . import gguf_file
from .chunked import CHUNK
from .prompts import ChatTokenizer
from .published import (
    ADAPTER,
    COMPANIONS,
    INDEX,
    TEMPLATES,
    architecture_of,
    empty_model,
    fetch,
    gpt_config,
    parameter_count,
)

SHARD_BYTES = 5 * 10**9
DTYPES = ("F32", "F16", "BF16")


# --- weights


def published_name(name):
    """A tensor's name in the published checkpoint, from its name in model.py."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def weight_files(folder):
    """The files that transformers would read: model.safetensors, else what the index names. Raises UserError."""
    if (folder / ADAPTER).exists():
        raise UserError(f"{folder / ADAPTER}: adapters are not supported; merge it into its model first")
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).exists():
        if file := gguf_file.packed(folder):
            return [file]
        pickles = "pickle checkpoints (.bin, .pt) are refused: they can run any code"
        raise UserError(f"{folder}: no model.safetensors, nor {INDEX}; {pickles}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / INDEX}: no weight_map from tensors to files")
    for tensor, name in names.items():
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX}: tensor {tensor} is in {name!r}, outside the folder")
        if not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX}: tensor {tensor} is in {name!r}, which is not a safetensors file")
    files = [folder / name for name in sorted(set(names.values()))]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing")
    return files


def headers(path, wanted):
    """{published name: (shape, type)} of a file. Raises UserError."""
    if path.suffix == ".gguf":
        return gguf_file.headers(path, wanted)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # not a dict
            return {name: (header.get_shape(), header.get_dtype()) for name, header in slices.items()}
    except (SafetensorError, OSError, RuntimeError) as error:  # the last: a file larger than can be mapped
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None


def tensors(path, names):
    """Pairs (published name, tensor) of a file."""
    if path.suffix == ".gguf":
        yield from gguf_file.tensors(path, names)
    else:
        with safe_open(path, "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in names)


def find_tensors(folder, model):
    """{published name: file}, after a look at every file's header: nothing is read before all shapes and dtypes fit.

    Raises UserError that names the file and the tensor.
    """
    wanted = {published_name(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
    places, embedding, head = {}, "model.embed_tokens.weight", "lm_head.weight"
    for path in weight_files(folder):
        for name, (shape, dtype) in headers(path, wanted).items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            expected = wanted.get(embedding if name == head and model.config.tied_head else name)
            if expected is None:
                raise UserError(f"{path}: tensor {name} has no place in this architecture")
            if name in places:
                raise UserError(f"{path}: tensor {name} is also in {places[name]}")
            if shape != expected:
                raise UserError(f"{path}: tensor {name} is of shape {shape}, not {expected}")
            if path.suffix != ".gguf" and dtype not in DTYPES:
                raise UserError(f"{path}: tensor {name} is of type {dtype}, not one of {', '.join(DTYPES)}")
            places[name] = path
    for name in wanted:
        if name not in places:
            raise UserError(f"{folder}: tensor {name} is missing")
    if model.config.tied_head and head in places:  # transformers unties them where they differ
        (_, one), (_, other) = (next(tensors(places[name], [name])) for name in (embedding, head))
        if not torch.equal(one, other):
            raise UserError(f"{places.pop(head)}: {head} is not {embedding}, and {folder / 'config.json'} ties them")
        del places[head]
    return places


@torch.no_grad()
def fill(model, places):
    """Copy every tensor into the model, cast to its type, file by file; a parameter that is sharded takes its own part.

    Raises UserError where one is not finite.
    """
    parameters = {published_name(name): parameter for name, parameter in model.named_parameters()}
    for path in sorted(set(places.values())):
        for name, tensor in tensors(path, [name for name, place in places.items() if place == path]):
            parameter = parameters[name]
            if not tensor.isfinite().all():
                raise UserError(f"{path}: tensor {name} has values that are not finite")
            if isinstance(parameter, DTensor):
                tensor = distribute_tensor(
                    tensor.to(parameter.device, parameter.dtype),
                    parameter.device_mesh,
                    parameter.placements,
                    src_data_rank=None,  # every process has read it
                )
            parameter.copy_(tensor)


def load_pretrained(name, dtype=torch.float32, device="cpu"):
    """A checkpoint, by hub name, folder or .gguf file -> (GPT, ChatTokenizer). Raises UserError; nothing is loaded then."""
    folder = fetch(name)
    model = empty_model(gpt_config(folder))
    places, tokenizer = find_tensors(folder, model), ChatTokenizer(folder)
    model = model.to(dtype).to_empty(device=device)
    fill(model, places)
    model.folder = folder
    return model, tokenizer


def checkpoint_key(folder):
    """A digest of a checkpoint's config.json and weights, all of them: a few seconds a GB at worst."""
    digests = [checksum(path) for path in (folder / "config.json", *weight_files(folder))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def save_pretrained(model, folder, dtype=None):
    """Write a checkpoint that transformers and vLLM load: weights with their published names, the rest as it was loaded.

    model.folder is where it was loaded from, whose config.json and tokenizer are copied. dtype: the weights' own where None.
    Of a model sharded over processes each must call this; the first one writes, a tensor at a time.
    """
    folder, source = Path(folder), model.folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.named_parameters())
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    dtype = dtype or next(iter(tensors.values())).dtype
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.numel() * dtype.itemsize > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.numel() * dtype.itemsize
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        whole = {}
        for name in names:
            tensor = tensors[name].detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if first:
                whole[published_name(name)] = tensor.to("cpu", dtype).contiguous()
        weight_map |= dict.fromkeys(whole, file)
        if first:
            with replacing(folder / file) as temporary:
                save_file(whole, temporary, metadata={"format": "pt"})
    if first:
        for path in (folder / INDEX, *folder.glob("model*.safetensors")):  # of another checkpoint here before
            if path.name not in weight_map.values():
                path.unlink(missing_ok=True)
        if len(shards) > 1:
            size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
            write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        for path in (*map(source.joinpath, COMPANIONS), *(source / TEMPLATES).glob("*.jinja")):
            if path.exists():
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                with replacing(target) as temporary:
                    temporary.write_bytes(path.read_bytes())
        raw = read_json(source / "config.json")
        raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", raw)


# --- what it takes


def training_gib(config, parameters, gpus, precision):
    """An estimate of a GPU's peak memory in full_scale/train.py, in GiB: what its tensors add up to, without fragmentation.

    precision "fp32" or "bf16", whose weights, gradients and AdamW moments are fp32 all the same, 16 bytes a parameter over
    all GPUs. With a cached reference, activation checkpointing, and 5,120 tokens at once: the flags' defaults.
    """
    size = {"fp32": 4, "bf16": 2}[precision]
    head = config.vocab_size * config.d_model
    layer = (parameters - (1 if config.tied_head else 2) * head) // config.n_layers
    gathered = (head * (1 if config.tied_head else 2) + 2 * layer) * (size + 4) if gpus > 1 or size == 2 else 0
    activations = 5120 * (config.n_layers * config.d_model + 4 * config.d_ff + 8 * config.d_model) * size
    logits = 4 * CHUNK * config.vocab_size * 4
    return (16 * parameters / gpus + gathered + head * (size + 4) + activations + logits) / 2**30


def describe(name, folder, model):
    """The lines of `python -m full_scale.load_hf` before the sample."""
    c, parameters = model.config, parameter_count(model)
    lines = [
        f"{name}: {architecture_of(read_json(folder / 'config.json'))}, {parameters / 1e9:.2f} billion parameters",
        f"  folder       {folder}",
        f"  shape        {c.n_layers} layers, width {c.d_model}, {c.n_heads} heads of {c.head_dim}, {c.n_kv_heads} key/value "
        f"heads, feed-forward {c.d_ff}, vocabulary {c.vocab_size}",
        "",
        "training memory of each GPU, estimated, GiB (16 bytes a parameter over all GPUs, and 5,120 tokens at once)",
        "  GPUs " + "".join(f"{gpus:>8}" for gpus in (1, 2, 4, 8)),
    ]
    for precision in ("fp32", "bf16"):
        cells = [training_gib(c, parameters, gpus, precision) for gpus in (1, 2, 4, 8)]
        lines.append(f"  {precision} " + "".join(f"{cell:8.0f}" for cell in cells))
    return "\n".join(lines)


def run(argv=None):
    """The command: what a checkpoint is and takes, and an answer; what goes wrong is one line and exit code 2."""
    description = "What a published checkpoint is, the memory that training it takes, and an answer of it."
    parser = command_line(description, prog="python -m full_scale.load_hf")
    parser.add_argument("name", help="hub name, such as Qwen/Qwen2.5-Math-1.5B, folder, or .gguf file")
    parser.add_argument("--prompt", default="What is 17 * 24?", metavar="TEXT", help="what to answer, greedily")
    parser.add_argument("--tokens", default=64, type=answer_length, metavar="N", help="at most so many of them")
    args = parser.parse_args(argv)
    with command(parser.prog, "nothing was written", args.name):
        folder = fetch(args.name)
        print(describe(args.name, folder, empty_model(gpt_config(folder))))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_pretrained(folder, torch.float32 if device == "cpu" else torch.bfloat16, device)
        prompt = torch.tensor([tokenizer.encode(tokenizer.ask(args.prompt), tokenizer.plain)], device=device)
        stops = torch.tensor(sorted(tokenizer.stops), device=device)
        answer = model.generate(prompt, args.tokens, stops, -1, temperature=0)[0].tolist()
        print(f"\n{args.prompt}\n  {tokenizer.decode([token for token in answer if token >= 0]).strip()}")


if __name__ == "__main__":
    run()
