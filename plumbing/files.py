"""Files that are whole or not there, caches with checksums, locks, and checked lines; the errors that a command shows.

A file is written under a temporary name, synced and renamed. A crash at any moment leaves the old file or the new one.
Left out: locks on Windows, which has no fcntl.
"""

import codecs
import contextlib
import csv
import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:
    fcntl = None

SHOWN = 10  # bad lines of a file that are named


class UserError(Exception):
    """Something the user can mend; shown as one line, exit code 2."""


class NonFiniteError(Exception):
    """The loss or the gradient is not finite; shown as one line, exit code 3."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, whose number is the argument; shown as one line, exit code 128 + number."""


def one_line(error, path):
    """An error as one line that names a path, the given one where it names none itself."""
    if isinstance(error, OSError) and not error.filename:
        return f"{path}: {error.strerror or error}"
    return " ".join(str(error).split()) or type(error).__name__


def raising(path, call, said=""):
    """What a call into a library returns. Raises UserError, whatever the library raises: some raise nothing narrower."""
    try:
        return call()
    except Exception as error:
        raise UserError(f"{path}: {said}{one_line(error, path)[:300]}") from None


def printable_path(text):
    """An argparse type: a path that fits into one line, `~` expanded (a shell leaves it in --out=~/x). Raises ValueError."""
    if not text.strip() or not text.isprintable():
        raise ValueError(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        raise ValueError(text) from None


# --- reading and writing


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write to, synced and renamed to `path` once it is whole. Raises UserError that names the path."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        if os.name != "nt":  # where a folder cannot be opened
            sync(path.parent)  # the rename too
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path):
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """A JSON file's object. Raises UserError that names the file."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from None


def write_csv(path, rows):
    """Rows, dicts of the same columns, with six digits of every float."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def write_tensors(path, tensors, metadata=None):
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def remove_leftovers(folder):
    """Remove the temporary files below a folder whose process is gone."""
    for path in folder.rglob("*.part"):
        pid = path.name.split(".")[-2]
        if fcntl and path.is_file() and pid.isdecimal():
            try:
                os.kill(int(pid), 0)  # no signal, only a look
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except (OSError, OverflowError):
                pass  # another user's, or no pid


def digest(settings, *paths):
    """8 hex digits of settings and of the files' contents: the key of whatever they determine."""
    contents = [json.dumps(settings, sort_keys=True).encode(), *(path.read_bytes() for path in paths)]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:8]


# --- caches: a file, and beside it a JSON file, written last, with a checksum of both


def checksum(path, facts=None):
    """SHA-256 of a file's content, and of what is known of it where that is given."""
    with open(path, "rb") as file:
        total = hashlib.file_digest(file, "sha256")
    total.update(b"" if facts is None else json.dumps(facts, sort_keys=True).encode())
    return total.hexdigest()


def write_beside(path, facts):
    """Say in the JSON file beside a file that it is whole, and what else is known of it."""
    write_json(path.with_suffix(".json"), {**facts, "sha256": checksum(path, facts)})


def read_beside(path):
    """What is known of a file, or None where it is not there or not whole. Raises UserError where either is edited."""
    beside = path.with_suffix(".json")
    if not (path.exists() and beside.exists()):
        return None
    facts = read_json(beside)
    if facts.pop("sha256", None) != checksum(path, facts):
        raise UserError(f"{path}: damaged or edited, its checksum is not that in {beside.name}; remove it to make it anew")
    return facts


# --- one process at a time


@contextlib.contextmanager
def locked(path, what, wait=False):
    """Hold a lock, which ends with the process, however that ends.

    Where another process holds it: wait for that one, and say so with its pid, or raise UserError that names it.
    """
    file = None
    while not (file and os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
        file = open(path, "a+")  # anew where the one who held it has just removed it
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                said = f"{what} is being worked on by process {file.read().strip()}"
                if not wait:
                    raise UserError(said) from None
                print(f"waiting: {said}")
                fcntl.flock(file, fcntl.LOCK_EX)
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


@contextlib.contextmanager
def locked_runs(out, names):
    """Hold the locks of runs below a folder. Raises UserError where another process holds one."""
    with contextlib.ExitStack() as locks:
        for name in names:
            locks.enter_context(locked(out / "cache" / f"{name}.lock", out / name))
        yield


# --- JSON from others


def lines_of(path):
    """A file's lines, one after another, as bytes."""
    with open(path, "rb") as file:
        yield from file


def read_lines(path, parse, skip_bad=False, say=print, lines=lines_of):
    """[parse(object)] of the lines of a file of JSON lines, blank ones left out; `lines` makes them of another file's path.

    Bad lines, not a JSON object or one that `parse` refuses by ValueError or UserError, are left out too where `skip_bad`; what
    is said of them is printed by `say` then, and raised as UserError otherwise: the first ten with their numbers, and how many
    there are.
    """
    parsed, bad = [], {}
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file")
        for number, line in enumerate(lines(path), start=1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    parsed.append(parse(parse_object(line)))
                except (ValueError, UserError) as error:
                    bad[number] = one_line(error, path)
                except RecursionError:
                    bad[number] = "nested too deep"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not parsed and not bad:
        raise UserError(f"{path}: empty")
    if bad:
        named = "; ".join(f"line {number}: {reason}" for number, reason in list(bad.items())[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        said = f"{path}: {len(bad)} of {len(bad) + len(parsed)} lines are bad: {named}{more}"
        if not skip_bad or not parsed:
            raise UserError(said)
        say(f"left out      {said}")
    return parsed


def parse_object(line):
    """Bytes -> JSON object. Raises ValueError that says why not."""
    try:
        value = json.loads(line.decode("utf-8-sig"))  # files that were joined have a byte order mark in the middle too
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def field(row, name, kind):
    """A field of a row. Raises ValueError where it is missing or not of a kind: str, bool, int."""
    if name not in row:
        raise ValueError(f"no {name}")
    if type(row[name]) is not kind:
        kinds = {str: "a text", bool: "true or false", int: "a whole number"}
        raise ValueError(f"{name} is {shown(row[name])}, not {kinds[kind]}")
    return row[name]


def shown(value):
    """A value for a message: JSON, one line, cut."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "…"
