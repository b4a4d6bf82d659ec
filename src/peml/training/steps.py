"""The part of the trainer that runs steps task by task where a balance or the log wants it, and lets balances learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peml.balance import Balance, CoBa
from peml.config import PemlConfig
from peml.mixing import InTurn, MixtureSampler, Onward
from peml.training.balancing import Balancer
from peml.training.bilevel import ArchitectureSteps
from peml.training.gradients import TaskGradients, rows_of
from peml.training.loss import LossMeter
from peml.training.search import SearchLog
from peml.tuner import PemlModel


class Stateful(Protocol):
    """What has a file of its own in a checkpoint."""

    def save(self, folder: str) -> None:
        """Write it."""

    def load(self, folder: str) -> None:
        """Read it."""


class BalancedSteps(SearchLog):
    """Trainer whose steps may keep the gradients of tasks apart until the last of them is known."""

    tuner: PemlModel
    task_names: list[str]
    balance: Balance
    balancer: Balancer
    sampler: MixtureSampler | Onward | InTurn | None = None
    held_out: tuple[int, ...] = ()
    architect: ArchitectureSteps | None = None
    states: list[Stateful]
    coming: list[dict[str, Any]]
    _meter: LossMeter
    _penalties: dict[str, Tensor]
    _gradients: TaskGradients | None = None
    _batches: tuple[dict[str, Any], ...] = ()
    _counts: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.states, self.coming = [], []
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own; the batches of the coming step are kept for what looks ahead."""
        self.coming, counts = super().get_batch_samples(*args, **kwargs)
        return self.coming, counts

    def sums_by_task(self, logits: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses and counts of a batch, `[T]`."""
        raise NotImplementedError

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is called with, of a batch."""
        raise NotImplementedError

    def _obstacle(self, config: PemlConfig, distillation: object) -> str | None:
        """Why the rows of a step cannot be run task by task, if they cannot."""
        if config.adapter is not None and config.adapter.feature_loss_weight > 0:
            return "with adapter.align, which compares the tasks of a batch"
        if distillation is not None:
            return "while a student is distilled, whose loss is one over all rows"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "under FSDP or DeepSpeed, where no device has a whole gradient: use DDP"
        if self.args.fp16:
            return "with fp16, whose scaled gradients may not be finite: use bf16"
        return None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Transformers' step, or one task by task."""
        assert isinstance(num_items_in_batch, Tensor)
        done, last = self.state.global_step, self.accelerator.sync_gradients
        if self.balance.needs_losses_after:
            self._batches += (inputs,)
            self._counts = num_items_in_batch
        if self.balancer.splits(done, self._numbers):
            loss = self._split_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if last:
            gradients, self._gradients = self._gradients, None
            whole = self.balancer.close(done, num_items_in_batch, self.accelerator, gradients)
            loss = loss if whole is None else loss + whole.to(loss)
        return loss

    @property
    def step_rows(self) -> int:
        """Rows of a step, over all micro-batches and devices."""
        return int(self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size)

    def _numbers(self) -> int:
        """Numbers that the gradients of the tasks in a step are."""
        trained = sum(p.numel() for p in self._trained())
        return int(trained * min(len(self.task_names), self.step_rows))

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _split_step(self, model: nn.Module, inputs: dict[str, Any], whole: Tensor) -> Tensor:
        """Forward and backward of each task's rows by themselves; returns the penalties only."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        counts = whole.tolist()
        if self._gradients is None:
            present = [task for task, count in enumerate(counts) if count]
            stacked = self.tuner.per_task_parameters()
            self._gradients = TaskGradients(self._trained(), stacked, present, len(counts))
        # Devices exchange what they have once, at the end: each may have other tasks, and another number of them.
        with self.accelerator.no_sync(model=model):
            for task in sorted({task for task in inputs["tasks"] if counts[task]}):
                part = rows_of(inputs, task)
                with self.compute_loss_context_manager():
                    logits = model(**self.call(part)).logits
                    sums, seen = self.sums_by_task(logits, part)
                self._meter.add(sums, seen)
                self.balancer.add(sums)
                (sums[task] / counts[task]).backward()
                self._gradients.collect(task)
            terms = self.tuner.penalties()
            penalty = sum(terms.values(), torch.zeros((), device=self.args.device))
            penalty = penalty / self.current_gradient_accumulation_steps
            if penalty.requires_grad:
                (penalty / self.accelerator.num_processes).backward()
                self._gradients.collect(None)
        self._penalties = {name: term.detach() for name, term in terms.items()}
        return penalty.detach()  # type: ignore[no-any-return]

    def update_balance(self) -> None:
        """After the optimiser's step: let the balance learn from it."""
        after = held_out = None
        if self.balance.needs_losses_after and self._counts is not None:
            batches, counts, self._batches, self._counts = self._batches, self._counts, (), None
            after = self._losses(batches, self.model.training) / counts.cpu().clamp_min(1)
        if isinstance(self.balance, CoBa) and self.state.global_step % self.balance.every == 0:
            held_out = self._held_out_losses()
        self.balancer.update(after, held_out)

    @torch.no_grad()
    def _losses(self, batches: tuple[dict[str, Any], ...], training: bool) -> Tensor:
        """Sums by task over all devices, without a trace in the random numbers of the training."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        was = self.model.training
        total = torch.zeros(len(self.task_names), device=self.args.device)
        self.model.train(training)
        with torch.random.fork_rng(devices=devices), self.compute_loss_context_manager():
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                logits = self.model(**self.call(inputs)).logits
                total += self.sums_by_task(logits, inputs)[0]
        self.model.train(was)
        return self.accelerator.reduce(total, "sum").double().cpu()  # type: ignore[no-any-return]

    def _held_out_losses(self) -> Tensor:
        """Loss of each task on the rows that are never trained on; every device looks at a part of them."""
        rank, world = self.args.process_index, self.args.world_size
        size = self.args.eval_batch_size
        mine = self.held_out[rank::world]
        rows = [[self.train_dataset[i] for i in mine[at : at + size]] for at in range(0, len(mine), size)]
        batches = [self.data_collator(part) for part in rows]
        whole = self._get_num_items_in_batch(batches, self.args.device)
        if whole is None:  # no rows here, but elsewhere
            whole = self.accelerator.reduce(torch.zeros(len(self.task_names), dtype=torch.long).to(self.args.device))
        counts: Tensor = whole.cpu().clamp_min(1)
        return self._losses(tuple(batches), training=False) / counts

    # The states of a rule and of an architecture go with that of the optimiser.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            for state in self.states:
                state.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for state in self.states:
                state.load(checkpoint)


class StepUpdates(TrainerCallback):
    """Tells the sampler its epoch and the balance of each step, before a checkpoint is taken."""

    def __init__(self, trainer: BalancedSteps) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Accelerate does not reach the sampler in a run that is resumed on several devices."""
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimiser has made its step."""
        self.trainer.update_balance()
