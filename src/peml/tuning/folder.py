"""The folder of a tuning: Optuna's study in a file, what was tried as JSON, and the best recipe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from peml.errors import PemlError
from peml.training.folder import RESOLVED, RunFolder, alone, write_text
from peml.training.recipe import Recipe, load_recipe
from peml.training.run import check_same_recipe

STUDY = "peml"
"""Name of the study in its file; Hyperband's brackets hang on it."""

FOUND = "# Found by peml tune: trains as it is. Its values were chosen on rows held out of the training rows.\n"


def optuna() -> Any:
    """Optuna, which is imported where it is needed because it takes seconds.

    Raises:
        PemlError: it is not installed.
    """
    try:
        import optuna as found
    except ImportError:
        raise PemlError("tuning needs Optuna: pip install 'peml[tune]'") from None
    # Its own lines would tear the table apart.
    found.logging.set_verbosity(found.logging.WARNING)
    return found


class TuneFolder:
    """Names of a tuning's files.

    `recipe.yaml` (resolved), `study.db` (Optuna's, from which a tuning goes on), `trials.json`, `best.yaml`, and
    `trials/`, the runs without their weights.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.run = RunFolder(path)
        self.path = self.run.path
        self.recipe = self.run.recipe
        self.study = self.path / "study.db"
        self.summary = self.path / "trials.json"
        self.best = self.path / "best.yaml"
        self.trials = self.path / "trials"

    def trial(self, number: int) -> RunFolder:
        """The run of one trial."""
        return RunFolder(self.trials / f"{number:03}")

    def check(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
        """Refuse a folder that must not be touched, or a recipe other than the one it was begun with.

        Args:
            recipe: with the section `tune` as it is in force.
            resume: go on with what lies there.
            overwrite: replace it.

        Raises:
            PemlError: naming the folder or the key.
        """
        self.run.check(resume=resume, overwrite=overwrite)
        # A run whose recipe has a section `tune` looks like a tuning that has just begun.
        trained = any(part.exists() for part in (self.run.metrics, self.run.adapter, self.run.checkpoints))
        if overwrite and self.run.is_run and (trained or not self.study.exists()):
            raise PemlError(f"{self.path} holds no tuning: it is not overwritten")
        if resume and trained:
            raise PemlError(
                f"{self.path} holds a run and no tuning: there is nothing to resume, choose another --output"
            )
        if resume and self.run.is_run:
            before = load_recipe(self.recipe).tune
            if before is None:
                raise PemlError(f"{self.path} holds no tuning: there is nothing to resume")
            assert recipe.tune is not None
            # How many trials there are in all does not change those that have been.
            same = recipe.tune.model_copy(update={"trials": before.trials})
            check_same_recipe(recipe.model_copy(update={"tune": same}), self.run)

    def create(self, recipe: Recipe, *, overwrite: bool = False) -> None:
        """Make the folder, after `check`; of one that is overwritten only its own files are removed."""
        if overwrite:
            shutil.rmtree(self.trials, ignore_errors=True)
            for file in (self.study, self.study.with_name("study.db-journal"), self.summary, self.best):
                file.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe, recipe.to_yaml())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made, as long as the block lasts.

        Raises:
            PemlError: another one is at work in it.
        """
        with alone(self.path, "`peml tune`"):
            yield

    def open_study(self, direction: str) -> Any:
        """Optuna's study in its file.

        Raises:
            PemlError: the file is damaged.
        """
        library = optuna()
        try:
            return library.create_study(
                storage=f"sqlite:///{self.study.resolve()}", study_name=STUDY, direction=direction, load_if_exists=True
            )
        except Exception as error:  # SQL libraries have errors of their own
            raise PemlError(f"{self.study} is damaged ({type(error).__name__}): tune again with --overwrite") from error

    def write_best(self, recipe: Recipe) -> None:
        """The recipe with the best values so far."""
        write_text(self.best, FOUND + recipe.to_yaml().removeprefix(RESOLVED))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """What was tried."""
        self.run.write_json(self.summary, summary)

    def read_summary(self) -> dict[str, Any]:
        """What was tried."""
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary

    def lighten(self, number: int) -> None:
        """Remove the weights of a trial."""
        run = self.trial(number)
        for part in (run.adapter, run.checkpoints, run.stages):
            shutil.rmtree(part, ignore_errors=True)

    def drop_unfinished(self, number: int) -> float:
        """Remove what the study has not, from this trial on; the seconds that the logs of all stages have noted."""
        lost = 0.0
        for path in self.trials.glob("[0-9]*"):
            if path.name.isdigit() and int(path.name) >= number:
                lost += sum(RunFolder(log.parent).rewind_log(10**12) for log in path.rglob("log.jsonl"))
                shutil.rmtree(path)
        return lost


def devices() -> dict[str, Any]:
    """What an hour of a trial is counted of: a GPU, or the threads of this process where there is none."""
    if torch.cuda.is_available():
        return {"kind": "gpus", "count": 1}
    return {"kind": "cpu threads", "count": torch.get_num_threads()}
