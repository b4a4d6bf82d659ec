"""`predictions.json`: what was answered to every evaluation row, and what would have been right.

It is enough to measure a run again on any choice of its rows, without model, data or recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peml.errors import PemlError
from peml.evaluation.evaluate import score_names
from peml.tasks import Example
from peml.tasks.metrics import Answers
from peml.training.workbench import Workbench


@dataclass(frozen=True)
class Predicted:
    """The answers to one task.

    Args:
        answers: by row.
        score: metrics whose mean is the task's score.
        rows: fingerprint of the rows; the same rows in the same order have the same.
    """

    answers: Answers
    score: tuple[str, ...]
    rows: str


def packed(answers: Mapping[str, Answers], results: Mapping[str, Mapping[str, float]], bench: Workbench) -> str:
    """The text of the file: of each task its distinct texts once, and every answer as a place among them.

    Args:
        answers: by task.
        results: metrics by task.
        bench: whose evaluation rows were answered.
    """
    own = {
        name: {"score": score_names(results[name], bench.tasks[name]), "rows": fingerprint(bench.eval[name])}
        | _places(given)
        for name, given in answers.items()
    }
    return json.dumps(own, ensure_ascii=False) + "\n"


def _places(answers: Answers) -> dict[str, Any]:
    place: dict[str, int] = {}

    def places(texts: Iterable[str]) -> list[int]:
        return [place.setdefault(text, len(place)) for text in texts]

    own: dict[str, Any] = {
        "choices": places(answers.choices),
        "predictions": places(answers.predictions),
        "references": places(answers.references),
    }
    if any(answers.groups):
        own["groups"] = places(answers.groups)
    if any(answers.accepted):
        own["accepted"] = [places(several) for several in answers.accepted]
    return own | {"texts": list(place)}


def fingerprint(rows: Iterable[Example]) -> str:
    """SHA-256 of what is asked and what is right, in order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.prompt, row.answer, row.value, row.texts, row.choices]).encode())
    return found.hexdigest()


def read_predictions(path: str | Path) -> dict[str, Predicted]:
    """What a run has answered, by task.

    Raises:
        PemlError: there is no such file, or it is damaged.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: _unpacked(own) for name, own in stored.items()}
    except FileNotFoundError:
        raise PemlError(f"there is no {path}: the run was trained by an earlier version, train it again") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise PemlError(f"{path} is damaged ({type(error).__name__}): train the run again") from None


def _unpacked(own: Mapping[str, Any]) -> Predicted:
    texts = own["texts"]

    def read(places: Iterable[int]) -> list[str]:
        return [texts[place] for place in places]

    answers = Answers(
        read(own["predictions"]),
        read(own["references"]),
        tuple(read(own["choices"])),
        read(own["groups"]) if "groups" in own else (),
        [tuple(read(several)) for several in own["accepted"]] if "accepted" in own else (),
    )
    return Predicted(answers, tuple(own["score"]), own["rows"])
