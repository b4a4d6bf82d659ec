"""Tasks that are answered no better than by always saying the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import TypeVar

from peml.evaluation import measure
from peml.tasks import Example, Task
from peml.training.workbench import Workbench

T = TypeVar("T")

TOLERANCE = 1e-9
"""Above the majority's score by less than this is not above it."""


def majority_scores(bench: Workbench) -> dict[str, float]:
    """Score of always giving the most frequent training answer, on the evaluation rows, by task.

    Where every row has options of its own, the place among them that is right most often; of values, their mean. Tasks
    without training rows at hand are left out.
    """
    return {
        name: measure(task, _constant(task, bench.train[name], bench.eval[name]), bench.eval[name])["score"]
        for name, task in bench.tasks.items()
        if bench.train.get(name)
    }


def collapsed(majority: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Tasks whose score is not above that of a constant answer, unless that is always right: nothing is above it.

    Args:
        majority: as `majority_scores` gives it.
        scores: metrics by task.
    """
    beatable = {task: constant for task, constant in majority.items() if constant < 1 - TOLERANCE}
    return [task for task, constant in beatable.items() if scores[task]["score"] <= constant + TOLERANCE]


def _constant(task: Task, train: list[Example], rows: list[Example]) -> list[str]:
    values = [example.value for example in train if example.value is not None]
    if values:
        return [repr(fmean(values))] * len(rows)
    if task.choices is not None and not isinstance(task.choices, tuple):
        place = _most_frequent([example.choices.index(example.answer) for example in train])
        return [example.choices[min(place, len(example.choices) - 1)] for example in rows]
    return [_most_frequent([example.answer for example in train])] * len(rows)


def _most_frequent(given: list[T]) -> T:
    return Counter(given).most_common(1)[0][0]
