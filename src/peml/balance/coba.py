"""CoBa: convergence balancer."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from peml.balance.base import Balance, Rule, Step, buffers


class CoBa(Balance):
    """Weigh tasks by how their held-out losses converge, and turn away from those that diverge.

        a_t: slope of the line through the last N held-out losses, each divided by the task's first
        RCS_t = softmax_t( T a_t / sum_u |a_u| )            slower than the others: more
        ACS_t = softmax_t( -N a_t / sum over the last N slopes of |a_t| )    slower than itself, or rising: less
        DF = min(n softmax over the n slopes so far ( -5 n a_max / sum |a_max| ), taken at the last, 1)
        w = softmax_t( T (DF RCS_t + (1 - DF) ACS_t) )

    a_max is the slope of the largest of the losses. A weight below m = 1/(10 T) lifts all: w (1 - m T) + m. Paper:
    arXiv:2410.06741, section 3; the lift is in its released code. Our choices: the rows that are held out come from
    each task's training rows and are never trained on, because weights that read the evaluation rows would leak them
    into the training; they are looked at every few steps, not in each.

    Args:
        rows: held out of each task, but no more than a tenth of it.
        every: steps between two looks at them.
        warmup: steps with equal weights.
        history: steps that a slope is taken over.
        tau: sharpness of DF.
    """

    rows: int = Field(16, gt=0)
    every: int = Field(10, gt=0)
    warmup: int = Field(100, ge=0)
    history: int = Field(200, gt=0)
    tau: float = Field(5.0, gt=0)

    def build(self, num_tasks: int) -> CoBaRule:
        """The rule at its start."""
        return CoBaRule(self, num_tasks)


class CoBaRule(Rule):
    """Held-out losses `[n, T]`, each over the first, their slopes `[n, T]`, and those of the largest `[n]`."""

    first: Tensor
    losses: Tensor
    slopes: Tensor
    steepest: Tensor
    current: Tensor

    def __init__(self, settings: CoBa, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.settings = settings
        self.window = max(2, settings.history // settings.every)
        empty = torch.zeros(0, num_tasks)
        buffers(self, first=torch.zeros(0), losses=empty, slopes=empty, steepest=torch.zeros(0))
        buffers(self, current=torch.ones(num_tasks))

    def weights(self, losses: Tensor | None = None) -> Tensor:
        """As of the last look."""
        return self.current

    def update(self, step: Step) -> None:
        """Take in new held-out losses, when there are some."""
        if step.held_out is None:
            return
        if len(self.first) == 0:
            self.first = step.held_out.clamp_min(1e-12)
        self.losses = torch.cat([self.losses, (step.held_out / self.first)[None]])[-self.window :]
        if len(self.losses) < 2 or step.number < self.settings.warmup:
            return
        slope = slope_of(self.losses)
        self.slopes = torch.cat([self.slopes, slope[None]])[-self.window :]
        self.steepest = torch.cat([self.steepest, slope_of(self.losses.amax(1)[:, None])])
        self.current = self._converging(slope)

    def _converging(self, slope: Tensor) -> Tensor:
        tasks, n, tiny = self.num_tasks, len(self.steepest), 1e-12
        relative = torch.softmax(tasks * slope / slope.abs().sum().clamp_min(tiny), dim=0)
        own = self.slopes.abs().sum(0).clamp_min(tiny)
        absolute = torch.softmax(-len(self.slopes) * slope / own, dim=0)
        total = self.steepest.abs().sum().clamp_min(tiny)
        diverging = n * torch.softmax(-self.settings.tau * n * self.steepest / total, dim=0)[-1]
        diverging = diverging.clamp(max=1)
        weights = torch.softmax(tasks * (diverging * relative + (1 - diverging) * absolute), dim=0)
        least = 1 / (10 * tasks)
        return weights * (1 - least * tasks) + least if bool((weights < least).any()) else weights


def slope_of(values: Tensor) -> Tensor:
    """Least-squares slope of each column of `[n, T]` over its row numbers."""
    steps = torch.arange(len(values), dtype=values.dtype)
    steps = steps - steps.mean()
    return (steps[:, None] * (values - values.mean(0))).sum(0) / (steps**2).sum()
