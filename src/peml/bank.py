"""The layer that hosts low-rank banks on a frozen linear, and what layers on one input compute."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peml import routing
from peml.adapters.ahead import resident, shared
from peml.adapters.base import Adapter
from peml.errors import PemlError
from peml.kernel import Branch, low_rank, prepare, run
from peml.routing import Forward, Route

if TYPE_CHECKING:
    from peml.siblings import Siblings


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
        self.siblings: Siblings | None = None
        # Torchao's backend wants to know how to quantise again, which is never asked of it here.
        backend = resolve_quantization_backend(base_layer, get_apply_tensor_subclass=lambda: None)
        self.quantized: str = "" if backend is None else backend.backend_name
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
        device = device or device_of(self.base_layer)
        if adapter_name in self.peml_adapter and device.type != "meta":
            self.peml_adapter[adapter_name].to(device)

    def active(self) -> Adapter | None:
        """The adapter in force, or None if it is disabled, merged, or elsewhere in the model."""
        if self._disable_adapters or self.merged_adapters:
            return None
        # Past the module's attribute look-up, which is slow and asked for several times in every call.
        names: Any = self._active_adapter
        adapters: Any = self._modules["peml_adapter"]
        return adapters._modules.get(names if isinstance(names, str) else names[0]) if names else None

    def forward(self, x: Tensor) -> Tensor:
        """`W x + b` plus the update of each row's task."""
        if self.active() is None:
            if self.merged and self._disable_adapters:
                self.unmerge()
            return self.base_layer(x)  # type: ignore[no-any-return]
        forward = routing.current()
        if forward is None and torch._C._current_graph_task_id() != -1:
            raise PemlError(
                f"{self.label} is recomputed in backward by a checkpoint that the model does not know, so its task is "
                "lost: use model.activation_checkpointing_enable(), or torch's checkpoint_wrapper"
            )
        if self.siblings is not None and forward is not None and forward.entered:
            handed = self.siblings.output(self, x, forward)
            if handed is not None:
                return handed
        return hand_over(self, together((self,), x, forward)[0], forward)

    def branch(self, adapter: Adapter, x: Tensor, dtype: torch.dtype, forward: Forward | None) -> Branch:
        """What the kernel computes for this layer."""
        route = self._route(adapter, x, forward)
        core = None if forward is None else forward.cores.get(adapter)
        if core is None:
            core = shared(adapter, adapter.core(adapter.core_tensors(), route, x))
        if route is not None and route.per_token and core.shape[0] == 1:
            core = core.expand(x.shape[0], *[-1] * (core.ndim - 1))
        return self._branch(adapter, core, route, dtype)

    def branch_of_all(self, adapter: Adapter, dtype: torch.dtype, every: Route) -> Branch:
        """The same with a core for each task there is."""
        route = every.to(device_of(self.base_layer)) if adapter.needs_task else None
        return self._branch(adapter, shared(adapter, adapter.core(adapter.core_tensors(), route)), route, dtype)

    def _branch(self, adapter: Adapter, core: Tensor, route: Route | None, dtype: torch.dtype) -> Branch:
        down, up = adapter.bank(route)
        weight, bias = self._frozen(dtype)
        return Branch(weight, bias, down, up, core, adapter.diagonal)

    def _frozen(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight `[O, I]` and bias of a plain frozen layer; (None, None) where only the layer itself can compute."""
        layer = self.base_layer
        if type(layer) not in (nn.Linear, Conv1D) or layer.weight.requires_grad or not resident(layer):
            return None, None
        # Hooked from outside, or its forward replaced (accelerate, which fetches weights that are elsewhere).
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return None, None
        weight, bias = layer.weight, layer.bias
        weight = weight.T if isinstance(layer, Conv1D) else weight
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def _route(self, adapter: Adapter, x: Tensor, forward: Forward | None) -> Route | None:
        if not adapter.needs_task:
            return None
        if forward is None or forward.route is None:
            names = self.task_names[self.active_adapters[0]]
            raise PemlError(f"this adapter is routed by task: pass tasks= with one of {', '.join(names)} per row")
        route, given = forward.route, forward.route.ids.shape
        if not forward.fits(x):
            raise PemlError(
                f"{self.label} cannot be routed: `tasks=` has {given[0]} entries, one per row, but its input "
                f"{list(x.shape)} is not of those rows; leave the layer out (exclude_modules), or give one task for all"
            )
        if route.per_token and given[1] != x.shape[1]:
            raise PemlError(f"`tasks=` has a task for {given[1]} tokens per row but rows have {x.shape[1]}")
        return route.to(x.device)

    def tasks(self, x: Tensor, forward: Forward) -> Tensor:
        """The task of every row or token of an input, in a row."""
        adapter = self.active()
        assert adapter is not None
        route = self._route(adapter, x, forward)
        assert route is not None
        ids = route.expand(route.ids, x.shape[0])
        # One row may stand for all, unless it tells tokens apart.
        return (ids.expand(x.shape[0], -1) if route.per_token else ids).reshape(-1)

    @torch.no_grad()
    def fold(self, adapter_name: str, task: int | None = None) -> tuple[Tensor, Tensor]:
        """The plain low-rank pair `down' [R', I]` and `up' [R', O]` that equals an adapter for one task.

        Args:
            adapter_name: the PEFT adapter.
            task: its id; None: the selected one.

        Raises:
            PemlError: the adapter needs a task and none is given or selected, or no such pair exists.
        """
        adapter: Adapter = self.peml_adapter[adapter_name]  # type: ignore[assignment]
        task = self.selected_task.get(adapter_name) if task is None else task
        device = next(adapter.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return adapter.fold(self._folded_route(adapter, adapter_name, task, device))

    def _folded_route(
        self, adapter: Adapter, adapter_name: str, task: int | None, device: torch.device
    ) -> Route | None:
        # An adapter that cannot be folded says so, whatever the task.
        if not adapter.needs_task or adapter.reads_input:
            return None
        if task is None:
            names = self.task_names[adapter_name]
            raise PemlError(f"merging needs one task: call select_task() with one of {', '.join(names)} first")
        return Route.of_ids([task]).to(device)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`up' C down` of the selected task in fp32 or better, in the orientation of the base weight."""
        down, up = self.fold(adapter_name)
        with torch.autocast(down.device.type, enabled=False):
            return down.T @ up if isinstance(self.base_layer, Conv1D) else up.T @ down

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the selected task's update into the weight, from the pristine weight and with a sum in fp32 or better.

        Raises:
            PemlError: no task selected on a task-routed adapter, a base that is not a plain linear, or NaN found.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.peml_adapter]
        if not names:
            return
        if self.quantized:
            raise PemlError(
                f"{self.label} is quantised ({self.quantized}): its steps would round a merged update away. Keep the "
                "adapter apart, or load the base model unquantised to merge"
            )
        if type(self.base_layer) not in (nn.Linear, Conv1D):
            kind = type(self.base_layer).__name__
            raise PemlError(
                f"{self.label} is a {kind}, whose weight cannot take a merged update: keep the adapter apart"
            )
        weight = self.base_layer.weight
        # The old tensor is kept whole: subtracting the update again would not give it back in half precision.
        pristine: Tensor = weight.data if self._pristine is None else self._pristine
        total = pristine.to(torch.promote_types(weight.dtype, torch.float32))
        for name in [*self.merged_adapters, *names]:
            total = total + self.get_delta_weight(name).to(weight.device)
        if safe_merge and not torch.isfinite(total).all():
            raise PemlError(
                f"merging adapter {names[0]!r} into {self.label} gives NaN or infinity: nothing was changed"
            )
        self._pristine = pristine
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

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What is put back later goes where the layer goes, and is cast with it.
        if self._pristine is not None:
            self._pristine = fn(self._pristine)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert this layer to plain LoRA by SVD of `get_delta_weight`."""
        return True

    def __repr__(self) -> str:
        return "peml." + super().__repr__()


def stands_alone(layer: BankLinear) -> bool:
    """Whether another may compute for a layer: not if its own call fetches weights, or changes what goes in or out."""
    adapter = layer.active()
    if adapter is None or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return resident(adapter) and not layer.quantized and layer._frozen(layer.base_layer.weight.dtype)[0] is not None


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's own weights are; those of quantised layers need not be called `weight`."""
    return next(t for t in (*layer.parameters(), *layer.buffers())).device


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a linear layer computes in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def hand_over(layer: BankLinear, computed: tuple[Tensor, Tensor | None], forward: Forward | None) -> Tensor:
    """A layer's output; the loss on its features is counted only now, since it was called with this input indeed."""
    output, hidden = computed
    if hidden is not None and forward is not None and forward.losses is not None and forward.route is not None:
        adapter = layer.active()
        assert adapter is not None
        loss = adapter.feature_loss(hidden, forward.route, forward.mask)
        if loss is not None:
            forward.losses.append(loss)
    return output


def together(layers: tuple[BankLinear, ...], x: Tensor, forward: Forward | None) -> list[tuple[Tensor, Tensor | None]]:
    """Outputs of layers with an active adapter on one input, and their features where losses are put on these."""
    dtype, device = compute_dtype(x), x.device.type
    if forward is not None and forward.knows(layers):
        prepared = forward.prepared[layers]  # type: ignore[index]
        if prepared.down.dtype == dtype:
            if prepared.by_task:
                prepared = prepared.of(layers[0].tasks(x, forward))
            x = x if x.dtype == dtype else x.to(dtype)
            return [(y, None) for y in run(prepared, x, views=True)[0]]
    adapters = [adapter for layer in layers if (adapter := layer.active()) is not None]
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if forward is not None and forward.every is not None and not torch.is_grad_enabled():
            every, pairs = forward.every, zip(layers, adapters, strict=True)
            ready = prepare([layer.branch_of_all(a, dtype, every) for layer, a in pairs], dtype)
            assert forward.prepared is not None
            forward.prepared[layers] = ready._replace(by_task=any(own[3] is not None for own in ready.layers))
            return together(layers, x, forward)
        branches = [layer.branch(a, x, dtype, forward) for layer, a in zip(layers, adapters, strict=True)]
        dropout = max(a.lora_dropout for a in adapters) if layers[0].training else 0.0
        *outputs, hidden = low_rank(x.to(dtype), branches, dropout)
    features: Sequence[Tensor | None] = [None] * len(layers)
    if forward is not None and forward.losses is not None and torch.is_grad_enabled():
        features = torch.split(hidden, [branch.down.shape[0] for branch in branches], dim=-1)
    if (
        forward is not None
        and forward.prepared is not None
        and not dropout
        and _lasting(branches, adapters[0], forward)
    ):
        forward.prepared[layers] = prepare(branches, dtype)
    outputs = [
        y if branch.weight is not None else _add(layer.base_layer(x), y)
        for layer, branch, y in zip(layers, branches, outputs, strict=True)
    ]
    return list(zip(outputs, features, strict=True))


def _lasting(branches: Sequence[Branch], adapter: Adapter, forward: Forward) -> bool:
    """Whether what was computed for this input holds for the next one of the same `generate`."""
    per_token = forward.route is not None and forward.route.per_token
    whole = all(branch.weight is not None for branch in branches)
    return whole and not per_token and not adapter.reads_input and not torch.is_grad_enabled()


def _add(base: Tensor, update: Tensor) -> Tensor:
    return base + update.to(base.dtype)
