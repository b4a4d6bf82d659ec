"""Search, then train what was found from the start."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from peft import PeftModel

from peml.prompts import Architecture, PrefixNAS
from peml.regimes.stages import Part, in_turn
from peml.training.folder import RunFolder
from peml.training.launch import Launch
from peml.training.recipe import Recipe
from peml.training.run import Stage, attach
from peml.training.streaming import training_rows
from peml.training.workbench import Workbench, prepare


def retrain(recipe: Recipe, launch: Launch) -> RunFolder:
    """Train jointly with a search, throw the weights away, and train a fresh adapter with the architecture.

    Paper: DARTS, arXiv:1806.09055, section 2.4, retrains what it has found. Our choice: all steps again, with the same
    seed, so that search and training are each as long as a joint training; the bill of the run holds both.

    Args:
        recipe: of both stages.
        launch: where, and what is there already.

    Raises:
        PemlError: bad input, before anything is written; or a stage that diverged.
    """

    def prepared(folder: RunFolder) -> dict[str, Part]:
        bench = launch.workbench or prepare(recipe)
        training_rows(bench)
        bench.check()
        found = RunFolder(folder.stages / "search").architecture
        search = recipe.stage(list(bench.tasks), evaluate_before=False)
        return {
            "search": Part(search, bench, Stage()),
            "training": Part(recipe, bench, Stage(attach=lambda bench: _with(bench, found), begin=lambda model: None)),
        }

    return in_turn(recipe, launch, prepared)


def _with(bench: Workbench, found: Path) -> PeftModel:
    """A fresh adapter with an architecture that was found."""
    config = bench.config()
    assert isinstance(config.prompt, PrefixNAS)
    config.prompt = dataclasses.replace(config.prompt, architecture=Architecture.load(found))
    return attach(bench.model, config)
