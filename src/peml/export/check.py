"""Whether an export answers as the adapter does: loaded in a fresh process, without peml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from peml.attention import evaluating
from peml.errors import PemlError

TOLERANCE = 1e-4
"""Largest difference of logits in single precision, in units of the largest logit where that is above 1.

Our choice: ten times what the tests hold small models to, because sums in another order differ by more in deep ones; an
export that is wrong is off by far more.
"""

ROWS, LENGTH, NEW = 2, 12, 8


class Answers(NamedTuple):
    """What a model says to the texts of a check.

    Args:
        ids: of the texts, `[rows, length]`.
        logits: `[rows, length, vocabulary]`.
        tokens: greedy continuations, `[rows, new]`.
    """

    ids: Tensor
    logits: Tensor
    tokens: Tensor


class Order(NamedTuple):
    """An export to be compared with the adapter that it was made from.

    Args:
        form: `lora`, `merged`, `prefix` or `kv`.
        folder: where the format's own files lie: of `prefix`, the adapter's.
        base: folder or Hub id of the model that it goes on.
        expected: from `answers`.
        auto: transformers' class that loads the base.
        remote: whether the base brings code of its own, as its run allowed.
        revision: of the base, on the Hub.
    """

    form: str
    folder: Path
    base: str
    expected: Answers
    auto: str = "AutoModelForCausalLM"
    remote: bool = False
    revision: str | None = None


class Checked(NamedTuple):
    """How far an export is from the adapter.

    Args:
        difference: largest difference of logits, in units of the largest where that is above 1.
        same_tokens: whether greedy continuations are equal.
    """

    difference: float
    same_tokens: bool

    @property
    def passed(self) -> bool:
        """Whether the export may be called the same model."""
        return self.difference <= TOLERANCE and self.same_tokens


def texts(vocabulary: int) -> Tensor:
    """Ids of the same random texts every time."""
    return torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def settings() -> dict[str, Any]:
    """Plain greedy search to a fixed length, whatever a model's own settings are."""
    return {
        "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0,
        "pad_token_id": 0,
    }  # fmt: skip


@torch.no_grad()
def answers(model: PeftModel | Any, task: str | None) -> Answers:
    """What a model says; of an adapter, for a task."""
    ids = texts(model.get_input_embeddings().weight.shape[0]).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    route = {} if task is None else {"tasks": task}
    whole = inputs | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with evaluating(model):
        logits = model(**whole, **route).logits
        tokens = model.generate(**inputs, **route, **settings())[:, -NEW:]
    return Answers(ids.cpu(), logits.float().cpu(), tokens.cpu())


def check_fresh(orders: Sequence[Order]) -> list[Checked]:
    """Load exports in one process that never imports peml, and compare what they say.

    Raises:
        PemlError: stock libraries cannot load one.
    """
    with tempfile.TemporaryDirectory(prefix="peml-check-") as temporary:
        files = [Path(temporary) / f"{number}.safetensors" for number in range(len(orders))]
        lines = [
            {
                "format": each.form, "folder": str(each.folder), "base": each.base, "auto": each.auto,
                "remote": each.remote, "revision": each.revision, "loader": str(Path(__file__).with_name("load_kv.py")),
                "input_ids": each.expected.ids.tolist(), "settings": settings(), "answers": str(file),
            }
            for each, file in zip(orders, files, strict=True)
        ]  # fmt: skip
        script = Path(__file__).with_name("fresh.py").read_text(encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", script], input=json.dumps(lines), env={**os.environ, "PYTHONWARNINGS": "ignore"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise PemlError(f"an export does not load without peml ({last})")
        return [_compared(load_file(str(file)), each.expected) for file, each in zip(files, orders, strict=True)]


def _compared(found: dict[str, Tensor], expected: Answers) -> Checked:
    unit = max(1.0, float(expected.logits.abs().max()))
    difference = float((found["logits"] - expected.logits).abs().max()) / unit
    return Checked(difference, torch.equal(found["tokens"], expected.tokens))
