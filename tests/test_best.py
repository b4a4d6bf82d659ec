"""Early stopping, and the best checkpoint: by the average over tasks or by one of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peml.errors import PemlError
from peml.regimes import train
from peml.training import RunFolder, open_run
from peml.training.recipe import Recipe
from peml.training.trainer import MultiTaskTrainer
from workshop import killed_in_step, recipe, write_model


def scored(scores: list[float]) -> Callable[..., Any]:
    """An evaluation during training that gives what it is told, to `size`; `color` does ever better."""
    left = iter(scores)

    def evaluate(self: MultiTaskTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        value, step = next(left), self.state.global_step
        metrics = {"eval_size/accuracy": value, "eval_size/loss": -value, "eval_color/exact_match": step / 1000}
        metrics["eval_average"] = (value + step / 1000) / 2
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    return evaluate


def run(folder: Path, scores: list[float], method: str = "lora", resume: bool = False, **more: Any) -> RunFolder:
    data = recipe(folder, method=method, evaluate_before=False)
    if method == "lora":
        data["set"] = {}
    data["train"] |= {"max_steps": 20, **more}
    if not (folder / "model").exists():
        write_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "evaluate", scored(scores))
        return train(Recipe.model_validate(data), folder / "run", resume=resume)


def steps(folder: RunFolder) -> list[int]:
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [entry["step"] for entry in log if "eval_average" in entry]


def kept_is(folder: RunFolder, step: int) -> bool:
    names = [folder.adapter, folder.checkpoints / f"checkpoint-{step}"]
    one, two = (load_file(path / "adapter_model.safetensors") for path in names)
    return all(torch.equal(value, two[key]) for key, value in one.items())


def test_patience_stops_a_run_and_keeps_its_best_step(tmp_path: Path) -> None:
    folder = run(tmp_path, [0.1, 0.5, 0.2, 0.3, 0.9], early_stopping_patience=2)
    assert steps(folder) == [2, 4, 6, 8], "ten evaluations, were it not for the patience"
    metrics = folder.read_metrics()
    assert metrics["steps"] == 8 and kept_is(folder, 4)
    assert metrics["kept"] == {"step": 4, "metric": "eval_average", "value": pytest.approx(0.252)}
    assert json.loads(folder.log.read_text().splitlines()[-1])["kept"] == metrics["kept"]


def test_one_task_may_choose(tmp_path: Path) -> None:
    more = {"eval_steps": 5, "metric_for_best_model": "size/accuracy"}
    folder = run(tmp_path, [0.501, 0.5, 0.2, 0.5], **more)
    assert steps(folder) == [5, 10, 15, 20] and folder.read_metrics()["kept"]["step"] == 5


def test_a_loss_is_better_when_it_is_less(tmp_path: Path) -> None:
    folder = run(tmp_path, [0.1, 0.5, 0.2, 0.3], eval_steps=5, metric_for_best_model="eval_size/loss")
    assert folder.read_metrics()["kept"] == {"step": 10, "metric": "eval_size/loss", "value": -0.5}


def test_progress_below_the_threshold_is_none(tmp_path: Path) -> None:
    more = {"early_stopping_patience": 2, "early_stopping_threshold": 0.1}
    assert steps(run(tmp_path, [0.5, 0.51, 0.52, 0.53], eval_steps=2, **more)) == [2, 4, 6]


def test_epochs_are_evaluated_one_by_one(tmp_path: Path) -> None:
    data = recipe(tmp_path, method="lora", set={}, evaluate_before=False)
    del data["train"]["max_steps"]
    data["train"] |= {"num_train_epochs": 2, "load_best_model_at_end": True}
    arguments = Recipe.model_validate(data).training_arguments(str(tmp_path))
    assert arguments.eval_strategy == arguments.save_strategy == "epoch" and arguments.greater_is_better


def test_patience_outlives_an_interruption(tmp_path: Path) -> None:
    with killed_in_step(8):
        run(tmp_path, [0.5, 0.4, 0.3], early_stopping_patience=3)
    folder = run(tmp_path, [0.2, 0.9], early_stopping_patience=3, resume=True)
    assert steps(folder) == [2, 4, 6, 8] and folder.read_metrics()["kept"]["step"] == 2
    # Killed during the last evaluation: what had stopped stays stopped, and the best step is still the best.
    shutil.rmtree(folder.adapter)
    metrics = folder.read_metrics()
    folder.write_json(folder.metrics, {"data": metrics["data"]})
    again = run(tmp_path, [], early_stopping_patience=3, resume=True)
    assert again.read_metrics()["kept"]["step"] == 2 and again.read_metrics()["after"] == metrics["after"]
    assert kept_is(again, 2) and again.read_metrics()["steps"] == 8


def test_an_open_search_is_not_what_would_be_kept(tmp_path: Path) -> None:
    more = {"finetune_fraction": 0.4, "early_stopping_patience": 2}
    folder = run(tmp_path, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.45, 0.3, 0.2, 0.1], method="peml", **more)
    # The search ends before step 13: patience and choice begin at the evaluation of step 14.
    assert folder.read_metrics()["kept"]["step"] == 14 and folder.read_metrics()["steps"] == 18
    assert folder.read_metrics()["architecture"]["derived"] and kept_is(folder, 14)
    bench, model = open_run(folder.path)
    assert bench.evaluate(model) == folder.read_metrics()["after"]
    assert not model.base_model.prompt.searching


@pytest.mark.parametrize(
    ("train_with", "message"),
    [
        (
            {"metric_for_best_model": "rte/accuracy"},
            "must be one of eval_average, .*eval_size/accuracy.*'rte/accuracy'",
        ),
        ({"metric_for_best_model": "eval_size/acuracy"}, "did you mean eval_size/accuracy?"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be 1 or more"),
        ({"early_stopping_patience": 1, "load_best_model_at_end": False}, "leave out load_best_model_at_end"),
        ({"early_stopping_patience": 1, "eval_strategy": "no"}, "leave out eval_strategy"),
    ],
)
def test_what_cannot_choose_is_refused(tmp_path: Path, train_with: dict[str, Any], message: str) -> None:
    with pytest.raises((PemlError, ValueError), match=message):
        run(tmp_path, [], **train_with)
