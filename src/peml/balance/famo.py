"""FAMO: fast adaptive multitask optimisation."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from peml.balance.base import Adam, Balance, Rule, Step, buffers, over_present


class FAMO(Balance):
    """Let the logarithms of all losses fall at the same rate.

        w_t = (z_t / D_t) / sum_u z_u / D_u      z = softmax(xi)      D_t = L_t + 1e-8
        xi moves against J_z (log D before - log D after), J_z the Jacobian of the softmax

    with the same rows before and after the step: a second forward. Paper: arXiv:2306.03792, algorithm 1. Our choice:
    the least loss that a task can have is 0, as that of an answer's tokens is.

    Args:
        learning_rate: of xi, which Adam moves.
        decay: gamma of the paper, the weight decay of xi.
    """

    needs_gradients: ClassVar[bool] = True
    needs_losses_after: ClassVar[bool] = True

    learning_rate: float = Field(0.025, gt=0)
    decay: float = Field(1e-3, ge=0)

    def build(self, num_tasks: int) -> FAMORule:
        """The rule at its start."""
        return FAMORule(self, num_tasks)


class FAMORule(Rule):
    """xi of each task."""

    logits: Tensor

    def __init__(self, settings: FAMO, num_tasks: int) -> None:
        super().__init__(num_tasks)
        buffers(self, logits=torch.zeros(num_tasks))
        self.adam = Adam(num_tasks, settings.learning_rate, settings.decay)

    def weights(self, losses: Tensor | None = None) -> Tensor:
        """z_t / D_t of the tasks present, divided by their sum."""
        if losses is None:
            return torch.softmax(self.logits, dim=0)
        present = losses > 0
        parts = over_present(self.logits, present) / (losses + 1e-8)
        return parts / parts.sum() if bool(present.any()) else torch.ones_like(parts)

    def update(self, step: Step) -> None:
        """Towards the tasks whose logarithm fell less."""
        assert step.after is not None
        z = over_present(self.logits, step.present)
        change = ((step.losses + 1e-8).log() - (step.after + 1e-8).log()) * step.present
        gradient = z * (change - (z * change).sum())
        self.logits = self.adam(self.logits, gradient, step.present)
