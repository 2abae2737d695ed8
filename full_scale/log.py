"""log.csv of a run of several processes: plumbing/log.py's columns and means. The first process writes and prints."""

import contextlib
import math
import time

import torch

from plumbing import log
from plumbing.files import write_csv

from .processes import is_first, say


class Steps(log.Steps):
    """The numbers of the steps as floats, which JSON can hold, with means in float64."""

    def columns(self):
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in self.numbers.items()}

    def state(self):
        return {**super().state(), "numbers": self.numbers}


class Log(log.Log):
    """Every process keeps the same rows. `seconds` counts the steps alone."""

    @contextlib.contextmanager
    def timed(self):
        """A step, whose seconds count."""
        began = time.time()
        yield
        self.seconds += time.time() - began

    def spent(self):
        return self.seconds

    def add(self, **numbers):
        """Keep the numbers of a step. Raises NonFiniteError at once, because a step is expensive here."""
        super().add(**numbers)
        self.steps.raise_if_not_finite()

    def evaluate(self, step, model):
        """Measure, append a row to log.csv, and print a line. Raises UserError where the disk is full."""
        self.rows.append(self.row(step, self.seconds, self.measure(step, model)))
        if is_first():
            write_csv(self.path, self.rows)
        say(progress_line(self.rows[-1], self.total))


def progress_line(row, steps):
    """The line that training prints for a row of log.csv."""
    loss = f"{row['loss']:+.4f}" if row["step"] else "   --  "
    accuracy = "" if math.isnan(row["accuracy"]) else f"accuracy {row['accuracy']:.3f}  greedy {row['accuracy_greedy']:.3f}  "
    rate = row["tokens_trained"] / max(row["seconds"], 1e-9)
    memory = f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    return (
        f"step {row['step']:5d}/{steps}  loss {loss}  {accuracy}log-ratio correct {row['logratio_correct']:+8.2f} "
        f"incorrect {row['logratio_incorrect']:+8.2f}  {rate:,.0f} completion tokens/s{memory}"
    )
