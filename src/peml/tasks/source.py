"""Where the rows of a task come from: a file, a data set of the Hub or a local folder, or the toy suite.

A source yields `(row, origin)` pairs. Which rows it yields depends on nothing but its fields: the rows that
`limit_train`, `limit_eval` and `eval_fraction` pick are drawn with `seed` and are the same on every machine.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peml.errors import PemlError
from peml.tasks.files import Item, Row, Rows, each_row, read_file, read_files, scan_file, split_files

Split = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Rows for training and for evaluation.

    Attributes:
        limit_train: at most so many training rows: the rows are shuffled with `seed`, the first are taken and
            yielded in their original order. A smaller limit takes a subset of a larger one.
        limit_eval: the same for evaluation.
        eval_fraction: share of the training rows that is held out for evaluation, drawn with `seed`, where
            the source has no evaluation rows of its own (then 0.1 unless given).
        seed: seed of these draws.
        streaming: whether training rows are read as they are needed, because they are too many to be held.
        held_out: share (below 1) or number of the training rows that are measured on in place of the evaluation rows,
            which are then not read at all; drawn with `seed` from those that `limit_train` leaves.
    """

    limit_train: int | None = None
    limit_eval: int | None = None
    eval_fraction: float | None = None
    seed: int = 0
    streaming: bool = False
    held_out: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for key, limit in (("limit_train", self.limit_train), ("limit_eval", self.limit_eval)):
            if limit is not None and limit < 1:
                raise PemlError(f"{self}: `{key}` must be at least 1, not {limit}")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise PemlError(f"{self}: `eval_fraction` must lie between 0 and 1, not {self.eval_fraction}")
        if self.eval_fraction is not None and self.has_eval:
            raise PemlError(f"{self}: has evaluation rows of its own, so `eval_fraction` must be left out")
        if self.seed < 0:
            raise PemlError(f"{self}: `seed` must not be negative, but is {self.seed}")
        if self.held_out is not None and (self.held_out <= 0 or (self.held_out > 1 and self.held_out % 1)):
            raise PemlError(f"{self}: `held_out` must be a share below 1 or a number of rows, not {self.held_out}")
        if self.held_out is not None and self.streaming:
            raise PemlError(f"{self}: rows that are streamed cannot be held out: leave out `streaming` or `held_out`")

    @abstractmethod
    def __str__(self) -> str:
        """Short name of the source for messages."""

    @property
    @abstractmethod
    def has_eval(self) -> bool:
        """Whether evaluation rows exist apart from the training rows."""

    @property
    def apart(self) -> bool:
        """Whether the rows to evaluate on come from a place of their own, not from the training rows."""
        return self.has_eval and self.held_out is None

    @abstractmethod
    def load(self, split: Split) -> Rows:
        """Every row of a split that exists, in the order of the origin."""

    def scan(self, split: Split) -> Iterator[Item]:
        """What `load` reads, and in place of an error every problem of it; nothing is raised."""
        try:
            yield from self.load(split)
        except PemlError as error:
            yield error, str(self)

    def rows(self, split: Split) -> Iterator[tuple[Row, str]]:
        """The rows of a split with their origins, after hold-out and limit, in the order of the origin."""
        rows = self.load(split if self.apart else "train")
        chosen = self.chosen(len(rows), split)
        if len(chosen) == len(rows):
            yield from rows
        else:
            yield from (rows[int(index)] for index in chosen)

    def stream(self, split: Split, *, start: int = 0, number: int = 0, buffer: int = 1000) -> Iterator[tuple[Row, str]]:
        """One pass over the rows of a split, each read when it is asked for; training rows are shuffled in a buffer.

        A function of the arguments and `seed` alone, so a run can go on in the middle of a pass. A limit takes the
        first rows, because nobody knows how many there are.

        Args:
            split: which rows.
            start: how many of the pass are left out; they are read all the same.
            number: of the pass; each is shuffled otherwise.
            buffer: rows in memory. 1,000 is our choice, as in `datasets`.

        Raises:
            PemlError: a bad row, when it is reached; or there are no evaluation rows apart.
        """
        if not self.has_eval:
            raise PemlError(
                f"{self}: a stream cannot be split: give it evaluation rows of its own, and no `eval_fraction`"
            )
        rows: Iterator[tuple[Row, str]] = islice(
            self._each(split), self.limit_train if split == "train" else self.limit_eval
        )
        if split == "train":
            rows = _shuffled(rows, buffer, np.random.default_rng([self.seed, 3, number]))
        return islice(rows, start, None)

    def _each(self, split: Split) -> Iterator[tuple[Row, str]]:
        """Rows of a split one by one; sources that can, do not read them all first."""
        yield from self.load(split)

    def chosen(self, count: int, split: Split) -> np.ndarray:
        """Which of `count` rows of the origin make the split, after hold-out and limit."""
        # A row that is held out of the training rows is one of those that training would see.
        origin: Split = "train" if self.held_out is not None else split
        chosen = np.arange(count) if self.has_eval else self._held_out(count, origin)
        chosen = self._limited(chosen, self.limit_train if origin == "train" else self.limit_eval)
        if self.held_out is None:
            return chosen
        size = self.held_out if self.held_out >= 1 else max(1, round(len(chosen) * self.held_out))
        if size >= len(chosen):
            raise PemlError(f"{self}: `held_out` {self.held_out:g} leaves none of {len(chosen)} rows to train on")
        order = np.random.default_rng([self.seed, 4]).permutation(len(chosen))
        if split == "train":
            return np.sort(chosen[order[int(size) :]])
        return self._limited(np.sort(chosen[order[: int(size)]]), self.limit_eval)

    def _limited(self, chosen: np.ndarray, limit: int | None) -> np.ndarray:
        if limit is None or limit >= len(chosen):
            return chosen
        order = np.random.default_rng([self.seed, 1]).permutation(len(chosen))
        return np.sort(chosen[order[:limit]])

    def shots(self, count: int) -> Rows:
        """Rows for examples in a prompt: training rows drawn with `seed`, whatever the limits.

        Whoever asks leaves them out of what is trained and measured.
        """
        rows = list(replace(self, limit_train=None, held_out=None).rows("train"))
        if len(rows) <= count:
            raise PemlError(f"{self}: `few_shot` {count} leaves none of the {len(rows)} training rows to train on")
        order = np.random.default_rng([self.seed, 2]).permutation(len(rows))
        return [rows[int(index)] for index in order[:count]]

    def _held_out(self, count: int, split: Split) -> np.ndarray:
        if count < 2:
            raise PemlError(f"{self}: one row is too few to hold some out; give evaluation rows as well")
        fraction = 0.1 if self.eval_fraction is None else self.eval_fraction
        size = min(max(round(count * fraction), 1), count - 1)
        order = np.random.default_rng([self.seed, 0]).permutation(count)
        return np.sort(order[:size] if split == "eval" else order[size:])


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """Rows of the user's own files: jsonl, json (a list of objects), csv, tsv or parquet, by suffix.

    Values of csv and tsv are texts. In tsv, quotation marks are ordinary characters, as in the GLUE files.
    """

    train: str | Path
    eval: str | Path | None = None

    def __str__(self) -> str:
        """Path of the training file."""
        return str(self.train)

    @property
    def has_eval(self) -> bool:
        """Whether a second file was given."""
        return self.eval is not None

    def load(self, split: Split) -> Rows:
        """All rows of the split's file; origins are `path:line` (`path:row` for json and parquet)."""
        return read_file(self._path(split))

    def scan(self, split: Split) -> Iterator[Item]:
        """Every row and every problem of the split's file."""
        return scan_file(self._path(split))

    def _each(self, split: Split) -> Iterator[tuple[Row, str]]:
        return each_row([self._path(split)])

    def _path(self, split: Split) -> Path:
        return Path(self.train if split == "train" or self.eval is None else self.eval)


@dataclass(frozen=True, kw_only=True)
class HubSource(Source):
    """Rows of a data set of the Hub, or of a local folder used in its place.

    A local folder may hold one file per split (`train.jsonl`, `validation.csv`; `dev` and `val` also stand
    for `validation`), several (`train-00000-of-00002.parquet`, or a folder `train`), in a subfolder `name` if
    that is given, or anything else that `datasets.load_dataset` understands.
    """

    path: str
    name: str | None = None
    train: str = "train"
    eval: str | None = "validation"
    revision: str | None = None

    def __str__(self) -> str:
        """Hub id and configuration."""
        return f"{self.path}/{self.name}" if self.name else self.path

    @property
    def has_eval(self) -> bool:
        """Whether a split for evaluation was named."""
        return self.eval is not None

    def load(self, split: Split) -> Rows:
        """All rows of the split; origins are `path/split:row`, or `file:line` for a local file."""
        files = split_files(Path(self.path, self.name or ""), self._wanted(split))
        return read_files(files) if files else self._dataset_rows(split)

    def scan(self, split: Split) -> Iterator[Item]:
        """Every row and every problem of the split."""
        try:
            files = split_files(Path(self.path, self.name or ""), self._wanted(split))
            yield from (item for file in files for item in scan_file(file))
            if not files:
                yield from self._dataset_rows(split)
        except PemlError as error:
            yield error, str(self)

    def _each(self, split: Split) -> Iterator[tuple[Row, str]]:
        wanted = self._wanted(split)
        files = split_files(Path(self.path, self.name or ""), wanted)
        if files:
            return each_row(files)
        rows = self._dataset(wanted, streaming=True)
        return ((row, f"{self}/{wanted}:{number}") for number, row in enumerate(rows, 1))

    def _wanted(self, split: Split) -> str:
        return self.train if split == "train" or self.eval is None else self.eval

    def _dataset_rows(self, split: Split) -> Rows:
        return _HubRows(self._dataset(self._wanted(split)), f"{self}/{self._wanted(split)}")

    def _dataset(self, split: str, streaming: bool = False) -> Any:
        # Imported here because it takes seconds, which a run on the user's own files need not wait for.
        import datasets

        try:
            lazily = {"streaming": True} if streaming else {}
            return datasets.load_dataset(self.path, self.name, split=split, revision=self.revision, **lazily)
        except Exception as error:  # the Hub, the network and the builder of any data set may fail in any way
            reason = str(error).strip().split("\n")[0]
            raise PemlError(
                f"{self}: the split {split!r} could not be loaded ({type(error).__name__}: {reason}); "
                "give a Hub id, or a local folder with a file such as " + f"{split}.jsonl"
            ) from error


@dataclass(frozen=True, kw_only=True)
class ToySource(Source):
    """Rows that are made up on the spot, for demos and tests without data."""

    task: str
    train_rows: int = 2000
    eval_rows: int = 200

    def __str__(self) -> str:
        """Name of the task in the toy suite."""
        return f"toy/{self.task}"

    @property
    def has_eval(self) -> bool:
        """Always true: the two splits are generated apart."""
        return True

    def load(self, split: Split) -> Rows:
        """The generated rows; origins are `toy/task:row`."""
        from peml.tasks.toy import toy_rows

        try:
            if split == "train":
                made = toy_rows(self.task, "train", self.train_rows, self.seed)
            else:
                made = toy_rows(self.task, "test", self.eval_rows, self.seed)
        except ValueError as error:
            raise PemlError(f"{self}: {error}") from error
        return [(row, f"{self}:{number}") for number, row in enumerate(made, 1)]


def _shuffled(rows: Iterator[Any], buffer: int, random: np.random.Generator) -> Iterator[Any]:
    """Each row waits among `buffer` others until it is drawn."""
    held = list(islice(rows, buffer))
    for row in rows:
        drawn = int(random.integers(len(held)))
        held[drawn], row = row, held[drawn]
        yield row
    yield from (held[index] for index in random.permutation(len(held)))


class _HubRows(Sequence[tuple[Row, str]]):
    """A data set as a sequence of (row, origin) that reads rows only when asked."""

    def __init__(self, dataset: Any, origin: str) -> None:
        self.dataset, self.origin = dataset, origin

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index], f"{self.origin}:{index + 1}"

    def __iter__(self) -> Iterator[tuple[Row, str]]:
        # A data set reads ahead when it is iterated: several times faster than row by row.
        for number, row in enumerate(self.dataset, 1):
            yield row, f"{self.origin}:{number}"
