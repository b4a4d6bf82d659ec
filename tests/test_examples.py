"""The examples run, and do what they say of themselves."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from peml.adapters import ADAPTERS
from peml.methods import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where the annotations of its dataclasses are looked up
    spec.loader.exec_module(module)
    return module


def test_each_of_the_twins_names_the_other() -> None:
    texts = {name: (EXAMPLES / f"{name}.py").read_text(encoding="utf-8") for name in ("flat_loop", "with_trainer")}
    assert "with_trainer.py" in texts["flat_loop"] and "flat_loop.py" in texts["with_trainer"]
    assert max(len(text.splitlines()) for text in texts.values()) < 150


@pytest.mark.slow
def test_the_flat_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 <= example("flat_loop").main(steps=10) <= 1
    assert "cells" in capsys.readouterr().out


@pytest.mark.slow
def test_the_flat_loop_and_the_trainer_end_with_the_same_weights() -> None:
    """Past the end of the search, which is after nine tenths of the steps."""
    flat, library = (example(name).train(steps=10).state_dict() for name in ("flat_loop", "with_trainer"))
    ours = [key for key in flat if ".peml_" in key]
    assert flat.keys() == library.keys() and ours
    assert all(torch.equal(flat[key], library[key]) for key in ours)


@pytest.mark.slow
def test_a_method_from_outside_keeps_the_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (ADAPTERS, METHODS):
        for name in ("GatedLoRA", "gated-lora"):
            monkeypatch.setitem(table, name, None)  # taken out again at the end
            monkeypatch.delitem(table, name)
    module = example("new_method")
    off, isolated = module.main(steps=10)
    assert isolated and len(off) == 4
    assert off["a fresh adapter changes nothing"] == off["what is stored is what was trained"] == 0
    assert max(off.values()) < 1e-4
