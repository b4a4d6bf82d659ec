"""Training: recipes, the trainer, and the folder of a run."""

from peml.training.data import Collator, TaskRows
from peml.training.folder import RunFolder
from peml.training.recipe import Recipe, load_recipe
from peml.training.run import open_adapter, open_run
from peml.training.search import SearchCallback
from peml.training.trainer import MultiTaskTrainer

__all__ = [
    "Collator",
    "MultiTaskTrainer",
    "Recipe",
    "RunFolder",
    "SearchCallback",
    "TaskRows",
    "load_recipe",
    "open_adapter",
    "open_run",
]
