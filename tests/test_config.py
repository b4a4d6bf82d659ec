"""`PemlConfig`: what it takes, what it refuses, and that JSON brings it back."""

import dataclasses
import json

import pytest
from peft import PeftConfig, get_peft_model

import peml
from models import tiny
from peml import PemlConfig, PemlError
from peml.adapters import ADAPTERS
from peml.config import changed, part_from_dict, part_to_dict
from peml.prompts import PROMPTS, PrefixNAS, PrefixTuning

PARTS = [
    *((kind(), "adapter") for kind in ADAPTERS.values()),
    *((kind(), "prompt") for kind in PROMPTS.values()),
    (peml.LoRA(r=3, lora_alpha=2, lora_dropout=0.1, use_rslora=True), "adapter"),
    (peml.MTLLoRA(lambda_kind="diag", routing_init="random", num_up=1), "adapter"),
    (PrefixTuning(num_virtual_tokens=(0, 3, 1), per_task=True), "prompt"),
    (PrefixNAS(operations=("linear", "none"), parameter_budget=5, gate_threshold=0.2, gate_after="unit"), "prompt"),
]
TABLES = {"adapter": ADAPTERS, "prompt": PROMPTS}


@pytest.mark.parametrize(("part", "axis"), PARTS, ids=lambda value: type(value).__name__)
def test_parts_survive_json(part, axis: str, tmp_path) -> None:
    stored = json.loads(json.dumps(part_to_dict(part)))
    assert stored["type"] == type(part).__name__
    assert part_from_dict(axis, TABLES[axis], stored) == part
    config = PemlConfig(task_names=["a", "b"], **{axis: part}, target_modules={"q_proj", "k_proj"})
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is PemlConfig and again == config
    assert getattr(again, axis) == part and again.target_modules == ["k_proj", "q_proj"]


def test_tables_are_by_class_name() -> None:
    for table in TABLES.values():
        assert all(name == kind.__name__ for name, kind in table.items())


@pytest.mark.parametrize("kind", [*ADAPTERS.values(), *PROMPTS.values()])
def test_every_part_is_frozen_and_documented(kind: type) -> None:
    """A config cannot change under the module that it built, and every setting stands in the docstring."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), dataclasses.fields(kind)[0].name, 1)
    for field in dataclasses.fields(kind):
        assert f"    {field.name}:" in kind.__doc__ or field.name in kind.__doc__, field.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_names": [], "adapter": peml.LoRA()}, "task_names is empty"),
        ({"task_names": ["a", "b", "a"], "adapter": peml.LoRA()}, "repeats a"),
        ({"task_names": ["a"]}, "nothing to train"),
        (
            {"task_names": ["a"], "adapter": PrefixTuning()},
            "adapter must be one of LoRA, .*, HydraLoRA, not PrefixTuning",
        ),
        (
            {"task_names": ["a"], "prompt": peml.LoRA()},
            "prompt must be one of PrefixTuning, PrefixNAS, PromptTuning, MultitaskPrompt, Attempt, not LoRA",
        ),
        ({"task_names": ["a"], "adapter": {"type": "Lora"}}, "unknown type 'Lora'; choose from LoRA, SingleTaskLoRA"),
        ({"task_names": ["a"], "adapter": {"r": 8}}, "unknown type None"),
        ({"task_names": ["a"], "adapter": {"type": "LoRA", "rank": 8}}, "adapter.rank is not a setting of LoRA"),
        ({"task_names": ["a"], "adapter": {"type": "LoRA", "lora_alhpa": 8}}, "did you mean lora_alpha"),
        ({"task_names": ["a"], "adapter": {"type": "LoRA", "r": "8"}}, "adapter.r must be a whole number, not '8'"),
        ({"task_names": ["a"], "adapter": {"type": "LoRA", "r": True}}, "adapter.r must be a whole number, not True"),
        ({"task_names": ["a"], "adapter": {"type": "LoRA", "r": 0}}, "adapter.r must be above 0, not 0"),
        (
            {"task_names": ["a"], "adapter": {"type": "LoRA", "lora_dropout": 1}},
            r"adapter.lora_dropout must be in \[0, 1\)",
        ),
        ({"task_names": ["a"], "adapter": {"type": "LoRA", "use_rslora": 1}}, "use_rslora must be true or false"),
        ({"task_names": ["a"], "adapter": {"type": "MTLLoRA", "temperature": 0}}, "temperature must be above 0"),
        ({"task_names": ["a"], "adapter": {"type": "MTLLoRA", "lambda_kind": "low"}}, "full or diag, not 'low'"),
        ({"task_names": ["a"], "prompt": {"type": "PrefixTuning", "num_virtual_tokens": 0}}, "above 0 in some layer"),
        ({"task_names": ["a"], "prompt": {"type": "PrefixTuning", "num_virtual_tokens": [0, 0]}}, "above 0 in some"),
        ({"task_names": ["a"], "prompt": {"type": "PrefixTuning", "num_virtual_tokens": [3, -1]}}, "above 0 in some"),
        (
            {"task_names": ["a"], "prompt": {"type": "PrefixTuning", "num_virtual_tokens": 2.5}},
            "whole number or a list",
        ),
        ({"task_names": ["a"], "prompt": {"type": "PrefixNAS", "temperature": [1.0, "x"]}}, "a list of a number"),
    ],
)
def test_mistakes_are_named(settings: dict, message: str) -> None:
    with pytest.raises(PemlError, match=message):
        PemlConfig(**settings)


def test_whole_numbers_serve_as_numbers() -> None:
    assert changed("adapter", peml.LoRA(), {"lora_alpha": 32}).lora_alpha == 32


def test_a_task_is_needed_where_something_depends_on_it() -> None:
    names = {"task_names": ["a", "b"]}
    assert not PemlConfig(**names, adapter=peml.LoRA(), prompt=PrefixNAS()).needs_task
    assert PemlConfig(**names, adapter=peml.MTLLoRA()).needs_task
    assert PemlConfig(**names, prompt=PrefixTuning(per_task=True)).needs_task
    assert not PemlConfig(**names, prompt=PrefixTuning()).needs_task


def test_the_users_lists_are_not_shared() -> None:
    names = ["a"]
    config = PemlConfig(task_names=names, adapter=peml.LoRA())
    names.append("b")
    assert config.task_names == ["a"]


def test_a_task_named_by_one_string_is_refused() -> None:
    """`task_names="rte"` would be three tasks of one letter."""
    with pytest.raises(PemlError, match="task_names"):
        PemlConfig(task_names="rte", adapter=peml.LoRA())


@pytest.mark.parametrize(
    "scale", [(peml.LoRA(r=4, lora_alpha=8), 2.0), (peml.LoRA(r=4, lora_alpha=8, use_rslora=True), 4.0)]
)
def test_scaling(scale) -> None:
    config, expected = scale
    assert config.scaling == expected and peml.MTLLoRA(r=4, lora_alpha=2).scaling == 0.5


@pytest.mark.parametrize(("layers", "expected"), [([0], {0}), (1, {1}), ([0, 1], {0, 1})])
def test_layers_to_transform_holds_for_all_linear_layers(layers: list[int] | int, expected: set[int]) -> None:
    config = peml.PemlConfig(task_names=["a"], adapter=peml.LoRA(r=2), layers_to_transform=layers)
    model = get_peft_model(tiny(), config)
    names = [name for name, _ in model.named_parameters() if "peml_adapter" in name]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_names": ["a", 2]}, "task_names must be texts"),
        ({"task_names": None}, "task_names is empty"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of module names"),
        ({"layers_to_transform": "x"}, "layers_to_transform must be a list of layer indices"),
        ({"adapter": peml.PrefixTuning(2)}, "adapter must be one of"),
    ],
)
def test_fields_of_the_wrong_type_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        peml.PemlConfig(**({"task_names": ["a"], "adapter": peml.LoRA()} | settings))  # type: ignore[arg-type]
    with pytest.raises(PemlError, match="adapter.r must be"):
        peml.LoRA(r="8")  # type: ignore[arg-type]
