"""Who holds a model's prompts, and how the model's attention comes to go through the twin.

Letters: `P` prefix tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from peml.attention import flash
from peml.attention.twin import MASKS, PROBE, Seen, twin_of
from peml.errors import PemlError
from peml.prompts.base import AttentionSlot, ModelShape, Prompt

_STAND_IN: ContextVar[tuple[Any, Prompt] | None] = ContextVar("peml_stand_in", default=None)


class PromptHost(nn.Module, BaseTunerLayer):
    """Holds the prompts of a model, one per PEFT adapter, so that PEFT saves, switches and deletes them.

    Args:
        shape: of the attention layers and the input embeddings.
        implementation: the attention implementation that the twin stands in for.
        causal: whether attention looks to the left only, as in decoders.
        packs: whether the model keeps texts apart whose positions start again within a row.
    """

    adapter_layer_names = ("peml_prompt",)
    active_adapters: list[str]  # of BaseTunerLayer, which has no types
    peml_prompt: nn.ModuleDict

    def __init__(self, shape: ModelShape, implementation: str, causal: bool, packs: bool = True) -> None:
        super().__init__()
        self.shape = shape
        self.implementation = implementation
        self.causal = causal
        self.packs = packs
        self.peml_prompt = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def slots(self) -> tuple[AttentionSlot, ...]:
        """Shapes of the attention layers."""
        return self.shape.slots

    def active(self) -> Prompt | None:
        """The prompt in force, or None if it is disabled or the active adapter has none."""
        stand_in = _STAND_IN.get()
        if stand_in is not None and stand_in[0] is self:
            return stand_in[1]
        if self._disable_adapters or not self.active_adapters:
            return None
        name = self.active_adapters[0]
        return self.peml_prompt[name] if name in self.peml_prompt else None  # type: ignore[return-value]  # noqa: SIM401

    @contextmanager
    def standing_in(self, prompt: Prompt) -> Iterator[None]:
        """Another prompt in force inside the block, in this thread."""
        token = _STAND_IN.set((self, prompt))
        try:
            yield
        finally:
            _STAND_IN.reset(token)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # A prompt wraps no layer: it goes where it is told.
        if device is not None and adapter_name in self.peml_prompt:
            self.peml_prompt[adapter_name].to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: a prefix stays beside merged weights."""

    def unmerge(self) -> None:
        """Nothing to undo."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Nothing is drawn at random inside the block; afterwards every module trains that did."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def install(model: nn.Module) -> PromptHost:
    """Route the model's attention through the twin and find the shapes of its attention layers.

    Raises:
        PemlError: the model, or its attention implementation, cannot take a prefix.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise PemlError(f"{name} cannot take a prefix: it is not a transformers model; use an adapter without a prompt")
    implementation = model.config._attn_implementation
    if implementation not in MASKS:
        raise PemlError(
            f"{name} uses attention {implementation!r}, which cannot take a prefix: "
            'load the model with attn_implementation="sdpa" or "eager"'
        )
    flash.check(model, implementation)
    refusal = PemlError(
        f"{name} cannot take a prefix: its attention does not go through transformers' AttentionInterface; "
        "use an adapter without a prompt for this model"
    )
    if not model._can_set_attn_implementation():
        raise refusal
    model.set_attn_implementation(twin_of(implementation))
    try:
        if model.config._attn_implementation != twin_of(implementation):
            raise refusal
        seen = _probe(model)
        if not seen:
            raise refusal
        if model.config.is_encoder_decoder and not _reaches_encoder(model, seen):
            raise PemlError(
                f"{name} cannot take a prefix: its encoder has an attention of its own, which does not go through "
                "transformers' AttentionInterface; use an adapter without a prompt for this model"
            )
        # A layer that the model calls several times (ALBERT) is one slot: its prefix serves every call.
        found = list({id(entry.module): entry for entry in seen}.values())
        for entry in found:
            if entry.slot.head_dim != entry.value_dim:
                kind = type(entry.module).__name__
                raise PemlError(f"{name} cannot take a prefix: keys and values of {kind} differ in size")
        packs = _packs(model)
    except BaseException:
        model.set_attn_implementation(implementation)
        raise
    causal = any(getattr(entry.module, "is_causal", False) for entry in found)
    shape = ModelShape(tuple(entry.slot for entry in found), model.get_input_embeddings().weight.shape[1])
    host = PromptHost(shape, implementation, causal, packs)
    for index, entry in enumerate(found):
        # A tuple keeps nn.Module from registering the host a second time, below every attention layer.
        entry.module._peml_slot = (index, host)  # type: ignore[assignment]
    return host


def uninstall(model: PreTrainedModel, host: PromptHost) -> None:
    """Restore the model's own attention."""
    for module in model.modules():
        module.__dict__.pop("_peml_slot", None)
    model.set_attn_implementation(host.implementation)


@torch.no_grad()
def _probe(model: PreTrainedModel, **inputs: Any) -> list[Seen]:
    """Run two tokens through the model and let every attention layer report the shape of its keys, and its mask.

    In the order of the calls: of an encoder-decoder, the encoder's layers before the decoder's.
    """
    seen: list[Seen] = []
    token = PROBE.set(seen)
    # A ready-made mask, because making one asks for values that a model on the meta device has not.
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=model.device)
    given = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=model.device)}
    masks = {"attention_mask": mask} if model.device.type == "meta" else {}
    if model.config.is_encoder_decoder:
        end = getattr(model.config, "eos_token_id", None)
        # Classifiers of this kind read what the decoder says at the end of the text.
        given = {name: ids + end for name, ids in given.items()} if isinstance(end, int) else given
        given["decoder_input_ids"] = given["input_ids"]
        masks |= {f"decoder_{name}": part for name, part in masks.items()}
    try:
        with evaluating(model):
            model(**given, **masks, **inputs)
    except PemlError:
        raise
    except Exception as error:
        raise PemlError(
            f"{type(model).__name__} cannot take a prefix: a forward with two tokens, which finds its attention "
            f"layers, failed with {error!r}; use an adapter without a prompt for this model"
        ) from error
    finally:
        PROBE.reset(token)
    return seen


def _reaches_encoder(model: PreTrainedModel, seen: list[Seen]) -> bool:
    inside = {id(module) for module in model.get_encoder().modules()}
    return any(id(entry.module) in inside for entry in seen)


def _packs(model: PreTrainedModel) -> bool:
    """Whether no token sees the one before it when the positions of both are 0."""
    if model.config.is_encoder_decoder:
        return False  # positions that are given are not even read
    arguments = inspect.signature(type(model).forward).parameters
    if model.device.type == "meta" or "position_ids" not in arguments:
        return True  # nothing to be seen there, or no way to ask for it
    apart = {"position_ids": torch.zeros(1, 2, dtype=torch.long, device=model.device)}
    if "use_cache" in arguments:
        apart["use_cache"] = False  # type: ignore[assignment]
    return all(_hidden(entry.mask) for entry in _probe(model, **apart))


def _hidden(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    pair = mask[..., 1, 0]
    return not bool(pair.any()) if mask.dtype == torch.bool else bool((pair < -1e3).all())
