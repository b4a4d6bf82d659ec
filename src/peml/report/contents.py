"""What a report shows: the record of a comparison, and from the folders of its runs the curves and the pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peml.compare import CompareFolder
from peml.errors import PemlError
from peml.training.folder import RunFolder

POINTS = 60
"""Of a curve: as many as a small panel can show."""


def contents_of(folder: CompareFolder) -> dict[str, Any]:
    """The record, and by method its `curves` (loss over steps), `pictures`, `architectures` and `ablations`, if any.

    Raises:
        PemlError: the folder holds no comparison.
    """
    results = folder.read_results()
    runs = {
        row["name"]: [RunFolder(folder.path / row["folder"] / str(seed)) for seed in row["seeds"]]
        for row in results["methods"]
    }
    curves = {name: loss_curve([run.log for run in own]) for name, own in runs.items()}
    pictures = {
        name: own[0].picture.read_text(encoding="utf-8")
        for name, own in runs.items()
        if own and own[0].picture.exists()
    }
    found = {name: [own for run in several if (own := _found(run))] for name, several in runs.items()}
    ablations = {name: several for name, own in runs.items() if (several := _contributions(own))}
    return {
        **results,
        "curves": {name: curve for name, curve in curves.items() if len(curve) > 1},
        "pictures": pictures,
        "ablations": ablations,
        "architectures": {name: several for name, several in found.items() if several},
    }


def _found(run: RunFolder) -> dict[str, Any] | None:
    """The architecture of a run, with the points that were `lost` where its search ended; None: none was searched."""
    metrics = run.read_metrics()
    if "architecture" not in metrics:
        return None
    gap = metrics.get("search", {}).get("gap")
    return {**metrics["architecture"], "lost": None if gap is None else gap["lost"]["average"]}


def _contributions(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """What each part gives to the average, by seed, of the runs that `peml evaluate --ablate` has measured."""
    found: dict[str, Any] = {}
    for run in runs:
        if run.evaluation.exists():
            try:
                record = json.loads(run.evaluation.read_text(encoding="utf-8"))
                contributions = record.get("contributions", {})
            except (ValueError, AttributeError) as error:
                raise PemlError(f"{run.evaluation} is damaged ({error}): evaluate the run again") from None
            for part, own in contributions.items():
                found.setdefault(part, []).append(own)
    return found


def loss_curve(logs: list[Path]) -> list[tuple[float, float]]:
    """Mean training loss over seeds by step, of steps that all seeds have, thinned out to what can be seen.

    Args:
        logs: `log.jsonl` of each seed.
    """
    curves = [curve for log in logs if (curve := _curve(log))]
    if not curves:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    thin = max(1, math.ceil(len(steps) / POINTS))
    # The last step is always shown.
    kept = sorted({*steps[::-thin]})
    return [(step, round(statistics.fmean(curve[step] for curve in curves), 5)) for step in kept]


def _curve(log: Path) -> Mapping[float, float]:
    curve: dict[float, float] = {}
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return curve
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
        if isinstance(entry.get("loss"), int | float) and math.isfinite(entry["loss"]):
            curve[float(entry["step"])] = float(entry["loss"])
    return curve
