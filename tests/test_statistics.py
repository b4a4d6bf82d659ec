"""Resampled metrics against measuring every resample anew; intervals, tests and ranks against what is known of them."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import norm, ttest_rel

from peml.compare import resample
from peml.compare.resample import resampled, resampled_score, units_of
from peml.compare.statistics import average_ranks, bootstrap, holm, interval, paired_p
from peml.errors import PemlError
from peml.tasks.metrics import METRICS, Answers, compute
from peml.training.predictions import Predicted


def answers(kind: str, n: int, seed: int = 0) -> Answers:
    rng = random.Random(seed)
    groups = [str(rng.randrange(n // 3)) for _ in range(n)]
    if kind == "number":
        right = [str(rng.randrange(6)) for _ in range(n)]
        return Answers([repr(float(value) + rng.choice([-1, 0, 0, 1, 2.5])) for value in right], right)
    words = ("no", "maybe", "yes")
    right = [rng.choice(words) for _ in range(n)]
    given = [value if rng.random() < 0.6 else rng.choice(words) for value in right]
    accepted = [("Yes", "yes!") if i % 5 == 0 else () for i in range(n)]
    return Answers(given, right, words, groups, accepted)


def draws(units: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` resamples of the units, as how often each row is in it."""
    whole = int(units.max()) + 1
    often = np.random.default_rng(seed).multinomial(whole, [1 / whole] * whole, size=count)
    return often[:, units].astype(float)


def anew(given: Answers, name: str, weights: np.ndarray) -> list[float]:
    """The slow way: rows written out as often as they were drawn."""
    out = []
    for line in weights:
        rows = [i for i, often in enumerate(line) for _ in range(int(often))]
        own = Answers(
            [given.predictions[i] for i in rows],
            [given.references[i] for i in rows],
            given.choices,
            # A group that was drawn twice is two groups that look alike, and they count twice.
            [given.groups[i] for i in rows] if given.groups else (),
            [given.accepted[i] for i in rows] if given.accepted else (),
        )
        out.append(compute(name, own))
    return out


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.kind != "group"])
def test_a_metric_on_resamples_is_the_metric_of_the_rows_written_out(name: str) -> None:
    given = answers(METRICS[name].kind, 23)
    weights = draws(np.arange(23), 40)
    weights[0] = 0.0
    weights[0, 3] = 23  # one row alone: constant answers
    np.testing.assert_allclose(resampled(given, name, weights), anew(given, name, weights), atol=1e-12)
    # None of them is left to the slow way, which the metrics of users would take.
    assert name in resample._FAST
    np.testing.assert_allclose(resample._one_by_one(given, name, weights), anew(given, name, weights), atol=1e-12)


def test_groups_are_drawn_and_counted_as_a_whole() -> None:
    given = answers("text", 30)
    units = units_of(given, ["group_exact_match"])
    assert len(set(units.tolist())) == len(set(given.groups)) and len(units_of(given, ["accuracy"])) == 30
    weights = draws(units, 20)
    whole = {g: all(p == r for p, r, h in zip(given.predictions, given.references, given.groups, strict=True) if h == g) for g in given.groups}  # fmt: skip
    for line, value in zip(weights, resampled(given, "group_exact_match", weights), strict=True):
        drawn = {g: line[given.groups.index(g)] for g in whole}
        assert value == pytest.approx(sum(drawn[g] * whole[g] for g in whole) / sum(drawn.values()))


def test_a_metric_of_one_group_counts_its_rows_alone() -> None:
    given = answers("text", 30)
    weights = draws(np.arange(30), 20) + 1.0  # no resample without the group, but for the one below
    group = given.groups[0]
    picked = [i for i, own in enumerate(given.groups) if own == group]
    weights[0, picked] = 0.0
    values = resampled(given, f"accuracy/{group}", weights)
    assert np.isnan(values[0])
    right = np.array([p == r for p, r in zip(given.predictions, given.references, strict=True)], dtype=float)
    expected = (weights[1:][:, picked] @ right[picked]) / weights[1:][:, picked].sum(1)
    np.testing.assert_allclose(values[1:], expected)


def test_answers_that_are_no_numbers_count_as_the_mean() -> None:
    given = answers("number", 20)
    given = Answers(["none", *given.predictions[1:]], given.references)
    weights = draws(np.arange(20), 15)
    for name in ("pearson", "spearman"):
        np.testing.assert_allclose(resampled(given, name, weights), anew(given, name, weights), atol=1e-12)


def test_a_score_is_the_mean_of_its_metrics() -> None:
    given, weights = answers("label", 20), draws(np.arange(20), 5)
    both = resampled(given, "accuracy", weights) + resampled(given, "f1", weights)
    np.testing.assert_allclose(resampled_score(given, ["accuracy", "f1"], weights), both / 2)


def told(right: Sequence[bool], rows: str = "same") -> Predicted:
    return Predicted(Answers(["yes" if r else "no" for r in right], ["yes"] * len(right)), ("accuracy",), rows)


def test_with_one_seed_the_interval_is_that_of_a_share() -> None:
    """The textbook's: p +- 1.96 sqrt(p (1 - p) / n)."""
    n, p = 400, 0.7
    found = {"a": {0: {"t": told([i < p * n for i in range(n)])}}}
    low, high = interval(bootstrap(found, rounds=4000).scores("a", [0], "t"))
    half = norm.ppf(0.975) * np.sqrt(p * (1 - p) / n)
    assert low == pytest.approx(p - half, abs=0.006) and high == pytest.approx(p + half, abs=0.006)


def test_seeds_widen_the_interval_by_how_much_they_differ() -> None:
    """With answers that are all alike within a seed, only the seeds vary: sd of a mean of S draws of the seeds' scores."""
    n, seeds = 50, range(6)
    found = {"a": {s: {"t": told([s % 2 == 0] * n)} for s in seeds}}
    drawn = bootstrap(found, rounds=4000).scores("a", list(seeds), "t")
    assert drawn.std() == pytest.approx(0.5 / np.sqrt(6), rel=0.05)


@pytest.mark.parametrize("same", [True, False])
def test_rows_that_all_seeds_share_are_drawn_once_for_all(same: bool) -> None:
    """Of shared rows the luck does not average out over seeds: variance p(1-p)/n, or that over S draws of S seeds."""
    n, seeds, p = 60, 5, 0.5
    found = {"a": {s: {"t": told([i < p * n for i in range(n)], "same" if same else str(s))} for s in range(seeds)}}
    drawn = bootstrap(found, rounds=4000).scores("a", list(range(seeds)), "t")
    # A seed that is drawn twice brings its rows twice: E[sum c_s^2] / S^2 = (2 - 1/S) / S.
    factor = 1.0 if same else (2 - 1 / seeds) / seeds
    assert drawn.var() == pytest.approx(factor * p * (1 - p) / n, rel=0.1)


def test_methods_share_their_draws() -> None:
    """Where two methods differ in the same rows by the same, their difference varies only as those rows do."""
    hard = [i % 2 == 0 for i in range(80)]
    easy = [True] * 4 + hard[4:]
    found = {
        name: {s: {"t": told(right), "u": told(right)} for s in range(3)} for name, right in (("a", hard), ("b", easy))
    }
    drawn = bootstrap(found, rounds=2000)
    gain = drawn.scores("b", [0, 1, 2]) - drawn.scores("a", [0, 1, 2])
    # Two of 80 rows differ, in each of two tasks that are drawn apart.
    share = 2 / 80
    assert gain.min() >= 0 and gain.mean() == pytest.approx(share, rel=0.05)
    assert gain.var() == pytest.approx(share * (1 - share) / 80 / 2, rel=0.15)


def test_a_method_that_lacks_a_seed_is_measured_on_the_others() -> None:
    found = {"a": {0: {"t": told([True, False])}, 1: {"t": told([True, True])}}, "b": {1: {"t": told([False, True])}}}
    drawn = bootstrap(found, rounds=200)
    scores = drawn.scores("b", [1], "t")
    assert np.isnan(scores[drawn.drawn[:, 1] == 0]).all() and np.isfinite(scores[drawn.drawn[:, 1] > 0]).all()
    assert interval(scores) is not None and interval(np.full(3, np.nan)) is None


def test_other_rows_are_refused() -> None:
    found = {"a": {0: {"t": told([True])}}, "b": {0: {"t": told([True], "other")}}}
    with pytest.raises(PemlError, match=r"task 't': a and b were measured on other rows with seed 0"):
        bootstrap(found)


def test_the_same_seed_draws_the_same() -> None:
    found = {"a": {s: {"t": told([i % 3 == 0 for i in range(40)], str(s))} for s in range(3)}}
    one, two, other = (bootstrap(found, 50, seed).scores("a", [0, 1, 2], "t") for seed in (0, 0, 1))
    assert (one == two).all() and (one != other).any()


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, None, 0.005]) == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]


def test_the_test_is_over_seeds() -> None:
    ours, theirs = [0.7, 0.72, 0.75], [0.69, 0.70, 0.70]
    assert paired_p(ours, theirs) == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert paired_p([0.7], [0.6]) is None and paired_p([0.5, 0.6], [0.5, 0.6]) is None


def test_ranks_share_places_and_count_what_all_have() -> None:
    scores = {
        "a": {("t", 0): 0.9, ("u", 0): 0.5, ("t", 1): 1.0},
        "b": {("t", 0): 0.9, ("u", 0): 0.6},
        "c": {("t", 0): 0.1, ("u", 0): 0.4},
    }
    assert average_ranks(scores) == {"a": 1.75, "b": 1.25, "c": 3.0}
    assert average_ranks({"a": {("t", 0): 1.0}, "b": {}}) == {}


def test_labels_that_a_model_makes_up_do_not_fill_the_memory() -> None:
    """Every text written is a label: a table of labels by labels for each of 1,000 resamples would take 32 GB."""
    n = 2000
    given = Answers([f"text {i}" if i % 2 else "yes" for i in range(n)], ["yes"] * n, ("no", "yes"))
    weights = draws(np.arange(n), 1000)
    tracemalloc.start()
    values = [resampled(given, name, weights)[:3] for name in ("f1", "macro_f1", "matthews")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500e6
    for own, name in zip(values, ("f1", "macro_f1", "matthews"), strict=True):
        np.testing.assert_allclose(own, anew(given, name, weights[:3]), atol=1e-12)
