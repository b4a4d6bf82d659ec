"""`peml affinity`: warm up a shared LoRA on the tasks of a recipe, measure, and suggest groups."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from peml.affinity.clusters import cluster
from peml.affinity.measure import measure
from peml.affinity.record import AGREES, Affinity, Rows
from peml.errors import PemlError
from peml.methods import WHERE
from peml.picture import draw_affinity
from peml.training.bill import bill_of, devices
from peml.training.data import Collator, TaskRows
from peml.training.folder import write_text
from peml.training.progress import progress_bar
from peml.training.recipe import Recipe
from peml.training.run import attach
from peml.training.streaming import StreamedRows, training_rows
from peml.training.trainer import MultiTaskTrainer
from peml.training.workbench import Workbench, prepare

KEPT = ("adapter.r", "adapter.lora_alpha", "adapter.use_rslora")
"""Settings of a method's adapter that the LoRA of the warm-up takes over."""

IDLE = ("eval_strategy", "load_best_model_at_end", "metric_for_best_model", "early_stopping_patience", "eval_steps")
"""Settings of a training that measures; the warm-up does not."""


@dataclass(frozen=True)
class How:
    """How affinities are measured.

    Args:
        warmup_steps: of a shared LoRA, before anything is measured; 100 is our choice.
        batches: that are averaged over; 20 is our choice.
        batch_rows: rows of each task in a batch.
        lookahead: length of a look-ahead step, as a share of the norm of the weights; None: no look-ahead.
        by: what is clustered, "cosine" or "lookahead".
        clusters: number of groups; None: chosen, see `cluster`.

    Raises:
        PemlError: a number that is not above 0, or "lookahead" that is not measured.
    """

    warmup_steps: int = 100
    batches: int = 20
    batch_rows: int = 16
    lookahead: float | None = None
    by: str = "cosine"
    clusters: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "batches", "batch_rows"):
            if getattr(self, name) < 1:
                raise PemlError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.lookahead is not None and not self.lookahead > 0:
            raise PemlError(f"lookahead must be above 0, not {self.lookahead}")
        if self.by not in ("cosine", "lookahead"):
            raise PemlError(f"by must be cosine or lookahead, not {self.by!r}")
        if self.by == "lookahead" and self.lookahead is None:
            raise PemlError("clusters by lookahead need it measured: give the length of its step")


def find_affinity(
    recipe: Recipe, how: How, *, workbench: Workbench | None = None, console: Console | None = None
) -> Affinity:
    """Warm up a LoRA that all tasks share, and measure the affinities between them.

    The base model is left as it was, without the LoRA. Nothing is evaluated and nothing is written.

    Args:
        recipe: whose tasks, model, mixing and training settings are used; a rank that it sets is that of the LoRA.
        how: what is measured.
        workbench: model and rows that are loaded already.
        console: where progress is shown; None: nowhere.

    Raises:
        PemlError: fewer than two tasks, bad rows, or a warm-up that diverged.
    """
    names = [task.name for task in recipe.build_tasks()]
    if len(names) < 2:
        raise PemlError(f"affinity is between tasks, and this recipe has one, {names[0]}")
    if how.clusters is not None and not 1 <= how.clusters <= len(names):
        raise PemlError(f"clusters must be between 1 and the number of tasks, {len(names)}, not {how.clusters}")
    console = console or Console(quiet=True)
    shared = shared_recipe(recipe, names, how.warmup_steps)
    bench = prepare(shared) if workbench is None else _like(workbench, shared)
    rows = training_rows(bench)
    held = rows
    if isinstance(rows, StreamedRows):
        held = TaskRows.encode(bench.tokenizer, bench.train, bench.max_length, bench.form, list(bench.tasks))
    set_seed(recipe.seed)
    model = attach(bench.model, bench.config())
    try:
        with TemporaryDirectory() as folder, progress_bar(console) as progress:
            bar = progress.add_task("affinity", total=how.warmup_steps)
            trainer = _trainer(shared, bench, model, rows, folder)
            trainer.add_callback(_Advance(lambda: progress.advance(bar)))
            begun = time.perf_counter()
            trainer.train()
            warm = time.perf_counter()
            found = measure(trainer, held, batches=how.batches, batch_rows=how.batch_rows, step=how.lookahead)
            ended = time.perf_counter()
        bill = bill_of(devices(trainer.args), ended - begun, trainer.state.global_step, {}, {})
    finally:
        model.unload()
    mean: Rows = found.cosines.tolist()
    spread: Rows = found.spread.tolist()
    ahead: Rows | None = None if found.lookahead is None else found.lookahead.tolist()
    blocks: dict[str, Rows] = {place: own.tolist() for place, own in found.blocks.items()}
    seconds = {"warmup": warm - begun, "measurement": ended - warm, "total": ended - begun}
    settings = {
        "model": recipe.model, "seed": recipe.seed, "warmup_steps": how.warmup_steps, "batches": how.batches,
        "batch_rows": how.batch_rows, "lookahead": how.lookahead, "adapter": lora_settings(shared),
    }  # fmt: skip
    rounded = {key: round(value, 3) for key, value in seconds.items()}
    if ahead is not None and not all(isfinite(gain) for row in ahead for gain in row):
        raise PemlError("a loss behind a look-ahead step is no number: give a shorter step")
    nothing = cluster([[1.0] * len(names)] * len(names), names, 1)
    agreement = None if found.agreement is None else dict(zip(names, found.agreement.tolist(), strict=True))
    whole = Affinity(
        names, mean, spread, blocks, ahead, how.by, nothing, settings, rounded, bill, found.depths, agreement
    )
    return replace(whole, clustering=cluster(whole.matrix, names, how.clusters))


def lora_settings(recipe: Recipe) -> Mapping[str, Any]:
    """What the LoRA of a warm-up is."""
    return {key: value for key, value in recipe.set.items() if key.startswith("adapter.")}


def shared_recipe(recipe: Recipe, names: list[str], steps: int) -> Recipe:
    """The recipe of the warm-up: one LoRA for all tasks, trained jointly, without any evaluation."""
    kept = {k: v for k, v in recipe.set.items() if k in KEPT or k.startswith("heads") or k in WHERE}
    kept.pop("groups", None)
    train = {k: v for k, v in recipe.train.items() if k not in (*IDLE, "num_train_epochs")}
    train |= {"max_steps": steps, "save_strategy": "no", "load_best_model_at_end": False}
    return recipe.stage(names, method="lora", set=kept, architecture=None, train=train, evaluate_before=False)


def write_affinity(found: Affinity, folder: Path) -> None:
    """`affinity.json` and its picture, `affinity.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / "affinity.json")
    own = found.clustering
    write_text(
        folder / "affinity.svg",
        draw_affinity(found.tasks, found.matrix, own.merges, own.order, own.clusters, found.blocks),
    )


def show_affinity(found: Affinity, console: Console) -> None:
    """The suggestion, with its score and what it cost, on the terminal."""
    own = found.clustering
    for number, group in enumerate(own.clusters, 1):
        console.print(Text.assemble((f"cluster {number}  ", "bold"), ", ".join(group)))
    scores = ", ".join(f"{value:.2f} of {n}" for n, value in own.scores.items())
    chosen = f"score {own.score:.2f}" if own.score is not None else "no score for this number of clusters"
    console.print(chosen + (f"; silhouette {scores} clusters" if scores else ""), highlight=False)
    if found.agreement is not None:
        own_cosines = ", ".join(f"{task} {value:.2f}" for task, value in found.agreement.items())
        console.print(f"agreement of two halves of the batches: {own_cosines}", highlight=False)
    if found.by_chance():
        console.print(
            f"below {AGREES:g}, as of {', '.join(found.by_chance())}, affinities are mostly chance: more --batches or "
            "--rows",
            style="yellow",
            highlight=False,
        )
    spent = found.seconds
    console.print(
        f"{spent['total']:.0f} s: warm-up {spent['warmup']:.0f} s, measurement {spent['measurement']:.0f} s",
        highlight=False,
    )


class _Advance(TrainerCallback):
    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance()


def _like(bench: Workbench, recipe: Recipe) -> Workbench:
    """The same model and rows under another recipe."""
    return Workbench(recipe, bench.tokenizer, bench.model, bench.tasks, bench.train, bench.eval)


def _trainer(recipe: Recipe, bench: Workbench, model: PeftModel, rows: TaskRows, folder: str) -> MultiTaskTrainer:
    trainer = MultiTaskTrainer(
        model,
        recipe.training_arguments(folder),
        train_dataset=rows,
        mixing=recipe.build_mixing(),
        head_learning_rate=recipe.train.get("head_learning_rate"),
        task_weights=recipe.task_weights(),
        data_collator=Collator(bench.pad_token_id, bench.form),
        processing_class=bench.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
