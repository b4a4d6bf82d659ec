"""Hooks that open a `Forward` around every call of a base model.

Hooks on the base, not an override of the tuner's `forward`: PEFT's wrappers, `generate` and models from
`AutoModel.from_pretrained(adapter_folder)` all reach the base by ways of their own. They are methods, not closures,
so that a deep copy of the model gets its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import Context
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peml import attention, routing
from peml.batching import TaskOf, route_steps, unshared
from peml.errors import PemlError
from peml.routing import Forward, Tasks


class Opener(Protocol):
    """What the hooks ask of the tuner."""

    @property
    def adapter_in_force(self) -> str | None:
        """Name of the active adapter."""

    def open_forward(
        self,
        tasks: Tasks | None,
        rows: int | None,
        mask: Tensor | None = None,
        text: tuple[Tensor, Tensor | None] | None = None,
    ) -> Forward:
        """Resolve the route of a batch, and compute its cores and its prefix."""

    def close_forward(self, forward: Forward) -> None:
        """Learn from a forward that has come to its end."""

    def counts_positions(self) -> bool:
        """Whether the model counts positions from the left, as decoders do."""

    def reads_input(self) -> bool:
        """Whether every row has a prompt of its own, made from its text."""

    def answer(self, forward: Forward, output: Any, mask: Tensor | None) -> Any:
        """A model's output, with the logits of the heads if there are any."""

    def reads_apart(self) -> bool:
        """Whether the texts of a pair are to be read apart."""

    def reads_states(self) -> bool:
        """Whether heads read other layers than the last."""

    def split_pairs(self, call: dict[str, Any], tasks: Tasks | None) -> tuple[dict[str, Any], Tasks | None, Tensor]:
        """A call and its tasks with the second text of every pair in a row of its own."""


_REPLACED = ("generate", "generate_batch", "init_continuous_batching")


class ForwardHooks:
    """The hooks of one model; `remove` takes them off."""

    def __init__(self, opener: Opener, model: Any) -> None:
        self.opener = opener
        self.model = model
        self.arguments = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.handles: tuple[Any, ...] = (
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        )
        if self._encodes_first():
            encoder = model.get_encoder()
            self.handles += (encoder.register_forward_pre_hook(self.enter_encoder, with_kwargs=True),)
        # Of a rotary model, whichever way it looks: the distance to a prefix key, which has no phase, is the position.
        self.rotary = attention.is_rotary(model)
        # RoBERTa and its kin start behind the padding token's number, and count for themselves.
        self.counts_itself = any(hasattr(part, "create_position_ids_from_input_ids") for part in model.modules())
        self.originals = {name: getattr(model, name) for name in _REPLACED if hasattr(model, name)}
        for name in self.originals:
            setattr(model, name, getattr(self, name))

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
        for name in self.originals:
            self.model.__dict__.pop(name, None)

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take `tasks=` from the call and open its `Forward`, unless `generate` has opened one around it."""
        tasks, input_mask = kwargs.pop("tasks", None), kwargs.pop("input_mask", None)
        input_mask = None if input_mask is None else torch.as_tensor(input_mask)
        second: Tensor | None = None
        if self.opener.reads_apart():
            named = dict(zip(self.arguments, args, strict=False)) | kwargs
            args, (kwargs, tasks, second) = (), self.opener.split_pairs(named, tasks)
        if self.opener.reads_states():
            kwargs = {**kwargs, "output_hidden_states": True}
        # Before anything is computed: soft tokens are run through the attention as well.
        attention.engage(module)
        forward, rows = routing.surrounding(module, self.opener.adapter_in_force), self._rows(args, kwargs)
        # Steps of `generate`, which has called the encoder itself.
        within = tasks is None and forward is not None and forward.prefix is not None
        if forward is None or not within:
            forward = self.opener.open_forward(
                tasks, rows, self._mask(args, kwargs), self._text(args, kwargs, input_mask)
            )
        lengths = self._lengths(args, kwargs)
        if forward.front is not None:
            args, kwargs = (), dict(zip(self.arguments, args, strict=False)) | kwargs
            lengths += tuple(length + forward.front.shape[1] for length in lengths)
            if self._encodes_first():
                if not within:
                    attention.check_outputs(kwargs, forward.front.shape[1])
                kwargs = attention.widened(kwargs, forward.front.shape[1])
            else:
                kwargs = attention.lengthened(self.model, kwargs, forward.front)
                forward = replace(forward, mask=kwargs["attention_mask"])
        routing.enter(replace(forward, rows=rows, lengths=lengths, handed={}, second=second))
        if module.training:
            routing.bind_checkpointing(module)
        if forward.prefix:
            self._check_packing(args, kwargs)
            self._add_position_ids(args, kwargs)
            if forward.offset:
                return (), self._moved(args, kwargs, forward.offset)
        return args, kwargs

    def enter_encoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put soft tokens in front of what the encoder of an encoder-decoder model reads."""
        forward = routing.current()
        if forward is None or forward.front is None or forward.model is not self.model:
            return args, kwargs
        arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        return (), attention.fronted(module, dict(zip(arguments, args, strict=False)) | kwargs, forward.front)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Close what `enter` opened, and let the heads answer."""
        forward = routing.current()
        try:
            if forward is not None and forward.model is module and output is not None:
                self.opener.close_forward(forward)
                if forward.front is not None and not self._encodes_first():
                    length, classes = kwargs["inputs_embeds"].shape[1], getattr(self.model.config, "num_labels", None)
                    output = attention.shortened(output, length, forward.front.shape[1], classes)
                output = self.opener.answer(forward, output, self._text_mask(forward, args, kwargs))
        finally:
            routing.leave(module)
        return output

    def generate(self, *args: Any, tasks: Tasks | None = None, **kwargs: Any) -> Any:
        """The model's `generate` with `tasks=`: all its steps share one prefix, computed without gradients."""
        # Soft tokens are run, and an encoder is called, before any hook of the whole model is.
        attention.engage(self.model)
        with torch.no_grad():
            forward = self.opener.open_forward(tasks, self._rows(args, kwargs), text=self._prompted(args, kwargs))
        if forward.front is not None:
            attention.check_outputs(kwargs, forward.front.shape[1])
        with routing.opened(replace(forward, prefix=forward.prefix or {}, prepared={})):
            return self.originals["generate"](*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate_batch`, which would ignore `tasks=`."""
        if "tasks" in kwargs:
            raise PemlError(
                "generate_batch cannot route by `tasks=`: it puts rows of all requests into one; call select_task() "
                "and generate_batch once per task, or generate(tasks=...)"
            )
        return self.originals["generate_batch"](*args, **kwargs)

    def init_continuous_batching(self, *args: Any, tasks_of: TaskOf | None = None, **kwargs: Any) -> Any:
        """The model's own, which knows plain names of attention implementations only.

        Args:
            args: for it.
            tasks_of: gives the task of a request; None: all have the one of `select_task`.
            kwargs: for it.
        """
        try:
            # The steps run in a thread of their own, which knows nothing of what is open here.
            if tasks_of is None:
                Context().run(self.opener.open_forward, None, None)
        except PemlError as error:
            raise PemlError(
                f"continuous batching serves one task at a time: call select_task() first, or pass tasks_of= ({error})"
            ) from error
        hosts = attention.hosts_prompts(self.model)
        if hosts:
            attention.check_paging(self.model)
        if self.opener.reads_input():
            raise PemlError("continuous batching cannot serve a prompt that is made from the text: call generate()")
        with attention.named_for_paging(self.model) if hosts else nullcontext():
            manager = self.originals["init_continuous_batching"](*args, **kwargs)
        manager.continuous_batching_config = unshared(manager.continuous_batching_config, tasks_of is not None)
        if tasks_of is not None:
            route_steps(manager, tasks_of, self._step_of)
        if not hosts:
            return manager
        create = manager._create_batch_processor

        def create_batch_processor(*inner: Any, **named: Any) -> Any:
            with attention.named_for_paging(self.model):
                return create(*inner, **named)

        manager._create_batch_processor = create_batch_processor
        return manager

    @contextmanager
    def _step_of(self, tasks: Tasks) -> Iterator[None]:
        """A step of continuous batching, resolved once for what the model's own hook would ask again."""
        with torch.no_grad():
            forward = self.opener.open_forward(tasks, None)
        with routing.opened(replace(forward, prefix=forward.prefix or {})):
            yield

    def _check_packing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse texts packed into one row where the model would let them see each other."""
        positions, reads = self._argument("position_ids", args, kwargs), self.opener.reads_input()
        packs = attention.packs(self.model)
        if not isinstance(positions, Tensor) or (packs and not reads and not self._caches(args, kwargs)):
            return
        others = () if self._encodes_first() else ("attention_mask", "past_key_values")
        if any(self._argument(name, args, kwargs) is not None for name in others):
            return
        if bool((positions.diff(dim=-1) != 1).any()):
            if reads:
                raise PemlError(
                    "a prompt made from the text cannot serve rows that pack several texts: give each a row of its own"
                )
            if packs:
                raise PemlError(
                    f"{type(self.model).__name__} does not keep texts apart that are packed into one row (positions "
                    "that start again) while it fills a cache: pass use_cache=False"
                )
            instead = "" if self._encodes_first() else ", or pass a 4D attention_mask"
            raise PemlError(
                f"{type(self.model).__name__} does not keep texts apart that are packed into one row (positions that "
                f"start again): give each text a row of its own, padded{instead}"
            )

    def _caches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the model will make a cache, as decoders do by default, but not while they checkpoint."""
        wanted = self._argument("use_cache", args, kwargs)
        wanted = getattr(getattr(self.model, "config", None), "use_cache", False) if wanted is None else wanted
        if not wanted or not self.opener.counts_positions():
            return False
        checkpoints = any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules())
        return not (self.model.training and checkpoints)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the caller gives for a parameter of the model's `forward`, by name or by position."""
        return kwargs.get(name, dict(zip(self.arguments, args, strict=False)).get(name))

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Rows of the batch, where it can be told."""
        names = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
        given = (*args[:1], *(kwargs.get(name) for name in names))
        return next((batch.shape[0] for batch in given if isinstance(batch, Tensor) and batch.ndim > 1), None)

    def _lengths(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Lengths of the texts, to know their tokens again where a layer gets those of all rows in one dimension."""
        names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
        given = (*args[:1], *(kwargs.get(name) for name in names))
        return tuple({batch.shape[1] for batch in given if isinstance(batch, Tensor) and batch.ndim > 1})

    def _encodes_first(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return attention.encodes_first(self.model)

    def _mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Which tokens are no padding, `[B, S]`, where the caller says it."""
        mask = self._argument("attention_mask", args, kwargs)
        if self._encodes_first():
            return None  # it is the encoder's, and half of the layers read something else
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _text_mask(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Which tokens of the text are no padding, without soft tokens behind the first."""
        mask = self._mask(args, kwargs)
        if mask is None or forward.front is None:
            return mask
        return torch.cat([mask[:, :1], mask[:, 1 + forward.front.shape[1] :]], dim=1)

    def _text(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Ids or embeddings of the batch, and which of them a prompt may read: not the answer, where it is told.

        Nothing where no prompt reads it.
        """
        if not self.opener.reads_input():
            return None
        given = (*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")))
        batch = next((batch for batch in given if isinstance(batch, Tensor)), None)
        if batch is None:
            return None
        cache = self._argument("past_key_values", args, kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            raise PemlError(
                "this adapter's prompt is made from the whole text, and a step through a cache has only its end: call "
                "generate(), or the model with the whole text"
            )
        if input_mask is None and (self._encodes_first() or not self.opener.counts_positions()):
            # An encoder has no answer in its text.
            given = self._argument("attention_mask", args, kwargs)
            input_mask = torch.ones(batch.shape[:2], device=batch.device) if given is None else given
        return batch, input_mask

    def _prompted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        """What `generate` goes on from: all of it may be read, but padding."""
        given, mask = kwargs.pop("input_mask", None), kwargs.get("attention_mask")
        text = self._text(args, kwargs, mask if given is None else given)
        if text is None or text[1] is not None:
            return text
        pad = getattr(getattr(self.model, "generation_config", None), "pad_token_id", None)
        if isinstance(pad, int) and bool((text[0] == pad).any()):
            raise PemlError("this adapter's prompt is made from the text, which holds padding: pass attention_mask=")
        return text[0], torch.ones(text[0].shape[:2], device=text[0].device)

    def _moved(self, args: tuple[Any, ...], kwargs: dict[str, Any], offset: int) -> dict[str, Any]:
        """The call with learned positions moved, to make room for soft tokens in front of the text."""
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        batch, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        batch = kwargs.get("inputs_embeds") if batch is None else batch
        assert isinstance(batch, Tensor)
        positions = kwargs.get("position_ids")
        past = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            positions = torch.arange(batch.shape[1], device=batch.device)[None] + past
        limit = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        # The length of a static cache is a tensor, for which nothing waits here.
        length = batch.shape[1] + (past if isinstance(past, int) else 0)
        # Padding and packing take no positions: asked of the device only where it might be too many.
        if isinstance(limit, int) and length + offset > limit and (last := int(positions.max()) + 1) + offset > limit:
            raise PemlError(
                f"{type(self.model).__name__} has {limit} positions: a text of {last} tokens and a prompt of {offset} "
                "do not fit"
            )
        return kwargs | {"position_ids": positions + offset}

    def _add_position_ids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count positions from the attention mask when the caller gives none.

        Prefix keys carry no rotary phase, so unlike without a prefix the offset of a left-padded row matters.
        """
        mask, batch = self._mask(args, kwargs), self._argument("input_ids", args, kwargs)
        batch = self._argument("inputs_embeds", args, kwargs) if batch is None else batch
        if batch is None or mask is None or self.counts_itself:
            return
        if not (self.rotary or self.opener.counts_positions()):
            return
        if self._argument("position_ids", args, kwargs) is not None or "position_ids" not in self.arguments:
            return
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        kwargs["position_ids"] = positions[:, -batch.shape[1] :]
