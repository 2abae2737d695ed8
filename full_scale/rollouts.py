"""From problems to verified rollouts of a checkpoint, as JSON lines; reading such lines for training.

    python -m full_scale.rollouts --model Qwen/Qwen2.5-Math-1.5B --problems problems.jsonl --n 8 --out rollouts.jsonl

A line is {"prompt", "completion", "label"}, TRL's unpaired preference format, and the problem's number and `finished`, False
where the answer was cut off. Answers are verified by math-verify. vLLM samples where it is installed, else model.py. Left
out: the sampled token ids (training tokenizes the text again).

A problems file has a JSON object a line. Fields by data set, as their dumps carry them, and the mapping to give:
    MATH-500        problem, answer                 none needed
    GSM8K           question, answer ("… #### 42")  --fields question answer
    AIME            problem (or Problem), answer    --fields Problem Answer
    AMC, Minerva    question, answer                --fields question answer
    OlympiadBench   question, final_answer (a list) --fields question final_answer
"""

import collections
import json
import os
import random
from importlib.util import find_spec

import torch
from math_verify import parse, verify

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

from .load_hf import ChatTokenizer, checkpoint_key, fetch, load_pretrained

AT_ONCE = 64  # sequences that model.py samples together


# --- lines


def message_text(line, name, tokenizer):
    """A prompt or completion as text: as it is, or, of a list of messages, by the chat template or the answer's content.

    Raises ValueError, UserError.
    """
    if name not in line:
        raise ValueError(f"no {name}")
    value, asked = line[name], name == "prompt"
    if isinstance(value, str):
        return value
    messages = isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
    texts = messages and all(isinstance(message.get(key), str) for message in value for key in ("role", "content"))
    if not texts or (not asked and len(value) > 1):
        raise ValueError(f"{name} is {shown(value)}, neither a text nor {'a list of messages' if asked else 'one message'}")
    return tokenizer.render(value) if asked else value[0]["content"]


def rollouts_of(line, tokenizer):
    """A line's object -> its rows {"prompt", "completion", "label", "finished"}, a pair's two. Raises ValueError, UserError."""
    prompt, rows = message_text(line, "prompt", tokenizer), []
    for name in ("chosen", "rejected") if "chosen" in line else ("completion",):
        completion = message_text(line, name, tokenizer)
        label = field(line, "label", bool) if name == "completion" else name == "chosen"
        finished = field(line, "finished", bool) if "finished" in line else True
        if not completion and line.get("finished") is not True:  # as written below, it is an end at once
            raise ValueError(f"{name} is empty")
        rows.append({"prompt": prompt, "completion": completion, "label": label, "finished": finished})
    return rows


def read_rollouts(path, tokenizer, tokenized=lambda row: row, **words):
    """A file of rollouts -> [{"prompt", "completion", "label", "finished", "problem_id"}], texts rendered.

    TRL's unpaired lines (prompt, completion, label) or its paired ones (prompt, chosen, rejected), which become two rows.
    Rows of the same prompt are of the same problem. `tokenized` may add to a row, or refuse it by ValueError or UserError;
    `words` are those of files.read_lines. Raises UserError that names the file and its bad lines.
    """
    ids = {}
    lines = read_lines(path, lambda line: [tokenized(row) for row in rollouts_of(line, tokenizer)], **words)
    return [{**row, "problem_id": ids.setdefault(row["prompt"], len(ids))} for rows in lines for row in rows]


def read_problems(path, fields=("problem", "answer"), **words):
    """A problems file -> [(problem, gold answer)], by the names of its two fields. Raises UserError: its bad lines."""

    def parse(line):
        values = []
        for name in fields:
            if name not in line:
                raise ValueError(f"no {name}, only {', '.join(line)[:60]}: map the fields by --fields")
            value = line[name]
            value = value[0] if isinstance(value, list) and len(value) == 1 else value  # OlympiadBench
            if isinstance(value, (list, dict)) or value is None or not str(value).strip():
                raise ValueError(f"{name} is {shown(value)}, not a text or a number")
            values.append(str(value))
        problem, answer = values
        return problem, answer.rsplit("####", 1)[-1].strip()  # GSM8K's answer ends its solution

    return read_lines(path, parse, **words)


def final_answer(completion):
    """The last whole \\boxed{…}, or all of the completion where there is none."""
    begin = len(completion)
    while (begin := completion.rfind("\\boxed{", 0, begin)) >= 0:
        depth = 0
        for end in range(begin + len("\\boxed"), len(completion)):
            depth += {"{": 1, "}": -1}.get(completion[end], 0)
            if depth == 0:
                return completion[begin : end + 1]
    return completion


def is_correct(answer, completion):
    """Whether a completion's final answer equals the gold one, by math-verify; the last \\boxed{} counts."""
    return bool(verify(parse(f"\\boxed{{{answer}}}"), parse(final_answer(completion))))


# --- sampling


def sampler(args):
    """A function from prompts and the number of samples of each to [[(text, finished)]], and the checkpoint's tokenizer."""
    folder = fetch(args.model)
    if args.engine == "vllm" or (args.engine == "auto" and torch.cuda.is_available() and find_spec("vllm")):
        return vllm_sampler(args, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_pretrained(folder, torch.float32 if device == "cpu" else torch.bfloat16, device)
    stops = torch.tensor(sorted(tokenizer.stops), device=device)

    def sample(prompts, counts, seed):
        """A prompt at a time: its samples are of one width, so that nothing is padded."""
        generator, answers = torch.Generator(device).manual_seed(seed), []
        for prompt, wanted in zip(prompts, counts):
            tokens = torch.tensor([tokenizer.encode(prompt)], device=device)
            answers.append([])
            while len(answers[-1]) < wanted:
                some = min(wanted - len(answers[-1]), AT_ONCE)
                sampled = model.generate(tokens, args.max_tokens, stops, -1, args.temperature, generator, some)
                for ids in sampled.tolist():
                    ends = [i for i, token in enumerate(ids) if token in tokenizer.stops]
                    answers[-1].append((tokenizer.decode(ids[: ends[0]] if ends else ids), bool(ends)))
        return answers

    return sample, tokenizer


def vllm_sampler(args, folder):
    """The same with vLLM, all prompts at once, over `--gpus` GPUs."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"--engine vllm: {error}; pip install vllm") from None
    tokenizer = ChatTokenizer(folder)
    engine = LLM(model=str(folder), tensor_parallel_size=args.gpus)

    def sample(prompts, counts, seed):
        asked = [
            SamplingParams(n=wanted, temperature=args.temperature, max_tokens=args.max_tokens, seed=seed + i,
                           stop_token_ids=sorted(tokenizer.stops))
            for i, wanted in enumerate(counts)
        ]  # fmt: skip
        inputs = [{"prompt_token_ids": tokenizer.encode(prompt)} for prompt in prompts]
        outputs = engine.generate(inputs, asked)
        return [[(sampled.text, sampled.finish_reason == "stop") for sampled in output.outputs] for output in outputs]

    return sample, tokenizer


def sampled_row(row):
    """A line that is there already. Raises ValueError where it is not as written below."""
    for name, kind in (("prompt", str), ("completion", str), ("label", bool), ("problem_id", int), ("finished", bool)):
        field(row, name, kind)
    return row


def sample_problems(args):
    """Sample until `args.out` holds args.n verified rollouts of every problem, going on where it stopped -> its rows.

    Raises UserError, also where the file was made with other settings, which are kept beside it.
    """
    problems = read_problems(args.problems, args.fields, skip_bad=args.skip_bad_lines)
    settings = {key: getattr(args, key) for key in ("model", "n", "temperature", "max_tokens", "seed")}
    settings |= {"problems": digest(problems), "checkpoint": checkpoint_key(fetch(args.model))}
    beside, rows = args.out.with_name(args.out.name + ".json"), []
    if args.out.exists():
        if not beside.exists() or read_json(beside) != settings:
            raise UserError(f"{args.out} was made with other settings or problems: name another --out, or remove it")
        whole = args.out.read_bytes().rpartition(b"\n")[0]
        os.truncate(args.out, len(whole) + bool(whole))  # a line torn by an interruption is sampled again
        rows = read_lines(args.out, sampled_row) if whole else []
    have = collections.Counter(row["problem_id"] for row in rows)
    if any(i not in range(len(problems)) or found > args.n for i, found in have.items()):
        raise UserError(f"{args.out}: has rollouts of other problems, or more than {args.n} of one")
    todo = [i for i in range(len(problems)) if have[i] < args.n]
    if rows:
        print(f"resuming {args.out}: {len(rows)} of {args.n * len(problems)} rollouts are there")
    if not todo:
        return rows
    sample, tokenizer = sampler(args)
    write_json(beside, settings)
    with open(args.out, "a", encoding="utf-8") as file, progress(total=len(todo), desc="problems") as bar:
        for some in (todo[i : i + args.at_once] for i in range(0, len(todo), args.at_once)):
            prompts, counts = [tokenizer.ask(problems[i][0]) for i in some], [args.n - have[i] for i in some]
            seed = random.Random(f"{args.seed}/{some[0]}/{have[some[0]]}").getrandbits(31)
            for i, prompt, answers in zip(some, prompts, sample(prompts, counts, seed)):
                for text, finished in answers:
                    row = {"prompt": prompt, "completion": text, "label": is_correct(problems[i][1], text)}
                    rows.append({**row, "problem_id": i, "finished": finished})
                    file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(some))
    return rows


# --- the command


def add_flags(parser, n, temperature):
    """The flags of rollouts.py and evaluate.py."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help=f"hub name or folder of the checkpoint that answers{NO_DEFAULT}")
    add(
        "--problems",
        required=True,
        type=printable_path,
        metavar="FILE",
        help=f"JSON lines: a problem and its answer each{NO_DEFAULT}",
    )
    add("--fields", nargs=2, default=["problem", "answer"], metavar=("PROBLEM", "ANSWER"), help="names of these two fields")
    add("--n", default=n, type=count, help="samples of each problem")
    add("--temperature", default=temperature, type=zero_or_temperature, metavar="X", help="0: the most likely token")
    add("--max-tokens", default=2048, type=answer_length, metavar="N", help="longest answer")
    add("--engine", default="auto", choices=["auto", "vllm", "own"], help="auto: vLLM where it and a GPU are, else model.py")
    add("--gpus", default=1, type=count, metavar="N", help="that vLLM spreads the model over; model.py takes one")
    add("--at-once", default=64, type=count, metavar="N", help="problems sampled before their lines are written")
    add("--seed", default=0, type=natural, metavar="N", help="of the sampling")
    add("--skip-bad-lines", action="store_true", help="go on without the problems' bad lines")


def run(argv=None, parser=None, n=8, temperature=1.0, report=None):
    """The command, or with evaluate.py's parser, defaults and report that one; what goes wrong is one line and exit code 2."""
    description = "Sample a checkpoint's answers to problems, verify them, and write them as JSON lines."
    parser = parser or command_line(description, prog="python -m full_scale.rollouts")
    add_flags(parser, n, temperature)
    parser.add_argument(
        "--out",
        required=True,
        type=printable_path,
        metavar="FILE",
        help=f"rollouts; an interrupted command goes on there{NO_DEFAULT}",
    )
    args = parser.parse_args(argv)
    kept = f"{args.out} keeps what is sampled; the same command goes on from there"
    with command(parser.prog, kept, args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with locked(args.out.with_name(f"{args.out.name}.lock"), args.out):
            rows = sample_problems(args)
        correct, finished = (sum(row[name] for row in rows) / len(rows) for name in ("label", "finished"))
        print(f"{args.out}: {len(rows)} rollouts, {correct:.1%} correct, {finished:.1%} finished")
        if report:
            print(report(rows))


if __name__ == "__main__":
    run()
