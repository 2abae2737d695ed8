"""The tables of results/: what they hold, and the way of finished runs into them. And the command that runs what they lack.

runs.csv has a row a run with its settings, and names its experiments. curves.csv has the rows of all runs, each with its run's
id. The tables of study/diagnostics.py have those of runs with `--diagnostics`, and tokens.csv those of seed 0 alone.
study/results.py reads them.
"""

import json
import shutil
from pathlib import Path

from plumbing.files import digest, locked, printable_path, replacing, write_csv
from plumbing.flags import RUNS_AT_ONCE, check_folder, command, command_line, natural, nearest
from study.results import METHOD, RENAMED, TABLES, by, read_runs, read_table, read_tables, run_folders, table_rows

BASES = Path(__file__).resolve().parents[1] / "results/bases"  # base models of `habit`, of all seeds but the pilot's


def identity(config):
    """A run's id: the digest of its settings, which also ends the name of its folder."""
    return digest({name: value for name, value in config.items() if name not in ("measured", "environment")})


def held(folder):
    """{id: Run} of a folder of tables."""
    return {run.folder.name: run for run in read_tables(folder)} if (folder / "runs.csv").exists() else {}


# --- gathering


def cell(value):
    """A setting as a cell's text: JSON, and a string bare where it cannot be taken for JSON."""
    if isinstance(value, str) and value.isprintable():
        try:
            json.loads(value)
        except ValueError:
            return value or '""'
    return json.dumps(value, ensure_ascii=False)


def flat(settings, prefix=""):
    """A dict in dicts as {column of runs.csv: cell}, names joined by dots. A setting of no value gets none."""
    cells = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            cells |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            cells[RENAMED.get(prefix + name, prefix + name)] = cell(value)
    return cells


def filled(rows, order=lambda name: 0):
    """Rows of text, each with all columns that some row has; a cell is empty where its row has none. `order` sorts columns."""
    names = sorted(dict.fromkeys(name for row in rows for name in row), key=order)
    return [{name: row.get(name, "") for name in names} for row in rows]


def place(name):
    """Of a column of runs.csv: settings, then the method, then what was measured and on what machine."""
    if name in METHOD:
        return METHOD.index(name)
    return len(METHOD) if name.split(".")[0] in ("measured", "environment", "machine") else -1


def gather(runs_folder, folder, experiments):
    """Append the finished runs of a folder of train.py's to the tables of another one; the number of new runs.

    Only runs of an experiment are taken: {name: ids}. A run that the tables hold stays as it is, but for diagnostics that it
    lacks. Tokens are taken of seed 0 alone: the table would be too large. runs.csv is written last, so that a run counts once
    its other rows are there.
    """
    names = by([(run, name) for name, ids in experiments.items() for run in ids], lambda pair: pair[0])
    finished = {identity(run.config): run for run in read_runs(run_folders(runs_folder))}
    finished = {run: finished[run] for run in names if run in finished}
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "runs.lock", folder, wait=True):
        tables = {name: read_table(folder / f"{name}.csv") for name in ("curves", *TABLES)}  # refused before any is written
        rows = {row["id"]: row for row in table_rows(folder / "runs.csv")}
        new = {run: made for run, made in finished.items() if run not in rows}
        for table, before in tables.items():
            known, added = rows.keys() & before.keys(), {}
            for run, made in finished.items():
                source = made.folder / ("log.csv" if table == "curves" else f"{table}.csv")
                if run not in known and source.exists() and (table != "tokens" or made.config["seed"] == 0):
                    added[run] = table_rows(source)
            if added:  # rows of such an id, of a gathering that was cut off, are replaced
                some = {**before, **added}.items()
                write_csv(folder / f"{table}.csv", filled([{"id": run, **row} for run, own in some for row in own]))
        rows |= {run: {"id": run, "experiments": "", **flat(made.config)} for run, made in new.items()}
        for run, row in rows.items():
            others = [name for name in row["experiments"].split() if name not in experiments]
            row["experiments"] = " ".join([*others, *(name for _, name in names.get(run, ()))])
        ordered = filled(rows.values(), place)
        if ordered != table_rows(folder / "runs.csv"):
            write_csv(folder / "runs.csv", ordered)
    return len(new)


# --- stored stages


def copy_stages(source, out):
    """Put the files of a folder of stages where train.py looks for them, below `out`, but for those that are there.

    With BASES every machine begins from the same base models. Trained anew, they would differ by rounding.
    """
    (out / "cache").mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if not (out / "cache" / path.name).exists():
            with replacing(out / "cache" / path.name) as temporary:
                shutil.copyfile(path, temporary)


# --- the command


def run_names(argv, program, description, what, known, run_one, listing, to="results", at_once=RUNS_AT_ONCE):
    """The command of experiments, tune, scale and real: it runs what is named, or lists it. A wrong name is one line.

    run_one(name, args) runs one, and listing(folder) is the text of the list; args holds out, to and jobs.
    """
    parser = command_line(description, prog=program)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{what} to run: {', '.join(known)}; without a name, list them")
    add("--out", default="runs", type=printable_path, metavar="FOLDER", help="folder that the runs are trained in")
    add("--to", default=to, type=printable_path, metavar="FOLDER", help="folder of the tables that hold the runs")
    add("--jobs", default=0, type=natural, metavar="N", help=at_once)
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in known:
            split = f"; write {' '.join(name.replace(',', ' ').split())}" if "," in name else ""
            parser.error(f"{name!r} is none of the {what}{split or nearest(name, known) or ': ' + ', '.join(known)}")
    check_folder(parser, "--out", args.out)
    check_folder(parser, "--to", args.to)
    kept = "finished runs, and checkpoints of the others, are kept; the same command goes on from there"
    with command(program, kept, args.out):
        for name in args.names:
            run_one(name, args)
        if not args.names:
            print(listing(args.to))
