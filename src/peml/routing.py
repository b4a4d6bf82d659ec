"""Which task each row of a batch belongs to, for as long as a forward pass and its recomputation last.

A `Forward` is opened by the tuner when a batch enters the model and closed when it leaves. Layers read it from a
context variable, so threads do not see each other's. Gradient checkpointing recomputes layers after the forward has
been closed; `bind_checkpointing` therefore ties the `Forward` that was open to the function that is recomputed.

Letters: `B` rows of the batch, `S` tokens, `T` tasks, `G` distinct tasks present in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peml.errors import PemlError

if TYPE_CHECKING:
    from peml.prompts.base import LayerPrefix

Tasks = str | int | Sequence[str] | Sequence[int] | Sequence[Sequence[str]] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Route:
    """Task of every row (or token) of a batch.

    Args:
        ids: `[1]` (one task for all rows), `[B]`, or `[B, S]` for rows that pack several tasks; int64.
        present: the G distinct tasks, ascending, known on the host so that no layer has to ask the device.
        index: position of every id in `present`, in the shape of `ids`.
        chosen: `present` as a tensor `[G]`.
        known: what layers have asked of this route before: itself on their device, and its parts by groups of tasks.
    """

    ids: Tensor
    present: tuple[int, ...]
    index: Tensor
    chosen: Tensor
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, tasks: Tasks, task_names: Sequence[str]) -> Route:
        """Resolve names or ids once, on the host.

        Raises:
            PemlError: a name or id that the adapter does not have, or rows of unequal length.
        """
        raw: Any = tasks.tolist() if hasattr(tasks, "tolist") else tasks
        raw = [raw] if isinstance(raw, str | int | float) else raw
        if not isinstance(raw, list | tuple):
            # A set or mapping would route rows in no particular order.
            raise PemlError(f"`tasks=` takes a name, an id, or a list of them, not a {type(raw).__name__}")
        if len(raw) == 0:
            raise PemlError("`tasks=` is empty: give one task name per row, or one for all rows")
        table = {name: i for i, name in enumerate(task_names)}
        packed = [isinstance(row, list | tuple) for row in raw]
        if any(packed):
            if not all(packed) or len({len(row) for row in raw}) != 1:
                raise PemlError("`tasks=` with a task per token needs lists of equal length, one per row")
            return cls.of_ids([[_id_of(t, table) for t in row] for row in raw])
        return cls.of_ids([_id_of(t, table) for t in raw])

    @classmethod
    def of_ids(cls, given: Sequence[int] | Sequence[Sequence[int]]) -> Route:
        """The route of ids that are known to be valid: `[1]`, `[B]` or `[B, S]`."""
        # On the host even where new tensors go elsewhere by default.
        ids = torch.tensor(given, device="cpu")
        chosen, index = torch.unique(ids, return_inverse=True)
        return cls(ids, tuple(chosen.tolist()), index, chosen)

    def to(self, device: torch.device) -> Route:
        """The same on a device."""
        if self.ids.device == device:
            return self
        if device not in self.known:
            # Not as tensors of inference mode: a step of training may follow in the same block.
            with torch.inference_mode(False):
                ids, index, chosen = (t.to(device, non_blocking=True) for t in (self.ids, self.index, self.chosen))
            self.known[device] = Route(ids, self.present, index, chosen)
        return self.known[device]  # type: ignore[no-any-return]

    def rows_present(self, stacked: Tensor) -> Tensor:
        """Of a tensor `[T, ...]` stacked over tasks, the rows of the tasks present: `[G, ...]`."""
        return stacked if len(self.present) == stacked.shape[0] else stacked.index_select(0, self.chosen)

    def split(self, groups: tuple[tuple[int, ...], ...]) -> tuple[Part, ...]:
        """What each group of tasks sees of the batch, for those that have rows in it; looked up once for all layers.

        Args:
            groups: task ids of each group; together every id once.
        """
        if groups not in self.known:
            with torch.inference_mode(False):
                self.known[groups] = self._split(groups)
        return self.known[groups]  # type: ignore[no-any-return]

    def _split(self, groups: tuple[tuple[int, ...], ...]) -> tuple[Part, ...]:
        parts, count, device = [], sum(map(len, groups)), self.ids.device
        for number, group in enumerate(groups):
            present = tuple(place for place, task in enumerate(group) if task in self.present)
            if not present:
                continue
            # Rows of other groups go with its first task that is here: the mask takes them out.
            table = torch.tensor([[present[0]] * count, [0] * count, [0] * count], device="cpu")
            for place, task in enumerate(group):
                table[2, task] = 1
                if place in present:
                    table[0, task], table[1, task] = place, present.index(place)
            ids, index, mask = table.to(device, non_blocking=True)[:, self.ids].unbind()
            chosen = torch.tensor(present, device="cpu").to(device, non_blocking=True)
            parts.append(Part(number, Route(ids, present, index, chosen), mask.bool()))
        return tuple(parts)

    @property
    def per_token(self) -> bool:
        """Whether rows pack several tasks."""
        return self.ids.ndim == 2

    def rows(self, num_rows: int, device: torch.device) -> Tensor:
        """Ids for `num_rows` rows: `[1]` stays `[1]`; beams and flattened tokens repeat each row's id."""
        return self.expand(self.ids, num_rows).to(device, non_blocking=True)

    def groups(self, num_rows: int, device: torch.device) -> Tensor:
        """Index of each row's task in `present`: what a tensor stacked over the tasks present is gathered with."""
        return self.expand(self.index, num_rows).to(device, non_blocking=True)

    def expand(self, ids: Tensor, num_rows: int) -> Tensor:
        """What there is of every row, in the shape of `ids`, for `num_rows` rows."""
        given = ids.shape[0]
        if given in (1, num_rows):
            return ids
        if num_rows % given or self.per_token:
            raise PemlError(f"`tasks=` has {given} entries but the batch has {num_rows} rows: give one task per row")
        return ids.repeat_interleave(num_rows // given)


@dataclass(frozen=True)
class Part:
    """What a group of tasks sees of a batch.

    Args:
        group: its number.
        route: tasks of the rows, counted within the group.
        mask: which rows, or tokens, are of the group, in the shape of the ids.
    """

    group: int
    route: Route
    mask: Tensor


def _id_of(task: object, table: Mapping[str, int]) -> int:
    if isinstance(task, str):
        if task not in table:
            raise PemlError(f"unknown task {task!r} in `tasks=`; this adapter has {', '.join(table)}")
        return table[task]
    if isinstance(task, bool) or not isinstance(task, int):
        raise PemlError(f"`tasks=` takes names or ids, not {type(task).__name__}; this adapter has {', '.join(table)}")
    if not 0 <= task < len(table):
        raise PemlError(f"task id {task} in `tasks=` is outside 0..{len(table) - 1}; ids follow {', '.join(table)}")
    return task


@dataclass(frozen=True)
class Forward:
    """What the layers of one forward pass need to know.

    Args:
        route: tasks of the rows; None when the caller gave none.
        prefix: learned keys and values of this forward, by attention slot; None: not computed yet.
        generated: whether `prefix` hangs on a graph that all layers share (a generator), which reentrant
            checkpointing cannot walk more than once.
        by_row: whether `prefix` has an entry per row, not per task present.
        offset: positions that the text moves by, to make room for a prompt in front of it.
        front: soft tokens that go through the model with the text, `[B, P, E]`; None: there are none.
        collected: where layers put the keys and values of the soft tokens that are run; None: this is no such run.
        model: the base model that it is for: a model called inside another one's block must not take its route.
        adapter: the PEFT adapter whose task names gave the route its ids.
        cores: cores computed ahead, for all layers at once, by adapter module.
        rows: of the batch that entered, beams included, and `lengths` of its texts; None and empty: not known.
        lengths: see rows.
        apart: groups of siblings that turned out not to read one input: each layer computes by itself.
        mask: which tokens of the batch are no padding, `[B, S]`; None: all, or not known.
        losses: where layers put losses on their features; None if the adapter has none, or does not train.
        handed: outputs that a layer has computed for its siblings, by group: what was read, output by layer.
        prepared: what layers keep from step to step of a `generate`, whose weights and tasks stay; None: nothing.
        every: the route of all tasks, if what layers keep holds for each of them, not for the route alone.
        second: rows of the batch that are pairs whose second texts follow as further rows; None: none do.
        entered: opened by a hook as the batch entered, not by a `with` block around the call.
        before: what was open around it.
    """

    route: Route | None = None
    prefix: Mapping[int, LayerPrefix] | None = None
    generated: bool = False
    by_row: bool = False
    offset: int = 0
    front: Tensor | None = None
    collected: dict[int, LayerPrefix] | None = None
    model: nn.Module | None = None
    adapter: str | None = None
    cores: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    rows: int | None = None
    lengths: tuple[int, ...] = ()
    apart: frozenset[Any] = frozenset()
    mask: Tensor | None = None
    losses: list[Tensor] | None = None
    handed: dict[Any, tuple[Any, dict[Any, Any]]] = field(default_factory=dict)
    prepared: dict[Any, Any] | None = None
    every: Route | None = None
    second: Tensor | None = None
    entered: bool = False
    before: Forward | None = None

    def fits(self, x: Tensor) -> bool:
        """Whether the first dimension of a layer's input is the rows that the route tells apart; never guessed.

        Layers that see tokens picked from several rows, or put another dimension first, cannot be routed by row.
        """
        assert self.route is not None
        given, first = self.route.ids.shape[0], x.shape[0]
        if given in (1, first):
            return True
        if self.route.per_token or self.rows is None or self.rows % given:
            return False
        return first == self.rows or (x.ndim == 2 and first in [self.rows * length for length in self.lengths])

    def knows(self, layers: Any) -> bool:
        """Whether these layers have kept something that holds now: not where gradients are wanted after all."""
        return self.prepared is not None and layers in self.prepared and not torch.is_grad_enabled()


_CURRENT: ContextVar[Forward | None] = ContextVar("peml_forward", default=None)


def current() -> Forward | None:
    """The forward pass that is open in this thread, if any."""
    return _CURRENT.get()


def surrounding(model: nn.Module, adapter: str | None) -> Forward | None:
    """What a `with` block around this call has opened for the model's active adapter, if any."""
    forward = _CURRENT.get()
    while forward is not None and (forward.entered or forward.model is not model or forward.adapter != adapter):
        forward = forward.before
    return forward


@contextmanager
def opened(forward: Forward) -> Iterator[None]:
    """Make `forward` the current one inside the block."""
    token = _CURRENT.set(replace(forward, before=_CURRENT.get()))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def enter(forward: Forward) -> None:
    """Make `forward` the current one until `leave`; for hooks, which cannot use `with`."""
    leave(forward.model)
    _CURRENT.set(replace(forward, entered=True, before=_CURRENT.get()))


def leave(model: nn.Module | None) -> None:
    """Undo `enter` of this model; nothing if it is not open.

    An interrupt (Ctrl-C) skips hooks, so `enter` also calls this: what was left behind must not route a later call.
    """
    forward = _CURRENT.get()
    while forward is not None and forward.entered and forward.model is model:
        forward = forward.before
    _CURRENT.set(forward)


def bind_checkpointing(model: nn.Module) -> None:
    """Tie the open `Forward` to every function that gradient checkpointing will recompute.

    Idempotent and cheap: called at the start of each forward, because enabling checkpointing replaces the functions.
    """
    for module in model.modules():
        # Of transformers, and of torch's CheckpointWrapper, which accelerate uses under FSDP.
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            function = module.__dict__.get(name)
            if callable(function) and not isinstance(function, _Bound):
                module.__dict__[name] = _Bound(function)


class _Bound:
    """A checkpointing function that reopens the `Forward` of its call whenever it recomputes."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        forward = current()
        if forward is None:
            return self.checkpoint(layer, *args, **kwargs)
        if torch.is_grad_enabled() and self._reentrant(kwargs):
            if forward.generated:
                raise PemlError(
                    "reentrant gradient checkpointing cannot be used while a prefix is generated, because every layer "
                    'would walk the generator again: set gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            if forward.losses is not None:
                raise PemlError(
                    "reentrant gradient checkpointing cannot be used with a loss on features (adapter.align), which it "
                    'would lose: set gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            # Cores computed ahead hang on one graph as well; here each layer computes its own.
            forward = replace(forward, cores={})
        passes = [forward]

        @functools.wraps(layer)
        def reopened(*inner: Any, **named: Any) -> Any:
            with opened(passes[0]):
                # What is recomputed has been counted, and collected, already.
                again = replace(forward, losses=None if forward.losses is None else [])
                passes[0] = again if forward.collected is None else replace(again, collected={})
                return layer(*inner, **named)

        return self.checkpoint(reopened, *args, **kwargs)

    def _reentrant(self, kwargs: Mapping[str, Any]) -> bool:
        stored = getattr(self.checkpoint, "keywords", {})
        return bool(kwargs.get("use_reentrant", stored.get("use_reentrant", False)))
