"""Pictures hold what they are of, as text and shapes that can be counted."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from peml.picture import draw, draw_traces, read_traces
from peml.picture.svg import INNER, WIDTH, length_of, ticks, wrapped
from peml.prompts import Architecture
from peml.prompts.base import AttentionSlot, ModelShape

NAME = "{http://www.w3.org/2000/svg}"
CANDIDATES = ["identity", "linear", "conv3"]


class Found:
    """An architecture with everything that its file can hold."""

    def __init__(self, tokens: list[list[int]], operations: list[str], **more: Any) -> None:
        self.tokens, self.operations, self.derived = tokens, tuple(operations), more.pop("derived", True)
        self.lengths = tuple(map(len, tokens))
        self.more = more

    def to_dict(self) -> dict[str, Any]:
        return {"operations": list(self.operations), "tokens": self.tokens, **self.more}


def found(layers: int = 3, p: int = 4, **more: Any) -> Found:
    tokens = [[t for t in range(p) if (t + layer) % 3] if layer != 1 else [] for layer in range(layers)]
    alpha = [[0.0, math.log(3), 0.0], [math.log(2), 0.0, 0.0]]
    gates = [[0.5] * p] * layers
    return Found(
        tokens, ["linear", "identity"], candidates=CANDIDATES, alpha=alpha, gates=gates, num_virtual_tokens=p,
        width=64, head_rank=8, **more,
    )  # fmt: skip


def shape(layers: int = 3) -> ModelShape:
    return ModelShape(tuple(AttentionSlot(2, 10 * (layer + 1)) for layer in range(layers)), 1)


def read(svg: str) -> tuple[list[str], list[ElementTree.Element]]:
    """Its texts, and its rectangles."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{NAME}svg" and root.get("role") == "img"
    return [t.text or "" for t in root.iter(f"{NAME}text")], list(root.iter(f"{NAME}rect"))


def test_an_architecture_is_drawn_with_all_that_is_known_of_it() -> None:
    one = found()
    budget = 2.0 * sum(slot.width for slot in shape().slots) * 2
    svg = draw(one, shape(), tasks=["a<b", "c&d"], budget_bytes=budget)  # type: ignore[arg-type]
    texts, rects = read(svg)
    assert "Searched prefix for 2 tasks" in texts and "a<b, c&d" in texts
    assert texts.count("linear") == 3, "the cell, and a candidate of both cells"
    assert "budget 2 on average" in texts and "off" in texts and "rank 8" in texts and "Generator, width 64" in texts
    kept = sum(one.lengths)
    cells = [r for r in rects if r.get("fill-opacity") is not None]
    assert len(cells) == kept and {r.get("fill-opacity") for r in cells} == {"0.65"}  # 0.3 + 0.7 * 0.5
    deployed = sum(n * slot.width * 2 for n, slot in zip(one.lengths, shape().slots, strict=True))
    words = f"{deployed} bytes of keys and values in bf16, {deployed / budget:.0%} of the budget of {budget:.0f} bytes"
    assert f"{words}; {kept} of 12 tokens; 1 of 3 layers off" in texts
    # Bars of the two other candidates are a third, and half, of the chosen one's.
    wide = {
        n: [float(r.get("width")) for r in rects if r.get("height") == "13.00" and r.get("class") == n]
        for n in ("main", "soft")
    }
    assert wide["soft"] == pytest.approx([wide["main"][0] / 3] * 2 + [wide["main"][1] / 2] * 2, abs=0.02)


def test_weights_of_candidates_that_do_not_compete_are_sigmoids() -> None:
    _, rects = read(draw(found(relaxation="sigmoid")))  # type: ignore[arg-type]
    wide = [float(r.get("width")) for r in rects if r.get("height") == "13.00"]
    assert [w / wide[1] for w in wide[:3]] == pytest.approx([0.5 / 0.75, 1.0, 0.5 / 0.75], abs=0.01)
    closed = found(relaxation="sigmoid")
    closed.more["alpha"] = [[-1e5] * 3] * 2
    read(draw(closed))  # type: ignore[arg-type]


def test_an_architecture_without_weights_or_model_is_drawn_as_far_as_it_is_known() -> None:
    plain = Found([[0, 2], [1]], ["conv3"], derived=False)
    texts, _ = read(draw(plain))  # type: ignore[arg-type]
    assert "Prefix, its search not finished" in texts and "3 tokens; 2 layers, none off" in texts
    assert not any("budget" in text or "bytes" in text or "None" in text for text in texts)
    with pytest.raises(ValueError, match="2 layers, the model 3"):
        draw(plain, shape())  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [1, 6, 12, 32, 80, 200])
@pytest.mark.parametrize("p", [1, 16, 64])
def test_everything_lies_on_the_page(layers: int, p: int) -> None:
    svg = draw(found(layers, p), shape(layers), tasks=[f"task {n}" for n in range(99)], budget_bytes=1e5)  # type: ignore[arg-type]
    root = ElementTree.fromstring(svg)
    high = float(root.get("height") or 0)
    for box in root.iter(f"{NAME}rect"):
        x, y = float(box.get("x") or 0), float(box.get("y") or 0)
        assert (
            x >= 0
            and y >= 0
            and x + float(box.get("width") or 0) <= WIDTH
            and y + float(box.get("height") or 0) <= high
        )
    for text in root.iter(f"{NAME}text"):
        if text.get("x") is not None:
            assert 0 < float(text.get("x") or 0) <= WIDTH and 0 < float(text.get("y") or 0) < high
    numbers = [
        float(t.get("x") or 0)
        for t in root.iter(f"{NAME}text")
        if t.get("class") == "small quiet" and (t.text or "").isdigit() and t.get("text-anchor") == "middle"
    ]
    assert all(b - a >= 15 for a, b in pairwise(numbers)), "numbers of layers do not touch"
    assert draw(found(layers, p), shape(layers)) == draw(found(layers, p), shape(layers))  # type: ignore[arg-type]


@pytest.mark.parametrize("svg", [draw(found(), shape(), tasks=["x"]), draw_traces({"entropy": [(0, 1.0), (5, 0.5)]})])  # type: ignore[arg-type]
def test_a_picture_asks_for_nothing_and_follows_the_reader(svg: str) -> None:
    assert "prefers-color-scheme:dark" in svg and "<title" in svg and "<desc" in svg
    for forbidden in ("<script", "href", "url(", "@import", "<image", "<foreignObject"):
        assert forbidden not in svg
    assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]


def test_what_the_package_itself_finds_is_drawn() -> None:
    import peml
    from models import adapt, tiny

    config = peml.PrefixNAS(num_virtual_tokens=4, width=8, embedding_dim=6, head_rank=4, budget_tokens=2.0)
    prompt = adapt(tiny(), prompt=config).base_model.prompt
    assert isinstance(prompt.architecture(), Architecture)
    assert "search not finished" in draw(prompt.architecture(), prompt.shape)
    prompt.derive()
    texts, _ = read(draw(prompt.architecture(), prompt.shape))
    assert prompt.architecture().operations[0] in texts and "Searched prefix" in texts


def test_the_traces_of_a_log_are_read_and_drawn(tmp_path: Path) -> None:
    entries = [
        {"step": 10 * n, "loss": 1.0, "search/entropy": 2.0 - n, "search/tokens/0": 4.0, "search/tokens/1": 4.0 - n}
        for n in range(3)
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 3', encoding="utf-8")
    curves = read_traces(log)
    assert curves["entropy"] == [(0.0, 2.0), (10.0, 1.0), (20.0, 0.0)] and set(curves) == {
        "entropy",
        "tokens/0",
        "tokens/1",
    }
    svg = draw_traces(curves | {"new": [(0.0, -2.0), (20.0, -1.0)]})
    texts, _ = read(svg)
    assert (
        "expected tokens per layer" in texts
        and "layer 1" in texts
        and "new" in texts
        and "-2" in texts
        and "-0" not in texts
    )
    assert "entropy of a cell's choice (nats): from 2 to 0; expected tokens per layer: from 4 to 3 on average" in svg
    assert svg.count('class="curve"') == 4 + 2, "four curves, and the two ends of the key"
    assert read_traces(tmp_path / "none") == {}


def test_lists_are_cut_where_they_do_not_fit() -> None:
    names = [f"name{n}" for n in range(50)]
    lines = wrapped(names, INNER, 2)
    assert len(lines) == 2 and all(length_of(line) <= INNER for line in lines)
    shown = sum(line.count("name") for line in lines)
    assert lines[-1].endswith(f"and {50 - shown} more") and lines[0].startswith("name0, name1,")
    assert wrapped(["a", "b"], INNER, 2) == ["a, b"] and wrapped([], INNER, 2) == [""]
    assert ticks(30) == [0, 10, 20, 30] and ticks(0.9) == pytest.approx([0, 0.5]) and ticks(0) == [0]
