"""The low-rank kernel: frozen linear layers that read one input, each with its update, in one autograd function.

    H = X down'          M_i = C_i H_i          Y_i = X W_i' + b_i + M_i up_i

for every layer i of a group of siblings, such as q, k and v; `down` is all their down-projections in one. The function
keeps X once and H, nothing else. Backward:

    G_M,i = dY_i up_i'     G_H,i = C_i' G_M,i     d_up,i = M_i' dY_i     dC_i = G_M,i' H_i
    d_down = G_H' X        dX = sum_i dY_i W_i + G_H down

What costs is passes over tensors of N rows, not arithmetic: a core that all rows share is folded into `up` first, and
`down`, `up` and `C` are cast to the dtype of X, never X to theirs.

Letters: `N` rows times tokens, `I`/`O` in/out features, `Q` = R_out and `R` = R_in, rows of `up` and `down`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Branch(NamedTuple):
    """One linear layer of a group.

    Shapes:
        weight `[O, I]` and bias `[O]`, frozen; without a weight the output is the update alone.
        down `[R, I]`, up `[Q, O]`, in any precision.
        core: `[Q, R]` for all rows, or with dimensions in front whose product divides N: one core for each run of
            N/product rows. If `diagonal`, `[..., R]`.
    """

    weight: Tensor | None
    bias: Tensor | None
    down: Tensor
    up: Tensor
    core: Tensor
    diagonal: bool = False


def low_rank_reference(x: Tensor, branch: Branch) -> Tensor:
    """`X W' + b + (C X down') up` in ordinary autograd: what `low_rank` must equal; twice differentiable."""
    core = torch.diag_embed(branch.core) if branch.diagonal else branch.core
    hidden = F.linear(x, branch.down.to(x.dtype)).reshape(-1, branch.down.shape[0])
    cores = core.to(x.dtype).reshape(-1, *core.shape[-2:])
    mixed = torch.einsum("bnr,bqr->bnq", hidden.view(len(cores), -1, hidden.shape[-1]), cores)
    update = (mixed.reshape(-1, core.shape[-2]) @ branch.up.to(x.dtype)).view(*x.shape[:-1], -1)
    return update if branch.weight is None else F.linear(x, branch.weight, branch.bias) + update


def low_rank(x: Tensor, branches: Sequence[Branch], dropout: float = 0.0) -> list[Tensor]:
    """Outputs of all branches on one input `[..., I]`, and H `[..., sum of R]` behind them.

    Args:
        x: in the dtype of the frozen weights.
        branches: the layers that read it.
        dropout: probability of zeroing an entry of x before `down`, drawn once for all branches.
    """
    plan, tensors = _Plan.of(branches, dropout), [t for b in branches for t in b[:5]]
    if torch.is_grad_enabled():
        return list(_LowRank.apply(plan, x, *tensors))  # type: ignore[no-untyped-call]
    outputs, _, hidden = run(_prepare(plan.diagonal, tensors, x.dtype), x, plan)
    return [*outputs, _shaped(hidden, x)]


def swiglu(x: Tensor, gate: Branch, up: Branch, down: Branch, dropout: Sequence[float] = (0.0, 0.0)) -> Tensor:
    """`down(silu(gate(x)) * up(x))` in one autograd function, which keeps x and the outputs of `gate` and `up`.

    The product is computed again in backward: with adapters, fewer activations are kept than by a frozen MLP, whose
    activation, product and gate are all kept by autograd.

    Args:
        x: in the dtype of the frozen weights.
        gate: frozen layer with its update; up and down likewise.
        up: see gate.
        down: see gate.
        dropout: in front of the updates of gate and up, and of that of down.
    """
    plans = _Plan.of((gate, up), dropout[0]), _Plan.of((down,), dropout[1])
    return _SwiGLU.apply(*plans, x, *gate[:5], *up[:5], *down[:5])  # type: ignore[no-any-return,no-untyped-call]


class Prepared(NamedTuple):
    """Branches as `run` takes them: for each weight, bias, R, and core and `up` as `_fold` leaves them.

    Args:
        by_task: whether cores are those of all tasks, of which `of` chooses.

    Shapes:
        down: of all branches, `[sum of R, I]`, in the dtype of the computation.
    """

    down: Tensor
    layers: list[tuple[Tensor | None, Tensor | None, int, Tensor | None, Tensor]]
    by_task: bool = False

    def of(self, tasks: Tensor) -> Prepared:
        """The same for rows or tokens of these tasks."""
        layers = [(*own[:3], None if own[3] is None else own[3].index_select(0, tasks), own[4]) for own in self.layers]
        return Prepared(self.down, layers)


class _Plan(NamedTuple):
    diagonal: tuple[bool, ...]
    dropout: float
    seed: int

    def kept_seed(self) -> Tensor | None:
        """The seed as a saved tensor: a checkpoint that recomputes with another draw then saves that one."""
        return torch.tensor(self.seed, device="cpu") if self.dropout else None

    def with_seed(self, seed: Tensor | None) -> _Plan:
        return self if seed is None else self._replace(seed=int(seed))

    @classmethod
    def of(cls, branches: Sequence[Branch], dropout: float) -> _Plan:
        return cls(tuple(b.diagonal for b in branches), dropout, int(torch.randint(2**62, ())) if dropout else 0)


def _fold(core: Tensor, up: Tensor, diagonal: bool, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Core and `up` in the dtype of the computation; no core where all rows share it: `up` then holds it."""
    own = 1 if diagonal else 2
    if core.ndim > own:
        return core.reshape(-1, *core.shape[-own:]).to(dtype), up.to(dtype)
    folded = core[:, None] * up if diagonal else core.T.to(up.dtype) @ up
    return None, folded.to(dtype)


def _mix(core: Tensor | None, hidden: Tensor) -> Tensor:
    """`C H`, one core for each run of rows: `[N, R]` -> `[N, Q]`."""
    if core is None:
        return hidden
    runs = _runs(core, hidden)
    if core.ndim == 2:
        return (runs * core.unsqueeze(1)).view(hidden.shape)
    return torch.bmm(runs, core.transpose(1, 2)).view(hidden.shape[0], core.shape[1])


def _runs(core: Tensor, rows: Tensor) -> Tensor:
    """The rows of each core together; sizes are spelt out, because an input without rows has no -1."""
    return rows.view(core.shape[0], rows.shape[0] // max(core.shape[0], 1), rows.shape[1])


def _kept(plan: _Plan, rows: Tensor) -> tuple[Tensor, float]:
    """Which entries of x dropout keeps, the same each time it is asked, and the probability of that."""
    generator = torch.Generator(rows.device).manual_seed(plan.seed)
    # Four decisions from each random number, 16 bits each: drawing is what dropout costs.
    words = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64, device=rows.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: rows.numel()].view(rows.shape)
    dropped = round(plan.dropout * 2**16)
    return bits >= dropped - 2**15, 1 - dropped / 2**16


def _down(downs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (downs[0] if len(downs) == 1 else torch.cat([d.detach() for d in downs])).to(dtype)


def prepare(branches: Sequence[Branch], dtype: torch.dtype) -> Prepared:
    """What stays the same from call to call without gradients: casts, folded cores, `down` of all branches in one."""
    return _prepare([b.diagonal for b in branches], [t for b in branches for t in b[:5]], dtype)


def _prepare(diagonal: Sequence[bool], tensors: Sequence[Any], dtype: torch.dtype) -> Prepared:
    layers = []
    for i, own in enumerate(diagonal):
        weight, bias, down, up, core = tensors[5 * i : 5 * i + 5]
        layers.append((weight, bias, down.shape[0], *_fold(core, up, own, dtype)))
    return Prepared(_down(tensors[2::5], dtype), layers)


def run(
    prepared: Prepared, x: Tensor, plan: _Plan | None = None, views: bool = False
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs, which may be views where no autograd function returns them; the rows of x; H as a matrix."""
    rows = x.reshape(-1, x.shape[-1])
    if plan is not None and plan.dropout:
        kept, probability = _kept(plan, rows)
        hidden = (rows * kept) @ prepared.down.T / probability
    else:
        hidden = rows @ prepared.down.T
    outputs, start = [], 0
    for weight, bias, size, core, up in prepared.layers:
        mixed = _mix(core, hidden if len(prepared.layers) == 1 else hidden.narrow(1, start, size))
        start += size
        if weight is None:
            y = mixed @ up
        else:
            y = F.linear(rows, weight, bias)
            y.addmm_(mixed, up)
        outputs.append(y.view(*x.shape[:-1], y.shape[1]) if views else _shaped(y, x))
    return outputs, rows, hidden


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    # Not a view: those of a function with several outputs may not be changed in place by who gets them.
    return y if x.ndim == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs, rows, hidden = run(_prepare(plan.diagonal, tensors, x.dtype), x, plan)
        features = _shaped(hidden, x)
        ctx.save_for_backward(rows, features, plan.kept_seed(), *tensors)
        ctx.plan, ctx.x_shape = plan, x.shape
        ctx.set_materialize_grads(False)
        return *outputs, features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, hidden, seed, *tensors = ctx.saved_tensors
        hidden = hidden.view(-1, hidden.shape[-1])
        grad_x, found = _backward(ctx.plan.with_seed(seed), rows, hidden, tensors, grads, ctx.needs_input_grad[1:])
        return None, None if grad_x is None else grad_x.view(ctx.x_shape), *found


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, into: _Plan, out: _Plan, x: Tensor, *tensors: Tensor | None) -> Tensor:
        (gate, up), rows, hidden = run(_prepare(into.diagonal, tensors[:10], x.dtype), x, into)
        (y,), _, hidden_out = run(_prepare(out.diagonal, tensors[10:], x.dtype), F.silu(gate) * up, out)
        seeds = into.kept_seed(), out.kept_seed()
        ctx.save_for_backward(rows, gate, up, hidden, hidden_out, *seeds, *tensors)
        ctx.plans, ctx.x_shape = (into, out), x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, hidden, hidden_out, seed_in, seed_out, *tensors = ctx.saved_tensors
        into, out = ctx.plans[0].with_seed(seed_in), ctx.plans[1].with_seed(seed_out)
        needed = ctx.needs_input_grad[2:]
        gate, up = (t.view(-1, t.shape[-1]) for t in (gate, up))
        active = F.silu(gate)
        middle, found_out = _backward(out, active * up, hidden_out, tensors[10:], (grad, None), (True, *needed[11:]))
        assert middle is not None
        grads = (torch.ops.aten.silu_backward(middle * up, gate), middle.mul_(active), None)
        grad_x, found = _backward(into, rows, hidden, tensors[:10], grads, needed[:11])
        return None, None, None if grad_x is None else grad_x.view(ctx.x_shape), *found, *found_out


def _backward(
    plan: _Plan,
    rows: Tensor,
    hidden: Tensor,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the rows and of the branches' tensors, of the outputs' and H's; `needed` says which, x first."""
    need_x, needed = needed[0], needed[1:]
    found: list[Tensor | None] = [None] * len(tensors)
    downs = tensors[2::5]
    grad_h = torch.zeros_like(hidden) if any(g is None for g in grads[:-1]) else torch.empty_like(hidden)
    grad_x = None
    start = 0
    for i, diagonal in enumerate(plan.diagonal):
        weight, _, own_down, up, core = tensors[5 * i : 5 * i + 5]
        end = start + own_down.shape[0]
        own, start = slice(start, end), end
        grad = grads[i]
        if grad is None:
            continue
        dy = grad.reshape(-1, grad.shape[-1])
        grad_h[:, own], found[5 * i + 3], found[5 * i + 4] = _backward_of_branch(
            *_fold(core, up, diagonal, rows.dtype), up, core, hidden[:, own], dy, diagonal, needed[5 * i + 3 :]
        )
        if weight is not None and need_x:
            grad_x = dy @ weight if grad_x is None else grad_x.addmm_(dy, weight)
    if grads[-1] is not None:
        grad_h += grads[-1].reshape(grad_h.shape)
    inner = rows
    if plan.dropout:
        kept, probability = _kept(plan, rows)
        grad_h = grad_h / probability
        inner = rows * kept
    if any(needed[2::5]):
        grad_down = grad_h.T @ inner
        for i, part in enumerate(torch.split(grad_down, [d.shape[0] for d in downs])):
            found[5 * i + 2] = part.to(downs[i].dtype)
    if need_x:
        down = _down(downs, rows.dtype)
        if plan.dropout:
            through = (grad_h @ down).mul_(kept)
            grad_x = through if grad_x is None else grad_x.add_(through)
        else:
            grad_x = grad_h @ down if grad_x is None else grad_x.addmm_(grad_h, down)
    return grad_x, found


def _backward_of_branch(
    cast_core: Tensor | None,
    cast_up: Tensor,
    up: Tensor,
    core: Tensor,
    hidden: Tensor,
    dy: Tensor,
    diagonal: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """G_H, d_up and dC of one branch."""
    need_up, need_core = needed[:2]
    grad_m = dy @ cast_up.T
    if cast_core is None:
        # `up` was folded with the core: both gradients follow from that of the product, at the size of a parameter.
        if not (need_up or need_core):
            return grad_m, None, None
        product = (hidden.T @ dy).to(up.dtype)
        grad_up = (core[:, None] * product if diagonal else core.to(up.dtype) @ product) if need_up else None
        if not need_core:
            return grad_m, grad_up, None
        return grad_m, grad_up, ((up * product).sum(1) if diagonal else up @ product.T).to(core.dtype)
    grad_up = (_mix(cast_core, hidden).T @ dy).to(up.dtype) if need_up else None
    grad_core = None
    if need_core:
        runs_m, runs_h = _runs(cast_core, grad_m), _runs(cast_core, hidden)
        grad_core = (runs_m * runs_h).sum(1) if diagonal else torch.bmm(runs_m.transpose(1, 2), runs_h)
        grad_core = grad_core.view(core.shape).to(core.dtype)
    return _mix(cast_core if diagonal else cast_core.transpose(1, 2), grad_m), grad_up, grad_core
