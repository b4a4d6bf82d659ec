"""The tables of a report, said once for Markdown and HTML."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peml.compare.words import (
    average_words,
    bytes_words,
    count_words,
    gain_words,
    interval_words,
    p_words,
    rounded,
    seconds_words,
    signed,
    sized_words,
)


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        words: what it says.
        strong: whether it stands out: a difference that its test supports, and nothing else.
    """

    words: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        title: above it.
        note: below it, how it is to be read.
        header: names of the columns; the first is that of the rows.
        rows: cells.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def measured(contents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The methods of which there is at least one finished run."""
    return [row for row in contents["methods"] if row["average"] is not None]


def losses_first(row: Mapping[str, Any]) -> list[str]:
    """Tasks of a method, by their gain over the baseline: what it loses comes first."""
    tests: Mapping[str, Mapping[str, Any]] = row["versus"]["tasks"]
    return sorted(tests, key=lambda task: tests[task]["gain"])


def tables_of(contents: Mapping[str, Any]) -> list[Table]:
    """All tables, in their order."""
    found = [_quality(contents), _tasks(contents), _training(contents), _inference(contents), _search(contents)]
    found.append(_ablations(contents))
    return [table for table in found if table is not None]


def _quality(contents: Mapping[str, Any]) -> Table:
    level, rows = f"{contents['level']:.0%}", []
    for row in measured(contents):
        test = row["versus"] and row["versus"]["average"]
        stands = bool(test and test["stands"])
        remark = " (other rows)" if row["other_rows"] else ""
        rows.append(
            [
                Cell(row["name"] + remark),
                Cell(average_words(row["average"]), stands),
                Cell(interval_words(row["average"]["interval"]).strip()),
                Cell("baseline" if row["name"] == contents["baseline"] else gain_words(test) or "-", stands),
                Cell(p_words(test)),
                Cell("" if row["rank"] is None else f"{row['rank']:.2f}"),
                Cell(f"{row['parameters']['trained']:,}"),
                Cell(f"{row['parameters']['deviation']:+.1%}"),
                Cell(sized_words(row)),
                Cell(str(len(row["seeds"]))),
            ]
        )
    frozen = contents["frozen"]
    before = "" if frozen is None else f" The frozen model has {frozen['average']:.3f}."
    note = (
        f"Mean and standard deviation over seeds of the mean over {len(contents['tasks'])} tasks. Intervals: {level}, "
        f"by a bootstrap over rows and seeds ({contents['resamples']:,} resamples). p: paired t-test over seeds "
        f"against {contents['baseline']}, Holm-corrected over the methods. Bold: p below {1 - contents['level']:.2g}, "
        f"and the interval of the gain does not reach zero. Budget: {contents['budget']:,} trained numbers, "
        f"for which the size (rank, or length of a prompt) was solved.{before}"
    )
    header = ("method", "average", level, "gain", "p", "rank", "trained", "off budget", "size", "seeds")
    return Table("Score on held-out rows", note, header, rows)


def _tasks(contents: Mapping[str, Any]) -> Table:
    rows = []
    for task in contents["tasks"]:
        cells = [Cell(f"{task['name']} ({', '.join(task['score'])}, n {task['n']:,})")]
        for row in measured(contents):
            test = row["versus"] and row["versus"]["tasks"].get(task["name"])
            cells.append(Cell(average_words(row["tasks"].get(task["name"])), bool(test and test["stands"])))
        rows.append(cells)
    note = (
        "Mean and standard deviation over seeds. Bold: differs from the baseline, up or down, after Holm's correction "
        "over all methods and tasks, and its interval does not reach zero."
    )
    return Table("Score by task", note, ("task", *(row["name"] for row in measured(contents))), rows)


def _training(contents: Mapping[str, Any]) -> Table:
    rows = []
    for row in measured(contents):
        cost, seconds = row["cost"], row["cost"]["seconds"]
        rows.append(
            [
                Cell(row["name"]),
                Cell(count_words(row["parameters"]["trained"])),
                Cell(count_words(cost["deployed"])),
                Cell(bytes_words(cost["adapter_bytes"])),
                Cell(bytes_words(cost["peak_memory_bytes"])),
                Cell(seconds_words(cost["seconds_per_step"])),
                Cell(_spent(seconds["search"] + seconds["discretisation"])),
                Cell(seconds_words(seconds["training"] + seconds["stages"])),
                Cell(_spent(seconds["tuning"])),
                Cell(rounded(cost["device_hours"])),
            ]
        )
    devices = next((row["cost"]["devices"] for row in measured(contents)), {"kind": "devices", "count": 0})
    note = (
        "Means over seeds, of memory the most. A step has the evaluations on its way in it. Search: with the "
        f"measurement of what discretisation loses. Hours: of {devices['kind']} ({devices['count']}), with search and "
        "tuning; the peak memory is that of the device, or of the process where there is no GPU."
    )
    header = (
        "method",
        "trained",
        "deployed",
        "on disk",
        "peak memory",
        "step",
        "search",
        "training",
        "tuning",
        "hours",
    )
    return Table("What training costs", note, header, rows)


def _spent(seconds: float) -> str:
    return seconds_words(seconds) if seconds else "-"


def _inference(contents: Mapping[str, Any]) -> Table | None:
    rows = []
    for row in measured(contents):
        found = row["cost"]["inference"]
        if found is None:
            continue
        cells = [Cell(row["name"])]
        for what in ("prefill", "token", "memory"):
            own = found.get(what, {})
            cells += [Cell(f"{own[name]:.3f}" if name in own else "") for name in ("one task", "mixed batch")]
        again = [f"{found[what]['base again']:.3f}" for what in ("prefill", "token") if what in found]
        rows.append([*cells, Cell(" / ".join(again))])
    if not rows:
        return None
    shape = next(row["cost"]["inference"] for row in measured(contents) if row["cost"]["inference"])
    note = (
        f"Ratios to the frozen base in the same process, in turns, medians of {shape['rounds']} rounds: "
        f"{shape['rows']} texts of {shape['length']} tokens, {shape['tokens']} tokens written. Memory is counted: "
        "weights, cache and prefix. The last column is the base against itself: a difference below that says nothing."
    )
    header = (
        *("method", "prefill, one task", "mixed", "per token, one task", "mixed"),
        *("memory, one task", "mixed", "base / base (prefill / token)"),
    )
    return Table("What running costs", note, header, rows)


def _ablations(contents: Mapping[str, Any]) -> Table | None:
    rows, names = [], [task["name"] for task in contents["tasks"]]
    for method, parts in contents.get("ablations", {}).items():
        for part, several in parts.items():
            means = [statistics.fmean(own["tasks"][task] for own in several) for task in names]
            whole = statistics.fmean(own["average"] for own in several)
            rows.append(
                [Cell(method), Cell(part), *[Cell(signed(value)) for value in (whole, *means)], Cell(str(len(several)))]
            )
    note = (
        "Score of the whole less the score without the part, means over the runs that "
        "`peml evaluate --ablate` has measured. Contributions need not add up: each part was trained beside the other."
    )
    return (
        Table("What each part contributes", note, ("method", "part", "average", *names, "runs"), rows) if rows else None
    )


def _search(contents: Mapping[str, Any]) -> Table | None:
    rows = []
    for row in measured(contents):
        found = contents.get("architectures", {}).get(row["name"], [])
        for seed, architecture in zip(row["seeds"], found, strict=False):
            lengths = [len(tokens) for tokens in architecture["tokens"]]
            rows.append(
                [
                    Cell(row["name"]),
                    Cell(str(seed)),
                    Cell(" → ".join(architecture["operations"])),
                    Cell(", ".join(map(str, lengths))),
                    Cell(str(sum(lengths))),
                    Cell("-" if architecture["lost"] is None else f"{architecture['lost']:+.2f}"),
                ]
            )
    note = (
        "Each seed has searched for itself. Lost: average just before discretisation less that just after, in points "
        "(100 times the score)."
    )
    header = ("method", "seed", "cells", "tokens kept by layer", "in all", "lost")
    return Table("What the searches found", note, header, rows) if rows else None
