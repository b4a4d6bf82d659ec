"""`peml affinity` and `peml transfer`: which tasks help each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peml.errors import PemlError

console = Console()


def affinity(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the result; default runs/NAME-affinity.")] = None,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of a LoRA that all tasks share, before measuring.")] = 100,
    batches: Annotated[int, typer.Option(min=1, help="Batches that are averaged over.")] = 20,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each task in a batch.")] = 16,
    clusters: Annotated[int | None, typer.Option(help="Number of clusters; default: as many as fit best.")] = None,
    lookahead: Annotated[
        float | None, typer.Option(help="Also look ahead by a step of this share of the weights, e.g. 0.001.")
    ] = None,
    by: Annotated[str, typer.Option(help="What is clustered: cosine or lookahead.")] = "cosine",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a measurement that lies there.")] = False,
) -> None:
    """Measure how alike the gradients of a recipe's tasks are, and suggest which of them should share an adapter."""
    from peml.affinity import How, find_affinity, show_affinity, write_affinity
    from peml.training.recipe import load_recipe

    how = How(warmup, batches, rows, lookahead, by, clusters)
    folder = output or Path("runs") / f"{recipe.stem}-affinity"
    if (folder / "affinity.json").exists() and not overwrite:
        raise PemlError(f"{folder} holds a measurement: add --overwrite, or another --output")
    if folder.is_file():
        raise PemlError(f"{folder} is a file: give a folder")
    found = find_affinity(load_recipe(recipe), how, console=console)
    write_affinity(found, folder)
    show_affinity(found, console)
    console.print(f"in {escape(str(folder))}: affinity.json, affinity.svg", soft_wrap=True, highlight=False)


def transfer(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; default runs/NAME-transfer.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Also train all tasks but each, to see which partner hurts.")
    ] = False,
) -> None:
    """Train the tasks of a recipe together and each alone, and report what each gains or loses."""
    from peml import regimes
    from peml.affinity.transfer import transfer as compare
    from peml.training.recipe import load_recipe

    folder = output or Path("runs") / f"{recipe.stem}-transfer"
    record = compare(
        load_recipe(recipe),
        folder,
        regimes.train,
        seeds=range(seeds),
        leave_one_out=leave_one_out,
        report=lambda line: console.print(Text(line, "dim")),
    )
    console.print(_transfers(record))
    console.print(f"in {escape(str(folder / 'transfer.json'))}", soft_wrap=True, highlight=False)


def _transfers(record: Mapping[str, Any]) -> Table:
    """Differences of scores; what is lost is red."""
    partners = record["partners"]
    table = Table("task", "together, less alone", title="score, mean and standard deviation", title_justify="left")
    for other in partners:
        table.add_column(Text(f"with, less without {other}"))
    for task, own in record["transfer"].items():
        others = [_cell(partners[task].get(other)) for other in partners]
        table.add_row(Text(task), _cell(own), *others)
    return table


def _cell(difference: Mapping[str, Any] | None) -> Text:
    if difference is None:
        return Text("-", "dim")
    mean, spread = difference["mean"], difference["spread"]
    shown = f"{mean:+.3f}" + ("" if spread is None else f" +- {spread:.3f}")
    return Text(shown, "red" if round(mean, 3) < 0 else "")
