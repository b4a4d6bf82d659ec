"""How a training is started, whatever its regime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from peml.training.folder import RunFolder
from peml.training.workbench import Workbench


@dataclass(frozen=True)
class Launch:
    """Where a run is written, and what is there already.

    Args:
        output: folder of the run.
        resume: go on from the last complete checkpoint in the folder, in whichever stage.
        overwrite: replace a run that lies there.
        console: where progress is shown; None: nowhere.
        workbench: model and rows that are loaded already; its model gets the adapter.
    """

    output: Path
    resume: bool = False
    overwrite: bool = False
    console: Console | None = None
    workbench: Workbench | None = None

    @property
    def folder(self) -> RunFolder:
        """Of the run."""
        return RunFolder(self.output)
