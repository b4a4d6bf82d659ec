"""HydraLoRA: one down-projection and several up-projections, mixed for every token by what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.experts import in_full
from peml.adapters.settings import positive, probability
from peml.errors import PemlError
from peml.routing import Route


@dataclass(frozen=True)
class HydraLoRA(AdapterConfig):
    """Share one down-projection and mix several up-projections (heads) by a router that reads each token.

        y = W x + s sum_i softmax(W_r x)_i up_i' down x        s = lora_alpha / r

    Paper: Tian et al. 2024, arXiv:2404.19245. No task id is used, and since the mixture differs by token
    the adapter is no plain LoRA: it can neither be merged nor exported as one.
    Init: down and W_r Kaiming-uniform, up zero, so a fresh adapter changes nothing.
    Defaults are those of the released code; it finds num_heads by clustering the data, which is left to the user.
    Our choice: dropout 0, and the router reads x before dropout.

    Args:
        r: R, rank of the shared space.
        lora_alpha: numerator of the scale.
        num_heads: E, up-projections to mix.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.

    Shapes:
        x (..., I), down (R, I), up (E, R, O), W_r (E, I) -> y (..., O).

    Raises:
        PemlError: a number not above 0, lora_dropout outside [0, 1).
    """

    foldable: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-4

    r: int = 4
    lora_alpha: float = 32.0
    num_heads: int = 4
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("r", "lora_alpha", "num_heads"):
            positive(f"adapter.{name}", getattr(self, name))
        probability("adapter.lora_dropout", self.lora_dropout)

    @property
    def scaling(self) -> float:
        """s, the factor that lives in the core."""
        return self.lora_alpha / self.r

    def build(self, in_features: int, out_features: int, num_tasks: int) -> HydraLoRAAdapter:
        """The adapter of one linear layer."""
        return HydraLoRAAdapter(self, in_features, out_features)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """R I + E R O + E I."""
        return self.r * in_features + self.num_heads * (self.r * out_features + in_features)

    def folded_rank(self, num_tasks: int) -> int:
        """There is none.

        Raises:
            PemlError: always.
        """
        raise PemlError("HydraLoRA mixes its heads by the input of each token: no plain low-rank pair equals it")


class HydraLoRAAdapter(Adapter):
    """`down [R, I]`, `up [E, R, O]`, `router [E, I]` (W_r)."""

    diagonal = True
    reads_input = True
    core_parameters = ("router",)

    def __init__(self, config: HydraLoRA, in_features: int, out_features: int) -> None:
        super().__init__()
        self.scaling = config.scaling
        self.lora_dropout = config.lora_dropout
        self.down = kaiming(config.r, in_features)
        self.up = nn.Parameter(torch.zeros(config.num_heads, config.r, out_features))
        self.router = kaiming(config.num_heads, in_features)

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """`down` once per head, `[E R, I]`, which makes the core diagonal, and `up [E R, O]`."""
        return self.down.expand(len(self.up), -1, -1).flatten(0, 1), self.up.flatten(0, 1)

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s softmax(W_r x)`, each weight R times, `[..., E R]`."""
        assert x is not None
        # The router follows the dtype of x: casting x would copy what is far larger.
        logits = in_full(F.linear(x, tensors["router"].to(x.dtype)))
        return (torch.softmax(logits, dim=-1) * self.scaling).repeat_interleave(self.down.shape[0], dim=-1)
