"""A server in a thread of its own, on a port that is free, and plain calls to it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import uvicorn

from peml.serving.app import Service, build_app


class Server:
    """Of a service; `stop` ends it as SIGTERM does."""

    def __init__(self, service: Service) -> None:
        self.service = service
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        config = uvicorn.Config(
            build_app(service), port=self.port, log_level="critical", timeout_graceful_shutdown=20, lifespan="on"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def start(self) -> None:
        self.thread.start()
        for _ in range(1000):
            if self.server.started or not self.thread.is_alive():
                break
            time.sleep(0.01)
        assert self.server.started

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()

    def connection(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status, and the body as JSON where it is some."""
        connection = self.connection()
        data = body if isinstance(body, bytes | str | None) else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        kind = answer.headers["Content-Type"] or ""
        return answer.status, json.loads(text) if kind.startswith("application/json") else text

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.call("POST", path, body)

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """A streamed answer."""
        status, text = self.post(path, stream=True, **body)
        assert status == 200, text
        lines = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@contextmanager
def served(service: Service) -> Iterator[Server]:
    server = Server(service)
    server.start()
    try:
        yield server
    finally:
        server.stop()
