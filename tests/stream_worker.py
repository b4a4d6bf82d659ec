"""What each process of the test of streams on two devices does; started by torch.distributed.run.

stream_worker.py FOLDER whole|broken|resumed

Leaves the rows that it saw in FOLDER; a broken run dies in its second epoch.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from peml.regimes import train
from peml.training.recipe import Recipe
from peml.training.trainer import MultiTaskTrainer

STEPS, SAVED, DIES = 14, 5, 12

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, what = Path(sys.argv[1]), sys.argv[2]
    seen: list[Any] = []
    original = MultiTaskTrainer.training_step

    def spy(self: MultiTaskTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if what == "broken" and len(seen) == DIES:
            os._exit(3)
        seen.append((inputs["tasks"], inputs["input_ids"].tolist()))
        return original(self, model, inputs, *args, **kwargs)

    MultiTaskTrainer.training_step = spy
    data = json.loads((folder / "recipe.json").read_text())
    data |= {"method": "lora", "set": {}, "evaluate_before": False}
    # 120 rows, 15 batches, 8 steps of both processes in an epoch.
    data["train"] |= {"max_steps": STEPS, "save_steps": SAVED, "use_cpu": True, "ddp_backend": "gloo"}
    train(Recipe.model_validate(data), folder / ("whole" if what == "whole" else "run"), resume=what == "resumed")
    (folder / f"{what}-{os.environ['RANK']}.json").write_text(json.dumps(seen))
