"""The optimiser's groups: one for every part of an adapter, each with its own learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from peml.tuner import PemlModel

HEAD_STEP = 0.05
"""How far one step of Adam moves a logit at most, whose features are of size 1. Our choice: see LOG.md."""


def parameter_groups(
    tuner: PemlModel, args: TrainingArguments, rates: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Groups for the optimiser: of every part what tasks share, and what belongs to single tasks.

    Args:
        tuner: whose active adapter is trained.
        args: with the adapter's rate, and the weight decay.
        rates: of `prompt`, `prompt per task`, `architecture` and `heads`; None or missing: the prompt's own default.
    """
    parts, stacked = tuner.parts(), tuner.per_task_parameters()
    # What `modules_to_save` made trainable goes with the adapter.
    parts["adapter"] = parts["adapter"] + parts["other"]
    for part in ("adapter", "prompt"):
        parts[f"{part} per task"] = [p for p in parts[part] if id(p) in stacked]
        parts[part] = [p for p in parts[part] if id(p) not in stacked]
    own = {"adapter": args.learning_rate, "adapter per task": args.learning_rate}
    if tuner.heads is not None:
        own["heads"] = HEAD_STEP / tuner.heads.num_features
    config = tuner.config_in_force
    if config is not None and config.prompt is not None:
        shared = rates.get("prompt")
        shared = config.prompt.prompt_learning_rate if shared is None else shared
        own |= {"prompt": shared, "prompt per task": shared * config.prompt.task_rate_factor}
        own["architecture"] = config.prompt.architecture_learning_rate
    own |= {name: rate for name, rate in rates.items() if rate is not None}
    # What belongs to single tasks, or chooses a structure, is not drawn to zero.
    decays = {"adapter": args.weight_decay, "prompt": args.weight_decay}
    return [
        {"name": name, "params": trainable, "lr": own[name], "weight_decay": decays.get(name, 0.0)}
        for name in ("adapter", "adapter per task", "prompt", "prompt per task", "architecture", "heads")
        if (trainable := [p for p in parts[name] if p.requires_grad])
    ]
