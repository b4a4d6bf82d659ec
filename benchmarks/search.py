"""Does searching matter? `python -m benchmarks.search toy`, or `... encoder --data FOLDER --model FOLDER`.

PEML against what it is made of, on equal numbers of trained parameters: LoRA at PEML's rank and rank-matched, LoRA
with a standard prefix (a table, or made by a network), a prefix alone, one after the other, a random architecture of
the same space, the architecture that was found trained again from nothing, MTL-LoRA; and the relaxations of the search
beside each other, with what is lost where it ends. With `--tune N` every row has its learning rates from N trials of
`peml tune` on rows held out of the training rows; rows that are variants of PEML take PEML's.

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
from peml.tuning import TuneFolder, tune

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
    "MTL-LoRA": {"method": "mtl-lora"},
    "PEML": {"method": "peml", "size": "own"},
    "random architecture": {"method": "peml", "architecture": "random", "size": "own", "rates": "PEML"},
    "PEML's architecture, trained anew": {"method": "peml", "architecture": "found", "size": "own", "rates": "PEML"},
    "PEML, Gumbel": {"method": "peml", "set": {"prompt.relaxation": "gumbel"}, "size": "own", "rates": "PEML"},
    "PEML, sigmoid": {"method": "peml", "set": {"prompt.relaxation": "sigmoid"}, "size": "own", "rates": "PEML"},
    "PEML, alternate": {"method": "peml", "regime": "alternate", "size": "own", "rates": "PEML"},
}
"""What each row trains. `size`: "own", all of PEML's settings; "rank", its rank; otherwise matched to its numbers.
`rates`: the row whose learning rates it takes; otherwise it is tuned itself."""


def toy(options: Namespace) -> dict[str, Any]:
    """The package's own tasks on its own model."""
    train = {**TRAIN, "max_steps": options.steps or 400}
    ranges = {
        "train.learning_rate": [1e-3, 2e-3, 4e-3, 8e-3],
        "train.prompt_learning_rate": [4e-3, 1e-2, 2e-2, 5e-2],
    }
    return {"model": "toy", "tasks": [{"suite": "toy"}], "train": train, "peml": SETTINGS["peml"], "ranges": ranges}


def encoder(options: Namespace) -> dict[str, Any]:
    """Six GLUE tasks on a sentence encoder, by the recipe of the package."""
    data = yaml.safe_load(ENCODER.read_text(encoding="utf-8"))
    task = data["tasks"][0] | {"path": options.data, "include": SHORT, "limit_eval": 400}
    heads = {key: value for key, value in data["set"].items() if key.startswith("heads.")}
    own = {
        "adapter.r": 12,
        "adapter.lora_alpha": 24,
        "prompt.num_virtual_tokens": 16,
        "prompt.budget_tokens": 8.0,
        "prompt.width": 64,
        "prompt.embedding_dim": 32,
        "prompt.head_rank": 16,
    }
    # Heads fitted on few rows leave the training something to do.
    own_rates = {"prompt_learning_rate": 5e-3, "architecture_learning_rate": 2e-2, "probe_rows": 200}
    train = data["train"] | own_rates | {"max_steps": options.steps or 400}
    ranges = {
        "train.learning_rate": [2e-4, 5e-4, 1e-3],
        "train.prompt_learning_rate": [1e-3, 3e-3, 1e-2],
    }
    return {
        "model": options.model, "tasks": [task], "train": train, "heads": heads, "peml": own, "mixing": data["mixing"],
        "ranges": ranges,
    }  # fmt: skip


SUITES = {"toy": toy, "encoder": encoder}


def base_recipe(suite: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What all rows have alike."""
    train = {**suite["train"], "seed": seed, "save_strategy": "no"}
    keys = ("model", "tasks", "mixing")
    return {key: suite[key] for key in keys if key in suite} | {"train": train, "evaluate_before": False}


def sized(suite: Mapping[str, Any], ways: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What sets every row's method up, with ranks and lengths that train as many numbers as PEML does in its search."""
    heads, own = suite.get("heads", {}), suite["peml"]
    whole = Recipe.model_validate(base_recipe(suite, 0) | {"method": "peml", "set": {**heads, **own}})
    bench = prepare(whole)
    names = list(bench.tasks)
    budget = trainable_parameters(bench.config(), bench.model)
    named = {"budget": int(own["prompt.budget_tokens"]), "head_rank": own["prompt.head_rank"]}
    found = {}
    for way in ways:
        row = WAYS[way]
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
        found[way] = {"method": row["method"], "set": {**heads, **settings}}
        found[way] |= {"regime": row["regime"]} if "regime" in row else {}
    return found


class Comparison:
    """The jobs of one table, in a folder.

    Args:
        suite: tasks, model, training.
        ways: rows.
        work: folder for the runs.
        trials: of each row's tuning; 0: all train with the suite's rates.
    """

    def __init__(self, suite: Mapping[str, Any], ways: Sequence[str], work: Path, trials: int = 0) -> None:
        self.suite, self.work, self.trials = suite, work, trials
        leaders = {WAYS[way].get("rates", way) for way in ways} if trials else set()
        self.own = sized(suite, [way for way in WAYS if way in {*ways, *leaders}])

    def folder(self, way: str, job: str) -> Path:
        """Of one run, or one tuning."""
        return self.work / "".join(c if c.isalnum() else "-" for c in way.lower()) / job

    def rates(self, way: str) -> dict[str, float]:
        """Learning rates that the row's trials chose: the same number of them for all rows."""
        leader = WAYS[way].get("rates", way)
        if not self.trials:
            return {}
        data = base_recipe(self.suite, 0) | self.own[leader]
        parts = Recipe.model_validate(data).config()
        there = {"train.learning_rate": parts.adapter, "train.prompt_learning_rate": parts.prompt}
        ranges = {key: self.suite["ranges"][key] for key, part in there.items() if part is not None}
        section = {"trials": self.trials, "ranges": ranges, "pruner": "none"}
        folder = TuneFolder(self.folder(leader, f"tuning-{self.trials}"))
        done = folder.summary.exists() and len(folder.read_summary()["trials"]) == self.trials
        if not done:
            tune(Recipe.model_validate(data | {"tune": section}), folder.path, resume=folder.run.is_run)
        summary = folder.read_summary()
        values = next(trial["values"] for trial in summary["trials"] if trial["number"] == summary["best"])
        return {key.removeprefix("train."): value for key, value in values.items()}

    def run(self, way: str, seed: int, architecture: Path | None = None) -> dict[str, Any]:
        """Scores and cost of one job, or of the same with an architecture that was found elsewhere."""
        folder = RunFolder(self.folder(way, f"{seed}-imported" if architecture else str(seed)))
        if not folder.finished:
            data = base_recipe(self.suite, seed) | self.own[way]
            data["train"] |= self.rates(way)
            kind = WAYS[way].get("architecture")
            if kind is not None:
                found = architecture or RunFolder(self.folder("PEML", str(seed))).architecture
                data["architecture"] = f"random:{seed}" if kind == "random" else str(found)
            peml.train(Recipe.model_validate(data), folder.path, overwrite=folder.is_run)
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
                "bill": [m["bill"] for m in own],
                "learning_rates": own[0]["learning_rates"],
                "gap": gaps,
                # Where one came from is a path of the machine.
                "architectures": [
                    {key: value for key, value in m["architecture"].items() if key != "origin"}
                    for m in own
                    if "architecture" in m
                ],
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


def recorded(name: str, terms: Mapping[str, Any], ways: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the record that were trained on the same terms and are not trained now."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    record = {"tune": 0, **json.loads(path.read_text(encoding="utf-8"))}
    same = all(record[key] == value for key, value in terms.items())
    return [row for row in record["rows"] if same and row["way"] not in ways]


def suite_parser(name: str, doc: str) -> ArgumentParser:
    """The command line of a benchmark on one of the suites."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", help="folder with GLUE's files, as docs/tasks.md names them")
    parser.add_argument("--model", help="folder or Hub id of the encoder")
    parser.add_argument("--work", default=f"runs/{name}", help="folder for the runs")
    parser.add_argument("--steps", type=int, help="of each training")
    return parser


def write_table(name: str, title: str, text: str, record: Mapping[str, Any]) -> None:
    """`NAME.md` and `NAME.json` among the results."""
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{text}\n", encoding="utf-8")
    whole = environment(torch.get_num_threads()) | dict(record)
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = suite_parser("search", __doc__)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", type=int, default=0, metavar="N", help="trials of each row's learning rates")
    parser.add_argument("--remark", default="", help="put below the table")
    options = parser.parse_args()
    seeds = range(options.seeds)
    comparison = Comparison(
        SUITES[options.suite](options), options.ways, Path(options.work) / options.suite, options.tune
    )
    # Seed by seed, so that what is there when somebody stops it compares.
    found = {(way, s): comparison.run(way, s) for s in seeds for way in options.ways}
    steps = comparison.suite["train"]["max_steps"]
    record = {"steps": steps, "seeds": options.seeds, "tune": options.tune}
    rows = recorded(f"search-{options.suite}", record, options.ways) + summary(options.ways, seeds, found)
    rows.sort(key=lambda row: list(WAYS).index(row["way"]))
    text = table(rows)
    head = (
        f"{steps} steps, seeds 0 to {options.seeds - 1}; mean and spread. "
        f"Learning rates: {f'{options.tune} trials for each row' if options.tune else 'the same for all rows'}.\n\n"
    )
    remark = f"\n\n{options.remark}" if options.remark else ""
    title = f"Search on the {options.suite} tasks"
    write_table(f"search-{options.suite}", title, f"{head}{text}{remark}", record | {"rows": rows})
    print(text)


if __name__ == "__main__":
    main()
