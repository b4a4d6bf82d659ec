r"""How tasks share an epoch and a batch.

    p_t ~ min(n_t, cap)^(1/tau)        for n_t rows of task t

tau = 1 is `proportional`, tau = infinity is `equal`; tau = 2 is the default; `weights` gives p_t as it stands.
`fixed_ratio` has p_t of every batch, not only of an epoch. `subset` draws k ~ U{2..T} tasks for every batch, which
share it equally (multitask prompt tuning, arXiv:2303.02861). The rows of an epoch are a function of (seed, epoch)
alone, never of what was drawn before, so a resumed run sees the rows that an uninterrupted one sees, whatever number of
workers loads them.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from peml.errors import PemlError

By = Literal["proportional", "temperature", "equal", "weights", "fixed_ratio", "subset"]
Batches = Literal["mixed", "homogeneous"]
Integers = NDArray[np.int64]

# What a random stream is for; part of its seed, so that no two streams are alike.
_SHARES, _ORDER, _ROWS, _SUBSETS, _HELD_OUT = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Mixing:
    """How often each task is drawn.

    Attributes:
        by: `proportional` to the number of rows, its root by `temperature`, `equal` for all tasks, by given `weights`,
            a `fixed_ratio` in every batch, or a `subset` of the tasks in every batch.
        temperature: tau, for `by="temperature"` only. 2 is our choice.
        weights: of every task, for `by="weights"`, and for `by="fixed_ratio"`, which is equal without.
        cap: rows beyond this number do not count for a task's share; one number for all tasks, or some by name.
        epochs: passes over its rows that a task gives at most in the whole training; one number, or some by name. What
            it no longer gives, the others do.
        batches: `mixed`, or `homogeneous`: each batch of one task.
    """

    by: By = "temperature"
    temperature: float = 2.0
    weights: Mapping[str, float] | None = None
    cap: int | Mapping[str, int] | None = None
    epochs: float | Mapping[str, float] | None = None
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
        for limit, least in (("cap", 1), ("epochs", 0)):
            given = getattr(self, limit)
            for name, value in given.items() if isinstance(given, Mapping) else [(None, given)]:
                if value is not None and not (value >= least and value > 0 and math.isfinite(value)):
                    where = f"{limit} of task {name!r}" if name else f"`{limit}`"
                    raise PemlError(f"mixing: {where} must be {'at least 1' if least else 'above 0'}, not {value}")
        if self.by in ("subset", "fixed_ratio"):
            for key, plain in (("batches", "mixed"), ("cap", None), ("epochs", None)):
                if getattr(self, key) != plain:
                    raise PemlError(f"mixing: `by: {self.by}` says what each batch holds: `{key}` does not go with it")
        self._check_weights()

    def _check_weights(self) -> None:
        if self.weights is None:
            if self.by == "weights":
                raise PemlError("mixing: `by: weights` needs `weights`, a number for each task")
            return
        if self.by not in ("weights", "fixed_ratio"):
            raise PemlError(
                f"mixing: `weights` goes with `by: weights` and `by: fixed_ratio`, not with `by: {self.by}`"
            )
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise PemlError(f"mixing: the weight of task {name!r} must be above 0, not {weight}")

    def check(self, task_names: Collection[str]) -> None:
        """Refuse names of tasks that are not there.

        Raises:
            PemlError: an unknown name, or a task without a weight.
        """
        for key in ("weights", "cap", "epochs"):
            given = getattr(self, key)
            for name in given if isinstance(given, Mapping) else ():
                if name not in task_names:
                    raise PemlError(
                        f"mixing.{key} names {name!r}, which is no task here; there are {', '.join(task_names)}"
                    )
        weights = dict.fromkeys(task_names) if self.weights is None else self.weights
        for name in task_names:
            if name not in weights:
                raise PemlError(f"mixing.weights has no weight for task {name!r}: give it one")

    def task_probabilities(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Share of each task in an epoch, given the number of its rows."""
        self.check(counts)
        return self._among(counts)

    def _among(self, counts: Mapping[str, int]) -> dict[str, float]:
        """The same, where tasks may be named that have no rows in this training."""
        for task, count in counts.items():
            if count < 1:
                raise PemlError(f"mixing: task {task!r} has no rows; give it some or leave it out")
        if not counts:
            raise PemlError("mixing: there is no task to draw from")
        if self.weights is None:
            shares = self._counted(counts)
        else:
            shares = np.array([self.weights[task] for task in counts], np.float64)
        return dict(zip(counts, (shares / shares.sum()).tolist(), strict=True))

    def _counted(self, counts: Mapping[str, int]) -> NDArray[np.float64]:
        exponent = {"proportional": 1.0, "temperature": 1 / self.temperature}.get(self.by, 0.0)
        capped = np.array([min(count, _of(self.cap, task) or count) for task, count in counts.items()])
        # Divided by the largest first: a small temperature would otherwise overflow.
        return np.asarray((capped / capped.max()) ** exponent)


def _of(limit: float | Mapping[str, float] | None, task: str) -> float | None:
    """What a limit says of a task."""
    return limit.get(task) if isinstance(limit, Mapping) else limit


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
                math.inf if (most := _of(mixing.epochs, name)) is None else round(most * len(rows)) // self.block
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


def held_out(row_tasks: Sequence[int], task_names: Sequence[str], rows: int, seed: int) -> tuple[int, ...]:
    """Rows of each task that are set aside for good: so many, at most a tenth of its own, and one if it has any.

    Raises:
        PemlError: a task with a single row.
    """
    return _set_aside(row_tasks, task_names, lambda own: min(rows, max(1, own // 10)), seed, "balance")


def split_off(row_tasks: Sequence[int], task_names: Sequence[str], share: float, seed: int) -> tuple[int, ...]:
    """A share of the rows of each task, and one at least on either side.

    Raises:
        PemlError: a task with a single row.
    """
    return _set_aside(row_tasks, task_names, lambda own: min(max(1, round(share * own)), own - 1), seed, "architecture")


def _set_aside(
    row_tasks: Sequence[int], task_names: Sequence[str], wanted: Callable[[int], int], seed: int, what_for: str
) -> tuple[int, ...]:
    tasks, chosen = np.asarray(row_tasks), []
    for task, name in enumerate(task_names):
        own = np.flatnonzero(tasks == task)
        if len(own) == 1:
            raise PemlError(f"task {name!r} has too few training rows to hold one out for the {what_for}: give it two")
        count = min(wanted(len(own)), len(own)) if len(own) else 0
        chosen += np.random.default_rng([seed, _HELD_OUT, task]).choice(own, count, replace=False).tolist()
    return tuple(sorted(chosen))


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
