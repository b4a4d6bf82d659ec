"""Cores of all layers at once: on tensors this small, launching an operation costs more than what it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peml.adapters.base import Adapter
from peml.adapters.grouped import GroupedAdapter
from peml.routing import Route


def cores_ahead(adapters: Sequence[Adapter], route: Route | None) -> dict[nn.Module, Tensor]:
    """Cores of all layers in a few operations; layers that are not in it compute their own."""
    cores = _alike([adapter for adapter in adapters if not isinstance(adapter, GroupedAdapter)], route)
    by_groups: dict[object, list[GroupedAdapter]] = {}
    for adapter in adapters:
        if isinstance(adapter, GroupedAdapter):
            by_groups.setdefault(adapter.groups, []).append(adapter)
    if route is not None:
        for layers in by_groups.values():
            cores |= _of_groups(layers, route)
    return cores


def _of_groups(layers: Sequence[GroupedAdapter], route: Route) -> dict[nn.Module, Tensor]:
    """Cores of layers with the same groups, those of each group computed together."""
    found: dict[nn.Module, Tensor] = {}
    for part in route.split(layers[0].groups):
        found |= _alike([layer.member(part.group) for layer in layers], part.route)
    cores: dict[nn.Module, Tensor] = {}
    for layer in layers:
        own = [found.get(member) for member, _ in layer.parts(route)]
        known = [core for core in own if core is not None]
        if len(known) == len(own):
            core = layer.joined(known, route.to(known[0].device))
            cores[layer] = shared(layer, core)
    return cores


def _alike(adapters: Sequence[Adapter], route: Route | None) -> dict[nn.Module, Tensor]:
    """The same for layers that differ in their numbers alone."""
    if not adapters or adapters[0].reads_input or (adapters[0].needs_task and route is None):
        return {}
    by_device: dict[torch.device, list[Adapter]] = {}
    for adapter in adapters:
        if not resident(adapter):
            return {}
        by_device.setdefault(next(adapter.parameters()).device, []).append(adapter)
    cores: dict[nn.Module, Tensor] = {}
    for device, group in by_device.items():
        here, first = None if route is None else route.to(device), group[0]
        with torch.autocast(device.type, enabled=False):
            if not first.core_parameters:
                cores |= dict.fromkeys(group, shared(first, first.core({}, here)))
                continue
            stacked = {n: torch.stack([getattr(a, n) for a in group]) for n in first.core_parameters}
            cores |= zip(group, shared(first, first.core(stacked, here), leading=1).unbind(), strict=True)
    return cores


def resident(module: nn.Module) -> bool:
    """Whether a module's own weights are whole and here: not sharded, quantised, or of another tensor class."""
    own = module._parameters.values()  # `parameters()` takes ten times as long, and every call of a layer asks
    here = all(p is None or (type(p) in (Tensor, nn.Parameter) and not hasattr(p, "ds_id")) for p in own)
    return here and all(child is None or resident(child) for child in module._modules.values())


def shared(adapter: Adapter, core: Tensor, leading: int = 0) -> Tensor:
    """Drop the dimension of the rows where one task has them all; `leading` dimensions stand in front of it."""
    own = leading + (1 if adapter.diagonal else 2)
    return core.squeeze(leading) if core.ndim == own + 1 and core.shape[leading] == 1 else core
