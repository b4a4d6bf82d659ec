"""TRL's SFTTrainer on our adapters: equal to our own trainer, packed as well as not, and routed by a column of tasks."""

import copy
import importlib
import sys
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import peml
from models import gradients, shake
from peml import PemlError
from peml.tasks.encode import IGNORED, Encoded
from peml.training import MultiTaskTrainer, SearchCallback, TaskRows
from workshop import tiny_tokenizer

try:
    import trl
except ImportError:
    trl = None

needs_trl = pytest.mark.skipif(trl is None, reason="TRL is not installed: pip install 'peml[trl]'")
TASKS = ["size", "color"]
SHARED = {"adapter": peml.LoRA(r=2), "prompt": peml.PrefixTuning(3)}
LENGTHS = (7, 3, 9, 5, 4, 8)


def base() -> nn.Module:
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=24, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    shake(model.parameters(), 0.2)
    return model


def adapted(tasks: tuple[str, ...] = ("all",), **parts) -> nn.Module:
    model = get_peft_model(base(), peml.PemlConfig(task_names=list(tasks), **parts), autocast_adapter_dtype=False)
    shake((p for p in model.double().parameters() if p.requires_grad), 0.2)
    return model


def some_rows() -> list[dict]:
    """Of unequal length, with and without a loss on their beginning, of tasks in no order."""
    texts = [torch.randint(3, len(tiny_tokenizer()), (length,)).tolist() for length in LENGTHS]
    labels = [[IGNORED] * (i % 3) + text[i % 3 :] for i, text in enumerate(texts)]
    tasks = [TASKS[i] for i in (0, 1, 1, 0, 1, 1)]
    return [
        {"input_ids": ids, "labels": own, "task": task} for ids, own, task in zip(texts, labels, tasks, strict=True)
    ]


def settings(folder, **changes) -> dict:
    """What both trainers understand; sequential, so that they see the same batches."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 3, "max_steps": 4, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True,
        "dataloader_pin_memory": False, "activation_checkpointing": True, "lr_scheduler_type": "linear",
    } | changes  # fmt: skip


def sft(kind, folder, model, rows, trainer=None, **changes):
    """A trainer of TRL's kind that reads the rows in their order."""
    known = settings(folder, max_length=16, shuffle_dataset=False, **changes)
    args = trl.SFTConfig(train_sampling_strategy="sequential", **known)
    return kind(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(), **(trainer or {})
    )


class InOrder(MultiTaskTrainer):
    """Ours, with the rows in their order."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def ours(folder, model, rows, **changes) -> MultiTaskTrainer:
    encoded = [Encoded(row["input_ids"], row["labels"], truncated=False) for row in rows]
    args = TrainingArguments(**settings(folder, **changes))
    return InOrder(model, args, train_dataset=TaskRows({"all": encoded}), prompt_learning_rate=args.learning_rate)


def token_mean(model: nn.Module, rows: list[dict], **call) -> Tensor:
    """The mean loss over tokens, row by row: no padding, no packing."""
    losses = []
    for row in rows:
        given = {"tasks": row["task"]} if call.get("routed") else {}
        logits = model(input_ids=torch.tensor([row["input_ids"]]), **given).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED))
    tokens = sum(int((torch.tensor(row["labels"][1:]) != IGNORED).sum()) for row in rows)
    return torch.cat(losses).sum() / tokens


def step(trainer) -> tuple[Tensor, dict[str, Tensor], dict]:
    """Loss and gradients of the trainer's first batch, as its training takes them."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), gradients(trainer.model), batch


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal gradients, of losses that both sides take in fp32."""
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@needs_trl
def test_a_step_equals_our_trainers(tmp_path) -> None:
    model, rows = adapted(**SHARED), some_rows()
    twin = copy.deepcopy(model)
    loss, found, batch = step(sft(trl.SFTTrainer, tmp_path, model, rows))
    assert batch["attention_mask"].shape == (3, 9) and not batch["attention_mask"].all()
    expected, wanted, _ = step(ours(tmp_path, twin, rows))
    # Both take the loss in fp32.
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert_near(found, wanted)
    assert min(g.abs().max() for g in found.values()) > 1e-5


@needs_trl
def test_a_training_equals_our_trainers(tmp_path) -> None:
    model, rows = adapted(**SHARED), some_rows()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    twin = copy.deepcopy(model)
    sft(trl.SFTTrainer, tmp_path / "theirs", model, rows).train()
    ours(tmp_path / "ours", twin, rows).train()
    ends = [{n: p.detach() for n, p in m.named_parameters() if p.requires_grad} for m in (model, twin)]
    for name, end in ends[0].items():
        torch.testing.assert_close(end, ends[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert (end - start[name]).abs().max() > 5e-3


@needs_trl
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # a default of TRL's
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_it_trains_with_the_defaults(packing: bool, task_type: str | None, tmp_path) -> None:
    """From plain text and a configuration of PEFT's, as TRL's own examples do."""
    texts = [{"text": f"big red {word}"} for word in ("cat", "dog", "tree", "big", "blue")]
    config = peml.PemlConfig(task_names=["all"], task_type=task_type, **SHARED)
    args = trl.SFTConfig(
        str(tmp_path), max_steps=2, packing=packing, max_length=16, learning_rate=1e-2, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    assert args.activation_checkpointing
    trainer = trl.SFTTrainer(
        base().float(), args, train_dataset=Dataset.from_list(texts), processing_class=tiny_tokenizer(),
        peft_config=config,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {n.split("peml_")[1].split(".")[0] for n in before} == {"adapter", "prompt"}
    trainer.train()
    assert all(0 < log["loss"] < 20 for log in trainer.state.log_history if "loss" in log)
    unmoved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    # Two steps: the first moves `up` off its zero, the second `down`.
    assert not unmoved
    again = PeftModel.from_pretrained(base().float(), tmp_path / "checkpoint-2")
    saved, kept = (get_peft_model_state_dict(m) for m in (again, trainer.model))
    assert saved.keys() == kept.keys() and all(torch.equal(saved[k].float(), kept[k].float()) for k in saved)


@needs_trl
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_texts_do_not_see_each_other(attention: str, tmp_path) -> None:
    """TRL packs by positions that start again, without a mask: transformers makes the mask, and ours keeps it."""
    model, rows = adapted(**SHARED), some_rows()
    model.set_attn_implementation(attention)
    twin = copy.deepcopy(model)
    loss, found, batch = step(sft(trl.SFTTrainer, tmp_path, model, rows, packing=True, per_device_train_batch_size=9))
    assert "attention_mask" not in batch and batch["input_ids"].shape == (1, sum(LENGTHS))
    assert (batch["position_ids"] == 0).sum() == len(LENGTHS)
    expected = token_mean(twin, rows)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_near(found, gradients(twin))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    known = {tuple(row["input_ids"]) for row in rows}
    logits = model.eval()(**{k: batch[k] for k in ("input_ids", "position_ids")}).logits[0]
    for start, end in zip(starts, [*starts[1:], sum(LENGTHS)], strict=True):
        text = batch["input_ids"][:, start:end]
        assert tuple(text[0].tolist()) in known
        torch.testing.assert_close(logits[start:end], twin.eval()(input_ids=text).logits[0], rtol=1e-5, atol=1e-5)


PER_TASK = {
    "adapter": {"adapter": peml.SingleTaskLoRA(r=2)},
    "prompt": {"prompt": peml.PrefixTuning(3, per_task=True)},
    "both": {"adapter": peml.MTLLoRA(r=2), "prompt": peml.PrefixTuning(3, per_task=True)},
}


@needs_trl
@pytest.mark.parametrize("parts", PER_TASK)
def test_without_tasks_it_says_so(parts: str, tmp_path) -> None:
    trainer = sft(trl.SFTTrainer, tmp_path, adapted(tuple(TASKS), **PER_TASK[parts]), some_rows())
    with pytest.raises(PemlError, match="tasks="):
        trainer.train()


def multi_task(folder, model, rows, trainer=None, **changes):
    from peml.training.sft import MultiTaskSFTTrainer

    return sft(MultiTaskSFTTrainer, folder, model, rows, trainer, **changes)


@needs_trl
@pytest.mark.parametrize("parts", PER_TASK)
@pytest.mark.parametrize("ids", [False, True])
def test_rows_are_routed_by_their_column(parts: str, ids: bool, tmp_path) -> None:
    model, rows = adapted(tuple(TASKS), **PER_TASK[parts]), some_rows()
    twin = copy.deepcopy(model)
    given = [{**row, "task": TASKS.index(row["task"])} for row in rows] if ids else rows
    loss, found, batch = step(multi_task(tmp_path, model, given))
    assert batch["tasks"] == [0, 1, 1]
    expected = token_mean(twin, rows[:3], routed=True)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_near(found, gradients(twin))


@needs_trl
def test_the_column_may_have_another_name(tmp_path) -> None:
    rows = [{"kind" if k == "task" else k: v for k, v in row.items()} for row in some_rows()]
    model = adapted(tuple(TASKS), **PER_TASK["both"])
    batch = next(iter(multi_task(tmp_path, model, rows, {"task_column": "kind"}).get_train_dataloader()))
    assert batch["tasks"] == [0, 1, 1]


@needs_trl
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.parametrize(
    "prompt",
    [peml.PrefixTuning(3), peml.PrefixTuning(3, per_task=True, gated=True), peml.PromptTuning(2),
     peml.PromptTuning(2, per_task=True), peml.MultitaskPrompt(2)],
    ids=["prefix", "prefix per task", "tokens", "tokens per task", "mpt"],
)  # fmt: skip
def test_packed_rows_carry_a_task_per_token(prompt: Any, strategy: str, tmp_path) -> None:
    """Of an adapter and a prompt that differ by task: the loss and its gradients are those of the rows by themselves."""
    parts = {"adapter": peml.MTLLoRA(r=2), "prompt": prompt}
    model, rows = adapted(tuple(TASKS), **parts), some_rows()
    twin = copy.deepcopy(model)
    changes = {"packing": True, "packing_strategy": strategy, "per_device_train_batch_size": 9}
    loss, found, batch = step(multi_task(tmp_path, model, rows, pad_to_multiple_of=8, **changes))
    assert len(batch["tasks"]) == 1 and len(batch["tasks"][0]) == batch["input_ids"].shape[1] == 40
    expected = token_mean(twin, rows, routed=True)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_near(found, gradients(twin))


@needs_trl
def test_packing_cuts_as_trl_does(tmp_path) -> None:
    rows = some_rows()
    packed = [
        kind(tmp_path, adapted(tuple(TASKS), **SHARED), rows, packing=True, **{"per_device_train_batch_size": 1})
        for kind in (multi_task, lambda *args, **changes: sft(trl.SFTTrainer, *args, **changes))
    ]
    found, wanted = (trainer.train_dataset.to_list() for trainer in packed)
    assert [{k: v for k, v in row.items() if k != "task"} for row in found] == wanted


@needs_trl
def test_what_cannot_be_routed_is_refused(tmp_path) -> None:
    rows, both = some_rows(), PER_TASK["both"]
    model = adapted(tuple(TASKS), **both)
    bare = [{k: v for k, v in row.items() if k != "task"} for row in rows]
    with pytest.raises(PemlError, match="no column 'task' with one of size, color per row"):
        multi_task(tmp_path, model, bare)
    with pytest.raises(PemlError, match="unknown task 'shape' in column 'task'; this adapter has size, color"):
        multi_task(tmp_path, model, [*rows, {**rows[0], "task": "shape"}])
    with pytest.raises(PemlError, match="Attempt makes its prompt from the text before the answer"):
        multi_task(tmp_path, adapted(tuple(TASKS), prompt=peml.Attempt(2, num_sources=1)), rows)
    with pytest.raises(PemlError, match="'wrapped' lets texts of different tasks see each other"):
        multi_task(tmp_path, adapted(tuple(TASKS), **SHARED), rows, packing=True, packing_strategy="wrapped")
    with pytest.raises(PemlError, match="needs a PEML adapter"):
        multi_task(tmp_path, base(), rows)
    aligned = adapted(tuple(TASKS), adapter=peml.LoRA(r=2, align="mmd"))
    with pytest.raises(PemlError, match="label_smoothing_factor"):
        multi_task(tmp_path, aligned, rows, label_smoothing_factor=0.1)


@needs_trl
def test_a_search_runs_to_its_end_and_pays_its_penalties(tmp_path) -> None:
    prompt = peml.PrefixNAS(num_virtual_tokens=4, width=6, embedding_dim=5, head_rank=3, budget_tokens=1)
    model = adapted(tuple(TASKS), adapter=peml.MTLLoRA(r=2), prompt=prompt)
    twin, rows = copy.deepcopy(model), some_rows()
    for each in (model, twin):
        each.base_model.prompt.set_progress(0.9)
    trainer = multi_task(tmp_path, model, rows, {"prompt_learning_rate": 2e-3})
    loss, found, _ = step(trainer)
    plain = token_mean(twin.train(), rows[:3], routed=True)
    penalty = sum(twin.base_model.penalties().values())
    assert penalty > 0.05
    (plain + penalty).backward()
    torch.testing.assert_close(loss.double(), (plain + penalty).detach(), rtol=1e-6, atol=1e-6)
    assert_near(found, gradients(twin))
    trainer.train()
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"adapter": 1e-2, "adapter per task": 1e-2, "prompt": 2e-3, "architecture": 3e-3}
    assert not model.base_model.prompt.searching


@needs_trl
@pytest.mark.parametrize("parts", [1, 2])
def test_a_callback_leads_the_search_in_trls_own_trainer(parts: int, tmp_path) -> None:
    """And pays its penalties: the same training as with them in the loss, whatever is accumulated."""
    prompt = peml.PrefixNAS(num_virtual_tokens=4, width=6, embedding_dim=5, head_rank=3, budget_tokens=1)
    model, rows = adapted(adapter=peml.LoRA(r=2), prompt=prompt), some_rows()
    twin = copy.deepcopy(model)
    shared = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 8}
    batch = {"per_device_train_batch_size": 6 // parts, "gradient_accumulation_steps": parts}
    theirs = sft(trl.SFTTrainer, tmp_path, model, rows, **shared, **batch)
    theirs.add_callback(SearchCallback(theirs.model))
    theirs.train()
    rates = {"prompt_learning_rate": 0.1, "architecture_learning_rate": 0.1}
    wanted = multi_task(tmp_path, twin, [{**row, "task": "all"} for row in rows], rates, **shared, **batch)
    wanted.train()
    assert not model.base_model.prompt.searching
    for (name, left), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    logged = [log for log in wanted.state.log_history if "derive/step" in log]
    assert [log["derive/step"] for log in logged] == [7.0]


def test_the_callback_says_what_it_cannot_lead() -> None:
    with pytest.raises(PemlError, match="SearchCallback needs a model with a PEML adapter"):
        SearchCallback(base())
    with pytest.raises(PemlError, match="adapter.align is a loss of every forward, which a callback cannot add"):
        SearchCallback(adapted(tuple(TASKS), adapter=peml.LoRA(r=2, align="mmd")))


@needs_trl
def test_accumulated_steps_equal_whole_ones(tmp_path) -> None:
    """The penalties of a search, too, count once per step."""
    prompt = peml.PrefixNAS(num_virtual_tokens=4, width=6, embedding_dim=5, head_rank=3, budget_tokens=1)
    model, rows = adapted(tuple(TASKS), adapter=peml.MTLLoRA(r=2), prompt=prompt), some_rows()
    twin = copy.deepcopy(model)
    # SGD: Adam would not see a penalty of twice the size.
    shared = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    rates = {"prompt_learning_rate": 0.1, "architecture_learning_rate": 0.1, "finetune_fraction": 0.0}
    multi_task(tmp_path, model, rows, rates, per_device_train_batch_size=6, **shared).train()
    multi_task(tmp_path, twin, rows, rates, gradient_accumulation_steps=2, **shared).train()
    for (name, left), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@needs_trl
def test_an_adapter_that_all_tasks_share_needs_no_column(tmp_path) -> None:
    rows = [{k: v for k, v in row.items() if k != "task"} for row in some_rows()]
    trainer = multi_task(tmp_path, adapted(tuple(TASKS), **SHARED), rows)
    assert "tasks" not in next(iter(trainer.get_train_dataloader()))
    trainer.train()


@needs_trl
def test_it_evaluates_routed_rows(tmp_path) -> None:
    model, rows = adapted(tuple(TASKS), **PER_TASK["both"]), some_rows()
    twin = copy.deepcopy(model)
    trainer = multi_task(tmp_path, model, rows, {"eval_dataset": Dataset.from_list(rows)}, per_device_eval_batch_size=9)
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(token_mean(twin.eval(), rows, routed=True).item(), rel=1e-5)


def test_without_trl_the_package_stands_and_this_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "peml.training.sft", raising=False)
    with pytest.raises(PemlError, match="pip install"):
        importlib.import_module("peml.training.sft")
    monkeypatch.delitem(sys.modules, "peml.training.sft", raising=False)
