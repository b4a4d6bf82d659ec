"""Pictures as SVG text: the architecture that a search has found, and how the search went."""

from peml.picture.architecture import draw
from peml.picture.traces import draw_traces, read_traces

__all__ = ["draw", "draw_traces", "read_traces"]
