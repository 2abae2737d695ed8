"""From problems to tensors: the corpus, rollouts of a policy as JSON lines, their overlap (C1), and evaluation.

A rollout's line is `{"prompt", "completion", "label"}`, the unpaired preference format that TRL's trainers and
`datasets.load_dataset("json", ...)` take, plus the problem's id, the first wrong step and whether the text is malformed.
"""

import json

import torch

from .problems import STEP_WIDTH, draw_problem, verify, write_trace
from .tokenizer import BOS, EOS, PAD, decode, encode


def corpus_rows(count, n_ops, slip_rate, rng):
    """Slipping solutions of training problems, to imitate: rows that `pack` takes, with their [Slip, ...]."""
    rows = []
    while len(rows) < count:
        problem = draw_problem(n_ops, rng)
        if problem.split == "train":
            completion, slips = write_trace(problem, slip_rate, rng)
            rows.append({"prompt": problem.prompt, "completion": completion, "finished": True, "slips": slips})
    return rows


def max_completion_tokens(n_ops):
    """n steps, `#` and two digits, EOS. A longer completion is malformed anyway."""
    return n_ops * STEP_WIDTH + len("#60") + 1


def prompt_tokens(problems, device="cpu"):
    """Problems of one length -> (B, P) token ids, BOS first."""
    return torch.tensor([[BOS] + encode(problem.prompt) for problem in problems], device=device)


def sample(model, problems, temperature, generator):
    """One completion for each problem, verified: [(completion text, finished, Verdict)]."""
    prompts = prompt_tokens(problems, generator.device)
    tokens = model.generate(prompts, max_completion_tokens(len(problems[0].ops)), EOS, PAD, temperature, generator)
    decoded = [decode(row) for row in tokens.tolist()]
    return [(text, finished, verify(problem, text, finished)) for problem, (text, finished) in zip(problems, decoded)]


def rollout_rows(problems, samples):
    """The JSON lines' fields. `finished` is False where the trajectory was cut off before EOS."""
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
        for problem, (text, finished, verdict) in zip(problems, samples)
    ]


def read_rows(path):
    """A file of JSON lines -> [row]. Raises OSError, or ValueError where a line is not JSON."""
    with open(path) as file:
        return [json.loads(line) for line in file]


def pack(rows):
    """Rows -> tokens (N, T) padded right with PAD, mask (N, T) True on completion tokens, EOS included."""
    texts = [(encode(r["prompt"]), encode(r["completion"]) + [EOS] * r["finished"]) for r in rows]
    sequences = [torch.tensor([BOS] + prompt + completion) for prompt, completion in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
    prompt_len = torch.tensor([1 + len(prompt) for prompt, _ in texts])[:, None]
    return tokens, (torch.arange(tokens.shape[1]) >= prompt_len) & (tokens != PAD)


def overlap(rows):
    """How much incorrect completions share with correct ones of the same prompt (claim C1).

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
        same = [[a == b for a, b in zip(wrong, right)] for right in rights]
        shared.append(sum(any(s[i : i + 1] == [True] for s in same) for i in range(len(wrong))) / len(wrong))
        prefix.append(max((s + [False]).index(False) for s in same) / len(wrong))
    n = len(shared)
    return {"shared_tokens": sum(shared) / max(n, 1), "common_prefix": sum(prefix) / max(n, 1), "incorrect": n}


def evaluate(model, problems, n_samples, temperature, generator):
    """Accuracy columns of the log, and the samples behind them: [(problem, completion, Verdict)].

    `accuracy` is pass@1, the mean over n_samples samples for each problem; `accuracy_greedy` takes the most likely tokens;
    `malformed` is the share of samples that are not a whole trace.
    """
    repeated = [problem for problem in problems for _ in range(n_samples)]
    sampled = sample(model, repeated, temperature, generator)
    greedy = sample(model, problems, 0, generator)
    verdicts = [verdict for _, _, verdict in sampled]
    metrics = {
        "accuracy": sum(v.correct for v in verdicts) / len(verdicts),
        "accuracy_greedy": sum(v.correct for _, _, v in greedy) / len(greedy),
        "malformed": sum(v.malformed for v in verdicts) / len(verdicts),
    }
    return metrics, [(problem, text, verdict) for problem, (text, _, verdict) in zip(repeated, sampled)]


def samples_text(samples):
    """Five right and five wrong answers, each of another problem, a line each; the samples as `evaluate` returns them."""
    lines = []
    for name, correct in (("right", True), ("wrong", False)):
        picked = {problem: (text, verdict) for problem, text, verdict in reversed(samples) if verdict.correct == correct}
        for problem, (text, verdict) in list(picked.items())[-5:]:
            where = "" if verdict.first_wrong_step is None else f"   first wrong step: {verdict.first_wrong_step}"
            lines.append(f"{name}  {problem.prompt} {text}{'   malformed' if verdict.malformed else ''}{where}")
    return "\n".join(lines) + "\n"
