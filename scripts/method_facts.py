"""What a page of a method says of its defaults and its size, from the classes of the package."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from peml.adapters import AdapterConfig
from peml.groups import level_at, read_groups
from peml.methods import METHODS
from peml.prompts import Attempt, PrefixNAS, PromptConfig
from peml.prompts.base import AttentionSlot, ModelShape
from peml.prompts.cost import BYTES

LAYERS, WIDTH, LINEARS, HEADS = 32, 4096, 4, 32
"""Of the worked example: q, k, v and o of a model in the shape of LLaMA-2-7B."""
TASKS, CLUSTERS = 8, 4
SHAPE = ModelShape((AttentionSlot(HEADS, WIDTH // HEADS),) * LAYERS, WIDTH)
KV_WIDTH = sum(slot.width for slot in SHAPE.slots)
EXAMPLE = f"{LAYERS} layers of width {WIDTH:,}, their q, k, v and o projections, T = {TASKS}"


def page_of(name: str) -> str:
    """The page of a method, without its ending; two names of one idea have one."""
    return {"mhr": "poly"}.get(name, name.replace("+", "-"))


def home_of(part: AdapterConfig | PromptConfig) -> str:
    """The page with the reference of a class: that of the first method that has it."""
    rows = METHODS.items()
    return page_of(next(name for name, row in rows if type(part) in (type(row.adapter), type(row.prompt))))


def facts(names: Sequence[str]) -> str:
    """Tables of what methods are by default, and of how many numbers that is."""
    parts = []
    for name in names:
        parts += [f"| `method: {name}` | |", "|---|---|", *(f"| {key} | {text} |" for key, text in rows(name)), ""]
    return "\n".join([*parts, f"Counted for {EXAMPLE}; the letters are those of the reference.", ""])


def rows(name: str) -> Iterator[tuple[str, str]]:
    """What is said of a method, line by line."""
    row = METHODS[name]
    for axis, part in (("adapter", row.adapter), ("prompt", row.prompt)):
        if part is not None:
            yield f"{axis}, defaults", defaults(part)
    yield "regime", f"`{row.regime}`"
    if row.adapter is not None:
        yield from adapter_rows(row.adapter, row.regime)
    if row.prompt is not None:
        yield from prompt_rows(row.prompt)


def defaults(part: AdapterConfig | PromptConfig) -> str:
    """The class, what can be set of it, and its learning rates."""
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    # A search has some thirty settings; those that others build on are enough here.
    kept = SHOWN if isinstance(part, PrefixNAS) else [k for k in values if not k.endswith(("_text", "name_or_path"))]
    home = f"[{type(part).__name__}]({home_of(part)}.md#peml.{type(part).__name__})"
    rates = f"{part.learning_rate:g}" if isinstance(part, AdapterConfig) else prompt_rates(part)
    return f"{home}: " + ", ".join(f"`{key}` {plain(values[key])}" for key in kept) + f"; learning rate {rates}"


SHOWN = ("num_virtual_tokens", "num_cells", "width", "embedding_dim", "head_rank", "temperature", "warmup_fraction")


def plain(value: Any) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def prompt_rates(prompt: PromptConfig) -> str:
    """Of the prompt, of what single tasks have of it, and of a search."""
    rates = f"{prompt.prompt_learning_rate:g}"
    if prompt.task_rate_factor != 1:
        rates += f", of the tasks' factors {prompt.prompt_learning_rate * prompt.task_rate_factor:.3g}"
    return rates + (f", of the search {prompt.architecture_learning_rate:g}" if isinstance(prompt, PrefixNAS) else "")


def adapter_rows(adapter: AdapterConfig, regime: str) -> Iterator[tuple[str, str]]:
    """Sizes of an adapter, alone or one for each group of tasks."""
    names = [str(task) for task in range(TASKS)]
    size = TASKS // CLUSTERS
    clusters = [names[i : i + size] for i in range(0, TASKS, size)]
    thirds = [{"until": 1 / 3, "groups": "all"}, {"until": 2 / 3, "groups": clusters}, {"until": 1.0, "groups": "each"}]
    grouped = {"one_plus_n": clusters, "progressive": thirds}.get(regime)
    levels = read_groups(grouped or [names], names)
    total = active = 0
    for layer in range(LAYERS):
        groups = [len(own) for own in level_at(levels, (layer + 0.5) / LAYERS).partition(names)]
        total += LINEARS * sum(adapter.num_parameters(WIDTH, WIDTH, count) for count in groups)
        with torch.device("meta"):
            active += LINEARS * adapter.build(WIDTH, WIDTH, groups[0]).num_active(0, groups[0])
    one = adapter.num_parameters(WIDTH, WIDTH, TASKS)
    if grouped:
        yield "trained on one linear, by a group of T tasks", formula(adapter)
        yield "trained in the model", f"{total:,}, with {CLUSTERS} clusters of {size} tasks"
    else:
        yield "trained on one linear", f"{one:,}: {formula(adapter)}"
        yield "trained in the model", f"{total:,}"
    if active < total:
        yield "of these, at work for one task", f"{active:,}"
    if not grouped and (more := adapter.num_parameters(WIDTH, WIDTH, TASKS + 1) - one):
        yield "one task more", f"{more:,} on one linear, {more * LINEARS * LAYERS:,} in the model"
    if adapter.foldable:
        whose = "for each task" if adapter.needs_task or grouped else "for all tasks"
        yield "deployed", f"a plain LoRA of rank {adapter.folded_rank(TASKS)} {whose}, or merged weights"
    else:
        yield "deployed", "as it was trained: no plain LoRA equals it"


def prompt_rows(prompt: PromptConfig) -> Iterator[tuple[str, str]]:
    """Sizes of a prompt."""
    count = prompt.num_parameters(SHAPE, TASKS)
    yield "trained in the prompt", f"{count:,}: {formula(prompt)}"
    if more := prompt.num_parameters(SHAPE, TASKS + 1) - count:
        yield "one task more", f"{more:,} in the prompt"
    if isinstance(prompt, Attempt):
        frozen = prompt.num_sources * prompt.num_virtual_tokens * WIDTH
        yield "frozen beside them", f"{frozen:,}, {prompt.num_sources} source prompts"
        yield "deployed prompt", "as it was trained: every text makes its own"
        return
    tokens = vars(prompt)["num_virtual_tokens"]
    budget = prompt.budget(SHAPE) / KV_WIDTH if isinstance(prompt, PrefixNAS) else tokens
    numbers = int(budget * KV_WIDTH)
    kept = "the tokens at the input; a causal model makes of them, once," if prompt.at_input else ""
    whose = "for each task" if prompt.needs_task else "for all tasks together"
    yield (
        "deployed prompt",
        f"{kept} keys and values of {budget:g} tokens in every layer, {numbers:,} numbers, "
        f"{numbers * BYTES / 1e6:.1f} MB in bf16, {whose}".strip(),
    )


def formula(part: AdapterConfig | PromptConfig) -> str:
    """How many numbers it trains, as its class says."""
    return (inspect.getdoc(type(part).num_parameters) or "").rstrip(".").replace("|", "\\|")
