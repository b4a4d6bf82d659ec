"""`peml generate` and `peml serve` as a person starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from export_kit import write_run
from peml.evaluation.scoring import generate_answers, score_choices
from peml.generate import read_prompts
from peml.training import open_run

Call = Callable[..., tuple[int, str, str]]


def test_answers_are_those_of_evaluation(peml: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path, "peml+mtl")
    bench, model = open_run(run)
    shared = {"max_length": bench.max_length, "batch_size": 4, "tasks_kwarg": True}
    written = generate_answers(model, bench.tokenizer, bench.eval["color"], max_new_tokens=3, **shared)
    chosen = score_choices(model, bench.tokenizer, bench.eval["size"], **shared)

    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    # Fields of the template; the answer is not among them.
    fields = tmp_path / "fields.jsonl"
    fields.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    code, out, _ = peml("generate", run, "--task", "color", "--file", fields, "--output", tmp_path / "out.jsonl")
    assert code == 0 and out.splitlines() == written
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in kept] == written and kept[0]["asked"] == {"text": rows[0]["text"]}

    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"{row['text']} big ?\n\n" for row in rows))
    code, out, _ = peml("generate", run, "--task", "size", "--file", lines, "--batch-size", 3)
    assert code == 0 and out.splitlines() == [("yes", "no")[index] for index in chosen]
    assert len(set(out.splitlines())) == 2

    code, out, _ = peml("generate", run, "red cat color :", "--task", "color", "--max-tokens", 1)
    assert code == 0 and len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "color"], "give prompts, or --file"),
        (["red", "--task", "color", "--output", "no/such/file"], "--output no/such/file is no file in a folder"),
        (["--task", "color", "--file", "half.jsonl"], "prompt 1 has half of a surrogate pair"),
        (["red", "--task", "rte"], "--task rte: the run has the tasks size, color"),
        (["--task", "color", "--file", "none.txt"], "none.txt cannot be read"),
        (["--task", "color", "--file", "bad.jsonl"], "bad.jsonl:2 is no JSON"),
        (["--task", "color", "--file", "number.jsonl"], "number.jsonl:1 must be a text, or an object"),
        (["--task", "color", "--file", "empty.txt"], "holds no prompt"),
        (["--task", "color", "--file", "other.jsonl"], "prompt 1: task 'color': `prompt` asks for what the row lacks"),
    ],
)
def test_mistakes(peml: Call, arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, "lora")
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('"red"\n{\n')
    Path("half.jsonl").write_text('"\\ud800"\n')
    Path("number.jsonl").write_text("3\n")
    Path("empty.txt").write_text("\n")
    Path("other.jsonl").write_text('{"words": "red"}\n')
    code, _, err = peml("generate", run, *arguments)
    assert code == 2 and says in err


def test_lines_end_with_line_breaks(tmp_path: Path) -> None:
    """Unicode has other separators, which texts hold; and some editors begin a file with a mark."""
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'\xef\xbb\xbf"a\xe2\x80\xa8b"\r\n\n"c\xc2\x85d"\n')
    assert read_prompts(file) == ["a\u2028b", "c\x85d"]


def test_what_cannot_be_served_is_one_sentence(peml: Call, tmp_path: Path) -> None:
    """Before anything is said to be served; and an address that is taken ends the engine, too."""
    pytest.importorskip("fastapi", reason="needs the extra `serve`")
    code, out, err = peml("serve", write_run(tmp_path / "a", "attempt"))
    assert code == 2 and "made from the text" in err and "serves" not in out and "Traceback" not in err
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = peml("serve", write_run(tmp_path / "b", "lora"), "--port", taken.getsockname()[1])
    assert code == 2 and "another program has it" in err and threading.active_count() <= before


@pytest.mark.slow
def test_serve_ends_when_all_is_answered(tmp_path: Path) -> None:
    """A process of its own, ended by SIGTERM while it has work."""
    pytest.importorskip("fastapi", reason="needs the extra `serve`")
    run = write_run(tmp_path, "peml")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    server = subprocess.Popen(
        [sys.executable, "-m", "peml", "serve", str(run), "--port", str(port)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        return found

    try:
        for _ in range(600):
            try:
                if ask("GET", "/health")[0] == 200:
                    break
            except OSError:
                assert server.poll() is None, server.stdout.read() if server.stdout else ""
            time.sleep(0.1)
        with ThreadPoolExecutor(8) as pool:
            asked = {"model": "color", "prompt": "red cat", "max_tokens": 40, "temperature": 1.0}
            calls = [pool.submit(ask, "POST", "/v1/completions", asked) for _ in range(8)]
            while not any(call.running() for call in calls):
                time.sleep(0.01)
            time.sleep(0.3)
            server.send_signal(signal.SIGTERM)
            assert [call.result()[0] for call in calls] == [200] * 8
        output, _ = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert f"http://127.0.0.1:{port}/v1 serves run, size, color" in output and "Traceback" not in output
