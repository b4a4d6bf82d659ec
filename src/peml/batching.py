"""Continuous batching in which every request has a task of its own: the route is per token of the packed row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from peml.routing import Tasks

TaskOf = Callable[[str], str | int]
"""The task of a request, by the id that it was added with."""


def unshared(config: Any, routed: bool) -> Any:
    """A copy of a batching configuration that keeps requests apart.

    Blocks are shared between prompts that begin alike, whatever task or adapter wrote them; and what a graph or a
    second batch in flight has recorded is the route of another step.
    """
    config = copy.copy(config)
    config.allow_block_sharing = False
    if routed:
        config.use_cuda_graph, config.use_async_batching = False, False
    return config


def route_steps(manager: Any, tasks_of: TaskOf, routed: Callable[[Tasks], AbstractContextManager[None]]) -> None:
    """Let every step of a manager know the task of each of its tokens.

    Args:
        manager: of transformers, before it is started.
        tasks_of: asked in the thread of the steps.
        routed: opens what the forward inside needs of these tasks.
    """

    def step() -> None:
        processor = manager.batch_processor
        tasks: list[Any] = []
        for each in processor.inputs_and_outputs.requests_in_batch:
            tasks += [tasks_of(each.state.request_id)] * each.query_length
        with routed([tasks]):
            processor._generation_step(manager.model)

    manager._generation_step = step
