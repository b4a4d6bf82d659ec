"""`peml compare`: jobs that do not know of each other, and the table of what they found."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from peml.compare.folder import CompareFolder, Job
from peml.compare.plan import Plan, plan
from peml.compare.results import results_of
from peml.compare.runners import LocalRunner, RayRunner, Runner, share
from peml.compare.show import CompareView
from peml.errors import PemlError
from peml.training.folder import alone
from peml.training.recipe import Recipe, load_recipe

LOOK = 0.5
"""Seconds between two looks at the logs of what runs."""


def compare(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    baseline: str | None = None,
    trials: int | None = None,
    workers: int = 1,
    threads: int | None = None,
    ray: str | None = None,
    costs: bool = False,
    console: Console | None = None,
    runner: Runner | None = None,
) -> CompareFolder:
    """Train methods on the same rows, order, steps and budget of trained numbers, with several seeds each.

    Every training is a job in a folder of its own. Called again it does what is left: a job that was finished is not
    done again, one that was interrupted goes on from its last checkpoint, one that failed is tried again. Ctrl-C, or a
    SIGTERM in the main thread, stops the jobs and leaves the results of what is finished.

    Args:
        recipe: a recipe or the path of one; its section `compare` says what each method has of its own.
        output: folder; default `runs/`, the recipe's name and `-compare`.
        methods: names; None: those of the section.
        seeds: trainings of each method; None: as the section says.
        baseline: that the others are tested against; None: as the section says.
        trials: of each method's tuning, 0 for none; None: as the section says.
        workers: processes at a time.
        threads: of each; None: those of this process, shared evenly.
        ray: address of a Ray cluster ("auto", "local"); None: processes of this machine.
        costs: also measure what each trained method costs to run.
        console: where progress is shown; None: nowhere.
        runner: what runs the jobs; None: as `workers` and `ray` say.

    Raises:
        PemlError: bad input, before anything is written. A job that fails is recorded in `results.json`, and the rest
            go on.
        KeyboardInterrupt, SystemExit: it was stopped; `results.json` is written.
    """
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "run"
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    for key, value, least in (
        ("seeds", seeds, 1),
        ("trials", trials, 0),
        ("workers", workers, 1),
        ("threads", threads, 1),
    ):
        if value is not None and value < least:
            raise PemlError(f"--{key} must be {least} or more, not {value}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PemlError("peml compare starts processes of its own: start it without `accelerate launch`")
    folder = CompareFolder(output or Path("runs") / f"{name}-compare")
    console = console or Console(quiet=True)
    with console.status("reading rows, solving sizes"):
        whole = plan(recipe, methods, seeds=seeds, baseline=baseline, trials=trials)
        folder.check(whole)
    with alone(folder.path, "`peml compare`"):
        folder.create(whole)
        if runner is None:
            each = threads or share(workers)
            runner = LocalRunner(workers, each) if ray is None else RayRunner(ray, each)
        try:
            jobs = _Jobs(whole, folder, runner, costs)
            with _terminable():
                jobs.run(console)
        except (KeyboardInterrupt, SystemExit):
            # Before their folders are read.
            runner.close()
            jobs.stopped(console)
            raise
        finally:
            runner.close()
        folder.write_results(results_of(whole, folder, jobs.all, jobs.failures))
    return folder


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, with a shell's status for it; otherwise nothing is written."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Jobs:
    """The jobs of one comparison: what is finished, what runs, what waits for another."""

    def __init__(self, whole: Plan, folder: CompareFolder, runner: Runner, costs: bool) -> None:
        self.plan, self.folder, self.runner = whole, folder, runner
        self.all: list[Job] = []
        self.before: dict[Job, Job] = {}
        self.failures: dict[str, str] = {}
        first = whole.seeds[0]
        for entry in whole.entries:
            if entry.ranges is not None:
                self.all.append(folder.tuning(entry))
        # Seed by seed, so that what is there when somebody stops it compares.
        for seed in whole.seeds:
            for entry in whole.entries:
                job = folder.training(entry, seed)
                self.all.append(job)
                if entry.ranges is not None:
                    self.before[job] = folder.tuning(entry)
        if costs:
            for entry in whole.entries:
                job = folder.costing(entry, first)
                self.all.append(job)
                self.before[job] = folder.training(entry, first)
        self.done = {job for job in self.all if job.done(whole.section.trials)}
        self.running: dict[Future[int], Job] = {}

    def run(self, console: Console) -> None:
        """Everything that is left, to its end or its failure."""
        if self.done:
            console.print(f"{len(self.done)} of {len(self.all)} jobs are finished already")
        with CompareView(console, self.plan, self.all) as view:
            self._start()
            while self.running:
                ended, _ = wait(self.running, timeout=LOOK, return_when=FIRST_COMPLETED)
                for future in ended:
                    self._ended(self.running.pop(future), future)
                self._start()
                view.update(self.done, set(self.running.values()), self.failures)

    def stopped(self, console: Console) -> None:
        """Results of what is finished, after the jobs were stopped; one that came to its end just then counts."""
        for job in self.all:
            with suppress(PemlError):  # what cannot be read is not finished
                if job.done(self.plan.section.trials):
                    self.done.add(job)
        open_jobs = [job.name for job in self.all if job not in self.done and job.name not in self.failures]
        self.folder.write_results(results_of(self.plan, self.folder, self.all, self.failures, open_jobs))
        done = len(self.all) - len(open_jobs) - len(self.failures)
        console.print(
            f"stopped with {done} of {len(self.all)} jobs finished, whose results are in {self.folder.results}; the "
            "same command goes on",
            soft_wrap=True,
        )

    def _start(self) -> None:
        for job in self.all:
            before = self.before.get(job)
            if self.runner.places is not None and len(self.running) >= self.runner.places:
                return  # what is first in this order when a place is free is not known before
            if job in self.done or job.name in self.failures or job in self.running.values():
                continue
            if before is not None and before.name in self.failures:
                self.failures[job.name] = f"{before.name} failed"
            elif before is None or before in self.done:
                self._submit(job)

    def _submit(self, job: Job) -> None:
        entry = self.plan.entry(job.method)
        try:
            recipe = None
            if job.kind == "tune":
                recipe = self.folder.tuned_recipe(self.plan, entry)
            elif job.seed is not None:
                recipe = self.folder.run_recipe(entry, job.seed)
                self.folder.check_job(job, recipe)
            self.folder.begin(job, recipe)
        except PemlError as error:
            self.failures[job.name] = str(error)
            return
        self.running[self.runner.submit(job.command, job.log)] = job

    def _ended(self, job: Job, future: Future[int]) -> None:
        problem = future.exception()
        if problem is not None:
            self.failures[job.name] = " ".join(str(problem).split()) or type(problem).__name__
            return
        try:
            if job.done(self.plan.section.trials):
                self.done.add(job)
            else:
                self.failures[job.name] = job.failure(future.result())
        except PemlError as error:
            self.failures[job.name] = str(error)
