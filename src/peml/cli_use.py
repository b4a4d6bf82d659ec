"""`peml export`: what is done with a finished run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

console = Console(quiet=os.environ.get("RANK", "0") != "0")


def export(
    folder: Annotated[Path, typer.Argument(help="Folder that `peml train` wrote.")],
    to: Annotated[str, typer.Option(help="lora, merged, prefix or kv; docs/export.md says which is for what.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Task to export, where they differ; may be repeated; default all.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New folder; default RUN/export/FORMAT.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of a checkpoint's weights: auto (as the base has them), float32, bfloat16 or float16.")
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Load it in a fresh process without peml, and compare logits and answers.")
    ] = False,
    push: Annotated[str | None, typer.Option(help="Also put it on the Hub, as USER/NAME.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is seen by all.")] = False,
) -> None:
    """Write a run in a format that others load without peml: PEFT, transformers, vLLM and their kin."""
    from peml.export import export_run
    from peml.export import push as push_to_hub

    def mind(sentence: str) -> None:
        console.print(Text(f"note: {sentence}", "yellow"), soft_wrap=True)

    done = export_run(folder, to, task or (), output, dtype=dtype, check=check, say=mind)
    for name, found in done.checks.items():
        whose = "" if name is None else f"{name}: "
        same = "the same" if found.same_tokens else "other"
        console.print(
            f"{escape(whose)}loads without peml; logits differ by {found.difference:.1e}, {same} greedy answers",
            highlight=False,
        )
    console.print(f"exported to {escape(str(done.folder))}", soft_wrap=True, highlight=False)
    if push is not None:
        console.print(f"on the Hub: {escape(push_to_hub(done.folder, push, public=public))}", soft_wrap=True)
