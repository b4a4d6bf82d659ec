"""Accidents in one process: what goes wrong is said in one sentence, and what was stored stays whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints

import peml
from export_kit import write_run
from models import TASKS, adapt, tiny, tokens
from peml import PemlError
from peml.export import export_run
from peml.export.stock import UNFINISHED
from peml.regimes import train
from peml.training import RunFolder, load_recipe, open_run
from peml.training.folder import alone
from peml.training.steps import BalancedSteps
from workshop import recipe, write_model, write_recipe, write_rows

Called = Callable[..., tuple[int, str, str]]
Tried = Callable[..., None]
QUICK = {"method": "lora", "set": {}, "evaluate_before": False}


def written(folder: Path, steps: int = 6, **arguments: Any) -> Path:
    """A recipe of a short training without a search."""
    given = recipe(folder)["train"] | {"max_steps": steps, "save_steps": 2} | arguments
    return write_recipe(folder, **QUICK, train=given)


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def equal(one: RunFolder, other: RunFolder) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path, tried: Tried) -> None:
    path = written(tmp_path)
    run = train(path, tmp_path / "run")
    with alone(run.path, "`peml train`"), pytest.raises(PemlError, match="another `peml train` is at work in .*run"):
        train(path, run.path, overwrite=True)
    assert run.finished, "the one that came second has touched nothing"
    fresh = tmp_path / "fresh"
    with alone(fresh, "`peml train`"), pytest.raises(PemlError, match="another `peml train` is at work in .*fresh"):
        train(path, fresh)
    assert not RunFolder(fresh).is_run
    assert equal(train(path, fresh), run), "the lock of one that is gone stands in nobody's way"
    tried("a second training into a folder where one is at work: refused", 2)


def test_a_clock_that_is_set_back_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    path = written(tmp_path, save_total_limit=2)
    straight = train(path, tmp_path / "straight")
    rng, now = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() - 86400 * rng.random())

    def late(output_dir: str, **kwargs: Any) -> None:
        for checkpoint in Path(output_dir).glob("checkpoint-*"):  # the later, the older by its time
            os.utime(checkpoint, (1e9, 1e9 - 100 * int(checkpoint.name.rpartition("-")[2])))
        rotate_checkpoints(output_dir=output_dir, **kwargs)

    monkeypatch.setattr("peml.training.trainer.rotate_checkpoints", late)
    run = train(path, tmp_path / "run")
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert equal(run, straight) and run.read_metrics()["train_seconds"] >= 0
    tried("a clock that jumps back by up to a day, at every look at it", 1)


def test_a_gradient_that_is_no_number_is_named_and_the_last_good_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    path = written(tmp_path, steps=8, save_steps=3, logging_steps=100)
    straight = train(path, tmp_path / "straight")
    step = BalancedSteps.training_step

    def poisoned(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 4:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(BalancedSteps, "training_step", poisoned)
    with pytest.raises(PemlError, match=r"training diverged: .* holds what is no number at step 6"):
        train(path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["checkpoint-3"] and not run.adapter.exists()
    monkeypatch.undo()
    assert equal(train(path, run.path, resume=True), straight)
    tried("a gradient that is no number, in the middle of a training: named; the checkpoint before it goes on", 1)


def test_a_base_that_has_changed_is_refused(tmp_path: Path, tried: Tried) -> None:
    path = written(tmp_path)
    run = train(path, tmp_path / "run")
    assert open_run(run.path)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    write_model(tmp_path / "model", seed=1)
    with pytest.raises(PemlError, match=r"the weights in .*model are not those that the run in .*run was trained on"):
        open_run(run.path)
    shutil.rmtree(run.adapter)
    with pytest.raises(PemlError, match=r"are not those that the run in .*run was trained on"):
        train(path, run.path, resume=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(before)
    train(path, run.path, resume=True)
    # One number of one tensor, in a file small enough to be read whole.
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PemlError, match="are not those"):
        open_run(run.path)
    tried("a base model whose weights changed under an adapter, or under a checkpoint: refused", 3)


@pytest.mark.parametrize(
    ("version", "says"),
    [("99.0.0", "written by peml 99.0.0, and this is .*pip install -U peml"), ("soon", "is no version: 'soon'")],
)
def test_an_adapter_of_a_later_version_is_refused(tmp_path: Path, version: str, says: str, tried: Tried) -> None:
    run = RunFolder(write_run(tmp_path, "lora"))
    config = run.adapter / "adapter_config.json"
    stored = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(stored | {"peml_version": version, "a_key_of_the_future": 1}), encoding="utf-8")
    with pytest.raises(PemlError, match=says):
        open_run(run.path)
    tried("an adapter of a later version, with keys that this one does not know: refused", 1)


def said(ended: tuple[int, str, str]) -> str:
    """What the command line says of a mistake: one sentence and exit code 2."""
    code, _, errors = ended
    assert code == 2 and errors.count("error: ") == 1 and "Traceback" not in errors, errors
    return errors


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), MemoryError("1 GiB")], ids=repr
)
def test_out_of_memory_says_what_to_lower(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peml: Called, tried: Tried
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("peml.training.run.MultiTaskTrainer.train", full)
    errors = said(peml("train", written(tmp_path), "--output", tmp_path / "run"))
    assert "out of memory: below train lower per_device_train_batch_size" in errors and "1 GiB" in errors
    tried("memory that runs out in a training: one sentence that says what to lower", 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/sys cannot be written, even by root, on Linux alone")
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, peml: Called, tried: Tried) -> None:
    assert "/sys/run" in said(peml("train", written(tmp_path), "--output", "/sys/run"))
    run = write_run(tmp_path / "other", "lora")
    assert "/sys/lora" in said(peml("export", run, "--to", "lora", "--output", "/sys/lora"))
    tried("a folder that cannot be written, for a training and for an export: refused", 2)


def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path: Path, tried: Tried) -> None:
    run = write_run(tmp_path, "lora")
    left = tmp_path / f".out{UNFINISHED}{os.getpid()}"  # numbers of processes come again
    left.mkdir()
    (left / "half").write_text("half")
    done = export_run(run, "lora", output=tmp_path / "out")
    assert not left.exists() and not (done.folder / "half").exists()
    tried("an export where a killed one of the same process number has left its half", 1)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", [f"model: {DEEP}", "model: " + '{"a": ' * 50_000, "? " * 20_000, "\x00", "model: !!python/name:os.system"]
)
def test_a_recipe_that_is_none_is_one_sentence(text: str, tmp_path: Path, tried: Tried) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PemlError, match="recipe.yaml"):
        load_recipe(path)
    tried("recipes nested 100,000 deep, with control characters or with Python in them: one sentence", 1)


def test_rows_of_a_megabyte_and_of_all_scripts(tmp_path: Path, tried: Tried) -> None:
    path = written(tmp_path, steps=2)
    texts = ["red cat " * 130_000, "ß Ω 中文 \u202e عربى 👩‍👩‍👧 \u2028 \x7f", "e\u0301" * 50, "\ufeffbig dog", " "]
    write_rows(
        tmp_path / "train.jsonl", [{"text": text, "big": i % 2 == 0, "color": "red"} for i, text in enumerate(texts)]
    )
    run = train(path, tmp_path / "läuft 中文")
    assert run.finished and open_run(run.path)
    tried("rows of a megabyte, of right-to-left text, joined emoji, separators and byte order marks", len(texts))


def test_threads_with_different_tasks_on_one_model(tried: Tried) -> None:
    model = adapt(tiny(), peml.MTLLoRA(r=2), peml.PrefixTuning(3))
    inputs = {task: tokens(2) for task in TASKS}
    with torch.no_grad():
        expected = {task: model(input_ids=inputs[task], tasks=task).logits for task in TASKS}
    wrong: list[str] = []
    start = threading.Barrier(6)

    def ask(task: str) -> None:
        start.wait()
        for _ in range(15):
            with torch.no_grad():
                if not torch.equal(model(input_ids=inputs[task], tasks=task).logits, expected[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=ask, args=(task,)) for task in TASKS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    tried("forwards of three tasks in six threads on one model: each as if alone", 90)
