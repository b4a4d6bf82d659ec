"""Uncertainty weighting."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from peml.balance.base import Adam, Balance, Rule, Step, buffers


class Uncertainty(Balance):
    """Weigh each task by a learnt noise: what is hard to fit counts less.

        L = sum_t L_t / (2 e^{s_t}) + s_t / 2        dL/ds_t = 1/2 - L_t e^{-s_t} / 2

    so that e^{s_t} follows L_t, and w_t = 1 / (2 e^{s_t}) evens out scales. Paper: arXiv:1705.07115, equation 7. Our
    choices: s is learnt by an Adam of its own with its gradient in closed form; like all weights these are divided by
    their sum, so that a learning rate means what it means without them.

    Args:
        learning_rate: of s; 0.01 follows a loss through a factor of 20 in 300 steps.
        init: s at the start.
    """

    learning_rate: float = Field(0.01, gt=0)
    init: float = -0.5

    def build(self, num_tasks: int) -> UncertaintyRule:
        """The rule at its start."""
        return UncertaintyRule(self, num_tasks)


class UncertaintyRule(Rule):
    """s of each task."""

    log_variance: Tensor

    def __init__(self, settings: Uncertainty, num_tasks: int) -> None:
        super().__init__(num_tasks)
        buffers(self, log_variance=torch.full((num_tasks,), settings.init))
        self.adam = Adam(num_tasks, settings.learning_rate)

    def weights(self, losses: Tensor | None = None) -> Tensor:
        """e^{-s_t} / 2."""
        return torch.exp(-self.log_variance) / 2

    def update(self, step: Step) -> None:
        """A step down the gradient of s."""
        gradient = 0.5 - step.losses * torch.exp(-self.log_variance) / 2
        self.log_variance = self.adam(self.log_variance, gradient, step.present)
