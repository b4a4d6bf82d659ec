"""One adapter set per cluster of tasks, or groups of tasks that become smaller towards the top."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel

from peml.affinity import Affinity, How, find_affinity, show_affinity, write_affinity
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.groups import cluster_of, read_groups
from peml.training.folder import RunFolder, write_text
from peml.training.grouping import Grouped, RetrainCluster
from peml.training.launch import Launch
from peml.training.recipe import Recipe, load_recipe, validated
from peml.training.run import Stage, attach, check_same_recipe, joint, load_adapter
from peml.training.workbench import Workbench, prepare
from peml.tuner import PemlModel


def grouped(recipe: Recipe, launch: Launch) -> RunFolder:
    """Choose groups of tasks, by hand or by affinity, and train one adapter with them jointly.

    `one_plus_n`: every cluster has an adapter set of its own in all layers (CGC-LoRA's 1 + N, arXiv:2402.01684).
    `progressive`: all tasks share the lower layers, clusters the middle ones, and every task has its own at the top
    (Progressive Task-specific Adaptation, arXiv:2509.19602, which is about vision; thirds of the depth are our choice).
    Our choice: all groups are trained side by side, in mixed batches, in which a group gets gradients of its own rows
    alone; and they begin afresh, not as copies of the adapter that affinity was measured on. Where clusters are found,
    `affinity.json` and `affinity.svg` lie in the run's folder, and a run that goes on measures nothing again.

    Args:
        recipe: whose regime says the clusters, or how they are found.
        launch: where, and what is there already.

    Raises:
        PemlError: bad input, before anything is written; or a training that diverged.
    """
    how = recipe.how
    assert isinstance(how, Grouped)
    if isinstance(how.clusters, list):
        stage = Stage(attach=lambda bench: attach(bench.model, bench.config()))
        return joint(recipe, launch, stage)
    folder, console, resume = launch.folder, launch.console, launch.resume
    arguments = recipe.training_arguments(str(folder.checkpoints))
    main, wait = arguments.process_index == 0, arguments.distributed_state.wait_for_everyone
    folder.check(resume=resume, overwrite=launch.overwrite)
    names = [task.name for task in recipe.build_tasks()]
    if resume:
        check_same_recipe(recipe, folder)
    bench = launch.workbench or prepare(recipe)
    bench.check()
    known = folder.affinity if resume and folder.affinity.exists() else None
    given = known or (None if how.clusters == "auto" else Path(how.clusters))
    if given is not None:
        found = Affinity.load(given, names)
    else:
        wanted = How(how.warmup_steps, how.batches, how.batch_rows, how.lookahead, how.by, how.num_clusters)
        found = find_affinity(recipe, wanted, workbench=bench, console=console)
    # Each process has measured by itself, and a last digit may decide: all take what the main one found.
    (chosen,) = broadcast_object_list([how.levels(found.between, names)])
    levels = read_groups(chosen, names, "regime.clusters")
    if main and known is None:
        folder.create(overwrite=launch.overwrite)
        write_text(folder.recipe, recipe.to_yaml())
        write_affinity(found, folder.path)
    wait()
    if console is not None and main:
        show_affinity(found, console)

    def attached(bench: Workbench) -> PeftModel:
        config = bench.config()
        config.set_groups(levels)
        return attach(bench.model, config)

    # What another run has measured is in its bill.
    own = how.clusters == "auto"
    stages = {"affinity": {"train_seconds": found.seconds["total"], "bill": found.bill}} if own else {}
    stage = Stage(attach=attached, begin=lambda model: None, record={"stages": stages})
    return joint(recipe, Launch(folder.path, resume=True, console=console, workbench=bench), stage)


def retrain_cluster(recipe: Recipe, launch: Launch) -> RunFolder:
    """Start one cluster of a finished run afresh and train it alone; outputs of the others stay, bit for bit.

    Args:
        recipe: of all tasks; its regime names the run and the cluster.
        launch: where, and what is there already.

    Raises:
        PemlError: bad input, before anything is written; or no group has these tasks alone.
    """
    how = recipe.how
    assert isinstance(how, RetrainCluster)
    source = RunFolder.existing(how.run)
    if launch.output.resolve() == source.path.resolve():
        raise PemlError(f"{source.path} is the run whose cluster is trained again: choose another --output")

    def attached(bench: Workbench) -> PeftModel:
        model = load_adapter(bench.model, source, trainable=True)
        tuner = cast("PemlModel", model.base_model)
        tuner.restart(how.tasks)
        tuner.freeze_others(how.tasks)
        return model

    stage = Stage(attach=attached, tasks=how.tasks, fresh=how.tasks)
    return joint(recipe, launch, stage)


def again_recipe(run: str | Path, task: str) -> Recipe:
    """The recipe that trains the cluster of a task of a finished run once more.

    Raises:
        PemlError: no finished run, an unknown task, or an adapter without clusters.
    """
    source = RunFolder.existing(run)
    config = cast("PemlConfig", PeftConfig.from_pretrained(str(source.adapter)))
    names = config.task_names
    if task not in names:
        raise PemlError(f"there is no task {task!r} in {source.path}; it has {', '.join(names)}")
    if config.groups is None:
        raise PemlError(f"the tasks of {source.path} share one adapter: it has no clusters to train again")
    settings: dict[str, Any] = yaml.safe_load(load_recipe(source.recipe).to_yaml())
    settings["train"].pop("output_dir", None)
    # Its best step may be chosen by a task that no longer changes.
    settings["train"].pop("metric_for_best_model", None)
    cluster = cluster_of(config.groups, names, task)
    how = {"name": "retrain_cluster", "run": str(source.path.resolve()), "tasks": cluster}
    return validated(settings | {"regime": how}, source.recipe)
