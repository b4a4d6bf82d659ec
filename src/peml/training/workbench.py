"""What a run works on: the base model, its tokeniser, and the rows of the recipe's tasks."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.evaluation import evaluate_tasks
from peml.tasks import Example, Task, encode_choices, encode_prompts
from peml.training.recipe import Recipe

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

    def check_lengths(self) -> None:
        """Refuse evaluation rows whose answer cannot fit, now rather than after the training.

        Raises:
            PemlError: naming the row.
        """
        longest = self.recipe.setting("max_length")
        for name, task in self.tasks.items():
            if task.kind == "choose":
                encode_choices(self.tokenizer, self.eval[name], longest)
            else:
                encode_prompts(self.tokenizer, self.eval[name], longest, task.max_new_tokens)

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
