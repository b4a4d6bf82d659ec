"""Single-task LoRA: one LoRA per task behind one bank, the reference for what tasks take from each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.experts import one_hot
from peml.adapters.settings import positive, probability
from peml.routing import Route


@dataclass(frozen=True)
class SingleTaskLoRA(AdapterConfig):
    """Train a LoRA of its own for every task; tasks share nothing but the frozen model.

        y = W x + s up_t' down_t x        s = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA

    Paper: Hu et al. 2021, arXiv:2106.09685, section 4.1, once per task.
    Init: down Kaiming-uniform, up zero, so a fresh adapter changes nothing.
    Our choice: the defaults of `LoRA`, so that a comparison differs in the sharing alone. All weights are per task
    and so take no weight decay.

    Args:
        r: R, rank of each task's update.
        lora_alpha: numerator of the scale.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.
        use_rslora: scale by 1/sqrt(r) instead of 1/r.

    Shapes:
        x (..., I), down (T, R, I), up (T, R, O) -> y (..., O).

    Raises:
        PemlError: r or lora_alpha not above 0, lora_dropout outside [0, 1).
    """

    needs_task: ClassVar[bool] = True

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        positive("adapter.r", self.r)
        positive("adapter.lora_alpha", self.lora_alpha)
        probability("adapter.lora_dropout", self.lora_dropout)

    @property
    def scaling(self) -> float:
        """s, the factor that lives in the core."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def build(self, in_features: int, out_features: int, num_tasks: int) -> SingleTaskLoRAAdapter:
        """The adapter of one linear layer."""
        return SingleTaskLoRAAdapter(self, in_features, out_features, num_tasks)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """T R (I + O)."""
        return num_tasks * self.r * (in_features + out_features)

    def folded_rank(self, num_tasks: int) -> int:
        """R."""
        return self.r


class SingleTaskLoRAAdapter(Adapter):
    """`down [T, R, I]`, `up [T, R, O]`; the core is `s` on the rows of the task, 0 on those of others."""

    needs_task = True
    diagonal = True
    task_parameters = ("down", "up")

    def __init__(self, config: SingleTaskLoRA, in_features: int, out_features: int, num_tasks: int) -> None:
        super().__init__()
        self.r = config.r
        self.scaling = config.scaling
        self.lora_dropout = config.lora_dropout
        self.down = kaiming(num_tasks, config.r, in_features)
        self.up = nn.Parameter(torch.zeros(num_tasks, config.r, out_features))

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """Rows of the tasks present, `[G R, I]` and `[G R, O]`."""
        assert route is not None
        return route.rows_present(self.down).flatten(0, 1), route.rows_present(self.up).flatten(0, 1)

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s 1[g = t]` R times for each task g present, `[*ids, G R]`."""
        assert route is not None
        own = one_hot(route.index, len(route.present), self.down.dtype)
        return own.repeat_interleave(self.r, dim=-1) * self.scaling
