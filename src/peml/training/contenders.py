"""The section `compare` of a recipe: which methods are compared, and what each has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, field_validator

from peml.errors import PemlError
from peml.methods import named
from peml.training.entries import Section, first_problem

_SAME = (
    *("seed", "max_steps", "num_train_epochs", "output_dir", "max_length", "dtype"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16"),
    *("dataloader_drop_last", "auto_find_batch_size", "early_stopping_patience", "early_stopping_threshold"),
    *("load_best_model_at_end", "metric_for_best_model", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("save_strategy", "save_steps", "save_total_limit"),
)
"""Keys of `train` that decide which rows are seen, in which order and how often, in what numbers, and which step's
weights are kept: of more measurements the best is better."""


class Contender(Section):
    """What one method of a comparison has of its own.

    Args:
        method: a name from `peml methods`; None: the name that the comparison has for it.
        set, train: changes to the method and to the recipe's training.
        regime, architecture: as in a recipe; `architecture: random` draws one by the seed of each run.
        tune: ranges of its tuning, as in `tune.ranges`; None: those of the method.
        match: whether its rank, or length, is solved for the budget.
    """

    method: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    regime: str | dict[str, Any] | None = None
    architecture: str | dict[str, Any] | None = None
    tune: dict[str, Any] | None = None
    match: bool = True

    @field_validator("train")
    @classmethod
    def _same_rows(cls, train: dict[str, Any]) -> dict[str, Any]:
        for key in _SAME:
            if key in train:
                raise PemlError(f"train.{key} must be the same for all methods: set it in `train` of the recipe")
        return train

    @field_validator("tune")
    @classmethod
    def _tunes_no_rows(cls, ranges: dict[str, Any] | None) -> dict[str, Any] | None:
        check_ranges(ranges or {})
        return ranges


class Compare(Section):
    """What `peml compare` does where the command line says nothing else.

    Args:
        methods: names, or a mapping from names to what each has of its own.
        baseline: that the others are tested against; None: `lora` if it is among them, else the first.
        budget: trainable numbers of every method, or the name of the one that sets them; None: the recipe's own method
            if it is among them, else the first.
        seeds: trainings of each method, with the seeds `train.seed`, `train.seed` + 1 ...
        trials: of each method's tuning; 0: nothing is tuned.
    """

    methods: dict[str, Contender] = Field(default_factory=dict)
    baseline: str | None = None
    budget: int | str | None = None
    seeds: int = Field(3, gt=0)
    trials: int = Field(0, ge=0)

    @field_validator("methods", mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, list):
            raw = {str(name): None for name in raw}
        if not isinstance(raw, Mapping):
            raise PemlError(f"compare.methods must be a list of names or a mapping, not {raw!r}")
        return {str(name): read_contender(str(name), own) for name, own in raw.items()}

    @field_validator("budget")
    @classmethod
    def _positive(cls, budget: int | str | None) -> int | str | None:
        if isinstance(budget, int) and budget < 1:
            raise PemlError(f"compare.budget must be 1 or more, not {budget}")
        return budget


def check_ranges(ranges: Mapping[str, Any]) -> None:
    """Refuse ranges of a tuning after which methods would not be trained on the same rows.

    Raises:
        PemlError: naming the key.
    """
    for key in _SAME:
        if f"train.{key}" in ranges:
            raise PemlError(f"train.{key} must be the same for all methods, and cannot be tuned for one: leave it out")


def read_contender(name: str, raw: Any) -> Contender:
    """One method of a comparison.

    Raises:
        PemlError: naming it, the key, and what is allowed.
    """
    try:
        own = raw if isinstance(raw, Contender) else Contender.model_validate(raw or {})
        named(own.method or name)
    except ValidationError as error:
        raise PemlError(f"compare.methods.{name}: {first_problem(error, list(Contender.model_fields))}") from None
    except PemlError as error:
        raise PemlError(f"compare.methods.{name}: {error}") from None
    return own
