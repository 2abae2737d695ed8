"""From problems to verified rollouts of a checkpoint, as JSON lines.

    python -m full_scale.rollouts --model Qwen/Qwen2.5-Math-1.5B --problems problems.jsonl --n 8 --out rollouts.jsonl

A line is {"prompt", "completion", "label"}, TRL's unpaired preference format, the problem's number, `finished`, False where
the answer was cut off, and the tokens that were asked and sampled, which training takes: prompt_ids, completion_ids. A
text of --stop that ended an answer is its stop_reason. Answers are verified by verdict.py. vLLM samples where it and a GPU are,
and the checkpoint is no .gguf file, else model.py.

A problems file has a JSON object a line. Fields by data set, as their dumps carry them, and the mapping to give:
    MATH-500        problem, answer                 none needed
    GSM8K           question, answer ("… #### 42")  --fields question answer
    AIME            problem (or Problem), answer    --fields Problem Answer
    AMC, Minerva    question, answer                --fields question answer
    OlympiadBench   question, final_answer (a list) --fields question final_answer
"""

import argparse
import bisect
import collections
import contextlib
import datetime
import inspect
import json
import os
import random
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from transformers import PreTrainedTokenizerBase

from plumbing.files import (
    UserError,
    digest,
    field,
    locked,
    printable_path,
    read_json,
    read_lines,
    shown,
    write_json,
)
from plumbing.flags import NO_DEFAULT, answer_length, command, command_line, count, natural, zero_or_temperature
from plumbing.log import progress

from . import gym
from .formats import json_lines
from .gguf_file import packed
from .load_hf import checkpoint_key, load_pretrained
from .prompts import PROMPT, ChatTokenizer
from .published import checkpoint_name, fetch
from .verdict import gold_answer

AT_ONCE = 64  # sequences that model.py samples together


# --- problems


def read_problems(path, fields=("problem", "answer"), **words):
    """A problems file -> [(problem, gold answer)], by the names of its two fields. Raises UserError: its bad lines.

    A problem of gym.py has for gold answer what gym.is_right takes.
    """

    def parse(line):
        """A line's object -> its problem and gold answer. Raises ValueError where one is missing, or is none."""
        if "gym" in line:
            return gym.read(line)
        values = []
        for name in fields:
            if name not in line:
                raise ValueError(f"no {name}, only {', '.join(line)[:60]}: map the fields by --fields")
            value = line[name]
            value = value[0] if isinstance(value, list) and len(value) == 1 else value  # OlympiadBench
            if isinstance(value, (list, dict, bool)) or value is None or not str(value).strip():
                raise ValueError(f"{name} is {shown(value)}, not a text or a number")
            values.append(value)
        answer = gold_answer(values[1])
        if answer is None:
            raise ValueError(f"{fields[1]} is {shown(values[1])}, which is no answer")
        return str(values[0]), answer

    return read_lines(path, parse, lines=json_lines, **words)


# --- sampling


# how problems are asked and answers read: what --eval-problems of train.py repeats
ASKED = ("fields", "system", "template", "stop", "strict", "max_tokens", "shots", "template_arg")


def asking(args):
    """{name: value} of ASKED. JSON can hold it."""
    pairs = {"shots": read_shots(args), "template_arg": args.template_arg}
    return {name: list(map(list, pairs[name])) if name in pairs else getattr(args, name) for name in ASKED}


def sampler(args, asked, date):
    """A function from prompts' ids and the number of samples of each to [[ids]], the tokenizer, and the texts that end."""
    folder = fetch(args.model)
    unpacked = packed(folder) is not None
    if unpacked and args.engine == "vllm":
        raise UserError(f"{args.model}: vLLM does not sample from a .gguf file here; --engine own does")
    if args.engine == "vllm" or (args.engine == "auto" and not unpacked and torch.cuda.is_available() and find_spec("vllm")):
        return vllm_sampler(args, asked, folder, date)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_pretrained(folder, torch.float32 if device == "cpu" else torch.bfloat16, device)
    texts = prepare(tokenizer, asked, date)
    ends = ends_of(tokenizer, texts, device)

    def sample(prompts, counts, seed):
        generator = torch.Generator(device).manual_seed(seed)
        return sample_each(model, prompts, counts, args.max_tokens, ends, args.temperature, generator)

    return sample, tokenizer, texts


def sample_each(model, prompts, counts, most, ends, temperature, generator):
    """Prompts' ids and the number of samples of each -> [[ids]]; the other arguments are those of GPT.generate.

    Prompts of one width, and of one number of samples, go through the model together, so that nothing is padded.
    """
    answers, groups = [[] for _ in prompts], {}
    for i, (prompt, wanted) in enumerate(zip(prompts, counts)):
        groups.setdefault((len(prompt), wanted), []).append(i)
    for (_, wanted), members in groups.items():
        size = max(AT_ONCE // wanted, 1)
        for some in (members[first : first + size] for first in range(0, len(members), size)):
            tokens = torch.tensor([prompts[i] for i in some], device=generator.device)
            while (left := wanted - len(answers[some[0]])) > 0:
                samples = min(left, AT_ONCE)
                sampled = model.generate(tokens, most, ends, -1, temperature, generator, samples).tolist()
                for row, ids in enumerate(sampled):
                    answers[some[row // samples]].append([token for token in ids if token >= 0])
    return answers


def prepare(tokenizer, asked, date):
    """Settle how problems are asked, `asking`'s values as attributes -> the texts that end an answer."""
    tokenizer.use_template(dict(asked.template_arg), date, plain=not asked.template)
    return [*asked.stop, *(["Problem:"] if asked.shots and tokenizer.plain else [])]  # what would come after an answer


def ends_of(tokenizer, texts, device):
    """What GPT.generate takes for the ends of answers: the tokens that end one, or a function where texts do too."""
    return text_ends(tokenizer, texts, device) if texts else torch.tensor(sorted(tokenizer.stops), device=device)


def text_ends(tokenizer, texts, device):
    """A function from sampled tokens (B, T), -1 after an end, to (B,): whether an answer ends with its last one."""
    stops, width = torch.tensor(sorted(tokenizer.stops), device=device), 4 * max(map(len, texts)) + 1  # 4: bytes of a letter

    def ends(sampled):
        over = torch.isin(sampled[:, -1], stops)
        for row in (~over & (sampled[:, -1] >= 0)).nonzero()[:, 0].tolist():
            tail = tokenizer.decode(sampled[row, -width:].tolist(), special=True)
            over[row] = any(text in tail for text in texts)
        return over

    return ends


def vllm_sampler(args, asked, folder, date):
    """The same with vLLM, all prompts at once, over `--gpus` GPUs."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"--engine vllm: {error}; pip install vllm") from None
    tokenizer = ChatTokenizer(folder)
    texts = prepare(tokenizer, asked, date)
    engine = LLM(model=str(folder), tensor_parallel_size=args.gpus)

    def sample(prompts, counts, seed):
        most = max(counts)  # vLLM gives a prompt's samples the seeds from its own one on, so the prompts' lie apart
        greedy = args.temperature == 0  # vLLM takes one such sample alone
        params = [
            SamplingParams(n=1 if greedy else wanted, temperature=args.temperature, max_tokens=args.max_tokens,
                           seed=seed + i * most, stop=texts, stop_token_ids=sorted(tokenizer.stops), skip_special_tokens=False)
            for i, wanted in enumerate(counts)
        ]  # fmt: skip
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        answers = [[list(sampled.token_ids) for sampled in output.outputs] for output in outputs]
        return [some * wanted if greedy else some for some, wanted in zip(answers, counts)]

    return sample, tokenizer, texts


def answer_of(ids, prompt, tokenizer, texts):
    """Sampled ids after a prompt's -> the fields of their row, up to the first end, a token or one of `texts`.

    The text has the special tokens of the answer but not its end; the ids have both.
    """
    end = next((i for i, token in enumerate(ids) if token in tokenizer.stops), None)
    text = tokenizer.decode_after(prompt, ids[:end])
    stop = min((stop for stop in texts if stop in text), key=text.index, default=None)
    if stop is None:
        return {"completion": text, "finished": end is not None, "completion_ids": ids if end is None else ids[: end + 1]}
    length = bisect.bisect_left(range(len(ids)), True, key=lambda n: stop in tokenizer.decode_after(prompt, ids[:n]))
    text = tokenizer.decode_after(prompt, ids[:length]).partition(stop)[0]  # bytes of a letter that is cut may read otherwise
    return {"completion": text, "finished": True, "completion_ids": ids[:length], "stop_reason": stop}


def sampled_row(row):
    """A line that is there already. Raises ValueError where it is not as written below."""
    for name, kind in (("prompt", str), ("completion", str), ("label", bool), ("problem_id", int), ("finished", bool)):
        field(row, name, kind)
    return row


def sample_problems(args):
    """Sample until `args.out` holds args.n verified rollouts of every problem, going on where it stopped -> rows, gold answers.

    Raises UserError, also where the file was made with other settings, which are kept beside it.
    """
    problems, asked = read_problems(args.problems, args.fields, skip_bad=args.skip_bad_lines), asking(args)
    settings = {"model": checkpoint_name(args.model), **{key: getattr(args, key) for key in ("n", "temperature", "seed")}}
    settings |= {"problems": digest(problems), "checkpoint": checkpoint_key(fetch(args.model)), "asked": asked}
    asked = SimpleNamespace(**asked)
    beside, rows, date = beside_of(args.out), [], datetime.datetime.now()
    if args.out.exists():
        date = date_of(beside, settings)
        if not date:
            raise UserError(f"{args.out} was made with other settings or problems: name another --out, or remove it")
        whole = args.out.read_bytes().rpartition(b"\n")[0]
        os.truncate(args.out, len(whole) + bool(whole))  # a line torn by an interruption is sampled again
        rows = read_lines(args.out, sampled_row) if whole else []
    elif beside.exists() and "asked" not in read_json(beside):
        raise UserError(f"{beside} would be written beside {args.out}, and holds something else: name another --out")
    have = collections.Counter(row["problem_id"] for row in rows)
    if any(i not in range(len(problems)) or found > args.n for i, found in have.items()):
        raise UserError(f"{args.out}: has rollouts of other problems, or more than {args.n} of one")
    todo = [i for i in range(len(problems)) if have[i] < args.n]
    if rows:
        print(f"resuming {args.out}: {len(rows)} of {args.n * len(problems)} rollouts are there")
    golds = [gold for _, gold in problems]
    if not todo:
        return rows, golds
    sample, tokenizer, texts = sampler(args, asked, date)
    prompts = prompts_of([tokenizer.ask(problems[i][0], asked.system, asked.shots) for i in todo], tokenizer, asked.max_tokens)
    write_json(beside, {**settings, "date": date.isoformat(), "rows": args.n * len(problems)})
    with open(args.out, "a", encoding="utf-8") as file, progress(total=len(todo), desc="problems") as bar:
        for first in range(0, len(todo), args.at_once):
            some, told = (values[first : first + args.at_once] for values in (todo, prompts))
            seed = random.Random(f"{args.seed}/{some[0]}/{have[some[0]]}").getrandbits(31)
            sampled = sample([ids for _, ids in told], [args.n - have[i] for i in some], seed)
            for i, (prompt, prompt_ids), answers in zip(some, told, sampled):
                for ids in answers:
                    answer = answer_of(ids, prompt_ids, tokenizer, texts)
                    label = gym.is_right(golds[i], answer["completion"], answer["finished"], args.strict)
                    row = {"prompt": prompt, "completion": answer["completion"], "label": label, "problem_id": i}
                    rows.append({**row, **answer, "prompt_ids": prompt_ids})
                    file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(some))
    return rows, golds


def beside_of(path):
    """The file beside rollouts that says how they were made."""
    return path.with_name(path.name + ".json")


def date_of(beside, settings):
    """The date of the prompts of an interrupted command, from the file beside its rows; None where it had other settings."""
    made = read_json(beside) if beside.exists() else {}
    made.pop("rows", None)
    with contextlib.suppress(TypeError, ValueError):
        date = datetime.datetime.fromisoformat(made.pop("date", None))
        return date if made == settings else None


def read_shots(args):
    """--shots: the (problem, solution) pairs of a file's first N lines. Raises UserError.

    A line's solution is its `solution`, as in MATH, or its answer, as in GSM8K, where this has the steps.
    """
    if not args.shots:
        return []
    path, wanted = args.shots

    def parse(line):
        return [field(line, name, str) for name in (args.fields[0], "solution" if "solution" in line else args.fields[1])]

    shots = read_lines(path, parse, lines=json_lines)
    if len(shots) < wanted:
        raise UserError(f"{path}: has {len(shots)} lines, and --shots asks for {wanted}")
    return shots[:wanted]


def prompts_of(texts, tokenizer, max_tokens, say=print):
    """Prompts -> [(text, ids)]; says where an answer of so many tokens is longer than the model was made for."""
    prompts = [(text, tokenizer.encode(text, special=tokenizer.plain)) for text in texts]
    most, positions = max(len(ids) for _, ids in prompts) + max_tokens, tokenizer.positions
    if positions and most > positions:
        say(f"warning: the longest prompt and --max-tokens are {most:,} tokens, and the model's positions {positions:,}")
    return prompts


# --- the command


class Shots(argparse.Action):
    """--shots FILE N: a path and a number."""

    def __call__(self, parser, namespace, values, option=None):
        try:
            setattr(namespace, self.dest, (printable_path(values[0]), count(values[1])))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentError(self, str(error)) from None


def template_arg(text):
    """NAME=VALUE with a name that a chat template may read. Raises ArgumentTypeError."""
    reserved = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"chat_template"}
    return gym.setting(text, {"messages", *reserved}, " with a name that the template reads")


def text(value):
    """A text that is not empty. Raises ArgumentTypeError."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def add_flags(parser, temperature):
    """The flags of rollouts.py and evaluate.py."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="hub name, folder or .gguf file of the checkpoint that answers, or a "
        f"Python package that holds one .gguf file{NO_DEFAULT}")  # fmt: skip
    add(
        "--problems",
        required=True,
        type=printable_path,
        metavar="FILE",
        help=f"JSON lines: a problem and its answer each, or what full_scale.gym wrote{NO_DEFAULT}",
    )
    add("--fields", nargs=2, default=["problem", "answer"], metavar=("PROBLEM", "ANSWER"), help="names of these two fields")
    add("--n", default=8, type=count, help="samples of each problem")
    add("--temperature", default=temperature, type=zero_or_temperature, metavar="X", help="0: the most likely token")
    add("--system", metavar="TEXT", help=f"instruction, '' for none (default: {PROMPT} With --shots: none){NO_DEFAULT}")
    add("--shots", nargs=2, action=Shots, metavar=("FILE", "N"), help="solved problems before each one, the first N of a file")
    add("--template", default=True, action=argparse.BooleanOptionalAction, help="ask by the checkpoint's chat template, if any")
    add("--template-arg", default=[], action="append", type=template_arg, metavar="NAME=VALUE", help="for the chat template, "
        f"such as enable_thinking=false; can be repeated{NO_DEFAULT}")  # fmt: skip
    add("--stop", nargs="+", default=[], type=text, metavar="TEXT", help="texts that end an answer; for base models"
        f"{NO_DEFAULT}")  # fmt: skip
    add("--max-tokens", default=2048, type=answer_length, metavar="N", help="longest answer")
    add("--engine", default="auto", choices=["auto", "vllm", "own"], help="auto: vLLM where it and a GPU are, else model.py")
    add("--gpus", default=1, type=count, metavar="N", help="that vLLM spreads the model over; model.py takes one")
    add("--at-once", default=64, type=count, metavar="N", help="problems sampled before their lines are written")
    add("--seed", default=0, type=natural, metavar="N", help="of the sampling")
    add(
        "--strict",
        action="store_true",
        help="an answer counts in a \\boxed{} alone; without this also behind a marker, or at the end",
    )
    add("--skip-bad-lines", action="store_true", help="go on without the problems' bad lines")


def run(argv=None, parser=None, temperature=1.0, report=None):
    """The command, or with evaluate.py's parser, defaults and report that one; what goes wrong is one line and exit code 2."""
    description = "Sample a checkpoint's answers to problems, verify them, and write them as JSON lines."
    parser = parser or command_line(description, prog="python -m full_scale.rollouts")
    add_flags(parser, temperature)
    parser.add_argument(
        "--out",
        required=True,
        type=printable_path,
        metavar="FILE",
        help=f"rollouts; an interrupted command goes on there{NO_DEFAULT}",
    )
    args = parser.parse_args(argv)
    if args.system is None:
        args.system = "" if args.shots else PROMPT
    kept = f"{args.out} keeps what is sampled; the same command goes on from there"
    with command(parser.prog, kept, args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with locked(args.out.with_name(f"{args.out.name}.lock"), args.out):
            rows, golds = sample_problems(args)
        correct, finished = (sum(row[name] for row in rows) / len(rows) for name in ("label", "finished"))
        votes = [gym.vote(golds[row["problem_id"]], row, args.strict) for row in rows]
        shares = f"{correct:.1%} correct, {finished:.1%} finished"
        print(f"{args.out}: {len(rows)} rollouts, {shares}, {votes.count(None)} answers could not be parsed")
        if report:
            print(report(rows, votes))


if __name__ == "__main__":
    run()
