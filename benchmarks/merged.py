"""A task folded into the weights of a Llama: it should cost what the base model costs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch

from benchmarks.harness import Case, Variant
from benchmarks.options import ROWS, TASKS, add_llama_shape, llama_shape
from benchmarks.sites import VOCABULARY, Site, llama, llama_site
from peml import adapters

ROUNDS = 31


def add_options(parser: ArgumentParser) -> None:
    add_llama_shape(parser)


def cases(options: Namespace) -> Iterator[Case]:
    """A prompt, then one token per row."""
    size, whole = llama_shape(options)
    for title, length in (("prompt", whole), ("one token per row", 1)):
        torch.manual_seed(options.seed)
        base = llama(**size)
        # One task for the whole batch, the one that is merged.
        site = llama_site(base, ROWS, length, options.dtype, ids=[0] * ROWS, num_tasks=TASKS, train=False)
        settings = {**size, "vocabulary": VOCABULARY, "dtype": options.dtype, "rows": ROWS, "length": length}
        unit = site.kwargs["inputs_embeds"].nbytes
        yield Case(f"Merged Llama, {title}", [*site.floors(), *_variants(site)], False, unit, settings, ROUNDS)


def _variants(site: Site) -> list[Variant]:
    variants = []
    for name, adapter in (("LoRA", adapters.LoRA(r=8)), ("MTL-LoRA", adapters.MTLLoRA(r=8, num_up=3))):
        unloaded, in_place = site.attach(adapter), site.attach(adapter)
        for model in (unloaded, in_place):
            model.base_model.select_task(0)
        in_place.base_model.merge_adapter()
        variants += [
            site.variant(f"peml {name}, merged and unloaded", unloaded.base_model.merge_and_unload(), "peml"),
            site.variant(f"peml {name}, merged in place", in_place, "peml"),
            site.peml(f"peml {name}, not merged", adapter),
        ]
    return variants
