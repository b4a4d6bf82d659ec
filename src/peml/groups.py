"""Which tasks share an adapter, and how deep: groups of tasks by ranges of depth.

    until 1/3: all        until 2/3: [[mnli, rte], [sst2]]        until 1: each

A layer has one set of an adapter's tensors for each of its groups, and a row goes through that of its task's group.
The same groups in every layer are one adapter set per cluster on one base (CGC-LoRA's 1 + N, arXiv:2402.01684); groups
that become smaller towards the top are progressive task-specific adaptation (arXiv:2509.19602).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peml.errors import PemlError

Partition = tuple[tuple[int, ...], ...]
"""Groups of task ids: each id is in one of them, ascending."""

_FORM = "give lists of task names, or a list of {until: SHARE, groups: all | each | lists of task names}"


@dataclass(frozen=True)
class Level:
    """The groups of a range of depth.

    Args:
        until: share of the depth where the range ends, in (0, 1]; it begins where the one before ends.
        groups: lists of task names; "all" is one group of all tasks, "each" a group of its own for every task.
    """

    until: float
    groups: str | tuple[tuple[str, ...], ...]

    def partition(self, task_names: Sequence[str]) -> Partition:
        """The groups by id."""
        if self.groups == "all":
            return (tuple(range(len(task_names))),)
        if self.groups == "each":
            return tuple((task,) for task in range(len(task_names)))
        table = {name: task for task, name in enumerate(task_names)}
        return tuple(tuple(sorted(table[name] for name in group)) for group in self.groups)

    def with_task(self, name: str, beside: str | None) -> Level:
        """With one task more: in the group of another one, or in one of its own."""
        if isinstance(self.groups, str):
            return self
        if beside is None:
            return replace(self, groups=(*self.groups, (name,)))
        return replace(self, groups=tuple((*own, name) if beside in own else own for own in self.groups))

    def without(self, names: Sequence[str]) -> Level:
        """Without some tasks, and without groups that have none left."""
        if isinstance(self.groups, str):
            return self
        kept = (tuple(name for name in own if name not in names) for own in self.groups)
        return replace(self, groups=tuple(own for own in kept if own))

    def __str__(self) -> str:
        if isinstance(self.groups, str):
            return f"until {self.until:.2f}: {self.groups}"
        return f"until {self.until:.2f}: " + " | ".join(", ".join(group) for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        """As `adapter_config.json` has it."""
        groups = self.groups if isinstance(self.groups, str) else [list(group) for group in self.groups]
        return {"until": self.until, "groups": groups}


def read_groups(raw: Any, task_names: Sequence[str], where: str = "groups") -> tuple[Level, ...]:
    """Levels from what a configuration or a recipe says.

    Args:
        raw: lists of task names, which hold in every layer; or a list of levels, from the bottom up.
        task_names: of the adapter.
        where: the key, for messages.

    Raises:
        PemlError: another form, an unknown task, one that is missing or there twice, or ranges that do not ascend to 1.
    """
    if not isinstance(raw, list | tuple) or not raw:
        raise PemlError(f"{where} must be a list, not {raw!r}: {_FORM}")
    if not any(isinstance(each, Level | Mapping) for each in raw):
        raw = [{"until": 1.0, "groups": raw}]
    levels = tuple(_level(each, task_names, where) for each in raw)
    ends = [level.until for level in levels]
    if ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
        raise PemlError(f"{where}.until must ascend from above 0 to 1, not {', '.join(f'{end:g}' for end in ends)}")
    return levels


def _level(raw: Any, task_names: Sequence[str], where: str) -> Level:
    given = raw.to_json() if isinstance(raw, Level) else raw
    if not isinstance(given, Mapping) or set(given) != {"until", "groups"}:
        raise PemlError(f"{where} has {raw!r}: {_FORM}")
    until, groups = given["until"], given["groups"]
    if not isinstance(until, int | float) or isinstance(until, bool):
        raise PemlError(f"{where}.until must be a share of the depth, not {until!r}")
    if groups in ("all", "each"):
        return Level(float(until), groups)
    return Level(float(until), checked_groups(groups, task_names, where))


def checked_groups(groups: Any, task_names: Sequence[str], where: str) -> tuple[tuple[str, ...], ...]:
    """Groups in which every task is once.

    Raises:
        PemlError: naming the task that is not, or the form.
    """
    lists = isinstance(groups, list | tuple) and all(isinstance(own, list | tuple) and own for own in groups)
    if not lists or not groups or not all(isinstance(name, str) for own in groups for name in own):
        raise PemlError(f"{where} has {groups!r}: {_FORM}")
    named = [name for own in groups for name in own]
    for name in named:
        if name not in task_names:
            raise PemlError(f"{where} names {name!r}, which is no task here; there are {', '.join(task_names)}")
        if named.count(name) > 1:
            raise PemlError(f"{where} has task {name!r} twice: a task is in one group of a layer")
    missing = [name for name in task_names if name not in named]
    if missing:
        raise PemlError(f"{where} leaves out {', '.join(missing)}: every task is in a group, if need be in its own")
    return tuple(tuple(own) for own in groups)


def level_at(levels: Sequence[Level], depth: float | None) -> Level:
    """The level of a layer whose middle is at this share of the depth; the lowest one for a layer of no stack."""
    return levels[0] if depth is None else next(level for level in levels if depth <= level.until)


def cluster_of(levels: Sequence[Level], task_names: Sequence[str], task: str) -> list[str]:
    """Tasks that are in a group with a task at any depth where not all are; at least itself."""
    found = {task}
    for level in levels:
        groups = level.partition(task_names)
        if len(groups) > 1:
            found |= {task_names[i] for group in groups if task_names.index(task) in group for i in group}
    return [name for name in task_names if name in found]


def stack_of(model: nn.Module, path: str) -> tuple[str, int, int] | None:
    """The block that a module lies in: path of the outermost list of modules, place in it, and its length."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if place and part.isdigit():
            parent = model.get_submodule(".".join(parts[:place]))
            if isinstance(parent, nn.ModuleList):
                return ".".join(parts[:place]), int(part), len(parent)
    return None


def depth_of(model: nn.Module, path: str) -> float | None:
    """Where the middle of a module's block is, as a share of its stack's depth; None outside of any stack."""
    found = stack_of(model, path)
    return None if found is None else (found[1] + 0.5) / found[2]
