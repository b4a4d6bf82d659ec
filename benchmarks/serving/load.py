"""Load on a server of this machine: as many callers as places who ask again at once, or who come when they come."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One request.

    Args:
        model: a task.
        ids: of the prompt.
        max_tokens: of the answer, which ends nowhere else.
    """

    model: str
    ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Reading:
    """What a load cost.

    Args:
        server_seconds: of a core, by the whole process without its callers, who are its main thread.
        wall_seconds: until the last answer was whole.
        first, whole: seconds of each request until its first token, and its last.
    """

    server_seconds: float
    wall_seconds: float
    first: list[float]
    whole: list[float]


def jobs(count: int, tasks: Sequence[str], vocabulary: int, lengths: tuple[int, int], new: int, seed: int) -> list[Job]:
    """Prompts of drawn ids and lengths; the same for the same seed, whatever the tasks."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, vocabulary) for _ in range(rng.randint(*lengths))] for _ in range(count)]
    return [Job(rng.choice(tasks), ids, new) for ids in prompts]


def closed(port: int, work: Sequence[Job], callers: int) -> Reading:
    """Every caller asks again as soon as he is answered."""

    async def all_() -> list[tuple[float, float]]:
        left = iter(work)

        async def caller() -> list[tuple[float, float]]:
            return [await _ask(port, job) for job in left]

        found = await asyncio.gather(*(caller() for _ in range(callers)))
        return [each for own in found for each in own]

    return _read(all_)


def opened(port: int, work: Sequence[Job], rate: float, seed: int) -> Reading:
    """Requests come by a Poisson process of `rate` a second, however many are waiting."""
    rng = random.Random(seed)

    async def all_() -> list[tuple[float, float]]:
        tasks = []
        for job in work:
            tasks.append(asyncio.create_task(_ask(port, job)))
            await asyncio.sleep(rng.expovariate(rate))
        return list(await asyncio.gather(*tasks))

    return _read(all_)


def _read(load) -> Reading:  # type: ignore[no-untyped-def]
    wall, process, own = time.perf_counter(), time.process_time(), time.thread_time()
    found = asyncio.run(load())
    server = (time.process_time() - process) - (time.thread_time() - own)
    wall = time.perf_counter() - wall
    return Reading(server, wall, *(list(each) for each in zip(*found, strict=True)))


async def _ask(port: int, job: Job) -> tuple[float, float]:
    """Seconds until the first token and the last, of a stream."""
    body = {"model": job.model, "prompt": job.ids, "max_tokens": job.max_tokens, "stream": True, "logprobs": 0}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    start, first, last, count = time.perf_counter(), 0.0, b"", 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    async for line in reader:
        if line.startswith(b"data: "):
            first, last, count = first or time.perf_counter(), line, count + 1
    writer.close()
    if not last.startswith(b"data: [DONE]") or count != job.max_tokens + 1:
        raise RuntimeError(f"a request was not answered: {last!r} after {count} events")
    return first - start, time.perf_counter() - start
