"""Does searching matter? `python -m benchmarks.search toy`, or `... encoder --data FOLDER --model FOLDER`.

PEML against what it is made of, on equal numbers of trained parameters: LoRA at PEML's rank and rank-matched, LoRA
with a standard prefix (a table, or made by a network), a prefix alone, one after the other, a random architecture of
the same space, MTL-LoRA; and the relaxations of the search beside each other, with what is lost where it ends.

Every job is a run folder of its own, and a finished one is not run again.
"""

from __future__ import annotations

import copy
import json
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy.stats import ttest_rel

import peml
from benchmarks.record import environment, spread
from peml.demo import SETTINGS, TRAIN
from peml.methods import match_params, method, trainable_parameters
from peml.training import Recipe, RunFolder
from peml.training.workbench import prepare

RESULTS = Path(__file__).parent / "results"
ENCODER = Path(__file__).parent.parent / "recipes" / "encoder.yaml"
SHORT = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli"]
"""GLUE tasks whose texts are short enough for many runs on a CPU."""

WAYS: Mapping[str, Mapping[str, Any]] = {
    "LoRA, PEML's rank": {"method": "lora", "size": "rank"},
    "LoRA, rank-matched": {"method": "lora"},
    "LoRA + prefix (table)": {"method": "lora+prefix", "set": {"prompt.num_virtual_tokens": "budget"}},
    "LoRA + prefix (network)": {
        "method": "lora+prefix",
        "set": {
            "prompt.num_virtual_tokens": "budget",
            "prompt.prefix_projection": True,
            "prompt.encoder_hidden_size": "head_rank",
        },
    },
    "prefix alone": {"method": "prefix"},
    "prefix, then LoRA": {"method": "peml", "regime": {"name": "sequential", "order": "prompt_first"}, "size": "own"},
    "LoRA, then prefix": {"method": "peml", "regime": {"name": "sequential", "order": "adapter_first"}, "size": "own"},
    "random architecture": {"method": "peml", "architecture": "random", "size": "own"},
    "MTL-LoRA": {"method": "mtl-lora"},
    "PEML": {"method": "peml", "size": "own"},
    "PEML, Gumbel": {"method": "peml", "set": {"prompt.relaxation": "gumbel"}, "size": "own"},
    "PEML, sigmoid": {"method": "peml", "set": {"prompt.relaxation": "sigmoid"}, "size": "own"},
    "PEML, alternate": {"method": "peml", "regime": "alternate", "size": "own"},
}
"""What each row trains. `size`: "own", all of PEML's settings; "rank", its rank; otherwise matched to its numbers."""


def toy(options: Namespace) -> dict[str, Any]:
    """The package's own tasks on its own model."""
    train = {**TRAIN, "max_steps": options.steps or 400}
    return {"model": "toy", "tasks": [{"suite": "toy"}], "train": train, "peml": dict(SETTINGS["peml"])}


def encoder(options: Namespace) -> dict[str, Any]:
    """Six GLUE tasks on a sentence encoder, by the recipe of the package."""
    data = yaml.safe_load(ENCODER.read_text(encoding="utf-8"))
    task = data["tasks"][0] | {"path": options.data, "include": SHORT}
    heads = {key: value for key, value in data["set"].items() if key.startswith("heads.")}
    own = {
        "adapter.r": 4,
        "adapter.lora_alpha": 8,
        "prompt.num_virtual_tokens": 16,
        "prompt.budget_tokens": 8.0,
        "prompt.width": 128,
        "prompt.embedding_dim": 64,
        "prompt.head_rank": 32,
    }
    train = data["train"] | {"max_steps": options.steps or 400}
    return {
        "model": options.model, "tasks": [task], "train": train, "heads": heads, "peml": own, "mixing": data["mixing"],
    }  # fmt: skip


SUITES = {"toy": toy, "encoder": encoder}


def base_recipe(suite: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What all rows have alike."""
    train = {**suite["train"], "seed": seed, "save_strategy": "no"}
    keys = ("model", "tasks", "mixing")
    return {key: suite[key] for key in keys if key in suite} | {"train": train, "evaluate_before": False}


def recipes(suite: Mapping[str, Any], seeds: Sequence[int], ways: Sequence[str]) -> dict[tuple[str, int], Recipe]:
    """The recipe of every job, with ranks and lengths that train as many numbers as PEML does in its search."""
    heads, own = suite.get("heads", {}), suite["peml"]
    whole = Recipe.model_validate(base_recipe(suite, 0) | {"method": "peml", "set": {**heads, **own}})
    bench = prepare(whole)
    names = list(bench.tasks)
    budget = trainable_parameters(bench.config(), bench.model)
    jobs = {}
    for way in ways:
        row = WAYS[way]
        named = {"budget": int(own["prompt.budget_tokens"]), "head_rank": own["prompt.head_rank"]}
        settings = {key: named.get(value, value) for key, value in row.get("set", {}).items()}
        if row.get("size") == "own":
            settings = {**own, **settings}
        elif row.get("size") == "rank":
            settings = {key: value for key, value in own.items() if key.startswith("adapter.")} | settings
        else:
            config = method(row["method"], names, settings, heads=copy.deepcopy(bench.config().heads))
            matched = match_params(config, bench.model, budget)
            if matched.adapter is not None:
                # As in PEML, the scale alpha / r stays what it is.
                share = own.get("adapter.lora_alpha", 16) / own["adapter.r"]
                settings |= {"adapter.r": matched.adapter.r, "adapter.lora_alpha": share * matched.adapter.r}
            else:
                settings |= {"prompt.num_virtual_tokens": matched.prompt.num_virtual_tokens}
        for seed in seeds:
            data = base_recipe(suite, seed) | {"method": row["method"], "set": {**heads, **settings}}
            data |= {"regime": row["regime"]} if "regime" in row else {}
            data |= {"architecture": f"random:{seed}"} if "architecture" in row else {}
            jobs[way, seed] = Recipe.model_validate(data)
    return jobs


def run(options: Namespace, recipe: Recipe, way: str, seed: int) -> dict[str, Any]:
    """Scores and cost of one job."""
    name = "".join(c if c.isalnum() else "-" for c in way.lower())
    folder = RunFolder(Path(options.work) / options.suite / name / str(seed))
    if not folder.finished:
        peml.train(recipe, folder.path, overwrite=folder.is_run)
    return folder.read_metrics()


def summary(ways: Sequence[str], seeds: Sequence[int], found: Mapping[tuple[str, int], Any]) -> list[dict[str, Any]]:
    """Of every row its scores in per cent by seed, what it trains, its time, and what its search lost."""
    rows = []
    for way in ways:
        own = [found[way, seed] for seed in seeds]
        tasks = {task: [100 * m["after"][task]["score"] for m in own] for task in own[0]["after"]}
        gaps = [m["search"]["gap"]["lost"]["average"] for m in own if m.get("search", {}).get("gap")]
        rows.append(
            {
                "way": way,
                "average": [100 * m["average"]["after"] for m in own],
                "tasks": tasks,
                "trained": sum(own[0]["parameters"].values()),
                "seconds": [m["train_seconds"] for m in own],
                "gap": gaps,
                "architectures": [m["architecture"] for m in own if "architecture" in m],
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]], against: str = "PEML") -> str:
    """Markdown: mean and standard deviation over seeds, and the paired t-test of the averages against PEML."""
    tasks = list(rows[0]["tasks"])
    peml_row = next((row for row in rows if row["way"] == against), None)
    lines = [
        f"| | average | {against} minus it | p | {' | '.join(tasks)} | trained | seconds | lost at derive |",
        "|---|" + "---|" * (len(tasks) + 6),
    ]
    for row in rows:
        ahead, p = "", ""
        if peml_row is not None and row is not peml_row:
            differences = [a - b for a, b in zip(peml_row["average"], row["average"], strict=True)]
            ahead = spread(differences)
            if len(differences) > 1 and statistics.pstdev(differences) > 0:
                p = f"{ttest_rel(peml_row['average'], row['average']).pvalue:.2f}"
        cells = [spread(row["average"]), ahead, p, *[spread(row["tasks"][task]) for task in tasks]]
        gap = spread(row["gap"]) if row["gap"] else ""
        seconds = statistics.mean(row["seconds"])
        lines.append(f"| {row['way']} | {' | '.join(cells)} | {row['trained']:,} | {seconds:.0f} | {gap} |")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.search", description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", help="folder with GLUE's files, as docs/tasks.md names them")
    parser.add_argument("--model", help="folder or Hub id of the encoder")
    parser.add_argument("--work", default="runs/search", help="folder for the runs")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--remark", default="", help="put below the table")
    options = parser.parse_args()
    seeds = range(options.seeds)
    jobs = recipes(SUITES[options.suite](options), seeds, options.ways)
    # Seed by seed, so that what is there when somebody stops it compares.
    found = {(way, s): run(options, jobs[way, s], way, s) for s in seeds for way in options.ways}
    rows = summary(options.ways, seeds, found)
    text = table(rows)
    steps = jobs[options.ways[0], 0].train["max_steps"]
    head = (
        f"# Search on the {options.suite} tasks\n\n{steps} steps, seeds 0 to {options.seeds - 1}; mean and spread.\n\n"
    )
    remark = f"\n\n{options.remark}" if options.remark else ""
    name = f"search-{options.suite}"
    (RESULTS / f"{name}.md").write_text(f"{head}{text}{remark}\n", encoding="utf-8")
    record = environment(torch.get_num_threads()) | {"steps": steps, "seeds": options.seeds, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
