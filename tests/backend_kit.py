"""Flex attention without a compiler and flash attention without its kernels, for tests on a CPU."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLASH = "flash_attention_2"


def flash_by_loops(
    module, query, key, value, mask=None, dropout=0.0, scaling=None, sliding_window=None, softcap=None, is_causal=None,
    **kwargs,
):  # fmt: skip
    """What flash attention 2 computes of what transformers gives it, padding included.

    Keys beyond the mask are dropped, as are padded keys and queries; of a row's queries the last sees all its keys.
    """
    assert module.config._attn_implementation == FLASH, "kernels are looked up by this name"
    assert sliding_window is None or key.shape[2] <= sliding_window, "the window would be applied"
    positions = kwargs.get("position_ids")
    packed = positions is not None and bool((positions.diff(dim=-1) != 1).any())
    assert mask is not None or (not packed and kwargs.get("cu_seq_lens_q") is None), "texts would be told apart"
    rows, heads, queries, _ = query.shape
    mask = torch.ones(rows, key.shape[2], dtype=torch.bool) if mask is None else mask.bool()
    asking = mask[:, -queries:] if queries > 1 else torch.ones(rows, 1, dtype=torch.bool)
    asking = mask if queries == mask.shape[1] else asking
    output = torch.zeros(rows, queries, heads, value.shape[3], dtype=query.dtype)
    causal = module.is_causal if is_causal is None else is_causal
    for b in range(rows):
        kept, asked_by = mask[b].nonzero()[:, 0], asking[b].nonzero()[:, 0]
        for i, s in enumerate(asked_by):
            last = len(kept) - len(asked_by) + i + 1 if causal else len(kept)
            for h in range(heads):
                group = h // (heads // key.shape[1])
                scores = key[b, group, kept[:last]] @ query[b, h, s] * scaling
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                output[b, s, h] = torch.softmax(scores, 0) @ value[b, group, kept[:last]]
    return output, None


@pytest.fixture(autouse=True)
def without_a_compiler_or_a_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention uncompiled, which has double precision, and flash attention in loops."""
    if any(request.node.get_closest_marker(mark) for mark in ("gpu", "slow")):
        yield
        return
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, FLASH, flash_by_loops)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, **kwargs: name)
    with torch.compiler.set_stance("force_eager"):
        yield


WARNINGS = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    # Of transformers, as it makes its masks, and of torch, as it begins to compile.
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
