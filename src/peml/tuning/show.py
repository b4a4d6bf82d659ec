"""What a tuning shows on the terminal: one table that lives, with a bar under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peml.training.progress import LiveView, progress_bar
from peml.training.ranges import Tune
from peml.tuning.summary import summary_of

_BEST = 10
"""Trials in the table."""


class TuningView(LiveView):
    """The best trials so far, and how far the present one is.

    Args:
        console: where.
        section: what was asked for.
        study: Optuna's, which grows.
        measurements: of one trial.
    """

    def __init__(self, console: Console, section: Tune, study: Any, measurements: int) -> None:
        self.section, self.study, self.measurements = section, study, measurements
        self.bar = progress_bar(console)
        self.all = self.bar.add_task("trials", total=section.trials)
        self.one = self.bar.add_task("", total=measurements, visible=False)
        self.live = Live(self._view(), console=console, transient=True, refresh_per_second=4)

    def begin(self, number: int) -> None:
        """A trial begins."""
        self.bar.update(self.all, completed=number)
        self.bar.update(self.one, completed=0, visible=True, description=f"trial {number}")
        self.live.update(self._view())

    def measured(self, count: int, value: float) -> None:
        """The present trial was measured."""
        number = len(self.study.trials) - 1
        self.bar.update(self.one, completed=count, description=f"trial {number} ({value:.3f})")

    def _view(self) -> Group:
        return Group(trials_table(summary_of(self.study, self.section, 0.0)), self.bar)


def trials_table(summary: Mapping[str, Any], most: int = _BEST) -> Table:
    """The best trials, then those that were stopped, then those that failed.

    Args:
        summary: `trials.json`.
        most: rows.
    """
    sign = 1 if summary["direction"] == "minimize" else -1
    order = ["complete", "pruned", "fail"]

    def rank(trial: Mapping[str, Any]) -> tuple[int, float]:
        value = trial["value"]
        return order.index(trial["state"]), 0.0 if value is None else sign * value

    trials = sorted(summary["trials"], key=rank)[:most]
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    table = Table("trial", escape(summary["metric"]))
    for key in keys:
        # The axis and the name on two lines: a table of ten keys still fits.
        table.add_column(Text(key.replace(".", ".\n", 1)), justify="right")
    table.add_column("seconds", justify="right")
    words = {"complete": "", "pruned": "stopped", "fail": "failed"}
    for trial in trials:
        value = "" if trial["value"] is None else f"{trial['value']:.3f}"
        said = " ".join(part for part in (value, words[trial["state"]]) if part)
        cells = [_shown(trial["values"][key]) if key in trial["values"] else "" for key in keys]
        style = "bold" if trial["number"] == summary["best"] else "" if trial["state"] == "complete" else "dim"
        table.add_row(str(trial["number"]), said, *cells, f"{trial['seconds']:.0f}", style=style)
    return table


def show_tuning(summary: Mapping[str, Any], console: Console) -> None:
    """The table, what mattered, and the bill."""
    console.print(trials_table(summary))
    if summary["importances"]:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in summary["importances"].items())
        console.print(Text(f"share of the differences that each explains: {shares}"), soft_wrap=True)
    states = [trial["state"] for trial in summary["trials"]]
    bill = summary["bill"]
    console.print(
        f"{len(states)} trials ({states.count('pruned')} stopped early, {states.count('fail')} failed), "
        f"{bill['wall_seconds']:.0f} s, {bill['device_hours']:.3g} device-hours ({bill['devices']['kind']})"
    )
    for trial in summary["trials"]:
        if trial["error"]:
            console.print(Text(f"trial {trial['number']} failed: {trial['error']}", "yellow"), soft_wrap=True)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
