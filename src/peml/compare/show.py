"""What a comparison shows on the terminal: which jobs are where, and the table at the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peml.compare.folder import Job
from peml.compare.plan import Plan
from peml.compare.words import average_words, count_words, interval_words, p_words, signed
from peml.training.folder import RunFolder
from peml.training.progress import LiveView


class CompareView(LiveView):
    """One row for each method, one cell for each of its jobs, while they go on.

    Args:
        console: where.
        plan: what is compared.
        jobs: all of them.
    """

    def __init__(self, console: Console, plan: Plan, jobs: Sequence[Job]) -> None:
        self.plan, self.jobs = plan, jobs
        train = plan.recipe.train
        # How many steps epochs are, the runs alone know.
        counted = "max_steps" in train or "num_train_epochs" not in train
        self.steps = int(plan.recipe.setting("max_steps")) if counted else 0
        self.live = Live(self._table(set(), set(), {}), console=console, transient=True, refresh_per_second=2)

    def update(self, done: Collection[Job], running: Collection[Job], failures: Mapping[str, str]) -> None:
        """Where the jobs are now."""
        self.live.update(self._table(done, running, failures))

    def _table(self, done: Collection[Job], running: Collection[Job], failures: Mapping[str, str]) -> Table:
        table = Table("method", title=f"{len(done)} of {len(self.jobs)} jobs", title_justify="left")
        columns = list(dict.fromkeys(_column(job) for job in self.jobs))
        for column in columns:
            table.add_column(column, justify="right")
        for entry in self.plan.entries:
            own = {_column(job): job for job in self.jobs if job.method == entry.name}
            cells = [self._cell(own[c], done, running, failures) if c in own else Text() for c in columns]
            table.add_row(Text(entry.name), *cells)
        return table

    def _cell(self, job: Job, done: Collection[Job], running: Collection[Job], failures: Mapping[str, str]) -> Text:
        if job.name in failures:
            return Text("failed", "red")
        if job in done:
            metrics = RunFolder(job.output).read_metrics() if job.kind == "train" else {}
            return Text(f"{metrics['average']['after']:.3f}" if metrics else "done", "green")
        if job in running and job.kind == "train":
            # Of jobs that wait for a worker nothing is logged yet.
            step = job.progress()
            return Text(f"{step / self.steps:.0%}" if self.steps and step else "...")
        return Text("..." if job in running else "-", "dim")


def _column(job: Job) -> str:
    return f"seed {job.seed}" if job.kind == "train" else job.kind


def results_table(results: Mapping[str, Any]) -> Table:
    """Mean and standard deviation of every method over its seeds, and its test; costs are in the report.

    Args:
        results: `results.json`.
    """
    seeds = len(results["seeds"])
    title = f"score on held-out rows, {seeds} seed{'s' if seeds > 1 else ''}, against {results['baseline']}"
    # Without lines between the columns it fits eighty letters.
    table = Table("method", title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("average", "gain", f"{results['level']:.0%}", "p", "rank", "trained"):
        table.add_column(column, justify="right")
    for row in results["methods"]:
        if row["average"] is None:
            table.add_row(Text(row["name"]), Text("failed", "red"))
            continue
        test = row["versus"] and row["versus"]["average"]
        style = "bold" if test and test["stands"] else ""
        table.add_row(
            Text(row["name"]),
            Text(average_words(row["average"]), style),
            Text(signed(test["gain"]), style) if test else "",
            interval_words(test["interval"], sign=True).strip() if test else "",
            p_words(test),
            "" if row["rank"] is None else f"{row['rank']:.2f}",
            count_words(row["parameters"]["trained"]),
        )
    return table
