"""One linear layer, forward and backward: every method beside what a first implementation of it costs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from benchmarks import naive, peers
from benchmarks.harness import Case, Variant
from benchmarks.options import PRESENT, TASKS, add_layer_shape, layer_shape, mixed_rows
from benchmarks.sites import Site, layer_site
from peml import adapters


def add_options(parser: ArgumentParser) -> None:
    add_layer_shape(parser, width=2048, tokens=2048, dtype="bf16")


def cases(options: Namespace) -> Iterator[Case]:
    """One case per method, so that each has a floor close by."""
    width, tokens = layer_shape(options)
    settings = {"d": width, "N": tokens, "dtype": options.dtype, "T": TASKS, "present": PRESENT, "rows": 8}
    for title, variants in METHODS.items():
        site = layer_site(
            width, width, tokens, options.dtype, ids=mixed_rows(), num_tasks=TASKS, train=True
        )  # fmt: skip
        x = site.args[0]
        yield Case(f"Linear, {title}", [*site.floors(), *variants(site)], True, x.nbytes, settings)


def _lora(site: Site) -> list[Variant]:
    peer = peers.peft_lora(site)
    return [peer, peers.peft_lora(site, dropout=0.05), site.peml("peml LoRA", adapters.LoRA(r=8), peer.name)]


def _mtl_lora(site: Site) -> list[Variant]:
    peer = peers.naive(site, "as published", naive.MTLLoRA)
    gather = peers.naive(site, "T LoRAs, gather + bmm", naive.GatherLoRA)
    return [peer, gather, site.peml("peml MTL-LoRA", adapters.MTLLoRA(r=8, num_up=3), peer.name)]


def _moe_lora(site: Site) -> list[Variant]:
    peer = peers.naive(site, "loop over experts", naive.MoELoRA, r=24, num_experts=3)
    return [peer, site.peml("peml MoELoRA", adapters.MoELoRA(r=24, num_experts=3), peer.name)]


def _multi_lora(site: Site) -> list[Variant]:
    peer = peers.naive(site, "loop over LoRAs", naive.MultiLoRA, r=8, num_parallel=3)
    return [peer, site.peml("peml MultiLoRA", adapters.MultiLoRA(r=8, num_parallel=3), peer.name)]


def _cgc_lora(site: Site) -> list[Variant]:
    peer = peers.naive(site, "loop over experts", naive.CGCLoRA, r=8, num_common=2, num_specific=1)
    return [peer, site.peml("peml CGCLoRA", adapters.CGCLoRA(r=24, num_common=2, num_specific=1), peer.name)]


def _poly(site: Site) -> list[Variant]:
    peer = peers.peft_poly(site)
    return [
        peer,
        peers.naive(site, "average, then bmm", naive.Poly, r=8, num_skills=4),
        site.peml("peml Poly", adapters.Poly(r=8, num_skills=4), peer.name),
    ]


METHODS = {
    "LoRA": _lora,
    "MTL-LoRA": _mtl_lora,
    "MOELoRA": _moe_lora,
    "MultiLoRA": _multi_lora,
    "CGC-LoRA": _cgc_lora,
    "Poly": _poly,
}
