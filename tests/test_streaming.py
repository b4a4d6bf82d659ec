"""Tasks whose rows are read as they are needed: the same rows for any number of workers, and after an interruption."""

from __future__ import annotations

import pickle
import shutil
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from peml import PemlError
from peml.regimes import train
from peml.training.recipe import load_recipe
from peml.training.streaming import StreamedRows, training_rows
from peml.training.workbench import prepare
from workshop import recipe, rows, write_model, write_rows


def streamed(folder: Path, **changes: Any) -> Path:
    """A recipe of which one task is streamed."""
    if not (folder / "model").exists():
        write_model(folder / "model")
    data = recipe(folder)
    data["tasks"][0]["streaming"] = True
    data |= {"method": "mtl-lora", "set": {"adapter.r": 2}, "mixing": {"by": "equal"}} | changes
    data["train"] |= {"max_steps": 20, "save_steps": 10}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_a_stream_gives_pass_after_pass_in_any_order_of_asking(tmp_path: Path) -> None:
    bench = prepare(load_recipe(streamed(tmp_path)))
    data = training_rows(bench)
    assert isinstance(data, StreamedRows) and len(data) == 60  # of the other task
    task, (stream,) = bench.tasks["size"], data.streams.values()
    passes = chain.from_iterable(task.stream("train", number=number) for number in range(3))
    wanted = [stream.encode(example).input_ids for example in islice(passes, 150)]
    assert [stream[i].input_ids for i in range(150)] == wanted
    assert wanted[:60] != wanted[60:120] and sorted(wanted[:60]) == sorted(wanted[60:120])
    for place in (7, 9, 149, 3, 61):
        assert stream[place].input_ids == wanted[place]
    assert pickle.loads(pickle.dumps(stream))[5].input_ids == wanted[5]
    assert training_rows(bench).digest() == data.digest()


@pytest.mark.parametrize(
    "mixing", [{"by": "equal"}, {"by": "weights", "weights": {"size": 3, "color": 1}}, {"by": "subset"},
               {"by": "fixed_ratio"}, {"by": "equal", "batches": "homogeneous"}],
)  # fmt: skip
def test_workers_do_not_change_the_rows(tmp_path: Path, mixing: dict[str, Any]) -> None:
    loaded = load_recipe(streamed(tmp_path, mixing=mixing))
    data = training_rows(prepare(loaded))
    assert isinstance(data, StreamedRows)
    seen = []
    for workers in (0, 2):
        sampler = data.sampler(loaded.build_mixing(), 0, 8, 160)
        loader = DataLoader(data, 8, sampler=sampler, num_workers=workers, collate_fn=list)
        seen.append([[(row["tasks"], row["input_ids"]) for row in batch] for batch in loader])
    assert seen[0] == seen[1] and len(seen[0]) == 20
    drawn = [task for batch in seen[0] for task, _ in batch]
    share = {"weights": 0.75}.get(mixing["by"], 0.5)
    assert abs(drawn.count(0) / len(drawn) - share) < 0.11


def test_a_streamed_training_goes_on_at_the_exact_row(tmp_path: Path) -> None:
    path = streamed(tmp_path)
    whole = train(path, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    for name in ("recipe.yaml", "log.jsonl"):
        shutil.copy(whole.path / name, tmp_path / "cut" / name)
    shutil.copytree(whole.checkpoints / "checkpoint-10", tmp_path / "cut" / "checkpoints" / "checkpoint-10")
    train(path, tmp_path / "cut", resume=True)
    first, second = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (whole.path, tmp_path / "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    metrics = whole.read_metrics()
    assert metrics["data"]["rows"]["size"] == [None, 20] and set(metrics["train_loss"]) == {"size", "color"}


def test_what_a_stream_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        PemlError, match=r"mixing.by: temperature asks how many rows task 'size' has, which is streamed"
    ):
        train(streamed(tmp_path, mixing={"by": "temperature"}), tmp_path / "run")
    with pytest.raises(PemlError, match=r"mixing.epochs asks how many rows"):
        train(streamed(tmp_path, mixing={"by": "equal", "epochs": 2}), tmp_path / "run")
    with pytest.raises(PemlError, match="no known number of rows, and balance: coba sets rows apart"):
        train(streamed(tmp_path, balance="coba"), tmp_path / "run")
    path = streamed(tmp_path)
    data = yaml.safe_load(path.read_text())
    data["tasks"][0].pop("eval_path")
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(PemlError, match="a stream cannot be split: give it evaluation rows of its own"):
        train(path, tmp_path / "run")
    path = streamed(tmp_path)
    write_rows(tmp_path / "train.jsonl", [*rows(40, 1), {"text": "big cat"}, *rows(2, 1)])
    with pytest.raises(PemlError, match=r"train.jsonl:41: task 'size'"):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
