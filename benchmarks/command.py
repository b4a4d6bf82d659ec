"""What every run does: measure its cases, print each table as it comes, write the record."""

from __future__ import annotations

import gc
import shlex
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.harness import Case, measure

RESULTS = Path(__file__).parent / "results"
QUICK_ROUNDS = 3


def add_options(parser: ArgumentParser) -> None:
    """Options of every run."""
    parser.add_argument("--quick", action="store_true", help="smoke run: tiny shapes, written only with --out")
    parser.add_argument("--rounds", type=int, help="readings per variant (15; 31 below 5 ms)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="name of the record (that of the run)")
    parser.add_argument("--out", help="folder of the record (benchmarks/results)")


def execute(
    name: str, cases: Callable[[Namespace], Iterator[Case]], options: Namespace, command: Sequence[str]
) -> None:
    """Run one benchmark.

    Args:
        command: module and arguments, as typed behind `python -m`.
    """
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else None)
    tables = []
    for case in cases(options):
        # Plain data at once: a result would keep the weights of all its variants.
        tables.append(record.case_of(measure(case, options.seed, rounds)))
        print("\n".join(record.table(tables[-1])) + "\n", flush=True)
        del case
        gc.collect()
    data = record.record(options.name or name, recorded(command), options.seed, options.threads, tables)
    print(f"{name}: {time.monotonic() - start:.0f} s")
    if options.out or not options.quick:
        for path in record.write(data, Path(options.out or RESULTS)):
            print(path)


def recorded(command: Sequence[str]) -> str:
    """What was typed, without the folder, which is nobody's business but the writer's."""
    kept = [a for i, a in enumerate(command) if not a.startswith("--out") and command[i - 1] != "--out"]
    return shlex.join(["python", "-m", *kept])
