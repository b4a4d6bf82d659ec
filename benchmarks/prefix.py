"""Learned keys and values: what making them costs per step, what attention pays in training, and one token per row.

Three questions, each beside PEFT's prefix tuning, which puts the prefix into the cache of every row.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import CartridgeConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peml
from benchmarks.harness import FLOOR, TWIN, Case, Variant
from benchmarks.options import add_dtype
from benchmarks.prefix_sites import (
    Shape,
    base_of,
    queries_keys_values,
    settings_of,
    size_of,
    with_ours,
    with_peft,
)
from benchmarks.record import MIB
from benchmarks.sites import DTYPES, llama_site
from peml import routing

TASKS = 4
DEPTH = 4
"""Layers whose caches are read in turn, so that none is still in the processor's cache."""
ROUNDS = 51
"""Of decoding, whose large caches make the allocator part of what is read."""

TRAINING = (Shape(8, 8, 64, 16), Shape(8, 8, 256, 16), Shape(8, 8, 256, 64), Shape(8, 2, 256, 64))
DECODING = (Shape(32, 8, 256, 512), Shape(32, 2, 256, 512), Shape(16, 8, 256, 128), Shape(8, 8, 128, 16))
PARTS = ("generator", "attention", "llama", "decode-attention", "decode-llama")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, action="append", help="one or more (all)")
    add_dtype(parser, "fp32")


def cases(options: Namespace) -> Iterator[Case]:
    """The generator, then training, then decoding."""
    wanted = options.part or PARTS
    training = [Shape(2, 2, 8, 3)] if options.quick else TRAINING
    decoding = [Shape(4, 2, 8, 130)] if options.quick else DECODING
    if "generator" in wanted:
        yield _generator(options)
    for part, shapes, build in (
        ("attention", training, _train_attention),
        ("llama", training, _train_llama),
        ("decode-attention", decoding, _decode_attention),
        ("decode-llama", decoding, _decode_llama),
    ):
        for shape in shapes if part in wanted else ():
            torch.manual_seed(options.seed)
            yield build(options, shape)


# The generator


class _Fed(torch.autograd.Function):
    """A loss of 0 that hands back ready-made gradients: what attention gives, without attention."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gradients)


def _generator(options: Namespace) -> Case:
    """Keys and values of every layer for a batch, and their way back to the generator's weights."""
    p, rows = (3, 4) if options.quick else (32, 8)
    base = base_of(options)
    width = base.config.hidden_size
    embedding = {"prefix_projection": True, "encoder_hidden_size": width}
    peft_model = with_peft(base_of(options), p, **embedding)

    def by_peft(number: int) -> Callable[[], list[Tensor]]:
        return lambda: [t for layer in peft_model.get_prompt(number).layers for t in (layer.keys, layer.values)]

    def by_us(model: nn.Module, number: int) -> Callable[[], list[Tensor]]:
        prompt = model.base_model.prompt
        return lambda: [t.expand(number, -1, -1, -1) for layer in prompt(None) for t in (layer.keys, layer.values)]

    def variant(
        name: str, make: Callable[[], list[Tensor]], model: nn.Module, kind: Any, against: str | None
    ) -> Variant:
        gradients = [torch.randn(t.shape, dtype=t.dtype) for t in make()]
        trained = tuple(p for p in model.parameters() if p.requires_grad)
        held = (*model.parameters(), *model.buffers())
        return Variant(name, lambda: _Fed.apply(gradients, *make()), kind, trained, held, against)

    # A derived generator that has dropped no token does the same work as the others.
    searched = peml.PrefixNAS(num_virtual_tokens=p, width=width, budget_tokens=p, gate_threshold=0.0)
    searching, derived = with_ours(base_of(options), searched), with_ours(base, searched)
    derived.base_model.prompt.derive()
    variants = [variant(name, by_peft(1), peft_model, "floor", None) for name in (FLOOR, TWIN)]
    variants.append(variant(f"PEFT prefix_projection, b={rows}", by_peft(rows), peft_model, "peer", FLOOR))
    for name, model in (("searching", searching), ("derived", derived)):
        one = f"peml PrefixNAS {name}, b=1"
        variants.append(variant(one, by_us(model, 1), model, "peml", None))
        variants.append(variant(f"peml PrefixNAS {name}, b={rows}", by_us(model, rows), model, "peml", one))
    settings = {**settings_of(options), "P": p, "floor": "PEFT prefix_projection, b=1"}
    return Case("Making the prefix of a step", variants, True, p * width * base.dtype.itemsize, settings)


# Training


def _train_attention(options: Namespace, shape: Shape) -> Case:
    """The attention function alone."""
    model = with_ours(base_of(options, shape), peml.PrefixTuning(shape.prefix))
    tuner, layer = model.base_model, model.base_model.model.model.layers[0].self_attn
    prompt, p = tuner.prompt, shape.prefix
    inputs = queries_keys_values(options, shape, shape.length, train=True)
    sdpa, ours = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["peml_sdpa"]
    mask = torch.ones(shape.length, p + shape.length, dtype=torch.bool).tril(p).expand(shape.rows, 1, -1, -1).clone()

    def plain() -> Tensor:
        return sdpa(layer, *inputs, None)[0]

    def repeated() -> Tensor:
        query, key, value = inputs
        keys, values = (
            # A table of tokens that is read once per row, as an embedding is.
            F.embedding(torch.arange(p).expand(shape.rows, -1), table["0"][0].flatten(1))
            .unflatten(-1, table["0"].shape[-2:])
            .transpose(1, 2)
            for table in (prompt.keys, prompt.values)
        )
        return sdpa(layer, query, torch.cat([keys, key], 2), torch.cat([values, value], 2), mask)[0]

    def twin() -> Tensor:
        with routing.opened(tuner.open_forward(None, shape.rows)):
            return ours(layer, *inputs, None)[0]

    held, leaves = (*model.parameters(), *model.buffers()), (*inputs, *prompt.parameters())
    peer = "a prefix and a mask per row, as PEFT"
    variants = [
        Variant(FLOOR, plain, "floor", leaves, held),
        Variant(TWIN, plain, "floor", leaves, held),
        Variant(peer, repeated, "peer", leaves, held),
        Variant("peml PrefixTuning", twin, "peml", leaves, held, peer),
    ]
    # The text's keys and values: what a prefix adds is measured in them.
    unit = inputs[1].nbytes + inputs[2].nbytes
    return Case(f"Training, attention alone: {shape}", variants, True, unit, settings_of(options, shape))


def _train_llama(options: Namespace, shape: Shape) -> Case:
    """A whole model, with texts padded to different lengths."""
    ids = [0] * shape.rows
    site = llama_site(
        base_of(options, shape), shape.rows, shape.length, options.dtype, ids=ids, num_tasks=1, train=True
    )
    lengths = torch.linspace(shape.length // 2, shape.length, shape.rows).long()
    mask = (torch.arange(shape.length) < lengths[:, None]).long()
    site = replace(site, kwargs={**site.kwargs, "attention_mask": mask})
    cartridge = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=shape.prefix, num_frozen_tokens=0)
    peers = {
        "PEFT prefix tuning": with_peft(site.copy(), shape.prefix),
        "PEFT CARTRIDGE": get_peft_model(site.copy(), cartridge, autocast_adapter_dtype=False),
    }
    ours = with_ours(site.copy(), peml.PrefixTuning(shape.prefix))
    variants = [
        *site.floors(),
        *(site.variant(name, model, "peer") for name, model in peers.items()),
        site.variant("peml PrefixTuning", ours, "peml", "PEFT prefix tuning"),
    ]
    unit = site.kwargs["inputs_embeds"].nbytes
    return Case(f"Training step of a Llama: {shape}", variants, True, unit, settings_of(options, shape))


# Decoding


def _decode_attention(options: Namespace, shape: Shape) -> Case:
    """The attention function alone, on the caches of several layers in turn; rows of unequal length."""
    prefix, per_task = peml.PrefixTuning(shape.prefix), peml.PrefixTuning(shape.prefix, per_task=True)
    model = with_ours(base_of(options, shape), prefix).requires_grad_(False)
    several = with_ours(base_of(options, shape), per_task, TASKS).requires_grad_(False)
    layer, table = model.base_model.model.model.layers[0].self_attn, model.base_model.prompt(None)[0]
    inputs = [queries_keys_values(options, shape, shape.length, train=False) for _ in range(DEPTH)]
    mask = torch.ones(shape.rows, 1, 1, shape.length, dtype=torch.bool)
    mask[::2, ..., : shape.length // 4] = False
    longer = F.pad(mask, (shape.prefix, 0), value=True)
    sdpa, ours = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["peml_sdpa"]

    def in_front(query: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        made = zip((table.keys, table.values), cache, strict=True)
        return (query, *(torch.cat([t.expand(shape.rows, -1, -1, -1), own], 2) for t, own in made))

    def twin(model: nn.Module, tasks: Any = None) -> Callable[[], list[Tensor]]:
        layer = model.base_model.model.model.layers[0].self_attn
        forward = model.base_model.open_forward(tasks, shape.rows)

        def step() -> list[Tensor]:
            with routing.opened(forward):
                return [ours(layer, *own, mask)[0] for own in inputs]

        return step

    def plain() -> list[Tensor]:
        return [sdpa(layer, *own, mask)[0] for own in inputs]

    long = [in_front(*own) for own in inputs]
    peer, ids = "prefix in the cache, as PEFT", [row % TASKS for row in range(shape.rows)]
    variants = [
        *(Variant(name, plain, "floor") for name in (FLOOR, TWIN)),
        Variant(peer, lambda: [sdpa(layer, *own, longer)[0] for own in long], "peer"),
        Variant(
            "concatenated at every step", lambda: [sdpa(layer, *in_front(*own), longer)[0] for own in inputs], "peer"
        ),
        Variant("peml PrefixTuning", twin(model), "peml", against=peer),
        Variant(f"peml PrefixTuning, one for each of {TASKS} tasks", twin(several, ids), "peml", against=peer),
    ]
    return _decode_case("Decoding, attention alone", options, shape, variants, inputs[0][0].nbytes)


@torch.no_grad()
def _decode_llama(options: Namespace, shape: Shape) -> Case:
    """A step of `generate` with its default cache, which grows by concatenation: cost that all variants have."""
    size = base_of(options, shape).config
    text = torch.randint(size.vocab_size, (shape.rows, shape.length))
    token = torch.randint(size.vocab_size, (shape.rows, 1))
    mask = torch.ones(shape.rows, shape.length, dtype=torch.long)
    mask[::2, : shape.length // 4] = 0

    def variant(name: str, kind: Any, base: nn.Module, p: int = 0, against: str | None = None) -> Variant:
        peft_model = with_peft(base, p) if p else None
        model = (base if peft_model is None else peft_model.get_base_model()).eval()
        cache = DynamicCache(config=size) if peft_model is None else peft_model.get_prompt(shape.rows)
        return Variant(name, _step(model, cache, p), kind, against=against)

    def _step(model: nn.Module, cache: DynamicCache, p: int) -> Callable[[], Tensor]:
        seen = F.pad(mask, (p, 0), value=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0) + p
        model(text, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True)
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        seen, position = F.pad(seen, (0, 1), value=1), positions[:, -1:] + 1

        def step() -> Tensor:
            for layer, (keys, values) in zip(cache.layers, kept, strict=True):
                layer.keys, layer.values = keys, values
            given = {"attention_mask": seen, "position_ids": position, "past_key_values": cache}
            return model(token, **given, use_cache=True).logits  # type: ignore[no-any-return]

        return step

    def ours(name: str, against: str, grad: bool = False) -> Variant:
        model = with_ours(base_of(options, shape), peml.PrefixTuning(shape.prefix)).requires_grad_(False).eval()
        tuner = model.base_model
        opened = replace(tuner.open_forward(None, shape.rows), prepared={})
        with routing.opened(opened):
            step = _step(tuner.model, DynamicCache(config=size), 0)

        def in_generate() -> Tensor:
            # With gradients enabled, though nothing has any, attention takes the way of training: it concatenates.
            with routing.opened(opened), torch.set_grad_enabled(grad):
                return step()

        return Variant(name, in_generate, "peer" if grad else "peml", against=against)

    peer = "PEFT prefix tuning"
    variants = [
        variant(FLOOR, "floor", base_of(options, shape)),
        variant(TWIN, "floor", base_of(options, shape)),
        variant(peer, "peer", base_of(options, shape), shape.prefix),
        ours("concatenated at every step", peer, grad=True),
        ours("peml PrefixTuning", peer),
    ]
    unit = shape.rows * size.hidden_size * DTYPES[options.dtype].itemsize
    return _decode_case("Decoding step of a Llama", options, shape, variants, unit)


def _decode_case(title: str, options: Namespace, shape: Shape, variants: list[Variant], unit: int) -> Case:
    size = size_of(options)
    kv_heads = min(shape.kv_heads, size["heads"])
    token = 2 * kv_heads * size["width"] // size["heads"] * DTYPES[options.dtype].itemsize
    text, prefix = shape.rows * shape.length * token, shape.prefix * token
    memory = {
        "MiB of keys and values per layer": f"{text / MIB:.2f} without a prefix",
        "in the cache of every row": f"{(text + shape.rows * prefix) / MIB:.2f}",
        "shared": f"{(text + prefix) / MIB:.2f}",
    }
    return Case(f"{title}: {shape}", variants, False, unit, {**settings_of(options, shape), **memory}, ROUNDS)
