"""`peml tune`: trainings of one recipe with other values, chosen by TPE, stopped early where they fall behind."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from peml import regimes
from peml.errors import PemlError
from peml.evaluation import average
from peml.tasks import Task
from peml.training.data import TaskRows
from peml.training.ranges import Tune
from peml.training.recipe import Recipe, load_recipe
from peml.training.regime import Grow
from peml.training.run import attach
from peml.training.streaming import training_rows
from peml.training.workbench import Workbench, load_base, prepare
from peml.tuning.folder import STUDY, TuneFolder, devices, optuna
from peml.tuning.show import TuningView
from peml.tuning.space import default_ranges, measurements, own_values, recipe_with, suggest, trial_recipe, values_of
from peml.tuning.summary import bill_of, summary_of


def tune(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    trials: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_adapters: bool = False,
    console: Console | None = None,
) -> TuneFolder:
    """Look for the values of a recipe that score best on rows held out of its training rows.

    Optuna's TPE (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", section 4) chooses the values of
    each trial from the trials before; the first is the recipe as it stands. What it draws follows from `tune.seed` and
    the number of the trial, and a trial is stored when it has ended, in one piece: a tuning that was killed and goes on
    tries what an uninterrupted one would have. The evaluation rows are never read.

    Args:
        recipe: a recipe or the path of one; its section `tune` says what is tried.
        output: folder of the tuning; default `runs/`, the recipe's name and `-tune`.
        trials: how many in all; None: as the recipe says.
        resume: go on with the trials that lie there.
        overwrite: replace them.
        keep_adapters: keep the weights of every trial.
        console: where progress is shown; None: nowhere.

    Raises:
        PemlError: bad input, before the first trial; or no trial that came to its end. A trial that fails is recorded.
    """
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "run"
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PemlError("peml tune runs in one process: start it without `accelerate launch`")
    recipe = with_section(recipe, trials)
    folder = TuneFolder(output or Path("runs") / f"{name}-tune")
    console = console or Console(quiet=True)
    optuna()
    folder.check(recipe, resume=resume, overwrite=overwrite)
    with console.status("reading rows, loading the model"):
        bench, data = _tried_out(recipe)
    with folder.alone():
        folder.create(recipe, overwrite=overwrite)
        return _Tuning(recipe, folder, bench, data, keep_adapters).run(console)


def with_section(recipe: Recipe, trials: int | None = None) -> Recipe:
    """The recipe with its section `tune` in full.

    Raises:
        PemlError: a number of trials below 1, or a recipe that measures on rows held out already.
    """
    if recipe.held_out is not None:
        # Both are the first of the same shuffled rows: the run would be measured on those that chose its values.
        raise PemlError("held_out takes the rows that trials are measured on: leave it out, tune.held_out is theirs")
    section = recipe.tune or Tune()
    if trials is not None and trials < 1:
        raise PemlError(f"--trials must be 1 or more, not {trials}")
    update: dict[str, Any] = {} if trials is None else {"trials": trials}
    update |= {} if section.ranges else {"ranges": default_ranges(recipe)}
    return recipe.model_copy(update={"tune": section.model_copy(update=update)})


def _tried_out(recipe: Recipe) -> tuple[Workbench, dict[str, Any]]:
    """Rows and model of the recipe as it stands, and a fingerprint of the rows: what is wrong with it is said now."""
    own = trial_recipe(recipe, {})
    measurements(own)
    how = own.how
    bench = prepare(
        own, trained=how.trained([task.name for task in own.build_tasks()]) if isinstance(how, Grow) else None
    )
    rows = training_rows(bench)
    bench.check()
    attach(bench.model, bench.config())
    held = TaskRows.encode(bench.tokenizer, bench.eval, bench.max_length, bench.form)
    return bench, {"train": rows.digest(), "held_out": held.digest()}


class _Tuning:
    """One tuning while it goes on.

    The study in memory is the one that Optuna works on; the one in the file gets each trial when it is over.
    """

    def __init__(
        self, recipe: Recipe, folder: TuneFolder, bench: Workbench, data: Mapping[str, Any], keep_adapters: bool
    ) -> None:
        assert recipe.tune is not None
        self.recipe, self.section, self.folder, self.keep_adapters = recipe, recipe.tune, folder, keep_adapters
        # The base model of the check is let go: every trial loads its own, so that none inherits from another.
        self.tasks, self.train, self.eval = bench.tasks, bench.train, bench.eval
        self.direction = "minimize" if self.section.metric.endswith("/loss") else "maximize"
        self.stored = folder.open_study(self.direction)
        asked = recipe.model_copy(update={"tune": self.section.model_copy(update={"trials": 1})})
        own = {"recipe": hashlib.sha256(asked.to_yaml().encode()).hexdigest(), "data": dict(data)}
        for key, what in (("recipe", "recipe is not that"), ("data", "rows are not those")):
            if self.stored.user_attrs.get(key, own[key]) != own[key]:
                raise PemlError(f"--resume: the {what} which {folder.study} was begun with: choose another --output")
        for key, value in own.items():
            self.stored.set_user_attr(key, value)
        self.last = measurements(trial_recipe(recipe, {}))
        self.study = optuna().create_study(direction=self.direction, study_name=STUDY, pruner=self._pruner())
        self.study.add_trials(self.stored.trials)

    def _pruner(self) -> Any:
        pruners = optuna().pruners
        if self.section.pruner == "none":
            return pruners.NopPruner()
        if self.section.pruner == "hyperband":
            # With five measurements a factor of two gives three brackets, the usual three only two: our choice.
            return pruners.HyperbandPruner(min_resource=1, max_resource=self.last, reduction_factor=2)
        return pruners.MedianPruner()

    def run(self, console: Console) -> TuneFolder:
        """The trials that are left."""
        count = len(self.study.trials)
        if count and not self.keep_adapters:
            self.folder.lighten(count - 1)
        if lost := self.folder.drop_unfinished(count):
            self.stored.set_user_attr("lost_seconds", self.stored.user_attrs.get("lost_seconds", 0.0) + lost)
        self._write()
        with TuningView(console, self.section, self.study, self.last) as view:
            for number in range(count, self.section.trials):
                view.begin(number)
                self._trial(number, view)
                self._write()
        self._write(importances=True)
        ended = [trial for trial in self.study.trials if trial.state.name == "COMPLETE"]
        if not ended:
            why = next(
                (t.user_attrs["error"] for t in self.study.trials if "error" in t.user_attrs), "all were stopped"
            )
            raise PemlError(f"no trial in {self.folder.path} came to its end; the first: {why}")
        return self.folder

    def _trial(self, number: int, view: TuningView) -> None:
        states = optuna().trial.TrialState
        # A sampler of its own for every trial: what it draws must not hang on what this process has drawn before.
        seed = int(np.random.SeedSequence([self.section.seed, number]).generate_state(1)[0])
        self.study.sampler = optuna().samplers.TPESampler(seed=seed)
        if number == 0:
            self.study.enqueue_trial(own_values(self.recipe, self.section.ranges))
        trial = self.study.ask()
        values = suggest(trial, self.section.ranges)
        begun = time.perf_counter()
        value: float | None = None
        try:
            value = self._train(number, values, self._watch(trial, view))
            state = states.COMPLETE
        except optuna().TrialPruned:
            state = states.PRUNED
        # torch says by a RuntimeError that memory is out, and most of what a value of the ranges makes impossible.
        except (PemlError, RuntimeError) as error:
            state = states.FAIL
            trial.set_user_attr("error", " ".join(str(error).split()))
        seconds = time.perf_counter() - begun
        trial.set_user_attr("seconds", round(seconds, 3))
        trial.set_user_attr("device_hours", seconds * devices()["count"] / 3600)
        self.study.tell(trial, value, state=state)
        self.stored.add_trial(self.study.trials[number])
        if not self.keep_adapters:
            self.folder.lighten(number)
        # Trainer and model hold each other, and would stay beside those of the next trial.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _train(self, number: int, values: Mapping[str, Any], watch: Callable[[Any], None]) -> float:
        recipe = trial_recipe(self.recipe, values)
        tokenizer, model = load_base(recipe)
        bench = Workbench(recipe, tokenizer, model, self.tasks, self.train, self.eval, watch)
        run = regimes.train(recipe, self.folder.trial(number).path, workbench=bench)
        return measured(self.section.metric, run.read_metrics()["after"], self.tasks)

    def _watch(self, trial: Any, view: TuningView) -> Callable[[Any], None]:
        """Told of each measurement of a trial: reports it, and stops the trial if it has fallen behind."""
        seen = 0

        def watch(results: Mapping[str, Mapping[str, float]]) -> None:
            nonlocal seen
            seen += 1
            value = measured(self.section.metric, results, self.tasks)
            if not math.isfinite(value):
                raise PemlError(f"training diverged: {self.section.metric} is no number at measurement {seen}")
            view.measured(seen, value)
            trial.report(value, seen)
            # At its end a trial has cost all that it can.
            if seen < self.last and trial.should_prune():
                raise optuna().TrialPruned

        return watch

    def _write(self, importances: bool = False) -> None:
        summary = summary_of(self.study, self.section, self.stored.user_attrs.get("lost_seconds", 0.0), importances)
        # The summary comes last: who finds all trials in it may take the best recipe.
        if summary["best"] is not None:
            best = self.study.best_trial
            values = values_of(best.params, self.section.ranges)
            tuned = bill_of(summary) | {"metric": self.section.metric, "value": best.value}
            self.folder.write_best(recipe_with(self.recipe, values, tuned=tuned))
        self.folder.write_summary(summary)


def measured(metric: str, results: Mapping[str, Mapping[str, float]], tasks: Mapping[str, Task]) -> float:
    """The number that trials are compared by.

    Args:
        metric: `average`, or `TASK/METRIC`.
        results: metrics by task.
        tasks: by name.
    """
    if metric == "average":
        return average(results, tasks)
    task, _, name = metric.rpartition("/")
    if task not in results:  # a metric of a group, `accuracy/x`
        task, _, name = metric.partition("/")
    return float(results[task][name])
