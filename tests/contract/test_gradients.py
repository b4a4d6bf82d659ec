"""Gradients: isolation of tasks, checkpointing of every kind, precision, dropout."""

import pytest
import torch
from cases import CASES, FEW, Case, cases, few_cases
from peft import PeftModel, get_peft_model

import peml
from models import FAMILIES, TASKS, adapt, assert_same, gradients, probe_loss, tiny, tokens
from peml.bank import BankLinear

KINDS = {"non-reentrant": None, "reentrant": {"use_reentrant": True}}


def per_task(model: PeftModel) -> list[torch.nn.Parameter]:
    """Parameters with one row per task."""
    chosen = model.base_model.per_task_parameters()
    return [parameter for parameter in model.parameters() if id(parameter) in chosen]


@cases
def test_tasks_are_isolated(case: Case) -> None:
    """No gradient for other tasks' rows, exactly; every other trainable tensor gets one."""
    model = case.build()
    layers = [module.peml_adapter["default"] for module in model.modules() if isinstance(module, BankLinear)]
    own = [] if case.prompt is None else model.base_model.prompt.task_parameters
    assert len(per_task(model)) == sum(len(layer.task_rows(3)) for layer in layers) + len(own)
    owners = model.base_model.per_task_parameters()
    for task in ("cola", "rte"):
        probe_loss(model(input_ids=tokens(), tasks=task).logits).backward()
        for parameter in per_task(model):
            tasks = [TASKS[i] for i in owners[id(parameter)]]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = gradient[None] if len(tasks) == 1 else gradient
            assert [bool(row.any()) for row in gradient] == [name == task for name in tasks]
        model.zero_grad()


@cases
def test_the_base_stays_as_it_is(case: Case) -> None:
    model = case.build()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert all(".peml_" not in name or "collapsed" in case.prompt_name for name in frozen)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        probe_loss(model(input_ids=tokens(), tasks=["rte", "cola", "rte"]).logits).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name])


def run(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two forwards with different tasks before one backward."""
    torch.manual_seed(1)
    first = model(input_ids=tokens(3, 5), tasks=["rte", "cola", "rte"]).logits
    second = model(input_ids=tokens(2, 4), tasks="sst2").logits
    (probe_loss(first) + probe_loss(second)).backward()
    return first.detach(), gradients(model)


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", case) for case in CASES] + [(family, case) for family in FAMILIES if family != "llama" for case in FEW],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(family: str, case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.build(family)
    if case.drawn:
        # Weights that are drawn in training are drawn in both runs, and drawn again the same when recomputed.
        model.train()
        if kind == "reentrant":
            # There each layer computes its own core; the plain run has to draw in that order too.
            monkeypatch.setattr(peml.attached, "cores_ahead", lambda adapters, route: {})
    logits, wanted = run(model)
    model.base_model.model.activation_checkpointing_enable(KINDS[kind])
    model.train()
    if kind == "reentrant" and case.generated and not (family == "bert" and case.at_input):
        with pytest.raises(peml.PemlError, match="use_reentrant"):
            run(model)
        assert peml.routing.current() is None
        return
    again, found = run(model)
    assert torch.equal(logits, again)
    assert_same(found, wanted, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_checkpointing_recomputes_with_its_own_dropout(attention: str) -> None:
    model = adapt(tiny("llama", attention), peml.MTLLoRA(r=3, lora_dropout=0.4), peml.PrefixNAS(3, 1, 8, 4, 4))
    model.train()
    logits, wanted = run(model)
    model.base_model.model.activation_checkpointing_enable()
    again, found = run(model)
    assert torch.equal(logits, again)
    assert_same(found, wanted, atol=1e-12)


def test_the_route_of_another_task_would_be_noticed() -> None:
    """The test above can fail: gradients of two tasks differ."""
    model = adapt(tiny(), peml.MTLLoRA(r=3))
    found = []
    for task in ("rte", "cola"):
        probe_loss(model(input_ids=torch.full((1, 4), 3), tasks=task).logits).backward()
        found.append(gradients(model))
    assert any(not torch.allclose(found[0][name], found[1][name]) for name in found[0] if name.endswith("up"))


@few_cases
def test_dropout_trains_and_rests_in_evaluation(case: Case) -> None:
    if case.adapter is None:
        pytest.skip("only adapters have dropout")
    adapter = peml.config.changed("adapter", case.adapter, {"lora_dropout": 0.5})
    model, batch = adapt(tiny(), adapter, case.prompt), tokens()
    quiet = model(input_ids=batch, tasks="rte").logits
    assert torch.equal(quiet, model(input_ids=batch, tasks="rte").logits)
    model.train()
    noisy = model(input_ids=batch, tasks="rte").logits
    assert not torch.allclose(noisy, quiet)
    mean = torch.stack([model(input_ids=batch, tasks="rte").logits.detach() for _ in range(30)]).mean(0)
    assert (mean - quiet).abs().mean() < (noisy - quiet).abs().mean()
    probe_loss(noisy).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("family", FAMILIES)
@few_cases
def test_half_precision_bases_keep_full_precision_adapters(family: str, case: Case) -> None:
    config = peml.PemlConfig(task_names=TASKS, adapter=case.adapter, prompt=case.prompt)
    model = get_peft_model(tiny(family).bfloat16(), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.train()
    logits = model(input_ids=tokens(), tasks=["rte", "cola", "sst2"]).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    probe_loss(logits.float()).backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("routing_init", ["uniform", "random"])
def test_mixtures_are_finite_at_every_temperature(dtype: torch.dtype, temperature: float, routing_init: str) -> None:
    adapter = peml.MTLLoRA(r=2, temperature=temperature, routing_init=routing_init).build(5, 7, 3)
    layer = BankLinear(torch.nn.Linear(5, 7, dtype=dtype).requires_grad_(False), "x")
    layer.update_layer("default", adapter, tuple(TASKS))
    layer.set_adapter("default")
    with torch.no_grad():
        adapter.routing.mul_(4)
        adapter.up.normal_()
    with peml.routing.opened(peml.routing.Forward(peml.routing.Route.of(TASKS, TASKS))):
        y = layer(torch.randn(3, 2, 5, dtype=dtype))
    y.float().square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in adapter.parameters())


@few_cases
def test_autocast(case: Case) -> None:
    """A base in full precision under bf16 autocast: near the full result, and finite gradients."""
    model = case.build(base=tiny().float())
    batch = tokens(3, 5)
    exact = model(input_ids=batch, tasks="rte").logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch, tasks="rte").logits
    assert (logits - exact).abs().mean() < 0.1 * exact.abs().mean()
    probe_loss(logits.float()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
