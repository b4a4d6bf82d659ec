"""Load on a small server: people who leave, mistakes, slow readers, and a cache too small for all at once.

For as many seconds as `PEML_LOAD_SECONDS` says, 15 without it.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from export_kit import write_run
from peml.serving import Limits, open_service
from peml.training import open_adapter
from serving_kit import Server, served
from test_serving import expected, text, waits_until

SECONDS, CALLERS = float(os.environ.get("PEML_LOAD_SECONDS", "15")), 24
GROWTH = 96
"""MiB that the process, its callers included, may grow by in the later half: allocators keep what threads give back."""

BUSY = (429, 504)
"""What a server may say that has too much to do, or too little of a machine that others work on too."""

MALFORMED = [(b"{", 400), (b"[]", 400), (b'{"model": 1}', 400), (b"x" * 5000, 413)]


def leave(server: Server, rng: random.Random, task: str) -> None:
    connection = server.connection()
    body = {"model": task, "prompt": "red", "max_tokens": 40, "temperature": 1.0, "stream": rng.random() < 0.5}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(rng.random() * 0.1)
    connection.close()


def read_slowly(server: Server, task: str, prompt: str) -> None:
    connection = server.connection()
    body = {"model": task, "prompt": prompt, "max_tokens": 20, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while answer.read(64):
        time.sleep(0.02)
    connection.close()


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def logprobs(body: Any) -> list[float]:
    return [each["logprob"] for each in body["choices"]]


@pytest.mark.slow
def test_no_wrong_answer_and_nothing_left_over(tmp_path: Path) -> None:
    run = write_run(tmp_path, "peml+mtl")
    alone: Any = open_adapter(run)[1:]
    cases = [(text(i), ("size", "color")[i % 2], 1 + i % 30) for i in range(60)]
    wanted = [expected(alone, *case)[1] for case in cases]
    limits = Limits(max_tokens=40, requests=20, body_bytes=4096, seconds=30)
    # A cache of 160 tokens: five requests at most, whose keys and values are dropped and computed again.
    service, seen = open_service(run, limits, cache_tokens=160, max_batch_tokens=48), Counter[Any]()

    def caller(seed: int) -> None:
        rng, end = random.Random(seed), time.monotonic() + SECONDS
        while time.monotonic() < end:
            what, i = rng.random(), rng.randrange(len(cases))
            prompt, task, new = cases[i]
            if what < 0.6:
                status, body = server.post("/v1/completions", model=task, prompt=prompt, max_tokens=new)
                seen[status] += 1
                assert status in BUSY or (status == 200 and body["choices"][0]["text"] == wanted[i]), body
            elif what < 0.75:
                leave(server, rng, task)
                seen["left"] += 1
            elif what < 0.85:
                body, status = rng.choice(MALFORMED)
                assert server.call("POST", "/v1/completions", body)[0] == status
                seen[status] += 1
            elif what < 0.88:
                assert server.post("/v1/completions", model="nobody", prompt=prompt)[0] == 404
                seen[404] += 1
            elif what < 0.9:
                status, body = server.post("/v1/completions", model=task, prompt="red " * 200)
                assert status == 400 and "together more than 64" in body["error"]["message"], body
                seen[400] += 1
            elif what < 0.95:
                status, body = server.post("/v1/classify", model="size", input=prompt)
                seen[f"classify {status}"] += 1
                assert status in BUSY or (status == 200 and logprobs(body) == pytest.approx(scored[i], abs=1e-4)), body
            else:
                read_slowly(server, task, prompt)
                seen["slow"] += 1

    with served(service) as server:
        scored = [logprobs(server.post("/v1/classify", model="size", input=prompt)[1]) for prompt, _, _ in cases]
        with ThreadPoolExecutor(CALLERS) as pool:
            calls, sizes = [pool.submit(caller, seed) for seed in range(CALLERS)], []
            for _ in range(10):
                time.sleep(SECONDS / 10)
                sizes.append(round(resident()))
            wrong = [error for call in calls if (error := call.exception()) is not None]
        print(f"{SECONDS:g} s: {dict(seen)}; MiB {sizes}")
        assert not wrong, wrong
        assert sizes[-1] - sizes[4] < GROWTH, sizes
        assert waits_until(lambda: not service.engine.requests and service.engine.cache_free == 1.0)
        assert server.call("GET", "/health")[0] == 200
    assert seen[200] > 20
