"""MultiLoRA: several LoRAs side by side, started by a learned scale of their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.settings import positive, probability
from peml.routing import Route


@dataclass(frozen=True)
class MultiLoRA(AdapterConfig):
    """Add several parallel LoRAs whose outputs are scaled per feature, to spread the update over more directions.

        y = W x + s sum_i c_i * up_i' down_i x        s = lora_alpha / r

    Paper: Wang et al. 2023, arXiv:2311.11501. No task id: all tasks share the update.
    Init: down and up Kaiming-uniform, c zero, so a fresh adapter changes nothing and only c has a gradient at first.
    Our choice: r 8 and lora_alpha 16, as for `LoRA`.

    Args:
        r: R, rank of each of the parallel updates.
        lora_alpha: numerator of the scale.
        num_parallel: E, number of parallel updates.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.

    Shapes:
        x (..., I), down (E, R, I), up (E, R, O), c (E, O) -> y (..., O).

    Raises:
        PemlError: a number not above 0, lora_dropout outside [0, 1).
    """

    r: int = 8
    lora_alpha: float = 16.0
    num_parallel: int = 3
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("r", "lora_alpha", "num_parallel"):
            positive(f"adapter.{name}", getattr(self, name))
        probability("adapter.lora_dropout", self.lora_dropout)

    @property
    def scaling(self) -> float:
        """s, the factor that lives in the core."""
        return self.lora_alpha / self.r

    def build(self, in_features: int, out_features: int, num_tasks: int) -> MultiLoRAAdapter:
        """The adapter of one linear layer."""
        return MultiLoRAAdapter(self, in_features, out_features)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """E (R (I + O) + O)."""
        return self.num_parallel * (self.r * (in_features + out_features) + out_features)

    def folded_rank(self, num_tasks: int) -> int:
        """E R."""
        return self.num_parallel * self.r


class MultiLoRAAdapter(Adapter):
    """`down [E, R, I]`, `up [E, R, O]`, `scale [E, O]` (c); core `s I`."""

    diagonal = True

    def __init__(self, config: MultiLoRA, in_features: int, out_features: int) -> None:
        super().__init__()
        self.scaling = config.scaling
        self.lora_dropout = config.lora_dropout
        self.down = kaiming(config.num_parallel, config.r, in_features)
        # As PEFT would draw it: an up-projection is a linear layer that reads R features.
        transposed = kaiming(config.num_parallel, out_features, config.r)
        self.up = nn.Parameter(transposed.detach().transpose(1, 2).contiguous())
        self.scale = nn.Parameter(torch.zeros(config.num_parallel, out_features))

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """`down [E R, I]` and the scaled `up [E R, O]`."""
        return self.down.flatten(0, 1), (self.scale[:, None] * self.up).flatten(0, 1)

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s`, E R times, whatever the task."""
        return self.down.new_full((self.down.shape[0] * self.down.shape[1],), self.scaling)
