"""`peml plan`: what a recipe costs, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    gpus: Annotated[int, typer.Option(min=1, help="Devices that train together.")] = 1,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of each, in 10^9 bytes: says what fits.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="Folder with a config.json, in place of the recipe's model.")
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Number of tasks, in place of the recipe's.")
    ] = None,
) -> None:
    """Work out the memory of a training, and what it sends between devices, by formula; reads no weights, no rows."""
    from peml.planning import plan as work_out
    from peml.planning import show_plan

    show_plan(work_out(recipe, gpus, model_config, tasks), Console(), memory)
