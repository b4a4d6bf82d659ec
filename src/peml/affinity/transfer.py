"""Negative transfer: what each task gains or loses by being trained with the others, and with which of them.

    transfer_t   = score_t(all tasks) - score_t(t alone)
    partner_ut   = score_t(all tasks) - score_t(all but u)        below 0: u hurts t

Every difference is between runs of one seed; mean and standard deviation are over the seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from peml.errors import PemlError
from peml.evaluation.evaluate import score
from peml.training.arguments import chooses_best
from peml.training.folder import RunFolder, write_text
from peml.training.recipe import Recipe
from peml.training.regime import Joint
from peml.training.run import other_recipe

Train = Callable[..., RunFolder]


def transfer(
    recipe: Recipe,
    output: Path,
    train: Train,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    leave_one_out: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train all tasks together and each alone, and on demand all but each, and compare.

    A task sees as many rows in each of them: a training of fewer tasks is as much shorter as they have less of a batch
    (our choice; the same number of steps would favour the training alone).

    Args:
        recipe: of all tasks, trained jointly.
        output: folder of the runs, of which those that are finished, with the same recipe, are not run again;
            `transfer.json` lies in it.
        train: trains a recipe, as `peml.train` does.
        seeds: of the runs.
        leave_one_out: whether to find which partner hurts.
        report: told what has been trained.

    Raises:
        PemlError: another regime, fewer than two tasks, a training that cannot be made shorter, or a run of another
            recipe in the folder.
    """
    tasks = {task.name: task for task in recipe.build_tasks()}
    names = list(tasks)
    if not isinstance(recipe.how, Joint):
        raise PemlError(
            f"transfer is between joint trainings, and the recipe's regime is {recipe.how.name}: leave it out"
        )
    if len(names) < 2:
        raise PemlError(f"transfer is between tasks, and this recipe has one, {names[0]}")
    if "num_train_epochs" in recipe.train and "max_steps" not in recipe.train:
        raise PemlError("transfer shortens trainings by steps: give train.max_steps in place of num_train_epochs")
    # Mixing that asks for the number of rows refuses streams, where it is not known.
    counts = {name: 1 if task.source.streaming else len(task.examples("train")) for name, task in tasks.items()}
    shares = recipe.build_mixing().task_probabilities(counts)
    trained = {"all": names} | {f"alone-{name}": [name] for name in names}
    if leave_one_out and len(names) > 2:
        trained |= {f"without-{name}": [other for other in names if other != name] for name in names}
    scores: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, float] = {}
    for seed in seeds:
        for run, own in trained.items():
            found = RunFolder(Path(output) / f"{run}-{seed}")
            steps = max(1, round(int(recipe.setting("max_steps")) * sum(shares[name] for name in own)))
            # A run that goes back to its best step needs its checkpoints.
            kept = {"max_steps": steps, "seed": seed} | ({} if chooses_best(recipe.train) else {"save_strategy": "no"})
            part = recipe.stage(own, train={**recipe.train, **kept}, evaluate_before=False)
            if not found.finished:
                train(part, found.path, overwrite=found.is_run)
            elif (key := other_recipe(part, found)) is not None:
                raise PemlError(
                    f"{found.path} was trained with another recipe ({key} differs): "
                    "choose another --output, or remove it"
                )
            metrics = found.read_metrics()
            seconds[run] = seconds.get(run, 0.0) + metrics["train_seconds"]
            for name in own:
                value = score(metrics["after"][name], tasks[name])
                scores.setdefault(run, {}).setdefault(name, []).append(value)
            report(f"{run}, seed {seed}")
    record = _compared(names, scores, list(seeds), leave_one_out) | {
        "seconds": {run: round(s, 3) for run, s in seconds.items()}
    }
    write_text(Path(output) / "transfer.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def _compared(
    names: Sequence[str], scores: Mapping[str, Mapping[str, Sequence[float]]], seeds: list[int], leave_one_out: bool
) -> dict[str, Any]:
    """Differences of scores, by task and by pair of tasks."""

    def difference(task: str, other: str) -> dict[str, Any]:
        own = [a - b for a, b in zip(scores["all"][task], scores[other][task], strict=True)]
        return {"mean": fmean(own), "spread": stdev(own) if len(own) > 1 else None, "by_seed": own}

    # Of two tasks, all but one is the other alone.
    partners = {
        task: {
            other: difference(task, f"without-{other}" if len(names) > 2 else f"alone-{task}")
            for other in names
            if other != task
        }
        for task in names
        if leave_one_out
    }
    transfers = {task: difference(task, f"alone-{task}") for task in names}
    return {"version": 1, "seeds": seeds, "transfer": transfers, "partners": partners, "scores": scores}
