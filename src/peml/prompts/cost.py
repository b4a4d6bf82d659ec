"""What a prefix costs once it is deployed, and which of its tokens a budget keeps.

    KV = sum_l sigmoid(gamma_l) sum_j sigmoid(beta_lj) w_l,     w_l = 2 H D numbers that a token stores in layer l

Letters: `L` layers, `P` tokens, `H` key/value heads, `D` head size, `U` units of a layer that stay or go together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BYTES = 2
"""Of a deployed number: bfloat16."""


def expected(token_gates: Tensor, layer_gates: Tensor, widths: Tensor) -> Tensor:
    """`KV`, in numbers.

    Args:
        token_gates: `[L, P]`, from 0 to 1.
        layer_gates: `[L]`, likewise.
        widths: `[L]`.
    """
    return (layer_gates * token_gates.sum(1) * widths).sum()


def common_shift(token_logits: Tensor, layer_gates: Tensor, widths: Tensor, budget: float) -> Tensor:
    """The `b` with `KV(beta + b, gamma) = budget`, differentiable in beta and gamma.

        db/dbeta = - (dKV/dbeta) / (dKV/db)      by the implicit function theorem

    Paper: the exact budget of S3Delta, arXiv:2206.07382, there for modules. Where all tokens together cost less than
    the budget, they are all open.

    Args:
        token_logits: beta, `[L, P]`.
        layer_gates: sigmoid(gamma), `[L]`.
        widths: `[L]`.
        budget: numbers.
    """
    beta, layers = token_logits.detach(), layer_gates.detach()
    low, high = -beta.max() - 40, -beta.min() + 40
    # Thirty-two sections at once in place of two: eleven rounds of small operations in each step, not sixty.
    parts = torch.linspace(0, 1, 33, dtype=beta.dtype, device=beta.device)
    for _ in range(11):
        shifts = low + (high - low) * parts
        costs = (torch.sigmoid(beta + shifts[:, None, None]).sum(2) * layers * widths).sum(1)
        below = (costs[1:-1] <= budget).sum()
        low, high = shifts.gather(0, below + torch.arange(2, device=beta.device))
    return _held(token_logits, layer_gates, widths, (low + high) / 2)


def _held(token_logits: Tensor, layer_gates: Tensor, widths: Tensor, b: Tensor) -> Tensor:
    """The shift `b`, with the gradient of one that holds the cost: a step of Newton's method that moves nothing."""
    open_now = torch.sigmoid(token_logits + b)
    slope = (layer_gates * (open_now * (1 - open_now)).sum(1) * widths).sum().detach()
    total = expected(open_now, layer_gates, widths)
    solvable = slope > 1e-12 * total.detach()
    step = torch.where(solvable, (total - total.detach()) / slope.clamp_min(1e-30), torch.zeros_like(total))
    shift: Tensor = b - step
    return shift


def at_equal_cost(token_logits: Tensor, layer_gates: Tensor, widths: Tensor) -> Tensor:
    """Beta itself, with the gradient of what changes no cost: a token opens as far as others close.

    Our choice, for the entropy: by itself it closes every gate below 1/2, needed or not, as soon as the budget is less
    than half of all tokens.

    Args:
        token_logits: beta, `[L, P]`.
        layer_gates: sigmoid(gamma), `[L]`; they do not compensate for tokens.
        widths: `[L]`.
    """
    return token_logits + _held(token_logits, layer_gates.detach(), widths, token_logits.new_zeros(()))


def kept(
    token_gates: Tensor, layer_gates: Tensor, widths: Tensor, budget: float, threshold: float, units: int
) -> Tensor:
    """Which tokens are deployed, `[L, P]`.

    Those whose gate and whose layer's gate reach the threshold; of them, in order of the product of both, what fits
    into the budget, because a half-open token costs a whole one once deployed. Among equal gates the layers take turns,
    so that a search that has not begun gives every layer as much. One unit always stays, the one most wanted.

    Args:
        token_gates: `[L, P]`.
        layer_gates: `[L]`.
        widths: `[L]`.
        budget: numbers.
        threshold: of both kinds of gates.
        units: U, of each layer: P where tokens go one by one, 1 where a layer goes as a whole.
    """
    gates = (token_gates * layer_gates[:, None])[:, :units]
    wanted = (token_gates[:, :units] >= threshold) & (layer_gates[:, None] >= threshold)
    wanted.view(-1)[gates.argmax()] = True
    # Whole numbers, because a sum of many in single precision is not exact.
    cost = (widths.long() * (token_gates.shape[1] // units))[:, None].expand_as(gates)
    order = torch.where(wanted, gates, -1.0).T.flatten().argsort(descending=True, stable=True)
    fits = cost.T.flatten()[order].cumsum(0) <= math.floor(budget)
    fits[0] = True
    within = torch.zeros_like(fits).scatter(0, order, fits).view(units, -1).T
    return (wanted & within).expand(-1, token_gates.shape[1] if units == 1 else -1)
