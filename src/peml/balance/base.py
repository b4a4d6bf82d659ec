"""What every way of balancing is made of: settings, a rule with its state, and what a rule is told after a step.

A rule never sits in the graph of the loss: it gives weights before a step, and is told afterwards what happened. That
makes it the same under gradient accumulation and on several devices, and lets its state be saved with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from peml.balance.means import Mean


class Balance(BaseModel):
    """How tasks share a loss and a gradient; the base of every rule's settings.

    Args:
        mean: how the losses of rows become one: see `peml.balance.means`.
        gradients_every: steps between two measurements of each task's gradient, for the log; 0: never; None: 100
            where it can be done. Rules that need these gradients anyway have them in every step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    needs_gradients: ClassVar[bool] = False
    """Whether the rule needs the gradient of each task in every step."""
    needs_losses_after: ClassVar[bool] = False
    """Whether it needs the losses of the same rows after the step."""

    mean: Mean = "task_mean"
    gradients_every: int | None = Field(None, ge=0)

    def build(self, num_tasks: int) -> Rule:
        """The rule at its start."""
        return Rule(num_tasks)


class Equal(Balance):
    """The same weight for all tasks, times the `weight` of their entries."""


@dataclass(frozen=True)
class Step:
    """What a rule is told of a step, over all its micro-batches and devices.

    Args:
        number: of the step, from 1.
        losses: of the tasks before the step, 0 where `present` is false.
        present: tasks that had rows.
        norms: of the gradient of each task's unweighted loss, where it was measured.
        after: losses of the same rows after the step, for a rule that needs them.
        held_out: losses of rows that are never trained on, for a rule that needs them, when they are due.

    Shapes:
        all tensors `[T]`, in fp64 on the CPU.
    """

    number: int
    losses: Tensor
    present: Tensor
    norms: Tensor | None = None
    after: Tensor | None = None
    held_out: Tensor | None = None


class Rule(nn.Module):
    """A balance with its state, which is in its buffers.

    Args:
        num_tasks: T.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks

    def weights(self, losses: Tensor | None = None) -> Tensor:
        """Weight of each task, `[T]`; only their ratios matter.

        Args:
            losses: of this step, 0 where a task is absent; known beforehand only where gradients are kept apart.
        """
        return torch.ones(self.num_tasks, dtype=torch.float64)

    def combine(self, gramian: Tensor, shares: Tensor, seed: int) -> Tensor:
        """Factor of each task's gradient, `[k]`, for the k tasks present; the shares themselves where nothing is done.

        Args:
            gramian: inner products of the gradients of the tasks' unweighted losses, `[k, k]`.
            shares: part of each task in the loss, `[k]`.
            seed: for rules that draw; the same on all devices.
        """
        return shares

    def update(self, step: Step) -> None:
        """Learn from a step."""

    def state(self) -> Mapping[str, Tensor]:
        """Everything that must outlive an interruption."""
        return {name: value.clone() for name, value in self.named_buffers()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; histories may have any length."""
        for name, _ in list(self.named_buffers()):
            owner, _, own = name.rpartition(".")
            setattr(self.get_submodule(owner), own, state[name].clone())


class Adam(nn.Module):
    """Adam over one number per task (arXiv:1412.6980), which leaves absent tasks where they are, momentum and all.

    torch's own would move an absent task by what its momentum remembers.

    Args:
        num_tasks: T.
        rate: its learning rate.
        decay: added to the gradient, times the value.
    """

    first: Tensor
    second: Tensor
    steps: Tensor

    def __init__(self, num_tasks: int, rate: float, decay: float = 0.0) -> None:
        super().__init__()
        self.rate, self.decay = rate, decay
        for name in ("first", "second", "steps"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))

    def forward(self, values: Tensor, gradient: Tensor, present: Tensor) -> Tensor:
        """The values after a step; all `[T]`."""
        gradient = gradient + self.decay * values
        self.steps = self.steps + present
        self.first = torch.where(present, 0.9 * self.first + 0.1 * gradient, self.first)
        self.second = torch.where(present, 0.999 * self.second + 0.001 * gradient**2, self.second)
        count = self.steps.clamp_min(1)
        move = (self.first / (1 - 0.9**count)) / ((self.second / (1 - 0.999**count)).sqrt() + 1e-8)
        return torch.where(present, values - self.rate * move, values)


def over_present(logits: Tensor, present: Tensor) -> Tensor:
    """Softmax over the tasks present, 0 for the others."""
    return torch.softmax(logits.masked_fill(~present, -torch.inf), dim=0) if bool(present.any()) else present.double()


def buffers(owner: nn.Module, **values: Any) -> None:
    """Register fp64 state."""
    for name, value in values.items():
        owner.register_buffer(name, torch.as_tensor(value, dtype=torch.float64))
