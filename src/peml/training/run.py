"""From a recipe to a run folder and back: train, measure, save; and open a finished run."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback

from peml.config import part_to_dict
from peml.errors import PemlError
from peml.evaluation import average
from peml.prompts import PrefixGenerator
from peml.training.data import Collator, TaskRows
from peml.training.folder import RunFolder, write_text
from peml.training.progress import RunLog, progress_bar
from peml.training.recipe import Recipe, load_recipe
from peml.training.trainer import MultiTaskTrainer, learning_rates
from peml.training.workbench import Workbench, prepare
from peml.tuner import count


def train(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    workbench: Workbench | None = None,
) -> RunFolder:
    """Train one adapter on the tasks of a recipe and write its run folder.

    Args:
        recipe: a recipe or the path of one.
        output: folder of the run; default `train.output_dir`, else `runs/` and the recipe's name.
        resume: go on from the last complete checkpoint in the folder.
        overwrite: replace a run that lies there.
        console: where progress is shown; None: nowhere.
        workbench: model and rows that are loaded already; its model gets the adapter.

    Raises:
        PemlError: bad input; nothing is written then.
    """
    started = time.perf_counter()
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "run"
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    folder = RunFolder(output or recipe.train.get("output_dir") or Path("runs") / name)
    arguments = recipe.training_arguments(str(folder.checkpoints))
    # Under `accelerate launch` all processes read and compute, and one writes.
    main, wait = arguments.process_index == 0, arguments.distributed_state.wait_for_everyone
    console = console if console is not None and main else Console(quiet=True)
    folder.check(resume=resume, overwrite=overwrite)
    if resume:
        _same_recipe(recipe, folder)
    with console.status("reading rows, loading the model"):
        bench = workbench or prepare(recipe)
        rows = TaskRows.encode(bench.tokenizer, bench.train, recipe.setting("max_length"))
        bench.check_lengths()
        config = recipe.config()
        set_seed(recipe.seed)
        model = get_peft_model(bench.model, config)
    wait()
    if main:
        folder.create(overwrite=overwrite and not resume)
        folder.drop_incomplete()
    wait()
    checkpoint = folder.last_checkpoint() if resume else None
    if resume:
        console.print(f"going on from {checkpoint.name}" if checkpoint else "no checkpoint yet: starting at step 0")
    if main:
        write_text(folder.recipe, recipe.to_yaml())
    for task, shortened in rows.truncated().items():
        if shortened:
            console.print(f"[yellow]{task}: {shortened} prompts lost their beginning to max_length[/]")
    with progress_bar(console) as progress:
        metrics = folder.read_metrics() if checkpoint else {}
        if "before" not in metrics and recipe.evaluate_before:
            with model.disable_adapter():
                metrics["before"] = bench.evaluate(model, progress)
            if main:
                folder.write_json(folder.metrics, metrics)
        # A resumed run goes on counting: its bill is that of all its parts.
        spent = folder.rewind_log(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0) if main else 0.0
        log = RunLog(folder, progress, spent)
        trainer = MultiTaskTrainer(
            model,
            arguments,
            train_dataset=rows,
            mixing=recipe.build_mixing(),
            prompt_learning_rate=recipe.train.get("prompt_learning_rate"),
            architecture_learning_rate=recipe.train.get("architecture_learning_rate"),
            task_weights=recipe.task_weights(),
            finetune_fraction=recipe.setting("finetune_fraction"),
            evaluate_tasks=bench.evaluate,
            data_collator=Collator(_pad_token(bench.tokenizer)),
            processing_class=bench.tokenizer,
            callbacks=[log],
        )
        trainer.remove_callback(PrinterCallback)
        begun = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trained = time.perf_counter() - begun
        metrics["after"] = bench.evaluate(model, progress)
    tuner: Any = model.base_model
    metrics |= {
        "average": {when: average(metrics[when], bench.tasks) for when in ("before", "after") if when in metrics},
        "train_loss": {t: {"first": log.first_loss[t], "last": log.last_loss[t]} for t in log.first_loss},
        "parameters": {part: count(own) for part, own in tuner.parts().items()},
        "learning_rates": learning_rates(trainer),
        "steps": trainer.state.global_step,
        "train_seconds": round(spent + trained, 3),
        "wall_seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": _peak_memory(),
        "adapter": part_to_dict(config.adapter),
        "prompt": part_to_dict(config.prompt),
        "environment": environment(),
    }
    if isinstance(tuner.prompt, PrefixGenerator):
        metrics["architecture"] = tuner.prompt.architecture().to_dict()
    if main:
        _save(model, folder)
        folder.write_json(folder.metrics, metrics)
    wait()
    return folder


def open_run(path: str | Path) -> tuple[Workbench, PeftModel]:
    """Load the model, adapter and evaluation rows of a finished run.

    Raises:
        PemlError: the folder holds no finished run, or its adapter does not fit its base model.
    """
    folder = RunFolder.existing(path)
    bench = prepare(load_recipe(folder.recipe), training=False)
    model = PeftModel.from_pretrained(bench.model, str(folder.adapter))
    model.eval()
    return bench, model


def _same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse to go on with a run under another recipe: the result would be that of neither.

    Raises:
        PemlError: naming the first key that differs.
    """
    if not folder.recipe.exists():
        return
    before, now = (yaml.safe_load(text) for text in (folder.recipe.read_text(encoding="utf-8"), recipe.to_yaml()))
    differing = [key for key in Recipe.model_fields if before.get(key) != now.get(key)]
    if differing:
        raise PemlError(
            f"--resume: the run in {folder.path} was started with another recipe ({differing[0]} differs); "
            "go on with the same one, or choose another --output"
        )


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    packages = ("peml", "torch", "transformers", "peft", "accelerate", "datasets")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _save(model: PeftModel, folder: RunFolder) -> None:
    """Write the adapter beside its final place, then move it there, so that a kill leaves none or all of it."""
    temporary = folder.path / ".adapter"
    if temporary.exists():
        shutil.rmtree(temporary)
    model.save_pretrained(str(temporary))
    if folder.adapter.exists():
        shutil.rmtree(folder.adapter)
    temporary.rename(folder.adapter)


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
