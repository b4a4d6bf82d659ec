"""Suites: tables of ready-made tasks. A task is a row of a table; adding one needs no code."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from peml.errors import PemlError
from peml.tasks.source import ToySource
from peml.tasks.suites.glue import GLUE
from peml.tasks.suites.published import Published, SuiteSource, placed
from peml.tasks.task import Task

__all__ = ["SUITES", "Published", "SuiteSource", "suite_tasks"]

Table = Mapping[str, tuple[dict[str, Any], Published]]


def _tasks(table: Table) -> dict[str, Task]:
    return {
        name: Task(name=name, source=SuiteSource(task=name, published=published), **fields)
        for name, (fields, published) in table.items()
    }


def _toy_tasks() -> dict[str, Task]:
    from peml.tasks.toy.suite import TOY_TASKS

    return {
        toy.name: Task(
            name=toy.name,
            kind=toy.kind,
            prompt=toy.prompt,
            answer=toy.answer,
            choices=toy.choices or None,
            metrics=(toy.metric,),
            source=ToySource(task=toy.name),
        )
        for toy in TOY_TASKS.values()
    }


SUITES: Mapping[str, Callable[[], dict[str, Task]]] = {"glue": lambda: _tasks(GLUE), "toy": _toy_tasks}


def suite_tasks(
    suite: str,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    path: str | None = None,
) -> list[Task]:
    """Tasks of a suite: all of them, or those of `include` in its order, without those of `exclude`.

    Args:
        suite: its name.
        include: names of tasks to take; None: all.
        exclude: names of tasks to leave.
        path: local folder with the suite's files; None: the Hub.
    """
    if suite not in SUITES:
        raise PemlError(f"there is no suite {suite!r}; {_instead(suite, SUITES)}")
    tasks = SUITES[suite]()
    for key, names in (("include", include or ()), ("exclude", exclude or ())):
        if isinstance(names, str):
            raise PemlError(f"suite {suite!r}: `{key}` must be a list of task names, not the text {names!r}")
        for name in names:
            if name not in tasks:
                raise PemlError(f"suite {suite!r}: `{key}` names the unknown task {name!r}; {_instead(name, tasks)}")
    wanted = list(tasks) if include is None else list(dict.fromkeys(include))
    chosen = [tasks[name] for name in wanted if name not in (exclude or ())]
    if not chosen:
        raise PemlError(f"suite {suite!r}: `include` and `exclude` leave no task; it has {', '.join(tasks)}")
    return [dataclasses.replace(task, source=placed(task.source, path)) for task in chosen]


def _instead(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(str(name).lower(), known, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}there are {', '.join(known)}"
