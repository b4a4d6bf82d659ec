"""The architecture of a searched prefix as a picture: its generator, the tokens of each layer, and what is deployed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peml.picture.svg import INNER, MARGIN, WIDTH, page, path, rect, text, ticks, wrapped
from peml.prompts import Architecture
from peml.prompts.base import ModelShape
from peml.prompts.cost import BYTES


def draw(
    architecture: Architecture,
    shape: ModelShape | None = None,
    *,
    tasks: Sequence[str] = (),
    budget_bytes: float | None = None,
) -> str:
    """The picture of an architecture, as SVG.

        deployed bytes = sum_l p_l * 2 H_l D_l * 2                    (keys and values, bf16)

    Args:
        architecture: what a search found, or holds so far.
        shape: of the model; None: the bytes are left out.
        tasks: that share the prefix.
        budget_bytes: what may be deployed, in bytes; None: no budget is drawn.

    Raises:
        ValueError: the shape has another number of layers.
    """
    found = architecture.to_dict()
    lengths = list(architecture.lengths)
    widths = None if shape is None else [slot.width * BYTES for slot in shape.slots]
    if widths is not None and len(widths) != len(lengths):
        raise ValueError(f"the architecture has {len(lengths)} layers, the model {len(widths)}")
    title = _title(architecture, tasks)
    pieces, y = [text(MARGIN, 44, title, "title")], 62.0
    for line in wrapped(tasks, INNER, 2):
        pieces.append(text(MARGIN, y, line, "quiet"))
        y += 16
    y += 14 if tasks else 0
    drawn, y = _generator(found, y)
    pieces += drawn
    budget = None if budget_bytes is None or widths is None else budget_bytes / sum(widths)
    drawn, y = _layers(found, lengths, budget, y + 34)
    pieces += drawn
    drawn, y = _deployed(found, lengths, widths, budget_bytes, y + 22)
    pieces += drawn
    about = (
        f"Cells: {', '.join(architecture.operations)}. Tokens kept by layer: {', '.join(map(str, lengths))}. "
        + _deployed_words(found, lengths, widths, budget_bytes)
    )
    return page(y + 20, title, about, pieces)


def _title(architecture: Architecture, tasks: Sequence[str]) -> str:
    what = "Searched prefix" if architecture.derived else "Prefix, its search not finished"
    return what + (f" for {len(tasks)} tasks" if len(tasks) > 1 else f" for {tasks[0]}" if tasks else "")


def _generator(found: Mapping[str, Any], top: float) -> tuple[list[str], float]:
    """Boxes from seed to head in rows, with the weights of every candidate below its cell, where they are known."""
    p, width, rank = (found.get(key) for key in ("num_virtual_tokens", "width", "head_rank"))
    boxes = [("seed", f"{p} tokens" if p else "E", False)]
    boxes += [(f"cell {c}", name, True) for c, name in enumerate(found["operations"], 1)]
    boxes += [("head", f"rank {rank}" if rank else "P Q", False)]
    candidates, gap, per_row = list(found.get("candidates") or ()), 22.0, 6
    alpha = found.get("alpha") or []
    bars = len(candidates) if alpha and len(candidates) > 1 else 0
    deep = 44 + (15 * bars + 10 if bars else 0)
    each = min(132.0, (INNER - gap * (min(len(boxes), per_row) - 1)) / min(len(boxes), per_row))
    pieces = [text(MARGIN, top, "Generator" + (f", width {width}" if width else ""), "head")]
    y = top + 12
    for place, (name, what, is_cell) in enumerate(boxes):
        row, column = divmod(place, per_row)
        x, at = MARGIN + column * (each + gap), y + row * (deep + 20)
        pieces.append(rect(x, at, each, 44, "chosen" if is_cell else "box", 5))
        pieces.append(text(x + each / 2, at + 17, name, "quiet small", "middle"))
        pieces.append(text(x + each / 2, at + 34, what, "head" if is_cell else "", "middle"))
        if column:
            pieces.append(_arrow(x - gap + 4, x - 4, at + 22))
        elif row:
            pieces.append(text(x - 6, at + 26, "→", "quiet", "end"))
        if is_cell and bars:
            apart = found.get("relaxation") == "sigmoid"
            pieces += _weights(candidates, alpha[place - 1], what, x, at + 54, each, apart)
    rows = math.ceil(len(boxes) / per_row)
    return pieces, y + rows * deep + (rows - 1) * 20


def _arrow(start: float, end: float, y: float) -> str:
    return path([(start, y), (end, y)], "line") + path([(end - 4, y - 3.5), (end, y), (end - 4, y + 3.5)], "line")


def _weights(
    candidates: Sequence[str], alpha: Sequence[float], chosen: str, x: float, y: float, width: float, apart: bool
) -> list[str]:
    """Names of the candidates of one cell on bars of their weights, the largest as wide as the cell.

    Weights are of a softmax, or, of candidates apart, of a sigmoid each.
    """
    logits = torch.tensor(alpha, dtype=torch.float64)
    shares = (torch.sigmoid(logits) if apart else torch.softmax(logits, dim=0)).tolist()
    most, pieces = max(shares) or 1.0, []
    for row, (name, share) in enumerate(zip(candidates, shares, strict=True)):
        at = y + 15 * row
        # Light letters need a bar that reaches behind all of them.
        strong = name == chosen and share == most
        pieces.append(rect(x, at, max(1.0, width * share / most), 13, "main" if strong else "soft", 2))
        kind = "small onmain" if strong else "small head" if name == chosen else "small"
        pieces.append(text(x + 6, at + 10, name, kind))
    return pieces


def _layers(
    found: Mapping[str, Any], lengths: Sequence[int], budget: float | None, top: float
) -> tuple[list[str], float]:
    """Bars of the tokens that each layer keeps, and below them which ones, darker the more open their gate."""
    p = found.get("num_virtual_tokens") or max((t + 1 for row in found["tokens"] for t in row), default=1)
    left, high = MARGIN + 34.0, 120.0
    pitch = min(109.0, (WIDTH - MARGIN - left) / len(lengths))
    wide, right = min(40.0, pitch * 0.76), left + pitch * len(lengths)
    most = max(*lengths, budget or 0, 1)
    pieces = [text(MARGIN, top, "Tokens kept in each layer", "head")]
    base, scale = top + 26 + high, high / most
    marks = sorted({round(mark) for mark in ticks(most)})
    for mark in marks:
        y = base - mark * scale
        pieces += [path([(left, y), (right, y)], "line"), text(left - 8, y + 4, str(mark), "small quiet", "end")]
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * pitch >= 18)
    middles = [left + pitch * (layer + 0.5) for layer in range(len(lengths))]
    for middle, count in zip(middles, lengths, strict=True):
        if count:
            pieces.append(rect(middle - wide / 2, base - count * scale, wide, count * scale, "main", 1))
    if budget is not None:
        y = base - budget * scale
        pieces.append(path([(left, y), (right, y)], "limit"))
        words = f"budget {budget:.3g} on average"
        beside = right - left < 330
        pieces.append(
            text(right + 8, y + 4, words, "small mark") if beside else text(right, top, words, "small mark", "end")
        )
    for middle, count in zip(middles, lengths, strict=True):
        if count and pitch >= 15:
            pieces.append(text(middle, base - count * scale - 4, str(count), "small over", "middle"))
        elif not count:
            off = ("off", "small quiet") if pitch >= 22 else ("×", "small mark")
            pieces.append(text(middle, base - 4, *off, "middle"))
    grid = base + 18
    drawn, bottom = _grid(found, p, grid, left, pitch, wide)
    pieces += drawn
    for layer in range(0, len(lengths), step):
        pieces.append(text(left + pitch * (layer + 0.5), bottom + 14, str(layer), "small quiet", "middle"))
    pieces.append(text((left + right) / 2, bottom + 30, "layer", "small quiet", "middle"))
    return pieces, bottom + 34


def _grid(
    found: Mapping[str, Any], p: int, top: float, left: float, pitch: float, wide: float
) -> tuple[list[str], float]:
    """One column for each layer, one row for each token of the search."""
    gates, row = found.get("gates") or [], min(7.0, 150.0 / p)
    gap, pieces = (1.0 if row >= 4 else 0.4), []
    for layer, tokens in enumerate(found["tokens"]):
        x = left + pitch * (layer + 0.5) - wide / 2
        pieces.append(rect(x, top, wide, p * row, "faint"))
        for token in tokens:
            gate = gates[layer][token] if gates else 1.0
            # A gate that is nearly closed can still be seen: it was kept.
            pieces.append(rect(x, top + token * row, wide, row - gap, "main", opacity=0.3 + 0.7 * gate))
    for token in (0, p - 1):
        if token == 0 or p > 1:
            pieces.append(text(left - 8, top + token * row + row / 2 + 3.5, str(token), "small quiet", "end"))
    middle = top + p * row / 2
    pieces.append(
        f'<text transform="translate({left - 24:.2f} {middle:.2f}) rotate(-90)" class="small quiet" '
        f'text-anchor="middle">token</text>'
    )
    return pieces, top + p * row


def _deployed(
    found: Mapping[str, Any],
    lengths: Sequence[int],
    widths: Sequence[int] | None,
    budget_bytes: float | None,
    top: float,
) -> tuple[list[str], float]:
    """What the prefix is once the generator is gone, as a bar over its budget and in words."""
    pieces = [text(MARGIN, top, "Deployed", "head")]
    words = _deployed_words(found, lengths, widths, budget_bytes)
    y = top + 10
    if widths is not None and budget_bytes:
        used = sum(n * w for n, w in zip(lengths, widths, strict=True)) / budget_bytes
        whole = max(1.0, used)
        pieces.append(rect(MARGIN, y, INNER / whole, 9, "faint", 2))
        pieces.append(rect(MARGIN, y, max(1.0, INNER * min(used, 1.0) / whole), 9, "main", 2))
        if used > 1:
            pieces.append(rect(MARGIN + INNER / whole, y, INNER * (used - 1) / whole, 9, "mark", 2))
        pieces.append(path([(MARGIN + INNER / whole, y - 3), (MARGIN + INNER / whole, y + 12)], "limit"))
        y += 15
    pieces.append(text(MARGIN, y + 12, words, "quiet"))
    return pieces, y + 14


def _deployed_words(
    found: Mapping[str, Any], lengths: Sequence[int], widths: Sequence[int] | None, budget_bytes: float | None
) -> str:
    p, kept, off = found.get("num_virtual_tokens"), sum(lengths), sum(n == 0 for n in lengths)
    of = f" of {p * len(lengths):,}" if p else ""
    words = [
        f"{kept:,}{of} tokens",
        f"{off} of {len(lengths)} layers off" if off else f"{len(lengths)} layers, none off",
    ]
    if widths is not None:
        size = sum(n * w for n, w in zip(lengths, widths, strict=True))
        share = f", {size / budget_bytes:.0%} of the budget of {_size(budget_bytes)}" if budget_bytes else ""
        words = [f"{_size(size)} of keys and values in bf16{share}", *words]
    return "; ".join(words)


def _size(number: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} bytes"
