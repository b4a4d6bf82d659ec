"""A run that is killed at any moment goes on to the same weights, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peml.training import RunFolder
from workshop import recipe, write_recipe

STEPS = 40


def command(folder: RunFolder, path: Path) -> list[str]:
    return [sys.executable, "-m", "peml", "train", str(path), "--output", str(folder.path), "--resume"]


def whole(folder: RunFolder, path: Path) -> RunFolder:
    """Run to the end, in a process of its own like every other part: other tests leave a process in another state."""
    subprocess.run(command(folder, path), check=True, capture_output=True, timeout=300)
    return folder


def kill_when(folder: RunFolder, path: Path, step: int) -> int:
    """Start the run in a process of its own and kill it once a step is logged; the step at which it died."""
    with subprocess.Popen(command(folder, path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 120
        while logged(folder) < step and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        process.send_signal(signal.SIGKILL)
        process.wait()
    return logged(folder)


def logged(folder: RunFolder) -> int:
    if not folder.log.exists():
        return 0
    lines = [line for line in folder.log.read_text().split("\n") if line.endswith("}")]
    return int(json.loads(lines[-1])["step"]) if lines else 0


@pytest.mark.parametrize("method", ["peml", "peml+mtl"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, method: str) -> None:
    base = recipe(tmp_path)
    settings = {key: value for key, value in base["set"].items() if key != "adapter.r"}
    arguments = base["train"] | {
        "max_steps": STEPS,
        "save_steps": 3,
        "logging_steps": 1,
        "architecture_learning_rate": 0.05,
    }
    path = write_recipe(tmp_path, method=method, set=settings, train=arguments, evaluate_before=False)
    straight = whole(RunFolder(tmp_path / "straight"), path)

    broken = RunFolder(tmp_path / "broken")
    rng = random.Random(len(method))
    first = kill_when(broken, path, rng.randrange(5, 15))
    assert not broken.adapter.exists()
    second = kill_when(broken, path, max(first + 2, rng.randrange(20, STEPS - 6)))
    assert 0 < first < second < STEPS
    # A checkpoint that was being written when the run was killed must not be believed.
    torn = broken.checkpoints / f"checkpoint-{STEPS - 1}"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": ')
    resumed = whole(broken, path)

    expected = load_file(straight.adapter / "adapter_model.safetensors")
    given = load_file(resumed.adapter / "adapter_model.safetensors")
    assert expected.keys() == given.keys()
    assert any(key.endswith("prompt.alpha") for key in expected)
    for key, value in expected.items():
        assert torch.equal(given[key], value), key
    assert resumed.read_metrics()["after"] == straight.read_metrics()["after"]
    steps = [json.loads(line)["step"] for line in resumed.log.read_text().splitlines()]
    assert steps == sorted(steps) and set(range(1, STEPS + 1)) <= set(steps)
    losses = [
        {e["step"]: e["loss/size"] for e in map(json.loads, run.log.read_text().splitlines()) if "loss/size" in e}
        for run in (straight, resumed)
    ]
    assert losses[0] == losses[1], "the same rows in the same order"
