"""One process, or several behind torchrun: how they start, agree and add up. torch.distributed serves both."""

import datetime
import os
import signal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def start_processes():
    """Join torchrun's processes, or be the only one -> their mesh."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend, mine = "gloo", None
    if device == "cuda":
        backend, mine = "nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(mine)
    if "RANK" in os.environ:  # the others wait where the first one downloads a checkpoint or checks a large file
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2), device_id=mine)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=mine)
    return init_device_mesh(device, (dist.get_world_size(),))


def is_first():
    """Whether this process is the one that prints and writes."""
    return dist.get_rank() == 0


def say(text):
    """Print in the first process only."""
    if is_first():
        print(text, flush=True)


def agreed(value):
    """The first process's value, in all of them."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def by_first(work):
    """What work() returns in the first process, which alone calls it, in all of them."""
    return agreed(work() if is_first() else None)


def summed(values):
    """A tensor's sum over processes, in place."""
    dist.all_reduce(values)
    return values


def summed_by_name(values):
    """{name: scalar tensor} -> {name: its sum over processes, float32 on the CPU}, in one exchange."""
    return dict(zip(values, summed(torch.stack([value.float() for value in values.values()])).cpu()))


def stopped(caught, device):
    """The signal that some process caught, the same in every one, or None."""
    if summed(torch.tensor(len(caught), device=device)) > 0:
        return agreed(caught[0] if caught else signal.SIGTERM)
    return None
