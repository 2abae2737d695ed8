"""The optimizer of a training loop, and what keeps its work: signals, checkpoints, and the `Keeper` that gives every loop both.

    with Keeper(store, parts, total=1000, every=100) as keeper:
        for step in keeper.steps():     # from the last checkpoint on
            ...                         # one step

The `store` puts a checkpoint somewhere: `OneFile` here, sharded files in full_scale/. The `parts` are whatever else must come
back as it was, each with state() -> values and tensors, and restore(state).
"""

import contextlib
import hashlib
import json
import math
import signal

import torch
from safetensors import SafetensorError, safe_open

from .files import Interrupted, UserError, write_json, write_tensors
from .log import progress


class Keeper:
    """Resumes, counts, saves and stops a training loop.

    A checkpoint is saved after the body of a step, every `every` steps. After a step with Ctrl-C or SIGTERM one is saved too,
    and Interrupted is raised. If the signal comes in the last step or later, the block ends first, so that the result is not
    lost. A second Ctrl-C ends at once. Leaving the block without an error removes the checkpoint. `stopping` turns the list of
    caught signals into the signal to stop for, or None; several processes agree there. Raises UserError where the checkpoint is
    damaged.
    """

    def __init__(self, store, parts, *, total, every, resume=True, desc="", title="", stopping=None, say=print, bar=True):
        self.store, self.parts, self.total, self.every, self.bar, self.desc = store, parts, total, every, bar, desc
        self.stopping = stopping or (lambda caught: caught[0] if caught else None)
        if not resume:
            store.remove()
        state = store.load() or {"step": 0}
        self.first = state["step"]
        if self.first:
            say(f"{title}resuming from step {self.first}")
            for name, part in parts.items():
                part.restore(state[name])

    def __enter__(self):
        self.entered, shown = contextlib.ExitStack(), {} if self.bar else {"disable": True}
        self.bar = self.entered.enter_context(progress(total=self.total, initial=self.first, desc=self.desc, **shown))
        self.caught = self.entered.enter_context(finishing_step())
        return self

    def steps(self):
        """The steps that are still to do, counted from 0; the generator saves between them."""
        for step in range(self.first, self.total):
            yield step
            self.bar.update()
            done, stopping = step + 1, self.stopping(self.caught)
            if done < self.total and (stopping or done % self.every == 0):
                self.store.save({"step": done, **{name: part.state() for name, part in self.parts.items()}})
            if done < self.total and stopping:
                raise Interrupted(stopping)

    def __exit__(self, kind, error, traceback):
        self.entered.close()
        if error is None:
            self.store.remove()
            if stopping := self.stopping(self.caught):
                raise Interrupted(stopping)


class OneFile:
    """A store: weights, AdamW's moments and all parts in one safetensors file with a checksum.

    A checkpoint whose `same` values differ is another run's and is not taken up. One of another device is refused.
    """

    def __init__(self, path, model, optimizer, device="cpu", **same):
        self.path, self.model, self.optimizer, self.same, self.device = path, model, optimizer, same, str(device)

    def load(self):
        """The state that was saved, or None. Raises UserError where the file is damaged or of another device."""
        if not (saved := load_checkpoint(self.path, self.model, self.optimizer, **self.same)):
            return None
        state, tensors = saved
        if state["device"] != self.device:
            raise UserError(f"{self.path}: of a run with --device {state['device']}; --no-resume begins anew")
        for name, tensor in tensors.items():
            *places, last = name.split("/")
            inside = state
            for place in places:
                inside = inside[place]
            inside[last] = tensor
        return state

    def save(self, state):
        values, tensors = split(state)
        save_checkpoint(self.path, self.model, self.optimizer, {**values, **self.same, "device": self.device}, tensors)

    def remove(self):
        self.path.unlink(missing_ok=True)


def split(state, place=""):
    """A nested state -> what JSON can hold, nested alike, and its tensors by their places, joined with slashes."""
    values, tensors = {}, {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[f"{place}{key}"] = value
        elif isinstance(value, dict):
            values[key], inner = split(value, f"{place}{key}/")
            tensors |= inner
        else:
            values[key] = value
    return values, tensors


def begin(folder, config, resume):
    """Make a run's folder and its config.json, and forget the checkpoint of a finished run or of one not to be resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not resume or (folder / "samples.txt").exists():  # the last file of a finished run
        for name in ("checkpoint.safetensors", "samples.txt"):
            (folder / name).unlink(missing_ok=True)
    write_json(folder / "config.json", config)


class Random:
    """A part: the state of a torch.Generator."""

    def __init__(self, generator):
        self.generator = generator

    def state(self):
        return {"generator": self.generator.get_state()}

    def restore(self, state):
        self.generator.set_state(state["generator"])


# --- the optimizer


def adamw(parameters, lr):
    """AdamW without weight decay, as every loop here uses it."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def warmup_cosine(step, warmup, steps):
    """The factor of a learning rate that rises linearly over `warmup` steps and falls as a cosine to 0 at the end."""
    return min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def update(model, optimizer, loss):
    """One optimizer step, its gradient clipped at norm 1 -> the norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return grad_norm


# --- checkpoints

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def training_tensors(model, optimizer):
    """Weights and the optimizer's moments by name, as they are in memory; those of a new optimizer are put there, zeros."""
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in optimizer.param_groups[0]["params"]:
        state = optimizer.state[parameter]
        if not state:
            state.update({moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS})
            state["step"] = torch.zeros((), device=parameter.device)
        tensors |= {f"{moment}.{names[parameter]}": state[moment] for moment in MOMENTS}
    return tensors


def steps_taken(optimizer):
    """How many steps the optimizer has taken."""
    return next((int(state["step"]) for state in optimizer.state.values()), 0)


def set_steps_taken(optimizer, count):
    for state in optimizer.state.values():
        state["step"].fill_(count)


def content_checksum(state, tensors):
    """SHA-256 of a checkpoint: its state, a text, and its tensors."""
    total = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        total.update(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def save_checkpoint(path, model, optimizer, state, tensors):
    """Put all that a run needs to go on into one file: weights, moments, other tensors, and `state`, which JSON can hold."""
    tensors = {**training_tensors(model, optimizer), **tensors}
    state = json.dumps({**state, "updates": steps_taken(optimizer)})
    write_tensors(path, tensors, {"state": state, "sha256": content_checksum(state, tensors)})


def load_checkpoint(path, model, optimizer, **expected):
    """Fill model and optimizer -> (state, the other tensors), or None where there is no checkpoint of these values of `state`.

    Raises UserError where it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # not a dict
        if metadata["sha256"] != content_checksum(metadata["state"], tensors):
            raise ValueError("its checksum is another")
        state = json.loads(metadata["state"])
        if any(state[name] != value for name, value in expected.items()):
            return None
        with torch.no_grad():
            for name, tensor in training_tensors(model, optimizer).items():
                tensor.copy_(tensors.pop(name))
        set_steps_taken(optimizer, state["updates"])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: damaged ({error}); --no-resume begins anew") from None
    return state, tensors


# --- signals


@contextlib.contextmanager
def interruptible():
    """Ctrl-C and SIGTERM raise Interrupted."""

    def interrupt(number, _):
        raise Interrupted(number)

    with handling(interrupt):
        yield


@contextlib.contextmanager
def finishing_step():
    """A list that Ctrl-C and SIGTERM append to, so that the step is finished first; a second Ctrl-C ends at once."""
    caught = []

    def catch(number, _):
        caught.append(number)
        if before[signal.SIGINT] != signal.SIG_IGN:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    with handling(catch) as before:
        yield caught


@contextlib.contextmanager
def handling(handler):
    """Handle both signals by one function, SIGINT not where it is ignored -> the handlers before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, old in before.items():
        if old != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)
