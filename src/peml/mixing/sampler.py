"""The rows of an epoch in their order, as a function of (seed, epoch) alone."""

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from peml.errors import PemlError
from peml.mixing.rule import Mixing, limit_of

Integers = NDArray[np.int64]

# What a random stream is for; part of its seed, so that no two streams are alike.
_SHARES, _ORDER, _ROWS, _SUBSETS, HELD_OUT = 0, 1, 2, 3, 4


class MixtureSampler(Sampler[int]):
    """Indices of data set rows in the order of training, an epoch at a time.

    Each task gets its share of the epoch, up to a rounding that changes from epoch to epoch. Its rows come in
    shuffled passes, each row once before any comes twice, and the passes go on over the epochs.
    `proportional` without cap is thus a plain shuffled pass over all rows.

    Args:
        row_tasks: id of the task of each row of the data set.
        mixing: how often each task is drawn.
        seed: seed of all draws.
        batch_size: rows per batch; matters where batches are planned: homogeneous ones, fixed ratios and subsets.
        num_samples: rows per epoch; as many as the data set has by default, or an even part of all that limited
            tasks may give. Planned batches are always whole, so there it is rounded up to a multiple of `batch_size`.
        task_names: names of the ids, for a mixing that names tasks.
        without: rows that are never drawn.
    """

    def __init__(
        self,
        row_tasks: Sequence[int],
        mixing: Mixing,
        seed: int,
        batch_size: int,
        num_samples: int | None = None,
        task_names: Sequence[str] | None = None,
        without: Collection[int] = (),
    ) -> None:
        """Sort the rows by task; nothing is drawn yet."""
        if len(row_tasks) == 0:
            raise PemlError("mixing: there are no rows to draw from")
        samples = len(row_tasks) - len(without) if num_samples is None else num_samples
        if seed < 0 or batch_size < 1 or samples < 1:
            raise PemlError(
                "mixing: the seed must be at least 0 and the rows per batch and per epoch at least 1, "
                f"but they are {seed}, {batch_size} and {samples}"
            )
        tasks = np.asarray(row_tasks)
        kept = np.ones(len(tasks), bool)
        kept[list(without)] = False
        present = np.unique(tasks)
        names = [str(task) if task_names is None else task_names[task] for task in present]
        self.rows = [np.flatnonzero((tasks == task) & kept) for task in present]
        mixing.check(names if task_names is None else task_names)
        shares = mixing._among({name: len(rows) for name, rows in zip(names, self.rows, strict=True)})
        self.probabilities = np.array(list(shares.values()))
        self.seed = seed
        self.epoch = 0
        self.by, self.batch_size = mixing.by, batch_size
        # Each batch has a plan of its own, or units of a row or of a batch are dealt out to the tasks.
        self.planned = mixing.by in ("subset", "fixed_ratio")
        self.block = batch_size if mixing.batches == "homogeneous" or self.planned else 1
        # Blocks that each task gives in the whole training.
        self.limits = np.array(
            [
                math.inf if (most := limit_of(mixing.epochs, name)) is None else round(most * len(rows)) // self.block
                for name, rows in zip(names, self.rows, strict=True)
            ]
        )
        for name, limit in zip(names, self.limits.tolist(), strict=True):
            if limit < 1:
                unit = "row" if self.block == 1 else "batch"
                raise PemlError(f"mixing.epochs lets task {name!r} give less than a {unit}: allow more")
        self.blocks = math.ceil(samples / self.block)
        if num_samples is None and math.isfinite(total := float(self.limits.sum())):
            # Whole epochs of what the tasks may give, so that all of it can be drawn.
            self.blocks = int(total // math.ceil(total / self.blocks))
        self._dealt: list[Integers] = []

    def __len__(self) -> int:
        """Rows per epoch."""
        return self.blocks * self.block

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; without it, every iteration draws epoch 0."""
        self.epoch = epoch

    def check(self, samples: int) -> None:
        """Find now whether the tasks will have given all that they may before the training has come to its end.

        Raises:
            PemlError: they have.
        """
        most = self.limits.sum() * self.block
        needed = math.ceil(samples / len(self)) * len(self)
        if needed > most:
            raise PemlError(
                f"mixing.epochs lets the tasks give {most:.0f} rows in all, and the training draws {needed} (in epochs "
                f"of {len(self)}): train fewer steps, allow more epochs, or leave a task without a limit"
            )

    def __iter__(self) -> Iterator[int]:
        """Rows of the chosen epoch."""
        if self.planned:
            yield from self._by_plan()
            return
        shares = self._shares(self.epoch) * self.block
        drawn_before = sum((self._shares(epoch) * self.block for epoch in range(self.epoch)), np.zeros_like(shares))
        by_task = np.concatenate(
            [self._stream(task, int(drawn_before[task]), int(share)) for task, share in enumerate(shares)]
        )
        order = self._generator(_ORDER, self.epoch).permutation(self.blocks)
        yield from by_task.reshape(self.blocks, self.block)[order].reshape(-1).tolist()

    def _by_plan(self) -> Iterator[int]:
        drawn = sum((self._plan(epoch).sum(0) for epoch in range(self.epoch)), np.zeros(len(self.rows), np.int64))
        plan = self._plan(self.epoch)
        streams = [self._stream(t, int(drawn[t]), int(count)) for t, count in enumerate(plan.sum(0))]
        order, begun = self._generator(_ORDER, self.epoch), np.zeros(len(self.rows), np.int64)
        for counts in plan:
            batch = np.concatenate([streams[t][begun[t] : begun[t] + count] for t, count in enumerate(counts)])
            begun += counts
            yield from order.permutation(batch).tolist()

    def _plan(self, epoch: int) -> Integers:
        """Rows of each task in each batch of an epoch, `[batches, T]`."""
        return self._subsets(epoch) if self.by == "subset" else self._ratios(epoch)

    def _subsets(self, epoch: int) -> Integers:
        """K ~ U{2..T} tasks in each, as equally as can be."""
        random, tasks = self._generator(_SUBSETS, epoch), len(self.rows)
        plan = np.zeros((self.blocks, tasks), np.int64)
        for counts in plan:
            k = int(random.integers(min(2, tasks), tasks + 1))
            chosen = random.permutation(tasks)[:k]
            counts[chosen] = self.batch_size // k
            counts[chosen[: self.batch_size % k]] += 1
        return plan

    def _ratios(self, epoch: int) -> Integers:
        """p_t of every batch, within one row, and exact on average: one systematic sample per batch."""
        borders = np.round(np.cumsum(self.probabilities) * self.batch_size, 6)
        borders = np.floor(borders + self._generator(_SHARES, epoch).random((self.blocks, 1)))
        return np.diff(borders, prepend=0, axis=1).astype(np.int64)

    def _shares(self, epoch: int) -> Integers:
        """Blocks per task in an epoch: its share, or what a limit has left of it."""
        while len(self._dealt) <= epoch:
            left = self.limits - sum(self._dealt, np.zeros(len(self.rows)))
            number = len(self._dealt)
            dealt = self._sample(self.probabilities, self.blocks, number)
            # What some can no longer give goes to those that can, in the proportions that they have among themselves.
            while (over := dealt > left).any():
                excess = int((dealt - left)[over].sum())
                dealt[over] = left[over].astype(np.int64)
                open_shares = self.probabilities * (dealt < left)
                if not open_shares.any():
                    raise PemlError("mixing.epochs leaves no task that may give rows: train fewer steps")
                dealt += self._sample(open_shares / open_shares.sum(), excess, number)
            self._dealt.append(dealt)
        return self._dealt[epoch]

    def _sample(self, probabilities: NDArray[np.float64], blocks: int, epoch: int) -> Integers:
        """Systematic sampling: within one block of p_t, exact on average."""
        # Rounded, so that shares that are whole numbers stay so.
        borders = np.round(np.cumsum(probabilities) * blocks, 6)
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


class Onward(Sampler[int]):
    """The rows of a sampler behind those that were drawn of it before, in epochs as long as its own.

    Args:
        sampler: whose rows they are.
        drawn: how many were.
    """

    def __init__(self, sampler: MixtureSampler, drawn: int) -> None:
        self.sampler, self.epoch = sampler, 0
        self.whole, self.rest = divmod(drawn, len(sampler))

    def __len__(self) -> int:
        """Rows per epoch."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws, counted from here."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The end of one epoch of the sampler, and the beginning of the next."""
        self.sampler.set_epoch(self.epoch + self.whole)
        yield from islice(self.sampler, self.rest, None)
        self.sampler.set_epoch(self.epoch + self.whole + 1)
        yield from islice(self.sampler, self.rest)


class InTurn(Sampler[int]):
    """The rows of one sampler, then those of the next; one epoch is the whole training.

    Args:
        phases: each with the rows that it gives in all.
    """

    def __init__(self, *phases: MixtureSampler) -> None:
        self.phases = phases

    def __len__(self) -> int:
        """Rows of the training."""
        return sum(len(phase) for phase in self.phases)

    def set_epoch(self, epoch: int) -> None:
        """There is one only."""

    def __iter__(self) -> Iterator[int]:
        """All rows."""
        for phase in self.phases:
            yield from phase
