"""Operations that a generator cell can choose from: small maps from `[P, h]` to `[P, h]`.

An operation of one's own is a line, before the configuration that names it:

    peml.prompts.OPERATIONS["mine"] = MyOperation

Letters: `P` prefix tokens, `h` width of the generator, `m` width inside an operation, `k` neighbouring tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from peml.errors import PemlError


class Operation(nn.Module, ABC):
    """One candidate of a cell.

    Args:
        num_tokens: P.
        width: h.
    """

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) / math.sqrt(rows))


def _inner(width: int, expansion: float) -> int:
    return max(1, int(width * expansion))


class Zero(Operation):
    """0: the cell gives nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        return torch.zeros_like(hidden)


class Identity(Operation):
    """H: free tokens, as in P-tuning v2 (arXiv:2110.07602)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        return hidden


class Linear(Operation):
    """H W."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        self.weight = _matrix(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        return hidden @ self.weight


class MLP(Operation):
    """act(H W1) W2: the reparametrisation of prefix tuning (arXiv:2101.00190).

    Args:
        num_tokens, width: P, h.
        activation: act.
        expansion: m / h.
    """

    def __init__(self, num_tokens: int, width: int, activation: Callable[[Tensor], Tensor], expansion: float) -> None:
        super().__init__(num_tokens, width)
        inner = _inner(width, expansion)
        self.activation = activation
        self.into = _matrix(width, inner)
        self.out = _matrix(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        return self.activation(hidden @ self.into) @ self.out


class ResidualBottleneck(Operation):
    """H + LN(relu(H W1) W2), m = h/4: residual prompt tuning (arXiv:2305.03937)."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        inner = _inner(width, 0.25)
        self.into = _matrix(width, inner)
        self.out = _matrix(inner, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        update = torch.relu(hidden @ self.into) @ self.out
        return hidden + F.layer_norm(update, update.shape[-1:], self.scale, self.shift)


class Convolution(Operation):
    """Depth-wise over k neighbouring tokens, then point-wise: the only candidates that know an order of tokens.

    Args:
        num_tokens, width: P, h.
        size: k, odd.
    """

    def __init__(self, num_tokens: int, width: int, size: int) -> None:
        super().__init__(num_tokens, width)
        self.depth = nn.Parameter(torch.randn(width, 1, size) / math.sqrt(size))
        self.point = _matrix(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        mixed = F.conv1d(hidden.T.unsqueeze(0), self.depth, padding=self.depth.shape[2] // 2, groups=hidden.shape[1])
        return mixed[0].T @ self.point


class SelfAttention(Operation):
    """H + softmax(H Wq (H Wk)' / sqrt h) H Wv Wo: one head over the tokens."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        self.query, self.key, self.value, self.out = (_matrix(width, width) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        scores = (hidden @ self.query) @ (hidden @ self.key).T / math.sqrt(hidden.shape[1])
        return hidden + torch.softmax(scores, dim=-1) @ (hidden @ self.value) @ self.out


class Gated(Operation):
    """sigmoid(H Wg) .* (H W)."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        self.gate = _matrix(width, width)
        self.weight = _matrix(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        return torch.sigmoid(hidden @ self.gate) * (hidden @ self.weight)


class LowRankMultiply(Operation):
    """H .* (u v'): the per-task factor of MPT (arXiv:2303.02861), here shared; starts at 1."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        self.by_token = nn.Parameter(torch.ones(num_tokens))
        self.by_feature = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        return hidden * torch.outer(self.by_token, self.by_feature)


class Cost(NamedTuple):
    """What an operation costs, as functions of P and h.

    Args:
        parameters: trainable numbers.
        multiply_adds: of one run.
    """

    parameters: Callable[[int, int], int]
    multiply_adds: Callable[[int, int], int]


def _products(numbers: Callable[[int], int], beside: Callable[[int], int] = lambda h: 0) -> Cost:
    """Of matrices that every token is multiplied by; what is beside them is not worth counting as time."""
    return Cost(lambda p, h: numbers(h) + beside(h), lambda p, h: p * numbers(h))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": torch.relu,
    "silu": F.silu,
}
_EXPANSIONS = {"h/4": 0.25, "h": 1.0, "2h": 2.0}


def _mlp_cost(expansion: float) -> Cost:
    return _products(lambda h: 2 * h * _inner(h, expansion))


OPERATIONS: dict[str, Callable[[int, int], Operation]] = {
    "none": Zero,
    "identity": Identity,
    "linear": Linear,
    **{
        f"mlp_{activation}_{m}": partial(MLP, activation=function, expansion=expansion)
        for activation, function in _ACTIVATIONS.items()
        for m, expansion in _EXPANSIONS.items()
    },
    "res_bottleneck": ResidualBottleneck,
    "conv3": partial(Convolution, size=3),
    "conv5": partial(Convolution, size=5),
    "self_attn": SelfAttention,
    "gated": Gated,
    "lowrank_mul": LowRankMultiply,
}
"""What builds each operation from P and h, by the name that recipes and architecture files use."""

COSTS: dict[str, Cost] = {
    "none": _products(lambda h: 0),
    "identity": _products(lambda h: 0),
    "linear": _products(lambda h: h * h),
    **{f"mlp_{name}_{m}": _mlp_cost(expansion) for name in _ACTIVATIONS for m, expansion in _EXPANSIONS.items()},
    "res_bottleneck": _products(lambda h: 2 * h * _inner(h, 0.25), lambda h: 2 * h),
    "conv3": _products(lambda h: 3 * h + h * h),
    "conv5": _products(lambda h: 5 * h + h * h),
    "self_attn": Cost(lambda p, h: 4 * h * h, lambda p, h: 4 * p * h * h + 2 * p * p * h),
    "gated": _products(lambda h: 2 * h * h),
    "lowrank_mul": Cost(lambda p, h: p + h, lambda p, h: 2 * p * h),
}
"""Formulas of the operations that have one; others are counted."""

DEFAULT_OPERATIONS = (
    "identity", "linear", "mlp_tanh_h/4", "mlp_gelu_h", "res_bottleneck", "conv3", "self_attn", "gated", "lowrank_mul",
)  # fmt: skip
"""One of each family: more of a family would only share its probability among its members, our choice."""


def operation_parameters(name: str, num_tokens: int, width: int) -> int:
    """Trainable numbers of an operation, by its formula in P and h, or counted on a copy without memory."""
    if name in COSTS:
        return COSTS[name].parameters(num_tokens, width)
    # The random state is left as it was: counting must not change what a seed gives.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sum(parameter.numel() for parameter in OPERATIONS[name](num_tokens, width).parameters())


def operation_multiply_adds(name: str, num_tokens: int, width: int) -> int:
    """Multiply-adds of one run of an operation; without a formula, as many as if every token met every parameter."""
    if name in COSTS:
        return COSTS[name].multiply_adds(num_tokens, width)
    return num_tokens * operation_parameters(name, num_tokens, width)


def check_operations(names: tuple[str, ...]) -> None:
    """Refuse names that are not in the table.

    Raises:
        PemlError: an unknown or repeated operation, or none at all.
    """
    check_known(names, "prompt.operations")
    if not names or len(set(names)) != len(names):
        raise PemlError(f"prompt.operations needs one or more distinct names, not {list(names)}")


def check_known(names: tuple[str, ...], where: str) -> None:
    """Refuse an operation that nobody has put into the table.

    Raises:
        PemlError: naming the operation and what there is.
    """
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise PemlError(
            f"{where} has unknown {unknown[0]!r}; choose from {', '.join(OPERATIONS)}, or put your own into "
            "peml.prompts.OPERATIONS first"
        )


def measured_seconds(names: Sequence[str], num_tokens: int, width: int, device: str | torch.device) -> dict[str, float]:
    """Median seconds of a forward and backward pass of each operation, after one that does not count."""
    seconds = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        # Drawn on the CPU, whose generator alone is put back.
        hidden = torch.randn(num_tokens, width).to(device).requires_grad_()
        for name in names:
            operation = OPERATIONS[name](num_tokens, width).to(device)
            # The input is added because `none` has no backward pass of its own.
            run = "(hidden + operation(hidden)).sum().backward()"
            timer = Timer(run, globals={"operation": operation, "hidden": hidden})
            seconds[name] = float(timer.blocked_autorange(min_run_time=0.02).median)
    return seconds
