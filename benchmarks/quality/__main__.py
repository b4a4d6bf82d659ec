"""What methods reach: `python -m benchmarks.quality toy`, or `encoder` and `text` with `--data FOLDER --model FOLDER`.

`peml compare` on the recipe beside this file; the same command goes on where it was stopped, and then writes
`benchmarks/results/quality-TABLE.md` and `.json`. With `--trials N` every method is tuned by as many trials first.
"""

from __future__ import annotations

import json
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from peml.compare import CompareFolder, compare
from peml.report.contents import contents_of
from peml.report.markdown import markdown
from peml.training import Recipe

RESULTS = Path(__file__).parents[1] / "results"
TABLES = ("toy", "encoder", "text")
TITLES = {
    "toy": "Eight toy tasks on the nano model",
    "encoder": "Eight GLUE tasks on a sentence encoder",
    "text": "Text-to-text tasks on a small Llama",
}


def committed(table: str) -> dict[str, Any]:
    """The recipe of a table, as it lies here: names in place of folders."""
    data: dict[str, Any] = yaml.safe_load((Path(__file__).parent / f"{table}.yaml").read_text(encoding="utf-8"))
    return data


def recipe_of(options: Namespace) -> Recipe:
    """The recipe with the folders that were given, and what the command line changes."""
    data = committed(options.table)
    if options.model is not None:
        data["model"] = options.model
    for task in data["tasks"]:
        if options.data is None:
            continue
        if "suite" in task:
            task["path"] = options.data
        elif "path" in task:
            folder = Path(options.data) / task["path"]
            # Where the official rows are not at hand, another's choice of them is.
            found = next((name for name in ("dev", "dev_subset") if (folder / f"{name}.jsonl").exists()), "dev")
            task |= {"path": str(folder / "train.jsonl"), "eval_path": str(folder / f"{found}.jsonl")}
    if options.steps is not None:
        data["train"]["max_steps"] = options.steps
    return Recipe.model_validate(data)


def record_of(folder: CompareFolder, table: str) -> dict[str, Any]:
    """What the comparison has found, with the committed recipe's names, and without pictures and curves."""
    contents = contents_of(folder)
    recipe: Mapping[str, Any] = {**contents["recipe"], **{k: committed(table)[k] for k in ("model", "tasks")}}
    left_out = ("pictures", "curves", "recipes")
    return {key: value for key, value in contents.items() if key not in left_out} | {"recipe": recipe}


def write(record: Mapping[str, Any], options: Namespace, to: Path) -> None:
    """The record as JSON, and its tables."""
    text = markdown({"curves": {}, "pictures": {}, **record})
    begun, _, how = text.partition("## To make it again")
    command = f"python -m benchmarks.quality {options.table}"
    command += "" if options.table == "toy" else " --data FOLDER --model FOLDER"
    command += "" if options.methods is None else f" --methods {shlex.join(options.methods)}"
    for name in ("seeds", "trials", "steps"):
        command += "" if getattr(options, name) is None else f" --{name} {getattr(options, name)}"
    versions = how.rstrip().rsplit("\n\n", 1)[-1]
    remark = f"{options.remark}\n\n" if options.remark else ""
    text = begun.replace("# Comparison", f"# {TITLES[options.table]}", 1)
    text += f"{remark}`{command}`: `benchmarks/quality/{options.table}.yaml`\n\n{versions}\n"
    (to / f"quality-{options.table}.md").write_text(text, encoding="utf-8")
    # One line for each number would be most of the file.
    (to / f"quality-{options.table}.json").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


def options_of(arguments: list[str] | None = None) -> Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", help="folder with the data sets, as docs/tasks.md and the recipe name them")
    parser.add_argument("--model", help="folder or Hub id; default as the recipe says")
    parser.add_argument("--methods", nargs="+", help="some of the recipe's; default all")
    parser.add_argument("--seeds", type=int, help="trainings of each (3)")
    parser.add_argument("--trials", type=int, help="of each method's tuning (0)")
    parser.add_argument("--steps", type=int, help="of each training; default as the recipe says")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--threads", type=int, help="of each; default an even share")
    parser.add_argument("--costs", action="store_true", help="also measure latency and memory")
    parser.add_argument("--work", default="runs/quality", help="folder for the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the record")
    parser.add_argument("--remark", default="", help="put below the tables")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compare, and write the record."""
    options = options_of(arguments)
    folder = compare(
        recipe_of(options),
        Path(options.work) / options.table,
        methods=options.methods,
        seeds=options.seeds,
        trials=options.trials,
        workers=options.workers,
        threads=options.threads,
        costs=options.costs,
        console=Console(),
    )
    record = record_of(folder, options.table)
    write(record, options, options.out)
    failed = [job for job in record["jobs"] if job["state"] == "failed"]
    for job in failed:
        print(f"failed: {job['name']}: {job['error']}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
