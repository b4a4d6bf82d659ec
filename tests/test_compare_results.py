"""The record of a comparison, from run folders that nobody trained, against the textbook's way of saying it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from scipy.stats import ttest_rel

from peml.compare import CompareFolder
from peml.compare.plan import Entry, Plan
from peml.compare.results import results_of
from peml.training.contenders import Compare
from peml.training.folder import RESOLVED
from peml.training.recipe import load_recipe
from test_compare import small

N, SEEDS = 100, (0, 1, 2, 3)
RIGHT: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "lora": {"size": (50, 52, 51, 50), "color": (60, 63, 61, 60)},
    "better": {"size": (80, 83, 81, 79), "color": (90, 92, 92, 90)},
    # Always ahead by a little, on other rows, so that its test says yes and its interval over rows no.
    "hair": {"size": (51, 53, 52, 51), "color": (60, 64, 62, 61)},
    "mixed": {"size": (90, 91, 93, 90), "color": (30, 31, 33, 29)},
}
"""Rows that are answered rightly, by method, task and seed."""


def write_run(folder: Path, own: Mapping[str, int], seed: int, data: str = "rows", turn: int = 37) -> None:
    """What a run of these scores leaves; which rows are right depends on `turn`."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"x" * 7)
    (folder / "recipe.yaml").write_text(RESOLVED)
    after = {task: {"score": count / N} for task, count in own.items()}
    bill = {
        "training": {"wall_seconds": 10.0 + seed},
        "search": {"wall_seconds": 4.0},
        "discretisation": {"wall_seconds": 1.0},
    }
    bill |= {"stages": {"first": {"wall_seconds": 6.0}}, "total": {"steps": 20, "device_hours": 0.5 + seed}}
    metrics: dict[str, Any] = {
        "after": after, "average": {"after": fmean(scores["score"] for scores in after.values()), "before": 0.25},
        "before": {task: {"score": 0.25} for task in own}, "data": data, "steps": 20, "parameters": {"adapter": 9},
        "deployed": {"adapter": 5, "prompt": 3}, "peak_memory_bytes": 100 + seed, "bill": bill | {"devices": {"kind": "x", "count": 1}},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    answers = {}
    for task, count in own.items():
        places = [1 if (turn * i) % N < count else 0 for i in range(N)]
        answers[task] = {"score": ["accuracy"], "rows": task, "choices": [0, 1], "predictions": places, "references": [1] * N, "texts": ["no", "yes"]}  # fmt: skip
    (folder / "predictions.json").write_text(json.dumps(answers))


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    entries = tuple(Entry(name, {"method": "lora", "set": {}}, 110, {}) for name in RIGHT)
    recipe = load_recipe(small(tmp_path)).model_copy(update={"compare": Compare(methods={})})
    plan = Plan(recipe, entries, 100, "lora", SEEDS, {"size": ("accuracy",), "color": ("accuracy",)}, {})
    folder = CompareFolder(tmp_path / "out")
    for entry in entries:
        for seed in SEEDS:
            rows = "others" if entry.name == "mixed" and seed == 2 else "rows"
            own = {task: counts[seed] for task, counts in RIGHT[entry.name].items()}
            write_run(folder.training(entry, seed).output, own, seed, rows, 61 if entry.name == "hair" else 37)
    results = results_of(plan, folder, [folder.training(e, s) for s in SEEDS for e in entries], {})
    return {row["name"]: row for row in results["methods"]} | {"frozen": results["frozen"]}


def average(name: str) -> list[float]:
    return [fmean(own[seed] / N for own in RIGHT[name].values()) for seed in SEEDS]


def holm(values: dict[Any, float]) -> dict[Any, float]:
    """By the definition: the largest of all smaller ones, each times how many are left."""
    order = sorted(values, key=lambda key: values[key])
    left = {key: min(1.0, (len(order) - place) * values[key]) for place, key in enumerate(order)}
    return {key: max(left[other] for other in order[: place + 1]) for place, key in enumerate(order)}


def test_means_gains_and_tests_are_the_textbooks(found: dict[str, Any]) -> None:
    others = [name for name in RIGHT if name != "lora"]
    whole = holm({name: ttest_rel(average(name), average("lora")).pvalue for name in others})
    single = {(name, task): [c / N for c in RIGHT[name][task]] for name in RIGHT for task in ("size", "color")}
    each = holm({(n, t): ttest_rel(single[n, t], single["lora", t]).pvalue for n in others for t in ("size", "color") if (n, t) != ("hair", "size")})  # fmt: skip
    for name in RIGHT:
        row = found[name]
        assert row["average"]["mean"] == pytest.approx(fmean(average(name)))
        assert row["average"]["sd"] == pytest.approx(stdev(average(name)))
        low, high = row["average"]["interval"]
        assert low < row["average"]["mean"] < high
        if name == "lora":
            assert row["versus"] is None
            continue
        test = row["versus"]["average"]
        assert test["gain"] == pytest.approx(fmean(average(name)) - fmean(average("lora")))
        assert test["interval"][0] < test["gain"] < test["interval"][1]
        assert test["adjusted"] == pytest.approx(whole[name])
        for task, own in row["versus"]["tasks"].items():
            # A difference that is the same for all seeds has no test, and is not counted among them.
            wanted = None if (name, task) == ("hair", "size") else pytest.approx(each[name, task])
            assert own["adjusted"] == wanted


def test_what_stands_needs_its_test_and_its_interval(found: dict[str, Any]) -> None:
    assert found["better"]["versus"]["average"]["stands"] and found["better"]["versus"]["tasks"]["size"]["stands"]
    hair = found["hair"]["versus"]["average"]
    assert hair["adjusted"] < 0.05 and hair["interval"][0] <= 0 and not hair["stands"]
    mixed = found["mixed"]["versus"]["tasks"]
    assert mixed["color"]["gain"] < 0 and mixed["color"]["stands"], "a loss stands as well"
    assert not found["hair"]["versus"]["tasks"]["size"]["stands"], "no test, no bold number"


def test_ranks_costs_and_remarks(found: dict[str, Any]) -> None:
    # Ranks on size are 4, 2, 3, 1 and on color 3 (at one seed 3.5), 1, 2 (2.5), 4.
    assert found["better"]["rank"] == 1.5 and found["mixed"]["rank"] == 2.5
    assert found["lora"]["rank"] == (4 * 4 + 3 * 3 + 2.5) / 8 and found["hair"]["rank"] == (4 * 3 + 3 * 2 + 2.5) / 8
    cost = found["better"]["cost"]
    assert cost["seconds"] == {"search": 4.0, "discretisation": 1.0, "training": 11.5, "tuning": 0.0, "stages": 6.0}
    assert cost["seconds_per_step"] == (4.0 + 11.5 + 6.0) / 20 and cost["device_hours"] == 2.0
    assert (cost["deployed"], cost["adapter_bytes"], cost["peak_memory_bytes"]) == (8, 7, 103)
    assert found["better"]["parameters"] == {"trained": 110, "deviation": pytest.approx(0.1)}
    assert found["mixed"]["other_rows"] and not found["better"]["other_rows"]
    assert found["frozen"] == {"average": 0.25, "tasks": {"size": 0.25, "color": 0.25}}
