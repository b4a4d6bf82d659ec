"""One cluster of tasks apart from the others: train it alone, start it afresh, take it away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from peml.adapters import Adapter, GroupedAdapter
from peml.errors import PemlError
from peml.groups import Partition, cluster_of, depth_of
from peml.growth import Growing, replace_parameter


class Clusters(Growing):
    """The part of a tuner that treats some of its tasks by themselves."""

    _only: Mapping[str, tuple[str, ...]] = {}

    def cluster_of(self, task: str) -> list[str]:
        """Tasks that share any of their layers' adapters with a task, but not with all; of a plain adapter, itself.

        Raises:
            PemlError: an unknown task.
        """
        config = self._active_config()
        self._check_tasks([task])
        return cluster_of(config.groups or (), config.task_names, task)

    def freeze_others(self, tasks: Sequence[str]) -> None:
        """Train nothing but what works for some tasks alone: the others' outputs then stay as they are, bit for bit.

        As with `freeze_shared`, under an optimiser without weight decay on what is stacked over tasks.

        Args:
            tasks: names; of an adapter with groups, whole groups of some layer, or there is little to train.

        Raises:
            PemlError: an unknown task, or nothing works for these alone.
        """
        self._check_tasks(tasks)
        own, name = self._own(tasks), self.adapter_in_force
        assert name is not None
        if not own:
            raise PemlError(f"nothing in this adapter works for {', '.join(tasks)} alone: train all of it")
        if name in self._only:
            # What was frozen for another cluster is not for this one.
            super().enable_adapter_layers()
        self._freeze_but(own)
        self._only = {**self._only, name: tuple(tasks)}

    def enable_adapter_layers(self) -> None:
        """As PEFT's, which trains everything again; what `freeze_others` froze stays frozen."""
        super().enable_adapter_layers()
        config = self.config_in_force
        # Anew: tasks that have come or gone since have replaced parameters.
        only = self._only.get(self.adapter_in_force or "", ())
        tasks = [task for task in only if config is not None and task in config.task_names]
        if tasks:
            self._freeze_but(self._own(tasks))

    def _own(self, tasks: Sequence[str]) -> set[int]:
        """`id` of the parameters that work for some tasks alone, or have rows of theirs."""
        names = self._active_config().task_names
        ids = {names.index(task) for task in tasks}
        own = {key for key, owners in self.per_task_parameters().items() if ids & set(owners)}
        for adapter in self._adapters():
            groups = adapter.groups if isinstance(adapter, GroupedAdapter) else (tuple(range(len(names))),)
            members = [*adapter.members] if isinstance(adapter, GroupedAdapter) else [adapter]
            for group, member in zip(groups, members, strict=True):
                if ids.issuperset(group):
                    own |= {id(p) for p in member.parameters()}
        return own

    def _freeze_but(self, own: set[int]) -> None:
        for part in self.parts().values():
            for parameter in part:
                parameter.requires_grad = parameter.requires_grad and id(parameter) in own

    @torch.no_grad()
    def restart(self, tasks: Sequence[str]) -> None:
        """Put adapters of groups that have no other tasks back to where a fresh one begins; nothing else changes.

        Raises:
            PemlError: an unknown task, a task is merged, or no group of these tasks alone.
        """
        self._check_tasks(tasks)
        self._check_unmerged("starting a cluster afresh")
        config, found = self._active_config(), False
        ids = {config.task_names.index(task) for task in tasks}
        for bank in self._banks():
            adapter = bank.active()
            if not isinstance(adapter, GroupedAdapter):
                continue
            fresh = config.build_adapter(bank.in_features, bank.out_features, depth_of(self.model, bank.label))
            assert isinstance(fresh, GroupedAdapter)
            for number, group in enumerate(adapter.groups):
                if ids.issuperset(group):
                    found = True
                    for old, new in zip(
                        adapter.members[number].parameters(), fresh.members[number].parameters(), strict=True
                    ):
                        old.copy_(new)
        if not found:
            raise PemlError(f"no group of this adapter has {', '.join(tasks)} alone: there is nothing to start afresh")

    def remove_tasks(self, tasks: Sequence[str]) -> None:
        """Take tasks, and groups that have no others, out of the active adapter; others do not change by a bit.

        Parameters that are stacked over tasks are new objects afterwards: make the optimiser after this.

        Raises:
            PemlError: an unknown task, all tasks, or a task is merged.
        """
        self._check_tasks(tasks)
        self._check_unmerged("removing tasks")
        config, adapter_name = self._active_config(), self.adapter_in_force
        assert adapter_name is not None
        kept = [i for i, name in enumerate(config.task_names) if name not in tasks]
        if not kept:
            raise PemlError("an adapter needs a task: delete_adapter() removes it as a whole")
        if config.adapter is not None and config.adapter.rank_step(1) != config.adapter.rank_step(2):
            raise PemlError('adapter.rank_mode "total" shares r among all tasks: none of them can be removed')
        for bank in self._banks():
            if adapter_name in bank.peml_adapter:
                groups = config.partition(depth_of(self.model, bank.label))
                old: Adapter = bank.peml_adapter[adapter_name]  # type: ignore[assignment]
                bank.peml_adapter[adapter_name] = _without(old, groups, kept)
                bank.task_names[adapter_name] = tuple(config.task_names[i] for i in kept)
        if self.prompt is not None:
            _keep_rows(self.prompt, self.prompt.task_parameters, kept)
        if self.heads is not None and config.heads is not None:
            self._shrink_heads(kept)
        config.groups = None if config.groups is None else tuple(level.without(tasks) for level in config.groups)
        config.task_names = [config.task_names[i] for i in kept]
        self._selected.pop(adapter_name, None)
        for bank in self._banks():
            bank.selected_task.pop(adapter_name, None)

    def _check_tasks(self, tasks: Sequence[str]) -> None:
        names = self._active_config().task_names
        wrong = [task for task in tasks if task not in names]
        if isinstance(tasks, str) or not tasks or wrong:
            given = repr(tasks) if isinstance(tasks, str) or not tasks else repr(wrong[0])
            raise PemlError(f"give a list of tasks of this adapter, {', '.join(names)}, not {given}")

    def _check_unmerged(self, what: str) -> None:
        if any(bank.merged for bank in self._banks()):
            raise PemlError(f"a task is merged into the weights: call unmerge_adapter() before {what}")


@torch.no_grad()
def _without(old: Adapter, groups: Partition, kept: Sequence[int]) -> Adapter:
    """A layer's adapter for fewer tasks, counted anew."""
    members = [*old.members] if isinstance(old, GroupedAdapter) else [old]
    place, found, left = {task: i for i, task in enumerate(kept)}, [], []
    for group, member in zip(groups, members, strict=True):
        own = [i for i, task in enumerate(group) if task in place]
        if own:
            _keep_rows(member, member.task_parameters, own)
            found.append(member)
            left.append(tuple(place[group[i]] for i in own))
    if len(found) == 1:
        return found[0]
    assert isinstance(old, GroupedAdapter)
    old.regroup(found, left)
    return old


@torch.no_grad()
def _keep_rows(owner: nn.Module, keys: Sequence[str], rows: Sequence[int]) -> None:
    """Some rows of every tensor that is stacked over tasks."""
    for key in keys:
        replace_parameter(owner, key, owner.get_parameter(key)[list(rows)].clone())
