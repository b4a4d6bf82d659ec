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

import torch
from torch import Tensor

from peml.adapters.experts import in_full, one_hot
from peml.routing import Route

EPS = 1e-8
BANDWIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
MMD_SAMPLES = 32
"""Of each task, evenly spread: pairs grow with the square, in every layer. Our choice."""


def divergence(hidden: Tensor, route: Route, mask: Tensor | None, kind: str, per_position: bool) -> Tensor:
    """Mean of D over pairs of tasks that have two samples each; 0 where there is no such pair.

    Args:
        hidden: z, `[B, S, R]`, or `[B, R]`.
        route: tasks of the rows or tokens.
        mask: which tokens count, `[B, S]`; None, or of another shape than the features: all.
        kind: "kl" or "mmd".
        per_position: compare rows position by position, as the released code does; the mask is not used.
    """
    hidden = in_full(hidden.unsqueeze(1) if hidden.ndim == 2 else hidden)
    rows, length, _ = hidden.shape
    groups = one_hot(route.groups(rows, hidden.device), len(route.present), hidden.dtype)
    if per_position:
        samples = hidden.transpose(0, 1)  # [S, B, R]
        member = (groups if not route.per_token else groups[:, 0]).expand(rows, -1)
    else:
        samples = hidden.reshape(1, rows * length, -1)
        member = (groups if route.per_token else groups[:, None]).expand(rows, length, -1)
        if mask is not None and mask.shape == (rows, length):
            member = member * mask.to(member)[..., None]
        member = member.reshape(rows * length, -1)
    counts = member.sum(0)
    distance = _kl(samples, member, counts) if kind == "kl" else _mmd(samples, member)
    enough = counts > 1
    pairs = (enough[:, None] & enough).triu(1).to(hidden.dtype)
    return (torch.where(pairs > 0, distance, 0) * pairs).sum() / pairs.sum().clamp_min(1)


def _kl(samples: Tensor, member: Tensor, counts: Tensor) -> Tensor:
    """Symmetric divergence of the diagonal Gaussians of all pairs of tasks, `[G, G]`, averaged over positions.

    The logarithms of KL(i || j) and KL(j || i) cancel.

    Shapes:
        samples `[positions, N, R]`, member `[N, G]` 0 or 1, counts `[G]`.
    """
    share = (member / counts.clamp_min(1)).T
    mean = share @ samples  # [positions, G, R]
    deviation = samples - member @ mean
    var = share @ deviation.square() + EPS
    square = (mean.unsqueeze(2) - mean.unsqueeze(1)).square()
    ratio = (var.unsqueeze(2) + square) / var.unsqueeze(1)
    return 0.25 * (ratio + ratio.transpose(1, 2) - 2).sum(-1).mean(0)


def _mmd(samples: Tensor, member: Tensor) -> Tensor:
    """Squared distance of kernel means of all pairs of tasks, `[G, G]`, averaged over positions; shapes as in `_kl`."""
    chosen = []
    for own in member.T:
        indices = own.nonzero().flatten()
        chosen.append(indices[:: max(1, -(-len(indices) // MMD_SAMPLES))])
    picked = torch.cat(chosen)
    samples, member = samples[:, picked], member[picked]
    square = (samples.unsqueeze(2) - samples.unsqueeze(1)).square().sum(-1)
    kernel = torch.stack([torch.exp(square / (-2 * sigma)) for sigma in BANDWIDTHS]).sum(0).mean(0)
    share = member / member.sum(0).clamp_min(1)
    mean = share.T @ kernel @ share
    own = mean.diagonal()
    return own[:, None] + own - 2 * mean
