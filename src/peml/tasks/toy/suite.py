"""The tasks over the invented world, and seeded generators of their rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, NamedTuple

from peml.tasks.toy import world
from peml.tasks.toy.world import CARRIED, KINDS, LOOKS, NAMES, SOCIAL, TRAITS, VERBS, kind_of

SUITE_VERSION: Final = 1
"""Goes up whenever the rows of any task change."""

Row = dict[str, object]

_UP_DOWN: Final = ("up", "down")
_VERDICTS: Final = ("yes", "no", "maybe")
_SAMENESS: Final = ("same", "other")
_SOUNDNESS: Final = ("fine", "wrong")


@dataclass(frozen=True)
class ToyTask:
    """A task as data: how a row becomes a prompt, which field answers it, and how it is scored."""

    name: str
    kind: Literal["choose", "generate"]
    prompt: str
    answer: str
    choices: tuple[str, ...] | str | None
    metric: Literal["accuracy", "exact_match", "matthews", "f1"]
    description: str


def _told(answer: str, **fields: str) -> Row:
    """Return a row of texts."""
    return {**fields, "answer": answer}


def _offered(answer: str, options: list[str], slot: int, **fields: str) -> Row:
    """Return a row that offers options, the right one at `slot`."""
    offered = [option for option in options if option != answer]
    offered.insert(slot, answer)
    return {**fields, "options": offered, "answer": answer}


def _mood(rng: Random, slot: int) -> Row:
    return _told(_UP_DOWN[slot], text=world.opinion(rng, slot == 0))


def _entailment(rng: Random, slot: int) -> Row:
    label = _VERDICTS[slot]
    premise, hypothesis = world.inference(rng, label)
    return _told(label, premise=premise, hypothesis=hypothesis)


def _paraphrase(rng: Random, slot: int) -> Row:
    pair = world.restatement(rng, same=slot == 0)
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    return _told(_SAMENESS[slot], first=first, second=second)


def _grammar(rng: Random, slot: int) -> Row:
    return _told(_SOUNDNESS[slot], text=world.clause(rng, flaw=slot == 1))


def _odd(rng: Random, slot: int) -> Row:
    kind, other = rng.sample(list(KINDS), 2)
    stranger = rng.choice(KINDS[other])
    return _offered(stranger, [*rng.sample(KINDS[kind], 3), stranger], slot)


def _trait(rng: Random, slot: int) -> Row:
    kinds = rng.sample(list(KINDS), 3)
    nouns = [rng.choice(KINDS[kind]) for kind in kinds]
    return _offered(nouns[0], nouns, slot, trait=rng.choice(TRAITS[kind_of(nouns[0])]))


def _past(rng: Random, _: int) -> Row:
    verb, name = rng.choice(VERBS), rng.choice(NAMES)
    return _told(verb.past, text=f"{name} {verb.third} the {rng.choice(LOOKS)} {rng.choice(CARRIED)} .")


def _passive(rng: Random, _: int) -> Row:
    one, two = rng.sample(NAMES, 2)
    verb, look, item = rng.choice(SOCIAL), rng.choice(LOOKS), rng.choice(CARRIED)
    if rng.random() < 0.5:
        return _told(f"{two} was {verb.participle} by {one}", text=f"{one} {verb.past} {two} .")
    return _told(f"{two} got the {look} {item} from {one}", text=f"{one} gave the {look} {item} to {two} .")


class _Entry(NamedTuple):
    """A task, how its rows are drafted, and how many answers or positions are to be balanced."""

    task: ToyTask
    draft: Callable[[Random, int], Row]
    slots: int


def _entry(
    name: str,
    prompt: str,
    choices: tuple[str, ...] | int | None,
    draft: Callable[[Random, int], Row],
    description: str,
) -> _Entry:
    """Return a task with fixed choices, with so many options in each row, or with an answer to write out."""
    if choices is None:
        return _Entry(ToyTask(name, "generate", prompt, "answer", None, "exact_match", description), draft, 1)
    offered, slots = ("options", choices) if isinstance(choices, int) else (choices, len(choices))
    return _Entry(ToyTask(name, "choose", prompt, "answer", offered, "accuracy", description), draft, slots)


_LISTED: Final = "{{ options | join(' | ') }}"

_ENTRIES: Final = tuple(
    _entry(*entry)
    for entry in (
        ("mood", "{{ text }} mood :", _UP_DOWN, _mood, "Is something praised or blamed?"),
        (
            "entailment",
            "{{ premise }} | {{ hypothesis }} holds :",
            _VERDICTS,
            _entailment,
            "Does the second sentence follow from the first, contradict it, or neither?",
        ),
        (
            "paraphrase",
            "{{ first }} | {{ second }} meaning :",
            _SAMENESS,
            _paraphrase,
            "Do two sentences mean the same?",
        ),
        ("grammar", "{{ text }} grammar :", _SOUNDNESS, _grammar, "Is the sentence well formed?"),
        ("odd", _LISTED + " odd :", 4, _odd, "Which of four things is of another kind?"),
        ("trait", _LISTED + " one {{ trait }} :", 3, _trait, "Which of three things has the trait?"),
        ("past", "{{ text }} past :", None, _past, "Put the verb of the sentence into the past."),
        ("passive", "{{ text }} back :", None, _passive, "Tell it from the other person's side."),
    )
)
_BY_NAME: Final = {entry.task.name: entry for entry in _ENTRIES}

TOY_TASKS: Final[dict[str, ToyTask]] = {name: entry.task for name, entry in _BY_NAME.items()}
"""The tasks by name, in the order in which they are reported."""


def _key(row: Row) -> str:
    """Return what a row says, whatever the order of its sentences or options."""
    parts: list[str] = []
    for field, value in row.items():
        if field != "answer":
            parts += value if isinstance(value, list) else [str(value)]
    return " ".join(sorted(parts))


def _split_of(row: Row) -> str:
    """Return the split of a row; it depends on its text alone, so no seed and no task can move it across."""
    return "test" if zlib.crc32(_key(row).encode()) % 5 == 0 else "train"


def toy_rows(task: str, split: Literal["train", "test"], n: int, seed: int = 0) -> list[dict[str, object]]:
    """Return `n` distinct rows of a task, the same ones for the same arguments.

    No text of one split occurs in the other, whatever the seed and the task. Answers are balanced, and
    where a row has options of its own the right one stands equally often in each position.

    Raises:
        ValueError: The task or split is unknown, or the task has fewer than `n` distinct rows.
    """
    if task not in _BY_NAME:
        raise ValueError(f"unknown toy task {task!r}; there are {', '.join(_BY_NAME)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; there are train and test")
    entry = _BY_NAME[task]
    rng = Random(f"toy-suite:{SUITE_VERSION}:{task}:{split}:{seed}")
    rows: list[Row] = []
    seen: set[str] = set()
    misses = 0
    while len(rows) < n:
        row = entry.draft(rng, len(rows) % entry.slots)
        key = repr(row)
        if key in seen or _split_of(row) != split:
            misses += 1
            if misses > 2000:
                raise ValueError(f"toy task {task!r} has not as many as {n} distinct {split} rows")
            continue
        seen.add(key)
        misses = 0
        rows.append(row)
    rng.shuffle(rows)
    return rows
