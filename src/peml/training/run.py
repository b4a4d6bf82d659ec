"""From a recipe to a run folder and back: train, measure, save; and open a finished run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from peml.config import PemlConfig
from peml.errors import PemlError
from peml.saving import gathered
from peml.tasks.metrics import Answers
from peml.training.arguments import one_line
from peml.training.bill import peak_memory
from peml.training.data import Collator, TaskRows
from peml.training.distillation import Distillation
from peml.training.folder import RunFolder, alone, write_text
from peml.training.guard import base_digest, check_base, check_finite, check_room
from peml.training.launch import Launch
from peml.training.predictions import packed
from peml.training.probing import probe_heads
from peml.training.progress import Patience, RunLog, progress_bar
from peml.training.recipe import Recipe, load_recipe
from peml.training.record import draw_search, record_of, write_architecture
from peml.training.regime import Bilevel
from peml.training.streaming import training_rows
from peml.training.trainer import MultiTaskTrainer
from peml.training.workbench import Workbench, load_base, prepare


def joint(recipe: Recipe, launch: Launch, stage: Stage | None = None) -> RunFolder:
    """Train one adapter jointly on the tasks of a recipe and write its run folder.

    Args:
        recipe: of the training.
        launch: where, and what is there already.
        stage: what a regime of several stages wants otherwise.

    Raises:
        PemlError: bad input, before anything is written; or a training that diverged, before its adapter is.
    """
    with ExitStack() as held:
        return _joint(recipe, launch, stage or Stage(), held)


def _joint(recipe: Recipe, launch: Launch, stage: Stage, held: ExitStack) -> RunFolder:
    """`joint`; `held` keeps other processes out of the folder until it is over."""
    folder, resume, overwrite = launch.folder, launch.resume, launch.overwrite
    # The folder keeps the recipe of the whole; a stage may train on other terms.
    ours = recipe.model_copy(update={"train": {**recipe.train, **stage.train}})
    arguments = ours.training_arguments(str(folder.checkpoints))
    # Under `accelerate launch` all processes read and compute, and one writes.
    main, wait = arguments.process_index == 0, arguments.distributed_state.wait_for_everyone
    console = launch.console if launch.console is not None and main else Console(quiet=True)
    folder.check(resume=resume, overwrite=overwrite)
    if resume:
        check_same_recipe(recipe, folder)
        if folder.finished:
            console.print("this run is finished: there is nothing to resume")
            return folder
    alone_here = alone(folder.path, "`peml train`")
    # A folder that is not there yet is made when nothing can be refused any more.
    was_run = folder.is_run
    if main and was_run:
        held.enter_context(alone_here)
    with console.status("reading rows, loading the model"):
        bench = launch.workbench or prepare(recipe, trained=stage.tasks)
        rows = training_rows(bench)
        shortened = {"training": rows.truncated(), "evaluation": bench.check()}
        set_seed(recipe.seed)
        model = (stage.attach or (lambda bench: attach(bench.model, bench.config())))(bench)
        distillation = None if stage.begin is None else stage.begin(model)
    data = {
        "rows": {n: [bench.rows_held(n), len(bench.eval[n])] for n in bench.tasks},
        "sha256": rows.digest(),
    }
    checkpoint = folder.last_checkpoint() if resume else None
    metrics = folder.read_metrics() if resume else {}
    _same_data(metrics.get("data"), data, checkpoint, folder)
    if resume:
        check_base(folder, bench.model.name_or_path)
    with progress_bar(console) as progress:
        log = RunLog(folder, progress, label=stage.label)
        trainer = _trainer(ours, bench, model, rows, arguments, log, distillation, stage)
        stages = stage.record.get("stages", {})
        trainer.schedule.clock, trainer.schedule.memory = log.elapsed, partial(peak_memory, reset=True)
        if main:
            trainer.schedule.derived = lambda: write_architecture(folder, bench, trainer, log.elapsed(), stages)
        # Everything that can be refused has been by now; from here on the folder is written.
        wait()
        if main:
            if not was_run:
                held.enter_context(alone_here)
                if folder.is_run:  # another one has come and gone meanwhile
                    folder.check(resume=resume, overwrite=overwrite)
            folder.create(overwrite=overwrite)
            folder.drop_incomplete()
            write_text(folder.recipe, recipe.to_yaml())
            log.spent = folder.rewind_log(_step(checkpoint))
        wait()
        if resume and (checkpoint or stage.begin is None):
            console.print(f"going on from {checkpoint.name}" if checkpoint else "no checkpoint yet: starting at step 0")
        for kind, counts in shortened.items():
            for task, count_ in counts.items():
                if count_:
                    console.print(Text(f"{task}: {count_} {kind} prompts lose their beginning to max_length", "yellow"))
        metrics |= {"data": data, "base": base_digest(bench.model.name_or_path)}
        # Without its heads an encoder has no answer.
        if "before" not in metrics and recipe.evaluate_before and bench.form != "heads":
            with model.disable_adapter():
                metrics["before"] = bench.evaluate(model, progress)
        if main:
            folder.write_json(folder.metrics, metrics)
        # What was held before, by a training in the same process for one, is none of this one's.
        peak_memory(reset=True)
        log.start()
        if checkpoint is None and bench.form == "heads":
            apart = () if trainer.architect is None else trainer.architect.held_out
            probe_heads(model, bench, bench.tasks if stage.fresh is None else stage.fresh, apart)
        if checkpoint is not None and trainer.has_ended(checkpoint):
            trainer.finish_from(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = log.elapsed()
        answers: dict[str, Answers] = {}
        metrics["after"] = bench.evaluate(model, progress, answers)
    check_finite(model, trainer.state.global_step)
    wrong = [task for task, scores in metrics["after"].items() if not all(map(math.isfinite, scores.values()))]
    if wrong:
        raise PemlError(f"training diverged: the scores of task {wrong[0]!r} are no numbers; lower the learning rates")
    metrics |= record_of(bench, trainer, log, metrics, seconds, stages) | dict(stage.record)
    if metrics["collapsed"]:
        tasks = ", ".join(metrics["collapsed"])
        console.print(Text(f"collapsed: {tasks} no better than one answer for every row; try lower rates", "yellow"))
    state = gathered(model)
    if main:
        write_architecture(folder, bench, trainer, seconds, stages)
        _save(model, folder, state)
        draw_search(folder, trainer)
        write_text(folder.predictions, packed(answers, metrics["after"], bench))
        folder.write_json(folder.metrics, metrics)
    wait()
    if stage.end is not None:
        stage.end(model)
    return folder


@dataclass(frozen=True)
class Stage:
    """What a regime of several stages wants of one of them.

    Args:
        label: beside the bar.
        begin: called with the fresh adapter, to set where it begins; returns what is learnt from a teacher, or None.
        end: called with the trained adapter.
        attach: makes the adapter; None: a fresh one, as the recipe says.
        tasks: whose rows are trained on; None: all.
        fresh: those that have learnt nothing yet; None: all.
        train: what it has in `train` other than the recipe.
        frozen: parts that it does not train.
        behind: run of the stage whose rows it goes on behind; None: it begins with the first.
        record: for `metrics.json`.
    """

    label: str = "train"
    begin: Callable[[PeftModel], Distillation | None] | None = None
    end: Callable[[PeftModel], None] | None = None
    attach: Callable[[Workbench], PeftModel] | None = None
    tasks: list[str] | None = None
    fresh: list[str] | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    frozen: Collection[str] = ()
    behind: RunFolder | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def attach(model: PreTrainedModel, config: PemlConfig) -> PeftModel:
    """`get_peft_model`, with PEFT's own refusals as ours.

    Raises:
        PemlError: the model cannot take the adapter, or its settings match nothing in it.
    """
    try:
        return get_peft_model(model, config)
    except PemlError:
        raise
    except Exception as error:  # PEFT and torch refuse settings with errors of every type
        raise PemlError(f"set: the adapter cannot be attached to this model ({one_line(error)})") from error


def _trainer(
    recipe: Recipe,
    bench: Workbench,
    model: PeftModel,
    rows: TaskRows,
    arguments: TrainingArguments,
    log: RunLog,
    distillation: Distillation | None,
    stage: Stage,
) -> MultiTaskTrainer:
    """The trainer, with optimiser and schedule tried out: what they refuse is refused before anything is written.

    Raises:
        PemlError: a training argument that transformers or torch does not take.
    """
    existed = Path(arguments.output_dir).exists(), Path(arguments.output_dir).parent.exists()
    try:
        trainer = MultiTaskTrainer(
            model,
            arguments,
            train_dataset=rows,
            mixing=recipe.build_mixing(),
            prompt_learning_rate=recipe.train.get("prompt_learning_rate"),
            task_prompt_learning_rate=recipe.train.get("task_prompt_learning_rate"),
            architecture_learning_rate=recipe.train.get("architecture_learning_rate"),
            head_learning_rate=recipe.train.get("head_learning_rate"),
            balance=recipe.balance,
            task_weights=recipe.task_weights(),
            finetune_fraction=recipe.finetune_fraction,
            measure_gap=recipe.setting("measure_gap"),
            bilevel=recipe.how if isinstance(recipe.how, Bilevel) else None,
            frozen=stage.frozen,
            steps_before=0 if stage.behind is None else stage.behind.read_metrics()["steps"],
            distillation=distillation,
            evaluate_tasks=bench.evaluate,
            data_collator=Collator(bench.pad_token_id, bench.form),
            processing_class=bench.tokenizer,
            callbacks=[log, *_patience(recipe)],
        )
        trainer.create_optimizer_and_scheduler(num_training_steps=max(1, arguments.max_steps))
        trainer.get_train_dataloader()
    except Exception as error:  # these values are checked deep inside, with errors of every type
        # transformers makes its folder when it is built, which was too early. After a success it stays: another
        # process may be about to make its own in it.
        for path, before in zip((Path(arguments.output_dir), Path(arguments.output_dir).parent), existed, strict=True):
            if not before:
                with suppress(OSError):  # it holds something, or another process was first
                    path.rmdir()
        if isinstance(error, PemlError):
            raise
        raise PemlError(f"train: {one_line(error)}") from error
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.remove_callback(PrinterCallback)
    return trainer


def _patience(recipe: Recipe) -> list[Patience]:
    patience = recipe.setting("early_stopping_patience")
    return [] if patience is None else [Patience(patience, recipe.setting("early_stopping_threshold"))]


def open_run(path: str | Path) -> tuple[Workbench, PeftModel]:
    """Load the model, adapter and evaluation rows of a finished run.

    Raises:
        PemlError: the folder holds no finished run, or its adapter does not fit its base model.
    """
    folder = RunFolder.existing(path)
    bench = prepare(load_recipe(folder.recipe), training=False)
    return bench, load_adapter(bench.model, folder).eval()


def open_adapter(path: str | Path, **train: Any) -> tuple[Recipe, PreTrainedTokenizerBase, PeftModel]:
    """Recipe, tokenizer and adapted model of a finished run; no rows are read.

    Args:
        path: folder of the run.
        train: keys of the recipe's `train` to load it with, `dtype` for one.

    Raises:
        PemlError: the folder holds no finished run, or its adapter does not fit its base model.
    """
    folder = RunFolder.existing(path)
    recipe = load_recipe(folder.recipe)
    recipe = recipe.model_copy(update={"train": {**recipe.train, **train}})
    tokenizer, model = load_base(recipe)
    adapted = load_adapter(model, folder).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.is_floating_point() and bool(parameter.isnan().any()):
            raise PemlError(f"{folder.adapter}: {name} holds what is no number: train it again")
    return recipe, tokenizer, adapted


def load_adapter(model: PreTrainedModel, folder: RunFolder, trainable: bool = False) -> PeftModel:
    """The adapter of a run on its base model.

    Raises:
        PemlError: it does not fit the model, which may have changed since, or is damaged.
    """
    try:
        adapted = PeftModel.from_pretrained(model, str(folder.adapter), is_trainable=trainable)
    except PemlError:
        raise
    except Exception as error:  # a configuration that was edited fails anywhere in PEFT or torch
        raise PemlError(f"{folder.adapter} cannot be loaded ({one_line(error)}): train it again") from error
    check_base(folder, model.name_or_path)  # after PEFT, which knows better what is wrong where the shapes differ
    return adapted


def check_same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse to go on with a run under another recipe: the result would be that of neither.

    Raises:
        PemlError: naming the first key that differs.
    """
    if (key := other_recipe(recipe, folder)) is not None:
        raise PemlError(
            f"--resume: the run in {folder.path} was started with another recipe ({key} differs); "
            "go on with the same one, or choose another --output"
        )


def other_recipe(recipe: Recipe, folder: RunFolder) -> str | None:
    """The first key in which a recipe differs from that of the run in a folder; None: in none, or there is no run."""
    if not folder.is_run:
        return None
    old, new = (yaml.safe_load(each.to_yaml()) for each in (load_recipe(folder.recipe), recipe))
    for key in Recipe.model_fields:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            key += "." + next(k for k in {**before, **after} if before.get(k) != after.get(k))
        return key
    return None


def _same_data(before: Any, now: dict[str, Any], checkpoint: Path | None, folder: RunFolder) -> None:
    """Refuse to go on from a checkpoint with other rows, or without an optimiser: the end would be another.

    Raises:
        PemlError: saying which of the two it is.
    """
    if checkpoint is None:
        return
    if before is not None and before != now:
        raise PemlError(f"--resume: the rows are not those that the run in {folder.path} was started with")
    # The second name is accelerate's, under FSDP.
    if not any((checkpoint / name).exists() for name in ("optimizer.pt", "optimizer.bin")):
        raise PemlError(
            f"--resume: {checkpoint} was saved without its optimizer (save_only_model): train from the start"
        )


def _step(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _save(model: PeftModel, folder: RunFolder, state: Mapping[str, Any] | None) -> None:
    """Write the adapter beside its final place, then move it there, so that a kill leaves none or all of it.

    Args:
        model: that has it.
        folder: of the run.
        state: whole tensors, where the model has parts of them.
    """
    temporary = folder.path / ".adapter"
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        model.save_pretrained(str(temporary), **({} if state is None else {"state_dict": state}))
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        check_room(error, folder.adapter, "and go on with --resume")
        raise
    if folder.adapter.exists():
        shutil.rmtree(folder.adapter)
    temporary.rename(folder.adapter)
