"""How files with rows are read: jsonl, json, csv, tsv and parquet, told apart by suffix.

A row comes with its origin, `path:line`, and a bad line stops the reading with an error that begins with it.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peml.errors import PemlError

Row = dict[str, Any]
Rows = Sequence[tuple[Row, str]]


def read_file(path: Path) -> Rows:
    """All rows of a file with their origins; the first bad line stops with an error that names it."""
    if path.is_dir():
        raise PemlError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        raise PemlError(f"{path} does not exist; {_near_misses(path)}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise PemlError(f"{path} has the suffix {path.suffix!r}, but rows are read from {', '.join(READERS)}")
    rows = list(reader(path))
    if not rows:
        raise PemlError(f"{path} is empty; it must have at least one row")
    return rows


def _near_misses(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(entry.name for entry in path.parent.iterdir())
    if close := get_close_matches(path.name, names, n=3):
        return f"did you mean {' or '.join(close)}?"
    readable = [name for name in names if Path(name).suffix.lower() in READERS]
    return f"its folder has {', '.join(readable[:10])}" if readable else "its folder has no file with rows"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Lines with their numbers; only "\n" ends a line, for texts contain the other separators of Unicode."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PemlError(
                    f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8; save it as UTF-8"
                ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[Row, str]]:
    blank = 0
    for number, line in _lines(path):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise PemlError(f"{path}:{blank}: the line is blank; remove it, only the end of the file may be blank")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PemlError(f"{path}:{number}: the line is not valid JSON ({error})") from error
        yield _object(row, f"{path}:{number}"), f"{path}:{number}"


def _read_json(path: Path) -> Iterator[tuple[Row, str]]:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise PemlError(f"{path}{line}: the file is not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise PemlError(f"{path}: the file must be a list of objects; for one object per line use the suffix .jsonl")
    for number, row in enumerate(rows, 1):
        yield _object(row, f"{path}:{number}"), f"{path}:{number}"


def _object(row: Any, origin: str) -> Row:
    if not isinstance(row, dict):
        raise PemlError(f"{origin}: the row must be a JSON object with named fields, not {json.dumps(row)[:40]}")
    return row


def _read_table(path: Path, **dialect: Any) -> Iterator[tuple[Row, str]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True, **dialect)
    header: list[str] = []
    start = 1  # a quoted value may span lines: a row is named after its first
    try:
        for values in reader:
            origin, start = f"{path}:{start}", reader.line_num + 1
            if not values:
                continue
            if not header:
                header = values
                if not all(header) or len(set(header)) < len(header):
                    raise PemlError(f"{origin}: the first line must name every column, each by a name of its own")
                continue
            if len(values) != len(header):
                raise PemlError(f"{origin}: the row has {len(values)} values, but the header has {len(header)}")
            yield dict(zip(header, values, strict=True)), origin
    except csv.Error as error:
        raise PemlError(f"{path}:{start}: the row cannot be read ({error})") from error


def _read_csv(path: Path) -> Iterator[tuple[Row, str]]:
    return _read_table(path)


def _read_tsv(path: Path) -> Iterator[tuple[Row, str]]:
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: Path) -> Iterator[tuple[Row, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise PemlError(f"{path} is not a parquet file ({str(error).split(chr(10))[0]})") from error
    for number, row in enumerate(rows, 1):
        yield row, f"{path}:{number}"


READERS: Mapping[str, Callable[[Path], Iterator[tuple[Row, str]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
