"""The process of one job: `python -m peml.compare.worker KIND SOURCE OUTPUT`."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from pathlib import Path

from peml.errors import PemlError


def work(kind: str, source: Path, output: Path) -> None:
    """Do one job, going on with what was begun.

    Args:
        kind: `train`, `tune` or `costs`.
        source: recipe of a training or tuning; of costs, the run.
        output: folder, or file, that is written.
    """
    if kind == "costs":
        from peml.compare.costs import measure_costs

        measure_costs(source, output)
    elif kind == "tune":
        from peml.tuning import tune

        tune(source, output, resume=True)
    else:
        from peml import regimes

        regimes.train(source, output, resume=True)


def _end_with_parent() -> None:
    """Nothing is written into this pipe: it ends when the parent does, however that ended."""
    # Without a buffer: a thread that waits in one cannot be left behind when Python ends.
    while os.read(0, 1):
        pass
    os._exit(3)


def main() -> None:
    """One job, as the parent says."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    try:
        work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except PemlError as error:
        print(f"error: {' '.join(str(error).split())}", flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
