"""Balances in training: gradients by task, accumulation, devices, checkpoints, the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from balance_worker import CASES, RULES, settings, work
from peml import LoRA, MTLLoRA, PemlConfig, PemlError, PrefixNAS
from peml.balance import BALANCES, Equal
from peml.regimes import train
from peml.training import RunFolder
from peml.training.balancing import STATE, Balancer
from peml.training.data import TaskRows
from peml.training.gradients import TaskGradients, conflicts, rows_of
from peml.training.recipe import Recipe
from peml.training.trainer import MultiTaskTrainer
from workshop import killed_in_step, recipe, write_model


def run(folder: Path, name: str, train_with: dict[str, Any] | None = None, **changes: Any) -> RunFolder:
    data = recipe(folder)
    if changes.get("method") != "peml":
        data["set"] = {}
    data |= {"method": "mtl-lora", "evaluate_before": False} | changes
    data["train"] |= train_with or {}
    if not (folder / "model").exists():
        write_model(folder / "model")
    return train(Recipe.model_validate(data), folder / name)


def weights(folder: RunFolder) -> dict[str, Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def log(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.log.read_text().splitlines()]


def assert_alike(first: RunFolder, second: RunFolder, atol: float = 1e-6) -> None:
    given, wanted = weights(second), weights(first)
    assert given.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(given[key], value, rtol=1e-4, atol=atol, msg=key)


def assert_logged(first: RunFolder, second: RunFolder, *keys: str) -> None:
    for one, other in zip(log(first), log(second), strict=True):
        for key in keys:
            assert (key in one) == (key in other), (key, one, other)
            assert one.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-3, abs=1e-6), key


PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 4, "logging_steps": 1, "learning_rate": 0.02}


@pytest.mark.parametrize("method", ["lora", "mtl-lora", "peml"])
def test_a_step_task_by_task_is_the_mixed_step(tmp_path: Path, method: str) -> None:
    more = PLAIN | {"prompt_learning_rate": 1e-2, "architecture_learning_rate": 1e-2}
    mixed = run(tmp_path, "mixed", more, method=method, balance={"gradients_every": 0})
    apart = run(tmp_path, "apart", more, method=method, balance={"gradients_every": 1})
    assert_alike(mixed, apart)
    assert_logged(mixed, apart, "loss", "grad_norm", "penalty/cost", "loss/size")
    assert "conflicts" in log(apart)[0] and "conflicts" not in log(mixed)[0]


# One rule of each kind in the ordinary run of the tests.
QUICK = ("equal", "uncertainty", "famo", "pcgrad")
ALL = [by if by in QUICK else pytest.param(by, marks=pytest.mark.slow) for by in RULES]


@pytest.mark.parametrize("by", ALL)
def test_accumulation_equals_one_large_batch(tmp_path: Path, by: str) -> None:
    whole = run(tmp_path, "whole", PLAIN, balance=settings(by))
    parts = PLAIN | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    split = run(tmp_path, "split", parts, balance=settings(by))
    assert_alike(whole, split)
    assert_logged(whole, split, "loss", "loss/color", "weight/size", "gradient_norm/color", "conflicts")


def test_the_log_has_weights_norms_and_conflicts(tmp_path: Path) -> None:
    wanted = {"weight/size", "weight/color", "gradient_norm/size", "gradient_norm/color", "conflicts"}
    entries = log(run(tmp_path, "pcgrad", PLAIN, balance="pcgrad"))
    assert all(wanted <= set(entry) for entry in entries[:4])
    measured = log(run(tmp_path, "equal", PLAIN, balance={"by": "equal", "gradients_every": 3}))
    assert [wanted <= set(entry) for entry in measured[:4]] == [False, False, True, False]
    assert measured[0]["weight/size"] == 1.0


def test_static_weights_go_with_every_rule(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    data["tasks"][0]["weight"] = 3.0
    given = [log(run(tmp_path, by, PLAIN, tasks=data["tasks"], balance=by))[0] for by in ("equal", "uncertainty")]
    assert given[0]["weight/size"] == pytest.approx(1.5) and given[0]["weight/color"] == pytest.approx(0.5)
    assert given[1]["weight/size"] == pytest.approx(1.5, rel=0.05)


def test_other_means_train(tmp_path: Path) -> None:
    runs = {
        mean: run(tmp_path, mean, PLAIN, balance={"mean": mean}) for mean in ("task_mean", "token_mean", "sample_mean")
    }
    losses = {mean: log(folder)[0]["loss"] for mean, folder in runs.items()}
    assert len(set(losses.values())) == 3
    apart = run(tmp_path, "apart", PLAIN, balance={"mean": "token_mean", "gradients_every": 1})
    assert_alike(runs["token_mean"], apart)


STATEFUL = ("uncertainty", "dwa", "gradnorm", "pcgrad")


@pytest.mark.parametrize("by", ["coba", "famo", *(pytest.param(by, marks=pytest.mark.slow) for by in STATEFUL)])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, by: str) -> None:
    more = {"max_steps": 11, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 7}
    straight = run(tmp_path, "straight", more, balance=settings(by))
    with killed_in_step(7):
        run(tmp_path, "broken", more, balance=settings(by))
    broken = RunFolder(tmp_path / "broken")
    resumed = train(Recipe.model_validate(load_recipe_data(broken)), broken.path, resume=True)
    for key, value in weights(straight).items():
        assert torch.equal(weights(resumed)[key], value), key
    last = [folder.checkpoints / "checkpoint-11" / STATE for folder in (straight, resumed)]
    assert last[0].exists() == (by != "pcgrad")
    if last[0].exists():
        states = [load_file(path) for path in last]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    losses = [[entry.get("loss") for entry in log(folder) if "loss" in entry] for folder in (straight, resumed)]
    assert losses[0] == losses[1]


def load_recipe_data(folder: RunFolder) -> dict[str, Any]:
    return yaml.safe_load(folder.recipe.read_text())  # type: ignore[no-any-return]


def test_a_checkpoint_without_its_balance_is_not_believed(tmp_path: Path) -> None:
    balancer = Balancer(BALANCES["uncertainty"](), ["a", "b"], None, 0)
    with pytest.raises(PemlError, match=r"balance.safetensors cannot be read"):
        balancer.load(tmp_path)
    (tmp_path / STATE).write_bytes(b"no tensors")
    with pytest.raises(PemlError, match=r"balance.safetensors cannot be read"):
        balancer.load(tmp_path)


def test_absent_tasks_keep_their_weight(tmp_path: Path) -> None:
    """Batches of one task each: what is not there is skipped."""
    entries = log(run(tmp_path, "run", PLAIN, balance="gradnorm", mixing={"batches": "homogeneous"}))
    assert all(sum(key.startswith("gradient_norm/") for key in entry) == 1 for entry in entries[:4])
    assert all("conflicts" not in entry for entry in entries)


def test_rows_held_out_are_never_trained_on(tmp_path: Path) -> None:
    held: list[set[int]] = []
    drawn: set[int] = set()
    get = TaskRows.__getitem__

    def noted(self: TaskRows, index: int) -> Any:
        drawn.add(index)
        return get(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskRows, "__getitem__", noted)
        patch.setattr(MultiTaskTrainer, "_held_out_losses", lambda self: held.append(set(self.held_out)))
        run(tmp_path, "run", {"max_steps": 40}, balance=settings("coba"))
    assert len(held[0]) == 12 and len(drawn) == 108 and not drawn & held[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "align-lora", "balance": "pcgrad"}, "balance 'pcgrad' needs .* cannot be had with adapter.align"),
        ({"method": "align-lora", "balance": {"gradients_every": 5}}, "balance.gradients_every needs .* adapter.align"),
    ],
)
def test_what_cannot_be_kept_apart_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        run(tmp_path, "run", **changes)
    assert not (tmp_path / "run").exists()
    assert "loss" in log(run(tmp_path, "run", PLAIN, method="align-lora"))[0]


def test_a_student_is_not_distilled_task_by_task(tmp_path: Path) -> None:
    data = recipe(tmp_path, method="mpt", set={}, balance="pcgrad")
    with pytest.raises(
        Exception, match="balance cannot keep the gradients of tasks apart while a student is distilled"
    ):
        Recipe.model_validate(data)
    Recipe.model_validate(data | {"regime": {"distillation_weight": 0}})
    Recipe.model_validate(data | {"regime": "joint"})


def test_a_measurement_that_nobody_asked_for_stays_small() -> None:
    balancer = Balancer(Equal(), ["a", "b"], None, 0)
    assert balancer.splits(99, lambda: 10) and not balancer.splits(98, lambda: 10)
    assert not balancer.splits(99, lambda: 2**40)
    asked = Balancer(Equal(gradients_every=1), ["a", "b"], None, 0)
    assert asked.splits(98, lambda: 2**40)
    assert not Balancer(Equal(gradients_every=0), ["a", "b"], None, 0).splits(99, lambda: 1)


# Gradients by task


def test_gradients_are_combined_where_they_are_shared_and_weighed_where_they_are_not() -> None:
    shared, own = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 2))
    unused, half = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    parameters = [shared, own, unused, half]
    kept = TaskGradients(parameters, {id(own): range(4)}, [0, 3], 4)
    for task, scale in ((0, 1.0), (3, 2.0), (3, 2.0)):
        ((shared * scale).sum() + own[task].sum() * 5 + half.sum()).backward()
        kept.collect(task)
    (shared.sum() * 10 + own.sum() * 7).backward()
    kept.collect(None)
    torch.testing.assert_close(kept.gramian(), torch.tensor([[5.0, 16.0], [16.0, 56.0]]).double())
    kept.write(torch.tensor([0.5, 0.25]).double(), torch.tensor([0.1, 9.0, 9.0, 0.2]).double())
    assert shared.grad is not None and own.grad is not None and half.grad is not None
    assert shared.grad.tolist() == [0.5 + 1.0 + 10] * 3
    expected = torch.tensor([[7.5, 7.5], [7.0, 7.0], [7.0, 7.0], [9.0, 9.0]])
    torch.testing.assert_close(own.grad, expected)
    assert unused.grad is None, "an optimiser would move it by what its momentum remembers"
    assert half.grad.dtype == torch.bfloat16


def test_the_part_of_a_batch_that_belongs_to_a_task() -> None:
    batch = {"input_ids": torch.arange(8).view(4, 2), "labels": torch.arange(4), "tasks": [1, 0, 1, 2]}
    part = rows_of(batch, 1)
    assert part["input_ids"].tolist() == [[0, 1], [4, 5]] and part["labels"].tolist() == [0, 2]
    assert part["tasks"] == [1, 1]


def test_conflicts_are_counted_by_pairs() -> None:
    assert conflicts(torch.tensor([[1.0, -1.0, 2.0], [-1.0, 1.0, -3.0], [2.0, -3.0, 1.0]])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("adapter", "prompt"), [(LoRA(r=2), None), (MTLLoRA(r=2), None), (LoRA(r=2), PrefixNAS(4, 2, 10, 6, 4))]
)
def test_the_sum_over_tasks_is_the_gradient_of_the_mixed_batch(tmp_path: Path, adapter: Any, prompt: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    names = ["a", "b", "c"]
    config = PemlConfig(task_names=names, adapter=adapter, prompt=prompt, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    batch = {"input_ids": torch.randint(4, 30, (6, 5)), "tasks": [0, 1, 2, 1, 0, 1]}
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(part: dict[str, Any], rows: list[float]) -> Tensor:
        logits = model(**part).logits
        return (logits.logsumexp(-1).sum(1) * torch.tensor(rows, dtype=torch.float64)).sum()

    loss(batch, [0.2, 0.5, 0.3, 0.5, 0.2, 0.5]).backward()
    wanted = [None if p.grad is None else p.grad.clone() for p in trained]
    model.zero_grad()
    kept = TaskGradients(trained, model.base_model.per_task_parameters(), [0, 1, 2], 3)
    for task in range(3):
        part = rows_of(batch, task)
        loss(part, [1.0] * len(part["tasks"])).backward()
        kept.collect(task)
    parts = torch.tensor([0.2, 0.5, 0.3]).double()
    kept.write(parts, parts)
    for p, gradient in zip(trained, wanted, strict=True):
        assert (p.grad is None) == (gradient is None)
        if gradient is not None:
            # The model takes its norms in fp32, and so rounds batches of other shapes in other ways.
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)


# Several devices


@pytest.mark.slow
def test_two_processes_with_tasks_of_their_own_equal_one(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(tmp_path)))
    worker = Path(__file__).with_name("balance_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    work(tmp_path, "one", {"gradient_accumulation_steps": 2})
    for mixing, rules in CASES.items():
        for by in rules:
            one, two = (RunFolder(tmp_path / f"{kind}-{mixing}-{by}") for kind in ("one", "two"))
            assert_alike(one, two)
            assert_logged(one, two, "loss", "loss/color", "weight/size", "gradient_norm/color", "conflicts")
