"""Prefix tuning: free keys and values in every attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peml.errors import PemlError
from peml.prompts.base import LayerPrefix, ModelShape, Prefix, PromptConfig


@dataclass(frozen=True)
class PrefixTuning(PromptConfig):
    """Train keys and values that every query of a layer can attend to.

        attention(q, [K_l; k], [V_l; v]) in layer l, with K_l, V_l free parameters

    Paper: Li and Liang 2021, arXiv:2101.00190, section 4.2; P-tuning v2, arXiv:2110.07602, for the free table.
    Departures: no position is taken by the prefix and its keys carry no rotary phase; no MLP reparametrisation.
    Init: normal with standard deviation 0.02. Such tokens take attention mass from the start, as in the paper:
    this prompt does not begin as the identity.

    Args:
        num_virtual_tokens: P, one number for all layers or one per attention layer (0: none there). An encoder-decoder
            has its encoder's layers first, then of each layer of the decoder its self- and its cross-attention.
        per_task: one prefix per task instead of one that all tasks share.
        gated: carry fixed log-gates, as a prefix that was found by a search and collapsed to a table does.

    Shapes:
        keys and values of layer l: (T or 1, P, H, D).

    Raises:
        PemlError: a negative length, no token at all, or lengths that do not match the model's layers.
    """

    prompt_learning_rate: ClassVar[float] = 5e-3

    num_virtual_tokens: int | tuple[int, ...] = 20
    per_task: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.num_virtual_tokens, int):
            object.__setattr__(self, "num_virtual_tokens", tuple(self.num_virtual_tokens))
        lengths = self.num_virtual_tokens
        lengths = (lengths,) if isinstance(lengths, int) else lengths
        if min(lengths, default=0) < 0 or sum(lengths) == 0:
            raise PemlError(f"prompt.num_virtual_tokens must be above 0 in some layer, not {self.num_virtual_tokens}")

    @property
    def needs_task(self) -> bool:
        """Whether the prefix differs by task."""
        return self.per_task

    def lengths(self, num_slots: int) -> tuple[int, ...]:
        """Prefix tokens per layer.

        Raises:
            PemlError: the configured lengths are for another number of layers.
        """
        given = self.num_virtual_tokens
        if isinstance(given, int):
            return (given,) * num_slots
        if len(given) != num_slots:
            raise PemlError(
                f"prompt.num_virtual_tokens has {len(given)} lengths but the model has {num_slots} attention layers"
            )
        return given

    def build(self, shape: ModelShape, num_tasks: int) -> PrefixTable:
        """The table of keys and values for these layers."""
        return PrefixTable(self, shape, num_tasks)

    def num_parameters(self, shape: ModelShape, num_tasks: int) -> int:
        """2 P H D summed over layers, times T if per task."""
        total = sum(p * slot.width for p, slot in zip(self.lengths(len(shape.slots)), shape.slots, strict=True))
        return total * (num_tasks if self.per_task else 1)


class PrefixTable(Prefix):
    """Keys and values as parameters of their own per layer, so that any kind of checkpointing can walk them."""

    def __init__(self, config: PrefixTuning, shape: ModelShape, num_tasks: int) -> None:
        super().__init__()
        self.needs_task = config.per_task  # type: ignore[misc]
        self.lengths = config.lengths(len(shape.slots))
        groups = num_tasks if config.per_task else 1
        self.keys = nn.ParameterDict()
        self.values = nn.ParameterDict()
        self.gated = config.gated
        for layer, (p, slot) in enumerate(zip(self.lengths, shape.slots, strict=True)):
            if p == 0:
                continue
            size = (groups, p, slot.num_heads, slot.head_dim)
            self.keys[str(layer)] = nn.Parameter(torch.randn(size) * 0.02)
            self.values[str(layer)] = nn.Parameter(torch.randn(size) * 0.02)
            if config.gated:
                self.register_buffer(f"log_gate_{layer}", torch.zeros(p))
        if config.per_task:
            layers = [str(layer) for layer, p in enumerate(self.lengths) if p]
            names = [f"{kind}.{layer}" for kind in ("keys", "values") for layer in layers]
            self.task_parameters = tuple(names)  # type: ignore[misc]

    def forward(self, present: Sequence[int] | None) -> list[LayerPrefix | None]:
        """The stored tokens of each layer, of the tasks present if there is a prefix per task."""
        return [self._layer(layer, present) if p else None for layer, p in enumerate(self.lengths)]

    def _layer(self, layer: int, present: Sequence[int] | None) -> LayerPrefix:
        gate: Tensor | None = getattr(self, f"log_gate_{layer}") if self.gated else None
        keys, values = self.keys[str(layer)], self.values[str(layer)]
        if self.needs_task:
            assert present is not None
            # Stacking views keeps each layer's graph free of saved tensors, which reentrant checkpointing needs.
            keys, values = (torch.stack([table[t] for t in present]) for table in (keys, values))
        return LayerPrefix(keys.transpose(1, 2), values.transpose(1, 2), gate)

    @torch.no_grad()
    def fill(self, layers: Sequence[LayerPrefix | None]) -> None:
        """Take over keys, values and gates computed elsewhere."""
        for layer, prefix in enumerate(layers):
            if prefix is None:
                continue
            self.keys[str(layer)].copy_(prefix.keys.transpose(1, 2))
            self.values[str(layer)].copy_(prefix.values.transpose(1, 2))
            if prefix.log_gate is not None:
                getattr(self, f"log_gate_{layer}").copy_(prefix.log_gate)
