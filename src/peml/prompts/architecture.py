"""The structure that a prefix search finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What a search found.

    Args:
        operations: one name per cell.
        tokens: kept tokens per attention layer.
        derived: whether the search is over; otherwise the operations are those of the largest weight so far.
    """

    operations: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    derived: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        """Prefix length per layer."""
        return tuple(len(row) for row in self.tokens)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON."""
        return {
            "operations": list(self.operations),
            "lengths": list(self.lengths),
            "tokens": [list(row) for row in self.tokens],
            "derived": self.derived,
        }
