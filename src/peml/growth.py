"""Adding a task to a trained adapter: one row more in every tensor that is stacked over tasks, the others untouched."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peml.adapters import Adapter, GroupedAdapter
from peml.answering import Answering
from peml.errors import PemlError
from peml.groups import Partition, depth_of
from peml.prompting import Prompting
from peml.prompts import Prompt, WordPromptConfig


class Growing(Prompting, Answering):
    """The part of a tuner that adds tasks."""

    _only_tasks: bool = False

    def add_task(
        self,
        name: str,
        init: str = "identity",
        num_labels: int | None = None,
        scale: tuple[float, float] = (0.0, 1.0),
        beside: str | None = None,
    ) -> None:
        """Append a task to the active adapter; outputs of the other tasks do not change by a bit.

        Parameters that are stacked over tasks are new objects afterwards: make the optimiser after this.

        Args:
            name: of the new task.
            init: where its own parameters start: "identity" as in a fresh adapter, "mean" of the other tasks',
                or "copy:TASK". A head always starts afresh, for its classes mean something else.
            num_labels: classes of its head, or 1 for a number; for an adapter with heads.
            scale: mean and scale of its values, if it is a number.
            beside: of an adapter with groups: a task whose groups it joins; None: it gets groups of its own, but where
                all tasks share one.

        Raises:
            PemlError: the name is taken, `init` or `beside` is unknown, `num_labels` is missing, or a task is merged.
        """
        config, adapter_name = self._active_config(), self.adapter_in_force
        assert adapter_name is not None
        check_name(name, config.task_names)
        source = source_of(init, config.task_names)
        if any(bank.merged for bank in self._banks()):
            raise PemlError("a task is merged into the weights: call unmerge_adapter() before adding another")
        if (config.heads is None) != (num_labels is None):
            wanted = "has no heads: leave num_labels out" if config.heads is None else "has heads: give num_labels="
            raise PemlError(f"this adapter {wanted}")
        if config.heads is not None and num_labels is not None:
            config.heads.grown(num_labels, *scale).check([*config.task_names, name])
        if beside is not None and (config.groups is None or beside not in config.task_names):
            wanted = "this adapter has no groups" if config.groups is None else f"one of {', '.join(config.task_names)}"
            raise PemlError(f"beside is a task whose groups the new one joins ({wanted}), not {beside!r}")
        grown = None if config.adapter is None else config.adapter.grown(len(config.task_names))
        names = (*config.task_names, name)
        whole = copy.copy(config)
        whole.adapter, whole.task_names = grown, list(names)
        whole.groups = None if config.groups is None else tuple(own.with_task(name, beside) for own in config.groups)
        for bank in self._banks():
            if adapter_name in bank.peml_adapter and grown is not None:
                depth = depth_of(self.model, bank.label)
                fresh = whole.build_adapter(bank.in_features, bank.out_features, depth)
                old: Adapter = bank.peml_adapter[adapter_name]  # type: ignore[assignment]
                new = with_task(old, fresh, config.partition(depth), whole.partition(depth), init, source)
                bank.peml_adapter[adapter_name] = new
                bank.task_names[adapter_name] = names
        host = self._prompt_host()
        if host is not None and self.prompt is not None and config.prompt is not None:
            one = config.prompt.build(host.shape, 1)
            if isinstance(config.prompt, WordPromptConfig):
                self._begin_at_words(one, config.prompt)
            append_task(self.prompt, one, init, source)
        if num_labels is not None:
            self._grow_heads(num_labels, scale)
        config.adapter, config.task_names, config.groups = grown, list(names), whole.groups

    def freeze_shared(self) -> None:
        """Train nothing but what belongs to single tasks: an added task then leaves the others as they are.

        Their parameters get gradients of zero. They stay in place under an optimiser without weight decay that has
        no momentum from before, as `MultiTaskTrainer` sets it up; AdamW's own default would shrink them.

        Raises:
            PemlError: all parameters of this adapter are shared by its tasks.
        """
        own = self.per_task_parameters()
        if not own:
            raise PemlError("all parameters of this adapter are shared by its tasks: none would be left to train")
        for part in self.parts().values():
            for parameter in part:
                parameter.requires_grad = parameter.requires_grad and id(parameter) in own
        self._only_tasks = True

    def enable_adapter_layers(self) -> None:
        """As PEFT's, which trains everything again; what `freeze_shared` froze stays frozen."""
        super().enable_adapter_layers()
        if self._only_tasks:
            self.freeze_shared()


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
def with_task(
    old: Adapter, fresh: Adapter, before: Partition, after: Partition, init: str, source: int | None
) -> Adapter:
    """A layer's adapter with one task more, in the group that it has in `after`; no other group changes.

    Args:
        old: the adapter, which is changed.
        fresh: one for the tasks in `after`, newly built.
        before: groups of `old`.
        after: the same, and the new task in one of them, or behind them in one of its own.
        init: "identity", "mean" of the tasks that it joins, or of all of another group; or "copy:..." of a task.
        source: id of the task to copy.
    """
    members = [*old.members] if isinstance(old, GroupedAdapter) else [old]
    new = sum(map(len, before))
    at = next(number for number, group in enumerate(after) if new in group)
    given = None if source is None else next((n, g.index(source)) for n, g in enumerate(before) if source in g)
    one = fresh.member(at) if isinstance(fresh, GroupedAdapter) else fresh
    one.train(old.training).to(next(old.parameters()))
    if at < len(before):
        if given is not None and given[0] != at:
            # The row of another group's task fits, for the method is the same; `one` is what "identity" takes it from.
            _copy_rows(one, members[given[0]], row=given[1])
            init, given = "identity", None
        append_task(members[at], one, init, None if given is None else given[1])
    else:
        for parameter, like in zip(one.parameters(), members[0].parameters(), strict=True):
            parameter.requires_grad = like.requires_grad
        if given is not None:
            _copy_shared(one, [members[given[0]]])
            _copy_rows(one, members[given[0]], row=given[1])
        elif init == "mean":
            _copy_shared(one, members)
            _copy_rows(one, *members)
        members.append(one)
    if len(members) == 1:
        return members[0]
    if isinstance(old, GroupedAdapter):
        old.regroup(members, after)
        return old
    return GroupedAdapter(members, after)


def _copy_shared(one: Adapter, members: Sequence[Adapter]) -> None:
    """Begin where a group's adapter is, or at the mean of several."""
    for key, parameter in one.named_parameters():
        if key not in one.task_parameters:
            parameter.copy_(torch.stack([member.get_parameter(key) for member in members]).mean(0))


def _copy_rows(one: Adapter, *members: Adapter, row: int | None = None) -> None:
    """The same for what belongs to single tasks: a row, or the mean of all."""
    for key in one.task_parameters:
        rows = torch.cat([member.get_parameter(key) for member in members])
        one.get_parameter(key).copy_(rows.mean(0) if row is None else rows[row])


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
        replace_parameter(owner, key, torch.cat([old, row]))


def replace_parameter(owner: nn.Module, key: str, value: Tensor) -> None:
    """Put a new parameter in the place of another, as trainable as that was."""
    path, _, name = key.rpartition(".")
    parent, old = owner.get_submodule(path), owner.get_parameter(key)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    if isinstance(parent, nn.ParameterDict):
        parent[name] = new
    else:
        setattr(parent, name, new)
