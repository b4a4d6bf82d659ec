"""GradNorm."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from peml.balance.base import Adam, Balance, Rule, Step, buffers


class GradNorm(Balance):
    """Weigh tasks so that their weighted gradients are alike in size, and larger for those that lag behind.

        G_t = w_t |g_t|      r_t = (L_t / L_t(0)) / mean      minimise sum_t | G_t - mean(G) r_t^alpha |   over w

    Paper: arXiv:1711.02257, equation 2; the targets are constants. Our choices: w = T softmax(v) in place of the
    renormalisation after each step; the gradients are those of all shared adapter and prompt parameters, which are few;
    L_t(0) is the loss of the first step that has the task.

    Args:
        alpha: how much more those that lag get; 0 evens out sizes only.
        learning_rate: of v, which Adam moves.
    """

    needs_gradients: ClassVar[bool] = True

    alpha: float = Field(1.5, ge=0)
    learning_rate: float = Field(0.025, gt=0)

    def build(self, num_tasks: int) -> GradNormRule:
        """The rule at its start."""
        return GradNormRule(self, num_tasks)


class GradNormRule(Rule):
    """v, and the first loss of each task, 0 where there is none yet."""

    logits: Tensor
    first: Tensor

    def __init__(self, settings: GradNorm, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.settings = settings
        buffers(self, logits=torch.zeros(num_tasks), first=torch.zeros(num_tasks))
        self.adam = Adam(num_tasks, settings.learning_rate)

    def weights(self, losses: Tensor | None = None) -> Tensor:
        """T softmax(v)."""
        return self.num_tasks * torch.softmax(self.logits, dim=0)

    def update(self, step: Step) -> None:
        """A step down the gradient of v, which the softmax gives in closed form."""
        assert step.norms is not None
        present = step.present
        self.first = torch.where(present & (self.first == 0), step.losses, self.first)
        if int(present.sum()) < 2:
            return
        weights = self.weights()
        rates = torch.where(present, step.losses / self.first.clamp_min(1e-12), 0.0)
        rates = rates / (rates.sum() / present.sum()).clamp_min(1e-12)
        sizes = weights * step.norms * present
        slopes = torch.sign(sizes - sizes.sum() / present.sum() * rates**self.settings.alpha) * step.norms * present
        gradient = weights * (slopes - (weights * slopes).sum() / self.num_tasks)
        self.logits = self.adam(self.logits, gradient, present)
