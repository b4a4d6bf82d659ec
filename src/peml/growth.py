"""Adding a task to a trained adapter: one row more in every tensor that is stacked over tasks, the others untouched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peml.adapters import Adapter
from peml.errors import PemlError
from peml.prompts import Prompt


def source_of(init: str, task_names: Sequence[str]) -> int | None:
    """What `init` says: the id of the task to copy, or None.

    Raises:
        PemlError: it is neither "identity" nor "mean" nor "copy:" with the name of a task.
    """
    if init in ("identity", "mean"):
        return None
    kind, _, name = init.partition(":")
    if kind != "copy" or name not in task_names:
        known = ", ".join(task_names)
        raise PemlError(f'init must be "identity", "mean" or "copy:TASK" with one of {known}, not {init!r}')
    return list(task_names).index(name)


def check_name(name: object, task_names: Sequence[str]) -> None:
    """Refuse a name that a further task cannot have.

    Raises:
        PemlError: it is no text, empty, or taken.
    """
    if not isinstance(name, str) or not name.strip():
        raise PemlError(f"the new task's name must be a text that is not empty, not {name!r}")
    if name in task_names:
        raise PemlError(f"there is a task {name!r} already: this adapter has {', '.join(task_names)}")


@torch.no_grad()
def append_task(owner: Adapter | Prompt, fresh: Adapter | Prompt, init: str, source: int | None) -> None:
    """Append a row to every tensor of `owner` that is stacked over tasks.

    Args:
        owner: what is grown.
        fresh: the same, newly built for one task: where "identity" starts from.
        init: "identity", "mean" of the other tasks, or "copy:..." of the task `source`.
        source: id of the task to copy.
    """
    for key in owner.task_parameters:
        old = owner.get_parameter(key)
        if init == "mean":
            row = old.mean(0, keepdim=True)
        elif source is not None:
            row = old[source : source + 1]
        else:
            row = fresh.get_parameter(key)[:1].to(old)
        _replace(owner, key, torch.cat([old, row]))


def _replace(owner: nn.Module, key: str, value: Tensor) -> None:
    path, _, name = key.rpartition(".")
    parent, old = owner.get_submodule(path), owner.get_parameter(key)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    if isinstance(parent, nn.ParameterDict):
        parent[name] = new
    else:
        setattr(parent, name, new)
