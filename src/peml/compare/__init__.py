"""Comparisons: methods with several seeds each on equal budgets, and what of their differences would be there again."""

from peml.compare.compare import compare
from peml.compare.folder import CompareFolder

__all__ = ["CompareFolder", "compare"]
