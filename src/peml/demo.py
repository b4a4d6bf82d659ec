"""`peml demo`: four methods on equal budgets, offline, on a laptop CPU, in minutes.

Uses the small model and the toy tasks that lie in the package; a first look, not a benchmark: one seed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peml.evaluation import average
from peml.inspection import architecture_view
from peml.methods import match_params, method, trainable_parameters
from peml.prompts import Architecture
from peml.regimes import train
from peml.tasks import suite_tasks
from peml.training.folder import RunFolder
from peml.training.progress import progress_bar
from peml.training.recipe import Recipe
from peml.training.record import environment
from peml.training.workbench import TOY_MODEL, load_base, prepare

METHODS = ("lora", "lora+prefix", "mtl-lora", "peml")
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "lora+prefix": {"prompt.num_virtual_tokens": 8},
    "mtl-lora": {},
    "peml": {
        "adapter.r": 12,
        "adapter.lora_alpha": 24,
        "prompt.num_virtual_tokens": 16,
        "prompt.budget_tokens": 8.0,
        "prompt.width": 32,
        "prompt.embedding_dim": 16,
        "prompt.head_rank": 16,
    },
}
"""What each method is, beside the rank that makes the budgets equal: `peml` sets the budget."""

TRAIN: Mapping[str, Any] = {
    "max_length": 64,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-3,
    "prompt_learning_rate": 1e-2,
    "architecture_learning_rate": 2e-2,
    "save_strategy": "no",
    "logging_steps": 20,
}


def recipe_for(name: str, steps: int, seed: int, settings: Mapping[str, Any]) -> Recipe:
    """The recipe of one of the demo's runs."""
    return Recipe.model_validate(
        {
            "model": TOY_MODEL,
            "tasks": [{"suite": "toy"}],
            "method": name,
            "set": dict(settings),
            "train": {**TRAIN, "max_steps": steps, "seed": seed},
            "evaluate_before": False,
        }
    )


def demo(output: Path, steps: int, seed: int, console: Console) -> dict[str, Any]:
    """Train the methods, print the table, and write `results.json` beside the four run folders."""
    names = [task.name for task in suite_tasks("toy")]
    first = recipe_for("peml", steps, seed, SETTINGS["peml"])
    console.print(
        f"One frozen model of a few million parameters, {len(names)} tasks, one adapter for all of them. "
        f"{len(METHODS)} methods on equal budgets, {steps} steps each, seed {seed}."
    )
    for name in METHODS:
        RunFolder(output / name).check(overwrite=True)
    with console.status("making rows, loading the model"):
        bench = prepare(first)
    budget = trainable_parameters(method("peml", names, SETTINGS["peml"]), bench.model)
    with progress_bar(console) as progress:
        frozen = bench.evaluate(bench.model, progress)
    results: dict[str, Any] = {"frozen": {"scores": frozen, "average": average(frozen, bench.tasks)}}
    for name in METHODS:
        settings = dict(SETTINGS[name])
        config = method(name, names, settings)
        if name != "peml":
            sized = match_params(config, bench.model, budget).adapter
            assert sized is not None
            # All at the scale alpha / r of peml: a rate that suits one scale is another's ruin.
            scale = SETTINGS["peml"]["adapter.lora_alpha"] / SETTINGS["peml"]["adapter.r"]
            settings |= {"adapter.r": sized.r, "adapter.lora_alpha": scale * sized.r}  # type: ignore[attr-defined]
        recipe = recipe_for(name, steps, seed, settings)
        console.print(f"training [bold]{name}[/] ...")
        started = time.perf_counter()
        tokenizer, model = load_base(recipe)
        fresh = type(bench)(recipe, tokenizer, model, bench.tasks, bench.train, bench.eval)
        run = train(recipe, output / name, overwrite=True, console=console, workbench=fresh)
        metrics = run.read_metrics()
        results[name] = {
            "scores": metrics["after"],
            "average": metrics["average"]["after"],
            "parameters": sum(metrics["parameters"].values()),
            "train_seconds": metrics["train_seconds"],
            "wall_seconds": round(time.perf_counter() - started, 1),
            "set": settings,
            "architecture": metrics.get("architecture"),
        }
    primary = {name: task.metrics[0] for name, task in bench.tasks.items()}
    console.print(_table(results, primary))
    found = results["peml"]["architecture"]
    console.print("\nWhat the search of [bold]peml[/] found:")
    console.print(architecture_view(Architecture.from_dict(found)))
    console.print(Text(f"\nRuns are in {output}; look into one with: peml inspect {output / 'peml'}"))
    folder = RunFolder(output)
    folder.write_json(output / "results.json", {"methods": results, "seed": seed, "environment": environment()})
    return results


def _table(results: Mapping[str, Any], primary: Mapping[str, str]) -> Table:
    table = Table(title="Score on held-out rows (one seed)", caption="seconds: training with the search inside")
    table.add_column("task")
    for name in results:
        table.add_column(name, justify="right")
    for task, metric in primary.items():
        cells = [f"{row['scores'][task][metric]:.3f}" for row in results.values()]
        table.add_row(f"{task} ({metric})", *cells)
    table.add_section()
    table.add_row("average", *[f"{row['average']:.3f}" for row in results.values()], style="bold")
    counts = [f"{row['parameters']:,}" if "parameters" in row else "0" for row in results.values()]
    table.add_row("trainable parameters", *counts)
    table.add_row(
        "seconds",
        *[f"{row['train_seconds']:.0f}" if "train_seconds" in row else "-" for row in results.values()],
    )
    return table
