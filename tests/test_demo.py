"""The demo, whole but short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from peml.demo import METHODS, demo
from peml.inspection import inspect_folder
from peml.tasks import suite_tasks


@pytest.mark.slow
def test_the_demo_trains_four_methods_on_equal_budgets(tmp_path: Path) -> None:
    with (tmp_path / "screen.txt").open("w") as screen:
        results = demo(tmp_path / "demo", steps=10, seed=0, console=Console(file=screen, width=140))
    assert list(results) == ["frozen", *METHODS]
    budget = results["peml"]["parameters"]
    for name in METHODS:
        assert abs(results[name]["parameters"] - budget) / budget < 0.1
        assert inspect_folder(tmp_path / "demo" / name).config.task_names == [task.name for task in suite_tasks("toy")]
    text = (tmp_path / "screen.txt").read_text()
    assert all(word in text for word in ("frozen", "mtl-lora", "average", "trainable parameters", "seconds", "cells"))
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["methods"].keys() == results.keys()
