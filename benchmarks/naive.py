"""Multi-task adapters written down as their papers describe them, one class each: what a first implementation does.

All share `y = W x + update`, keep their weights in the dtype of the base (no casts), and read the tasks of the rows
from a `Batch`. Loops stay loops, and mixtures are formed as the paper or its released code forms them.

Letters: `B` rows, `S` tokens, `I`/`O` in/out features, `R` rank, `T` tasks, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.sites import Site

ALPHA = 16.0


@dataclass
class Batch:
    """Tasks of the rows of the batch in flight, `ids [B]`."""

    ids: Tensor


class Naive(nn.Module):
    """A frozen linear with an update written out in plain autograd."""

    def __init__(self, base: nn.Linear, batch: Batch, num_tasks: int) -> None:
        super().__init__()
        self.base = base
        self.batch = batch
        self.num_tasks = num_tasks
        self.width, self.out = base.in_features, base.out_features

    def weights(self, *shape: int) -> nn.Parameter:
        """Trainable numbers in the dtype of the base."""
        return nn.Parameter(torch.randn(*shape, dtype=self.base.weight.dtype) * shape[-1] ** -0.5)


class GatherLoRA(Naive):
    """T separate LoRAs: every row gathers its own pair, and two batched products apply it (the idea of BGMV)."""

    def __init__(self, base: nn.Linear, batch: Batch, num_tasks: int, r: int = 8) -> None:
        super().__init__(base, batch, num_tasks)
        self.scaling = ALPHA / r
        self.down = self.weights(num_tasks, r, self.width)
        self.up = self.weights(num_tasks, r, self.out)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.batch.ids
        hidden = torch.bmm(x, self.down[ids].transpose(1, 2))
        return self.base(x) + torch.bmm(hidden, self.up[ids]) * self.scaling


class MTLLoRA(Naive):
    """MTL-LoRA, arXiv:2410.09437: up-projections are mixed for all T tasks, rows gather theirs, three products."""

    def __init__(
        self, base: nn.Linear, batch: Batch, num_tasks: int, r: int = 8, num_up: int = 3, temperature: float = 0.1
    ) -> None:
        super().__init__(base, batch, num_tasks)
        self.scaling, self.temperature = ALPHA / r, temperature
        self.down = self.weights(r, self.width)
        self.up = self.weights(num_up, r, self.out)
        self.transform = self.weights(num_tasks, r, r)
        self.routing = self.weights(num_tasks, num_up)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.batch.ids
        weights_TE = torch.softmax(self.routing / self.temperature, -1)
        up_TRO = torch.einsum("te,ero->tro", weights_TE, self.up)
        down_BIR = self.down.T.repeat(len(ids), 1, 1)
        hidden = torch.bmm(x, down_BIR)
        hidden = torch.bmm(hidden, self.transform[ids].transpose(1, 2))
        return self.base(x) + torch.bmm(hidden, up_TRO[ids]) * self.scaling


class MoELoRA(Naive):
    """MOELoRA, arXiv:2310.18339: a loop over experts, each weighted by a gate that sees the task."""

    def __init__(self, base: nn.Linear, batch: Batch, num_tasks: int, r: int = 24, num_experts: int = 3) -> None:
        super().__init__(base, batch, num_tasks)
        self.scaling = ALPHA / r
        self.down = self.weights(num_experts, r // num_experts, self.width)
        self.up = self.weights(num_experts, r // num_experts, self.out)
        self.embedding = self.weights(num_tasks, 64)
        self.gate = self.weights(num_experts, 64)

    def forward(self, x: Tensor) -> Tensor:
        weights_BE = torch.softmax(self.embedding[self.batch.ids] @ self.gate.T, -1)
        y = self.base(x)
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + F.linear(F.linear(x, down), up.T) * weights_BE[:, i, None, None] * self.scaling
        return y


class MultiLoRA(Naive):
    """MultiLoRA, arXiv:2311.11501: a loop over parallel LoRAs, each scaled per output feature."""

    def __init__(self, base: nn.Linear, batch: Batch, num_tasks: int, r: int = 8, num_parallel: int = 3) -> None:
        super().__init__(base, batch, num_tasks)
        self.scaling = ALPHA / r
        self.down = self.weights(num_parallel, r, self.width)
        self.up = self.weights(num_parallel, r, self.out)
        self.scale = self.weights(num_parallel, self.out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for down, up, scale_O in zip(self.down, self.up, self.scale, strict=True):
            y = y + F.linear(F.linear(x, down), up.T) * scale_O * self.scaling
        return y


class CGCLoRA(Naive):
    """CGC-LoRA, arXiv:2402.01684: a loop over the common experts, and over the own experts of each task's rows.

    Softer than a loop over all experts with zero gates: rows of other tasks are left out.
    """

    def __init__(
        self, base: nn.Linear, batch: Batch, num_tasks: int, r: int = 8, num_common: int = 2, num_specific: int = 1
    ) -> None:
        super().__init__(base, batch, num_tasks)
        self.scaling = ALPHA / (r * (num_common + num_specific))
        self.down, self.up = self.weights(num_common, r, self.width), self.weights(num_common, r, self.out)
        self.down_specific = self.weights(num_tasks, num_specific, r, self.width)
        self.up_specific = self.weights(num_tasks, num_specific, r, self.out)
        self.embedding = self.weights(num_tasks, 64)
        self.gate = self.weights(num_common + num_specific, 64)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.batch.ids
        weights_BE = torch.softmax(self.embedding[ids] @ self.gate.T, -1)
        y = self.base(x)
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + F.linear(F.linear(x, down), up.T) * weights_BE[:, i, None, None] * self.scaling
        for task in ids.unique().tolist():
            rows = (ids == task).nonzero().squeeze(1)
            for j, (down, up) in enumerate(zip(self.down_specific[task], self.up_specific[task], strict=True)):
                weight = weights_BE[rows, len(self.down) + j, None, None]
                y = y.index_add(0, rows, F.linear(F.linear(x[rows], down), up.T) * weight * self.scaling)
        return y


class Poly(Naive):
    """Poly, arXiv:2202.13914: rows average the factors of all skills, and apply the product of the averages."""

    def __init__(self, base: nn.Linear, batch: Batch, num_tasks: int, r: int = 8, num_skills: int = 4) -> None:
        super().__init__(base, batch, num_tasks)
        self.scaling = 1 / r
        self.down = self.weights(num_skills, r, self.width)
        self.up = self.weights(num_skills, r, self.out)
        self.routing = self.weights(num_tasks, num_skills)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.routing[self.batch.ids])
        weights_BE = weights / (weights.sum(-1, keepdim=True) + 1e-12)
        down = torch.einsum("be,eri->bri", weights_BE, self.down)
        up = torch.einsum("be,ero->bro", weights_BE, self.up)
        return self.base(x) + torch.bmm(torch.bmm(x, down.transpose(1, 2)), up) * self.scaling


class CPoly(Naive):
    """C-Poly, arXiv:2312.03248: a loop over common skills, and over the own skills of each row."""

    def __init__(self, base: nn.Linear, batch: Batch, num_tasks: int, r: int = 8, num_common: int = 3) -> None:
        super().__init__(base, batch, num_tasks)
        self.scaling = ALPHA / r
        self.down, self.up = self.weights(num_common, r, self.width), self.weights(num_common, r, self.out)
        self.down_specific = self.weights(num_tasks, r, self.width)
        self.up_specific = self.weights(num_tasks, r, self.out)
        self.routing = self.weights(num_tasks, num_common)
        self.weight_specific = self.weights(num_tasks, 1)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.batch.ids
        weights = torch.sigmoid(self.routing[ids])
        weights_BE = weights / (weights.sum(-1, keepdim=True) + 1e-12)
        y = self.base(x)
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + F.linear(F.linear(x, down), up.T) * weights_BE[:, i, None, None] * self.scaling
        hidden = torch.bmm(x, self.down_specific[ids].transpose(1, 2))
        return y + torch.bmm(hidden, self.up_specific[ids]) * self.weight_specific[ids, :, None] * self.scaling


def replace_linears(model: nn.Module, targets: list[str] | str, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replace the linears that PEFT would: those named in `targets`, or "all-linear" but the head."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        if leaf != "lm_head" if targets == "all-linear" else leaf in targets:
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


def naive_model(site: Site, kind: type[Naive], num_tasks: int | None = None, **settings: Any) -> nn.Module:
    """The site's module with such layers in place of its linears."""
    batch, tasks = Batch(torch.tensor(site.ids)), num_tasks or site.num_tasks
    return replace_linears(site.copy(), site.targets, lambda base: kind(base, batch, tasks, **settings))
