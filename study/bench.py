"""Time and memory against the machine's own limit and against peers, and how they grow.

    python -m study.bench           # everything, some twenty minutes; prints the tables and writes them to docs/bench.md
    python -m study.bench --quick   # a minute or two: the toy's size only, few rounds, a main job of seconds; prints only

What is compared within a process is timed in turn, round after round. A ratio is the median over the rounds, so a machine that
slows down slows both. Peers are `pip install transformers trl`. Left out: GPUs, except for full_scale/'s own steps.
"""

import contextlib
import datetime
import functools
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import model as model_py
from losses import objective, token_logps
from model import GPT, GPTConfig
from plumbing import jobs
from plumbing.files import write_text
from plumbing.flags import NO_DEFAULT, command, command_line
from plumbing.keeper import adamw, update
from plumbing.log import environment, progress
from study.measuring import NO_GOAL, against_best, against_generate, goal, in_turn, llama, make, peak_resident, ratio
from toy_math import rollouts
from toy_math.problems import draw_problems, write_trace
from toy_math.stages import CONFIG, Rollouts
from toy_math.tokenizer import ALPHABET, BOS, EOS, PAD, VOCAB_SIZE
from train import add_logps

ROOT = Path(__file__).resolve().parent.parent
LARGE = GPTConfig(vocab_size=VOCAB_SIZE, d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_ff=1152)
PAIRS, OPS = 32, 6
EVAL_PROBLEMS, EVAL_SAMPLES = 256, 8  # of the sampling that is timed
RUNS = {"off_rl": SimpleNamespace(loss="off_rl", lam=0.0), "fpa": SimpleNamespace(loss="fpa", lam=2.0, target="both")}
SMALL_JOB = "--ops 1 --base-steps 300 --slip 0.3 --prompts 64 --steps 100 --eval-every 50".split()  # seconds, for --quick


# --- what is measured


def pair_rows(pairs=PAIRS, ops=OPS):
    """Clean solutions of some problems, then slipped ones of the same problems."""
    rng, rows = random.Random(0), []
    for slipped in (False, True):
        for problem in draw_problems(pairs, ops, "train", random.Random(1)):
            completion, mistakes = write_trace(problem)
            while slipped and not mistakes:
                completion, mistakes = write_trace(problem, 0.12, rng)
            rows.append({"prompt": problem.prompt, "completion": completion, "finished": True})
    return rows


def pair_data(config=CONFIG, pairs=PAIRS, ops=OPS):
    """`pair_rows` as toy_math/stages.py prepares rollouts; the reference logits are those of random weights."""
    rows = pair_rows(pairs, ops)
    tokens, mask = rollouts.pack(rows)
    start = len(rows[0]["prompt"])
    torch.manual_seed(1)
    with torch.no_grad():
        ref_logits = GPT(config)(tokens, start)
    reward = torch.tensor([1.0] * pairs + [-1.0] * pairs)
    return Rollouts(tokens, mask, start, ref_logits, reward=reward)


def step_on(model, optimizer, data, rows, run):
    """One training step of train.py on some rows -> its loss and gradient norm (2,)."""
    b = data[rows]
    add_logps(model, b, run.lam)
    loss, _ = objective(b, run)
    return torch.stack([loss.detach(), update(model, optimizer, loss)])


def stepper(config, data, loss_name="fpa"):
    """A function that takes one training step on all of the data."""
    model, optimizer = make(config)
    return functools.partial(step_on, model, optimizer, data, torch.arange(len(data)), RUNS[loss_name])


# --- 1. roofline


def linear_shapes(config, data):
    """(rows, inputs, outputs) of every matrix product of a forward pass but attention's; the head sees completions only."""
    B, T = data.inputs.shape
    modules = [m for m in GPT(config).modules() if isinstance(m, torch.nn.Linear)]
    return [(B * T, m.in_features, m.out_features) for m in modules] + [
        (B * (T - data.start), config.d_model, config.vocab_size)
    ]


def step_flops(config, data):
    """Floating-point operations of a training step: NOTES has the formula in words."""
    B, T = data.inputs.shape
    linear = sum(2 * m * k * n for m, k, n in linear_shapes(config, data))
    attention = config.n_layers * 4 * B * T * T * config.d_model
    return 3 * (linear + attention)


def own_sizes(config, data):
    """A function that multiplies what a step's linear layers multiply, forward and backward, and its operations."""
    products = []
    for m, k, n in linear_shapes(config, data):
        x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        products += [(x, w.T), (dy, w), (dy.T, x)]  # y, dx, dw

    def multiply():
        for a, b in products:
            a @ b

    return multiply, sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in products)


def roofline(rounds, quick):
    """Rows: the step's rate over that of its own matrix products, on all threads, on one, and at 10 M parameters."""
    square, threads = torch.randn(2048, 2048), torch.get_num_threads()
    cases = [("toy", CONFIG, count, 0.5) for count in sorted({1, threads}, reverse=True)]
    cases += [] if quick else [("10 M", LARGE, threads, 0.8)]
    rows = []
    for name, config, count, bound in cases:
        torch.set_num_threads(count)
        data = pair_data(config)
        own, own_flops = own_sizes(config, data)
        n = rounds if config is CONFIG else 5
        seconds = in_turn(n, step=stepper(config, data), own=own, square=lambda: square @ square)
        flops = {"step": step_flops(config, data), "own": own_flops, "square": 2 * 2048**3}
        rates = {key: flops[key] / seconds[key] / 1e9 for key in flops}
        step, own, large = (np.median(rate) for rate in rates.values())
        value, words = ratio(rates["step"], rates["own"])
        what = f"{name}, {count} thread{'s' * (count > 1)}, {flops['step'] / 1e9:.1f} GFLOP a step"
        rows.append((what, f"{words}: {step:.0f} of {own:.0f} GFLOP/s; large {large:.0f}", *goal(value, "≥", bound)))
    torch.set_num_threads(threads)
    return rows


# --- 2. overhead of FPA


def peak_memory(loss_name, config):
    """Peak resident MiB of a few steps on 8,192 rollouts; Off-RL goes without reference logits. For a process of its own."""
    data, copies = pair_data(config), 8192 // 2 // PAIRS
    model, optimizer = make(config)
    data.columns = {name: values.repeat_interleave(copies, dim=0) for name, values in data.columns.items()}
    if loss_name == "off_rl":
        del data.columns["ref_logits"]
    for first in range(3):
        step_on(model, optimizer, data, torch.arange(first, 8192, copies), RUNS[loss_name])
    return peak_resident()


def overhead(rounds, quick):
    """Rows: step time and peak memory of FPA over Off-RL's."""
    rows = []
    for name, config in [("toy", CONFIG)] + [("10 M", LARGE)] * (not quick):
        data = pair_data(config)
        n = 2 * rounds if name == "toy" else 5
        seconds = in_turn(n, off_rl=stepper(config, data, "off_rl"), fpa=stepper(config, data))
        value, words = ratio(seconds["fpa"], seconds["off_rl"])
        rows.append((f"{name}: step time, FPA / Off-RL", words, *goal(value, "≤", 1.03)))
        if not Path("/proc/self/status").exists():
            rows.append((f"{name}: peak memory", "needs /proc", *NO_GOAL))
            continue
        peaks = {"off_rl": [], "fpa": []}
        for loss_name in list(peaks) * (1 if quick else 3):  # a process each: a peak stays a peak
            with jobs.workers(1) as pool:
                peaks[loss_name].append(pool.submit(peak_memory, loss_name, config).result())
        peaks = {loss_name: np.median(values) for loss_name, values in peaks.items()}
        value, more = round(peaks["fpa"] / peaks["off_rl"], 2), peaks["fpa"] - peaks["off_rl"]
        words = f"{value:.2f}: {more:.0f} MiB more than {peaks['off_rl']:.0f} MiB"
        rows.append((f"{name}: peak memory, FPA / Off-RL", words, *goal(value, "≤", 1.02)))
    return rows


# --- 3. peers


def against_llama(config, rounds):
    """Forward, backward and optimizer step on the same tokens."""
    tokens, mask = rollouts.pack(pair_rows())
    model, optimizer = make(config)

    def step(policy, optimizer, **words):
        logits = policy(tokens, **words)
        loss = -token_logps(logits if policy is model else logits.logits, tokens, mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    contestants = {"ours": functools.partial(step, model, optimizer)}
    for attention in ("sdpa", "eager"):
        peer = llama(model, attention)
        torch.testing.assert_close(peer(tokens).logits, model(tokens), rtol=1e-3, atol=1e-3)
        contestants[attention] = functools.partial(step, peer, adamw(peer.parameters(), 1e-4), use_cache=False)
    return in_turn(rounds, **contestants)


def evaluation_samples(config, problems):
    """EVAL_SAMPLES samples of each problem, as an evaluation takes them."""
    prompts = rollouts.prompt_tokens(draw_problems(problems, OPS, "test", random.Random(0)))
    at_once = rollouts.problems_at_once(EVAL_SAMPLES, prompts.device)
    return against_generate(GPT(config), prompts, rollouts.max_completion_tokens(OPS), EVAL_SAMPLES, 3, at_once)


def toy_tokenizer():
    """The toy's tokenizer as transformers' class."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(ALPHABET)} | {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def against_trl(config, rounds):
    """A whole step of TRL's DPOTrainer, reference precomputed, and ours in turn on the same 32 pairs."""
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows, data = pair_rows(), pair_data(config)
    step = stepper(config, data)
    pairs = [
        {"prompt": "<bos>" + good["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}
        for good, bad in zip(rows[:PAIRS], rows[PAIRS:])
    ]
    dataset = Dataset.from_list(pairs * (rounds + 2))  # one epoch, whose start and end are then in no step
    seconds = {"TRL": [], "ours": []}

    class Turns(transformers.TrainerCallback):
        """The peer's step runs from the end of ours to its own end: batch, forward, backward, optimizer."""

        def on_step_end(self, args, state, control, **kwargs):
            if hasattr(self, "began"):
                seconds["TRL"].append(time.perf_counter() - self.began)
            began = time.perf_counter()
            step()
            self.began = time.perf_counter()
            seconds["ours"].append(self.began - began)

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            folder, per_device_train_batch_size=PAIRS, max_steps=rounds + 2, precompute_ref_log_probs=True, max_length=None,
            learning_rate=1e-4, optim="adamw_torch_fused", max_grad_norm=1.0, adam_beta2=0.95, weight_decay=0.0, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none", logging_strategy="no", save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DPOTrainer(llama(make(config)[0]), args=settings, train_dataset=dataset, processing_class=toy_tokenizer())
        trainer.add_callback(Turns())
        batch = next(iter(trainer.get_train_dataloader()))["input_ids"]
        assert len(batch) == 2 * PAIRS and {*map(tuple, batch.tolist())} <= {*map(tuple, data.inputs.tolist())}
        with contextlib.redirect_stdout(None):  # it prints its averages at the end
            trainer.train()
    return {"TRL": np.array(seconds["TRL"][1:]), "ours": np.array(seconds["ours"][1:-1])}


def peers(rounds, quick):
    """Rows: each peer's time over ours, or that it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    for name, config in [("toy", CONFIG)] + [("10 M", LARGE)] * (not quick):
        toy = name == "toy"
        some = rounds if toy else 5
        problems = 48 if quick else EVAL_PROBLEMS if toy else 16
        sampling = f"{EVAL_SAMPLES} samples of {problems} prompts, transformers / ours"
        cases = [
            ("forward, backward and step, transformers / ours", lambda: against_llama(config, some), 1),
            ("a step, TRL's DPO / our FPA", lambda: against_trl(config, some), 2 if toy else 1.2),
            (sampling, lambda: evaluation_samples(config, problems), 3 if toy else None),
        ]
        for what, measure, bound in cases:
            try:
                seconds = measure()
            except ImportError:
                rows.append((f"{name}: {what}", "not installed", *NO_GOAL))
                continue
            rows.append(against_best(f"{name}: {what}", seconds, bound))
    return rows


# --- ideas


def ideas(rounds, quick):
    """Each idea left out, or taken up, and the shipped code in turn, on all threads and on one, as in runs side by side."""
    threads, columns = torch.get_num_threads(), []
    for count in (threads, 1):
        torch.set_num_threads(count)
        columns.append(ideas_on_these_threads(rounds, quick))
    torch.set_num_threads(threads)
    return [(what, words, other_words, verdict) for (what, words, verdict), (_, other_words, _) in zip(*columns)]


def ideas_on_these_threads(rounds, quick):
    """Rows (idea, ratio in words, verdict)."""
    count, data = 96 if quick else EVAL_PROBLEMS, pair_data()
    steps, samples = ideas_in_steps(rounds, data), ideas_in_sampling(3 if quick else 5, count)
    rows = [
        ("attention weights written out, step", steps, "fused", "kept"),
        ("attention weights written out, sampling", samples, "fused", "kept"),
        ("cached reference logits, step", steps, "uncached", "kept"),
        ("AdamW's fused kernel, step", steps, "loop", "kept"),
        (f"{rollouts.CPU_ROWS} rows a thread at once, not {EVAL_SAMPLES * count}, sampling", samples, "whole", "kept"),
        ("a prompt read once for its samples, sampling", samples, "unshared", "kept"),
        ("bfloat16 products, step", steps, "bfloat16", "not taken: float32 on CPUs"),
    ]
    rows = [(what, ratio(seconds[other], seconds["shipped"])[1], verdict) for what, seconds, other, verdict in rows]
    return rows if quick else [*rows, compiled(rounds, data)]


def with_fused_attention(function):
    """Call a function with torch's fused attention in the place of model.py's."""
    attention = torch.nn.functional.scaled_dot_product_attention
    with mock.patch.object(model_py, "attend", lambda q, k, v: attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)):
        function()


def ideas_in_steps(rounds, data):
    """Seconds of the shipped step, and of a step with another idea each."""
    step, bfloat16_step, fused_step, cached_step = (stepper(CONFIG, data) for _ in range(4))
    reference, model = make(CONFIG)[0], make(CONFIG)[0]
    loop = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)

    def with_reference_forward():
        with torch.no_grad():
            reference(data.inputs, data.start)
        cached_step()

    def with_bfloat16():
        torch.set_float32_matmul_precision("medium")
        bfloat16_step()
        torch.set_float32_matmul_precision("highest")

    def with_loop():
        step_on(model, loop, data, torch.arange(len(data)), RUNS["fpa"])

    others = {"uncached": with_reference_forward, "loop": with_loop, "bfloat16": with_bfloat16}
    return in_turn(rounds, shipped=step, fused=lambda: with_fused_attention(fused_step), **others)


def ideas_in_sampling(rounds, count):
    """Seconds of the shipped sampling of `count` prompts, and of sampling with another idea each."""
    model, width = make(CONFIG)[0], rollouts.max_completion_tokens(OPS)
    prompts = rollouts.prompt_tokens(draw_problems(count, OPS, "test", random.Random(0)))
    split = prompts.split(rollouts.problems_at_once(EVAL_SAMPLES, prompts.device))

    def sample(prompts=split, repeat=1):
        for some in prompts:
            some = some.repeat_interleave(repeat, dim=0)
            model.generate(some, width, eos=-1, pad=PAD, samples=EVAL_SAMPLES // repeat)

    others = {"fused": lambda: with_fused_attention(sample), "whole": lambda: sample([prompts])}
    return in_turn(rounds, shipped=sample, unshared=lambda: sample(repeat=EVAL_SAMPLES), **others)


def compiled(rounds, data):
    """The step with torch.compile, and the seconds that compiling takes; it needs a C++ compiler."""
    from torch._inductor import config

    config.force_disable_caches = True  # what an earlier run compiled would take no time
    model, optimizer = make(CONFIG)
    model.hidden = torch.compile(model.hidden)
    step = functools.partial(step_on, model, optimizer, data, torch.arange(len(data)), RUNS["fpa"])
    began = time.perf_counter()
    try:
        step()
    except RuntimeError as error:
        return "torch.compile, step", f"failed: {type(error).__name__}", "not taken"
    compiling = time.perf_counter() - began
    seconds = in_turn(rounds, shipped=stepper(CONFIG, data), compiled=step)
    return "torch.compile, step", ratio(seconds["compiled"], seconds["shipped"])[1], f"not taken: {compiling:.0f} s to compile"


# --- growth


def growth(rounds, quick):
    """Median step times along one size at a time, and the exponent of the power law through them."""
    pair_counts, widths = [8, 16, 32, 64], [32, 64, 128, 256]
    vocabularies, op_counts = [20, 200, 2_000, 8_000], [2, 4, 8, 16]
    if quick:
        pair_counts, widths, vocabularies, op_counts = (x[:2] for x in (pair_counts, widths, vocabularies, op_counts))
    batches, traces = [pair_data(pairs=pairs) for pairs in pair_counts], [pair_data(ops=ops) for ops in op_counts]
    wide = [GPTConfig(vocab_size=VOCAB_SIZE, d_model=width, d_ff=3 * width) for width in widths]
    wordy = [GPTConfig(vocab_size=size) for size in vocabularies]
    lines = [
        ("tokens a batch", [d.inputs.numel() for d in batches], [stepper(CONFIG, d) for d in batches]),
        ("model width D", widths, [stepper(config, pair_data(config)) for config in wide]),
        ("vocabulary V", vocabularies, [stepper(config, pair_data(config)) for config in wordy]),
        ("trace length T", [d.inputs.shape[1] for d in traces], [stepper(CONFIG, d) for d in traces]),
    ]
    rows = []
    for what, sizes, steps in lines:
        seconds = in_turn(max(rounds // 2, 3), **{str(size): step for size, step in zip(sizes, steps)})
        times = [np.median(seconds[str(size)]) for size in sizes]
        exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        points = "; ".join(f"{size:,}: {1000 * t:.0f} ms" for size, t in zip(sizes, times))
        rows.append((what, points, f"{exponent:.2f}"))
    return rows


# --- the command itself


def run_train(*words):
    """`python train.py WORDS` in a process of its own: (seconds, what it printed)."""
    began = time.perf_counter()
    command = [sys.executable, ROOT / "train.py", *map(str, words)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - began, result.stdout


def share_of_evaluations(out, *words):
    """Of the seconds of a run with caches, those in its evaluations. For a process of its own: it changes train.py."""
    import train

    spent, plain, began = [], train.Exam.__call__, time.perf_counter()

    def timed(*values):
        before = time.perf_counter()
        columns = plain(*values)
        spent.append(time.perf_counter() - before)
        return columns

    with mock.patch.object(train.Exam, "__call__", timed), contextlib.redirect_stdout(None):
        train.main(train.parse_args([*words, "--out", str(out)]))
    return sum(spent) / (time.perf_counter() - began)


def time_to_result(out, quick):
    """Rows: the main job and a run with its caches, by stage; the share of the evaluations."""
    small, rows = SMALL_JOB if quick else [], []
    for title, words in {"from nothing, Off-RL and FPA": [], "with caches, FPA": ["--loss", "fpa", "--lam", 3]}.items():
        seconds, printed = run_train(*words, "--device", "cpu", "--out", out / "runs", *small)
        stages = re.findall(r"^(base model|rollouts|reference) +([\d.]+) s", printed, flags=re.M)
        rows.append(
            (title, ", ".join(f"{stage} {float(time):.1f} s" for stage, time in [("whole", seconds), *stages]), *NO_GOAL)
        )
    with jobs.workers(1) as pool:
        share = round(pool.submit(share_of_evaluations, out / "runs", "--loss", "fpa", "--lam", "4", *small).result(), 2)
    return [*rows, ("evaluations, share of a run with caches", f"{share:.2f}", *(NO_GOAL if quick else goal(share, "≤", 0.2)))]


def sweep(out):
    """Runs of several λ, caches in place: n runs as the command takes them, and the same one by one."""
    words = ["--loss", "fpa", "--device", "cpu", "--out", out, "--force", "--steps", 300, "--eval-every", 300, "--lam"]
    counts, lams = [1, 2, 4, 8], range(1, 9)
    if not (out / "cache").exists():  # by --only, without Time to result
        run_train(*words, *lams[:1])
    times = [run_train(*words, *lams[:count])[0] for count in counts]
    one_by_one = run_train(*words, *lams, "--jobs", 1)[0]
    points = "; ".join(f"{count}: {t:.0f} s" for count, t in zip(counts, times))
    return [
        ("runs", points, f"{np.polyfit(np.log(counts), np.log(times), 1)[0]:.2f}"),
        ("8 runs one by one / side by side", f"{one_by_one / times[-1]:.2f} ({one_by_one:.0f} / {times[-1]:.0f} s)", ""),
    ]


# --- full scale


def full_scale(out, quick):
    """Rows: those of study/bench_full_scale.py."""
    if find_spec("transformers") is None or not Path("/proc/self/status").exists():
        return [("memory of the loss", "needs /proc, and pip install -r full_scale/requirements.txt", *NO_GOAL)]
    from study import bench_full_scale

    return bench_full_scale.full_scale(out, quick)


# --- the page


def table(title, note, header, rows):
    lines = ("| " + " | ".join(cells) + " |\n" for cells in (header, ["---"] * len(header), *rows))
    return f"## {title}\n\n{note}\n\n{''.join(lines)}\nMeasured on {datetime.date.today()}.\n"


def machine():
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "trl"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"The machine: {environment('cpu')['cpu']}, {cores}. The versions: {', '.join(versions)}."


NOTES = {
    "Roofline": """Operations of a step = 3 (2 Σ m·k·n + 4 · layers · B · T² · D). Every linear layer multiplies (m, k) by
(k, n), and m is B · T tokens. For the head m counts the completion's tokens alone. Attention has two products of T² · D a
sequence. Backward costs twice forward. "Of own sizes" is the step's rate over the rate of just these (m, k, n), forward and
backward. Large is 2,048³. All is float32.""",
    "Overhead of FPA": """A step takes 32 pairs, and the reference logits are cached. Memory is the peak of a process that
imports, holds 8,192 rollouts and trains three steps, the median of three. Off-RL's process goes without the reference logits,
which `train.py` loads for either loss. FPA's holds V floats for every completion token, whatever the size of the model.""",
    "Peers": """Both sides have the same random weights, tokens and optimizer (fused AdamW), in float32. transformers has
the better of its sdpa and eager attention, and of all prompts at once and the split that we sample in. TRL's step is
DPOTrainer's own with precomputed reference log-probabilities, its batch collation and metrics included. Ours is a whole FPA
step. Both take 32 pairs. Above 1, ours is faster.""",
    "Ideas": """A ratio is the time without the idea over the time with it. Of an idea that was not taken, it is the time with
it over the time without. "Sampling" is an evaluation's.""",
    "Growth": """Median times of a step; the exponent is that of a power law through the points, 1 being linear.""",
    "Time to result": """`python train.py`, then `--loss fpa --lam 3` with what the first has cached; once each.""",
    "Sweeps": """A run has one λ and 300 steps. The caches are in place, and start-up and figures are included. Each is run
once. Several runs go side by side in processes of one thread. One run, and runs one by one, have all threads.""",
    "Full scale": """Memory is that of the log-probabilities under the present and the future policy, forward and backward, in
float32 at a vocabulary of 151,936. It is the peak of a process beyond hidden states, heads and their gradients. Plain holds all
positions' logits, and `full_scale/chunked.py` those of 256. Few-shot is an FPA step in float32, without sharding and
gradient clipping, on 16 rows of SmolLM2-135M's shape, with random weights. All rows share 386 tokens. Each row has 14 more of
its problem and 26 of its answer. A large product is 2,048³. On a GPU there are also 20 FPA steps of `full_scale/train.py` in
bf16, on random checkpoints of real shapes, with 512 tokens a row. A large product is 8,192³ there.""",
}


def main(args):
    """Every section in turn, printed and, where args.to says so, written."""
    rounds = 8 if args.quick else 40
    goals, growths = ["", "measured", "goal", "met"], ["", "time", "exponent"]
    rule = "a ratio with brackets is the median over rounds taken in turn, and the middle half of them."
    rule = f"`python -m study.bench{' --quick' * args.quick}`; {rule}"
    head = f"# Measured against the limit and against peers\n\n{machine()}\n\n{rule}\n"
    print(head)
    texts = {}
    if args.only and args.to and args.to.exists():
        texts = {part.split("\n")[0]: f"## {part.strip()}\n" for part in args.to.read_text().split("\n## ")[1:]}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        sections = {
            "Roofline": (goals, lambda: roofline(rounds, args.quick)),
            "Overhead of FPA": (goals, lambda: overhead(rounds, args.quick)),
            "Peers": (goals, lambda: peers(rounds, args.quick)),
            "Ideas": (["", f"{torch.get_num_threads()} threads", "1 thread", ""], lambda: ideas(rounds, args.quick)),
            "Growth": (growths, lambda: growth(rounds, args.quick)),
            "Time to result": (goals, lambda: time_to_result(out, args.quick)),
            "Sweeps": (growths, lambda: sweep(out / "runs")),
            "Full scale": (goals, lambda: full_scale(out, args.quick)),
        }
        chosen = args.only or [title for title in sections if not (args.quick and title == "Sweeps")]
        for title in progress(chosen, desc="bench"):
            header, measure = sections[title]
            texts[title] = table(title, NOTES[title], header, measure())
            tqdm.write(texts[title])
            if args.to:  # after each section, so that Ctrl-C loses one at most
                write_text(args.to, "\n".join([head, *(texts[title] for title in sections if title in texts)]))
    if args.to:
        print(f"written to {args.to}")


def run(argv=None):
    """The command: a wrong flag, or Ctrl-C, is one line and an exit code."""
    parser = command_line(__doc__.splitlines()[0], prog="python -m study.bench")
    parser.add_argument("--quick", action="store_true", help="a minute or two: the toy's size only, few rounds, no sweeps")
    parser.add_argument("--only", nargs="+", choices=NOTES, metavar="SECTION", help="measure these; the page keeps "
        f"the others{NO_DEFAULT}")  # fmt: skip
    parser.add_argument("--to", type=Path, metavar="FILE", help="where the tables go "
        f"(default: docs/bench.md, with --quick nowhere){NO_DEFAULT}")  # fmt: skip
    args = parser.parse_args(argv)
    args.to = args.to or (None if args.quick else ROOT / "docs" / "bench.md")
    if args.to and (not args.to.absolute().parent.is_dir() or args.to.is_dir()):
        parser.error(f"argument --to: {args.to} is not a file in a folder that exists")
    with command(parser.prog, "what is printed above is all that was measured", args.to or "."):
        main(args)


if __name__ == "__main__":
    run()
