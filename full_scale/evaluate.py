"""pass@k and maj@k of a checkpoint on problems, from n samples each, with standard errors over problems.

    python -m full_scale.evaluate --model runs/qwen/model --problems math500.jsonl --out math500-fpa.jsonl

The paper's setting by default, 8 samples at temperature 0.7. pass@1 is the share of right answers, pass@k the chance that one
of k is right, maj@k the chance that the answer which most of k give is right. Flags and files are those of
full_scale/rollouts.py.
"""

import collections

import numpy as np

from plumbing.flags import command_line
from plumbing.log import pass_at

from . import rollouts


def majority(votes):
    """The chance that the answer with most votes is the right one, True, where a tie is broken by lot. None is no vote."""
    counts = collections.Counter(vote for vote in votes if vote is not None)
    first = [vote for vote, count in counts.items() if count == max(counts.values())]
    return (True in first) / max(len(first), 1)


def pass_at_k(votes, k):
    return pass_at(k, len(votes), votes.count(True))


def majority_at_k(votes, k):
    """The mean over the groups of k samples in a row, none of which shares a sample with another."""
    return np.mean([majority(votes[i : i + k]) for i in range(0, len(votes) - k + 1, k)])


MEASURES = {"pass": pass_at_k, "maj": majority_at_k}


def mean_and_error(values):
    """(mean, its standard error, NaN of one value) of what was measured on each problem."""
    return np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan


def report(rows, votes):
    """A line of pass@1, and one for each power of two up to the number of samples, and for that number.

    A row's vote is what its answer is counted as (`gym.vote`).
    """
    by_id = {}
    for row, vote in zip(rows, votes, strict=True):
        by_id.setdefault(row["problem_id"], []).append(row["label"] or vote)
    problems = list(by_id.values())
    n, one = min(map(len, problems)), len(problems) == 1

    def shown(name, k):
        mean, error = mean_and_error([MEASURES[name](votes, k) for votes in problems])
        return f"{name}@{k} {mean:.4f}" + ("" if one else f" ± {error:.4f}")

    basis = "one problem" if one else f"standard error over {len(problems)} problems"
    samples = f"{n} {'sample' if n == 1 else 'samples'}{'' if one else ' each'}"
    ks = sorted({2**i for i in range(1, n.bit_length())} | {n} - {1})
    return "\n".join([f"{shown('pass', 1)} ({basis}, {samples})", *(f"{shown('pass', k)}   {shown('maj', k)}" for k in ks)])


def run(argv=None):
    parser = command_line("Measure pass@k and maj@k of a checkpoint on problems.", prog="python -m full_scale.evaluate")
    rollouts.run(argv, parser, temperature=0.7, report=report)


if __name__ == "__main__":
    run()
