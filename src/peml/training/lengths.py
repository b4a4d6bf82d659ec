"""How long the rows of a task are for a model, without its weights: what is cut, and what cannot fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.evaluation.scoring import ENCODE_CHOICES
from peml.tasks import Example, Form, Split, Task, encode_prompts
from peml.tasks.encode import Encoded, token_counts
from peml.tasks.script import count_tokens, tokenize
from peml.training.arguments import one_line
from peml.training.data import ENCODE
from peml.training.recipe import Recipe
from peml.training.workbench import form_for, longest_row, model_path

ENDLESS = 1_000_000
"""Longer than any row: what is encoded up to here is not cut."""

SHORT = 4
"""Rows of fewer tokens are looked at closely."""

Encode = Callable[[Sequence[Example], int], list[Encoded]]


@dataclasses.dataclass(frozen=True)
class Reader:
    """What decides how long a row is.

    Attributes:
        tokenizer: of the model.
        form: how the model answers.
        max_length: most tokens of a row.
    """

    tokenizer: PreTrainedTokenizerBase
    form: Form
    max_length: int


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of rows with their answers, before anything is cut; with the longest choice, where choices are scored.

    Attributes:
        median, most, longest: of the rows; 95 % have at most `most`.
        cut: rows that lose text to `max_length`.
        unwritable: answers longer than the tokens that may be generated.
        outdone: rows whose right choice begins with the tokens of another, which is as likely or likelier by itself.
    """

    median: int
    most: int
    longest: int
    cut: int
    unwritable: int = 0
    outdone: int = 0


def load_reader(recipe: Recipe) -> Reader:
    """Tokeniser and configuration of a recipe's model.

    Raises:
        PemlError: they cannot be had.
    """
    path, shared = (
        model_path(recipe.model),
        {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code},
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **shared)
        config: Any = AutoConfig.from_pretrained(path, **shared)
    except Exception as error:  # hub, network and tokenizer classes fail in their own ways
        raise PemlError(
            f"model: the tokenizer of {recipe.model} could not be loaded ({type(error).__name__}: {one_line(error)})"
        ) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise PemlError(f"model: {recipe.model} has no tokenizer")
    form = form_for(config)
    return Reader(tokenizer, form, longest_row(recipe, config, tokenizer, form))


def measure(
    task: Task, split: Split, examples: Sequence[Example], reader: Reader
) -> tuple[Lengths | None, list[tuple[str, PemlError]]]:
    """Lengths of the rows of a split, and those that cannot be encoded, with their origins.

    Training rows are measured with their right answer, those of evaluation as they are evaluated.
    """
    encode = _encoder(split, reader)
    ((_, first),) = _each(encode, examples[:1], ENDLESS)
    if isinstance(first, PemlError) and not str(first).startswith(examples[0].origin):
        return None, [("", first)]  # it is not the row: the model cannot read this task
    writes = split == "eval" and task.kind in ("generate", "regress") and reader.form != "heads"
    counts, problems = _counts(split, examples, reader)
    # A row that is too long is cut or refused; one that is very short may have no token of its own.
    odd = [e for e, row, answer in counts if max(row, answer) > reader.max_length or row < SHORT or not answer]
    cut = _try(encode, odd, reader.max_length, problems)
    if writes and reader.form == "causal":
        tight = [e for e, row, _ in counts if row + task.max_new_tokens > reader.max_length]
        cut = _try(_prompts(task, reader), tight, reader.max_length, problems)
    unwritable = sum(answer > task.max_new_tokens for _, _, answer in counts) if writes else 0
    if not counts:
        return None, list(problems.items())
    lengths = [row for _, row, _ in counts]
    median, most, longest = (int(value) for value in np.percentile(lengths, (50, 95, 100), method="higher"))
    outdone = _outdone(task, examples, reader) if split == "eval" else 0
    return Lengths(median, most, longest, cut, unwritable, outdone), list(problems.items())


def _outdone(task: Task, examples: Sequence[Example], reader: Reader) -> int:
    # Choices are scored without an end token by language models, and with one by encoder-decoders.
    if reader.form != "causal" or task.length_normalization:
        return 0
    texts = sorted({choice for example in examples for choice in example.choices})
    ids = dict(zip(texts, tokenize(reader.tokenizer, [f" {text}" for text in texts]), strict=True))
    return sum(
        any(choice != e.answer and ids[e.answer][: len(ids[choice])] == ids[choice] for choice in e.choices)
        for e in examples
    )


def _counts(
    split: Split, examples: Sequence[Example], reader: Reader
) -> tuple[list[tuple[Example, int, int]], dict[str, PemlError]]:
    """Tokens of each row and of its answer; and the rows that cannot be encoded at any length."""
    if reader.form == "causal":
        rows: list[int] = []
        for start in range(0, len(examples), 1000):
            batch = examples[start : start + 1000]
            rows += token_counts(reader.tokenizer, batch, "answer" if split == "train" else "choices")
        alone = sorted({f" {example.answer}" for example in examples})
        answers = dict(zip(alone, count_tokens(reader.tokenizer, alone), strict=True))
        return [(e, row, answers[f" {e.answer}"]) for e, row in zip(examples, rows, strict=True)], {}
    counts, problems = [], {}
    for example, encoded in _each(_encoder(split, reader), examples, ENDLESS):
        if isinstance(encoded, PemlError):
            problems[example.origin] = encoded
        else:
            counts.append((example, len(encoded.input_ids), 1 if reader.form == "heads" else len(encoded.labels)))
    return counts, problems


def _try(encode: Encode, examples: Sequence[Example], max_length: int, problems: dict[str, PemlError]) -> int:
    """How many rows are cut; those that cannot be encoded are added to the problems."""
    cut = 0
    for example, row in _each(encode, examples, max_length):
        if isinstance(row, PemlError):
            problems.setdefault(example.origin, row)
        else:
            cut += row.truncated
    return cut


def _prompts(task: Task, reader: Reader) -> Encode:
    return lambda examples, max_length: encode_prompts(reader.tokenizer, examples, max_length, task.max_new_tokens)


def _encoder(split: Split, reader: Reader) -> Encode:
    if split == "train" or reader.form == "heads":
        return lambda examples, max_length: ENCODE[reader.form](reader.tokenizer, examples, max_length)

    def longest(examples: Sequence[Example], max_length: int) -> list[Encoded]:
        groups = ENCODE_CHOICES[reader.form](reader.tokenizer, examples, max_length)
        return [max(group, key=lambda row: (len(row.input_ids), len(row.labels))) for group in groups]

    return longest


def _each(
    encode: Encode, examples: Sequence[Example], max_length: int, size: int = 1000
) -> Iterator[tuple[Example, Encoded | PemlError]]:
    """Every row encoded, or why it cannot be; bad rows are found by halving, since most batches have none."""
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        try:
            yield from zip(batch, encode(batch, max_length), strict=True)
        except PemlError as error:
            if len(batch) == 1:
                yield batch[0], error
            else:
                yield from _each(encode, batch, max_length, (len(batch) + 1) // 2)
