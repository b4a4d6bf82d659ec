"""The rows that a training sees: the same for the same seed, whoever loads them and wherever it was interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peml.regimes import train
from peml.training import RunFolder
from peml.training.recipe import Recipe
from peml.training.trainer import MultiTaskTrainer
from stream_worker import DIES, SAVED, STEPS
from workshop import recipe, write_model

MIXINGS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "fixed ratio": {"by": "fixed_ratio", "weights": {"size": 3, "color": 1}},
    "limited": {"by": "equal", "epochs": {"size": 0.5}, "batches": "homogeneous"},
    "subset": {"by": "subset"},
}


class Killed(BaseException):
    pass


def stream(
    folder: Path, name: str, mixing: dict[str, Any], dies_at: int | None = None, resume: bool = False, **more: Any
) -> list[Any]:
    """Ids and tasks of every batch, in order."""
    seen: list[Any] = []
    original = MultiTaskTrainer.training_step

    def spy(self: MultiTaskTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(seen) == dies_at:
            raise Killed
        seen.append((inputs["tasks"], inputs["input_ids"].tolist()))
        return original(self, model, inputs, *args, **kwargs)

    if not (folder / "model").exists():
        write_model(folder / "model")
    data = recipe(folder, method="lora", set={}, mixing=mixing, evaluate_before=False)
    # 120 rows, 15 batches an epoch: the interruption is inside the second.
    data["train"] |= {"max_steps": 22, "save_steps": 6, **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "training_step", spy)
        train(Recipe.model_validate(data), RunFolder(folder / name).path, resume=resume)
    return seen


SLOW = ("temperature", "subset")


@pytest.mark.parametrize(
    "mixing", [pytest.param(m, id=n, marks=[pytest.mark.slow] * (n in SLOW)) for n, m in MIXINGS.items()]
)
def test_an_interrupted_run_goes_on_at_the_exact_row(tmp_path: Path, mixing: dict[str, Any]) -> None:
    whole = stream(tmp_path, "whole", mixing)
    assert len(whole) == 22
    with pytest.raises(Killed):
        stream(tmp_path, "broken", mixing, dies_at=20)
    assert stream(tmp_path, "broken", mixing, resume=True) == whole[18:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    alone = stream(tmp_path, "0", {})
    for workers in (1, 2):
        assert stream(tmp_path, str(workers), {}, dataloader_num_workers=workers) == alone


def test_a_training_longer_than_its_epochs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="mixing.epochs lets the tasks give 120 rows in all"):
        stream(tmp_path, "run", {"epochs": 1})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_go_on_at_the_exact_row(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for what in ("whole", "broken", "resumed"):
        command = [*launch, str(Path(__file__).with_name("stream_worker.py")), str(tmp_path), what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert (done.returncode == 0) == (what != "broken"), done.stderr[-2000:]
    for rank in range(2):
        whole, resumed = (json.loads((tmp_path / f"{what}-{rank}.json").read_text()) for what in ("whole", "resumed"))
        assert len(whole) == STEPS and whole[8:] != whole[: STEPS - 8], "epochs differ"
        assert resumed == whole[DIES - DIES % SAVED :]
