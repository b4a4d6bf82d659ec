"""What goes in comes out right: equations, mixed batches, permutations, identity at the start."""

import dataclasses
import math
import re

import pytest
import torch
from cases import CASES, FEW, SMALL_ADAPTERS, SMALL_PROMPTS, Case, cases
from peft import PeftModel
from torch import Tensor

import peml
import references
from models import FAMILIES, TASKS, adapt, assert_same, gradients, probe_loss, tiny, tokens
from peml.bank import BankLinear


@pytest.mark.parametrize("axis", ["adapter", "prompt"])
def test_every_method_is_in_the_contract(axis: str) -> None:
    table = {"adapter": peml.adapters.ADAPTERS, "prompt": peml.prompts.PROMPTS}[axis]
    small = {"adapter": SMALL_ADAPTERS.values(), "prompt": [config for config, _ in SMALL_PROMPTS.values()]}[axis]
    known = {"adapter": references.ADAPTERS, "prompt": references.PROMPTS | references.SOFT}[axis]
    for name, kind in table.items():
        assert any(isinstance(config, kind) for config in small), f"{name}: add a small one to contract/cases.py"
        assert name in known, f"{name}: add a naive version to references.py"


def reference_logits(model: PeftModel, batch: Tensor, tasks: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the naive version, and copies of the trained tensors that it used, by their name in the model."""
    tuner = model.base_model
    config, host = tuner.config_in_force, getattr(tuner.model, "prompt_host", None)
    state = {key: value.detach().clone() for key, value in model.state_dict(keep_vars=False).items()}
    leaves = {key: state[key].requires_grad_() for key, p in model.named_parameters() if p.requires_grad}

    def own(mark: str) -> dict[str, Tensor]:
        return {key[len(mark) :]: value for key, value in state.items() if key.startswith(mark)}

    updates = {}
    for name, module in tuner.model.named_modules():
        if isinstance(module, BankLinear):
            tensors, settings = (
                own(f"base_model.model.{name}.peml_adapter.default."),
                dataclasses.asdict(config.adapter),
            )
            update = references.ADAPTERS[type(config.adapter).__name__]
            if any(key.startswith("members.") for key in tensors):
                update = references.grouped(update, groups_of(name, config, tuner.model.config.num_hidden_layers))
            updates[name] = lambda x, t, u=update, own=tensors, s=settings: u(x, own, s, t)
    prefixes = soft = None
    if config.prompt is not None:
        tensors, settings = own("base_model.model.prompt_host.peml_prompt.default."), dataclasses.asdict(config.prompt)
        shapes = [(slot.num_heads, slot.head_dim) for slot in host.slots]
        if config.prompt.at_input:
            rule = references.SOFT[type(config.prompt).__name__]
            soft = lambda t, text: rule(tensors, settings, t, text)  # noqa: E731
        else:
            rule = references.PROMPTS[type(config.prompt).__name__]
            prefixes = lambda t: rule(tensors, settings, shapes, t)  # noqa: E731
    base = model.unload()  # no longer ours: everything above was copied
    inputs, before = {"input_ids": batch}, 0
    if soft is not None:
        # Prepended, so that the model runs over it with every text, once per row.
        texts = base.get_input_embeddings()(batch)
        prompts = torch.stack([soft(TASKS.index(task), text) for task, text in zip(tasks, texts, strict=True)])
        before = prompts.shape[1]
        encoder = type(base).__name__.startswith("Bert")
        first = 1 if encoder else 0  # behind the first token, which classifiers read
        inputs = {"inputs_embeds": torch.cat([texts[:, :first], prompts, texts[:, first:]], dim=1)}
        if hasattr(base.config, "rope_parameters"):
            # The same positions as ours, because transformers rounds rotations to single precision.
            inputs["position_ids"] = torch.arange(-before, batch.shape[1])[None]
    rows, length = batch.shape[0], batch.shape[1] + before
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible if type(base).__name__.startswith("Bert") else visible.tril()
    ids = [[TASKS.index(task)] * length for task in tasks]
    logits = references.run(base, inputs, visible.expand(rows, -1, -1), updates, prefixes, ids)
    if soft is not None and encoder:
        return torch.cat([logits[:, :1], logits[:, 1 + before :]], dim=1), leaves
    return logits[:, before:], leaves


def groups_of(path: str, config: peml.PemlConfig, depth: int) -> list[list[int]]:
    """Task ids of each group of a layer, by its number alone; the lowest groups for one without a number."""
    found = re.search(r"\.(\d+)\.", f".{path}.")
    at = 0 if found is None else (int(found[1]) + 0.5) / depth
    level = next(own for own in config.groups if at <= own.until)
    groups = [[name] for name in TASKS] if level.groups == "each" else level.groups
    return [[i for i, name in enumerate(TASKS) if name in group] for group in groups]


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", case) for case in CASES] + [(family, case) for family in FAMILIES if family != "llama" for case in FEW],
    ids=lambda value: getattr(value, "name", value),
)
def test_outputs_and_gradients_equal_the_equations(family: str, case: Case) -> None:
    model, batch, tasks = case.build(family), tokens(3, 4), ["sst2", "cola", "sst2"]
    logits = model(input_ids=batch, tasks=tasks).logits
    probe_loss(logits).backward()
    found = gradients(model)
    expected, leaves = reference_logits(model, batch, tasks)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    probe_loss(expected).backward()
    wanted = {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()}
    assert_same(found, wanted, **case.rounding(family))
    assert any(gradient.any() for gradient in found.values())


@cases
def test_a_mixed_batch_equals_its_tasks_apart(case: Case) -> None:
    """Outputs and gradients, with a task that is absent, and again with all of them present."""
    model, batch = case.build(), tokens(4, 5)
    for tasks in (["cola", "rte", "cola", "rte"], ["cola", "rte", "sst2", "rte"]):
        mixed = model(input_ids=batch, tasks=tasks).logits
        mixed.square().mean(dim=(1, 2)).sum().backward()
        together = gradients(model)
        apart = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
        for task in sorted(set(tasks)):
            rows = [i for i, name in enumerate(tasks) if name == task]
            alone = model(input_ids=batch[rows], tasks=task).logits
            torch.testing.assert_close(mixed[rows], alone, rtol=1e-10, atol=1e-10)
            alone.square().mean(dim=(1, 2)).sum().backward()
            for name, gradient in gradients(model).items():
                apart[name] += gradient
        assert_same(apart, together, **case.rounding() if case.at_input else {})


@cases
@torch.no_grad()
def test_rows_are_independent(case: Case) -> None:
    """Permuted rows, one row of one token, ids for names, one name for all, a tensor of ids."""
    model, batch, tasks = case.build(), tokens(4, 5), ["cola", "rte", "sst2", "rte"]
    logits = model(input_ids=batch, tasks=tasks).logits
    order = [2, 0, 3, 1]
    permuted = model(input_ids=batch[order], tasks=[tasks[i] for i in order]).logits
    torch.testing.assert_close(permuted, logits[order], rtol=1e-10, atol=1e-10)
    for i, task in enumerate(tasks):
        if case.reads_input:
            break  # the prompt of a shorter text is another
        one = model(input_ids=batch[i : i + 1, :1], tasks=[task]).logits
        torch.testing.assert_close(one, logits[i : i + 1, :1], rtol=1e-10, atol=1e-10)
    ids = [TASKS.index(task) for task in tasks]
    for given in (ids, torch.tensor(ids), tuple(tasks)):
        assert torch.equal(model(input_ids=batch, tasks=given).logits, logits)
    same = model(input_ids=batch, tasks=["sst2"] * 4).logits
    for given in ("sst2", 1, ["sst2"], torch.tensor(1)):
        torch.testing.assert_close(model(input_ids=batch, tasks=given).logits, same, rtol=1e-10, atol=1e-10)


@cases
@torch.no_grad()
def test_a_task_differs_from_another_where_it_should(case: Case) -> None:
    model, batch = case.build(), tokens(2, 5)
    rte, sst2 = (model(input_ids=batch, tasks=task).logits for task in ("rte", "sst2"))  # of two clusters
    assert torch.allclose(rte, sst2) != case.needs_task


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "adapter",
    [
        *(kind() for kind in peml.adapters.ADAPTERS.values()),
        peml.MTLLoRA(lambda_kind="diag", routing_init="random"),
        peml.Poly(n_splits=2),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit(family: str, adapter: peml.adapters.AdapterConfig) -> None:
    base, batch = tiny(family), tokens()
    before = base(input_ids=batch).logits
    model = adapt(base, adapter, shaken=False)
    assert torch.equal(model(input_ids=batch, tasks="rte").logits, before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fresh_search_starts_near_the_base(family: str) -> None:
    """The prefix weighs as much as e^-c tokens of the model's size: at most ten times that changes of the largest logit."""
    base, batch = FAMILIES[family]().double().eval(), tokens()
    before, distance = base(input_ids=batch).logits, []
    for gate_init in (2.0, 4.0, 8.0, 40.0):
        model = adapt(base, prompt=peml.PrefixNAS(8, 2, 16, 8, 4, gate_init=gate_init), shaken=False)
        distance.append(float((model(input_ids=batch).logits - before).abs().max() / before.abs().max()))
        assert distance[-1] < 10 * math.exp(-gate_init) + 1e-12
        base = model.unload()
    assert distance == sorted(distance, reverse=True) and distance[0] > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_closed_gates_are_the_base_model(family: str, attention: str) -> None:
    base, batch = tiny(family, attention), tokens()
    before = base(input_ids=batch).logits
    model = adapt(base, prompt=peml.PrefixNAS(4, width=8, embedding_dim=6, exact_budget=False))
    with torch.no_grad():
        model.base_model.prompt.token_gate.fill_(-1e5)
        torch.testing.assert_close(model(input_ids=batch).logits, before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(input_ids=batch).logits, before, rtol=1e-12, atol=1e-12)


@cases
@torch.no_grad()
def test_the_count_is_the_formula(case: Case) -> None:
    """Collapsed tables are left out: a search has more parameters than what is left of it."""
    if "collapsed" in case.prompt_name:
        pytest.skip("the configuration of a collapsed prefix is that of its table, which test_bank covers")
    model = case.build()
    banks = [module for module in model.modules() if isinstance(module, BankLinear)]
    expected = 0
    for bank in banks:
        own = bank.peml_adapter["default"]
        sizes = [len(group) for group in own.groups] if isinstance(own, peml.adapters.GroupedAdapter) else [3]
        assert sum(sizes) == 3
        expected += sum(case.adapter.num_parameters(bank.in_features, bank.out_features, size) for size in sizes)
    if case.prompt is not None:
        expected += case.prompt.num_parameters(model.base_model.model.prompt_host.shape, 3)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
