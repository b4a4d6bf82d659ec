"""Adapters against what their papers and other implementations say, and how they draw at random."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import PolyConfig
from peft.tuners.poly.layer import Linear as PeftPoly
from torch import nn

import peml
from adapter_kit import (
    CONFIGS,
    DRAWN,
    IN,
    OUT,
    applied,
    build,
    gradients,
    same,
    tensors,
)
from models import TASKS, shake
from peml.adapters import Adapter, AdapterConfig, MHRAdapter
from peml.routing import Route

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
        assert sized.scaling == pytest.approx(config.scaling)
