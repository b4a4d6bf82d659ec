"""`peml evaluate`: a finished run measured again, by its own tasks or by lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from peml.cli_report import console
from peml.errors import PemlError


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder that `peml train` wrote.")],
    ablate: Annotated[
        str, typer.Option(help="Also measure without parts: prompt, adapter, both, several with commas, or all.")
    ] = "",
    harness: Annotated[
        str, typer.Option(help="Measure with these tasks of lm-eval instead, with commas; needs the extra lm-eval.")
    ] = "",
    harness_tasks: Annotated[Path | None, typer.Option(help="Folder with YAML tasks of your own for lm-eval.")] = None,
    harness_route: Annotated[
        list[str] | None,
        typer.Option(help="HARNESS_TASK=TASK where names differ; may be a pattern, as mmlu_*=qa, and repeated."),
    ] = None,
    harness_limit: Annotated[int | None, typer.Option(help="Rows of each of lm-eval's tasks; default all.")] = None,
    harness_fewshot: Annotated[
        int | None, typer.Option(help="Answered examples in each of its prompts; default as the task says.")
    ] = None,
    harness_batch: Annotated[str, typer.Option(help="Rows of its batches, or auto.")] = "8",
) -> None:
    """Measure a run on every task, or on tasks of lm-eval, each answered by the adapter's task that it is routed to."""
    further = [harness_tasks, harness_route, harness_limit, harness_fewshot]
    if not harness and any(given is not None for given in further):
        raise PemlError("--harness-tasks, -route, -limit and -fewshot go with --harness NAMES")
    if harness and ablate:
        raise PemlError("--ablate and --harness are two measurements: give one of them")
    if harness:
        from peml.cli_report import harness_table
        from peml.harness import measure_run
        from peml.training.folder import RunFolder

        results = measure_run(
            folder,
            [name.strip() for name in harness.split(",") if name.strip()],
            tasks=harness_tasks,
            limit=harness_limit,
            fewshot=harness_fewshot,
            routes=harness_route or (),
            batch_size=harness_batch,
        )
        console.print(harness_table(results))
        console.print(f"lm-eval's record is in {escape(str(RunFolder(folder).harness))}", soft_wrap=True)
        return
    from peml.cli_report import contributions_table, scores_table
    from peml.evaluation import ablate as without
    from peml.evaluation import ablation_record, parts_there, read_parts
    from peml.training.folder import RunFolder
    from peml.training.progress import progress_bar
    from peml.training.run import open_run

    named = read_parts(ablate)
    bench, model = open_run(folder)
    tuner: Any = model.base_model
    parts = parts_there(named, tuner.config_in_force)
    with progress_bar(console) as progress:
        results = without(tuner, lambda: bench.evaluate(model, progress), parts)
    record = ablation_record(results, bench.tasks)
    run = RunFolder.existing(folder)
    run.write_json(run.evaluation, record)
    console.print(scores_table(record, list(results)))
    if parts:
        console.print(contributions_table(record["contributions"]))
