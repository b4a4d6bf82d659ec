"""The end of a search: the gap it leaves, its bill, its traces, and tasks that collapse."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

import peml
from peml import PemlError
from peml.prompts import Architecture
from peml.training import MultiTaskTrainer, RunFolder
from peml.training.bill import bill_line, bill_of, search_bill
from peml.training.collapse import _constant as constant_answers
from peml.training.collapse import collapsed, majority_scores
from peml.training.recipe import Recipe
from peml.training.search import SearchSchedule, gap_of, steps_of_search
from test_regimes_search import run, weights
from workshop import killed_in_step, recipe, rows, write_rows


def entries(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.log.read_text().splitlines()]


def derived(folder: RunFolder) -> list[dict[str, Any]]:
    return [entry for entry in entries(folder) if "derive/step" in entry]


def test_the_gap_is_what_the_evaluation_says_on_either_side(tmp_path: Path) -> None:
    seen: list[tuple[bool, dict[str, dict[str, float]]]] = []
    original = MultiTaskTrainer._measure

    def spy(self: MultiTaskTrainer) -> Any:
        scores = original(self)
        # Far apart, so that what is logged of either cannot be the other.
        scores["size"]["score"] = 0.9 - 0.25 * len(seen)
        seen.append((self.tuner.prompt.searching, scores))
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "_measure", spy)
        folder = run(tmp_path, "run", "joint")
    assert [searching for searching, _ in seen] == [True, False]
    gap = folder.read_metrics()["search"]["gap"]
    assert gap["step"] == 9 and [gap[when]["tasks"] for when in ("before", "after")] == [own for _, own in seen]
    lost = 100 * (seen[0][1]["color"]["score"] - seen[1][1]["color"]["score"])
    assert gap["lost"]["tasks"] == {"size": pytest.approx(25), "color": pytest.approx(lost)}
    assert gap["lost"]["average"] == pytest.approx((25 + lost) / 2)
    (entry,) = derived(folder)
    assert entry["step"] == 9 and entry["derive/before/size/score"] == 0.9
    assert "derive/after/color/loss" in entry and entry["derive/lost"] == gap["lost"]["average"]
    assert json.loads(folder.architecture.read_text())["origin"]["gap"] == gap["lost"]["average"]


def test_names_with_slashes_are_told_apart() -> None:
    record = {"derive/step": 3.0, "derive/lost": 1.0}
    for when in ("before", "after"):
        record |= {f"derive/{when}/average": 0.5, f"derive/{when}/a/b/score": 0.5, f"derive/{when}/a/b/f1/group": 0.1}
    gap = gap_of(record, ["a/b"])
    assert gap is not None and gap["before"]["tasks"] == {"a/b": {"score": 0.5, "f1/group": 0.1}}
    assert gap_of({"derive/step": 3.0}, ["a"]) is None


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_search_without_steps_is_refused(share: float) -> None:
    with pytest.raises(PemlError, match=f"finetune_fraction must be 0 or more and below 1, not {share}"):
        SearchSchedule(None, share)  # type: ignore[arg-type]


def test_it_need_not_be_measured_and_nothing_need_follow(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "joint", train={"measure_gap": False, "after_search": "keep"})
    metrics = folder.read_metrics()
    assert "search" not in metrics and metrics["architecture"]["derived"]
    (entry,) = derived(folder)
    assert entry["derive/step"] == 10 and not any(key.startswith("derive/before") for key in entry)
    assert metrics["bill"]["training"]["steps"] == 0 and metrics["bill"]["search"]["steps"] == 10
    with pytest.raises(ValueError, match="after_search: keep leaves no step after the search: leave out finetune"):
        Recipe.model_validate(recipe(tmp_path, train={"after_search": "keep", "finetune_fraction": 0.3}))
    assert [steps_of_search(steps, 0.1) for steps in (1, 10, 1000)] == [1, 9, 900]


def test_a_search_that_is_kept_as_it_is_is_measured_too(tmp_path: Path) -> None:
    gap = run(tmp_path, "run", "joint", train={"after_search": "keep"}).read_metrics()["search"]["gap"]
    assert gap["step"] == 10 and set(gap["lost"]["tasks"]) == {"size", "color"}


@pytest.mark.parametrize("dies_at", [7, 10])
def test_record_and_bill_outlive_an_interruption(tmp_path: Path, dies_at: int) -> None:
    """Before the end of the search, and behind it."""

    train = {"save_steps": 3, "finetune_fraction": 0.4}
    whole = run(tmp_path, "whole", "joint", train=train)
    with killed_in_step(dies_at):
        run(tmp_path, "broken", "joint", train=train)
    folder = RunFolder(tmp_path / "broken")
    kept = [entry["elapsed_seconds"] for entry in entries(folder) if entry.get("checkpoint")]
    again = run(tmp_path, "broken", "joint", resume=True, train=train)
    one, two = whole.read_metrics(), again.read_metrics()
    assert one["search"] == two["search"] and len(derived(again)) == 1
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(whole).items())
    for metrics in (one, two):
        bill = metrics["bill"]
        assert [bill[part]["steps"] for part in ("search", "discretisation", "training", "total")] == [6, 0, 4, 10]
        assert bill["total"]["wall_seconds"] == pytest.approx(metrics["train_seconds"], abs=0.002)
        assert sum(bill[part]["share"] for part in ("search", "discretisation", "training")) == pytest.approx(
            1, abs=1e-3
        )
    # What was spent until the last checkpoint is in the bill, on top of what came after it.
    begun = [entry["elapsed_seconds"] for entry in entries(again) if entry["step"] > (6 if dies_at == 7 else 9)]
    assert kept and min(begun) >= max(kept)
    # Killed during the last evaluation: everything is there still.
    shutil.rmtree(again.adapter)
    again.write_json(again.metrics, {"data": two["data"]})
    last = run(tmp_path, "broken", "joint", resume=True, train=train).read_metrics()
    assert last["search"] == one["search"]
    assert last["bill"]["search"]["wall_seconds"] == two["bill"]["search"]["wall_seconds"]


def test_the_best_step_is_kept_with_the_record_of_the_search(tmp_path: Path) -> None:
    train = {"finetune_fraction": 0.4, "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2}
    folder = run(tmp_path, "run", "joint", train=train)
    metrics = folder.read_metrics()
    assert metrics["kept"]["step"] > 6 and metrics["search"]["gap"]["step"] == 6
    assert metrics["bill"]["search"]["steps"] == 6 and metrics["architecture"]["derived"]


def test_the_parts_add_up() -> None:
    counted = {"kind": "gpus", "count": 4}
    found = {
        "derive/step": 9.0,
        "derive/search_seconds": 90.0,
        "derive/seconds": 10.0,
        "derive/search_peak_bytes": 7e12,
    }
    first = bill_of(counted, 200.0, 20, found, {})
    assert [first[part]["wall_seconds"] for part in ("search", "discretisation", "training", "total")] == [
        90,
        10,
        100,
        200,
    ]
    assert first["search"]["device_hours"] == pytest.approx(0.1) and first["search"]["share"] == 0.45
    assert first["total"]["peak_memory_bytes"] == 7e12
    tuned = {"trials": 5, "wall_seconds": 300.0, "device_hours": 1.0}
    both = bill_of(counted, 200.0, 20, found, {}, tuned)
    assert both["total"]["wall_seconds"] == 500 and both["search"]["share"] == 0.18
    whole = bill_of(counted, 100.0, 10, {}, {"search": both}, tuned, origin={"search": {"wall_seconds": 3.0}})
    assert whole["search"]["wall_seconds"] == 90 and whole["search"]["steps"] == 9
    assert whole["stages"]["search"] == {
        "wall_seconds": 100.0, "device_hours": pytest.approx(0.111111, abs=1e-6), "steps": 11,
        "peak_memory_bytes": first["training"]["peak_memory_bytes"], "share": pytest.approx(100 / 600, abs=1e-4),
    }  # fmt: skip
    assert whole["tuning"]["trials"] == 5 and whole["tuning"]["share"] == 0.5
    assert whole["total"]["wall_seconds"] == 600 and whole["total"]["steps"] == 30
    assert whole["total"]["device_hours"] == pytest.approx(1 + 4 * 300 / 3600)
    parts = ("search", "discretisation", "training", "tuning")
    shares = [whole[part]["share"] for part in parts] + [whole["stages"]["search"]["share"]]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    line = bill_line(whole)
    assert "search 90 s (15%)" in line and "GPU-hours" in line and line.endswith("comes from a search of 3 s")
    assert set(search_bill(whole)) == {"devices", "search", "discretisation", "tuning", "total"}


def test_a_training_that_costs_nothing_has_shares(tmp_path: Path) -> None:
    bill = bill_of({"kind": "cpu threads", "count": 2}, 0.0, 0, {}, {})
    assert bill["training"]["share"] == 0 and "training 0 s" in bill_line(bill)


def test_memory_is_counted_from_the_beginning_of_the_training(tmp_path: Path) -> None:
    import peml.training.run as running

    calls: list[Any] = []
    step = MultiTaskTrainer.training_step

    def peak(reset: bool = False) -> int:
        calls.append(reset)
        return 1

    def spy(self: MultiTaskTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append("step")
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "peak_memory", peak)
        patch.setattr(MultiTaskTrainer, "training_step", spy)
        run(tmp_path, "run", "joint", method="lora", set={}, train={"max_steps": 2})
    assert calls == [True, "step", "step"]


def test_every_run_has_a_bill_and_the_command_line_shows_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from peml.cli import app
    from workshop import write_recipe

    train = recipe(tmp_path)["train"] | {"max_steps": 2}
    path = write_recipe(tmp_path, method="lora", set={}, evaluate_before=False, train=train)
    shown = CliRunner().invoke(app, ["train", str(path), "--output", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    bill = RunFolder(tmp_path / "run").read_metrics()["bill"]
    assert bill["search"]["steps"] == 0 and bill["training"]["steps"] == 2 and bill["training"]["share"] == 1
    assert "bill: training" in shown.output and "CPU-thread-hours" in shown.output


def test_the_architecture_is_there_when_the_search_has_ended(tmp_path: Path) -> None:
    """A training that is stopped afterwards leaves it behind."""

    with killed_in_step(10):
        run(tmp_path, "run", "joint")
    found = Architecture.load(tmp_path / "run" / "architecture.json")
    assert found.derived and found.origin["tasks"] == ["size", "color"]
    assert found.origin["steps"] == 9 and found.origin["seed"] == 0
    assert found.origin["bill"]["search"]["steps"] == 9 and found.origin["base"] == str(tmp_path / "model")


class Collect(TrainerCallback):
    """What reports to a board see."""

    seen: list[dict[str, float]] = []  # noqa: RUF012

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_callbacks_see_the_traces_while_the_search_is_open(tmp_path: Path) -> None:
    Collect.seen.clear()
    original = MultiTaskTrainer.__init__

    def watched(self: MultiTaskTrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Collect())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "__init__", watched)
        run(tmp_path, "run", "joint")
    losses = [logs for logs in Collect.seen if "loss" in logs]
    wanted = {"search/entropy", "search/temperature", "search/tokens/0", "search/tokens/1", "search/leading/1"}
    assert [wanted <= set(logs) for logs in losses] == [True] * 9 + [False]
    assert losses[0]["search/temperature"] > losses[8]["search/temperature"]
    assert all(isinstance(value, float) for logs in losses for key, value in logs.items() if "search/" in key)


def test_traces_reach_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, "run", "joint", train={"report_to": "tensorboard"})
    assert list((tmp_path / "run").rglob("events.out.*"))


# Collapse


def test_one_answer_for_every_row_is_what_a_task_has_to_beat(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "joint", method="lora", set={}, train={"max_steps": 1})
    bench, _ = peml.training.open_run(folder.path)
    # Of 8 training rows 5 are big; of 20 evaluation rows, whatever they are.
    train = [{"text": "big red cat", "big": i < 5, "color": "red" if i % 3 else "blue"} for i in range(8)]
    write_rows(tmp_path / "train.jsonl", train)
    held_out = rows(20, seed=2)
    from peml.training.workbench import prepare

    found = majority_scores(prepare(bench.recipe, base=(bench.tokenizer, bench.model)))
    assert found == {
        "size": pytest.approx(sum(row["big"] for row in held_out) / 20),
        "color": pytest.approx(sum(row["color"] == "red" for row in held_out) / 20),
    }
    assert collapsed(found, {"size": {"score": found["size"]}, "color": {"score": found["color"] + 0.01}}) == ["size"]
    assert collapsed({"size": 1.0}, {"size": {"score": 1.0}}) == [], "nothing is better than always right"
    assert majority_scores(bench) == {}, "without training rows nothing can be said"


def test_the_constant_answer_of_values_and_of_options_of_ones_own() -> None:
    from peml.tasks import Example, FileSource, Task

    source = FileSource(train="none.jsonl")
    values = Task(name="v", kind="regress", source=source, prompt="p", answer="a")

    def row(answer: str, choices: tuple[str, ...] = (), value: float | None = None) -> Example:
        return Example("t", "p", answer, choices, "here", value=value)

    assert (
        constant_answers(values, [row("1", value=1.0), row("4", value=4.0)], [row("0", value=0.0)] * 2) == ["2.5"] * 2
    )
    chosen = Task(name="c", kind="choose", source=source, prompt="p", answer="a", choices="options")
    train = [row("b", ("a", "b")), row("d", ("c", "d")), row("a", ("a", "b"))]
    assert constant_answers(chosen, train, [row("x", ("x", "y")), row("x", ("x",))]) == ["y", "x"]


def test_a_run_says_which_tasks_have_collapsed(tmp_path: Path) -> None:
    screen = io.StringIO()
    train = {"max_steps": 1, "learning_rate": 0.0}
    folder = run(tmp_path, "run", "joint", method="lora", set={}, console=Console(file=screen, width=200), train=train)
    metrics = folder.read_metrics()
    assert metrics["collapsed"] == [
        task for task, constant in metrics["majority"].items() if metrics["after"][task]["score"] <= constant
    ]
    assert "color" in metrics["collapsed"], "nobody taught it"
    assert "collapsed:" in screen.getvalue() and "color" in screen.getvalue()
