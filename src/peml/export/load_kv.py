"""Load this export with transformers, peft and safetensors alone: LoRA, and keys and values in front of every text.

    from load_kv import load

    model = load(base_model, folder)
    model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=16)

Left padding needs `position_ids` counted from the attention mask in a direct call; `generate` counts them.
Attention becomes softmax(q [K_prefix; K] + [log g; 0]) [V_prefix; V]; the cache holds the text alone, which begins at
position 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_with_kv"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Attention over the stored keys and values and the text's own."""
    prefix = getattr(module, "kv_prefix", None)
    if prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, _, length, _ = query.shape
    keys, values, gate = (t.to(query.device, query.dtype) for t in prefix)
    if attention_mask is None:
        # Without a mask the last query sees every key.
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = seen.tril(key.shape[2] - length)[None, None]
    if attention_mask.dtype == torch.bool:
        hidden = ~attention_mask
        attention_mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
    bias = torch.cat([gate.expand(*attention_mask.shape[:3], -1), attention_mask], dim=-1)
    key = torch.cat([keys.expand(rows, -1, -1, -1), key], dim=2)
    value = torch.cat([values.expand(rows, -1, -1, -1), value], dim=2)
    return sdpa_attention_forward(module, query, key, value, bias, **{**kwargs, "is_causal": False})


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Always a mask, so that what none would mean need not be guessed."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})  # type: ignore[no-any-return]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


def load(base: Any, folder: str | Path, **kwargs: Any) -> Any:
    """The base model with what lies in a folder of this export.

    Args:
        base: its name or folder, or the model itself.
        folder: of the export, or of one of its tasks.
        kwargs: for `from_pretrained` of the base.

    Raises:
        ValueError: the model's attention cannot take keys and values.
    """
    folder = Path(folder)
    if isinstance(base, str | Path):
        base = AutoModelForCausalLM.from_pretrained(base, **kwargs)
    with safe_open(str(folder / "prefix_kv.safetensors"), framework="pt") as file:
        layers: dict[str, str] = json.loads(file.metadata()["layers"])
        for index, name in layers.items():
            parts = [file.get_tensor(f"layers.{index}.{part}") for part in ("key", "value", "log_gate")]
            base.get_submodule(name).kv_prefix = (parts[0][None], parts[1][None], parts[2])
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise ValueError("this model's attention does not go through transformers' AttentionInterface")
    model = base
    if (folder / "lora").is_dir():
        model = PeftModel.from_pretrained(base, str(folder / "lora"))
    return model.eval()
