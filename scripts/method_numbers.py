"""What a page of a method says was measured, from the records in `benchmarks/results`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean as mean
from typing import Any, NamedTuple

import yaml
from method_costs import cost_table, costs
from records import RESULTS, TITLES, read, title_of

RECIPES = RESULTS.parent / "quality"
PLAIN = ("search-toy", "search-encoder", "encoder", "sharing-toy", "sharing-encoder", "transfer-toy")
"""Records of scores that are a list of rows."""

ROWS = {
    "LoRA, rank-matched": "lora",
    "LoRA, PEML's rank": "lora",
    "LoRA + prefix (table)": "lora+prefix",
    "LoRA + prefix (network)": "lora+prefix",
    "prefix alone": "prefix",
    "prefix, then LoRA": "peml",
    "LoRA, then prefix": "peml",
    "MTL-LoRA": "mtl-lora",
    "PEML": "peml",
    "random architecture": "peml",
    "PEML's architecture, trained anew": "peml",
    "the other half's architecture": "peml",
    "PEML, Gumbel": "peml",
    "PEML, sigmoid": "peml",
    "PEML, alternate": "peml",
    "one LoRA": "lora",
    "one LoRA, equal active": "lora",
    "one LoRA, total of one_plus_n": "lora",
    "one LoRA, total of progressive": "lora",
    "single-task LoRA": "single-task",
    "CGC-LoRA": "cgc-lora",
    "one_plus_n, LoRA": "one-plus-n",
    "one_plus_n, CGC-LoRA": "one-plus-n",
    "progressive, LoRA": "progressive",
    "prompt tuning": "prompt-tuning",
    "MPT": "mpt",
    "MPT without distillation": "mpt",
    "lora": "lora",
    "mtl-lora": "mtl-lora",
    "peml": "peml",
}
"""The method of each row of the records; a row that is not here fails the build."""

BASELINES = {"LoRA, rank-matched", "one LoRA", "one LoRA, equal active", "lora"}
STAGED = {"prefix, then LoRA", "LoRA, then prefix"}
"""Of these the record counts what the last stage trains."""


class Score(NamedTuple):
    """One row of a record of scores, in per cent.

    Args:
        record: name of its file.
        row: its name there.
        method: of our table.
        seeds: averages by seed.
        ahead: of the baseline, by seed; empty: it is the baseline, or there is none.
        tasks: gain over the baseline by task.
        trained: numbers; 0: not recorded.
        stands: whether a test says that the average differs.
    """

    record: str
    row: str
    method: str
    seeds: Sequence[float]
    ahead: Sequence[float]
    tasks: Mapping[str, float]
    trained: int
    stands: bool = False


def numbers(names: Sequence[str]) -> str:
    """Everything that the records have of methods."""
    own = [score for score in scores() if score.method in names]
    parts = [score_table(own)] if own else []
    parts += [few_rows()] if {"mpt", "prompt-tuning"} & set(names) else []
    if not parts:
        parts = ["Its scores were not measured yet.\n"]
    if missing := open_tables(names):
        parts.append("Not run yet, and shown here as soon as there is a record: " + ", ".join(missing) + ".\n")
    parts += [cost_table(cost)] if (cost := costs(names)) else []
    return "\n".join(parts)


def scores() -> Iterator[Score]:
    """Rows of all records of scores."""
    for name in PLAIN:
        table = {row[0]: row for row in plain_rows(read(name))}
        base = next((row for key, row in table.items() if key in BASELINES), None)
        for key, (_, seeds, tasks, trained) in table.items():
            other = None if base is None or key == base[0] else base
            gains = {task: mean(tasks[task]) - mean(other[2][task]) for task in tasks} if other else {}
            ahead = [a - b for a, b in zip(seeds, other[1], strict=True)] if other else []
            yield Score(name, key, ROWS[key], seeds, ahead, gains, trained)
    for name in tables():
        yield from quality_rows(f"quality-{name}")


def tables() -> list[str]:
    """The project's own comparisons, made or not."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def plain_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, list[float], dict[str, list[float]], int]]:
    """Name, averages, scores by task and numbers trained of each row."""
    if "halves" in record:
        first, second = record["halves"]
        for row in first:
            yield row, [mean(pair) for pair in zip(first[row], second[row], strict=True)], {}, 0
    for row in record.get("rows", ()):
        tasks = row.get("tasks") or row["scores"]
        tasks = {task: values if isinstance(values, list) else [values] for task, values in tasks.items()}
        average = row.get("average") or tasks.pop("average", None)
        average = average or [mean(values) for values in zip(*tasks.values(), strict=True)]
        yield row.get("way") or row["method"], average, tasks, row.get("trained") or row["total"]


def quality_rows(name: str) -> Iterator[Score]:
    """Rows of one of the project's own comparisons, if it was made."""
    for row in read(name).get("methods", ()):
        if row["average"] is None:
            continue
        versus = row["versus"] or {"average": {"values": [], "stands": False}, "tasks": {}}
        ahead = [100 * gain for gain in versus["average"]["values"]]
        gains = {task: 100 * test["gain"] for task, test in versus["tasks"].items()}
        label = row["name"] + (" (other rows)" if row["other_rows"] else "")
        values, trained = [100 * value for value in row["average"]["values"]], row["parameters"]["trained"]
        yield Score(name, label, row["method"], values, ahead, gains, trained, versus["average"]["stands"])


def score_table(rows: Sequence[Score]) -> str:
    """Averages, what is gained over LoRA, and the tasks that gain and lose most."""
    lines = [
        "| where, seeds | what | average | less LoRA's | gains most | loses most | trained |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = spread(row.ahead, signed=True) if row.ahead else ""
        gain = f"**{gain}**" if row.stands else gain
        order = sorted(row.tasks, key=lambda task: row.tasks[task])
        best = f"{order[-1]} {row.tasks[order[-1]]:+.1f}" if order and row.tasks[order[-1]] > 0.05 else ""
        worst = f"{order[0]} {row.tasks[order[0]]:+.1f}" if order and row.tasks[order[0]] < -0.05 else ""
        trained = f"{row.trained:,}" if row.trained and row.row not in STAGED else ""
        where = f"[{title_of(row.record)}](../results/{row.record}.md), {len(row.seeds)}"
        lines.append(f"| {where} | {row.row} | {spread(row.seeds)} | {gain} | {best} | {worst} | {trained} |")
    note = (
        "Per cent: mean and standard deviation over the seeds, of which the first column has the number. LoRA's is "
        "that of the same record with as many trained numbers, where it has one; differences are taken seed by seed, "
        "and bold where a test that the record has says that they stand."
    )
    return "\n".join([*lines, "", note, ""])


def few_rows() -> str:
    """Prompt tuning and its multitask form by rows per target."""
    lines = ["| where | rows per target | prompt tuning | MPT without distillation | MPT |", "|---|---|---|---|---|"]
    for name in ("mpt-toy", "mpt-real"):
        by_shots: dict[Any, dict[str, str]] = {}
        for record in read(name).get("records", ()):
            averages = [mean(values) for values in zip(*record["scores"].values(), strict=True)]
            assert record["way"] in ROWS, record["way"]
            by_shots.setdefault(record["shots"], {})[record["way"]] = spread(averages)
        for shots, found in by_shots.items():
            cells = [found.get(way, "") for way in ("prompt tuning", "MPT without distillation", "MPT")]
            lines.append(f"| [{TITLES[name]}](../results/{name}.md) | {shots or 'all'} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""]) if len(lines) > 2 else ""


def open_tables(names: Sequence[str]) -> list[str]:
    """Commands of the comparisons that have these methods and were not made."""
    found = []
    for table in tables():
        methods = yaml.safe_load((RECIPES / f"{table}.yaml").read_text(encoding="utf-8"))["compare"]["methods"]
        named = {(changes or {}).get("method", name) for name, changes in methods.items()}
        if named & set(names) and not read(f"quality-{table}"):
            found.append(f"`python -m benchmarks.quality {table}`")
    return found


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean and standard deviation."""
    rounded = round(mean(values), 1) + 0.0  # no negative zero
    middle = f"{rounded:+.1f}" if signed else f"{rounded:.1f}"
    return f"{middle} ± {statistics.stdev(values):.1f}" if len(values) > 1 else middle
