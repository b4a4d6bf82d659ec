"""What each balance does to the worst task: `python -m benchmarks.balance`.

1. Two quadratics that share x, one a hundred times as steep: L_1 = 100 (x - 1)^2 / 2, L_2 = (x + 1)^2 / 2 + y^2 / 2. At
   y = 0 all x from -1 to 1 are Pareto optimal; equal weights come to rest at x = 99 / 101, where L_2 is 1.96.
2. Four toy tasks on the shipped model, with the loss of one of them multiplied by 100, as if it were measured in other
   units; three seeds. The time of a step is beside that of equal weights with the same seed.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import environment, spread
from peml.balance import BALANCES, Step
from peml.regimes import train
from peml.training import RunFolder
from peml.training.balancing import read_balance
from peml.training.recipe import Recipe
from peml.training.trainer import MultiTaskTrainer

RESULTS = Path(__file__).parent / "results"
TASKS = ["mood", "odd", "trait", "past"]
SCALED, SCALE = "mood", 100.0


# Two quadratics


def losses_of(x: Tensor) -> Tensor:
    return torch.stack([50 * (x[0] - 1) ** 2, (x[0] + 1) ** 2 / 2 + x[1] ** 2 / 2])


def quadratics(by: str, steps: int = 2000, rate: float = 0.01) -> dict[str, float]:
    """Adam on the two, from (-0.9, 2): where it is after so many steps."""
    settings = {"every": 1, "warmup": 20, "history": 50} if by == "coba" else {}
    rule = read_balance({"by": by, **settings}).build(2)
    x = torch.tensor([-0.9, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    both = torch.tensor([True, True])
    for number in range(1, steps + 1):
        losses = losses_of(x)
        rows = torch.stack([torch.autograd.grad(part, x, retain_graph=True)[0] for part in losses])
        before = losses.detach()
        weights = rule.weights(before)
        gramian = rows @ rows.T
        x.grad = rule.combine(gramian, weights / weights.sum(), number) @ rows
        optimizer.step()
        decay.step()
        after = losses_of(x).detach()
        rule.update(Step(number, before, both, gramian.diagonal().sqrt(), after, after))
    end = losses_of(x).tolist()
    return {"x": float(x[0]), "y": float(x[1]), "L1": end[0], "L2": end[1]}


def quadratics_table(balances: list[str]) -> tuple[str, list[Any]]:
    lines = ["| balance | x | y | L_1 | L_2 |", "|---|---|---|---|---|"]
    records = []
    for by in balances:
        end = quadratics(by)
        lines.append(f"| {by} | {end['x']:.3f} | {end['y']:.3f} | {end['L1']:.4g} | {end['L2']:.4g} |")
        records.append({"balance": by, **end})
    return "\n".join(lines), records


# Toy tasks


def folder_of(options: Namespace, by: str, scale: float, seed: int) -> Path:
    return Path(options.runs) / f"{by}-{scale:g}-{seed}"


def one(options: Namespace, by: str, scale: float, seed: int) -> None:
    """Train, unless it was; the time of a step without evaluations goes beside the run."""
    folder = RunFolder(folder_of(options, by, scale, seed))
    if folder.finished and (folder.path / "step.json").exists():
        return
    balance: dict[str, Any] = {"by": by}
    if not BALANCES[by].needs_gradients:
        balance["gradients_every"] = 0
    recipe = Recipe.model_validate(
        {
            "model": "toy",
            "tasks": [{"suite": "toy", "include": TASKS, "limit_eval": 100}],
            "method": "lora",
            "balance": balance,
            "evaluate_before": False,
            "train": {
                "max_steps": options.steps, "per_device_train_batch_size": options.rows, "max_length": 64, "seed": seed,
                "learning_rate": 2e-3,
                "save_strategy": "steps", "save_steps": options.steps, "logging_steps": 10,
            },
        }
    )  # fmt: skip
    sums, step, seconds = MultiTaskTrainer.sums_by_task, MultiTaskTrainer.training_step, []
    update = MultiTaskTrainer.update_balance

    def scaled(self: MultiTaskTrainer, logits: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
        losses, counts = sums(self, logits, inputs)
        factors = torch.ones_like(losses)
        factors[TASKS.index(SCALED)] = scale
        return losses * factors, counts

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            seconds.append(time.perf_counter() - begun)
            return result

        return call

    try:
        MultiTaskTrainer.sums_by_task = scaled
        MultiTaskTrainer.training_step, MultiTaskTrainer.update_balance = timed(step), timed(update)
        train(recipe, folder.path, overwrite=folder.is_run)
    finally:
        MultiTaskTrainer.sums_by_task, MultiTaskTrainer.training_step = sums, step
        MultiTaskTrainer.update_balance = update
    (folder.path / "step.json").write_text(json.dumps(sum(seconds) / options.steps))


def toy_table(options: Namespace, rows: list[tuple[str, str, float]]) -> tuple[str, list[Any]]:
    lines = ["| balance | average | worst task | " + " | ".join(TASKS) + " | a step, to equal |"]
    lines.append("|---|---|---|" + "---|" * (len(TASKS) + 1))
    records, seeds = [], range(options.seeds)
    for title, by, scale in rows:
        runs = [RunFolder(folder_of(options, by, scale, seed)).read_metrics()["after"] for seed in seeds]
        scores = {task: [100 * next(iter(run[task].values())) for run in runs] for task in TASKS}
        average = [statistics.mean(values) for values in zip(*scores.values(), strict=True)]
        worst = [min(values) for values in zip(*scores.values(), strict=True)]
        times = {
            name: [json.loads((folder_of(options, name, scale, seed) / "step.json").read_text()) for seed in seeds]
            for name in (by, "equal")
        }
        cost = statistics.median(a / b for a, b in zip(times[by], times["equal"], strict=True))
        cells = [spread(average), spread(worst), *(spread(values) for values in scores.values()), f"{cost:.2f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
        records.append({"balance": by, "scale": scale, "scores": scores, "seconds": times[by], "cost": cost})
    return "\n".join(lines), records


def main() -> None:
    parser = ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--runs", default="runs/balance", help="folder of the runs; a finished one is not run again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16, help="per batch")
    parser.add_argument("--balances", nargs="+", default=list(BALANCES), choices=list(BALANCES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    table, found = quadratics_table(options.balances)
    print(table, flush=True)
    parts, records = [f"## Two quadratics, 2000 steps of Adam\n\n{table}"], {"quadratics": found}
    for seed in range(options.seeds):
        one(options, "equal", 1.0, seed)
        for by in options.balances:
            one(options, by, SCALE, seed)
    rows = [("equal, nothing scaled", "equal", 1.0), *((by, by, SCALE) for by in options.balances)]
    table, found = toy_table(options, rows)
    parts.append(f"## Four toy tasks, the loss of {SCALED} times {SCALE:g}\n\n{table}")
    records["toy"] = found
    how = (
        f"Score in per cent on 100 held-out rows a task, mean and standard deviation over {options.seeds} seeds, "
        f"LoRA of rank 8 on the shipped model, {options.steps} steps of {options.rows} rows; the worst task is that of "
        "each run by itself. A step is forward, backward, combination and update of the rule, in the median over the "
        "seeds."
    )
    text = "\n\n".join(["# Balances", how, *parts])
    (options.out / "balance.md").write_text(text + "\n", encoding="utf-8")
    machine = environment(1)
    settings = {key: getattr(options, key) for key in ("seeds", "steps", "rows")}
    record = {"environment": machine, "options": settings, **records}
    (options.out / "balance.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
