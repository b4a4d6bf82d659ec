"""Every adapter on its own, without a model: banks, cores and folds against the equations, and what papers promise."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import PolyConfig
from peft.tuners.poly.layer import Linear as PeftPoly
from torch import Tensor, nn

import peml
import references
from models import TASKS, shake
from peml import PemlError
from peml.adapters import ADAPTERS, Adapter, AdapterConfig, MHRAdapter
from peml.bank import BankLinear
from peml.routing import Forward, Route, opened

IN, OUT = 8, 12

CONFIGS: dict[str, AdapterConfig] = {
    "LoRA": peml.LoRA(r=3, lora_alpha=5),
    "SingleTaskLoRA": peml.SingleTaskLoRA(r=3, lora_alpha=5),
    "SingleTaskLoRA-rs": peml.SingleTaskLoRA(r=3, lora_alpha=5, use_rslora=True),
    "MTLLoRA": peml.MTLLoRA(r=3, num_up=2, lora_alpha=4),
    "MTLLoRA-diag": peml.MTLLoRA(r=3, lambda_kind="diag", routing_init="random"),
    "MultiLoRA": peml.MultiLoRA(r=2, lora_alpha=3),
    "MoELoRA": peml.MoELoRA(r=6, num_experts=3, task_dim=4),
    "CGCLoRA": peml.CGCLoRA(r=8, temperature=0.5, task_dim=4),
    "CGCLoRA-per-task": peml.CGCLoRA(r=3, num_common=1, num_specific=2, gate="per_task", task_dim=4),
    "CGCLoRA-table": peml.CGCLoRA(r=3, num_common=1, num_specific=2, gate="table", temperature=2),
    "CGCLoRA-total": peml.CGCLoRA(r=10, num_common=2, num_specific=1, rank_mode="total"),
    "CGCLoRA-common": peml.CGCLoRA(r=4, num_common=2, num_specific=0),
    "CGCLoRA-specific": peml.CGCLoRA(r=4, num_common=0, num_specific=2),
    "Poly": peml.Poly(r=3, num_skills=3),
    "Poly-sample": peml.Poly(r=3, num_skills=2, sampling="sample"),
    "MHR": peml.Poly(r=3, num_skills=2, n_splits=4),
    "MHR-sample": peml.Poly(r=2, num_skills=3, n_splits=2, sampling="sample"),
    "CPoly": peml.CPoly(r=2, num_common=2, num_specific=2),
    "CPoly-common": peml.CPoly(r=2, num_specific=0),
    "CPoly-specific": peml.CPoly(r=2, num_common=0),
    "HydraLoRA": peml.HydraLoRA(r=3, num_heads=2),
}
FOLDABLE = [name for name, config in CONFIGS.items() if config.foldable]
DRAWN = [name for name, config in CONFIGS.items() if isinstance(config, peml.Poly | peml.CPoly)]
ROUTES: dict[str, list[Any]] = {
    "one for all": [1],
    "every task": [2, 0, 1],
    "the last is missing": [1, 0, 1],
    "the first is missing": [2, 2, 1],
    "by token": [[0, 2, 2, 0], [2, 2, 0, 0], [0, 0, 0, 2]],
}


def build(config: AdapterConfig, tasks: int = 3, size: float = 0.5, dtype: torch.dtype = torch.float64) -> Adapter:
    """An adapter in evaluation, away from its neutral start."""
    adapter = config.build(IN, OUT, tasks).to(dtype)
    shake(adapter.parameters(), size)
    return adapter.eval()


def applied(adapter: Adapter, x: Tensor, route: Route | None) -> Tensor:
    """`up' C down x` for `x [B, S, I]`, from what the adapter gives the kernel."""
    down, up = adapter.bank(route)
    core = adapter.core(adapter.core_tensors(), route, x)
    hidden = x @ down.T
    if not adapter.diagonal:
        while core.ndim < hidden.ndim + 1:
            core = core.unsqueeze(-3)
        return (core @ hidden[..., None]).squeeze(-1) @ up
    while core.ndim < hidden.ndim:
        core = core.unsqueeze(-2)
    return (core * hidden) @ up


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    return dict(adapter.named_parameters())


def expected(config: AdapterConfig, adapter: Adapter, x: Tensor, ids: Sequence[Any]) -> Tensor:
    """The naive version, token by token."""
    rows = [list(row) if isinstance(row, list) else [row] * x.shape[1] for row in ids] * (x.shape[0] // len(ids))
    update, settings = references.ADAPTERS[type(config).__name__], dataclasses.asdict(config)
    tokens = zip(x.flatten(0, 1), itertools.chain(*rows), strict=True)
    return torch.stack([update(v, tensors(adapter), settings, t) for v, t in tokens]).view(*x.shape[:-1], OUT)


def gradients(adapter: Adapter, y: Tensor) -> dict[str, Tensor]:
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    names = list(tensors(adapter))
    found = torch.autograd.grad((y * weight).sum(), list(adapter.parameters()), allow_unused=True)
    zeros = [torch.zeros_like(p) for p in adapter.parameters()]
    return {name: z if g is None else g for name, g, z in zip(names, found, zeros, strict=True)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def layer(adapter: Adapter, tasks: Sequence[str] = TASKS, dtype: torch.dtype = torch.float64) -> BankLinear:
    """The adapter on a frozen linear."""
    host = BankLinear(nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False), "path.of.layer")
    host.update_layer("default", adapter, tuple(tasks))
    host.set_adapter("default")
    return host.train(adapter.training)


# What holds for all of them.


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


# Draws.


@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_of_training_and_follow_the_seed(name: str) -> None:
    adapter, x, route = build(CONFIGS[name]), torch.randn(3, 4, IN, dtype=torch.float64), Route.of([2, 0, 2], TASKS)
    quiet = applied(adapter, x, route)
    assert torch.equal(applied(adapter, x, route), quiet)
    adapter.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(applied(adapter, x, route))
    assert torch.equal(drawn[0], drawn[1])
    if name == "CPoly-specific":
        assert torch.equal(drawn[0], quiet)
        return
    assert not torch.allclose(drawn[0], drawn[2]) and not torch.allclose(drawn[0], quiet)


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "CPoly-specific"])
def test_draws_are_shared_as_stated(name: str) -> None:
    """Rows of one task share a draw, unless each samples its own; layers never share one."""
    adapter, route = build(CONFIGS[name]).train(), Route.of([2, 0, 2], TASKS)
    x = torch.randn(1, 4, IN, dtype=torch.float64).expand(3, -1, -1)
    first, _, third = applied(adapter, x, route)
    assert torch.allclose(first, third) != name.endswith("sample")
    by_token = Route.of([[0, 2, 2, 0]] * 3, TASKS)
    y = applied(adapter, x[:, :1].expand(-1, 4, -1), by_token)
    torch.testing.assert_close(y, y[:1].expand_as(y))
    torch.testing.assert_close(y[0, 0], y[0, 3])
    assert not torch.allclose(y[0, 0], y[0, 1])
    if adapter.core_parameters:
        same_layers = {key: torch.stack([value, value]) for key, value in adapter.core_tensors().items()}
        one, other = adapter.core(same_layers, route)
        assert not torch.allclose(one, other)


def test_the_mean_of_many_draws_is_near_the_evaluation() -> None:
    adapter = build(peml.Poly(num_skills=3, r=1), size=0)
    route = Route.of(1, TASKS)
    quiet = adapter.core(adapter.core_tensors(), route)
    adapter.train()
    many = {"routing": adapter.routing.expand(20_000, -1, -1, -1)}
    drawn = adapter.core(many, route)
    skills = torch.diagonal(drawn, dim1=-2, dim2=-1).sqrt()
    torch.testing.assert_close(skills.sum(-1), torch.ones_like(skills[..., 0]))
    mean = skills.mean(0)[0]
    torch.testing.assert_close(mean, torch.diagonal(quiet[0]).sqrt(), rtol=0.02, atol=0.0)


# What the papers and other implementations say.


def test_single_task_gradients_are_those_of_separate_loras() -> None:
    x, ids = torch.randn(5, 4, IN, dtype=torch.float64), [2, 0, 2, 1, 0]
    together = build(peml.SingleTaskLoRA(r=3, lora_alpha=5))
    y = applied(together, x, Route.of(ids, TASKS))
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    for task in range(3):
        alone = build(peml.LoRA(r=3, lora_alpha=5))
        with torch.no_grad():
            alone.down.copy_(together.down[task])
            alone.up.copy_(together.up[task])
        rows = [i for i, t in enumerate(ids) if t == task]
        update = applied(alone, x[rows], None)
        torch.testing.assert_close(update, y[rows], rtol=1e-12, atol=1e-12)
        (update * weight[rows]).sum().backward()
        torch.testing.assert_close(together.down.grad[task], alone.down.grad, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(together.up.grad[task], alone.up.grad, rtol=1e-11, atol=1e-11)


def test_multi_lora_starts_with_its_scale_alone() -> None:
    adapter = peml.MultiLoRA(r=2).build(IN, OUT, 3)
    applied(adapter, torch.randn(2, 3, IN), None).square().sum().backward()
    assert not any(p.grad.any() for p in adapter.parameters())  # the update is 0, and so is the square's slope
    applied(adapter, torch.randn(2, 3, IN), None).sum().backward()
    assert {key for key, p in tensors(adapter).items() if p.grad.any()} == {"scale"}
    # Up-projections are drawn as linear layers that read r features: within 1/sqrt(r), and not far below.
    wide = peml.MultiLoRA(r=4).build(IN, 500, 3).up
    assert 0.45 < wide.abs().max() <= 0.5


def test_a_uniform_gate_is_lora_with_a_smaller_scale() -> None:
    moe = build(peml.MoELoRA(r=6, lora_alpha=12, num_experts=3))
    lora = build(peml.LoRA(r=6, lora_alpha=12 / 3))
    with torch.no_grad():
        moe.gate.zero_()
        lora.down.copy_(moe.down.flatten(0, 1))
        lora.up.copy_(moe.up.flatten(0, 1))
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    torch.testing.assert_close(applied(moe, x, Route.of([2, 0, 1], TASKS)), applied(lora, x, None))


def test_cgc_without_own_experts_is_moe() -> None:
    cgc = build(peml.CGCLoRA(r=6, lora_alpha=12, num_common=3, num_specific=0, task_dim=5))
    moe = build(peml.MoELoRA(r=6, lora_alpha=12, num_experts=3, task_dim=5))
    moe.load_state_dict(cgc.state_dict())
    x, route = torch.randn(3, 4, IN, dtype=torch.float64), Route.of([2, 0, 1], TASKS)
    y, z = applied(cgc, x, route), applied(moe, x, route)
    torch.testing.assert_close(y, z)
    same(gradients(cgc, y), gradients(moe, z))


@pytest.mark.parametrize("gate", ["embedding", "per_task", "table"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_one_own_expert_is_single_task_lora(gate: Any, temperature: float) -> None:
    """A softmax over one is 1; for C-Poly a weight of 1."""
    cgc = build(peml.CGCLoRA(r=3, num_common=0, num_specific=1, gate=gate, temperature=temperature))
    c_poly = build(peml.CPoly(r=3, num_common=0, num_specific=1))
    single = build(peml.SingleTaskLoRA(r=3))
    x, route = torch.randn(3, 4, IN, dtype=torch.float64), Route.of([2, 0, 2], TASKS)
    with torch.no_grad():
        c_poly.weight_specific.fill_(1.0)
        for adapter in (cgc, c_poly):
            adapter.down_specific.copy_(single.down[:, None])
            adapter.up_specific.copy_(single.up[:, None])
            torch.testing.assert_close(applied(adapter, x, route), applied(single, x, route))


def test_own_experts_belong_to_their_task() -> None:
    """No gradient for other tasks' experts, in a mixed batch too, and no change of outputs by them."""
    x, route = torch.randn(4, 3, IN, dtype=torch.float64), Route.of([2, 0, 2, 0], TASKS)
    for config in (peml.CGCLoRA(r=4), peml.CPoly(r=2)):
        adapter = build(config)
        y = applied(adapter, x, route)
        found = gradients(adapter, y[[0, 2]])
        for key in ("down_specific", "up_specific"):
            assert found[key][2].any() and not found[key][:2].any()
        with torch.no_grad():
            adapter.down_specific[:2].normal_()
        again = applied(adapter, x, route)
        assert torch.equal(again[[0, 2]], y[[0, 2]]) and not torch.allclose(again[1], y[1])


def test_c_poly_without_own_skills_is_a_routed_sum() -> None:
    """Also in training; and it is not Poly, which averages factors."""
    config = peml.CPoly(r=3, num_common=2, num_specific=0, lora_alpha=6)
    adapter, x = build(config), torch.randn(2, 4, IN, dtype=torch.float64)
    for mode in (True, False):
        adapter.train(mode)
        torch.manual_seed(3)
        y = applied(adapter, x, Route.of(1, TASKS))
        torch.manual_seed(3)
        weights = adapter.core(adapter.core_tensors(), Route.of(1, TASKS))[0, ::3] / config.scaling
        assert weights.sum().item() == pytest.approx(1.0)
        wanted = sum(w * 2.0 * x @ a.T @ b for w, a, b in zip(weights, adapter.down, adapter.up, strict=True))
        torch.testing.assert_close(y, wanted)
    poly = build(peml.Poly(r=3, num_skills=2))
    with torch.no_grad():
        for key in ("down", "up"):
            getattr(poly, key).copy_(getattr(adapter, key)[None])
        poly.routing.copy_(adapter.routing[:, None])
    other = applied(poly, x, Route.of(1, TASKS)) * 3 * config.scaling
    assert not torch.allclose(other, y, rtol=0.1)


def peft_poly(config: peml.Poly, adapter: Adapter) -> PeftPoly:
    """PEFT's layer with the same weights; no base, so that its output is the update."""
    settings = PolyConfig(r=config.r, n_tasks=3, n_skills=config.num_skills, n_splits=config.n_splits)
    base = nn.Linear(IN, OUT, bias=False)
    stock = PeftPoly(base, "default", settings)
    stock.double()
    with torch.no_grad():
        base.weight.zero_()
        stock.poly_lora_A["default"].copy_(adapter.down.transpose(-1, -2))
        stock.poly_lora_B["default"].copy_(adapter.up)
        stock.poly_router["default"].module_logits.copy_(adapter.routing.flatten(1))
    return stock


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n_splits", [1, 2, 4])
def test_poly_equals_pefts(n_splits: int, training: bool) -> None:
    """Outputs and gradients, in training from the same seed too."""
    config = peml.Poly(r=3, num_skills=3, n_splits=n_splits, sampling="sample")
    adapter = build(config).train(training)
    stock = peft_poly(config, adapter).train(training)
    x, ids = torch.randn(4, 5, IN, dtype=torch.float64), [2, 0, 2, 1]
    torch.manual_seed(7)
    wanted = stock(x, task_ids=torch.tensor(ids))
    torch.manual_seed(7)
    route = Route.of(ids, TASKS)
    if n_splits == 1:
        found = applied(adapter, x, route)
    else:
        down, up = adapter.bank(route)  # the only place that draws
        found = (x @ down.T * adapter.core({}, route)[:, None]) @ up
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(wanted)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    for own, theirs in (
        (adapter.down.grad.transpose(-1, -2), stock.poly_lora_A["default"].grad),
        (adapter.up.grad, stock.poly_lora_B["default"].grad),
        (adapter.routing.grad.flatten(1), stock.poly_router["default"].module_logits.grad),
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def test_an_average_of_products_is_something_else() -> None:
    adapter, x = build(peml.Poly(r=3, num_skills=2)), torch.randn(1, 4, IN, dtype=torch.float64)
    (update,) = applied(adapter, x, Route.of(1, TASKS))
    z = torch.sigmoid(adapter.routing[1, 0])
    z = z / z.sum()
    products = sum(w * x[0] @ a.T @ b / 3 for w, a, b in zip(z, adapter.down[0], adapter.up[0], strict=True))
    assert not torch.allclose(update, products, rtol=0.1)


def test_one_split_of_mhr_is_poly() -> None:
    """The averaged form and the dense core are two ways to compute one thing."""
    config = peml.Poly(r=3, num_skills=3)
    poly, averaged = build(config), MHRAdapter(config, IN, OUT, 3).double().eval()
    averaged.load_state_dict(poly.state_dict())
    x, route = torch.randn(3, 4, IN, dtype=torch.float64), Route.of([2, 0, 1], TASKS)
    torch.testing.assert_close(applied(averaged, x, route), applied(poly, x, route))


def test_an_open_router_is_the_mean_of_the_heads() -> None:
    hydra, lora = build(peml.HydraLoRA(r=3, lora_alpha=6, num_heads=2)), build(peml.LoRA(r=3, lora_alpha=6))
    with torch.no_grad():
        hydra.router.zero_()
        lora.down.copy_(hydra.down)
        lora.up.copy_(hydra.up.mean(0))
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    torch.testing.assert_close(applied(hydra, x, None), applied(lora, x, None))


def test_the_router_learns_as_soon_as_the_heads_differ() -> None:
    """D15: no declared part that never has a gradient."""
    adapter, x = peml.HydraLoRA(r=3).build(IN, OUT, 3), torch.randn(2, 3, IN)
    applied(adapter, x, None).sum().backward()
    assert adapter.up.grad.any() and not adapter.router.grad.any()
    shake([adapter.up], 0.1)
    applied(adapter, x, None).sum().backward()
    assert adapter.router.grad.any() and adapter.down.grad.any()


def test_the_router_keeps_the_precision_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision is read as it is; only what comes out of the product is made wider."""
    adapter, linear, seen = build(peml.HydraLoRA(r=2), dtype=torch.float32), nn.functional.linear, []
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight: seen.append((x, weight.dtype)) or linear(x, weight))
    x = torch.randn(2, 3, IN, dtype=torch.bfloat16)
    core = adapter.core(adapter.core_tensors(), None, x)
    assert seen[0][0] is x and seen[0][1] == torch.bfloat16
    assert core.dtype == torch.float32 and core.shape == (2, 3, 2 * 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_trained(name: str) -> None:
    """D15, away from the start."""
    adapter = build(CONFIGS[name]).train()
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    found = gradients(adapter, applied(adapter, x, Route.of([2, 0, 1], TASKS)))
    assert [key for key, gradient in found.items() if not gradient.any()] == []


@pytest.mark.parametrize(
    ("config", "per_linear", "total"),
    [
        (peml.LoRA(), 65_536, 8_388_608),
        (peml.SingleTaskLoRA(), 524_288, 67_108_864),
        (peml.MTLLoRA(), 131_608, 16_845_824),
        (peml.MTLLoRA(lambda_kind="diag"), 131_160, 16_788_480),
        (peml.MultiLoRA(), 208_896, 26_738_688),
        (peml.MoELoRA(r=8), 66_560, 8_519_680),
        (peml.CGCLoRA(), 180_992, 23_166_976),
        (peml.Poly(), 262_176, 33_558_528),
        (peml.Poly(n_splits=4), 262_272, 33_570_816),
        (peml.CPoly(), 720_928, 92_278_784),
        (peml.HydraLoRA(r=8, num_heads=3), 143_360, 18_350_080),
    ],
)
def test_counts_on_llama_2_7b(config: AdapterConfig, per_linear: int, total: int) -> None:
    """q, k, v, o of 32 layers, 8 tasks: by the formula, and by counting an adapter without memory."""
    assert config.num_parameters(4096, 4096, 8) == per_linear and 128 * per_linear == total
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build(4096, 4096, 8).parameters()) == per_linear


def test_starts_and_defaults_are_those_of_the_released_code() -> None:
    moe = peml.MoELoRA().build(2000, OUT, 50)
    assert moe.down.std().item() == pytest.approx(0.01, rel=0.05) and moe.down.shape == (8, 2, 2000)
    assert moe.embedding.std().item() == pytest.approx(1.0, rel=0.05) and moe.gate.abs().max() <= 1 / 8
    cgc = peml.CGCLoRA().build(IN, OUT, 5)
    assert not cgc.gate.any() and cgc.embedding.any() and cgc.r == 2
    c_poly = peml.CPoly(num_specific=4).build(IN, OUT, 5)
    assert (c_poly.weight_specific == 0.25).all() and 0 < c_poly.routing.abs().max() <= 1e-3
    poly = peml.Poly().build(IN, OUT, 5)
    assert 0 < poly.routing.abs().max() <= 1e-3 and poly.down.shape == (1, 4, 8, IN)
    assert peml.MoELoRA.learning_rate == peml.HydraLoRA.learning_rate == 2e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_another_rank_keeps_the_rest(name: str) -> None:
    """D24: budgets are matched by rank, in steps that the experts can share."""
    config: Any = CONFIGS[name]
    step = config.rank_step(3)
    sized = config.resized(5 * step)
    assert sized.r == 5 * step and type(sized) is type(config)
    assert config.r % step == 0 and sized.num_parameters(IN, OUT, 3) > 0
    rest = [f.name for f in dataclasses.fields(config) if f.name not in ("r", "lora_alpha")]
    assert all(getattr(sized, key) == getattr(config, key) for key in rest)
    if hasattr(config, "lora_alpha"):
        assert sized.lora_alpha / sized.r == pytest.approx(config.lora_alpha / config.r)
