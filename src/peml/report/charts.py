"""Charts of a report, as SVG in panels as wide as a phone: text stays text, and colours are those of the page.

One colour is the data, quiet ones are the rest, and what stands is filled: nothing is said by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from peml.compare.words import count_words, signed
from peml.picture.svg import length_of, path, rect, text

WIDTH = 360
"""Of a panel: most phones."""

_LEFT, _RIGHT, _ROW = 118, 300, 20
_SMALL, _HEAD = 10.5, 13
"""Sizes of letters; bold ones are wider than their 12 pixels."""


@dataclass(frozen=True)
class Dot:
    """One line of a chart of dots.

    Args:
        label: beside it.
        value: where the dot is.
        interval: ends of the bar through it; None: no bar.
        values: of single seeds, as ticks.
        strong: whether the dot is filled.
        shown: the number at the right.
    """

    label: str
    value: float
    interval: Sequence[float] | None = None
    values: Sequence[float] = ()
    strong: bool = True
    shown: str = ""


def figure(height: float, title: str, about: str, pieces: Sequence[str]) -> str:
    """One panel.

    Args:
        height: of it.
        title: above it.
        about: the same in words, for those who do not see it.
        pieces: what is on it.
    """
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(f"{title}: {about}", quote=True)}">'
        + text(0, 14, fitted(title, WIDTH, _HEAD), "head")
        + "".join(pieces)
        + "</svg>"
    )


def dots(
    title: str, rows: Sequence[Dot], zero: bool = False, line: float | None = None, reach: Sequence[float] = ()
) -> str:
    """A dot with its interval for each row, on one axis.

    Args:
        title: above it.
        rows: from top to bottom.
        zero: whether the axis goes through zero, for differences; a line marks it.
        line: a value to compare with, dashed.
        reach: values that must lie on the axis too, so that several charts have the same.
    """
    ends = [*reach, *ends_of(rows)] + ([0.0] if zero else [])
    ends += [] if line is None else [line]
    marks = marks_between(min(ends), max(ends), 3)
    low, high = min(*ends, *marks), max(*ends, *marks)
    scale = (_RIGHT - _LEFT) / ((high - low) or 1.0)

    def at(value: float) -> float:
        return _LEFT + (value - low) * scale

    top, bottom = 28, 28 + _ROW * len(rows)
    pieces = []
    for mark in marks:
        kind = "axis" if zero and mark == 0 else "line"
        pieces.append(path([(at(mark), top - 4), (at(mark), bottom)], kind))
        pieces.append(text(at(mark), bottom + 13, f"{mark:g}", "small quiet", "middle"))
    if line is not None:
        pieces.append(path([(at(line), top - 4), (at(line), bottom)], "limit"))
    for place, row in enumerate(rows):
        y = top + _ROW * place + _ROW / 2
        pieces.append(text(_LEFT - 8, y + 4, fitted(row.label, _LEFT - 12), "small", "end"))
        if row.interval is not None:
            pieces.append(path([(at(end), y) for end in row.interval], "bar"))
        pieces += [path([(at(value), y - 4), (at(value), y + 4)], "seed") for value in row.values]
        pieces.append(
            f'<circle cx="{at(row.value):.2f}" cy="{y:.2f}" r="4" class="{"dot" if row.strong else "ring"}"/>'
        )
        pieces.append(text(WIDTH, y + 4, row.shown, "small", "end"))
    about = "; ".join(f"{row.label} {row.shown}" for row in rows)
    return figure(bottom + 20, title, about, pieces)


def ends_of(rows: Sequence[Dot]) -> list[float]:
    """Everything that an axis must reach."""
    return [end for row in rows for end in (*(row.interval or ()), *row.values, row.value)]


def scatter(
    title: str,
    points: Sequence[tuple[str, float, float, Sequence[float] | None]],
    across: str,
    written: Callable[[float], str] = count_words,
) -> str:
    """Score against a cost, with the interval of each score; the cost by factors.

    Args:
        title: above it.
        points: label, cost, score, and the score's interval.
        across: what the cost is.
        written: a cost in words.
    """
    height, left, right, top, bottom = 250, 40, 352, 30, 200
    costs = [math.log10(max(cost, 1e-12)) for _, cost, _, _ in points]
    low, high = min(costs), max(costs)
    # Points alone in their column are drawn in its middle.
    low, high = (low - 0.15, high + 0.15) if high - low < 0.3 else (low - 0.05, high + 0.05)
    ends = [end for _, _, score, interval in points for end in (*(interval or ()), score)]
    marks = marks_between(min(ends), max(ends), 4)
    least, most = min(*ends, *marks), max(*ends, *marks)

    def at(cost: float, score: float) -> tuple[float, float]:
        x = left + (right - left) * (math.log10(max(cost, 1e-12)) - low) / (high - low)
        return x, bottom - (bottom - top) * (score - least) / ((most - least) or 1.0)

    pieces = []
    for mark in marks:
        y = at(1, mark)[1]
        pieces += [path([(left, y), (right, y)], "line"), text(left - 5, y + 4, f"{mark:g}", "small quiet", "end")]
    for mark in _powers(low, high):
        x = at(mark, least)[0]
        pieces.append(path([(x, bottom), (x, bottom + 4)], "line"))
        pieces.append(text(x, bottom + 16, written(mark), "small quiet", "middle"))
    pieces.append(text(right, bottom + 34, across, "small quiet", "end"))
    taken: list[tuple[float, float, float]] = []
    for label, cost, score, interval in sorted(points, key=lambda point: -point[2]):
        x, y = at(cost, score)
        if interval is not None:
            pieces.append(path([(x, at(cost, end)[1]) for end in interval], "thin"))
        pieces.append(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="4" class="dot"/>')
        pieces.append(_beside(label, x, y, right, taken))
    about = "; ".join(f"{label} {score:.3f} at {written(cost)}" for label, cost, score, _ in points)
    return figure(height, title, about, pieces)


def _beside(label: str, x: float, y: float, right: float, taken: list[tuple[float, float, float]]) -> str:
    """A label right or left of its point, lowered until it covers no other."""
    label = fitted(label, right / 2 - 10)
    width = length_of(label, _SMALL)
    leftwards = x + 7 + width > right
    begin, line = (x - 7 - width if leftwards else x + 7), y + 4
    while any(abs(line - other) < 11 and begin < end and begin + width > start for start, end, other in taken):
        line += 11
    taken.append((begin, begin + width, line))
    return text(begin, line, label, "small over")


def curves(title: str, own: Sequence[tuple[float, float]], others: Sequence[Sequence[tuple[float, float]]]) -> str:
    """Loss over steps of one method, before those of the others.

    Args:
        title: the method.
        own: its curve.
        others: theirs, quiet.
    """
    height, left, right, top, bottom = 150, 40, 352, 26, 122
    everything = [point for curve in (own, *others) for point in curve]
    end = max(step for step, _ in everything)
    # The first losses are far above all others, and would flatten what matters.
    losses = sorted(loss for _, loss in everything)
    most, least = losses[min(len(losses) - 1, int(0.98 * len(losses)))], losses[0]
    marks = marks_between(min(least, 0.0), most, 3)
    low, high = min(marks), max(most, *marks)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return (
            left + (right - left) * point[0] / end,
            bottom - (bottom - top) * (min(point[1], high) - low) / ((high - low) or 1.0),
        )

    pieces = []
    for mark in marks:
        y = at((0, mark))[1]
        pieces += [path([(left, y), (right, y)], "line"), text(left - 5, y + 4, f"{mark:g}", "small quiet", "end")]
    pieces += [path([at(point) for point in curve], "other") for curve in others]
    pieces.append(path([at(point) for point in own], "own"))
    pieces.append(text(left, bottom + 15, "0", "small quiet", "middle"))
    pieces.append(text(right, bottom + 15, f"step {end:,.0f}", "small quiet", "end"))
    return figure(height - 8, title, f"loss from {own[0][1]:.3g} to {own[-1][1]:.3g}", pieces)


def shares(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], shown: Sequence[str]) -> str:
    """Parts of a whole for each row, as a bar; the longest row is as wide as the panel.

    Args:
        rows: label, and its parts with their sizes.
        shown: the whole of each row, in words.
    """
    most = max((sum(size for _, size in parts) for _, parts in rows), default=1.0) or 1.0
    pieces, names = [], list(dict.fromkeys(name for _, parts in rows for name, size in parts if size))
    for place, ((label, parts), words) in enumerate(zip(rows, shown, strict=True)):
        y, x = 24.0 + _ROW * place, float(_LEFT)
        pieces.append(text(_LEFT - 8, y + 14, fitted(label, _LEFT - 12), "small", "end"))
        for name, size in parts:
            wide = (_RIGHT - _LEFT) * size / most
            if size:
                pieces.append(rect(x, y + 4, max(0.5, wide - 0.5), 12, f"part{names.index(name) % 5}"))
            x += wide
        pieces.append(text(WIDTH, y + 14, words, "small", "end"))
    y, x = 24.0 + _ROW * len(rows) + 14, float(_LEFT)
    for place, name in enumerate(names):
        wide = 16 + length_of(name, _SMALL) + 10
        if x + wide > WIDTH and x > _LEFT:
            x, y = float(_LEFT), y + 15
        pieces += [rect(x, y - 8, 10, 10, f"part{place % 5}"), text(x + 14, y, name, "small quiet")]
        x += wide
    return figure(
        y + 10, "Where the time goes", "; ".join(f"{r[0]} {w}" for r, w in zip(rows, shown, strict=True)), pieces
    )


def marks_between(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them; one at least."""
    reach = high - low
    if reach <= 1e-12:
        return [round(low, 3)]
    least = reach / count
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    marks = [round(number * step, 12) + 0.0 for number in range(first, last + 1)]
    return marks or [round(low, 3)]


def _powers(low: float, high: float) -> list[float]:
    """Round numbers on an axis by factors, between two logarithms."""
    if high - low < math.log10(4):
        return marks_between(10.0**low, 10.0**high, 3)
    found = [
        factor * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in (1, 2, 5)
        if low <= math.log10(factor * 10.0**power) <= high
    ]
    return found if len(found) <= 5 else found[:: math.ceil(len(found) / 5)]


def fitted(label: str, width: float, size: float = _SMALL) -> str:
    """A label that fits, its end left out if it must be."""
    size *= 1.1  # the fonts of some systems are wider than most
    if length_of(label, size) <= width:
        return label
    kept = next((n for n in range(len(label), 0, -1) if length_of(f"{label[:n]}…", size) <= width), 0)
    return f"{label[:kept]}…"


def gain_dot(label: str, test: Mapping[str, object]) -> Dot:
    """The gain over the baseline, filled where it stands."""
    gain, values = float(test["gain"]), list(test["values"])  # type: ignore[arg-type, call-overload]
    return Dot(label, gain, test["interval"], values, bool(test["stands"]), signed(gain))  # type: ignore[arg-type]
