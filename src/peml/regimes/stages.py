"""Regimes of several stages: each a run of its own below `stages/`, the last one the run itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peml.attached import HOOKS
from peml.training.folder import RunFolder, write_text
from peml.training.launch import Launch
from peml.training.recipe import Recipe
from peml.training.run import Stage, check_same_recipe, joint
from peml.training.workbench import Workbench

_COST = (
    "steps",
    "train_seconds",
    "peak_memory_bytes",
    "parameters",
    "learning_rates",
    "after",
    "average",
    "search",
    "bill",
)
"""What the record of the whole says of a stage."""


@dataclass(frozen=True)
class Part:
    """One stage.

    Args:
        recipe: of it; of the last one, that of the whole.
        bench: what it works on; all stages may share a model, which is plain between them.
        stage: what it wants of a training otherwise.
    """

    recipe: Recipe
    bench: Workbench
    stage: Stage


def in_turn(recipe: Recipe, launch: Launch, prepared: Callable[[RunFolder], Mapping[str, Part]]) -> RunFolder:
    """Run stages one after the other; those that are finished already are left as they are.

    Args:
        recipe: of the whole.
        launch: where, and what is there already.
        prepared: reads and checks what all stages need, before anything is written; called with the run's folder.

    Raises:
        PemlError: bad input, before anything is written; or a stage that diverged.
    """
    folder, resume, overwrite, console = launch.folder, launch.resume, launch.overwrite, launch.console
    arguments = recipe.training_arguments(str(folder.checkpoints))
    main, wait = arguments.process_index == 0, arguments.distributed_state.wait_for_everyone
    folder.check(resume=resume, overwrite=overwrite)
    if resume:
        check_same_recipe(recipe, folder)
        if folder.finished:
            return joint(recipe, Launch(launch.output, resume=True, console=console))
    parts = prepared(folder)
    wait()
    if main and not (resume and folder.is_run):
        folder.create(overwrite=overwrite)
        write_text(folder.recipe, recipe.to_yaml())
    wait()
    bill: dict[str, Any] = {}
    for number, (name, part) in enumerate(parts.items(), 1):
        last = number == len(parts)
        run = folder if last else RunFolder(folder.stages / name)
        if last or not run.finished:
            record = {"stages": bill} if last else {}
            stage = replace(part.stage, label=name, end=lambda model: model.unload(), record=record)
            try:
                joint(part.recipe, Launch(run.path, resume=run.is_run, console=console, workbench=part.bench), stage)
            except BaseException:
                # The base model is the caller's, and was plain.
                hooks = part.bench.model.__dict__.get(HOOKS)
                if hooks is not None:
                    hooks.opener.unload()
                raise
        metrics = run.read_metrics()
        bill[name] = {key: metrics[key] for key in _COST if key in metrics}
    return folder
