"""What a search adds to a step: PEML while it searches, and after, beside LoRA with a prefix made by a network.

A step is forward, penalties and backward of a whole model, with the search half done, when every penalty is alive.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

import peml
from benchmarks.harness import Case, Variant
from benchmarks.options import TINY, add_dtype
from benchmarks.sites import Site, llama, llama_site
from peml.prompts import PrefixNAS, PrefixTuning, PromptConfig

BESIDE = "LoRA + prefix by a network"


class Shape(NamedTuple):
    """Of a model and its batch."""

    width: int
    layers: int
    heads: int
    intermediate: int
    rows: int
    length: int

    def __str__(self) -> str:
        return f"width {self.width}, {self.layers} layers, b={self.rows}, l={self.length}"


SHAPES = (Shape(384, 6, 6, 1536, 16, 64), Shape(512, 6, 8, 1536, 8, 128))


def add_options(parser: ArgumentParser) -> None:
    add_dtype(parser, "fp32")


def cases(options: Namespace) -> Iterator[Case]:
    """One table per shape."""
    quick = Shape(TINY["width"], 2, TINY["heads"], TINY["intermediate"], 2, 8)
    for shape in (quick,) if options.quick else SHAPES:
        torch.manual_seed(options.seed)
        yield _case(options, shape)


def _case(options: Namespace, shape: Shape) -> Case:
    base = llama(width=shape.width, layers=shape.layers, heads=shape.heads, intermediate=shape.intermediate)
    ids = [0] * shape.rows
    site = llama_site(base, shape.rows, shape.length, options.dtype, ids=ids, num_tasks=1, train=True)
    search = PrefixNAS(num_virtual_tokens=4, width=8) if options.quick else PrefixNAS()
    network = PrefixTuning(
        search.num_virtual_tokens, prefix_projection=True, encoder_hidden_size=min(shape.width, search.width)
    )
    variants = [
        *site.floors(),
        _variant(site, "LoRA", None, "peer"),
        _variant(site, BESIDE, network, "peer"),
        *(
            _variant(site, f"PEML, {relaxation}", replace(search, relaxation=relaxation), "peml")
            for relaxation in ("softmax", "gumbel", "sigmoid")
        ),
        _variant(site, "PEML, derived", search, "peml", derived=True),
    ]
    settings = {**shape._asdict(), "P": search.num_virtual_tokens, "h": search.width, "dtype": options.dtype}
    return Case(f"Training step: {shape}", variants, True, site.kwargs["inputs_embeds"].nbytes, settings)


def _variant(site: Site, name: str, prompt: PromptConfig | None, kind: Any, derived: bool = False) -> Variant:
    model = site.attach(peml.LoRA(), prompt=prompt)
    tuner: Any = model.base_model
    if isinstance(prompt, PrefixNAS):
        tuner.prompt.set_progress(0.75)
        if derived:
            tuner.prompt.derive()
    step = site.variant(name, Penalised(model), kind, BESIDE if kind == "peml" else None)
    return replace(step, setting="" if prompt is None else type(prompt).__name__)


class Penalised(nn.Module):
    """A model whose loss has the penalties of its prompt in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        output = self.model(**kwargs)
        output.loss = output.loss + sum(self.model.base_model.penalties().values(), 0.0)
        return output
