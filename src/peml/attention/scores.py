"""The scores of prefix tokens: their log-gates, as a mask or as a channel of the keys, and the step of one query.

Letters: `B` rows, `H` heads, `S` queries, `K` keys, `P` prefix tokens, `D` head size, `G` prefixes,
`N` heads that share keys and values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_bias(mask: Tensor | None, gate: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Additive mask `[B or 1, 1, S, P + K]` with the log-gates in its first P columns."""
    columns = F.pad(gate.to(query.dtype), (0, key.shape[2] - gate.shape[0]))
    if mask is None:
        return columns.expand(1, 1, query.shape[2], -1)
    if mask.dtype == torch.bool:
        return torch.where(mask, columns, torch.finfo(query.dtype).min)
    return mask + columns


def gate_channel(query: Tensor, key: Tensor, value: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Carry trainable gates as one more key channel against a query channel of 1.

    An additive mask that needs a gradient would send SDPA to its slow path; this is exact and does not.
    Heads are padded to a multiple of 8, which the fused kernels want.
    """
    extra = 8 - query.shape[-1] % 8
    gates = F.pad(column.to(key.dtype), (0, key.shape[2] - column.shape[0])).view(1, 1, -1, 1)
    key = torch.cat([key, gates.expand(*key.shape[:2], -1, -1)], dim=-1)
    query = F.pad(query, (0, 1), value=1.0)
    query, key = (F.pad(t, (0, extra - 1)) for t in (query, key))
    return query, key, F.pad(value, (0, extra))


class Sorted(NamedTuple):
    """Rows of a batch brought together by the prefix that they attend to.

    Args:
        order, back: into that order, `[B]`, and out of it again.
        sizes: rows of each prefix.
    """

    order: Tensor
    back: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, groups: Tensor, num_prefixes: int, device: torch.device) -> Sorted:
        """From each row's prefix, `[B]`, known on the host so that nothing waits for the device."""
        order = groups.argsort(stable=True)
        sizes = torch.bincount(groups, minlength=num_prefixes).tolist()
        return cls(order.to(device, non_blocking=True), order.argsort().to(device, non_blocking=True), sizes)


def attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    prefix: tuple[Tensor, Tensor],
    gate: Tensor | None,
    rows: Sorted | None = None,
) -> tuple[Tensor, None]:
    """One query per row: join the scores of prefix and cache, never their keys, so the cache is not copied.

    Shapes:
        prefix `[1, H_kv, P, D]` for all rows, `[B, H_kv, P, D]`, or `[G, H_kv, P, D]` with the rows of each.
    """
    batch, heads, _, size = query.shape
    query_BHND = (query * scaling).view(batch, key.shape[1], heads // key.shape[1], size)
    scores = query_BHND @ key.transpose(2, 3)
    if mask is not None:
        # [B or 1, 1 or H, 1, K]: a mask per head would have to follow the grouping; transformers has none here.
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    prefix_scores = _product(query_BHND, prefix[0].transpose(2, 3), rows)
    if gate is not None:
        prefix_scores = prefix_scores + gate.to(prefix_scores.dtype)
    joined = torch.cat([prefix_scores, scores], dim=-1)
    weights = torch.softmax(joined, dim=-1, dtype=torch.promote_types(joined.dtype, torch.float32)).to(query.dtype)
    p = prefix[0].shape[2]
    output = _product(weights[..., :p], prefix[1], rows) + weights[..., p:] @ value
    return output.reshape(batch, 1, heads, size), None


def _product(left: Tensor, prefixes: Tensor, rows: Sorted | None) -> Tensor:
    """Every row's `[H, N, X]` times its own prefix's `[H, X, Y]`: `[B, H, N, Y]`."""
    if rows is not None:
        parts = zip(left[rows.order].split(rows.sizes), prefixes, strict=True)  # type: ignore[no-untyped-call]
        return torch.cat([_shared(part, table) for part, table in parts])[rows.back]
    return _shared(left, prefixes[0]) if prefixes.shape[0] == 1 else left @ prefixes


def _shared(left: Tensor, table: Tensor) -> Tensor:
    """`[B, H, N, X]` times `[H, X, Y]`, the rows as further queries: broadcast, the table would be copied per row."""
    batch, heads, n, x = left.shape
    folded = left.transpose(0, 1).reshape(heads, batch * n, x)
    return (folded @ table).view(heads, batch, n, -1).transpose(0, 1)
