"""Dynamic weight averaging."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from peml.balance.base import Balance, Rule, Step, buffers


class DWA(Balance):
    """Weigh each task by how slowly its loss falls, from one window to the next.

        w_t = T softmax_t( (L_t(e-1) / L_t(e-2)) / temperature )        1 in the first two windows

    Paper: arXiv:1803.10704, equation 7, whose windows are epochs. Our choice: windows of steps, because fine-tuning
    has few epochs; a task that a window did not see keeps its last two means.

    Args:
        temperature: larger is more even.
        window: steps that a mean is taken over.
    """

    temperature: float = Field(2.0, gt=0)
    window: int = Field(50, gt=0)

    def build(self, num_tasks: int) -> DWARule:
        """The rule at its start."""
        return DWARule(self, num_tasks)


class DWARule(Rule):
    """Sums of the open window, and the means of the last two, 0 where there is none yet."""

    sums: Tensor
    counts: Tensor
    last: Tensor
    before: Tensor

    def __init__(self, settings: DWA, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.settings = settings
        buffers(self, **{name: torch.zeros(num_tasks) for name in ("sums", "counts", "last", "before")})

    def weights(self, losses: Tensor | None = None) -> Tensor:
        """T softmax of the ratios; a task without two windows has ratio 1."""
        ratios = torch.where(self.before > 0, self.last / self.before.clamp_min(1e-12), 1.0)
        return self.num_tasks * torch.softmax(ratios / self.settings.temperature, dim=0)

    def update(self, step: Step) -> None:
        """Count the step, and close the window at its end."""
        self.sums = self.sums + step.losses * step.present
        self.counts = self.counts + step.present
        if step.number % self.settings.window == 0:
            seen = self.counts > 0
            self.before = torch.where(seen, self.last, self.before)
            self.last = torch.where(seen, self.sums / self.counts.clamp_min(1), self.last)
            self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
