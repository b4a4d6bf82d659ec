"""How files with rows are read: jsonl, json, csv, tsv and parquet, told apart by suffix.

Readers go on after a bad line: they yield the row, or what is wrong with it, and the origin `path:line`. Training
stops at the first problem (`read_files`), a check wants to see them all (`scan_file`).
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peml.errors import PemlError

Row = dict[str, Any]
Rows = Sequence[tuple[Row, str]]
LONGEST_FIELD = 2**31 - 1
"""Characters of one value of a table; more does not fit into C's `long` everywhere."""

Item = tuple[Row | PemlError, str]
"""A row or what is wrong with it, and where it is: `path:line`, or the path alone."""


def read_file(path: Path) -> Rows:
    """All rows of a file with their origins; the first bad line stops with an error that names it."""
    return read_files([path])


def read_files(paths: Iterable[Path]) -> Rows:
    """All rows of several files, one after the other; the first bad line stops with an error that names it."""
    return list(each_row(paths))


def each_row(paths: Iterable[Path]) -> Iterator[tuple[Row, str]]:
    """The rows of several files one by one; the first bad line stops with an error that names it."""
    return ((_good(row), origin) for path in paths for row, origin in scan_file(path))


def _good(row: Row | PemlError) -> Row:
    if isinstance(row, PemlError):
        raise row
    return row


def scan_file(path: Path) -> Iterator[Item]:
    """Every row of a file and every problem, in the order of the file; nothing is raised."""
    if path.is_dir():
        yield PemlError(f"{path} is a folder; name a file in it"), str(path)
    elif not path.is_file():
        yield PemlError(f"{path} does not exist; {_near_misses(path)}"), str(path)
    elif (reader := READERS.get(path.suffix.lower())) is None:
        readable = ", ".join(READERS)
        yield PemlError(f"{path} has the suffix {path.suffix!r}, but rows are read from {readable}"), str(path)
    else:
        empty = True
        for item in reader(path):
            empty = False
            yield item
        if empty:
            yield PemlError(f"{path} is empty; it must have at least one row"), str(path)


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder; none if it is laid out in another way.

    `train.jsonl`; or the shards `train-00000-of-00002.parquet`, also in `data/`; or every file in `train/`. `dev` and
    `val` stand for `validation` too.

    Raises:
        PemlError: a shard is missing.
    """
    names = ("validation", "dev", "val") if split == "validation" else (split,)
    single = [folder / f"{name}{suffix}" for name in names for suffix in READERS]
    if found := next((file for file in single if file.is_file()), None):
        return [found]
    for place in (folder, folder / "data"):
        for name in names:
            if shards := _shards(place, name):
                return shards
    for name in names:
        if inside := _readable(folder / name):
            return inside
    return []


def _shards(folder: Path, name: str) -> list[Path]:
    pattern = re.compile(re.escape(name) + r"-(\d+)-of-(\d+)")
    matches = [(file, found) for file in _readable(folder) if (found := pattern.fullmatch(file.stem))]
    if matches:
        numbers, total = {int(found[1]) for _, found in matches}, int(matches[0][1][2])
        lost = sorted(set(range(total)) - numbers)
        if lost or len(matches) != total or len({found[2] for _, found in matches}) > 1:
            what = f"that of number {lost[0]:05} is missing" if lost else "some are there twice"
            raise PemlError(f"{folder}: the shards {name}-*-of-{total:05} are not complete: {what}")
    return [file for file, _ in matches]


def _readable(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS and file.is_file())


def _near_misses(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(entry.name for entry in path.parent.iterdir())
    if close := get_close_matches(path.name, names, n=3):
        return f"did you mean {' or '.join(close)}?"
    readable = [name for name in names if Path(name).suffix.lower() in READERS]
    return f"its folder has {', '.join(readable[:10])}" if readable else "its folder has no file with rows"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file with their numbers; one that is not UTF-8 stops with an error that names it."""
    for number, line in _decoded(path):
        if isinstance(line, PemlError):
            raise line
        yield number, line


def _decoded(path: Path) -> Iterator[tuple[int, str | PemlError]]:
    r"""Lines with their numbers; only "\n" ends a line, for texts contain the other separators of Unicode."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = f"{path}:{number}: byte {error.start + 1} of the line"
                yield number, PemlError(f"{at} is not UTF-8; save it as UTF-8")


def _read_jsonl(path: Path) -> Iterator[Item]:
    blank: list[int] = []
    for number, line in _decoded(path):
        origin = f"{path}:{number}"
        if isinstance(line, str) and not line.strip():
            blank.append(number)
            continue
        for lost in blank:
            problem = f"{path}:{lost}: the line is blank; remove it, only the end of the file may be blank"
            yield PemlError(problem), f"{path}:{lost}"
        blank = []
        yield (line if isinstance(line, PemlError) else _parsed(line, origin)), origin


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a field that is there twice is refused, where JSON would forget the first without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return row


def _parsed(line: str, origin: str) -> Row | PemlError:
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith("\n") else "; the file ends here, so it may be cut off"
        return PemlError(f"{origin}: the line is not valid JSON ({error}){cut}")
    return _object(row, origin)


def _read_json(path: Path) -> Iterator[Item]:
    decoded = list(_decoded(path))
    broken = [(line, f"{path}:{number}") for number, line in decoded if isinstance(line, PemlError)]
    yield from broken
    text = "".join(line for _, line in decoded if isinstance(line, str))
    if broken or not text.strip():
        return
    try:
        rows = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        origin = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        lines = "; for one object per line use the suffix .jsonl" if "Extra data" in str(error) else ""
        yield PemlError(f"{origin}: the file is not valid JSON ({error}){lines}"), origin
        return
    if not isinstance(rows, list):
        message = "the file must be a list of objects; for one object per line use the suffix .jsonl"
        yield PemlError(f"{path}: {message}"), str(path)
        return
    for number, row in enumerate(rows, 1):
        yield _object(row, f"{path}:{number}"), f"{path}:{number}"


def _object(row: Any, origin: str) -> Row | PemlError:
    if isinstance(row, dict):
        return row
    return PemlError(f"{origin}: the row must be a JSON object with named fields, not {json.dumps(row)[:40]}")


class _Tape:
    """Lines of a file for `csv`, which can be wound back to the second line of the row that is being read."""

    def __init__(self, path: Path) -> None:
        self.lines = _decoded(path)
        self.row: list[tuple[int, str | PemlError]] = []
        self.again: list[tuple[int, str | PemlError]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = self.again.pop() if self.again else next(self.lines)
        self.row.append((number, line))
        return line if isinstance(line, str) else ""

    def begin(self) -> None:
        self.row = []

    def back(self) -> None:
        self.again += reversed(self.row[1:])
        self.row = []

    def problem(self) -> tuple[PemlError, int] | None:
        return next(((line, number) for number, line in self.row if isinstance(line, PemlError)), None)


def _read_table(path: Path, **dialect: Any) -> Iterator[Item]:
    # The module's own limit, 131,072 characters, is for all readers of the process; documents are longer.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    tape = _Tape(path)
    header: list[str] = []
    reader = csv.reader(tape, strict=True, **dialect)
    while True:
        tape.begin()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quoted value may span lines: a row is named after its first, and reading goes on at its second.
            origin = f"{path}:{tape.row[0][0]}"
            tape.back()
            reader = csv.reader(tape, strict=True, **dialect)
            yield PemlError(f"{origin}: the row cannot be read ({error})"), origin
            if not header:
                return
            continue
        origin = f"{path}:{tape.row[0][0]}"
        if (undecoded := tape.problem()) is not None:
            yield undecoded[0], f"{path}:{undecoded[1]}"
            if not header:
                return
        elif not values:
            continue
        elif not header:
            header = values
            if not all(header) or len(set(header)) < len(header):
                message = "the first line must name every column, each by a name of its own"
                yield PemlError(f"{origin}: {message}"), origin
                return
        elif len(values) != len(header):
            message = f"the row has {len(values)} values, but the header has {len(header)}"
            yield PemlError(f"{origin}: {message}"), origin
        else:
            yield dict(zip(header, values, strict=True)), origin


def _read_csv(path: Path) -> Iterator[Item]:
    return _read_table(path)


def _read_tsv(path: Path) -> Iterator[Item]:
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: Path) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}:{number}"
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        yield PemlError(f"{path} is not a parquet file{after} ({str(error).split(chr(10))[0]})"), str(path)


READERS: Mapping[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
