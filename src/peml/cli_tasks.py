"""`peml tasks`: what there is to train on, and what a model will see of it."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from peml.cli_report import console, show_report
from peml.errors import PemlError

if TYPE_CHECKING:
    from peml.tasks import Example, Task


class _OrSuite(TyperGroup):
    """A first word that is no command is the name of a suite."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put `list` in front of the name of a suite."""
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["list", *args])


class Rows(str, Enum):
    """Rows to show."""

    train = "train"
    eval = "eval"


tasks_app = typer.Typer(
    help="List the built-in suites and their tasks, and show rows as a model sees them.",
    cls=_OrSuite,
    invoke_without_command=True,
)


@tasks_app.callback()
def _every(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_tasks(None)


@tasks_app.command(name="list")
def list_tasks(suite: Annotated[str | None, typer.Argument(help="One suite; default all.")] = None) -> None:
    """List the built-in suites and their tasks."""
    from peml.tasks import SUITES, suite_tasks

    table = Table(Column("task", no_wrap=True), "kind", "choices", "metrics", "rows from", box=None)
    for name in SUITES if suite is None else [suite]:
        groups = SUITES[name].groups if name in SUITES else {}
        if suite is None and groups:
            # All of them would hide the other suites; `peml tasks NAME` lists them.
            for group, members in groups.items():
                first = suite_tasks(name, [group])[0]
                table.add_row(f"{name}: {group} ({len(members)})", *_columns(first)[:-1], _origin(first))
            continue
        for task in suite_tasks(name):
            table.add_row(f"{name}/{task.name}", *_columns(task))
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
    from peml.training.check import check_tasks

    with Console(quiet=as_json or not console.is_terminal).status("reading rows"):
        report = check_tasks(recipe, model)
    if as_json:
        print(json.dumps(report.to_dict(show), indent=2))
    else:
        show_report(report, show, console)
    if not report.clean:
        raise typer.Exit(2)


@tasks_app.command()
def show(
    target: Annotated[str, typer.Argument(help="SUITE, SUITE/TASK, RECIPE.yaml or RECIPE.yaml:TASK.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of each task.")] = 3,
    split: Annotated[Rows, typer.Option(help="Training or evaluation rows.")] = Rows.train,
    path: Annotated[Path | None, typer.Option(help="Local folder of the suite; default the Hub.")] = None,
    few_shot: Annotated[int, typer.Option(min=0, help="Answered examples in front of each prompt.")] = 0,
    model: Annotated[str | None, typer.Option(help="Count tokens for this model, a Hub id or a folder.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest row in tokens; default the recipe's or 512.")
    ] = None,
) -> None:
    """Show rows as the model will see them."""
    from peml.training.arguments import DEFAULTS

    tasks, longest = _named(target, path, few_shot)
    counter = None if model is None else _Counter(model, max_length or longest or int(DEFAULTS["max_length"]))
    for task in tasks:
        for number, example in enumerate(task.examples(split.value, rows), 1):
            console.print(_shown(task, example, f"{split.value} {number}", counter), soft_wrap=True, highlight=False)


def _columns(task: Task) -> tuple[str, str, str, str]:
    choices = task.choices if isinstance(task.choices, str) else ", ".join(task.choices or ("-",))
    return task.kind, choices, ", ".join(task.metrics), str(task.source)


def _origin(task: Task) -> str:
    from peml.tasks import SuiteSource

    return (task.source.published.hub if isinstance(task.source, SuiteSource) else None) or str(task.source)


def _named(target: str, path: Path | None, few_shot: int) -> tuple[list[Task], int | None]:
    """The tasks that the user names, and the recipe's longest row."""
    from peml.tasks import suite_tasks
    from peml.training.recipe import load_recipe

    file, _, one = target.partition(":")
    if Path(file).suffix.lower() in (".yaml", ".yml"):
        if path is not None:
            raise PemlError("--path goes with a suite: a recipe names its own folders")
        recipe = load_recipe(file)
        tasks = recipe.every_task()
        names = [task.name for task in tasks]
        if one and one not in names:
            raise PemlError(f"{file} has no task {one!r}; it has {', '.join(names)}")
        chosen = [task for task in tasks if not one or task.name == one]
        longest = recipe.setting("max_length")
    else:
        suite, _, name = target.partition("/")
        chosen = suite_tasks(suite, [name] if name else None, path=None if path is None else str(path))
        longest = None
    if few_shot:
        chosen = [dataclasses.replace(task, few_shot=few_shot) for task in chosen]
    return chosen, longest


class _Counter:
    """Counts the tokens of examples as a model reads them.

    Args:
        model: Hub id or folder; its weights are not loaded.
        max_length: longest row.
    """

    def __init__(self, model: str, max_length: int) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from peml.training.workbench import form_for, model_path

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model_path(model))
            self.form = form_for(AutoConfig.from_pretrained(model_path(model)))
        except Exception as error:  # hub, network and tokenizer classes fail in their own ways
            raise PemlError(
                f"--model {model} could not be loaded ({type(error).__name__}); give a Hub id or a model's folder"
            ) from error
        self.max_length = max_length

    def __call__(self, example: Example) -> str:
        """How many tokens there are, and what is left of a row that is too long."""
        from peml.training.data import ENCODE

        (encoded,) = ENCODE[self.form](self.tokenizer, [example], self.max_length)
        count = f"{len(encoded.input_ids)} of at most {self.max_length}"
        if not encoded.truncated:
            return count
        return f"{count}, truncated to: {self.tokenizer.decode(encoded.input_ids)}"


def _shown(task: Task, example: Example, title: str, counter: _Counter | None) -> Text:
    lines = [*(example.turns or [("prompt", example.prompt)]), ("answer", example.answer)]
    if example.references:
        lines.append(("also right", " | ".join(example.references)))
    if example.choices:
        lines.append(("choices", " | ".join(example.choices)))
    if example.group:
        lines.append(("group", example.group))
    names = ("encoder",) if len(example.texts) == 1 else ("encoder 1", "encoder 2")
    lines += zip(names, example.texts, strict=False)
    if counter is not None:
        lines.append(("tokens", counter(example)))
    suite = f"{task.suite}/" if task.suite else ""
    text = Text(f"{suite}{task.name}, {title}", style="bold").append(f"  {example.origin}\n", style="dim")
    for name, value in lines:
        text.append(f"  {name:<10} ", style="cyan")
        text.append(value.replace("\n", "\n" + " " * 13) + "\n", style="default")
    return text
