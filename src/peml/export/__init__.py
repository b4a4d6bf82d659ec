"""Leaving peml, and coming to it: run folders in formats that others load, and prompts to and from stock PEFT."""

from peml.export.formats import FORMATS
from peml.export.imports import from_peft
from peml.export.lint import Finding, foreseen, lint
from peml.export.prompts import to_peft_prompt
from peml.export.run import Exported, export_run, push

__all__ = [
    "FORMATS",
    "Exported",
    "Finding",
    "export_run",
    "foreseen",
    "from_peft",
    "lint",
    "push",
    "to_peft_prompt",
]
