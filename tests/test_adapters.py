"""What holds for every adapter on its own, without a model: banks, cores and folds against the equations."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import peml
from adapter_kit import (
    CONFIGS,
    FOLDABLE,
    IN,
    OUT,
    ROUTES,
    applied,
    build,
    expected,
    gradients,
    layer,
    same,
    tensors,
)
from models import TASKS
from peml import PemlError
from peml.adapters import ADAPTERS, Adapter, AdapterConfig
from peml.routing import Forward, Route, opened


def test_every_adapter_is_here() -> None:
    assert {type(config) for config in CONFIGS.values()} == set(ADAPTERS.values())


@pytest.mark.parametrize("ids", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("name", CONFIGS)
def test_bank_and_core_equal_the_equation(name: str, ids: list[Any]) -> None:
    """Outputs and gradients of every parameter, for each kind of batch (D6: the last task may be missing)."""
    config, x = CONFIGS[name], torch.randn(3, 4, IN, dtype=torch.float64)
    adapter = build(config)
    y, wanted = applied(adapter, x, Route.of(ids, TASKS)), expected(config, adapter, x, ids)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-11)
    same(gradients(adapter, y), gradients(adapter, wanted))


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_tasks_present_cost(name: str) -> None:
    """Bank and core have the same shapes for 3 tasks and for 50 (D4)."""
    if name == "CGCLoRA-total":
        pytest.skip("its rank per expert follows the number of tasks")
    shapes = []
    for tasks in (3, 50):
        adapter = build(CONFIGS[name], tasks)
        route = Route.of([0, 2, 0], [str(i) for i in range(tasks)])
        x = torch.randn(3, 4, IN, dtype=torch.float64)
        shapes.append([t.shape for t in (*adapter.bank(route), adapter.core(adapter.core_tensors(), route, x))])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("ids", [[1], [2, 0, 2], [[0, 2, 2, 0]] * 3], ids=["one", "rows", "tokens"])
@pytest.mark.parametrize("name", FOLDABLE)
def test_cores_of_stacked_layers_equal_those_of_each(name: str, ids: list[Any]) -> None:
    adapters, route = [build(CONFIGS[name]) for _ in range(4)], Route.of(ids, TASKS)
    first = adapters[0]
    stacked = {key: torch.stack([getattr(a, key) for a in adapters]) for key in first.core_parameters}
    together = first.core(stacked, route)
    apart = [adapter.core(adapter.core_tensors(), route) for adapter in adapters]
    if not first.core_parameters:
        assert all(torch.equal(together, core) for core in apart)
        return
    # Not bit for bit: sigmoids at the end of a vector are computed apart from the others.
    torch.testing.assert_close(together, torch.stack(apart), rtol=1e-14, atol=1e-14)
    # Two dimensions in front as well.
    deeper = first.core({key: value.unflatten(0, (2, 2)) for key, value in stacked.items()}, route)
    torch.testing.assert_close(deeper.flatten(0, 1), together, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_fold_is_the_adapter_of_its_task(name: str) -> None:
    """For every task, with the rank that the method states (D5)."""
    config, x = CONFIGS[name], torch.randn(1, 4, IN, dtype=torch.float64)
    adapter = build(config)
    for task in range(3):
        down, up = adapter.fold(Route.of(task, TASKS))
        assert down.shape == (config.folded_rank(3), IN) and up.shape == (config.folded_rank(3), OUT)
        torch.testing.assert_close(x @ down.T @ up, expected(config, adapter, x, [task]), rtol=1e-10, atol=1e-11)
    if not config.needs_task:
        assert all(map(torch.equal, adapter.fold(None), adapter.fold(Route.of(0, TASKS))))


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_fold_is_of_evaluation_in_fp32_or_better(name: str) -> None:
    adapter, route = build(CONFIGS[name], dtype=torch.bfloat16), Route.of(2, TASKS)
    quiet = adapter.fold(route)
    assert {t.dtype for t in quiet} == {torch.float32}
    state = torch.get_rng_state()
    assert all(map(torch.equal, quiet, adapter.train().fold(route)))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_reads_its_input_does_not_fold() -> None:
    config = peml.HydraLoRA()
    assert not config.foldable and config.build(IN, OUT, 3).reads_input
    for fold in (lambda: config.folded_rank(3), lambda: build(config).fold(None)):
        with pytest.raises(PemlError, match="no plain low-rank pair"):
            fold()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_adapter_is_exactly_nothing(name: str, dtype: torch.dtype) -> None:
    """In every precision, trained or not; and linear layers without a bias get none (D1, D8)."""
    adapter, x = CONFIGS[name].build(IN, OUT, 3).to(dtype), torch.randn(3, 4, IN).to(dtype)
    for mode in (True, False):
        update = applied(adapter.train(mode).float(), x.float(), Route.of([2, 0, 1], TASKS))
        assert not update.any()
        host = layer(adapter.to(dtype).train(mode), dtype=dtype)
        with opened(Forward(Route.of([2, 0, 1], TASKS))):
            assert torch.equal(host(x), host.base_layer(x))
    assert not [key for key in tensors(adapter) if "bias" in key]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_counts_the_parameters(name: str) -> None:
    config = wide(CONFIGS[name])
    for tasks in (1, 3, 8):
        adapter = config.build(IN, OUT, tasks)
        assert config.num_parameters(IN, OUT, tasks) == sum(p.numel() for p in adapter.parameters())
        assert all(p.numel() and p.requires_grad for p in adapter.parameters()) and not list(adapter.buffers())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_declared_per_task_is(name: str) -> None:
    """One row per task, no gradient for other tasks' rows, and no tensor that forgot to declare itself."""
    few, many = (build(wide(CONFIGS[name]), tasks).train() for tasks in (3, 8))
    own = {key for key, p in tensors(few).items() if p.shape[0] != tensors(many)[key].shape[0]}
    assert set(few.task_parameters) == own
    assert set(few.core_parameters) <= set(tensors(few))
    found = gradients(few, applied(few, torch.randn(2, 4, IN, dtype=torch.float64), Route.of([1, 1], TASKS)))
    for key in own:
        assert found[key].shape[0] == 3 and found[key][1].any() and not found[key][[0, 2]].any()


def wide(config: AdapterConfig) -> AdapterConfig:
    """With a rank that any number of experts shares evenly."""
    return dataclasses.replace(config, r=60)  # type: ignore[call-arg]


SMALLEST: dict[type[AdapterConfig], tuple[str, ...]] = {
    peml.SingleTaskLoRA: ("r", "lora_alpha"),
    peml.MultiLoRA: ("r", "lora_alpha", "num_parallel"),
    peml.MoELoRA: ("r", "lora_alpha", "num_experts", "task_dim"),
    peml.CGCLoRA: ("r", "lora_alpha", "temperature", "task_dim"),
    peml.Poly: ("r", "num_skills", "n_splits"),
    peml.CPoly: ("r", "lora_alpha"),
    peml.HydraLoRA: ("r", "lora_alpha", "num_heads"),
}


@pytest.mark.parametrize(("kind", "field"), [(kind, name) for kind, names in SMALLEST.items() for name in names])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_sizes_and_temperatures_must_be_positive(kind: type[AdapterConfig], field: str, value: float) -> None:
    """A temperature of 0 among them (D7)."""
    with pytest.raises(PemlError, match=f"adapter.{field} must be above 0, not"):
        kind(**{field: value})


@pytest.mark.parametrize("kind", SMALLEST)
@pytest.mark.parametrize("value", [-0.1, 1, 2])
def test_dropout_is_a_probability(kind: type[AdapterConfig], value: float) -> None:
    with pytest.raises(PemlError, match=r"adapter.lora_dropout must be in \[0, 1\)"):
        kind(lora_dropout=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: peml.MoELoRA(r=12),
            r"adapter.r must be a multiple of 8, the number of experts, not 12: 8 or 16 would fit",
        ),
        (lambda: peml.MoELoRA(r=3), r"not 3: 8 would fit"),
        (
            lambda: peml.CGCLoRA(r=6),
            r"adapter.r must be a multiple of 4, 3 common \+ 1 specific experts, not 6: 4 or 8",
        ),
        (lambda: peml.CGCLoRA(num_common=-1), "adapter.num_common must be 0 or above, not -1"),
        (lambda: peml.CGCLoRA(num_common=0, num_specific=0), "both 0: there must be an expert"),
        (lambda: peml.CPoly(num_common=0, num_specific=0), "both 0: there must be an expert"),
        (lambda: peml.CPoly(num_specific=-2), "adapter.num_specific must be 0 or above, not -2"),
        (lambda: peml.CGCLoRA(rank_mode="all"), "adapter.rank_mode must be active or total, not 'all'"),
        (lambda: peml.CGCLoRA(gate="global"), "adapter.gate must be embedding or per_task or table, not 'global'"),
        (lambda: peml.Poly(sampling="row"), "adapter.sampling must be task or sample, not 'row'"),
    ],
)
def test_settings_that_do_not_fit_are_named(make: Callable[[], AdapterConfig], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        make()


def test_layers_and_tasks_that_do_not_fit_are_named() -> None:
    with pytest.raises(PemlError, match=r"adapter.n_splits 4 does not divide both 8 and 10, .*: take one of 1, 2, or"):
        peml.Poly(n_splits=4).build(8, 10, 2)
    config = peml.CGCLoRA(r=12, rank_mode="total")
    assert config.build(IN, OUT, 3).r == 2
    with pytest.raises(
        PemlError, match=r"multiple of 8, 3 common \+ 1 specific experts for each of 5 tasks, not 12: 8 or"
    ):
        config.build(IN, OUT, 5)


KINDS: dict[type[AdapterConfig], dict[str, tuple[Any, ...]]] = {
    peml.SingleTaskLoRA: {"use_rslora": (True, False)},
    peml.CGCLoRA: {"rank_mode": ("active", "total"), "gate": ("embedding", "per_task", "table"), "r": (12,)},
    peml.Poly: {"sampling": ("task", "sample"), "n_splits": (1, 2, 4)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_builds_and_starts_at_nothing(kind: type[AdapterConfig]) -> None:
    """D8: no value of an option that cannot be constructed."""
    x, route = torch.randn(3, 4, IN), Route.of([2, 0, 1], TASKS)
    for values in itertools.product(*KINDS[kind].values()):
        adapter = kind(**dict(zip(KINDS[kind], values, strict=True))).build(IN, OUT, 3)
        y = applied(adapter, x, route)
        assert y.shape == (3, 4, OUT) and not y.any()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (peml.SingleTaskLoRA(r=4, lora_alpha=8), 2.0),
        (peml.SingleTaskLoRA(r=4, lora_alpha=8, use_rslora=True), 4.0),
        (peml.MultiLoRA(r=4, lora_alpha=8), 2.0),
        (peml.MoELoRA(r=4, lora_alpha=8, num_experts=2), 2.0),
        (peml.CGCLoRA(r=4, lora_alpha=8), 2.0),
        (peml.CGCLoRA(r=12, lora_alpha=24, rank_mode="total"), 2.0),
        (peml.Poly(r=4), 0.25),
        (peml.Poly(r=4, n_splits=2), 0.25),
        (peml.CPoly(r=4, lora_alpha=8), 2.0),
        (peml.HydraLoRA(r=4, lora_alpha=8), 2.0),
    ],
)
def test_the_scale_of_each_method(config: Any, scale: float) -> None:
    """D17. A mixture of equal experts of ones gives the scale times the rank of one expert."""
    assert config.scaling == scale
    adapter, x, route = config.build(IN, OUT, 3).eval(), torch.ones(1, 1, IN), Route.of(1, TASKS)
    weights = {key: p for key, p in tensors(adapter).items() if key.split("_")[0] in ("down", "up")}
    with torch.no_grad():
        for p in weights.values():
            p.fill_(1.0)
        for key in ("routing", "gate", "router"):
            if key in tensors(adapter):
                getattr(adapter, key).zero_()
        if isinstance(config, peml.MultiLoRA):
            adapter.scale.fill_(1 / config.num_parallel)
        if isinstance(config, peml.CPoly):
            # Own skills are added to the common ones, so only half of each is left.
            adapter.down.mul_(0.5)
            adapter.down_specific.mul_(0.5)
    rank = weights["up"].shape[-2]
    assert applied(adapter, x, route)[0, 0, 0].item() == pytest.approx(scale * rank * IN, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("gate", ["embedding", "per_task", "table"])
def test_gates_are_finite_at_every_temperature(dtype: torch.dtype, temperature: float, gate: Any) -> None:
    """D7: weights of half precision, and logits that would overflow there."""
    adapter = build(peml.CGCLoRA(temperature=temperature, gate=gate), dtype=dtype)
    with torch.no_grad():
        for key in adapter.core_parameters:
            getattr(adapter, key).mul_(40)
    finite(adapter, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_is_finite(name: str, dtype: torch.dtype, training: bool, scale: float) -> None:
    """However far routing has gone, to one skill or to none."""
    adapter = build(CONFIGS[name], size=0.1, dtype=dtype).train(training)
    with torch.no_grad():
        for key in ("routing", "gate", "router"):
            if key in tensors(adapter) and not isinstance(CONFIGS[name], peml.MTLLoRA):
                getattr(adapter, key).mul_(scale)
    finite(adapter, dtype)


def finite(adapter: Adapter, dtype: torch.dtype) -> None:
    x, route = torch.randn(3, 2, IN).to(dtype), Route.of([2, 0, 2], TASKS)
    down, up = adapter.bank(route)
    core = adapter.core(adapter.core_tensors(), route, x)
    assert torch.promote_types(core.dtype, torch.float32) == torch.float32
    loss = sum(t.float().square().sum() for t in (down, up, core))
    assert all(t.isfinite().all() for t in (down, up, core)) and loss.isfinite()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("shape", [(3, 4, IN), (3, IN), (1, 1, IN)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_layout_of_the_input(name: str, shape: tuple[int, ...]) -> None:
    """D9: rows of tokens, rows alone, one token."""
    config, x = CONFIGS[name], torch.randn(shape, dtype=torch.float64)
    adapter = build(config)
    host, ids = layer(adapter), [2, 0, 2][: shape[0]]
    with opened(Forward(Route.of(ids, TASKS))):
        y = host(x) - host.base_layer(x)
    wanted = expected(config, adapter, x if x.ndim == 3 else x[:, None], ids)
    torch.testing.assert_close(y, wanted.view(y.shape), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_toggling_changes_no_weight(name: str) -> None:
    """D21: a hundred times between training and evaluation, and merged where that is possible."""
    config = CONFIGS[name]
    adapter = build(config, dtype=torch.float32)
    host = layer(adapter, dtype=torch.bfloat16)
    before = copy.deepcopy(host.state_dict())
    host.selected_task["default"] = 1
    for i in range(100):
        host.train()
        host.eval()
        if config.foldable and i % 10 == 0:
            host.merge()
            host.unmerge()
    after = host.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
