"""What stands between the trainer and a rule of balance: the losses of a step, its state in checkpoints, its log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peml.balance import BALANCES, Balance, Rule, Step, shares
from peml.errors import PemlError
from peml.training.entries import first_problem, near
from peml.training.gradients import TaskGradients, conflicts

STATE = "balance.safetensors"
"""File of a checkpoint that holds the state of its rule."""

MEASURED_EVERY = 100
"""Steps between two measurements of the tasks' gradients, where they are not asked for and can be had: our choice."""

MEASURED_NUMBERS = 2**28
"""Most numbers that a measurement nobody asked for may hold: 1 GiB in fp32."""


def read_balance(raw: Any) -> Balance:
    """The section of a recipe: the name of a rule, or a mapping of its settings.

    Raises:
        PemlError: naming the key.
    """
    if isinstance(raw, Balance):
        return raw
    raw = {"by": raw} if isinstance(raw, str) else raw
    if not isinstance(raw, dict):
        raise PemlError(f"balance must be a name ({', '.join(BALANCES)}) or a mapping with `by`, not {raw!r}")
    settings = dict(raw)
    by = settings.pop("by", "equal")
    if by not in BALANCES:
        raise PemlError(f"balance.by must be one of {', '.join(BALANCES)}, not {by!r}{near(str(by), BALANCES)}")
    kind = BALANCES[by]
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise PemlError(f"balance: {first_problem(error, ['by', *kind.model_fields])}") from None


def write_balance(balance: Balance) -> dict[str, Any]:
    """The section again."""
    name = next(name for name, kind in BALANCES.items() if kind is type(balance))
    return {"by": name, **balance.model_dump(exclude_none=True)}


class Balancer:
    """A rule at work.

    Args:
        balance: its settings.
        task_names: in the order of their ids.
        static: weight of each task that never changes; None: all 1.
        seed: of what the rule draws.
        obstacle: why the gradients of the tasks cannot be had; None: they can.

    Raises:
        PemlError: the rule needs them, or they are asked for, and they cannot be had.
    """

    def __init__(
        self,
        balance: Balance,
        task_names: Sequence[str],
        static: Mapping[str, float] | None,
        seed: int,
        obstacle: str | None = None,
    ) -> None:
        self.balance, self.task_names, self.seed = balance, list(task_names), seed
        name = write_balance(balance)["by"]
        if obstacle is not None and (balance.needs_gradients or balance.gradients_every):
            wants = f"balance {name!r}" if balance.needs_gradients else "balance.gradients_every"
            raise PemlError(f"{wants} needs the gradient of each task by itself, which cannot be had {obstacle}")
        self.every = balance.gradients_every
        if self.every is None:
            self.every = 0 if obstacle is not None else MEASURED_EVERY
        self.rule = balance.build(len(self.task_names))
        ones = dict.fromkeys(self.task_names, 1.0)
        self.static = torch.tensor([(static or ones)[n] for n in self.task_names], dtype=torch.float64)
        self.learns = type(self.rule).update is not Rule.update
        self.sums: Tensor | None = None
        self.step: Step | None = None
        self.logs: dict[str, float] = {}

    def weights(self, losses: Tensor | None = None) -> Tensor:
        """Weight of each task in the loss, `[T]`."""
        return self.static * self.rule.weights(losses)

    def splits(self, steps_done: int, numbers: Callable[[], int]) -> bool:
        """Whether the next step runs task by task.

        Args:
            steps_done: optimiser steps so far.
            numbers: says how many the gradients of all tasks in a step would be.
        """
        if self.balance.needs_gradients:
            return True
        if not self.every or (steps_done + 1) % self.every:
            return False
        return self.balance.gradients_every is not None or numbers() <= MEASURED_NUMBERS

    def add(self, sums: Tensor) -> None:
        """Count the losses of a micro-batch, `[T]`."""
        sums = sums.detach()
        self.sums = sums if self.sums is None else self.sums + sums

    def close(
        self, steps_done: int, counts: Tensor, accelerator: Any, gradients: TaskGradients | None = None
    ) -> Tensor | None:
        """After the last backward pass of a step: combine gradients that were kept apart, and note what there is.

        Args:
            steps_done: optimiser steps so far.
            counts: by task over the whole step, `[T]`.
            accelerator: that sums over devices.
            gradients: those kept apart, of the shared and the single tasks' parameters.

        Returns:
            The loss of the step, where gradients were kept apart.
        """
        sums, self.sums = self.sums, None
        if sums is None or not (self.learns or gradients is not None):
            return None  # without waiting for the device
        counts = counts.cpu()
        losses = accelerator.reduce(sums, "sum").double().cpu() / counts.clamp_min(1)
        present, norms, loss = counts > 0, None, None
        if gradients is not None:
            norms = torch.zeros_like(losses)
            loss, norms[present] = self._combine(steps_done, counts, losses, present, gradients)
        self.step = Step(steps_done + 1, losses, present, norms)
        return loss

    def _combine(
        self, steps_done: int, counts: Tensor, losses: Tensor, present: Tensor, gradients: TaskGradients
    ) -> tuple[Tensor, Tensor]:
        """Write the gradient of the step; its loss, and the norms of the gradients of the tasks present."""
        gradients.reduce()
        gramian = gradients.gramian()
        parts = shares(self.balance.mean, counts, self.weights(losses))
        factors = self.rule.combine(gramian, parts[present], self.seed * 1_000_003 + steps_done)
        gradients.write(factors, parts)
        norms = gramian.diagonal().clamp_min(0).sqrt()
        names = [task for task, here in zip(self.task_names, present.tolist(), strict=True) if here]
        self.logs |= {f"gradient_norm/{task}": norm for task, norm in zip(names, norms.tolist(), strict=True)}
        if len(names) > 1:
            self.logs["conflicts"] = conflicts(gramian)
        if self.balance.needs_gradients:
            multiples = (factors * len(names)).tolist()
            self.logs |= {f"weight/{task}": part for task, part in zip(names, multiples, strict=True)}
        return (parts * losses).sum(), norms

    def update(self, after: Tensor | None = None, held_out: Tensor | None = None) -> None:
        """After the optimiser's step: let the rule learn."""
        step, self.step = self.step, None
        if step is not None and self.learns:
            self.rule.update(Step(step.number, step.losses, step.present, step.norms, after, held_out))

    def pop(self) -> dict[str, float]:
        """What is new for the log: weights as multiples of an equal part, and what was measured of gradients."""
        logs, self.logs = self.logs, {}
        if not self.balance.needs_gradients:
            weights = self.weights()
            parts = (weights / weights.mean()).tolist()
            logs |= {f"weight/{task}": part for task, part in zip(self.task_names, parts, strict=True)}
        return logs

    def save(self, folder: str | Path) -> None:
        """Write the rule's state into a checkpoint, if it has any."""
        state = dict(self.rule.state())
        if state:
            save_file(state, Path(folder) / STATE)

    def load(self, folder: str | Path) -> None:
        """Take it from there.

        Raises:
            PemlError: it is missing or damaged.
        """
        names = {name for name, _ in self.rule.named_buffers()}
        if not names:
            return
        try:
            state = load_file(Path(folder) / STATE)
            self.rule.restore(state)
        except (OSError, SafetensorError, KeyError) as error:
            raise PemlError(f"{Path(folder) / STATE} cannot be read ({error}): train from the start") from None
