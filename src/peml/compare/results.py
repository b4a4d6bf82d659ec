"""`results.json`: what a comparison found, from the folders of its runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from peml.compare.folder import CompareFolder, Job
from peml.compare.plan import Entry, Plan
from peml.compare.statistics import (
    LEVEL,
    ROUNDS,
    Bootstrap,
    average_ranks,
    bootstrap,
    holm,
    interval,
    paired_p,
)
from peml.errors import PemlError
from peml.training.folder import RunFolder, size_of
from peml.training.predictions import Predicted, read_predictions
from peml.training.record import environment

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""`metrics.json` by method and seed."""


def results_of(
    plan: Plan,
    folder: CompareFolder,
    jobs: Sequence[Job],
    failures: Mapping[str, str],
    unfinished: Collection[str] = (),
) -> dict[str, Any]:
    """The record of a comparison.

    Args:
        plan: what was asked for.
        folder: with its runs.
        jobs: all of them.
        failures: why a job failed, by its name.
        unfinished: names of jobs that are still to be done.
    """
    failures = dict(failures)
    runs: dict[str, dict[int, Mapping[str, Any]]] = {}
    found: dict[str, dict[int, dict[str, Predicted]]] = {}
    for entry in plan.entries:
        for seed in plan.seeds:
            job = folder.training(entry, seed)
            run = RunFolder(job.output)
            try:
                if job.name not in failures and run.finished:
                    answers = read_predictions(run.predictions)
                    runs.setdefault(entry.name, {})[seed] = run.read_metrics()
                    found.setdefault(entry.name, {})[seed] = answers
            except PemlError as error:
                # One run that cannot be read must not keep the others from being compared.
                failures[job.name] = f"{error}; in a comparison: remove {run.path} and compare again"
    drawn = bootstrap(found) if found else None
    rows = [_row(plan, folder, entry, runs, drawn) for entry in plan.entries]
    scores = {
        name: {(task, seed): _score(metrics, task) for seed, metrics in own.items() for task in plan.tasks}
        for name, own in runs.items()
    }
    ranks = average_ranks(scores) if scores else {}
    for row in rows:
        row["rank"] = ranks.get(row["name"])
    _correct(rows, list(plan.tasks))
    first = next(iter(found.values()), {})
    return {
        "format": "peml-compare",
        "version": 1,
        "recipe": yaml.safe_load(plan.recipe.to_yaml()),
        "baseline": plan.baseline,
        "budget": plan.budget,
        "seeds": list(plan.seeds),
        "level": LEVEL,
        "resamples": ROUNDS,
        "tasks": [
            {
                "name": task,
                "metrics": list(metrics),
                "score": list(own.score) if (own := _any(first, task)) is not None else [],
                "n": len(own.answers.references) if own is not None else 0,
            }
            for task, metrics in plan.tasks.items()
        ],
        "frozen": _frozen(runs),
        "methods": rows,
        "jobs": [
            {
                "name": job.name,
                "kind": job.kind,
                "method": job.method,
                "seed": job.seed,
                "state": "failed" if job.name in failures else "open" if job.name in unfinished else "done",
                "error": failures.get(job.name),
            }
            for job in jobs
        ],
        "recipes": folder.identities(jobs),
        "environment": environment(),
    }


def _any(runs: Mapping[int, Mapping[str, Predicted]], task: str) -> Predicted | None:
    return next((run[task] for run in runs.values() if task in run), None)


def _frozen(runs: Runs) -> dict[str, Any] | None:
    """Scores of the base model, where a run has measured it."""
    for own in runs.values():
        for metrics in own.values():
            if "before" in metrics:
                scores = {task: values["score"] for task, values in metrics["before"].items()}
                return {"average": metrics["average"]["before"], "tasks": scores}
    return None


def _row(plan: Plan, folder: CompareFolder, entry: Entry, runs: Runs, drawn: Bootstrap | None) -> dict[str, Any]:
    own, theirs = runs.get(entry.name, {}), runs.get(plan.baseline, {})
    row: dict[str, Any] = {
        "name": entry.name,
        "folder": entry.folder,
        "method": entry.data["method"],
        "set": entry.data["set"],
        "sized": dict(entry.sized),
        "seeds": list(own),
        "parameters": {"trained": entry.parameters, "deviation": entry.parameters / plan.budget - 1},
        "average": None,
        "tasks": {},
        "versus": None,
        "cost": None,
        "run": None,
    }
    if not own or drawn is None:
        return row
    row["average"] = _summary(drawn, entry.name, list(own), [_average(m) for m in own.values()])
    for task in plan.tasks:
        scores = [_score(m, task) for m in own.values()]
        row["tasks"][task] = _summary(drawn, entry.name, list(own), scores, task)
    row["parameters"] = parameters_of(entry, list(own), plan.budget)
    row["cost"] = _cost(folder, entry, own)
    last = next(iter(own.values()))
    row["run"] = {key: last[key] for key in ("learning_rates", "architecture", "search", "steps") if key in last}
    row["other_rows"] = _other_rows(own, theirs)
    if entry.name != plan.baseline and (both := [seed for seed in own if seed in theirs]):
        names, pair = (entry.name, plan.baseline), (own, theirs)
        row["versus"] = {
            "seeds": both,
            "average": _against(drawn, names, both, pair, None),
            "tasks": {task: _against(drawn, names, both, pair, task) for task in plan.tasks},
        }
    return row


def _average(metrics: Mapping[str, Any]) -> float:
    return float(metrics["average"]["after"])


def _score(metrics: Mapping[str, Any], task: str | None) -> float:
    return _average(metrics) if task is None else float(metrics["after"][task]["score"])


def _summary(
    drawn: Bootstrap, method: str, seeds: Sequence[int], scores: Sequence[float], task: str | None = None
) -> dict[str, Any]:
    """Mean, standard deviation over seeds, and the interval over rows and seeds."""
    return {
        "values": list(scores),
        "mean": statistics.fmean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "interval": interval(drawn.scores(method, seeds, task)),
    }


def _against(
    drawn: Bootstrap,
    names: tuple[str, str],
    seeds: Sequence[int],
    runs: tuple[Mapping[int, Any], Mapping[int, Any]],
    task: str | None,
) -> dict[str, Any]:
    """The gain over the baseline, its interval, and its test; `adjusted` and `stands` come when all tests are known."""
    ours, theirs = ([_score(own[seed], task) for seed in seeds] for own in runs)
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    return {
        "values": gains,
        "gain": statistics.fmean(gains),
        "interval": interval(drawn.scores(names[0], seeds, task) - drawn.scores(names[1], seeds, task)),
        "p": paired_p(ours, theirs),
    }


def _correct(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    """Holm's correction, over all methods for the averages, and over all methods and tasks for the tasks.

    A gain stands where the corrected test over seeds says so and the interval over rows and seeds does not reach zero.
    """
    versus = [row["versus"] for row in rows if row["versus"] is not None]
    for family in ([own["average"] for own in versus], [own["tasks"][task] for own in versus for task in tasks]):
        for test, adjusted in zip(family, holm([test["p"] for test in family]), strict=True):
            test["adjusted"] = adjusted
            low, high = test["interval"] or (-1.0, 1.0)
            test["stands"] = adjusted is not None and adjusted < 1 - LEVEL and (low > 0 or high < 0)


def parameters_of(entry: Entry, seeds: Sequence[int], budget: int) -> dict[str, Any]:
    """Mean over the seeds of what is trained, and how far the farthest of them is off the budget."""
    trained = [entry.drawn.get(seed, entry.parameters) for seed in seeds]
    deviation = max((count / budget - 1 for count in trained), key=abs)
    return {"trained": round(statistics.fmean(trained)), "deviation": deviation}


def _cost(folder: CompareFolder, entry: Entry, own: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What training, keeping and running a method costs: means over seeds, of memory the most."""
    first = next(iter(own))
    bills = [metrics["bill"] for metrics in own.values()]
    parts = ("search", "discretisation", "training", "tuning")
    seconds = {part: statistics.fmean(bill.get(part, {}).get("wall_seconds", 0.0) for bill in bills) for part in parts}
    stages = statistics.fmean(sum(stage["wall_seconds"] for stage in bill.get("stages", {}).values()) for bill in bills)
    steps = statistics.fmean(bill["total"]["steps"] for bill in bills)
    training = seconds["search"] + seconds["training"] + stages
    run = RunFolder(folder.training(entry, first).output)
    measured = folder.costing(entry, first).output
    return {
        "parts": own[first]["parameters"],
        "deployed": sum(own[first]["deployed"].values()),
        "adapter_bytes": size_of(run.adapter),
        "peak_memory_bytes": max(metrics["peak_memory_bytes"] for metrics in own.values()),
        "seconds": seconds | {"stages": stages},
        "seconds_per_step": training / steps if steps else 0.0,
        "device_hours": statistics.fmean(bill["total"]["device_hours"] for bill in bills),
        "devices": bills[0]["devices"],
        "inference": folder.read_json(measured) if measured.exists() else None,
    }


def _other_rows(own: Mapping[int, Any], theirs: Mapping[int, Any]) -> bool:
    """Whether a regime trained on other rows than the baseline, with some seed that both have."""
    return any(own[seed]["data"] != theirs[seed]["data"] for seed in own if seed in theirs)
