"""From an example to token ids for an encoder with heads: one text or a pair, and a number that says the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.tasks.encode import Encoded
from peml.tasks.example import Example
from peml.tasks.task import Task


def check_heads(task: Task) -> None:
    """Refuse a task that a head cannot answer.

    Raises:
        PemlError: it writes texts, or its choices differ by row.
    """
    if task.kind == "generate" or isinstance(task.choices, str):
        what = "writes its answers" if task.kind == "generate" else f"has the choices of field {task.choices!r}"
        raise PemlError(
            f"task {task.name!r} {what}, but the model is an encoder, whose heads take fixed choices or numbers: use a "
            "language model, or leave the task out"
        )


def encode_heads(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Texts as the tokeniser joins them; of a pair that is too long, the longer text loses its end first.

    A prompt that stands for the texts loses its beginning, as everywhere: what is asked comes last.

    Raises:
        PemlError: not even the special tokens fit.
    """
    encoded: dict[int, Encoded] = {}
    for texts in (0, 1, 2):
        chosen = [i for i, example in enumerate(examples) if len(example.texts) == texts]
        if chosen:
            encoded |= zip(chosen, _encode(tokenizer, [examples[i] for i in chosen], max_length), strict=True)
    return [encoded[i] for i in range(len(examples))]


def _encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    texts = [example.texts or (example.question,) for example in examples]
    columns = [list(column) for column in zip(*texts, strict=True)]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
    if room < len(columns):
        raise PemlError(f"{examples[0].origin}: task {examples[0].task!r}: `max_length` {max_length} is too small")
    lengths = [
        sum(map(len, parts))
        for parts in zip(
            *(tokenizer(column, add_special_tokens=False, verbose=False)["input_ids"] for column in columns),
            strict=True,
        )
    ]
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "right" if examples[0].texts else "left"
    try:
        batch: Any = tokenizer(*columns, truncation="longest_first", max_length=max_length, verbose=False)
    finally:
        tokenizer.truncation_side = side
    types = batch.get("token_type_ids", [None] * len(examples))
    return [
        Encoded(ids, [], length > room, own, target_of(example))
        for example, ids, own, length in zip(examples, batch["input_ids"], types, lengths, strict=True)
    ]


def target_of(example: Example) -> float:
    """What a head should say: the number of the right choice, or the value."""
    return float(example.choices.index(example.answer)) if example.value is None else example.value
