"""From a request to token ids: the same way as in training, and nothing cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.tasks import Task
from peml.tasks.conversation import Turns, plain_text
from peml.tasks.encode import encode_prompts
from peml.tasks.example import Example, after
from peml.tasks.render import check_characters

UNCUT = 2**40
"""Tokens that no prompt has: what is too long is refused, not shortened."""


class UnknownModel(PemlError):
    """No such model id."""


class Reader:
    """Reads prompts of tasks.

    Args:
        tokenizer: of the model.
        tasks: by name, in the order of their ids.
        adapter_id: the id of the adapter as a whole.
        needs_task: whether the adapter answers nothing without one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Task], adapter_id: str, needs_task: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.tasks = dict(tasks)
        self.ids = {name: number for number, name in enumerate(self.tasks)}
        # A task of the same name is meant by it.
        self.adapter_id = adapter_id if adapter_id not in self.tasks else f"{adapter_id}-adapter"
        self.needs_task = needs_task
        self.shots = {name: task.shots() for name, task in self.tasks.items()}

    @property
    def models(self) -> list[str]:
        """All model ids."""
        return [self.adapter_id, *self.tasks]

    def task(self, model: str, task: str | None) -> Task | None:
        """The task that a request means; None: the adapter without one.

        Raises:
            UnknownModel: neither a task nor the adapter.
            PemlError: the adapter needs a task, and none is given; or two are.
        """
        names = ", ".join(self.tasks)
        if task is not None and task not in self.tasks:
            raise UnknownModel(f"there is no task {task!r}: choose {names}")
        if model in self.tasks:
            if task not in (None, model):
                raise PemlError(f"`model` says task {model!r}, and `task` {task!r}: leave one out")
            return self.tasks[model]
        if model != self.adapter_id:
            raise UnknownModel(f"there is no model {model!r}: choose {self.adapter_id}, {names}")
        if task is None and self.needs_task:
            raise PemlError(f"{model!r} answers by task: give one as `model`, or as `task`: {names}")
        return None if task is None else self.tasks[task]

    def example(self, task: Task | None, asked: str | Mapping[str, Any]) -> Example:
        """A prompt as it is, or fields in the task's own template."""
        if isinstance(asked, str):
            check_characters(asked, "the request: the prompt")
            return Example("" if task is None else task.name, asked, "", (), "the request")
        if task is None:
            raise PemlError("`fields` go into a task's template: give a task as `model`, or as `task`")
        return after(self.shots[task.name], task.question(dict(asked), "the request"))

    def chat(self, task: Task | None, turns: Turns) -> Example:
        """A conversation, by the chat template if the task was trained with it; else as plain text.

        Without a task the model's template decides.
        """
        talks = bool(self.tokenizer.chat_template) if task is None else bool(task.chat) or task.prompt is None
        return dataclasses.replace(self.example(task, plain_text(turns)), turns=turns if talks else ())

    def encoded(self, examples: Sequence[Example]) -> list[list[int]]:
        """Ids of prompts.

        Raises:
            PemlError: a prompt that is empty, or that the chat template refuses.
        """
        found = [row.input_ids for row in encode_prompts(self.tokenizer, examples, UNCUT, 0)]
        if not all(found):
            raise PemlError("the prompt has no tokens")
        return found


class Decoder:
    """Text of ids as they come, held back while a character or a stop text may still go on.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer, and are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = list(stops)
        self.ids: list[int] = []
        self.text = ""
        self.given = 0
        self.stopped = False
        self._from, self._settled = 0, ""

    def add(self, token: int) -> str:
        """The text that is certain with one more token; `stopped` says whether the answer is over."""
        self.ids.append(token)
        # Some tokens later nothing before them changes: those are decoded once, and kept.
        tail = self._decode(self.ids[self._from :])
        self.text = self._settled + tail
        if len(self.ids) - self._from > 64 and not tail.endswith("\ufffd"):
            keep = len(self.ids) - 16
            head = self._decode(self.ids[self._from : keep])
            if tail.startswith(head) and head + self._decode(self.ids[keep:]) == tail:
                self._settled, self._from = self._settled + head, keep
        at = min((i for stop in self.stops if (i := self.text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.text, self.stopped = self.text[:at], True
            return self._give(len(self.text))
        # Of a character that is not whole some tokenizers make one mark, and others one for each of its bytes.
        return self._give(min(len(self.text) - self._open(), len(self.text.rstrip("\ufffd"))))

    def end(self) -> str:
        """What was held back, at the end."""
        return self._give(len(self.text))

    def _open(self) -> int:
        """Characters at the end that a stop text may begin with."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _give(self, until: int) -> str:
        new = self.text[self.given : until]
        self.given = max(self.given, until)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
