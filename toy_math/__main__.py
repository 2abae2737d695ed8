"""Look at the task: python -m toy_math [ROLLOUTS.jsonl] [--task slips]

Prints a few problems, a clean and a wrong trace side by side, and how much incorrect solutions share with correct ones.
Without a file the solutions come from the task's corpus itself, which is what the base model learns to imitate.
"""

import argparse
import itertools
import random

from plumbing.files import printable_path
from plumbing.flags import Parser, command, natural, one_of

from .problems import draw_problems, verify, write_trace
from .rollouts import overlap, read_rows, rollout_rows
from .stages import DEFAULT_TASK, TASKS


def solutions(path, problems, task, rng):
    """Rows as in rollouts.py, and where they come from, a file or the task's corpus. Raises UserError on a bad file."""
    if path:
        return read_rows(path), path
    repeated = [problem for problem in problems for _ in range(8)]
    texts = [write_trace(problem, TASKS[task]["slip"], rng, TASKS[task]["habit"])[0] for problem in repeated]
    rows = rollout_rows([(problem, text, True, verify(problem, text)) for problem, text in zip(repeated, texts)])
    return rows, f"the corpus of task {task}, 200 problems × 8"


def wrong_trace(problems, task, rng):
    """A problem, its clean trace, and one with a single error that changes the answer, a habit where the task has one."""
    slip, habit = TASKS[task]["slip"], TASKS[task]["habit"]
    for problem in itertools.cycle(problems):
        clean, _ = write_trace(problem)
        wrong, mistakes = write_trace(problem, slip, rng, habit)
        if len(mistakes) == 1 and wrong[-2:] != clean[-2:] and (mistakes[0].kind == "habit") == (habit > 0):
            return problem, clean, wrong, mistakes[0]


def show(args):
    """Print the page."""
    rng = random.Random(args.seed)
    problems = draw_problems(200, n_ops=6, split="train", rng=rng)
    rows, source = solutions(args.rollouts, problems, args.task, rng)
    figures = overlap(rows)
    correct, malformed = (sum(row[key] for row in rows) for key in ("label", "malformed"))

    print(f"problems of task {args.task}")
    for problem in problems[:5]:
        print(f"  {problem.prompt:16} -> {write_trace(problem)[0][-2:]}")
    likely = float(TASKS[args.task]["habit"] > 0.5)  # the most likely trace has every habit, or none
    mistaken = sum(not verify(problem, write_trace(problem, habit_rate=likely)[0]).correct for problem in problems)
    print(f"  the corpus' most likely answer is wrong in {mistaken / len(problems):.0%} of {len(problems)} problems")

    problem, clean, wrong, slip = wrong_trace(problems, args.task, rng)
    marks = "".join("^" if a != b else " " for a, b in zip(clean, wrong))
    print(f"\nclean and wrong solution of {problem.prompt}")
    print(f"  clean    {clean}\n  wrong    {wrong}   {slip.kind} in step {slip.step}\n           {marks.rstrip()}")

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
    parser.add_argument("--task", type=one_of(TASKS), default=DEFAULT_TASK, metavar="NAME", help="errors of the corpus: habit, "
        f"systematic and random ones, or slips, random ones alone (default: {DEFAULT_TASK})")  # fmt: skip
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="seed of the problems and errors (default: 0)")
    args = parser.parse_args(argv)
    with command(parser.prog):
        show(args)


if __name__ == "__main__":
    run()
