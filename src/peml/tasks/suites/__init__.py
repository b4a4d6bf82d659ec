"""Suites: tables of ready-made tasks. A task is a row of a table; adding one needs no code."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from peml.errors import PemlError
from peml.tasks.source import ToySource
from peml.tasks.suites.commonsense import COMMONSENSE, COMMONSENSE_INSTRUCT
from peml.tasks.suites.glue import GLUE
from peml.tasks.suites.mmlu import MMLU, MMLU_GROUPS
from peml.tasks.suites.published import Published, SuiteSource, placed
from peml.tasks.suites.superglue import SUPERGLUE
from peml.tasks.task import Task

__all__ = ["SUITES", "Published", "Suite", "SuiteSource", "suite_tasks"]

Table = Mapping[str, tuple[dict[str, Any], Published]]


@dataclass(frozen=True)
class Suite:
    """A table of tasks, and what its authors make of their scores.

    Attributes:
        tasks: makes the tasks, by name.
        groups: names that stand for several tasks, in `include` and in averages.
        average: what its average is taken over, `tasks`, or the `rows` of all tasks alike; None: it has none.
    """

    tasks: Callable[[], dict[str, Task]]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    average: Literal["tasks", "rows"] | None = "tasks"


def _tasks(suite: str, table: Table) -> dict[str, Task]:
    return {
        name: Task(name=name, suite=suite, source=SuiteSource(task=name, published=published), **fields)
        for name, (fields, published) in table.items()
    }


def _toy_tasks() -> dict[str, Task]:
    from peml.tasks.toy.suite import TOY_TASKS

    return {
        toy.name: Task(
            name=toy.name,
            suite="toy",
            kind=toy.kind,
            prompt=toy.prompt,
            answer=toy.answer,
            choices=toy.choices or None,
            metrics=(toy.metric,),
            source=ToySource(task=toy.name),
        )
        for toy in TOY_TASKS.values()
    }


SUITES: Mapping[str, Suite] = {
    "glue": Suite(partial(_tasks, "glue", GLUE)),
    "superglue": Suite(partial(_tasks, "superglue", SUPERGLUE)),
    # The authors' code averages over all questions, so that large subjects count more.
    "mmlu": Suite(partial(_tasks, "mmlu", MMLU), MMLU_GROUPS, "rows"),
    "commonsense": Suite(partial(_tasks, "commonsense", COMMONSENSE)),
    "commonsense_instruct": Suite(partial(_tasks, "commonsense_instruct", COMMONSENSE_INSTRUCT)),
    "toy": Suite(_toy_tasks, average=None),
}


def suite_tasks(
    suite: str,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    path: str | None = None,
) -> list[Task]:
    """Tasks of a suite: all of them, or those of `include` in its order, without those of `exclude`.

    Args:
        suite: its name.
        include: names of tasks, or of groups of tasks, to take; None: all.
        exclude: names of tasks or groups to leave.
        path: local folder with the suite's files; None: the Hub.
    """
    if suite not in SUITES:
        raise PemlError(f"there is no suite {suite!r}; {_instead(suite, SUITES)}")
    tasks, groups = SUITES[suite].tasks(), SUITES[suite].groups
    named: dict[str, list[str]] = {}
    for key, names in (("include", include), ("exclude", exclude)):
        if isinstance(names, str):
            raise PemlError(f"suite {suite!r}: `{key}` must be a list of task names, not the text {names!r}")
        for name in names or ():
            if name not in tasks and name not in groups:
                known = {**groups, **tasks}
                raise PemlError(f"suite {suite!r}: `{key}` names the unknown task {name!r}; {_instead(name, known)}")
        named[key] = [task for name in names or () for task in groups.get(name, (name,))]
    wanted = list(tasks) if include is None else list(dict.fromkeys(named["include"]))
    chosen = [tasks[name] for name in wanted if name not in named["exclude"]]
    if not chosen:
        raise PemlError(f"suite {suite!r}: `include` and `exclude` leave no task; it has {', '.join(tasks)}")
    return [dataclasses.replace(task, source=placed(task.source, path)) for task in chosen]


def _instead(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(str(name).lower(), known, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}there are {', '.join(known)}"
