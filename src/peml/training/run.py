"""From a recipe to a run folder and back: load, train, measure, save; and open a finished run."""

from __future__ import annotations

import dataclasses
import platform
import resource
import sys
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from peml.config import part_to_dict
from peml.errors import PemlError
from peml.evaluation import average, evaluate_tasks
from peml.prompts import PrefixGenerator
from peml.tasks import Example, Task
from peml.training.data import Collator, TaskRows
from peml.training.folder import RunFolder, write_text
from peml.training.progress import RunLog, progress_bar
from peml.training.recipe import Recipe, load_recipe
from peml.training.trainer import MultiTaskTrainer, learning_rates
from peml.tuner import count

TOY_MODEL = "toy"
"""Name of the small model that lies in the package."""


@dataclasses.dataclass(frozen=True)
class Workbench:
    """A base model with its tokeniser, and the rows of a recipe's tasks.

    Args:
        train, eval: examples by task.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    tasks: dict[str, Task]
    train: dict[str, list[Example]]
    eval: dict[str, list[Example]]

    def evaluate(self, model: torch.nn.Module, progress: Progress | None = None) -> dict[str, dict[str, float]]:
        """Metrics of every task; works for the bare base model too."""
        return evaluate_tasks(
            model,
            self.tokenizer,
            self.eval,
            self.tasks,
            max_length=self.recipe.setting("max_length"),
            batch_size=self.recipe.setting("per_device_eval_batch_size"),
            tasks_kwarg=isinstance(model, PeftModel),
            progress=progress,
        )


def model_path(name: str) -> str:
    """Folder or Hub id of a model; "toy" is the one in the package."""
    return str(files("peml") / "assets" / "toy-llama") if name == TOY_MODEL else name


def prepare(recipe: Recipe, *, training: bool = True) -> Workbench:
    """Read the rows, then load tokeniser and model.

    Raises:
        PemlError: a bad row, an empty task, or a model that cannot be loaded.
    """
    tasks = {task.name: task for task in recipe.build_tasks()}
    # Rows first: a typing error in a file should not wait for gigabytes of weights.
    train = {name: task.examples("train") for name, task in tasks.items()} if training else {}
    held_out = {name: task.examples("eval") for name, task in tasks.items()}
    tokenizer, model = load_base(recipe)
    if not held_out or not all(held_out.values()):
        empty = next((name for name, rows in held_out.items() if not rows), "?")
        raise PemlError(f"task {empty!r} has no rows to evaluate on: give it some or leave it out")
    return Workbench(recipe, tokenizer, model, tasks, train, held_out)


def load_base(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokeniser and model that a recipe names.

    Raises:
        PemlError: the folder or Hub id does not give a causal language model.
    """
    path = model_path(recipe.model)
    if (path.startswith((".", "/", "~")) or Path(path).exists()) and not (Path(path) / "config.json").is_file():
        raise PemlError(f"model: {recipe.model} is not a model folder (there is no config.json in it)")
    dtype = recipe.setting("dtype")
    # Half-precision weights on a CPU are slow and gain nothing on models that fit there.
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    shared: dict[str, Any] = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    attention = recipe.train.get("attn_implementation")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **shared)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention, **shared)
    except Exception as error:  # hub, network, tokenizer and model classes fail in their own ways
        reason = str(error).strip().split("\n")[0]
        raise PemlError(
            f"model: {recipe.model} could not be loaded ({type(error).__name__}: {reason}); "
            "give a Hub id or a local folder with a causal language model"
        ) from error
    return tokenizer, model


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
    console = console or Console(quiet=True)
    arguments = recipe.training_arguments(str(folder.checkpoints))
    bench = workbench or prepare(recipe)
    rows = TaskRows.encode(bench.tokenizer, bench.train, recipe.setting("max_length"))
    config = recipe.config()
    set_seed(recipe.seed)
    model = get_peft_model(bench.model, config)
    folder.create(resume=resume, overwrite=overwrite)
    checkpoint = folder.last_checkpoint() if resume else None
    write_text(folder.recipe, recipe.to_yaml())
    for task, shortened in rows.truncated().items():
        if shortened:
            console.print(f"[yellow]{task}: {shortened} prompts lost their beginning to max_length[/]")
    with progress_bar(console) as progress:
        metrics = folder.read_metrics() if checkpoint else {}
        if "before" not in metrics and recipe.evaluate_before:
            with model.disable_adapter():
                metrics["before"] = bench.evaluate(model, progress)
            folder.write_json(folder.metrics, metrics)
        log = RunLog(folder, progress)
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
        if checkpoint is not None:
            folder.rewind_log(int(checkpoint.name.rpartition("-")[2]))
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
        "train_seconds": round(trained, 3) + (metrics.get("train_seconds", 0.0) if checkpoint else 0.0),
        "wall_seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": _peak_memory(),
        "adapter": part_to_dict(config.adapter),
        "prompt": part_to_dict(config.prompt),
        "environment": environment(),
    }
    if isinstance(tuner.prompt, PrefixGenerator):
        metrics["architecture"] = tuner.prompt.architecture().to_dict()
    _save(model, folder)
    folder.write_json(folder.metrics, metrics)
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
    import shutil

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
