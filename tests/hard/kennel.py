"""Commands in processes of their own that begin with everything imported, and can be killed at any instant."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["peml.cli", "peml.regimes", "peml.export", "peml.tuning", "peml.compare", "optuna"])

Prepare = Callable[[], None]


def _run(arguments: Sequence[str], output: str, prepare: Prepare | None) -> None:
    # Through a process of its own: what limits the size of files must not cut off what is said of it.
    with open(output, "wb") as file:
        pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file).stdin
    assert pipe is not None
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    from peml.cli import main

    if prepare is not None:
        prepare()
    sys.argv = ["peml", *arguments]
    main()


class Command:
    """`peml ARGUMENTS`; what it says goes to a file.

    Args:
        arguments: of the command.
        output: the file.
        prepare: called in the process, before anything else.
    """

    def __init__(self, arguments: Sequence[str | Path], output: Path, prepare: Prepare | None = None) -> None:
        self.output = output
        self.process = _CONTEXT.Process(target=_run, args=([*map(str, arguments)], str(output), prepare))
        self.process.start()

    def wait(self, seconds: float = 300) -> int:
        """Its exit code; what takes longer is an error."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"no end after {seconds} s: {self.said()}"
        return self.process.exitcode

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL at that instant; whether it was still at work."""
        until = time.monotonic() + seconds
        self.process.join(max(0.0, until - time.monotonic()))
        alive = self.process.exitcode is None
        if alive:
            os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        return alive

    def said(self) -> str:
        """Both streams; what is still in the pipe comes a moment later."""
        time.sleep(0.2)
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""
