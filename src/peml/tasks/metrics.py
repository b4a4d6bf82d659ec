"""What a task can be measured by: pure functions over texts, on top of scikit-learn and scipy.

Every metric takes (predictions, references, choices) as plain strings and answers with one number. Input on
which the textbook formula has no value (constant predictions, a class that never occurs) counts 0.0, without
a warning: at the start of training that is the ordinary case, not a mistake.

scikit-learn and scipy are imported where they are used, which makes `import peml` two seconds faster.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peml.errors import PemlError

Texts = Sequence[str]


@dataclass(frozen=True)
class Metric:
    """A metric and what it may be asked of.

    Attributes:
        function: `(predictions, references, choices) -> number`.
        higher_is_better: true for all metrics of this table; a loss would say false.
        kind: `label` needs a fixed set of choices, `number` answers that read as numbers, `text` nothing.
    """

    function: Callable[[Texts, Texts, tuple[str, ...]], float]
    higher_is_better: bool
    kind: Literal["label", "number", "text"]


def accuracy(predictions: Texts, references: Texts, choices: tuple[str, ...]) -> float:
    """Share of predictions that equal the reference to the letter."""
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def exact_match(predictions: Texts, references: Texts, choices: tuple[str, ...]) -> float:
    """Share of predictions that equal the reference up to case and spacing."""
    return accuracy([_plain(p) for p in predictions], [_plain(r) for r in references], choices)


def f1(predictions: Texts, references: Texts, choices: tuple[str, ...]) -> float:
    """F1 of the positive class, the task's *last* choice: with `choices: [no, yes]`, the F1 of `yes`."""
    from sklearn.metrics import f1_score

    positive = choices[-1]
    return float(f1_score(references, predictions, labels=[positive], average="macro", zero_division=0.0))


def macro_f1(predictions: Texts, references: Texts, choices: tuple[str, ...]) -> float:
    """Mean of the F1 of every class that occurs in references or predictions (scikit-learn's convention)."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def matthews(predictions: Texts, references: Texts, choices: tuple[str, ...]) -> float:
    """Matthews correlation, in [-1, 1]; 0.0 when either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(set(predictions)) < 2 or len(set(references)) < 2:
        return 0.0
    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Texts, references: Texts, choices: tuple[str, ...]) -> float:
    """Linear correlation of the answers read as numbers, in [-1, 1]; 0.0 when either side is constant."""
    from scipy import stats

    return _correlation(stats.pearsonr, predictions, references)


def spearman(predictions: Texts, references: Texts, choices: tuple[str, ...]) -> float:
    """Rank correlation of the answers read as numbers, in [-1, 1]; 0.0 when either side is constant."""
    from scipy import stats

    return _correlation(stats.spearmanr, predictions, references)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(accuracy, higher_is_better=True, kind="text"),
    "exact_match": Metric(exact_match, higher_is_better=True, kind="text"),
    "f1": Metric(f1, higher_is_better=True, kind="label"),
    "macro_f1": Metric(macro_f1, higher_is_better=True, kind="label"),
    "matthews": Metric(matthews, higher_is_better=True, kind="label"),
    "pearson": Metric(pearson, higher_is_better=True, kind="number"),
    "spearman": Metric(spearman, higher_is_better=True, kind="number"),
}


def compute(name: str, predictions: Texts, references: Texts, choices: tuple[str, ...] = ()) -> float:
    """Value of the metric `name`; `choices` are the task's, in its order (only `f1` looks at them)."""
    if name not in METRICS:
        raise PemlError(f"there is no metric {name!r}; choose one of {', '.join(METRICS)}")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(references)} references")
    if not references:
        raise PemlError(f"the metric {name!r} needs at least one example to score")
    return METRICS[name].function(predictions, references, choices)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _correlation(function: Callable[..., tuple[float, float]], predictions: Texts, references: Texts) -> float:
    truth = [_number(reference) for reference in references]
    if None in truth:
        raise PemlError(f"a correlation needs answers that are numbers, not {references[truth.index(None)]!r}")
    read = [_number(prediction) for prediction in predictions]
    known = [value for value in read if value is not None]
    if not known:
        return 0.0
    # A generated answer that is no number says nothing: the mean adds nothing to the covariance.
    middle = math.fsum(value / len(known) for value in known)
    guess = [middle if value is None else value for value in read]
    if len(set(guess)) < 2 or len(set(truth)) < 2:
        return 0.0
    with warnings.catch_warnings():
        # Nearly constant predictions are ordinary early in training, too.
        warnings.simplefilter("ignore", RuntimeWarning)
        value = float(function(guess, truth)[0])
    return value if math.isfinite(value) else 0.0
