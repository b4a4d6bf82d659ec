"""The folder of a run: what lies where, written so that an interruption never leaves half a file."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peml.errors import PemlError

RESOLVED = "# Resolved by peml: what this run was trained with.\n"
"""First line of the recipe in a run folder, which tells it from a recipe that a person wrote."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names of the two files that make an adapter."""


LOCK = ".lock"
"""File that the process holds which is at work in a folder."""


class RunFolder:
    """Names of a run's files.

    `recipe.yaml` (resolved), `adapter/` (PEFT's), `metrics.json`, `log.jsonl`, `checkpoints/`; `predictions.json`, what
    was answered to every evaluation row; `evaluation.json` and `harness.json`, what was measured later, by us and
    by lm-eval; `architecture.json` and its pictures where one was searched; `affinity.json` and its picture where
    clusters were found; `stages/`, the runs of a regime's earlier stages; and `export/`, where exports go that are told
    no other place.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.recipe = self.path / "recipe.yaml"
        self.adapter = self.path / "adapter"
        self.metrics = self.path / "metrics.json"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation, self.harness = self.path / "evaluation.json", self.path / "harness.json"
        self.predictions = self.path / "predictions.json"
        self.architecture = self.path / "architecture.json"
        self.picture, self.curves = self.path / "architecture.svg", self.path / "search.svg"
        self.affinity, self.affinities = self.path / "affinity.json", self.path / "affinity.svg"
        self.stages = self.path / "stages"
        self.exports = self.path / "export"

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A folder that holds a finished run.

        Raises:
            PemlError: it does not; the message says what is missing.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise PemlError(f"{run.path} is not a folder: give the folder that `peml train` wrote")
        for part in (run.recipe, run.adapter):
            if not part.exists():
                unfinished = "; it was interrupted, continue it with --resume" if run.checkpoints.exists() else ""
                raise PemlError(f"{run.path} holds no finished run: there is no {part.name} in it{unfinished}")
        check_adapter(run.adapter)
        return run

    @property
    def is_run(self) -> bool:
        """Whether a run of peml was written here: its recipe says so in its first line."""
        try:
            return self.recipe.read_text(encoding="utf-8").startswith(RESOLVED)
        except (OSError, UnicodeDecodeError):
            return False

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.is_run and self.adapter.is_dir() and "after" in self.read_metrics()

    def check(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Refuse a folder that a run must not touch; changes nothing.

        Raises:
            PemlError: it holds something already and neither resuming nor overwriting was asked for.
        """
        if resume and overwrite:
            raise PemlError("--resume and --overwrite contradict each other: choose one")
        for place in (self.path, *self.path.parents):
            if place.is_file():
                raise PemlError(f"{place} is a file: give a folder for the run")
        # A run that was killed before its first word leaves empty folders and its lock.
        if not any(file.is_file() and file.name != LOCK for file in self.path.rglob("*")):
            return
        if not (resume or overwrite):
            raise PemlError(f"{self.path} already holds files: add --resume, --overwrite, or another --output")
        if not self.is_run:
            wanted = "gone on with" if resume else "overwritten"
            raise PemlError(f"{self.path} is not empty and holds no run of peml: it is not {wanted}")

    def create(self, *, overwrite: bool = False) -> None:
        """Make the folder, after `check`; of an overwritten run only its own files are removed."""
        if overwrite:
            for part in (self.adapter, self.checkpoints, self.stages, self.exports):
                shutil.rmtree(part, ignore_errors=True)
            for file in (
                self.metrics,
                self.log,
                self.recipe,
                self.evaluation,
                self.harness,
                self.predictions,
                self.architecture,
                self.picture,
                self.curves,
                self.affinity,
                self.affinities,
            ):
                file.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        return next((checkpoint for checkpoint in self._checkpoints() if _complete(checkpoint)), None)

    def drop_incomplete(self) -> None:
        """Remove what is newer than the last complete checkpoint: the write that a kill interrupted."""
        for checkpoint in self._checkpoints():
            if _complete(checkpoint):
                break
            shutil.rmtree(checkpoint)

    def _checkpoints(self) -> list[Path]:
        """Newest first."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)

    def write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        """Replace a JSON file in one step."""
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_metrics(self) -> dict[str, Any]:
        """`metrics.json`, or nothing if the run has none yet."""
        if not self.metrics.exists():
            return {}
        try:
            metrics = json.loads(self.metrics.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PemlError(f"{self.metrics} is damaged ({error}): remove it or train again") from None
        if not isinstance(metrics, dict):
            raise PemlError(f"{self.metrics} is damaged (not a mapping): remove it or train again")
        return metrics

    def append_log(self, entry: Mapping[str, Any]) -> None:
        """Add a line to `log.jsonl`."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def rewind_log(self, step: int) -> float:
        """Drop what was logged after a checkpoint that training goes on from; the seconds spent until there."""
        if not self.log.exists():
            return 0.0
        kept = []
        for line in self.log.read_text(encoding="utf-8").split("\n"):
            try:
                if line and (entry := json.loads(line))["step"] <= step:
                    kept.append(entry)
                    # Behind the note of the checkpoint stands what the next step began with, a derivation for one.
                    if entry["step"] == step and entry.get("checkpoint"):
                        break
            except (ValueError, KeyError, TypeError):  # the line that was being written when the run was killed
                continue
        write_text(self.log, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))
        return float(kept[-1]["elapsed_seconds"]) if kept else 0.0


def check_adapter(folder: Path) -> Path:
    """The weights in an adapter's folder.

    Raises:
        PemlError: configuration or weights are missing or damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise PemlError(f"{folder} holds no adapter: there is no {name} in it")
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
        with safe_open(str(folder / WEIGHTS), framework="pt"):
            pass
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        name = WEIGHTS if isinstance(error, SafetensorError) else CONFIG
        raise PemlError(f"{folder / name} is damaged ({error}): train or copy the adapter again") from None
    if kind != "PEML":
        raise PemlError(f"{folder} holds an adapter of type {kind}, not one of peml")
    return folder / WEIGHTS


def _complete(checkpoint: Path) -> bool:
    # The Trainer writes its state last: if that can be read, everything before it is there.
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def alone(folder: Path, command: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made, as long as the block lasts.

    Args:
        folder: where to work.
        command: of both processes.

    Raises:
        PemlError: another one is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The file stays: removing it would let a third process lock another one of the same name.
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PemlError(f"another {command} is at work in {folder}: wait, or choose another --output") from None
        yield
