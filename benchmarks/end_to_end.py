"""A whole Llama with an adapter on all of its linears but the head: a training step, and a forward without gradients.

The embeddings of the text are fed in and require a gradient, so that the floor's backward reaches the first layer as
every adapter's does. The vocabulary is small, or the head, which no adapter touches, would hide the differences.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch

from benchmarks import naive, peers
from benchmarks.harness import Case
from benchmarks.options import PRESENT, ROWS, TASKS, add_llama_shape, llama_shape, mixed_rows
from benchmarks.sites import VOCABULARY, llama, llama_site
from peml import adapters


def add_options(parser: ArgumentParser) -> None:
    add_llama_shape(parser)


def cases(options: Namespace) -> Iterator[Case]:
    """Training, then inference."""
    size, length = llama_shape(options)
    for train in (True, False):
        torch.manual_seed(options.seed)
        base = llama(**size)
        site = llama_site(base, ROWS, length, options.dtype, ids=mixed_rows(), num_tasks=TASKS, train=train)
        lora, mtl_lora = peers.peft_lora(site), peers.naive(site, "MTL-LoRA as published", naive.MTLLoRA)
        # Without gradients the models are in evaluation mode, where dropout does nothing.
        dropped = [peers.peft_lora(site, dropout=0.05)] if train else []
        options_of_training = (
            [
                site.peml("peml LoRA, dropout 0.05", adapters.LoRA(r=8, lora_dropout=0.05), dropped[0].name),
                site.peml("peml LoRA, fuse_mlp", adapters.LoRA(r=8), lora.name, fuse_mlp=True),
            ]
            if train
            else []
        )
        variants = [
            *site.floors(),
            lora,
            *dropped,
            peers.peft_poly(site),
            mtl_lora,
            site.peml("peml LoRA", adapters.LoRA(r=8), lora.name),
            *options_of_training,
            site.peml("peml MTL-LoRA", adapters.MTLLoRA(r=8, num_up=3), mtl_lora.name),
            site.peml("peml Poly", adapters.Poly(r=8, num_skills=4), "PEFT Poly"),
        ]
        settings = {**size, "vocabulary": VOCABULARY, "dtype": options.dtype, "rows": ROWS, "length": length}
        settings |= {"T": TASKS, "present": PRESENT}
        title = "training step" if train else "inference"
        yield Case(f"Llama {title}", variants, train, site.kwargs["inputs_embeds"].nbytes, settings)
