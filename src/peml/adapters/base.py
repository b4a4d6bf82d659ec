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
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peml.errors import PemlError


class Adapter(nn.Module, ABC):
    """The trainable tensors of one method on one linear layer."""

    needs_task: ClassVar[bool] = False
    task_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of parameters with one row per task, `[T, ...]`: they take no weight decay."""

    lora_dropout: float = 0.0

    @abstractmethod
    def bank(self) -> tuple[Tensor, Tensor]:
        """`down [R_in, I]` and `up [R_out, O]`."""

    @abstractmethod
    def core(self, task_ids: Tensor | None) -> Tensor:
        """`[R_out, R_in]` shared by all rows, or `[*task_ids.shape, R_out, R_in]`.

        Args:
            task_ids: task of each row `[B]` or token `[B, S]`; None only if the method needs no task.
        """


@dataclass(frozen=True)
class AdapterConfig(ABC):
    """Settings of a method; builds its `Adapter` for one linear layer."""

    needs_task: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-4
    """For AdamW, where a recipe gives none; our choice, between those of the multi-task repositories."""

    @abstractmethod
    def build(self, in_features: int, out_features: int, num_tasks: int) -> Adapter:
        """The adapter of a linear layer from `in_features` to `out_features`."""

    @abstractmethod
    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """Trainable numbers on one such layer, by the paper's formula."""


def kaiming(*shape: int) -> nn.Parameter:
    """Kaiming-uniform rows over the last dimension, `a = sqrt 5`: PEFT's start for a down-projection."""
    bound = 1.0 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


def positive(name: str, value: float) -> None:
    """Refuse a setting that must be above zero.

    Raises:
        PemlError: `value` is zero or below.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise PemlError(f"{name} must be above 0, not {value}")


def probability(name: str, value: float) -> None:
    """Refuse a setting that must lie in [0, 1).

    Raises:
        PemlError: `value` is outside.
    """
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise PemlError(f"{name} must be in [0, 1), not {value}")
