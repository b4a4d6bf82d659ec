"""The trainer: its loss against a naive one, accumulation, groups, the search schedule, the run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from peml import LoRA, MTLLoRA, PemlConfig, PemlError
from peml.bank import BankLinear
from peml.inspection import inspect_folder
from peml.mixing import Mixing
from peml.regimes import train
from peml.tasks.encode import IGNORED
from peml.training import RunFolder, load_recipe, open_run
from peml.training.data import Collator
from peml.training.loss import LossMeter, balanced, by_task, row_counts, row_losses
from peml.training.recipe import Recipe
from peml.training.trainer import MultiTaskTrainer
from workshop import recipe, write_model, write_recipe


def naive_task_mean(logits: Tensor, labels: Tensor, tasks: list[int], weights: list[float]) -> Tensor:
    """Token by token, in words: the weighted mean over tasks of the mean loss of their answer tokens."""
    by_task: dict[int, list[Tensor]] = {}
    for b, task in enumerate(tasks):
        for s in range(labels.shape[1] - 1):
            target = int(labels[b, s + 1])
            if target != IGNORED:
                by_task.setdefault(task, []).append(-torch.log_softmax(logits[b, s], -1)[target])
    total = sum(weights[t] * sum(losses) / len(losses) for t, losses in by_task.items())
    return total / sum(weights[t] for t in by_task)  # type: ignore[return-value]


def some_batch() -> tuple[Tensor, Tensor, list[int]]:
    logits = torch.randn(5, 7, 11, requires_grad=True)
    labels = torch.full((5, 7), IGNORED)
    for row, length in enumerate((1, 3, 2, 6, 4)):
        labels[row, -length:] = torch.randint(0, 11, (length,))
    return logits, labels, [2, 0, 2, 0, 2]


def test_the_loss_is_the_mean_over_tasks_present() -> None:
    logits, labels, tasks = some_batch()
    weights = [2.0, 5.0, 0.5]
    sums, counts = (
        by_task(values, tasks, 3) for values in (row_losses("causal", logits, labels), row_counts("causal", labels))
    )
    loss = balanced("task_mean", sums, counts, torch.tensor(weights))
    expected = naive_task_mean(logits, labels, tasks, weights)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0])


def test_the_meter_gives_the_mean_token_loss_of_each_task_seen() -> None:
    class OneProcess:
        def reduce(self, tensor: Tensor, how: str) -> Tensor:
            return tensor

    meter = LossMeter(["a", "b", "c"])
    meter.add(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([4, 0, 1]))
    meter.add(torch.tensor([4.0, 0.0, 0.0]), torch.tensor([2, 0, 0]))
    assert meter.pop(OneProcess()) == {"a": 1.0, "c": 1.0}
    assert meter.pop(OneProcess()) == {}


def test_the_collator_pads_on_the_right_and_keeps_tasks_on_the_host() -> None:
    batch = Collator(pad_token_id=9)(
        [
            {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3], "tasks": 1},
            {"input_ids": [4], "labels": [IGNORED], "tasks": 0},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED] * 3]
    assert batch["tasks"] == [1, 0]


def run(folder: Path, name: str, **changes: Any) -> RunFolder:
    data = recipe(folder, **changes)
    if not (folder / "model").exists():
        write_model(folder / "model")
    return train(Recipe.model_validate(data), folder / name)


def weights(folder: RunFolder) -> dict[str, Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)["train"] | {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0}
    whole = run(tmp_path, "whole", method="mtl-lora", set={}, train=arguments)
    parts = arguments | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    split = run(tmp_path, "split", method="mtl-lora", set={}, train=parts)
    first, second = weights(whole), weights(split)
    moved = max(float(v.abs().max()) for k, v in first.items() if k.endswith(".up"))
    assert moved > 1e-4
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-7, msg=key)


def test_a_run_folder_holds_everything(tmp_path: Path) -> None:
    folder = train(write_recipe(tmp_path), tmp_path / "run")
    metrics = folder.read_metrics()
    assert set(metrics["before"]) == set(metrics["after"]) == {"size", "color"}
    assert metrics["steps"] == 12 and metrics["train_seconds"] > 0
    assert metrics["architecture"]["derived"] and len(metrics["architecture"]["operations"]) == 2
    assert metrics["learning_rates"] == {"adapter": 1e-2, "prompt": 1e-3, "architecture": 3e-3}
    assert load_recipe(folder.recipe).config() == load_recipe(tmp_path / "recipe.yaml").config()
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert {"loss/size", "loss/color", "penalty/entropy", "learning_rate"} <= set(log[0])
    # The lock stays, held by nobody: removing it would let two others lock two files of that name.
    assert [p.name for p in folder.path.rglob(".*")] == [".lock"], "nothing temporary is left"
    bench, model = open_run(folder.path)
    again = bench.evaluate(model)
    assert again == metrics["after"]


def test_losses_fall_and_the_tasks_are_learned(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)["train"] | {"max_steps": 150, "architecture_learning_rate": 0.05}
    folder = run(tmp_path, "run", train=arguments | {"prompt_learning_rate": 1e-2})
    metrics = folder.read_metrics()
    for losses in metrics["train_loss"].values():
        assert losses["last"] < 0.5 * losses["first"]
    assert metrics["after"]["size"]["accuracy"] > 0.9 and metrics["after"]["color"]["exact_match"] > 0.9


def test_the_architecture_rests_during_warm_up_and_is_derived_before_the_end(tmp_path: Path) -> None:
    seen: list[tuple[float, bool, float]] = []
    original = MultiTaskTrainer.training_step

    def spy(self: MultiTaskTrainer, *args: Any, **kwargs: Any) -> Any:
        prompt = self.tuner.prompt
        seen.append((float(prompt.progress), prompt.searching, float(prompt.alpha.detach().sum())))
        return original(self, *args, **kwargs)

    arguments = recipe(tmp_path)["train"] | {"max_steps": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "training_step", spy)
        run(tmp_path, "run", train=arguments)
    progress, searching, alpha = zip(*seen, strict=True)
    assert list(searching) == [True] * 18 + [False] * 2
    assert progress[9] == pytest.approx(0.5) and progress[-1] == 1.0
    assert len(set(alpha[:4])) == 1, "still during the first 15 %"
    assert len(set(alpha[4:18])) > 5 and len(set(alpha[18:])) == 1


def test_parameters_fall_into_groups_with_their_own_rates(tmp_path: Path) -> None:
    kept: list[Any] = []
    original = MultiTaskTrainer.create_optimizer

    def spy(self: MultiTaskTrainer, model: Any = None) -> Any:
        optimizer = original(self, model)
        kept.append([(g["name"], g["lr"], g["weight_decay"], g["params"]) for g in optimizer.param_groups])
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == trained
        return optimizer

    arguments = recipe(tmp_path)["train"] | {"max_steps": 1, "weight_decay": 0.1, "architecture_learning_rate": 0.5}
    settings = {k: v for k, v in recipe(tmp_path)["set"].items() if k != "adapter.r"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "create_optimizer", spy)
        run(tmp_path, "run", method="peml+mtl", set=settings, train=arguments)
    groups = {name: (lr, decay) for name, lr, decay, _ in kept[0]}
    assert groups == {
        "adapter": (1e-2, 0.1),
        "adapter per task": (1e-2, 0.0),
        "prompt": (1e-3, 0.1),
        "architecture": (0.5, 0.0),
    }
    stacked = next(params for name, *_, params in kept[0] if name == "adapter per task")
    assert all(p.shape[0] == 2 for p in stacked) and len(stacked) == 2 * 2 * 7
    assert MTLLoRA().needs_task


def test_the_best_checkpoint_can_be_chosen_by_the_average_over_tasks(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)["train"] | {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_average",
    }
    folder = run(tmp_path, "run", method="lora", set={}, train=arguments)
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    averages = [entry["eval_average"] for entry in log if "eval_average" in entry]
    assert len(averages) == 3 and {"eval_size/accuracy", "eval_color/exact_match"} <= {
        key for entry in log for key in entry
    }
    assert folder.read_metrics()["average"]["after"] == pytest.approx(max(averages))


def test_runs_are_never_mixed_and_nothing_of_others_is_removed(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, method="lora", set={}, evaluate_before=False)
    train(path, tmp_path / "run")
    with pytest.raises(PemlError, match=r"run already holds files: add --resume, --overwrite, or another --output"):
        train(path, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    # Weights that were exported are those of the run before.
    (RunFolder(tmp_path / "run").exports / "lora").mkdir(parents=True)
    train(path, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").exists() and not RunFolder(tmp_path / "run").exports.exists()
    with pytest.raises(PemlError, match="contradict each other"):
        train(path, tmp_path / "run", overwrite=True, resume=True)
    for wrong in (path, path / "run"):
        with pytest.raises(PemlError, match=r"recipe.yaml is a file: give a folder for the run"):
            train(path, wrong)
    # A project of the user's, with a recipe and checkpoints of its own, is no run.
    (tmp_path / "checkpoints").mkdir()
    for how in ("overwrite", "resume"):
        with pytest.raises(PemlError, match="holds no run of peml: it is not"):
            train(path, tmp_path, **{how: True})  # type: ignore[arg-type]
    assert path.exists() and (tmp_path / "train.jsonl").exists()


def test_a_metric_of_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    tasks = recipe(tmp_path)["tasks"]
    tasks[0] |= {"group": "color", "metrics": ["accuracy", "accuracy/red", "accuracy/bleu"]}
    path = write_recipe(tmp_path, method="lora", set={}, tasks=tasks)
    with pytest.raises(PemlError, match=r"task 'size': .* group of its metric 'accuracy/bleu'.* are blue, red"):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rate_that_waits_for_a_plateau_looks_at_the_average(tmp_path: Path) -> None:
    own = recipe(tmp_path)["train"] | {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 10.0},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "max_steps": 4,
    }
    path = write_recipe(tmp_path, method="lora", set={}, evaluate_before=False, train=own)
    folder = train(path, tmp_path / "run")
    rates = [json.loads(line).get("learning_rate") for line in folder.log.read_text().splitlines()]
    seen = [rate for rate in rates if rate is not None]
    assert seen[-1] < seen[0] and folder.finished


@pytest.mark.parametrize("arguments", [{"adam_beta1": 2.0}, {"lr_scheduler_kwargs": {"bad": 1}}, {"optim": "nope"}])
def test_what_is_refused_late_leaves_an_old_run_whole(tmp_path: Path, arguments: dict[str, Any]) -> None:
    folder = train(write_recipe(tmp_path, method="lora", set={}, evaluate_before=False), tmp_path / "run")
    before = weights(folder)
    wrong = recipe(tmp_path)["train"] | arguments
    path = write_recipe(tmp_path, method="lora", set={}, evaluate_before=False, train=wrong)
    with pytest.raises(PemlError, match="train: "):
        train(path, folder.path, overwrite=True)
    assert all(torch.equal(value, before[key]) for key, value in weights(folder).items())
    with pytest.raises(PemlError, match="train: "):
        train(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["lora", "peml"])
def test_a_run_that_only_lacks_its_end_is_finished_without_a_further_step(tmp_path: Path, method: str) -> None:
    arguments = recipe(tmp_path)["train"] | {"max_steps": 6, "save_steps": 3, "lr_scheduler_type": "constant"}
    settings = recipe(tmp_path)["set"] if method == "peml" else {}
    path = write_recipe(tmp_path, method=method, set=settings, evaluate_before=False, train=arguments)
    folder = train(path, tmp_path / "run")
    expected, metrics = weights(folder), folder.read_metrics()
    assert train(path, folder.path, resume=True).read_metrics() == metrics, "a finished run stays as it is"
    # As if killed during the last evaluation.
    shutil.rmtree(folder.adapter)
    folder.write_json(folder.metrics, {"data": metrics["data"]})
    resumed = train(path, folder.path, resume=True)
    assert resumed.read_metrics()["steps"] == 6 and resumed.read_metrics()["after"] == metrics["after"]
    assert resumed.read_metrics()["train_loss"] == metrics["train_loss"]
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed).items())


def test_other_rows_and_checkpoints_without_optimizer_are_not_resumed(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)["train"] | {"max_steps": 6, "save_steps": 2}
    path = write_recipe(tmp_path, method="lora", set={}, evaluate_before=False, train=arguments)
    folder = train(path, tmp_path / "run")
    shutil.rmtree(folder.adapter)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "big red cat", "big": true, "color": "red"}\n')
    with pytest.raises(PemlError, match="--resume: the rows are not those"):
        train(path, folder.path, resume=True)
    path = write_recipe(tmp_path, method="lora", set={}, evaluate_before=False, train=arguments)
    for file in folder.checkpoints.rglob("optimizer.pt"):
        file.unlink()
    with pytest.raises(PemlError, match="saved without its optimizer"):
        train(path, folder.path, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)["train"] | {"learning_rate": 1e30, "max_grad_norm": 0.0}
    path = write_recipe(tmp_path, method="lora", set={}, evaluate_before=False, train=arguments)
    with pytest.raises(PemlError, match="training diverged: the loss of task '.*' is not finite at step"):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_evaluation_during_training_leaves_the_logged_losses_alone(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)["train"] | {"max_steps": 4}
    plain = run(tmp_path, "plain", method="lora", set={}, train=arguments)
    busy = run(tmp_path, "busy", method="lora", set={}, train=arguments | {"eval_strategy": "steps", "eval_steps": 1})
    assert plain.read_metrics()["train_loss"] == busy.read_metrics()["train_loss"]


def test_models_that_are_not_causal_or_not_whole_are_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, method="lora", set={})
    stored = tmp_path / "model" / "model.safetensors"
    tensors = load_file(stored)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp" not in k}, stored, metadata={"format": "pt"})
    with pytest.raises(PemlError, match="lacks the weights of .*layers.1.mlp"):
        train(path, tmp_path / "run")
    size = len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    stored.unlink()
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertForMaskedLM(BertConfig(vocab_size=size, max_position_embeddings=64, **small)).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(PemlError, match="task 'color' writes its answers, but the model is an encoder"):
        train(path, tmp_path / "run")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["BertLMHeadModel"]}))
    with pytest.raises(PemlError, match="no causal language model"):
        train(path, tmp_path / "run")
    for file in (tmp_path / "model").glob("token*"):
        file.unlink()
    with pytest.raises(PemlError, match="model: .*"):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_are_cut_to_the_positions_that_the_model_has(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)["train"] | {"max_length": 4096, "max_steps": 1}
    folder = run(tmp_path, "run", method="lora", set={}, train=arguments)
    bench, _ = open_run(folder.path)
    assert bench.max_length == 64


def test_modules_to_save_are_counted(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", method="lora", set={"modules_to_save": ["lm_head"]})
    counts = folder.read_metrics()["parameters"]
    assert counts["other"] == 24 * 34 and counts["adapter"] > 0
    with pytest.raises(PemlError, match="modules_to_save names 'nope'"):
        run(tmp_path, "other", method="lora", set={"modules_to_save": ["nope"]})


def test_bad_rows_stop_before_anything_is_written(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "big cat", "color": "red"}\n')
    with pytest.raises(PemlError, match=r"train.jsonl:61: task 'size': .*'big'"):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere/model"}, "model: /nowhere/model is not a model folder"),
        ({"model": "nobody/nothing"}, "model: nobody/nothing could not be loaded"),
        ({"train": {"max_length": 3}}, r"train.jsonl:\d+.*max_length"),
    ],
)
def test_bad_models_and_lengths_stop_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PemlError, match=message):
        train(write_recipe(tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_on_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = train(write_recipe(tmp_path), tmp_path / "run")
    for file in (tmp_path / "model").iterdir():
        file.unlink()
    write_model(tmp_path / "model", hidden=32)
    with pytest.raises(PemlError, match="trained on another base model"):
        open_run(folder.path)


def test_folders_without_a_run_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PemlError, match="is not a folder"):
        open_run(tmp_path / "none")
    with pytest.raises(PemlError, match=r"holds no finished run: there is no recipe.yaml in it"):
        open_run(tmp_path)
    with pytest.raises(PemlError, match="holds no adapter"):
        inspect_folder(tmp_path)


def test_homogeneous_batches_hold_one_task(tmp_path: Path) -> None:
    seen: list[set[int]] = []
    original = MultiTaskTrainer.compute_loss

    def spy(self: MultiTaskTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(set(inputs["tasks"]))
        return original(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "compute_loss", spy)
        run(tmp_path, "one", method="lora", set={}, mixing={"batches": "homogeneous"})
        assert all(len(tasks) == 1 for tasks in seen) and len(set.union(*seen)) == 2
        seen.clear()
        run(tmp_path, "all", method="lora", set={})
        assert any(len(tasks) == 2 for tasks in seen)
    assert Mixing().batches == "mixed"


def test_checkpointed_activations_train_to_the_same_weights(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)["train"]
    plain = weights(run(tmp_path, "plain", train=arguments))
    checkpointed = weights(run(tmp_path, "less", train=arguments | {"activation_checkpointing": True}))
    for key, value in plain.items():
        assert torch.equal(checkpointed[key], value), key


def test_a_run_is_resumed_under_its_own_recipe_only(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, method="lora", set={}, evaluate_before=False)
    train(path, tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(PemlError, match=r"--resume: the run in .* was started with another recipe \(method differs\)"):
        train(write_recipe(tmp_path, method="mtl-lora", set={}, evaluate_before=False), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before


def test_evaluation_rows_that_cannot_fit_stop_before_training(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write(json.dumps({"text": "big red cat", "big": True, "color": " ".join(["red"] * 40)}) + "\n")
    data = recipe(tmp_path)
    data["tasks"][1]["max_new_tokens"] = 40
    with pytest.raises(PemlError, match=r"eval.jsonl:\d+: task 'color': 40 new tokens"):
        train(Recipe.model_validate(data), tmp_path / "run")
    assert not (tmp_path / "run").exists() and path.exists()


def test_parts_follow_the_adapter_that_the_layers_have_in_force(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    first = PemlConfig(task_names=["a"], adapter=LoRA(r=2), task_type="CAUSAL_LM")
    model = get_peft_model(base, first)
    model.add_adapter("wide", PemlConfig(task_names=["b"], adapter=LoRA(r=3), task_type="CAUSAL_LM"))
    # As transformers' own `set_adapter` does it: the layers are told, the tuner is not.
    for module in base.modules():
        if isinstance(module, BankLinear):
            module.set_adapter("wide")
    assert all(p.shape[0] == 3 for p in model.base_model.parts()["adapter"])
