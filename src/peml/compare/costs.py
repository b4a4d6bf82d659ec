"""What a trained method costs to run, beside the frozen base in the same process, in turns.

A shared machine drifts by more than the differences of interest, so only ratios of the same round count; the base is
timed twice, and how far its ratio to itself is from 1 says how much of the others to believe.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peml.prompts.base import Prefix
from peml.training.folder import RunFolder
from peml.training.run import open_run
from peml.training.workbench import Workbench, load_base

ROWS, LENGTH, TOKENS, ROUNDS = 8, 64, 16, 15
"""Of the batch, its text, what is written, and how often: our choice, small enough for a CPU."""

BASE, AGAIN, ONE, MIXED = "base", "base again", "one task", "mixed batch"


@torch.no_grad()
def measure_costs(run: Path, output: Path, rounds: int = ROUNDS) -> None:
    """Time and memory of a run's model as ratios to its frozen base, written as JSON.

        prefill = t(a forward over the text),    per token = (t(write n) - t(write 1)) / (n - 1)

    Args:
        run: its folder.
        output: the file.
        rounds: of which the medians are taken.

    Raises:
        PemlError: the folder holds no finished run.
    """
    bench, model = open_run(run)
    _, base = load_base(bench.recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    base.to(device).eval()
    length = max(1, min(LENGTH, bench.max_length - TOKENS))
    ids = torch.randint(0, bench.model.config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    names = list(bench.tasks)
    routes: dict[str, tuple[Any, dict[str, Any]]] = {
        BASE: (base, {}),
        AGAIN: (base, {}),
        ONE: (model, {"tasks": [names[0]] * ROWS}),
        MIXED: (model, {"tasks": [names[i % len(names)] for i in range(ROWS)]}),
    }
    found: dict[str, Any] = {"rows": ROWS, "length": length, "tokens": TOKENS, "rounds": rounds}
    # An encoder-decoder reads, and begins to write.
    begins = {"decoder_input_ids": batch["input_ids"][:, :1]} if bench.form == "seq2seq" else {}
    forwards = {n: _forward(m, batch | begins, own) for n, (m, own) in routes.items()}
    found["prefill"] = _ratios(_timed(forwards, rounds))
    if bench.form != "heads":
        whole, first = (
            _timed({n: _writing(m, batch, own, bench, count) for n, (m, own) in routes.items()}, rounds)
            for count in (TOKENS, 1)
        )
        each = {
            name: [max(1e-9, a - b) / (TOKENS - 1) for a, b in zip(whole[name], first[name], strict=True)]
            for name in routes
        }
        found["token"] = _ratios(each)
    if bench.form != "seq2seq":  # it has two caches, one of them of the text that it reads
        found["memory"] = _memory(model, base, routes, length + TOKENS if bench.form == "causal" else 0)
    RunFolder(output.parent).write_json(output, found)


def _forward(model: nn.Module, batch: Mapping[str, Any], own: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: model(**batch, **own)


def _writing(
    model: Any, batch: Mapping[str, Any], own: Mapping[str, Any], bench: Workbench, count: int
) -> Callable[[], object]:
    """Greedy writing of so many tokens, whatever they are."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": 1}
    return lambda: model.generate(**batch, **own, **settings, pad_token_id=bench.pad_token_id)


def _timed(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, in another order each round, after two to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0)
    for number in range(rounds + 2):
        shuffle.shuffle(order)
        for name in order:
            _wait()
            begun = time.perf_counter()
            variants[name]()
            _wait()
            if number >= 2:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ratios(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of each variant over the base."""
    return {
        name: round(statistics.median(a / b for a, b in zip(own, seconds[BASE], strict=True)), 4)
        for name, own in seconds.items()
        if name != BASE
    } | {"seconds": round(statistics.median(seconds[BASE]), 6)}


def _memory(
    model: Any, base: Any, routes: Mapping[str, tuple[Any, Mapping[str, Any]]], tokens: int
) -> dict[str, float]:
    """Weights, cache and prefix over weights and cache, counted in bytes.

    The prefix lies once for every task present; the cache has keys and values of all rows, and an encoder has none.
    """
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = next(base.parameters()).element_size()
    cache = 2 * config.num_hidden_layers * heads * size * ROWS * tokens * item
    whole, floor, prompt = _bytes(model), _bytes(base), model.base_model.prompt
    found: dict[str, float] = {}
    for name in (ONE, MIXED):
        tasks = sorted({model.base_model.config_in_force.task_names.index(task) for task in routes[name][1]["tasks"]})
        prefix = 0
        if isinstance(prompt, Prefix):
            layers = prompt(tasks if prompt.needs_task else None)
            prefix = sum(own.keys.nbytes + own.values.nbytes for own in layers if own is not None)
        found[name] = round((whole + prefix + cache) / (floor + cache), 4)
    return found | {"bytes": floor + cache}


def _bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each counted once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
