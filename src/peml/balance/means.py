r"""How the losses of rows become one loss.

    L_t = sum of the losses of task t / what it has of them        L = sum_t c_t L_t,  sum_t c_t = 1

| mean | a row counts | c_t is proportional to |
|---|---|---|
| `task_mean` | as many losses as it has (answer tokens) | w_t |
| `task_sample_mean` | one, the mean of its own | w_t |
| `token_mean` | as many losses as it has | w_t times the losses of task t |
| `sample_mean` | one | w_t times the rows of task t |

over the tasks present. `task_mean` is the default, as MFTCoder (arXiv:2311.02303) recommends: long answers and large
tasks do not drown the rest. Everything is counted over all micro-batches and devices of a step before it is divided;
averaging averages weighs wrongly.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Mean = Literal["task_mean", "task_sample_mean", "token_mean", "sample_mean"]


def per_sample(mean: Mean, losses: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and count of each row as a mean wants them, `[B]`, from sums of token losses and numbers of tokens."""
    if mean in ("sample_mean", "task_sample_mean"):
        return losses / counts.to(losses.device).clamp_min(1), counts.clamp(max=1)
    return losses, counts


def shares(mean: Mean, counts: Tensor, weights: Tensor) -> Tensor:
    """c_t, `[T]`: part of each task's loss in the whole; 0 for tasks that are absent.

    Shapes:
        counts and weights `[T]`; counts over the whole step.
    """
    size = counts if mean in ("token_mean", "sample_mean") else counts > 0
    parts = weights * size.to(weights)
    return parts / parts.sum().clamp_min(torch.finfo(parts.dtype).tiny)
