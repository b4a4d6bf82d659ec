"""Rows that are set aside for good, before anything is drawn."""

from collections.abc import Callable, Sequence

import numpy as np

from peml.errors import PemlError
from peml.mixing.sampler import HELD_OUT


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
        chosen += np.random.default_rng([seed, HELD_OUT, task]).choice(own, count, replace=False).tolist()
    return tuple(sorted(chosen))
