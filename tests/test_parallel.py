"""Two processes with different tasks do what one process does with both batches: DDP and FSDP2, every adapter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from models import gradients
from parallel_worker import COMBINATIONS, TASKS_BY_RANK, base_of, build, loss_of

TASKS_OF_ROWS = [task for tasks in TASKS_BY_RANK for task in tasks]


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def left(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp(request.param)
    worker = Path(__file__).with_name("parallel_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(worker), request.param, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder


@pytest.mark.parametrize("combination", COMBINATIONS, ids="+".join)
def test_two_processes_equal_one(left: tuple[str, Path], combination: tuple[str, str]) -> None:
    kind, folder = left
    name = "+".join(combination)
    if kind == "ddp":
        model, batch = build(*combination)
        loss_of(model, batch, TASKS_OF_ROWS).backward()
        given, wanted = load_file(folder / f"{name}.safetensors"), gradients(model)
        assert given.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(given[key], wanted[key], rtol=1e-9, atol=1e-12, msg=key)
        return
    model, batch = build(*combination, torch.float32)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(2):
        loss_of(model, batch, TASKS_OF_ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(base_of(combination[1]).float(), folder / name).eval()
    given, wanted = again.state_dict(), model.state_dict()
    assert given.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(given[key], wanted[key], rtol=1e-4, atol=1e-6, check_dtype=False, msg=key)
    with torch.no_grad():
        logits = [m(input_ids=batch, tasks=TASKS_OF_ROWS).logits.nan_to_num(neginf=0.0) for m in (again, model)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
