"""How much of a difference would be there again: intervals over rows and seeds, tests over seeds, ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peml.compare.resample import Array, resampled_score, units_of
from peml.errors import PemlError
from peml.training.predictions import Predicted

ROUNDS = 1000
"""Resamples: our choice, which leaves about 25 beyond either end of an interval."""

LEVEL = 0.95
"""Of the intervals, and of the tests with 1 - LEVEL."""

_AT_ONCE = 2_000_000
"""Numbers of a block of resamples, so that many rows do not fill the memory."""

Found = Mapping[str, Mapping[int, Mapping[str, Predicted]]]
"""Answers by method, seed and task."""


@dataclass(frozen=True)
class Bootstrap:
    """Scores on resamples of rows and seeds.

        score*(m, t) = sum_s c_s score(m, s, t; rows* of t) / sum_s c_s,     c ~ multinomial(S; 1/S ..)

    Seeds are drawn with replacement, and so are the rows of every task: once for all seeds if these were measured on
    the same rows, else for each. All methods share all draws, so that what is easy or hard about a draw leaves their
    differences. Rows that are measured in groups are drawn in groups. Two levels as in Davison and Hinkley 1997,
    section 3.8; with few seeds such intervals are too short by about sqrt((S - 1) / S), which is why the tests are
    over seeds alone. Number of resamples: our choice.

    Args:
        values: `[B]` by method, task and seed.
        drawn: `[B, S]`, how often each seed was drawn.
        seeds: their order.
    """

    values: Mapping[str, Mapping[str, Mapping[int, Array]]]
    drawn: NDArray[np.int64]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...] = field(default=())

    def scores(self, method: str, seeds: Sequence[int], task: str | None = None) -> Array:
        """`[B]`, of one task, or of the mean over all.

        Args:
            method: by name.
            seeds: that count.
            task: None: the mean over the tasks.
        """
        if task is None:
            whole: Array = np.mean([self.scores(method, seeds, name) for name in self.tasks], axis=0)
            return whole
        often = self.drawn[:, [self.seeds.index(seed) for seed in seeds]]
        values = np.stack([self.values[method][task][seed] for seed in seeds], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            # A resample without any of these seeds says nothing.
            mean: Array = (often * values).sum(1) / often.sum(1)
        return mean


def bootstrap(found: Found, rounds: int = ROUNDS, seed: int = 0) -> Bootstrap:
    """Draw rows and seeds, and measure every method on every draw.

    Args:
        found: answers by method, seed and task; a method may lack seeds.
        rounds: B.
        seed: of the draws.

    Raises:
        PemlError: two methods were measured on other rows with the same seed.
    """
    seeds = tuple(sorted({own for runs in found.values() for own in runs}))
    tasks = tuple(next(iter(next(iter(found.values())).values())))
    drawn = np.random.default_rng(seed).multinomial(len(seeds), [1 / len(seeds)] * len(seeds), size=rounds)
    values: dict[str, dict[str, dict[int, Array]]] = {name: {task: {} for task in tasks} for name in found}
    for place, task in enumerate(tasks):
        rows = _rows(found, task, seeds)
        shared = len(set(rows.values())) == 1
        for own in seeds:
            random = np.random.default_rng([seed, place, 0 if shared else own + 1])
            mine = {name: runs[own][task] for name, runs in found.items() if own in runs}
            measured = _measured(mine, rounds, random)
            for name, scores in measured.items():
                values[name][task][own] = scores
    return Bootstrap(values, drawn, seeds, tasks)


def _rows(found: Found, task: str, seeds: Sequence[int]) -> dict[int, str]:
    """Fingerprints of a task's rows by seed."""
    rows: dict[int, str] = {}
    for seed in seeds:
        own = {name: runs[seed][task].rows for name, runs in found.items() if seed in runs}
        if len(set(own.values())) > 1:
            first = next(iter(own))
            other = next(name for name, mark in own.items() if mark != own[first])
            raise PemlError(
                f"task {task!r}: {first} and {other} were measured on other rows with seed {seed}: the data have "
                "changed between the runs, compare again in another --output"
            )
        rows[seed] = next(iter(own.values()))
    return rows


def _measured(mine: Mapping[str, Predicted], rounds: int, random: np.random.Generator) -> dict[str, Array]:
    """Scores on resamples of the rows, `[B]` by method; all methods on the same ones."""
    first = next(iter(mine.values()))
    units = units_of(first.answers, first.score)
    count = int(units.max()) + 1
    block = max(1, _AT_ONCE // max(count, len(units)))
    parts: dict[str, list[Array]] = {name: [] for name in mine}
    for begin in range(0, rounds, block):
        size = min(block, rounds - begin)
        often = random.multinomial(count, np.full(count, 1 / count), size=size).astype(float)
        for name, own in mine.items():
            parts[name].append(resampled_score(own.answers, own.score, often[:, units]))
    return {name: np.concatenate(blocks) for name, blocks in parts.items()}


def interval(values: Array, level: float = LEVEL) -> tuple[float, float] | None:
    """The percentile interval; None: there is nothing to see it by."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_p(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Two-sided p of the paired t-test over seeds; None: fewer than two, or differences that do not vary."""
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2 or np.ptp(differences) <= 1e-12:
        return None
    with warnings.catch_warnings():
        # Differences that are nearly the same: the p-value is tiny, and scipy says that it may not be exact.
        warnings.simplefilter("ignore", RuntimeWarning)
        value = float(ttest_rel(ours, theirs).pvalue)
    return value if math.isfinite(value) else None


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for all of them being looked at; those that are None stay so and do not count.

        p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))        Holm 1979

    Args:
        values: of one family of tests.
    """
    order = sorted((value, place) for place, value in enumerate(values) if value is not None)
    out: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (value, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * value))
        out[place] = least
    return out


def average_ranks(scores: Mapping[str, Mapping[tuple[str, int], float]]) -> dict[str, float]:
    """Mean rank of every method over tasks and seeds, 1 the best, equal ones sharing the mean of theirs.

    Args:
        scores: by method, and by task and seed; only what all methods have is ranked.
    """
    from scipy.stats import rankdata

    common = set.intersection(*(set(own) for own in scores.values()))
    ranks = [rankdata([-own[key] for own in scores.values()]) for key in sorted(common)]
    return dict(zip(scores, np.mean(ranks, axis=0).tolist(), strict=True)) if ranks else {}
