"""MOELoRA: the rank split into experts that a gate weights by the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.experts import gate_logits
from peml.adapters.settings import divisible, positive, probability
from peml.routing import Route


@dataclass(frozen=True)
class MoELoRA(AdapterConfig):
    """Split the rank of a LoRA into experts, and weight them by a gate that sees the embedding of the task.

        y = W x + s sum_i g_{t,i} up_i' down_i x        g_t = softmax(W_g e_t), s = lora_alpha / r

    Paper: Liu et al. 2023, arXiv:2310.18339. Every linear layer has its own embeddings and gate, as in the
    released code, whose r, lora_alpha, task_dim and learning rate are the defaults too.
    Init: down N(0, 0.01), up zero, e N(0, 1), W_g Kaiming-uniform, as in the released code.
    Our choice: dropout 0, to compare methods alike (the released code has 0.1); no embedding for a task 0 that is not
    used.

    Args:
        r: R, total rank of all experts: each has r / num_experts.
        lora_alpha: numerator of the scale.
        num_experts: E, number of experts.
        task_dim: D, length of a task's embedding.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.

    Shapes:
        x (..., I), down (E, R/E, I), up (E, R/E, O), e (T, D), W_g (E, D) -> y (..., O).

    Raises:
        PemlError: a number not above 0, r no multiple of num_experts, lora_dropout outside [0, 1).
    """

    needs_task: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 2e-4

    r: int = 16
    lora_alpha: float = 32.0
    num_experts: int = 8
    task_dim: int = 64
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("r", "lora_alpha", "num_experts", "task_dim"):
            positive(f"adapter.{name}", getattr(self, name))
        probability("adapter.lora_dropout", self.lora_dropout)
        divisible("adapter.r", self.r, self.num_experts, "the number of experts")

    @property
    def scaling(self) -> float:
        """s, the factor that lives in the core; by the total rank."""
        return self.lora_alpha / self.r

    def build(self, in_features: int, out_features: int, num_tasks: int) -> MoELoRAAdapter:
        """The adapter of one linear layer."""
        return MoELoRAAdapter(self, in_features, out_features, num_tasks)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """R (I + O) + T D + D E."""
        return self.r * (in_features + out_features) + self.task_dim * (num_tasks + self.num_experts)

    def folded_rank(self, num_tasks: int) -> int:
        """R."""
        return self.r

    def rank_step(self, num_tasks: int) -> int:
        """E."""
        return self.num_experts


class MoELoRAAdapter(Adapter):
    """`down [E, R/E, I]`, `up [E, R/E, O]`, `gate [E, D]` (W_g); per task `embedding` (e)."""

    needs_task = True
    diagonal = True
    task_parameters = ("embedding",)
    core_parameters = ("gate", "embedding")

    def __init__(self, config: MoELoRA, in_features: int, out_features: int, num_tasks: int) -> None:
        super().__init__()
        self.r = config.r // config.num_experts
        self.scaling = config.scaling
        self.lora_dropout = config.lora_dropout
        self.down = nn.Parameter(torch.randn(config.num_experts, self.r, in_features) * 0.01)
        self.up = nn.Parameter(torch.zeros(config.num_experts, self.r, out_features))
        self.gate = kaiming(config.num_experts, config.task_dim)
        self.embedding = nn.Parameter(torch.randn(num_tasks, config.task_dim))

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """All experts as rows, `[R, I]` and `[R, O]`."""
        return self.down.flatten(0, 1), self.up.flatten(0, 1)

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s g_t`, each weight R/E times, `[*ids, R]`."""
        assert route is not None
        weights = torch.softmax(gate_logits(tensors["gate"], tensors["embedding"], route), dim=-1) * self.scaling
        return weights[..., route.index, :].repeat_interleave(self.r, dim=-1)
