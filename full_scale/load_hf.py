"""Published checkpoints in model.py, and back into their own form: config.json, *.safetensors, tokenizer.json.

    python -m full_scale.load_hf Qwen/Qwen2.5-Math-1.5B   # what it is, the memory that training takes, a greedy answer

Architectures: Llama (Llama 2 and 3, DeepSeekMath), Qwen2, Qwen3. Pickle checkpoints (.bin, .pt) are refused: reading one can
run any code. Left out: quantised checkpoints, sliding windows, other rotary scalings than Llama 3's.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import sys
from pathlib import Path

import jinja2
import jinja2.sandbox
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.distributed.tensor import DTensor, distribute_tensor

from model import GPT, GPTConfig
from plumbing.files import UserError, checksum, one_line, read_json, replacing, shown, write_json
from plumbing.flags import answer_length, command, command_line

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
MOST_LAYERS = 1000  # each takes time to build, however small it is
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Beside config.json and the weights; copied as they are.
COMPANIONS = (
    "tokenizer.json tokenizer_config.json chat_template.jinja generation_config.json special_tokens_map.json vocab.json "
    "merges.txt added_tokens.json"
).split()
PUBLISHED = ("*.safetensors", "config.json", INDEX, *COMPANIONS)  # what is downloaded
PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


# --- config.json


def gpt_config(raw, path):
    """GPTConfig of a published config.json's object. Raises UserError on what model.py does not compute, or no memory holds."""
    architecture = raw.get("architectures") or ["none"]
    architecture = architecture[0] if isinstance(architecture, list) else architecture
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {shown(architecture)} is not supported, only {', '.join(ARCHITECTURES)}")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(name) or {}, dict):
            raise UserError(f"{path}: {name} is {shown(raw[name])}, not an object")
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    rope = {"rope_theta": 10_000.0, **{name: value for name, value in rope.items() if value is not None}}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        f"rotary scaling {kind!r}": kind not in ("default", "llama3"),
        f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "a bias in every attention layer": raw.get("attention_bias"),
        "a bias in the feed-forward layers": raw.get("mlp_bias"),
        "sliding windows": raw.get("use_sliding_window"),
        "quantised weights": raw.get("quantization_config"),
    }
    for what, found in refused.items():
        if found:
            raise UserError(f"{path}: {what} is not supported")
    sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    optional = ["num_key_value_heads", "head_dim"]
    scaling = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"] * (kind == "llama3")
    values = {name: raw.get(name) for name in sizes} | {name: raw[name] for name in optional if raw.get(name) is not None}
    for name, value in values.items():
        most = MOST_LAYERS if name == "num_hidden_layers" else 2**31 - 1
        if type(value) is not int or not 0 < value <= most:
            raise UserError(f"{path}: {name} is {shown(value)}, not a whole number from 1 to {most:,}")
    numbers = {"rms_norm_eps": raw.get("rms_norm_eps"), **{name: rope.get(name) for name in ["rope_theta", *scaling]}}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise UserError(f"{path}: {name} is {shown(value)}, not a number above 0")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    own_head_dim = values.get("head_dim", width / heads) != width / heads
    try:
        config = GPTConfig(
            vocab_size=values["vocab_size"],
            d_model=width,
            n_layers=values["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=values.get("num_key_value_heads", heads),
            d_ff=values["intermediate_size"],
            rope_theta=float(numbers["rope_theta"]),
            norm_eps=numbers["rms_norm_eps"],
            qkv_bias=architecture == "Qwen2ForCausalLM",
            tied_head=bool(raw.get("tie_word_embeddings", False)),
            own_head_dim=values["head_dim"] if own_head_dim else None,
            qk_norm=architecture == "Qwen3ForCausalLM" or None,
            rope_scaling=tuple(numbers[name] for name in scaling) or None,
        )
        needed = 4 * parameter_total(config)
    except (ValueError, RuntimeError) as error:  # the latter: sizes whose product is no 64-bit number
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if needed > (memory := memory_of_machine()):
        gib = [f"{size / 2**30:,.0f} GiB" for size in (needed, memory)]
        raise UserError(f"{path}: weights of these sizes take {gib[0]} in fp32, and this machine has {gib[1]}")
    return config


def parameter_total(config):
    """Parameters of a config, from models of one and two layers: no number in a stranger's file makes work or takes memory."""
    one, two = (parameter_count(empty_model(dataclasses.replace(config, n_layers=layers))) for layers in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


def memory_of_machine():
    """Bytes of main memory and of all GPUs."""
    gpus = sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return gpus + os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- weights


def published_name(name):
    """A tensor's name in the published checkpoint, from its name in model.py."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def empty_model(config):
    """A GPT without memory for its weights, on torch's meta device."""
    with torch.device("meta"):
        return GPT(config)


def weight_files(folder):
    """The *.safetensors files of a checkpoint. Raises UserError."""
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{folder / INDEX}: no weight_map from tensors to files")
        for tensor, name in names.items():
            if Path(name).name != name:
                raise UserError(f"{folder / INDEX}: tensor {tensor} is in {name!r}, outside the folder")
            if not name.endswith(".safetensors"):
                raise UserError(f"{folder / INDEX}: tensor {tensor} is in {name!r}, which is not a safetensors file")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = [folder / "model.safetensors"]
        if not files[0].exists():
            raise UserError(f"{folder}: no *.safetensors; pickle checkpoints (.bin, .pt) are refused: they can run any code")
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing")
    return files


def find_tensors(folder, model):
    """{name in model.py: file}, after a look at every file's header: nothing is read before all shapes and dtypes fit.

    Raises UserError that names the file and the tensor.
    """
    wanted = {published_name(name): name for name in model.state_dict()}
    shapes, places = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}, {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                headers = {name: (header.get_shape(), header.get_dtype()) for name, header in headers.items()}
        except (SafetensorError, OSError, RuntimeError) as error:  # the last: a file larger than can be mapped
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None
        for published, (shape, dtype) in headers.items():
            tied_copy = model.config.tied_head and published == "lm_head.weight"
            if tied_copy or published.endswith("rotary_emb.inv_freq"):
                continue
            name = wanted.get(published)
            if name is None:
                raise UserError(f"{path}: tensor {published} has no place in this architecture")
            if name in places:
                raise UserError(f"{path}: tensor {published} is also in {places[name]}")
            if shape != shapes[name]:
                raise UserError(f"{path}: tensor {published} is of shape {shape}, not {shapes[name]}")
            if dtype not in DTYPES:
                raise UserError(f"{path}: tensor {published} is of type {dtype}, not one of {', '.join(DTYPES)}")
            places[name] = path
    for published, name in wanted.items():
        if name not in places:
            raise UserError(f"{folder}: tensor {published} is missing")
    return places


@torch.no_grad()
def fill(model, places):
    """Copy every tensor into the model, cast to its type, file by file; a parameter that is sharded takes its own part.

    Raises UserError where one is not finite.
    """
    parameters = dict(model.named_parameters())
    for path in sorted(set(places.values())):
        with safe_open(path, "pt") as file:
            for name in (name for name, place in places.items() if place == path):
                parameter, tensor = parameters[name], file.get_tensor(published_name(name))
                if not tensor.isfinite().all():
                    raise UserError(f"{path}: tensor {published_name(name)} has values that are not finite")
                if isinstance(parameter, DTensor):
                    tensor = distribute_tensor(
                        tensor.to(parameter.device, parameter.dtype),
                        parameter.device_mesh,
                        parameter.placements,
                        src_data_rank=None,  # every process has read it
                    )
                parameter.copy_(tensor)


def fetch(name_or_folder):
    """The folder itself, or that of a hub name's files, downloaded once. Raises UserError."""
    if Path(name_or_folder).is_dir():
        return without_links_out(Path(name_or_folder))
    try:
        return without_links_out(Path(snapshot_download(str(name_or_folder), allow_patterns=PUBLISHED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name_or_folder}: no such folder, nor from the hub: {str(error).splitlines()[0]}") from None


def without_links_out(folder):
    """The folder. Raises UserError where what is read is no file, or a link out of it, in the hub's cache out of its blobs."""
    root = folder.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for path in (path for pattern in PUBLISHED for path in folder.glob(pattern)):
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:  # the latter: it leads to itself
            raise UserError(f"{path}: {error}") from None
        if not any(target.is_relative_to(place) for place in allowed):
            raise UserError(f"{path}: a link out of the folder, to {target}")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file")
    return folder


def load_pretrained(name_or_folder, dtype=torch.float32, device="cpu"):
    """A published checkpoint, by hub name or folder -> (GPT, ChatTokenizer). Raises UserError; nothing is loaded then."""
    folder = fetch(name_or_folder)
    model = empty_model(gpt_config(read_json(folder / "config.json"), folder / "config.json"))
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
        for name in COMPANIONS:
            if (source / name).exists():
                with replacing(folder / name) as temporary:
                    temporary.write_bytes((source / name).read_bytes())
        raw = read_json(source / "config.json")
        raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", raw)


# --- tokenizer


class ChatTokenizer:
    """A checkpoint's tokenizer.json with its chat template. Raises UserError where a file is missing or broken.

    vocab_size: how many tokens the weights know; eos: the one that ends an answer and is trained as such; stops: all that end
    one, a set.
    """

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        names = ("tokenizer_config.json", "generation_config.json")
        config, generation = (read_json(folder / name) if (folder / name).exists() else {} for name in names)
        texts = {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.texts = {key: text.get("content") if isinstance(text, dict) else text for key, text in texts.items() if text}
        for key, text in self.texts.items():
            if not isinstance(text, str):
                raise UserError(f"{folder / 'tokenizer_config.json'}: {key} is {json.dumps(text)}, not a text")
        raw = read_json(folder / "config.json")
        self.vocab_size, ids = raw.get("vocab_size"), generation.get("eos_token_id", raw.get("eos_token_id"))
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        own = self.tokenizer.token_to_id(self.texts.get("eos_token", ""))
        if type(self.vocab_size) is not int:
            raise UserError(f"{folder / 'config.json'}: vocab_size is {shown(self.vocab_size)}, not a whole number")
        if not all(type(token) is int and 0 <= token < self.vocab_size for token in ids):
            raise UserError(f"{folder}: eos_token_id is {shown(ids)}, not one or several token ids")
        self.stops = {*ids, *([] if own is None else [own])}
        if not self.stops:
            raise UserError(f"{folder}: no eos_token_id in generation_config.json or config.json, no eos_token")
        self.eos = ids[0] if own is None else own
        path = folder / "chat_template.jinja"
        try:
            template = path.read_text(encoding="utf-8") if path.exists() else config.get("chat_template")
            if isinstance(template, list):  # several, each with a name
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
            self.template = compiled(template) if template else None
        except Exception as error:  # a template can fail in any way
            raise UserError(f"{folder}: the chat template: {one_line(error, path)}") from None

    def encode(self, text, special=True):
        """Token ids; with the tokens that the tokenizer puts around a text, unless `special` is off or the text has its BOS.

        Raises UserError where the checkpoint has no such token, and where a prompt, `special`, has none.
        """
        begun = "bos_token" in self.texts and text.startswith(self.texts["bos_token"])
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=special and not begun).ids
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"the tokenizer refuses {shown(text)}: {error}") from None
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(
                f"the tokenizer makes token {max(ids)} of {shown(text)}, and the vocabulary is of {self.vocab_size:,}"
            )
        if special and not ids:
            raise UserError("a prompt of no token, so that none predicts the first answer token")
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def render(self, messages):
        """The chat template's text of a list of {"role", "content"}, up to where the answer begins. Raises UserError."""
        if self.template is None:
            raise UserError("this checkpoint has no chat template, so a prompt must be a text, not a list of messages")
        try:
            return self.template.render(messages=messages, add_generation_prompt=True, **self.texts)
        except Exception as error:  # a template can fail in any way
            raise UserError(f"the chat template refuses these messages: {error}") from None

    def ask(self, problem):
        """A problem as a prompt: through the chat template where there is one, else as plain text."""
        if self.template is None:
            return f"{problem}\n{PROMPT}\n"
        return self.render([{"role": "system", "content": PROMPT}, {"role": "user", "content": problem}])


def compiled(template):
    """A chat template, in the sandbox and with the helpers that published ones rely on."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


# --- what it takes


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def training_gib(config, parameters, gpus, precision, tokens=5120, chunk=256):
    """An estimate of a GPU's peak memory in full_scale/train.py, in GiB: what its tensors add up to, without fragmentation.

    precision "fp32" or "bf16", whose weights, gradients and AdamW moments are fp32 all the same, 16 bytes a parameter over
    all GPUs. With a cached reference, activation checkpointing, and `tokens` tokens at once: the flags' defaults.
    """
    size = {"fp32": 4, "bf16": 2}[precision]
    head = config.vocab_size * config.d_model
    layer = (parameters - (1 if config.tied_head else 2) * head) // config.n_layers
    gathered = (head * (1 if config.tied_head else 2) + 2 * layer) * (size + 4) if gpus > 1 or size == 2 else 0
    activations = tokens * (config.n_layers * config.d_model + 4 * config.d_ff + 8 * config.d_model) * size
    logits = 4 * chunk * config.vocab_size * 4
    return (16 * parameters / gpus + gathered + head * (size + 4) + activations + logits) / 2**30


def describe(name, folder, raw, model):
    """The lines of `python -m full_scale.load_hf` before the sample."""
    c, parameters = model.config, parameter_count(model)
    lines = [
        f"{name}: {raw['architectures'][0]}, {parameters / 1e9:.2f} billion parameters",
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
    parser.add_argument("name", help="hub name, such as Qwen/Qwen2.5-Math-1.5B, or folder")
    parser.add_argument("--prompt", default="What is 17 * 24?", metavar="TEXT", help="what to answer, greedily")
    parser.add_argument("--tokens", default=64, type=answer_length, metavar="N", help="at most so many of them")
    args = parser.parse_args(argv)
    with command(parser.prog, "nothing was written", args.name):
        folder = fetch(args.name)
        raw = read_json(folder / "config.json")
        print(describe(args.name, folder, raw, empty_model(gpt_config(raw, folder / "config.json"))))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_pretrained(folder, torch.float32 if device == "cpu" else torch.bfloat16, device)
        prompt = torch.tensor([tokenizer.encode(tokenizer.ask(args.prompt))], device=device)
        stops = torch.tensor(sorted(tokenizer.stops), device=device)
        answer = model.generate(prompt, args.tokens, stops, tokenizer.eos, temperature=0)[0].tolist()
        print(f"\n{args.prompt}\n  {tokenizer.decode(answer).strip()}")


if __name__ == "__main__":
    run()
