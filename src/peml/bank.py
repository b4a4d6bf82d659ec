"""The low-rank bank: one kernel for all adapters, and the layer that hosts it on a frozen linear.

    H = X down'          M = C H          Y = X W' + b + M up

One autograd function computes the frozen linear and the update together and keeps X and H, nothing else. Backward:

    G_M = dY up'     G_H = C' G_M     d_up = M' dY     dC = G_M' H     d_down = G_H' X     dX = dY W + G_H down

Letters: `N` rows times tokens, `I`/`O` in/out features, `Q` = R_out and `R` = R_in, rows of `up` and `down`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from peml import routing
from peml.adapters.base import Adapter
from peml.errors import PemlError


def low_rank_reference(
    x: Tensor, weight_OI: Tensor | None, bias_O: Tensor | None, down_RI: Tensor, up_QO: Tensor, core: Tensor
) -> Tensor:
    """`X W' + b + (C X down') up` in ordinary autograd: what `low_rank` must equal; twice differentiable."""
    update = _apply_core(core, F.linear(x, down_RI)) @ up_QO
    return update if weight_OI is None else F.linear(x, weight_OI, bias_O) + update


def low_rank(
    x: Tensor, weight_OI: Tensor | None, bias_O: Tensor | None, down_RI: Tensor, up_QO: Tensor, core: Tensor
) -> Tensor:
    """The same as `low_rank_reference`, in one autograd function.

    Args:
        x: `[..., I]`; its first dimension is the rows when the core differs by row.
        weight_OI: frozen weight, or None for the update alone.
        bias_O: frozen bias, or None.
        down_RI: `[R, I]`, in the dtype of x.
        up_QO: `[Q, O]`, in the dtype of x.
        core: `[Q, R]`, or one per row `[B, Q, R]`, or one per token `[B, S, Q, R]`.
    """
    return _LowRank.apply(x, weight_OI, bias_O, down_RI, up_QO, core)  # type: ignore[no-any-return,no-untyped-call]


def _apply_core(core: Tensor, hidden: Tensor) -> Tensor:
    """`C H` for a core that is shared, per row or per token; `hidden [..., R]` -> `[..., Q]`."""
    if core.ndim == 2:
        return hidden @ core.T
    if core.ndim == 3:
        by_row = hidden.reshape(core.shape[0], -1, hidden.shape[-1])
        return torch.bmm(by_row, core.transpose(1, 2)).view(*hidden.shape[:-1], core.shape[1])
    return torch.einsum("bsr,bsqr->bsq", hidden, core)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, down: Tensor, up: Tensor, core: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ down.T
        mixed = _apply_core(core, hidden.view(*x.shape[:-1], -1)).reshape(rows.shape[0], -1)
        if weight is None:
            y = mixed @ up
        else:
            y = F.linear(rows, weight, bias)
            y.addmm_(mixed, up)
        ctx.save_for_backward(rows, hidden, weight, down, up, core)
        ctx.x_shape = x.shape
        return y.view(*x.shape[:-1], up.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, weight, down, up, core = ctx.saved_tensors
        need_x, _, _, need_down, need_up, need_core = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        lead = ctx.x_shape[:-1]
        grad_m = dy @ up.T
        by_lead = grad_m.view(*lead, -1)
        grad_h = _apply_core(core.transpose(-1, -2), by_lead).reshape(rows.shape[0], -1)
        grad_up = grad_core = grad_down = grad_x = None
        if need_up:
            mixed = _apply_core(core, hidden.view(*lead, -1)).reshape(rows.shape[0], -1)
            grad_up = mixed.T @ dy
        if need_core:
            if core.ndim == 2:
                grad_core = grad_m.T @ hidden
            elif core.ndim == 3:
                b = core.shape[0]
                grad_core = torch.bmm(
                    grad_m.view(b, -1, core.shape[1]).transpose(1, 2), hidden.view(b, -1, core.shape[2])
                )
            else:
                grad_core = by_lead.unsqueeze(-1) * hidden.view(*lead, 1, -1)
        if need_down:
            grad_down = grad_h.T @ rows
        if need_x:
            if weight is None:
                grad_x = grad_h @ down
            else:
                grad_x = dy @ weight
                grad_x.addmm_(grad_h, down)
            grad_x = grad_x.view(ctx.x_shape)
        return grad_x, None, None, grad_down, grad_up, grad_core


class BankLinear(nn.Module, BaseTunerLayer):
    """A frozen `Linear` or `Conv1D` with a low-rank bank per PEFT adapter.

    Args:
        base_layer: the frozen layer; anything else with `in_features` and `out_features` computes its own output.
        label: the module's path, for messages.
    """

    adapter_layer_names = ("peml_adapter",)
    active_adapters: list[str]  # of BaseTunerLayer, which has no types
    merged: bool
    base_layer: Any
    peml_adapter: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, label: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.label = label
        self.peml_adapter = nn.ModuleDict()
        self.task_names: dict[str, tuple[str, ...]] = {}
        self.selected_task: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._pristine: Tensor | None = None
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def update_layer(self, adapter_name: str, adapter: Adapter, task_names: tuple[str, ...]) -> None:
        """Add a PEFT adapter to this layer."""
        self.peml_adapter[adapter_name] = adapter
        self.task_names[adapter_name] = task_names

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a PEFT adapter from this layer."""
        self.task_names.pop(adapter_name, None)
        self.selected_task.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # To the device only: PEFT would also cast to the base's dtype and round the fp32 weights away.
        device = device or self.base_layer.weight.device
        if adapter_name in self.peml_adapter and device.type != "meta":
            self.peml_adapter[adapter_name].to(device)

    def active(self) -> Adapter | None:
        """The adapter in force, or None if it is disabled, merged, or elsewhere in the model."""
        if self._disable_adapters or self.merged:
            return None
        name = self.active_adapters[0] if self.active_adapters else ""
        return self.peml_adapter[name] if name in self.peml_adapter else None  # type: ignore[return-value]  # noqa: SIM401

    def forward(self, x: Tensor) -> Tensor:
        """`W x + b` plus the update of each row's task."""
        adapter = self.active()
        if adapter is None:
            if self.merged and self._disable_adapters:
                self.unmerge()
            return self.base_layer(x)  # type: ignore[no-any-return]
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        core = adapter.core(self._task_ids(adapter, x)).to(dtype)
        if core.ndim > 2 and core.shape[0] == 1:
            core = core[0] if core.ndim == 3 else core.expand(x.shape[0], -1, -1, -1)
        down, up = adapter.bank()
        down, up = down.to(dtype), up.to(dtype)
        weight, bias = self._frozen(dtype)
        dropped = self.training and adapter.lora_dropout > 0
        with torch.autocast(x.device.type, enabled=False):
            if weight is None or dropped:
                base: Tensor = self.base_layer(x) if weight is None else F.linear(x.to(dtype), weight, bias)
                inner = F.dropout(x, adapter.lora_dropout) if dropped else x
                return base + low_rank(inner.to(dtype), None, None, down, up, core).to(base.dtype)
            return low_rank(x.to(dtype), weight, bias, down, up, core)

    def _frozen(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight `[O, I]` and bias of a plain frozen layer; (None, None) where only the layer itself can compute."""
        layer = self.base_layer
        if type(layer) not in (nn.Linear, Conv1D) or layer.weight.requires_grad:
            return None, None
        # Hooked from outside, or its forward replaced (accelerate, which fetches weights that are elsewhere).
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return None, None
        weight, bias = layer.weight, layer.bias
        weight = weight.T if isinstance(layer, Conv1D) else weight
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def _task_ids(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        if not adapter.needs_task:
            return None
        forward = routing.current()
        if forward is None or forward.route is None:
            names = self.task_names[self.active_adapters[0]]
            raise PemlError(f"this adapter is routed by task: pass tasks= with one of {', '.join(names)} per row")
        ids = forward.route.rows(x.shape[0], x.device)
        if forward.route.per_token and ids.shape[1] != x.shape[1]:
            raise PemlError(f"`tasks=` has a task for {ids.shape[1]} tokens per row but rows have {x.shape[1]}")
        return ids

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`(up' C down)` of the selected task in fp32 or better, in the orientation of the base weight."""
        adapter: Adapter = self.peml_adapter[adapter_name]  # type: ignore[assignment]
        down, up = adapter.bank()
        ids = None
        if adapter.needs_task:
            if adapter_name not in self.selected_task:
                names = self.task_names[adapter_name]
                raise PemlError(f"merging needs one task: call select_task() with one of {', '.join(names)} first")
            ids = torch.tensor([self.selected_task[adapter_name]], device=down.device)
        core = adapter.core(ids)
        core = core[0] if core.ndim == 3 else core
        dtype = torch.promote_types(up.dtype, torch.float32)
        delta = up.to(dtype).T @ core.to(dtype) @ down.to(dtype)
        return delta.T if isinstance(self.base_layer, Conv1D) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the selected task's update into the weight, from the pristine weight and with a sum in fp32 or better.

        Raises:
            PemlError: no task selected on a task-routed adapter, a base that is not a plain linear, or NaN found.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.peml_adapter]
        if not names:
            return
        if type(self.base_layer) not in (nn.Linear, Conv1D):
            kind = type(self.base_layer).__name__
            raise PemlError(
                f"{self.label} is a {kind}, whose weight cannot take a merged update: keep the adapter apart"
            )
        weight = self.base_layer.weight
        total: Tensor = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            total = total + self.get_delta_weight(name).to(weight.device)
        if safe_merge and not torch.isfinite(total).all():
            raise PemlError(
                f"merging adapter {names[0]!r} into {self.label} gives NaN or infinity: nothing was changed"
            )
        # The old tensor is kept whole: subtracting the update again would not give it back in half precision.
        self._pristine = weight.data
        weight.data = total.to(weight.dtype)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the pristine weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._pristine is not None
        self.base_layer.weight.data = self._pristine
        self._pristine = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert this layer to plain LoRA by SVD of `get_delta_weight`."""
        return True

    def __repr__(self) -> str:
        return "peml." + super().__repr__()
