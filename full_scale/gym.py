"""Problems of reasoning-gym, a library of generators with verifiers, as problems files; its verifiers judge the answers.

    pip install reasoning-gym
    python -m full_scale.gym chain_sum --config min_terms=3 max_terms=3 max_digits=1 --count 96 32 --to train.jsonl test.jsonl

The files of one command share no problem. A line is {"problem", "answer", "gym": {"task", "config", "index"}}. Whoever reads it
makes the problem again from `gym`, so that no verifier sees what a stranger wrote beside it. Some verifiers run an answer as
Python code, so an answer goes to a verifier only where its characters spell no call. Left out: tasks whose own answers do.
"""

import argparse
import dataclasses
import functools
import json
import re

from plumbing.files import UserError, field, printable_path, raising, shown, write_text
from plumbing.flags import NO_DEFAULT, command, command_line, count, natural, nearest

from . import verdict
from .verdict import LONGEST, final_answer, is_correct, number, plain

HARMLESS = re.compile(r"[\w\s.,:;%/+-]*")  # no brackets, quotes, powers or products: as code it calls nothing, and is short
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)  # as the library's own prompts ask for it
ENDLESS = re.compile(r"[eE][+-]?\d{4}")  # 1e10000000, which a verifier would write out
DRAWS = 20  # for each problem that is wanted, since some come twice


# --- the library


def library():
    """reasoning-gym's table of tasks, a module. Raises UserError where it is not installed."""
    try:
        import reasoning_gym  # noqa: F401 (fills the table)
        from reasoning_gym import factory
    except ImportError as error:
        raise UserError(f"{error}: pip install reasoning-gym") from None
    return factory


@functools.cache
def dataset(task, config):
    """A task's generator; config: its settings, a JSON object as text. Raises UserError."""
    tasks, config = library().DATASETS, json.loads(config)
    if task not in tasks:
        raise UserError(f"reasoning-gym has no task {shown(task)}{nearest(task, tasks)}")
    _, settings = tasks[task]
    names = [part.name for part in dataclasses.fields(settings)]
    if unknown := config.keys() - names:
        raise UserError(f"{task} has no setting {min(unknown)}, only {', '.join(names)}")
    return raising(task, lambda: library().create_dataset(task, **config))


def generator_of(task, config):
    """`dataset` of settings in a dict."""
    return dataset(task, json.dumps(config, sort_keys=True))


def problem_of(task, config, index):
    """A problem as the library has it: question, answer and what its verifier needs. Raises UserError."""
    generator = generator_of(task, config)
    return raising(task, lambda: generator[index])


def full_marks(gym, answer):
    """Whether the verifier of a problem, the value of a line's `gym`, gives an answer its highest mark."""
    if len(answer) > LONGEST or not HARMLESS.fullmatch(answer) or ENDLESS.search(answer):
        return False
    problem = problem_of(**gym)
    try:
        return generator_of(gym["task"], gym["config"]).score_answer(answer, problem) == 1
    except Exception:  # some verifiers raise at what they cannot read
        return False


# --- files of problems


def draw(task, config, wanted):
    """So many different problems of a task, as lines of a problems file, in the order in which they are drawn.

    Raises UserError where there are fewer, and where the verifier would refuse a problem's own answer.
    """
    lines = {}
    for index in range(DRAWS * wanted):
        gym = {"task": task, "config": config, "index": index}
        problem = problem_of(**gym)
        question, answer = problem["question"], problem["answer"]
        if not isinstance(answer, str) or not full_marks(gym, answer):
            raise UserError(f"{task} has no verifier that can be asked here: of its own answer {str(answer)[:40]!r}")
        lines.setdefault(question, {"problem": question, "answer": answer, "gym": gym})
        if len(lines) == wanted:
            return list(lines.values())
    raise UserError(f"{task} has only {len(lines)} different problems in {DRAWS * wanted} draws, and {wanted} are wanted")


def read(line):
    """A line with `gym` -> (problem, its answer and its `gym`, which `is_right` takes). Raises ValueError, UserError."""
    asked, gym = field(line, "problem", str), line["gym"]
    kinds = {"task": str, "config": dict, "index": int}
    if not isinstance(gym, dict) or {name: type(value) for name, value in gym.items()} != kinds:
        raise ValueError(f"gym is {shown(gym)}, not a task, its config and a problem's index")
    problem = problem_of(**gym)
    if asked != problem["question"]:
        raise ValueError(f"this version of reasoning-gym has another problem there: {shown(problem['question'])}")
    return asked, {"answer": problem["answer"], **gym}


def stated(gold, completion, finished=False, strict=False):
    """The answer that a completion states, as verdict.final_answer; to a problem of the library, what the last tags hold."""
    tagged = [] if strict or isinstance(gold, str) else TAGGED.findall(completion)
    return tagged[-1] if tagged else final_answer(completion, finished, strict)


def is_right(gold, completion, finished=False, strict=False):
    """Whether a completion answers rightly: by a problem's own verifier, where gold is `read`'s, else as verdict.is_correct."""
    if isinstance(gold, str):
        return is_correct(gold, completion, finished, strict)
    gym = {name: gold[name] for name in ("task", "config", "index")}
    answer = stated(gold, completion, finished, strict)
    return answer is not None and any(full_marks(gym, text) for text in (answer.strip(), plain(answer)))


def vote(gold, row, strict=False):
    """verdict.vote of a rollout; to a problem of the library, whose answers may be sentences, the words of its answer."""
    if isinstance(gold, str):
        return verdict.vote(row, strict)
    answer = stated(gold, row["completion"], row["finished"], strict)
    if not answer:
        return None
    return number(answer) or " ".join(plain(answer).casefold().split()) or None


# --- the command


def setting(text, refused=(), which=""):
    """NAME=VALUE -> (name, value), JSON's value where it is one. Raises ArgumentTypeError, also for some names."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals or name in refused:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE{which}, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run(argv=None):
    """The command; what goes wrong is one line and exit code 2, and nothing is written then."""
    parser = command_line("Write problems of a task of reasoning-gym into problems files.", prog="python -m full_scale.gym")
    add = parser.add_argument
    add("task", help="its name in the library, such as chain_sum")
    add("--config", nargs="+", default=[], type=setting, metavar="NAME=VALUE", help=f"settings of the task{NO_DEFAULT}")
    add("--seed", default=0, type=natural, metavar="N", help="of the problems")
    add("--count", nargs="+", default=[256], type=count, metavar="N", help="problems of each file, all of them different")
    add("--to", nargs="+", required=True, type=printable_path, metavar="FILE", help=f"as many files as counts{NO_DEFAULT}")
    args = parser.parse_args(argv)
    if len(args.count) != len(args.to) or len(set(args.to)) < len(args.to):
        parser.error(f"argument --to: needs {len(args.count)} different files, one for each --count, not {len(args.to)}")
    with command(parser.prog, "nothing was written", args.to[0]):
        lines = draw(args.task, {"seed": args.seed, "size": DRAWS * sum(args.count), **dict(args.config)}, sum(args.count))
        files = {}  # {path: its problems}
        for path, wanted in zip(args.to, args.count):
            files[path], lines = lines[:wanted], lines[wanted:]
        texts = {path: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in some) for path, some in files.items()}
        for path, text in texts.items():
            if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
                raise UserError(f"{path} holds something else: name another --to, or remove it")
        for path, some in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, texts[path])
            print(f"{path}: {len(some)} problems of {args.task}, such as {some[0]['problem'][:80]!r}, {some[0]['answer']!r}")


if __name__ == "__main__":
    run()
