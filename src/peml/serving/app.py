"""The server: one model in memory, every task a model id, in the form of OpenAI's API."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any, TypeVar

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peml.evaluation.scoring import best_choice, log_likelihoods
from peml.serving.answers import Answering, Order, Piece
from peml.serving.engine import Engine
from peml.serving.limits import MODEL, PROBLEMS, Gate, Limits, Refused, add_handlers, body_of, problem
from peml.serving.metrics import Metrics
from peml.serving.openai import DONE, Chats, Completions, event, usage
from peml.serving.prompts import Reader
from peml.serving.sampling import Sampling
from peml.serving.schema import Chat, Classify, Completion, Generation
from peml.tasks import Task
from peml.tasks.encode import encode_choices
from peml.tasks.render import fields_of

Result = TypeVar("Result")

POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The playground asks this server and nobody else."""

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What the document of the API says of an answer that may come as events."""

GONE = 499
"""What the log says of a caller who left; nobody reads it."""


class Service:
    """What answers the routes.

    Args:
        model: with its adapter.
        tokenizer: of the model.
        reader: of prompts.
        engine: that generates.
        limits: of the server.
    """

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, reader: Reader, engine: Engine, limits: Limits
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.reader = reader
        self.engine = engine
        self.limits = limits
        self.metrics = Metrics(lambda: engine.in_flight, lambda: engine.cache_free)
        self.answering = Answering(engine, tokenizer, limits, self.metrics)
        self.started = int(time.time())

    def orders(self, asked: Generation, prompts: Sequence[Sequence[int]], top: int | None, most: int) -> list[Order]:
        """An order for each answer that a request wants: all of its first prompt, then of the second."""
        task = self.reader.task(asked.model, asked.task)
        number = 0 if task is None else self.reader.ids[task.name]
        wanted, room = len(prompts) * asked.n, self.engine.max_requests
        if wanted > room:
            raise Refused(
                400, f"{wanted} answers are asked for at once, and this server has {room} places: ask for fewer",
                "too_many_answers",
            )  # fmt: skip
        found = []
        for index, ids in enumerate(itertools.chain.from_iterable(itertools.repeat(ids, asked.n) for ids in prompts)):
            # Answers of one request differ, and are the same again with the same seed.
            seed = None if asked.seed is None else (asked.seed + index) % 2**63
            how = Sampling(asked.temperature, asked.top_p, asked.top_k, asked.min_p, seed, top)
            found.append(Order(asked.model, number, ids, most, how, asked.stops))
        for order in found:
            self.answering.check(order)
        return found

    async def answer(
        self, request: Request, asked: Generation, orders: list[Order], form: Completions, strip: bool
    ) -> Any:
        """All answers of a request, in one body or as events."""
        head = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model,
            "system_fingerprint": None,
        }  # fmt: skip
        prompt_tokens = sum(len(order.ids) for order in orders[:: asked.n])
        if asked.stream:
            chunk = head | {"object": form.part}
            # The first piece is waited for: what is refused has a status of its own, as long as nothing is sent.
            events = self._events(orders, form, chunk, prompt_tokens, asked, strip)
            first = await self.unless_left(request, anext(events))
            return StreamingResponse(_after(first, events), media_type="text/event-stream")
        pieces: list[Piece] = await self.unless_left(
            request, _together([self.answering.whole(order) for order in orders])
        )
        for piece in pieces:
            piece.text = piece.text.lstrip() if strip else piece.text
        count = sum(len(piece.tokens) for piece in pieces)
        choices = [form.choice(index, piece) for index, piece in enumerate(pieces)]
        return head | {"object": form.whole, "choices": choices, "usage": usage(prompt_tokens, count)}

    async def _events(
        self,
        orders: list[Order],
        form: Completions,
        chunk: dict[str, Any],
        prompt_tokens: int,
        asked: Generation,
        strip: bool,
    ) -> AsyncGenerator[str, None]:
        queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

        async def drain(index: int, order: Order) -> None:
            try:
                async for piece in self.answering.stream(order):
                    queue.put_nowait((index, piece))
            except Exception as error:
                queue.put_nowait((index, error))

        workers = [asyncio.create_task(drain(index, order)) for index, order in enumerate(orders)]
        open_, count, begun, spoken, sent = len(orders), 0, set[int](), set[int](), False
        counted = asked.stream_options is not None and asked.stream_options.include_usage
        extra: dict[str, Any] = {"usage": None} if counted else {}
        try:
            while open_:
                index, piece = await queue.get()
                if isinstance(piece, Exception):
                    if not sent:
                        raise piece
                    yield event(body_of(problem(piece)))
                    return
                count += len(piece.tokens)
                open_ -= piece.finish is not None
                if index not in begun and (first := form.first(index)) is not None:
                    yield event(chunk | {"choices": [first]} | extra)
                    sent = True
                begun.add(index)
                if strip and index not in spoken:
                    piece.text = piece.text.lstrip()
                if piece.text:
                    spoken.add(index)
                if piece.text or piece.finish is not None or form.wanted:
                    yield event(chunk | {"choices": [form.delta(index, piece)]} | extra)
                    sent = True
            if counted:
                yield event(chunk | {"choices": [], "usage": usage(prompt_tokens, count)})
            yield DONE
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def unless_left(self, request: Request, work: Awaitable[Result]) -> Result:
        """A result, unless the caller leaves before it is there: then the work is given up."""
        doing = asyncio.ensure_future(work)
        watching = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise Refused(GONE, "the caller has left", "gone")
            return doing.result()
        finally:
            for each in (doing, watching):
                each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await asyncio.gather(doing, watching, return_exceptions=True)

    def classify(self, asked: Classify) -> dict[str, Any]:
        """The probabilities of choices, between two steps of the engine."""
        task = self.reader.task(asked.model, asked.task)
        example = self.reader.example(task, asked.input if asked.input is not None else asked.fields or {})
        choices = tuple(asked.choices or example.choices or _choices(task))
        if not choices:
            raise Refused(400, f"{asked.model!r} has no choices of its own: give `choices`", "invalid_request")
        if len(set(choices)) < len(choices):
            raise Refused(400, "choices: each may be there once", "invalid_request")
        example = dataclasses.replace(example, choices=choices, answer=choices[0])
        room = self.engine.longest
        rows = encode_choices(self.tokenizer, [example], room)[0]
        if rows[0].truncated:
            raise Refused(400, f"the input is longer than {room} tokens", "context_length_exceeded")
        # Without a task any will do: the adapter answers all alike.
        names = [self.engine.task_names[0] if task is None else task.name] * len(rows)
        # As many tokens at once as a step of the engine has.
        size = max(1, min(32, self.engine.max_batch_tokens // max(len(row.input_ids) for row in rows)))
        values = self.engine.aside(lambda: log_likelihoods(self.model, self.tokenizer, rows, names, batch_size=size))
        normalize = task is not None and task.length_normalization
        shares = torch.softmax(torch.tensor(values, dtype=torch.float64), dim=0).tolist()
        self.metrics.tokens.labels(asked.model, "prompt").inc(sum(len(row.input_ids) for row in rows))
        return {
            "object": "classification", "model": asked.model,
            "answer": choices[best_choice(example, values, normalize)],
            "choices": [
                {"text": text, "probability": share, "logprob": value}
                for text, share, value in zip(choices, shares, values, strict=True)
            ],
            "usage": usage(sum(len(row.input_ids) for row in rows), 0),
        }  # fmt: skip


def build_app(service: Service) -> Any:
    """The ASGI app of a service; it starts the engine, and ends it when all that was accepted is answered."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop, 30.0)

    # The pages that FastAPI makes of its document ask other servers for their scripts.
    app = FastAPI(
        title="peml", description="One adapter, every task.", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    add_handlers(app)

    page = (files("peml") / "assets" / "playground.html").read_text(encoding="utf-8")

    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})

    async def health() -> dict[str, str]:
        if not service.engine.running:
            raise Refused(503, "the engine has stopped", "unavailable")
        return {"status": "ok"}

    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.reader.models]}

    async def model(name: str) -> dict[str, Any]:
        if name not in service.reader.models:
            raise Refused(404, f"there is no model {name!r}", "model_not_found")
        return _model(service, name)

    async def completions(asked: Completion, request: Request) -> Any:
        task = service.reader.task(asked.model, asked.task)
        request.scope[MODEL] = asked.model
        given = asked.asked
        ready = isinstance(given[0], list)
        prompts = given if ready else service.reader.encoded([service.reader.example(task, each) for each in given])
        most = asked.max_tokens or min(16 if task is None else task.max_new_tokens, service.limits.max_tokens)
        orders = service.orders(asked, prompts, asked.logprobs, most)
        form = Completions(service.tokenizer, asked.logprobs is not None)
        return await service.answer(request, asked, orders, form, strip=False)

    async def chat(asked: Chat, request: Request) -> Any:
        task = service.reader.task(asked.model, asked.task)
        request.scope[MODEL] = asked.model
        turns = tuple(("system" if m.role == "developer" else m.role, m.text) for m in asked.messages)
        prompts = service.reader.encoded([service.reader.chat(task, turns)])
        room = max(1, service.engine.longest - len(prompts[0]))
        most = asked.max_completion_tokens or asked.max_tokens or min(service.limits.max_tokens, room)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        orders = service.orders(asked, prompts, top, most)
        return await service.answer(request, asked, orders, Chats(service.tokenizer, bool(asked.logprobs)), strip=True)

    async def classify(asked: Classify, request: Request) -> dict[str, Any]:
        service.reader.task(asked.model, asked.task)
        request.scope[MODEL] = asked.model
        engine = service.engine
        engine.check_room()
        engine.asides += 1
        try:
            work = asyncio.wait_for(asyncio.to_thread(service.classify, asked), service.limits.seconds)
            return await service.unless_left(request, work)
        except asyncio.TimeoutError:
            raise TimeoutError from None
        finally:
            engine.asides -= 1

    app.get("/", include_in_schema=False)(playground)
    app.get("/health", responses=PROBLEMS)(health)
    app.get("/metrics", responses=PROBLEMS, response_class=PlainTextResponse)(metrics)
    app.get("/v1/models", responses=PROBLEMS)(models)
    app.get("/v1/models/{name:path}", responses=PROBLEMS)(model)
    app.post("/v1/completions", responses=PROBLEMS | STREAMED)(completions)
    app.post("/v1/chat/completions", responses=PROBLEMS | STREAMED)(chat)
    app.post("/v1/classify", responses=PROBLEMS)(classify)
    return Gate(app, service.limits, service.metrics)


def _model(service: Service, name: str) -> dict[str, Any]:
    task = service.reader.tasks.get(name)
    about: dict[str, Any] = {"id": name, "object": "model", "created": service.started, "owned_by": "peml"}
    if task is None:
        return about | {"kind": "adapter", "tasks": list(service.reader.tasks)}
    template = next(iter(task.prompts), None)
    own = {"template": template, "fields": None if template is None else fields_of(template)}
    return about | {"kind": task.kind, "choices": list(_choices(task)) or None, **own}


def _choices(task: Task | None) -> tuple[str, ...]:
    """Those that are the same for all rows."""
    return task.choices if task is not None and isinstance(task.choices, tuple) else ()


async def _left(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _together(answers: Sequence[Awaitable[Piece]]) -> list[Piece]:
    """All answers; one that fails, or is given up, ends the others."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _after(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for each in rest:
            yield each
    finally:
        await rest.aclose()
