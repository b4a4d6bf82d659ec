"""The plan of a recipe: its model on no device, its adapter counted, and the formulas with its numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from peml.errors import PemlError
from peml.methods import trainable_parameters
from peml.planning.formulas import Costs, Load, Shape, Sizes, communication, memory
from peml.training.arguments import one_line
from peml.training.recipe import Recipe, load_recipe
from peml.training.workbench import model_class, model_path

TYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
"""Bytes of a number by `train.dtype`; auto: half precision, in which large models are stored."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe costs.

    Args:
        shape, sizes, load: what the formulas were given.
        alone: bytes with everything on each device, as under DDP.
        sharded: bytes with everything sharded, as under FSDP2.
        sent: bytes that a device sends in a step, by the way of sharing.
    """

    shape: Shape
    sizes: Sizes
    load: Load
    alone: Costs
    sharded: Costs
    sent: dict[str, int]


def plan(
    recipe: Recipe | str | Path, gpus: int = 1, model_config: str | Path | None = None, tasks: int | None = None
) -> Plan:
    """Work out memory and communication of a recipe; neither weights nor rows are read.

    Args:
        recipe: a recipe or the path of one.
        gpus: devices that train together.
        model_config: folder with a `config.json`, or one itself, in place of the recipe's model.
        tasks: how many tasks there are, in place of the recipe's.

    Raises:
        PemlError: the model's configuration cannot be read, or the model is no decoder.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    model = empty_model(str(model_config) if model_config is not None else model_path(recipe.model))
    config = recipe.config()
    if tasks is not None:
        config.task_names = [f"task {number}" for number in range(tasks)]
    prompt: Any = config.prompt
    # The prefix while it is trained: every token that a search may keep is there.
    length = getattr(prompt, "num_virtual_tokens", 0) if prompt is not None else 0
    by_task = prompt is not None and bool(getattr(prompt, "per_task", False))
    load = Load(
        rows=int(recipe.setting("per_device_train_batch_size")),
        tokens=min(int(recipe.setting("max_length")), getattr(model.config, "max_position_embeddings", 2**31)),
        prefix=int(max(length) if isinstance(length, tuple) else length),
        prefixes=len(config.task_names) if by_task else 1,
        dtype_bytes=TYPES.get(str(recipe.setting("dtype")), 2),
        devices=gpus,
    )
    shape = Shape.of(model.config)
    sizes = Sizes(
        base=sum(p.numel() for p in model.parameters()),
        layer=largest_layer(model),
        trained=trainable_parameters(config, model),
    )
    return Plan(
        shape, sizes, load, memory(shape, sizes, load), memory(shape, sizes, load, True), communication(sizes, load)
    )


def empty_model(path: str) -> PreTrainedModel:
    """A model by its configuration alone, without memory for its weights.

    Raises:
        PemlError: there is none, or it is no language model.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config).from_config(config)
    except PemlError:
        raise
    except Exception as error:  # hub, network and configurations fail in their own ways
        raise PemlError(
            f"no configuration of a model can be read from {path} ({one_line(error)}): give --model-config FOLDER"
        ) from error
    if model.config.is_encoder_decoder:
        raise PemlError(f"{path} is an encoder-decoder: the formulas are of decoders and encoders")
    return model


def largest_layer(model: PreTrainedModel) -> int:
    """Numbers of the part that FSDP gathers at a time: a block of the stack."""
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max((sum(p.numel() for p in block.parameters()) for stack in stacks for block in stack), default=0)
