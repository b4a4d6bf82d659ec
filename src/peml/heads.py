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

Pooling = Literal["mean", "first", "last"]
Pairs = Literal["joined", "apart"]


@dataclass(frozen=True)
class Heads:
    """A linear head for each task over the pooled text, with a layer in front of it if wanted.

        logits = W_t g(pool(states)) + b_t            g = identity, or tanh(V_t . + c_t) with `hidden`

    A task with one label regresses: its head says (value - mean) / scale, and `logits` hold the value.

    Args:
        num_labels: classes of each task, in the order of the tasks; 1: a number.
        pooling: what of a text a head sees: the `mean` of its tokens, the `first` or the `last` one, scaled to
            numbers of size 1 so that one learning rate serves all encoders (our choice).
        layers: whose states are pooled, one after the other, counted as in `hidden_states`: 0 is the embeddings, -1 the
            last. None: the last; in a recipe the ends of the three thirds of the depth, because an encoder that was
            trained for something else has what a task needs in the middle (our choice, see LOG.md).
        pairs: `joined`: the encoder reads both texts of a pair at once, as BERT does. `apart`: each by itself, and the
            head sees (a, b, |a - b|, a b) of what both are pooled to (arXiv:1908.10084, section 3), which is better
            for encoders that were trained to compare sentences; a single text is a pair with itself.
        hidden: whether each task has a layer of the encoder's width and a tanh in front, as RoBERTa's classifier has.
        dropout: on what a head sees, while training.
        means, scales: of the values of each task that regresses; losses are in units of the scale, so that they
            compare with those of classes (our choice). Empty: 0 and 1.
    """

    num_labels: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    layers: tuple[int, ...] | None = None
    pairs: Pairs = "joined"
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
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise PemlError(f"heads.layers needs one or more layers, each once, not {list(self.layers)}")
        if not 0 <= self.dropout < 1:
            raise PemlError(f"heads.dropout must be 0 or more and below 1, not {self.dropout}")
        if any(not scale > 0 for scale in self.scales):
            raise PemlError(f"heads.scales must be above 0, not {list(self.scales)}")

    def build(self, width: int) -> TaskHeads:
        """The module for an encoder of this width."""
        return TaskHeads(self, width)

    def num_parameters(self, width: int) -> int:
        """T C (F + 1), F = D for each layer, 4 D with pairs apart; with `hidden` T C (D + 1) + T D (F + 1)."""
        tasks, classes, features = len(self.num_labels), max(self.num_labels), self.num_features(width)
        if self.hidden:
            return tasks * classes * (width + 1) + tasks * width * (features + 1)
        return tasks * classes * (features + 1)

    def num_features(self, width: int) -> int:
        """Numbers that a head sees."""
        return len(self.layers or (-1,)) * (4 * width if self.pairs == "apart" else width)

    def grown(self, num_labels: int, mean: float = 0.0, scale: float = 1.0) -> Heads:
        """The same with one more task."""
        tasks = range(len(self.num_labels))
        means, scales = zip(*map(self.scale_of, tasks), strict=True)
        return replace(self, num_labels=(*self.num_labels, num_labels), means=(*means, mean), scales=(*scales, scale))

    def among(self, kept: Sequence[int]) -> Heads:
        """The same with some of the tasks."""
        means, scales = zip(*map(self.scale_of, kept), strict=True)
        return replace(self, num_labels=tuple(self.num_labels[i] for i in kept), means=means, scales=scales)

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

    @property
    def num_features(self) -> int:
        """F."""
        return (self.hidden_weight if self.config.hidden else self.weight).shape[-1]

    def features(self, states: Sequence[Tensor], mask: Tensor | None, second: Tensor | None = None) -> Tensor:
        """What the heads see, `[B, F]`.

        Shapes:
            states `[B, S, D]` of each layer, mask `[B, S]` (1 on tokens that are no padding). With pairs apart second
            texts follow as further rows of states and mask, and `second` holds the rows of the first ones.
        """
        texts = [pooled(layer, mask, self.config.pooling).to(self.weight.dtype) for layer in states]
        if self.config.pairs == "apart":
            texts = [_compared(text, second) for text in texts]
        return texts[0] if len(texts) == 1 else torch.cat(texts, dim=-1)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """`[B, C]`, in the precision of the heads; classes that a row's task has not are -inf.

        Shapes:
            features `[B, F]`, ids `[B]` or `[1]`.
        """
        ids = ids.to(features.device)[: len(features)].expand(len(features))
        text = F.dropout(features, self.config.dropout, self.training)
        if self.config.hidden:
            text = torch.tanh(torch.einsum("bd,bhd->bh", text, self.hidden_weight[ids]) + self.hidden_bias[ids])
            text = F.dropout(text, self.config.dropout, self.training)
        # Not a matrix product, which rounds otherwise with another number of classes: a new task changes no other.
        logits = (text[:, None] * self.weight[ids]).sum(-1) + self.bias[ids]
        logits = self.means[ids][:, None] + self.scales[ids][:, None] * logits
        beyond = torch.arange(logits.shape[1], device=ids.device) >= self.counts[ids][:, None]
        return logits.masked_fill(beyond, -math.inf)


def pooled(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One vector per row, `[B, D]`, of mean square 1, from states `[B, S, D]` and mask `[B, S]`."""
    if mask is None:
        mask = torch.ones(states.shape[:2], device=states.device)
    mask = mask.to(states.device).long()
    if pooling == "mean":
        weights = mask.to(states.dtype)
        chosen = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
    else:
        # Padding may be on either side. Half precision has no numbers for places beyond the 256th.
        places = torch.arange(states.shape[1], device=states.device) * mask
        at = mask.argmax(1) if pooling == "first" else places.argmax(1)
        chosen = states[torch.arange(len(states), device=states.device), at]
    return F.rms_norm(chosen, chosen.shape[-1:])


def _compared(text: Tensor, second: Tensor | None) -> Tensor:
    """(a, b, |a - b|, a b), `[B, 4 D]`, of first texts and the second ones behind them."""
    rows = len(text) if second is None else len(text) - len(second)
    first = other = text[:rows]
    if second is not None:
        other = first.index_copy(0, second.to(first.device), text[rows:])
    return torch.cat([first, other, (first - other).abs(), first * other], dim=-1)


def apart(call: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The arguments of a call with the second text of every pair in a row of its own, behind all first ones.

    Args:
        call: with pairs as a tokenizer joins them, told apart by `token_type_ids`; what goes into the model.

    Returns:
        The call, and the rows that are pairs, `[P]`. Each text begins with the row's first token.

    Raises:
        PemlError: nothing tells the texts apart, or the call is not by token ids.
    """
    ids, types, mask = (call.get(key) for key in ("input_ids", "token_type_ids", "attention_mask"))
    if ids is None or types is None:
        raise PemlError(
            'heads.pairs "apart" wants input_ids= and token_type_ids=, which tells the two texts of a pair apart; this '
            'call, or model, has not both: use "joined"'
        )
    if call.get("position_ids") is not None:
        raise PemlError('heads.pairs "apart" counts the positions of both texts itself: leave position_ids out')
    if mask is not None and mask.ndim != 2:
        raise PemlError(f'heads.pairs "apart" wants an attention_mask of [rows, tokens], not {list(mask.shape)}')
    mask = torch.ones_like(ids) if mask is None else mask.long()
    later = (mask * types).bool()
    pairs = later.any(1).nonzero()[:, 0]
    first, first_mask = _moved_left(ids, mask.bool() & ~later)
    # Padding may be on the left.
    begin = ids.gather(1, mask.argmax(1, keepdim=True))[pairs]
    second, second_mask = _moved_left(ids[pairs], later[pairs])
    second, second_mask = torch.cat([begin, second], 1), torch.cat([torch.ones_like(begin), second_mask], 1)
    rows = [
        F.pad(part, (0, max(first.shape[1], second.shape[1]) - part.shape[1]))
        for part in (first, second, first_mask, second_mask)
    ]
    ids, mask = torch.cat(rows[:2]), torch.cat(rows[2:])
    return call | {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}, pairs


def _moved_left(ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that are kept, at the beginning of their rows, and their mask."""
    lengths = kept.sum(1, keepdim=True)
    width = int(lengths.max()) if len(ids) else 0
    order = (~kept).long().argsort(dim=1, stable=True)[:, :width]
    mask = torch.arange(width, device=ids.device) < lengths
    return ids.gather(1, order) * mask, mask.long()


@dataclass
class HeadsOutput(ModelOutput):
    """What an encoder with heads returns.

    Args:
        logits: `[B, C]`; classes that the task of a row has not are -inf, of a task that regresses the first is
            the value.
        features: what the heads saw, `[B, F]`.
        last_hidden_state: `[B, S, D]`; with pairs apart, second texts are further rows.
        hidden_states: as transformers gives them; always, where heads read several layers.
        attentions: as transformers gives them.
    """

    logits: Tensor | None = None
    features: Tensor | None = None
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
    heads: TaskHeads, output: Any, mask: Tensor | None, ids: Tensor, second: Tensor | None = None
) -> HeadsOutput | tuple[Any, ...]:
    """A model's output with the logits of the heads.

    Args:
        heads: in force.
        output: of the encoder, `ModelOutput` or tuple.
        mask: `[B, S]`, or None.
        ids: of the tasks, `[B]` or `[1]`.
        second: rows of the first texts of pairs whose second ones follow as further rows; None: there are none.
    """
    states = [output[0]]
    if heads.config.layers is not None:
        every = next(part for part in output if isinstance(part, tuple)) if isinstance(output, tuple) else None
        every = output["hidden_states"] if every is None else every
        states = [every[layer] for layer in heads.config.layers]
    features = heads.features(states, mask, second)
    logits = heads(features, ids)
    if isinstance(output, tuple):
        return logits, *output
    return HeadsOutput(
        logits=logits,
        features=features,
        last_hidden_state=output[0],
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
    )
