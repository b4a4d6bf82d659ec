"""From encoded examples to batches: a data set that knows the task of each row, and the collator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.tasks.encode import IGNORED, Encoded, Form, encode_all
from peml.tasks.task import Example


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
        cls, tokenizer: PreTrainedTokenizerBase, examples: Mapping[str, Sequence[Example]], max_length: int
    ) -> TaskRows:
        """Tokenise the examples of every task.

        Raises:
            PemlError: a task without rows, or a row whose answer does not fit into `max_length`.
        """
        for name, rows in examples.items():
            if not rows:
                raise PemlError(f"task {name!r} has no training rows: give it some or leave it out")
        return cls({name: encode_all(tokenizer, rows, max_length) for name, rows in examples.items()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row.input_ids, "labels": row.labels, "tasks": self.row_tasks[index]}

    def digest(self) -> str:
        """Fingerprint of the rows as they are trained on, in their order."""
        whole = hashlib.sha256()
        for row, task in zip(self.rows, self.row_tasks, strict=True):
            whole.update(repr((self.task_names[task], row.input_ids, row.labels)).encode())
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
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels` `[B, S]`, and `tasks`, a list of B ids that stays on the host.

        Also `input_mask` `[B, S]`: the tokens before the answer, which a prompt made from the text may read.
        """
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([list(row[key]) + [value] * (longest - len(row[key])) for row in rows])

        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
            ),
            "input_mask": torch.tensor(
                [
                    [int(label == IGNORED) for label in row["labels"]] + [0] * (longest - len(row["labels"]))
                    for row in rows
                ]
            ),
            "labels": padded("labels", IGNORED),
            "tasks": [int(row["tasks"]) for row in rows],
        }
