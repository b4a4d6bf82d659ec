"""Every method of the table at its defaults on one Llama: a training step, a forward, and writing, with mixed tasks.

In training a searched prefix is half-way through its search, with its penalties in the loss; afterwards it is derived
and collapsed to the keys and values that are deployed. Methods that differ from another one only in how they are
trained are left out.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import peers
from benchmarks.harness import Case, Variant
from benchmarks.options import PRESENT, ROWS, TASKS, add_llama_shape, llama_shape, mixed_rows
from benchmarks.searching import Penalised
from benchmarks.sites import VOCABULARY, Site, llama, llama_site
from peml.methods import METHODS, Method
from peml.prompts import Attempt, PrefixNAS

TEXT, NEW = 16, 32
"""Tokens of the text that is written on from, and new ones."""


def add_options(parser: ArgumentParser) -> None:
    add_llama_shape(parser)


def cases(options: Namespace) -> Iterator[Case]:
    """Training, reading, writing."""
    size, length = llama_shape(options)
    settings = {**size, "vocabulary": VOCABULARY, "dtype": options.dtype, "rows": ROWS, "T": TASKS, "present": PRESENT}
    for title, train, tokens in (("training step", True, length), ("forward", False, length), ("writing", False, TEXT)):
        torch.manual_seed(options.seed)
        base = llama(**size)
        site = llama_site(base, ROWS, tokens, options.dtype, ids=mixed_rows(), num_tasks=TASKS, train=train)
        if title == "writing":
            settings |= {"new": 2 if options.quick else NEW}
            site = _writing(site, int(settings["new"]))
        variants = [*site.floors(), peers.peft_lora(site), *(_variant(site, name, row) for name, row in measured())]
        unit = ROWS * tokens * size["width"] * site.dtype.itemsize
        yield Case(f"Llama, {title}", variants, train, unit, {**settings, "length": tokens})


def _writing(site: Site, new: int) -> Site:
    """The same in `generate`, whose first step reads the text."""
    ids = torch.randint(VOCABULARY, (ROWS, TEXT))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def calls(model: Any) -> Callable[..., Any]:
        return partial(
            model.generate, do_sample=False, min_new_tokens=new, max_new_tokens=new, use_cache=True, pad_token_id=0
        )

    return replace(site, kwargs=kwargs, outputs=lambda written: written, calls=calls)


def measured() -> Iterator[tuple[str, Method]]:
    """Methods that cost what no other one does."""
    for name, row in METHODS.items():
        # Sources that ATTEMPT reads are the result of another training, and its prompt is made from the text.
        if row.regime not in ("one_plus_n", "progressive") and not isinstance(row.prompt, Attempt):
            yield name, row


def _variant(site: Site, name: str, row: Method) -> Variant:
    if row.adapter is None:
        site = replace(site, targets=None)
    model = site.attach(row.adapter, prompt=row.prompt)
    if isinstance(row.prompt, PrefixNAS):
        prompt = model.base_model.prompt
        prompt.set_progress(0.75)
        if not site.train:
            prompt.derive()
            model.base_model.collapse_prompt()
    call = Penalised(model) if site.train else model
    found = site.variant(f"peml {name}", call, "peml", "PEFT LoRA" if name == "lora" else None, tasks=site.ids)
    return replace(found, setting=f"{row.adapter!r}, {row.prompt!r}")
