"""Fused SwiGLU blocks against the same model without: results, memory, and when they step aside."""

import copy

import pytest
import torch
from peft import get_peft_model

import peml
from models import TASKS, adapt, assert_same, gradients, probe_loss, tiny, tokens
from peml.mlp import FusedMLP

ADAPTERS = [
    peml.LoRA(r=3), peml.LoRA(r=3, lora_dropout=0.3), peml.MTLLoRA(r=2), peml.adapters.CGCLoRA(r=4), peml.adapters.Poly(r=2),
]  # fmt: skip


def both(adapter, **settings):
    """The same model, without and with fused blocks."""
    plain = adapt(tiny(), adapter, fuse_mlp=False, **settings)
    fused = copy.deepcopy(plain)
    assert peml.mlp.fuse_mlps(fused) == 2
    return plain, fused


def fused_blocks(model) -> list[FusedMLP]:
    found = [m.__dict__.get("forward") for m in model.modules() if hasattr(m, "gate_proj")]
    return [f for f in found if isinstance(f, FusedMLP)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    original = peml.mlp.swiglu
    monkeypatch.setattr(peml.mlp, "swiglu", lambda *args: made.append(1) or original(*args))
    return made


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_changes(adapter, checkpointed: bool, calls: list[int]) -> None:
    """Dropout draws the same masks in the same order."""
    results = []
    for model in both(adapter):
        model.train()
        if checkpointed:
            model.base_model.model.activation_checkpointing_enable()
        torch.manual_seed(1)
        logits = model(input_ids=tokens(), tasks=TASKS).logits
        probe_loss(logits).backward()
        results.append((logits, gradients(model)))
    assert len(calls) == (4 if checkpointed else 2)
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1], atol=1e-12)


def test_a_row_of_its_own_task_and_a_token_of_its_own() -> None:
    plain, fused = both(peml.MTLLoRA(r=2))
    for tasks in (["rte", "cola", "rte"], [["rte"] * 2 + ["cola"] * 3] * 3, "sst2"):
        batch = tokens(3, 5)
        left, right = (model(input_ids=batch, tasks=tasks).logits for model in (plain, fused))
        assert torch.equal(left, right)


def test_it_keeps_less_than_the_frozen_block() -> None:
    """x, gate and up; the frozen block keeps gate, its activation, up; with adapters unfused, x and the product too."""
    base = tiny().model.layers[0].mlp
    base.requires_grad_(False)
    width, inner, rows = 24, 20, 50
    weights = {p.untyped_storage().data_ptr() for p in base.parameters()}
    kept = {}
    for name in ("frozen", "adapted", "fused"):
        block = copy.deepcopy(base)
        if name != "frozen":
            block = get_peft_model(
                block, peml.PemlConfig(task_names=["a"], adapter=peml.LoRA(r=1), target_modules="all-linear")
            )
            block.double()
        if name == "fused":
            peml.mlp.fuse_mlps(block)
        x = torch.randn(2, rows // 2, width, dtype=torch.float64, requires_grad=True)
        own = {p.untyped_storage().data_ptr() for p in block.parameters()} | weights
        storages: dict[int, int] = {}

        def note(t: torch.Tensor, own=own, storages=storages) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in own and t.numel() > 100:
                storages[t.untyped_storage().data_ptr()] = t.numel() // rows
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            block(x)
        kept[name] = sum(storages.values())
    assert kept["frozen"] == 3 * inner
    assert kept["fused"] == width + 2 * inner
    assert kept["adapted"] == width + 4 * inner


def test_it_steps_aside(calls: list[int]) -> None:
    """No gradients, hooks, a disabled adapter, a merged task, losses on features, routing by input."""
    _, model = both(peml.LoRA(r=2))
    batch = tokens()
    with torch.no_grad():
        before = model(input_ids=batch).logits
    assert not calls
    model(input_ids=batch)
    assert len(calls) == 2
    with model.disable_adapter():
        model(input_ids=batch)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda *a: None)
    model(input_ids=batch)
    assert len(calls) == 3
    handle.remove()
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=batch).logits, before)
    assert len(calls) == 3
    for adapter in (peml.adapters.HydraLoRA(r=2), peml.LoRA(r=2, align="kl")):
        _, model = both(adapter)
        model.train()(input_ids=batch, tasks=TASKS)
    assert len(calls) == 3


def test_attached_saved_loaded_copied_and_taken_off(tmp_path) -> None:
    base, batch = tiny(), tokens()
    plain = base(input_ids=batch).logits
    model = adapt(base, peml.MTLLoRA(r=2), fuse_mlp=True)
    assert len(fused_blocks(model)) == 2
    twin = copy.deepcopy(model)
    assert all(block.mlp is not other.mlp for block, other in zip(fused_blocks(model), fused_blocks(twin), strict=True))
    model.save_pretrained(tmp_path)
    again = peml.PemlConfig.from_pretrained(tmp_path)
    assert again.fuse_mlp is True
    left = model.unload()
    assert not fused_blocks(left) and torch.equal(left(input_ids=batch).logits, plain)


def test_where_there_is_nothing_to_fuse_it_says_so() -> None:
    with pytest.warns(UserWarning, match="fuse_mlp has no effect"):
        adapt(tiny("gpt2"), peml.LoRA(r=2), fuse_mlp=True)
    with pytest.warns(UserWarning, match="fuse_mlp has no effect"):
        adapt(tiny(), peml.LoRA(r=2), fuse_mlp=True, target_modules=["q_proj"])
    with pytest.raises(peml.PemlError, match="fuse_mlp must be true or false"):
        peml.PemlConfig(task_names=["a"], adapter=peml.LoRA(), fuse_mlp="yes")
    gelu = tiny()
    for layer in gelu.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    with pytest.warns(UserWarning, match="fuse_mlp has no effect"):
        adapt(gelu, peml.LoRA(r=2), fuse_mlp=True)
