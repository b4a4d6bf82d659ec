"""`peml tasks`: what there is to train on, and what a model will see of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup


class _OrSuite(TyperGroup):
    """A first word that is no command is the name of a suite."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple:  # type: ignore[type-arg, override]
        """Put `list` in front of the name of a suite."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["list", *args]
        return super().resolve_command(ctx, args)


tasks_app = typer.Typer(
    help="List the built-in suites and their tasks, and show rows as a model sees them.",
    cls=_OrSuite,
    invoke_without_command=True,
)
# Under `accelerate launch` every process runs this file; the first one speaks.
console = Console(quiet=os.environ.get("RANK", "0") != "0")


@tasks_app.callback()
def _every(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_tasks(None)


@tasks_app.command(name="list")
def list_tasks(suite: Annotated[str | None, typer.Argument(help="One suite; default all.")] = None) -> None:
    """List the built-in suites and their tasks."""
    from peml.tasks import SUITES, suite_tasks

    table = Table("task", "kind", "choices", "metrics", "rows from")
    for name in SUITES if suite is None else [suite]:
        for task in suite_tasks(name):
            choices = task.choices if isinstance(task.choices, str) else ", ".join(task.choices or ("-",))
            table.add_row(f"{name}/{task.name}", task.kind, choices, ", ".join(task.metrics), str(task.source))
    console.print(table)


@tasks_app.command(name="check")
def check_tasks(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer that measures lengths; default the recipe's.")
    ] = None,
    show: Annotated[int, typer.Option(min=1, help="Problems shown of each file.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Read every row of every task before any training; exit code 2 if training would stop."""
    from peml.cli_report import show_report
    from peml.training.check import check_tasks

    with Console(quiet=as_json or not console.is_terminal).status("reading rows"):
        report = check_tasks(recipe, model)
    if as_json:
        print(json.dumps(report.to_dict(show), indent=2))
    else:
        show_report(report, show, console)
    if not report.clean:
        raise typer.Exit(2)
