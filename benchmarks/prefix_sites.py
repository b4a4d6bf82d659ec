"""What the runs on prefixes share: shapes, models with our prefix and with PEFT's, inputs of an attention layer."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

import peml
from benchmarks.options import TINY
from benchmarks.sites import DTYPES, llama

WIDTH, HEADS = 512, 8


class Shape(NamedTuple):
    """Of an attention layer: rows, heads, heads of keys and values, tokens of a text, tokens of the prefix."""

    rows: int
    kv_heads: int
    length: int
    prefix: int

    def __str__(self) -> str:
        return f"b={self.rows}, heads {HEADS}/{self.kv_heads}, l={self.length}, P={self.prefix}"


# The work of an attention layer must not drown in that of the other layers, which no prefix touches.
MODEL = {"width": WIDTH, "layers": 2, "heads": HEADS, "intermediate": WIDTH}


def settings_of(options: Namespace, shape: Shape | None = None) -> dict[str, object]:
    own = {} if shape is None else {**shape._asdict(), "heads": HEADS}
    return {**size_of(options), **own, "dtype": options.dtype}


def size_of(options: Namespace) -> dict[str, int]:
    return {**TINY, "layers": 2} if options.quick else dict(MODEL)


def base_of(options: Namespace, shape: Shape | None = None) -> nn.Module:
    size = size_of(options)
    kv_heads = size["heads"] if shape is None else min(shape.kv_heads, size["heads"])
    return llama(**size, kv_heads=kv_heads).to(DTYPES[options.dtype]).requires_grad_(False)


def with_ours(base: nn.Module, prompt: Any, tasks: int = 1) -> nn.Module:
    names = [f"task{i}" for i in range(tasks)]
    return get_peft_model(base, peml.PemlConfig(task_names=names, prompt=prompt), autocast_adapter_dtype=False)


def with_peft(base: nn.Module, tokens: int, **settings: Any) -> nn.Module:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **settings)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def queries_keys_values(options: Namespace, shape: Shape, keys: int, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    size = size_of(options)
    heads, width = size["heads"], size["width"] // size["heads"]
    queries = shape.length if train else 1
    shapes = ((heads, queries), (min(shape.kv_heads, heads), keys), (min(shape.kv_heads, heads), keys))
    # As a model has them: made with the heads behind the tokens.
    made = [torch.randn(shape.rows, n, h, width, dtype=DTYPES[options.dtype]).transpose(1, 2) for h, n in shapes]
    # A cache is contiguous the other way round.
    made = made if train else [made[0], *(t.contiguous() for t in made[1:])]
    return tuple(t.requires_grad_(train) for t in made)  # type: ignore[return-value]
