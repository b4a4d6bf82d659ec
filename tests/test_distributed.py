"""Two processes on one machine train to what one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import peml
from peml.affinity import Affinity
from peml.regimes import train
from peml.training import RunFolder
from workshop import recipe, write_model, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mtl-lora", "peml"])
def test_two_processes_equal_one(tmp_path: Path, method: str) -> None:
    base = recipe(tmp_path)
    settings = {key: value for key, value in base["set"].items() if method == "peml"}
    # Plain gradient descent: Adam would blow differences of rounding up to the size of its step.
    arguments = base["train"] | {"max_steps": 5, "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True}
    arguments |= {"prompt_learning_rate": 1e-2, "architecture_learning_rate": 1e-2, "logging_steps": 1}
    one = train(write_recipe(tmp_path, method=method, set=settings, train=arguments), tmp_path / "one")

    halves = arguments | {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    path = write_recipe(tmp_path, method=method, set=settings, train=halves)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peml"]
    command = [*launch, "train", str(path), "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

    expected, given = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert expected.keys() == given.keys()
    for key, value in expected.items():
        torch.testing.assert_close(given[key], value, rtol=1e-3, atol=1e-6, msg=key)
    losses = [one.read_metrics()["train_loss"], type(one)(tmp_path / "two").read_metrics()["train_loss"]]
    for task, ends in losses[0].items():
        assert ends["first"] == pytest.approx(losses[1][task]["first"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["alternate", "unrolled"])
def test_two_processes_take_the_architecture_steps_of_one(tmp_path: Path, regime: str) -> None:
    base = recipe(tmp_path)
    how = {"name": regime, "weight_decay": 0.0, "max_grad_norm": 0.0}
    arguments = base["train"] | {"max_steps": 6, "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True}
    # Small steps: Adam would blow differences of rounding up to their size. What it remembers is compared below.
    arguments |= {"prompt_learning_rate": 1e-2, "architecture_learning_rate": 1e-6, "save_steps": 4}
    changes = {"regime": how, "evaluate_before": False}
    one = peml.train(write_recipe(tmp_path, train=arguments, **changes), tmp_path / "one")

    halves = arguments | {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    path = write_recipe(tmp_path, train=halves, **changes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peml"]
    command = [*launch, "train", str(path), "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]

    for name in ("adapter_model", "architecture"):
        expected, given = (
            load_file(tmp_path / folder / "checkpoints" / "checkpoint-4" / f"{name}.safetensors")
            for folder in ("one", "two")
        )
        assert expected.keys() == given.keys() and expected
        for key, value in expected.items():
            torch.testing.assert_close(given[key], value, rtol=2e-2, atol=1e-6, msg=key)
    assert (one.path / "architecture.json").exists() and (tmp_path / "two" / "architecture.json").exists()


@pytest.mark.slow
def test_two_processes_agree_on_the_clusters_that_they_find(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    how = {"name": "one_plus_n", "num_clusters": 2, "warmup_steps": 2, "batches": 1, "batch_rows": 4}
    data = recipe(tmp_path, method="lora", set={"adapter.r": 4}, regime=how, evaluate_before=False)
    data["tasks"].append(data["tasks"][0] | {"name": "third"})
    data["train"] |= {"max_steps": 3, "use_cpu": True, "ddp_backend": "gloo"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peml"]
    command = [*launch, "train", str(path), "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = RunFolder(tmp_path / "two")
    found = [list(group) for group in Affinity.load(folder.path).clustering.clusters]
    assert folder.read_metrics()["groups"] == [{"until": 1.0, "groups": found}] and len(found) == 2
