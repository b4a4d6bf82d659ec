"""`peml export`, `peml serve` and `peml generate`: what is done with a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from peml.cli_report import console
from peml.errors import PemlError


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


def serve(
    folder: Annotated[Path, typer.Argument(help="Folder that `peml train` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="PEML_API_KEY", show_envvar=True, help="Key that callers must bear.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests in flight and waiting; more get 429.")] = 256,
    max_body_kib: Annotated[int, typer.Option(min=1, help="Largest body; more gets 413.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer; then 504.")] = 120.0,
    cache_tokens: Annotated[
        int, typer.Option(min=32, help="Tokens of all requests together that the cache holds.")
    ] = 16384,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one step.")] = 1024,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default a GPU if there is one.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold a low-rank part that all tasks share into the weights: faster.")
    ] = False,
) -> None:
    """Serve every task of a run from one copy of the model, in the form of OpenAI's API."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise PemlError(f"peml serve needs {', '.join(missing)}: pip install 'peml[serve]'")
    from peml.serving import Limits, open_service
    from peml.serving import serve as run_server
    from peml.serving.server import LOOPBACK

    limits = Limits(max_body_kib * 1024, max_tokens, max_requests, timeout, api_key)
    with console.status("loading the model"):
        service = open_service(
            folder, limits, cache_tokens=cache_tokens, max_batch_tokens=batch_tokens, device=device, merge=merge
        )
        service.engine.start()
    if api_key is None and host not in LOOPBACK:
        console.print(Text("note: whoever reaches this address may use it: set --api-key", "yellow"), soft_wrap=True)
    models = escape(", ".join(service.reader.models))
    console.print(
        f"http://{host}:{port}/v1 serves {models}; a page to try them is at /", soft_wrap=True, highlight=False
    )
    run_server(service, host, port)


def generate(
    folder: Annotated[Path, typer.Argument(help="Folder that `peml train` wrote.")],
    task: Annotated[str, typer.Option(help="Task of the prompts.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, as they are.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts, a line each; in .jsonl a text, or the fields of the task's template.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write a .jsonl file: what was asked, and the answer.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; default the task's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of one batch.")] = 8,
) -> None:
    """Answer prompts by a run, a line each: the likeliest choice of a task that has choices, else greedy text."""
    from peml.generate import generate_run, read_prompts
    from peml.training.folder import write_text
    from peml.training.progress import progress_bar

    if bool(prompts) == (file is not None):
        raise PemlError("give prompts, or --file with some")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise PemlError(f"--output {output} is no file in a folder that is there: give another")
    asked = read_prompts(file) if file is not None else list(prompts or ())
    with progress_bar(Console(stderr=True)) as progress:
        answers = generate_run(folder, task, asked, max_new_tokens=max_tokens, batch_size=batch_size, progress=progress)
    for answer in answers:
        # A line each, whatever is in them, so that they can be counted.
        print(answer.replace("\r", "\\r").replace("\n", "\\n"))
    if output is not None:
        rows = [{"task": task, "asked": each, "answer": answer} for each, answer in zip(asked, answers, strict=True)]
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
