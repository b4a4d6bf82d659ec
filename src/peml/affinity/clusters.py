"""From affinities between tasks to groups of them: average linkage, with a number of groups chosen by silhouette."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peml.errors import PemlError

WEAK = 0.1
"""A silhouette below this is no reason to split the tasks: our choice."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Clustering:
    """Groups of tasks.

    Args:
        clusters: names, each group in the order of the tasks, groups by their first task.
        score: silhouette of this choice; None where it is not defined: one group, or as many as tasks.
        scores: silhouette by number of groups.
        merges: which two clusters average linkage joins and at what distance, as `scipy.cluster.hierarchy.linkage` has
            them, `[T - 1]` rows of first, second and distance.
        order: tasks as the leaves of the tree stand side by side.
    """

    clusters: tuple[tuple[str, ...], ...]
    score: float | None
    scores: dict[int, float]
    merges: tuple[tuple[int, int, float], ...]
    order: tuple[str, ...]


def cluster(affinity: Any, task_names: Sequence[str], number: int | None = None) -> Clustering:
    """Group tasks whose affinities are high.

        distance_ij = 1 - (z_ij + z_ji) / 2

    Average linkage over these distances. The number of groups is that of the largest mean silhouette (Rousseeuw 1987)
    between 2 and T - 1; one group if that is below `WEAK`. Our choice: methods differ, and this one needs no number.
    Where no two tasks have a positive affinity, each is apart: of that a silhouette cannot be had.

    Args:
        affinity: z, `[T, T]`, at most 1, such as cosines; the diagonal is not read.
        task_names: of its rows.
        number: of groups; None: chosen.

    Raises:
        PemlError: a number that is not between 1 and T, or an affinity that is no number.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform
    from sklearn.metrics import silhouette_score

    names, z = list(task_names), np.asarray(affinity, dtype=np.float64)
    count = len(names)
    if number is not None and not 1 <= number <= count:
        raise PemlError(f"clusters must be between 1 and the number of tasks, {count}, not {number}")
    if count == 1:
        return Clustering(((names[0],),), None, {}, (), (names[0],))
    distances = 1 - (z + z.T) / 2
    np.fill_diagonal(distances, 0)
    if not np.isfinite(distances).all():
        raise PemlError(
            "an affinity is no number: the warm-up diverged, or a task has no gradient; lower learning_rate"
        )
    tree = linkage(squareform(distances, checks=False), "average")
    labels = {n: _labels(tree, count, n) for n in range(1, count + 1)}
    scores = {n: float(silhouette_score(distances, labels[n], metric="precomputed")) for n in range(2, count)}
    if number is None:
        best = max(scores, key=lambda n: scores[n], default=None)
        apart = count if tree[0, 2] > 1 else 1
        number = best if best is not None and scores[best] >= WEAK else apart
    own = labels[number]
    groups = [tuple(n for n, at in zip(names, own, strict=True) if at == label) for label in dict.fromkeys(own)]
    merges = tuple((int(a), int(b), float(distance)) for a, b, distance, _ in tree)
    order = tuple(names[leaf] for leaf in leaves_list(tree))
    return Clustering(tuple(groups), scores.get(number), scores, merges, order)


def _labels(tree: Matrix, count: int, number: int) -> list[int]:
    """The group of each task after so many merges that `number` groups are left.

    Not cut by a distance, as scipy does it: ties must not leave fewer groups than are asked for.
    """
    groups = {task: [task] for task in range(count)}
    for step, (a, b, *_) in enumerate(tree[: count - number]):
        groups[count + step] = groups.pop(int(a)) + groups.pop(int(b))
    return [next(label for label, own in groups.items() if task in own) for task in range(count)]
