"""Small adapters without a model, and what the tests ask of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peml
import references
from models import TASKS, shake
from peml.adapters import Adapter, AdapterConfig
from peml.bank import BankLinear
from peml.routing import Route

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
