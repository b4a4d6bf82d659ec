"""The entries under `tasks` of a recipe: suites, and tasks on the user's own rows."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from peml.errors import PemlError
from peml.tasks import FileSource, HubSource, Task, suite_tasks
from peml.tasks.files import READERS, split_files


def _text(item: Any) -> str:
    if isinstance(item, bool):
        raise PemlError(
            "YAML reads yes, no, on, off, true and false as booleans: put them in quotes to use them as words"
        )
    return str(item)


def _texts(value: Any) -> Any:
    return [_text(item) for item in value] if isinstance(value, list) else value


Texts = Annotated[list[str], BeforeValidator(_texts)]


class Section(BaseModel):
    """A part of the recipe; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class SuiteEntry(Section):
    """Tasks of a built-in suite.

    Args:
        suite: name of the suite.
        path: local folder with the suite's files in their published form; None: the Hub.
        include, exclude: tasks, or groups of tasks, to take or leave; None: all.
        few_shot: answered examples in front of each prompt.
        limit_train, limit_eval: most rows of each task, drawn by seed.
        weight: of each of the tasks in the loss.
    """

    suite: str
    path: str | None = Field(None, min_length=1)
    include: list[str] | None = None
    exclude: list[str] | None = None
    few_shot: int = Field(0, ge=0)
    limit_train: int | None = Field(None, gt=0)
    limit_eval: int | None = Field(None, gt=0)
    weight: float = Field(1.0, gt=0)


class OwnEntry(Section):
    """A task on the user's own rows; `path`, `split` and `revision` as in `datasets.load_dataset`.

    Without `prompt` and `answer` the rows are as TRL has them: `prompt` and `completion`, or `messages`.

    Args:
        name: the task's name.
        path: file (jsonl, json, csv, tsv, parquet), local folder, or Hub id.
        eval_path: file with rows to evaluate on; without one, `eval_fraction` of the training rows is held out.
        subset: configuration name of a Hub data set.
        split: names of the training and evaluation splits of a Hub data set.
        kind: as in `peml.Task`; may be left out, for `generate`, where rows are as TRL has them.
        prompt, texts, choices, answer, labels, metrics, score, group, references, few_shot: as in `peml.Task`.
        streaming: whether training rows are read as they are needed; evaluation rows, which must be apart, are held.
        chat: whether the prompt is asked as a user's turn of the model's chat template; None: as the recipe says.
    """

    name: str
    path: str = Field(min_length=1)
    eval_path: str | None = Field(None, min_length=1)
    subset: str | None = None
    revision: str | None = None
    split: dict[Literal["train", "eval"], str] = {}
    eval_fraction: float | None = Field(None, gt=0, lt=1)
    limit_train: int | None = Field(None, gt=0)
    limit_eval: int | None = Field(None, gt=0)
    kind: Literal["choose", "generate", "classify", "regress"] | None = None
    prompt: Texts | str | None = None
    texts: Texts | str = []
    answer: str | None = None
    choices: Texts | str | None = None
    labels: dict[Any, Any] = {}
    metrics: list[str] = []
    score: list[str] = []
    group: str | None = None
    references: str | None = None
    few_shot: int = Field(0, ge=0)
    max_new_tokens: int = Field(16, gt=0)
    length_normalization: bool = False
    chat: bool | None = None
    streaming: bool = False
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _whole(self) -> OwnEntry:
        lacking = [key for key in ("kind", "prompt", "answer") if getattr(self, key) is None]
        if self.prompt is None and self.answer is None:
            if self.kind is None and self.choices is not None:
                raise PemlError("the key kind is missing: choices go with kind choose or classify")
        elif lacking:
            raise PemlError(f"the key {lacking[0]} is missing")
        return self


def read_entry(index: int, raw: Any) -> Any:
    """One entry of `tasks`: the name of a suite, or a mapping.

    Deciding by key, not by trial, keeps pydantic from reporting both readings of a faulty entry.

    Raises:
        PemlError: naming the entry and the key.
    """
    if isinstance(raw, Section):
        return raw
    if isinstance(raw, str):
        return SuiteEntry(suite=raw)
    if not isinstance(raw, dict):
        raise PemlError(f"tasks[{index}] must be a mapping with `suite`, or with `name` and `path`, not {raw!r}")
    kind = SuiteEntry if "suite" in raw else OwnEntry
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        label = raw.get("name") or raw.get("suite") or index
        raise PemlError(f"tasks[{label}]: {first_problem(error, list(kind.model_fields))}") from None


def build_tasks(entry: SuiteEntry | OwnEntry, seed: int) -> list[Task]:
    """Tasks of one entry; nothing is read yet."""
    limits: dict[str, Any] = {"limit_train": entry.limit_train, "limit_eval": entry.limit_eval, "seed": seed}
    if isinstance(entry, SuiteEntry):
        folder = entry.path and str(Path(entry.path).expanduser())
        tasks = suite_tasks(entry.suite, entry.include, entry.exclude, folder)
        return [
            dataclasses.replace(t, few_shot=entry.few_shot, source=dataclasses.replace(t.source, **limits))
            for t in tasks
        ]
    limits["streaming"] = entry.streaming
    path = str(Path(entry.path).expanduser())
    is_file = (Path(path).suffix.lower() in READERS or Path(path).is_file()) and not Path(path).is_dir()
    held_out = entry.eval_fraction
    source: FileSource | HubSource
    if is_file or entry.eval_path is not None:
        if idle := [key for key in ("subset", "split", "revision") if getattr(entry, key)]:
            raise PemlError(
                f"tasks[{entry.name}]: `{idle[0]}` goes with a folder or a Hub id, not with the file {entry.path}: "
                "leave it out, and give evaluation rows as `eval_path`"
            )
        if held_out is None and entry.eval_path is None:
            held_out = 0.1
        source = FileSource(
            train=path,
            eval=entry.eval_path and str(Path(entry.eval_path).expanduser()),
            eval_fraction=held_out,
            **limits,
        )
    else:
        evaluation: str | None = entry.split.get("eval", "validation")
        if held_out or ("eval" not in entry.split and _has_train_alone(entry, path)):
            evaluation, held_out = None, held_out or 0.1
        source = HubSource(
            path=path,
            name=entry.subset,
            train=entry.split.get("train", "train"),
            eval=evaluation,
            revision=entry.revision,
            eval_fraction=held_out,
            **limits,
        )
    choices = tuple(entry.choices) if isinstance(entry.choices, list) else entry.choices
    labels = {_label(k): _text(v) for k, v in entry.labels.items()}
    return [
        Task(
            name=entry.name,
            kind=entry.kind or "generate",
            prompt=tuple(entry.prompt) if isinstance(entry.prompt, list) else entry.prompt,
            texts=(entry.texts,) if isinstance(entry.texts, str) else tuple(entry.texts),
            answer=entry.answer,
            choices=choices,
            labels=labels,
            metrics=tuple(entry.metrics),
            score=tuple(entry.score),
            group=entry.group,
            references=entry.references,
            few_shot=entry.few_shot,
            max_new_tokens=entry.max_new_tokens,
            length_normalization=entry.length_normalization,
            chat=entry.chat,
            source=source,
        )
    ]


def _has_train_alone(entry: OwnEntry, path: str) -> bool:
    """Whether a local folder has training rows, and nothing that `datasets` might take for validation rows."""
    folder = Path(path, entry.subset or "")
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    names = [found.name.lower() for place in places for found in place.iterdir()]
    # A data set's card may name files of any name.
    if any("val" in name or "dev" in name or name == "readme.md" for name in names):
        return False
    try:
        return bool(split_files(folder, entry.split.get("train", "train")))
    except PemlError:  # reading the rows says so too, where a check lists it
        return False


def _label(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def first_problem(error: ValidationError, allowed: Sequence[str], foreign: Mapping[str, str] | None = None) -> str:
    """One sentence for the first thing that pydantic found.

    Args:
        error: its complaint.
        allowed: keys of the section where it was found.
        foreign: what keys of other tools are called here.
    """
    problem = error.errors(include_url=False)[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, PemlError):
        return str(cause)
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        if foreign is not None and name in foreign:
            return f"{key} is called `{foreign[name]}` here"
        return f"unknown key {key}{near(name, allowed)}; allowed are {', '.join(allowed)}"
    if problem["type"] == "too_short" and not problem["input"]:
        return f"{key} is empty: name at least one"
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def near(name: str, known: Iterable[str]) -> str:
    """A question after the nearest known name, if one is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
