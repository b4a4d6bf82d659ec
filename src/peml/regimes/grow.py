"""Adding tasks to a run: a trained adapter gets them, and they are trained, alone or with the tasks it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml
from peft import PeftModel

from peml.errors import PemlError
from peml.training.folder import RunFolder
from peml.training.launch import Launch
from peml.training.recipe import Recipe, load_recipe, read_yaml, validated
from peml.training.regime import DistilThenAdapt, Grow
from peml.training.run import Stage, joint, load_adapter
from peml.training.workbench import Workbench
from peml.tuner import PemlModel

_ALLOWED = ("tasks", "train", "mixing", "balance")


def grow(recipe: Recipe, launch: Launch) -> RunFolder:
    """Add tasks to the adapter of a finished run, and train them.

    With `freeze: shared` only what belongs to the new tasks alone is trained, on their rows alone: the outputs of the
    other tasks stay as they are, bit for bit. Otherwise everything is trained, on the rows of all tasks, so that the
    old ones are not forgotten (our choice).

    Args:
        recipe: of all tasks; its regime names the run that is grown and the tasks that are new.
        launch: where, and what is there already.

    Raises:
        PemlError: bad input, before anything is written; or an adapter whose parameters are all shared.
    """
    how = recipe.how
    assert isinstance(how, Grow)
    source = RunFolder.existing(how.run)
    if launch.output.resolve() == source.path.resolve():
        raise PemlError(f"{source.path} is the run that is grown: choose another --output")
    stage = Stage(
        attach=lambda bench: _attached(bench, source, how),
        tasks=how.trained([task.name for task in recipe.build_tasks()]),
        fresh=how.tasks,
    )
    return joint(recipe, launch, stage)


def _attached(bench: Workbench, source: RunFolder, how: Grow) -> PeftModel:
    """The base model with the run's adapter, one task larger for each new one."""
    wanted = bench.config().heads
    model = load_adapter(bench.model, source, trainable=True)
    tuner = cast("PemlModel", model.base_model)
    config = tuner.config_in_force
    assert config is not None
    names = list(bench.tasks)
    if names[: len(config.task_names)] != config.task_names:
        raise PemlError(f"{source.path} has the tasks {', '.join(config.task_names)}, which must come first, in order")
    for name in names[len(config.task_names) :]:
        at = names.index(name)
        beside = None if how.beside == name else how.beside
        if wanted is None:
            tuner.add_task(name, how.init, beside=beside)
        else:
            tuner.add_task(name, how.init, wanted.num_labels[at], wanted.scale_of(at), beside=beside)
    if how.freeze == "shared":
        try:
            # Groups that have none but new tasks are theirs alone, whole.
            tuner.freeze_others(how.tasks)
        except PemlError as error:
            raise PemlError(
                "all parameters of this adapter are shared by its tasks: none would be left to train with --freeze "
                "shared; add --freeze none, which trains everything on the rows of all tasks"
            ) from error
    return model


def grown_recipe(
    run: str | Path, added: str | Path, freeze: str, init: str = "identity", beside: str | None = None
) -> Recipe:
    """The recipe of a run with further tasks.

    Args:
        run: folder of the finished run.
        added: YAML file with a task, a list of tasks, or `tasks` and what else is to change: `train`, `mixing`,
            `balance`.
        freeze: `shared` or `none`.
        init: where the new tasks' own parameters start.
        beside: task whose groups they join; None: they have their own.

    Raises:
        PemlError: naming the file and the key.
    """
    source = RunFolder.existing(run)
    old, given = load_recipe(source.recipe), read_yaml(added)
    # A list of tasks, or a single one, stands for itself.
    if not (isinstance(given, dict) and "tasks" in given):
        given = {"tasks": given if isinstance(given, list) else [given]}
    for key in given:
        if key not in _ALLOWED:
            raise PemlError(f"{added}: {key} cannot change when tasks are added; allowed are {', '.join(_ALLOWED)}")
        kind = {"tasks": list, "train": dict | None}.get(key, object)
        if not isinstance(given[key], kind):
            what = "a list" if key == "tasks" else "a mapping"
            raise PemlError(f"{added}: {key} must be {what}, not {given[key]!r}")
    names, shots = [task.name for task in old.build_tasks()], getattr(old.how, "shots", None)
    if isinstance(old.how, DistilThenAdapt):
        # Sources are no tasks of the adapter.
        old = old.stage(names)
    settings: dict[str, Any] = yaml.safe_load(old.to_yaml())
    for entry in settings["tasks"] if shots else ():
        entry["limit_train"] = min(shots, entry.get("limit_train", shots))
    count = len(names)
    settings |= {key: given[key] for key in ("mixing", "balance") if given.get(key) is not None}
    changed = given.get("train") or {}
    # The step that was kept was chosen by the old tasks, which may not change any more.
    dropped = {"output_dir", "metric_for_best_model", "early_stopping_patience", "load_best_model_at_end"}
    # A training that is now counted in epochs is no longer counted in steps.
    dropped |= {"max_steps"} if "num_train_epochs" in changed else set()
    settings["train"] = {k: v for k, v in settings["train"].items() if k not in dropped} | changed
    settings["tasks"] = [*settings["tasks"], *given["tasks"]]
    settings.pop("regime", None)
    names = [task.name for task in validated(settings, added).every_task()]
    how = {"name": "grow", "run": str(source.path.resolve()), "tasks": names[count:], "freeze": freeze, "init": init}
    how |= {} if beside is None else {"beside": beside}
    return validated(settings | {"regime": how}, added)
