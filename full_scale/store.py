"""A sharded run's checkpoint, which any number of processes can load: the store of plumbing/keeper.py's Keeper.

Weights and AdamW's moments are safetensors files of torch.distributed.checkpoint. state.json holds the rest, and a checksum of
itself and of every file. A new checkpoint is written beside the last one and then takes its name: at every moment one is whole.
"""

import contextlib
import hashlib
import shutil

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from plumbing.files import UserError, digest, read_json, write_json
from plumbing.keeper import set_steps_taken, steps_taken, training_tensors

from .processes import agreed, is_first

SHARD_BYTES = 2**30  # of a checkpoint's file
NAMES = ("checkpoint", "checkpoint.part", "checkpoint.old")


class ShardedStore:
    """Keeps model, optimizer and a state that JSON can hold below a run's folder. Every process calls every method."""

    def __init__(self, folder, model, optimizer):
        self.folder, self.model, self.optimizer = folder, model, optimizer

    def load(self):
        """Fill model and optimizer from the latest whole checkpoint -> its state, or None. Raises UserError.

        An interruption while one checkpoint took the other's place leaves the new one under its temporary name, or the old
        one under its own.
        """
        found = {}
        if is_first():
            found = {name: state for name in NAMES if (state := read_state(self.folder / name))}
        found = agreed(found)
        name = max(found, key=lambda name: found[name]["step"]) if found else None
        self.remove(keep=name)
        if not found:
            return None
        checkpoint = self.folder / "checkpoint"
        if is_first():
            (self.folder / name).rename(checkpoint)
        dist.barrier()
        tensors = training_tensors(self.model, self.optimizer)
        with one_line_of(checkpoint):
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
        set_steps_taken(self.optimizer, found[name]["updates"])
        return found[name]

    def save(self, state):
        """Put this step's checkpoint in the place of the last. Raises UserError where the disk is full."""
        new, old = self.folder / "checkpoint.part", self.folder / "checkpoint"
        if is_first():
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        dist.barrier()
        tensors = training_tensors(self.model, self.optimizer)
        sizes = torch.tensor([tensor.nbytes for tensor in tensors.values()]).cumsum(0) // SHARD_BYTES
        shards = dict(zip(tensors, (sizes + 1).tolist()))
        with one_line_of(new):
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(new), shards, save_distributed=True))
        dist.barrier()
        if is_first():
            files = {path.name: block_checksum(path) for path in new.iterdir()}
            state = {**state, "updates": steps_taken(self.optimizer), "files": files}
            write_json(new / "state.json", {**state, "digest": digest(state)})
            if old.exists():
                old.rename(self.folder / "checkpoint.old")
            new.rename(old)
            shutil.rmtree(self.folder / "checkpoint.old", ignore_errors=True)

    def remove(self, keep=None):
        """Remove every checkpoint but the one of the name `keep`."""
        if is_first():
            for name in set(NAMES) - {keep}:
                shutil.rmtree(self.folder / name, ignore_errors=True)


def block_checksum(path):
    """A checksum of a file in a fiftieth of the time that writing it takes, where SHA-256 of all of it takes a third.

    It is the SHA-256 of every 4 KiB's sum, as 64-bit words, and of the rest. A wrong word changes it, and so does a block that
    is missing or moved. It is no seal: whoever wants to can write another file with the same one.
    """
    size, words = path.stat().st_size, 4096 // 8
    blocks = np.memmap(path, np.uint64, "r", shape=(size // 4096, words)) if size >= 4096 else np.empty((0, words), np.uint64)
    with open(path, "rb") as file:
        file.seek(blocks.nbytes)
        return hashlib.sha256(blocks.sum(1).tobytes() + file.read()).hexdigest()


def read_state(folder):
    """state.json of a checkpoint all of whose files are there, else None; UserError where it should be whole and is not."""
    with contextlib.suppress(UserError, OSError, KeyError):
        state = read_json(folder / "state.json")
        whole = state.pop("digest") == digest(state) and all(
            block_checksum(folder / name) == checksum for name, checksum in state["files"].items()
        )
        if whole and state.keys() >= {"step", "log", "updates"}:
            return state
    if folder.name == "checkpoint" and folder.exists():  # the other two may be half-written or half-removed
        raise UserError(f"{folder}: damaged; --no-resume begins anew")
    return None


@contextlib.contextmanager
def one_line_of(path):
    """Make what torch raises where a checkpoint cannot be written or read a UserError that names its path."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{path}: {getattr(cause, 'strerror', None) or str(cause).splitlines()[0]}") from None
