"""The command line: what was asked for, one function that does it, and errors in one sentence.

`peml train` goes on in `peml.training.recipe`, which names a row of `peml.methods`, whose adapter and prompt
`peml.tuner` attaches; the equations are in `peml.adapters` and `peml.prompts`.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peml.cli_affinity import affinity, transfer
from peml.cli_evaluate import evaluate
from peml.cli_plan import plan
from peml.cli_report import console, scores_table
from peml.cli_tasks import tasks_app
from peml.cli_use import export, generate, serve
from peml.errors import PemlError

app = typer.Typer(
    help="Fine-tune one language model for many tasks with one adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(tasks_app, name="tasks")
app.command()(evaluate)
app.command()(export)
app.command()(serve)
app.command()(generate)
app.command()(affinity)
app.command()(transfer)
app.command()(plan)


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe, a YAML file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that lies there.")] = False,
    run: Annotated[Path | None, typer.Option("--from", help="Finished run whose adapter gets further tasks.")] = None,
    add_task: Annotated[Path | None, typer.Option(help="YAML file with the tasks that it gets.")] = None,
    freeze: Annotated[str, typer.Option(help="With --from: shared (train the new tasks alone) or none.")] = "shared",
    init: Annotated[str, typer.Option(help="With --from: identity, mean, or copy:TASK.")] = "identity",
    beside: Annotated[str | None, typer.Option(help="With --from: the task whose groups they join.")] = None,
    retrain: Annotated[str | None, typer.Option(help="With --from: the task whose cluster is trained afresh.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Architecture file of an earlier search, or random:SEED: nothing is searched.")
    ] = None,
) -> None:
    """Train one adapter on the tasks of a recipe, add tasks to a trained one, or train one of its clusters again."""
    from peml import regimes
    from peml.training.bill import bill_line

    what: Any = recipe
    if (run is None) != (add_task is None and retrain is None) or (run is None) == (recipe is None):
        raise PemlError("give a recipe, or --from RUN with --add-task FILE or --retrain TASK")
    if add_task is not None and retrain is not None:
        raise PemlError("--add-task and --retrain are two trainings: give one of them")
    if run is not None and retrain is not None:
        what = regimes.again_recipe(run, retrain)
        output = output or run.with_name(f"{run.name}-{retrain}-again")
    if run is not None and add_task is not None:
        what = regimes.grown_recipe(run, add_task, freeze, init, beside)
        output = output or run.with_name(f"{run.name}+{add_task.stem}")
    if architecture is not None:
        if recipe is None:
            raise PemlError("--architecture goes with a recipe: tasks are added to the architecture that a run has")
        from peml.training.recipe import load_recipe

        what = load_recipe(recipe, architecture=architecture)
        output = output or Path(what.train.get("output_dir") or Path("runs") / recipe.stem)
    folder = regimes.train(what, output, resume=resume, overwrite=overwrite, console=console)
    metrics = folder.read_metrics()
    console.print(scores_table(metrics, [when for when in ("before", "after") if when in metrics]))
    count = sum(metrics["parameters"].values())
    if "kept" in metrics:
        kept = metrics["kept"]
        console.print(f"kept step {kept['step']} of {metrics['steps']}, the best by {escape(kept['metric'])}")
    earlier = sum(stage["train_seconds"] for stage in metrics.get("stages", {}).values())
    before = f" after {earlier:.0f} s in earlier stages" if earlier else ""
    console.print(
        f"{count:,} trained parameters, {metrics['train_seconds']:.0f} s of training{before}, "
        f"run in {escape(str(folder.path))}"
    )
    console.print(bill_line(metrics["bill"]), highlight=False)


@app.command()
def tune(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file; its section `tune` says what is tried.")],
    trials: Annotated[int | None, typer.Option(help="Trials in all; default as the recipe says, or 20.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the tuning; default runs/NAME-tune.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the trials that lie there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a tuning that lies there.")] = False,
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="Keep every trial's weights.")] = False,
) -> None:
    """Look for better settings of a recipe, by trials that are measured on rows held out of its training rows."""
    from peml.tuning import tune as run_tuning
    from peml.tuning.show import show_tuning

    folder = run_tuning(
        recipe,
        output,
        trials=trials,
        resume=resume,
        overwrite=overwrite,
        keep_adapters=keep_adapters,
        console=console,
    )
    show_tuning(folder.read_summary(), console)
    console.print(f"train with what was found: peml train {escape(str(folder.best))}", soft_wrap=True)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file; its section `compare` has what differs.")],
    methods: Annotated[str, typer.Option(help="Methods, with commas; default as the recipe says.")] = "",
    seeds: Annotated[int | None, typer.Option(help="Trainings of each; default as the recipe says, or 3.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default runs/NAME-compare.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Method that the others are tested against.")] = None,
    trials: Annotated[int | None, typer.Option(help="Trials of each method's tuning; 0: none.")] = None,
    workers: Annotated[int, typer.Option(help="Trainings at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of each; default an even share.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, auto or local.")] = None,
    costs: Annotated[bool, typer.Option("--costs", help="Also measure latency and memory of the trained.")] = False,
) -> None:
    """Train methods on equal budgets, with several seeds, and test what they gain; called again, it goes on."""
    from peml.compare import compare as run_compare
    from peml.compare.show import results_table

    folder = run_compare(
        recipe,
        output,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        seeds=seeds,
        baseline=baseline,
        trials=trials,
        workers=workers,
        threads=threads,
        ray=ray,
        costs=costs,
        console=console,
    )
    results = folder.read_results()
    console.print(results_table(results))
    failed = [job for job in results["jobs"] if job["state"] == "failed"]
    for job in failed:
        console.print(Text(f"failed: {job['name']}: {job['error']}", "yellow"), soft_wrap=True)
    console.print(f"results in {escape(str(folder.results))}; read them with: peml report {escape(str(folder.path))}")
    if failed:
        console.print(f"{len(failed)} of {len(results['jobs'])} jobs failed; the same command tries them again")
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `peml compare` wrote.")],
    output: Annotated[Path | None, typer.Option(help="HTML file; default report.html in the folder.")] = None,
) -> None:
    """Write a comparison as one HTML file that needs no network, and as Markdown and JSON beside it."""
    from peml.report import report as write_report

    for path in write_report(folder, output):
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)


@app.command(name="inspect")
def inspect_run(folder: Annotated[Path, typer.Argument(help="Run or adapter folder.")]) -> None:
    """Show tasks, adapter, prompt, derived architecture, parameters and where a run can be exported to."""
    from peml.inspection import draw_pictures, inspect_folder, show

    found = inspect_folder(folder)
    show(found, console)
    for picture in draw_pictures(found, folder):
        console.print(f"picture  {escape(str(picture))}", soft_wrap=True)


@app.command(name="methods")
def list_methods() -> None:
    """List the methods that a recipe can name."""
    from peml.methods import METHODS

    table = Table.grid(padding=(0, 2))
    for name, row in METHODS.items():
        axes = " x ".join("none" if part is None else type(part).__name__ for part in (row.adapter, row.prompt))
        folds = {"-": "", "no": ", cannot be folded"}.get(row.folds, f", folds {row.folds}")
        about = Text(row.summary).append(f"\n{axes} x {row.regime}{folds}", style="dim")
        table.add_row(Text(name, style="bold"), about)
    console.print(table)
    console.print(
        "\nAxes: adapter x prompt x regime. To fold is to merge into the weights, or to export as plain LoRA."
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=10, help="Steps of each method.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Train four methods on the toy tasks and compare them; needs no network."""
    from peml.demo import demo as run_demo

    results = run_demo(output, steps, seed, Console(quiet=True) if as_json else console)
    if as_json:
        print(json.dumps(results, indent=2))


LOWER = {
    "train": "below train lower per_device_train_batch_size (gradient_accumulation_steps makes up for it), "
    "per_device_eval_batch_size or max_length, or set activation_checkpointing: true there, and train with --overwrite",
    "serve": "lower --cache-tokens or --batch-tokens",
    "generate": "lower --batch-size, or ask for shorter answers",
}
"""What takes most memory, by command."""

INTERRUPTED = 130
"""What typer makes of Ctrl-C."""


def _complain(errors: Console, message: str) -> None:
    errors.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    sys.exit(2)


def main() -> None:
    """Run the command line; a mistake of the user is one sentence and exit code 2."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Deprecations inside libraries say nothing to somebody who runs a command.
    warnings.simplefilter("ignore")
    errors = Console(stderr=True)
    try:
        app()
    except PemlError as error:
        _complain(errors, str(error))
    except OSError as error:
        _complain(errors, f"{error.filename or 'the output folder'}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        from peml.training.guard import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _complain(errors, f"out of memory: {LOWER.get(sys.argv[1], LOWER['train'])} ({str(error)[:200]})")
    except SystemExit as ended:
        # A comparison says itself how it goes on.
        if ended.code == INTERRUPTED and sys.argv[1:2] != ["compare"]:
            errors.print("interrupted; what has been stored goes on with --resume")
        raise
