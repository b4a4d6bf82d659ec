"""What `peml inspect` says of exports is true."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, save_as_lora

import peml
from models import TASKS, adapt, shake, tiny, tokens
from peml import PemlError
from peml.export import export_targets, to_peft_prompt
from peml.inspection import inspect_folder


@pytest.mark.parametrize("adapter", [peml.LoRA(r=3), peml.MTLLoRA(r=3)], ids=lambda a: type(a).__name__)
@torch.no_grad()
def test_the_stock_lora_of_a_task_equals_it(adapter: peml.adapters.AdapterConfig, tmp_path: Path) -> None:
    config = peml.PemlConfig(task_names=TASKS, adapter=adapter, task_type="CAUSAL_LM")
    assert next(t for t in export_targets(config) if t.name == "stock LoRA adapter").possible
    base = tiny()
    model = get_peft_model(copy.deepcopy(base), config).double().eval()
    shake([p for p in model.parameters() if p.requires_grad], 0.2)
    model.base_model.select_task("sst2")
    batch = tokens(2, 5)
    save_as_lora(str(tmp_path), model, rank=3)
    stock = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    expected = model(input_ids=batch, tasks="sst2").logits
    torch.testing.assert_close(stock(input_ids=batch).logits, expected, rtol=1e-4, atol=1e-4)


def reasons(config: peml.PemlConfig, **known: object) -> dict[str, tuple[bool, str]]:
    return {t.name: (t.possible, t.remark) for t in export_targets(config, **known)}  # type: ignore[arg-type]


PREFIX, TOKENS = "stock prefix (PREFIX_TUNING, CARTRIDGE)", "stock tokens (PROMPT_TUNING)"


def test_what_stands_in_the_way_is_named() -> None:
    whole = reasons(peml.PemlConfig(task_names=["a"], adapter=peml.LoRA(), prompt=peml.PrefixNAS()))
    assert not whole["merged checkpoint"][0] and not whole[PREFIX][0]
    alone = peml.PemlConfig(task_names=["a"], prompt=peml.PrefixTuning(4))
    assert reasons(alone, lengths=(4,))[PREFIX][0]
    assert "another length" in reasons(alone, lengths=(4, 3))[PREFIX][1]
    assert reasons(alone)["stock LoRA adapter"] == (False, "there is no low-rank part")
    searched = peml.PemlConfig(task_names=["a"], prompt=peml.PrefixNAS())
    assert "gates" in reasons(searched, lengths=(4, 4))[PREFIX][1]


NAS: dict[str, Any] = {
    "num_virtual_tokens": 4, "num_cells": 1, "width": 8, "embedding_dim": 4, "head_rank": 4, "budget_tokens": 4.0,
}  # fmt: skip

PLAIN: dict[str, Any] = {"gate_after": "unit", "gate_threshold": 0.0, "gate_init": None}
"""A search that ends with ordinary tokens."""


@pytest.mark.parametrize(
    ("adapter", "prompt", "state", "prefix", "at_input"),
    [
        (None, peml.PrefixTuning(2), None, True, False),
        (None, peml.PrefixTuning(2, per_task=True), None, True, False),
        (None, peml.PrefixTuning(2, prefix_projection=True, encoder_hidden_size=3), None, True, False),
        (None, peml.PrefixTuning((2, 1)), None, False, False),
        (None, peml.PrefixTuning(2, gated=True), None, True, False),
        (None, peml.PrefixNAS(**NAS, **PLAIN), None, False, False),
        (None, peml.PrefixNAS(**NAS, **PLAIN), "derived", True, False),
        (None, peml.PrefixNAS(**NAS, **PLAIN), "collapsed", True, False),
        (None, peml.PrefixNAS(**NAS, **PLAIN | {"gate_init": 2.0}), "derived", False, False),
        (None, peml.PrefixNAS(**NAS, **PLAIN | {"gate_init": 2.0}), "collapsed", False, False),
        (None, peml.PrefixNAS(**NAS, gate_threshold=0.0), "derived", False, False),
        (None, peml.PrefixNAS(**NAS, gate_threshold=0.0), "collapsed", False, False),
        (None, peml.PromptTuning(2), None, True, True),
        (None, peml.PromptTuning(2, per_task=True), None, True, True),
        (None, peml.MultitaskPrompt(2), None, True, True),
        (None, peml.MultitaskPrompt(2, deep=True), None, True, False),
        (None, peml.Attempt(2), None, False, False),
        (peml.LoRA(r=2), peml.PrefixTuning(2), None, False, False),
        (peml.LoRA(r=2), peml.PromptTuning(2), None, False, False),
        (peml.LoRA(r=2), None, None, False, False),
    ],
)
def test_what_is_said_of_prompts_is_what_happens(
    adapter: Any, prompt: Any, state: str | None, prefix: bool, at_input: bool, tmp_path: Path
) -> None:
    """On a rotary model: `inspect` reads files alone and knows of no base."""
    model = adapt(tiny(), adapter, prompt)
    if state is not None:
        model.base_model.prompt.derive()
    if state == "collapsed":
        model.base_model.collapse_prompt()
    model.save_pretrained(tmp_path / "adapter")
    said = {target.name: target.possible for target in inspect_folder(tmp_path / "adapter").targets}
    task = "rte" if prompt is not None and prompt.needs_task else None
    for name, kind, expected in ((PREFIX, "prefix_tuning", prefix), (TOKENS, "prompt_tuning", at_input)):
        assert said[name] == expected
        if expected:
            to_peft_prompt(model, tmp_path / kind, task, kind=kind)
        else:
            with pytest.raises(PemlError):
                to_peft_prompt(model, tmp_path / kind, task, kind=kind)
