"""`peml tasks check`: every row of every task, before any training.

Training stops at the first bad row; here reading goes on, and every problem is reported with its file and line.
A problem would stop the training; a note would not, but says what to look at.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from peml.errors import PemlError
from peml.evaluation.evaluate import measure as score
from peml.tasks import Example, Split, Task
from peml.tasks.encode_heads import check_heads
from peml.tasks.example import after
from peml.tasks.files import Row
from peml.training.lengths import Lengths, Reader, load_reader, measure
from peml.training.recipe import Recipe, load_recipe

Asked = dict[tuple[str, str], str]
"""Origin and question of a row -> the question by the first template."""

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong, and where.

    Attributes:
        file: path, or data set and split.
        line: line or row in it; None: the file as a whole.
        message: the sentence with which training would stop.
    """

    file: str
    line: int | None
    message: str


@dataclasses.dataclass
class TaskCheck:
    """What was found about one task.

    Attributes:
        name, kind: of the task.
        rows: good rows by split, after hold-out and limits.
        lengths: tokens by split; empty without a tokeniser.
        answers: by split: how often each choice is right (by its place, where choices differ by row), or for numbers
            the least, the mean and the greatest.
        duplicates: training rows that repeat another; that ask the same as another and answer otherwise; evaluation
            rows that ask what a training row asks.
        notes: what to look at.
        problems: what would stop the training.
    """

    name: str
    kind: str
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    lengths: dict[str, Lengths] = dataclasses.field(default_factory=dict)
    answers: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    duplicates: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def add(self, error: PemlError, origin: str = "") -> None:
        """Note a problem, once."""
        message = str(error)
        if repr(self.name) not in message:
            message += f" (task {self.name!r})"
        problem = _placed(message, origin)
        if problem not in self._seen:
            self._seen.add(problem)
            self.problems.append(problem)

    def __post_init__(self) -> None:
        """Nothing was seen yet."""
        self._seen: set[Problem] = set()

    def to_dict(self, show: int) -> dict[str, Any]:
        """For JSON; of each file the first `show` problems."""
        data = dataclasses.asdict(self) | {"count": len(self.problems)}
        data["problems"] = [dataclasses.asdict(p) for problems in self.by_file().values() for p in problems[:show]]
        return data

    def by_file(self) -> dict[str, list[Problem]]:
        """The problems of each file, in its order."""
        files: dict[str, list[Problem]] = {}
        for problem in sorted(self.problems, key=lambda p: (p.file, p.line or 0)):
            files.setdefault(problem.file, []).append(problem)
        return files


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found about all tasks of a recipe.

    Attributes:
        tasks: one by one.
        max_length: tokens that a row may have; None without a tokeniser.
        unread: why there is no tokeniser.
    """

    tasks: list[TaskCheck]
    max_length: int | None
    unread: str | None

    @property
    def clean(self) -> bool:
        """Whether training would start."""
        return not any(task.problems for task in self.tasks)

    def to_dict(self, show: int) -> dict[str, Any]:
        """For JSON; of each file the first `show` problems."""
        tasks = [task.to_dict(show) for task in self.tasks]
        return {"clean": self.clean, "max_length": self.max_length, "unread": self.unread, "tasks": tasks}


def check_tasks(recipe: Recipe | str | Path, model: str | None = None) -> Report:
    """Read and check every row of every task of a recipe; of the model, the tokeniser alone.

    Args:
        recipe: a recipe or the path of one.
        model: folder or Hub id whose tokeniser measures lengths; None: the recipe's, if it can be had.

    Raises:
        PemlError: the recipe is wrong, or `model` was given and has no tokeniser.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    reader, unread = None, None
    try:
        reader = load_reader(recipe if model is None else recipe.model_copy(update={"model": model, "revision": None}))
    except PemlError as error:
        if model is not None:
            raise
        unread = str(error)
    found = [check_task(task, reader) for task in recipe.every_task()]
    return Report(found, None if reader is None else reader.max_length, unread)


def check_task(task: Task, reader: Reader | None = None) -> TaskCheck:
    """Read and check every row of a task."""
    found = TaskCheck(task.name, task.kind)
    if reader is not None and reader.form == "heads":
        try:
            check_heads(task)
        except PemlError as error:
            found.add(error)
            reader = None
    asked: Asked = {}
    examples = _examples(task, found, asked)
    found.rows = {split: len(rows) for split, rows in examples.items()}
    if not found.problems:
        for split, use in (("train", "training"), ("eval", "evaluation")):
            if not found.rows[split]:
                found.add(PemlError(f"task {task.name!r} has no {use} rows: give it some or leave it out"))
    found.answers = {split: _answers(task, rows) for split, rows in examples.items() if rows}
    _compare(examples["train"], examples["eval"], found, asked)
    for split, rows in examples.items():
        if reader is not None and rows:
            _measure(task, split, rows, reader, found)
    _score(task, examples["eval"], found)
    return found


def _examples(task: Task, found: TaskCheck, asked: Asked) -> dict[Split, list[Example]]:
    """The examples of each split as they are trained and measured on; rows that limits leave out are looked at too.

    Training rows that are asked by another template than the first are noted in `asked`, as the first would ask them.
    """
    own = task.source.apart
    first = dataclasses.replace(task, prompt=task.prompts[0]) if len(task.prompts) > 1 else None
    readable = {use: list(_readable(task, use, found)) for use in (SPLITS if own else SPLITS[:1])}
    chosen: dict[Split, set[int]] = {}
    for split in SPLITS:
        try:
            chosen[split] = set(task.source.chosen(len(readable[split if own else "train"]), split).tolist())
        except PemlError as error:
            chosen[split] = set()
            # With problems, too few rows are their consequence.
            if not found.problems:
                found.add(error)
    examples: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for index, (row, origin) in enumerate(readable[split if own else "train"]):
            wanted = index in chosen[split]
            if not wanted and not own and (split == "eval" or index in chosen["eval"]):
                continue  # it is a row of the other split
            try:
                example = task.example(row, origin, split)
            except PemlError as error:
                found.add(error, origin)
            else:
                examples[split] += [example] * wanted
                if first is not None and split == "train" and wanted:
                    asked[example.origin, example.question] = first.example(row, origin, split).question
    return _with_shots(task, examples, found)


def _readable(task: Task, use: Split, found: TaskCheck) -> Iterator[tuple[Row, str]]:
    for row, origin in task.source.scan(use):
        if isinstance(row, PemlError):
            found.add(row, origin)
        else:
            yield row, origin


def _with_shots(task: Task, examples: dict[Split, list[Example]], found: TaskCheck) -> dict[Split, list[Example]]:
    if not task.few_shot or found.problems:
        return examples
    try:
        shots = task.shots()
        kept = {shot.origin for shot in shots}
        return {split: [after(shots, e) for e in rows if e.origin not in kept] for split, rows in examples.items()}
    except PemlError as error:
        found.add(error)
        return examples


def _answers(task: Task, examples: Sequence[Example]) -> dict[str, float]:
    if task.kind == "regress":
        values = [example.value or 0.0 for example in examples]
        return {"least": min(values), "mean": sum(values) / len(values), "greatest": max(values)}
    if task.kind == "generate":
        return {}
    counts: Counter[str] = Counter(
        example.answer if isinstance(task.choices, tuple) else f"choice {example.choices.index(example.answer) + 1}"
        for example in examples
    )
    order = task.choices if isinstance(task.choices, tuple) else sorted(counts, key=lambda c: int(c.split()[1]))
    return {choice: counts[choice] for choice in order}


def _compare(train: Sequence[Example], evaluation: Sequence[Example], found: TaskCheck, asked: Asked) -> None:
    """Rows that ask the same, up to case and spacing."""
    first: dict[str, Example] = {}
    answers: dict[str, set[str]] = {}
    pairs: dict[str, list[tuple[Example, Example]]] = {"repeated": [], "contradictory": [], "leaked": []}
    for example in train:
        key, answer = _asked(example, asked), _plain(example.answer)
        if key in answers:
            kind = "repeated" if answer in answers[key] else "contradictory"
            pairs[kind].append((example, first[key]))
        first.setdefault(key, example)
        answers.setdefault(key, set()).add(answer)
    pairs["leaked"] = [(example, first[key]) for example in evaluation if (key := _asked(example, {})) in first]
    found.duplicates = {kind: len(some) for kind, some in pairs.items()}
    sentences = {
        "repeated": "training rows repeat another one",
        "contradictory": "training rows ask the same as another one and answer otherwise",
        "leaked": "evaluation rows ask what a training row asks",
    }
    for kind, some in pairs.items():
        if some:
            one, other = some[0]
            found.notes.append(f"{len(some):,} {sentences[kind]}, first {one.origin} as {other.origin}")
    unseen = [choice for choice, count in found.answers.get("train", {}).items() if not count]
    if unseen and found.kind != "regress":
        found.notes.append(f"no training row answers {', '.join(map(repr, unseen))}")


def _asked(example: Example, asked: Asked) -> str:
    # Of several templates for the prompt a training row has one or another, and those of evaluation the first.
    question = asked.get((example.origin, example.question), example.question)
    return _plain("\n".join((*(example.texts or (question,)), *example.choices)))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _measure(task: Task, split: Split, examples: Sequence[Example], reader: Reader, found: TaskCheck) -> None:
    measured, problems = measure(task, split, examples, reader)
    for origin, error in problems:
        found.add(error, origin)
    if measured is None:
        return
    found.lengths[split] = measured
    if measured.cut:
        found.notes.append(f"{measured.cut:,} {split} rows lose text to `max_length` {reader.max_length}")
    if split == "eval" and measured.unwritable:
        few = f"`max_new_tokens` {task.max_new_tokens}"
        found.notes.append(f"{measured.unwritable:,} eval answers are longer than {few}: they cannot be written")
    if measured.outdone:
        found.notes.append(
            f"{measured.outdone:,} {split} rows cannot be answered right: another choice is the beginning of the right "
            "one, and never less likely; reword the choices, or set `length_normalization`"
        )


def _score(task: Task, examples: Sequence[Example], found: TaskCheck) -> None:
    """Metrics that cannot measure the right answers would fail after the training."""
    try:
        if examples:
            score(task, [e.answer if e.value is None else repr(e.value) for e in examples], examples)
    except PemlError as error:
        found.add(error)


def _placed(message: str, origin: str) -> Problem:
    for text in (origin, message):
        if match := re.match(r"(.+?):(\d+)(?::\s|$)", text, re.DOTALL):
            return Problem(match[1], int(match[2]), message)
    return Problem(origin, None, message)
