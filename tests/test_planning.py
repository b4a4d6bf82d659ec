"""What is worked out on paper is what a model takes: weights, gradients and optimizer exactly, activations nearly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peml
from peml import PemlError
from peml.planning import Load, Shape, Sizes, communication, memory, plan, show_plan
from peml.training import load_recipe
from workshop import write_recipe

ROOT = Path(__file__).parents[1]
WITHIN = 1.2
"""Activations: by formula over measured, or the other way round."""


def model(vocab: int = 50, layers: int = 3) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def kept(forward, held) -> int:
    """Bytes of the storages that autograd keeps, without those of parameters."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del result
    return sum(size for address, size in sizes.items() if address not in own)


def adapted(base: nn.Module, **parts) -> nn.Module:
    config = peml.PemlConfig(task_names=["rte", "sst2"], task_type="CAUSAL_LM", **parts)
    return get_peft_model(base, config)


@pytest.mark.parametrize(
    ("parts", "prefix"),
    [
        ({"adapter": peml.LoRA(r=2)}, 0),
        ({"adapter": peml.MTLLoRA(r=2), "prompt": peml.PrefixTuning(6)}, 6),
    ],
    ids=["lora", "mtl-lora, prefix"],
)
def test_a_step_takes_what_was_worked_out(parts: dict, prefix: int) -> None:
    base = model()
    frozen = sum(p.numel() for p in base.parameters())
    tuned = adapted(base, **parts)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    sizes = Sizes(frozen, 0, sum(p.numel() for p in trained))
    load = Load(rows=4, tokens=16, prefix=prefix, dtype_bytes=4)
    shape = Shape.of(base.config)
    costs = memory(shape, sizes, load)

    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(0, 50, (4, 16))

    def forward() -> Tensor:
        return tuned(input_ids=ids, tasks=["rte", "sst2", "rte", "rte"]).logits

    measured = kept(lambda: forward().square(), tuned.parameters())
    forward().square().mean().backward()
    optimizer.step()
    states = [v for own in optimizer.state.values() for name, v in own.items() if name != "step"]
    assert costs.weights == sum(p.numel() * p.element_size() for p in tuned.parameters() if not p.requires_grad)
    assert costs.adapter == sum(p.numel() * p.element_size() for p in trained)
    assert costs.gradients == sum(p.grad.numel() * p.grad.element_size() for p in trained)
    assert costs.optimizer == sum(v.numel() * v.element_size() for v in states)
    assert 1 / WITHIN < costs.activations / measured < WITHIN, (costs.activations, measured)

    tuned.enable_input_require_grads()
    tuned.base_model.model.activation_checkpointing_enable()
    tuned.train()
    stored = kept(lambda: forward().square(), tuned.parameters())
    # Before the backward pass there are the layers' inputs and the logits; one layer at a time comes back in it.
    one = (costs.activations - memory(Shape.of(model(layers=2).config), sizes, load).activations) if prefix == 0 else 0
    assert stored < costs.checkpointed < costs.activations
    if one:
        assert 1 / WITHIN < (costs.checkpointed - one) / stored < WITHIN, (costs.checkpointed - one, stored)


def test_the_cache_is_that_of_generation() -> None:
    base = model()
    with torch.no_grad():
        cache = base(input_ids=torch.randint(0, 50, (4, 16)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    costs = [memory(Shape.of(base.config), Sizes(1, 1, 1), Load(4, 16, p, n, 4)).cache for p, n in ((0, 1), (6, 2))]
    assert costs[0] == held
    # A prefix is held once for each task, not for each row.
    assert costs[1] - held == 2 * 3 * 24 * 6 * 2 * 4


def test_devices_share_and_send() -> None:
    shape, sizes = Shape.of(model().config), Sizes(base=8_000_000, layer=1_000_000, trained=80_000)
    alone = memory(shape, sizes, Load(4, 16, devices=8))
    sharded = memory(shape, sizes, Load(4, 16, devices=8), sharded=True)
    assert alone.weights == 16_000_000 and sharded.weights == 2 * (1_000_000 + 1_000_000)
    assert (sharded.adapter, sharded.gradients, sharded.optimizer) == (40_000, 40_000, 80_000)
    assert sharded.activations == alone.activations
    sent = communication(sizes, Load(4, 16, devices=8))
    # A ring sends each of N parts N - 1 times, and twice for an all-reduce.
    assert sent["ddp"] == 2 * 7 * (80_000 // 8) * 4
    assert sent["fsdp2"] == 7 * (2 * (8_000_000 // 8 * 2 + 80_000 // 8 * 4) + 80_000 // 8 * 4)
    assert communication(sizes, Load(4, 16)) == {"ddp": 0, "fsdp2": 0}


def test_a_recipe_is_planned_without_its_weights(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, method="lora+prefix", set={"prompt.num_virtual_tokens": 5})
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "train.jsonl").unlink()
    found = plan(path, gpus=2)
    assert (found.load.rows, found.load.tokens, found.load.prefix, found.load.devices) == (8, 32, 5, 2)
    config = load_recipe(path).config()
    tuned = get_peft_model(LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path / "model")), config)
    assert found.sizes.trained == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert found.sizes.base == sum(p.numel() for p in tuned.parameters() if not p.requires_grad)
    many = plan(write_recipe(tmp_path, method="mtl-lora", set={}), tasks=1000)
    few = plan(tmp_path / "recipe.yaml")
    assert many.sizes.trained > few.sizes.trained and many.sizes.base == few.sizes.base

    console = Console(record=True, width=120)
    show_plan(found, console, gigabytes=1e-6)
    text = console.export_text()
    assert all(word in text for word in ("FSDP2 over 2", "too much", "checkpointed", "sent by each device"))
    with pytest.raises(PemlError, match="no configuration of a model can be read from .*nowhere.*--model-config"):
        plan(path, model_config=tmp_path / "nowhere")


def test_the_numbers_of_the_page_are_those_of_the_formulas() -> None:
    """`docs/scale.md` works out a 70 B base; its table cannot go stale."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    shape = Shape(layers=80, hidden=8192, intermediate=28672, vocab=128256, query=8192, key=1024)
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", page, flags=re.M)
    assert {int(devices) for devices, _ in rows} == {1, 8, 64}
    for devices, cells in rows:
        sizes = Sizes(base=70_553_706_496, layer=855_654_400, trained=207_093_760)
        load = Load(rows=1, tokens=2048, prefix=16, devices=int(devices))
        costs = memory(shape, sizes, load, sharded=int(devices) > 1)
        sent = communication(sizes, load)
        own = [costs.weights, costs.adapter + costs.gradients + costs.optimizer, costs.activations, costs.checkpointed]
        own += [costs.total(False), costs.total(True), sent["ddp"], sent["fsdp2"]]
        assert [cell.strip() for cell in cells.split("|")] == [f"{number / 1e9:.1f}" for number in own]


def test_what_tasks_add_is_what_adapters_count() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    wide = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]
    for name, adapter in (
        ("`mtl-lora` (3 up-projections)", peml.MTLLoRA(r=8)),
        ("`single-task`", peml.SingleTaskLoRA(r=8)),
    ):
        with torch.device("meta"):
            built = [[adapter.build(i, o, tasks) for i, o in wide] for tasks in (1, 2)]
        sizes = [80 * sum(p.numel() for part in own for p in part.parameters()) for own in built]
        own = sizes[1] - sizes[0]
        row = f"| {name} | {own:,} | {own * 16e-6:,.1f} GB | {own * 2e-6:,.1f} GB |"
        assert row in page, row
    prefix = 2 * 80 * 1024 * 16
    assert f"| {prefix:,} | {prefix * 16e-6:.1f} GB | {prefix * 2e-6:.1f} GB |" in page


def test_the_70_billion_are_those_of_the_model(tmp_path: Path) -> None:
    """Llama 3's published shape, counted without memory."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "big")
    write_recipe(tmp_path, method="lora", set={"adapter.r": 16})
    found = plan(tmp_path / "recipe.yaml", model_config=tmp_path / "big")
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert all(f"{number:,}" in page for number in (found.sizes.base, found.sizes.layer, found.sizes.trained)), (
        found.sizes
    )
    assert json.loads((tmp_path / "big" / "config.json").read_text())["num_hidden_layers"] == 80
