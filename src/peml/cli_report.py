"""What `peml train`, `peml evaluate` and `peml tasks check` print."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peml.training.check import Report, TaskCheck

# Under `accelerate launch` every process runs a command; the first one speaks.
console = Console(quiet=os.environ.get("RANK", "0") != "0")


def show_report(report: Report, show: int, console: Console) -> None:
    """A table of rows and lengths, then notes and problems by task, of each file the first `show`."""
    table = Table("task", "kind", "split")
    for word in ("rows", "tokens", "95 %", "most", "cut"):
        table.add_column(word, justify="right")
    table.add_column("answers")
    for task in report.tasks:
        for index, split in enumerate(("train", "eval")):
            lengths = task.lengths.get(split)
            numbers = [lengths.median, lengths.most, lengths.longest, lengths.cut] if lengths else []
            cells = [f"{number:,}" for number in numbers] or [""] * 4
            first = ["", ""] if index else [Text(task.name), task.kind]
            table.add_row(*first, split, f"{task.rows.get(split, 0):,}", *cells, _answers(task, split))
    console.print(table)
    if report.unread:
        console.print(Text(f"no lengths: {report.unread}", "yellow"), soft_wrap=True)
    for task in report.tasks:
        for note in task.notes:
            console.print(Text(f"note: {task.name}: {note}", "yellow"), soft_wrap=True)
    for task in report.tasks:
        for file, problems in task.by_file().items():
            for problem in problems[:show]:
                console.print(Text.assemble(("error: ", "bold red"), problem.message), soft_wrap=True)
            if len(problems) > show:
                console.print(Text(f"       and {len(problems) - show:,} more in {file}", "red"), soft_wrap=True)
    good = sum(sum(task.rows.values()) for task in report.tasks)
    count = sum(len(task.problems) for task in report.tasks)
    found = "no problem" if not count else "1 problem" if count == 1 else f"{count:,} problems"
    console.print(f"{good:,} good rows, {found}", style="bold" if not count else "bold red", highlight=False)


def scores_table(metrics: Mapping[str, Any], columns: Sequence[str]) -> Table:
    """Every metric of every task, then averages.

    Args:
        metrics: `metrics.json`, or a record of `peml.evaluation.ablation_record`.
        columns: keys of it, such as `before` and `after`; the last one has all tasks.
    """
    table = Table("task", "metric")
    for column in columns:
        table.add_column(column, justify="right")
    for task, scores in metrics[columns[-1]].items():
        others = [value for metric, value in scores.items() if metric not in ("n", "loss", "score")]
        # Of a task with one metric that counts, the score is that metric.
        hidden = ("n", "score") if scores.get("score") in others else ("n",)
        for metric in scores:
            if metric not in hidden:
                cells = [f"{metrics[column][task][metric]:.3f}" for column in columns]
                table.add_row(escape(f"{task} (n {scores['n']:.0f})"), metric, *cells)
    table.add_section()
    suites = metrics.get("suites", {})
    for suite in suites.get(columns[-1], {}):
        table.add_row(escape(suite), "suite", *[f"{suites[c][suite]:.3f}" for c in columns])
    table.add_row("average", "score", *[f"{metrics['average'][c]:.3f}" for c in columns], style="bold")
    return table


def harness_table(results: Mapping[str, Any]) -> Table:
    """What lm-eval has found: every metric of every task and group, under its own names.

    Args:
        results: of `peml.harness.measure_run`.
    """
    table = Table("task", "shots", "metric", "filter")
    for word in ("value", "standard error"):
        table.add_column(word, justify="right")
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        shots = results.get("n-shot", {}).get(task, "")
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kept}")
            numbers = [f"{number:.4f}" if isinstance(number, float) else "" for number in (value, error)]
            table.add_row(Text(task), str(shots), metric, kept, *numbers)
    return table


def contributions_table(contributions: Mapping[str, Any]) -> Table:
    """What each part gives to each task's score, in its unit; what a part takes away is red.

    Args:
        contributions: by part, as `peml.evaluation.ablation_record` has them.
    """
    table = Table("task", title="whole, less the score without", title_justify="left")
    for part in contributions:
        table.add_column(part, justify="right")
    for task in next(iter(contributions.values()))["tasks"]:
        table.add_row(Text(task), *[_signed(own["tasks"][task]) for own in contributions.values()])
    table.add_section()
    table.add_row("average", *[_signed(own["average"]) for own in contributions.values()], style="bold")
    return table


def _signed(value: float) -> Text:
    # Rounded first: what is shown as zero has no sign.
    value = round(value, 3)
    return Text(f"{value:+.3f}" if value else "0.000", "red" if value < 0 else "")


def _answers(task: TaskCheck, split: str) -> Text:
    answers = task.answers.get(split, {})
    if task.kind == "regress":
        return Text(", ".join(f"{name} {value:.3g}" for name, value in answers.items()))
    total = sum(answers.values())
    shares = [f"{name} {count / total:.1%}" for name, count in list(answers.items())[:8]]
    return Text(", ".join(shares + ["..."] * (len(answers) > 8)))
