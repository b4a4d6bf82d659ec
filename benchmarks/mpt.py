"""Multitask prompt tuning against its ablations: `python -m benchmarks.mpt toy` or `... real --data ../shared/data`.

Sources teach, targets are measured, on all of their rows and on a few. Three ways to the same targets:

- prompt tuning: a prompt per target task, from words of the vocabulary (no sources);
- MPT without distillation: student on the sources, then adaptation;
- MPT: teachers, distilled student, adaptation.

Every job is a run folder of its own, and a finished one is not run again; runs on few rows go on from the stages of
the run on all rows, because sources do not change with the targets.
"""

from __future__ import annotations

import json
import shutil
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import peml
from benchmarks.record import environment, spread
from peml.training import Recipe, RunFolder

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "prompt tuning": {"method": "prompt-tuning", "per_task": True},
    "MPT without distillation": {"method": "mpt", "regime": {"distillation_weight": 0.0}},
    "MPT": {"method": "mpt", "regime": {"distillation_weight": 0.9}},
}
SHOTS = (None, 32, 16, 4)

TOY = {"sources": ["mood", "entailment", "odd", "past"], "targets": ["trait", "passive"]}
PAIR = "{{ sentence1 }}\nDoes it follow that {{ sentence2 }}\nAnswer:"
YES_NO = {"labels": {"entailment": "yes", "not_entailment": "no"}, "choices": ["yes", "no"]}
SAME = "First: {{ sentence1 }}\nSecond: {{ sentence2 }}\nDo they say the same? Answer:"
REAL: dict[str, dict[str, Any]] = {
    "sst2": {
        "path": "glue_sst2", "prompt": "Review: {{ sentence }}\nIs it good or bad? It is", "answer": "label",
        "labels": {"0": "bad", "1": "good"}, "choices": ["bad", "good"],
    },
    "qnli": {
        "path": "glue_qnli", "eval": "dev_subset", "answer": "label", **YES_NO,
        "prompt": "{{ sentence1 }}\n{{ sentence2 }}\nDoes this answer the question? Answer:",
    },
    "qqp": {"path": "glue_qqp", "prompt": SAME, "answer": "label", "labels": {"0": "no", "1": "yes"},
            "choices": ["no", "yes"]},
    "mnli": {
        "path": "glue_mnli", "prompt": PAIR, "answer": "label", "choices": ["yes", "no", "maybe"],
        "labels": {"entailment": "yes", "contradiction": "no", "neutral": "maybe"},
    },
    "mrpc": {"path": "glue_mrpc", "prompt": SAME, "answer": "label", "labels": {"0": "no", "1": "yes"},
             "choices": ["no", "yes"]},
    "rte": {"path": "glue_rte", "prompt": PAIR, "answer": "label", **YES_NO},
    "cb": {
        "path": "superglue_cb", "prompt": "{{ premise }}\nDoes it follow that {{ hypothesis }}\nAnswer:",
        "answer": "label", "choices": ["yes", "no", "maybe"],
        "labels": {"entailment": "yes", "contradiction": "no", "neutral": "maybe"},
    },
}  # fmt: skip
SOURCES, TARGETS = ["sst2", "qnli", "qqp", "mnli"], ["mrpc", "rte", "cb"]


def toy(options: Namespace) -> dict[str, Any]:
    """Tasks of the package, on its model."""
    names = TOY["sources"] + TOY["targets"]
    return {"model": "toy", "tasks": [{"suite": "toy", "include": names}], "sizes": TOY, "max_length": 64}


def real(options: Namespace) -> dict[str, Any]:
    """GLUE and SuperGLUE in files, on a small causal model."""
    tasks = []
    for name, row in REAL.items():
        fields = dict(row)
        folder = Path(options.data) / fields.pop("path")
        files = {"path": folder / "train.jsonl", "eval_path": folder / f"{fields.pop('eval', 'dev')}.jsonl"}
        tasks.append(
            {"name": name, "kind": "choose", "limit_eval": 300, **fields, **{k: str(v) for k, v in files.items()}}
        )
    model = str(Path(options.data) / "models" / "stories3M-hf")
    return {"model": model, "tasks": tasks, "sizes": {"sources": SOURCES, "targets": TARGETS}, "max_length": 96}


SUITES = {"toy": toy, "real": real}


def jobs(options: Namespace) -> Iterator[tuple[int, str, int | None]]:
    """Seed, way, rows per target."""
    for seed in range(options.seeds):
        for way in WAYS:
            for shots in options.shots:
                yield seed, way, shots


def recipe_of(options: Namespace, seed: int, way: str, shots: int | None) -> Recipe:
    """The recipe of one job; steps and rates are the same for all ways."""
    suite = SUITES[options.suite](options)
    settings, sizes = WAYS[way], suite["sizes"]
    steps = options.steps if shots is None else options.few_steps
    tasks: list[dict[str, Any]] = suite["tasks"]
    recipe: dict[str, Any] = {"model": suite["model"], "method": settings["method"], "evaluate_before": False}
    recipe["set"] = {"prompt.num_virtual_tokens": options.tokens}
    if "regime" in settings:
        stages = {stage: {"max_steps": options.steps} for stage in ("teachers", "student")}
        recipe["regime"] = {**sizes, **settings["regime"], **stages, "shots": shots}
    else:
        recipe["set"]["prompt.per_task"] = True
        tasks = [_only(task, sizes["targets"], shots) for task in tasks if _wanted(task, sizes["targets"])]
    recipe["train"] = {
        "max_steps": steps, "max_length": suite["max_length"], "per_device_train_batch_size": options.rows,
        "prompt_learning_rate": options.rate, "seed": seed, "save_strategy": "no",
    }  # fmt: skip
    return Recipe.model_validate(recipe | {"tasks": tasks})


def _wanted(task: dict[str, Any], targets: list[str]) -> bool:
    return "suite" in task or task["name"] in targets


def _only(task: dict[str, Any], targets: list[str], shots: int | None) -> dict[str, Any]:
    task = dict(task)
    if "suite" in task:
        task["include"] = targets
    return task if shots is None else task | {"limit_train": shots}


def folder_of(options: Namespace, seed: int, way: str, shots: int | None) -> Path:
    """Where a job's run lies."""
    return Path(options.work) / options.suite / way.replace(" ", "-") / f"{shots or 'all'}-{seed}"


def run(options: Namespace, seed: int, way: str, shots: int | None) -> dict[str, Any]:
    """Scores and cost of one job."""
    path = folder_of(options, seed, way, shots)
    folder = RunFolder(path)
    if not folder.finished:
        recipe = recipe_of(options, seed, way, shots)
        stages = folder_of(options, seed, way, None) / "stages"
        if shots is not None and stages.exists():
            path.mkdir(parents=True, exist_ok=True)
            shutil.copytree(stages, path / "stages", dirs_exist_ok=True)
            (path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        peml.train(recipe, path, resume=True)
    return folder.read_metrics()


def table(options: Namespace, metrics: dict[tuple[int, str, int | None], dict[str, Any]]) -> tuple[str, list[Any]]:
    """Mean and standard deviation over the seeds, per target and on average."""
    sizes = SUITES[options.suite](options)["sizes"]
    targets = sizes["targets"]
    lines = [f"| rows per target | | {' | '.join(targets)} | average | trained | seconds, all stages |"]
    lines.append("|---|---|" + "---|" * (len(targets) + 3))
    records = []
    for shots in options.shots:
        for way in WAYS:
            runs = [metrics[seed, way, shots] for seed in range(options.seeds)]
            scores = {t: [100 * next(iter(run["after"][t].values())) for run in runs] for t in targets}
            scores["average"] = [statistics.mean(values) for values in zip(*scores.values(), strict=True)]
            seconds = [
                run["train_seconds"] + sum(s["train_seconds"] for s in run.get("stages", {}).values()) for run in runs
            ]
            cells = [spread(values) for values in scores.values()]
            cells += [f"{sum(runs[0]['parameters'].values()):,}", f"{statistics.mean(seconds):.0f}"]
            lines.append(f"| {shots or 'all'} | {way} | {' | '.join(cells)} |")
            records.append({"shots": shots, "way": way, "scores": scores, "seconds": seconds})
    return "\n".join(lines), records


def sources_table(options: Namespace) -> tuple[str, list[Any]]:
    """The same for the sources, after the first two stages: what distillation is for."""
    ways = {"teachers": ("MPT", "teachers"), "student": ("MPT", "student")}
    ways["student without distillation"] = ("MPT without distillation", "student")
    sources = SUITES[options.suite](options)["sizes"]["sources"]
    lines = [f"| after | {' | '.join(sources)} | average |", "|---|" + "---|" * (len(sources) + 1)]
    records = []
    for title, (way, stage) in ways.items():
        runs = [RunFolder(folder_of(options, s, way, None) / "stages" / stage) for s in range(options.seeds)]
        after = [run.read_metrics()["after"] for run in runs]
        scores = {task: [100 * next(iter(own[task].values())) for own in after] for task in sources}
        scores["average"] = [statistics.mean(values) for values in zip(*scores.values(), strict=True)]
        lines.append(f"| {title} | {' | '.join(map(spread, scores.values()))} |")
        records.append({"stage": title, "scores": scores})
    return "\n".join(lines), records


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.mpt", description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", default="data", help="folder with the data sets in their published formats")
    parser.add_argument("--work", default="runs/mpt", help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of every stage, on all rows")
    parser.add_argument("--few-steps", type=int, default=400, help="of the last stage, on few rows")
    parser.add_argument("--rows", type=int, default=16, help="rows per step")
    parser.add_argument("--tokens", type=int, default=20, help="soft tokens")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of the prompts; 0.03 for `real`")
    parser.add_argument("--shots", type=lambda s: None if s == "all" else int(s), nargs="*", default=list(SHOTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    metrics = {}
    for job in jobs(options):
        metrics[job] = run(options, *job)
        scores = {task: round(next(iter(own.values())), 3) for task, own in metrics[job]["after"].items()}
        print(*job, scores, flush=True)
    rows, records = table(options, metrics)
    taught, stages = sources_table(options)
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "work")}
    record = {"settings": settings, **environment(options.threads), "records": records, "sources": stages}
    name = f"mpt-{options.suite}"
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sizes = SUITES[options.suite](options)["sizes"]
    head = (
        f"# MPT and its ablations, {options.suite}\n\n`python -m benchmarks.mpt {options.suite}`: sources "
        f"{', '.join(sizes['sources'])}; first metric of each target in per cent, mean ± standard deviation of "
        f"{options.seeds} seeds. {options.tokens} soft tokens, {options.steps} steps of {options.rows} rows per stage "
        f"({options.few_steps} on few rows), learning rate {options.rate:g}, CPU.\n\n"
    )
    text = f"{head}{rows}\n\nThe sources, {options.steps} steps each:\n\n{taught}\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
