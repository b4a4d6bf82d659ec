"""Numbers of a comparison as people read them: one way for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLACES = 3
"""Of scores."""


def average_words(summary: Mapping[str, Any] | None) -> str:
    """Mean and standard deviation over seeds."""
    if summary is None:
        return ""
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.{PLACES}f}"
    return f"{summary['mean']:.{PLACES}f}{spread}"


def gain_words(test: Mapping[str, Any] | None) -> str:
    """The gain over the baseline, with its interval."""
    if not test:
        return ""
    return f"{signed(test['gain'])}{interval_words(test['interval'], sign=True)}"


def interval_words(interval: tuple[float, float] | None, sign: bool = False) -> str:
    """The two ends of an interval."""
    if interval is None:
        return ""
    low, high = (signed(end) if sign else f"{end:.{PLACES}f}" for end in interval)
    return f" [{low}, {high}]"


def p_words(test: Mapping[str, Any] | None) -> str:
    """The corrected p-value; a dash where there is no test, as with one seed."""
    if not test:
        return ""
    p = test.get("adjusted")
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def signed(value: float) -> str:
    """With its sign; what is shown as zero has none."""
    value = round(value, PLACES)
    return f"{value:+.{PLACES}f}" if value else f"{0:.{PLACES}f}"


def rounded(number: float) -> str:
    """Three figures, and never a power of ten."""
    return f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:.3g}"


def count_words(number: float) -> str:
    """A count of numbers, by thousands, millions and billions."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # What would be rounded to a thousand of a unit is one of the next.
        if number >= 0.9995 * factor:
            return f"{rounded(number / factor)} {unit}"
    return f"{number:.0f}"


def bytes_words(number: float) -> str:
    """A size."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * factor:
            return f"{rounded(number / factor)} {unit}"
    return f"{number:.0f} bytes"


def seconds_words(seconds: float) -> str:
    """A time, in the unit that suits it."""
    if seconds >= 5400:
        return f"{rounded(seconds / 3600)} h"
    if seconds >= 90:
        return f"{seconds / 60:.3g} min"
    return f"{seconds * 1000:.3g} ms" if seconds < 0.1 else f"{seconds:.3g} s"


def sized_words(row: Mapping[str, Any]) -> str:
    """What was solved for the budget, as a person would say it."""
    shown = [
        f"{key.partition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{key.partition('.')[2]} {value}"
        for key, value in row["sized"].items()
        if key.endswith((".r", ".num_virtual_tokens"))
    ]
    return ", ".join(shown) or "as given"
