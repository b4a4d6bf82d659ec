"""What prompt and adapter each contribute: a run measured whole, and without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peml.attached import ABLATED, Attached
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.evaluation.evaluate import average, score, suite_averages
from peml.tasks.task import Task

WHOLE = "whole"
"""Name of the measurement with everything."""

Results = Mapping[str, Mapping[str, float]]


def read_parts(wanted: str) -> list[str]:
    """The names in a text: `prompt`, `adapter`, `both`, `all`, several of them with commas.

    Raises:
        PemlError: an unknown name.
    """
    named = [part.strip() for part in wanted.split(",") if part.strip()]
    for part in named:
        if part not in (*ABLATED, "all"):
            raise PemlError(f"--ablate takes {', '.join(ABLATED)} and all, not {part!r}")
    return named


def parts_there(named: Sequence[str], config: PemlConfig) -> list[str]:
    """The parts to switch off; `all` stands for those that there are.

    Args:
        named: from `read_parts`.
        config: of the adapter.

    Raises:
        PemlError: a part that the adapter has not.
    """
    there = [part for part in ("prompt", "adapter") if getattr(config, part) is not None]
    there += ["both"] if len(there) == 2 else []
    for part in named:
        if part not in (*there, "all"):
            raise PemlError(f"--ablate {part}: this run has not got that; it has {', '.join(there)}")
    return list(dict.fromkeys(part for name in named for part in (there if name == "all" else [name])))


def ablate(tuner: Attached, evaluate: Callable[[], dict[str, Any]], parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results of every task: `whole`, and `without PART` for each part. Heads stay, without them is no answer.

    Args:
        tuner: whose parts are switched off.
        evaluate: measures every task.
        parts: from `parts_there`.
    """
    results = {WHOLE: evaluate()}
    for part in parts:
        with tuner.ablated(part):
            results[f"without {part}"] = evaluate()
    return results


def ablation_record(results: Mapping[str, Results], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The results with averages, and what each part contributes.

        contribution(part, task) = score(whole, task) - score(without part, task)

    Our choice; reviewers of PEML (arXiv:2605.14055) asked for it. The contributions of prompt and adapter need not add
    up to that of both: each was trained beside the other.

    Args:
        results: of `ablate`.
        tasks: by name.
    """
    averages = {name: average(scores, tasks) for name, scores in results.items()}
    suites = {name: suite_averages(scores, tasks) for name, scores in results.items()}
    contributions = {}
    for name, scores in results.items():
        if name != WHOLE:
            each = {t: score(results[WHOLE][t], tasks[t]) - score(values, tasks[t]) for t, values in scores.items()}
            contributions[name.removeprefix("without ")] = {
                "tasks": each,
                "average": averages[WHOLE] - averages[name],
            }
    return {**results, "average": averages, "suites": suites, "contributions": contributions}
