"""The folder of a comparison, and the jobs that fill it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peml.compare.plan import Entry, Plan
from peml.errors import PemlError
from peml.training.folder import RESOLVED, RunFolder, write_text
from peml.training.recipe import Recipe, load_recipe
from peml.training.run import other_recipe
from peml.tuning.folder import TuneFolder

COMPARED = "# Compared by peml: what this comparison was made with.\n"
"""First line of the recipe in the folder of a comparison."""

Kind = Literal["tune", "train", "costs"]


@dataclass(frozen=True)
class Job:
    """One process of a comparison.

    Args:
        kind: what it does.
        method: name of the entry.
        seed: of a training; None: it belongs to the method as a whole.
        output: what it writes, a folder or a file.
        source: recipe, or run, that it starts from.
    """

    kind: Kind
    method: str
    seed: int | None
    output: Path
    source: Path

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.method}, seed {self.seed}" if self.kind == "train" else f"{self.kind} of {self.method}"

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.output.with_name(f"{self.output.stem}.log")

    @property
    def command(self) -> list[str]:
        """What it is told."""
        return [self.kind, str(self.source.resolve()), str(self.output.resolve())]

    def done(self, trials: int = 0) -> bool:
        """Whether it was brought to its end, now or before."""
        if self.kind == "train":
            return RunFolder(self.output).finished
        if self.kind == "costs":
            return self.output.exists()
        return TuneFolder(self.output).best.exists() and self.tried() >= trials

    def tried(self) -> int:
        """Trials of a tuning so far.

        Raises:
            PemlError: its record is damaged.
        """
        folder = TuneFolder(self.output)
        try:
            return len(folder.read_summary()["trials"]) if folder.summary.exists() else 0
        except (ValueError, KeyError, TypeError) as error:
            raise PemlError(f"{folder.summary} is damaged ({type(error).__name__}): remove {self.output}") from None

    def progress(self) -> int:
        """Steps of a training so far, as its log says."""
        try:
            lines = RunFolder(self.output).log.read_text(encoding="utf-8").strip().rsplit("\n", 1)
            return int(json.loads(lines[-1])["step"])
        except (OSError, ValueError, KeyError):
            return 0

    def failure(self, status: int = 1) -> str:
        """What ended it, or the last line of what it printed, of a trace the one that says what happened.

        Args:
            status: of its process; below zero: the signal that killed it, of which what it printed knows nothing.
        """
        if status < 0:
            memory = ", as Linux does where memory runs out" if status == -signal.SIGKILL else ""
            return f"it was killed by signal {-status}{memory}; what it printed is in {self.log}"
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
        except OSError:
            lines = []
        return lines[-1].removeprefix("error: ") if lines else "it ended without a word"


class CompareFolder:
    """Names of a comparison's files.

    `recipe.yaml` (resolved), `rows.json` (fingerprints of the tasks' rows), `results.json`, and of every method a
    folder with one run for each seed (`METHOD/0`), the recipe and the output of its process beside it (`0.yaml`,
    `0.log`), its tuning (`tune`) and its costs (`costs.json`).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.recipe = self.path / "recipe.yaml"
        self.rows = self.path / "rows.json"
        self.results = self.path / "results.json"

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> CompareFolder:
        """A folder that holds a comparison.

        Raises:
            PemlError: it does not.
        """
        folder = cls(path)
        if not folder.results.is_file() and folder._ours():
            raise PemlError(f"the comparison in {folder.path} was stopped: call `peml compare` again, it goes on")
        if not folder.results.is_file():
            raise PemlError(f"{folder.path} holds no comparison: there is no {folder.results.name} in it")
        return folder

    def read_results(self) -> dict[str, Any]:
        """`results.json`.

        Raises:
            PemlError: it is damaged.
        """
        try:
            results = self.read_json(self.results)
            if results["format"] != "peml-compare":
                raise ValueError("it is something else")
        except (ValueError, KeyError, TypeError) as error:
            raise PemlError(f"{self.results} is damaged ({error}): compare again") from None
        return results

    def read_json(self, path: Path) -> dict[str, Any]:
        """A JSON file of the folder."""
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replace `results.json` in one step."""
        RunFolder(self.path).write_json(self.results, results)

    def tuning(self, entry: Entry) -> Job:
        """The job that tunes a method."""
        folder = self.path / entry.folder
        return Job("tune", entry.name, None, folder / "tune", folder / "tune.yaml")

    def training(self, entry: Entry, seed: int) -> Job:
        """The job that trains a method once."""
        folder = self.path / entry.folder
        return Job("train", entry.name, seed, folder / str(seed), folder / f"{seed}.yaml")

    def costing(self, entry: Entry, seed: int) -> Job:
        """The job that measures what a trained method costs to run."""
        folder = self.path / entry.folder
        return Job("costs", entry.name, None, folder / "costs.json", folder / str(seed))

    def check(self, plan: Plan) -> None:
        """Refuse a folder of something else, and one with runs of another recipe; changes nothing.

        Raises:
            PemlError: naming the folder and the key.
        """
        if self.path.exists() and not self.path.is_dir():
            raise PemlError(f"{self.path} is a file: give a folder for the comparison")
        # The lock lies there before anything else.
        there = self.path.is_dir() and any(not part.name.startswith(".") for part in self.path.iterdir())
        if there and not self._ours():
            raise PemlError(f"{self.path} is not empty and holds no comparison: choose another --output")
        self._check_rows(plan.rows)
        for entry in plan.entries:
            tuned = entry.ranges is not None
            if tuned:
                self.check_tuning(entry, self.tuned_recipe(plan, entry))
                self._check_trials(plan, entry)
            for seed in plan.seeds:
                job = self.training(entry, seed)
                if not tuned or self.tuning(entry).done(plan.section.trials):
                    self.check_job(job, self.run_recipe(entry, seed))
                elif RunFolder(job.output).is_run:
                    raise PemlError(
                        f"the run in {job.output} was trained before all {plan.section.trials} trials of its tuning: "
                        "choose another --output, or remove that folder"
                    )

    def _check_rows(self, rows: Mapping[str, str]) -> None:
        """Refuse rows that have changed since the comparison began: its table would mix trainings on both.

        Raises:
            PemlError: naming the tasks.
        """
        try:
            before = self.read_json(self.rows) if self.rows.exists() else {}
        except ValueError as error:
            raise PemlError(f"{self.rows} is damaged ({error}): choose another --output") from None
        if changed := [name for name, mark in rows.items() if before.get(name, mark) != mark]:
            raise PemlError(
                f"the rows of {', '.join(changed)} have changed since the comparison in {self.path} began: "
                "choose another --output, or remove that folder"
            )

    def _ours(self) -> bool:
        try:
            return self.recipe.read_text(encoding="utf-8").startswith(COMPARED)
        except (OSError, UnicodeDecodeError):
            return False

    def check_job(self, job: Job, recipe: Recipe) -> None:
        """Refuse a run that another recipe has begun: the table would compare it with what it is not.

        Raises:
            PemlError: naming the key.
        """
        if (key := other_recipe(recipe, RunFolder(job.output))) is not None:
            raise PemlError(
                f"the run in {job.output} was made with another recipe ({key} differs): "
                "choose another --output, or remove that folder"
            )

    def check_tuning(self, entry: Entry, recipe: Recipe) -> None:
        """Refuse a tuning that another recipe has begun.

        Raises:
            PemlError: naming the folder and the key.
        """
        TuneFolder(self.tuning(entry).output).check(recipe, resume=True)

    def _check_trials(self, plan: Plan, entry: Entry) -> None:
        """Refuse a tuning that had more trials than the others will have.

        Raises:
            PemlError: naming the method.
        """
        job, trials = self.tuning(entry), plan.section.trials
        if (tried := job.tried()) > trials:
            raise PemlError(
                f"{entry.name} was tuned with {tried} trials in {job.output}, and {trials} are asked for: "
                f"ask for {tried}, or choose another --output"
            )

    def tuned_recipe(self, plan: Plan, entry: Entry) -> Recipe:
        """What a method is tuned with."""
        return entry.tuned_recipe(plan.recipe.tune, plan.section.trials, plan.seeds[0])

    def run_recipe(self, entry: Entry, seed: int) -> Recipe:
        """What a method is trained with: what its tuning has found, if it was tuned."""
        found = None if entry.ranges is None else load_recipe(TuneFolder(self.tuning(entry).output).best)
        return entry.recipe(seed, found)

    def create(self, plan: Plan) -> None:
        """Make the folder, after `check`."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe, COMPARED + plan.recipe.to_yaml().removeprefix(RESOLVED))
        RunFolder(self.path).write_json(self.rows, plan.rows)

    def begin(self, job: Job, recipe: Recipe | None) -> None:
        """Write what a job starts from, and clear away what a kill left before anything was stored."""
        job.output.parent.mkdir(parents=True, exist_ok=True)
        if recipe is not None:
            write_text(job.source, recipe.to_yaml())
        run = RunFolder(job.output)
        if job.kind == "train" and not run.is_run and run.path.is_dir():
            # transformers makes the folder for checkpoints before the recipe is written.
            left = [part for part in run.path.rglob("*") if not part.is_dir()]
            if all(part.name.startswith(".") for part in left):
                shutil.rmtree(run.path)

    def identities(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Fingerprint of the recipe of every training, by the name of the job."""
        return {
            job.name: hashlib.sha256(job.source.read_bytes()).hexdigest()
            for job in jobs
            if job.kind == "train" and job.source.is_file()
        }
