"""A prefix in flex attention, whose masks are functions of two positions.

Letters: `B` rows, `H` heads, `S` queries, `K` keys, `P` prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def attend(
    original: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask | Tensor | None,
    p: int,
    gate: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The original over keys and values whose first P are the prefix; gates go where T5 adds its position bias.

    Shapes:
        query `[B, H, S, D]`, key and value `[B, H_kv, P + K, D]`, mask of the K keys, gate `[P]`.
    """
    bias = kwargs.pop("position_bias", None)
    if bias is not None:
        bias = F.pad(bias, (p, 0))
    if gate is not None:
        columns = F.pad(gate.to(query.dtype), (0, key.shape[2] - p))
        # Broadcasting, for a bias of any rows: the function indexes what it adds by row, head, query and key.
        bias = columns.expand(1, 1, 1, -1) if bias is None else bias + columns
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], -1)
    if isinstance(mask, BlockMask):
        mask = _behind(mask, p)
    elif mask is not None:
        if mask.dtype == torch.bool:
            # The original would add it to the scores as ones and zeros.
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        mask = F.pad(mask, (p, 0)).expand(query.shape[0], -1, -1, -1)
    return original(query, key, value, mask, position_bias=bias, **kwargs)


def _behind(mask: BlockMask, p: int) -> BlockMask:
    """The mask of `[prefix; text]`: every query sees the first P keys, and the others as before.

    Layers with equally many prefix tokens share one, for as long as the mask of the text lives.
    """
    known: dict[int, BlockMask] = mask.__dict__.setdefault("_peml_behind", {})
    if p not in known:
        inner = mask.mask_mod

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv < p) | inner(b, h, q, (kv - p).clamp_min(0))

        rows, heads = mask.kv_num_blocks.shape[:2]
        queries, keys = mask.seq_lengths
        device = mask.kv_num_blocks.device
        known[p] = _create()(visible, rows, heads, queries, keys + p, device=device)
    return known[p]


@cache
def _create() -> Callable[..., BlockMask]:
    # Uncompiled, a mask of all queries and keys would be made on the way. Not at import, which the compiler slows.
    return torch.compile(create_block_mask)
