"""How a choice becomes differentiable: among the candidates of a cell, and between a token and none.

Letters: `C` choices, `O` candidates of each, `L` layers, `P` tokens, `h` width of the generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peml.prompts.operations import Identity

Relaxation = Literal["softmax", "gumbel", "sigmoid"]
GateRelaxation = Literal["sigmoid", "straight_through"]

CLOSED = 1e-9
"""Weight of a token whose gate is 0 while it is searched: nothing in single precision, but with a gradient."""


class Weights(NamedTuple):
    """Weights of the candidates in one forward.

    Args:
        values: `[C, O]`.
        chosen: the only candidate of each choice that runs; None: all run.
    """

    values: Tensor
    chosen: list[int] | None = None


def probabilities(kind: Relaxation, alpha: Tensor, tau: Tensor) -> Tensor:
    """Weights without any noise, `[C, O]`, of which entropy and cost are made.

    softmax: softmax(alpha / tau)      gumbel: softmax(alpha), how often each is drawn      sigmoid: sigmoid(alpha)
    """
    if kind == "sigmoid":
        return torch.sigmoid(alpha)
    return torch.softmax(alpha if kind == "gumbel" else alpha / tau, dim=-1)


def relaxed(kind: Relaxation, alpha: Tensor, tau: Tensor, draw: bool) -> Weights:
    """Weights of one forward.

        gumbel: l = (log softmax(alpha) + G) / tau, forward one-hot(argmax l), backward softmax(l)

    Papers: softmax as in DARTS, arXiv:1806.09055; gumbel GDAS, arXiv:1910.04465, of which only the operation that
    is drawn runs; sigmoid FairDARTS, arXiv:1911.12126, whose candidates do not compete.

    Args:
        kind: of the three.
        alpha: `[C, O]`.
        tau: temperature; not used by sigmoid.
        draw: add noise from torch's generator; otherwise gumbel takes the argmax.
    """
    if kind != "gumbel":
        return Weights(probabilities(kind, alpha, tau))
    logits = torch.log_softmax(alpha, dim=-1)
    soft = torch.softmax((logits + _gumbel(logits) if draw else logits) / tau, dim=-1)
    index = soft.argmax(-1)
    hard = F.one_hot(index, soft.shape[-1]).to(soft.dtype)
    # The difference is exactly zero, so that what runs has a weight of exactly one.
    return Weights(hard + (soft - soft.detach()), index.tolist())


def _gumbel(like: Tensor) -> Tensor:
    noise = -torch.empty_like(like).exponential_().log()
    while not bool(noise.isfinite().all()):
        noise = -torch.empty_like(like).exponential_().log()
    return noise


def mixed(operations: Iterable[nn.Module], hidden: Tensor, weights: Weights, c: int, skip_dropout: float) -> Tensor:
    """One relaxed cell: `sum_o a_o op_o(H)`, `[P, h]`.

    Paper: of the dropout on the skip connection P-DARTS, arXiv:1904.12760 (search space regularisation).

    Args:
        operations: candidates.
        hidden: `[P, h]`.
        weights: of all cells.
        c: which cell.
        skip_dropout: probability of zeroing a number that `identity` gives.
    """

    def run(operation: nn.Module) -> Tensor:
        found: Tensor = operation(hidden)
        if skip_dropout > 0 and isinstance(operation, Identity):
            found = F.dropout(found, skip_dropout)
        return found

    candidates = list(operations)
    if weights.chosen is not None:
        o = weights.chosen[c]
        total: Tensor = weights.values[c, o] * run(candidates[o])
    else:
        total = torch.tensordot(weights.values[c], torch.stack([run(operation) for operation in candidates]), dims=1)
    return total


def log_gate(kind: GateRelaxation, logits: Tensor, tau: Tensor, draw: bool) -> Tensor:
    """Log of a gate.

        sigmoid: log sigmoid(beta)
        straight_through: g = [beta + N > 0] with logistic noise N, backward sigmoid((beta + N) / tau); log max(g, 1e-9)

    Paper: of the second the binary concrete variable of arXiv:1611.00712. Our choice: the logarithm's derivative is
    taken at max(g, 1e-9), so that a closed token feels whether it is wanted.
    """
    if kind == "sigmoid":
        return F.logsigmoid(logits)
    if draw:
        logits = logits + _gumbel(logits) - _gumbel(logits)
    soft = torch.sigmoid(logits / tau)
    value = torch.full_like(soft, CLOSED).masked_fill(logits > 0, 1.0)
    log: Tensor = value.log() + (soft - soft.detach()) / value
    return log


def entropy(weights: Tensor) -> Tensor:
    """Categorical entropy of each choice, `[C]`, in nats."""
    logs = weights.clamp_min(1e-12).log()
    return -(logs.exp() * logs).sum(-1)


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy of each gate, in nats."""
    p = torch.sigmoid(logits)
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits))


def zero_one(weights: Tensor) -> Tensor:
    """How far the independent weights of each choice are from 0 and 1, `[C]`: `mean (1/4 - (a - 1/2)^2)`.

    Paper: the zero-one loss of FairDARTS, arXiv:1911.12126, with 1/4 added so that it ends at 0.
    """
    return (0.25 - (weights - 0.5) ** 2).mean(-1)


def temperature(ends: tuple[float, float], progress: Tensor) -> Tensor:
    """`tau`, falling exponentially from the first end to the second."""
    start, end = ends
    tau: Tensor = start * torch.exp(math.log(end / start) * progress)
    return tau
