"""Runs of train.py with something of it exchanged, which train.py has no flag for: another objective or another optimizer."""

import contextlib
from unittest import mock

import torch

import train
from plumbing import jobs
from plumbing.files import locked_runs
from study.results import is_finished


def train_one(args, name, settings, changes):
    """train.py's, with {name of something in it: what is put there}. For a process of its own."""
    with contextlib.ExitStack() as patches:
        for changed, function in changes.items():
            patches.enter_context(mock.patch.object(train, changed, function))
        train.train_one(args, name, settings)


def train_all(args, runs, one):
    """Train those of the runs {folder name: settings} that are not finished, side by side, by one(args, name, settings).

    Raises UserError, NonFiniteError, Interrupted.
    """
    todo = {name: settings for name, settings in runs.items() if args.force or not is_finished(args.out / name)}
    if not todo:
        return
    (args.out / "cache").mkdir(parents=True, exist_ok=True)
    with locked_runs(args.out, todo):
        stages = {f"seed {settings['seed']}": (args, settings["seed"], todo) for settings in todo.values()}
        tasks = {args.out / name: (f"seed {s['seed']}", (args, name, s)) for name, s in todo.items()}
        count = min(args.jobs or torch.get_num_threads(), len(tasks))
        jobs.side_by_side(count, train.cache_stages, stages, one, tasks, after=lambda folder: None)
