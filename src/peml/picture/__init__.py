"""Pictures as SVG text: the architecture that a search has found, how the search went, and affinities of tasks."""

from peml.picture.affinity import draw_affinity
from peml.picture.architecture import draw
from peml.picture.traces import draw_traces, read_traces

__all__ = ["draw", "draw_affinity", "draw_traces", "read_traces"]
