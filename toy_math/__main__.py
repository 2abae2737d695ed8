"""Look at the task: python -m toy_math [ROLLOUTS.jsonl]

Prints a few problems, a clean and a slipped trace side by side, and how much incorrect solutions share with correct ones.
Without a file the solutions come from the slipping corpus itself, which is what the base model learns to imitate.
"""

import argparse
import random
from pathlib import Path

from plumbing.files import UserError

from .problems import draw_problems, verify, write_trace
from .rollouts import overlap, read_rows, rollout_rows

parser = argparse.ArgumentParser(
    prog="python -m toy_math", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, no usage
parser.add_argument(
    "rollouts", nargs="?", type=Path, metavar="ROLLOUTS.jsonl", help="rollouts of a run, e.g. runs/cache/rollouts-….jsonl"
)
parser.add_argument("--seed", type=int, default=0, help="seed of the problems and slips (default: 0)")
args = parser.parse_args()

rng = random.Random(args.seed)
problems = draw_problems(200, n_ops=6, split="train", rng=rng)
try:
    if args.rollouts:
        rows, source = read_rows(args.rollouts), args.rollouts
    else:
        repeated = [problem for problem in problems for _ in range(8)]
        texts = [write_trace(problem, 0.12, rng)[0] for problem in repeated]
        rows = rollout_rows([(problem, text, True, verify(problem, text)) for problem, text in zip(repeated, texts)])
        source = "the slipping corpus, 200 problems × 8"
    figures = overlap(rows)
    correct, malformed = (sum(row[key] for row in rows) for key in ("label", "malformed"))
except UserError as error:
    parser.error(str(error))

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
