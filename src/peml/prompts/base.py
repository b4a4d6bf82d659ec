"""What every prompt gives to attention: keys and values in front of a layer's own, each with a log-gate.

    softmax([scale q K' + log g, scale q k' + mask]) [V; v]

A log-gate of 0 is an ordinary token, minus infinity removes it exactly. Learned keys carry no rotary phase, so they
are a set: any of them can be dropped, and every layer has its own number.

Letters: `P` prefix tokens, `H` key/value heads, `D` head size, `L` attention layers ("slots"), `T` tasks,
`G` distinct tasks present in the batch (1 for a prompt that all tasks share).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSlot:
    """Key/value shape of one attention layer: H heads of size D."""

    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers that one prefix token stores in this layer: key and value."""
        return 2 * self.num_heads * self.head_dim


class LayerPrefix(NamedTuple):
    """Learned tokens of one layer, for the tasks present.

    Shapes:
        keys, values: `[G, H, P, D]`.
        log_gate: `[P]`, or None when every gate is 0.
    """

    keys: Tensor
    values: Tensor
    log_gate: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """P."""
        return self.keys.shape[2]


class Prompt(nn.Module, ABC):
    """The trainable tensors of one prompt."""

    needs_task: ClassVar[bool] = False
    task_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of parameters with one row per task, `[T, ...]`."""
    generated: ClassVar[bool] = False
    """Whether all layers' prefixes hang on one graph, which reentrant checkpointing cannot walk repeatedly."""

    @abstractmethod
    def forward(self, present: Sequence[int] | None) -> list[LayerPrefix | None]:
        """One prefix per attention slot (None: no tokens there), computed once per step.

        Args:
            present: the distinct tasks in the batch; None only if the prompt needs no task.
        """

    def architecture_parameters(self) -> list[nn.Parameter]:
        """Parameters that choose a structure; they get an optimiser group of their own."""
        return []

    def penalties(self) -> Mapping[str, Tensor]:
        """Terms to add to the loss, weighted, by name."""
        return {}

    def set_progress(self, fraction: float) -> None:
        """Told at the start of each step how much of the training is done, from 0 to 1."""


@dataclass(frozen=True)
class PromptConfig(ABC):
    """Settings of a prompt; builds its `Prompt` for the attention slots of a model."""

    prompt_learning_rate: ClassVar[float]
    """For AdamW, where a recipe gives none."""
    architecture_learning_rate: ClassVar[float] = 3e-3
    """For parameters that choose a structure; our choice."""

    @property
    def needs_task(self) -> bool:
        """Whether the prefix differs by task."""
        return False

    @abstractmethod
    def build(self, slots: Sequence[AttentionSlot], num_tasks: int) -> Prompt:
        """The prompt of a model with these attention slots."""

    @abstractmethod
    def num_parameters(self, slots: Sequence[AttentionSlot], num_tasks: int) -> int:
        """Trainable numbers, by the paper's formula."""
