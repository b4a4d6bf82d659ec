"""Short trainings with every balance, in one process or in each of several started by torch.distributed.run.

balance_worker.py FOLDER

The folder holds `recipe.json`, and what it names.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

RULES = ["equal", "uncertainty", "dwa", "gradnorm", "coba", "famo", "pcgrad", "cagrad", "aligned_mtl", "nash_mtl"]

CASES = {"homogeneous": RULES, "mixed": ["equal", "famo", "pcgrad"]}


def settings(by: str) -> dict[str, Any]:
    """Quick enough to be seen in a few steps."""
    own: dict[str, Any] = {
        "equal": {"gradients_every": 2},
        "uncertainty": {"learning_rate": 0.5},
        "dwa": {"window": 1, "temperature": 0.5},
        "gradnorm": {"learning_rate": 0.5},
        "famo": {"learning_rate": 0.5},
        "coba": {"every": 1, "warmup": 2},
    }
    return {"by": by, **own.get(by, {})}


def work(folder: Path, name: str, more: dict[str, Any]) -> None:
    """Train with every rule, in batches of one task each, so that processes have different ones, and some in mixed ones."""
    from peml.regimes import train
    from peml.training.recipe import Recipe

    plain = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 4, "logging_steps": 1, "learning_rate": 0.02}
    for batches, rules in CASES.items():
        for by in rules:
            data = json.loads((folder / "recipe.json").read_text())
            data |= {"method": "mtl-lora", "set": {}, "evaluate_before": False, "balance": settings(by)}
            data["mixing"] = {"batches": batches}
            data["train"] |= plain | {"per_device_train_batch_size": 4, "use_cpu": True} | more
            train(Recipe.model_validate(data), folder / f"{name}-{batches}-{by}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    work(Path(sys.argv[1]), "two", {"ddp_backend": "gloo"})
