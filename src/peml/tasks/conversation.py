"""Rows as TRL has them: `prompt` and `completion`, as texts or as turns, and `messages`.

The last turn, the assistant's, is the answer; all before it is context. (Our choice: TRL trains on every assistant
turn of `messages` unless told otherwise, but a task has one answer per row, which can be measured.) A row with
`prompt` and `completion` is read as these, whatever else it has; `messages` are read otherwise.
"""

from collections.abc import Mapping
from typing import Any

from peml.errors import PemlError
from peml.tasks.files import Row

Turns = tuple[tuple[str, str], ...]
"""Who speaks, and what: `(("user", "How do you do?"),)`."""

ROLES = ("system", "user", "assistant")
UNREAD = ("tools", "tool_calls", "chat_template_kwargs", "images", "audio")


def read_row(row: Row, where: str) -> tuple[Turns, str, str]:
    """The turns before the answer (none if the row has plain texts), the prompt as plain text, and the answer.

    Raises:
        PemlError: beginning with `where`, what is wrong with the row.
    """
    for key in UNREAD:
        if row.get(key):
            raise PemlError(f"{where}: `{key}` are not supported; drop the field, or the row")
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return _plain(prompt, completion, where)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise PemlError(f"{where}: `prompt` and `completion` must both be texts, or both be lists of turns")
        before, answer = _turns(prompt, f"{where}: `prompt`"), _turns(completion, f"{where}: `completion`")
        if [role for role, _ in answer] != ["assistant"]:
            raise PemlError(f"{where}: `completion` must be one turn of the assistant, not {len(answer)} turns")
        turns = before + answer
    elif "messages" in row:
        turns = _turns(row["messages"], f"{where}: `messages`")
    else:
        fields = ", ".join(map(str, row)) or "none"
        raise PemlError(
            f"{where}: the row has neither `messages` nor `prompt` and `completion`, and the task no templates "
            f"`prompt` and `answer`; its fields are: {fields}"
        )
    _check_order([role for role, _ in turns], where)
    return turns[:-1], plain_text(turns[:-1]), turns[-1][1]


def plain_text(turns: Turns) -> str:
    """Turns as one text, for those who read no turns: a question alone is itself."""
    if [role for role, _ in turns] == ["user"]:
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in turns)


def _plain(prompt: str, completion: str, where: str) -> tuple[Turns, str, str]:
    for key, text in (("prompt", prompt), ("completion", completion)):
        if not text.strip():
            raise PemlError(f"{where}: `{key}` is empty; fill it in or drop the row")
    return (), prompt.rstrip(), completion.strip()


def _turns(value: Any, where: str) -> Turns:
    if not isinstance(value, list | tuple) or not value:
        what = "an empty list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
        raise PemlError(f"{where} must be a list of turns, each with `role` and `content`, not {what}")
    return tuple(_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(value, 1))


def _turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise PemlError(f"{where} must be an object with `role` and `content`")
    role, content = turn["role"], turn["content"]
    if role not in ROLES or turn.get("tool_calls"):
        asked = "tool calls" if role in ROLES else f"the role {role!r}"
        raise PemlError(f"{where} has {asked}; only texts of {', '.join(ROLES)} are supported")
    if not isinstance(content, str):
        raise PemlError(f"{where}: `content` must be a text, not a {type(content).__name__}")
    if not content.strip():
        raise PemlError(f"{where}: `content` is empty; fill it in or drop the row")
    return role, content.strip()


def _check_order(roles: list[str], where: str) -> None:
    """System or not, then user and assistant by turns, to the assistant's answer."""
    if roles[-1] != "assistant":
        raise PemlError(f"{where}: the last turn must be the assistant's, which is the answer, not the {roles[-1]}'s")
    begin = int(roles[0] == "system")
    for number, role in enumerate(roles[begin:]):
        due = ("user", "assistant")[number % 2]
        if role != due:
            raise PemlError(f"{where}: turn {begin + number + 1} must be the {due}'s, not the {role}'s")
