"""The sections `tune` and `tuned` of a recipe: what is tried, and what the values that were found have cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from peml.config import PemlConfig
from peml.errors import PemlError
from peml.methods import method
from peml.prompts import PrefixNAS
from peml.tasks import Task
from peml.training.arguments import checked
from peml.training.entries import Section, first_problem, near

_FIXED = {
    "seed": "the best seed is luck",
    "max_steps": "trials are compared at equal steps; `tune.steps` says how many",
    "num_train_epochs": "trials are compared at equal steps; `tune.steps` says how many",
    "output_dir": "every trial has a folder of its own",
}


_OF_SEARCH = {
    "train": ("architecture_learning_rate", "finetune_fraction", "after_search", "measure_gap"),
    "prompt": (
        *("temperature", "warmup_fraction", "relaxation", "gate_relaxation", "skip_dropout"),
        *("entropy_weight", "cost_weight", "parameter_weight", "time_weight"),
    ),
}
"""Settings that nothing but a search reads."""

_OF_ARCHITECTURE = ("num_cells", "num_virtual_tokens", "width", "embedding_dim", "head_rank", "operations")
"""Settings of a prompt that an imported architecture takes the place of."""


class Range(Section):
    """Numbers from `low` to `high`, both included; whole numbers where both of them (and `step`) are.

    Args:
        low, high: the ends.
        log: whether the logarithm is uniform, for what varies by factors.
        step: distance between neighbours; None: none, or 1.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = Field(None, gt=0)

    @property
    def whole(self) -> bool:
        """Whether the numbers are whole."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise PemlError(f"low must be below high, not {self.low:g} and {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise PemlError("log needs a low above 0 and no step")
        return self


Wanted = Range | list[Any]
"""Values that a key may have: a range, or a list of them."""


class Tune(Section):
    """What `peml tune` tries.

    Args:
        trials: trainings in all. 20 is the reconstruction's (methods of PEML, our choice).
        ranges: what may change, by the keys of `set` and `train`, e.g. `adapter.r: [4, 8]`,
            `train.learning_rate: {low: 1e-4, high: 1e-2, log: true}`; empty: ranges that go with the method.
        metric: `average` over the tasks, or `TASK/METRIC`.
        held_out: share (below 1) or number of each task's training rows that the trials are measured on. The evaluation
            rows are not read.
        seed: of what is tried; the trainings have the recipe's.
        pruner: what stops a trial that falls behind at its early evaluations.
        steps: of each trial; None: as many as the recipe's training has.
    """

    trials: int = Field(20, gt=0)
    ranges: dict[str, Wanted] = Field(default_factory=dict)
    metric: str = "average"
    held_out: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)
    pruner: Literal["median", "hyperband", "none"] = "median"
    steps: int | None = Field(None, gt=0)

    @field_validator("ranges", mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            raise PemlError(f"tune.ranges must be a mapping from keys to ranges, not {raw!r}")
        return {str(key): _read_range(f"tune.ranges.{key}", value) for key, value in raw.items()}

    def check(self, name: str, tasks: Sequence[Task], settings: Mapping[str, Any]) -> None:
        """Try every end of every range where the recipe is read, not in the trial that first comes upon it.

        Args:
            name: of the method.
            tasks: of the adapter.
            settings: `set` of the recipe, with an architecture that it imports.

        Raises:
            PemlError: naming the key, or the metric.
        """
        names = [task.name for task in tasks]
        config = method(name, names, settings)
        for key, wanted in self.ranges.items():
            axis, _, setting = key.partition(".")
            if axis == "train" and setting in _FIXED:
                raise PemlError(f"tune.ranges.{key} cannot be tuned: {_FIXED[setting]}")
            for value in ends(wanted):
                try:
                    if axis == "train":
                        checked({setting: value})
                    else:
                        method(name, names, {**settings, key: value})
                except PemlError as error:
                    raise PemlError(f"tune.ranges: {error}") from None
            if (reason := idle(key, config)) is not None:
                raise PemlError(f"tune.ranges.{key} would change nothing: {reason}; leave it out")
        known = ["average", *(f"{task.name}/{metric}" for task in tasks for metric in (*task.metrics, "score", "loss"))]
        if self.metric not in known:
            raise PemlError(
                f"tune.metric must be one of {', '.join(known)}, not {self.metric!r}{near(self.metric, known)}"
            )


def idle(key: str, config: PemlConfig) -> str | None:
    """Why a key of a recipe has no effect on what is trained; None: it has one.

    Args:
        key: of `set` or `train`, e.g. `prompt.width`.
        config: of the adapter.
    """
    axis, _, name = key.partition(".")
    prompt = config.prompt
    if key == "train.learning_rate" and config.adapter is None and not config.modules_to_save:
        return "the method has no adapter"
    if key in ("train.prompt_learning_rate", "train.task_prompt_learning_rate") and prompt is None:
        return "the method has no prompt"
    imported = None if not isinstance(prompt, PrefixNAS) else prompt.architecture
    searched = isinstance(prompt, PrefixNAS) and imported is None
    if name in _OF_SEARCH.get(axis, ()) and not searched:
        return "nothing is searched"
    # One that is drawn has these sizes.
    if axis == "prompt" and name in _OF_ARCHITECTURE and imported is not None and not isinstance(imported, str):
        return "the architecture that is imported says what it is"
    return None


def ends(wanted: Wanted) -> list[Any]:
    """The values of a list, or the two ends of a range."""
    return [wanted.low, wanted.high] if isinstance(wanted, Range) else wanted


def _read_range(key: str, raw: Any) -> Any:
    if isinstance(raw, Range):
        return raw
    if isinstance(raw, list):
        if len(raw) < 2 or any(value in raw[:index] for index, value in enumerate(raw)):
            raise PemlError(f"{key} must list two or more different values, not {raw!r}")
        return raw
    if not isinstance(raw, Mapping):
        raise PemlError(f"{key} must be a list of values or a mapping with low and high, not {raw!r}")
    try:
        return Range.model_validate(raw)
    except ValidationError as error:
        raise PemlError(f"{key}: {first_problem(error, list(Range.model_fields))}") from None


class Tuned(Section):
    """Where the values of a recipe were found, and the bill of finding them.

    Args:
        trials: trainings that were begun, with those that were stopped or failed.
        wall_seconds: of all of them.
        device_hours: hours times devices (GPUs; without one, CPU threads) of all of them.
        metric, value: what was best, on rows held out of the training rows.
    """

    trials: int = Field(ge=0)
    wall_seconds: float = Field(ge=0)
    device_hours: float = Field(ge=0)
    metric: str = "average"
    value: float | None = None
