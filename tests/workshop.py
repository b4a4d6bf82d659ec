"""A whole workplace in a temporary folder: a tiny model, its tokenizer, two task files and a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peml.training import MultiTaskTrainer

WORDS = ["big", "small", "red", "blue", "cat", "dog", "tree", "yes", "no", "after", "before", "color", ":", "?", "one"]


def tiny_tokenizer(vocabulary: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """Whole words, each with and without the blank before it."""
    special = ["<s>", "</s>", "<unk>"]
    words = [*special, "\n", *(blank + word for word in vocabulary for blank in ("", " "))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s]+"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write_model(folder: Path, hidden: int = 24, seed: int = 0) -> Path:
    """A random Llama with the tokenizer beside it."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,  # large, so that a frozen head can tell words apart at all
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Which things are big, and what color they have."""
    rng = random.Random(seed)
    things, sizes, colors = ("cat", "dog", "tree"), ("big", "small"), ("red", "blue")
    drawn = [(rng.choice(sizes), rng.choice(colors), rng.choice(things)) for _ in range(count)]
    return [{"text": f"{s} {c} {t}", "big": s == "big", "color": c} for s, c, t in drawn]


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over two tasks, one to choose and one to generate, with their files written."""
    write_rows(folder / "train.jsonl", rows(60, seed=1))
    write_rows(folder / "eval.jsonl", rows(20, seed=2))
    files = {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl")}
    size = {"kind": "choose", "prompt": "{{ text }} big ?", "answer": "big", "choices": [True, False]}
    size |= {"labels": {True: "yes", False: "no"}, "choices": ["yes", "no"]}
    color = {"kind": "generate", "prompt": "{{ text }} color :", "answer": "color", "max_new_tokens": 3}
    small = {f"prompt.{name}": 8 for name in ("width", "embedding_dim", "head_rank", "num_virtual_tokens")}
    return {
        "model": str(folder / "model"),
        "tasks": [{"name": "size", **files, **size}, {"name": "color", **files, **color}],
        "method": "peml",
        "set": {"adapter.r": 2, "prompt.budget_tokens": 4, **small},
        "train": {
            "max_steps": 12,
            "per_device_train_batch_size": 8,
            "max_length": 32,
            "learning_rate": 1e-2,
            "logging_steps": 2,
        },
    } | changes


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Everything on disk; returns the recipe's path."""
    if not (folder / "model").exists():
        write_model(folder / "model")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **changes)), encoding="utf-8")
    return path


class Killed(BaseException):
    """In place of a signal: nothing that handles errors catches it."""


@contextmanager
def killed_in_step(number: int) -> Iterator[None]:
    """A training inside the block ends as if by a signal when it begins this step, counted from 1."""
    original, begun = MultiTaskTrainer.training_step, []

    def dies(self: MultiTaskTrainer, *args: Any, **kwargs: Any) -> Any:
        begun.append(1)
        if len(begun) == number:
            raise Killed
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "training_step", dies)
        with pytest.raises(Killed):
            yield
