"""Command-line options that several runs share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from benchmarks.sites import DTYPES, rows_of_tasks

TASKS, PRESENT, ROWS = 8, 6, 8
"""T, how many of them a batch holds, and rows of a batch: what a mixed batch looks like unless a run says otherwise."""

LENGTH = 128
LLAMAS = {
    "512/4L": {"width": 512, "layers": 4, "heads": 8, "intermediate": 1376},
    "288/6L": {"width": 288, "layers": 6, "heads": 6, "intermediate": 768},
}
TINY = {"width": 16, "layers": 1, "heads": 2, "intermediate": 24}


def add_layer_shape(parser: ArgumentParser, width: int, tokens: int, dtype: str) -> None:
    """Options of a linear layer."""
    parser.add_argument("--width", type=int, default=width, help=f"features in and out ({width})")
    parser.add_argument("--tokens", type=int, default=tokens, help=f"N, rows times length ({tokens})")
    add_dtype(parser, dtype)


def add_dtype(parser: ArgumentParser, dtype: str) -> None:
    """Option of the frozen weights' type."""
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype, help=f"of weights and inputs ({dtype})")


def layer_shape(options: Namespace) -> tuple[int, int]:
    """Width and tokens, tiny where only a smoke run is asked for."""
    return (16, 32) if options.quick else (options.width, options.tokens)


def add_llama_shape(parser: ArgumentParser) -> None:
    """Options of a whole model."""
    parser.add_argument("--size", choices=list(LLAMAS), default="512/4L", help="width and layers (512/4L)")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens per row ({LENGTH})")
    add_dtype(parser, "bf16")


def llama_shape(options: Namespace) -> tuple[dict[str, int], int]:
    """Arguments of `sites.llama` and tokens per row, tiny where only a smoke run is asked for."""
    return (TINY, 8) if options.quick else (LLAMAS[options.size], options.length)


def mixed_rows(rows: int = ROWS) -> list[int]:
    """Unsorted tasks of a batch in which `PRESENT` of `TASKS` occur."""
    return rows_of_tasks(rows, range(PRESENT))
