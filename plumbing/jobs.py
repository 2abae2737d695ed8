"""Tasks side by side in processes of one thread each."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from .files import Interrupted
from .log import progress


def start_worker():
    """One thread, lines at once, no bars, and an end when the parent ends."""
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    progress.keywords["disable"] = True
    tqdm.set_lock(threading.RLock())  # the default one is shared between processes, and a terminated worker would leak it
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def workers(count):
    """A pool of `count` processes, started at once; where the block is left by an exception they end, a training step finished.

    A second Ctrl-C ends them at once.
    """
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start_worker) as pool:
        # the workers inherit it: Ctrl-C is for the parent, which ends them
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for _ in range(count):
            pool.submit(int)  # starts one
        signal.signal(signal.SIGINT, handler)
        try:
            yield pool
        except BaseException:
            children = multiprocessing.active_children()
            for worker in children:
                worker.terminate()
            try:
                for worker in children:
                    worker.join()
            except KeyboardInterrupt:
                for worker in children:
                    worker.kill()
            raise


def task(function, *values):
    """In a worker: call the function, and end the process where it was interrupted, which else would take up the next task."""
    try:
        return function(*values)
    except Interrupted as signalled:
        os._exit(128 + signalled.args[0])


def finished(pool, function, arguments, errors):
    """Call function(*arguments[name]) for every name, and yield each name as it is done.

    One that fails stops no other: its exception goes into `errors`, by its name.
    """
    futures = {pool.submit(task, function, *values): name for name, values in arguments.items()}
    for future in as_completed(futures):
        if error := future.exception():
            errors[futures[future]] = error
            print(f"failed: {futures[future]}: {error}")
        yield futures[future]


def side_by_side(count, make, stages, train, runs, after):
    """Call train(*runs[name]) for every run, `count` at once, and first make(*stages[stage]) for the stages that they need.

    runs: {name: (stage, arguments)}. Runs of a stage that failed are left out. after(name) is called for each run that is done
    without a failure. A failure stops no other run; the first one is raised last.
    """
    errors = {}  # by stage, or by run
    print(f"{count} runs at once, one thread each")
    with workers(count) as pool:
        if len(stages) == 1:
            make(*next(iter(stages.values())))  # here, on all threads
        else:
            list(finished(pool, make, stages, errors))
        arguments = {name: values for name, (stage, values) in runs.items() if stage not in errors}
        began = time.time()
        for done, name in enumerate(finished(pool, train, arguments, errors), start=1):
            turns, turns_done = math.ceil(len(arguments) / count), math.ceil(done / count)
            left = (time.time() - began) / turns_done * (turns - turns_done) / 60
            print(f"\n{name}   {done} of {len(arguments)} runs, about {left:.0f} min left")
            if name not in errors:
                after(name)
    if errors:
        raise next(iter(errors.values()))
