"""What a task can be measured by: pure functions over texts, on top of scikit-learn and scipy.

Every metric takes the answers of a task as plain strings and answers with one number. Input on
which the textbook formula has no value (constant predictions, a class that never occurs) counts 0.0, without
a warning: at the start of training that is the ordinary case, not a mistake.

scikit-learn and scipy are imported where they are used, which makes `import peml` two seconds faster.
"""

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peml.errors import PemlError

Texts = Sequence[str]


@dataclass(frozen=True)
class Answers:
    """What was answered to the rows of a task, and what would have been right.

    Attributes:
        predictions: the answers given.
        references: the right answer to each row.
        choices: the task's fixed options, in its order; none: it has no such options.
        groups: what rows belong together by; none: nothing.
        accepted: all right answers to each row; none: there is one, the reference.
    """

    predictions: Texts
    references: Texts
    choices: tuple[str, ...] = ()
    groups: Texts = ()
    accepted: Sequence[tuple[str, ...]] = ()

    def of_group(self, group: str) -> "Answers":
        """The rows of one group."""
        picked = [i for i, name in enumerate(self.groups) if name == group]
        return replace(
            self,
            predictions=[self.predictions[i] for i in picked],
            references=[self.references[i] for i in picked],
            groups=[group] * len(picked),
            accepted=[self.accepted[i] for i in picked] if self.accepted else (),
        )

    def best(self, similarity: Callable[[str, str], float]) -> float:
        """Mean over rows of the similarity to the right answer that is most like the prediction."""
        accepted = self.accepted or [(reference,) for reference in self.references]
        # A row that lists no other answers has one.
        listed = [several or (one,) for several, one in zip(accepted, self.references, strict=True)]
        best = [max(similarity(p, r) for r in right) for p, right in zip(self.predictions, listed, strict=True)]
        return sum(best) / len(best)


@dataclass(frozen=True)
class Metric:
    """A metric and what it may be asked of.

    Attributes:
        function: `(answers) -> number`.
        higher_is_better: true for all metrics of this table; a loss would say false.
        kind: `label` needs a fixed set of choices, `number` answers that read as numbers, `group` rows that belong
            together, `text` nothing.
    """

    function: Callable[[Answers], float]
    higher_is_better: bool
    kind: Literal["label", "number", "group", "text"]


def accuracy(answers: Answers) -> float:
    """Share of predictions that equal the reference to the letter."""
    return _share([p == r for p, r in zip(answers.predictions, answers.references, strict=True)])


def exact_match(answers: Answers) -> float:
    """Share of predictions that equal the reference, or one of several, up to case and spacing."""
    return answers.best(lambda prediction, right: float(_plain(prediction) == _plain(right)))


def f1(answers: Answers) -> float:
    """F1 of the positive class, the task's *last* choice: with `choices: [no, yes]`, the F1 of `yes`."""
    from sklearn.metrics import f1_score

    positive = [answers.choices[-1]]
    return float(f1_score(answers.references, answers.predictions, labels=positive, average="macro", zero_division=0.0))


def macro_f1(answers: Answers) -> float:
    """Mean of the F1 of every class that occurs in references or predictions (scikit-learn's convention)."""
    from sklearn.metrics import f1_score

    return float(f1_score(answers.references, answers.predictions, average="macro", zero_division=0.0))


def matthews(answers: Answers) -> float:
    """Matthews correlation, in [-1, 1]; 0.0 when either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(set(answers.predictions)) < 2 or len(set(answers.references)) < 2:
        return 0.0
    return float(matthews_corrcoef(answers.references, answers.predictions))


def pearson(answers: Answers) -> float:
    """Linear correlation of the answers read as numbers, in [-1, 1]; 0.0 when either side is constant."""
    from scipy import stats

    return _correlation(stats.pearsonr, answers.predictions, answers.references)


def spearman(answers: Answers) -> float:
    """Rank correlation of the answers read as numbers, in [-1, 1]; 0.0 when either side is constant."""
    from scipy import stats

    return _correlation(stats.spearmanr, answers.predictions, answers.references)


def group_exact_match(answers: Answers) -> float:
    """Share of groups in which every prediction is right: the EM of MultiRC (aclanthology.org/N18-1023)."""
    whole: dict[str, bool] = {}
    for group, prediction, reference in zip(answers.groups, answers.predictions, answers.references, strict=True):
        whole[group] = whole.get(group, True) and prediction == reference
    return _share(list(whole.values()))


def squad_exact_match(answers: Answers) -> float:
    """Share of predictions that equal a right answer but for case, punctuation, articles and spacing.

    The exact match of SQuAD (arXiv:1606.05250) and ReCoRD (arXiv:1810.12885).
    """
    return answers.best(lambda prediction, right: float(_bare(prediction) == _bare(right)))


def squad_f1(answers: Answers) -> float:
    """Mean F1 of the words that a prediction shares with the right answer most like it, texts as in exact match.

    F1 = 2 P R / (P + R), P and R the shares of the common words in the prediction and in the answer.
    """
    return answers.best(_words_f1)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(accuracy, higher_is_better=True, kind="text"),
    "exact_match": Metric(exact_match, higher_is_better=True, kind="text"),
    "f1": Metric(f1, higher_is_better=True, kind="label"),
    "macro_f1": Metric(macro_f1, higher_is_better=True, kind="label"),
    "matthews": Metric(matthews, higher_is_better=True, kind="label"),
    "pearson": Metric(pearson, higher_is_better=True, kind="number"),
    "spearman": Metric(spearman, higher_is_better=True, kind="number"),
    "group_exact_match": Metric(group_exact_match, higher_is_better=True, kind="group"),
    "squad_exact_match": Metric(squad_exact_match, higher_is_better=True, kind="text"),
    "squad_f1": Metric(squad_f1, higher_is_better=True, kind="text"),
}


def compute(name: str, answers: Answers) -> float:
    """Value of the metric `name`; of `name/group`, over the rows of that group."""
    base, _, group = name.partition("/")
    if base not in METRICS:
        raise PemlError(f"there is no metric {base!r}; choose one of {', '.join(METRICS)}")
    given, right = len(answers.predictions), len(answers.references)
    if given != right:
        raise ValueError(f"{given} predictions cannot be compared with {right} references")
    if group:
        answers = answers.of_group(group)
    if not answers.references:
        raise PemlError(f"the metric {name!r} needs at least one example to score")
    if METRICS[base].kind == "group" and not answers.groups:
        raise PemlError(f"the metric {name!r} needs the group of each example")
    return METRICS[base].function(answers)


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _bare(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _words_f1(prediction: str, right: str) -> float:
    given, wanted = _bare(prediction).split(), _bare(right).split()
    common = sum((Counter(given) & Counter(wanted)).values())
    # 2 P R / (P + R) with P = common / given and R = common / wanted.
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


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
