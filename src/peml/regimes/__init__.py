"""Regimes: ways to train the parts of a method, one file each; all of them drive the same trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console

from peml.regimes.distil_then_adapt import distil_then_adapt
from peml.regimes.grouped import again_recipe, grouped, retrain_cluster
from peml.regimes.grow import grow, grown_recipe
from peml.regimes.retrain import retrain
from peml.regimes.sequential import sequential
from peml.training.folder import RunFolder
from peml.training.launch import Launch
from peml.training.recipe import Recipe, load_recipe
from peml.training.run import joint
from peml.training.workbench import Workbench


class Regime(Protocol):
    """What trains a recipe."""

    def __call__(self, recipe: Recipe, launch: Launch) -> RunFolder:
        """Train, and write the run's folder."""


REGIMES: Mapping[str, Regime] = {
    "joint": joint,
    "distil_then_adapt": distil_then_adapt,
    "grow": grow,
    "sequential": sequential,
    # These differ in the trainer's steps alone.
    "alternate": joint,
    "unrolled": joint,
    "retrain": retrain,
    # One training too, behind the choice of groups.
    "one_plus_n": grouped,
    "progressive": grouped,
    "retrain_cluster": retrain_cluster,
}
"""Every regime by the name that recipes and methods have for it."""


def train(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    workbench: Workbench | None = None,
) -> RunFolder:
    """Train one adapter on the tasks of a recipe, as its regime says, and write its run folder.

    Args:
        recipe: a recipe or the path of one.
        output: folder of the run; default `train.output_dir`, else `runs/` and the recipe's name.
        resume: go on from the last complete checkpoint in the folder.
        overwrite: replace a run that lies there.
        console: where progress is shown; None: nowhere.
        workbench: model and rows that are loaded already; its model gets the adapter.

    Raises:
        PemlError: bad input, before anything is written; or a training that diverged, before its adapter is.
    """
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "run"
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    folder = Path(output or recipe.train.get("output_dir") or Path("runs") / name).expanduser()
    return REGIMES[recipe.how.name](recipe, Launch(folder, resume, overwrite, console, workbench))


__all__ = ["REGIMES", "again_recipe", "grown_recipe", "train"]
