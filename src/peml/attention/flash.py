"""A prefix in flash attention 2, which knows two masks only: causal, aligned at the last key, and padding.

So the prefix may come in front of the keys as it is, and in front of the padding as tokens that are none. What would
need a mask of another kind is refused: gates, windows that end within the prefix, packed rows, static chunks.

Letters: `B` rows, `H` heads, `S` queries, `K` keys, `P` prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

from peml.errors import PemlError

NAME = "flash_attention_2"
# Transformers takes every unknown name with "flash" in it for a kernel to be fetched from the Hub.
ALIASES = {NAME: "fa2"}

INSTEAD = 'load the model with attn_implementation="sdpa"'


class _Instead:
    """Something else's attributes, but for a few."""

    def __init__(self, of: Any, **own: Any) -> None:
        self.__dict__.update(own, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def under_own_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """The original, to which the layer's configuration names it and not its twin: it looks its kernels up by that."""

    def renamed(module: Any, *args: Any, **kwargs: Any) -> Any:
        return original(_Instead(module, config=_Instead(module.config, _attn_implementation=NAME)), *args, **kwargs)

    return renamed


def check(model: PreTrainedModel, implementation: str) -> None:
    """Refuse what flash attention could not do with a prefix in any call.

    Raises:
        PemlError: an encoder-decoder model, or a device whose flash attention aligns masks at the first key.
    """
    if implementation != NAME:
        return
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise PemlError(
            f"{name} cannot take a prefix with {NAME}, which reads the padding of the encoder's text as that of the "
            f"decoder's in cross-attention: {INSTEAD}"
        )
    if flash_attn_supports_top_left_mask():
        raise PemlError(
            f"{name} cannot take a prefix with {NAME} on this device, where it aligns causal masks at the first key: "
            f"{INSTEAD}"
        )


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask `[B, K]`, or None where nothing is padded.

    Raises:
        PemlError: attention in chunks, of which flash attention knows nothing.
    """
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and kv_length + kv_offset > chunk:
        raise PemlError(f"{NAME} cannot attend in chunks ({chunk} tokens, of {kv_length + kv_offset}): {INSTEAD}")
    if attention_mask is None and kv_length + kv_offset > q_length + q_offset:
        # `generate` drops a mask of ones unless it sees flash attention's own name: a static cache has empty places.
        attention_mask = torch.ones(batch_size, int(q_length + q_offset), dtype=torch.bool, device=device)
    return flash_attention_mask(  # type: ignore[no-any-return]
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs
    )


def attend(
    original: Callable[..., tuple[Tensor, None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: int,
    gate: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """The original over keys and values whose first P are the prefix.

    Shapes:
        query `[B, H, S, D]`, key and value `[B, H_kv, P + K, D]`, mask `[B, K]` or None.

    Raises:
        PemlError: gates, packed rows, or a window that does not hold all keys and the prefix.
    """
    if gate is not None:
        raise PemlError(
            f"{NAME} cannot weigh prefix tokens with gates, because it adds nothing to scores: {INSTEAD}, or use a "
            "prompt without gates (PrefixTuning)"
        )
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise PemlError(
            f"{NAME} would hide the prefix behind a sliding window of {window} tokens ({p} of the prefix and "
            f"{key.shape[2] - p} of text): {INSTEAD}"
        )
    positions = kwargs.pop("position_ids", None)
    if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k")) or (
        mask is None and positions is not None and _starts_again(positions)
    ):
        raise PemlError(
            f"{NAME} gives a prefix to the first of the texts packed into one row only: {INSTEAD}, or give each text "
            "a row of its own"
        )
    if mask is not None:
        mask = F.pad(mask, (p, 0), value=1)
    return original(query, key, value, mask, **kwargs)


def _starts_again(positions: Tensor) -> bool:
    """Whether positions are those of several texts in one row; asked of the device once, not by every layer."""
    known = positions.__dict__
    if "_peml_packed" not in known:
        known["_peml_packed"] = bool((positions.diff(dim=-1) != 1).any())
    return bool(known["_peml_packed"])
