"""Killed at random instants, and a disk that is full: nothing that can be seen is torn, and what goes on ends the same."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kennel import Command
from safetensors.torch import load_file

from export_kit import write_run
from peml.training import RunFolder
from workshop import recipe, write_recipe

pytestmark = pytest.mark.hard

KILLS = int(os.environ.get("PEML_HARD_KILLS", "100"))
Tried = Callable[..., None]


def files(folder: Path) -> Iterator[Path]:
    """What may be read by others: hidden names are being written, and checkpoints are whole when their state is there."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts) and "checkpoints" not in parts:
            yield path


def check_whole(folder: Path) -> None:
    """Every file that can be seen can be read to its end; the log may end in the middle of a line."""
    for path in files(folder):
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".yaml":
            assert yaml.safe_load(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".svg":
            assert path.read_text(encoding="utf-8").rstrip().endswith("</svg>")
        elif path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                json.loads(line)
    for state in folder.rglob("trainer_state.json"):
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            continue  # it was being written: a checkpoint that is not believed
        assert load_file(state.parent / "adapter_model.safetensors")


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = [path for path in files(folder) if path.name == "adapter_model.safetensors"]
    return {str(path.relative_to(folder)): load_file(path) for path in found}


def assert_equal(one: Path, other: Path) -> None:
    """The same weights under the same names, bit for bit."""
    left, right = adapters(one), adapters(other)
    assert left.keys() == right.keys() and left
    for name, own in left.items():
        assert own.keys() == right[name].keys()
        assert all(torch.equal(value, right[name][key]) for key, value in own.items()), name


def killed_until(
    kills: int,
    straight: Path,
    begin: Callable[[Path, bool], list[str | Path]],
    same: Callable[[Path, Path], None],
) -> int:
    """Kill a command again and again, going on after each, and compare each end with that of one that nobody killed.

    Args:
        kills: how many.
        straight: folder of the one that runs to its end; others lie beside it.
        begin: the command for a folder, and whether to go on with what is there.
        same: compares two folders.

    Returns:
        How often it was killed at work.
    """
    said, rng = straight.with_suffix(".txt"), random.Random(kills)
    began = time.monotonic()
    whole = Command(begin(straight, False), said)
    assert whole.wait() == 0, whole.said()
    duration, done, number = time.monotonic() - began, 0, 0
    while done < kills:
        number += 1
        folder = straight.with_name(f"killed-{number}")
        for _ in range(rng.randint(1, 4)):
            command = Command(begin(folder, folder.exists()), said)
            done += command.kill_after(rng.uniform(0, duration))
            if folder.exists():
                check_whole(folder)
            if command.process.exitcode == 0 or done >= kills:
                break
            assert command.process.exitcode == -9, command.said()
        last = Command(begin(folder, folder.exists()), said)
        assert last.wait() == 0, last.said()
        check_whole(folder)
        same(folder, straight)
        shutil.rmtree(folder)
    return done


@pytest.mark.parametrize("method", ["lora", "peml"])
def test_training(method: str, tmp_path: Path, tried: Tried) -> None:
    base = recipe(tmp_path)
    settings = base["set"] if method == "peml" else {}
    arguments = base["train"] | {"max_steps": 20, "save_steps": 3, "logging_steps": 1, "save_total_limit": 2}
    path = write_recipe(tmp_path, method=method, set=settings, train=arguments, evaluate_before=False)
    kills = killed_until(
        max(1, 2 * KILLS // 5), tmp_path / "straight",
        lambda folder, again: ["train", path, "--output", folder, *(["--resume"] if again else [])], assert_equal,
    )  # fmt: skip
    tried(
        f"SIGKILL during `peml train`, method {method}; the end equals that of a run that nobody killed, bit for bit",
        kills,
    )


def test_tuning(tmp_path: Path, tried: Tried) -> None:
    pytest.importorskip("optuna", reason="needs the extra tune")
    arguments = recipe(tmp_path)["train"] | {"max_steps": 4, "logging_steps": 1}
    tune = {"ranges": {"train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}, "pruner": "none"}
    path = write_recipe(tmp_path, method="lora", set={}, train=arguments, evaluate_before=False, tune=tune)

    def same(one: Path, other: Path) -> None:
        best = [yaml.safe_load((folder / "best.yaml").read_text(encoding="utf-8")) for folder in (one, other)]
        assert best[0]["train"] == best[1]["train"]

    kills = killed_until(
        max(1, KILLS // 10), tmp_path / "straight",
        lambda folder, again: ["tune", path, "--trials", "2", "--output", folder, *(["--resume"] if again else [])], same,
    )  # fmt: skip
    tried("SIGKILL during `peml tune`; it goes on, and finds what one finds that nobody killed", kills)


@pytest.mark.parametrize("form", ["merged", "lora"])
def test_export(form: str, tmp_path: Path, tried: Tried) -> None:
    run = write_run(tmp_path, "lora")

    def same(one: Path, other: Path) -> None:
        names = [sorted(str(path.relative_to(folder)) for path in files(folder)) for folder in (one, other)]
        assert names[0] == names[1]
        for name in names[0]:
            if name.endswith(".safetensors"):
                left, right = load_file(one / name), load_file(other / name)
                assert all(torch.equal(left[key], right[key]) for key in right)

    def begin(folder: Path, again: bool) -> list[str | Path]:
        if again:  # it is there, so it is whole: an export does not go on
            same(folder, tmp_path / "straight")
            shutil.rmtree(folder)
        return ["export", run, "--to", form, "--output", folder]

    kills = killed_until(max(1, KILLS // 20), tmp_path / "straight", begin, same)
    tried(f"SIGKILL during `peml export --to {form}`; the folder is there whole or not at all", kills)


def test_comparison(tmp_path: Path, tried: Tried) -> None:
    arguments = recipe(tmp_path)["train"] | {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    compare = {"methods": {"lora": {"match": False}, "mtl-lora": {"match": False}}, "seeds": 2}
    path = write_recipe(tmp_path, method="lora", set={}, train=arguments, evaluate_before=False, compare=compare)

    def same(one: Path, other: Path) -> None:
        assert_equal(one, other)
        states = [json.loads((f / "results.json").read_text(encoding="utf-8"))["jobs"] for f in (one, other)]
        assert [job["state"] for job in states[0]] == [job["state"] for job in states[1]]

    kills = killed_until(
        max(1, KILLS // 20), tmp_path / "straight", lambda folder, _: ["compare", path, "--output", folder], same
    )
    tried("SIGKILL during `peml compare`; called again it ends with the same weights", kills)


def limited(size: int) -> None:
    """No file may become larger: what a full disk is to a program."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("what", ["train", "merged"])
def test_a_full_disk_is_one_sentence(what: str, tmp_path: Path, tried: Tried) -> None:
    if what == "train":
        base = recipe(tmp_path)
        arguments = base["train"] | {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
        path = write_recipe(tmp_path, method="lora", set={"adapter.r": 2}, train=arguments, evaluate_before=False)
        order: list[Any] = ["train", path, "--output"]
    else:
        order = ["export", write_run(tmp_path, "lora"), "--to", "merged", "--output"]
    said = tmp_path / "said.txt"
    whole = Command([*order, tmp_path / "whole"], said)
    assert whole.wait() == 0, whole.said()
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*"))
    failures = 0
    for size in sorted({max(1, largest // 4**k) for k in range(1, 7)} | {largest - 1}):
        folder = tmp_path / f"full-{size}"
        command = Command([*order, folder], said, partial(limited, size))
        code = command.wait()
        assert "Traceback" not in command.said() and code == 2, (size, code, command.said()[-2000:])
        assert len(re.findall(r"^error: ", command.said(), flags=re.M)) == 1, command.said()
        failures += 1
        if folder.exists():
            check_whole(folder)
            again = ["--resume"] if RunFolder(folder).is_run else []
            rest = Command([*order, folder, *again], said)
            assert rest.wait() == 0, rest.said()
            assert_equal(folder, tmp_path / "whole")
    tried(
        f"a disk that is full at some byte of `peml {'export' if what == 'merged' else what}`: one sentence", failures
    )
