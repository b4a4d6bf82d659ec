"""Several adapters on one model: add, switch, disable, delete, merge, unload, copy."""

import copy
import pickle

import pytest
import torch
from cases import Case, cases, few_cases
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import peml
from models import FAMILIES, TASKS, adapt, shake, tiny, tokens
from peml import PemlError
from peml.bank import BankLinear

SECOND = peml.PemlConfig(
    task_names=["x", "rte"],
    adapter=peml.MTLLoRA(r=2),
    prompt=peml.PrefixTuning(num_virtual_tokens=(2, 1), per_task=True),
)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "peml_" not in name
    }


def with_second(model: PeftModel) -> None:
    """Add another adapter: own tasks, own prefix."""
    model.add_adapter("second", copy.deepcopy(SECOND))
    model.double()
    shake((p for name, p in model.named_parameters() if ".second." in name), 0.3)


@cases
@torch.no_grad()
def test_a_second_adapter(case: Case) -> None:
    base, batch = tiny(), tokens(2, 5)
    plain = base(input_ids=batch).logits
    model = case.build(base=base)
    first = model(input_ids=batch, tasks=["rte", "cola"]).logits
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with_second(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(model(input_ids=batch, tasks=["rte", "cola"]).logits, first)

    model.set_adapter("second")
    assert all(p.requires_grad == (".second." in name) for name, p in model.named_parameters())
    second = model(input_ids=batch, tasks=["rte", "x"]).logits
    alone = adapt(copy.deepcopy(tiny()), SECOND.adapter, SECOND.prompt, SECOND.task_names)
    alone.base_model.model.load_state_dict(
        {k.removeprefix("base_model.model.").replace(".second.", ".default."): v for k, v in model.state_dict().items()
         if ".default." not in k}, strict=False,
    )  # fmt: skip
    if case.adapter is not None:
        torch.testing.assert_close(alone(input_ids=batch, tasks=["rte", "x"]).logits, second, rtol=1e-12, atol=1e-12)
    with pytest.raises(PemlError, match=r"unknown task 'cola'.*x, rte"):
        model(input_ids=batch, tasks=["rte", "cola"])
    with pytest.raises(PemlError, match="one PEML adapter can be active"):
        model.base_model.set_adapter(["default", "second"])
    with model.disable_adapter():
        assert torch.equal(model(input_ids=batch).logits, plain)
        assert torch.equal(model(input_ids=batch, tasks="x").logits, plain)
    assert torch.equal(model(input_ids=batch, tasks=["rte", "x"]).logits, second)

    model.set_adapter("default")
    assert torch.equal(model(input_ids=batch, tasks=["rte", "cola"]).logits, first)
    model.delete_adapter("second")
    assert not [name for name, _ in model.named_parameters() if ".second." in name]
    assert torch.equal(model(input_ids=batch, tasks=["rte", "cola"]).logits, first)


@pytest.mark.parametrize("first", [(peml.MTLLoRA(r=2), peml.PrefixNAS(3, 1, 8, 4, 4)), (peml.LoRA(r=2), None)])
@pytest.mark.parametrize("second", [(SECOND.adapter, SECOND.prompt), (None, SECOND.prompt)])
@torch.no_grad()
def test_deleting_the_active_adapter_activates_the_other(first, second) -> None:
    """Everywhere, also where the layers of the two differ."""
    model, batch = adapt(tiny(), *first), tokens(2, 4)
    model.add_adapter("second", peml.PemlConfig(task_names=["x", "rte"], adapter=second[0], prompt=second[1]))
    model.double()
    model.set_adapter("second")
    expected = model(input_ids=batch, tasks=["x", "rte"]).logits
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapter == "second"
    assert torch.equal(model(input_ids=batch, tasks=["x", "rte"]).logits, expected)


def test_a_loaded_adapter_does_not_freeze_the_one_in_training(tmp_path) -> None:
    adapt(tiny(), peml.LoRA(r=2), peml.PrefixTuning(2)).save_pretrained(tmp_path)
    model = adapt(tiny(), peml.LoRA(r=2), peml.PrefixTuning(3))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(tmp_path, "loaded")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_a_second_adapter_that_does_not_fit_changes_nothing() -> None:
    model, batch = adapt(tiny(), peml.LoRA(r=2), peml.PrefixTuning(2)), tokens(1, 4)
    before, names = model(input_ids=batch).logits, set(model.state_dict())
    config = peml.PemlConfig(task_names=["a"], adapter=peml.LoRA(r=2), prompt=peml.PrefixTuning((1, 2, 3)))
    with pytest.raises(PemlError, match="3 lengths but the model has 2 attention layers"):
        model.add_adapter("second", config)
    assert set(model.state_dict()) == names and torch.equal(model(input_ids=batch).logits, before)


@cases
@torch.no_grad()
def test_disabled_is_the_base_model(case: Case) -> None:
    base, batch = tiny(), tokens(2, 5)
    plain = base(input_ids=batch).logits
    greedy = base.generate(batch, max_new_tokens=3, do_sample=False)
    model = case.build(base=base)
    assert not torch.allclose(model(input_ids=batch, tasks="rte").logits, plain)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=batch).logits, plain)
        assert torch.equal(model.generate(input_ids=batch, max_new_tokens=3, do_sample=False), greedy)
    assert not torch.allclose(model(input_ids=batch, tasks="rte").logits, plain)


def refused(model: PeftModel, batch: torch.Tensor, merge) -> None:
    """What mixes its experts token by token cannot be merged, says so, and goes on as before."""
    before, expected = weights(model), model(input_ids=batch, tasks="rte").logits
    model.base_model.select_task("rte")
    with pytest.raises(PemlError, match="no plain low-rank pair"):
        merge()
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.merged for module in model.modules() if isinstance(module, BankLinear))
    assert torch.equal(model(input_ids=batch, tasks="rte").logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@few_cases
@torch.no_grad()
def test_merging(family: str, case: Case) -> None:
    """Merged equals unmerged; the weights come back bit for bit; the prefix stays."""
    if case.adapter is None:
        pytest.skip("nothing to merge")
    model, batch = case.build(family), tokens(2, 5)
    before = weights(model)
    if not case.adapter.foldable:
        refused(model, batch, model.merge_adapter)
        return
    for task in TASKS:
        expected = model(input_ids=batch, tasks=task).logits
        if case.adapter_needs_task:
            model.base_model.select_task(None)
            with pytest.raises(PemlError, match=r"select_task.*rte, sst2, cola"):
                model.merge_adapter()
        model.base_model.select_task(task)
        assert torch.equal(model(input_ids=batch).logits, expected)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=batch, tasks=task).logits, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(input_ids=batch).logits, expected, rtol=1e-10, atol=1e-10)
        if case.adapter_needs_task:
            other = next(name for name in TASKS if name != task)
            for wrong in (other, [task, other]):
                with pytest.raises(PemlError, match=f"task '{task}' is merged"):
                    model(input_ids=batch, tasks=wrong)
        with pytest.raises(PemlError, match="unmerge_adapter"):
            model.base_model.select_task("rte")
        for _ in range(100):
            model.train()
            model.eval()
        model.unmerge_adapter()
        after = weights(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(model(input_ids=batch, tasks=task).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@few_cases
@torch.no_grad()
def test_merge_and_unload(family: str, dtype: torch.dtype, case: Case) -> None:
    base, batch = tiny(family).to(dtype), tokens(2, 5)
    plain_kinds = [type(module) for module in base.modules()]
    model = case.build(base=base)
    if case.prompt is not None:
        with pytest.raises(PemlError, match="prefix cannot be folded"):
            model.merge_and_unload()
        return
    if not case.adapter.foldable:
        refused(model, batch, model.merge_and_unload)
        return
    expected = model(input_ids=batch, tasks="cola").logits
    if case.needs_task:
        with pytest.raises(PemlError, match="select_task"):
            model.merge_and_unload()
    model.base_model.select_task("cola")
    merged = model.merge_and_unload(safe_merge=True)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(merged(input_ids=batch).logits, expected, rtol=tolerance, atol=tolerance)
    assert [type(module) for module in merged.modules()] == plain_kinds


@torch.no_grad()
def test_a_merge_that_fails_changes_nothing() -> None:
    model, batch = adapt(tiny(), peml.LoRA(r=2)), tokens(1, 4)
    last = [module for module in model.modules() if isinstance(module, BankLinear)][-1]
    last.peml_adapter["default"].up[0, 0] = torch.nan
    before = weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(PemlError, match="NaN"):
            merge(safe_merge=True)
        after = weights(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(module.merged for module in model.modules() if isinstance(module, BankLinear))
        model(input_ids=batch)


def test_half_precision_merges_from_the_pristine_weight() -> None:
    """One merge rounds; merging and unmerging again and again does not add up."""
    layer = BankLinear(nn.Linear(31, 17, bias=False, dtype=torch.bfloat16).requires_grad_(False), "x")
    adapter = peml.LoRA(r=4).build(31, 17, 1)
    shake(adapter.parameters(), 0.05)
    layer.update_layer("default", adapter, ("a",))
    layer.set_adapter("default")
    before = layer.base_layer.weight.clone()
    for _ in range(10):
        layer.merge()
        exact = before.float() + layer.get_delta_weight("default")
        assert torch.equal(layer.base_layer.weight, exact.to(torch.bfloat16))
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@cases
@torch.no_grad()
def test_unloading_leaves_nothing_behind(case: Case) -> None:
    base, batch = tiny(), tokens(2, 5)
    plain, before, kinds = base(input_ids=batch).logits, weights(base), [type(m) for m in base.modules()]
    model = case.build(base=base)
    if case.adapter is not None and case.adapter.foldable:
        model.base_model.select_task("rte")
        model.merge_adapter()
    base = model.unload()
    assert base.config._attn_implementation == "sdpa"
    assert [type(module) for module in base.modules()] == kinds
    assert not base._forward_pre_hooks and not base._forward_hooks
    assert "generate" not in vars(base) and not [m for m in base.modules() if "_peml_slot" in vars(m)]
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    after = weights(base)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(base(input_ids=batch).logits, plain)
    assert case.build(base=base)(input_ids=batch, tasks="rte").logits.shape == plain.shape


def test_stock_lora_after_ours() -> None:
    model = adapt(tiny(), peml.MTLLoRA(r=2))
    model.base_model.select_task("rte")
    again = get_peft_model(model.merge_and_unload(), LoraConfig(r=2, target_modules=["q_proj"]))
    again(input_ids=tokens())


@cases
@torch.no_grad()
def test_a_copy_is_independent(case: Case) -> None:
    """Its hooks, its `generate`, its prefix: nothing of a copy leads back to the original."""
    model, batch = case.build(), tokens(2, 5)
    expected = model(input_ids=batch, tasks=["rte", "cola"]).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=batch, tasks=["rte", "cola"]).logits, expected)
    shake((p for p in model.parameters() if p.requires_grad), 1.0)
    assert not torch.allclose(model(input_ids=batch, tasks=["rte", "cola"]).logits, expected)
    assert torch.equal(twin(input_ids=batch, tasks=["rte", "cola"]).logits, expected)
    call = {"input_ids": batch, "tasks": "rte", "max_new_tokens": 3, "do_sample": False, "output_logits": True}
    found = twin.generate(**call, return_dict_in_generate=True).logits[0]
    torch.testing.assert_close(
        found, twin(input_ids=batch, tasks="rte").logits[:, -1], rtol=1e-6, atol=1e-6, check_dtype=False
    )
    with twin.disable_adapter():
        assert not torch.allclose(model(input_ids=batch, tasks="rte").logits, twin(input_ids=batch).logits)


@few_cases
def test_models_can_be_pickled(case: Case) -> None:
    model, batch = case.build(), tokens(2, 5)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(input_ids=batch, tasks="rte").logits, model(input_ids=batch, tasks="rte").logits)


def test_a_selected_task_belongs_to_its_adapter() -> None:
    """The id of a task of one adapter means nothing to another."""
    model, batch = adapt(tiny(), peml.MTLLoRA(r=2)), tokens(1, 4)
    with_second(model)
    model.base_model.select_task("cola")
    model.set_adapter("second")
    with pytest.raises(PemlError, match="x, rte"):
        model(input_ids=batch)
    with pytest.raises(PemlError, match="select_task"):
        model.merge_adapter()
    model.base_model.select_task("x")
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(model(input_ids=batch).logits, model(input_ids=batch, tasks="cola").logits)
