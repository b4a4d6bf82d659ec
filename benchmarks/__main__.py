"""`python -m benchmarks RUN`: run, print the tables and write the record."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from benchmarks import command, decode, end_to_end, every, groups, layers, merged, prefix, searching, soft, tasks

RUNS = {
    "layers": layers,
    "groups": groups,
    "end-to-end": end_to_end,
    "every": every,
    "tasks": tasks,
    "decode": decode,
    "merged": merged,
    "prefix": prefix,
    "searching": searching,
    "soft": soft,
}
ALL = "all"


def parser() -> ArgumentParser:
    """The command line: one subcommand per run."""
    top = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="run", required=True)
    for name, module in RUNS.items():
        run = commands.add_parser(name, help=(module.__doc__ or "").partition("\n")[0])
        command.add_options(run)
        module.add_options(run)
    command.add_options(commands.add_parser(ALL, help="every run, each with its own record"))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark, or all."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    for name in RUNS if options.run == ALL else [options.run]:
        again = [name if argument == ALL else argument for argument in arguments]
        command.execute(name, RUNS[name].cases, parser().parse_args(again), ["benchmarks", *again])
    return 0


if __name__ == "__main__":
    sys.exit(main())
