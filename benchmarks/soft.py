"""Soft tokens before the text, in training: run once per step and task, or with every row, as PEFT does."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace

import torch
from peft import MultitaskPromptTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

import peml
from benchmarks.harness import Case
from benchmarks.options import add_dtype
from benchmarks.prefix_sites import Shape, base_of, settings_of, with_ours
from benchmarks.sites import Site, llama_site

TASKS = 4
SHAPES = (Shape(8, 8, 64, 20), Shape(8, 8, 64, 100), Shape(8, 8, 256, 100))


def add_options(parser: ArgumentParser) -> None:
    add_dtype(parser, "fp32")


def cases(options: Namespace) -> Iterator[Case]:
    """A training step of a Llama, on padded texts of four tasks."""
    for shape in [Shape(4, 2, 8, 3)] if options.quick else SHAPES:
        torch.manual_seed(options.seed)
        ids = [row % TASKS for row in range(shape.rows)]
        site = llama_site(
            base_of(options, shape), shape.rows, shape.length, options.dtype, ids=ids, num_tasks=TASKS, train=True
        )
        lengths = torch.linspace(shape.length // 2, shape.length, shape.rows).long()
        mask = (torch.arange(shape.length) < lengths[:, None]).long()
        # The loss is the model's own: PEFT's logits are as long as prompt and text.
        site = replace(site, kwargs={**site.kwargs, "attention_mask": mask})
        names = [f"task{i}" for i in ids]
        shared, multitask = "PEFT prompt tuning", "PEFT multitask prompt tuning"
        variants = [
            *site.floors(),
            site.variant(shared, _stock(site, shape, PromptTuningConfig), "peer"),
            site.variant(
                multitask,
                _stock(site, shape, MultitaskPromptTuningConfig, num_tasks=TASKS),
                "peer",
                task_ids=torch.tensor(ids),
            ),
            site.variant("peml PromptTuning", with_ours(site.copy(), peml.PromptTuning(shape.prefix)), "peml", shared),
            site.variant(
                "peml MultitaskPrompt", with_ours(site.copy(), peml.MultitaskPrompt(shape.prefix), TASKS), "peml",
                multitask, tasks=names,
            ),
        ]  # fmt: skip
        unit = site.kwargs["inputs_embeds"].nbytes
        settings = {**settings_of(options, shape), "T": TASKS}
        yield Case(f"Training step of a Llama, soft tokens: {shape}", variants, True, unit, settings)


def _stock(site: Site, shape: Shape, kind: type, **settings: object) -> nn.Module:
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=shape.prefix, **settings)
    return get_peft_model(site.copy(), config, autocast_adapter_dtype=False)
