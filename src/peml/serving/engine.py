"""One model, many requests of many tasks: transformers' continuous batching with a route per token.

The scheduler, the paged cache and the packing are transformers'. Ours: the task of each token of a step, the choice of
each request's next token by its own rule, and its way to the event loop of whoever asked.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from peml.errors import PemlError
from peml.serving.sampling import Sampling, Token, choose, logprobs_of

PAGE = 32
"""Tokens of one block of the cache; small, so that short requests waste little."""

Result = TypeVar("Result")


class EngineStopped(RuntimeError):
    """The engine takes no requests: it is being shut down, or it broke."""


class Overloaded(RuntimeError):
    """As many requests are waiting as may."""


@dataclass
class Request:
    """One request in flight.

    Args:
        task: its id.
        max_new_tokens: most tokens of the answer.
        sampling: how they are chosen.
        ends: ids that end it.
        out: where its tokens go, in the event loop that asked.
        count: tokens so far.
    """

    task: int
    max_new_tokens: int
    sampling: Sampling
    ends: frozenset[int]
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Token | Exception] = field(default_factory=asyncio.Queue)
    count: int = 0


class Engine:
    """Generates for many requests at once.

    Args:
        model: with its adapter.
        ends: ids that end an answer.
        cache_tokens: of all requests together that the cache holds.
        max_batch_tokens: of one step.
        max_requests: in flight and waiting together.
    """

    def __init__(
        self,
        model: PeftModel,
        ends: Sequence[int],
        *,
        cache_tokens: int = 16384,
        max_batch_tokens: int = 1024,
        max_requests: int = 256,
    ) -> None:
        self.model = model
        self.tuner: Any = model.base_model
        self.base: Any = self.tuner.model
        self.ends = frozenset(ends)
        self.task_names = list(self.tuner.config_in_force.task_names)
        self.max_requests = max_requests
        self.num_blocks = max(1, cache_tokens // PAGE)
        self.max_batch_tokens = max_batch_tokens
        self.requests: dict[str, Request] = {}
        self.asides = 0
        self._numbers = itertools.count()
        self._stack = ExitStack()
        self._manager: Any = None
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        """Requests that run and wait, those aside of the batch among them."""
        return len(self.requests) + self.asides

    def check_room(self) -> None:
        """Refuse one more request where there are as many as may be.

        Raises:
            EngineStopped: the engine takes none.
            Overloaded: too many requests are waiting.
        """
        if not self.running:
            raise EngineStopped("the engine is not running")
        if self.in_flight >= self.max_requests:
            raise Overloaded(f"{self.max_requests} requests are in flight")

    @property
    def longest(self) -> int:
        """Most tokens of one request, prompt and answer: what the cache holds, and what the model has positions for."""
        held = self.num_blocks * PAGE
        positions = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        return min(held, positions) if isinstance(positions, int) else held

    @property
    def vocabulary(self) -> int:
        """Ids that the model can read."""
        return int(self.base.get_input_embeddings().weight.shape[0])

    def start(self) -> None:
        """Begin to serve, if that has not been done; a prompt is computed once, here.

        Raises:
            PemlError: a model that continuous batching cannot serve.
        """
        if self._manager is not None:
            return
        self.model.eval()
        self._stack.enter_context(self.tuner.kept())
        settings = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=sorted(self.ends) or -1)
        batching = ContinuousBatchingConfig(
            num_blocks=self.num_blocks,
            page_size=PAGE,
            max_batch_tokens=min(self.max_batch_tokens, self.num_blocks * PAGE),
            auto_switch_to_flash=False,
        )
        try:
            self._manager = self.base.init_continuous_batching(
                generation_config=settings, continuous_batching_config=batching, tasks_of=task_of
            )
        except PemlError:
            self._stack.close()
            raise
        except ValueError as error:
            self._stack.close()
            raise PemlError(f"continuous batching does not take this model: {error}") from error
        create = self._manager._create_batch_processor

        def create_batch_processor() -> Any:
            processor = create()
            runner = processor.model_runner

            def sample(scores: Tensor, output_ids: Tensor) -> None:
                self._sample(processor.inputs_and_outputs.requests_in_batch, scores, output_ids)

            runner._sample = sample
            return processor

        self._manager._create_batch_processor = create_batch_processor
        # Answers have gone out token by token; what is left to hear of is failures.
        router = self._manager.output_router
        router.deliver, router.deliver_batch = self._failed, lambda outputs: None
        self._manager.start()

    def stop(self, timeout: float | None = None) -> None:
        """Finish what was accepted, then end; what is left after `timeout` seconds is dropped."""
        if self._manager is not None and self._manager._generation_thread is not None:
            self._manager.stop(block=True, timeout=timeout)
            if self._manager.is_running():
                self._manager.stop(block=True, hard_stop=True)
        self._stack.close()

    @property
    def running(self) -> bool:
        """Whether requests are answered."""
        return self._manager is not None and self._manager.is_running() and self._denied() is None

    def _denied(self) -> str | None:
        denied: str | None = self._manager.background_thread_status.can_accept_new_requests()
        return denied

    @property
    def cache_free(self) -> float:
        """Share of the cache that nobody uses."""
        processor = None if self._manager is None else self._manager.batch_processor
        return 1.0 if processor is None else float(processor.cache.compute_free_capacity())

    async def generate(
        self, ids: Sequence[int], task: int, max_new_tokens: int, sampling: Sampling, seconds: float | None = None
    ) -> AsyncGenerator[Token, None]:
        """The tokens of an answer, as they come; leaving early cancels the request and frees its place.

        Args:
            ids: of the prompt.
            task: its id; any, for an adapter that needs none.
            max_new_tokens: most of the answer.
            sampling: how they are chosen.
            seconds: until the last one; None: as long as it takes.

        Raises:
            TimeoutError: it took longer.
            Overloaded: too many requests are waiting.
            EngineStopped: the engine takes none.
        """
        self.check_room()
        name = f"{task}.{next(self._numbers)}"
        request = Request(task, max_new_tokens, sampling, self.ends, asyncio.get_running_loop())
        self.requests[name] = request
        finished, deadline = False, None if seconds is None else request.loop.time() + seconds
        try:
            if self._manager.add_request(list(ids), request_id=name, max_new_tokens=max_new_tokens) is None:
                finished = True
                raise EngineStopped("the engine is stopping")
            while not finished:
                left = None if deadline is None else max(0.0, deadline - request.loop.time())
                try:
                    token = await asyncio.wait_for(request.out.get(), left)
                except asyncio.TimeoutError:
                    raise TimeoutError from None
                if isinstance(token, Exception):
                    finished = True
                    raise token
                finished = token.finish is not None
                yield token
        finally:
            self.requests.pop(name, None)
            if not finished:
                self._manager.cancel_request(name)

    def aside(self, work: Callable[[], Result]) -> Result:
        """Use the model between two steps, in the caller's thread: nothing else runs on it meanwhile."""
        with self._lock:
            if not self.running:
                raise EngineStopped("the engine is not running")
            with self._manager.pause():
                return work()

    def _failed(self, output: Any) -> None:
        request = self.requests.get(output.request_id)
        if request is not None and output.error is not None and not request.loop.is_closed():
            request.loop.call_soon_threadsafe(request.out.put_nowait, EngineStopped(output.error))

    def _sample(self, states: Sequence[Any], scores: Tensor, output_ids: Tensor) -> None:
        """Choose every request's next token, and tell whoever waits for it."""
        names = [each.state.request_id for each in states if each.has_new_token]
        rows = scores[0, : len(names)]
        tokens = rows.argmax(dim=-1).tolist()
        broken = rows.isnan().any(dim=-1).tolist()
        told: dict[asyncio.AbstractEventLoop, list[tuple[Request, Token | Exception]]] = {}
        for row, name in enumerate(names):
            request = self.requests.get(name)
            if request is None:
                # Given up: its token matters to nobody, and a cancellation that came too early comes again.
                self._manager.cancel_request(name)
                continue
            news: Token | Exception
            try:
                if broken[row]:
                    raise ArithmeticError("the model's scores are no numbers")
                news = self._next(request, rows[row], tokens[row])
                tokens[row] = news.id
            except Exception as error:  # what is wrong with one answer must not end the others
                news = error
                self._manager.cancel_request(name)
            told.setdefault(request.loop, []).append((request, news))
        output_ids[0, : len(tokens)].copy_(torch.tensor(tokens, dtype=output_ids.dtype))
        for loop, all_news in told.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_tell, all_news)

    def _next(self, request: Request, scores: Tensor, likeliest: int) -> Token:
        """The next token of one request."""
        how = request.sampling
        token = choose(scores, how) if how.temperature > 0 else likeliest
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if how.top_logprobs is not None:
            logprob, top = logprobs_of(scores, token, how.top_logprobs)
        request.count += 1
        ended = "stop" if token in request.ends else None
        return Token(token, logprob, top, ended or ("length" if request.count >= request.max_new_tokens else None))


def _tell(news: list[tuple[Request, Token | Exception]]) -> None:
    for request, token in news:
        request.out.put_nowait(token)


def task_of(request_id: str) -> int:
    """The task of a request, which its name begins with: a step may still hold one that has been given up."""
    return int(request_id.partition(".")[0])
