"""The section `regime` of a recipe where tasks have adapters by group: which clusters, and how deep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from peml.errors import PemlError
from peml.groups import checked_groups
from peml.training.entries import Section

MEASURED = ("warmup_steps", "batches", "batch_rows", "lookahead", "by")
"""Keys of a regime that say how its clusters are measured."""


class Grouped(Section):
    """A regime whose tasks have adapters by group.

    Args:
        clusters: lists of task names; a file of `peml affinity`, or the folder with it; or "auto": measured first.
        num_clusters: how many are found; None: as many as fit best.
        warmup_steps, batches, batch_rows, lookahead, by: of the measurement, as in `peml.affinity.How`.
    """

    clusters: Literal["auto"] | str | list[list[str]] = "auto"
    num_clusters: int | None = Field(None, gt=0)
    warmup_steps: int = Field(100, gt=0)
    batches: int = Field(20, gt=0)
    batch_rows: int = Field(16, gt=0)
    lookahead: float | None = Field(None, gt=0)
    by: Literal["cosine", "lookahead"] = "cosine"

    def check(self, tasks: Sequence[str], method: str, adapter: object, groups: object) -> None:
        """Refuse clusters that are none of these tasks, and what clusters cannot be given to.

        Raises:
            PemlError: naming the key.
        """
        name = self.name  # type: ignore[attr-defined]
        if adapter is None:
            raise PemlError(f"regime {name} gives every cluster an adapter, and method {method!r} has none")
        if groups is not None:
            raise PemlError(f"regime {name} chooses the groups: leave out set.groups, or the regime")
        if isinstance(self.clusters, list):
            checked_groups(self.clusters, tasks, "regime.clusters")
            if self.num_clusters not in (None, len(self.clusters)):
                raise PemlError(f"regime.num_clusters is {self.num_clusters}, and {len(self.clusters)} are given")
        elif len(tasks) < (self.num_clusters or 2):
            raise PemlError(f"regime {name} wants clusters, and there is but {', '.join(tasks)}: use the regime joint")
        # A run's own recipe has every key, most as they are by default.
        own = type(self).model_fields
        unread = [key for key in MEASURED if getattr(self, key) != own[key].default]
        if self.clusters != "auto" and unread:
            raise PemlError(
                f"regime.{unread[0]} says how affinity is measured, and regime.clusters are given: leave one out"
            )
        if self.by == "lookahead" and self.lookahead is None:
            raise PemlError("regime.by: lookahead needs the length of its step: set regime.lookahead")

    def levels(self, found: Callable[..., Any], tasks: Sequence[str]) -> list[Any]:
        """What `PemlConfig.groups` is.

        Args:
            found: called with a range of depth and a number, gives the clustering of it.
            tasks: of the adapter.
        """
        raise NotImplementedError

    def _chosen(self, found: Callable[..., Any], low: float, high: float) -> list[list[str]]:
        if isinstance(self.clusters, list):
            return self.clusters
        return [list(group) for group in found(low, high, self.num_clusters).clusters]


class OnePlusN(Grouped):
    """One base, and an adapter set per cluster of tasks (arXiv:2402.01684)."""

    name: Literal["one_plus_n"] = "one_plus_n"

    def levels(self, found: Callable[..., Any], tasks: Sequence[str]) -> list[Any]:
        """The same clusters in every layer."""
        return self._chosen(found, 0.0, 1.0)


class Progressive(Grouped):
    """One group at the bottom, clusters in the middle, one per task at the top (arXiv:2509.19602).

    Args:
        bounds: shares of the depth where clusters begin, and where they end. Our choice: thirds.
    """

    name: Literal["progressive"] = "progressive"
    bounds: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (1 / 3, 2 / 3)

    def check(self, tasks: Sequence[str], method: str, adapter: object, groups: object) -> None:
        """As for clusters; and bounds that do not ascend.

        Raises:
            PemlError: naming the key.
        """
        super().check(tasks, method, adapter, groups)
        if self.bounds[0] > self.bounds[1]:
            raise PemlError(f"regime.bounds must ascend, not {self.bounds[0]:g}, {self.bounds[1]:g}")

    def levels(self, found: Callable[..., Any], tasks: Sequence[str]) -> list[Any]:
        """By depth; clusters are those of the affinities in the middle."""
        low, high = self.bounds
        middle = self._chosen(found, low, high) if low < high else None
        ranges = ((low, "all"), (high, middle), (1.0, "each"))
        before, levels = 0.0, []
        for until, groups in ranges:
            if until > before:
                levels.append({"until": until, "groups": groups})
                before = until
        return levels


class RetrainCluster(Section):
    """One cluster of a finished run once more, from a fresh adapter; the others stay as they are.

    Args:
        run: its folder.
        tasks: of the cluster.
    """

    name: Literal["retrain_cluster"] = "retrain_cluster"
    run: str
    tasks: list[str] = Field(min_length=1)

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse tasks that the recipe has not.

        Raises:
            PemlError: naming it.
        """
        for task in self.tasks:
            if task not in tasks:
                raise PemlError(f"regime.tasks names {task!r}, which is no task here; there are {', '.join(tasks)}")
