"""Arithmetic problems, their step-by-step traces, the errors in them, and the verifier.

A problem is a two-digit start and n operations, everything mod 100, e.g. `47+8*3-5?`. Its trace spells every step in
fixed width, `47+8=55;55*3=65;65-5=60;#60`. In the corpus some steps are wrong, and the later steps follow from the wrong
value. A *slip* is a random error: any step has it with a small probability. A *habit* is a systematic error, as a student's
buggy rule is: where + or - with a digit of 7, 8 or 9 needs a carry or a borrow, the carry is mostly forgotten. So correct and
incorrect solutions of one problem share most of their tokens, which entangles their gradients.

The task `slips` has slips alone, and the most likely answer is right. The task `habit` has both, and the most likely answer is
wrong in more than half of the problems.
"""

import random
import re
import zlib
from dataclasses import dataclass

MODULUS = 100
STEP_WIDTH = len("47+8=55;")
SPLITS = {0: "test", 1: "validation"}  # by a problem's checksum modulo 8; all others are of the split "train"
HABIT_DIGITS = (7, 8, 9)
PROMPT = re.compile(r"[0-9]{2}([-+*][2-9])+\?")
DERIVATION = re.compile(r"(\d\d[-+*]\d=\d\d;)+#(\d\d)")


@dataclass(frozen=True)
class Problem:
    """A start value and the operations that follow, everything mod 100."""

    start: int  # 0..99
    ops: tuple[tuple[str, int], ...]  # (operator, digit 2..9), applied from left to right

    @property
    def prompt(self):
        return f"{self.start:02d}" + "".join(f"{op}{digit}" for op, digit in self.ops) + "?"

    @property
    def split(self):
        """ "train", "validation" or "test", read off the problem itself, so that they can never overlap."""
        return SPLITS.get(zlib.crc32(self.prompt.encode()) % 8, "train")


@dataclass(frozen=True)
class Mistake:
    """A wrong step: a slip, or the habit."""

    step: int  # 1 is the first step
    kind: str  # "habit", or a key of `slip_results`


@dataclass(frozen=True)
class Verdict:
    correct: bool  # well-formed, and the final answer is the true one
    malformed: bool  # not n steps and an answer in the trace's format
    first_wrong_step: int | None  # 1 is the first step, n + 1 the final answer; None where the trace is the clean one


def draw_problem(n_ops, rng):
    """One problem of any split; rng is a random.Random."""
    return Problem(rng.randrange(MODULUS), tuple((rng.choice("+-*"), rng.randint(2, 9)) for _ in range(n_ops)))


def read_problem(prompt):
    """The problem of a prompt such as `47+8*3-5?`. Raises ValueError where it is none."""
    if not PROMPT.fullmatch(prompt):
        raise ValueError(f"prompt is {prompt[:40]!r}, not a start, operations and ?")
    return Problem(int(prompt[:2]), tuple((prompt[i], int(prompt[i + 1])) for i in range(2, len(prompt) - 1, 2)))


def draw_problems(count, n_ops, split, rng):
    """`count` distinct problems of one split. Raises ValueError where there are not that many."""
    found = {}  # a dict keeps the order of drawing
    for _ in range(100 * (count + 100)):
        if len(found) == count:
            break
        problem = draw_problem(n_ops, rng)
        if problem.split == split:
            found[problem] = None
    else:
        raise ValueError(f"found only {len(found)} different {split} problems of {n_ops} operation(s), not {count}")
    return list(found)


def apply(op, value, digit):
    """The true result of one step, 0..99."""
    return {"+": value + digit, "-": value - digit, "*": value * digit}[op] % MODULUS


def slip_results(op, value, digit):
    """The wrong results a student might write for one step: {kind: candidates}."""
    true = apply(op, value, digit)
    ones = value % 10
    unit = {"+": ones + digit, "-": ones - digit, "*": ones * digit}[op]
    carry = unit // 10  # negative where a subtraction borrows
    kinds = {
        "off_by_one": [true - 1, true + 1],
        "off_by_two": [true - 2, true + 2],
        "off_by_ten": [true - 10, true + 10],
        "forgotten_carry": [true - 10 * carry] if carry else [],
    }
    return {kind: [r % MODULUS for r in results] for kind, results in kinds.items() if results}


def habit_result(op, value, digit):
    """What a step gives whose carry or borrow is forgotten; None where the habit does not show in it."""
    if op == "*" or digit not in HABIT_DIGITS:
        return None
    return slip_results(op, value, digit).get("forgotten_carry", [None])[0]


def write_trace(problem, slip_rate=0.0, rng=random, habit_rate=0.0):
    """Solve a problem step by step: (trace, [Mistake, ...]).

    A step that needs a carry or borrow with a digit of 7, 8 or 9 forgets it with probability `habit_rate`. Any other step, or
    one that did not forget, slips with probability `slip_rate`.
    """
    value, text, mistakes = problem.start, [], []
    for step, (op, digit) in enumerate(problem.ops, start=1):
        result = apply(op, value, digit)
        forgotten = habit_result(op, value, digit) if habit_rate else None
        if forgotten is not None and rng.random() < habit_rate:
            result = forgotten
            mistakes.append(Mistake(step, "habit"))
        elif slip_rate and rng.random() < slip_rate:
            wrong = slip_results(op, value, digit)
            kind = rng.choice(list(wrong))
            result = rng.choice(wrong[kind])
            mistakes.append(Mistake(step, kind))
        text.append(f"{value:02d}{op}{digit}={result:02d};")
        value = result
    return "".join(text) + f"#{value:02d}", mistakes


def verify(problem, completion, finished=True):
    """Recompute the answer and compare. `finished` says whether the completion ended with EOS; one that did not is
    malformed. Only the final answer decides `correct`, so two mistakes that cancel out pass, as they would in public
    verifiers of mathematical answers."""
    clean, _ = write_trace(problem)
    match = DERIVATION.fullmatch(completion)
    malformed = not finished or match is None or len(completion) != len(clean)
    correct = not malformed and match[2] == clean[-2:]
    wrong_at = next((i for i, (a, b) in enumerate(zip(completion, clean)) if a != b), len(completion))
    first_wrong_step = None if completion == clean and finished else min(wrong_at, len(clean) - 1) // STEP_WIDTH + 1
    return Verdict(correct, malformed, first_wrong_step)
