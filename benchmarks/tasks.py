"""How the cost grows with the number of tasks while a batch still holds the same four.

All numbers of tasks of a method are read in the same rounds, so that its growth is a ratio of neighbours.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

from benchmarks import naive, peers
from benchmarks.harness import Case, Variant
from benchmarks.options import ROWS, add_layer_shape, layer_shape
from benchmarks.sites import layer_site, rows_of_tasks
from peml import adapters

COUNTS = (4, 32, 256)
DEPTH = 4
ADAPTERS = {
    "SingleTaskLoRA": adapters.SingleTaskLoRA(r=8),
    "MTLLoRA": adapters.MTLLoRA(r=8, num_up=3),
    "MoELoRA": adapters.MoELoRA(r=24, num_experts=3),
    "CGCLoRA": adapters.CGCLoRA(r=24, num_common=2, num_specific=1),
    "Poly": adapters.Poly(r=8, num_skills=4),
    "CPoly": adapters.CPoly(r=8, num_common=3, num_specific=1),
}
NAIVE: dict[str, type[naive.Naive]] = {
    "SingleTaskLoRA": naive.GatherLoRA,
    "MTLLoRA": naive.MTLLoRA,
    "MoELoRA": naive.MoELoRA,
    "CGCLoRA": naive.CGCLoRA,
    "Poly": naive.Poly,
    "CPoly": naive.CPoly,
}


def add_options(parser: ArgumentParser) -> None:
    add_layer_shape(parser, width=2048, tokens=512, dtype="bf16")
    parser.add_argument("--method", choices=list(ADAPTERS), action="append", help="one or more (all)")


def cases(options: Namespace) -> Iterator[Case]:
    """Training on one layer and decoding through a few, per method."""
    width, tokens = layer_shape(options)
    ids = rows_of_tasks(ROWS, range(min(COUNTS)))
    for method in options.method or ADAPTERS:
        for train in (True, False):
            depth, tokens_now = (1, tokens) if train else (DEPTH, ROWS)
            site = layer_site(
                width, width, tokens_now, options.dtype, ids=ids, num_tasks=min(COUNTS), train=train, depth=depth
            )  # fmt: skip
            variants = site.floors()
            variants += _counts("peml", lambda name, count, against, s=site, m=method: s.peml(
                f"peml {name}", ADAPTERS[m], against and f"peml {against}", num_tasks=count
            ))  # fmt: skip
            variants += _counts("naive", lambda name, count, against, s=site, m=method: peers.naive(
                s, f"naive {name}", NAIVE[m], against and f"naive {against}", num_tasks=count
            ))  # fmt: skip
            settings = {"d": width, "N": tokens_now, "dtype": options.dtype, "layers": depth, "present": min(COUNTS)}
            title = f"{method}, {'training' if train else 'decoding'}"
            yield Case(title, variants, train, site.args[0].nbytes, settings)


def _counts(kind: str, make: Callable[[str, int, str | None], Variant]) -> list[Variant]:
    """One variant per number of tasks, each compared with the fewest."""
    first = f"T={COUNTS[0]}"
    return [make(f"T={count}", count, None if count == COUNTS[0] else first) for count in COUNTS]
