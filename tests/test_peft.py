"""The inside of PEFT and transformers that we stand on: each test says what moved, before users find out."""

import inspect

import peft
import pytest
import torch
import transformers
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peml
from models import adapt, llama, tiny, tokens
from peml import PemlConfig, PemlModel
from peml import _peft as registration


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_type_is_a_member_of_the_enum() -> None:
    member = PeftType("PEML")
    assert member is PeftType.PEML and PeftType["PEML"] is member and member in list(PeftType)
    assert member == "PEML" and member.value == "PEML" and isinstance(member, str)
    registration.register()
    assert [kind.name for kind in PeftType].count("PEML") == 1, "registering twice must change nothing"


def test_the_type_is_in_the_mappings() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PEML] is PemlConfig, "register_peft_method: configs have moved"
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PEML] is PemlModel, "register_peft_method: tuners have moved"
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.PEML] == "peml_", "transformers derives this prefix from the type"
    config = PemlConfig(task_names=["a"], adapter=peml.LoRA())
    assert config.peft_type is PeftType.PEML
    assert not config.is_prompt_learning, "PEFT's prompt-learning branches must stay closed to us"
    assert not config.is_adaption_prompt


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (BaseTuner, "_remove_adapter_name_from_key"),
        (BaseTuner, "_remap_adapter_state_dict_for_load"),
        (BaseTuner, "_create_and_replace"),
        (BaseTuner, "_prepare_adapter_config"),
        (BaseTuner, "_replace_module"),
        (BaseTuner, "_unload_and_optionally_merge"),
        (BaseTunerLayer, "_move_adapter_to_device_of_base_layer"),
        (BaseTunerLayer, "set_adapter"),
        (BaseTunerLayer, "delete_adapter"),
        (BaseTunerLayer, "active_adapters"),
        (BaseTunerLayer, "merged"),
    ],
)
def test_what_we_override_or_call_exists(owner: type, name: str) -> None:
    assert hasattr(owner, name), f"PEFT {peft.__version__} has no {owner.__name__}.{name} any more"


def test_signatures() -> None:
    expected = ["self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"]
    assert parameters(BaseTuner.inject_adapter) == expected, "PemlModel.inject_adapter must follow"
    assert parameters(PemlModel.inject_adapter) == expected
    assert parameters(BaseTuner.merge_and_unload) == parameters(PemlModel.merge_and_unload)
    assert parameters(BaseTuner.unload) == parameters(PemlModel.unload)
    assert parameters(BaseTuner.set_adapter) == parameters(PemlModel.set_adapter)
    assert parameters(BaseTuner.delete_adapter) == parameters(PemlModel.delete_adapter)
    assert parameters(BaseTuner._remove_adapter_name_from_key) == ["key", "adapter_name"]
    remap = parameters(BaseTuner._remap_adapter_state_dict_for_load)
    assert remap == ["model", "config", "adapter_name", "state_dict"], "PemlModel checks files in this hook"
    merge = parameters(BaseTuner.merge_adapter)
    assert merge == ["self", "adapter_names", "safe_merge"], "merge_and_unload names these"
    assert parameters(check_adapters_to_merge)[:2] == ["module", "adapter_names"]
    assert isinstance(DUMMY_TARGET_MODULES, str), "how a prompt without an adapter matches no module"


def test_the_hooks_are_still_called(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that PEFT no longer calls would save wrong keys, or load a file unchecked, in silence."""
    called = []
    for name in ("_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"):
        original = getattr(PemlModel, name)

        def spy(cls, *args, _original=original, _name=name, **kwargs):
            called.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(PemlModel, name, classmethod(spy))
    adapt(tiny(), peml.LoRA(r=2), peml.PrefixTuning(2)).save_pretrained(tmp_path)
    assert "_remove_adapter_name_from_key" in called, "PEFT saves by another way"
    peft.PeftModel.from_pretrained(tiny(), tmp_path)
    assert "_remap_adapter_state_dict_for_load" in called, "PEFT loads by another way"


def test_adapter_names_leave_the_right_part_of_a_key() -> None:
    remove = PemlModel._remove_adapter_name_from_key
    assert remove("a.q_proj.peml_adapter.up.up", "up") == "a.q_proj.peml_adapter.up"
    assert remove("prompt_host.peml_prompt.keys.keys.0", "keys") == "prompt_host.peml_prompt.keys.0"
    assert remove("a.other.weight", "other") == "a.other.weight"


@pytest.mark.parametrize("name", ["up", "seed", "0", "cells"])
@torch.no_grad()
def test_awkward_adapter_names_survive(name: str, tmp_path) -> None:
    """Names that parameters below the adapter have too."""
    base = tiny().float()
    model, batch = adapt(base, peml.MTLLoRA(r=2), peml.PrefixNAS(3, 1, 8, 4, 4)), tokens(1, 4)
    model.save_pretrained(tmp_path)
    expected = model(input_ids=batch, tasks="rte").logits
    base = model.unload()
    again = peft.PeftModel.from_pretrained(base, tmp_path, adapter_name=name)
    assert torch.equal(again(input_ids=batch, tasks="rte").logits, expected)


def test_gradient_checkpointing_goes_through_a_function_of_the_layer() -> None:
    model = llama()
    model.activation_checkpointing_enable()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers, f"transformers {transformers.__version__}: decoder layers are checkpointed by another class"
    for layer in layers:
        function = layer.__dict__.get("_gradient_checkpointing_func")
        assert function is not None, "the function that routing.bind_checkpointing replaces has moved"
        assert function.keywords == {"use_reentrant": False}, "the default kind, or where it is stored, has changed"
    source = inspect.getsource(GradientCheckpointingLayer)
    assert "self._gradient_checkpointing_func(" in source, "the function is called by another name"


def test_attention_goes_through_the_registries() -> None:
    for implementation in ("sdpa", "eager"):
        assert f"peml_{implementation}" in ALL_ATTENTION_FUNCTIONS, "AttentionInterface.register has changed"
        assert f"peml_{implementation}" in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "the mask twin is not optional"
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS
    assert callable(AttentionInterface.register) and callable(AttentionMaskInterface.register)
    assert callable(masking_utils.sdpa_mask) and callable(masking_utils.eager_mask)
    modeling = inspect.getmodule(type(llama().model.layers[0].self_attn))
    assert hasattr(modeling, "eager_attention_forward"), "the eager function is no longer beside the attention layer"
    assert parameters(modeling.eager_attention_forward)[:6] == [
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "scaling",
    ]


def test_an_unsupported_model_is_only_warned_about() -> None:
    """Why `install` compares the implementation afterwards; if this starts to raise, it may be simplified."""
    assert hasattr(transformers.PreTrainedModel, "_can_set_attn_implementation")
    assert llama()._can_set_attn_implementation()


@pytest.mark.parametrize("name", ["forward", "generate"])
def test_tasks_reach_the_base_through_peft(name: str) -> None:
    """PEFT's own keyword `task_ids` is swallowed on the way; ours must not be."""
    model, batch = adapt(tiny(), peml.MTLLoRA(r=2)), tokens(1, 3)
    assert "tasks" not in parameters(getattr(peft.PeftModelForCausalLM, name)), "PEFT has taken our keyword"
    getattr(model, name)(input_ids=batch, tasks="rte", **({"max_new_tokens": 1} if name == "generate" else {}))
