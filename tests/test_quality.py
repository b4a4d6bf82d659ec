"""The project's own comparisons: their recipes can be read, and their records name no folder of this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed with the package

from benchmarks.quality.__main__ import TABLES, committed, main, options_of, recipe_of, write  # noqa: E402

from peml.methods import METHODS  # noqa: E402
from test_compare import Here  # noqa: E402
from test_report import contents  # noqa: E402


@pytest.mark.parametrize("table", TABLES)
def test_the_recipes_can_be_read(table: str, tmp_path: Path) -> None:
    given = [table, "--steps", "7", *([] if table == "toy" else ["--data", str(tmp_path), "--model", "some/model"])]
    recipe = recipe_of(options_of(given))
    assert recipe.compare is not None and recipe.setting("max_steps") == 7
    assert len(recipe.compare.methods) >= 12 and recipe.compare.budget == "peml"
    if table != "toy":
        assert recipe.model == "some/model"
        assert all(str(tmp_path) in str(task) for task in recipe.model_dump()["tasks"])
    assert str(tmp_path) not in str(committed(table))


def test_the_toy_table_has_every_method_that_can_be_trained_at_once() -> None:
    own = recipe_of(options_of(["toy"])).compare
    assert own is not None
    there = {contender.method or name for name, contender in own.methods.items()}
    # These look for clusters, or for prompts of source tasks, first.
    assert set(METHODS) - there == {"one-plus-n", "progressive", "attempt"}


def test_one_command_trains_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["peml.compare.compare"], "LocalRunner", lambda workers, threads: Here())
    given = ["toy", "--methods", "lora", "peml", "--seeds", "1", "--steps", "2", "--work", str(tmp_path / "work")]
    small = committed("toy")
    small["tasks"] = [{"suite": "toy", "include": ["mood", "odd"], "limit_train": 40, "limit_eval": 10}]
    monkeypatch.setattr("benchmarks.quality.__main__.committed", lambda table: json.loads(json.dumps(small)))
    with pytest.raises(SystemExit) as ended:
        main([*given, "--out", str(tmp_path), "--remark", "Short."])
    assert ended.value.code == 0
    text, record = (tmp_path / "quality-toy.md").read_text(), json.loads((tmp_path / "quality-toy.json").read_text())
    assert text.startswith("# Eight toy tasks on the nano model") and "| peml |" in text and "Short." in text
    assert (
        "`python -m benchmarks.quality toy --methods lora peml --seeds 1 --steps 2`" in text
        and "torch" in text.splitlines()[-1]
    )
    assert [row["name"] for row in record["methods"]] == ["lora", "peml"]
    assert not {"pictures", "curves", "recipes"} & set(record) and str(tmp_path) not in json.dumps(record) + text


def test_a_record_has_the_committed_names(tmp_path: Path) -> None:
    write(contents(methods=3, seeds=2), options_of(["encoder", "--seeds", "2"]), tmp_path)
    text = (tmp_path / "quality-encoder.md").read_text()
    assert "benchmarks.quality encoder --data FOLDER --model FOLDER --seeds 2" in text and "```yaml" not in text
