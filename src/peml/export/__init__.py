"""Leaving peml, and coming to it: where an adapter can go, at what price, and prompts to and from stock PEFT."""

from peml.export.imports import from_peft
from peml.export.prompts import to_peft_prompt
from peml.export.targets import Target, export_targets

__all__ = ["Target", "export_targets", "from_peft", "to_peft_prompt"]
