"""Learned keys and values inside the attention function of unmodified transformers models.

A twin of the model's attention implementation is registered with `AttentionInterface`, and of its mask function with
`AttentionMaskInterface` (without the second, the padding mask would be dropped silently). The twin puts the prefix of
the open `Forward` in front of the layer's keys and values and calls the original. The cache never holds the prefix,
real tokens keep their positions, and gradient checkpointing, packing, static caches and beams work as without it.

Letters: `B` rows, `H` heads, `S` queries, `K` keys, `P` prefix tokens, `D` head size, `G` tasks present.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peml import routing
from peml.errors import PemlError
from peml.prompts.base import AttentionSlot, LayerPrefix, Prompt

TWIN = "peml_"
_MASKS: dict[str, Callable[..., Any]] = {"sdpa": sdpa_mask, "eager": eager_mask}

Attention = tuple[Tensor, Tensor | None]
_PROBE: ContextVar[list[tuple[nn.Module, AttentionSlot, int]] | None] = ContextVar("peml_probe", default=None)


class PromptHost(nn.Module, BaseTunerLayer):
    """Holds the prompts of a model, one per PEFT adapter, so that PEFT saves, switches and deletes them.

    Args:
        slots: shapes of the attention layers.
        implementation: the attention implementation that the twin stands in for.
        causal: whether attention looks to the left only, as in decoders.
    """

    adapter_layer_names = ("peml_prompt",)
    active_adapters: list[str]  # of BaseTunerLayer, which has no types
    peml_prompt: nn.ModuleDict

    def __init__(self, slots: Sequence[AttentionSlot], implementation: str, causal: bool) -> None:
        super().__init__()
        self.slots = tuple(slots)
        self.implementation = implementation
        self.causal = causal
        self.peml_prompt = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def active(self) -> Prompt | None:
        """The prompt in force, or None if it is disabled or the active adapter has none."""
        if self._disable_adapters or not self.active_adapters:
            return None
        name = self.active_adapters[0]
        return self.peml_prompt[name] if name in self.peml_prompt else None  # type: ignore[return-value]  # noqa: SIM401

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # A prompt wraps no layer: it goes where it is told.
        if device is not None and adapter_name in self.peml_prompt:
            self.peml_prompt[adapter_name].to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: a prefix stays beside merged weights."""

    def unmerge(self) -> None:
        """Nothing to undo."""


def install(model: nn.Module) -> PromptHost:
    """Route the model's attention through the twin and find the shapes of its attention layers.

    Raises:
        PemlError: the model, or its attention implementation, cannot take a prefix.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise PemlError(f"{name} cannot take a prefix: it is not a transformers model; use an adapter without a prompt")
    if getattr(model.config, "is_encoder_decoder", False):
        raise PemlError(f"{name} cannot take a prefix yet: encoder-decoder models are not supported with a prompt")
    implementation = model.config._attn_implementation
    if implementation not in _MASKS:
        raise PemlError(
            f"{name} uses attention {implementation!r}, which cannot take a prefix: "
            'load the model with attn_implementation="sdpa" or "eager"'
        )
    refusal = PemlError(
        f"{name} cannot take a prefix: its attention does not go through transformers' AttentionInterface; "
        "use an adapter without a prompt for this model"
    )
    if not model._can_set_attn_implementation():
        raise refusal
    _set(model, TWIN + implementation)
    try:
        if model.config._attn_implementation != TWIN + implementation:
            raise refusal
        found = _probe(model)
        if not found:
            raise refusal
        for module, slot, value_dim in found:
            if slot.head_dim != value_dim:
                kind = type(module).__name__
                raise PemlError(f"{name} cannot take a prefix: keys and values of {kind} differ in size")
    except BaseException:
        _set(model, implementation)
        raise
    causal = any(getattr(module, "is_causal", False) for module, _, _ in found)
    host = PromptHost([slot for _, slot, _ in found], implementation, causal)
    for index, (module, _, _) in enumerate(found):
        # A tuple keeps nn.Module from registering the host a second time, below every attention layer.
        module._peml_slot = (index, host)  # type: ignore[assignment]
    return host


def uninstall(model: PreTrainedModel, host: PromptHost) -> None:
    """Restore the model's own attention."""
    for module in model.modules():
        module.__dict__.pop("_peml_slot", None)
    _set(model, host.implementation)


def _set(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> list[tuple[nn.Module, AttentionSlot, int]]:
    """Run two tokens through the model and let every attention layer report the shape of its keys."""
    seen: list[tuple[nn.Module, AttentionSlot, int]] = []
    token = _PROBE.set(seen)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # A ready-made mask, because making one asks for values that a model on the meta device has not.
        mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=model.device)
        ready = {"attention_mask": mask} if model.device.type == "meta" else {}
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), **ready)
    finally:
        for module in training:
            module.training = True
        _PROBE.reset(token)
    # A layer that the model calls several times (ALBERT) is one slot: its prefix serves every call.
    return list({id(entry[0]): entry for entry in seen}.values())


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
    probe = _PROBE.get()
    if probe is not None:
        probe.append((module, AttentionSlot(key.shape[1], key.shape[3]), value.shape[3]))
        return original(query, key, value, attention_mask, scaling=scaling, **kwargs)
    prefix = _prefix_of(module)
    if prefix is None:
        return original(query, key, value, attention_mask, scaling=scaling, **kwargs)

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = not kwargs.get("dropout") and all(kwargs.get(k) is None for k in ("softcap", "s_aux", "position_bias"))
    gate = None if prefix.log_gate is None else prefix.log_gate.to(query.device)
    if query.shape[2] == 1 and implementation == "sdpa" and plain and not torch.is_grad_enabled():
        return _attend_one(query, key, value, attention_mask, scaling, _gather(prefix, query, shared=True), gate)

    p = prefix.num_tokens
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and query.shape[2] > 1 and implementation == "sdpa":
        # To SDPA no mask means "causal, aligned at the first key": a longer static cache has only zeros after the
        # queries. To the eager function it means that everything is visible.
        s = query.shape[2]
        key, value = key[:, :, :s], value[:, :, :s]
        attention_mask = torch.ones(1, 1, s, p + s, dtype=torch.bool, device=query.device).tril(p)
    elif attention_mask is not None:
        attention_mask = F.pad(attention_mask, (p, 0), value=attention_mask.dtype == torch.bool)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (p, 0))

    prefix_key, prefix_value = _gather(prefix, query, shared=False)
    key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
    if gate is None:
        return original(query, key, value, attention_mask, scaling=scaling, **kwargs)
    if gate.requires_grad and implementation == "sdpa":
        size = query.shape[-1]
        query, key, value = _gate_channel(query, key, value, gate / scaling)
        output, weights = original(query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output[..., :size], weights
    bias = _gate_bias(attention_mask, gate, query, key)
    return original(query, key, value, bias, scaling=scaling, **kwargs)


def _original(implementation: str, module: nn.Module) -> Callable[..., Attention]:
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]


def _prefix_of(module: nn.Module) -> LayerPrefix | None:
    slot: tuple[int, PromptHost] | None = getattr(module, "_peml_slot", None)
    if slot is None or slot[1].active() is None:
        return None
    forward = routing.current()
    if forward is None:
        raise PemlError(
            "a layer with a learned prefix was called outside its model's forward, where the prefix would be lost: "
            "call the adapted model itself"
        )
    return None if forward.prefix is None else forward.prefix.get(slot[0])


def _gather(prefix: LayerPrefix, query: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Prefix keys and values `[B, H_kv, P, D]` in the query's dtype; `[1, ...]` if all rows share them and may."""
    keys, values = (t.to(query.device, query.dtype) for t in (prefix.keys, prefix.values))
    rows = query.shape[0]
    if keys.shape[0] > 1:
        forward = routing.current()
        assert forward is not None and forward.route is not None
        if forward.route.per_token:
            raise PemlError("a prefix per task cannot serve rows that pack several tasks: give one task per row")
        index = forward.route.groups(rows, query.device)
        return keys[index], values[index]
    if shared:
        return keys, values
    return keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)


def _gate_bias(mask: Tensor | None, gate: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Additive mask `[B or 1, 1, S, P + K]` with the log-gates in its first P columns."""
    columns = F.pad(gate.to(query.dtype), (0, key.shape[2] - gate.shape[0]))
    if mask is None:
        return columns.expand(1, 1, query.shape[2], -1)
    if mask.dtype == torch.bool:
        return torch.where(mask, columns, torch.finfo(query.dtype).min)
    return mask + columns


def _gate_channel(query: Tensor, key: Tensor, value: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Carry trainable gates as one more key channel against a query channel of 1.

    An additive mask that needs a gradient would send SDPA to its slow path; this is exact and does not.
    Heads are padded to a multiple of 8, which the fused kernels want.
    """
    extra = 8 - query.shape[-1] % 8
    gates = F.pad(column.to(key.dtype), (0, key.shape[2] - column.shape[0])).view(1, 1, -1, 1)
    key = torch.cat([key, gates.expand(*key.shape[:2], -1, -1)], dim=-1)
    query = F.pad(query, (0, 1), value=1.0)
    query, key = (F.pad(t, (0, extra - 1)) for t in (query, key))
    return query, key, F.pad(value, (0, extra))


def _attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    prefix: tuple[Tensor, Tensor],
    gate: Tensor | None,
) -> Attention:
    """One query per row: join the scores of prefix and cache, never their keys, so the cache is not copied."""
    rows, heads, _, size = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)
    scores = grouped @ key.transpose(2, 3) * scaling
    if mask is not None:
        # [B or 1, 1 or H, 1, K]: a mask per head would have to follow the grouping; transformers has none here.
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    prefix_scores = grouped @ prefix[0].transpose(2, 3) * scaling
    if gate is not None:
        prefix_scores = prefix_scores + gate.to(prefix_scores.dtype)
    joined = torch.cat([prefix_scores, scores], dim=-1)
    weights = torch.softmax(joined, dim=-1, dtype=torch.promote_types(joined.dtype, torch.float32)).to(query.dtype)
    p = prefix[0].shape[2]
    output = weights[..., :p] @ prefix[1] + weights[..., p:] @ value
    return output.reshape(rows, 1, heads, size), None


for _implementation, _mask in _MASKS.items():
    AttentionInterface.register(TWIN + _implementation, partial(attend, _implementation))
    AttentionMaskInterface.register(TWIN + _implementation, _mask)
