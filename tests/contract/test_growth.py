"""Adding a task to a trained adapter, and folding one out of it."""

import pytest
import torch
from cases import CASES, Case
from peft import LoraConfig, PeftModel, get_peft_model

import peml
from models import TASKS, adapt, probe_loss, tiny, tokens
from peml import PemlError

# Every adapter and every prompt, but not every pair.
grown_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.prompt is None or c.adapter_name in ("none", "MTLLoRA")], ids=lambda case: case.name
)
adapter_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.prompt is None and c.adapter is not None], ids=lambda case: case.name
)


def rows_of_tasks(model: PeftModel) -> dict[str, torch.Tensor]:
    chosen = model.base_model.per_task_parameters()
    return {name: p.detach().clone() for name, p in model.named_parameters() if id(p) in chosen}


@grown_cases
@pytest.mark.parametrize("init", ["identity", "mean", "copy:sst2"])
@torch.no_grad()
def test_a_further_task_touches_no_other(case: Case, init: str, tmp_path) -> None:
    model, batch = case.build(), tokens(4, 5)
    tasks = ["rte", "cola", "sst2", "rte"]
    before, old = model(input_ids=batch, tasks=tasks).logits, rows_of_tasks(model)
    wanted = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.base_model.add_task("new", init)
    assert torch.equal(model(input_ids=batch, tasks=tasks).logits, before)
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if case.groups is None:
        assert list(now) == list(wanted)
        for name, row in rows_of_tasks(model).items():
            assert torch.equal(row[:3], old[name])
            if init == "mean":
                torch.testing.assert_close(row[3], old[name].mean(0))
            if init == "copy:sst2":
                assert torch.equal(row[3], old[name][1])
    else:
        # It has groups of its own, unless all tasks share one.
        assert wanted.keys() < now.keys()
        assert all(torch.equal(now[name][: len(old)], old) for name, old in wanted.items())
    new = model(input_ids=batch, tasks="new").logits
    assert new.isfinite().all()
    if init == "copy:sst2":
        torch.testing.assert_close(new, model(input_ids=batch, tasks="sst2").logits, rtol=1e-10, atol=1e-10)
    assert model.peft_config["default"].task_names == [*TASKS, "new"]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_like(model), tmp_path).double().eval()
    # Weights are loaded in single precision.
    torch.testing.assert_close(again(input_ids=batch, tasks="new").logits, new, rtol=1e-3, atol=1e-3)


def tiny_like(model: PeftModel) -> torch.nn.Module:
    """A fresh copy of the base."""
    base = tiny()
    own = {k.replace("base_model.model.", "", 1).replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    base.load_state_dict({k: v for k, v in own.items() if "peml_" not in k})
    return base


@grown_cases
def test_a_further_task_is_trained_without_moving_the_others(case: Case) -> None:
    model, batch = case.build(), tokens(3, 5)
    with torch.no_grad():
        before = model(input_ids=batch, tasks=["rte", "cola", "sst2"]).logits
    model.base_model.add_task("new")
    if not model.base_model.per_task_parameters():
        with pytest.raises(PemlError, match="none would be left to train"):
            model.base_model.freeze_shared()
        return
    model.base_model.freeze_shared()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0)
    with torch.no_grad():
        start = model(input_ids=batch, tasks="new").logits
    for _ in range(3):
        probe_loss(model(input_ids=batch, tasks="new").logits).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch, tasks=["rte", "cola", "sst2"]).logits, before)
        assert not torch.allclose(model(input_ids=batch, tasks="new").logits, start)


def test_what_cannot_be_added_is_refused_whole() -> None:
    model = adapt(tiny(), peml.MTLLoRA(r=2))
    tuner, state = model.base_model, {k: v.clone() for k, v in model.state_dict().items()}
    for name, init, message in (
        ("rte", "identity", "a task 'rte' already"),
        (" ", "identity", "not empty"),
        (7, "identity", "must be a text"),
        ("new", "copy:mnli", "rte, sst2, cola"),
        ("new", "zero", '"identity", "mean" or "copy:TASK"'),
    ):
        with pytest.raises(PemlError, match=message):
            tuner.add_task(name, init)
    tuner.select_task("rte")
    tuner.merge_adapter()
    with pytest.raises(PemlError, match="unmerge_adapter"):
        tuner.add_task("new")
    tuner.unmerge_adapter()
    assert model.peft_config["default"].task_names == TASKS
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@adapter_cases
@torch.no_grad()
def test_each_task_folds_to_a_plain_lora_that_peft_loads(case: Case) -> None:
    """Outputs of stock PEFT with the folded factors equal ours, at the rank that the method says."""
    model, batch = case.build(), tokens(2, 5)
    tuner = model.base_model
    if not case.adapter.foldable:
        with pytest.raises(PemlError, match="input of each token"):
            tuner.fold()
        with pytest.raises(PemlError, match="input of each token"):
            tuner.merge_adapter()
        return
    rank = case.adapter.folded_rank(len(TASKS))
    if case.needs_task:
        with pytest.raises(PemlError, match="rte, sst2, cola"):
            tuner.fold()
    for task in TASKS:
        pairs = tuner.fold(task)
        wanted = model(input_ids=batch, tasks=task).logits
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        stock = get_peft_model(tiny_like(model), config).double().eval()
        for path, (down, up) in pairs.items():
            layer = stock.base_model.model.get_submodule(path)
            assert down.shape[0] == up.shape[0] == rank
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up.T)
        torch.testing.assert_close(stock(input_ids=batch).logits, wanted, rtol=1e-9, atol=1e-9)
        if not case.needs_task:
            assert all(
                torch.equal(a, b) for a, b in zip(*(sum(f.values(), ()) for f in (pairs, tuner.fold())), strict=True)
            )


@adapter_cases
@torch.no_grad()
def test_a_hundred_switches_leave_the_weights_as_they_were(case: Case) -> None:
    """In half precision, where adding and subtracting would not give them back."""
    if not case.adapter.foldable:
        pytest.skip("cannot be merged, which the test above covers")
    model = case.build(base=tiny().bfloat16())
    before = {n: p.clone() for n, p in model.named_parameters() if "peml_" not in n}
    for i in range(100):
        model.base_model.select_task(TASKS[i % 3])
        model.merge_adapter()
        if i == 50:
            assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
