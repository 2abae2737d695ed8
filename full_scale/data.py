"""Rollouts as tensors: read, paired with other prompts for KTO, padded into batches, split over processes."""

import datetime
import functools
import hashlib
from types import SimpleNamespace

import torch
import torch.distributed as dist

from losses import optimal_value, prompt_mean
from plumbing.files import UserError, read_json, write_json

from .processes import say
from .rows import read_rollouts, tokens_of


def read_data(args, tokenizer, mismatched=False):
    """The rollouts as a namespace: tokens, a list of N id tensors, and tensors (N,) over rows. Raises UserError.

    The tensors: prompt_length and length, in tokens; reward, +1 or -1; problem_ids; value and mean_reward, of a row's prompt;
    other_prompt, the row of another prompt for KTO's z0, or None where `mismatched` does not ask for it. key: their digest.
    """
    encode = functools.cache(tokenizer.encode)  # prompts repeat

    def tokens(row):
        prompt, completion = tokens_of(row, tokenizer, encode)
        if len(prompt) + len(completion) > args.max_length:
            raise ValueError(f"{len(prompt) + len(completion)} tokens, more than --max-length {args.max_length}")
        return {"tokens": torch.tensor(prompt + completion), "prompt_length": len(prompt)}

    rows = read_rollouts(args.data, tokenizer, tokens, skip_bad=args.skip_bad_lines, say=say)
    if len({row["label"] for row in rows}) < 2:
        raise UserError(f"{args.data}: needs correct and incorrect rows, and has {len(rows)} of one kind only")
    tokens, prompt_length = [row["tokens"] for row in rows], torch.tensor([row["prompt_length"] for row in rows])
    reward = torch.tensor([1.0 if row["label"] else -1.0 for row in rows])
    problem_ids = torch.tensor([row["problem_id"] for row in rows])
    ids = problem_ids.unique(return_inverse=True)[1]
    content = b"".join(values.numpy().tobytes() for values in [*tokens, prompt_length, reward])
    return SimpleNamespace(
        key=hashlib.sha256(content).hexdigest()[:16],
        tokens=tokens,
        prompt_length=prompt_length,
        length=torch.tensor([len(ids) for ids in tokens]) - prompt_length,
        reward=reward,
        problem_ids=problem_ids,
        value=optimal_value(reward, ids),
        mean_reward=prompt_mean(reward, ids),
        other_prompt=other_prompts(problem_ids.tolist()) if mismatched else None,
    )


def first_date(tokenizer, folder):
    """Today, or, of a chat template that asks for it, the first run's today: else a run would go on with other prompts."""
    path, today = folder / "date.json", datetime.datetime.now()
    if "strftime_now" not in str(tokenizer.tokenizer.chat_template):
        return today
    if not path.exists():
        write_json(path, {"date": today.isoformat()})
    try:
        return datetime.datetime.fromisoformat(read_json(path).get("date"))
    except (TypeError, ValueError):
        raise UserError(f"{path}: no date; remove it to take today's") from None


def other_prompts(ids):
    """For KTO's z0, the row (N,) whose prompt a row's completion is put after: the next one of another problem.

    ids: the problem of every row. Raises UserError where there is only one problem.
    """
    if len(set(ids)) < 2:
        raise UserError("kto needs rows of at least two prompts: its z0 puts completions after others' prompts")
    other = [0] * len(ids)
    following = next(i for i in range(len(ids)) if ids[i] != ids[-1])
    for i in reversed(range(len(ids))):
        following = i + 1 if i + 1 < len(ids) and ids[i + 1] != ids[i] else following
        other[i] = following
    return torch.tensor(other)


def pack(data, rows, device, prompts=None):
    """Some rows -> tokens (B, T) padded right, mask (B, T) True on completion tokens; `prompts`: the rows of their prompts."""
    prompts = rows if prompts is None else prompts
    sequences, starts = [], []
    for row, prompt in zip(rows.tolist(), prompts.tolist()):
        start = data.prompt_length[prompt].item()
        completion = data.tokens[row][data.prompt_length[row] :]
        sequences.append(torch.cat([data.tokens[prompt][:start], completion]))
        starts.append(start)
    return padded(sequences, starts, device)


def padded(sequences, starts, device):
    """Sequences (T,) and where their completions start -> tokens (B, T) padded right, mask (B, T) True on completion tokens."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    positions = torch.arange(tokens.shape[1])
    mask = (positions >= torch.tensor(starts)[:, None]) & (positions < lengths)
    return tokens.to(device), mask.to(device)


def micro_batches(data, rows, size, pairs=False):
    """This process's share of some rows, `size` at once and of similar lengths. A pair stays together, correct rows first."""
    units = rows.view(2, -1).T if pairs else rows[:, None]  # (units, rows of each)
    total = data.prompt_length + data.length
    units = units[total[units].amax(1).argsort()]
    return [unit.T.flatten() for unit in units.split(size // units.shape[1])][dist.get_rank() :: dist.get_world_size()]


def batch_of(data, rows, device):
    """What losses.objective reads of some rows and knows before a forward: a namespace of tensors (B,)."""
    names = ("reward", "length", "value", "mean_reward")
    return SimpleNamespace(**{name: getattr(data, name)[rows].to(device) for name in names})
