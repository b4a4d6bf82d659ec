"""Multitask prompt tuning as its paper trains it: the losses, the stages, what each begins at, and resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import peml
from models import IDS, TASKS, adapt, tiny, tokens
from peml.methods import METHODS, Method
from peml.tasks.encode import IGNORED
from peml.training import Recipe, RunFolder
from peml.training.distillation import Distillation, distance, divergence
from workshop import recipe, rows, write_model, write_rows

# The losses.


def test_the_divergence_by_hand() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    labels = torch.tensor([[IGNORED, 3, 1, IGNORED], [IGNORED, IGNORED, IGNORED, 2]])
    total = 0.0
    # A label is predicted at the position before it.
    for row, column in ((0, 0), (0, 1), (1, 2)):
        p, q = (logits[row, column].softmax(-1) for logits in (teacher, student))
        total += sum(float(p[v]) * (math.log(p[v]) - math.log(q[v])) for v in range(5))
    assert divergence(teacher, student, labels) == pytest.approx(total / 3, rel=1e-5)
    assert divergence(teacher, teacher, labels) == pytest.approx(0, abs=1e-7)
    assert divergence(teacher, student, torch.full((2, 4), IGNORED)) == 0


def test_the_distance_by_hand() -> None:
    torch.manual_seed(0)
    teacher, student = ([torch.randn(2, 3, 4) for _ in range(2)] for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    layers = []
    for wanted, found in zip(teacher, student, strict=True):
        squares = [
            float((wanted[b, s, d] - found[b, s, d]) ** 2)
            for b in range(2)
            for s in range(3)
            for d in range(4)
            if mask[b, s]
        ]
        layers.append(sum(squares) / len(squares))
    assert distance(teacher, student, mask) == pytest.approx(sum(layers) / 2, rel=1e-5)


def terms(hidden_layers: Any, prompt: Any = None, weight: float = 0.9) -> tuple[Any, dict[str, Tensor]]:
    """Both losses of a student, and its model."""
    model = adapt(tiny(layers=3), peml.LoRA(r=2), prompt or peml.MultitaskPrompt(3))
    teacher = peml.PromptTuning(3, per_task=True).build(model.base_model.model.prompt_host.shape, 3).double()
    learn = Distillation(model.base_model, teacher, weight, hidden_layers)
    inputs = {
        "input_ids": tokens(3, 5),
        "attention_mask": torch.ones(3, 5),
        "tasks": TASKS,
        "output_hidden_states": True,
    }
    labels = inputs["input_ids"].masked_fill(torch.arange(5) < 3, IGNORED)
    return (model, teacher, inputs), learn(model, inputs, labels, model(**inputs))


@pytest.mark.parametrize("deep", [False, True])
def test_every_term_reaches_the_student_and_not_the_teacher(deep: bool) -> None:
    for name in ("distil_logits", "distil_hidden"):
        (model, teacher, _), found = terms("all", peml.MultitaskPrompt(3, deep=deep))
        found[name].backward()
        assert all(p.grad.any() for p in model.base_model.prompt.parameters())
        assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("hidden_layers", "kept"), [("all", [1, 2, 3]), ("last", [3]), (2, [1, 3]), (5, [3])])
def test_the_layers_that_are_compared(hidden_layers: Any, kept: list[int]) -> None:
    torch.manual_seed(3)
    (model, teacher, inputs), found = terms(hidden_layers)
    with model.base_model.prompted_by(teacher), torch.no_grad():
        wanted = model(**inputs).hidden_states
    student = model(**inputs).hidden_states
    mean = torch.stack([(wanted[i] - student[i]).float().square().mean() for i in kept]).mean()
    torch.testing.assert_close(found["distil_hidden"], 0.9 * mean)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    model = adapt(tiny(), prompt=peml.PromptTuning(3, per_task=True))
    learn = Distillation(model.base_model, model.base_model.prompt, 0.9, "all")
    inputs = {
        "input_ids": tokens(3, 5),
        "attention_mask": torch.ones(3, 5),
        "tasks": TASKS,
        "output_hidden_states": True,
    }
    found = learn(model, inputs, inputs["input_ids"], model(**inputs))
    assert all(term == pytest.approx(0, abs=1e-9) for term in found.values())


def test_the_teacher_stands_alone_and_only_inside_the_block() -> None:
    """Without the student's adapter; afterwards everything is as it was."""
    model, batch = adapt(tiny(), peml.MTLLoRA(r=2), peml.MultitaskPrompt(3)), tokens(2, 4)
    before = model(input_ids=batch, tasks="rte").logits
    teacher = peml.PromptTuning(2, per_task=True).build(model.base_model.model.prompt_host.shape, 3).double()
    with model.base_model.prompted_by(teacher):
        found = model(input_ids=batch, tasks="rte").logits
    assert torch.equal(model(input_ids=batch, tasks="rte").logits, before)
    alone = adapt(model.unload(), prompt=peml.PromptTuning(2, per_task=True))
    alone.base_model.prompt.load_state_dict(teacher.state_dict())
    assert torch.equal(found, alone(input_ids=batch, tasks="rte").logits)


def test_the_teacher_rests_and_padding_is_not_compared() -> None:
    """Dropout in the student's training is none of the teacher's; what a padded token becomes is nobody's business."""
    config = GPT2Config(vocab_size=67, n_embd=24, n_layer=2, n_head=2, n_positions=32, **{**IDS, "pad_token_id": 1})
    model = adapt(GPT2LMHeadModel(config).double(), prompt=peml.MultitaskPrompt(3)).train()
    teacher = peml.PromptTuning(3, per_task=True).build(model.base_model.model.prompt_host.shape, 3).double()
    seen: list[bool] = []
    model.base_model.model.transformer.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    learn = Distillation(model.base_model, teacher, 1.0, "last")
    ids, mask = tokens(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "tasks": TASKS[:2], "output_hidden_states": True}
    student = model(**inputs)
    seen.clear()
    found = learn(model, inputs, ids, student)["distil_hidden"]
    assert seen and not any(seen) and model.training
    with model.base_model.prompted_by(teacher), torch.no_grad():
        wanted = model.eval()(**inputs).hidden_states[-1]
    difference = (wanted - student.hidden_states[-1])[mask.bool()]
    torch.testing.assert_close(found, difference.float().square().mean(), rtol=1e-4, atol=1e-6)


def test_terms_are_shared_out_over_accumulated_batches(tmp_path: Path) -> None:
    """Half of a step's rows twice: the gradient of the whole is neither doubled nor halved."""
    norms = []
    for rows_, steps in ((4, 1), (2, 2)):
        arguments = mpt(tmp_path).train | {"logging_steps": 1, "max_grad_norm": 1e9, "optim": "sgd"}
        arguments |= {"per_device_train_batch_size": rows_, "gradient_accumulation_steps": steps}
        regime = {"distillation_weight": 1000.0, "student": {"max_steps": 1}}
        run = peml.train(mpt(tmp_path, train=arguments, regime=regime), tmp_path / f"run{steps}")
        norms.append(json.loads((run.stages / "student" / "log.jsonl").read_text().splitlines()[0])["grad_norm"])
    assert 0.7 < norms[0] / norms[1] < 1.4


# The stages.


def mpt(folder: Path, **changes: Any) -> Recipe:
    """Three tasks; two are sources, the third is a target that has few rows."""
    data = recipe(folder)
    third = dict(data["tasks"][0]) | {"name": "third"}
    regime = {
        "sources": [task["name"] for task in data["tasks"]],
        "teachers": {"max_steps": 3, "prompt_learning_rate": 0.03},
        "student": {"max_steps": 4},
    }
    arguments = data["train"] | {"max_steps": 5, "save_steps": 2}
    for key in ("architecture_learning_rate", "finetune_fraction"):
        arguments.pop(key, None)
    whole = data | {"tasks": [*data["tasks"], third], "method": "mpt", "set": {"prompt.num_virtual_tokens": 3}}
    whole |= {"regime": regime | changes.pop("regime", {}), "train": arguments, **changes}
    if not (folder / "model").exists():
        write_model(folder / "model")
    return Recipe.model_validate(whole)


def prompt_of(folder: RunFolder) -> dict[str, Tensor]:
    tensors = load_file(folder.adapter / "adapter_model.safetensors")
    return {key.rpartition(".")[2]: value for key, value in tensors.items()}


def test_the_stages_and_their_bill(tmp_path: Path) -> None:
    whole = mpt(tmp_path, regime={"shots": 4})
    run = peml.train(whole, tmp_path / "run")
    sources = whole.how.sources
    teachers, student = (RunFolder.existing(run.stages / name) for name in ("teachers", "student"))
    found = prompt_of(run)
    assert prompt_of(teachers)["tokens"].shape[:2] == (2, 3)
    assert prompt_of(student)["by_token"].shape == (2, 3, 1) and found["by_token"].shape == (1, 3, 1)
    metrics = run.read_metrics()
    assert list(metrics["after"]) == ["third"] and metrics["data"]["rows"]["third"][0] == 4
    assert {name: stage["steps"] for name, stage in metrics["stages"].items()} == {"teachers": 3, "student": 4}
    assert metrics["steps"] == 5 and all(stage["train_seconds"] > 0 for stage in metrics["stages"].values())
    log = [json.loads(line) for line in student.log.read_text().splitlines()]
    assert {"penalty/distil_logits", "penalty/distil_hidden"} <= set(log[0])
    assert json.loads(teachers.metrics.read_text())["learning_rates"]["prompt per task"] == 0.03
    assert list(json.loads(student.metrics.read_text())["after"]) == sources
    assert "by: subset" in student.recipe.read_text() and "by: subset" not in teachers.recipe.read_text()
    # The finished run opens as any other: with its targets alone.
    bench, model = peml.training.open_run(run.path)
    assert list(bench.tasks) == ["third"] == model.peft_config["default"].task_names


def test_the_target_begins_at_the_mean_of_the_sources(tmp_path: Path) -> None:
    arguments = mpt(tmp_path).train | {"max_steps": 1, "learning_rate": 0.0, "prompt_learning_rate": 0.0}
    changes = {"regime": {"student": {"max_steps": 4, "prompt_learning_rate": 0.02}}, "train": arguments}
    run = peml.train(mpt(tmp_path, **changes), tmp_path / "run")
    source, target = prompt_of(RunFolder(run.stages / "student")), prompt_of(run)
    assert torch.equal(target["shared"], source["shared"])
    for name in ("by_token", "by_feature"):
        assert (source[name][0] - source[name][1]).abs().max() > 1e-3
        assert torch.equal(target[name], source[name].mean(0, keepdim=True))


def test_a_target_that_was_a_source_keeps_its_factors(tmp_path: Path) -> None:
    arguments = mpt(tmp_path).train | {"max_steps": 1, "learning_rate": 0.0, "prompt_learning_rate": 0.0}
    names = mpt(tmp_path).how.sources
    regime = {"targets": ["third", names[1]], "student": {"max_steps": 4, "prompt_learning_rate": 0.02}}
    run = peml.train(mpt(tmp_path, regime=regime, train=arguments), tmp_path / "run")
    source, target = prompt_of(RunFolder(run.stages / "student")), prompt_of(run)
    assert torch.equal(target["by_token"][0], source["by_token"][1])  # in the recipe's order: the source comes first
    assert torch.equal(target["by_token"][1], source["by_token"].mean(0))


def test_two_learning_rates(tmp_path: Path) -> None:
    arguments = mpt(tmp_path).train | {"prompt_learning_rate": 0.003, "task_prompt_learning_rate": 0.007}
    run = peml.train(mpt(tmp_path, train=arguments), tmp_path / "run")
    assert run.read_metrics()["learning_rates"] == {"prompt": 0.003, "prompt per task": 0.007}
    student = json.loads((run.stages / "student" / "metrics.json").read_text())
    assert student["learning_rates"] == {"prompt": 0.003, "prompt per task": 0.007}
    own = peml.train(mpt(tmp_path), tmp_path / "own").read_metrics()["learning_rates"]
    assert own["prompt per task"] == pytest.approx(own["prompt"] * 4 / 3)


def test_stages_have_steps_and_rates_of_their_own(tmp_path: Path) -> None:
    arguments = mpt(tmp_path).train | {"task_prompt_learning_rate": 0.4, "prompt_learning_rate": 0.003}
    regime = {"teachers": {"num_train_epochs": 1}, "shots": 30}
    whole = mpt(tmp_path, train=arguments, regime=regime)
    tasks = [task.model_copy(update={"limit_train": 5}) for task in whole.tasks]
    run = peml.train(whole.model_copy(update={"tasks": tasks}), tmp_path / "run")
    teachers = json.loads((run.stages / "teachers" / "metrics.json").read_text())
    batch = whole.train["per_device_train_batch_size"]
    assert teachers["steps"] == math.ceil(10 / batch)  # two sources of five rows, once
    assert teachers["learning_rates"] == {"prompt per task": 0.003}
    assert run.read_metrics()["data"]["rows"]["third"][0] == 5  # the task's own limit is the lower one


def test_without_distillation_there_are_no_teachers(tmp_path: Path) -> None:
    run = peml.train(mpt(tmp_path, regime={"distillation_weight": 0}), tmp_path / "run")
    assert sorted(run.read_metrics()["stages"]) == ["student"] and not (run.stages / "teachers").exists()


def test_an_adapter_joins_in_the_last_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Method(peml.LoRA(r=2), peml.MultitaskPrompt(3), "distil_then_adapt", "both")
    monkeypatch.setitem(METHODS, "lora+mpt", both)
    run = peml.train(mpt(tmp_path, method="lora+mpt", set={"adapter.r": 3}), tmp_path / "run")
    assert {"down", "up", "shared"} <= set(prompt_of(run)) and "down" not in prompt_of(
        RunFolder(run.stages / "student")
    )


def test_attempt_attends_to_its_teachers(tmp_path: Path) -> None:
    run = peml.train(mpt(tmp_path, method="attempt", set={"prompt.num_virtual_tokens": 3}), tmp_path / "run")
    assert torch.equal(prompt_of(run)["sources"], prompt_of(RunFolder(run.stages / "teachers"))["tokens"])
    assert sorted(run.read_metrics()["stages"]) == ["teachers"]
    bench, model = peml.training.open_run(run.path)
    again = bench.evaluate(model)
    assert again == run.read_metrics()["after"]


# Going on.


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("stage", ["teachers", "student", "targets"])
def test_an_interrupted_run_goes_on_in_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    whole = peml.train(mpt(tmp_path), tmp_path / "whole")
    trained = peml.training.run._save

    def save(model: Any, folder: RunFolder, state: Any) -> None:
        if (folder.path.name if folder.path.parent.name == "stages" else "targets") == stage:
            raise Killed
        trained(model, folder, state)

    monkeypatch.setattr(peml.training.run, "_save", save)
    bench = peml.training.workbench.prepare(mpt(tmp_path))
    with pytest.raises(Killed):
        peml.train(mpt(tmp_path), tmp_path / "parts", workbench=bench)
    # The caller's model is as plain as it was.
    assert not hasattr(bench.model, "prompt_host") and "peml" not in bench.model.config._attn_implementation
    monkeypatch.setattr(peml.training.run, "_save", trained)
    with pytest.raises(peml.PemlError, match="already holds files"):
        peml.train(mpt(tmp_path), tmp_path / "parts")
    with pytest.raises(peml.PemlError, match="another recipe"):
        peml.train(mpt(tmp_path, regime={"shots": 3}), tmp_path / "parts", resume=True)
    parts = peml.train(mpt(tmp_path), tmp_path / "parts", resume=True)
    first, second = prompt_of(whole), prompt_of(parts)
    assert all(torch.allclose(first[key], second[key], rtol=1e-5, atol=1e-6) for key in first)
    assert set(parts.read_metrics()["stages"]) == {"teachers", "student"}
    # Finished is finished; and what is replaced is replaced whole.
    changed = parts.metrics.read_bytes()
    peml.train(mpt(tmp_path), tmp_path / "parts", resume=True)
    assert parts.metrics.read_bytes() == changed
    peml.train(mpt(tmp_path, regime={"distillation_weight": 0}), tmp_path / "parts", overwrite=True)
    assert not (parts.stages / "teachers").exists()


# What is refused, before anything is written.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regime": {"sources": ["nothing"]}}, r"regime.sources names 'nothing', which is no task here; there are"),
        ({"regime": {"targets": []}}, "regime.targets is empty"),
        ({"regime": {"shots": 0}}, "regime: shots"),
        ({"regime": {"hidden_layers": 0}}, "regime.hidden_layers must be all, last, or 1 and more"),
        ({"regime": {"kappa": 1}}, "regime: unknown key kappa"),
        ({"regime": {"teachers": {"max_step": 1}}}, r"regime.teachers.max_step is not a training argument; did you"),
        ({"regime": {"name": "serial"}}, "regime.name must be one of joint, distil_then_adapt"),
        ({"regime": {"student": {"dtype": "bfloat16"}}}, "regime.student.dtype cannot differ from the recipe"),
        ({"regime": {"hidden_layers": True}}, "regime: hidden_layers"),
        ({"mixing": {"by": "subset", "cap": 3}}, "by: subset` says what each batch holds"),
        ({"method": "lora", "set": {}, "regime": {"name": "distil_then_adapt"}}, "method 'lora' has neither"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        mpt(tmp_path, **changes)


def test_attempt_without_teachers_is_refused(tmp_path: Path) -> None:
    data = recipe(tmp_path) | {"method": "attempt", "set": {}, "regime": "joint"}
    with pytest.raises(Exception, match="needs prompts of source tasks"):
        Recipe.model_validate(data)


def test_a_bad_row_of_a_target_stops_before_the_teachers(tmp_path: Path) -> None:
    whole = mpt(tmp_path)
    broken = write_rows(tmp_path / "broken.jsonl", [*rows(4, 0), {"nothing": 1}])
    data = json.loads(whole.model_dump_json(exclude_none=True))
    data["tasks"][-1]["path"] = str(broken)
    data["tasks"][-1].pop("eval_path", None)
    with pytest.raises(peml.PemlError, match="broken.jsonl"):
        peml.train(Recipe.model_validate(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
