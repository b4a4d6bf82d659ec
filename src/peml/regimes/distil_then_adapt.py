"""Multitask prompt tuning as its paper trains it: teachers, a student of all of them, adaptation to the targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from peml.attached import HOST
from peml.errors import PemlError
from peml.prompts import Attempt, MultitaskPrompt, Prompt
from peml.regimes.stages import Part, in_turn
from peml.training.data import TaskRows
from peml.training.distillation import Distillation
from peml.training.folder import RunFolder
from peml.training.launch import Launch
from peml.training.recipe import MixingSection, Recipe
from peml.training.regime import DistilThenAdapt
from peml.training.run import Stage
from peml.training.workbench import load_base, prepare
from peml.tuner import PemlModel


def distil_then_adapt(recipe: Recipe, launch: Launch) -> RunFolder:
    """Train a multitask prompt in three stages, each a run of its own below `stages/`, the last one the run itself.

    0. Teachers: one prompt per source task, by plain prompt tuning.
    1. Student: one multitask prompt for all sources, with the losses of `Distillation`; every batch has k ~ U{2..T}
       tasks. ATTEMPT has no student: its targets attend to the teachers themselves.
    2. Adaptation: the targets start at the student's shared prompt, and at the mean of the sources' factors; shared
       prompt and factors have learning rates of their own.

    Paper: MPT, arXiv:2303.02861, section 3. Our choice: the teachers' prompts are trained side by side, in mixed
    batches, which gives each of them gradients of its own task alone; a target that was a source keeps its own factors;
    all targets are adapted together; an adapter, where the method has one, is trained in the last stage only.

    Args:
        recipe: whose regime has sources, targets, and what is different in the first two stages.
        launch: where, and what is there already; of a workbench only model and tokenizer are used.

    Raises:
        PemlError: bad input, before anything is written; or a stage that diverged.
    """
    how = recipe.how
    assert isinstance(how, DistilThenAdapt)

    def prepared(folder: RunFolder) -> dict[str, Part]:
        stages = _recipes(recipe, how)
        held = launch.workbench
        base = load_base(recipe) if held is None else (held.tokenizer, held.model)
        # The rows of all stages first: the last one should not fail after hours in the others.
        benches = {name: prepare(stage, base=base) for name, stage in stages.items()}
        for bench in benches.values():
            if bench.form == "heads":
                raise PemlError("regime distil_then_adapt learns from answers in words: use it with a language model")
            TaskRows.encode(bench.tokenizer, bench.train, bench.max_length, bench.form)
            bench.check()
        teachers, student = (RunFolder(folder.stages / name) for name in ("teachers", "student"))
        begins: dict[str, Callable[[PeftModel], Distillation | None]] = {
            "teachers": lambda model: None,
            "student": lambda model: _taught(model, how, teachers) if "teachers" in stages else None,
            "targets": lambda model: _adapted(model, student) if "student" in stages else _sourced(model, teachers),
        }
        return {name: Part(stages[name], bench, Stage(begin=begins[name])) for name, bench in benches.items()}

    return in_turn(recipe, launch, prepared)


def _recipes(recipe: Recipe, how: DistilThenAdapt) -> dict[str, Recipe]:
    """Recipes of the stages, by name, in their order; without teachers if nothing is learnt from them."""
    everything = recipe.every_task()
    sources = how.source_names([task.name for task in everything])
    prompt = recipe.config().prompt
    assert isinstance(prompt, MultitaskPrompt | Attempt)
    stages = {}
    if how.distillation_weight > 0 or isinstance(prompt, Attempt):
        teacher = {
            "prompt.per_task": True,
            "prompt.num_virtual_tokens": prompt.num_virtual_tokens,
            "prompt.prompt_tuning_init": prompt.prompt_tuning_init,
            "prompt.prompt_tuning_init_text": prompt.prompt_tuning_init_text,
            "prompt.tokenizer_name_or_path": prompt.tokenizer_name_or_path,
        }
        # Their prompts are whole, not factors of one: the rate of those is none of theirs.
        common = {key: value for key, value in recipe.train.items() if key != "task_prompt_learning_rate"}
        stages["teachers"] = recipe.stage(
            sources, method="prompt-tuning", set=teacher, train=_train(common, how.teachers), evaluate_before=False
        )
    if isinstance(prompt, Attempt):
        return stages | {"targets": recipe}
    own = {f"prompt.{key}": value for key, value in dataclasses.asdict(prompt).items()}
    stages["student"] = recipe.stage(
        sources,
        method="mpt",
        set=own,
        train=_train(recipe.train, how.student),
        mixing=MixingSection(by="subset"),
        evaluate_before=False,
    )
    return stages | {"targets": recipe}


def _train(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`train` of a stage; epochs of its own replace the recipe's steps."""
    if "num_train_epochs" in own and "max_steps" not in own:
        common = {key: value for key, value in common.items() if key != "max_steps"}
    return {**common, **own}


def _taught(model: PeftModel, how: DistilThenAdapt, teachers: RunFolder) -> Distillation:
    """What the student learns from."""
    tuner = cast("PemlModel", model.base_model)
    teacher, _ = _prompt_of(model, teachers)
    return Distillation(tuner, teacher, how.distillation_weight, how.hidden_layers)


@torch.no_grad()
def _adapted(model: PeftModel, student: RunFolder) -> None:
    """Begin at the shared prompt of the student; factors of a new task at the mean of the sources'."""
    tuner = cast("PemlModel", model.base_model)
    config, prompt = tuner.config_in_force, tuner.prompt
    assert config is not None
    source, names = _prompt_of(model, student)
    by_task = set(prompt.task_parameters)
    for key, parameter in prompt.named_parameters():
        learnt: Tensor = source.get_parameter(key)
        if key in by_task:
            rows = [learnt[names.index(n)] if n in names else learnt.mean(0) for n in config.task_names]
            learnt = torch.stack(rows)
        parameter.copy_(learnt)


@torch.no_grad()
def _sourced(model: PeftModel, teachers: RunFolder) -> None:
    """The teachers' prompts are what the targets' attend to."""
    source, _ = _prompt_of(model, teachers)
    model.base_model.prompt.sources.copy_(source.get_parameter("tokens"))


def _prompt_of(model: PeftModel, folder: RunFolder) -> tuple[Prompt, list[str]]:
    """The trained prompt of an earlier stage, and the tasks of its rows."""
    model.load_adapter(str(folder.adapter), "earlier")
    prompt: Prompt = model.base_model.model.get_submodule(HOST).peml_prompt["earlier"]
    names = list(model.peft_config["earlier"].task_names)
    model.delete_adapter("earlier")
    return prompt, names
