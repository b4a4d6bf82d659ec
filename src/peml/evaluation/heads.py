"""How an encoder answers: by the head of each task, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peml.attention import evaluating
from peml.evaluation.scoring import Advance, _batches, _padded, pad_id
from peml.tasks.encode_heads import encode_heads
from peml.tasks.example import Example


def head_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    batch_size: int,
    progress: Advance | None = None,
) -> tuple[list[str], float]:
    """The likeliest choice of each example, or the number that its head says; and the mean loss.

    Args:
        model: a `PeftModel` with heads.
        tokenizer: its tokeniser.
        examples: of tasks that heads can answer.
        max_length: longest text in tokens.
        batch_size: rows per batch.
        progress: told how many rows are done.
    """
    encoded = encode_heads(tokenizer, examples, max_length)
    device, tuner = next(model.parameters()).device, _tuner(model)
    heads, names = tuner.config_in_force.heads, tuner.config_in_force.task_names
    answers, total = [""] * len(encoded), 0.0
    with evaluating(model), torch.no_grad():
        for picked in _batches([len(row.input_ids) for row in encoded], batch_size):
            rows = [encoded[i] for i in picked]
            width = max(len(row.input_ids) for row in rows)
            tasks = [names.index(examples[i].task) for i in picked]
            batch: dict[str, Any] = {
                "input_ids": _padded([row.input_ids for row in rows], width, pad_id(tokenizer), device),
                "attention_mask": _padded([[1] * len(row.input_ids) for row in rows], width, 0, device),
            }
            if rows[0].token_type_ids is not None:
                batch["token_type_ids"] = _padded([row.token_type_ids or [] for row in rows], width, 0, device)
            logits = model(**batch, tasks=tasks).logits
            targets = torch.tensor([row.target for row in rows], device=device)
            total += float(heads.losses(logits, targets, tasks).double().sum())
            for i, row in zip(picked, logits.tolist(), strict=True):
                choices = examples[i].choices
                answers[i] = choices[max(range(len(choices)), key=row.__getitem__)] if choices else repr(row[0])
            if progress:
                progress(len(picked))
    return answers, total / len(encoded)


def _tuner(model: Any) -> Any:
    return model.base_model
