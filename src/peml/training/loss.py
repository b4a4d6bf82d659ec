"""From logits to losses: of rows, of tasks, and of a whole step; how they become one number is `peml.balance.means`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peml.balance import Mean, shares
from peml.tasks.encode import IGNORED, Form


def row_counts(form: Form, labels: Tensor) -> Tensor:
    """How many losses each row has, `[B]`: its answer tokens, or one for a head.

    Shapes:
        labels `[B, S]`, or `[B]` for heads.
    """
    if form == "heads":
        return torch.ones_like(labels, dtype=torch.long)
    # The first position of a text that goes on predicts nothing before it.
    return labels[:, int(form == "causal") :].ne(IGNORED).sum(1)


def row_losses(form: Form, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the token losses of each row, `[B]`, in nats and fp32; those of heads are `Heads.losses`.

    Shapes:
        logits `[B, S, V]`, labels `[B, S]` (not shifted).
    """
    targets = labels[:, int(form == "causal") :]
    row, column = targets.ne(IGNORED).nonzero(as_tuple=True)
    losses = F.cross_entropy(
        logits[row, column].float(), targets[row, column], reduction="none", label_smoothing=label_smoothing
    )
    return torch.zeros(len(labels), dtype=losses.dtype, device=logits.device).index_add_(0, row, losses)


def by_task(values: Tensor, tasks: Sequence[int], num_tasks: int) -> Tensor:
    """Sum over the rows of each task, `[T]`, of `values` `[B]`."""
    rows = torch.tensor(list(tasks), device=values.device)
    return torch.zeros(num_tasks, dtype=values.dtype, device=values.device).index_add_(0, rows, values)


def balanced(mean: Mean, sums: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of the losses of the tasks; tasks without rows do not count.

    Args:
        mean: see `peml.balance.means`.
        sums: of the losses of each task, as `peml.balance.per_sample` gives those of rows.
        counts: how many they are.
        weights: of the tasks; None: all the same.

    Shapes:
        sums, counts and weights `[T]`; `counts` may cover more rows than `sums`, as under gradient accumulation.
    """
    weights = torch.ones_like(sums) if weights is None else weights.to(sums)
    return (shares(mean, counts, weights) * sums / counts.clamp_min(1)).sum()


class LossMeter:
    """Loss by task since the last log, kept on the device so that a step never waits for it."""

    def __init__(self, task_names: Sequence[str]) -> None:
        self.task_names = list(task_names)
        self.sums: Tensor | None = None
        self.tokens: Tensor | None = None

    def add(self, sums: Tensor, tokens: Tensor) -> None:
        """Count a micro-batch."""
        sums, tokens = sums.detach(), tokens.to(sums.device)
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Mean loss of each task seen on any device, and start afresh."""
        if self.sums is None or self.tokens is None:
            return {}
        sums, tokens = (accelerator.reduce(t, "sum").tolist() for t in (self.sums, self.tokens))
        self.sums = self.tokens = None
        return {n: s / c for n, s, c in zip(self.task_names, sums, tokens, strict=True) if c > 0}
