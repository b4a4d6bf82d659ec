"""C-Poly: skills that all tasks select from, beside skills of each task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.experts import expert_diagonal, expert_rows, in_full, skill_weights
from peml.adapters.settings import common_and_specific, positive, probability
from peml.routing import Route


@dataclass(frozen=True)
class CPoly(AdapterConfig):
    """Add the outputs of common skills, selected softly by the task, to those of skills of the task alone.

        y = W x + s [sum_i z_{t,i} up_i' down_i x + sum_j w_{t,j} up_{t,j}' down_{t,j} x]        s = lora_alpha / r
        z_t = zeta / sum zeta, zeta_i ~ RelaxedBernoulli(temperature 1, logits Z_{t,i}), or sigmoid(Z_t) in evaluation

    Paper: Wang et al. 2023, arXiv:2312.03248. It is a sum of modules, whereas Poly averages factors:
    without own skills (num_specific 0) the routing is Poly's, but the update is not.
    Init: down Kaiming-uniform, up zero, Z U(-1e-3, 1e-3), so a fresh adapter changes nothing.
    Our choice: z sums to 1 as in Poly, while w is free and starts at 1 / num_specific, because own skills have
    nothing to be selected from; one draw per task present and step; r 8 and lora_alpha 16 as for `LoRA`.

    Args:
        r: R, rank of each skill.
        lora_alpha: numerator of the scale.
        num_common: E, skills of all tasks; may be 0.
        num_specific: F, skills of each task; may be 0, but not together with num_common.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.

    Shapes:
        x (..., I), down (E, R, I), up (E, R, O), own (T, F, R, I) and (T, F, R, O), Z (T, E), w (T, F) -> y (..., O).

    Raises:
        PemlError: a number not above 0 or negative, no skill at all, lora_dropout outside [0, 1).
    """

    needs_task: ClassVar[bool] = True

    r: int = 8
    lora_alpha: float = 16.0
    num_common: int = 3
    num_specific: int = 1
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        positive("adapter.r", self.r)
        positive("adapter.lora_alpha", self.lora_alpha)
        common_and_specific(self.num_common, self.num_specific)
        probability("adapter.lora_dropout", self.lora_dropout)

    @property
    def scaling(self) -> float:
        """s, the factor that lives in the core."""
        return self.lora_alpha / self.r

    def build(self, in_features: int, out_features: int, num_tasks: int) -> CPolyAdapter:
        """The adapter of one linear layer."""
        return CPolyAdapter(self, in_features, out_features, num_tasks)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """(E + T F) R (I + O) + T (E + F)."""
        skills = self.num_common + num_tasks * self.num_specific
        return skills * self.r * (in_features + out_features) + num_tasks * (self.num_common + self.num_specific)

    def folded_rank(self, num_tasks: int) -> int:
        """(E + F) R."""
        return (self.num_common + self.num_specific) * self.r


class CPolyAdapter(Adapter):
    """`down [E, R, I]`, `up [E, R, O]` with `routing` (Z); per task the same with `weight_specific` (w)."""

    needs_task = True
    diagonal = True

    def __init__(self, config: CPoly, in_features: int, out_features: int, num_tasks: int) -> None:
        super().__init__()
        self.r = config.r
        self.scaling = config.scaling
        self.lora_dropout = config.lora_dropout
        self.down = self.up = self.down_specific = self.up_specific = None
        weights: tuple[str, ...] = ()
        rows: tuple[str, ...] = ()
        if config.num_common:
            self.down = kaiming(config.num_common, config.r, in_features)
            self.up = nn.Parameter(torch.zeros(config.num_common, config.r, out_features))
            self.routing = nn.Parameter(torch.empty(num_tasks, config.num_common).uniform_(-1e-3, 1e-3))
            weights += ("routing",)
        if config.num_specific:
            self.down_specific = kaiming(num_tasks, config.num_specific, config.r, in_features)
            self.up_specific = nn.Parameter(torch.zeros(num_tasks, config.num_specific, config.r, out_features))
            self.weight_specific = nn.Parameter(torch.full((num_tasks, config.num_specific), 1 / config.num_specific))
            weights += ("weight_specific",)
            rows = ("down_specific", "up_specific")
        self.core_parameters = weights  # type: ignore[misc]
        self.task_parameters = rows + weights  # type: ignore[misc]

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """Common skills and those of the tasks present, `[(E + G F) R, I]` and `[(E + G F) R, O]`."""
        assert route is not None
        down = expert_rows(self.down, self.down_specific, route)
        return down, expert_rows(self.up, self.up_specific, route)

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s z_t` and `s w_t`, each weight R times and 0 on other tasks' skills, `[*ids, (E + G F) R]`."""
        assert route is not None
        return self._diagonal(tensors, route, self.training)

    def fold(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """As every adapter does, but with the weights of evaluation whatever the mode."""
        assert route is not None
        down, up = (in_full(rows) for rows in self.bank(route))
        diagonal = self._diagonal(self.core_tensors(), route, draw=False)[0]
        return down, diagonal[:, None] * up

    def _diagonal(self, tensors: Mapping[str, Tensor], route: Route, draw: bool) -> Tensor:
        common = specific = None
        if "routing" in tensors:
            z = skill_weights(tensors["routing"][..., route.chosen, :], draw)
            common = z[..., route.index, :] * self.scaling
        if "weight_specific" in tensors:
            specific = in_full(tensors["weight_specific"][..., route.ids, :]) * self.scaling
        return expert_diagonal(common, specific, route, self.r)
