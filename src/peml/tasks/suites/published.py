"""Where the rows of a suite's task are published, as data: the Hub's data set and layouts of local folders.

Rows come out with the Hub's field names, whichever form they are read from, so that one template serves all.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from peml.errors import PemlError
from peml.tasks.files import Row, Rows, _lines, read_file
from peml.tasks.source import HubSource, Source, Split

Expand = Callable[[Row], list[Row]]

PART = "part"
"""Field that names the part of the evaluation rows that a row belongs to, where there are several."""


@dataclass(frozen=True)
class Layout:
    """Files of one published form of a task, by their paths in a local folder; a path may be a pattern.

    Attributes:
        train, eval, shots: candidates for the rows of each use; the first that exists is read, of a pattern every
            file that it matches.
        parts: name of a part of the evaluation -> its candidates; instead of `eval`.
        columns: what the columns are called in a table without a header.
        fields: field of the Hub -> what it is called here.
        expand: makes the Hub's rows of one row here.
        ragged: rows of a table with too few or too many values are left out, as its publishers do.
        answers: field that the lines of a second file hold, which lies beside the first: its name has `-labels.lst`
            in place of the suffix.
    """

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    shots: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    expand: Expand | None = None
    ragged: bool = False
    answers: str | None = None

    def wanted(self, use: str) -> dict[str, tuple[str, ...]]:
        """Candidates for `train`, `eval` or `shots` by part; "" is the name of the only part."""
        if use == "eval" and self.parts:
            return dict(self.parts)
        candidates: tuple[str, ...] = getattr(self, use)
        return {"": candidates} if candidates else {}

    def found(self, folder: Path, use: str) -> dict[str, list[Path]]:
        """The files that are there, by part."""
        there = {part: _existing(folder, names) for part, names in self.wanted(use).items()}
        return {part: files for part, files in there.items() if files}

    def read(self, files: Iterable[Path]) -> Rows:
        """Rows of files under the Hub's field names."""
        return [row for file in files for row in self._read(file)]

    def _read(self, file: Path) -> Iterator[tuple[Row, str]]:
        bare = bool(self.columns) and file.suffix.lower() in _DIALECTS
        rows = _table(file, self.columns, self.ragged) if bare or self.ragged else read_file(file)
        if self.answers:
            rows = _answered(file, rows, self.answers)
        return _expanded(((self._renamed(row), origin) for row, origin in rows), self.expand)

    def _renamed(self, row: Row) -> Row:
        here = {name: row[name] for name in row if name not in self.fields.values()}
        return here | {name: row[old] for name, old in self.fields.items() if old in row}


@dataclass(frozen=True)
class Published:
    """Where a task's rows are.

    Attributes:
        hub: Hub id; None: the form is published as files only.
        config: configuration of the Hub's data set.
        train: its training split.
        eval: its evaluation splits, by part; "" is the name of the only part.
        revision: of the Hub's data set.
        expand: makes the rows of a task of one row of the Hub.
        layouts: local forms, the most official first.
        shots: split with the rows that examples in a prompt are taken from.
    """

    hub: str | None
    config: str | None = None
    train: str = "train"
    eval: Mapping[str, str] = field(default_factory=lambda: {"": "validation"})
    revision: str | None = None
    expand: Expand | None = None
    layouts: tuple[Layout, ...] = ()
    shots: str | None = None

    def splits(self, use: str) -> dict[str, str]:
        """Splits of the Hub for `train`, `eval` or `shots`, by part."""
        if use == "eval":
            return dict(self.eval)
        name: str | None = getattr(self, use)
        return {} if name is None else {"": name}

    def every_layout(self) -> tuple[Layout, ...]:
        """The layouts, and behind them a copy of the Hub's own files in a folder named as its configuration."""
        if self.hub is None:
            return self.layouts
        folder = self.config or self.hub.rpartition("/")[2]

        def copied(split: str) -> tuple[str, ...]:
            places = (f"{folder}/{split}", f"{folder}/data/{split}")
            return tuple(place + rest for rest in ("-*.parquet", ".jsonl", ".csv") for place in places)

        parts = {part: copied(split) for part, split in self.eval.items()}
        single = "" in parts
        copy = Layout(
            train=copied(self.train),
            eval=parts[""] if single else (),
            parts={} if single else parts,
            shots=copied(self.shots) if self.shots else (),
            expand=self.expand,
        )
        return (*self.layouts, copy)


@dataclass(frozen=True, kw_only=True)
class SuiteSource(Source):
    """Rows of a suite's task, from the Hub or from a local folder.

    Attributes:
        task: name of the task in its suite.
        published: where its rows are.
        path: local folder to read instead of the Hub.
    """

    task: str
    published: Published
    path: str | None = None

    def __str__(self) -> str:
        """Hub id and configuration, or the task and its folder."""
        if self.path is not None:
            return f"{self.task} in {self.path}"
        hub = self.published.hub or f"{self.task} (local files only)"
        return f"{hub}/{self.published.config}" if self.published.config else hub

    @property
    def has_eval(self) -> bool:
        """Always true: suites come with evaluation rows."""
        return True

    def load(self, split: Split) -> Rows:
        """All rows of a split; origins are `file:line`, or `data set/split:row`."""
        return self.read(split)

    def shots(self, count: int) -> Rows:
        """The first rows that are published for this, or drawn training rows where none are."""
        if self.published.shots is None:
            return super().shots(count)
        rows = self.read("shots")
        if len(rows) < count:
            raise PemlError(f"{self}: `few_shot` must be at most {len(rows)}, the examples there are, not {count}")
        return [rows[number] for number in range(count)]

    def read(self, use: str) -> Rows:
        """All rows for `train`, `eval` or `shots`."""
        if self.path is None:
            return self._from_hub(use)
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise PemlError(f"task {self.task!r}: `path` {self.path} is not a folder; give the suite's data folder")
        for layout in self.published.every_layout():
            files = layout.found(folder, use)
            if files:
                return _joined({part: layout.read(found) for part, found in files.items()})
        looked = [
            name for layout in self.published.every_layout() for names in layout.wanted(use).values() for name in names
        ]
        raise PemlError(
            f"task {self.task!r}: no file with {use} rows in {self.path}; looked for {', '.join(dict.fromkeys(looked))}"
        )

    def _from_hub(self, use: str) -> Rows:
        where = self.published
        if where.hub is None:
            raise PemlError(f"task {self.task!r} is published as files only: give their folder, `path: FOLDER`")
        found: dict[str, Rows] = {}
        for part, split in where.splits(use).items():
            source = HubSource(path=where.hub, name=where.config, train=split, revision=where.revision)
            rows = source.load("train")
            found[part] = list(_expanded(rows, where.expand)) if where.expand else rows
        return _joined(found)


def placed(source: Source, path: str | None) -> Source:
    """The source on a local folder; other sources than those of published suites have no folder."""
    if path is None:
        return source
    if not isinstance(source, SuiteSource):
        raise PemlError(f"{source} is made up on the spot and reads no files: leave out `path`")
    return replace(source, path=path)


def _joined(parts: Mapping[str, Rows]) -> Rows:
    if list(parts) == [""]:
        return parts[""]
    return [(row | {PART: part}, origin) for part, rows in parts.items() for row, origin in rows]


def _expanded(rows: Iterable[tuple[Row, str]], expand: Expand | None) -> Iterator[tuple[Row, str]]:
    for row, origin in rows:
        if expand is None:
            yield row, origin
            continue
        try:
            made = expand(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise PemlError(f"{origin}: the row is not as it is published ({type(error).__name__}: {error})") from error
        yield from ((one, origin) for one in made)


def _existing(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files of the first name that there are any of."""
    for name in names:
        if files := sorted(folder.glob(name)) if "*" in name else [folder / name] * (folder / name).is_file():
            return files
    return []


_DIALECTS: Mapping[str, Mapping[str, object]] = {
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
    ".csv": {},
}


def _table(path: Path, columns: tuple[str, ...], ragged: bool) -> Rows:
    """Rows of a table; without `columns` its first line names them."""
    dialect = _DIALECTS[path.suffix.lower()]
    reader = csv.reader((line for _, line in _lines(path)), strict=True, **dialect)  # type: ignore[arg-type]
    rows: list[tuple[Row, str]] = []
    start = 1
    try:
        for values in reader:
            origin, start = f"{path}:{start}", reader.line_num + 1
            if not values:
                continue
            if not columns:
                columns = tuple(values)
            elif len(values) == len(columns):
                rows.append((dict(zip(columns, values, strict=True)), origin))
            elif not ragged:
                named = ", ".join(columns)
                raise PemlError(f"{origin}: the row has {len(values)} values, but should have {len(columns)}: {named}")
    except csv.Error as error:
        raise PemlError(f"{path}:{start}: the row cannot be read ({error})") from error
    if not rows:
        raise PemlError(f"{path} is empty; it must have at least one row")
    return rows


def _answered(file: Path, rows: Rows, field_name: str) -> Rows:
    answers = file.with_name(file.name.removesuffix(file.suffix) + "-labels.lst")
    if not answers.is_file():
        if all(field_name in row for row, _ in rows):
            return rows
        raise PemlError(f"{answers} does not exist; it must hold the answers to {file}, one per line")
    lines = [line.strip() for _, line in _lines(answers)]
    lines = lines[:-1] if lines and not lines[-1] else lines
    if len(lines) != len(rows):
        raise PemlError(f"{answers} has {len(lines)} answers, but {file} has {len(rows)} rows")
    return [(row | {field_name: line}, origin) for (row, origin), line in zip(rows, lines, strict=True)]
