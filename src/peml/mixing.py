r"""How tasks share an epoch and a batch.

    p_t ~ min(n_t, cap)^(1/tau)        for n_t rows of task t

tau = 1 is `proportional`, tau = infinity is `equal`; tau = 2 is the default. `subset` draws k ~ U{2..T} tasks for every
batch, which share it equally (multitask prompt tuning, arXiv:2303.02861). The rows of an epoch are a
function of (seed, epoch) alone, never of what was drawn before, so a resumed run sees the rows that an
uninterrupted one sees.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from peml.errors import PemlError

By = Literal["proportional", "temperature", "equal", "subset"]
Batches = Literal["mixed", "homogeneous"]
Integers = NDArray[np.int64]

# What a random stream is for; part of its seed, so that no two streams are alike.
_SHARES, _ORDER, _ROWS, _SUBSETS = 0, 1, 2, 3


@dataclass(frozen=True)
class Mixing:
    """How often each task is drawn.

    Attributes:
        by: `proportional` to the number of rows, its root by `temperature`, `equal` for all tasks, or a `subset` of
            the tasks in every batch.
        temperature: tau, for `by="temperature"` only. 2 is our choice.
        cap: rows of a task beyond this number do not count.
        batches: `mixed`, or `homogeneous`: each batch of one task.
    """

    by: By = "temperature"
    temperature: float = 2.0
    cap: int | None = None
    batches: Batches = "mixed"

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for key, value, allowed in (
            ("by", self.by, get_args(By)),
            ("batches", self.batches, get_args(Batches)),
        ):
            if value not in allowed:
                raise PemlError(f"mixing: `{key}` must be one of {', '.join(allowed)}, not {value!r}")
        if not self.temperature > 0:
            raise PemlError(f"mixing: `temperature` must be above 0, not {self.temperature}")
        if self.by == "subset" and (self.batches != "mixed" or self.cap is not None):
            raise PemlError("mixing: `by: subset` draws the tasks of each batch: `batches` and `cap` do not go with it")
        if self.cap is not None and self.cap < 1:
            raise PemlError(f"mixing: `cap` must be at least 1, not {self.cap}")

    def task_probabilities(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Share of each task in an epoch, given the number of its rows."""
        for task, count in counts.items():
            if count < 1:
                raise PemlError(f"mixing: task {task!r} has no rows; give it some or leave it out")
        if not counts:
            raise PemlError("mixing: there is no task to draw from")
        shares = self._probabilities(np.array(list(counts.values())))
        return dict(zip(counts, shares.tolist(), strict=True))

    def _probabilities(self, counts: Integers) -> NDArray[np.float64]:
        exponent = {"proportional": 1.0, "temperature": 1 / self.temperature}.get(self.by, 0.0)
        capped = np.minimum(counts, self.cap or counts.max())
        # Divided by the largest first: a small temperature would otherwise overflow.
        weights = (capped / capped.max()) ** exponent
        return np.asarray(weights / weights.sum())


class MixtureSampler(Sampler[int]):
    """Indices of data set rows in the order of training, an epoch at a time.

    Each task gets its share of the epoch, up to a rounding that changes from epoch to epoch. Its rows come in
    shuffled passes, each row once before any comes twice, and the passes go on over the epochs.
    `proportional` without cap is thus a plain shuffled pass over all rows.

    Args:
        row_tasks: id of the task of each row of the data set.
        mixing: how often each task is drawn.
        seed: seed of all draws.
        batch_size: rows per batch; matters for homogeneous batches only.
        num_samples: rows per epoch; as many as the data set has by default. Homogeneous batches are always
            whole, so there it is rounded up to a multiple of `batch_size`; those of a subset of the tasks as well.
    """

    def __init__(
        self,
        row_tasks: Sequence[int],
        mixing: Mixing,
        seed: int,
        batch_size: int,
        num_samples: int | None = None,
    ) -> None:
        """Sort the rows by task; nothing is drawn yet."""
        if len(row_tasks) == 0:
            raise PemlError("mixing: there are no rows to draw from")
        samples = len(row_tasks) if num_samples is None else num_samples
        if seed < 0 or batch_size < 1 or samples < 1:
            raise PemlError(
                "mixing: the seed must be at least 0 and the rows per batch and per epoch at least 1, "
                f"but they are {seed}, {batch_size} and {samples}"
            )
        tasks = np.asarray(row_tasks)
        self.rows = [np.flatnonzero(tasks == task) for task in np.unique(tasks)]
        self.probabilities = mixing._probabilities(np.array([len(rows) for rows in self.rows]))
        self.seed = seed
        self.epoch = 0
        self.by_subset, self.batch_size = mixing.by == "subset", batch_size
        # The unit that is dealt out to the tasks: a row, or a batch of rows.
        self.block = batch_size if mixing.batches == "homogeneous" or self.by_subset else 1
        self.blocks = math.ceil(samples / self.block)

    def __len__(self) -> int:
        """Rows per epoch."""
        return self.blocks * self.block

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; without it, every iteration draws epoch 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Rows of the chosen epoch."""
        if self.by_subset:
            yield from self._of_subsets()
            return
        shares = self._shares(self.epoch) * self.block
        drawn_before = sum((self._shares(epoch) * self.block for epoch in range(self.epoch)), np.zeros_like(shares))
        by_task = np.concatenate(
            [self._stream(task, int(drawn_before[task]), int(share)) for task, share in enumerate(shares)]
        )
        order = self._generator(_ORDER, self.epoch).permutation(self.blocks)
        yield from by_task.reshape(self.blocks, self.block)[order].reshape(-1).tolist()

    def _of_subsets(self) -> Iterator[int]:
        drawn = sum((self._subsets(epoch).sum(0) for epoch in range(self.epoch)), np.zeros(len(self.rows), np.int64))
        plan = self._subsets(self.epoch)
        streams = [self._stream(t, int(drawn[t]), int(count)) for t, count in enumerate(plan.sum(0))]
        order, begun = self._generator(_ORDER, self.epoch), np.zeros(len(self.rows), np.int64)
        for counts in plan:
            batch = np.concatenate([streams[t][begun[t] : begun[t] + count] for t, count in enumerate(counts)])
            begun += counts
            yield from order.permutation(batch).tolist()

    def _subsets(self, epoch: int) -> Integers:
        """Rows of each task in each batch of an epoch, `[batches, T]`: k ~ U{2..T} tasks, as equally as can be."""
        random, tasks = self._generator(_SUBSETS, epoch), len(self.rows)
        plan = np.zeros((self.blocks, tasks), np.int64)
        for counts in plan:
            k = int(random.integers(min(2, tasks), tasks + 1))
            chosen = random.permutation(tasks)[:k]
            counts[chosen] = self.batch_size // k
            counts[chosen[: self.batch_size % k]] += 1
        return plan

    def _shares(self, epoch: int) -> Integers:
        """Blocks per task in an epoch, by systematic sampling: within one block of p_t, exact on average."""
        # Rounded, so that shares that are whole numbers stay so.
        borders = np.round(np.cumsum(self.probabilities) * self.blocks, 6)
        borders = np.floor(borders + self._generator(_SHARES, epoch).random())
        return np.diff(borders, prepend=0).astype(np.int64)

    def _stream(self, task: int, start: int, count: int) -> Integers:
        """Rows `start` to `start + count` of the task's endless row of shuffled passes."""
        rows = self.rows[task]
        first, last = start // len(rows), (start + count) // len(rows)
        passes = [
            rows[self._generator(_ROWS, task, number).permutation(len(rows))] for number in range(first, last + 1)
        ]
        begin = start - first * len(rows)
        return np.concatenate(passes)[begin : begin + count]

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose])
