"""One server for all tasks: its answers are those of `generate` one by one, and every mistake has its status."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from safetensors.torch import load_file, save_file

from export_kit import write_run
from peml import PemlError
from peml.evaluation.scoring import log_likelihoods
from peml.serving import Limits, open_service
from peml.serving.answers import Piece
from peml.serving.sampling import Token
from peml.tasks.encode import encode_choices
from peml.training import open_adapter
from serving_kit import Server, served

WORDS = ["big", "small", "red", "blue", "cat", "dog", "tree", "after", "before"]


def text(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 9)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA that differs by task, and a searched prefix with gates."""
    return write_run(tmp_path_factory.mktemp("serving"), "peml+mtl")


@pytest.fixture(scope="module")
def alone(run: Path) -> Any:
    """Tokenizer and model of the same run, for what the server should say."""
    return open_adapter(run)[1:]


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    limits = Limits(body_bytes=4096, max_tokens=40, requests=64)
    with served(open_service(run, limits, cache_tokens=1024, max_batch_tokens=64)) as server:
        yield server


@torch.no_grad()
def expected(alone: Any, prompt: str, task: str, new: int) -> tuple[list[int], str]:
    """Ids and text by `generate`, one by one."""
    tokenizer, model = alone
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(ids, tasks=task, do_sample=False, max_new_tokens=new, eos_token_id=1, pad_token_id=1)[
        0, ids.shape[1] :
    ].tolist()
    return found, tokenizer.decode(found, skip_special_tokens=True)


def mixed(server: Server, alone: Any, count: int) -> None:
    wanted = [(text(i), ("size", "color")[i % 2], 1 + i % 7) for i in range(count)]

    def ask(one: tuple[str, str, int]) -> Any:
        prompt, task, new = one
        return server.post("/v1/completions", model=task, prompt=prompt, max_tokens=new, logprobs=0)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, wanted))
    tokenizer = alone[0]
    both = set()
    for (prompt, task, new), (status, body) in zip(wanted, answers, strict=True):
        assert status == 200, body
        ids, said = expected(alone, prompt, task, new)
        choice = body["choices"][0]
        assert choice["text"] == said
        assert choice["logprobs"]["tokens"] == [tokenizer.decode([number]) for number in ids]
        assert choice["finish_reason"] == ("stop" if ids[-1] == 1 else "length")
        assert body["usage"]["completion_tokens"] == len(ids)
        both.add((prompt, said))
    # The tasks do not answer alike, so that a wrong route would show.
    assert any(expected(alone, prompt, "size", 3) != expected(alone, prompt, "color", 3) for prompt, _, _ in wanted[:9])


def test_mixed_tasks_get_the_answers_of_one_by_one(server: Server, alone: Any) -> None:
    mixed(server, alone, 24)


def test_tasks_share_no_keys_of_the_same_prompt(server: Server, alone: Any) -> None:
    """A prompt of more than a block of the cache: what one task has computed of it is not the other's."""
    prompt = " ".join(WORDS * 5)
    for task in ("size", "color", "size"):
        said = server.post("/v1/completions", model=task, prompt=prompt, max_tokens=8)[1]["choices"][0]["text"]
        assert said == expected(alone, prompt, task, 8)[1]
    assert expected(alone, prompt, "size", 8) != expected(alone, prompt, "color", 8)


@pytest.mark.slow
def test_two_hundred_of_them(server: Server, alone: Any) -> None:
    mixed(server, alone, 200)


def test_models(server: Server) -> None:
    status, body = server.call("GET", "/v1/models")
    assert status == 200 and [each["id"] for each in body["data"]] == ["run", "size", "color"]
    assert body["data"][1]["choices"] == ["yes", "no"] and body["data"][1]["template"] == "{{ text }} big ?"
    color = server.call("GET", "/v1/models/color")[1]
    assert color["kind"] == "generate" and color["fields"] == ["text"]
    assert server.call("GET", "/v1/models/rte")[0] == 404


def test_the_templates_of_tasks(server: Server, alone: Any) -> None:
    """Fields give what the whole prompt gives; and several are several answers."""
    rows = [{"text": "red cat"}, {"text": "blue small tree"}]
    status, body = server.post("/v1/completions", model="run", task="color", fields=rows, max_tokens=4)
    assert status == 200
    for row, choice in zip(rows, body["choices"], strict=True):
        assert choice["text"] == expected(alone, f"{row['text']} color :", "color", 4)[1]
    status, body = server.post("/v1/completions", model="color", fields={"words": "red"})
    assert status == 400 and "its fields are: words" in body["error"]["message"]


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_streams_are_the_whole(server: Server, path: str) -> None:
    if path == "completions":
        url, asked = "/v1/completions", {"model": "color", "prompt": ["red cat", "big dog"], "max_tokens": 6}
    else:
        url = "/v1/chat/completions"
        asked = {"model": "size", "messages": [{"role": "user", "content": "red cat"}], "max_tokens": 6}
    whole = server.post(url, **asked)[1]
    events = server.events(url, **asked, stream_options={"include_usage": True})
    assert events[-1]["usage"] == whole["usage"] and not events[-1]["choices"]
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]]
        if path == "chat":
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            said = "".join(each["delta"].get("content", "") for each in mine)
            assert said == choice["message"]["content"]
        else:
            assert "".join(each["text"] for each in mine) == choice["text"]
        assert [each["finish_reason"] for each in mine][-1] == choice["finish_reason"] is not None
        assert not any(each["finish_reason"] for each in mine[:-1])


def test_offsets_of_a_stream_go_on(server: Server) -> None:
    asked = {"model": "color", "prompt": ["red cat", "big dog"], "max_tokens": 5, "logprobs": 0}
    whole = server.post("/v1/completions", **asked)[1]["choices"]
    events = [event["choices"][0] for event in server.events("/v1/completions", **asked)]
    for choice in whole:
        found = [n for each in events if each["index"] == choice["index"] for n in each["logprobs"]["text_offset"]]
        assert found == choice["logprobs"]["text_offset"] and found[-1] > 0


def test_a_stream_that_begins_with_nothing_to_show(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanks in front of a chat's answer, and bytes that are no character yet: who speaks is said once."""
    pieces = [Piece(text, [Token(5)]) for text in ("", " ", "\n a", "", " b")] + [Piece("", [Token(1)], "stop")]

    async def stream(order: Any) -> AsyncIterator[Piece]:
        for piece in pieces:
            yield dataclasses.replace(piece)

    monkeypatch.setattr(server.service.answering, "stream", stream)
    asked = {"model": "size", "messages": [{"role": "user", "content": "red"}], "max_tokens": 6}
    found = [event["choices"][0] for event in server.events("/v1/chat/completions", **asked)]
    assert [each["delta"] for each in found] == [
        {"role": "assistant", "content": ""}, {"content": "a"}, {"content": " b"}, {},
    ]  # fmt: skip
    assert found[-1]["finish_reason"] == "stop"
    assert server.post("/v1/chat/completions", **asked)[1]["choices"][0]["message"]["content"] == "a b"


def test_the_openai_client(server: Server, alone: Any) -> None:
    openai = pytest.importorskip("openai", reason="needs openai, for development")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any") as client:
        assert [model.id for model in client.models.list()] == ["run", "size", "color"]
        said = client.completions.create(model="color", prompt="red cat", max_tokens=5).choices[0].text
        assert said == expected(alone, "red cat", "color", 5)[1]
        turns = [{"role": "user", "content": "red cat"}]
        whole = client.chat.completions.create(model="color", messages=turns, max_tokens=5).choices[0].message.content
        assert whole == said.lstrip()
        parts = client.chat.completions.create(model="color", messages=turns, max_tokens=5, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
            client.completions.create(model="gpt", prompt="red")


@torch.no_grad()
def test_logprobs(server: Server, alone: Any) -> None:
    """The model's own, at every token."""
    tokenizer, model = alone
    body = server.post(
        "/v1/chat/completions", model="color", messages=[{"role": "user", "content": "red cat"}], max_tokens=4,
        logprobs=True, top_logprobs=3, temperature=1.5, seed=3,
    )[1]  # fmt: skip
    entries = body["choices"][0]["logprobs"]["content"]
    ids = tokenizer("red cat", return_tensors="pt")["input_ids"]
    for entry in entries:
        scores = model(input_ids=ids, tasks="color").logits[0, -1].log_softmax(-1)
        number = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == entry["token"])
        assert entry["logprob"] == pytest.approx(float(scores[number]), abs=1e-4)
        top = scores.topk(3)
        assert [t["token"] for t in entry["top_logprobs"]] == [tokenizer.decode([i]) for i in top.indices.tolist()]
        ids = torch.cat([ids, torch.tensor([[number]])], dim=1)


def test_draws_follow_their_seed(server: Server) -> None:
    def drawn(**changes: Any) -> list[str]:
        asked = {"model": "color", "prompt": "red cat", "max_tokens": 8, "temperature": 2.0, "n": 3} | changes
        return [choice["text"] for choice in server.post("/v1/completions", **asked)[1]["choices"]]

    first = drawn(seed=5)
    assert drawn(seed=5) == first and len(set(first)) > 1
    assert drawn(seed=6) != first
    assert len({*drawn(temperature=0)}) == 1
    # Of the smallest share only the likeliest token is left.
    assert drawn(top_p=1e-6) == drawn(temperature=0)


def test_stop_texts(server: Server) -> None:
    whole = server.post("/v1/completions", model="color", prompt="red cat", max_tokens=8)[1]["choices"][0]["text"]
    at = len(whole) // 2
    stop = whole[at : at + 3]
    status, body = server.post("/v1/completions", model="color", prompt="red cat", max_tokens=8, stop=["@", stop])
    assert status == 200
    assert body["choices"][0]["text"] == whole[: whole.find(stop)] and body["choices"][0]["finish_reason"] == "stop"
    events = server.events("/v1/completions", model="color", prompt="red cat", max_tokens=8, stop=stop)
    assert "".join(event["choices"][0]["text"] for event in events) == whole[: whole.find(stop)]


def test_choices_are_scored(server: Server, alone: Any) -> None:
    """As evaluation scores them, while others are being answered."""
    tokenizer, model = alone
    with ThreadPoolExecutor(6) as pool:
        others = [
            pool.submit(server.post, "/v1/completions", model="color", prompt=text(i), max_tokens=30) for i in range(5)
        ]
        status, body = server.post("/v1/classify", model="size", fields={"text": "red cat"})
        assert all(other.result()[0] == 200 for other in others)
    assert status == 200
    values = [choice["logprob"] for choice in body["choices"]]
    task = open_adapter_task(model)
    rows = encode_choices(tokenizer, [task.example({"text": "red cat", "big": True}, "here")], 64)[0]
    wanted = log_likelihoods(model, tokenizer, rows, ["size"] * 2, batch_size=2)
    assert values == pytest.approx(wanted, abs=1e-4)
    assert [choice["text"] for choice in body["choices"]] == ["yes", "no"]
    assert body["answer"] == ("yes", "no")[max((0, 1), key=wanted.__getitem__)]
    assert sum(choice["probability"] for choice in body["choices"]) == pytest.approx(1)
    odds = body["choices"][0]["probability"] / body["choices"][1]["probability"]
    assert math.log(odds) == pytest.approx(wanted[0] - wanted[1], abs=1e-3)
    own = server.post("/v1/classify", model="color", input="red cat color :", choices=["red", "blue", "big"])[1]
    assert own["answer"] in ("red", "blue", "big") and len(own["choices"]) == 3


def open_adapter_task(model: Any) -> Any:
    """The task `size`, from the recipe of the run."""
    from peml.training import load_recipe

    folder = Path(model.peft_config["default"].base_model_name_or_path).parent
    return load_recipe(folder / "run" / "recipe.yaml").build_tasks()[0]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {"model": "gpt", "prompt": "red"}, 404, "there is no model 'gpt': choose run, size, color"),
        ("/v1/completions", {"model": "run", "prompt": "red"}, 400, "'run' answers by task"),
        ("/v1/completions", {"model": "run", "task": "rte", "prompt": "red"}, 404, "there is no task 'rte'"),
        ("/v1/completions", {"model": "size", "task": "color", "prompt": "red"}, 400, "leave one out"),
        ("/v1/completions", {"model": "size"}, 400, "give `prompt`, or `fields`"),
        ("/v1/completions", {"model": "size", "prompt": "red", "temperature": 3}, 400, "temperature: Input should be less"),
        ("/v1/completions", {"model": "size", "prompt": "red", "echo": True}, 400, "`echo` is not supported"),
        ("/v1/completions", {"model": "size", "prompt": "red", "frequency_penalty": 1}, 400, "`frequency_penalty` is not"),
        ("/v1/completions", {"model": "size", "prompt": "red", "top_k": -2}, 400, "top_k: Input should be greater"),
        ("/v1/completions", {"model": "size", "prompt": "red", "typical_p": 0.5}, 400, "`typical_p` is not supported"),
        ("/v1/chat/completions", {"model": "size", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400,
         "`tools` is not supported"),
        ("/v1/classify", {"model": "size", "input": "red", "temperature": 1}, 400, "temperature: Extra inputs are not"),
        ("/v1/completions", {"model": "size", "prompt": "red", "max_tokens": 41}, 400, "writes 40 at most"),
        ("/v1/completions", {"model": "size", "prompt": "red " * 60}, 400, "together more than 64"),
        ("/v1/completions", {"model": "size", "prompt": [5, 99]}, 400, "ids go from 0 to"),
        ("/v1/completions", {"model": "size", "prompt": ["red"] * 64, "n": 2}, 400, "128 answers are asked for at once"),
        ("/v1/completions", {"model": "size", "prompt": "\ud800"}, 400, "half of a surrogate pair"),
        ("/v1/completions", {"model": "size", "fields": {"\ud800": "red"}}, 400, "its fields are: \\ud800"),
        ("/v1/completions", b"{", 400, "JSON decode error"),
        ("/v1/completions", {"model": "size", "prompt": "x" * 5000}, 413, "larger than 4,096 bytes"),
        ("/v1/chat/completions", {"model": "size", "messages": []}, 400, "messages: List should have at least 1"),
        ("/v1/chat/completions", {"model": "size", "messages": [{"role": "tool", "content": "a"}]}, 400, "role"),
        ("/v1/classify", {"model": "color", "input": "red"}, 400, "has no choices of its own"),
        ("/v1/classify", {"model": "size", "input": "red", "choices": ["a", "a"]}, 400, "each may be there once"),
        ("/v1/embeddings", {}, 404, "/v1/embeddings: Not Found"),
        ("/health", {}, 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_mistakes(server: Server, path: str, body: Any, status: int, says: str) -> None:
    found, answer = server.call("POST", path, body)
    assert found == status, answer
    assert says in answer["error"]["message"] and answer["error"]["code"]
    # Asked as a stream it is refused in the same way, before anything is sent.
    if isinstance(body, dict) and "prompt" in body and status == 400:
        assert server.call("POST", path, body | {"stream": True})[0] == status


def test_what_changes_nothing_is_taken(server: Server) -> None:
    asked = {"model": "size", "prompt": "red", "max_tokens": 2}
    same = {"user": "me", "store": True, "echo": False, "tools": [], "presence_penalty": 0.0, "logit_bias": None,
            "response_format": {"type": "text"}, "best_of": 1, "metadata": {"a": "b"}}  # fmt: skip
    status, body = server.post("/v1/completions", **asked, **same)
    assert status == 200 and body["choices"] == server.post("/v1/completions", **asked)[1]["choices"]
    # Of one token there is nothing to draw, whatever the temperature.
    drawn = server.post("/v1/completions", **asked, temperature=2.0, top_k=1)[1]
    assert drawn["choices"] == server.post("/v1/completions", **asked, temperature=2.0, min_p=1.0)[1]["choices"]
    assert drawn["choices"] == body["choices"]


def test_a_body_of_unknown_length_is_bounded(server: Server) -> None:
    headers = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    for parts, status in (([b" " * 3000] * 2, 413), ([b'{"model": "size", ', b'"prompt": "red"}'], 200)):
        connection = server.connection()
        connection.request("POST", "/v1/completions", iter(parts), headers, encode_chunked=True)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        assert answer.status == status


def test_a_body_that_never_ends_is_given_up(run: Path) -> None:
    """Declared or not; and nothing of it stays behind."""
    service = open_service(run, Limits(body_seconds=0.3), cache_tokens=256)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with served(service) as server:
        for rest in (b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(head + rest)
                answer = b""
                while part := connection.recv(4096):
                    answer += part
            assert answer.startswith(b"HTTP/1.1 408") and json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"]


def waits_until(true: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


def test_a_caller_who_leaves_frees_the_place(server: Server) -> None:
    engine = server.service.engine
    assert waits_until(lambda: not engine.requests)
    for stream in (True, False):
        connection = server.connection()
        body = {"model": "color", "prompt": "red", "max_tokens": 40, "stream": stream, "stop": "@", "temperature": 1.0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert waits_until(lambda: engine.requests)
        connection.close()
        assert waits_until(lambda: not engine.requests)
    assert waits_until(lambda: engine.cache_free == 1.0)
    assert server.call("GET", "/health") == (200, {"status": "ok"})


def test_metrics(server: Server) -> None:
    server.post("/v1/completions", model="color", prompt="red", max_tokens=2)
    page = server.call("GET", "/metrics")[1]
    assert 'peml_requests_total{model="color",path="/v1/completions",status="200"}' in page
    assert 'peml_tokens_total{kind="answer",model="color"}' in page and "peml_first_token_seconds_count" in page
    server.call("GET", "/made/up")
    assert "/made/up" not in server.call("GET", "/metrics")[1]


def test_limits_of_a_small_server(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, a queue of two, and little time."""
    service = open_service(run, Limits(requests=2, seconds=1.0, api_key="secret", max_tokens=40), cache_tokens=256)
    chosen = service.engine._sample

    def slow(*args: Any) -> None:
        time.sleep(0.1)
        chosen(*args)

    monkeypatch.setattr(service.engine, "_sample", slow)
    service.engine.ends = frozenset()  # every answer goes on to its full length
    with served(service) as server:
        assert server.call("GET", "/health")[0] == 200
        status, body = server.call("GET", "/v1/models")
        assert status == 401 and body["error"]["code"] == "invalid_api_key"
        assert server.call("GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert server.call("GET", "/v1/models", **key)[0] == 200
        asked = {"model": "color", "prompt": "red", "max_tokens": 40, "temperature": 1.0, "seed": 1}
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(server.call, "POST", "/v1/completions", asked, **key) for _ in range(4)]
            found = sorted(call.result()[0] for call in calls)
        assert found == [429, 429, 504, 504]
        assert waits_until(lambda: not service.engine.requests)


def test_what_was_accepted_is_answered_before_the_end(run: Path, alone: Any) -> None:
    service = open_service(run, Limits(max_tokens=40), cache_tokens=1024)
    with ThreadPoolExecutor(8) as pool:
        with served(service) as server:
            calls = [
                pool.submit(server.post, "/v1/completions", model="color", prompt=text(i), max_tokens=30)
                for i in range(8)
            ]
            assert waits_until(lambda: len(service.engine.requests) == 8 or all(call.done() for call in calls))
        for i, call in enumerate(calls):
            status, body = call.result()
            assert status == 200 and body["choices"][0]["text"] == expected(alone, text(i), "color", 30)[1]
    assert not service.engine.running


def test_an_engine_that_breaks_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To whoever waits, to those who come, and to whoever watches it."""
    service = open_service(run, cache_tokens=256)

    def broken(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.engine, "_sample", broken)
    with served(service) as server:
        asked = {"model": "color", "prompt": "red cat"}
        status, body = server.post("/v1/completions", **asked)
        assert status == 503 and body["error"]["type"] == "server_error" and "out of memory" in body["error"]["message"]
        assert waits_until(lambda: not service.engine.running)
        assert server.post("/v1/completions", **asked)[0] == 503
        assert server.post("/v1/classify", model="size", input="red")[0] == 503
        assert server.call("GET", "/health")[0] == 503 and not service.engine.requests


def test_an_answer_that_breaks_breaks_no_other(server: Server, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are no numbers, and a choice that fails, are the matter of one request."""
    engine, sample = server.service.engine, server.service.engine._sample

    def spoiled(states: Any, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        names = [each.state.request_id for each in states if each.has_new_token]
        for row, name in enumerate(names):
            if name in engine.requests and engine.requests[name].max_new_tokens == 7:
                scores[0, row] = math.nan
        sample(states, scores, output_ids)

    monkeypatch.setattr(engine, "_sample", spoiled)
    with ThreadPoolExecutor(4) as pool:
        good = [
            pool.submit(server.post, "/v1/completions", model="color", prompt=text(i), max_tokens=9) for i in range(2)
        ]
        bad = [
            pool.submit(server.post, "/v1/completions", model="color", prompt="red", max_tokens=7, temperature=t)
            for t in (0, 1)
        ]
        for i, call in enumerate(good):
            assert call.result()[1]["choices"][0]["text"] == expected(alone, text(i), "color", 9)[1]
        assert [call.result()[0] for call in bad] == [500, 500]
    assert server.call("GET", "/health")[0] == 200
    assert waits_until(lambda: not engine.requests and engine.cache_free == 1.0)


def test_a_shared_adapter_answers_without_a_task(tmp_path: Path) -> None:
    service = open_service(write_run(tmp_path, "lora+prefix"), cache_tokens=256)
    with served(service) as server:
        asked = {"prompt": "red cat", "max_tokens": 4}
        said = {
            server.post("/v1/completions", model=name, **asked)[1]["choices"][0]["text"] for name in ("run", "size")
        }
        assert len(said) == 1
        status, body = server.post("/v1/completions", model="run", fields={"text": "red"})
        assert status == 400 and "go into a task's template" in body["error"]["message"]


@torch.no_grad()
def test_a_shared_adapter_may_be_merged(run: Path, tmp_path: Path) -> None:
    """Its layers are plain ones then; the prefix stays."""
    shared = write_run(tmp_path, "lora+prefix")
    service = open_service(shared, cache_tokens=256, merge=True)
    assert all(bank.merged for bank in service.engine.tuner._banks())
    alone = open_adapter(shared)[1:]
    alone[1].base_model.merge_adapter()
    with served(service) as server:
        said = server.post("/v1/completions", model="run", prompt="red cat", max_tokens=8)[1]["choices"][0]["text"]
    assert said == expected(alone, "red cat", "size", 8)[1]
    with pytest.raises(PemlError, match="--merge is for a low-rank part that is the same for all tasks"):
        open_service(run, merge=True)
    grouped = write_run(tmp_path / "grouped", "lora", {"groups": [["size"], ["color"]]})
    with pytest.raises(PemlError, match="--merge is for a low-rank part that is the same for all tasks"):
        open_service(grouped, merge=True)


def no_numbers(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * math.nan for name, tensor in tensors.items()}, file)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"{}"), "is damaged"),
        (lambda run: (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / "adapter_model.bin"), "there is no adapter_model.safetensors"),
        (lambda run: (run / "recipe.yaml").unlink(), "there is no recipe.yaml"),
        (no_numbers, "holds what is no number"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_served(spoil: Any, says: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, "lora")
    spoil(run)
    with pytest.raises(PemlError, match=says):
        open_service(run)


def test_prompts_made_from_the_text_are_refused(tmp_path: Path) -> None:
    service = open_service(write_run(tmp_path, "attempt"), cache_tokens=256)
    with pytest.raises(PemlError, match="^continuous batching cannot serve a prompt that is made from the text"):
        service.engine.start()


def test_a_device_that_is_not_there(run: Path) -> None:
    with pytest.raises(PemlError, match="--device cuda:99: the model cannot go there"):
        open_service(run, device="cuda:99")


def test_choices_wait_in_the_same_queue(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told to come again like the others; and one that is too wide is scored in parts."""
    service = open_service(run, Limits(requests=2), cache_tokens=256, max_batch_tokens=8)
    asked = {"model": "size", "input": "red cat big dog"}
    with served(service) as server:
        choices = server.post("/v1/classify", **asked)[1]["choices"]
        held = threading.Event()
        monkeypatch.setattr(service.engine, "aside", lambda work: held.wait(20) and work())
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(server.post, "/v1/classify", **asked) for _ in range(4)]
            assert waits_until(lambda: sum(call.done() for call in calls) == 2)
            assert server.post("/v1/completions", model="size", prompt="red")[0] == 429
            held.set()
            found = sorted((call.result() for call in calls), key=lambda each: each[0])
        assert [status for status, _ in found] == [200, 200, 429, 429] and found[0][1]["choices"] == choices
        assert service.engine.in_flight == 0


# The playground.

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_asks_nobody_else(server: Server) -> None:
    connection = server.connection()
    connection.request("GET", "/")
    answer = connection.getresponse()
    page = answer.read().decode()
    connection.close()
    assert (
        answer.status == 200 and "default-src 'none'; connect-src 'self'" in answer.headers["Content-Security-Policy"]
    )
    assert not re.findall(r"(?:src|href|url)\s*[=(]|https?:|//[a-z]", page)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_answers(server: Server) -> None:
    """A link with tasks and fields is asked at once, and says what is wrong side by side.

    Not a streamed answer: Chromium's virtual time does not wait for one.
    """

    def opened(link: str) -> str:
        done = subprocess.run(
            [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom",
             f"http://127.0.0.1:{server.port}/#{link}"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert 'data-answered="yes"' in done.stdout and "run, 2 tasks" in done.stdout
        return done.stdout

    page = opened("task=size&text=red%20cat")
    body = server.post("/v1/classify", model="size", fields={"text": "red cat"})[1]
    assert f'<div class="answer">{body["answer"]}</div>' in page and 'class="bad"' not in page
    for choice in body["choices"]:
        assert f">{choice['text']}</span><span>{100 * choice['probability']:.1f} %</span>" in page
    page = opened("task=size&task=color&text=" + "red%20" * 70)
    assert page.count('class="bad"') == 2 and "together more than 64" in page and "longer than 64 tokens" in page
