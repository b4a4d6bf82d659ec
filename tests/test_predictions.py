"""What a run keeps of its answers: enough to measure it again, and what it deploys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from peml import Recipe, train
from peml.errors import PemlError
from peml.tasks.metrics import Answers, compute
from peml.training.predictions import fingerprint, packed, read_predictions
from peml.training.workbench import prepare
from workshop import recipe, write_model


def short(folder: Path, **changes: object) -> Recipe:
    write_model(folder / "model")
    data = recipe(folder, evaluate_before=False, **changes)
    data["train"] |= {"max_steps": 2, "save_strategy": "no"}
    return Recipe.model_validate(data)


def test_a_run_can_be_measured_again_from_its_answers_alone(tmp_path: Path) -> None:
    run = train(short(tmp_path), tmp_path / "run")
    metrics, found = run.read_metrics(), read_predictions(run.predictions)
    assert list(found) == ["size", "color"]
    for task, own in found.items():
        assert len(own.answers.references) == 20 and own.score == ({"size": "accuracy", "color": "exact_match"}[task],)
        assert compute(own.score[0], own.answers) == metrics["after"][task]["score"]
    assert found["size"].answers.choices == ("yes", "no") and set(found["color"].answers.references) == {"red", "blue"}
    # Deployed is a key and a value of 12 numbers for each token that is left.
    lengths = [len(tokens) for tokens in metrics["architecture"]["tokens"]]
    assert metrics["deployed"] == {"adapter": metrics["parameters"]["adapter"], "prompt": sum(lengths) * 2 * 12}
    train(short(tmp_path), run.path, overwrite=True)
    assert read_predictions(run.predictions) == found


def test_groups_and_several_right_answers_survive(tmp_path: Path) -> None:
    bench = prepare(short(tmp_path, method="lora", set={}))
    rows = len(bench.eval["size"])
    groups = [str(i // 2) for i in range(rows)]
    accepted = [("yes", "ja") if i % 2 else () for i in range(rows)]
    given = Answers(["ja"] * rows, ["yes"] * rows, ("yes", "no"), groups, accepted)
    path = tmp_path / "predictions.json"
    path.write_text(packed({"size": given}, {"size": {"accuracy": 0.0}}, bench))
    again = read_predictions(path)["size"]
    assert again.answers == given and again.rows == fingerprint(bench.eval["size"])
    assert len(json.loads(path.read_text())["size"]["texts"]) == 3 + rows // 2
    other = [replace(bench.eval["size"][0], answer="no"), *bench.eval["size"][1:]]
    assert fingerprint(other) != again.rows and fingerprint(bench.eval["size"][::-1]) != again.rows


@pytest.mark.parametrize("content", ["{", "[]", '{"size": {}}', '{"size": {"score": [], "rows": "", "texts": []}}'])
def test_damaged_answers_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "predictions.json"
    with pytest.raises(PemlError, match="there is no .*predictions.json"):
        read_predictions(path)
    path.write_text(content)
    with pytest.raises(PemlError, match="predictions.json is damaged"):
        read_predictions(path)
