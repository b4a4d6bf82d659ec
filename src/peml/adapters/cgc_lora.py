"""CGC-LoRA: experts common to all tasks beside experts of each task, under a gate that follows the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.experts import expert_diagonal, expert_rows, gate_logits, in_full
from peml.adapters.settings import common_and_specific, divisible, one_of, positive, probability, temperature
from peml.routing import Route


@dataclass(frozen=True)
class CGCLoRA(AdapterConfig):
    """Mix low-rank experts that all tasks share with experts of the row's own task.

        y = W x + s [sum_i g_{t,i} up_i' down_i x + sum_j g_{t,E+j} up_{t,j}' down_{t,j} x]
        g_t = softmax(W_g e_t / tau) over E common and F own experts, s = lora_alpha / r

    Paper: Song et al. 2024, arXiv:2402.01684, which names the parts but leaves the equation open: this is the
    customised gate control of PLE with low-rank experts, our reconstruction. No code was released.
    Init: down Kaiming-uniform, up zero, e N(0, 1), so a fresh adapter changes nothing.
    Our choice: W_g zero, i.e. a uniform mixture, as no expert is better than another before training; three common
    experts, one own, rank 2 each, which costs a task as much compute as LoRA of rank 8; D 64 as in MOELoRA.

    Args:
        r: R, rank that the experts share evenly, see `rank_mode`.
        lora_alpha: numerator of the scale.
        num_common: E, experts of all tasks; may be 0.
        num_specific: F, experts of each task; may be 0, but not together with num_common.
        rank_mode: "active" shares r among the E + F experts that work for one task, so that r is what a row costs;
            "total" among all E + T F, so that r is what is stored, whatever the number of tasks.
        gate: "embedding" has one W_g for all tasks, "per_task" one each, "table" stores W_g e_t itself.
        temperature: tau, above 0; lower is sharper.
        task_dim: D, length of a task's embedding.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.

    Shapes:
        x (..., I), with rank q per expert: down (E, q, I), up (E, q, O), own (T, F, q, I) and (T, F, q, O),
        e (T, D), W_g (E + F, D), or (T, E + F, D) per task -> y (..., O).

    Raises:
        PemlError: a number not above 0 or negative, no expert at all, r that the experts cannot share evenly (for
            "total" when the adapter is attached), an unknown kind, lora_dropout outside [0, 1).
    """

    needs_task: ClassVar[bool] = True

    r: int = 8
    lora_alpha: float = 16.0
    num_common: int = 3
    num_specific: int = 1
    rank_mode: Literal["active", "total"] = "active"
    gate: Literal["embedding", "per_task", "table"] = "embedding"
    temperature: float = 1.0
    task_dim: int = 64
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("r", "lora_alpha", "temperature", "task_dim"):
            positive(f"adapter.{name}", getattr(self, name))
        common_and_specific(self.num_common, self.num_specific)
        one_of("adapter.rank_mode", self.rank_mode, "active", "total")
        one_of("adapter.gate", self.gate, "embedding", "per_task", "table")
        temperature("adapter.temperature", self.temperature)
        probability("adapter.lora_dropout", self.lora_dropout)
        if self.rank_mode == "active":
            self.expert_rank(1)

    @property
    def scaling(self) -> float:
        """s, the factor that lives in the core."""
        return self.lora_alpha / self.r

    def rank_step(self, num_tasks: int) -> int:
        """E + F, or E + T F for the total rank."""
        return self.num_common + self.num_specific * (1 if self.rank_mode == "active" else num_tasks)

    def expert_rank(self, num_tasks: int) -> int:
        """Rank of each expert.

        Raises:
            PemlError: r is no multiple of the number of experts that share it.
        """
        step = self.rank_step(num_tasks)
        tasks = "" if self.rank_mode == "active" else f" for each of {num_tasks} tasks"
        divisible("adapter.r", self.r, step, f"{self.num_common} common + {self.num_specific} specific experts{tasks}")
        return self.r // step

    def build(self, in_features: int, out_features: int, num_tasks: int) -> CGCLoRAAdapter:
        """The adapter of one linear layer."""
        return CGCLoRAAdapter(self, in_features, out_features, num_tasks)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """(E + T F) q (I + O) + T D + D (E + F); the gate is T D (E + F) per task, T (E + F) in all for a table."""
        experts, active = self.num_common + num_tasks * self.num_specific, self.num_common + self.num_specific
        rows = experts * self.expert_rank(num_tasks) * (in_features + out_features)
        if self.gate == "table":
            return rows + num_tasks * active
        gates = num_tasks if self.gate == "per_task" else 1
        return rows + num_tasks * self.task_dim + gates * self.task_dim * active

    def folded_rank(self, num_tasks: int) -> int:
        """(E + F) q: the experts that work for one task."""
        return (self.num_common + self.num_specific) * self.expert_rank(num_tasks)


class CGCLoRAAdapter(Adapter):
    """`down [E, q, I]`, `up [E, q, O]`, and the same per task; `gate` (W_g) with `embedding` (e), or `routing`."""

    needs_task = True
    diagonal = True

    def __init__(self, config: CGCLoRA, in_features: int, out_features: int, num_tasks: int) -> None:
        super().__init__()
        self.scaling = config.scaling
        self.temperature = config.temperature
        self.lora_dropout = config.lora_dropout
        self.common = config.num_common
        self.r = r = config.expert_rank(num_tasks)
        self.down = self.up = self.down_specific = self.up_specific = None
        own: list[str] = []
        if config.num_common:
            self.down = kaiming(config.num_common, r, in_features)
            self.up = nn.Parameter(torch.zeros(config.num_common, r, out_features))
        if config.num_specific:
            self.down_specific = kaiming(num_tasks, config.num_specific, r, in_features)
            self.up_specific = nn.Parameter(torch.zeros(num_tasks, config.num_specific, r, out_features))
            own += ["down_specific", "up_specific"]
        active = config.num_common + config.num_specific
        if config.gate == "table":
            self.routing = nn.Parameter(torch.zeros(num_tasks, active))
            self.core_parameters = ("routing",)  # type: ignore[misc]
        else:
            lead = (num_tasks,) if config.gate == "per_task" else ()
            self.gate = nn.Parameter(torch.zeros(*lead, active, config.task_dim))
            self.embedding = nn.Parameter(torch.randn(num_tasks, config.task_dim))
            self.core_parameters = ("gate", "embedding")  # type: ignore[misc]
        own += {"table": ["routing"], "per_task": ["gate", "embedding"], "embedding": ["embedding"]}[config.gate]
        self.task_parameters = tuple(own)  # type: ignore[misc]

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """Common experts and those of the tasks present, `[(E + G F) q, I]` and `[(E + G F) q, O]`."""
        assert route is not None
        down = expert_rows(self.down, self.down_specific, route)
        return down, expert_rows(self.up, self.up_specific, route)

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s g_t`, each weight q times and 0 on other tasks' experts, `[*ids, (E + G F) q]`."""
        assert route is not None
        if "routing" in tensors:
            logits = in_full(tensors["routing"][..., route.chosen, :])
        else:
            logits = gate_logits(tensors["gate"], tensors["embedding"], route)
        weights = torch.softmax(logits / self.temperature, dim=-1) * self.scaling
        weights = weights[..., route.index, :]
        return expert_diagonal(weights[..., : self.common], weights[..., self.common :], route, self.r)
