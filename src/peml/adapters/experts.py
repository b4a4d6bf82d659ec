"""What adapters with experts and skills share: gates, draws, and banks of which only the rows in use are taken.

Letters: `E` experts of all tasks, `F` experts of each task, `T` tasks, `G` tasks present, `R` rank, `D` task embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peml.routing import Route


def in_full(tensor: Tensor) -> Tensor:
    """The tensor in fp32 or better: what softmax and sigmoid are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`[*index.shape, size]`: 1 at each index. Unlike torch's it never asks the device for the largest."""
    return (index[..., None] == torch.arange(size, device=index.device)).to(dtype)


def gate_logits(gate: Tensor, embedding: Tensor, route: Route) -> Tensor:
    """`W_g e_t` of the G tasks present, `[..., G, E]`, in fp32 or better.

    Args:
        gate: W_g, `[..., E, D]`, or one per task, `[..., T, E, D]`.
        embedding: e, `[..., T, D]`.
        route: tasks of the batch.
    """
    per_task = gate.ndim > embedding.ndim
    matrices = gate[..., route.chosen, :, :] if per_task else gate.unsqueeze(-3)
    # A product and a sum, not a matmul: autocast would round that to half precision.
    return (in_full(matrices) * in_full(embedding[..., route.chosen, :]).unsqueeze(-2)).sum(-1)


def skill_weights(logits: Tensor, draw: bool) -> Tensor:
    """Weights that sum to 1 over the last dimension, in fp32 or better: `zeta / (sum zeta + 1e-12)`.

    Args:
        logits: of each skill being used.
        draw: zeta is a relaxed Bernoulli variable of temperature 1 (Gumbel-sigmoid); else it is the sigmoid.
    """
    logits = in_full(logits)
    if draw:
        # Not torch.distributions: its validation makes the host wait for the device in every layer.
        edge = torch.finfo(logits.dtype).eps
        uniform = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device).clamp(edge, 1 - edge)
        logits = logits + uniform.log() - torch.log1p(-uniform)
    zeta = torch.sigmoid(logits)
    return zeta / (zeta.sum(-1, keepdim=True) + 1e-12)


def expert_rows(common: Tensor | None, specific: Tensor | None, route: Route) -> Tensor:
    """`[common | specific experts of the tasks present]`: `[E, R, I]` and `[T, F, R, I]` to `[(E + G F) R, I]`."""
    rows = [] if common is None else [common.flatten(0, 1)]
    rows += [] if specific is None else [route.rows_present(specific).flatten(0, 2)]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def expert_diagonal(common: Tensor | None, specific: Tensor | None, route: Route, r: int) -> Tensor:
    """Diagonal for `expert_rows`: weights `[..., *ids, E]` and `[..., *ids, F]` to `[..., *ids, (E + G F) r]`.

    It is zero on the experts of other tasks.
    """
    weights = [] if common is None else [common]
    if specific is not None:
        own = one_hot(route.index, len(route.present), specific.dtype)
        weights.append((own[..., None] * specific[..., None, :]).flatten(-2))
    return torch.cat(weights, dim=-1).repeat_interleave(r, dim=-1)
