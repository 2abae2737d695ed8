"""Does the coefficients' scale matter, or only their ratio? The runs of claim N5.

    python -m study.scale       # lists them
    python -m study.scale all   # trains what results/ lacks of them, and gathers it

FPA at λ = 2 as it is, and with its weights C |y| divided by their mean in each batch. AdamW divides a gradient's scale out, SGD
does not. AdamW has the rate that the grid of λ = 2 chose. SGD, without clipping, has the best of RATES for FPA as it is.
"""

import torch

from losses import objective
from plumbing.files import UserError
from study import changed, experiments
from study.results import SEEDS
from study.tables import BASES, copy_stages, gather, held, identity, run_names

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CASE = "λ = 2"


# --- the two changes to train.py


def rescaled(batch, run):
    """losses.objective with weights C |y| whose mean over the batch is 1."""
    loss, coefficient = objective(batch, run)
    return loss / (coefficient * batch.length).mean(), coefficient


def unclipped(parameters, most):
    """clip_grad_norm_ without its clipping."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])


def train_one(args, name, settings):
    """train.py's, with the changes that the settings name. For a process of its own."""
    changes = {"objective": rescaled} if "scale" in settings else {}
    changes |= {"adamw": torch.optim.SGD, "clip_grad_norm_": unclipped} if "optimizer" in settings else {}
    changed.train_one(args, name, settings, changes)


# --- the runs


def grid(lr):
    """The runs that choose SGD's rate."""
    return experiments.settings_of(experiments.on_grid("--loss fpa --lam 2", lr), experiments.GRID_SEEDS, optimizer="sgd")


def best_rate(runs):
    """SGD's rate with the best mean over the grid's seeds; None where a run is not held."""
    return experiments.best_rate({lr: grid(lr) for lr in RATES}, runs)


def members(runs):
    """{case: {id: settings}}, of SGD and AdamW once their rates are chosen."""
    cases = {f"SGD, {lr:g}": grid(lr) for lr in RATES}
    if lr := best_rate(runs):
        flags = experiments.on_grid("--loss fpa --lam 2", lr)
        cases["SGD"] = experiments.settings_of(flags, SEEDS, optimizer="sgd")
        cases["SGD, mean 1"] = experiments.settings_of(flags, SEEDS, optimizer="sgd", scale="mean1")
    if flags := experiments.at_best("lambda", runs).get(CASE):
        cases["AdamW"] = experiments.settings_of(flags, SEEDS)
        cases["AdamW, mean 1"] = experiments.settings_of(flags, SEEDS, scale="mean1")
    return {case: {identity(settings): settings for settings in some} for case, some in cases.items()}


def run_scale(name, args):
    """Train what is missing, stage by stage: the grid first, then the cases at the rates that it chose."""
    copy_stages(BASES, args.out)
    while True:
        runs = held(args.to)
        cases = members(runs)
        lacking = [settings for some in cases.values() for run, settings in some.items() if run not in runs]
        if not lacking and "AdamW" not in cases:
            raise UserError(f"{args.to}: AdamW's rate comes from the runs of `python -m study.experiments lambda-grid`")
        if not lacking:
            return print(f"all of its {sum(map(len, cases.values()))} runs are in {args.to}")
        command = experiments.command_of("--loss fpa", SEEDS, args.out, args.jobs)
        try:
            changed.train_all(command, {f"fpa-{identity(settings)}": settings for settings in lacking}, train_one)
        finally:  # after an error too
            gather(args.out, args.to, {"scale": [run for some in cases.values() for run in some]})


def listing(folder):
    """How many of its runs a folder of tables holds."""
    runs = held(folder)
    cases = members(runs)
    return "\n".join(f"{case:16}{sum(run in runs for run in some):>3} of {len(some)}" for case, some in cases.items())


def run(argv=None):
    """The command: list, or train and gather."""
    run_names(argv, "python -m study.scale", __doc__.splitlines()[0], "parts", {"all": run_scale}, run_scale, listing)


if __name__ == "__main__":
    run()
