"""How a comparison can be made again, and what went wrong in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def recipe_text(contents: Mapping[str, Any]) -> str:
    """The recipe, as YAML."""
    return str(yaml.safe_dump(contents["recipe"], sort_keys=False, allow_unicode=True))


def command(contents: Mapping[str, Any]) -> str:
    """The command line; methods, seeds, baseline and trials are in the recipe, where a name may hold a comma."""
    return "peml compare recipe.yaml" + (" --costs" if any(job["kind"] == "costs" for job in contents["jobs"]) else "")


def versions(contents: Mapping[str, Any]) -> str:
    """Versions and machine, in one line."""
    return ", ".join(f"{key} {value}" for key, value in contents["environment"].items())


def failures(contents: Mapping[str, Any]) -> list[str]:
    """One line for each job that failed."""
    return [f"{job['name']}: {job['error']}" for job in contents["jobs"] if job["state"] == "failed"]


def summary(contents: Mapping[str, Any]) -> str:
    """What the comparison supports, in a few sentences, from the tests alone."""
    rows = [row for row in contents["methods"] if row["versus"]]
    ahead = [row["name"] for row in rows if row["versus"]["average"]["stands"] and row["versus"]["average"]["gain"] > 0]
    behind = [
        row["name"] for row in rows if row["versus"]["average"]["stands"] and row["versus"]["average"]["gain"] < 0
    ]
    base, seeds = contents["baseline"], len(contents["seeds"])
    words = [
        f"{len(contents['methods'])} methods, {len(contents['tasks'])} tasks, {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{_length(contents['recipe']['train'])} on {contents['recipe']['model']}."
    ]
    if not rows:
        words.append(f"Of {base}, the baseline, no run shares a seed with another method: nothing is tested.")
    elif seeds < 2:
        words.append("One seed tests nothing: no difference here is more than a first look.")
    elif not ahead and not behind:
        words.append(f"On average no method is told apart from {base} by its test.")
    if ahead:
        words.append(f"Above {base} on average: {', '.join(ahead)}.")
    if behind:
        words.append(f"Below {base} on average: {', '.join(behind)}.")
    if lost := [f"{row['name']} ({', '.join(tasks)})" for row in rows if (tasks := _lost(row))]:
        words.append(f"Below {base} on single tasks: {'; '.join(lost)}.")
    if failed := failures(contents):
        words.append(f"{len(failed)} of {len(contents['jobs'])} jobs failed.")
    if left := sum(job["state"] == "open" for job in contents["jobs"]):
        words.append(f"It was stopped: {left} of {len(contents['jobs'])} jobs are still to be done.")
    return " ".join(words)


def _length(train: Mapping[str, Any]) -> str:
    return f"{train['max_steps']:,} steps" if "max_steps" in train else f"{train.get('num_train_epochs', 0):g} epochs"


def _lost(row: Mapping[str, Any]) -> list[str]:
    """Tasks on which a method is below the baseline, and its test says so."""
    tests = row["versus"]["tasks"]
    return [task for task, test in tests.items() if test["stands"] and test["gain"] < 0]
