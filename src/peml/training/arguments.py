"""The section `train` of a recipe: names and types of `TrainingArguments`, and a few of our own."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from peml.errors import PemlError
from peml.tasks import Task
from peml.training.entries import near

OWN: Mapping[str, Any] = {
    "dtype": typing.Literal["auto", "float32", "bfloat16", "float16"],
    "attn_implementation": str | None,
    "max_length": int,
    "prompt_learning_rate": float | None,
    "task_prompt_learning_rate": float | None,
    "architecture_learning_rate": float | None,
    "head_learning_rate": float | None,
    "probe_rows": int,
    "finetune_fraction": float,
    "after_search": typing.Literal["finetune", "keep"],
    "measure_gap": bool,
    "early_stopping_patience": int | None,
    "early_stopping_threshold": float,
}
"""What a recipe has beside transformers' arguments."""

DEFAULTS: Mapping[str, Any] = {
    "max_length": 512,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "max_steps": 1000,
    "logging_steps": 10,
    "warmup_steps": 0.05,
    "lr_scheduler_type": "linear",
    "seed": 0,
    "dtype": "auto",
    "finetune_fraction": 0.1,
    "after_search": "finetune",
    "measure_gap": True,
    "probe_rows": 2000,
    "early_stopping_threshold": 0.0,
}

_AT_LEAST: Mapping[str, float] = {
    "max_length": 2,
    "max_steps": 1,
    "num_train_epochs": 1e-6,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "prompt_learning_rate": 0,
    "task_prompt_learning_rate": 0,
    "architecture_learning_rate": 0,
    "head_learning_rate": 0,
    "probe_rows": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "finetune_fraction": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
    "early_stopping_patience": 1,
    "early_stopping_threshold": 0,
}
_BELOW: Mapping[str, float] = {"finetune_fraction": 1, "seed": 2**32, "label_smoothing_factor": 1}

AVERAGE = "eval_average"
"""Mean over the tasks of the first metric of each."""

_OURS = {
    "disable_tqdm": "peml shows its own bar",
    "remove_unused_columns": "the tasks of the rows must reach the model",
    "resume_from_checkpoint": "use --resume",
    "data_seed": "rows are drawn by `seed`",
    "ignore_data_skip": "a training that goes on sees the rows that it has not seen, so that it ends the same",
    "greater_is_better": "that follows from metric_for_best_model: of a loss less is better, of every score more",
    "train_sampling_strategy": "rows are drawn by `mixing`",
    "hub_token": "set HF_TOKEN in the environment: the recipe is stored with the run",
}
"""Arguments that would have no effect or a wrong one, and what to do instead."""


def checked(train: Mapping[str, Any]) -> dict[str, Any]:
    """The section with every value of its proper type; texts that are numbers, like YAML's 3e-4, become numbers.

    Raises:
        PemlError: an unknown key or a value of the wrong type or size.
    """
    hints = {**typing.get_type_hints(TrainingArguments), **OWN}
    names = {field.name for field in dataclasses.fields(TrainingArguments)} | set(OWN)
    out: dict[str, Any] = {}
    for key, value in train.items():
        if key in _OURS:
            raise PemlError(f"train.{key} cannot be set: {_OURS[key]}")
        if key not in names:
            raise PemlError(f"train.{key} is not a training argument{near(str(key), names)}")
        out[key] = _typed(key, value, hints[key])
        number = out[key] if isinstance(out[key], int | float) else None
        if number is not None and number < _AT_LEAST.get(key, number):
            raise PemlError(f"train.{key} must be {_AT_LEAST[key]:g} or more, not {value!r}")
        if number is not None and key in _BELOW and number >= _BELOW[key]:
            raise PemlError(f"train.{key} must be below {_BELOW[key]:g}, not {value!r}")
    if out.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        raise PemlError("train.use_liger_kernel needs its package: pip install liger-kernel")
    if out.get("after_search") == "keep" and out.get("finetune_fraction", DEFAULTS["finetune_fraction"]) not in (
        0,
        DEFAULTS["finetune_fraction"],
    ):
        raise PemlError("train.after_search: keep leaves no step after the search: leave out finetune_fraction")
    return out


def _typed(key: str, value: Any, hint: Any) -> Any:
    plain = hint in (int, float, int | None, float | None)
    try:
        if plain and isinstance(value, bool):
            raise ValueError
        if key in ("report_to", "lr_scheduler_type", "optim", "save_strategy", "eval_strategy", "logging_strategy"):
            return value  # enumerations: TrainingArguments lists the names
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)).validate_python(
            value
        )
    except (ValidationError, ValueError):
        kind = str(hint).replace("typing.", "") if typing.get_args(hint) else hint.__name__
        raise PemlError(f"train.{key} must be {kind}, not {value!r}") from None


def training_arguments(train: Mapping[str, Any], learning_rate: float, output_dir: str) -> TrainingArguments:
    """What transformers' Trainer gets.

    Raises:
        PemlError: transformers refuses a value.
    """
    given = {k: v for k, v in {**DEFAULTS, **train}.items() if k not in OWN and k != "output_dir"}
    if "num_train_epochs" in train and "max_steps" not in train:
        given.pop("max_steps")
    if chooses_best(train):
        given = _with_best(given)
    elif given.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        # transformers would look for a loss, which is measured for each task by itself.
        given |= {"metric_for_best_model": AVERAGE, "greater_is_better": True}
    given.setdefault("learning_rate", learning_rate)
    given.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    given.setdefault("save_strategy", "steps")
    given.setdefault("save_total_limit", 2)
    # A loss that is not finite stops the run; transformers would log the last finite one instead.
    given |= {"logging_nan_inf_filter": False, "disable_tqdm": True, "remove_unused_columns": False}
    try:
        return TrainingArguments(**given, output_dir=output_dir)
    except Exception as error:  # values are checked here and there inside, with errors of every type
        raise PemlError(f"train: {one_line(error)}") from error


def chooses_best(train: Mapping[str, Any]) -> bool:
    """Whether the best checkpoint is kept, not the last; stopping early, and naming a metric, mean that as well."""
    wanted = train.get("early_stopping_patience") is not None or train.get("metric_for_best_model") is not None
    return bool(train.get("load_best_model_at_end", wanted))


def _with_best(given: dict[str, Any]) -> dict[str, Any]:
    """What choosing a checkpoint needs and the recipe leaves open.

    Our choice: ten evaluations, or one per epoch where the training is counted in epochs.
    """
    metric = str(given.get("metric_for_best_model") or AVERAGE)
    how = "epoch" if "max_steps" not in given else "steps"
    how = given["save_strategy"] if given.get("save_strategy") in ("steps", "epoch") else how
    best = {
        "load_best_model_at_end": True,
        "greater_is_better": not metric.endswith("/loss"),
        "eval_strategy": how,
    }
    given = best | given | {"metric_for_best_model": metric}
    given.setdefault("save_strategy", given["eval_strategy"])
    if given["eval_strategy"] == "steps":
        tenth = max(1, int(given.get("max_steps", 10)) // 10)
        given.setdefault("eval_steps", given.get("save_steps", tenth))
        given.setdefault("save_steps", given["eval_steps"])
    # The patience that is left is part of a run that is resumed.
    given.setdefault("restore_callback_states_from_checkpoint", True)
    return given


def check_best(train: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    """Refuse a metric that no evaluation gives, and patience without a choice.

    Raises:
        PemlError: naming the key, and what there is.
    """
    if train.get("early_stopping_patience") is not None:
        if not chooses_best(train):
            raise PemlError("train.early_stopping_patience keeps the best checkpoint: leave out load_best_model_at_end")
        if train.get("eval_strategy", "steps") == "no":
            raise PemlError("train.early_stopping_patience needs evaluations: leave out eval_strategy")
    metric = train.get("metric_for_best_model")
    if metric is None:
        return
    known = {AVERAGE} | {f"eval_{task.name}/{name}" for task in tasks for name in (*task.metrics, "loss")}
    full = metric if metric.startswith("eval_") else f"eval_{metric}"
    if full not in known:
        raise PemlError(
            f"train.metric_for_best_model must be one of {', '.join(sorted(known))}, not {metric!r}{near(full, known)}"
        )


def one_line(error: BaseException) -> str:
    """The message of somebody else's error as one sentence."""
    return " ".join(str(error).split()) or type(error).__name__
