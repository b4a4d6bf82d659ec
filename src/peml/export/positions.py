"""Learned positions: a stock prefix of P tokens takes the first P of them, so that a table goes on with P more rows.

    E'[P + i] = E[i]

With the table moved, a text behind a stock prefix gets the positions that it has behind ours; keys stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peml.attention import is_rotary
from peml.errors import PemlError

_TABLES = ("wpe", "embed_positions")
"""What GPT-2 and its kin, and OPT, call their table of positions."""


def position_table(model: Any) -> nn.Embedding | None:
    """The table of learned positions of a decoder; None: it is rotary.

    Raises:
        PemlError: it is neither, or its table is not known here.
    """
    if is_rotary(model):
        return None
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding)
    ]
    if len(found) != 1 or not isinstance(getattr(model.config, "max_position_embeddings", None), int):
        raise PemlError(
            f"{type(model).__name__} has no rotary positions and no table of them that is known here: a stock prefix, "
            "behind which its text begins at P, cannot be made; use --to kv"
        )
    return found[0]


@torch.no_grad()
def move_positions(model: Any, num_tokens: int) -> None:
    """Put so many rows in front of a model's table of positions, and say so in its configuration.

    What is in them does not matter: only a prefix stands there.
    """
    table = position_table(model)
    assert table is not None
    weight = table.weight
    table.weight = nn.Parameter(torch.cat([weight[:1].expand(num_tokens, -1), weight]), weight.requires_grad)
    table.num_embeddings += num_tokens
    model.config.max_position_embeddings += num_tokens
