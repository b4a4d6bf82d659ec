"""Standard benchmarks: lm-eval measures a run, every request routed to the adapter's task.

    lm_eval.simple_evaluate(model="peml", model_args={"run": "runs/glue"}, tasks=["rte", "mrpc"])

works after `import peml`, and `python -m peml.harness` is lm-eval's own command line with it.
"""

from __future__ import annotations

from peml.harness.routes import Routes, read_routes
from peml.harness.run import measure_run

NAME = "peml"
"""Of the model class, as `--model` takes it."""

__all__ = ["NAME", "Routes", "measure_run", "read_routes", "register"]


def register() -> None:
    """Add the model class `peml` to lm-eval, where that is installed; the class is imported when it is asked for."""
    try:
        from lm_eval.api.registry import model_registry
    except ImportError:
        # None at all, or one from before it could register what is not imported yet: `measure_run` says so.
        return
    if NAME not in model_registry:
        model_registry.register(NAME, target="peml.harness.model:PemlLM")


register()
