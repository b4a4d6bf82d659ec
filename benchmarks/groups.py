"""Sibling projections of one input (queries, keys and values; gate and up), forward and backward."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from benchmarks import naive, peers
from benchmarks.harness import Case
from benchmarks.options import PRESENT, TASKS, mixed_rows
from benchmarks.sites import group_site
from peml import adapters

TOKENS = 2048
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
SHAPES = {
    "qkv-512-fp32": (512, dict.fromkeys(ATTENTION, 512), "fp32"),
    "qkv-512-bf16": (512, dict.fromkeys(ATTENTION, 512), "bf16"),
    "gqa-2048-fp32": (2048, dict(zip(ATTENTION, (2048, 512, 512), strict=True)), "fp32"),
    "gqa-2048-bf16": (2048, dict(zip(ATTENTION, (2048, 512, 512), strict=True)), "bf16"),
    "gate-up-512-fp32": (512, dict.fromkeys(MLP, 1376), "fp32"),
    "gate-up-512-bf16": (512, dict.fromkeys(MLP, 1376), "bf16"),
}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="one or more (all)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"N, rows times length ({TOKENS})")


def cases(options: Namespace) -> Iterator[Case]:
    """One case per shape."""
    for shape in options.shape or SHAPES:
        width, outputs, dtype = SHAPES[shape]
        tokens = options.tokens
        if options.quick:
            width, outputs, tokens = width // 32, {name: out // 32 for name, out in outputs.items()}, 32
        site = group_site(width, outputs, tokens, dtype, ids=mixed_rows(), num_tasks=TASKS)
        lora, mtl_lora = peers.peft_lora(site), peers.naive(site, "MTL-LoRA as published", naive.MTLLoRA)
        variants = [
            *site.floors(),
            lora,
            peers.peft_lora(site, dropout=0.05),
            site.peml("peml LoRA", adapters.LoRA(r=8), lora.name),
            mtl_lora,
            site.peml("peml MTL-LoRA", adapters.MTLLoRA(r=8, num_up=3), mtl_lora.name),
        ]
        widths = ", ".join(f"{name} {width} -> {out}" for name, out in outputs.items())
        settings = {"dtype": dtype, "N": tokens, "T": TASKS, "present": PRESENT}
        yield Case(f"Group {shape}: {widths}", variants, True, site.args[0].nbytes, settings)
