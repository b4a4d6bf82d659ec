"""Regimes whose tasks have adapters by cluster, and by depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import peml
from peml import PemlError
from peml.affinity import Affinity
from peml.inspection import inspect_folder, show
from peml.regimes import again_recipe, grown_recipe
from peml.training import RunFolder, open_run
from peml.training.recipe import Recipe, validated
from workshop import recipe, write_model

CLUSTERS = [["size", "third"], ["color"]]
QUICK = {"warmup_steps": 3, "batches": 1, "batch_rows": 4}


def whole(folder: Path, how: Any, **changes: Any) -> Recipe:
    """Three tasks, the third a twin of the first."""
    if not (folder / "model").exists():
        write_model(folder / "model")
    data = recipe(folder, regime=how, evaluate_before=False, set={"adapter.r": 4})
    del data["method"]
    data["tasks"].append(data["tasks"][0] | {"name": "third"})
    data["train"] |= {"max_steps": 6, "logging_steps": 1, **changes.pop("train", {})}
    return validated(data | changes, folder / "recipe.yaml")


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def test_clusters_that_are_given_are_trained_side_by_side(tmp_path: Path) -> None:
    made = whole(tmp_path, {"name": "one_plus_n", "clusters": CLUSTERS})
    assert made.method == "one-plus-n" and isinstance(made.config().adapter, peml.CGCLoRA)
    folder = peml.train(made, tmp_path / "run")
    metrics = folder.read_metrics()
    assert metrics["groups"] == [{"until": 1.0, "groups": CLUSTERS}] and "stages" not in metrics["bill"]
    assert set(metrics["active_parameters"]) == {"size", "color", "third"}
    keys = weights(folder)
    assert {key.split(".members.")[1].split(".")[0] for key in keys} == {"0", "1"}
    assert all(value.abs().max() > 0 for key, value in keys.items() if key.endswith(".up"))
    console = Console(record=True, width=160)
    show(inspect_folder(folder.path), console)
    said = console.export_text()
    assert "until 1.00: size, third | color" in said and "of the adapter's parameters for a task" in said
    _, model = open_run(folder.path)
    assert model.base_model.cluster_of("third") == ["size", "third"]
    again = peml.train(whole(tmp_path, {"name": "one_plus_n", "clusters": CLUSTERS}), tmp_path / "again")
    assert all(torch.equal(value, keys[key]) for key, value in weights(again).items())


@pytest.mark.parametrize("name", ["one_plus_n", "progressive"])
def test_clusters_are_found_in_the_same_command(tmp_path: Path, name: str) -> None:
    made = whole(tmp_path, {"name": name, "num_clusters": 2, **QUICK})
    folder = peml.train(made, tmp_path / "run")
    found, metrics = Affinity.load(folder.path), folder.read_metrics()
    clusters = [list(group) for group in found.clustering.clusters]
    assert len(clusters) == 2 and folder.affinities.exists()
    wanted = [{"until": 1.0, "groups": clusters}]
    if name == "progressive":
        middle = [list(group) for group in found.between(1 / 3, 2 / 3, 2).clusters]
        wanted = [
            {"until": 1 / 3, "groups": "all"}, {"until": 2 / 3, "groups": middle}, {"until": 1.0, "groups": "each"},
        ]  # fmt: skip
    assert metrics["groups"] == wanted
    bill = metrics["bill"]
    assert bill["stages"]["affinity"]["wall_seconds"] == pytest.approx(found.seconds["total"], abs=2e-3)
    assert bill["stages"]["affinity"]["steps"] == 3 and bill["total"]["steps"] == 9
    keys = weights(folder)
    for part in (folder.adapter, folder.metrics):
        part.rename(part.with_name(f"old-{part.name}"))
    before = folder.affinity.stat().st_mtime_ns
    again = peml.train(made, folder.path, resume=True)
    assert folder.affinity.stat().st_mtime_ns == before, "it was measured again"
    assert all(torch.equal(value, keys[key]) for key, value in weights(again).items())
    # Another run takes what was measured, without its cost.
    other = peml.train(whole(tmp_path, {"name": name, "clusters": str(folder.path), "num_clusters": 2}), tmp_path / "b")
    assert other.read_metrics()["groups"] == wanted and "stages" not in other.read_metrics()["bill"]


def test_one_cluster_is_a_joint_training_and_each_task_alone_its_own(tmp_path: Path) -> None:
    def lora(how: Any, **more: Any) -> dict[str, torch.Tensor]:
        name = f"run{len(list(tmp_path.glob('run*')))}"
        return weights(peml.train(whole(tmp_path, how, method="lora", **more), tmp_path / name))

    together, joint = lora({"name": "one_plus_n", "clusters": [["size", "color", "third"]]}), lora("joint")
    assert together.keys() == joint.keys() and all(torch.equal(v, joint[k]) for k, v in together.items())
    apart = lora({"name": "progressive", "bounds": [0.0, 0.0], "clusters": CLUSTERS})
    each = lora({"name": "one_plus_n", "clusters": [["size"], ["color"], ["third"]]})
    assert apart.keys() == each.keys() and all(torch.equal(v, each[k]) for k, v in apart.items())


def test_a_cluster_is_added_to_a_run_without_moving_the_others(tmp_path: Path) -> None:
    folder = peml.train(whole(tmp_path, {"name": "one_plus_n", "clusters": CLUSTERS}), tmp_path / "run")
    entries = recipe(tmp_path)["tasks"]
    added = tmp_path / "new.yaml"
    added.write_text(yaml.safe_dump([entries[0] | {"name": "fourth"}, entries[1] | {"name": "fifth"}]))
    grown = peml.train(grown_recipe(folder.path, added, "shared", beside="fourth"), tmp_path / "grown")
    config = open_run(grown.path)[1].peft_config["default"]
    assert [level.groups for level in config.groups] == [(("size", "third"), ("color",), ("fourth", "fifth"))]
    before, after = weights(folder), weights(grown)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    # What the new tasks share with each other is trained too.
    ups = [key for key in after if ".members.2." in key and key.endswith((".up", ".up_specific"))]
    assert any(key.endswith(".up") for key in ups)
    assert all(after[key].abs().max() > 0 for key in ups)


def test_a_cluster_of_plain_lora_is_added(tmp_path: Path) -> None:
    """Nothing in it belongs to one task, and yet it is that of the new tasks alone."""
    how = {"name": "one_plus_n", "clusters": CLUSTERS}
    folder = peml.train(whole(tmp_path, how, method="lora"), tmp_path / "run")
    entries = recipe(tmp_path)["tasks"]
    added = tmp_path / "new.yaml"
    added.write_text(yaml.safe_dump([entries[0] | {"name": "fourth"}, entries[1] | {"name": "fifth"}]))
    grown = peml.train(grown_recipe(folder.path, added, "shared", beside="fourth"), tmp_path / "grown")
    before, after = weights(folder), weights(grown)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(value.abs().max() > 0 for key, value in after.items() if ".members.2." in key)


def test_a_cluster_of_a_run_is_trained_again_alone(tmp_path: Path) -> None:
    folder = peml.train(whole(tmp_path, {"name": "one_plus_n", "clusters": CLUSTERS}), tmp_path / "run")
    made = again_recipe(folder.path, "third")
    assert made.how.tasks == ["size", "third"]  # type: ignore[union-attr]
    before, after = weights(folder), weights(peml.train(made, tmp_path / "again"))
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    assert same == {key for key in before if ".members.1." in key}
    config = open_run(tmp_path / "again")[1].peft_config["default"]
    assert [[list(group) for group in level.groups] for level in config.groups] == [CLUSTERS]
    with pytest.raises(PemlError, match="no task 'x'"):
        again_recipe(folder.path, "x")
    with pytest.raises(PemlError, match="choose another --output"):
        peml.train(made, folder.path, overwrite=True)
    joint = peml.train(whole(tmp_path, "joint", method="lora"), tmp_path / "joint")
    with pytest.raises(PemlError, match="has no clusters"):
        again_recipe(joint.path, "size")


@pytest.mark.parametrize(
    ("how", "changes", "message"),
    [
        ({"name": "one_plus_n", "clusters": [["size"], ["color"]]}, {}, "regime.clusters leaves out third"),
        ({"name": "one_plus_n", "clusters": CLUSTERS, "num_clusters": 3}, {}, "is 3, and 2 are given"),
        ({"name": "one_plus_n"}, {"method": "prefix", "set": {}}, "method 'prefix' has none"),
        ({"name": "one_plus_n"}, {"set": {"groups": CLUSTERS}}, "leave out set.groups"),
        ({"name": "progressive", "bounds": [0.7, 0.3]}, {}, "regime.bounds must ascend"),
        ({"name": "progressive", "num_clusters": 4}, {}, "wants clusters"),
        ({"name": "progressive", "by": "lookahead"}, {}, "set regime.lookahead"),
        ({"name": "one_plus_n", "clusters": "a/run", "warmup_steps": 9}, {}, "regime.warmup_steps says how affinity"),
        ({"name": "one_plus_n", "clusters": CLUSTERS, "batches": 2}, {}, "regime.batches says how affinity"),
    ],
)
def test_what_cannot_be_clustered_is_refused(tmp_path: Path, how: Any, changes: Any, message: str) -> None:
    with pytest.raises(PemlError, match=message):
        whole(tmp_path, how, **changes)


def test_a_file_that_is_missing_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(PemlError, match="there is no .*nowhere"):
        peml.train(whole(tmp_path, {"name": "one_plus_n", "clusters": str(tmp_path / "nowhere")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
