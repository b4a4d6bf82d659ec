"""The embedded world, corpus and tasks, with which the package works on its own."""

from peml.tasks.toy.corpus import documents
from peml.tasks.toy.suite import SUITE_VERSION, TOY_TASKS, ToyTask, toy_rows

__all__ = ["SUITE_VERSION", "TOY_TASKS", "ToyTask", "documents", "toy_rows"]
