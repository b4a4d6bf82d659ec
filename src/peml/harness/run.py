"""`peml evaluate --harness`: a run measured by lm-eval, and lm-eval's own record beside ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peml.errors import PemlError
from peml.harness.routes import Given, Routes, read_routes
from peml.training.arguments import one_line
from peml.training.folder import RunFolder, write_text
from peml.training.recipe import load_recipe


def needs_harness() -> None:
    """Say what is missing.

    Raises:
        PemlError: lm-eval is not installed, or is older than 0.4.13.
    """
    try:
        from lm_eval.api.registry import model_registry  # noqa: F401
    except ImportError:
        raise PemlError("--harness needs lm-eval 0.4.13 or newer: pip install 'peml[lm-eval]'") from None


def measure_run(
    run: str | Path,
    names: Sequence[str],
    *,
    tasks: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    routes: Given = (),
    batch_size: int | str = 8,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Measure a run with tasks of lm-eval; writes `harness.json`, lm-eval's own record, into its folder.

    Args:
        run: its folder.
        names: of tasks, groups or tags of lm-eval; `*` stands for letters.
        tasks: folder with YAML tasks of one's own; lm-eval's are read only for names that are not there.
        limit: rows of each task; None: all.
        fewshot: answered examples in each prompt; None: as the task says.
        routes: of tasks whose name is another in the adapter, as `peml.harness.read_routes` takes them.
        batch_size: rows of a batch, or `auto`.
        log_samples: keep every request and its answer in what is returned (not in the file).

    Returns:
        lm-eval's results.

    Raises:
        PemlError: lm-eval is not installed, an unknown name, a task without a route, or one that cannot be loaded.
    """
    needs_harness()
    folder = RunFolder.existing(run)
    if not names:
        raise PemlError("--harness needs the name of one or more tasks of lm-eval")
    if tasks is not None and not Path(tasks).is_dir():
        raise PemlError(f"--harness-tasks {tasks} is not a folder: give one with YAML tasks of lm-eval")
    for key, value, least in (("limit", limit, 1), ("fewshot", fewshot, 0)):
        if value is not None and value < least:
            raise PemlError(f"--harness-{key} must be {least} or more, not {value}")
    given = read_routes(routes)
    known = Routes(given, tuple(task.name for task in load_recipe(folder.recipe).build_tasks()))
    # lm-eval tells of every step, and warns of a model that is loaded already.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    manager, found = _found(names, tasks)
    loaded = _loaded(manager, found)
    for name in loaded["tasks"]:
        # Before the model is loaded, not after half of the requests.
        known.task_of(name)
    results: dict[str, Any] = simple_evaluate(
        model="peml",
        model_args={"run": str(folder.path), "route": given},
        tasks=found,
        task_manager=manager,
        limit=limit,
        num_fewshot=fewshot,
        batch_size=batch_size,
        log_samples=log_samples,
    )
    kept = {key: value for key, value in results.items() if key != "samples"}
    write_text(folder.harness, json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
    return results


def _found(names: Sequence[str], tasks: str | Path | None) -> tuple[Any, list[str]]:
    """A manager that knows all names, and what they stand for.

    Reading lm-eval's thousands of tasks takes seconds, so they are left out where the folder has them all.
    """
    from lm_eval.tasks import TaskManager

    include = None if tasks is None else str(tasks)
    for defaults in (False, True):
        if not defaults and include is None:
            continue
        manager = TaskManager(include_path=include, include_defaults=defaults)
        matched = {name: manager.match_tasks([name]) for name in names}
        missing = [name for name, own in matched.items() if not own]
        if not missing:
            return manager, list(dict.fromkeys(one for own in matched.values() for one in own))
    where = "" if include is None else f", neither in {include}"
    raise PemlError(f"--harness: lm-eval knows no task {', '.join(missing)}{where}; `lm-eval ls tasks` lists its own")


def _loaded(manager: Any, names: Sequence[str]) -> Any:
    try:
        return manager.load(list(names))
    except Exception as error:  # data sets, YAML and templates fail in their own ways
        raise PemlError(
            f"--harness: {', '.join(names)} could not be loaded ({type(error).__name__}: {one_line(error)}); lm-eval's "
            "own tasks read their rows from the Hub or its cache, tasks of your own may read local files"
        ) from error
