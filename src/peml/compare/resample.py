"""Metrics on resamples of the rows, many at a time: a resample is how often it has each row.

    metric(rows, each w_i times)        for every line of `weights`, [B, n]

Letters: `B` resamples, `n` rows, `K` labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peml.tasks.metrics import METRICS, Answers, compute

Array = NDArray[np.float64]


def resampled_score(answers: Answers, names: Sequence[str], weights: Array) -> Array:
    """Mean of several metrics on each resample, `[B]`; where one is not defined, nan.

    Args:
        answers: to all rows.
        names: of the metrics.
        weights: `[B, n]`, whole numbers.
    """
    values: Array = np.mean([resampled(answers, name, weights) for name in names], axis=0)
    return values


def resampled(answers: Answers, name: str, weights: Array) -> Array:
    """One metric on each resample, `[B]`; nan where the resample has no row to measure.

    Args:
        answers: to all rows.
        name: of the metric, `metric` or `metric/group`.
        weights: `[B, n]`, whole numbers; rows of a group alike where the metric measures groups.
    """
    base, _, group = name.partition("/")
    if group:
        picked = [i for i, own in enumerate(answers.groups) if own == group]
        answers, weights = answers.of_group(group), weights[:, picked]
    values = _FAST.get(base, _one_by_one)(answers, base, weights)
    known: Array = np.where(weights.sum(1) > 0, values, np.nan)
    return known


def units_of(answers: Answers, names: Sequence[str]) -> NDArray[np.int64]:
    """What is drawn as a whole, a number for each row: groups where a metric measures them, else single rows."""
    if not any(METRICS[name.partition("/")[0]].kind == "group" for name in names):
        return np.arange(len(answers.references))
    return np.unique(np.asarray(answers.groups), return_inverse=True)[1]


def _rows(answers: Answers, rows: Sequence[int]) -> Answers:
    return replace(
        answers,
        predictions=[answers.predictions[i] for i in rows],
        references=[answers.references[i] for i in rows],
        groups=[answers.groups[i] for i in rows] if answers.groups else (),
        accepted=[answers.accepted[i] for i in rows] if answers.accepted else (),
    )


def _one_by_one(answers: Answers, name: str, weights: Array) -> Array:
    """Any metric, by measuring every resample: exact, and slow."""
    drawn = [np.repeat(np.arange(weights.shape[1]), line.astype(int)).tolist() for line in weights]
    return np.array([compute(name, _rows(answers, rows)) if rows else np.nan for rows in drawn])


def _mean_of_rows(answers: Answers, name: str, weights: Array) -> Array:
    """Metrics that are means over rows: each row is measured once."""
    own = np.array([compute(name, _rows(answers, [i])) for i in range(weights.shape[1])])
    return _divided(weights @ own, weights.sum(1))


def _mean_of_groups(answers: Answers, name: str, weights: Array) -> Array:
    """Metrics that are means over groups, which are drawn as a whole."""
    groups: dict[str, list[int]] = {}
    for i, group in enumerate(answers.groups):
        groups.setdefault(group, []).append(i)
    own = np.array([compute(name, _rows(answers, rows)) for rows in groups.values()])
    drawn = weights[:, [rows[0] for rows in groups.values()]]
    return _divided(drawn @ own, drawn.sum(1))


def _from_confusion(answers: Answers, name: str, weights: Array) -> Array:
    """F1, macro F1 and Matthews correlation, from how often each label was given, was right, and was both, `[B, K]`.

    Multi-class Matthews correlation as scikit-learn has it (Gorodkin 2004). The whole table of given and right labels
    is not needed, and would fill the memory: every text that a model writes is a label.
    """
    labels = sorted({*answers.predictions, *answers.references, *answers.choices})
    place = {label: i for i, label in enumerate(labels)}

    def counted(of_rows: Sequence[str], rows: Sequence[int]) -> Array:
        counts = np.zeros((len(labels), len(weights)))
        np.add.at(counts, [place[of_rows[i]] for i in rows], weights.T[rows])
        return counts.T

    every = list(range(weights.shape[1]))
    given_counts, right_counts = counted(answers.predictions, every), counted(answers.references, every)
    hits = counted(answers.references, [i for i in every if answers.predictions[i] == answers.references[i]])
    if name == "matthews":
        total = weights.sum(1)
        covariance = hits.sum(1) * total - (given_counts * right_counts).sum(1)
        spreads = [total**2 - (side**2).sum(1) for side in (given_counts, right_counts)]
        return _divided(covariance, np.sqrt(spreads[0] * spreads[1]))
    f1 = _divided(2 * hits, given_counts + right_counts)
    if name == "f1":
        return f1[:, place[answers.choices[-1]]]
    return _divided(f1.sum(1), (given_counts + right_counts > 0).sum(1))


def _correlation(answers: Answers, name: str, weights: Array) -> Array:
    """Pearson's and Spearman's correlation, with the ranks that values have in each resample."""
    try:
        given = np.array([float(text) for text in answers.predictions])
    except ValueError:  # an answer that is no number counts as the mean of those of its resample that are
        return _one_by_one(answers, name, weights)
    right = np.array([float(text) for text in answers.references])
    if not np.isfinite(given).all():
        return _one_by_one(answers, name, weights)
    sides = [given, right] if name == "pearson" else [_ranks(side, weights) for side in (given, right)]
    total = weights.sum(1)
    left, other = (side - _divided((weights * side).sum(1), total)[:, None] for side in sides)
    variances = [_divided((weights * side**2).sum(1), total) for side in (left, other)]
    # Rounding leaves something of a variance that is zero.
    least = [1e-18 * float(np.max(np.abs(side), initial=1.0)) ** 2 for side in sides]
    constant = (variances[0] <= least[0]) | (variances[1] <= least[1])
    covariance = _divided((weights * left * other).sum(1), total)
    value: Array = np.where(constant, 0.0, _divided(covariance, np.sqrt(variances[0] * variances[1])))
    return value


def _ranks(values: Array, weights: Array) -> Array:
    """Ranks within each resample, `[B, n]`, equal values sharing the mean of theirs."""
    order = np.argsort(values, kind="stable")
    _, start, place = np.unique(values[order], return_index=True, return_inverse=True)
    counts = np.add.reduceat(weights[:, order], start, axis=1)
    shared = counts.cumsum(1) - counts + (counts + 1) / 2
    ranks = np.empty_like(weights)
    ranks[:, order] = shared[:, place]
    return ranks


def _divided(above: Any, below: Any) -> Array:
    """Where nothing is below, 0: what the metrics say of what the textbook leaves open."""
    ratio: Array = np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) > 0)
    return ratio


_FAST: Mapping[str, Callable[[Answers, str, Array], Array]] = {
    **dict.fromkeys(("accuracy", "exact_match", "squad_exact_match", "squad_f1"), _mean_of_rows),
    **dict.fromkeys(("f1", "macro_f1", "matthews"), _from_confusion),
    **dict.fromkeys(("pearson", "spearman"), _correlation),
    "group_exact_match": _mean_of_groups,
}
"""Metrics that need not be measured anew for every resample; others are."""
