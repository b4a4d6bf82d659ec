"""The twin of an attention function: the original, over `[prefix; key]` and `[prefix; value]`.

Letters: `B` rows, `H` heads, `S` queries, `K` keys, `P` prefix tokens, `D` head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, flex_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peml import routing
from peml.attention import flash, flex
from peml.attention.scores import Sorted, attend_one, gate_bias, gate_channel
from peml.errors import PemlError
from peml.prompts.base import AttentionSlot, LayerPrefix, SideBySide

if TYPE_CHECKING:
    from peml.attention.host import PromptHost

TWIN = "peml_"
MASKS: dict[str, Callable[..., Any]] = {
    "sdpa": sdpa_mask,
    "eager": eager_mask,
    "flex_attention": flex_attention_mask,
    flash.NAME: flash.mask,
}
APART: dict[str, Callable[..., Any]] = {"flex_attention": flex.attend, flash.NAME: flash.attend}
"""Implementations whose masks are no tensors of scores."""

WORTH_SORTING = 128
"""Tokens copied per prefix from which on rows are sorted by prefix; measured on a CPU, see LOG.md."""

Attention = tuple[Tensor, Tensor | None]


class Seen(NamedTuple):
    """What a probing forward sees of one attention layer."""

    module: nn.Module
    slot: AttentionSlot
    value_dim: int
    mask: Tensor | None


PROBE: ContextVar[list[Seen] | None] = ContextVar("peml_probe", default=None)


def twin_of(implementation: str) -> str:
    """Name under which the twin of an attention implementation is registered."""
    return TWIN + flash.ALIASES.get(implementation, implementation)


def twinned(name: str) -> str:
    """The implementation that a name means, be it its own or its twin's."""
    found = name.removeprefix(TWIN)
    return next((own for own, alias in flash.ALIASES.items() if alias == found), found)


def attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Attention:
    """The twin: the original attention over `[prefix; key]` and `[prefix; value]`.

    Shapes:
        query `[B, H, S, D]`, key and value `[B, H_kv, K, D]`, attention_mask `[B or 1, 1, S, K]` or None.
    """
    original = partial(_original(implementation, module), module)
    probe = PROBE.get()
    if probe is not None:
        _check(implementation, module, kwargs)
        probe.append(Seen(module, AttentionSlot(key.shape[1], key.shape[3]), value.shape[3], attention_mask))
        # Not the original, which may want a device, a compiler or half precision that the model has not got yet.
        return query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[3]), None
    paged = kwargs.pop("cache", None)
    if paged is not None:
        # Continuous batching leaves this to the attention function; the prefix must not get into the cache.
        key, value = paged.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    _collect(module, key, value)
    prefix = _prefix_of(module)
    if prefix is None:
        return original(query, key, value, attention_mask, scaling=scaling, **kwargs)

    prefix = _side_by_side(prefix)
    alone = not isinstance(prefix, SideBySide)
    if not alone and implementation in APART:
        raise PemlError(
            "a prefix per task cannot serve rows that pack several tasks in this attention: give one task per row, or "
            'call set_attn_implementation("sdpa") or ("eager")'
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = not kwargs.get("dropout") and all(kwargs.get(k) is None for k in ("softcap", "s_aux", "position_bias"))
    gate = None if prefix.log_gate is None else prefix.log_gate.to(query.device)
    if implementation in APART:
        prefix_key, prefix_value = _gather(prefix, query, shared=False)
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        call = partial(original, scaling=scaling)
        return APART[implementation](call, query, key, value, attention_mask, prefix.num_tokens, gate, kwargs)  # type: ignore[no-any-return]
    if query.shape[2] == 1 and implementation == "sdpa" and plain and alone and not torch.is_grad_enabled():
        tables, rows = _tables(prefix, query)
        return attend_one(query, key, value, attention_mask, scaling, tables, gate, rows)

    p = prefix.num_tokens
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and query.shape[2] > 1 and implementation == "sdpa":
        # To SDPA no mask means "causal, aligned at the first key": a longer static cache has only zeros after the
        # queries. To the eager function it means that everything is visible.
        s = query.shape[2]
        key, value = key[:, :, :s], value[:, :, :s]
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][..., :s]
        attention_mask = torch.ones(1, 1, s, p + s, dtype=torch.bool, device=query.device).tril(p)
        attention_mask = _without_others(attention_mask, prefix, query)
    elif paged is None:
        attention_mask = _over_prefix(attention_mask, prefix, query, key, implementation)
    else:
        # Every step has a mask of its own, and a route, if any; its layers have one mask for all.
        forward, at = routing.current(), (id(attention_mask), p, alone)
        known = {} if forward is None or forward.route is None else forward.route.known
        if at not in known:
            known[at] = attention_mask, _over_prefix(attention_mask, prefix, query, key, implementation)
        attention_mask = known[at][1]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (p, 0))

    prefix_key, prefix_value = _gather(prefix, query, shared=False)
    key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
    if gate is None:
        return original(query, key, value, attention_mask, scaling=scaling, **kwargs)
    if gate.requires_grad and implementation == "sdpa":
        size = query.shape[-1]
        query, key, value = gate_channel(query, key, value, gate / scaling)
        output, weights = original(query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output[..., :size], weights
    bias = gate_bias(attention_mask, gate, query, key)
    return original(query, key, value, bias, scaling=scaling, **kwargs)


def _original(implementation: str, module: nn.Module) -> Callable[..., Attention]:
    if implementation == flash.NAME:
        return flash.under_own_name(ALL_ATTENTION_FUNCTIONS[implementation])
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]
    # The class that was written beside the function, where a user's own class inherits from it.
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise PemlError(f"{type(module).__name__} has no eager attention function that a prefix could go through")


def _check(implementation: str, module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("softcap") is not None and implementation == "sdpa":
        raise PemlError(
            f"{type(module).__name__} soft-caps its scores, which attention 'sdpa' cannot: load the model with "
            'attn_implementation="eager"'
        )


def _mask_of(mask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Probing reads the mask, and flash attention's would not tell.
    return (mask if PROBE.get() is None else sdpa_mask)(*args, **kwargs)


def _collect(module: nn.Module, key: Tensor, value: Tensor) -> None:
    """Keep keys and values of soft tokens, which a run over nothing else is for."""
    slot, forward = getattr(module, "_peml_slot", None), routing.current()
    if slot is not None and forward is not None and forward.collected is not None:
        forward.collected[slot[0]] = LayerPrefix(key, value)


def _prefix_of(module: nn.Module) -> LayerPrefix | None:
    slot: tuple[int, PromptHost] | None = getattr(module, "_peml_slot", None)
    if slot is None or slot[1].active() is None:
        return None
    forward = routing.current()
    # A block that only routes has computed no prefix: the model's own forward would have. And another model's, in
    # whose forward this one is called, is not for here.
    elsewhere = forward is not None and getattr(forward.model, "prompt_host", slot[1]) is not slot[1]
    if forward is None or forward.prefix is None or elsewhere:
        raise PemlError(
            "a layer with a learned prefix was called outside its model's forward, where the prefix would be lost: "
            "call the adapted model itself"
        )
    return forward.prefix.get(slot[0])


def _gather(prefix: LayerPrefix, query: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Prefix keys and values `[B, H_kv, P, D]` in the query's dtype; `[1, ...]` if all rows share them and may."""
    keys, values = (t.to(query.device, query.dtype) for t in (prefix.keys, prefix.values))
    rows, forward = query.shape[0], routing.current()
    if forward is not None and forward.by_row:
        # Beams repeat every row.
        return tuple(t.repeat_interleave(rows // t.shape[0], 0) for t in (keys, values))  # type: ignore[return-value]
    if keys.shape[0] > 1:
        assert forward is not None and forward.route is not None
        index = forward.route.groups(rows, query.device)
        return keys[index], values[index]
    if shared:
        return keys, values
    return keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)


def _side_by_side(prefix: LayerPrefix) -> LayerPrefix:
    """For rows that pack several tasks their prefixes one beside the other; for others the prefix as it is."""
    forward = routing.current()
    if isinstance(prefix, SideBySide) or prefix.keys.shape[0] == 1 or forward is None or forward.by_row:
        return prefix
    return prefix.side_by_side() if forward.route is not None and forward.route.per_token else prefix


def _over_prefix(
    mask: Tensor | None, prefix: LayerPrefix, query: Tensor, key: Tensor, implementation: str
) -> Tensor | None:
    """The mask over `[prefix; keys]`, or None if all is visible."""
    if mask is not None:
        mask = F.pad(mask, (prefix.num_tokens, 0), value=mask.dtype == torch.bool)
    elif isinstance(prefix, SideBySide):
        # To the eager function a mask is something to add.
        size, bools = (query.shape[2], prefix.num_tokens + key.shape[2]), implementation != "eager"
        mask = torch.ones(1, 1, *size, dtype=torch.bool, device=query.device) if bools else query.new_zeros(1, 1, *size)
    return mask if mask is None else _without_others(mask, prefix, query)


def _without_others(mask: Tensor, prefix: LayerPrefix, query: Tensor) -> Tensor:
    """The mask over `[prefixes; keys]` in which nobody sees the prefix of another task."""
    if not isinstance(prefix, SideBySide):
        return mask
    forward, p = routing.current(), prefix.num_tokens
    assert forward is not None and forward.route is not None
    count = len(forward.route.present)
    owners = torch.arange(count, device=query.device).repeat_interleave(p // count)
    index = forward.route.groups(query.shape[0], query.device)
    allowed = F.pad((index[:, :, None] == owners)[:, None], (0, mask.shape[-1] - p), value=True)
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(query.dtype).min)


def _tables(prefix: LayerPrefix, query: Tensor) -> tuple[tuple[Tensor, Tensor], Sorted | None]:
    """What one query per row needs: the prefixes as stored and the rows of each, or a short prefix copied per row."""
    groups, rows = prefix.keys.shape[0], query.shape[0]
    forward = routing.current()
    assert forward is not None
    route, copied = forward.route, rows * prefix.num_tokens
    if groups == 1 or forward.by_row or route is None or route.per_token or copied < groups * WORTH_SORTING:
        return _gather(prefix, query, shared=True), None
    keys, values = (t.to(query.device, query.dtype) for t in (prefix.keys, prefix.values))
    # The same in every layer, and in every step of `generate`; what is kept for all routes knows nothing of one.
    own = forward.prepared is not None and forward.every is None
    known, key = forward.prepared if own else {}, (Sorted, rows, query.device)
    assert known is not None
    if key not in known:
        known[key] = Sorted.of(route.groups(rows, torch.device("cpu")), groups, query.device)
    return (keys, values), known[key]


for _implementation, _mask in MASKS.items():
    AttentionInterface.register(twin_of(_implementation), partial(attend, _implementation))
    AttentionMaskInterface.register(twin_of(_implementation), partial(_mask_of, _mask))
