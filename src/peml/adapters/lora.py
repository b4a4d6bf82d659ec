"""LoRA: one low-rank update shared by all tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peml.adapters.align import divergence
from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.settings import positive, probability
from peml.errors import PemlError
from peml.routing import Route


@dataclass(frozen=True)
class LoRA(AdapterConfig):
    """Add a trainable low-rank update to a frozen linear layer, the same for every task.

        y = W x + s up' down x        s = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA

    Paper: Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    Init: down Kaiming-uniform, up zero, so a fresh adapter changes nothing.
    Our choice: r 8, lora_alpha 16, dropout 0 (the multi-task repositories use r 8 and lora_alpha 16 or 32).

    With `align` this is Align-LoRA (arXiv:2508.05078, see `adapters/align.py`): a loss in training that makes the
    features `down x` of all tasks alike. Its released class has weight 0.01, its script 0.2: search both. It costs
    time, "mmd" several times more than "kl"; in encoder-decoder models padding counts as text.

    Args:
        r: R, rank of the update.
        lora_alpha: numerator of the scale.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.
        use_rslora: scale by 1/sqrt(r) instead of 1/r.
        align: distance between the tasks' features that is minimised: "none", "kl" or "mmd".
        align_weight: eta, weight of that loss.
        align_per_position: compare features position by position, as the released code, not over all tokens.

    Shapes:
        x (..., I), down (R, I), up (R, O) -> y (..., O).

    Raises:
        PemlError: r, lora_alpha or align_weight not above 0, lora_dropout outside [0, 1), an unknown `align`.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    align: Literal["none", "kl", "mmd"] = "none"
    align_weight: float = 0.01
    align_per_position: bool = False

    def __post_init__(self) -> None:
        positive("adapter.r", self.r)
        positive("adapter.lora_alpha", self.lora_alpha)
        probability("adapter.lora_dropout", self.lora_dropout)
        positive("adapter.align_weight", self.align_weight)
        if self.align not in ("none", "kl", "mmd"):
            raise PemlError(f"adapter.align must be none, kl or mmd, not {self.align!r}")

    @property
    def feature_loss_weight(self) -> float:
        """eta, or 0 without `align`."""
        return 0.0 if self.align == "none" else self.align_weight

    @property
    def scaling(self) -> float:
        """s, the factor that lives in the core."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def build(self, in_features: int, out_features: int, num_tasks: int) -> LoRAAdapter:
        """The adapter of one linear layer."""
        return LoRAAdapter(self, in_features, out_features)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """R (I + O)."""
        return self.r * (in_features + out_features)

    def folded_rank(self, num_tasks: int) -> int:
        """R."""
        return self.r


class LoRAAdapter(Adapter):
    """`down [R, I]`, `up [R, O]`, core `s I`."""

    diagonal = True

    def __init__(self, config: LoRA, in_features: int, out_features: int) -> None:
        super().__init__()
        self.scaling = config.scaling
        self.lora_dropout = config.lora_dropout
        self.align = config.align
        self.align_per_position = config.align_per_position
        self.down = kaiming(config.r, in_features)
        self.up = nn.Parameter(torch.zeros(config.r, out_features))

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """`down`, `up`."""
        return self.down, self.up

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s`, R times, whatever the task."""
        return self.down.new_full(self.down.shape[:1], self.scaling)

    def feature_loss(self, hidden: Tensor, route: Route, mask: Tensor | None) -> Tensor | None:
        """Distance between the tasks' features, if the configuration asks for one."""
        if self.align == "none":
            return None
        return divergence(hidden, route, mask, self.align, self.align_per_position)
