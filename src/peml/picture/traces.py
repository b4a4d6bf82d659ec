"""How a search went, as small multiples: entropy, expected length, leading weights over the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peml.picture.svg import INNER, MARGIN, page, path, text, ticks

PREFIX = "search/"
"""What the names of a search's numbers begin with in the log."""

_TITLES: Mapping[str, str] = {
    "entropy": "entropy of a cell's choice (nats)",
    "leading": "weight of the leading operation",
    "tokens": "expected tokens per layer",
    "cost": "expected cost over the budget",
    "gate": "mean gate of the tokens",
    "temperature": "temperature",
    "rank": "expected rank of the head",
    "strength": "mean log strength of the prefix",
}
"""Panels in their order, and their titles; other numbers come after them under their own names."""

Curve = list[tuple[float, float]]


def read_traces(log: str | Path) -> dict[str, Curve]:
    """The numbers of a search from a run's `log.jsonl`: `[(step, value)]` by name; nothing where none was logged."""
    if not Path(log).exists():
        return {}
    entries = []
    for line in Path(log).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the line that was being written when the run was killed
            continue
    return curves_of(entries)


def curves_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """`[(step, value)]` by name, from entries of a log."""
    curves: dict[str, Curve] = {}
    for entry in entries:
        for key, value in entry.items():
            if key.startswith(PREFIX) and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(key.removeprefix(PREFIX), []).append((float(entry["step"]), float(value)))
    return curves


def draw_traces(curves: Mapping[str, Curve], title: str = "How the search went") -> str:
    """The picture of a search, as SVG: one panel for each kind of number, one curve for each layer or cell.

    Args:
        curves: from `read_traces`; of a name with a number behind a slash, all are in one panel.
        title: above it.
    """
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        kind, _, index = name.partition("/")
        panels.setdefault(kind, {})[index] = curve
    order = [kind for kind in _TITLES if kind in panels] + sorted(set(panels) - set(_TITLES))
    end = max((step for curve in curves.values() for step, _ in curve), default=1.0)
    columns, gap = 2, 44.0
    wide, high = (INNER - gap) / columns, 118.0
    pieces = [text(MARGIN, 44, title, "title")]
    for place, kind in enumerate(order):
        row, column = divmod(place, columns)
        x, y = MARGIN + column * (wide + gap), 76 + row * (high + 70)
        pieces += _panel(kind, panels[kind], x, y, wide, high, end)
    rows = math.ceil(len(order) / columns)
    about = "; ".join(f"{_TITLES.get(kind, kind)}: {_in_words(panels[kind])}" for kind in order)
    return page(76 + rows * (high + 70), title, about, pieces)


def _panel(
    kind: str, curves: Mapping[str, Curve], x: float, y: float, wide: float, high: float, end: float
) -> list[str]:
    values = [value for curve in curves.values() for _, value in curve]
    low, most = min(0.0, *values), max(0.0, *values)
    marks = ticks(most if most > 0 else -low, 3)
    marks = marks if most > 0 else [0.0, *(-mark for mark in marks[1:])]
    low, most = min(low, *marks), max(most, *marks)
    inner, top = x + 34, y + 16
    width, scale = wide - 34, high / ((most - low) or 1.0)
    pieces = [text(x, y, _TITLES.get(kind, kind), "head")]
    for mark in marks:
        level = top + (most - mark) * scale
        pieces.append(path([(inner, level), (inner + width, level)], "line"))
        pieces.append(text(inner - 7, level + 4, f"{mark:g}", "small quiet", "end"))
    if kind == "cost" and low < 1 < most:
        level = top + (most - 1) * scale
        pieces.append(path([(inner, level), (inner + width, level)], "limit"))
    for step in ticks(end, 4):
        # The last one would run into the next panel.
        anchor = "middle" if step < end else "end"
        pieces.append(text(inner + width * step / (end or 1), top + high + 15, f"{step:,.0f}", "small quiet", anchor))
    pieces.append(text(inner + width, top + high + 30, "step", "small quiet", "end"))
    for place, (_, curve) in enumerate(curves.items()):
        points = [(inner + width * step / (end or 1), top + (most - value) * scale) for step, value in curve]
        pieces.append(path(points, "curve", f' style="stroke:{_colour(place, len(curves))}"'))
    return pieces + _key(kind, curves, inner, top + high + 30)


def _colour(place: int, count: int) -> str:
    """From the quiet to the strong end of one hue: layers and cells have an order."""
    share = 100 if count == 1 else round(25 + 75 * place / (count - 1))
    return f"color-mix(in oklab,var(--main) {share}%,var(--soft))" if share < 100 else "var(--main)"


def _key(kind: str, curves: Mapping[str, Curve], x: float, y: float) -> list[str]:
    """Which end of the hue is which."""
    if len(curves) < 2:
        return []
    name = "cell" if kind == "leading" else "layer"
    first, last = next(iter(curves)), list(curves)[-1]
    pieces: list[str] = []
    for place, label in ((0, f"{name} {first}"), (len(curves) - 1, f"{name} {last}")):
        style = f' style="stroke:{_colour(place, len(curves))}"'
        pieces.append(path([(x, y - 4), (x + 16, y - 4)], "curve", style))
        pieces.append(text(x + 21, y, label, "small quiet"))
        x += 88
    return pieces


def _in_words(curves: Mapping[str, Curve]) -> str:
    ends = [(curve[0][1], curve[-1][1]) for curve in curves.values()]
    first, last = (sum(values) / len(ends) for values in zip(*ends, strict=True))
    return f"from {first:.3g} to {last:.3g}" + (" on average" if len(ends) > 1 else "")
