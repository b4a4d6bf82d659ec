"""How token losses become one number: sums per task first, then an average over tasks.

    L_t = sum of token losses of task t / answer tokens of task t         L = sum_t w_t L_t / sum_t w_t

over the tasks present (`task_mean`, MFTCoder's recommendation: long answers and large tasks do not drown the rest).
Tokens are counted over all micro-batches and devices of a step before dividing; averaging averages weighs wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peml.tasks.encode import IGNORED


def answer_tokens(labels: Tensor, tasks: Sequence[int], num_tasks: int) -> Tensor:
    """Tokens with a loss by task, `[T]`; the first position predicts nothing before it.

    Shapes:
        labels `[B, S]`, tasks B ids.
    """
    counts = labels[:, 1:].ne(IGNORED).sum(1)
    return torch.zeros(num_tasks, dtype=counts.dtype, device=labels.device).index_add_(
        0, torch.tensor(list(tasks), device=labels.device), counts
    )


def token_loss_by_task(
    logits: Tensor, labels: Tensor, tasks: Sequence[int], num_tasks: int, label_smoothing: float = 0.0
) -> Tensor:
    """Sum of token losses by task, `[T]`, in nats and fp32.

    Shapes:
        logits `[B, S, V]`, labels `[B, S]` (not shifted), tasks B ids.
    """
    targets = labels[:, 1:]
    row, column = targets.ne(IGNORED).nonzero(as_tuple=True)
    losses = F.cross_entropy(
        logits[row, column].float(), targets[row, column], reduction="none", label_smoothing=label_smoothing
    )
    by_row = torch.tensor(list(tasks), device=logits.device)
    return torch.zeros(num_tasks, dtype=losses.dtype, device=logits.device).index_add_(0, by_row[row], losses)


def task_mean(sums: Tensor, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean over tasks of the mean token loss of each; tasks without tokens do not count.

    Shapes:
        sums, tokens and weights `[T]`; `tokens` may cover more rows than `sums`, as under gradient accumulation.
    """
    present = tokens > 0
    weights = torch.ones_like(sums) if weights is None else weights.to(sums)
    means = sums / tokens.clamp_min(1)
    return (weights * means * present).sum() / (weights * present).sum().clamp_min(torch.finfo(sums.dtype).tiny)


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
