"""From encoded examples to batches: a data set that knows the task of each row, and the collator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.tasks.encode import IGNORED, Encoded, Form, encode_all
from peml.tasks.encode_heads import encode_heads
from peml.tasks.encode_seq2seq import encode_seq2seq
from peml.tasks.example import Example

ENCODE: Mapping[Form, Callable[[PreTrainedTokenizerBase, Sequence[Example], int], list[Encoded]]] = {
    "causal": encode_all,
    "seq2seq": encode_seq2seq,
    "heads": encode_heads,
}
"""How an example becomes a training row, by how the model answers."""


class TaskRows(Dataset[dict[str, Any]]):
    """Encoded training rows of all tasks, one after the other.

    Args:
        encoded: rows by task; ids follow the order of the mapping.
        form: how the model answers.
    """

    def __init__(self, encoded: Mapping[str, Sequence[Encoded]], form: Form = "causal") -> None:
        self.form: Form = form
        self.task_names = list(encoded)
        self.rows = [row for rows in encoded.values() for row in rows]
        self.row_tasks = [task for task, rows in enumerate(encoded.values()) for _ in rows]

    @classmethod
    def encode(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        examples: Mapping[str, Sequence[Example]],
        max_length: int,
        form: Form = "causal",
        task_names: Sequence[str] | None = None,
    ) -> TaskRows:
        """Tokenise the examples of every task.

        Args:
            tokenizer: of the model.
            examples: by task.
            max_length: most tokens of a row.
            form: how the model answers.
            task_names: all tasks of the adapter, if it has some that are not trained.

        Raises:
            PemlError: a task without rows, or a row whose answer does not fit into `max_length`.
        """
        for name, rows in examples.items():
            if not rows:
                raise PemlError(f"task {name!r} has no training rows: give it some or leave it out")
        encoded = {name: ENCODE[form](tokenizer, rows, max_length) for name, rows in examples.items()}
        return cls({name: encoded.get(name, []) for name in task_names or examples}, form)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        labels = row.labels if row.target is None else row.target
        given = {"input_ids": row.input_ids, "labels": labels, "tasks": self.row_tasks[index]}
        return given if row.token_type_ids is None else given | {"token_type_ids": row.token_type_ids}

    def digest(self) -> str:
        """Fingerprint of the rows as they are trained on, in their order."""
        whole = hashlib.sha256()
        for row, task in zip(self.rows, self.row_tasks, strict=True):
            whole.update(
                repr((self.task_names[task], row.input_ids, row.labels if row.target is None else row.target)).encode()
            )
        return whole.hexdigest()

    def truncated(self) -> dict[str, int]:
        """How many prompts of each task lost their beginning."""
        counts = dict.fromkeys(self.task_names, 0)
        for row, task in zip(self.rows, self.row_tasks, strict=True):
            counts[self.task_names[task]] += row.truncated
        return counts


@dataclass(frozen=True)
class Collator:
    """Pad rows on the right and name their tasks.

    Args:
        pad_token_id: fills `input_ids`; the attention mask hides it.
        form: how the model answers.
    """

    pad_token_id: int
    form: Form = "causal"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` `[B, S]`, `labels`, and `tasks`, a list of B ids that stays on the host.

        Labels are `[B, S]` for `causal`, `[B, A]` for `seq2seq`, `[B]` for `heads`. For `causal` there is `input_mask`
        `[B, S]` as well: the tokens before the answer, which a prompt made from the text may read.
        """
        batch: dict[str, Any] = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "tasks": [int(row["tasks"]) for row in rows],
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
        labels = [row["labels"] for row in rows]
        if self.form == "heads":
            return batch | {"labels": torch.tensor(labels, dtype=torch.float)}
        if self.form == "causal":
            batch["input_mask"] = padded([[int(label == IGNORED) for label in row] for row in labels], 0)
        return batch | {"labels": padded(labels, IGNORED)}


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of one length, filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def call_of(form: Form, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with: a batch without its labels, of which an encoder-decoder's decoder gets all but one.

    Args:
        form: how the model answers.
        model: the base model, which knows what its decoder starts with.
        batch: from a `Collator`.
    """
    given = {key: value for key, value in batch.items() if key != "labels"}
    if form == "seq2seq":
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return given
