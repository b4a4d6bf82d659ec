"""Poly and MHR: each task averages the factors of the skills that it selects, for all features or by slices of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.experts import in_full, one_hot, skill_weights
from peml.adapters.settings import one_of, positive, probability
from peml.errors import PemlError
from peml.routing import Route


@dataclass(frozen=True)
class Poly(AdapterConfig):
    """Let every task select a soft subset of low-rank skills, whose factors are averaged before they are multiplied.

        y = W x + 1/r (sum_k z_{t,k} up_k)' (sum_k z_{t,k} down_k) x
        z_t = zeta / sum zeta, zeta_k ~ RelaxedBernoulli(temperature 1, logits Z_{t,k}), or sigmoid(Z_t) in evaluation

    Paper: Ponti et al. 2022, arXiv:2202.13914. With n_splits > 1 it is MHR (Caccia et al. 2022,
    arXiv:2211.03831): Z_t, the skills and the average are per slice of the features of x and of y. Sizes,
    scale (1/r, there is no lora_alpha) and the order of products are those of PEFT's `Poly`.
    Init: down Kaiming-uniform, up zero, Z U(-1e-3, 1e-3).
    Our choice: one draw per task present and step, which costs by tasks and not by rows, where PEFT draws for every
    row (`sampling="sample"`); dropout 0.

    Args:
        r: R, rank of each skill.
        num_skills: K, number of skills.
        n_splits: Q, slices of the features; it divides I and O.
        sampling: "task" draws z once per task present and forward, "sample" for each entry of `tasks=`; training only.
            Rows that pack several tasks draw by task in either case, and one name for all rows is one entry.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.

    Shapes:
        x (..., I), down (Q, K, R, I/Q), up (Q, K, R, O/Q), Z (T, Q, K) -> y (..., O).

    Raises:
        PemlError: a number not above 0, an unknown kind, lora_dropout outside [0, 1); n_splits that does not divide
            the features of a layer, when the adapter is attached.
    """

    needs_task: ClassVar[bool] = True

    r: int = 8
    num_skills: int = 4
    n_splits: int = 1
    sampling: Literal["task", "sample"] = "task"
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("r", "num_skills", "n_splits"):
            positive(f"adapter.{name}", getattr(self, name))
        one_of("adapter.sampling", self.sampling, "task", "sample")
        probability("adapter.lora_dropout", self.lora_dropout)

    @property
    def scaling(self) -> float:
        """1/r, the factor that lives in the core."""
        return 1.0 / self.r

    def build(self, in_features: int, out_features: int, num_tasks: int) -> PolyAdapter:
        """The adapter of one linear layer.

        Raises:
            PemlError: n_splits does not divide the layer's features.
        """
        if in_features % self.n_splits or out_features % self.n_splits:
            common = math.gcd(in_features, out_features)
            fits = ", ".join(str(n) for n in range(1, min(common, 32) + 1) if common % n == 0)
            raise PemlError(
                f"adapter.n_splits {self.n_splits} does not divide both {in_features} and {out_features}, the "
                f"features of a layer: take one of {fits}, or leave that layer out"
            )
        kind = PolyAdapter if self.n_splits == 1 else MHRAdapter
        return kind(self, in_features, out_features, num_tasks)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """K R (I + O) + T Q K."""
        return self.num_skills * (self.r * (in_features + out_features) + num_tasks * self.n_splits)

    def folded_rank(self, num_tasks: int) -> int:
        """R: a product of averages has the rank of one skill."""
        return self.r


class PolyAdapter(Adapter):
    """`down [Q, K, R, I/Q]`, `up [Q, K, R, O/Q]`; per task `routing` (Z). For Q = 1 all skills are rows of the bank."""

    needs_task = True
    task_parameters: ClassVar[tuple[str, ...]] = ("routing",)
    core_parameters: ClassVar[tuple[str, ...]] = ("routing",)

    def __init__(self, config: Poly, in_features: int, out_features: int, num_tasks: int) -> None:
        super().__init__()
        self.r = config.r
        self.scaling = config.scaling
        self.by_row = config.sampling == "sample"
        self.lora_dropout = config.lora_dropout
        splits, skills = config.n_splits, config.num_skills
        self.down = kaiming(splits, skills, config.r, in_features // splits)
        self.up = nn.Parameter(torch.zeros(splits, skills, config.r, out_features // splits))
        self.routing = nn.Parameter(torch.empty(num_tasks, splits, skills).uniform_(-1e-3, 1e-3))

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """All skills as rows, `[K R, I]` and `[K R, O]`."""
        return self.down.flatten(0, 2), self.up.flatten(0, 2)

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`(z_t z_t') (x) I / r`, shape `[*ids, K R, K R]`: of the products of skills, those of the same rank row."""
        assert route is not None
        tasks, index = self._draws(route)
        z = skill_weights(tensors["routing"][..., tasks, :, :].squeeze(-2), self.training)[..., index, :]
        pairs = z[..., :, None] * z[..., None, :] * self.scaling
        identity = torch.eye(self.r, dtype=z.dtype, device=z.device)
        return (pairs[..., :, None, :, None] * identity[:, None, :]).flatten(-4, -3).flatten(-2, -1)

    def fold(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """The two averages, with the weights of evaluation: rank R, where the bank would give K R."""
        assert route is not None
        down, up = self._averages(skill_weights(self.routing[route.chosen], draw=False))
        return down, up * self.scaling

    def _draws(self, route: Route) -> tuple[Tensor, Tensor]:
        """Tasks `[D]` for which z is computed, and which of these each id takes, `[*ids]`."""
        if self.by_row and self.training and not route.per_token:
            return route.ids, torch.arange(len(route.ids), device=route.ids.device)
        return route.chosen, route.index

    def _averages(self, z_DQK: Tensor) -> tuple[Tensor, Tensor]:
        """`sum_k z_k down_k` and the same of `up`, slices side by side: `[D R, I]` and `[D R, O]`."""
        down, up = (
            torch.einsum("dqk,qkri->drqi", z_DQK, in_full(factor)).flatten(2).flatten(0, 1)
            for factor in (self.down, self.up)
        )
        return down, up


class MHRAdapter(PolyAdapter):
    """Poly by slices: the bank holds the averages of each task present, of each row where rows draw for themselves."""

    diagonal = True
    core_parameters: ClassVar[tuple[str, ...]] = ()

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """The averages, `[D R, I]` and `[D R, O]`."""
        assert route is not None
        tasks, _ = self._draws(route)
        return self._averages(skill_weights(self.routing[tasks], self.training))

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`1/r` on the rows of the task's average, 0 on others, `[*ids, D R]`."""
        assert route is not None
        tasks, index = self._draws(route)
        own = one_hot(index, len(tasks), self.down.dtype)
        return own.repeat_interleave(self.r, dim=-1) * self.scaling
