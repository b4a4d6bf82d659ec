"""Operations that a generator cell can choose from: small maps from `[P, h]` to `[P, h]`.

Letters: `P` prefix tokens, `h` width of the generator, `m` width inside an operation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """act(H W1) W2: the reparametrisation of prefix tuning (arXiv:2101.00190)."""

    expansion: ClassVar[float]

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        inner = max(1, int(width * self.expansion))
        self.into = _matrix(width, inner)
        self.out = _matrix(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        return self.activation(hidden @ self.into) @ self.out

    @staticmethod
    @abstractmethod
    def activation(inner: Tensor) -> Tensor:
        """Between the two products."""


class NarrowTanhMLP(MLP):
    """tanh, m = h/4."""

    expansion = 0.25

    @staticmethod
    def activation(inner: Tensor) -> Tensor:
        """Hyperbolic tangent."""
        return torch.tanh(inner)


class WideGeluMLP(MLP):
    """gelu, m = h."""

    expansion = 1.0

    @staticmethod
    def activation(inner: Tensor) -> Tensor:
        """GELU."""
        return F.gelu(inner)


class ResidualBottleneck(Operation):
    """H + LN(relu(H W1) W2), m = h/4: residual prompt tuning (arXiv:2305.03937)."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        inner = max(1, width // 4)
        self.into = _matrix(width, inner)
        self.out = _matrix(inner, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        update = torch.relu(hidden @ self.into) @ self.out
        return hidden + F.layer_norm(update, update.shape[-1:], self.scale, self.shift)


class Convolution(Operation):
    """Depth-wise over 3 neighbouring tokens, then point-wise: the only candidate that knows an order of tokens."""

    size: ClassVar[int] = 3

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        self.depth = nn.Parameter(torch.randn(width, 1, self.size) / math.sqrt(self.size))
        self.point = _matrix(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[P, h]` to `[P, h]`."""
        mixed = F.conv1d(hidden.T.unsqueeze(0), self.depth, padding=self.size // 2, groups=hidden.shape[1])
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


OPERATIONS: dict[str, type[Operation]] = {
    "none": Zero,
    "identity": Identity,
    "linear": Linear,
    "mlp_tanh_h/4": NarrowTanhMLP,
    "mlp_gelu_h": WideGeluMLP,
    "res_bottleneck": ResidualBottleneck,
    "conv3": Convolution,
    "self_attn": SelfAttention,
    "gated": Gated,
    "lowrank_mul": LowRankMultiply,
}
"""Every operation by the name that recipes and architecture files use."""

DEFAULT_OPERATIONS = tuple(name for name in OPERATIONS if name != "none")


def operation_parameters(name: str, num_tokens: int, width: int) -> int:
    """Trainable numbers of an operation, by its formula in P, h and m."""
    p, h, quarter = num_tokens, width, max(1, width // 4)
    return {
        "none": 0,
        "identity": 0,
        "linear": h * h,
        "mlp_tanh_h/4": 2 * h * max(1, int(h * 0.25)),
        "mlp_gelu_h": 2 * h * h,
        "res_bottleneck": 2 * h * quarter + 2 * h,
        "conv3": 3 * h + h * h,
        "self_attn": 4 * h * h,
        "gated": 2 * h * h,
        "lowrank_mul": p + h,
    }[name]


def check_operations(names: tuple[str, ...]) -> None:
    """Refuse names that are not in the table.

    Raises:
        PemlError: an unknown or repeated operation, or none at all.
    """
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise PemlError(f"prompt.operations has unknown {unknown[0]!r}; choose from {', '.join(OPERATIONS)}")
    if not names or len(set(names)) != len(names):
        raise PemlError(f"prompt.operations needs one or more distinct names, not {list(names)}")
