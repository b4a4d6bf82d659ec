"""Align-LoRA: push the low-rank features `z = down x` of all tasks towards one distribution.

    L = L_task + eta mean over layers and pairs of tasks of D(z_i, z_j)

    kl    D = (KL(i || j) + KL(j || i)) / 2 between diagonal Gaussians with the features' means and variances
    mmd   D = mean k(z_i, z_i) + mean k(z_j, z_j) - 2 mean k(z_i, z_j),  k(u, v) = sum_sigma exp(-|u - v|^2 / 2 sigma)

Paper: arXiv:2508.05078. No routing and no parameter is added: at inference it is a plain LoRA.
Departures: rows are grouped by their task, where the released code goes by their position in the batch; statistics are
over all valid tokens of a task, where it takes those over rows at each position, padding included (`per_position`).

Letters: `B` rows, `S` tokens, `R` features, `G` tasks present, `n_t` samples of task t.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from peml.routing import Route

EPS = 1e-8
BANDWIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
MMD_SAMPLES = 64
"""Of each task, evenly spread: pairs grow with the square, in every layer. Our choice."""


def divergence(hidden: Tensor, route: Route, mask: Tensor | None, kind: str, per_position: bool) -> Tensor | None:
    """Mean of D over pairs of tasks; None where fewer than two tasks have two samples.

    Args:
        hidden: z, `[B, S, R]`, or `[B, R]`.
        route: tasks of the rows or tokens.
        mask: which tokens count, `[B, S]`; None: all.
        kind: "kl" or "mmd".
        per_position: compare rows position by position, as the released code does; the mask is not used.
    """
    hidden = hidden.unsqueeze(1) if hidden.ndim == 2 else hidden
    # Log-ratios of variances and kernels of many bandwidths do not live in half precision.
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    rows, length, _ = hidden.shape
    if per_position:
        ids = route.groups(rows, hidden.device)
        groups = [hidden[ids == g].transpose(0, 1) for g in range(len(route.present))]
    else:
        ids = route.groups(rows, hidden.device)
        ids = (ids if route.per_token else ids[:, None]).expand(rows, length)
        counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
        groups = [hidden[(ids == g) & counted].unsqueeze(0) for g in range(len(route.present))]
    groups = [z for z in groups if z.shape[1] > 1]
    if len(groups) < 2:
        return None
    measure = _kl if kind == "kl" else _mmd
    return torch.stack([measure(a, b) for a, b in combinations(groups, 2)]).mean()


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Symmetric divergence of two diagonal Gaussians, `[positions, n, R]` each: summed over R, averaged over positions.

    The logarithms of KL(i || j) and KL(j || i) cancel.
    """
    (mean_a, var_a), (mean_b, var_b) = ((z.mean(1), z.var(1, unbiased=False) + EPS) for z in (a, b))
    square = (mean_a - mean_b).square()
    return 0.25 * ((var_a + square) / var_b + (var_b + square) / var_a - 2).sum(-1).mean()


def _mmd(a: Tensor, b: Tensor) -> Tensor:
    a, b = (z[:, :: -(-z.shape[1] // MMD_SAMPLES)] for z in (a, b))

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        distance = (u.unsqueeze(2) - v.unsqueeze(1)).square().sum(-1)
        return torch.stack([torch.exp(distance / (-2 * sigma)) for sigma in BANDWIDTHS]).sum(0).mean()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
