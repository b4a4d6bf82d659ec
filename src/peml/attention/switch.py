"""Keeps the twin in its place when somebody else changes the model's attention implementation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from peml.attention import flash
from peml.attention.host import PromptHost
from peml.attention.twin import APART, MASKS, twin_of, twinned
from peml.errors import PemlError


def engage(model: nn.Module) -> None:
    """Make sure that attention goes through the twin: without it the prefix would be lost without a word.

    `set_attn_implementation` may have been called after the prefix was attached.

    Raises:
        PemlError: an implementation that has no twin.
    """
    host = _host(model)
    if host is None or host.active() is None:
        return
    assert isinstance(model, PreTrainedModel)
    parts = (model, model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else (model,)
    names = (part.config._attn_implementation for part in parts)
    found = next((name for name in names if name != twin_of(host.implementation)), None)
    if found is None:
        return
    wanted = twinned(found)
    if wanted not in MASKS:
        raise PemlError(
            f"{type(model).__name__} was switched to attention {found!r}, which cannot take its prefix: "
            'call set_attn_implementation("sdpa") or ("eager"), or disable_adapter()'
        )
    flash.check(model, wanted)
    model.set_attn_implementation(twin_of(wanted))
    host.implementation = wanted


def check_paging(model: nn.Module) -> None:
    """Refuse continuous batching where the prefix would not be seen, or not by the text that it belongs to.

    Raises:
        PemlError: an encoder-decoder model, or an implementation whose masks are no tensors of scores.
    """
    host = _host(model)
    assert host is not None and isinstance(model, PreTrainedModel)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise PemlError(
            f"continuous batching serves no encoder-decoder models such as {name}: call generate(tasks=...)"
        )
    if twinned(model.config._attn_implementation) in APART:
        raise PemlError(
            f"continuous batching with a prefix does not go through {host.implementation!r}: call "
            f'set_attn_implementation("sdpa") or ("eager") on {name} first'
        )


@contextmanager
def named_for_paging(model: nn.Module) -> Iterator[None]:
    """Inside, the model bears a name from which continuous batching knows that attention wants ready-made masks."""
    assert isinstance(model, PreTrainedModel)
    before = model.config._attn_implementation
    model.set_attn_implementation("paged|eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def hosts_prompts(model: nn.Module) -> bool:
    """Whether the model has been given a prompt."""
    return _host(model) is not None


def packs(model: nn.Module) -> bool:
    """Whether the model keeps texts apart whose positions start again within a row."""
    host = _host(model)
    return host is None or host.packs


def _host(model: nn.Module) -> PromptHost | None:
    return next((child for child in model.children() if isinstance(child, PromptHost)), None)
