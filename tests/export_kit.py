"""Run folders without a training: a tiny model, and every method on it, away from its neutral start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from models import shake
from peml.methods import METHODS
from peml.training import RunFolder, load_recipe
from peml.training.run import attach
from peml.training.workbench import load_base
from workshop import tiny_tokenizer, write_model, write_recipe

PLAIN: dict[str, Any] = {"prompt.gate_after": "unit", "prompt.gate_threshold": 0.0, "prompt.gate_init": None}
"""A search that ends with ordinary tokens, the same number in every layer."""

NAS: dict[str, Any] = {
    "prompt.num_virtual_tokens": 4, "prompt.num_cells": 1, "prompt.width": 8, "prompt.embedding_dim": 4,
    "prompt.head_rank": 4, "prompt.budget_tokens": 4.0,
}  # fmt: skip
TOKENS: dict[str, Any] = {"prompt.num_virtual_tokens": 3}
SIZES: dict[str, dict[str, Any]] = {
    "prefix": TOKENS, "prompt-tuning": TOKENS | {"prompt.prompt_tuning_init": "random"},
    "mpt": TOKENS | {"prompt.prompt_tuning_init": "random"},
    "attempt": TOKENS | {"prompt.prompt_tuning_init": "random"},
    "lora+prefix": TOKENS, "prefix-nas": NAS, "peml": NAS, "peml+mtl": NAS,
}  # fmt: skip


def gpt2(words: int) -> PreTrainedModel:
    """Learned positions, and `Conv1D` layers."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=words, n_embd=24, n_layer=2, n_head=2, n_positions=48, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.4, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def opt(words: int) -> PreTrainedModel:
    """Learned positions that begin behind two rows."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=words, hidden_size=24, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.0,
            max_position_embeddings=48, word_embed_proj_dim=24, init_std=0.4, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    )  # fmt: skip


def t5(words: int) -> PreTrainedModel:
    """An encoder-decoder."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=words, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


OTHERS = {"gpt2": gpt2, "opt": opt, "t5": t5}


def write_other(folder: Path, family: str) -> None:
    """A random model with the tokenizer beside it."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    OTHERS[family](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_run(
    folder: Path, method: str, changes: dict[str, Any] | None = None, family: str = "llama", **keys: Any
) -> Path:
    """A run folder as `peml train` leaves it, its adapter drawn at random; a search in it has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_model(folder / "model") if family == "llama" else write_other(folder / "model", family)
    # Of eight experts each needs a rank of its own.
    small = {} if METHODS[method].adapter is None else {"adapter.r": 8 if method == "moe-lora" else 4}
    path = write_recipe(folder, method=method, set=small | SIZES.get(method, {}) | (changes or {}), **keys)
    return draw_run(path, folder / "run")


def draw_run(path: Path, to: Path, noise: float = 0.2) -> Path:
    """The run folder of a recipe, without a training: its adapter is drawn at random, `noise` from its start."""
    recipe, run = load_recipe(path), RunFolder(to)
    _, base = load_base(recipe)
    config = recipe.config()
    config.task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    torch.manual_seed(1)
    model = attach(base, config)
    shake([p for p in model.parameters() if p.requires_grad], noise)
    if hasattr(model.base_model.prompt, "derive"):
        model.base_model.prompt.derive()
    run.path.mkdir(parents=True)
    run.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    model.save_pretrained(str(run.adapter))
    scores = {"exact_match": 0.5, "score": 0.5, "n": 20.0, "loss": 1.0}
    after = {task.name: scores for task in recipe.build_tasks()}
    run.metrics.write_text(json.dumps({"after": after, "average": {"after": 0.5}}))
    return run.path
