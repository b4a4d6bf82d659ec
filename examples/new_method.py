"""A method of one's own in one file: configuration, module, a row of the table; then trained, and held to the promises.

    y = W x + s up' diag(g_t) down x        s = lora_alpha / r

A LoRA that all tasks share, and a number per task and rank, by which each task opens or closes a direction of it. It
is nobody's paper; it stands here because it is short. In the package it would be `src/peml/adapters/gated.py`, a row in
`methods.py` and a naive reference in the tests; outside of it, both tables take new entries. Run it from a checkout:
`python examples/new_method.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peml
from peml.adapters import ADAPTERS, Adapter, AdapterConfig
from peml.adapters.base import kaiming
from peml.methods import METHODS, Method
from peml.routing import Route
from peml.training.recipe import Recipe
from peml.training.workbench import load_base


@dataclass(frozen=True)
class GatedLoRA(AdapterConfig):
    """A shared low-rank update whose directions each task weighs.

    Args:
        r: R, rank of the update.
        lora_alpha: numerator of the scale.
        lora_dropout: probability in [0, 1) of zeroing an entry of x before `down`; training only.
    """

    needs_task: ClassVar[bool] = True

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    def build(self, in_features: int, out_features: int, num_tasks: int) -> GatedLoRAAdapter:
        """The adapter of one linear layer."""
        return GatedLoRAAdapter(self, in_features, out_features, num_tasks)

    def num_parameters(self, in_features: int, out_features: int, num_tasks: int) -> int:
        """R (I + O + T)."""
        return self.r * (in_features + out_features + num_tasks)

    def folded_rank(self, num_tasks: int) -> int:
        """R: for one task it is a plain LoRA, so that it merges and exports as one."""
        return self.r


class GatedLoRAAdapter(Adapter):
    """`down [R, I]`, `up [R, O]`, shared; `gate [T, R]`."""

    needs_task = True
    task_parameters = ("gate",)  # one row per task: no weight decay, and `add_task` makes one more
    core_parameters = ("gate",)
    diagonal = True

    def __init__(self, config: GatedLoRA, in_features: int, out_features: int, num_tasks: int) -> None:
        super().__init__()
        self.scaling, self.lora_dropout = config.lora_alpha / config.r, config.lora_dropout
        self.down = kaiming(config.r, in_features)
        self.up = nn.Parameter(torch.zeros(config.r, out_features))  # so a fresh adapter changes nothing
        self.gate = nn.Parameter(torch.ones(num_tasks, config.r))

    def bank(self, route: Route | None) -> tuple[Tensor, Tensor]:
        """What is multiplied with the text, once for all tasks."""
        return self.down, self.up

    def core(self, tensors: Mapping[str, Tensor], route: Route | None, x: Tensor | None = None) -> Tensor:
        """`s g_t` of each row, `[*ids, R]`: only the rows' own tasks are gathered."""
        assert route is not None
        return self.scaling * tensors["gate"][..., route.ids, :]


ADAPTERS[GatedLoRA.__name__] = GatedLoRA  # what a stored adapter is read by
METHODS["gated-lora"] = Method(GatedLoRA(), None, "joint", "LoRA with a weight per task and direction")

TASKS = ["mood", "odd"]


@torch.no_grad()
def promises(model: PeftModel, stored: Path) -> dict[str, float]:
    """How far the trained adapter is from each promise, as the largest difference of logits."""
    ids = torch.arange(10, 34).view(4, 6)
    tasks = ["mood", "odd", "odd", "mood"]
    mixed = model(input_ids=ids, tasks=tasks).logits
    apart = torch.cat([model(input_ids=ids[i : i + 1], tasks=tasks[i]).logits for i in range(4)])
    _, base = load_base(Recipe(model="toy", tasks=["toy"]))
    fresh = get_peft_model(base, peml.method("gated-lora", TASKS, task_type="CAUSAL_LM"))
    begun = fresh(input_ids=ids, tasks=tasks).logits
    with model.disable_adapter():
        frozen = model(input_ids=ids).logits
    _, base = load_base(Recipe(model="toy", tasks=["toy"]))
    again = PeftModel.from_pretrained(base, str(stored)).eval()(input_ids=ids, tasks=tasks).logits
    of_mood = model(input_ids=ids, tasks="mood").logits
    model.base_model.select_task("mood")
    model.merge_adapter()
    merged = model(input_ids=ids, tasks="mood").logits
    model.unmerge_adapter()
    pairs = {
        "a fresh adapter changes nothing": (begun, frozen),
        "a mixed batch is its rows one by one": (mixed, apart),
        "what is stored is what was trained": (again, mixed),
        "merged for a task is not merged": (merged, of_mood),
    }
    return {promise: float((one - other).abs().max()) for promise, (one, other) in pairs.items()}


def isolated(model: PeftModel) -> bool:
    """Whether rows of one task leave what belongs to the other without a gradient."""
    model.zero_grad()
    model(input_ids=torch.arange(10, 22).view(2, 6), tasks="mood").logits.sum().backward()
    gates = [p.grad for name, p in model.named_parameters() if name.endswith(".gate")]
    return all(gate is not None and gate[0].any() and not gate[1].any() for gate in gates)


def main(steps: int) -> tuple[dict[str, float], bool]:
    """Train it by its name on two tasks; then what the promises are off, and whether tasks are isolated."""
    recipe = Recipe(
        model="toy",
        tasks=[{"suite": "toy", "include": TASKS}],
        method="gated-lora",
        set={"adapter.r": 4},
        train={"max_steps": steps, "max_length": 64, "learning_rate": 4e-3, "use_cpu": True},
    )
    with tempfile.TemporaryDirectory() as folder:
        run = peml.train(recipe, folder)
        scores = run.read_metrics()
        for task in TASKS:
            print(f"{task:5s} {scores['before'][task]['accuracy']:.3f} -> {scores['after'][task]['accuracy']:.3f}")
        _, base = load_base(recipe)
        model = PeftModel.from_pretrained(base, str(run.adapter), is_trainable=True).eval()
        return promises(model, run.adapter), isolated(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    off, apart = main(parser.parse_args().steps)
    for promise, difference in off.items():
        print(f"{promise}: {difference:.1e}")
    print(f"tasks are isolated: {apart}")
