"""The public names, and what importing them costs."""

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

import peml

NAMES = [
    "Attempt",
    "CGCLoRA",
    "CPoly",
    "Heads",
    "HydraLoRA",
    "LoRA",
    "MTLLoRA",
    "MoELoRA",
    "MultiLoRA",
    "MultiTaskTrainer",
    "MultitaskPrompt",
    "PemlConfig",
    "PemlError",
    "PemlModel",
    "Poly",
    "PrefixNAS",
    "PrefixTuning",
    "PromptTuning",
    "Recipe",
    "SingleTaskLoRA",
    "Task",
    "evaluate_tasks",
    "match_params",
    "method",
    "methods",
    "train",
]

# Extras of single commands: whoever trains one adapter must not wait for them, nor need them installed.
HEAVY = {"trl", "optuna", "ray", "lm_eval", "matplotlib", "fastapi", "uvicorn", "prometheus_client"}

PROBE = """
import json, socket, sys

asked = []

def refuse(*args, **kwargs):
    asked.append(repr(args))
    raise OSError("no network here")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import peml
for name in peml.__all__:
    getattr(peml, name)
print(json.dumps({"asked": asked, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict[str, Any]:
    """What a new interpreter does on importing peml and every public name, with the Hub allowed."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_public_names_are_pinned() -> None:
    """A change here is a change for users: it needs a line in CHANGELOG.md."""
    assert sorted(peml.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_public_name_exists(name: str) -> None:
    assert hasattr(peml, name)


def test_import_takes_no_network(fresh_import: dict[str, Any]) -> None:
    assert fresh_import["asked"] == []


def test_import_leaves_the_extras_alone(fresh_import: dict[str, Any]) -> None:
    assert HEAVY.isdisjoint(fresh_import["modules"])


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "peml.invalid"])
def test_the_suite_refuses_the_network(host: str) -> None:
    with pytest.raises(RuntimeError, match="tests must not use the network"):
        socket.create_connection((host, 80), timeout=1)


def test_the_suite_allows_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
