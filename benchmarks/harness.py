"""The protocol: all variants in one process, shuffled every round, as ratios to a frozen floor measured twice.

A shared machine drifts by far more than the differences of interest. What survives is the ratio of two readings of the
same round, and the ratio of the floor to its own twin (the A/A pair) says how much of it to believe.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes, saved_bytes

WARMUPS = 2
ROUNDS = 15
ROUNDS_IF_SHORT = 31
SHORT_SECONDS = 5e-3
FLOOR, TWIN = "floor", "floor again"

Outputs = Tensor | Sequence[Tensor] | None


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared.

    Args:
        name: as in the table.
        forward: what is timed; with its backward pass if the case trains.
        kind: whose code it is.
        leaves: tensors whose gradients are cleared, untimed, before every step.
        held: parameters and buffers, which are no activations.
        against: name of the variant that it is also compared with.
        setting: what it was built with.
    """

    name: str
    forward: Callable[[], Outputs]
    kind: Literal["floor", "peer", "peml"]
    leaves: tuple[Tensor, ...] = ()
    held: tuple[Tensor, ...] = ()
    against: str | None = None
    setting: str = ""


@dataclass(frozen=True)
class Case:
    """Variants that share inputs and a floor, and become one table.

    Args:
        title: heading of the table.
        variants: the first two are the floor and its twin.
        train: forward and backward; otherwise forward without gradients.
        unit_bytes: size of the input; memory is also given in this unit.
        settings: shapes and the like, for the record.
        rounds: minimum, where the run asks for more than the protocol does.
    """

    title: str
    variants: Sequence[Variant]
    train: bool
    unit_bytes: int
    settings: Mapping[str, object] = field(default_factory=dict)
    rounds: int = 0

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        assert names[:2] == [FLOOR, TWIN] and len(set(names)) == len(names), names
        assert all(variant.against in (None, *names) for variant in self.variants), names


@dataclass(frozen=True)
class Ratio:
    """Readings of one variant over readings of another, round by round.

    Args:
        median, q1, q3: of the ratios of each round.
        minima: ratio of the two shortest readings, which a busy machine disturbs least.
    """

    median: float
    q1: float
    q3: float
    minima: float

    @classmethod
    def of(cls, seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
        """Ratios of readings of the same rounds."""
        ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
        # One round (a smoke run) has no quartiles of its own.
        q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return cls(median, q1, q3, min(seconds) / min(reference))

    @property
    def spread(self) -> float:
        """Distance from 1 of the farther quartile: of an A/A pair, what a difference has to exceed to count."""
        return max(abs(self.q1 - 1), abs(self.q3 - 1))

    def within(self, spread: float) -> bool:
        """Whether it differs from 1 by no more than an A/A pair does."""
        return abs(self.median - 1) <= spread


@dataclass(frozen=True)
class Row:
    """What was measured of one variant.

    Args:
        variant: of which.
        seconds: every reading, in the order of the rounds.
        ratio: to the floor.
        versus: to the variant that it is compared with, if any.
        saved, peak: bytes kept for backward (None without gradients) and at the peak.
    """

    variant: Variant
    seconds: list[float]
    ratio: Ratio
    versus: Ratio | None
    saved: int | None
    peak: int


@dataclass(frozen=True)
class Result:
    """All rows of a case, and the spread of its A/A pair."""

    case: Case
    rounds: int
    spread: float
    rows: list[Row]


def interleave(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    order: random.Random,
    before: Callable[[str], object] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every step once per round, in an order shuffled anew each round.

    Args:
        before: called, untimed, before each step.
    """
    readings: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            before(name)
            start = clock()
            outputs = steps[name]()
            readings[name].append(clock() - start)
            del outputs
    return readings


def measure(case: Case, seed: int, rounds: int | None = None, clock: Callable[[], float] = time.perf_counter) -> Result:
    """Warm up, time and weigh all variants of a case.

    Args:
        seed: of the order and of the gradients fed to backward.
        rounds: instead of the protocol's number.
    """
    torch.manual_seed(seed)
    order = random.Random(seed)
    variants = {variant.name: variant for variant in case.variants}

    def clear(name: str) -> None:
        # Outside the clock: an optimiser's zero_grad is no part of what is compared.
        for leaf in variants[name].leaves:
            leaf.grad = None

    with torch.set_grad_enabled(case.train):
        steps = _steps(case)
        warm = interleave(steps, WARMUPS, order, clear, clock)
        rounds = rounds or max(case.rounds, ROUNDS_IF_SHORT if min(warm[FLOOR]) < SHORT_SECONDS else ROUNDS)
        gc.collect()
        gc.disable()
        try:
            seconds = interleave(steps, rounds, order, clear, clock)
        finally:
            gc.enable()
        memory = {name: _memory(case, variants[name], steps[name], clear) for name in variants}
    rows = []
    for name, variant in variants.items():
        versus = None if variant.against is None else Ratio.of(seconds[name], seconds[variant.against])
        rows.append(Row(variant, seconds[name], Ratio.of(seconds[name], seconds[FLOOR]), versus, *memory[name]))
    return Result(case, rounds, rows[1].ratio.spread, rows)


def _steps(case: Case) -> dict[str, Callable[[], object]]:
    """One call per variant: forward, and backward from the same gradients for all."""
    if not case.train:
        return {variant.name: variant.forward for variant in case.variants}
    outputs = _tensors(case.variants[0].forward())
    gradients = [torch.ones_like(y) if y.ndim == 0 else torch.randn_like(y) for y in outputs]

    def step(forward: Callable[[], Outputs]) -> Callable[[], object]:
        return lambda: torch.autograd.backward(_tensors(forward()), gradients)

    return {variant.name: step(variant.forward) for variant in case.variants}


def _tensors(outputs: Outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs or ())


def _memory(
    case: Case, variant: Variant, step: Callable[[], object], clear: Callable[[str], None]
) -> tuple[int | None, int]:
    clear(variant.name)
    saved = saved_bytes(variant.forward, variant.held) if case.train else None
    peak = peak_bytes(step)
    clear(variant.name)
    return saved, peak
