"""What a trial may be: ranges where the recipe has none, the values of one trial, and its recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from peml.config import PemlConfig
from peml.prompts import PrefixNAS
from peml.training.arguments import chooses_best
from peml.training.ranges import Range, Wanted, idle
from peml.training.recipe import Recipe, validated
from peml.training.regime import Bilevel

EVALUATIONS = 5
"""Measurements of a trial, the last at its end, by which it may be stopped: our choice, which costs little."""

_SEARCH: Mapping[str, Wanted] = {
    "prompt.num_cells": Range(low=1, high=4),
    "prompt.width": [256, 512, 1024],
    "prompt.entropy_weight": Range(low=0.01, high=1.0, log=True),
    "prompt.cost_weight": Range(low=0.1, high=10.0, log=True),
    "prompt.temperature": [[1.0, 0.03], [1.0, 0.1], [1.0, 0.3]],
}
"""Of a searched prefix, beside rates, rank and length: what PEML's reconstruction gives to TPE."""


def default_ranges(recipe: Recipe) -> dict[str, Wanted]:
    """Ranges for a recipe that names none.

    Learning rates within a factor of ten of the recipe's; rank, prompt length and the settings of a search unless the
    recipe sets them. PEML, arXiv:2605.14055, tunes by TPE; which keys and how far is our choice.

    Args:
        recipe: whose method decides which keys there are.
    """
    config = recipe.config()
    ranges: dict[str, Wanted] = {}
    for name in ("learning_rate", "prompt_learning_rate", "architecture_learning_rate"):
        rate = own_value(recipe, config, f"train.{name}")
        if rate:
            ranges[f"train.{name}"] = Range(low=float(f"{rate / 10:.3g}"), high=float(f"{rate * 10:.3g}"), log=True)
    structure: dict[str, Wanted] = {}
    if config.adapter is not None:
        step = config.adapter.rank_step(len(config.task_names))
        ranks = [rank for rank in (4, 8, 16, 32) if rank % step == 0]
        structure |= {"adapter.r": ranks} if len(ranks) > 1 else {}
    if isinstance(getattr(config.prompt, "num_virtual_tokens", None), int):
        structure["prompt.num_virtual_tokens"] = [16, 32, 64]
    structure |= _SEARCH if isinstance(config.prompt, PrefixNAS) else {}
    ranges |= {key: wanted for key, wanted in structure.items() if key not in flat(recipe.set)}
    return {key: wanted for key, wanted in ranges.items() if idle(key, config) is None}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`set` of a recipe with every key dotted: `{adapter: {r: 4}}` is `{adapter.r: 4}`."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        if key in ("adapter", "prompt", "heads") and isinstance(value, Mapping):
            out |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            out[key] = value
    return out


def own_value(recipe: Recipe, config: PemlConfig, key: str) -> Any:
    """What a recipe has for a key, or its method's default; None where that is not known before the training."""
    axis, _, name = key.partition(".")
    if axis != "train":
        return getattr(getattr(config, axis, None), name, None)
    value = recipe.setting(name)
    if value is not None:
        return value
    if name == "learning_rate":
        return None if config.adapter is None else config.adapter.learning_rate
    prompt = config.prompt
    if name == "prompt_learning_rate":
        return None if prompt is None else prompt.prompt_learning_rate
    if name == "architecture_learning_rate" and isinstance(prompt, PrefixNAS):
        return recipe.how.learning_rate if isinstance(recipe.how, Bilevel) else prompt.architecture_learning_rate
    return None


def own_values(recipe: Recipe, ranges: Mapping[str, Wanted]) -> dict[str, Any]:
    """The recipe as it stands, as far as its values lie in the ranges: what the first trial is."""
    config = recipe.config()
    values = {key: own_value(recipe, config, key) for key in ranges}
    return {key: _stored(value) for key, value in values.items() if _lies_in(ranges[key], value)}


def _lies_in(wanted: Wanted, value: Any) -> bool:
    if isinstance(wanted, list):
        return value in wanted or (isinstance(value, tuple) and list(value) in wanted)
    if isinstance(value, bool) or not isinstance(value, int if wanted.whole else int | float):
        return False
    return wanted.low <= value <= wanted.high and (wanted.step is None or (value - wanted.low) % wanted.step == 0)


def suggest(trial: Any, ranges: Mapping[str, Wanted]) -> dict[str, Any]:
    """The values of one trial.

    Args:
        trial: Optuna's.
        ranges: by key.
    """
    return {key: _suggested(trial, key, wanted) for key, wanted in ranges.items()}


def _suggested(trial: Any, key: str, wanted: Wanted) -> Any:
    if isinstance(wanted, list):
        return _value(wanted, trial.suggest_categorical(key, [_stored(value) for value in wanted]))
    if wanted.whole:
        return trial.suggest_int(key, wanted.low, wanted.high, log=wanted.log, step=wanted.step or 1)
    return trial.suggest_float(key, wanted.low, wanted.high, log=wanted.log, step=wanted.step)


def values_of(params: Mapping[str, Any], ranges: Mapping[str, Wanted]) -> dict[str, Any]:
    """What Optuna has stored of a trial, as a recipe has it."""
    return {key: _value(ranges[key], value) for key, value in params.items()}


def _stored(value: Any) -> Any:
    """Lists as text: Optuna stores single values alone."""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def _value(wanted: Wanted, stored: Any) -> Any:
    return stored if isinstance(wanted, Range) else wanted[[_stored(value) for value in wanted].index(stored)]


def recipe_with(recipe: Recipe, values: Mapping[str, Any], **changes: Any) -> Recipe:
    """A recipe with the values of a trial and no section `tune`.

    Args:
        recipe: that is tuned.
        values: by the keys of `set` and `train`.
        changes: other keys of the recipe.

    Raises:
        PemlError: values that do not go together, naming the key.
    """
    data: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    data.pop("tune", None)
    train = {key.removeprefix("train."): value for key, value in values.items() if key.startswith("train.")}
    data["set"] = flat(data["set"]) | {key: value for key, value in values.items() if not key.startswith("train.")}
    data["train"] |= train
    return validated(data | changes, "tune")


def trial_recipe(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """What one trial trains: measured on rows that are held out of the training rows, never on the evaluation rows.

    Args:
        recipe: that is tuned.
        values: of the trial.

    Raises:
        PemlError: values that do not go together, naming the key.
    """
    section = recipe.tune
    assert section is not None
    trial = recipe_with(recipe, values, held_out=section.held_out, evaluate_before=False)
    # Nothing is chosen by the gap, and its two measurements would count among those of the trial.
    train = {**trial.train, "measure_gap": False}
    if section.steps is not None:
        train["max_steps"] = section.steps
        train.pop("num_train_epochs", None)
    if not chooses_best(train):
        train["save_strategy"] = "no"
        if section.pruner != "none" and "eval_strategy" not in train:
            every = {"eval_strategy": "steps", "eval_steps": int(train.get("max_steps", 0)) // EVALUATIONS + 1}
            train |= every if "max_steps" in train else {"eval_strategy": "epoch"}
    return trial.model_copy(update={"train": train})


def measurements(recipe: Recipe) -> int:
    """How often a trial is measured, with its end.

    Raises:
        PemlError: transformers refuses a training argument.
    """
    arguments = recipe.training_arguments("trial")
    if arguments.eval_strategy == "epoch":
        return max(1, int(arguments.num_train_epochs)) + 1
    if arguments.eval_strategy == "no":
        return 1
    every = arguments.eval_steps
    return int(1 / every if every < 1 else arguments.max_steps // every) + 1
