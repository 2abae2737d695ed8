"""The reference policy without a second model: its hidden states are computed once and kept on disk, its head in memory.

The cache is a folder for each checkpoint, data set and precision, which all runs share. A
hidden-*.safetensors file holds the hidden states of some rows' completion tokens, for losses that look at the future policy.
sums.safetensors holds every row's logp_sum, and mismatched.safetensors KTO's. Each has its checksum beside it.
"""

import contextlib
import shutil
import time

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from losses import future_lam
from plumbing.files import UserError, digest, locked, read_beside, write_beside, write_tensors
from plumbing.log import progress

from .data import pack
from .policy import build, completion_hidden, head_of, logp_sums
from .processes import by_first, is_first, say, summed

SHARD_BYTES = 2**30  # of hidden states in a file


def read_cache(folder):
    """The names of the files of hidden states: none if the cache holds only sums. None if there is no cache.

    Raises UserError where one is damaged or gone.
    """
    facts = read_beside(folder / "sums.safetensors")
    for name in facts["files"] if facts else ():
        if read_beside(folder / name) is None:
            raise UserError(f"{folder / name}: gone; remove {folder} to make it anew")
    return facts and facts["files"]


class Reference:
    """The reference policy of several runs: logp_sum (N,), seconds, head (V, D), and `hidden`, from disk or from a model.

    mismatched_logp_sum (N,), where a run wants it, is that of the completions after `data.other_prompt`.
    """

    def __init__(self, args, runs, model, data, key, mesh):
        """The model is still the reference policy; key names it and the data. Raises UserError where the disk is too small."""
        self.data, self.device, self.live = data, mesh.device_type, None
        with torch.no_grad():
            head = head_of(model)
            head = head.full_tensor() if isinstance(head, DTensor) else head
            self.head = head.to(torch.bfloat16 if args.precision == "bf16" else torch.float32, copy=True)
        future = any(future_lam(run) > 0 for run in runs)
        stored = future and args.reference == "cached"
        if future and args.reference == "live":
            self.live = build(args, model.folder, mesh).requires_grad_(False)
        self.cache = args.out / "cache" / f"reference-{digest([key, args.precision])}"
        began, size = time.time(), data.length.sum().item() * self.head.element_size() * self.head.shape[1] * stored
        with contextlib.ExitStack() as stack:  # another command may be computing it
            if is_first():
                stack.enter_context(locked(self.cache.with_suffix(".lock"), self.cache, wait=True))
            free, files = by_first(lambda: (shutil.disk_usage(args.out).free, read_cache(self.cache)))
            there = files is not None and (bool(files) or not stored)
            if not there:
                if size > free:
                    raise UserError(f"{args.out}: the reference takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
                self.compute(args.micro_batch, model, stored)
            said = "cached  " if there else f"{time.time() - began:6.1f} s"
            say(f"reference     {said}     {self.cache}   {size / 1e9:.1f} GB")
            sums = load_file(self.cache / "sums.safetensors")
            self.logp_sum, self.seconds = sums["logp_sum"], sums["seconds"]
            if data.other_prompt is not None:
                self.mismatched_logp_sum = self.mismatched(args.micro_batch, model)
        self.find_hidden()

    def find_hidden(self):
        """Fill `places`: row -> (open file, where its hidden states begin, where they end)."""
        self.places = {}
        for path in sorted(self.cache.glob("hidden-*.safetensors")):
            file = safe_open(path, "pt")
            rows = file.get_tensor("rows")
            ends = self.data.length[rows].cumsum(0).tolist()
            self.places |= {row: (file, begin, end) for row, begin, end in zip(rows.tolist(), [0, *ends], ends)}

    def compute(self, micro_batch, model, stored):
        """Run every row through the model once; the hidden states go to each process's files, the sums to one of all."""
        began = time.time()
        if is_first():
            self.cache.mkdir(parents=True, exist_ok=True)
            for path in self.cache.glob("hidden-*"):  # of a pass that was interrupted, maybe of more processes
                path.unlink()
        dist.barrier()
        sums = self.sums(micro_batch, model, stored=stored)
        if is_first():  # after every process's files, and last: it says that they are whole
            seconds, names = torch.tensor(time.time() - began), sorted(x.name for x in self.cache.glob("hidden-*.safetensors"))
            (self.cache / "sums.json").unlink(missing_ok=True)  # of older sums, made without hidden states
            write_tensors(self.cache / "sums.safetensors", {"logp_sum": sums, "seconds": seconds})
            write_beside(self.cache / "sums.safetensors", {"files": names})
        dist.barrier()

    def mismatched(self, micro_batch, model):
        """logp_sum (N,) of the completions after other prompts, computed where it is not there. Raises UserError."""
        path = self.cache / "mismatched.safetensors"
        if not by_first(lambda: read_beside(path) is not None):
            sums = self.sums(micro_batch, model, self.data.other_prompt)
            if is_first():
                write_tensors(path, {"logp_sum": sums})
                write_beside(path, {})
            dist.barrier()
        return load_file(path)["logp_sum"]

    @torch.no_grad()
    def sums(self, micro_batch, model, prompts=None, stored=False):
        """logp_sum (N,) of every row, after its prompt or that of the row in `prompts`; `stored` keeps the hidden states."""
        data, sums, waiting, files = self.data, torch.zeros(len(self.data.reward)), [], 0
        rank, world = dist.get_rank(), dist.get_world_size()
        batches = (data.prompt_length + data.length).argsort().split(micro_batch * world)
        for batch in progress(batches, desc="reference", disable=rank > 0 or None):
            mine = len(batch) > rank
            rows = batch[rank::world] if mine else batch[:1]  # every process takes part in every forward
            tokens, mask = pack(data, rows, self.device, None if prompts is None else prompts[rows])
            hidden, targets = completion_hidden(model, tokens, mask)
            logp_sum = logp_sums(hidden, self.head, targets, mask)[0].cpu()
            sums[rows] = logp_sum if mine else sums[rows]
            waiting += [(rows, hidden.to(self.head.dtype).cpu())] * (stored and mine)
            if sum(hidden.nbytes for _, hidden in waiting) > SHARD_BYTES:
                self.write(waiting, rank, files)
                waiting, files = [], files + 1
        if waiting:
            self.write(waiting, rank, files)
        model.reshard()  # FSDP2 does so in backward only, and the optimizer wants the shards
        return summed(sums.to(self.device)).cpu()

    def write(self, waiting, rank, number):
        """Put hidden states, (rows, hidden) pairs, into a file of this process."""
        rows, hidden = zip(*waiting)
        path = self.cache / f"hidden-{rank:03}-{number:05}.safetensors"
        try:
            write_tensors(path, {"rows": torch.cat(rows), "hidden": torch.cat(hidden)})
        except UserError as error:  # of this process alone, which has to print it
            raise OSError(str(error)) from None
        write_beside(path, {})

    def hidden(self, rows, tokens, mask):
        """The reference's hidden states (N, D) of some rows' completions."""
        if self.live is not None:
            with torch.no_grad():
                return completion_hidden(self.live, tokens, mask)[0]
        places = [self.places[row] for row in rows.tolist()]
        return torch.cat([file.get_slice("hidden")[begin:end] for file, begin, end in places]).to(self.device)
