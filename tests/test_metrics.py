"""Metrics against scikit-learn and scipy, and on input for which the formulas have no value."""

import random
from typing import Any

import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from peml.errors import PemlError
from peml.tasks import metrics
from peml.tasks.metrics import METRICS, Answers

TWO = ("no", "yes")
THREE = ("no", "maybe", "yes")


def compute(name: str, predictions: list[str], references: list[str], *more: Any, **fields: Any) -> float:
    return metrics.compute(name, Answers(predictions, references, *more, **fields))


def draw(choices: tuple[str, ...], count: int = 200, noise: float = 0.4) -> tuple[list[str], list[str]]:
    rng = random.Random(3)
    references = rng.choices(choices, k=count)
    predictions = [rng.choice(choices) if rng.random() < noise else r for r in references]
    return predictions, references


@pytest.mark.parametrize("choices", [TWO, THREE])
def test_label_metrics_equal_scikit_learn(choices: tuple[str, ...]) -> None:
    predictions, references = draw(choices)
    truth = {
        "accuracy": sklearn_metrics.accuracy_score(references, predictions),
        "macro_f1": sklearn_metrics.f1_score(references, predictions, average="macro"),
        "matthews": sklearn_metrics.matthews_corrcoef(references, predictions),
    }
    for name, value in truth.items():
        assert compute(name, predictions, references, choices) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("choices", [TWO, TWO[::-1]])
def test_f1_is_that_of_the_last_choice(choices: tuple[str, ...]) -> None:
    predictions, references = draw(choices)
    truth = sklearn_metrics.f1_score(references, predictions, pos_label=choices[-1])
    assert compute("f1", predictions, references, choices) == pytest.approx(truth, abs=1e-12)


def test_correlations_equal_scipy() -> None:
    rng = random.Random(5)
    truth = [round(rng.uniform(0, 5), 1) for _ in range(100)]
    guess = [round(value + rng.gauss(0, 1), 1) for value in truth]
    texts = [str(value) for value in guess], [str(value) for value in truth]
    assert compute("pearson", *texts) == pytest.approx(stats.pearsonr(guess, truth)[0], abs=1e-12)
    assert compute("spearman", *texts) == pytest.approx(stats.spearmanr(guess, truth)[0], abs=1e-12)


def test_exact_match_forgives_case_and_spacing_only() -> None:
    predictions = ["The  Hague ", "the hague.", "Paris", ""]
    assert compute("exact_match", predictions, ["the hague", "the hague", "PARIS", "x"]) == 0.5
    assert compute("accuracy", predictions, ["the hague", "the hague", "PARIS", "x"]) == 0.0


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        (["0", "0", "0"], ["0", "1", "0"]),  # constant predictions
        (["0", "1", "0"], ["1", "1", "1"]),  # constant references
        (["0", "0"], ["0", "0"]),
        (["0", "0"], ["1", "1"]),
        (["1"], ["1"]),
    ],
)
def test_degenerate_input_counts_and_does_not_warn(name: str, predictions: list[str], references: list[str]) -> None:
    """Warnings are errors in this suite, so a warning would fail the test."""
    value = compute(name, predictions, references, ("0", "1"), ["a"] * len(references))
    assert -1.0 <= value <= 1.0
    if name in ("matthews", "pearson", "spearman"):
        assert value == 0.0


def test_f1_of_a_class_that_never_occurs_is_zero() -> None:
    assert compute("f1", ["no", "no"], ["no", "no"], TWO) == 0.0
    assert compute("macro_f1", ["no", "no"], ["no", "no"], TWO) == 1.0


def test_a_guess_that_is_no_number_lowers_a_correlation_without_breaking_it() -> None:
    references = ["1", "2", "3", "4"]
    assert compute("pearson", ["1", "2", "3", "4"], references) == pytest.approx(1.0)
    assert 0 < compute("pearson", ["1", "none", "3", "4"], references) < 1
    for unreadable in ("none", "nan", "inf"):
        assert compute("spearman", [unreadable] * 4, references) == 0.0


def test_nearly_constant_numbers_do_not_warn() -> None:
    assert -1.0 <= compute("pearson", ["1", "1", "1.0000000000000002"], ["1", "2", "3"]) <= 1.0
    assert -1.0 <= compute("pearson", ["1e308", "-1e308", "0"], ["1", "2", "3"]) <= 1.0


def test_bad_calls_are_refused() -> None:
    with pytest.raises(PemlError, match=r"no metric 'bleu'; choose one of accuracy"):
        compute("bleu", ["a"], ["a"])
    with pytest.raises(PemlError, match="'accuracy' needs at least one example"):
        compute("accuracy", [], [])
    with pytest.raises(PemlError, match="needs answers that are numbers, not 'high'"):
        compute("pearson", ["1", "2"], ["1", "high"])
    with pytest.raises(ValueError, match="1 predictions cannot be compared with 2"):
        compute("accuracy", ["a"], ["a", "b"])


def test_every_metric_says_that_higher_is_better() -> None:
    assert all(metric.higher_is_better for metric in METRICS.values())
