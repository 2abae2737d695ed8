"""Command lines: numbers that are checked, names that are corrected, errors of one line, and the flags of a table of losses."""

import argparse
import contextlib
import difflib
import io
import itertools
import math
import os
import re
import shlex
import sys
from concurrent.futures.process import BrokenProcessPool

import torch

from .files import Interrupted, NonFiniteError, UserError, one_line, printable_path
from .keeper import interruptible

DEVICES = ("auto", "cpu", "cuda", "mps")
RUNS_AT_ONCE = "runs at once, a thread each; 0: one a CPU thread, one on a GPU"  # help of --jobs
NO_DEFAULT = "%(default).0s"  # keeps argparse from adding a default to a flag's help


# --- values


def spelling(text, kind, accepts):
    """The spelling of a number or of several that works, in words, where somebody would write `text` for it."""
    words = []
    if span := re.fullmatch(r"(\d+)(?:-|\.\.|:)(\d+)", text):
        first, last = map(int, span.groups())
        words = range(first, last + 1) if first < last < first + 100 else []
    elif kind is int and re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        words = [text.replace(",", "")]
    elif "," in text.strip(","):
        words = text.replace(",", " ").split()
    else:
        with contextlib.suppress(ValueError, OverflowError):
            words = [int(float(text))] if kind is int and float(text) == int(float(text)) else []
    with contextlib.suppress(ValueError):
        if words and all(accepts(kind(word)) for word in words):
            return f"; write {' '.join(map(str, words))}"
    return ""


def checked(kind, accepts, described):
    """An argparse type: int or float, finite and within its range, or a message that says what it must be."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be {described}, not {text!r}{spelling(text, kind, accepts)}")
        return value + 0  # -0.0 is 0.0

    return parse


def count_up_to(most):
    return checked(int, lambda value: 1 <= value <= most, f"a whole number from 1 to {most:,}")


count = count_up_to(10**9)
answer_length = count_up_to(2**17)  # whose keys and values are kept
natural = checked(int, lambda value: 0 <= value < 2**31, "a whole number of at least 0 and below 2^31")
learning_rate = checked(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
zero_or_temperature = checked(float, lambda value: value == 0 or value >= 1e-6, "0 or a finite number of at least 1e-6")
share = checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def bounded(at_least, above):
    """An argparse type: a finite float of at least, or above, a bound; None is no bound."""
    bounds = {"of at least": at_least, "above": above}
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    low, beyond = (-math.inf if bound is None else bound for bound in bounds.values())
    return checked(float, lambda value: low <= value and beyond < value, f"a finite number {words}".strip())


def nearest(word, names):
    """`; did you mean NAME?` where one of the names is near, else nothing."""
    near = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(names, also=None):
    """An argparse type: one of some names, in any case, with hyphens or underscores. `also` maps other words to names."""
    also = also or {}

    def parse(text):
        plain = text.lower().replace("-", "_").strip()
        if plain in names:
            return plain
        hint = f"; did you mean {also[plain]}?" if plain in also else nearest(plain, names)
        if "," in text:
            hint = f"; write {' '.join(text.replace(',', ' ').split())}"
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, not {text!r}{hint}")

    return parse


# --- parsers and errors


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line without the usage, name the nearest flag, and end with exit code 2."""

    losses = ()  # a word that is one of these lacks --loss

    def parse_known_args(self, args=None, namespace=None):
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def typed(self, flag, value):
        """The command that was typed with another value of a flag: the spelling that works."""
        words = self.words
        if flag in words:
            begin = words.index(flag)
            end = next((i for i in range(begin + 1, len(words)) if words[i].startswith("--")), len(words))
            words = words[:begin] + words[end:]
        program = self.prog if self.prog.startswith("python") else f"python {self.prog}"
        return f"{program} {shlex.join([*words, flag, str(value)])}"

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            lacks = unknown[1].lower().replace("-", "_") in self.losses
            message += f"; did you mean --loss {unknown[1]}?" if lacks else nearest(unknown[1], self._option_string_actions)
        if misspelt := re.match(r"argument [^:]*: invalid \w+ value: (.*)", message):  # printable_path
            message = f"{message.split(': invalid')[0]}: empty, or not a path that one line can show: {misspelt[1]}"
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows a default as it would be typed, and none where there is none."""

    def _expand_help(self, action):
        default = action.default
        if isinstance(default, list):
            action.default = " ".join(map(str, default))
        text = super()._expand_help(action)
        action.default = default
        return text

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def command_line(description, **words):
    """A `Parser`; `words` are argparse's."""
    return Parser(description=description, formatter_class=Help, **words)


@contextlib.contextmanager
def command(program, kept="what is finished stays", path="."):
    """Turn what goes wrong in a command into one line on stderr and an exit code.

    2 for what the user can mend, 3 for a loss that is not finite, 128 + number for a signal. Output that is cut off, as by
    `head`, is no error. `kept` says what an interruption leaves; `path` is named where an error names no file.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # each line at once, into a pipe or a file too
    try:
        with interruptible():
            yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still printed goes nowhere
        sys.exit(0)
    except Interrupted as signalled:
        print(f"interrupted: {kept}", file=sys.stderr)
        sys.exit(128 + signalled.args[0])
    except (UserError, NonFiniteError, OSError, BrokenProcessPool, torch.OutOfMemoryError) as error:
        print(f"{program}: error: {one_line(error, path)}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NonFiniteError) else 2)


# --- the flags of a table of losses (losses.py's LOSSES and HYPERPARAMETERS, which are given as arguments)


def users(name, losses):
    """The losses that a hyperparameter's flag changes."""
    fpa = name in ("lam", "target")
    return [loss for loss, row in losses.items() if name in row.defaults or (fpa and row.has_fpa_form)]


def add_method_flags(parser, losses, hyperparameters, default):
    """The flags that choose the method; `methods` reads them. All but the switches take several values."""
    add = parser.add_argument_group("method").add_argument
    parser.losses = tuple(losses)
    labels = {row.label.lower().replace("-", "_"): name for name, row in losses.items()}
    add("--loss", nargs="+", default=default, type=one_of(losses, labels), metavar="NAME", help=f"{', '.join(losses)}")
    for name, flag in hyperparameters.items():
        having = users(name, losses)
        defaults = {loss: losses[loss].defaults[name] for loss in having if name in losses[loss].defaults}
        if isinstance(next(iter(defaults.values())), bool):
            add(f"--{name}", action="store_true", default=None, help=f"{', '.join(having)}: {flag.help}{NO_DEFAULT}")
            continue
        kind = one_of(flag.choices) if flag.choices else bounded(flag.at_least, flag.above)
        words = ", ".join(f"{loss} {value}".removesuffix(".0") for loss, value in defaults.items())
        shown = f" (default: {words}{', else 0' if name == 'lam' else ''}){NO_DEFAULT}"
        metavar = "ROWS" if flag.choices else "X"
        add(f"--{name}", nargs="+", type=kind, metavar=metavar, help=f"{', '.join(having)}: {flag.help}{shown}")


def methods(args, losses, hyperparameters):
    """The settings of every method that the flags ask for: {"loss", and the hyperparameters that it uses}.

    lam = 0 is the plain loss, without lam and target. A loss that another is the FPA form of becomes that one at lam > 0, and
    the other way round; beside its FPA form it stays plain.
    """
    forms = {row.form_of: name for name, row in losses.items() if row.form_of}
    found = []
    for loss in args.loss:
        own = [name for name in hyperparameters if loss in users(name, losses)]
        given = {name: getattr(args, name) for name in own}
        default = losses[loss].defaults.get
        lists = [[default(name)] if v is None else v if isinstance(v, list) else [v] for name, v in given.items()]
        for combination in itertools.product(*lists):
            found.append(method_settings(loss, dict(zip(own, combination)), losses, forms, forms.get(loss) in args.loss))
    return found


def method_settings(loss, values, losses, forms, beside_its_form):
    """One method's settings, from a value for each of its flags; None is what the loss itself has no default for."""
    row = losses[loss]
    if row.has_fpa_form or row.form_of:
        lam = 0.0 if beside_its_form else values["lam"] or 0.0
        loss = forms.get(loss, loss) if lam else row.form_of or loss
        values = {**values, "lam": lam, "target": values["target"] or "both"}
        if not lam:
            values = {name: value for name, value in values.items() if name not in ("lam", "target")}
    return {"loss": loss, **values}


def method_words(method, hyperparameters):
    """The words of a run's name that say its method."""
    words = [method["loss"]]
    for name in hyperparameters:
        value = method.get(name)
        if isinstance(value, bool):
            words += [name] * value
        elif isinstance(value, str):
            words.append(value)
        elif value is not None:
            words.append(f"{name}{value:g}")
    return words


def reinterpreted(args, losses, hyperparameters):
    """What the flags ask for under another name, and what --lam turns into its FPA form, a line each."""
    said = []
    for loss in args.loss:
        for method in methods(argparse.Namespace(**{**vars(args), "loss": [loss]}), losses, hyperparameters):
            name = method["loss"]
            if name != loss and not (losses[name].form_of and name in args.loss):  # beside its FPA form it stays plain
                said.append(f"--loss {loss} with --lam {method.get('lam', 0):g} is {name}")
            elif losses[name].has_fpa_form and not losses[name].form_of and method.get("lam"):
                said.append(f"--loss {loss} with --lam {method['lam']:g} is its FPA form")
    return list(dict.fromkeys(said))


def check_method_flags(parser, args, losses, hyperparameters):
    """Refuse flags of other losses than those that are asked for, and a target without lam."""
    for name in hyperparameters:
        having = users(name, losses)
        if getattr(args, name) is not None and not set(having) & set(args.loss):
            parser.error(f"argument --{name}: {' '.join(args.loss)} has none; only {', '.join(having)}")
    if args.target is not None and not any("target" in method for method in methods(args, losses, hyperparameters)):
        if args.lam is None:
            parser.error(f"argument --target: {' '.join(args.loss)} needs --lam above 0; try: {parser.typed('--lam', 2)}")
        parser.error(f"argument --target: no run uses it, because --lam is 0 for {' '.join(args.loss)}")


def check_groups(parser, args, losses):
    """Refuse groups of an online loss that no batch holds."""
    online = [loss for loss in args.loss if losses[loss].online]
    if online and (args.rollouts == 1 or args.batch_size % args.rollouts):
        fits = 8 if args.batch_size % 8 == 0 else 2
        parser.error(f"argument --rollouts: {online[0]} needs at least 2, and --batch-size must be a multiple of them, "
            f"not {args.rollouts}; try: {parser.typed('--rollouts', fits)}")  # fmt: skip


SCHEDULES = ("constant", "linear")
MOST_ROWS = 10**8  # rows that a run trains on, since their order is drawn before its first step


def check_rows(parser, args):
    """Refuse more rows than an order is drawn for."""
    rows = args.steps * args.batch_size
    if rows > MOST_ROWS:
        parser.error(f"argument --steps: times --batch-size must be at most {MOST_ROWS:,}, not {rows:,}")


# --- training, and the machine


def add_training_flags(parser):
    """A run's length and its rows."""
    add = parser.add_argument_group("training").add_argument
    add("--seed", nargs="+", default=[0], type=natural, metavar="N", help="seed of the whole pipeline, base model included")
    add("--steps", default=1000, type=count, metavar="N", help="optimizer steps")
    add("--lr", nargs="+", default=[2e-4], type=learning_rate, metavar="X", help="AdamW's learning rate")
    add("--schedule", nargs="+", default=["constant"], type=one_of(SCHEDULES), metavar="NAME", help="constant: the rate stays; "
        "linear: it falls to 0 at the end")  # fmt: skip
    add("--batch-size", default=64, type=count, metavar="N", help="answers a step; offline, half correct, half incorrect")
    add("--skip-nonfinite", default=0, type=natural, metavar="N", help="leave out the updates of at most N steps whose loss or "
        "gradient is not finite; one more stops the run")  # fmt: skip
    add("--diagnostics", action="store_true", help="also measure gradient entanglement, extrapolation and single tokens")


def add_machine_flags(parser):
    """Where the work is done and kept."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", type=one_of(DEVICES, {"gpu": "cuda"}), metavar="NAME", help=f"{', '.join(DEVICES)}; "
        "auto takes a GPU where there is one")  # fmt: skip
    add("--jobs", default=0, type=natural, metavar="N", help=RUNS_AT_ONCE)
    add("--out", default="runs", type=printable_path, metavar="FOLDER", help="folder of the runs and of the cached stages")
    add("--save-every", default=100, type=count, metavar="N", help="steps between checkpoints")
    add("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on with an interrupted run from its last "
        "checkpoint, or begin it anew")  # fmt: skip
    add("--force", action="store_true", help="train finished runs anew; cached stages stay")


def check_machine_flags(parser, args):
    """Settle `--device auto`, and refuse a device that is not there and an output folder that cannot be written to."""
    check_folder(parser, "--out", args.out)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if args.device == "auto":
        args.device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[args.device]:
        parser.error(f"argument --device: there is no {args.device} device on this machine")


def check_folder(parser, flag, path):
    """Refuse an output folder that cannot be made or written to."""
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:  # a name that is too long, a folder that one may not enter
        parser.error(f"argument {flag}: {error.strerror}: {path}")
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        parser.error(f"argument {flag}: {existing} is not a folder that can be written to")
