"""The search of an architecture inside a training: how far it is, its end, and what the end costs.

The record of the end is one entry of the log, which is in every checkpoint: a run that is resumed has it still.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peml.errors import PemlError
from peml.prompts import PrefixGenerator
from peml.tuner import PemlModel

FINETUNE_FRACTION = 0.1
"""Share of the training that follows the search, on the derived architecture: our choice."""

Scores = dict[str, dict[str, float]]
"""Metrics by task."""


def steps_of_search(max_steps: int, finetune_fraction: float) -> int:
    """Steps of a training before its architecture is derived."""
    return max(1, round(max_steps * (1 - finetune_fraction)))


def searching(prompt: Any) -> bool:
    """Whether a prompt's architecture is still open."""
    return isinstance(prompt, PrefixGenerator) and prompt.searching


class SearchSchedule(TrainerCallback):
    """Tells a searching prompt how far training is, and derives its architecture when the search is over.

    Everything follows from the step number, so that a resumed run does what an uninterrupted one does.

    Args:
        tuner: whose prompt searches.
        finetune_fraction: share of the steps after the search.
        log: takes the record of its end; None: nobody does.
        measure: scores of the model as it is, taken just before and just after it is derived; None: they are not.
        clock: seconds of the training so far, of all its parts if it was interrupted.
        memory: most bytes held so far.
        derived: called when the search has ended.

    Raises:
        PemlError: a share that leaves no step to the search.
    """

    def __init__(
        self,
        tuner: PemlModel,
        finetune_fraction: float,
        *,
        log: Callable[[dict[str, float]], None] | None = None,
        measure: Callable[[], Scores] | None = None,
    ) -> None:
        if not 0 <= finetune_fraction < 1:
            raise PemlError(f"finetune_fraction must be 0 or more and below 1, not {finetune_fraction}")
        self.tuner, self.finetune_fraction = tuner, finetune_fraction
        self.log, self.measure = log, measure
        self.clock: Callable[[], float] = time.perf_counter
        self.memory: Callable[[], int] = lambda: 0
        self.derived: Callable[[], None] = lambda: None
        self.progress = 0.0
        self.record: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the end of the search, if a resumed run is past it."""
        self.record = next((entry for entry in state.log_history if "derive/step" in entry), {})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Progress of the search; at its end, derive."""
        if not searching(self.tuner.prompt):
            return
        steps = steps_of_search(state.max_steps, self.finetune_fraction)
        self.progress = min(1.0, state.global_step / steps)
        self.tuner.prompt.set_progress(self.progress)
        if state.global_step >= steps:
            self._derive(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A search that training left open is closed."""
        if searching(self.tuner.prompt):
            self._derive(state.global_step)

    def _derive(self, step: int) -> None:
        begun = self.clock()
        record = {"step": float(step), "search_seconds": begun, "search_peak_bytes": float(self.memory())}
        before = None if self.measure is None else self.measure()
        self.tuner.prompt.derive()
        if before is not None and self.measure is not None:
            for when, scores in (("before", before), ("after", self.measure())):
                record[f"{when}/average"] = sum(own["score"] for own in scores.values()) / len(scores)
                record |= {f"{when}/{task}/{name}": v for task, own in scores.items() for name, v in own.items()}
            record["lost"] = 100 * (record["before/average"] - record["after/average"])
        record |= {"seconds": self.clock() - begun, "peak_bytes": float(self.memory())}
        self.record = {f"derive/{key}": value for key, value in record.items()}
        if self.log is not None:
            self.log(dict(self.record))
        self.derived()


class SearchCallback(SearchSchedule):
    """Leads a search under a Trainer that knows nothing of it, TRL's `SFTTrainer` for one, and adds its penalties.

        trainer = SFTTrainer(model, ...); trainer.add_callback(SearchCallback(trainer.model))

    The penalties depend on the architecture alone, so their gradient is added just before the optimiser's step: behind
    the clipping, and once per step whatever is accumulated. `MultiTaskTrainer` and `MultiTaskSFTTrainer` need none.

    Args:
        model: the `PeftModel` that is trained.
        finetune_fraction: share of the steps after the search.

    Raises:
        PemlError: no adapter of peml, or a loss on features, which belongs into the loss of each forward.
    """

    def __init__(self, model: nn.Module, finetune_fraction: float = FINETUNE_FRACTION) -> None:
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, PemlModel):
            raise PemlError("SearchCallback needs a model with a PEML adapter: get_peft_model(model, PemlConfig(...))")
        config = tuner.config_in_force
        if config is not None and config.adapter is not None and config.adapter.feature_loss_weight > 0:
            raise PemlError("adapter.align is a loss of every forward, which a callback cannot add: MultiTaskTrainer")
        super().__init__(tuner, finetune_fraction)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the gradient of the penalties."""
        if searching(self.tuner.prompt):
            terms = [term for term in self.tuner.prompt.penalties().values() if term.requires_grad]
            if terms:
                torch.autograd.backward(terms)


class SearchLog(Trainer):
    """Trainer that logs how a search goes, as `search/...`, beside the loss."""

    tuner: PemlModel

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add entropy, lengths, temperature and leading weights while the architecture is open."""
        prompt = self.tuner.prompt
        if "loss" in logs and searching(prompt):
            logs |= {f"search/{name}": value for name, value in prompt.traces().items()}
        super().log(logs, start_time)


def gap_of(record: Mapping[str, float], tasks: Sequence[str]) -> dict[str, Any] | None:
    """Scores just before and just after discretisation, and the points between them; None: it was not measured.

    Args:
        record: as `SearchSchedule` logs it.
        tasks: whose scores it has.
    """
    if "derive/lost" not in record:
        return None
    gap: dict[str, Any] = {"step": int(record["derive/step"])}
    for when in ("before", "after"):
        # By name, not by slash: metrics of a group of rows have slashes of their own.
        heads = {task: f"derive/{when}/{task}/" for task in tasks}
        scores = {
            task: {key[len(head) :]: value for key, value in record.items() if key.startswith(head)}
            for task, head in heads.items()
        }
        gap[when] = {"average": record[f"derive/{when}/average"], "tasks": {t: own for t, own in scores.items() if own}}
    lost = {
        task: 100 * (scores["score"] - gap["after"]["tasks"][task]["score"])
        for task, scores in gap["before"]["tasks"].items()
        if "score" in scores
    }
    gap["lost"] = {"average": record["derive/lost"], "tasks": lost}
    return gap
