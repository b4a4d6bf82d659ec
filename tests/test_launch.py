"""`accelerate launch` with the files of `examples/accelerate`: two processes train to what one process does."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from peml.training import RunFolder
from workshop import recipe, write_recipe

FILES = Path(__file__).parents[1] / "examples" / "accelerate"
FSDP = str(Path(__file__).with_name("fsdp_worker.py"))


@pytest.mark.parametrize("file", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_accelerate_reads_the_file(file: Path) -> None:
    """As `accelerate launch` does, up to the process that it would start."""
    config = load_config_from_file(str(file))
    asked = launch_command_parser().parse_args(["--config_file", str(file), "-m", "peml", "train", "recipe.yaml"])
    args, _, _ = _validate_launch_command(asked)
    assert args.num_processes == config.num_processes == 2 and args.mixed_precision == "no"
    kinds = {"ddp": args.multi_gpu, "fsdp2": args.use_fsdp, "deepspeed": args.use_deepspeed}
    (kind,) = (name for name, chosen in kinds.items() if chosen)
    assert file.stem.startswith(kind)
    assert kind != "fsdp2" or (int(args.fsdp_version), args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    assert kind != "deepspeed" or f"zero{args.zero_stage}" in file.stem
    assert kind != "deepspeed" or "UNTESTED" in file.read_text(encoding="utf-8")


def launch(kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --config_file KIND.yaml -m peml ARGUMENTS`; FSDP is forced upon processes without a GPU."""
    program = [FSDP] if kind == "fsdp2" else ["-m", "peml"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES / f"{kind}.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += ["--main_process_port", str(free.getsockname()[1])]
    return subprocess.run(
        [*command, *program, *arguments], capture_output=True, text=True, timeout=400, env=environment
    )


def write(folder: Path, method: str, rows: int, **train: Any) -> Path:
    """A recipe of five steps on a CPU, with so many rows a process."""
    base = recipe(folder)
    ours = {"lora+prefix": ("prompt.num_virtual_tokens",), "mtl-lora": ("adapter.r",), "peml": (*base["set"],)}
    settings = {key: base["set"][key] for key in ours[method]}
    # Plain gradient descent: Adam would blow differences of rounding up to the size of its step.
    arguments = base["train"] | {"max_steps": 5, "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True}
    arguments |= {"prompt_learning_rate": 1e-2, "architecture_learning_rate": 1e-2}
    arguments |= {"per_device_train_batch_size": rows} | train
    return write_recipe(folder, method=method, set=settings, train=arguments, evaluate_before=False)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"), [("ddp", "peml"), ("ddp", "mtl-lora"), ("fsdp2", "lora+prefix"), ("fsdp2", "mtl-lora")]
)
def test_two_processes_equal_one(tmp_path: Path, kind: str, method: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [sys.executable, "-m", "peml", "train", str(write(tmp_path, method, rows=8)), "--output", str(one)]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    done = launch(kind, "train", str(write(tmp_path, method, rows=4)), "--output", str(two))
    assert done.returncode == 0, done.stderr[-2000:]
    expected, given = weights(one), weights(two)
    assert expected.keys() == given.keys()
    for key, value in expected.items():
        torch.testing.assert_close(given[key], value, rtol=1e-3, atol=1e-6, msg=key)
    answers = [json.loads((run / "predictions.json").read_text(encoding="utf-8")) for run in (one, two)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_under_fsdp(tmp_path: Path) -> None:
    """With Adam, whose state is in parts as well: the end is the same, bit for bit."""
    path, whole, cut = write(tmp_path, "mtl-lora", 4, optim="adamw_torch", save_steps=2), tmp_path / "a", tmp_path / "b"
    done = launch("fsdp2", "train", str(path), "--output", str(whole))
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-5")
    folder = RunFolder(cut)
    folder.write_json(folder.metrics, {k: v for k, v in folder.read_metrics().items() if k != "after"})
    done = launch("fsdp2", "train", str(path), "--output", str(cut), "--resume")
    assert done.returncode == 0 and "going on from checkpoint-4" in done.stdout, done.stderr[-2000:]
    expected, given = weights(whole), weights(cut)
    assert expected.keys() == given.keys() and all(torch.equal(given[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_a_search_is_refused_under_fsdp(tmp_path: Path) -> None:
    done = launch("fsdp2", "train", str(write(tmp_path, "peml", rows=4)), "--output", str(tmp_path / "run"))
    assert done.returncode != 0 and "a prefix cannot be searched under FSDP" in " ".join(done.stderr.split())
    assert not (tmp_path / "run" / "recipe.yaml").exists()
