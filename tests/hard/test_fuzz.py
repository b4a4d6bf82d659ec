"""Drawn inputs: recipes, rows, adapter configurations and headers of weights, of which most are wrong in some way.

What is wrong is a `PemlError` of one sentence: no other error, no hang, nothing written.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis, for development")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from export_kit import write_run  # noqa: E402
from peml import PemlError  # noqa: E402
from peml.tasks import FileSource, Task  # noqa: E402
from peml.tasks.files import read_file  # noqa: E402
from peml.training import RunFolder, load_recipe, open_run  # noqa: E402
from workshop import recipe  # noqa: E402

CASES = int(os.environ.get("PEML_HARD_CASES", "0"))
Tried = Callable[..., None]

few = settings(
    max_examples=max(CASES // 4, 50),
    deadline=60_000,  # milliseconds: what takes longer hangs, also on a machine with other work
    derandomize=not CASES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
"""A quarter of the cases for each kind of input; fifty, always the same, where nobody asks for more."""

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12),
    st.sampled_from(["", "peml", "lora", "all", "glue", "toy", "{{ text }}", "{% for %}", "../..", "/dev/null", "~", "1e400", "\x00"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)  # fmt: skip


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested mappings and lists."""
    inner = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    return [*([at] if at else []), *(place for key, value in inner for place in places(value, (*at, key)))]


@st.composite
def damaged(draw: st.DrawFn, whole: Any, keys: st.SearchStrategy[str]) -> Any:
    """Something that is right but in one to three places: another value, a key more, or one less."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        where = places(data)
        if not where:
            break
        *path, last = draw(st.sampled_from(where))
        holder = data
        for key in path:
            holder = holder[key]
        what = draw(st.sampled_from(["other", "other", "less", "more"]))
        if what == "less":
            del holder[last]
        elif what == "more" and isinstance(holder, dict):
            holder[draw(keys)] = draw(values)
        else:
            holder[last] = draw(values)
    return data


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(write_run(tmp_path_factory.mktemp("fuzz"), "lora"))


KEYS = ["model", "tasks", "set", "train", "mixing", "balance", "regime", "tune", "compare", "architecture", "chat"]


@few
@given(data=st.data())
def one_recipe(folder: Path, data: st.DataObject) -> None:
    drawn = data.draw(damaged(recipe(folder), st.sampled_from(KEYS) | st.text(max_size=8)))
    path = folder / "drawn.yaml"
    path.write_text(yaml.safe_dump(drawn, allow_unicode=True), encoding="utf-8")
    before = entries(folder)
    try:
        found = load_recipe(path)
        found.config()
        found.training_arguments(str(folder / "none"))
    except PemlError as error:
        assert str(error).strip()
    assert entries(folder) == before


def test_recipes(tmp_path: Path, tried: Tried) -> None:
    one_recipe(tmp_path)
    tried("recipes with up to three wrong places", few.max_examples)


@few
@given(text=st.text(max_size=300) | st.binary(max_size=300))
def one_text(folder: Path, text: str | bytes) -> None:
    path = folder / "drawn.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PemlError):
        load_recipe(path)


def test_texts_that_are_no_recipe(tmp_path: Path, tried: Tried) -> None:
    one_text(tmp_path)
    tried("bytes that are no recipe", few.max_examples)


TASK: dict[str, Any] = {"prompt": "{{ text }} big ?", "answer": "big", "choices": ["yes", "no"]}
ROW = {"text": "big red cat", "big": "yes", "color": "red"}
ends = st.sampled_from(["", "\n", "\r\n", "\n\n", "\x00", "\ufeff", '{"text": "big', ",", "]"])


@few
@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
def one_file_of_rows(folder: Path, data: st.DataObject, suffix: str) -> None:
    path = folder / f"rows{suffix}"
    drawn = data.draw(st.lists(damaged(ROW, st.text(max_size=8)), max_size=3))
    lines = [json.dumps(row, ensure_ascii=data.draw(st.booleans())) for row in drawn]
    text = ("\n".join(lines) if suffix != ".json" else json.dumps(drawn)) + data.draw(ends)
    content = (
        text.encode("utf-8", "surrogatepass") if data.draw(st.integers(0, 4)) else data.draw(st.binary(max_size=200))
    )
    path.write_bytes(content)
    before = entries(folder)
    try:
        task = Task(name="size", source=FileSource(train=path), kind="choose", **TASK)
        for row, origin in read_file(path):
            assert task.example(row, origin).prompt
    except PemlError as error:
        assert path.name in str(error)
    assert entries(folder) == before


def test_rows(tmp_path: Path, tried: Tried) -> None:
    one_file_of_rows(tmp_path)
    tried("files of rows, of all five kinds", few.max_examples)


@few
@given(data=st.data())
def one_adapter_configuration(run: RunFolder, data: st.DataObject) -> None:
    path = run.adapter / "adapter_config.json"
    whole = path.read_text(encoding="utf-8")
    keys = st.sampled_from(["r", "groups", "heads", "fuse_mlp", "rank_pattern"]) | st.text(max_size=8)
    drawn = json.dumps(data.draw(damaged(json.loads(whole), keys)))
    try:
        path.write_text(drawn, encoding="utf-8")
        before = entries(run.path)
        try:
            open_run(run.path)
        except PemlError as error:
            assert str(error).strip()
        assert entries(run.path) == before
    finally:
        path.write_text(whole, encoding="utf-8")


@pytest.mark.hard
@pytest.mark.filterwarnings("ignore")
def test_adapter_configurations(run: RunFolder, tried: Tried) -> None:
    one_adapter_configuration(run)
    tried("adapter configurations with up to three wrong places", few.max_examples)


@few
@given(data=st.data())
def one_file_of_weights(run: RunFolder, data: st.DataObject) -> None:
    """The header says where each tensor lies: shapes, types and places that are wrong, or bytes that are none."""
    path = run.adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    drawn = json.dumps(data.draw(damaged(header, st.text(max_size=8)))).encode()
    size = data.draw(st.just(len(drawn)) | st.integers(0, 2**64 - 1))
    content = struct.pack("<Q", size) + drawn + whole[8 + length :]
    if not data.draw(st.integers(0, 4)):
        content = content[: data.draw(st.integers(0, len(content)))]
    try:
        path.write_bytes(content)
        try:
            open_run(run.path)
        except PemlError as error:
            assert str(error).strip()
    finally:
        path.write_bytes(whole)


@pytest.mark.hard
@pytest.mark.filterwarnings("ignore")
def test_headers_of_weights(run: RunFolder, tried: Tried) -> None:
    one_file_of_weights(run)
    tried("headers of files of weights with up to three wrong places, or cut off", few.max_examples)
    assert load_file(run.adapter / "adapter_model.safetensors")
