"""pass@1 of a checkpoint on problems: the mean over problems of the share of right answers among n samples.

    python -m full_scale.evaluate --model runs/qwen/model --problems math500.jsonl --out math500-fpa.jsonl

The paper's setting by default, 8 samples at temperature 0.7. Flags and files are those of full_scale/rollouts.py.
"""

import numpy as np

from plumbing.flags import command_line

from . import rollouts


def pass_at_1(rows):
    """Rollouts -> (mean over problems, its standard error over problems, number of problems)."""
    labels = {}
    for row in rows:
        labels.setdefault(row["problem_id"], []).append(row["label"])
    shares = np.array([np.mean(some) for some in labels.values()])
    error = shares.std(ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else np.nan
    return shares.mean(), error, len(shares)


def report(rows):
    mean, error, problems = pass_at_1(rows)
    return f"pass@1 {mean:.4f} ± {error:.4f} (standard error over {problems} problems, {len(rows) // problems} samples each)"


def run(argv=None):
    parser = command_line(__doc__.splitlines()[0], prog="python -m full_scale.evaluate")
    rollouts.run(argv, parser, n=8, temperature=0.7, report=report)


if __name__ == "__main__":
    run()
