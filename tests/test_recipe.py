"""Recipes: what they mean, and one sentence for everything that can be wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peml import LoRA, PemlError, PrefixNAS
from peml.training import load_recipe
from peml.training.recipe import Recipe
from workshop import recipe, write_recipe

PROJECT = Path(__file__).parents[1]


def test_a_recipe_names_a_method_and_changes_it(tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path))
    config = loaded.config()
    assert config.task_names == ["size", "color"]
    assert isinstance(config.adapter, LoRA) and config.adapter.r == 2
    assert isinstance(config.prompt, PrefixNAS) and config.prompt.width == 8
    assert config.adapter.lora_alpha == LoRA().lora_alpha


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path))
    again = tmp_path / "resolved.yaml"
    again.write_text(loaded.to_yaml(), encoding="utf-8")
    assert load_recipe(again).to_yaml() == loaded.to_yaml()
    assert load_recipe(again).config() == loaded.config()


def test_settings_outside_adapter_and_prompt_reach_the_config(tmp_path: Path) -> None:
    loaded = Recipe.model_validate(recipe(tmp_path, method="lora", set={"target_modules": ["q_proj"], "adapter.r": 3}))
    assert loaded.config().target_modules == ["q_proj"]


@pytest.mark.parametrize("path", sorted((PROJECT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).build_tasks()


def change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(changes)


def task(index: int = 0, drop: str | None = None, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: dict[str, Any]) -> None:
        data["tasks"][index].update(changes)
        if drop is not None:
            del data["tasks"][index][drop]

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change(method="pmel"), r"unknown method 'pmel': did you mean peml\? there are lora, .*peml"),
        (change(methods="peml"), r"unknown key methods; did you mean method\?; allowed are model, "),
        (change(lora_rank=8), r"lora_rank is called `set: \{adapter.r: ...\}` here"),
        (change(model_name_or_path="x"), r"model_name_or_path is called `model` here"),
        (
            change(train={"learning_rat": 1}),
            r"train.learning_rat is not a training argument; did you mean learning_rate",
        ),
        (change(train={"max_length": "long"}), r"train.max_length must be int, not 'long'"),
        (change(train={"lr_scheduler_type": "wavy"}), r"train: .*wavy"),
        (change(train={"finetune_fraction": 1.5}), r"train.finetune_fraction must be below 1, not 1.5"),
        (change(train={"max_steps": True}), r"train.max_steps must be int, not True"),
        (change(train={"max_steps": 0}), r"train.max_steps must be 1 or more, not 0"),
        (change(train={"learning_rate": float("nan")}), r"train.learning_rate must be float, not nan"),
        (change(train={"prompt_learning_rate": -1}), r"train.prompt_learning_rate must be 0 or more, not -1"),
        (change(train={"per_device_eval_batch_size": -2}), r"train.per_device_eval_batch_size must be 1 or more"),
        (change(train={"dtype": "half"}), r"train.dtype must be .*float16.*, not 'half'"),
        (change(train={"hub_token": "secret"}), r"train.hub_token cannot be set: set HF_TOKEN"),
        (change(train={"ignore_data_skip": True}), r"train.ignore_data_skip cannot be set: .* ends the same"),
        (change(train={"greater_is_better": False}), r"train.greater_is_better cannot be set: .*metric_for_best_model"),
        (
            change(train={"use_liger_kernel": True}),
            r"train.use_liger_kernel needs its package: pip install liger-kernel",
        ),
        (change(set={"prompt.cost_weight": float("inf")}), r"set.prompt.cost_weight must be a number, not inf"),
        (change(set={"task_type": "SEQ_CLS"}), r"set.task_type is unknown"),
        (change(set={"adapter": {"rank": 2}}), r"set.adapter.rank is not a setting of LoRA"),
        (task(choices=[True, False]), r"tasks\[size\]: YAML reads yes, no, on, off, true and false as booleans"),
        (task(labels={True: True, False: False}), r"YAML reads yes, no"),
        (task(path=""), r"tasks\[size\]: path: string should have at least 1 character"),
        (change(set={"adapter.rank": 4}), r"set.adapter.rank is not a setting of LoRA \(.*lora_alpha.*\)"),
        (change(set={"adapter.r": "four"}), r"set.adapter.r must be a whole number, not 'four'"),
        (change(set={"adapter.r": 0}), r"adapter.r must be above 0, not 0"),
        (change(method="lora"), r"set.prompt.\w+ does not apply: method 'lora' has no prompt"),
        (change(set={"rank": 4}), r"set.rank is unknown: write adapter.NAME, prompt.NAME, heads.NAME, or one of "),
        (
            change(mixing={"by": "size"}),
            r"mixing.by: input should be 'proportional', 'temperature', 'equal', 'weights', 'fixed_ratio' or 'subset'",
        ),
        (change(mixing={"temperatur": 1}), r"unknown key mixing.temperatur; did you mean temperature\?"),
        (change(tasks=[]), r"tasks is empty: name at least one"),
        (change(tasks=["tpy"]), r"'tpy'.*did you mean 'toy'"),
        (change(tasks=[{"suite": "glue", "include": ["rtee"]}]), r"unknown task 'rtee'.*did you mean 'rte'"),
        (change(tasks=[{"suite": "glue", "includes": ["rte"]}]), r"tasks\[glue\]: unknown key includes; did you mean"),
        (change(tasks=[3]), r"tasks\[0\] must be a mapping"),
        (change(tasks=[{"suite": "glue", "include": ["rte"]}] * 2), r"'rte' is there twice"),
        (
            task(kind="sort"),
            r"tasks\[size\]: kind: input should be 'choose', 'generate', 'classify' or 'regress', not 'sort'",
        ),
        (task(drop="prompt"), r"tasks\[size\]: the key prompt is missing"),
        (task(prompt="{{ text"), r"'size'.*not a valid Jinja template"),
        (task(drop="choices"), r"'size'.*choices"),
        (task(metrics=["acuracy"]), r"'size'.*acuracy"),
        (task(weight=0), r"tasks\[size\]: weight: input should be greater than 0"),
        (task(max_new_tokens=0), r"tasks\[size\]: max_new_tokens: input should be greater than 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_sentence_with_file_and_key(
    tmp_path: Path, apply: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = recipe(tmp_path)
    apply(data)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(PemlError, match=message) as caught:
        load_recipe(path).training_arguments(str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [a\ntasks: b: c\n", r"recipe.yaml:\d+ is not valid YAML"),
        (b"model: toy\ntasks: [toy]\nmodel: other\n", r"recipe.yaml:3 .*the key 'model' is there twice"),
        (b"train: {max_steps: 1, max_steps: 2}\n", r"recipe.yaml:1 .*the key 'max_steps' is there twice"),
        (b"- 1\n", "recipe.yaml must be a mapping with the keys model"),
        (b"", "recipe.yaml must be a mapping"),
        (b"model: \xff\n", r"recipe.yaml is not UTF-8 \(byte 7\)"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(PemlError, match=message):
        load_recipe(path)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PemlError, match=r"there is no recipe .*none.yaml"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(PemlError, match="is a folder"):
        load_recipe(tmp_path)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    text = path.read_text(encoding="utf-8").replace("learning_rate: 0.01", "learning_rate: 3e-4")
    path.write_text(text, encoding="utf-8")
    assert yaml.safe_load(text)["train"]["learning_rate"] == "3e-4"
    assert load_recipe(path).training_arguments(str(tmp_path / "out")).learning_rate == 3e-4


def test_empty_sections_are_empty(tmp_path: Path) -> None:
    data = recipe(tmp_path, method="lora") | {"set": None, "train": None, "mixing": None}
    assert Recipe.model_validate(data).setting("max_steps") == 1000


def test_local_paths_are_absolute_in_the_resolved_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = recipe(tmp_path) | {"model": "model"}
    data["tasks"][0]["path"] = "train.jsonl"
    resolved = yaml.safe_load(Recipe.model_validate(data).to_yaml())
    assert resolved["model"] == str(tmp_path / "model")
    assert resolved["tasks"][0]["path"] == str(tmp_path / "train.jsonl")
