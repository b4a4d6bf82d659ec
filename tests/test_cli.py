"""The command line as a person uses it: what it prints, its exit codes, and errors without tracebacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from peml.training import RunFolder
from peml.training.recipe import load_recipe
from suite_files import write_suite
from workshop import recipe, write_recipe


def test_a_run_is_trained_inspected_and_measured(peml, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = tmp_path / "run"
    code, out, _ = peml("train", write_recipe(tmp_path), "--output", run)
    assert code == 0
    assert all(word in out for word in ("size", "color", "exact_match", "before", "after", "trained parameters"))

    code, out, _ = peml("inspect", run)
    assert code == 0
    for word in ("size, color", "LoRA  r 2", "PrefixNAS", "cells", "layer  0", "parameters", "export to"):
        assert word in out, word
    for line in ("no --to merged: its prompt would be lost", "yes --to kv: one for all tasks"):
        assert line in " ".join(out.split())
    assert "operations [identity, linear" in " ".join(out.split())

    code, out, _ = peml("evaluate", run, "--ablate", "prompt, adapter")
    assert code == 0 and "without prompt" in out and "without adapter" in out
    assert (run / "evaluation.json").exists()
    after = RunFolder(run).read_metrics()["average"]["after"]
    assert f"{after:.3f}" in out

    code, out, _ = peml("inspect", run / "adapter")
    assert code == 0 and "size, color" in out


def test_an_adapter_routed_by_task_is_inspected(peml, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    changes = {"method": "mtl-lora", "set": {}, "evaluate_before": False}
    code, _, _ = peml("train", write_recipe(tmp_path, **changes), "--output", tmp_path / "run")
    assert code == 0
    _, out, _ = peml("inspect", tmp_path / "run")
    assert "--to lora: one for each task" in out and "--to kv: it has no prompt" in out


def test_lists(peml) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = peml("methods")
    assert all(name in out for name in ("lora", "mtl-lora", "lora+prefix", "peml"))
    _, out, _ = peml("tasks")
    assert "glue/rte" in out and "toy/" in out
    _, out, _ = peml("tasks", "glue")
    assert "glue/rte" in out and "toy/" not in out
    _, out, _ = peml("tasks", "list", "mmlu")
    assert "mmlu/virology" in out and len(out.strip().split("\n")) > 57


def test_rows_are_shown_as_a_model_reads_them(peml, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = write_suite("glue", tmp_path / "glue")
    code, out, _ = peml("tasks", "show", "glue/rte", "--path", folder, "--rows", "1")
    assert code == 0 and "glue/rte, train 1" in out and "RTE/train.tsv:2" in out and "train 2" not in out
    assert "Sentence 1: Ann lives in Oslo.\n" in out and "encoder 2  Ann lives in Norway." in out
    assert re.search(r"answer +yes\n +choices +no \| yes\n", out)
    _, out, _ = peml(
        "tasks", "show", "glue", "--path", folder, "--split", "eval", "--model", "toy", "--max-length", "40"
    )
    assert out.count(", eval 1 ") == 9 and re.search(r"group +mismatched\n", out)
    assert "tokens     40 of at most 40, truncated to: <bos>" in out
    path = write_recipe(tmp_path)
    name = load_recipe(path).every_task()[0].name
    code, out, _ = peml("tasks", "show", f"{path}:{name}", "--rows", "2", "--few-shot", "1")
    assert code == 0 and out.count(f"{name}, train") == 2 and "also right" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "there is no recipe none.yaml"),
        (["tasks", "gleu"], "did you mean 'glue'"),
        (["tasks", "show", "gleu/rte"], "there is no suite 'gleu'; did you mean 'glue'"),
        (["tasks", "show", "glue/rt"], "did you mean 'rte'"),
        (["tasks", "show", "glue/rte", "--path", "nowhere"], "task 'rte': `path` nowhere is not a folder"),
        (["tasks", "show", "none.yaml"], "there is no recipe none.yaml"),
        (["tasks", "show", "none.yaml", "--path", "x"], "--path goes with a suite"),
        (["tasks", "show", "toy/mood", "--model", "/nowhere"], "--model /nowhere could not be loaded"),
        (["evaluate", "nowhere"], "nowhere is not a folder"),
        (["inspect", "nowhere"], "nowhere holds no adapter"),
        (["evaluate", "nowhere", "--ablate", "prefix"], "--ablate takes prompt, adapter, both and all, not 'prefix'"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(peml, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    code, _, errors = peml(*arguments)
    assert code == 2
    assert message in errors and "Traceback" not in errors
    assert len(errors.strip().split("\n")) == 1


def test_a_wrong_recipe_leaves_no_folder(peml, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = write_recipe(tmp_path, method="pmel")
    code, _, errors = peml("train", path, "--output", tmp_path / "run")
    assert code == 2 and "did you mean peml" in errors and str(path) in errors
    assert not (tmp_path / "run").exists()


def test_usage_errors_have_code_2(peml) -> None:  # type: ignore[no-untyped-def]
    code, _, errors = peml("train")
    assert code == 2 and "give a recipe" in errors
    code, _, errors = peml("trian")
    assert code == 2 and "No such command" in errors


def test_a_damaged_adapter_is_named(peml, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = recipe(tmp_path)["train"] | {"max_steps": 2}
    path = write_recipe(tmp_path, evaluate_before=False, train=arguments)
    peml("train", path, "--output", tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for command in ("inspect", "evaluate"):
        code, _, errors = peml(command, tmp_path / "run")
        assert code == 2 and "adapter" in errors, command
    whole = weights.with_name("adapter_config.json").read_text()
    for broken in ("{", "[]", '{"peft_type": "LORA"}', whole.replace('"conv3"', '"linear"').replace('"gated",', "")):
        weights.with_name("adapter_config.json").write_text(broken)
        for command in ("inspect", "evaluate"):
            code, _, errors = peml(command, tmp_path / "run")
            assert code == 2 and "adapter" in errors and "Traceback" not in errors, (command, broken)
    weights.with_name("adapter_config.json").write_text(whole)
    weights.unlink()
    for command in ("inspect", "evaluate"):
        code, _, errors = peml(command, tmp_path / "run")
        assert code == 2 and "adapter_model.safetensors" in errors, command


def test_a_task_is_added_from_the_command_line(peml, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    settings = recipe(tmp_path)
    assert (
        peml("train", write_recipe(tmp_path, method="mtl-lora", set={"adapter.r": 2}), "--output", tmp_path / "run")[0]
        == 0
    )
    task = settings["tasks"][0] | {"name": "small"}
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    code, out, _ = peml("train", "--from", tmp_path / "run", "--add-task", tmp_path / "new.yaml", "--init", "copy:size")
    assert code == 0 and "small" in out
    grown = RunFolder(tmp_path / "run+new").read_metrics()
    whole = RunFolder(tmp_path / "run").read_metrics()
    assert grown["after"]["color"] == whole["after"]["color"]
    assert 0 < sum(grown["parameters"].values()) < sum(whole["parameters"].values())
    for arguments in (["train"], ["train", "--from", tmp_path / "run"], ["train", "x.yaml", "--add-task", "new.yaml"]):
        code, _, error = peml(*arguments)
        assert code == 2 and "give a recipe, or --from RUN with --add-task FILE" in error
    code, _, error = peml("train", "--from", tmp_path / "run", "--add-task", tmp_path / "new.yaml", "--freeze", "all")
    assert code == 2 and "freeze: input should be 'shared' or 'none', not 'all'" in error


def test_methods_are_compared_and_reported(peml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from peml.compare import compare as real
    from test_compare import Here, small

    runner = Here(fail=["mtl-lora/0"])
    asked = {}

    def here(*arguments: object, **settings: object) -> object:
        asked.update(settings)
        return real(*arguments, **settings, runner=runner)  # type: ignore[arg-type]

    monkeypatch.setattr("peml.compare.compare", here)
    path, out = small(tmp_path), tmp_path / "out"
    code, said, _ = peml("compare", path, "--methods", "lora, mtl-lora", "--seeds", "1", "--output", out)
    assert code == 1 and asked["methods"] == ["lora", "mtl-lora"] and asked["workers"] == 1
    assert "failed: mtl-lora, seed 0: it was not to be" in said and "1 of 2 jobs failed" in said
    runner.fail = []
    code, said, _ = peml("compare", path, "--methods", "lora,mtl-lora", "--seeds", "1", "--output", out)
    assert code == 0 and "1 of 2 jobs are finished already" in said and f"pemlreport{out}" in "".join(said.split())
    code, said, _ = peml("report", out)
    assert code == 0 and "report.html" in said and (out / "report.md").exists()
    code, _, errors = peml("report", tmp_path)
    assert code == 2 and "holds no comparison" in errors
    code, _, errors = peml("compare", path, "--methods", "lora,loora")
    assert code == 2 and "did you mean lora" in errors
