"""Files of data sets as JSON lines: JSON lines themselves, a JSON array, gzip of either, parquet.

The first bytes say what a file is, its name does not. Left out: other formats; a refusal says how to convert the usual ones.
"""

import codecs
import gzip
import json
import shlex
import zlib
from importlib.util import find_spec

from plumbing.files import UserError

REFUSED = {  # first bytes: the format, the command that makes a file that is read
    codecs.BOM_UTF16_LE: ("UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > {path}.jsonl"),
    codecs.BOM_UTF16_BE: ("UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > {path}.jsonl"),
    b"PK\x03\x04": ("a zip archive", "unzip {path}"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d {path} -o {path}.jsonl"),
    b"BZh": ("bzip2", "bzip2 -dc {path} > {path}.jsonl"),
    b"\xfd7zXZ": ("xz", "xz -dc {path} > {path}.jsonl"),
}
PARQUET, GZIP = b"PAR1", b"\x1f\x8b"


def json_lines(path):
    """The rows of a file, each as the bytes of a JSON line. Raises UserError where the file is of no format that is read."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, (kind, command) in REFUSED.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {kind} is not read; convert it: {command.format(path=shlex.quote(str(path)))}")
    if start.startswith(PARQUET):
        return parquet_lines(path)
    return text_lines(path, gzip.open if start.startswith(GZIP) else open)


def text_lines(path, opener):
    """Lines as they are, or where the text is a JSON array, its items."""
    try:
        with opener(path, "rb") as file:
            starts = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
            is_array = next(filter(None, starts), b"").startswith(b"[")
            file.seek(0)
            if is_array:
                try:
                    yield from (json.dumps(item).encode() for item in json.loads(file.read()))
                    return
                except (ValueError, RecursionError):  # not an array: each of its lines says why
                    file.seek(0)
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from None


def parquet_lines(path):
    """A table's rows. Raises UserError where it is damaged, or nothing here reads it."""
    if find_spec("pyarrow") is None:
        code = f"import datasets; datasets.Dataset.from_parquet({str(path)!r}).to_json({str(path) + '.jsonl'!r})"
        command = f"python -c {shlex.quote(code)}"
        raise UserError(f"{path}: parquet is read where datasets is: pip install datasets; or convert it: {command}")
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                yield from (json.dumps(without_nulls(row), default=str).encode() for row in batch.to_pylist())
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file: {error}") from None


def without_nulls(value):
    """A value without the fields that are null: a table has every field in every row."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
