"""Trials: checked before the first, measured on training rows alone, the same after a kill, and all of them in the bill."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import peml
import peml.tuning.summary as summary
import peml.tuning.trials as module
from peml import PemlError
from peml.evaluation.evaluate import measure
from peml.methods import METHODS
from peml.prompts import Architecture
from peml.prompts.base import AttentionSlot, ModelShape
from peml.tasks import FileSource, Task
from peml.training import RunFolder
from peml.training.recipe import Recipe, load_recipe
from peml.training.workbench import Workbench
from peml.tuning import TuneFolder, default_ranges, tune
from peml.tuning.show import trials_table
from peml.tuning.space import measurements, own_values, trial_recipe
from workshop import recipe, rows, write_recipe, write_rows

RATE = {"low": 1e-4, "high": 1.0, "log": True}
RANGES: dict[str, Any] = {
    "train.learning_rate": RATE,
    "adapter.r": [2, 4, 8],
    "prompt.temperature": [[1.0, 0.1], [1.0, 0.3]],
    "prompt.num_cells": {"low": 1, "high": 3},
}


def tuned(folder: Path, **section: Any) -> Path:
    """A recipe with a section `tune`, on disk."""
    return write_recipe(folder, tune={"ranges": RANGES, "trials": 4, "held_out": 12, **section})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Recipe]]:
    """Trials without a training: a score is a function of the recipe, reported as if it had been measured on the way."""

    def install(score: Callable[[Recipe, int], float], kill_at: int | None = None) -> list[Recipe]:
        seen: list[Recipe] = []

        def train(own: Recipe, path: Path, workbench: Workbench) -> RunFolder:
            seen.append(own)
            if kill_at == len(seen):
                raise KeyboardInterrupt
            run = RunFolder(path)
            run.create()
            run.append_log({"step": 1, "elapsed_seconds": 7.0})
            assert workbench.watch is not None
            for number in range(1, measurements(own) + 1):
                value = score(own, number)
                results = {"size": {"accuracy": value}, "color": {"exact_match": value, "loss": 1 - value}}
                workbench.watch(results)
            run.write_json(run.metrics, {"after": results})
            return run

        monkeypatch.setattr(module.regimes, "train", train)
        monkeypatch.setattr(module, "load_base", lambda own: (None, None))
        # Importances take longer than all the trials; the test that wants them sets this back.
        monkeypatch.setattr(summary, "ENOUGH", 10**6)
        return seen

    return install


def near(best: float) -> Callable[[Recipe, int], float]:
    """The better, the nearer the learning rate is to `best`; grows over the measurements."""
    return lambda own, number: number / 5 / (1 + abs(math.log10(own.train["learning_rate"] / best)))


def tried(folder: TuneFolder) -> list[dict[str, Any]]:
    """Every trial but for what the clock says."""
    trials = folder.read_summary()["trials"]
    return [{key: value for key, value in trial.items() if key not in ("seconds", "device_hours")} for trial in trials]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"ranges": {"train.learning_ratee": [1, 2]}}, "tune.ranges: train.learning_ratee is not a training argument"),
        ({"ranges": {"adapter.rank": [1, 2]}}, "tune.ranges: set.adapter.rank is not a setting of LoRA"),
        ({"ranges": {"rank": [1, 2]}}, "tune.ranges: set.rank is unknown"),
        ({"ranges": {"adapter.r": [4, "x"]}}, "set.adapter.r must be a whole number, not 'x'"),
        ({"ranges": {"adapter.r": {"low": 0, "high": 8}}}, "adapter.r must be above 0, not 0"),
        (
            {"ranges": {"adapter.r": {"low": 8, "high": 4}}},
            "tune.ranges.adapter.r: low must be below high, not 8 and 4",
        ),
        ({"ranges": {"adapter.r": {"low": 4}}}, "tune.ranges.adapter.r: the key high is missing"),
        ({"ranges": {"adapter.r": {"low": 4, "high": 8, "base": 2}}}, "adapter.r: unknown key base"),
        ({"ranges": {"adapter.r": 4}}, "tune.ranges.adapter.r must be a list of values or a mapping with low and high"),
        ({"ranges": {"adapter.r": [4, 4]}}, "adapter.r must list two or more different values"),
        ({"ranges": {"train.weight_decay": {"low": 0, "high": 1.0, "log": True}}}, "log needs a low above 0"),
        ({"ranges": {"train.seed": [0, 1]}}, "tune.ranges.train.seed cannot be tuned: the best seed is luck"),
        ({"ranges": {"train.max_steps": [10, 20]}}, "trials are compared at equal steps"),
        ({"ranges": [1]}, "tune.ranges must be a mapping"),
        ({"trials": 0}, "tune.trials"),
        ({"trails": 3}, "unknown key tune.trails; did you mean trials"),
        ({"pruner": "asha"}, "tune.pruner"),
        ({"metric": "size/f1"}, "tune.metric must be one of average, size/accuracy"),
        ({"held_out": 1.5}, "`held_out` must be a share below 1 or a number of rows, not 1.5"),
        ({"held_out": 60}, "`held_out` 60 leaves none of 60 rows to train on"),
    ],
)
def test_mistakes_are_said_before_the_first_trial(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(PemlError) as raised:
        tune(tuned(tmp_path, **section), tmp_path / "out")
    assert message in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "changes", "reason"),
    [
        ("train.learning_rate", {"method": "prefix"}, "the method has no adapter"),
        ("train.prompt_learning_rate", {"method": "lora"}, "the method has no prompt"),
        ("train.task_prompt_learning_rate", {"method": "lora"}, "the method has no prompt"),
        ("train.architecture_learning_rate", {"method": "lora+prefix"}, "nothing is searched"),
        ("train.finetune_fraction", {"architecture": "random:1"}, "nothing is searched"),
        ("prompt.entropy_weight", {"architecture": "random:1"}, "nothing is searched"),
        ("prompt.width", {"architecture": "found"}, "the architecture that is imported says what it is"),
    ],
)
def test_a_key_that_would_change_nothing_is_refused(
    tmp_path: Path, key: str, changes: dict[str, Any], reason: str
) -> None:
    if changes.get("architecture") == "found":
        changes = {"architecture": found_architecture()}
    section = {"ranges": {key: {"low": 0.1, "high": 0.2} if key != "prompt.width" else [8, 16]}}
    base: dict[str, Any] = {"set": {}} | changes
    with pytest.raises(ValueError, match=f"tune.ranges.{key} would change nothing: {reason}; leave it out"):
        Recipe.model_validate(recipe(tmp_path, tune=section, **base))
    assert key not in default_ranges(Recipe.model_validate(recipe(tmp_path, **base)))


def found_architecture() -> dict[str, Any]:
    shape = ModelShape((AttentionSlot(1, 12),) * 2, 24)
    return Architecture.random(peml.PrefixNAS(num_virtual_tokens=4), shape, 0).to_dict()


def test_sizes_of_a_drawn_architecture_can_be_tuned_and_those_of_a_found_one_cannot(tmp_path: Path) -> None:
    drawn = default_ranges(Recipe.model_validate(recipe(tmp_path, set={}, architecture="random:1")))
    assert {"prompt.width", "prompt.num_cells", "prompt.num_virtual_tokens"} <= set(drawn)
    found = default_ranges(Recipe.model_validate(recipe(tmp_path, set={}, architecture=found_architecture())))
    assert set(found) == {"train.learning_rate", "train.prompt_learning_rate", "adapter.r"}


def test_a_search_on_rows_of_its_own_is_tuned_around_its_own_rate(tmp_path: Path) -> None:
    base = Recipe.model_validate(recipe(tmp_path, regime="alternate"))
    wanted = default_ranges(base)["train.architecture_learning_rate"]
    assert (wanted.low, wanted.high) == (3e-5, 3e-3)  # type: ignore[union-attr]
    assert own_values(base, {"train.architecture_learning_rate": wanted}) == {"train.architecture_learning_rate": 3e-4}


def test_rows_that_a_run_is_measured_on_do_not_choose_its_values(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, held_out=0.2)
    with pytest.raises(PemlError, match="held_out takes the rows that trials are measured on: leave it out"):
        tune(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistake_of_the_recipe_itself_stops_at_once(tmp_path: Path) -> None:
    path = tuned(tmp_path)
    write_rows(tmp_path / "train.jsonl", [{"text": "big red cat", "big": True}] * 20)
    with pytest.raises(PemlError, match="color"):
        tune(path, tmp_path / "out")
    with pytest.raises(PemlError, match="cannot be attached"):
        tune(write_recipe(tmp_path, set={"target_modules": ["nothing"]}, method="lora"), tmp_path / "out")
    with pytest.raises(PemlError, match="--trials must be 1 or more, not 0"):
        tune(path, tmp_path / "out", trials=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_ranges_that_it_takes(tmp_path: Path, name: str) -> None:
    base = Recipe.model_validate(recipe(tmp_path, method=name, set={}))
    found = default_ranges(base)
    assert found and all(key.startswith(("train.", "adapter.", "prompt.")) for key in found)
    checked = Recipe.model_validate(recipe(tmp_path, method=name, set={}, tune={"ranges": found}))
    assert checked.tune is not None and checked.tune.ranges == found
    # The recipe as it stands is the first trial, as far as it lies in the ranges.
    own = own_values(base, found)
    assert {key for key in found if key.startswith("train.")} <= set(own)


def test_what_the_recipe_sets_is_not_tuned_unless_it_asks_for_it(tmp_path: Path) -> None:
    own = {"adapter": {"r": 2}, "prompt.width": 8}
    found = default_ranges(Recipe.model_validate(recipe(tmp_path, set=own)))
    assert "adapter.r" not in found and "prompt.width" not in found and "prompt.num_cells" in found
    assert found["train.learning_rate"].low == pytest.approx(1e-3)  # type: ignore[union-attr]


def test_held_out_rows_are_training_rows_and_no_others(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"n": n} for n in range(40)])
    write_rows(tmp_path / "eval.jsonl", [{"n": -1}])

    def of(split: Any, **settings: Any) -> list[int]:
        return [row["n"] for row, _ in FileSource(train=path, **settings).rows(split)]

    files = {"eval": tmp_path / "eval.jsonl"}
    for settings in (files, {}, files | {"limit_train": 20}):
        plain = of("train", **settings)
        for held, size in ((0.25, round(len(plain) * 0.25)), (7, 7)):
            split = settings | {"held_out": held}
            train, measured = of("train", **split), of("eval", **split)
            assert len(measured) == size and not set(train) & set(measured) and sorted(train + measured) == plain
            assert of("eval", **split, seed=1) != measured and of("eval", **split) == measured
    assert of("eval", **files, held_out=10, limit_eval=3) != of("eval", **files) == [-1]
    assert len(of("eval", **files, held_out=10, limit_eval=3)) == 3
    examples = {"kind": "generate", "prompt": "{{ n }}", "answer": "n", "few_shot": 2}
    plain, held = (Task(name="t", source=FileSource(train=path, **files, held_out=h), **examples) for h in (None, 10))  # type: ignore[arg-type]
    assert plain.shots() == held.shots(), "the examples in a prompt are those of the training itself"
    with pytest.raises(PemlError, match="rows that are streamed cannot be held out"):
        FileSource(train=path, **files, held_out=0.1, streaming=True)  # type: ignore[arg-type]


def test_held_out_rows_without_a_part_are_measured_as_a_whole(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": ("no", "yes")[n % 2]} for n in range(20)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    parts = write_rows(tmp_path / "eval.jsonl", [row | {"part": "near"} for row in rows])
    source = FileSource(train=path, eval=parts, held_out=6)
    settings = {"kind": "choose", "prompt": "{{ text }}", "answer": "label", "choices": ["no", "yes"], "group": "part"}
    whole = Task(name="t", source=source, metrics=("accuracy", "accuracy/near"), score=("accuracy/near",), **settings)  # type: ignore[arg-type]
    held = whole.examples("eval")
    assert len(held) == 6 and {example.group for example in held} == {""}
    assert measure(whole, [example.answer for example in held], held) == {"accuracy": 1.0, "score": 1.0}
    with pytest.raises(PemlError, match="no row belongs to a group"):
        measure(dataclasses.replace(whole, source=FileSource(train=path, eval=parts)), ["no"] * 6, held)
    # Rows that are one answer together cannot be measured apart.
    together = dataclasses.replace(whole, metrics=("group_exact_match",), score=("group_exact_match",))
    with pytest.raises(PemlError, match="`group` names the field 'part', which the row lacks"):
        together.examples("eval")


def test_trials_are_trained_and_the_best_is_a_recipe(tmp_path: Path) -> None:
    path = tuned(tmp_path, trials=3, ranges={"train.learning_rate": RATE, "adapter.r": [2, 4]})
    (tmp_path / "eval.jsonl").unlink()  # the evaluation rows are not even read
    folder = tune(path, tmp_path / "out")
    record = folder.read_summary()
    trials = record["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert trials[0]["values"] == {"train.learning_rate": 1e-2, "adapter.r": 2}, "the recipe as it stands"
    best = max((t for t in trials if t["state"] == "complete"), key=lambda t: t["value"])
    assert trials[record["best"]]["value"] == best["value"]
    assert len(trials[0]["measured"]) == measurements(trial_recipe(module.with_section(load_recipe(path)), {})) == 5
    for number in (0, record["best"]):
        run = folder.trial(number)
        metrics = run.read_metrics()
        assert metrics["average"]["after"] == trials[number]["value"] and metrics["data"]["rows"]["size"] == [48, 12]
        assert not run.adapter.exists() and not run.checkpoints.exists()
    assert record["bill"]["wall_seconds"] == pytest.approx(sum(t["seconds"] for t in trials), abs=1e-2)

    write_rows(tmp_path / "eval.jsonl", rows(20, seed=2))
    found = load_recipe(folder.best)
    assert found.tune is None and found.held_out is None and found.evaluate_before
    values = trials[record["best"]]["values"]
    assert (
        found.train["learning_rate"] == values["train.learning_rate"] and found.set["adapter.r"] == values["adapter.r"]
    )
    assert found.tuned is not None
    assert found.tuned.model_dump() == {
        "trials": 3,
        "wall_seconds": record["bill"]["wall_seconds"],
        "device_hours": record["bill"]["device_hours"],
        "metric": "average",
        "value": trials[record["best"]]["value"],
    }
    run = module.regimes.train(found, tmp_path / "run")
    metrics = run.read_metrics()
    assert metrics["data"]["rows"]["size"] == [60, 20] and metrics["bill"]["tuning"]["trials"] == 3
    assert metrics["bill"]["total"]["wall_seconds"] > record["bill"]["wall_seconds"]
    assert "% of the budget of" in run.picture.read_text()
    assert "tuned:" in run.recipe.read_text()
    with pytest.raises(PemlError, match="already holds files"):
        tune(path, tmp_path / "out")


def test_a_run_that_grows_is_tuned_on_the_rows_that_it_trains_on(
    tmp_path: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    original = module.prepare

    def spy(own: Recipe, **settings: Any) -> Workbench:
        trained.append(settings["trained"])
        return original(own, **settings)

    monkeypatch.setattr(module, "prepare", spy)
    quick(near(1e-2))
    grow = {"name": "grow", "run": "earlier", "tasks": ["color"]}
    for freeze, wanted in (("shared", ["color"]), ("none", ["size", "color"])):
        path = write_recipe(tmp_path, regime=grow | {"freeze": freeze}, tune={"held_out": 12, "ranges": RANGES})
        tune(path, tmp_path / freeze, trials=1)
        assert trained.pop() == wanted


def test_weights_are_kept_when_asked_for_and_a_tuning_is_overwritten(tmp_path: Path) -> None:
    path = tuned(tmp_path, trials=1)
    folder = tune(path, tmp_path / "out", keep_adapters=True)
    assert (folder.trial(0).adapter / "adapter_model.safetensors").exists()
    tune(path, tmp_path / "out", overwrite=True)
    assert len(folder.read_summary()["trials"]) == 1 and not folder.trial(0).adapter.exists()


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_a_tuning_that_goes_on_tries_what_a_whole_one_does(tmp_path: Path, quick: Any, pruner: str) -> None:
    path = tuned(tmp_path, pruner=pruner)
    quick(near(1e-2))
    whole = tune(path, tmp_path / "whole", trials=12)
    first = tried(tune(path, tmp_path / "parts", trials=5))
    quick(near(1e-2), kill_at=4)
    with pytest.raises(KeyboardInterrupt):
        tune(path, tmp_path / "parts", trials=12, resume=True)
    quick(near(1e-2))
    parts = tune(path, tmp_path / "parts", trials=12, resume=True)
    assert tried(parts) == tried(whole) and tried(parts)[:5] == first
    states = [trial["state"] for trial in tried(whole)]
    assert set(states) == ({"complete"} if pruner == "none" else {"complete", "pruned"})
    quick(near(1e-2))
    other = tune(tuned(tmp_path, pruner=pruner, seed=1), tmp_path / "other", trials=3)
    assert tried(other)[1:] != tried(whole)[1:3]


def test_tpe_comes_nearer_than_the_first_half_did(tmp_path: Path, quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = quick(near(3e-3))
    monkeypatch.setattr(summary, "ENOUGH", 10)
    folder = tune(tuned(tmp_path, pruner="none"), tmp_path / "out", trials=24)
    off = [abs(math.log10(own.train["learning_rate"] / 3e-3)) for own in seen]
    assert sum(off[12:]) < sum(off[:12]) / 2
    shares = folder.read_summary()["importances"]
    assert max(shares, key=shares.get) == "train.learning_rate" and sum(shares.values()) == pytest.approx(1, abs=1e-2)


def test_a_trial_that_falls_behind_is_stopped_and_billed(tmp_path: Path, quick: Any) -> None:
    seen = quick(lambda own, number: 0.0 if own.set["adapter.r"] == 8 else number / 5)
    folder = tune(tuned(tmp_path), tmp_path / "out", trials=16)
    trials = tried(folder)
    stopped = [trial for trial in trials if trial["state"] == "pruned"]
    assert stopped and all(trial["values"]["adapter.r"] == 8 and len(trial["measured"]) < 5 for trial in stopped)
    assert all(len(trial["measured"]) == measurements(seen[0]) for trial in trials if trial["state"] == "complete")
    assert folder.read_summary()["bill"]["trials"] == 16
    assert folder.read_summary()["best"] not in [trial["number"] for trial in stopped]
    table = trials_table(folder.read_summary())
    assert table.row_count == 10 and "adapter.\nr" in [str(column.header) for column in table.columns]


@pytest.mark.parametrize("kind", [PemlError, RuntimeError])
def test_a_trial_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, quick: Any, kind: type[Exception]) -> None:
    def diverges(own: Recipe, number: int) -> float:
        if own.set["prompt.temperature"] == [1.0, 0.3]:
            raise kind("training diverged:\n lower the learning rates")
        return 0.5

    quick(diverges)
    folder = tune(tuned(tmp_path), tmp_path / "out", trials=8)
    trials = tried(folder)
    failed = [trial for trial in trials if trial["state"] == "fail"]
    assert 0 < len(failed) < 8 and {trial["error"] for trial in failed} == {
        "training diverged: lower the learning rates"
    }
    assert all(trial["values"]["prompt.temperature"] == [1.0, 0.3] and trial["value"] is None for trial in failed)

    def fails(own: Recipe, number: int) -> float:
        raise PemlError("nothing works")

    quick(fails)
    with pytest.raises(PemlError, match="no trial in .* came to its end; the first: nothing works"):
        tune(tuned(tmp_path), tmp_path / "none", trials=2)
    assert [trial["state"] for trial in tried(TuneFolder(tmp_path / "none"))] == ["fail", "fail"]
    assert not (tmp_path / "none" / "best.yaml").exists()


def test_a_metric_of_one_task_and_a_loss_can_be_chosen_by(tmp_path: Path, quick: Any) -> None:
    quick(near(1e-2))
    folder = tune(tuned(tmp_path, metric="color/loss", pruner="none"), tmp_path / "out", trials=6)
    record = folder.read_summary()
    assert record["direction"] == "minimize"
    assert record["trials"][record["best"]]["value"] == min(trial["value"] for trial in record["trials"])


def test_a_measurement_that_is_no_number_fails_its_trial_alone(tmp_path: Path, quick: Any) -> None:
    quick(lambda own, number: math.nan if own.set["adapter.r"] == 8 and number == 2 else 0.5)
    folder = tune(tuned(tmp_path), tmp_path / "out", trials=8)
    failed = [trial for trial in tried(folder) if trial["state"] == "fail"]
    assert failed and all(trial["values"]["adapter.r"] == 8 and len(trial["measured"]) == 1 for trial in failed)
    assert {trial["error"] for trial in failed} == {"training diverged: average is no number at measurement 2"}


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_two_at_once_do_not_share_a_folder(tmp_path: Path, quick: Any, flag: str) -> None:
    path, out = tuned(tmp_path), tmp_path / "out"
    quick(near(1e-2))
    tune(path, out, trials=1)

    def second(own: Recipe, number: int) -> float:
        with pytest.raises(PemlError, match="another `peml tune` is at work in .*out: wait, or choose another"):
            tune(path, out, trials=3, **{flag: True})
        return 0.5

    quick(second)
    assert len(tried(tune(path, out, trials=2, resume=True))) == 2


def test_a_study_that_was_lost_or_is_of_another_tuning(tmp_path: Path, quick: Any) -> None:
    path = tuned(tmp_path)
    quick(near(1e-2))
    whole = tune(path, tmp_path / "out", trials=3)
    before = tried(whole)
    for stage in ("stages/prompt", "."):
        RunFolder(whole.trial(2).path / stage).path.mkdir(parents=True, exist_ok=True)
        RunFolder(whole.trial(2).path / stage).append_log({"step": 1, "elapsed_seconds": 5.0})
    whole.study.unlink()
    again = tune(path, tmp_path / "out", trials=3, resume=True)
    assert tried(again) == before, "trials whose record is lost are made again, in clean folders"
    assert again.read_summary()["bill"]["lost_seconds"] == 7 + 7 + 5 + 5
    other = tune(tuned(tmp_path, seed=5), tmp_path / "other", trials=2)
    again.study.write_bytes(other.study.read_bytes())
    with pytest.raises(PemlError, match="the recipe is not that which .*study.db was begun with"):
        tune(tuned(tmp_path), tmp_path / "out", resume=True)


def test_a_run_is_no_tuning(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, method="lora", set={}, tune={"held_out": 12, "trials": 1, "pruner": "none"})
    whole = module.with_section(load_recipe(path))
    run = RunFolder(tmp_path / "run")
    run.create()
    run.recipe.write_text(whole.to_yaml())
    run.write_json(run.metrics, {})
    with pytest.raises(PemlError, match="holds a run and no tuning: there is nothing to resume"):
        tune(path, run.path, resume=True)
    with pytest.raises(PemlError, match="holds no tuning: it is not overwritten"):
        tune(path, run.path, overwrite=True)
    assert {file.name for file in run.path.iterdir()} == {"recipe.yaml", "metrics.json"}


def test_only_the_same_tuning_goes_on(tmp_path: Path, quick: Any) -> None:
    quick(near(1e-2))
    path = tuned(tmp_path)
    tune(path, tmp_path / "out", trials=2)
    with pytest.raises(PemlError, match=r"another recipe \(tune.seed differs\)"):
        tune(tuned(tmp_path, seed=3), tmp_path / "out", resume=True)
    path = tuned(tmp_path)
    write_rows(tmp_path / "train.jsonl", rows(60, seed=9))
    with pytest.raises(PemlError, match="the rows are not those"):
        tune(path, tmp_path / "out", resume=True)
    path = tuned(tmp_path)
    (tmp_path / "out" / "study.db").write_bytes(b"no database" * 99)
    with pytest.raises(PemlError, match=r"study\.db is damaged"):
        tune(path, tmp_path / "out", resume=True)
    run = module.TuneFolder(tmp_path / "run")
    run.run.create()
    (tmp_path / "run" / "recipe.yaml").write_text((tmp_path / "out" / "recipe.yaml").read_text())
    with pytest.raises(PemlError, match="holds no tuning: it is not overwritten"):
        tune(path, tmp_path / "run", overwrite=True)


def test_several_processes_and_a_missing_library_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "optuna", None)
        with pytest.raises(PemlError, match=r"tuning needs Optuna: pip install 'peml\[tune\]'"):
            tune(path, tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PemlError, match="runs in one process"):
        tune(path, tmp_path / "out")


def test_trials_are_measured_on_the_way_unless_nothing_is_pruned(tmp_path: Path) -> None:
    def of(train: Mapping[str, Any], **section: Any) -> Recipe:
        base = recipe(tmp_path, tune={"ranges": RANGES, **section})
        return trial_recipe(Recipe.model_validate(base | {"train": base["train"] | train}), {})

    assert of({"max_steps": 300}).train["eval_steps"] == 61 and measurements(of({"max_steps": 300})) == 5
    assert of({}, steps=50).train["max_steps"] == 50 and of({}, steps=50).train["eval_steps"] == 11
    assert "eval_strategy" not in of({}, pruner="none").train and measurements(of({}, pruner="none")) == 1
    assert of({"eval_strategy": "steps", "eval_steps": 4}).train["eval_steps"] == 4
    best = of({"metric_for_best_model": "eval_average", "max_steps": 100})
    assert "eval_strategy" not in best.train and "save_strategy" not in best.train and measurements(best) == 11
    assert of({}).held_out == 0.1 and not of({}).evaluate_before and of({}).tune is None


def test_a_tuning_that_was_killed_goes_on(tmp_path: Path) -> None:
    base = recipe(tmp_path)["train"] | {"max_steps": 6}
    path = write_recipe(tmp_path, train=base, tune={"ranges": RANGES, "trials": 4, "held_out": 12})
    whole = tune(path, tmp_path / "whole")
    killed = TuneFolder(tmp_path / "killed")
    command = [sys.executable, "-m", "peml", "tune", str(path), "--output", str(killed.path), "--resume"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 300
        # In the middle of the third trial: two are stored, and its log has a whole line, which says what is lost.
        log = killed.trial(2).log
        while not (log.exists() and b"\n" in log.read_bytes()) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(killed.read_summary()["trials"]) == 2
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert tried(killed) == tried(whole)
    bill = killed.read_summary()["bill"]
    assert 0 < bill["lost_seconds"] < bill["wall_seconds"]
    assert json.dumps(yaml.safe_load(killed.best.read_text())["set"]) == json.dumps(
        yaml.safe_load(whole.best.read_text())["set"]
    )
