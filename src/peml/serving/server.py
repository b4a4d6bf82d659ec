"""`peml serve`: a run folder, opened, checked and served until somebody ends it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import uvicorn

from peml.errors import PemlError
from peml.export.lint import tied_layer
from peml.serving.app import Service, build_app
from peml.serving.engine import Engine
from peml.serving.limits import Limits
from peml.serving.prompts import Reader
from peml.tasks.encode import end_ids
from peml.training import open_adapter
from peml.training.arguments import one_line
from peml.training.workbench import form_of

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def open_service(
    run: str | Path,
    limits: Limits | None = None,
    *,
    cache_tokens: int = 16384,
    max_batch_tokens: int = 1024,
    device: str | None = None,
    merge: bool = False,
) -> Service:
    """Load a run once, for all its tasks.

    Args:
        run: its folder.
        limits: of the server.
        cache_tokens: of all requests together that the cache holds.
        max_batch_tokens: of one step.
        device: where the model goes; None: a GPU if there is one.
        merge: fold the low-rank part into the weights first, which rounds it to their precision; a prefix stays.

    Raises:
        PemlError: no finished run, an adapter that is damaged or does not fit its base, or one that cannot be batched.
    """
    limits = limits or Limits()
    recipe, tokenizer, model = open_adapter(run)
    if form_of(model.base_model.model) != "causal":
        raise PemlError(f"{run}: only decoders are served, and {recipe.model} has an encoder: use `peml evaluate`")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise PemlError(f"--device {place}: the model cannot go there ({one_line(error)}): choose another") from error
    config = model.base_model.config_in_force
    if merge:
        if config.adapter is None or not config.adapter.foldable or config.adapter_needs_task:
            raise PemlError(f"{run}: --merge is for a low-rank part that is the same for all tasks: leave it out")
        if (tied := tied_layer(model.base_model)) is not None:
            raise PemlError(f"{run}: {tied} shares its weights with another layer: leave out --merge")
        model.base_model.merge_adapter()
    tasks = {task.name: task for task in recipe.build_tasks()}
    if list(tasks) != list(config.task_names):
        raise PemlError(
            f"{run}: the recipe has the tasks {', '.join(tasks)}, and the adapter {', '.join(config.task_names)}: "
            "they are of two runs"
        )
    reader = Reader(tokenizer, tasks, Path(run).resolve().name, config.needs_task)
    engine = Engine(
        model,
        _ends(tokenizer, model, reader),
        cache_tokens=cache_tokens,
        max_batch_tokens=max_batch_tokens,
        max_requests=limits.requests,
    )
    return Service(model, tokenizer, reader, engine, limits)


def serve(service: Service, host: str = "127.0.0.1", port: int = 8000, grace_seconds: float = 60.0) -> None:
    """Serve until SIGINT or SIGTERM; what was accepted is answered first, as far as the grace allows.

    Raises:
        PemlError: the address cannot be had.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(service), host=host, port=port, log_level="warning", access_log=False,
            timeout_graceful_shutdown=int(grace_seconds), server_header=False,
        )
    )  # fmt: skip
    try:
        server.run()
    except SystemExit:
        # uvicorn has said why on standard error.
        raise PemlError(
            f"{host}:{port} cannot be served: another program has it, or it is no address of this machine"
        ) from None


def _ends(tokenizer: Any, model: Any, reader: Reader) -> list[int]:
    """Ids that end an answer: the tokenizer's, the model's, and the chat template's."""
    ends = set(end_ids(tokenizer, []))
    known = getattr(model.base_model.model.generation_config, "eos_token_id", None)
    ends |= {number for number in (known if isinstance(known, list) else [known]) if isinstance(number, int)}
    if tokenizer.chat_template:
        with suppress(PemlError):  # a template that refuses this refuses requests too, each with its reason
            ends |= end_ids(tokenizer, [reader.chat(None, (("user", "a"),))])
    return sorted(ends)
