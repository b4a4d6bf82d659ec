"""peml: one language model, many tasks, one adapter.

    config = peml.PemlConfig(task_names=["rte", "sst2"], adapter=peml.LoRA(r=8), prompt=peml.PrefixNAS())
    model = peft.get_peft_model(base, config)
    model(**batch, tasks=["rte", "sst2", "rte"])

Importing the package adds the type `PEML` to PEFT, and the model `peml` to lm-eval where that is installed.
"""

from peml import _peft as _peft
from peml import harness as _harness  # noqa: F401  (adds its model to lm-eval)
from peml.adapters import CGCLoRA, CPoly, HydraLoRA, LoRA, MoELoRA, MTLLoRA, MultiLoRA, Poly, SingleTaskLoRA
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.evaluation import evaluate_tasks
from peml.heads import Heads
from peml.methods import match_params, method, methods
from peml.prompts import Attempt, MultitaskPrompt, PrefixNAS, PrefixTuning, PromptTuning
from peml.regimes import train
from peml.tasks import Task
from peml.training import MultiTaskTrainer, Recipe
from peml.tuner import PemlModel

__all__ = [  # noqa: RUF022  (in the order in which a reader meets them)
    # What is added to a model
    "PemlConfig",
    "LoRA",
    "SingleTaskLoRA",
    "MTLLoRA",
    "MultiLoRA",
    "MoELoRA",
    "CGCLoRA",
    "Poly",
    "CPoly",
    "HydraLoRA",
    "PrefixTuning",
    "PrefixNAS",
    "PromptTuning",
    "MultitaskPrompt",
    "Attempt",
    "Heads",
    # Named combinations of these
    "method",
    "methods",
    "match_params",
    # Tasks, training, measuring
    "Task",
    "Recipe",
    "train",
    "MultiTaskTrainer",
    "evaluate_tasks",
    # Underneath
    "PemlModel",
    "PemlError",
]
