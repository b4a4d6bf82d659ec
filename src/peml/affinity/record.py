"""What an affinity measurement leaves behind: a file that regimes read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peml.affinity.clusters import Clustering, cluster
from peml.errors import PemlError
from peml.training.folder import write_text

Rows = list[list[float]]

AGREES = 0.5
"""A task whose agreement with itself is lower has affinities by chance: our choice."""


@dataclass(frozen=True)
class Affinity:
    """Affinities between tasks, and the groups that they suggest.

    Args:
        tasks: names, in the order of all rows and columns.
        cosines: of the tasks' mean gradients, `[T, T]`.
        spread: standard deviation over the batches of the cosines of each by itself, `[T, T]`.
        blocks: cosines by block of the model, from the bottom up.
        lookahead: mean look-ahead affinity, row i what a step for task i does to the others; None: not measured.
        by: what was clustered: "cosine" or "lookahead".
        clustering: of that.
        settings: model, seed, steps of the warm-up, batches and rows.
        seconds: of the warm-up, the measurement, and both.
        bill: as of a run; see `peml.training.bill`.
        depths: middle of each block as a share of its stack's depth; None: in no stack. Of a file without them, blocks
            count as all of one stack.
        agreement: by task, how far the mean gradients of two halves of the batches point the same way, a cosine; None:
            not measured.
    """

    tasks: list[str]
    cosines: Rows
    spread: Rows
    blocks: dict[str, Rows]
    lookahead: Rows | None
    by: str
    clustering: Clustering
    settings: dict[str, Any]
    seconds: dict[str, float]
    bill: dict[str, Any] = field(default_factory=dict)
    depths: dict[str, float | None] = field(default_factory=dict)
    agreement: dict[str, float] | None = None

    def between(self, low: float, high: float, number: int | None = None) -> Clustering:
        """Clusters by the mean of the blocks in a range of depth; where it has all or none, those of the whole."""
        count = len(self.blocks)
        depths = self.depths or {place: (i + 0.5) / count for i, place in enumerate(self.blocks)}
        at = {place: depth for place, depth in depths.items() if depth is not None}
        chosen = [self.blocks[place] for place, depth in at.items() if low < depth <= high]
        if self.by != "cosine" or len(chosen) in (0, count):
            return self.clustering if number is None else cluster(self.matrix, self.tasks, number)
        mean = [[sum(own[i][j] for own in chosen) / len(chosen) for j in self._range] for i in self._range]
        return cluster(mean, self.tasks, number)

    def by_chance(self) -> list[str]:
        """Tasks whose gradients hardly agree with themselves."""
        return [task for task, own in (self.agreement or {}).items() if own < AGREES]

    @property
    def _range(self) -> range:
        return range(len(self.tasks))

    @property
    def matrix(self) -> Rows:
        """What was clustered."""
        if self.by == "cosine" or self.lookahead is None:
            return self.cosines
        # Gains are small: the largest between two tasks counts as 1.
        most = max(abs(self.lookahead[i][j]) for i in self._range for j in self._range if i != j) or 1.0
        return [[1.0 if i == j else self.lookahead[i][j] / most for j in self._range] for i in self._range]

    def to_json(self) -> str:
        """The file."""
        return json.dumps({"version": 1, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write it in one step."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path, task_names: Sequence[str] | None = None) -> Affinity:
        """Read a file.

        Args:
            path: `affinity.json`, or a folder with it.
            task_names: that it must be of, in any order; None: any.

        Raises:
            PemlError: there is none, it is damaged, or it is of other tasks.
        """
        path = Path(path).expanduser()
        path = path / "affinity.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data.pop("version")
            own = data.pop("clustering")
            clustering = Clustering(
                tuple(tuple(names) for names in own["clusters"]),
                own["score"],
                {int(n): score for n, score in own["scores"].items()},
                tuple((int(a), int(b), float(d)) for a, b, d in own["merges"]),
                tuple(own["order"]),
            )
            found = cls(**data, clustering=clustering)
        except FileNotFoundError:
            raise PemlError(f"there is no {path}: `peml affinity RECIPE` writes one") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PemlError(f"{path} is no file of peml affinity ({error}): measure again") from None
        if task_names is not None and sorted(found.tasks) != sorted(task_names):
            raise PemlError(
                f"{path} is of the tasks {', '.join(found.tasks)}, and these are {', '.join(task_names)}: measure again"
            )
        return found
