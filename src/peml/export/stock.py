"""Adapters of stock PEFT on disk: what is read, and how a folder is written whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peml.errors import PemlError
from peml.training.guard import check_room

Source: TypeAlias = str | Path | PeftModel
"""Where a stock adapter is: a folder, or a model that has it active."""

KINDS: dict[str, type[Any]] = {
    "prefix_tuning": PrefixTuningConfig,
    "cartridge": CartridgeConfig,
    "prompt_tuning": PromptTuningConfig,
    "multitask_prompt_tuning": MultitaskPromptTuningConfig,
}
"""Types of PEFT that are a prompt of ours, by their names in lower case."""

UNFINISHED = ".peml-"
"""In the name of a folder that is being written, before the number of the process that does."""

PREFIXES = ("prefix_tuning", "cartridge")
"""Those that are keys and values."""


class Stock(NamedTuple):
    """A stock adapter.

    Args:
        kind: a key of `KINDS`.
        config: of PEFT.
        tensors: `prompt_embeddings`, and `prefix_task_cols`, `prefix_task_rows` of a multitask prompt.
        name: what to call it in messages.
    """

    kind: str
    config: Any
    tensors: dict[str, Tensor]
    name: str


def read_stock(source: Source) -> Stock:
    """A stock adapter, from its folder or out of a model.

    Raises:
        PemlError: there is none, it is of another type, or it is not for a causal language model.
    """
    if isinstance(source, PeftModel):
        adapter = source.active_adapter
        name, config = f"adapter {adapter!r}", source.peft_config[adapter]
        tensors = {} if _kind(config) is None else get_peft_model_state_dict(source, adapter_name=adapter)
    elif not isinstance(source, str | Path):
        raise PemlError(f"source must be a folder or a PeftModel, not {type(source).__name__}")
    else:
        folder = Path(source).expanduser()
        name = str(folder)
        if not (folder / "adapter_config.json").is_file():
            raise PemlError(f"{folder} has no adapter_config.json: give the folder of a PEFT adapter")
        try:
            config = PeftConfig.from_pretrained(name)
        except Exception as error:  # an edited file fails anywhere in PEFT
            raise PemlError(
                f"{folder / 'adapter_config.json'} is no configuration of PEFT ({error!r}): copy the adapter again"
            ) from None
        tensors = _weights(folder) if _kind(config) is not None else {}
    kind = _kind(config)
    if kind is None:
        known = ", ".join(map(str.upper, KINDS))
        raise PemlError(f"{name} is of type {_type(config)}, which is no prompt that peml can take over: {known}")
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM") or config.num_transformer_submodules not in (None, 1):
        raise PemlError(f"{name} is for {task}: only prompts of causal language models can be taken over")
    wanted = {"prompt_embeddings"}
    if kind == "multitask_prompt_tuning":
        wanted |= {"prefix_task_cols", "prefix_task_rows"}
    if tensors.keys() != wanted:
        raise PemlError(f"{name} holds {', '.join(sorted(tensors)) or 'nothing'}, not {', '.join(sorted(wanted))}")
    _check_tensors(tensors, name)
    return Stock(kind, config, {key: tensor.detach().clone() for key, tensor in tensors.items()}, name)


def _check_tensors(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that would only fit by being broadcast, or that are no numbers.

    Raises:
        PemlError: naming the tensor and its shape.
    """
    table = tensors["prompt_embeddings"]
    shapes: dict[str, object] = {"prompt_embeddings": table.shape if table.ndim == 2 else "tokens x numbers"}
    if "prefix_task_cols" in tensors and table.ndim == 2:
        columns = tensors["prefix_task_cols"]
        tasks, ranks = (columns.shape[0], columns.shape[-1]) if columns.ndim == 3 else (0, 0)
        shapes["prefix_task_cols"] = (tasks, table.shape[0], ranks)
        shapes["prefix_task_rows"] = (tasks, ranks, table.shape[1])
    for key, wanted in shapes.items():
        tensor = tensors[key]
        if tensor.shape != wanted:
            raise PemlError(f"{name}: {key} is {list(tensor.shape)}, not {wanted}: copy or save the adapter again")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise PemlError(f"{name}: {key} does not hold finite numbers: copy or save the adapter again")


def _type(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _kind(config: PeftConfig) -> str | None:
    kind = _type(config).lower()
    return kind if kind in KINDS else None


def _weights(folder: Path) -> dict[str, Tensor]:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise PemlError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: save the adapter again with a current PEFT")
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise PemlError(f"{file} cannot be read ({error}): copy or save it again") from None


def write_stock(
    folder: str | Path, kind: str, tensors: Mapping[str, Tensor], base: str | None, **settings: Any
) -> None:
    """Write a stock adapter for a causal language model: the whole folder, or nothing.

    Raises:
        PemlError: the folder is not empty, or cannot be made.
    """
    config = KINDS[kind](
        task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=base, num_transformer_submodules=1,
        **settings,
    )  # fmt: skip
    with new_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(plain, str(temporary / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})


def check_new(folder: str | Path) -> Path:
    """The absolute path of a folder that nothing lies in yet.

    Raises:
        PemlError: something does.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PemlError(f"{folder} already holds something: give a folder that is new or empty")
    return folder


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that comes to be whole or not at all: what the block writes lies beside it until the end.

    Raises:
        PemlError: the folder is not empty, or cannot be made.
    """
    folder = check_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}{UNFINISHED}*"):
            with _held(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}{UNFINISHED}{os.getpid()}")
        temporary.mkdir()
    except OSError as error:
        raise PemlError(f"{folder} cannot be made ({error.strerror}): give another folder") from None
    with _held(temporary):
        try:
            yield temporary
            os.replace(temporary, folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            check_room(error, folder, "and export again")
            raise


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether a folder could be held against other processes; a process that is killed holds nothing any more."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:  # another has it, or the file system knows no locks
        held = False
    try:
        yield held
    finally:
        os.close(handle)
