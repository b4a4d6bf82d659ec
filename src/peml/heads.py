"""Heads: what an encoder answers with. One small classifier or regressor per task, stacked and routed like an adapter.

Letters: `B` batch, `S` sequence, `D` width of the encoder, `T` tasks, `C` most classes of any task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import ModelOutput

from peml.errors import PemlError

Pooling = Literal["mean", "first", "last", "pair"]


@dataclass(frozen=True)
class Heads:
    """A linear head for each task over the pooled text, with a layer in front of it if wanted.

        logits = W_t g(pool(states)) + b_t            g = identity, or tanh(V_t . + c_t) with `hidden`

    A task with one label regresses: its head says (value - mean) / scale, and `logits` hold the value.

    Args:
        num_labels: classes of each task, in the order of the tasks; 1: a number.
        pooling: what of the text a head sees: the `mean` of its tokens, the `first` or the `last` one, or of a `pair`
            the means a and b of both texts as (a, b, |a - b|, a b), which is what models of sentences are compared by
            (arXiv:1908.10084, section 3); a single text is a pair with itself.
        hidden: whether each task has a layer of the encoder's width and a tanh in front, as RoBERTa's classifier has.
        dropout: on what a head sees, while training.
        means, scales: of the values of each task that regresses; losses are in units of the scale, so that they
            compare with those of classes (our choice). Empty: 0 and 1.
    """

    num_labels: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    hidden: bool = False
    dropout: float = 0.1
    means: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()

    def check(self, task_names: Sequence[str]) -> None:
        """Refuse what does not fit the tasks.

        Raises:
            PemlError: naming the setting.
        """
        for key in ("num_labels", "means", "scales"):
            given = getattr(self, key)
            if (given or key == "num_labels") and len(given) != len(task_names):
                raise PemlError(f"heads.{key} has {len(given)} entries for {len(task_names)} tasks: give one per task")
        if min(self.num_labels) < 1:
            raise PemlError(f"heads.num_labels must be 1 (a number) or the number of classes, not {self.num_labels}")
        if not 0 <= self.dropout < 1:
            raise PemlError(f"heads.dropout must be 0 or more and below 1, not {self.dropout}")
        if any(not scale > 0 for scale in self.scales):
            raise PemlError(f"heads.scales must be above 0, not {list(self.scales)}")

    def build(self, width: int) -> TaskHeads:
        """The module for an encoder of this width."""
        return TaskHeads(self, width)

    def num_parameters(self, width: int) -> int:
        """T C (F + 1) with F = D features, or 4 D of a pair; with `hidden` T C (D + 1) + T D (F + 1)."""
        tasks, classes, features = len(self.num_labels), max(self.num_labels), self.num_features(width)
        if self.hidden:
            return tasks * classes * (width + 1) + tasks * width * (features + 1)
        return tasks * classes * (features + 1)

    def num_features(self, width: int) -> int:
        """Numbers that a head sees."""
        return 4 * width if self.pooling == "pair" else width

    def grown(self, num_labels: int, mean: float = 0.0, scale: float = 1.0) -> Heads:
        """The same with one more task."""
        tasks = range(len(self.num_labels))
        means, scales = zip(*map(self.scale_of, tasks), strict=True)
        return replace(self, num_labels=(*self.num_labels, num_labels), means=(*means, mean), scales=(*scales, scale))

    def scale_of(self, task: int) -> tuple[float, float]:
        """Mean and scale of a task's values; 0 and 1 for classes."""
        if self.num_labels[task] > 1:
            return 0.0, 1.0
        return (self.means[task] if self.means else 0.0), (self.scales[task] if self.scales else 1.0)

    def losses(self, logits: Tensor, targets: Tensor, tasks: Sequence[int], label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy of each row over its own classes, or the squared error in units of the scale; `[B]`, fp32.

        Shapes:
            logits `[B, C]`, targets `[B]`: the number of the class, or the value.
        """
        ids = torch.tensor(list(tasks))
        counts = torch.tensor(self.num_labels)[ids].to(logits.device)
        scales = torch.tensor([self.scale_of(task)[1] for task in tasks], device=logits.device)
        numbers, own = counts == 1, torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
        logits, targets = logits.float(), targets.to(logits.device)
        chances = F.log_softmax(logits, dim=-1)
        right = chances.gather(1, targets.long().clamp_min(0).masked_fill(numbers, 0)[:, None])[:, 0]
        smooth = chances.masked_fill(~own, 0).sum(1) / counts
        classes = -(1 - label_smoothing) * right - label_smoothing * smooth
        return torch.where(numbers, ((logits[:, 0] - targets) / scales) ** 2, classes)


class TaskHeads(nn.Module):
    """Stacked weights of all heads: `weight [T, C, F]`, `bias [T, C]`, and with `hidden` `[T, D, F]`, `[T, D]`.

    Args:
        config: of the heads.
        width: D.
    """

    task_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(self, config: Heads, width: int) -> None:
        super().__init__()
        self.config = config
        tasks, classes = len(config.num_labels), max(config.num_labels)
        # As nn.Linear begins: a head that begins at zero would give the encoder no gradient in the first step.
        features = config.num_features(width)
        before = width if config.hidden else features
        self.weight = nn.Parameter(torch.empty(tasks, classes, before).uniform_(-1, 1) / math.sqrt(before))
        self.bias = nn.Parameter(torch.zeros(tasks, classes))
        self.counts: Tensor
        self.means: Tensor
        self.scales: Tensor
        means, scales = zip(*(config.scale_of(task) for task in range(tasks)), strict=True)
        # All of it is in the configuration: nothing to be saved.
        for name, values in (("counts", config.num_labels), ("means", means), ("scales", scales)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        if config.hidden:
            self.task_parameters = ("weight", "bias", "hidden_weight", "hidden_bias")  # type: ignore[misc]
            self.hidden_weight = nn.Parameter(torch.empty(tasks, width, features).uniform_(-1, 1) / math.sqrt(features))
            self.hidden_bias = nn.Parameter(torch.zeros(tasks, width))

    def forward(self, states: Tensor, mask: Tensor | None, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """`[B, C]` in fp32; classes that a row's task has not are -inf.

        Shapes:
            states `[B, S, D]`, mask `[B, S]` (1 on tokens that are no padding), ids `[B]` or `[1]`, segments `[B, S]`
            (1 on tokens of the second text).
        """
        ids = ids.to(states.device).expand(len(states))
        text = pooled(states, mask, self.config.pooling, segments).to(self.weight.dtype)
        text = F.dropout(text, self.config.dropout, self.training)
        if self.config.hidden:
            text = torch.tanh(torch.einsum("bd,bhd->bh", text, self.hidden_weight[ids]) + self.hidden_bias[ids])
            text = F.dropout(text, self.config.dropout, self.training)
        # Not a matrix product, which rounds otherwise with another number of classes: a new task changes no other.
        logits = (text[:, None] * self.weight[ids]).sum(-1) + self.bias[ids]
        logits = self.means[ids][:, None] + self.scales[ids][:, None] * logits
        beyond = torch.arange(logits.shape[1], device=ids.device) >= self.counts[ids][:, None]
        return logits.masked_fill(beyond, -math.inf)


def pooled(states: Tensor, mask: Tensor | None, pooling: Pooling, segments: Tensor | None = None) -> Tensor:
    """One vector per row, `[B, F]`, from states `[B, S, D]`, mask and segments `[B, S]`.

    Raises:
        PemlError: pairs are wanted, and nothing tells the two texts apart.
    """
    if mask is None:
        mask = torch.ones(states.shape[:2], device=states.device)
    mask = mask.to(states.device, states.dtype)
    if pooling == "mean":
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    if pooling == "pair":
        if segments is None:
            raise PemlError(
                'heads.pooling "pair" tells two texts apart by token_type_ids, which this call or model has not: '
                'use "mean"'
            )
        second = mask * segments.to(mask)
        first, alone = mask - second, second.sum(1, keepdim=True) == 0
        a, b = ((states * part[..., None]).sum(1) / part.sum(1, keepdim=True).clamp_min(1) for part in (first, second))
        b = torch.where(alone, a, b)
        return torch.cat([a, b, (a - b).abs(), a * b], dim=-1)
    # Padding may be on either side.
    places = torch.arange(states.shape[1], device=states.device) * mask
    chosen = mask.argmax(1) if pooling == "first" else places.argmax(1)
    return states[torch.arange(len(states), device=states.device), chosen]


@dataclass
class HeadsOutput(ModelOutput):
    """What an encoder with heads returns.

    Args:
        logits: `[B, C]`; classes that the task of a row has not are -inf, of a task that regresses the first is
            the value.
        last_hidden_state: `[B, S, D]`.
        hidden_states, attentions: as transformers gives them.
    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class HeadHost(nn.Module, BaseTunerLayer):
    """Holds the heads of a model, one set per PEFT adapter, so that PEFT saves, switches and deletes them."""

    adapter_layer_names = ("peml_head",)
    active_adapters: list[str]  # of BaseTunerLayer, which has no types
    peml_head: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.peml_head = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def active(self) -> TaskHeads | None:
        """The heads in force, or None if they are disabled or the active adapter has none."""
        if self._disable_adapters or not self.active_adapters:
            return None
        name = self.active_adapters[0]
        return self.peml_head[name] if name in self.peml_head else None  # type: ignore[return-value]  # noqa: SIM401

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Heads wrap no layer: they go where they are told.
        if device is not None and adapter_name in self.peml_head:
            self.peml_head[adapter_name].to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: heads stay beside merged weights."""

    def unmerge(self) -> None:
        """Nothing to undo."""


def answered(
    heads: TaskHeads, output: Any, mask: Tensor | None, ids: Tensor, segments: Tensor | None = None
) -> HeadsOutput | tuple[Any, ...]:
    """A model's output with the logits of the heads.

    Args:
        heads: in force.
        output: of the encoder, `ModelOutput` or tuple.
        mask: `[B, S]`, or None.
        ids: of the tasks, `[B]` or `[1]`.
        segments: `[B, S]`, or None.
    """
    states = output[0]
    logits = heads(states, mask, ids, segments)
    if isinstance(output, tuple):
        return logits, *output
    return HeadsOutput(
        logits=logits,
        last_hidden_state=states,
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
    )
