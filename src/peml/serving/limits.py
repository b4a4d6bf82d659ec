"""What the server refuses, and how it says so: JSON in OpenAI's form, whatever goes wrong."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from peml.errors import PemlError
from peml.serving.engine import EngineStopped, Overloaded
from peml.serving.metrics import Metrics
from peml.serving.prompts import UnknownModel

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MODEL = "peml.model"
"""Where a request's scope says which model it was for, for the counters."""

OPEN = ("/", "/health")
"""What needs no key."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    Args:
        body_bytes: of a request.
        max_tokens: of an answer; where a request does not say, the task's own for a completion (16 without one), and
            this for a chat.
        requests: in flight and waiting; more are told to come again.
        seconds: until an answer must be complete.
        api_key: that callers must bear; None: nobody asks.
        body_seconds: until a body must be there.
    """

    body_bytes: int = 1 << 20
    max_tokens: int = 1024
    requests: int = 256
    seconds: float = 120.0
    api_key: str | None = None
    body_seconds: float = 30.0


class Detail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(BaseModel):
    """Every answer that is none."""

    error: Detail


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in (("4XX", "The request is refused."), ("5XX", "The server cannot answer it."))
}
"""Of a route, for the document of the API; without them FastAPI writes its own form of errors there."""


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: a sentence.
        code: for programs.
        headers: of the response.
    """

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def problem(error: Exception) -> Refused:
    """An error of ours as a refusal."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UnknownModel):
        return Refused(404, str(error), "model_not_found")
    if isinstance(error, PemlError):
        return Refused(400, str(error), "invalid_request")
    if isinstance(error, Overloaded):
        return Refused(429, f"{error}: try again in a moment", "overloaded", {"Retry-After": "1"})
    if isinstance(error, EngineStopped):
        return Refused(503, f"no request is taken: {error}", "unavailable", {"Retry-After": "5"})
    if isinstance(error, TimeoutError):
        return Refused(504, "the answer took longer than this server allows", "timeout")
    return Refused(500, "something broke in the server, which logged what", "internal_error")


def body_of(refused: Refused) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    # What somebody sent may be in the sentence, halves of surrogate pairs too, which no response can hold.
    message = refused.message.encode("utf-8", "backslashreplace").decode("utf-8")
    return {"error": {"message": message, "type": kind, "param": None, "code": refused.code}}


def response(refused: Refused) -> JSONResponse:
    """A refusal as a response."""
    return JSONResponse(body_of(refused), status_code=refused.status, headers=refused.headers)


def add_handlers(app: FastAPI) -> None:
    """Let every error of an app be a JSON body."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = str(first["msg"]).removeprefix("Value error, ")
        return response(Refused(400, f"{where}: {message}" if where else message, "invalid_request"))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        refused = Refused(
            error.status_code, f"{request.url.path}: {error.detail}", "not_found", dict(error.headers or {})
        )
        return response(refused)

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return response(problem(error))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (Refused, PemlError, Overloaded, EngineStopped, TimeoutError, Exception):
        app.add_exception_handler(kind, ours)


class Gate:
    """In front of the app: who may come in, and with how much; and what they were told is counted.

    Args:
        app: behind it.
        limits: of the server.
        metrics: told of every response.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                # Paths as they are declared: whatever somebody makes up must not become a series of its own.
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, scope.get(MODEL, ""), str(message["status"])).inc()
            await send(message)

        await self._passed(scope, receive, counted)

    async def _passed(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
        if self.limits.api_key is not None and scope["path"] not in OPEN and not self._bears(headers):
            refused = Refused(401, "a key is needed: Authorization: Bearer KEY", "invalid_api_key")
            await self._refuse(refused, scope, receive, send)
            return
        most = self.limits.body_bytes
        refused = Refused(413, f"the body is larger than {most:,} bytes", "body_too_large", {"Connection": "close"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            await self._refuse(refused, scope, receive, send)
            return
        # A body is read here, so that one that is too large, or never ends, is refused before anything is answered.
        body, more, loop = b"", True, asyncio.get_running_loop()
        end = loop.time() + self.limits.body_seconds
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - loop.time()))
            except asyncio.TimeoutError:
                slow = f"the body took longer than {self.limits.body_seconds:g} seconds"
                await self._refuse(Refused(408, slow, "body_too_slow", {"Connection": "close"}), scope, receive, send)
                return
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                await self._refuse(refused, scope, receive, send)
                return
        given = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _bears(self, headers: dict[bytes, bytes]) -> bool:
        assert self.limits.api_key is not None
        given = headers.get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self.limits.api_key.encode())

    async def _refuse(self, refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        await response(refused)(scope, receive, send)
