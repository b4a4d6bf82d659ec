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
from peml.tasks.encode import Encoded
from peml.training.arguments import one_line
from peml.training.data import ENCODE
from peml.training.recipe import Recipe
from peml.training.workbench import form_for, longest_row, model_path

ENDLESS = 1_000_000
"""Longer than any row: what is encoded up to here is not cut."""

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
    """

    median: int
    most: int
    longest: int
    cut: int
    unwritable: int = 0


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
    if split == "eval" and reader.form != "heads":
        encode = _longest_choice(reader)
    else:
        encode = _bound(ENCODE[reader.form], reader)
    problems: list[tuple[str, PemlError]] = []
    lengths, answers, long = [], [], []
    for example, row in _each(encode, examples, ENDLESS):
        if isinstance(row, PemlError):
            problems.append((example.origin, row))
            if not str(row).startswith(example.origin):
                return None, [("", row)]  # it is not the row: the model cannot read this task
            continue
        lengths.append(len(row.input_ids))
        answers.append(len(row.labels) if reader.form == "seq2seq" else sum(label >= 0 for label in row.labels))
        if max(lengths[-1], answers[-1]) > reader.max_length:
            long.append(example)
    cut = 0
    for example, row in _each(encode, long, reader.max_length):
        if isinstance(row, PemlError):
            problems.append((example.origin, row))
        else:
            cut += row.truncated
    unwritable = 0
    if split == "eval" and task.kind in ("generate", "regress") and reader.form != "heads":
        unwritable = sum(answer > task.max_new_tokens for answer in answers)
        if reader.form == "causal":
            more, cut = _prompts(task, examples, reader)
            known = {origin for origin, _ in problems}
            problems += [each for each in more if each[0] not in known]
    if not lengths:
        return None, problems
    median, most, longest = (int(value) for value in np.percentile(lengths, (50, 95, 100), method="higher"))
    return Lengths(median, most, longest, cut, unwritable), problems


def _prompts(task: Task, examples: Sequence[Example], reader: Reader) -> tuple[list[tuple[str, PemlError]], int]:
    """Prompts that leave no room to write an answer, and how many are cut for it."""

    def encode(some: Sequence[Example], max_length: int) -> list[Encoded]:
        return encode_prompts(reader.tokenizer, some, max_length, task.max_new_tokens)

    problems, cut = [], 0
    for example, row in _each(encode, examples, reader.max_length):
        if isinstance(row, PemlError):
            problems.append((example.origin, row))
        else:
            cut += row.truncated
    return problems, cut


def _bound(encode: Callable[..., list[Encoded]], reader: Reader) -> Encode:
    return lambda examples, max_length: encode(reader.tokenizer, examples, max_length)


def _longest_choice(reader: Reader) -> Encode:
    def encode(examples: Sequence[Example], max_length: int) -> list[Encoded]:
        groups = ENCODE_CHOICES[reader.form](reader.tokenizer, examples, max_length)
        return [max(group, key=lambda row: (len(row.input_ids), len(row.labels))) for group in groups]

    return encode


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
