"""How often each task is drawn: what a recipe says under `mixing`, checked, and the shares that follow."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from peml.errors import PemlError

By = Literal["proportional", "temperature", "equal", "weights", "fixed_ratio", "subset"]
Batches = Literal["mixed", "homogeneous"]


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
        capped = np.array([min(count, limit_of(self.cap, task) or count) for task, count in counts.items()])
        # Divided by the largest first: a small temperature would otherwise overflow.
        return np.asarray((capped / capped.max()) ** exponent)


def limit_of(limit: float | Mapping[str, float] | None, task: str) -> float | None:
    """What a limit says of a task."""
    return limit.get(task) if isinstance(limit, Mapping) else limit
