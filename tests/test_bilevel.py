"""Architecture steps on rows set apart: their gradients, what they leave alone, and how they go on after a stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

import peml
from models import shake
from peml import PemlError
from peml.mixing import split_off
from peml.tasks.encode import IGNORED, Encoded
from peml.training import MultiTaskTrainer, RunFolder, TaskRows
from peml.training.bilevel import only, unrolled_gradient
from peml.training.recipe import Recipe
from peml.training.regime import Alternate, Unrolled
from workshop import killed_in_step, recipe, write_model

# The second-order gradient by itself


def toy() -> tuple[Any, Any, list[nn.Parameter], list[nn.Parameter], list[float]]:
    """Two losses of two weights and an architecture, as bent as can be."""
    w = [nn.Parameter(torch.randn(3, dtype=torch.float64)), nn.Parameter(torch.randn(2, 3, dtype=torch.float64))]
    a = [nn.Parameter(torch.randn(2, dtype=torch.float64)), nn.Parameter(torch.randn((), dtype=torch.float64))]

    def train(w: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
        return torch.tanh(torch.softmax(a[0], 0) @ w[1] * w[0]).square().sum() + (a[1] * w[0]).sin().sum()

    def held_out(w: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
        return (torch.sigmoid(a[0]) @ torch.exp(0.3 * w[1])).square().sum() + (w[0] * a[1]).cos().sum()

    return train, held_out, w, a, [0.1, 0.03]


def looked_ahead(train: Any, held_out: Any, w: list[Any], a: list[Any], rates: list[float]) -> Tensor:
    """The objective as it stands in the paper: one step of descent, then the held-out loss."""
    slopes = torch.autograd.grad(train(w, a), w, create_graph=True)
    return held_out([p - rate * slope for p, rate, slope in zip(w, rates, slopes, strict=True)], a)


def test_the_unrolled_gradient_is_that_of_double_backward() -> None:
    train, held_out, w, a, rates = toy()
    wanted = torch.autograd.grad(looked_ahead(train, held_out, w, a, rates), a)
    before = [p.detach().clone() for p in w]

    def slope(loss: Any) -> Any:
        def of(wanted: Sequence[nn.Parameter]) -> list[Tensor]:
            with torch.enable_grad():
                return list(torch.autograd.grad(loss(w, a), wanted))

        return of

    found = unrolled_gradient(slope(train), slope(held_out), w, rates, a, epsilon=1e-4)
    first = torch.autograd.grad(held_out(w, a), a)
    for left, right, plain in zip(found, wanted, first, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)
        assert (left - plain).abs().max() > 1e-3, "the second order counts"
    assert all(torch.equal(p, old) for p, old in zip(w, before, strict=True))


def test_weights_that_the_held_out_loss_ignores_leave_the_first_order() -> None:
    train, _, w, a, rates = toy()

    def slope(loss: Any) -> Any:
        def of(wanted: Sequence[nn.Parameter]) -> list[Tensor]:
            with torch.enable_grad():
                found = torch.autograd.grad(loss(w, a), wanted, allow_unused=True)
            return [torch.zeros_like(p) if s is None else s for p, s in zip(wanted, found, strict=True)]

        return of

    found = unrolled_gradient(slope(train), slope(lambda w, a: a[0].square().sum() + a[1]), w, rates, a)
    torch.testing.assert_close(found[0], 2 * a[0].detach())
    assert found[1] == 1


# Through the trainer

TASKS = ["size", "color"]
PROMPT = peml.PrefixNAS(
    num_virtual_tokens=4,
    width=6,
    embedding_dim=5,
    head_rank=3,
    budget_tokens=1,
    operations=("linear", "mlp_gelu_h"),
    gate_init=2.0,
    normalize_kv=False,  # less bent: differences of gradients are compared with differences of losses
)


def rows(count: int) -> dict[str, list[Encoded]]:
    made = {}
    for task in TASKS:
        texts = [torch.randint(3, 30, (4 + i % 3,)).tolist() for i in range(count)]
        made[task] = [Encoded(text, [IGNORED] * 2 + text[2:], truncated=False) for text in texts]
    return made


def trainer(
    folder: Path, regime: Any, *, data: Any = None, balance: Any = None, config: Any = None, **args: Any
) -> Any:
    torch.manual_seed(0)
    # Of GPT-2, whose norms stay in fp64, where Llama's are fp32 whatever comes in.
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_embd=16, n_inner=12, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
                   eos_token_id=2, pad_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip
    config = config or peml.PemlConfig(task_names=TASKS, adapter=peml.MTLLoRA(r=2), prompt=PROMPT)
    model = get_peft_model(base.double(), config, autocast_adapter_dtype=False)
    shake((p for p in model.double().parameters() if p.requires_grad), 0.3)
    known = {
        "per_device_train_batch_size": 4, "max_steps": 10, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        "dataloader_pin_memory": False,
    } | args  # fmt: skip
    return MultiTaskTrainer(
        model, TrainingArguments(str(folder), **known), train_dataset=TaskRows(rows(12)) if data is None else data,
        prompt_learning_rate=0.02, architecture_learning_rate=0.01, bilevel=regime, balance=balance,
    )  # fmt: skip


def naive_loss(one: Any, batch: dict[str, Any]) -> Tensor:
    """Mean over tasks of the mean over tokens, and the penalties."""
    logits = one.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], tasks=batch["tasks"]
    ).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    means = []
    for task in sorted(set(batch["tasks"])):
        own = [i for i, t in enumerate(batch["tasks"]) if t == task]
        means.append(losses[own].sum() / (labels[own] != IGNORED).sum())
    return sum(means) / len(means) + sum(one.tuner.penalties().values())


@pytest.mark.parametrize("regime", [Alternate(), Unrolled(epsilon=1e-4)], ids=lambda r: r.name)
def test_the_trainers_gradient_is_that_of_finite_differences(tmp_path: Path, regime: Any) -> None:
    one = trainer(tmp_path, regime)
    one.create_optimizer_and_scheduler(10)
    groups = {group["name"]: group["lr"] for group in one.optimizer.param_groups}
    assert groups == {"adapter": 0.05, "adapter per task": 0.05, "prompt": 0.02}
    one.tuner.prompt.set_progress(0.8)
    training = [next(iter(one.get_train_dataloader()))]
    one.coming, (held_out,) = training, one.architect._batches(3)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    found = one.architect.gradient(3)
    assert all(torch.equal(p, before[name]) for name, p in one.model.named_parameters())
    weights = [(p, group["lr"]) for group in one.optimizer.param_groups for p in group["params"]]

    def objective() -> float:
        """The held-out loss behind a step of descent; of the first order, without one."""
        start = [p.detach().clone() for p, _ in weights]
        if isinstance(regime, Unrolled):
            slopes = torch.autograd.grad(naive_loss(one, training[0]), [p for p, _ in weights], allow_unused=True)
            with torch.no_grad():
                for (p, rate), slope in zip(weights, slopes, strict=True):
                    p -= rate * (0 if slope is None else slope)
        value = float(naive_loss(one, held_out).detach())
        with torch.no_grad():
            for (p, _), old in zip(weights, start, strict=True):
                p.copy_(old)
        return value

    h = 1e-5
    for parameter, slope in zip(one.architect.parameters, found, strict=True):
        flat = parameter.data.view(-1)
        for at in range(0, flat.numel(), max(1, flat.numel() // 3)):
            ends = []
            for shift in (h, -2 * h):
                flat[at] += shift
                ends.append(objective())
            flat[at] += h
            difference = (ends[0] - ends[1]) / (2 * h)
            assert float(slope.view(-1)[at]) == pytest.approx(difference, rel=2e-6, abs=1e-8)
    assert all(float(slope.abs().max()) > 1e-4 for slope in found)


def test_the_second_order_differs_from_the_first(tmp_path: Path) -> None:
    found = []
    for regime in (Alternate(), Unrolled()):
        one = trainer(tmp_path, regime)
        one.create_optimizer_and_scheduler(10)
        one.tuner.prompt.set_progress(0.8)
        one.coming = [next(iter(one.get_train_dataloader()))]
        found.append(one.architect.gradient(3))
    assert all(float((x - y).abs().max()) > 1e-4 * float(x.abs().max()) for x, y in zip(*found, strict=True))


def state(one: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Architecture and weights."""
    ids = {id(p) for p in one.architect.parameters}
    kept: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, p in one.model.named_parameters():
        kept[id(p) not in ids][name] = p.detach().clone()
    return kept


@pytest.mark.parametrize("regime", [Alternate(), Unrolled()], ids=lambda r: r.name)
def test_each_kind_of_step_leaves_the_other_as_it_is(tmp_path: Path, regime: Any) -> None:
    one = trainer(tmp_path, regime)
    seen: list[tuple[str, bool, bool]] = []

    class Watch(TrainerCallback):
        """Before all other callbacks, or behind them: what has moved since the last look."""

        last = state(one)

        def look(self, kind: str) -> None:
            new = state(one)
            moved = [
                any(not torch.equal(now[k], value) for k, value in old.items())
                for old, now in zip(self.last, new, strict=True)
            ]
            Watch.last = new
            seen.append((kind, *moved))

    class First(Watch):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.look("before")

    class Last(Watch):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.look("architecture")

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.look("weights")

    one.callback_handler.callbacks.insert(0, First())
    one.add_callback(Last())
    one.train()
    steps = {kind: [moved for name, *moved in seen if name == kind] for kind in ("before", "architecture", "weights")}
    # 9 steps of search, of which the first 15 % rest, and one of fine-tuning, before which gates and strength are settled.
    assert steps["architecture"] == [[False, False]] * 2 + [[True, False]] * 7 + [[True, True]]
    assert steps["weights"] == [[False, True]] * 10 and steps["before"] == [[False, False]] * 10
    assert not one.tuner.prompt.searching


def test_rows_of_the_architecture_are_not_those_of_the_weights_until_the_search_is_over(tmp_path: Path) -> None:
    one = trainer(tmp_path, Alternate(held_out=0.25), max_steps=10)
    held = set(one.architect.held_out)
    assert [sum(one.train_dataset.row_tasks[i] == task for i in held) for task in (0, 1)] == [3, 3]
    order = list(one._get_train_sampler())
    assert len(order) == 40 and not held & set(order[:36])
    assert set(one.architect.order) == held and len(one.architect.order) == 36
    late = trainer(tmp_path, Alternate(), max_steps=100, per_device_train_batch_size=4)
    assert set(list(late._get_train_sampler())[360:]) == set(range(24)), "then all rows"
    drawn = [row for step in range(9) for batch in one.architect._batches(step) for row in batch["tasks"]]
    assert len(drawn) == 36


def test_the_two_kinds_of_rows_come_in_orders_of_their_own(tmp_path: Path) -> None:
    one = trainer(tmp_path, Alternate(), data=TaskRows(rows(30)), max_steps=20)
    tasks = one.train_dataset.row_tasks
    orders = [[tasks[i] for i in order] for order in (one.architect.order, list(one._get_train_sampler())[:72])]
    assert orders[0] != orders[1] and [sum(own) for own in orders] == [36, 36]


@pytest.mark.parametrize("most", [0.0, 0.03])
def test_a_step_of_the_architecture_is_one_of_adam_behind_its_clipping(tmp_path: Path, most: float) -> None:
    one = trainer(tmp_path, Alternate(max_grad_norm=most, weight_decay=0.1))
    one.create_optimizer_and_scheduler(10)
    one.schedule.progress = 0.8
    one.tuner.prompt.set_progress(0.8)
    begins = [p.detach().clone() for p in one.architect.parameters]
    slopes = [slope.clone() for slope in one.architect.gradient(3)]
    length = float(torch.cat([slope.flatten() for slope in slopes]).norm())
    assert length > 0.04
    scale = most / (length + 1e-6) if most else 1.0
    one.state.global_step = 3
    one.architect.on_step_begin(one.args, one.state, one.control)
    for p, old, slope in zip(one.architect.parameters, begins, slopes, strict=True):
        whole = scale * slope + 0.1 * old
        # Adam's first step: both averages, freed of their bias, are those of this gradient alone.
        torch.testing.assert_close(p.detach(), old - 0.01 * whole / (whole.abs() + 1e-8), rtol=1e-9, atol=1e-12)
        assert p.grad is None
    assert {float(own["step"]) for own in one.architect.optimizer.state.values()} == {1.0}


def test_halves_keep_a_row_on_either_side() -> None:
    tasks = [0] * 10 + [1] * 2
    for share in (0.01, 0.5, 0.99):
        held = split_off(tasks, ["a", "b"], share, 0)
        assert [sum(tasks[i] == t for i in held) for t in (0, 1)] == [{0.01: 1, 0.5: 5, 0.99: 9}[share], 1]
    with pytest.raises(PemlError, match="task 'b' has too few training rows to hold one out for the architecture"):
        split_off([0, 0, 1], ["a", "b"], 0.5, 0)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    found = []
    for parts in (1, 4):
        one = trainer(
            tmp_path, Unrolled(), per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
            optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        one.train()
        found.append(state(one))
    for one, two in zip(*found, strict=True):
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-8, atol=1e-10, msg=key)


def test_looking_ahead_sees_one_and_the_same_noise(tmp_path: Path) -> None:
    """Other dropout on either side of a difference would drown it."""
    config = peml.PemlConfig(task_names=TASKS, adapter=peml.LoRA(r=2, lora_dropout=0.5), prompt=PROMPT)
    near, far = (trainer(tmp_path, Unrolled(epsilon=epsilon), config=config) for epsilon in (1e-5, 1e-4))
    gradients = []
    for one in (near, far):
        one.create_optimizer_and_scheduler(10)
        one.tuner.prompt.set_progress(0.8)
        one.coming = [next(iter(one.get_train_dataloader()))]
        torch.manual_seed(5)
        gradients.append(one.architect.gradient(0))
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)


def test_what_is_only_frozen_for_a_moment_comes_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), only(model, [model[0].bias]):
        assert [p.requires_grad for p in model.parameters()] == [False, True, False, False]
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize(
    "changes",
    [
        {"relaxation": "gumbel"},
        {"relaxation": "sigmoid"},
        {"gate_relaxation": "straight_through"},
        {"exact_budget": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_relaxation_moves_in_steps_of_its_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    prompt = dataclasses.replace(PROMPT, **changes, head_rank=(2, 3))
    one = trainer(tmp_path, Unrolled(), config=peml.PemlConfig(task_names=TASKS, adapter=peml.LoRA(r=2), prompt=prompt))
    before = state(one)[0]
    one.train()
    after = state(one)[0]
    assert len(before) == 4 and all(not torch.equal(before[key], value) for key, value in after.items())
    assert all(bool(value.isfinite().all()) for value in after.values()) and not one.tuner.prompt.searching


@pytest.mark.parametrize("balance", ["uncertainty", "pcgrad", "famo", "gradnorm"])
def test_balances_go_with_alternate(tmp_path: Path, balance: str) -> None:
    from peml.training.balancing import read_balance

    one = trainer(tmp_path, Alternate(), balance=read_balance(balance), max_steps=4)
    before = state(one)[0]
    one.train()
    assert all(not torch.equal(before[key], value) for key, value in state(one)[0].items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regime": Alternate(), "balance": "coba"}, "regime alternate and balance: coba both set rows apart"),
        ({"regime": Unrolled(), "balance": "pcgrad"}, "regime unrolled looks a plain step of the weights ahead"),
        ({"regime": Alternate(), "max_steps": -1, "num_train_epochs": 2}, "regime alternate needs train.max_steps"),
        (
            {"regime": Alternate(), "config": peml.PemlConfig(task_names=TASKS, adapter=peml.LoRA(r=2))},
            "regime alternate needs an architecture to search, and this adapter has none",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from peml.training.balancing import read_balance

    regime, balance = changes.pop("regime"), changes.pop("balance", None)
    with pytest.raises(PemlError, match=message):
        trainer(tmp_path, regime, balance=None if balance is None else read_balance(balance), **changes)


# As a recipe


def run(folder: Path, name: str, how: Any, resume: bool = False, **train: Any) -> RunFolder:
    data = recipe(folder, regime=how, evaluate_before=False)
    data["train"] |= {"max_steps": 12, "logging_steps": 1} | train
    if not (folder / "model").exists():
        write_model(folder / "model")
    return peml.train(Recipe.model_validate(data), folder / name, resume=resume)


@pytest.mark.parametrize("how", ["alternate", "unrolled"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, how: str) -> None:
    train = {"save_steps": 3, "architecture_learning_rate": 0.05}
    whole = run(tmp_path, "whole", how, **train)
    with killed_in_step(8):
        run(tmp_path, "broken", how, **train)
    assert (tmp_path / "broken/checkpoints/checkpoint-6/architecture.safetensors").exists()
    again = run(tmp_path, "broken", how, resume=True, **train)
    one, two = (load_file(each.adapter / "adapter_model.safetensors") for each in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    assert whole.read_metrics()["after"] == again.read_metrics()["after"]
    assert whole.read_metrics()["parameters"]["architecture"] > 0
    assert whole.read_metrics()["learning_rates"]["architecture"] == 0.05


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    one = trainer(tmp_path, Alternate())
    (tmp_path / "architecture.safetensors").write_bytes(b"nothing")
    with pytest.raises(PemlError, match="architecture.safetensors cannot be read .*: train from the start"):
        one.architect.load(tmp_path)


def test_half_precision_trains_and_fp16_is_refused(tmp_path: Path) -> None:
    metrics = run(tmp_path, "bf16", "unrolled", bf16=True, use_cpu=True, max_steps=6).read_metrics()
    assert metrics["steps"] == 6 and metrics["architecture"]["derived"]
    one = trainer(tmp_path, Alternate())
    one.args.fp16 = True
    with pytest.raises(PemlError, match="regime alternate takes gradients that fp16 would have to scale: use bf16"):
        one.architect._check()


def test_settings_are_those_of_darts_and_can_be_changed(tmp_path: Path) -> None:
    assert run(tmp_path, "plain", "alternate", max_steps=2).read_metrics()["learning_rates"]["architecture"] == 3e-4
    how = {"name": "unrolled", "held_out": 0.25, "betas": [0.9, 0.99], "weight_decay": 0, "epsilon": 0.1}
    folder = run(tmp_path, "own", how, max_steps=2)
    stored = peml.training.load_recipe(folder.recipe).how
    assert isinstance(stored, Unrolled) and stored.betas == (0.9, 0.99) and stored.held_out == 0.25
    assert Alternate().betas == (0.5, 0.999) and (Alternate().weight_decay, Alternate().max_grad_norm) == (1e-3, 5.0)
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert any("search/entropy" in entry for entry in log)


@pytest.mark.parametrize("name", ["alternate", "unrolled", "retrain"])
def test_methods_without_an_architecture_are_refused_by_name(tmp_path: Path, name: str) -> None:
    data = recipe(tmp_path, method="lora+prefix", set={}, regime=name)
    with pytest.raises(
        ValueError, match=f"regime {name} searches an architecture, and method 'lora\\+prefix' has none"
    ):
        Recipe.model_validate(data)
    with pytest.raises(ValueError, match="regime: held_out: input should be less than 1"):
        Recipe.model_validate(recipe(tmp_path, regime={"name": "alternate", "held_out": 1.0}))
