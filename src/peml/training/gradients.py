"""The gradient of each task in a step, from passes over the rows of one task at a time.

A mixed batch gives what batches per task give, in every method here; so the rows of a micro-batch are run task by
task, which costs about what one pass costs, not as many passes as there are tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rows_of(inputs: Mapping[str, Any], task: int) -> dict[str, Any]:
    """The part of a batch that belongs to a task."""
    tasks: Sequence[int] = inputs["tasks"]
    rows = [row for row, own in enumerate(tasks) if own == task]
    out: dict[str, Any] = {}
    for key, value in inputs.items():
        picked = torch.tensor(rows, device=value.device) if isinstance(value, Tensor) else rows
        out[key] = value[picked] if isinstance(value, Tensor) else [value[row] for row in rows]
    return out


class TaskGradients:
    """Gradients of one step, kept apart by task, and what no task has: the penalties.

    Shared parameters have a row for each task present, and one for the penalties. A parameter that is stacked over
    tasks needs two rows only: that of task t has its gradient in part t.

    Args:
        parameters: all that are trained.
        stacked: `id` of those that belong to single tasks, with the task of each of their rows, or of all.
        present: tasks of the step, on any device.
        num_tasks: T.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        stacked: Mapping[int, Sequence[int]],
        present: Sequence[int],
        num_tasks: int,
    ) -> None:
        self.parameters = list(parameters)
        self.shared = [id(p) not in stacked for p in self.parameters]
        self.owners = [list(stacked.get(id(p), ())) for p in self.parameters]
        self.present = list(present)
        self.num_tasks = num_tasks
        self.touched = [False] * len(self.parameters)
        # One buffer for each kind of parameter, so that devices exchange a few large tensors, not many small ones.
        self.flat: dict[tuple[Any, ...], Tensor] = {}
        self.kinds = [(p.device, p.dtype, s) for p, s in zip(self.parameters, self.shared, strict=True)]
        lengths: dict[tuple[Any, ...], int] = dict.fromkeys(self.kinds, 0)
        self.places = []
        for kind, p in zip(self.kinds, self.parameters, strict=True):
            self.places.append(slice(lengths[kind], lengths[kind] + p.numel()))
            lengths[kind] += p.numel()
        for kind, length in lengths.items():
            device, dtype, shared = kind
            rows = (len(self.present) if shared else 1) + 1
            self.flat[kind] = torch.zeros(rows, length, device=device, dtype=dtype)

    def collect(self, task: int | None) -> None:
        """Move what a backward pass has left into its row; None: of the penalties."""
        for i, (p, kind, place) in enumerate(zip(self.parameters, self.kinds, self.places, strict=True)):
            if p.grad is None:
                continue
            row = -1 if task is None else self.present.index(task) if self.shared[i] else 0
            self.flat[kind][row, place] += p.grad.flatten()
            self.touched[i] = True
            p.grad = None

    def reduce(self) -> None:
        """Sum over devices."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for buffer in self.flat.values():
            dist.all_reduce(buffer)
        touched = torch.tensor(self.touched, dtype=torch.int32, device=self.parameters[0].device)
        dist.all_reduce(touched, dist.ReduceOp.MAX)
        self.touched = [bool(value) for value in touched.tolist()]

    def gramian(self) -> Tensor:
        """Inner products of the tasks' gradients of the shared parameters, `[k, k]`, in fp64 on the CPU."""
        k = len(self.present)
        total = torch.zeros(k, k, dtype=torch.float64)
        for (_, _, shared), buffer in self.flat.items():
            if shared:
                rows = buffer[:k].to(torch.promote_types(buffer.dtype, torch.float32))
                total += (rows @ rows.T).double().cpu()
        return total

    def write(self, factors: Tensor, shares: Tensor) -> None:
        """Leave the gradient of the step where the optimiser looks for it.

        Args:
            factors: of each task present, for what tasks share, `[k]`.
            shares: of all tasks, for what belongs to single ones, `[T]`.
        """
        for kind, buffer in self.flat.items():
            if kind[2]:
                buffer[-1] += factors.to(buffer) @ buffer[:-1]
        everything = zip(self.parameters, self.kinds, self.places, self.touched, self.owners, strict=True)
        for p, kind, place, touched, owners in everything:
            if not touched:
                continue
            buffer = self.flat[kind]
            gradient = buffer[-1, place].view_as(p)
            if not kind[2]:
                by_task = shares.to(buffer)[owners].view(-1, *[1] * (p.ndim - 1))
                gradient = gradient + by_task * buffer[0, place].view_as(p)
            p.grad = gradient.clone()


def conflicts(gramian: Tensor) -> float:
    """Share of the pairs of tasks whose gradients have a negative cosine."""
    upper = torch.triu(torch.ones_like(gramian, dtype=torch.bool), 1)
    return float((gramian[upper] < 0).double().mean())
