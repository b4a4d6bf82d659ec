"""Exact memory of one step: what autograd keeps for backward, and the peak of everything that is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ALLOCATION = "[memory]"
"""Name of the profiler's events that carry an allocation (positive) or a release (negative)."""


def saved_bytes(forward: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for backward: unique storages, without those of `held`.

    A storage counts once and whole, however many views of it are saved, since one view keeps all of it alive.

    Args:
        forward: runs once, with gradients.
        held: parameters and buffers, which exist with or without a backward pass.
    """
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)  # kept alive, so that no second storage can take its address
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    excluded = {tensor.untyped_storage().data_ptr() for tensor in held}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del outputs
    return sum(size for address, size in storages.items() if address not in excluded)


def peak_bytes(step: Callable[[], object]) -> int:
    """Highest number of bytes that a step has allocated and not yet released; what was there before is not counted.

    The running sum over the CPU allocator's own events, and so exact: no sampling, no resident set size.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        outputs = step()
    del outputs
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == ALLOCATION]
    peak = running = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak
