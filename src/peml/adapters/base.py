"""What every low-rank adapter is: a bank of rows and a small core.

    y = W x + up' C(t) down x            up' is the transpose of up

`down` is stored `[R_in, I]` and `up` `[R_out, O]`, row per rank. The core `C(t)` is `[R_out, R_in]`, holds all
scaling, gates and per-task numbers, and is rebuilt from tiny parameters in each forward. A method is a bank shape
and one function `core`.

Letters: `I`/`O` in/out features, `R` rank, `T` tasks, `E` experts (parallel up-projections), `B` rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peml.errors import PemlError
from peml.routing import Route

if TYPE_CHECKING:
    from typing import Self


class Adapter(nn.Module, ABC):
    """The trainable tensors of one method on one linear layer."""

    needs_task: ClassVar[bool] = False
    task_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of parameters with one row per task, `[T, ...]`: they take no weight decay."""
    core_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that the core is made of."""
    diagonal: ClassVar[bool] = False
    """Whether the core is diagonal, and `core` returns its diagonal `[..., R]` alone."""
    reads_input: ClassVar[bool] = False
    """Whether the core depends on the layer's input: it then cannot be computed ahead, nor folded."""

    lora_dropout: float = 0.0

    @abstractmethod
    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """`down [R_in, I]` and `up [R_out, O]`.

        Rows that only some tasks use are left out where none of the tasks in `route.present` does; a batch then costs
        by the tasks that are in it, not by those that there are.
        """

    @abstractmethod
    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`[R_out, R_in]` shared by all rows, or `[*route.ids.shape, R_out, R_in]`; diagonal ones without R_out.

        Args:
            tensors: those of `core_parameters`. Each may have dimensions in front: M layers of the same method are
                computed at once, `[M, ...]` to `[M, *route.ids.shape, R_out, R_in]`.
            route: tasks of the rows or tokens; None only if the method needs no task.
            x: the layer's input `[..., I]`, if the method reads it.
        """

    def core_tensors(self) -> dict[str, Tensor]:
        """The parameters that the core is made of, by name."""
        return {name: getattr(self, name) for name in self.core_parameters}

    def task_rows(self, num_tasks: int) -> dict[str, tuple[int, ...]]:
        """Parameters that belong to single tasks: the task of each of their rows; one task may have all rows."""
        return dict.fromkeys(self.task_parameters, tuple(range(num_tasks)))

    def num_active(self, task: int, num_tasks: int) -> int:
        """How many numbers of this layer work for a task: what tasks share, and its own rows."""
        rows = self.task_rows(num_tasks)
        return sum(p.numel() // num_tasks if name in rows else p.numel() for name, p in self.named_parameters())

    def feature_loss(self, hidden: Tensor, route: Route, mask: Tensor | None) -> Tensor | None:
        """A loss on the features `down x` of a batch, or None if there is none.

        Args:
            hidden: `[B, S, R_in]` or `[B, R_in]`.
            route: tasks of the rows or tokens.
            mask: which tokens are no padding, `[B, S]`; None: all.
        """
        return None

    def fold(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """The plain low-rank pair that equals this adapter for one task: `down' [R', I]` and `up' [R', O]`, scale 1.

        R' is R_in, or R_out of a diagonal core; in fp32 or better.

        Args:
            route: of one task; None only if the method needs none.

        Raises:
            PemlError: the core depends on the input.
        """
        if self.reads_input:
            raise PemlError(
                "this adapter mixes its experts by the input of each token: no plain low-rank pair equals it"
            )
        down, up = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in self.bank(route))
        core = self.core(self.core_tensors(), route).to(up.dtype)
        core = core[0] if core.ndim > (1 if self.diagonal else 2) else core
        return (down, core[:, None] * up) if self.diagonal else (down, core.T @ up)


@dataclass(frozen=True)
class AdapterConfig(ABC):
    """Settings of a method; builds its `Adapter` for one linear layer."""

    needs_task: ClassVar[bool] = False
    foldable: ClassVar[bool] = True
    """Whether it is an ordinary LoRA once the task is fixed, and so can be merged and exported."""
    learning_rate: ClassVar[float] = 3e-4
    """For AdamW, where a recipe gives none; our choice, between those of the multi-task repositories."""

    @property
    def feature_loss_weight(self) -> float:
        """Weight of the mean of the layers' `feature_loss` in the training loss; 0: the method has none."""
        return 0.0

    @abstractmethod
    def build(self, in_features: int, out_features: int, num_tasks: int) -> Adapter:
        """The adapter of a linear layer from `in_features` to `out_features`."""

    @abstractmethod
    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """Trainable numbers on one such layer, by the paper's formula."""

    def grown(self, num_tasks: int) -> AdapterConfig:
        """The settings with which an adapter that was built for `num_tasks` has room for one more.

        They differ only where `r` is shared among the experts of all tasks.
        """
        before, after = self.rank_step(num_tasks), self.rank_step(num_tasks + 1)
        return self if before == after else self.resized(self.r // before * after)  # type: ignore[attr-defined]

    @abstractmethod
    def folded_rank(self, num_tasks: int) -> int:
        """R', the rank of the plain LoRA that the adapter is for one task.

        Raises:
            PemlError: there is none, because the method is not foldable.
        """

    def rank_step(self, num_tasks: int) -> int:
        """What `r` must be a multiple of: the number of experts that share it."""
        return 1

    def resized(self, r: int) -> Self:
        """The same method at another rank.

        The scale of the update stays: learning rates found at one rank then hold at the other. Methods without
        lora_alpha keep their own rule.
        """
        changes: dict[str, Any] = {"r": r}
        if hasattr(self, "lora_alpha"):
            ratio = r / self.r  # type: ignore[attr-defined]
            changes["lora_alpha"] = self.lora_alpha * (
                math.sqrt(ratio) if getattr(self, "use_rslora", False) else ratio
            )
        return replace(self, **changes)


def kaiming(*shape: int) -> nn.Parameter:
    """Kaiming-uniform rows over the last dimension, `a = sqrt 5`: PEFT's start for a down-projection."""
    bound = 1.0 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
