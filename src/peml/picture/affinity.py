"""Affinities between tasks as a picture: heat map, the tree that clusters them, and how they change with depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from peml.picture.svg import INNER, MARGIN, length_of, page, path, rect, text, ticks

Rows = Sequence[Sequence[float]]
Merge = tuple[int, int, float]

TREE = 90.0
"""Height of the tree, in pixels."""


def draw_affinity(
    tasks: Sequence[str],
    matrix: Rows,
    merges: Sequence[Merge],
    order: Sequence[str],
    clusters: Sequence[Sequence[str]],
    blocks: Mapping[str, Rows],
) -> str:
    """The picture, as SVG.

    Args:
        tasks: names of the rows and columns.
        matrix: affinities, `[T, T]`, between -1 and 1.
        merges: the tree, as `peml.affinity.Clustering` has it.
        order: tasks as they stand side by side.
        clusters: groups that are framed.
        blocks: affinities by block, from the bottom up.
    """
    at = {name: place for place, name in enumerate(tasks)}
    left = min(170.0, 10 + max(length_of(name) for name in tasks))
    size = min(56.0, (INNER - left) / len(order))
    top = 76 + TREE
    title = f"{len(tasks)} tasks in {len(clusters)} cluster{'s' if len(clusters) > 1 else ''}"
    pieces = [text(MARGIN, 44, title, "title")]
    pieces += _tree(tasks, merges, order, MARGIN + left, top - 8, size)
    for row, first in enumerate(order):
        y = top + row * size
        pieces.append(text(MARGIN + left - 8, y + size / 2 + 4, first, "", "end"))
        for column, second in enumerate(order):
            value = matrix[at[first]][at[second]]
            x = MARGIN + left + column * size
            kind = "main" if value >= 0 else "mark"
            pieces.append(rect(x + 1, y + 1, size - 2, size - 2, "faint"))
            pieces.append(rect(x + 1, y + 1, size - 2, size - 2, kind, opacity=min(0.99, abs(value))))
            if size >= 30:
                ink = "small onmain" if abs(value) > 0.55 else "small"
                pieces.append(text(x + size / 2, y + size / 2 + 4, f"{value:.2f}", ink, "middle"))
    for group in clusters:
        places = sorted(order.index(name) for name in group)
        if places == list(range(places[0], places[-1] + 1)):
            start, end = places[0] * size, (places[-1] + 1) * size
            corners = [(start, start), (end, start), (end, end), (start, end), (start, start)]
            pieces.append(
                path([(MARGIN + left + x, top + y) for x, y in corners], "line", ' style="stroke:var(--ink)"')
            )
    y = top + len(order) * size + 44
    if len(blocks) > 1:
        drawn, y = _by_depth(tasks, clusters, blocks, y)
        pieces += drawn
    about = "; ".join(f"cluster {number}: {', '.join(group)}" for number, group in enumerate(clusters, 1))
    return page(y + 16, title, about, pieces)


def _tree(
    tasks: Sequence[str], merges: Sequence[Merge], order: Sequence[str], x: float, bottom: float, size: float
) -> list[str]:
    """Joints at the height of their distance."""
    most = max((distance for *_, distance in merges), default=1.0) or 1.0
    ends = {leaf: (x + (order.index(name) + 0.5) * size, bottom) for leaf, name in enumerate(tasks)}
    pieces = []
    for number, (one, two, distance) in enumerate(merges, len(tasks)):
        level = bottom - TREE * 0.85 * distance / most
        (x1, y1), (x2, y2) = ends[one], ends[two]
        pieces.append(path([(x1, y1), (x1, level), (x2, level), (x2, y2)], "line", ' style="stroke:var(--quiet)"'))
        ends[number] = ((x1 + x2) / 2, level)
    return pieces


def _by_depth(
    tasks: Sequence[str], clusters: Sequence[Sequence[str]], blocks: Mapping[str, Rows], y: float
) -> tuple[list[str], float]:
    """Mean affinity within and between clusters by block."""
    of = {name: number for number, group in enumerate(clusters) for name in group}
    pairs = [(i, j) for i in range(len(tasks)) for j in range(i)]
    curves = {
        "within clusters": [(i, j) for i, j in pairs if of[tasks[i]] == of[tasks[j]]],
        "between clusters": [(i, j) for i, j in pairs if of[tasks[i]] != of[tasks[j]]],
    }
    values = {
        name: [sum(own[i][j] for i, j in chosen) / len(chosen) for own in blocks.values()]
        for name, chosen in curves.items()
        if chosen
    }
    flat = [value for own in values.values() for value in own]
    most = max(0.05, max(map(abs, flat)))
    marks = [mark for mark in ticks(most, 2)]
    high, inner, width = 96.0, MARGIN + 40, INNER - 60
    half = high / 2 / max(most, *marks)
    middle = y + 18 + high / 2
    pieces = [text(MARGIN, y, "affinity by block, from the bottom up", "head")]
    for mark in sorted({*marks, *(-mark for mark in marks)}):
        level = middle - mark * half
        pieces.append(path([(inner, level), (inner + width, level)], "line"))
        pieces.append(text(inner - 7, level + 4, f"{mark:g}", "small quiet", "end"))
    step = width / max(1, len(blocks) - 1)
    for kind, (name, own) in zip(("--main", "--mark"), values.items(), strict=False):
        points = [(inner + place * step, middle - value * half) for place, value in enumerate(own)]
        stroke = "--mark" if name.startswith("between") else kind
        pieces.append(path(points, "curve", f' style="stroke:var({stroke})"'))
        last = own[-1] if math.isfinite(own[-1]) else 0.0
        pieces.append(text(inner + width, middle - last * half - 6, name, "small over", "end"))
    return pieces, y + 18 + high + 14
