"""What `peml inspect` says of exports is true."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, save_as_lora

import peml
from models import TASKS, shake, tiny, tokens
from peml.export import export_targets


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


def test_what_stands_in_the_way_is_named() -> None:
    whole = reasons(peml.PemlConfig(task_names=["a"], adapter=peml.LoRA(), prompt=peml.PrefixNAS()))
    assert not whole["merged checkpoint"][0] and not whole["stock prefix (PREFIX_TUNING)"][0]
    alone = peml.PemlConfig(task_names=["a"], prompt=peml.PrefixTuning(4))
    assert reasons(alone, lengths=(4,))["stock prefix (PREFIX_TUNING)"][0]
    assert "another length" in reasons(alone, lengths=(4, 3))["stock prefix (PREFIX_TUNING)"][1]
    assert reasons(alone)["stock LoRA adapter"] == (False, "there is no low-rank part")
    searched = peml.PemlConfig(task_names=["a"], prompt=peml.PrefixNAS())
    assert "gates" in reasons(searched, lengths=(4, 4))["stock prefix (PREFIX_TUNING)"][1]
