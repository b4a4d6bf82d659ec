"""What it is worth to know which tasks should share: `python -m benchmarks.sharing toy`, or `encoder --data FOLDER`.

toy: two families of tasks that contradict each other (`benchmarks.sharing_tasks`). Does affinity find the families, and
what do adapters by cluster and by depth reach beside one LoRA that all tasks share?

encoder: eight GLUE tasks on a sentence encoder, with `recipes/encoder.yaml`; every row has the rank at which it trains
as many numbers in all as one LoRA of the recipe's rank.

Every job is a folder of its own, and a finished one is not run again.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

import peml
from benchmarks.record import environment, spread
from benchmarks.sharing_tasks import FAMILIES, TASKS, family_of, write_families
from peml.affinity import Affinity, How, find_affinity, write_affinity
from peml.config import PemlConfig
from peml.methods import match_params, trainable_parameters
from peml.training import Recipe, RunFolder
from peml.training.grouping import Grouped
from peml.training.run import attach
from peml.training.workbench import load_base

RESULTS = Path(__file__).parent / "results"
CORE_SECONDS = "core_seconds.json"
RECIPE = Path(__file__).parent.parent / "recipes" / "encoder.yaml"

Ways = dict[str, dict[str, Any]]

TOY: Ways = {
    "one LoRA, equal active": {"method": "lora", "set": {"adapter.r": 8}},
    "one LoRA, total of one_plus_n": {"method": "lora", "set": {"adapter.r": 16, "adapter.lora_alpha": 32}},
    "one LoRA, total of progressive": {"method": "lora", "set": {"adapter.r": 22, "adapter.lora_alpha": 44}},
    "single-task LoRA": {"method": "single-task", "set": {"adapter.r": 8}},
    "one_plus_n, LoRA": {"method": "lora", "set": {"adapter.r": 8}, "regime": {"name": "one_plus_n"}},
    "one_plus_n, CGC-LoRA": {"method": "cgc-lora", "set": {"adapter.r": 8}, "regime": {"name": "one_plus_n"}},
    "progressive, LoRA": {"method": "lora", "set": {"adapter.r": 8}, "regime": {"name": "progressive"}},
}
ENCODER: Ways = {
    "single-task LoRA": {"method": "single-task"},
    "one LoRA": {"method": "lora"},
    "MTL-LoRA": {"method": "mtl-lora"},
    "CGC-LoRA": {"method": "cgc-lora"},
    "one_plus_n, CGC-LoRA": {"method": "cgc-lora", "regime": {"name": "one_plus_n"}},
    "progressive, LoRA": {"method": "lora", "regime": {"name": "progressive"}},
}


def base_of(options: Namespace, seed: int) -> dict[str, Any]:
    """A recipe without a method."""
    if options.what == "encoder":
        data: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        data |= {"model": options.model}
        data["tasks"][0]["path"] = options.data
        limits = {"limit_train": options.train_rows, "limit_eval": options.eval_rows}
        data["tasks"][0] |= {key: limit for key, limit in limits.items() if limit is not None}
        # Heads fitted on few rows leave the training something to do.
        data["train"] |= {"probe_rows": 200}
        data |= {"evaluate_before": False}
    else:
        entries = write_families(Path(options.work) / f"rows-{seed}", seed, options.train_rows, options.eval_rows)
        data = {"model": "toy", "tasks": entries, "mixing": {"by": "equal"}, "evaluate_before": False}
        data["train"] = {"max_length": 64, "per_device_train_batch_size": 24, "learning_rate": 1e-3}
    data["train"] |= {"seed": seed, "max_steps": options.steps, "save_strategy": "no", "logging_steps": 50}
    return data


def recipe_of(options: Namespace, way: dict[str, Any], seed: int) -> Recipe:
    """The recipe of one job; clusters are those that affinity found with the same seed."""
    data, own = base_of(options, seed), dict(way)
    data["set"] = {**data.get("set", {}), **own.pop("set", {})}
    if "regime" in own:
        found = {"clusters": str(affinity_folder(options, seed).resolve()), "num_clusters": options.clusters}
        own["regime"] = {**own["regime"], **found}
    recipe = Recipe.model_validate(data | own)
    return recipe if options.what == "toy" else matched(recipe)


def trained_base(recipe: Recipe) -> PreTrainedModel:
    """The base without what no task's answer comes from: heads do not read a pooler."""
    base = load_base(recipe)[1]
    if hasattr(base, "pooler"):
        base.pooler = None
    return base


@functools.lru_cache(maxsize=1)
def base_and_budget(model: str) -> tuple[PreTrainedModel, int]:
    """The encoder, and how many numbers one LoRA of the recipe trains; heads are the same in all rows."""
    recipe = Recipe.model_validate(yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {"model": model})
    base = trained_base(recipe)
    return base, trainable_parameters(headless(recipe), base)


def headless(recipe: Recipe) -> PemlConfig:
    """The adapter alone, with the groups that affinity gives it."""
    config, how = recipe.config(), recipe.how
    config.task_type, config.heads = "FEATURE_EXTRACTION", None
    if isinstance(how, Grouped):
        found = Affinity.load(str(how.clusters), config.task_names)
        config.set_groups(how.levels(found.between, config.task_names))
    return config


def matched(recipe: Recipe) -> Recipe:
    """The same at the rank that trains as many numbers as one LoRA does; alpha / r stays 2, as in the recipe."""
    base, budget = base_and_budget(recipe.model)
    adapter = match_params(headless(recipe), base, budget).adapter
    assert adapter is not None
    settings = recipe.settings | {"adapter.r": adapter.r, "adapter.lora_alpha": 2 * adapter.r}
    return recipe.model_copy(update={"set": settings})


def affinity_folder(options: Namespace, seed: int) -> Path:
    return Path(options.work) / f"affinity-{seed}"


def affinity(options: Namespace, seed: int) -> Affinity:
    """Measured once for each seed."""
    folder = affinity_folder(options, seed)
    if not (folder / "affinity.json").exists():
        recipe = Recipe.model_validate(base_of(options, seed) | {"method": "lora"})
        how = How(warmup_steps=options.warmup, batches=options.batches, batch_rows=16, clusters=options.clusters)
        timed(folder, lambda: write_affinity(find_affinity(recipe, how), folder))
    return Affinity.load(folder)


def timed(folder: Path, work: Callable[[], object]) -> None:
    """Do what fills a folder, and leave in it the seconds of a core that it took, loading included.

    Seconds of a core, because other work on the machine stretches these least.
    """
    begun = time.process_time()
    work()
    (folder / CORE_SECONDS).write_text(json.dumps(time.process_time() - begun), encoding="utf-8")


def core_seconds_of(folders: Sequence[Path]) -> list[float] | None:
    """What was written, by folder; None: not by all of them."""
    files = [folder / CORE_SECONDS for folder in folders]
    if not all(file.exists() for file in files):
        return None
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def recovered(found: Affinity) -> bool:
    """Whether the clusters are the families."""
    families = {frozenset(task for task in TASKS if family_of(task) == family) for family in FAMILIES}
    return {frozenset(group) for group in found.clustering.clusters} == families


def run(options: Namespace, name: str, way: dict[str, Any], seed: int) -> dict[str, Any]:
    """Scores and cost of one job."""
    folder = run_folder(options, name, seed)
    if not folder.finished:
        recipe = recipe_of(options, way, seed)
        timed(folder.path, lambda: peml.train(recipe, folder.path, overwrite=folder.is_run))
    return folder.read_metrics()


def run_folder(options: Namespace, name: str, seed: int) -> RunFolder:
    return RunFolder(Path(options.work) / f"{name.replace(' ', '-').replace(',', '')}-{seed}")


def numbers(recipe: Recipe, metrics: dict[str, Any]) -> tuple[int, int]:
    """What is trained in the adapter, and most that works for one task."""
    config = recipe.config()
    config.task_type, config.heads = "FEATURE_EXTRACTION", None
    config.set_groups(metrics.get("groups"))
    active = attach(trained_base(recipe), config).base_model.active_parameters()
    return metrics["parameters"]["adapter"], max(active.values())


def table(options: Namespace, ways: Ways) -> tuple[str, list[dict[str, Any]]]:
    """Scores in per cent, mean and standard deviation over the seeds."""
    seeds, lines, records = range(options.seeds), [], []
    for name, way in ways.items():
        begun = time.perf_counter()
        own = [run(options, name, way, seed) for seed in seeds]
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        scores = {
            task: [100 * m["after"][task].get("score", next(iter(m["after"][task].values()))) for m in own]
            for task in own[0]["after"]
        }
        average = [100 * m["average"]["after"] for m in own]
        worst = [min(values) for values in zip(*scores.values(), strict=True)]
        total, active = numbers(recipe_of(options, way, 0), own[0])
        seconds = statistics.mean(m["train_seconds"] for m in own)
        cells = [name, spread(average), spread(worst), f"{total:,}", f"{active:,}", f"{seconds:.0f}"]
        if options.what == "encoder":
            cells += [spread(values) for values in scores.values()]
        if not lines:
            more = list(scores) if options.what == "encoder" else []
            head = ["method", "average", "worst task", "trained", "active", "seconds", *more]
            lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines.append(f"| {' | '.join(cells)} |")
        records.append({"method": name, "average": average, "scores": scores, "total": total, "active": active,
                        "seconds": [m["train_seconds"] for m in own],
                        "core_seconds": core_seconds_of([run_folder(options, name, seed).path for seed in seeds]),
                        })  # fmt: skip
    return "\n".join(lines), records


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["toy", "encoder"])
    parser.add_argument("--work", help="folder for the runs; default runs/sharing-WHAT")
    parser.add_argument("--data", help="encoder: folder with GLUE's files, as docs/tasks.md names them")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="encoder: folder or Hub id")
    parser.add_argument("--seeds", type=int, help="of the table; default 5 and 3")
    parser.add_argument("--affinity-seeds", type=int, help="default 10 and 3")
    parser.add_argument("--ways", nargs="+", help="names of rows of the table; default all")
    parser.add_argument("--steps", type=int, help="default 200 and 1200")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--clusters", type=int, help="how many; default as many as fit best")
    parser.add_argument("--train-rows", type=int, help="of each task; default 128, and as the recipe says")
    parser.add_argument("--eval-rows", type=int, help="of each task; default 60, and all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the record; default sharing-WHAT")
    options = parser.parse_args()
    toy = options.what == "toy"
    options.work = options.work or f"runs/sharing-{options.what}"
    options.steps = options.steps or (200 if toy else 1200)
    options.seeds = options.seeds or (5 if toy else 3)
    options.affinity_seeds = max(options.seeds, options.affinity_seeds or (10 if toy else 3))
    if toy:
        options.train_rows, options.eval_rows = options.train_rows or 128, options.eval_rows or 60
    if not toy and options.data is None:
        parser.error("encoder needs --data")
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    every = TOY if toy else ENCODER
    ways = {name: way for name, way in every.items() if options.ways is None or name in options.ways}
    measured = []
    for seed in range(options.affinity_seeds):
        measured.append(affinity(options, seed))
        print(seed, measured[-1].clustering.clusters, measured[-1].clustering.score, flush=True)
    rows, records = table(options, ways)
    spent = statistics.mean(found.seconds["total"] for found in measured)
    parts = [f"# Which tasks share: {'two families of toy tasks' if toy else 'eight GLUE tasks'}"]
    over = f"mean and standard deviation over {options.seeds} seeds" if options.seeds > 1 else "seed 0"
    parts.append(
        f"{options.steps} steps, {over}, scores in per cent; clusters "
        f"are those of `peml affinity`: {options.warmup} steps of warm-up, {options.batches} batches of 16 rows a "
        f"task, {spent:.0f} s on average{'' if options.clusters is None else f'; cut into {options.clusters}'}."
    )
    parts.append(rows)
    spent_cores = core_seconds_of([affinity_folder(options, seed) for seed in range(options.affinity_seeds)])
    for row in records:
        if spent_cores and row["core_seconds"]:
            own, whole = statistics.mean(spent_cores), statistics.mean(row["core_seconds"])
            parts.append(
                f"Affinity takes {own:.0f} s of a core, loading included: {100 * own / whole:.1f} % of the "
                f"{whole:.0f} s that {row['method']} takes from its rows to its scores."
            )
    if toy:
        hits = sum(map(recovered, measured))
        parts.append(f"Affinity recovers the families for {hits} of {len(measured)} seeds.")
    clusters = [[list(group) for group in found.clustering.clusters] for found in measured]
    lines = []
    for seed, (own, from_seed) in enumerate(zip(clusters, measured, strict=True)):
        line = f"- seed {seed}: {' / '.join(map(', '.join, own))}"
        line += f"; best silhouette of any number of clusters {max(from_seed.clustering.scores.values()):.2f}"
        if from_seed.agreement is not None:
            line += f"; agreement of two halves of the batches {min(from_seed.agreement.values()):.2f} to "
            line += f"{max(from_seed.agreement.values()):.2f}"
        lines.append(line)
    parts.append("\n".join(lines))
    name = options.name or f"sharing-{options.what}"
    (options.out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    settings = {k: v for k, v in vars(options).items() if k not in ("work", "data", "model", "out", "name")}
    found = [{"clusters": own, "score": m.clustering.score, "cosines": m.cosines,
             "agreement": m.agreement, "seconds": m.seconds}
             for own, m in zip(clusters, measured, strict=True)]  # fmt: skip
    record = {
        "environment": environment(torch.get_num_threads()),
        "options": settings,
        "affinity": found,
        "rows": records,
        "affinity_core_seconds": spent_cores,
    }
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
