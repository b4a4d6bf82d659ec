"""One axis after the other: a prompt and then its adapter, or the other way round."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from peml.errors import PemlError
from peml.mixing import MixtureSampler
from peml.regimes.stages import Part, in_turn
from peml.training.data import TaskRows
from peml.training.folder import RunFolder
from peml.training.launch import Launch
from peml.training.recipe import Recipe
from peml.training.regime import Sequential
from peml.training.run import Stage, attach
from peml.training.streaming import StreamedRows, training_rows
from peml.training.workbench import prepare

FROZEN = {"prompt": ("prompt", "architecture"), "adapter": ("adapter", "other")}
"""Parts of an axis, as `PemlModel.parts` calls them; what `modules_to_save` names goes with the adapter."""


def sequential(recipe: Recipe, launch: Launch) -> RunFolder:
    """Train one axis, freeze it, and train the other; both together make as many steps as a joint training.

    Paper: the ablation of PEML, arXiv:2605.14055, "parallel beats sequential"; how it was done is not known. Our
    choice: the second axis is not there yet in the first stage; each stage has a whole schedule of learning rates; a
    search and its end are part of the prompt's stage, `finetune_fraction` is of its steps; heads train in both; the
    second stage goes on behind the rows of the first, so that both together see those of a joint training.

    Args:
        recipe: whose regime says the order, and the first axis's share of the steps.
        launch: where, and what is there already.

    Raises:
        PemlError: bad input, before anything is written; or a stage that diverged.
    """
    how = recipe.how
    assert isinstance(how, Sequential)
    first, second = ("prompt", "adapter") if how.order == "prompt_first" else ("adapter", "prompt")
    lengths = _lengths(recipe, how.split)

    def prepared(folder: RunFolder) -> dict[str, Part]:
        bench = launch.workbench or prepare(recipe)
        _check_rows(recipe, training_rows(bench))
        bench.check()
        alone = bench.config()
        setattr(alone, second, None)
        if second == "adapter":
            alone.modules_to_save = None
        earlier = RunFolder(folder.stages / first)
        own = recipe.stage(list(bench.tasks), train={**recipe.train, **lengths[0]}, evaluate_before=False)
        return {
            first: Part(own, bench, Stage(attach=lambda bench: attach(bench.model, copy.deepcopy(alone)))),
            second: Part(
                recipe,
                bench,
                Stage(
                    begin=lambda model: _taken_over(model, earlier),
                    fresh=[],
                    train=lengths[1],
                    frozen=FROZEN[first],
                    behind=earlier,
                ),
            ),
        }

    return in_turn(recipe, launch, prepared)


def _check_rows(recipe: Recipe, rows: TaskRows) -> None:
    """Find now whether tasks will have given all that `mixing.epochs` allows before the second stage has ended.

    Raises:
        PemlError: they will.
    """
    if recipe.mixing.epochs is None or isinstance(rows, StreamedRows):
        return
    args = recipe.training_arguments("rows")
    size = args.train_batch_size
    sampler = MixtureSampler(rows.row_tasks, recipe.build_mixing(), recipe.seed, size, task_names=rows.task_names)
    counted = args.max_steps * size * args.gradient_accumulation_steps * args.world_size
    sampler.check(counted if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(sampler)))


def _lengths(recipe: Recipe, split: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """`train` of the two stages: together as many steps, or epochs, as the recipe has.

    Raises:
        PemlError: a single step cannot be shared.
    """
    if "num_train_epochs" in recipe.train and "max_steps" not in recipe.train:
        epochs = recipe.train["num_train_epochs"]
        return {"num_train_epochs": split * epochs}, {"num_train_epochs": (1 - split) * epochs}
    steps = int(recipe.setting("max_steps"))
    if steps < 2:
        raise PemlError("regime sequential shares train.max_steps among two stages: give it 2 or more")
    first = min(max(1, round(split * steps)), steps - 1)
    return {"max_steps": first}, {"max_steps": steps - first}


@torch.no_grad()
def _taken_over(model: PeftModel, earlier: RunFolder) -> None:
    """Put all that an earlier stage has trained in place of what is fresh."""
    model.load_adapter(str(earlier.adapter), "earlier")
    name = model.active_adapters[0]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            for kind in module.adapter_layer_names:
                held = getattr(module, kind)
                if "earlier" in held:
                    held[name].load_state_dict(held["earlier"].state_dict())
    model.delete_adapter("earlier")
