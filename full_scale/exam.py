"""Accuracies during training: a policy's answers to held-out problems, which are asked as the rollouts were.

The columns are the toy's, with `malformed` for the share of samples at temperature 1 that state no answer. Of several processes
each samples all answers, and the first one judges its own. Left out: vLLM, and the columns of test problems.
"""

import contextlib
import datetime
from types import SimpleNamespace

import torch
import torch.distributed as dist

from plumbing.batches import seeded
from plumbing.files import UserError, digest, read_json
from plumbing.log import pass_at

from . import gym
from .chunked import chunks, head_logits
from .data import padded
from .policy import completion_hidden, head_of
from .processes import by_first, say
from .prompts import ChatTokenizer
from .rollouts import ASKED, answer_of, beside_of, ends_of, prepare, prompts_of, read_problems, sample_each

PASS_AT = (4, 16)  # the k of pass@k, where there are so many samples
MOST_SAMPLES = 48  # of a problem at temperature 1, so that all of its answers are sampled at once


class Exam:
    """Held-out problems, asked and read as FILE.json beside the rollouts says.

    settings: what config.json says of the exam. Raises UserError where that file is missing or damaged, or a problem is in the
    training data.
    """

    def __init__(self, args, folder, data):
        path = beside_of(args.data)
        if not path.exists():
            raise UserError(f"{path}: not there; --eval-problems asks as full_scale.rollouts says there that it asked")
        made = read_json(path)
        try:
            self.asked = SimpleNamespace(**{name: made["asked"][name] for name in ASKED})
            date = datetime.datetime.fromisoformat(made["date"])
            self.problems = read_problems(args.eval_problems, self.asked.fields, skip_bad=args.skip_bad_lines, say=say)
            self.tokenizer = ChatTokenizer(folder)
            self.texts = prepare(self.tokenizer, self.asked, date)
            texts = [self.tokenizer.ask(problem, self.asked.system, self.asked.shots) for problem, _ in self.problems]
            self.prompts = [ids for _, ids in prompts_of(texts, self.tokenizer, self.asked.max_tokens, say)]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path}: does not say how these rollouts were asked; full_scale.rollouts writes it") from None
        trained = {tuple(ids[:start].tolist()) for ids, start in zip(data.tokens, data.prompt_length)}
        if known := sum(tuple(prompt) in trained for prompt in self.prompts):
            raise UserError(f"{args.eval_problems}: {known} of {len(self.prompts)} problems are in {args.data} too")
        self.samples, self.micro_batch = args.eval_samples, args.micro_batch
        self.before = {}  # {seed: the checkpoint's columns}
        asked = digest([self.prompts, made["asked"], [gold for _, gold in self.problems]])
        self.settings = {"eval_problems": len(self.prompts), "eval_samples": self.samples, "exam": asked}

    def __call__(self, step, model, run, device):
        """Columns of log.csv. Before training, all runs of a seed have the same policy and samples, which are drawn once."""
        if step:
            return self.measure(step, model, run, device)
        if run.seed not in self.before:
            self.before[run.seed] = self.measure(step, model, run, device)
        return self.before[run.seed]

    @torch.no_grad()
    def measure(self, step, model, run, device):
        """Sample and judge. The same seed and step draw the same samples from the same policy."""
        cool = max(self.samples // 4, 1)
        temperatures = torch.tensor([1.0] * self.samples + [0.7] * cool + [0.0], device=device)
        generator, counts = seeded(device, run.seed, "evaluation", step), [len(temperatures)] * len(self.prompts)
        with gathered(model):
            ends = together(ends_of(self.tokenizer, self.texts, device))
            sampled = sample_each(model, self.prompts, counts, self.asked.max_tokens, ends, temperatures, generator)
            entropy = self.entropy(model, [ids[0] for ids in sampled], device)
        answers = [[answer_of(ids, prompt, self.tokenizer, self.texts) for ids in some]
                   for some, prompt in zip(sampled, self.prompts)]  # fmt: skip
        return by_first(lambda: self.columns(answers) | {"entropy": entropy})

    def columns(self, answers):
        """Accuracies from the answers to every problem: those at temperature 1, those at 0.7, the greedy one."""
        read = [[(a["completion"], a["finished"], self.asked.strict) for a in some] for some in answers]
        right = torch.tensor([[gym.is_right(gold, *a) for a in some] for some, (_, gold) in zip(read, self.problems)]).float()
        warm, cool, greedy = right.split([self.samples, right.shape[1] - self.samples - 1, 1], dim=1)
        columns = {"accuracy": warm.mean().item(), "accuracy_0.7": cool.mean().item(), "accuracy_greedy": greedy.mean().item()}
        lost = [gym.stated(gold, *a) is None for some, (_, gold) in zip(read, self.problems) for a in some[: self.samples]]
        columns["malformed"] = sum(lost) / warm.numel()
        for k in (k for k in PASS_AT if k <= self.samples):
            chances = [pass_at(k, self.samples, int(count)) for count in warm.sum(1)]
            columns[f"pass@{k}"] = sum(chances) / len(chances)
        return columns

    def entropy(self, model, completions, device):
        """The mean entropy of the next token at the positions of a completion to each problem, in nats."""
        total, tokens = 0.0, 0
        rows = [(torch.tensor(prompt + ids), len(prompt)) for prompt, ids in zip(self.prompts, completions)]
        for first in range(0, len(rows), self.micro_batch):
            hidden, _ = completion_hidden(model, *padded(*zip(*rows[first : first + self.micro_batch]), device))
            for some in chunks(len(hidden)):
                logps = head_logits(hidden[some], head_of(model)).log_softmax(-1)
                total -= (logps.exp() * logps).sum().item()
            tokens += len(hidden)
        return total / tokens


def together(ends):
    """GPT.generate's `eos` for several processes, which stop at the same step: the first one's ends, for all."""

    def agreed_ends(sampled):
        over = ends(sampled) if callable(ends) else torch.isin(sampled[:, -1], ends)
        over = over.to(torch.uint8)
        dist.broadcast(over, 0)
        return over.bool()

    return agreed_ends


@contextlib.contextmanager
def gathered(model):
    """All of a sharded model's weights in every process, so that sampling does not gather them for each token."""
    for layer in model.layers:
        layer.set_reshard_after_forward(False)
    model.unshard()
    try:
        yield
    finally:
        for layer in model.layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()
        model.reshard()
