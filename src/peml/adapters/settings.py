"""Settings that cannot work are refused where they are given, by name."""

from __future__ import annotations

import math

from peml.errors import PemlError


def positive(name: str, value: float) -> None:
    """Refuse a setting that must be above zero.

    Raises:
        PemlError: `value` is zero or below.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise PemlError(f"{name} must be above 0, not {value}")


def probability(name: str, value: float) -> None:
    """Refuse a setting that must lie in [0, 1).

    Raises:
        PemlError: `value` is outside.
    """
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise PemlError(f"{name} must be in [0, 1), not {value}")
    if value and not 1e-4 <= value <= 0.9999:
        # Dropout decides by 16 bits, which would make these never or always.
        raise PemlError(f"{name} must be 0, or between 0.0001 and 0.9999, not {value}")


def temperature(name: str, value: float) -> None:
    """Refuse a temperature that softmax cannot be divided by.

    Raises:
        PemlError: `value` is below 0.001.
    """
    positive(name, value)
    if value < 1e-3:
        raise PemlError(f"{name} must be at least 0.001, not {value}")


def one_of(name: str, value: str, *options: str) -> None:
    """Refuse a setting that is none of the options.

    Raises:
        PemlError: `value` is another one.
    """
    if value not in options:
        raise PemlError(f"{name} must be {' or '.join(options)}, not {value!r}")


def divisible(name: str, value: int, step: int, why: str) -> None:
    """Refuse a rank that cannot be shared evenly.

    Raises:
        PemlError: `value` is no multiple of `step`; the message has the nearest that are.
    """
    if value % step:
        below = value // step * step
        fits = f"{below} or {below + step}" if below else f"{step}"
        raise PemlError(f"{name} must be a multiple of {step}, {why}, not {value}: {fits} would fit")


def common_and_specific(num_common: int, num_specific: int) -> None:
    """Refuse numbers of experts that are negative, or none at all.

    Raises:
        PemlError: one is below 0, or both are 0.
    """
    for name, value in (("num_common", num_common), ("num_specific", num_specific)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise PemlError(f"adapter.{name} must be 0 or above, not {value}")
    if num_common == num_specific == 0:
        raise PemlError("adapter.num_common and adapter.num_specific are both 0: there must be an expert")
