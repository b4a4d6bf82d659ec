"""What `metrics.json` says of a run beside the scores."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import version
from typing import Any

import torch

from peml.attached import count
from peml.config import part_to_dict
from peml.evaluation import average, suite_averages
from peml.prompts import PrefixGenerator
from peml.training.progress import RunLog, kept
from peml.training.trainer import MultiTaskTrainer, learning_rates
from peml.training.workbench import Workbench


def record_of(
    bench: Workbench, trainer: MultiTaskTrainer, log: RunLog, metrics: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Losses, parameters, cost and environment of a training that has come to its end."""
    tuner = trainer.tuner
    config = tuner.config_in_force
    assert config is not None
    trained = {part: [p for p in own if p.requires_grad] for part, own in tuner.parts().items()}
    record = {
        "average": {when: average(metrics[when], bench.tasks) for when in ("before", "after") if when in metrics},
        "suites": {when: suite_averages(metrics[when], bench.tasks) for when in ("before", "after") if when in metrics},
        "train_loss": {t: {"first": log.first_loss[t], "last": log.last_loss[t]} for t in log.first_loss},
        "parameters": {part: count(own) for part, own in trained.items() if own},
        "learning_rates": learning_rates(trainer),
        "steps": trainer.state.global_step,
        **kept(trainer.args, trainer.state),
        "train_seconds": round(seconds, 3),
        "peak_memory_bytes": _peak_memory(),
        "adapter": part_to_dict(config.adapter),
        "prompt": part_to_dict(config.prompt),
        "environment": environment(),
    }
    if isinstance(tuner.prompt, PrefixGenerator):
        record["architecture"] = tuner.prompt.architecture().to_dict()
    return record


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


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
