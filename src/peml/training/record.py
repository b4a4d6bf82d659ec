"""What `metrics.json` says of a run beside the scores."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from peml.attached import count
from peml.config import part_to_dict
from peml.evaluation import average, suite_averages
from peml.picture import draw, draw_traces, read_traces
from peml.prompts import PrefixGenerator
from peml.prompts.base import Prefix
from peml.prompts.cost import BYTES
from peml.training.bill import bill_of, devices, origin_of, search_bill
from peml.training.collapse import collapsed, majority_scores
from peml.training.folder import RunFolder, write_text
from peml.training.progress import RunLog, kept
from peml.training.search import gap_of
from peml.training.trainer import MultiTaskTrainer
from peml.training.workbench import Workbench
from peml.tuner import PemlModel


def record_of(
    bench: Workbench,
    trainer: MultiTaskTrainer,
    log: RunLog,
    metrics: dict[str, Any],
    seconds: float,
    stages: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Losses, parameters, cost and environment of a training that has come to its end.

    Args:
        bench: what it worked on.
        trainer: that did it.
        log: of it.
        metrics: scores before and after.
        seconds: that it took.
        stages: records of earlier stages.
    """
    tuner = trainer.tuner
    config = tuner.config_in_force
    assert config is not None
    trained = {part: [p for p in own if p.requires_grad] for part, own in tuner.parts().items()}
    bill, majority = bill_now(bench, trainer, seconds, stages), majority_scores(bench)
    record = {
        "average": {when: average(metrics[when], bench.tasks) for when in ("before", "after") if when in metrics},
        "suites": {when: suite_averages(metrics[when], bench.tasks) for when in ("before", "after") if when in metrics},
        "majority": majority,
        "collapsed": collapsed(majority, metrics["after"]),
        "train_loss": {t: {"first": log.first_loss[t], "last": log.last_loss[t]} for t in log.first_loss},
        "parameters": {part: count(own) for part, own in trained.items() if own},
        "deployed": deployed(tuner),
        "learning_rates": trainer.learning_rates(),
        "steps": trainer.state.global_step,
        **kept(trainer.args, trainer.state),
        "train_seconds": round(seconds, 3),
        "peak_memory_bytes": bill["total"]["peak_memory_bytes"],
        "bill": bill,
        "adapter": part_to_dict(config.adapter),
        "prompt": part_to_dict(config.prompt),
        "environment": environment(),
    }
    if config.groups is not None:
        record["groups"] = [level.to_json() for level in config.groups]
        record["active_parameters"] = tuner.active_parameters()
    gap = _gap(trainer, stages)
    if gap is not None:
        record["search"] = {"gap": gap}
    if isinstance(tuner.prompt, PrefixGenerator):
        record["architecture"] = tuner.prompt.architecture().to_dict()
    return record


@torch.no_grad()
def deployed(tuner: PemlModel) -> dict[str, int]:
    """Numbers of each part once it is deployed: of a prefix its keys and values for all tasks, however they were made.

    Args:
        tuner: with the adapter.
    """
    config, prompt = tuner.config_in_force, tuner.prompt
    own = {part: count(list(parameters)) for part, parameters in tuner.parts().items()}
    if config is not None and isinstance(prompt, Prefix):
        own.pop("architecture", None)
        layers = prompt(range(len(config.task_names)) if prompt.needs_task else None)
        own["prompt"] = sum(layer.keys.numel() + layer.values.numel() for layer in layers if layer is not None)
    return {part: numbers for part, numbers in own.items() if numbers}


def bill_now(
    bench: Workbench, trainer: MultiTaskTrainer, seconds: float, stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The bill of a training so far."""
    tuned = getattr(bench.recipe, "tuned", None)
    return bill_of(
        devices(trainer.args),
        seconds,
        trainer.state.global_step,
        trainer.schedule.record,
        {name: own["bill"] for name, own in stages.items() if "bill" in own},
        None if tuned is None else dict(tuned),
        origin_of(trainer.tuner.prompt),
    )


def write_architecture(
    folder: RunFolder,
    bench: Workbench,
    trainer: MultiTaskTrainer,
    seconds: float,
    stages: Mapping[str, Mapping[str, Any]],
) -> None:
    """What the search found, with its provenance, for runs that import it; nothing where nothing was searched.

    Args:
        folder: of the run.
        bench: what was trained on.
        trainer: of the training.
        seconds: that it has taken so far.
        stages: records of earlier stages.
    """
    prompt = trainer.tuner.prompt
    if not isinstance(prompt, PrefixGenerator) or prompt.searching:
        return
    imported = prompt.config.found
    gap, bill = _gap(trainer, stages), bill_now(bench, trainer, seconds, stages)
    origin = (
        imported.origin
        if imported is not None
        else {
            "base": bench.recipe.model,
            "tasks": list(bench.tasks),
            "seed": bench.recipe.seed,
            "steps": bill["search"]["steps"],
            "gap": None if gap is None else gap["lost"]["average"],
            "bill": search_bill(bill),
        }
    )
    dataclasses.replace(prompt.architecture(), origin=origin).save(folder.architecture)


def draw_search(folder: RunFolder, trainer: MultiTaskTrainer) -> None:
    """What the search found and how it went, as pictures in the run's folder; nothing where nothing was searched."""
    prompt = trainer.tuner.prompt
    if not isinstance(prompt, PrefixGenerator) or prompt.searching:
        return
    budget = None if prompt.config.found is not None else BYTES * prompt.config.budget(prompt.shape)
    picture = draw(prompt.architecture(), prompt.shape, tasks=trainer.task_names, budget_bytes=budget)
    write_text(folder.picture, picture)
    if curves := read_traces(folder.log):
        write_text(folder.curves, draw_traces(curves))


def _gap(trainer: MultiTaskTrainer, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of this training, or of the stage before it that searched."""
    own = gap_of(trainer.schedule.record, trainer.task_names)
    return own or next((stage["search"]["gap"] for stage in stages.values() if "search" in stage), None)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    packages = ("peml", "torch", "transformers", "peft", "accelerate", "datasets")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "device": device,
        "threads": torch.get_num_threads(),
    }
