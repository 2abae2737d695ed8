"""Look at the task: python -m toy_math [ROLLOUTS.jsonl]

Prints a few problems, a clean and a slipped trace side by side, and how much incorrect solutions share with correct ones.
Without a file the solutions come from the slipping corpus itself, which is what the base model learns to imitate.
"""

import argparse
import random

from plumbing.files import printable_path
from plumbing.flags import Parser, command, natural

from .problems import draw_problems, verify, write_trace
from .rollouts import overlap, read_rows, rollout_rows


def solutions(path, problems, rng):
    """Rows as in rollouts.py, and where they come from, a file or the slipping corpus. Raises UserError on a bad file."""
    if path:
        return read_rows(path), path
    repeated = [problem for problem in problems for _ in range(8)]
    texts = [write_trace(problem, 0.12, rng)[0] for problem in repeated]
    rows = rollout_rows([(problem, text, True, verify(problem, text)) for problem, text in zip(repeated, texts)])
    return rows, "the slipping corpus, 200 problems × 8"


def show(args):
    """Print the page."""
    rng = random.Random(args.seed)
    problems = draw_problems(200, n_ops=6, split="train", rng=rng)
    rows, source = solutions(args.rollouts, problems, rng)
    figures = overlap(rows)
    correct, malformed = (sum(row[key] for row in rows) for key in ("label", "malformed"))

    print("problems")
    for problem in problems[:5]:
        print(f"  {problem.prompt:16} -> {write_trace(problem)[0][-2:]}")

    clean, slips = write_trace(problems[0])
    slipped = clean
    while len(slips) != 1 or slipped[-2:] == clean[-2:]:  # one slip, and one that changes the answer
        slipped, slips = write_trace(problems[0], 0.12, rng)
    marks = "".join("^" if a != b else " " for a, b in zip(clean, slipped))
    print(f"\nclean and slipped solution of {problems[0].prompt}")
    print(f"  clean    {clean}\n  slipped  {slipped}   {slips[0].kind} in step {slips[0].step}\n           {marks.rstrip()}")

    print(f"\noverlap of incorrect with correct solutions of the same problem ({source})")
    print(f"  solutions                                                  {len(rows)}: {correct} correct, {malformed} malformed")
    print(f"  incorrect ones whose problem has a correct one             {figures['incorrect']}")
    print(f"  their tokens also in a correct one, at the same position   {figures['shared_tokens']:.1%}")
    print(f"  their longest common prefix with a correct one             {figures['common_prefix']:.1%} of their length")


def run(argv=None):
    """The command."""
    parser = Parser(prog="python -m toy_math", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rollouts", nargs="?", type=printable_path, metavar="ROLLOUTS.jsonl",
        help="rollouts of a run, e.g. runs/cache/rollouts-….jsonl")  # fmt: skip
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="seed of the problems and slips (default: 0)")
    args = parser.parse_args(argv)
    with command(parser.prog):
        show(args)


if __name__ == "__main__":
    run()
