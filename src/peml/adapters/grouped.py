"""Adapters of groups of tasks on one linear layer: each row goes through that of its task's group.

    y = W x + sum_g 1[t in g] up_g' C_g(t) down_g x

The banks of the groups stand side by side, and the core of a row is that of its group on the group's rows, zero on all
others: one product for a batch that mixes groups, whatever the method, and exactly no gradient across groups.

Letters: `R_g` ranks of group g, `N` groups, `T` tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peml.adapters.base import Adapter
from peml.routing import Part, Route


class GroupedAdapter(Adapter):
    """One adapter of a method per group, as `members`; each knows the tasks of its group alone, by their place in it.

    Args:
        members: adapters of one method, N.
        groups: task ids of each, ascending; together every id once.
    """

    needs_task = True
    members: nn.ModuleList

    def __init__(self, members: Sequence[Adapter], groups: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.regroup(members, groups)
        first = members[0]
        self.diagonal = first.diagonal  # type: ignore[misc]
        self.reads_input = first.reads_input  # type: ignore[misc]
        self.lora_dropout = first.lora_dropout

    def regroup(self, members: Sequence[Adapter], groups: Sequence[tuple[int, ...]]) -> None:
        """Take other members, or other tasks in them."""
        self.members = nn.ModuleList(members)
        self.groups = tuple(groups)

    def member(self, group: int) -> Adapter:
        """The adapter of a group."""
        return self.members[group]  # type: ignore[return-value]

    def parts(self, route: Route) -> list[tuple[Adapter, Part]]:
        """Members that the batch has rows of, and what each sees of it."""
        return [(self.member(part.group), part) for part in route.split(self.groups)]

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """Banks of the groups present, one below the other."""
        assert route is not None
        banks = [member.bank(part.route) for member, part in self.parts(route)]
        down, up = banks[0] if len(banks) == 1 else (torch.cat(own) for own in zip(*banks, strict=True))
        if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            # Other devices may have rows of the other groups: DDP waits for a gradient of every parameter here too.
            down = down + 0 * sum(p.flatten()[0] for p in self.parameters() if p.requires_grad)
        return down, up

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """The members' own cores, put together by `joined`."""
        assert route is not None
        own = [member.core(member.core_tensors(), part.route, x) for member, part in self.parts(route)]
        return self.joined(own, route, x)

    def joined(self, cores: Sequence[Tensor], route: Route, x: Tensor | None = None) -> Tensor:
        """Cores of the groups present as one: each on its own rows of the bank, and for rows of its own tasks.

        Args:
            cores: one of each group present, `[..., R_g]` or `[..., R_out_g, R_in_g]`; those that all rows share
                without a dimension of rows. Dimensions in front are those of layers.
            route: tasks of the rows or tokens.
            x: the layer's input, if the method reads it.
        """
        parts = route.split(self.groups)
        if len(parts) == 1:
            return cores[0]
        own = 1 if self.diagonal else 2
        masked = []
        for core, part in zip(cores, parts, strict=True):
            mask = part.mask if x is None or not self.reads_input else _of_input(part.mask, route, x)
            # Cores of several layers, or of one that all rows share, lack the dimension of rows at its place.
            core = core if core.ndim > own else core.expand(*[1] * mask.ndim, *core.shape)
            masked.append(core * mask.to(core.dtype)[(..., *[None] * own)])
        if self.diagonal:
            return torch.cat(masked, dim=-1)
        widths, before, rows = [core.shape[-1] for core in masked], 0, []
        for core, width in zip(masked, widths, strict=True):
            rows.append(F.pad(core, (before, sum(widths) - before - width)))
            before += width
        return torch.cat(rows, dim=-2)

    def fold(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """That of the task's group."""
        if self.reads_input:
            return self.member(0).fold(None)
        assert route is not None
        (member, part), *others = self.parts(route)
        assert not others
        return member.fold(part.route)

    def task_rows(self, num_tasks: int) -> dict[str, tuple[int, ...]]:
        """Rows of members' stacked parameters; of a member with one task all parameters are that task's."""
        found: dict[str, tuple[int, ...]] = {}
        for number, group in enumerate(self.groups):
            member = self.member(number)
            names = member.task_parameters if len(group) > 1 else [name for name, _ in member.named_parameters()]
            found |= {f"members.{number}.{name}": group for name in names}
        return found

    def num_active(self, task: int, num_tasks: int) -> int:
        """Those of the task's group that work for the task."""
        number = next(n for n, group in enumerate(self.groups) if task in group)
        group = self.groups[number]
        return self.member(number).num_active(group.index(task), len(group))


def _of_input(mask: Tensor, route: Route, x: Tensor) -> Tensor:
    """The mask of rows for a core that has an entry for every token of x."""
    own = route.expand(mask, x.shape[0]).to(x.device)
    return own.reshape(*own.shape, *[1] * (x.ndim - 1 - own.ndim))
