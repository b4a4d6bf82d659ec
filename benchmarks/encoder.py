"""Eight GLUE tasks on a sentence encoder: `python -m benchmarks.encoder --data FOLDER --model FOLDER`.

Trains `recipes/encoder.yaml` with several methods and seeds. Every job is a run folder of its own, and a finished one
is not run again.
"""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
import yaml

import peml
from benchmarks.record import environment, spread
from peml.training import Recipe, RunFolder

RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parent.parent / "recipes" / "encoder.yaml"


def recipe_of(options: Namespace, method: str, seed: int) -> Recipe:
    """The recipe with another method, seed, and the files that were given."""
    data: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    data |= {"method": method, "model": options.model}
    data["tasks"][0]["path"] = options.data
    data["train"] |= {"seed": seed, "max_steps": options.steps, "save_strategy": "no"}
    return Recipe.model_validate(data)


def run(options: Namespace, method: str, seed: int) -> dict[str, Any]:
    """Scores and cost of one job."""
    folder = RunFolder(Path(options.work) / f"{method}-{seed}")
    if not folder.finished:
        peml.train(recipe_of(options, method, seed), folder.path, overwrite=folder.is_run)
    return folder.read_metrics()


def table(options: Namespace, runs: dict[tuple[str, int], dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Scores in per cent, mean and standard deviation over the seeds."""
    tasks = list(next(iter(runs.values()))["after"])
    lines = [f"| method | {' | '.join(tasks)} | average | trained | minutes |", "|---|" + "---|" * (len(tasks) + 3)]
    records = []
    for method in options.methods:
        own = [runs[method, seed] for seed in range(options.seeds)]
        scores = {task: [100 * _score(metrics["after"][task]) for metrics in own] for task in tasks}
        scores["average"] = [100 * metrics["average"]["after"] for metrics in own]
        minutes = statistics.mean(metrics["train_seconds"] / 60 for metrics in own)
        cells = [spread(values) for values in scores.values()]
        trained = sum(own[0]["parameters"].values())
        lines.append(f"| {method} | {' | '.join(cells)} | {trained:,} | {minutes:.0f} |")
        records.append({"method": method, "scores": scores, "trained": trained, "minutes": minutes})
    return "\n".join(lines), records


def _score(metrics: dict[str, float]) -> float:
    return metrics.get("score", next(iter(metrics.values())))


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with GLUE's files, as docs/tasks.md names them")
    parser.add_argument("--model", required=True, help="folder or Hub id of the encoder")
    parser.add_argument("--work", default="runs/encoder", help="folder for the runs")
    parser.add_argument("--methods", nargs="+", default=["lora", "mtl-lora", "peml"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--remark", default="", help="put below the table")
    options = parser.parse_args()
    runs = {(m, s): run(options, m, s) for m in options.methods for s in range(options.seeds)}
    text, records = table(options, runs)
    head = f"# Eight GLUE tasks on a sentence encoder\n\n{options.steps} steps of 16 rows, {options.seeds} seed(s).\n\n"
    remark = f"\n\n{options.remark}" if options.remark else ""
    (RESULTS / "encoder.md").write_text(f"{head}{text}{remark}\n", encoding="utf-8")
    record = environment(torch.get_num_threads()) | {"steps": options.steps, "seeds": options.seeds, "rows": records}
    (RESULTS / "encoder.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
