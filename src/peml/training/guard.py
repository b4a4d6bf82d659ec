"""What keeps a run's files right when something goes wrong: numbers that are none, a full disk, a clock that jumps."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from peml.errors import PemlError
from peml.training.folder import RunFolder

TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "file_writer", "iostream error")
"""What torch says of it, at the first byte, in the middle and at the last."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def check_finite(model: nn.Module, step: int) -> None:
    """Refuse to keep weights that are no numbers: what is stored already stays the newest that can be gone on with.

    Raises:
        PemlError: naming the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise PemlError(
                f"training diverged: {name} holds what is no number at step {step}; the last checkpoint before is "
                "kept: lower the learning rates, or look for a row that the model cannot take"
            )


BLOCK, BLOCKS = 4096, 1024
"""Of a file of weights at most so many blocks of so many bytes are looked at: all of a small one, 4 MiB of a large."""


def base_digest(path: str) -> str | None:
    """Digest of the weights in a model's folder; None: there is no such folder.

    Another training changes every tensor, so that blocks spread over each file find it, and a model of 140 GB takes
    no minutes.
    """
    files = sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("*.bin"))
    whole = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        whole.update(str(size).encode())
        with file.open("rb") as weights:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                weights.seek(start)
                whole.update(weights.read(BLOCK))
    return whole.hexdigest() if files else None


def check_base(folder: RunFolder, path: str) -> None:
    """Refuse a base model that is not the one under which an adapter was trained: shapes would fit, answers not.

    Args:
        folder: of the run.
        path: of the base.

    Raises:
        PemlError: its weights have changed.
    """
    before, now = folder.read_metrics().get("base"), base_digest(path)
    if before is not None and now is not None and before != now:
        raise PemlError(
            f"the weights in {path} are not those that the run in {folder.path} was trained on: put them back, or "
            "train again (if they are the same in other files, remove `base` from its metrics.json)"
        )


def check_room(error: BaseException, path: Path, then: str) -> None:
    """Say in one sentence that something could not be written; other errors are left alone.

    The disk being full is an error of every type: Python's, safetensors' and torch's each have their own.

    Args:
        error: what was raised while a file was written.
        path: what was being written.
        then: what to do when there is room.

    Raises:
        PemlError: it was the writing that failed.
    """
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        reason = error.strerror or str(error)
    elif isinstance(error, SafetensorError) or any(words in str(error) for words in TORCH_CANNOT_WRITE):
        reason = str(error).splitlines()[0]
    else:
        return
    raise PemlError(f"{path} cannot be written ({reason}): make room, or choose another folder, {then}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out: of a GPU, or of the machine, for which torch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
