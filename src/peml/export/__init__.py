"""Leaving peml: where an adapter can go, and at what price."""

from peml.export.targets import Target, export_targets

__all__ = ["Target", "export_targets"]
