"""From problems to tensors: the corpus, rollouts of a policy as JSON lines, their overlap, and evaluation.

A rollout's line is `{"prompt", "completion", "label"}`, the unpaired preference format that TRL's trainers and
`datasets.load_dataset("json", ...)` take, plus `problem_id`, `first_wrong_step`, `malformed`, and `finished`, which
says whether EOS was sampled.
"""

import math
import os
from types import SimpleNamespace

import torch

from losses import group_advantage
from plumbing.files import UserError, field, read_lines
from plumbing.log import pass_at

from .problems import STEP_WIDTH, draw_problem, read_problem, verify, write_trace
from .tokenizer import BOS, EOS, PAD, decode, encode

CPU_ROWS = 384  # sampled at once for each thread of a CPU, whose caches hold the keys and values of this many rows
GPU_ROWS = 2048
PASS_AT = (4, 16)  # the k of pass@k
COOL_SAMPLES = 4  # of each problem, at temperature 0.7


def corpus_rows(count, n_ops, slip_rate, rng, habit_rate=0.0):
    """Solutions of training problems with errors, to imitate: rows that `pack` takes."""
    rows = []
    while len(rows) < count:
        problem = draw_problem(n_ops, rng)
        if problem.split == "train":
            completion, _ = write_trace(problem, slip_rate, rng, habit_rate)
            rows.append({"prompt": problem.prompt, "completion": completion, "finished": True})
    return rows


def max_completion_tokens(n_ops):
    """n steps, `#` and two digits, EOS. A longer completion is malformed anyway."""
    return n_ops * STEP_WIDTH + len("#60") + 1


def prompt_tokens(problems, device="cpu"):
    """Problems of one length -> (B, P) token ids, BOS first."""
    return torch.tensor([[BOS] + encode(problem.prompt) for problem in problems], device=device)


def problems_at_once(n_samples, device):
    rows = CPU_ROWS * torch.get_num_threads() if device.type == "cpu" else GPU_ROWS
    return max(rows // n_samples, 1)


def sample(model, problems, n_samples, temperature, generator, bar=iter):
    """n_samples completions of each problem, verified, problem by problem: [(problem, text, finished, Verdict)].

    `temperature` is a number, or a list with one for each sample of a problem. `bar` may wrap the loop over batches in a
    progress bar.
    """
    at_once = problems_at_once(n_samples, generator.device)
    width, samples = max_completion_tokens(len(problems[0].ops)), []
    for first in bar(range(0, len(problems), at_once)):
        some = problems[first : first + at_once]
        prompts = prompt_tokens(some, generator.device)
        tokens = model.generate(prompts, width, EOS, PAD, temperature, generator, n_samples)
        for row, tokens_of_row in enumerate(tokens.tolist()):
            problem, (text, finished) = some[row // n_samples], decode(tokens_of_row)
            samples.append((problem, text, finished, verify(problem, text, finished)))
    return samples


def sample_groups(model, problems, run, generator):
    """An online batch: a group of run.rollouts verified answers of the present policy to each problem.

    With `dapo` the groups of one reward only are dropped, not sampled anew.
    """
    rows = rollout_rows(sample(model, problems, run.rollouts, 1.0, generator))
    inputs, mask = (x.to(generator.device) for x in pack(rows))
    reward = torch.tensor([1.0 if row["label"] else -1.0 for row in rows], device=generator.device)
    advantage, start = group_advantage(reward, run.rollouts), len(rows[0]["prompt"])
    kept = advantage != 0 if run.dapo else slice(None)
    b = {"inputs": inputs, "tokens": inputs[:, start:], "mask": mask[:, start:], "reward": reward, "advantage": advantage}
    b |= {"length": b["mask"].sum(-1), "ref_logp_sum": torch.full_like(reward, math.nan)}  # no reference policy
    return SimpleNamespace(start=start, sampled=mask.sum(), **{name: values[kept] for name, values in b.items()})


def rollout_rows(samples):
    """The JSON lines' fields of what `sample` returns. `finished` is False where the completion was cut off before EOS."""
    ids = {}
    return [
        {
            "prompt": problem.prompt,
            "completion": text,
            "label": verdict.correct,
            "problem_id": ids.setdefault(problem.prompt, len(ids)),
            "first_wrong_step": verdict.first_wrong_step,
            "malformed": verdict.malformed,
            "finished": finished,
        }
        for problem, text, finished, verdict in samples
    ]


def read_rows(path):
    """A file of JSON lines -> [row]. Raises UserError that names the first bad lines, or where problems differ in length."""
    rows = read_lines(path, checked_row)
    if len({len(read_problem(row["prompt"]).ops) for row in rows}) > 1:
        raise UserError(f"{path}: problems of different lengths")
    return rows


def checked_row(row):
    """The row itself. Raises ValueError that names what is wrong with it."""
    problem = read_problem(field(row, "prompt", str))
    encode(field(row, "completion", str))
    for name in ("label", "malformed", "finished"):
        field(row, name, bool)
    if field(row, "problem_id", int) < 0:
        raise ValueError(f"problem_id is {row['problem_id']}, below 0")
    if row.get("first_wrong_step") is not None:
        field(row, "first_wrong_step", int)
    length, longest = len(row["completion"]) + row["finished"], max_completion_tokens(len(problem.ops))
    if not 0 < length <= longest:
        raise ValueError(f"a completion of {length} tokens, not 1 to {longest}")
    return row


def pack(rows):
    """Rows -> tokens (N, T) padded right with PAD, mask (N, T) True on completion tokens, EOS included."""
    texts = [(encode(r["prompt"]), encode(r["completion"]) + [EOS] * r["finished"]) for r in rows]
    sequences = [torch.tensor([BOS] + prompt + completion) for prompt, completion in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
    prompt_len = torch.tensor([1 + len(prompt) for prompt, _ in texts])[:, None]
    return tokens, (torch.arange(tokens.shape[1]) >= prompt_len) & (tokens != PAD)


def overlap(rows):
    """How much incorrect completions share with correct ones of the same prompt.

    Means over the incorrect rows whose prompt has a correct one: `shared_tokens`, the share of their tokens that some
    correct completion has at the same position; `common_prefix`, the longest prefix shared with one, as a share of the
    incorrect completion's tokens; `incorrect`, the number of such rows.
    """
    correct = {}
    for row in rows:
        if row["label"]:
            correct.setdefault(row["prompt"], set()).add(row["completion"])
    shared, prefix = [], []
    for row in rows:
        wrong, rights = row["completion"], correct.get(row["prompt"])
        if row["label"] or not rights or not wrong:
            continue
        shared.append(sum(any(right[i : i + 1] == c for right in rights) for i, c in enumerate(wrong)) / len(wrong))
        prefix.append(max(len(os.path.commonprefix([wrong, right])) for right in rights) / len(wrong))
    n = len(shared)
    return {"shared_tokens": sum(shared) / max(n, 1), "common_prefix": sum(prefix) / max(n, 1), "incorrect": n}


def evaluate(model, problems, n_samples, generator):
    """Accuracy columns of the log, and the samples at temperature 1, as `sample` returns them.

    `accuracy` is pass@1 at temperature 1, the mean over n_samples samples of each problem. `accuracy_0.7` is pass@1 at
    temperature 0.7, over COOL_SAMPLES samples. `accuracy_greedy` takes the most likely tokens. pass@k is the unbiased estimate
    from the samples at temperature 1, and `malformed` the share of these that are not a whole trace. `entropy`, in nats a
    token, is the policy's mean entropy at the positions of one sample of each problem. Raises ValueError for fewer samples
    than a k.
    """
    temperatures = [1.0] * n_samples + [0.7] * COOL_SAMPLES + [0.0]  # together, since a wide batch samples faster
    samples = sample(model, problems, len(temperatures), temperatures, generator)
    correct = torch.tensor([verdict.correct for *_, verdict in samples], dtype=torch.float).view(len(problems), -1)
    warm = [s for first in range(0, len(samples), len(temperatures)) for s in samples[first : first + n_samples]]
    columns = {
        "accuracy": correct[:, :n_samples].mean().item(),
        "accuracy_0.7": correct[:, n_samples:-1].mean().item(),
        "accuracy_greedy": correct[:, -1].mean().item(),
        "malformed": sum(verdict.malformed for *_, verdict in warm) / len(warm),
        "entropy": entropy(model, warm[::n_samples], generator.device),
    }
    for k in PASS_AT:
        chances = [pass_at(k, n_samples, int(count)) for count in correct[:, :n_samples].sum(1)]
        columns[f"pass@{k}"] = sum(chances) / len(chances)
    return columns, warm


@torch.no_grad()
def entropy(model, samples, device):
    """The mean entropy of the next token at the positions of samples' completions, in nats."""
    tokens, mask = (x.to(device) for x in pack(rollout_rows(samples)))
    logps = model(tokens)[:, :-1].float().log_softmax(-1)  # (N, T-1, V)
    return -(logps.exp() * logps).sum(-1)[mask[:, 1:]].mean().item()


def samples_text(samples):
    """Five right and five wrong answers, each of another problem, a line each; samples as `sample` returns them."""
    lines = []
    for name, correct in (("right", True), ("wrong", False)):
        picked = {problem: (text, v) for problem, text, _, v in reversed(samples) if v.correct == correct}
        for problem, (text, verdict) in list(picked.items())[-5:]:
            where = "" if verdict.first_wrong_step is None else f"   first wrong step: {verdict.first_wrong_step}"
            lines.append(f"{name}  {problem.prompt} {text}{'   malformed' if verdict.malformed else ''}{where}")
    return "\n".join(lines) + "\n"
