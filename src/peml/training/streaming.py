"""Tasks whose rows are read as they are needed, because they are too many to be held.

A row of such a task has a number, counted over endless passes, in place of an index. Which numbers a batch has is
planned by the sampler as for any other rows, so a stream is mixed, resumed and shared by workers and processes like
them: who wants a later number reads over those before it, and encodes only its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.mixing import Integers, Mixing, MixtureSampler
from peml.tasks import Encoded, Example, Task
from peml.tasks.files import Row
from peml.training.data import ENCODE, Encode, TaskRows
from peml.training.workbench import SAMPLE, Workbench

_PLACES = 1 << 40


class Stream:
    """The training rows of a task, one after the other, pass after pass.

    Args:
        task: whose source is streamed.
        encode: makes a training row of an example.
    """

    def __init__(self, task: Task, encode: Callable[[Example], Encoded]) -> None:
        self.task, self.encode = task, encode
        self._restart()

    def _restart(self) -> None:
        self._rows: Iterator[tuple[Row, str]] | None = None
        self._number, self._done, self._in_pass = -1, 0, 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: a worker opens its own."""
        return {"task": self.task, "encode": self.encode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._restart()

    def __getitem__(self, place: int) -> Encoded:
        """Row number `place`; cheap if it lies ahead of the last one, and near.

        Raises:
            PemlError: a bad row; or there are none.
        """
        if place < self._done:
            self._restart()
        while True:
            found = None if self._rows is None else next(self._rows, None)
            if found is None:
                if self._rows is not None and not self._in_pass:
                    raise PemlError(f"task {self.task.name!r} has no training rows: give it some or leave it out")
                self._number, self._in_pass = self._number + 1, 0
                self._rows = self.task.source.stream("train", number=self._number)
                continue
            self._done += 1
            self._in_pass += 1
            if self._done > place:
                return self.encode(self.task.example(*found, "train"))


class StreamedRows(TaskRows):
    """Training rows of which some tasks' are streamed.

    Args:
        held: the rows of the other tasks.
        streams: by task.
    """

    def __init__(self, held: TaskRows, streams: Mapping[str, Stream]) -> None:
        self.__dict__ |= held.__dict__
        self.streams = {self.task_names.index(name): stream for name, stream in streams.items()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        task, place = divmod(index, _PLACES)
        return self._item(self.streams[task - 1][place], task - 1) if task else super().__getitem__(index)

    def digest(self) -> str:
        """Of the rows that are held, and the first of every stream."""
        whole = hashlib.sha256(super().digest().encode())
        for task, stream in self.streams.items():
            fresh = Stream(stream.task, stream.encode)
            rows = islice(stream.task.source.stream("train"), SAMPLE // 10)
            whole.update(repr([(task, row.input_ids) for row in (fresh[i] for i, _ in enumerate(rows))]).encode())
        return whole.hexdigest()

    def sampler(self, mixing: Mixing, seed: int, batch_size: int, samples: int) -> StreamSampler:
        """Which rows are drawn in a training of so many."""
        return StreamSampler(self.row_tasks, sorted(self.streams), mixing, seed, batch_size, samples, self.task_names)


class StreamSampler(MixtureSampler):
    """`MixtureSampler` where the rows of some tasks are numbers in a stream; one epoch is the whole training.

    Args:
        row_tasks: tasks of the rows that are held.
        streamed: tasks of the others.
        mixing, seed, batch_size, num_samples, task_names: as there.

    Raises:
        PemlError: the mixing asks how many rows a stream has.
    """

    def __init__(
        self,
        row_tasks: Sequence[int],
        streamed: Sequence[int],
        mixing: Mixing,
        seed: int,
        batch_size: int,
        num_samples: int,
        task_names: Sequence[str],
    ) -> None:
        if mixing.by in ("proportional", "temperature") or mixing.epochs is not None:
            what = "epochs" if mixing.epochs is not None else f"by: {mixing.by}"
            raise PemlError(
                f"mixing.{what} asks how many rows task {task_names[streamed[0]]!r} has, which is streamed: use by: "
                "equal, weights, fixed_ratio or subset, without epochs"
            )
        super().__init__([*row_tasks, *streamed], mixing, seed, batch_size, num_samples, task_names)
        self.streamed = set(streamed)
        self.present = sorted({*row_tasks, *streamed})

    def _stream(self, task: int, start: int, count: int) -> Integers:
        if self.present[task] not in self.streamed:
            return super()._stream(task, start, count)
        return np.arange(start, start + count) + (self.present[task] + 1) * _PLACES


def training_rows(bench: Workbench) -> TaskRows:
    """The rows that a recipe trains on, encoded as far as they are held.

    Raises:
        PemlError: a bad row, or a task without any.
    """
    encode, length = ENCODE[bench.form], bench.max_length
    streamed = {name: task for name, task in bench.tasks.items() if task.source.streaming and name in bench.train}
    held = {name: rows for name, rows in bench.train.items() if name not in streamed}
    rows = TaskRows.encode(bench.tokenizer, held, length, bench.form, list(bench.tasks))
    if not streamed:
        return rows

    one = partial(_one, encode, bench.tokenizer, length)
    return StreamedRows(rows, {name: Stream(task, one) for name, task in streamed.items()})


def _one(encode: Encode, tokenizer: PreTrainedTokenizerBase, max_length: int, example: Example) -> Encoded:
    return encode(tokenizer, [example], max_length)[0]
