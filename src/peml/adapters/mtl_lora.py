"""MTL-LoRA: a task-specific transform between one down-projection and a task-specific mixture of up-projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peml.adapters.base import Adapter, AdapterConfig, kaiming
from peml.adapters.settings import one_of, positive, probability, temperature
from peml.routing import Route


@dataclass(frozen=True)
class MTLLoRA(AdapterConfig):
    """Share the low-rank space between tasks, but transform and mix it per task.

        y = W x + s [sum_i softmax(omega_t / tau)_i up_i'] Lambda_t down x        s = lora_alpha / r

    Paper: Yang et al. 2024, arXiv:2410.09437, section 3. Defaults are those of the released code for
    commonsense reasoning, where the summaries call Lambda diagonal but the released script trains it in full.
    Init: down Kaiming-uniform, up zero, Lambda identity. Our choice: omega zero, i.e. a uniform mixture; the released
    code draws it at random, which at tau 0.1 is almost one-hot routing (`routing_init="random"`).

    Args:
        r: R, rank of the shared space.
        lora_alpha: numerator of the scale.
        num_up: E, up-projections to mix.
        temperature: tau, above 0; lower is sharper.
        lambda_kind: "full" trains Lambda as R x R, "diag" as R numbers.
        routing_init: "uniform", or "random" as the released code.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.

    Shapes:
        down (R, I), up (E, R, O), Lambda (T, R, R) or (T, R), omega (T, E).

    Raises:
        PemlError: a number not above 0, lora_dropout outside [0, 1), an unknown kind.
    """

    needs_task: ClassVar[bool] = True

    r: int = 8
    lora_alpha: float = 16.0
    num_up: int = 3
    temperature: float = 0.1
    lambda_kind: Literal["full", "diag"] = "full"
    routing_init: Literal["uniform", "random"] = "uniform"
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("r", "lora_alpha", "num_up", "temperature"):
            positive(f"adapter.{name}", getattr(self, name))
        temperature("adapter.temperature", self.temperature)
        probability("adapter.lora_dropout", self.lora_dropout)
        one_of("adapter.lambda_kind", self.lambda_kind, "full", "diag")
        one_of("adapter.routing_init", self.routing_init, "uniform", "random")

    @property
    def scaling(self) -> float:
        """s, the factor that lives in the core."""
        return self.lora_alpha / self.r

    def build(self, in_features: int, out_features: int, num_tasks: int) -> MTLLoRAAdapter:
        """The adapter of one linear layer."""
        return MTLLoRAAdapter(self, in_features, out_features, num_tasks)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """R I + E R O + T (R^2 + E), or T (R + E) with a diagonal Lambda."""
        transform = self.r**2 if self.lambda_kind == "full" else self.r
        shared = self.r * in_features + self.num_up * self.r * out_features
        return shared + num_tasks * (transform + self.num_up)

    def folded_rank(self, num_tasks: int) -> int:
        """R."""
        return self.r


class MTLLoRAAdapter(Adapter):
    """`down [R, I]`, `up [E, R, O]`; per task `transform` (Lambda) and `routing` (omega)."""

    needs_task = True
    task_parameters = ("transform", "routing")
    core_parameters = ("transform", "routing")

    def __init__(self, config: MTLLoRA, in_features: int, out_features: int, num_tasks: int) -> None:
        super().__init__()
        self.scaling = config.scaling
        self.temperature = config.temperature
        self.full = config.lambda_kind == "full"
        self.lora_dropout = config.lora_dropout
        self.down = kaiming(config.r, in_features)
        self.up = nn.Parameter(torch.zeros(config.num_up, config.r, out_features))
        identity = torch.eye(config.r) if config.lambda_kind == "full" else torch.ones(config.r)
        self.transform = nn.Parameter(identity.repeat(num_tasks, *[1] * identity.ndim))
        if config.routing_init == "random":
            self.routing = kaiming(num_tasks, config.num_up)
        else:
            self.routing = nn.Parameter(torch.zeros(num_tasks, config.num_up))

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """`down [R, I]` and all up-projections as rows, `[E R, O]`."""
        return self.down, self.up.flatten(0, 1)

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s w_t (x) Lambda_t`, shape `[*ids, E R, R]`: only the rows' own tasks are gathered."""
        assert route is not None
        # Gather before the arithmetic: the cost then depends on the batch, not on the number of tasks.
        logits = tensors["routing"][..., route.ids, :]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        weights = torch.softmax(logits, dim=-1) * self.scaling
        if self.full:
            transform = tensors["transform"][..., route.ids, :, :]
        else:
            transform = torch.diag_embed(tensors["transform"][..., route.ids, :])
        blocks = weights.to(transform.dtype)[..., None, None] * transform.unsqueeze(-3)
        return blocks.flatten(-3, -2)
