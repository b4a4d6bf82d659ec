"""Layers that read one input: which they are, and how the first one called computes all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peml.bank import BankLinear, hand_over, stands_alone, together
from peml.routing import Forward

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of linear layers that read the same input in transformers' models, the one that is called first in front.

A few models call another one first, or give them other inputs: their groups are given up after one forward.
"""

CROSS = re.compile(r"(cross|encoder_attn|encdec)[^.]*$", re.IGNORECASE)
"""Attention whose queries read something else than its keys and values do."""


class Siblings:
    """Layers that read one input: the first one called computes them all, the others take what is theirs.

    The results lie in the `Forward`, under the identity of the input. A layer that is called with another input, or
    outside of a model's forward, computes by itself; a group of which that happens is none from the next forward on.
    """

    def __init__(self, layers: Sequence[BankLinear]) -> None:
        self.layers = tuple(layers)

    def output(self, layer: BankLinear, x: Tensor, forward: Forward) -> Tensor | None:
        """The layer's output, or None if it has to compute by itself."""
        handed = forward.handed.get(self)
        if handed is not None and handed[0][0] is x and handed[0][1:] == _state(x) and layer in handed[1]:
            output = handed[1].pop(layer)
            if not handed[1]:
                del forward.handed[self]
            return hand_over(layer, output, forward)
        if layer is not self.layers[0] or self in forward.apart:
            return None
        if not (forward.knows(self.layers) or all(stands_alone(other) for other in self.layers)):
            return None
        outputs = dict(zip(self.layers, together(self.layers, x, forward), strict=True))
        own = outputs.pop(layer)
        forward.handed[self] = ((x, *_state(x)), outputs)
        return hand_over(layer, own, forward)


def group_siblings(model: nn.Module) -> None:
    """Tell the layers of a model which of them read one input."""
    for path, parent in model.named_modules():
        own = {name: child for name, child in parent.named_children() if isinstance(child, BankLinear)}
        for layer in own.values():
            layer.siblings = None
        for names in SIBLINGS:
            shared_by = names[1:] if CROSS.search(path) else names
            group = [own[name] for name in shared_by if name in own and own[name].siblings is None]
            if len(group) > 1 and len({layer.in_features for layer in group}) == 1:
                siblings = Siblings(group)
                for layer in group:
                    layer.siblings = siblings


def _state(x: Tensor) -> tuple[int, bool]:
    """What must be the same for a result to be handed over: the content of the input, and whether gradients flow."""
    return (0 if x.is_inference() else x._version), torch.is_grad_enabled()
