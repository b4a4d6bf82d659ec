"""An example: one row of a task as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from peml.errors import PemlError
from peml.tasks.conversation import Turns


@dataclass(frozen=True)
class Example:
    """One row as text: what the model reads, what it should answer, and where the row came from.

    Attributes:
        task: name of the task.
        prompt: text before the answer, without trailing white space.
        answer: text of the right answer; one of `choices` if there are any.
        choices: options to choose from; empty for a task that generates.
        origin: file and line (or data set and row) for messages, as in `data/tickets.jsonl:12`.
        texts: what an encoder with heads reads, one text or a pair; none: the prompt.
        value: the number behind the answer of a task that regresses.
        group: what rows are measured together by, such as the question of several answers; "": nothing.
        references: every right answer, where there may be several.
        cuts: where `prompt` may begin instead, behind its first example, its second ...; none: it has no examples.
        turns: the prompt as a conversation, which the tokeniser's chat template renders; none: it is plain text.
    """

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...]
    origin: str
    texts: tuple[str, ...] = ()
    value: float | None = None
    group: str = ""
    references: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()
    turns: Turns = ()

    @property
    def question(self) -> str:
        """The prompt without the answered examples in front of it."""
        return self.prompt[self.cuts[-1] :] if self.cuts else self.prompt

    def asked(self, prompt: str, cuts: tuple[int, ...]) -> Example:
        """The same with another prompt."""
        return replace(self, prompt=prompt, cuts=cuts, turns=(("user", prompt.strip()),) if self.turns else ())


def after(shots: Sequence[Example], example: Example) -> Example:
    """The example with answered ones in front of it, an empty line between any two; a user says all in one turn."""
    if not shots:
        return example
    if len(example.turns) > 1 or any(len(shot.turns) > 1 for shot in shots):
        raise PemlError(f"{example.origin}: task {example.task!r}: `few_shot` does not go with rows of several turns")
    before = [f"{shot.prompt} {shot.answer}\n\n" for shot in shots]
    cuts = tuple(accumulate(len(text) for text in before))
    return example.asked("".join(before) + example.prompt, cuts)
