"""Regimes around a search: one axis after the other, and training anew what was found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peml
from peml import PemlError
from peml.prompts import Architecture
from peml.training import RunFolder, load_recipe, open_run
from peml.training.recipe import Recipe
from workshop import killed_in_step, recipe, write_model


def run(folder: Path, name: str, how: Any, resume: bool = False, console: Any = None, **changes: Any) -> RunFolder:
    data = recipe(folder, regime=how, evaluate_before=False)
    train = data["train"] | {"max_steps": 10, "logging_steps": 1} | changes.pop("train", {})
    if not (folder / "model").exists():
        write_model(folder / "model")
    whole = Recipe.model_validate(data | {"train": train} | changes)
    return peml.train(whole, folder / name, resume=resume, console=console)


def weights(folder: RunFolder) -> dict[str, Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def parts(folder: RunFolder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the prompt and of the adapter."""
    tensors = weights(folder)
    return tuple({k: v for k, v in tensors.items() if ("prompt" in k) == wanted} for wanted in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize("order", ["prompt_first", "adapter_first"])
def test_the_axis_that_comes_first_is_frozen_bit_for_bit(tmp_path: Path, order: str) -> None:
    how = {"name": "sequential", "order": order, "split": 0.4}
    whole = run(tmp_path, "run", how, train={"architecture_learning_rate": 0.05})
    first, second = ("prompt", "adapter") if order == "prompt_first" else ("adapter", "prompt")
    stage = RunFolder(whole.stages / first)
    earlier, later = parts(stage), parts(whole)
    kept = order == "adapter_first"
    assert earlier[kept] and not earlier[not kept], "the second axis is not there yet"
    assert earlier[kept].keys() == later[kept].keys() and later[not kept]
    assert all(torch.equal(value, later[kept][key]) for key, value in earlier[kept].items())
    metrics = whole.read_metrics()
    assert (stage.read_metrics()["steps"], metrics["steps"]) == (4, 6)
    assert set(metrics["parameters"]) == {"adapter"} if first == "prompt" else {"prompt", "architecture"}
    trained = {key: value for key, value in later[not kept].items() if key.endswith((".up", "head_in"))}
    assert trained and all(float(value.abs().max()) > 0 for value in trained.values())
    # The search and its end are in the prompt's stage.
    assert metrics["architecture"]["derived"] and metrics["search"]["gap"]["step"] == (4 if kept is False else 5)
    assert ("search" in stage.read_metrics()) is (first == "prompt")
    assert Architecture.load(whole.architecture).operations == tuple(metrics["architecture"]["operations"])
    bench, model = open_run(whole.path)
    assert bench.evaluate(model) == metrics["after"]
    assert load_recipe(whole.recipe).how.order == order  # type: ignore[union-attr]
    assert second in ("adapter", "prompt")


def test_both_stages_together_make_the_steps_of_a_joint_training(tmp_path: Path) -> None:
    from peml.regimes.sequential import _lengths

    def lengths(split: float, **train: Any) -> Any:
        data = recipe(tmp_path, regime="sequential")
        del data["train"]["max_steps"]
        data["train"] |= train
        return _lengths(Recipe.model_validate(data), split)

    assert lengths(0.5, max_steps=7) == ({"max_steps": 4}, {"max_steps": 3})
    assert lengths(0.01, max_steps=7) == ({"max_steps": 1}, {"max_steps": 6})
    assert lengths(0.25, num_train_epochs=2) == ({"num_train_epochs": 0.5}, {"num_train_epochs": 1.5})
    with pytest.raises(PemlError, match="regime sequential shares train.max_steps among two stages: give it 2"):
        lengths(0.5, max_steps=1)


@pytest.mark.parametrize(
    ("how", "changes", "size"),
    [
        ({"split": 0.5}, {}, 4),
        # An epoch has 6 steps: the second stage begins in one, and goes on into the next.
        ({"split": 0.4}, {}, 20),
        ({"split": 0.7}, {}, 20),
        ({"split": 0.5}, {"mixing": {"epochs": 1.0}}, 8),
    ],
)
def test_both_stages_together_see_the_rows_of_a_joint_training(
    tmp_path: Path, how: dict[str, Any], changes: dict[str, Any], size: int
) -> None:
    import peml.training.trainer as training

    def drawn(name: str, how: Any) -> list[list[int]]:
        steps: list[list[int]] = []
        original = training.MultiTaskTrainer.training_step

        def spy(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
            steps.append(sorted(inputs["input_ids"].flatten().tolist() + inputs["tasks"]))
            return original(self, model, inputs, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.MultiTaskTrainer, "training_step", spy)
            run(tmp_path, name, how, train={"per_device_train_batch_size": size, "measure_gap": False}, **changes)
        return steps

    whole = drawn("joint", "joint")
    assert whole == drawn("sequential", {"name": "sequential", **how}) and len(whole) == 10
    assert len({str(step) for step in whole}) > 8, "the rows tell steps apart"


def test_rows_that_will_not_do_for_both_stages_are_refused_before_the_first(tmp_path: Path) -> None:
    for train in ({"max_steps": 10}, {"num_train_epochs": 1.5}):
        data = recipe(tmp_path, regime="sequential", mixing={"epochs": 0.5})
        whole = Recipe.model_validate(data | {"train": {"per_device_train_batch_size": 8, **train}})
        write_model(tmp_path / "model")
        with pytest.raises(PemlError, match="mixing.epochs lets the tasks give 60 rows in all, and the training draws"):
            peml.train(whole, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dies_at", [3, 8])
def test_it_is_resumed_in_either_stage(tmp_path: Path, dies_at: int) -> None:
    train = {"save_steps": 2, "architecture_learning_rate": 0.05}
    whole = run(tmp_path, "whole", "sequential", train=train)
    with killed_in_step(dies_at):
        run(tmp_path, "broken", "sequential", train=train)
    again = run(tmp_path, "broken", "sequential", resume=True, train=train)
    one, two = weights(whole), weights(again)
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    bill = again.read_metrics()["bill"]
    assert bill["total"]["steps"] == 10 and bill["search"]["steps"] == 4


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_methods_without_both_axes_are_refused(tmp_path: Path, method: str) -> None:
    lacks = "prompt" if method == "lora" else "adapter"
    with pytest.raises(ValueError, match=f"one after the other, and method '{method}' has no {lacks}: use one with"):
        Recipe.model_validate(recipe(tmp_path, method=method, set={}, regime="sequential"))


def test_a_prompt_that_is_not_searched_goes_as_well(tmp_path: Path) -> None:
    whole = run(tmp_path, "run", "sequential", method="lora+prefix", set={"prompt.num_virtual_tokens": 4})
    metrics = whole.read_metrics()
    assert "search" not in metrics and metrics["bill"]["search"]["steps"] == 0
    assert metrics["bill"]["total"]["steps"] == 10 and not whole.architecture.exists()


def test_what_was_found_is_trained_anew(tmp_path: Path) -> None:
    whole = run(tmp_path, "run", "retrain", train={"architecture_learning_rate": 0.05})
    search, metrics = RunFolder(whole.stages / "search"), whole.read_metrics()
    found = search.read_metrics()
    assert (found["steps"], metrics["steps"]) == (10, 10)
    for key in ("operations", "lengths", "tokens"):
        assert metrics["architecture"][key] == found["architecture"][key]
    assert "architecture" not in metrics["parameters"] and "architecture" in found["parameters"]
    assert not any(key.endswith(("alpha", "gate")) for key in weights(whole))
    bill = metrics["bill"]
    assert bill["search"]["steps"] == 9 and bill["training"]["steps"] == 10 and bill["total"]["steps"] == 20
    assert bill["stages"]["search"]["steps"] == 1 and metrics["search"] == found["search"]
    assert bill["origin"]["search"]["wall_seconds"] == pytest.approx(bill["search"]["wall_seconds"], abs=0.01)
    origin = Architecture.load(whole.architecture).origin
    assert origin == Architecture.load(search.architecture).origin
    bench, model = open_run(whole.path)
    assert bench.evaluate(model) == metrics["after"]


def test_a_search_that_is_done_is_not_made_again(tmp_path: Path) -> None:
    whole = run(tmp_path, "run", "retrain")
    before = (whole.stages / "search" / "metrics.json").read_text()
    expected = weights(whole)
    shutil.rmtree(whole.adapter)
    shutil.rmtree(whole.checkpoints)
    whole.write_json(whole.metrics, {"data": whole.read_metrics()["data"]})
    again = run(tmp_path, "run", "retrain", resume=True)
    assert (whole.stages / "search" / "metrics.json").read_text() == before
    assert all(torch.equal(value, expected[key]) for key, value in weights(again).items())


def test_an_imported_architecture_is_not_searched(tmp_path: Path) -> None:
    found = run(tmp_path, "found", "joint")
    given = Architecture.load(found.architecture).to_dict()
    settings = recipe(tmp_path)["set"] | {"prompt.architecture": given}
    imported = run(tmp_path, "imported", "joint", set=settings)
    bill = imported.read_metrics()["bill"]
    assert bill["search"]["wall_seconds"] == 0 and bill["search"]["steps"] == 0 and bill["search"]["share"] == 0
    assert bill["origin"] == found_bill(found)
    assert json.loads(imported.architecture.read_text())["origin"] == given["origin"]
    for how in ("alternate", "unrolled", "retrain"):
        with pytest.raises(ValueError, match=f"regime {how} searches an architecture, and this recipe imports one"):
            Recipe.model_validate(recipe(tmp_path, set=settings, regime=how))


def found_bill(folder: RunFolder) -> Any:
    return json.loads(folder.architecture.read_text())["origin"]["bill"]


SMALL = {f"prompt.{name}": 8 for name in ("width", "embedding_dim", "head_rank", "num_virtual_tokens")}


def encoder_recipe(folder: Path, how: Any) -> Path:
    from test_forms import settings

    train = recipe(folder)["train"] | {"max_steps": 8, "save_steps": 4}
    return settings(folder, "bert", method="peml", set={"adapter.r": 2, **SMALL}, regime=how, train=train)


def test_heads_are_trained_in_both_stages_and_fitted_once(tmp_path: Path) -> None:
    import peml.training.run as running

    fitted: list[list[str]] = []
    original = running.probe_heads

    def spy(model: Any, bench: Any, tasks: Any, without: Any) -> None:
        fitted.append(list(tasks))
        original(model, bench, tasks, without)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "probe_heads", spy)
        whole = peml.train(encoder_recipe(tmp_path, "sequential"), tmp_path / "run")
    assert fitted == [["size", "color", "count"], []]
    ends = [
        {key: value for key, value in weights(folder).items() if "head_host" in key}
        for folder in (RunFolder(whole.stages / "prompt"), whole)
    ]
    moved = [float((ends[1][key] - value).abs().max()) for key, value in ends[0].items()]
    assert moved and all(0 < step < 1 for step in moved), "they go on from where the first stage left them"
    assert set(whole.read_metrics()["parameters"]) == {"adapter", "heads"}


def test_heads_are_not_fitted_to_the_rows_of_the_architecture(tmp_path: Path) -> None:
    import peml.training.probing as probing
    from peml.mixing import split_off
    from peml.training.workbench import prepare

    seen: list[str] = []
    original = probing.encode_heads

    def spy(tokenizer: Any, examples: Any, *args: Any) -> Any:
        seen.extend(f"{example.task} {example.origin}" for example in examples)
        return original(tokenizer, examples, *args)

    path = encoder_recipe(tmp_path, "alternate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "encode_heads", spy)
        whole = peml.train(path, tmp_path / "run")
    bench = prepare(load_recipe(path))
    order = [f"{example.task} {example.origin}" for rows in bench.train.values() for example in rows]
    tasks = [at for at, rows in enumerate(bench.train.values()) for _ in rows]
    held = {order[row] for row in split_off(tasks, list(bench.train), 0.5, 0)}
    assert len(seen) == 90 and set(seen) == set(order) - held
    assert {"architecture", "heads"} <= set(whole.read_metrics()["parameters"])
