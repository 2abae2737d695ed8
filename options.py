"""The command line: every flag, their checks, and the runs that they ask for."""

import argparse
import itertools
import math
import os

import torch

from files import printable_path
from losses import TARGETS
from results import NAMES
from stages import EVAL_PROBLEMS, digest, draw_splits, stage_settings

WITH_FPA_FORM = ("off_rl", "fpa", "simper", "dpo", "rpo", "kto")
BETA = {"dpo": 0.1, "rpo": 0.1, "kto": 0.1, "a_star_po": 1e-3, "pessimistic": 0.1}
USERS = {  # of the flags that not every loss has
    "lam": (*WITH_FPA_FORM, "sharpened"),
    "target": (*WITH_FPA_FORM, "sharpened"),
    "beta": tuple(BETA),
    "alpha": ("rpo",),
    "weight": ("constant",),
    "shift": ("pessimistic",),
    "dapo": ("grpo",),
}
NO_DEFAULT = "%(default).0s"  # keeps argparse from adding one to a flag's help
EVAL_SAMPLES = 8
MOST_ROWS = 10**8  # that a run trains on, since their order is drawn before its first step
MONITORED = 128  # correct, and as many incorrect, training rollouts whose log-probabilities are logged


# --- flags


def checked(kind, accepts, described):
    """An argparse type: int or float, finite and within its range, or a message that says what it must be."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {described}, not {text!r}")
        return value + 0  # -0.0 is 0.0

    return parse


def count_up_to(most):
    return checked(int, lambda value: 1 <= value <= most, f"a whole number from 1 to {most:,}")


count = count_up_to(10**9)
answer_length = count_up_to(2**17)  # whose keys and values are kept
natural = checked(int, lambda value: 0 <= value < 2**31, "a whole number of at least 0 and below 2^31")
positive = checked(float, lambda value: value > 0, "a finite number above 0")
learning_rate = checked(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
temperature = checked(float, lambda value: value >= 1e-6, "a finite number of at least 1e-6")
not_negative = checked(float, lambda value: value >= 0, "a finite number of at least 0")
finite = checked(float, lambda value: True, "a finite number")
zero_or_temperature = checked(float, lambda value: value == 0 or value >= 1e-6, "0 or a finite number of at least 1e-6")
share = checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def command_line(description, **words):
    """A parser whose help shows the defaults, and whose errors are one line on stderr, without the usage, and exit code 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **words)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    return parser


def add_method_flags(parser):
    """The flags that choose the method; `methods` reads them."""
    add = parser.add_argument_group("method").add_argument
    add("--loss", nargs="+", default=["off_rl", "fpa"], choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES)}; "
        "fpa is off_rl with --lam 2, grpo is online, and constant and sharpened are controls")  # fmt: skip
    add("--lam", nargs="+", type=not_negative, metavar="X", help="how far to extrapolate to the future policy: above 0 turns "
        f"{', '.join(WITH_FPA_FORM)} into their FPA form (off_rl not beside fpa); the power of sharpened is 1 + X "
        f"(default: 2 for fpa and sharpened, else 0){NO_DEFAULT}")  # fmt: skip
    add("--target", nargs="+", default=["both"], choices=TARGETS, metavar="ROWS",
        help="rows whose coefficient is the future policy's: both, correct or incorrect")  # fmt: skip
    add("--beta", nargs="+", type=positive, metavar="X", help="weight of the log-ratio "
        f"(default: {', '.join(f'{loss} {beta:g}' for loss, beta in BETA.items())}){NO_DEFAULT}")  # fmt: skip
    add("--alpha", nargs="+", default=[1.0], type=not_negative, metavar="X", help="weight of rpo's log-likelihood term")
    add(
        "--weight",
        nargs="+",
        default=[0.25],
        type=not_negative,
        metavar="X",
        help="weight of grad logp_mean of constant on incorrect rows",
    )
    add(
        "--shift", nargs="+", default=[0.0], type=finite, metavar="X", help="shift of pessimistic's advantage, in units of beta"
    )
    add("--dapo", action="store_true", help="grpo with DAPO's normalisation, over the batch's tokens, and without the prompts "
        "whose samples all have one reward")  # fmt: skip


def parse_args(argv=None):
    """The flags, every one checked before anything is written; a wrong one is one line on stderr and exit code 2."""
    parser = command_line(
        "Offline RL on synthetic arithmetic: Off-RL, Future Policy Approximation (FPA) and their neighbours.",
        epilog="Flags shown with several values take several, and then the runs are their product.",
    )
    add_method_flags(parser)
    add = parser.add_argument_group("training").add_argument
    add("--seed", nargs="+", default=[0], type=natural, metavar="N", help="seed of the whole pipeline, base model included")
    add("--steps", default=1000, type=count, metavar="N", help="optimizer steps")
    add("--lr", nargs="+", default=[2e-4], type=learning_rate, metavar="X", help="AdamW's learning rate, constant")
    add("--batch-size", default=64, type=count, metavar="N", help="trajectories a step; offline, half correct, half incorrect")
    add("--skip-nonfinite", default=0, type=natural, metavar="N", help="leave out the updates of at most N steps whose loss or "
        "gradient is not finite; one more stops the run")  # fmt: skip

    add = parser.add_argument_group("task").add_argument
    add(
        "--prompts",
        nargs="+",
        default=[1024],
        type=count_up_to(10**6),
        metavar="N",
        help="training problems, which are rolled out",
    )
    add(
        "--rollouts",
        default=8,
        type=count_up_to(1000),
        metavar="N",
        help="samples per training problem, and in a group of grpo's",
    )
    add("--ops", default=6, type=count_up_to(50), metavar="N", help="operations per problem")
    add("--slip", default=0.12, type=share, metavar="X", help="probability that a step of the base model's corpus is wrong")
    add("--base-steps", default=3000, type=count_up_to(200_000), metavar="N", help="training steps of the base model")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", default=50, type=count, metavar="N", help="steps between evaluations")
    add("--eval-temperature", default=1.0, type=temperature, metavar="X", help="sampling temperature of the column `accuracy`")
    add("--diagnostics", action="store_true", help="also measure gradient entanglement, extrapolation and single tokens")
    add("--explain", choices=WITH_FPA_FORM, metavar="NAME", help="train nothing: show what one step of this loss and one of "
        f"its FPA form do to a pair of rollouts, token by token{NO_DEFAULT}")  # fmt: skip

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto takes a GPU where there is one")
    add("--jobs", default=0, type=natural, metavar="N", help="runs at once, a thread each; 0: one a CPU thread, one on a GPU")
    add("--out", default="runs", type=printable_path, metavar="FOLDER", help="folder of the runs and of the cached stages")
    add("--save-every", default=100, type=count, metavar="N", help="steps between checkpoints")
    add("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on with an interrupted run from its last "
        "checkpoint, or begin it anew")  # fmt: skip
    add("--force", action="store_true", help="train finished runs anew; cached stages stay")
    args = parser.parse_args(argv)
    if args.explain:
        args.loss, args.lam = [args.explain], args.lam or [2.0]
    check_args(parser, args)
    return args


def check_method_flags(parser, args):
    """Flags of other losses than those that are asked for."""
    for flag, users in USERS.items():
        if getattr(args, flag) is not parser.get_default(flag) and not set(users) & set(args.loss):
            parser.error(f"argument --{flag}: {' '.join(args.loss)} has none; only {', '.join(users)}")
    if args.target is not parser.get_default("target") and not any(
        m["target"] for m in methods(args) if m["loss"] != "constant"
    ):
        parser.error(f"argument --target: no run weights rows by another coefficient; --lam is 0 for {' '.join(args.loss)}")


def check_rows(parser, args):
    rows = args.steps * args.batch_size
    if rows > MOST_ROWS:
        parser.error(f"argument --steps: times --batch-size must be at most {MOST_ROWS:,}, not {rows:,}")


def check_args(parser, args):
    """What no single flag shows: flags at odds, too few problems, the output folder; settles `--device auto`."""
    if args.batch_size % 2:
        parser.error(f"argument --batch-size: must be even, half correct and half incorrect, not {args.batch_size}")
    check_rows(parser, args)
    check_method_flags(parser, args)
    if "grpo" in args.loss and (args.rollouts == 1 or args.batch_size % args.rollouts):
        parser.error(f"argument --rollouts: grpo needs at least 2, and --batch-size a multiple of them, not {args.rollouts}")
    try:  # too few problems of this length are noticed before anything is trained
        for seed, prompts in itertools.product(args.seed, args.prompts):
            draw_splits(args, seed, prompts)
    except ValueError as error:
        parser.error(f"argument --ops or --prompts: {error}")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if args.device == "auto":
        args.device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[args.device]:
        parser.error(f"argument --device: there is no {args.device} device on this machine")
    try:
        existing = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
    except OSError as error:  # a name that is too long, a folder that one may not enter
        parser.error(f"argument --out: {error.strerror}: {args.out}")
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        parser.error(f"argument --out: {existing} is not a folder that can be written to")


# --- the product of runs


def method_settings(args, loss, lam, target, beta, alpha, weight, shift):
    """What makes the method, None where it has no such thing. Off-RL at λ > 0 is fpa, and fpa at λ = 0 is Off-RL."""
    if lam is None:
        lam = 2.0 if loss in ("fpa", "sharpened") else 0.0
    if loss not in USERS["lam"] or (loss == "off_rl" and "fpa" in args.loss):  # beside its FPA form it is the plain one
        lam = 0.0
    if loss in ("off_rl", "fpa"):
        loss = "fpa" if lam else "off_rl"
    target = "incorrect" if loss == "constant" else target if lam else None
    values = {"beta": beta or BETA.get(loss), "alpha": alpha, "weight": weight, "shift": shift, "dapo": args.dapo}
    return {"loss": loss, "lam": lam, "target": target, **{k: v if loss in USERS[k] else None for k, v in values.items()}}


def methods(args):
    """`method_settings` of every combination of the method's flags."""
    flags = (args.loss, args.lam or [None], args.target, args.beta or [None], args.alpha, args.weight, args.shift)
    return [method_settings(args, *values) for values in itertools.product(*flags)]


def method_words(method):
    """The words of a run's name that say its method."""
    words = [method["loss"], *([f"lam{method['lam']:g}"] * (method["lam"] > 0)), *([method["target"]] * bool(method["target"]))]
    words += [f"{key}{method[key]:g}" for key in ("beta", "alpha", "weight", "shift") if method[key] is not None]
    return words + ["dapo"] * bool(method["dapo"])


def run_settings(args):
    """Settings of every run that the flags ask for, by folder name; a run's name is built from the values that it uses."""
    runs = {}
    for seed, prompts, lr, method in itertools.product(args.seed, args.prompts, args.lr, methods(args)):
        _, settings = stage_settings(args, seed, prompts)
        settings |= {"lr": lr, **{key: getattr(args, key) for key in ("steps", "batch_size", "eval_every", "eval_temperature")}}
        settings |= {"eval_problems": EVAL_PROBLEMS, "eval_samples": EVAL_SAMPLES, "monitored": MONITORED, **method}
        words = method_words(method)
        words += [f"prompts{prompts}", f"steps{args.steps}", f"lr{lr:g}", f"seed{seed}", digest(settings)]
        runs["-".join(words)] = settings
    return runs
