"""What `peml inspect` says of exports is true."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, save_as_lora

import peml
from models import TASKS, adapt, shake, tiny, tokens
from peml.export import foreseen, lint
from peml.export.stock import new_folder
from peml.inspection import inspect_folder


@pytest.mark.parametrize("adapter", [peml.LoRA(r=3), peml.MTLLoRA(r=3)], ids=lambda a: type(a).__name__)
@torch.no_grad()
def test_the_stock_lora_of_a_task_equals_it(adapter: peml.adapters.AdapterConfig, tmp_path: Path) -> None:
    config = peml.PemlConfig(task_names=TASKS, adapter=adapter, task_type="CAUSAL_LM")
    assert not foreseen(config)["lora"].stops
    base = tiny()
    model = get_peft_model(copy.deepcopy(base), config).double().eval()
    shake([p for p in model.parameters() if p.requires_grad], 0.2)
    model.base_model.select_task("sst2")
    batch = tokens(2, 5)
    save_as_lora(str(tmp_path), model, rank=3)
    stock = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    expected = model(input_ids=batch, tasks="sst2").logits
    torch.testing.assert_close(stock(input_ids=batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_stands_in_the_way_is_named() -> None:
    whole = foreseen(peml.PemlConfig(task_names=["a"], adapter=peml.LoRA(), prompt=peml.PrefixNAS()))
    assert whole["merged"].stops and whole["prefix"].stops and not whole["kv"].stops
    alone = peml.PemlConfig(task_names=["a"], prompt=peml.PrefixTuning(4))
    assert foreseen(alone, lengths=(4,))["prefix"] == (False, "one for all tasks")
    assert "another length" in foreseen(alone, lengths=(4, 3))["prefix"].text
    assert foreseen(alone)["lora"] == (
        True,
        "its prompt would be lost, which folds into no weights: use --to prefix, or --to kv",
    )
    searched = peml.PemlConfig(task_names=["a"], prompt=peml.PrefixNAS())
    assert "gates" in foreseen(searched, lengths=(4, 4))["prefix"].text
    assert "search" in foreseen(searched, lengths=(4, 4), searching=True)["kv"].text


NAS: dict[str, Any] = {
    "num_virtual_tokens": 4, "num_cells": 1, "width": 8, "embedding_dim": 4, "head_rank": 4, "budget_tokens": 4.0,
}  # fmt: skip

PLAIN: dict[str, Any] = {"gate_after": "unit", "gate_threshold": 0.0, "gate_init": None}
"""A search that ends with ordinary tokens."""


BOTH, KV, LOW = {"prefix", "kv"}, {"kv"}, {"lora", "merged"}


@pytest.mark.parametrize(
    ("adapter", "prompt", "state", "possible"),
    [
        (None, peml.PrefixTuning(2), None, BOTH),
        (None, peml.PrefixTuning(2, per_task=True), None, BOTH),
        (None, peml.PrefixTuning(2, prefix_projection=True, encoder_hidden_size=3), None, BOTH),
        (None, peml.PrefixTuning((2, 1)), None, KV),
        (None, peml.PrefixTuning(2, gated=True), None, BOTH),
        (None, peml.PrefixNAS(**NAS, **PLAIN), None, set()),
        (None, peml.PrefixNAS(**NAS, **PLAIN), "derived", BOTH),
        (None, peml.PrefixNAS(**NAS, **PLAIN), "collapsed", BOTH),
        (None, peml.PrefixNAS(**NAS, **PLAIN | {"gate_init": 2.0}), "derived", KV),
        (None, peml.PrefixNAS(**NAS, **PLAIN | {"gate_init": 2.0}), "collapsed", KV),
        (None, peml.PrefixNAS(**NAS, gate_threshold=0.0), "derived", KV),
        (None, peml.PrefixNAS(**NAS, gate_threshold=0.0), "collapsed", KV),
        (None, peml.PromptTuning(2), None, BOTH),
        (None, peml.PromptTuning(2, per_task=True), None, BOTH),
        (None, peml.MultitaskPrompt(2), None, BOTH),
        (None, peml.MultitaskPrompt(2, deep=True), None, BOTH),
        (None, peml.Attempt(2), None, set()),
        (peml.LoRA(r=2), peml.PrefixTuning(2), None, BOTH),
        (peml.LoRA(r=2), peml.PrefixTuning((2, 1)), None, KV),
        (peml.LoRA(r=2), None, None, LOW),
        (peml.MTLLoRA(r=2), None, None, LOW),
        (peml.HydraLoRA(r=2), None, None, set()),
    ],
)
def test_what_is_said_of_an_adapter_is_what_its_export_says(
    adapter: Any, prompt: Any, state: str | None, possible: set[str], tmp_path: Path
) -> None:
    """On a rotary model: `inspect` reads files alone and knows of no base."""
    model = adapt(tiny(), adapter, prompt)
    if state is not None:
        model.base_model.prompt.derive()
    if state == "collapsed":
        model.base_model.collapse_prompt()
    model.save_pretrained(tmp_path / "adapter")
    said = inspect_folder(tmp_path / "adapter").exports
    assert {form for form, finding in said.items() if not finding.stops} == possible
    for form, finding in said.items():
        assert finding.stops == any(each.stops for each in lint(model.base_model, form)), (form, finding)


def test_what_a_killed_export_leaves_goes_with_the_next(tmp_path: Path) -> None:
    """But not what another process is writing, or has never been an export's."""
    folder, other = tmp_path / "lora[1]", tmp_path / ".lora[1].7"
    other.mkdir()
    with pytest.raises(KeyError), new_folder(folder) as temporary:
        # What would be there if the process had no time to clean up.
        left = temporary.with_name(f"{temporary.name}1")
        shutil.copytree(temporary, left)
        (left / "half").write_text("")
        raise KeyError
    assert left.exists() and not temporary.exists()
    with new_folder(folder) as temporary:
        assert not left.exists()
        at_work = temporary.with_name(f"{temporary.name}2")
        os.replace(temporary, at_work)  # as if it were another process's
        with new_folder(folder) as second:
            assert second != at_work and at_work.exists()
        shutil.rmtree(folder)
        os.replace(at_work, temporary)
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, folder.name]
