"""SwiGLU feed-forward blocks in one autograd function: with adapters, they keep fewer activations than without.

An option (`PemlConfig.fuse_mlp`), because the product of gate and up is computed twice. It fits the unmodified modules
of transformers whose forward is, word for word, the expression below; everything else is left as it is.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from peml import routing
from peml.bank import BankLinear, compute_dtype, stands_alone
from peml.kernel import swiglu

EXPRESSION = re.compile(r"self\.down_proj\(self\.act_fn\(self\.gate_proj\((\w+)\)\) \* self\.up_proj\(\1\)\)\s")


class FusedMLP:
    """Stands in for the `forward` of one block, as an attribute of it: no module, so that nothing else changes."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        """The block's output; by its own forward where nothing would be saved or something else is in the way."""
        mlp, forward = self.mlp, routing.current()
        layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        adapters = [layer.active() for layer in layers]
        fits = torch.is_grad_enabled() and forward is not None and forward.losses is None
        if not fits or not all(stands_alone(layer) for layer in layers) or any(a.reads_input for a in adapters):
            return type(mlp).forward(mlp, x)  # type: ignore[no-any-return]
        dtype, device = compute_dtype(x), x.device.type
        with torch.autocast(device, enabled=False):
            x = x.to(dtype)
            gate, up, down = (layer.branch(a, x, dtype, forward) for layer, a in zip(layers, adapters, strict=True))
            into, out = (a.lora_dropout if mlp.training else 0.0 for a in adapters[1:])
            return swiglu(x, gate, up, down, (into, out))


def fuse_mlps(model: nn.Module) -> int:
    """Replace the forward of every SwiGLU block whose three layers have banks; returns how many there are."""
    found = 0
    for module in model.modules():
        layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(layer, BankLinear) for layer in layers):
            continue
        if "forward" not in module.__dict__ and _is_swiglu(module):
            module.__dict__["forward"] = FusedMLP(module)
        found += isinstance(module.__dict__.get("forward"), FusedMLP)
    return found


def separate_mlps(model: nn.Module) -> None:
    """Undo `fuse_mlps`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedMLP):
            del module.__dict__["forward"]


def _is_swiglu(module: nn.Module) -> bool:
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    body = source.partition("\n")[2]
    statements = [line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]
    if EXPRESSION.search(body) is None or len(statements) > 2:
        return False
    probe = torch.tensor([-1.5, 0.3, 2.0], device="cpu")
    activation: Any = module.act_fn
    return torch.equal(activation(probe), nn.functional.silu(probe))
