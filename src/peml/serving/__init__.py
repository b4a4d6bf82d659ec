"""One server for all tasks of a run; needs the extra `serve`."""

from peml.serving.engine import Engine
from peml.serving.limits import Limits
from peml.serving.server import open_service, serve

__all__ = ["Engine", "Limits", "open_service", "serve"]
