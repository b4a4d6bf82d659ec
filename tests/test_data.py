"""The shipped recipe for real data, on a real checkpoint, for a few steps; skipped where the data is absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from peml.regimes import train
from peml.training import open_run
from peml.training.recipe import Recipe

pytestmark = pytest.mark.data
RECIPE = Path(__file__).parents[1] / "recipes" / "local.yaml"


def test_the_recipe_for_real_data_trains(
    shared_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPE.parents[1])
    data = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for path in [data["model"]] + [task[key] for task in data["tasks"] for key in ("path", "eval_path")]:
        shared_path(path.partition("shared/data/")[2])
    for task in data["tasks"]:
        task |= {"limit_train": 64, "limit_eval": 8}
    data["train"] |= {"max_steps": 8, "logging_steps": 4, "max_length": 96, "per_device_train_batch_size": 10}
    folder = train(Recipe.model_validate(data), tmp_path / "run")
    metrics = folder.read_metrics()
    assert set(metrics["after"]) == {"sst2", "rte", "mrpc", "cb", "boolq"}
    for task, losses in metrics["train_loss"].items():
        assert losses["last"] < losses["first"], task
    assert metrics["after"]["sst2"]["loss"] < metrics["before"]["sst2"]["loss"]
    bench, model = open_run(folder.path)
    assert bench.evaluate(model) == metrics["after"]
