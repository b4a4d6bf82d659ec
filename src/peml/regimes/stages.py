"""Regimes of several stages: each a run of its own below `stages/`, the last one the run itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from peml.attached import HOOKS
from peml.training.folder import RunFolder, write_text
from peml.training.recipe import Recipe
from peml.training.run import Stage, check_same_recipe, train
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


def in_turn(
    recipe: Recipe,
    output: Path,
    prepared: Callable[[RunFolder], Mapping[str, Part]],
    *,
    resume: bool,
    overwrite: bool,
    console: Console | None,
) -> RunFolder:
    """Run stages one after the other; those that are finished already are left as they are.

    Args:
        recipe: of the whole.
        output: folder of the run.
        prepared: reads and checks what all stages need, before anything is written; called with the run's folder.
        resume: go on where an interrupted run stopped, in whichever stage.
        overwrite: replace a run that lies there.
        console: where progress is shown; None: nowhere.

    Raises:
        PemlError: bad input, before anything is written; or a stage that diverged.
    """
    folder = RunFolder(output)
    arguments = recipe.training_arguments(str(folder.checkpoints))
    main, wait = arguments.process_index == 0, arguments.distributed_state.wait_for_everyone
    folder.check(resume=resume, overwrite=overwrite)
    if resume:
        check_same_recipe(recipe, folder)
        if folder.finished:
            return train(recipe, output, resume=True, console=console, stage=Stage())
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
                train(part.recipe, run.path, resume=run.is_run, console=console, workbench=part.bench, stage=stage)
            except BaseException:
                # The base model is the caller's, and was plain.
                hooks = part.bench.model.__dict__.get(HOOKS)
                if hooks is not None:
                    hooks.opener.unload()
                raise
        metrics = run.read_metrics()
        bill[name] = {key: metrics[key] for key in _COST if key in metrics}
    return folder
