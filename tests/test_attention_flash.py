"""What flash attention 2 cannot do with a prefix, it refuses."""

import pytest
import torch

import families
import peml
from backend_kit import FLASH, without_a_compiler_or_a_kernel  # noqa: F401
from families import made, texts
from models import adapt
from peml import PemlError
from test_families import close


def test_flash_attention_refuses_gates() -> None:
    model = made("llama", FLASH, "gated")
    with pytest.raises(PemlError, match="flash_attention_2 cannot weigh prefix tokens with gates"):
        model(input_ids=texts()[0][None])
    model = adapt(families.build("llama", FLASH), prompt=peml.PrefixNAS(num_virtual_tokens=3, num_cells=1, width=8))
    with pytest.raises(PemlError, match="or use a prompt without gates"):
        model(input_ids=texts()[0][None])


def test_flash_attention_refuses_windows_that_would_hide_the_prefix() -> None:
    model = made("mistral", FLASH, "shared")
    with pytest.raises(PemlError, match=r"sliding window of 3 tokens \(3 of the prefix and 4 of text\)"):
        model(input_ids=texts()[0][None])
    with model.disable_adapter(), pytest.raises(AssertionError, match="the window would be applied"):
        model(input_ids=texts()[0][None])


@torch.no_grad()
def test_flash_attention_takes_windows_that_hold_everything() -> None:
    base = families.build("mistral", FLASH)
    base.config.sliding_window = 9
    for layer in base.model.layers:
        layer.self_attn.sliding_window = 9
    model, row = adapt(base, prompt=peml.PrefixTuning(3)), texts()[1]
    found = model(input_ids=row[None]).logits
    base.set_attn_implementation("sdpa")
    close(found, model(input_ids=row[None]).logits, "sdpa")
    base.set_attn_implementation(FLASH)
    with pytest.raises(PemlError, match="sliding window of 9 tokens"):
        model(input_ids=torch.cat([row, row[:1]])[None])


@pytest.mark.parametrize("how", ["position_ids", "with a mask of ones", "cu_seq_lens"])
def test_flash_attention_refuses_packed_rows(how: str) -> None:
    model, row = made("llama", FLASH, "shared"), texts()[1]
    call = {"input_ids": row[None], "use_cache": False, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    if how == "with a mask of ones":
        call["attention_mask"] = torch.ones(1, 6, dtype=torch.long)
    if how == "cu_seq_lens":
        lengths = torch.tensor([0, 3, 6], dtype=torch.int32)
        call |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 3, "max_length_k": 3}
        call["position_ids"] = torch.arange(6)[None]
    with pytest.raises(PemlError, match="gives a prefix to the first of the texts packed into one row only"):
        model(**call)


def test_flash_attention_refuses_chunks() -> None:
    from peml.attention import flash

    class Config:
        attention_chunk_size = 4

    assert flash.mask(1, 4, 4, config=Config()) is None
    with pytest.raises(PemlError, match=r"cannot attend in chunks \(4 tokens, of 5\)"):
        flash.mask(1, 5, 5, config=Config())


def test_flash_attention_refuses_encoder_decoders() -> None:
    """At once, and when it is chosen later."""
    base = families.build("bart", FLASH)
    with pytest.raises(PemlError, match="BartForConditionalGeneration cannot take a prefix with flash_attention_2"):
        adapt(base, prompt=peml.PrefixTuning(2))
    assert base.config._attn_implementation == FLASH
    model = made("bart", "sdpa", "shared")
    model.base_model.model.set_attn_implementation(FLASH)
    with pytest.raises(PemlError, match="cannot take a prefix with flash_attention_2"):
        model(input_ids=texts()[0][None])


def test_flash_attention_refuses_masks_aligned_at_the_first_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peml.attention.flash.flash_attn_supports_top_left_mask", lambda: True)
    with pytest.raises(PemlError, match="aligns causal masks at the first key"):
        adapt(families.build("llama", FLASH), prompt=peml.PrefixTuning(2))
