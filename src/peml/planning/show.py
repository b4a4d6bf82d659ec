"""A plan on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from peml.planning.formulas import Costs
from peml.planning.plan import Plan

ROWS = {
    "weights": "weights of the base",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer (Adam)",
    "activations": "activations",
    "checkpointed": "activations, checkpointed",
    "cache": "cache at generation",
}


def size(count: float) -> str:
    """Bytes for a reader, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def show_plan(found: Plan, console: Console, gigabytes: float | None = None) -> None:
    """Print it.

    Args:
        found: the plan.
        console: where to.
        gigabytes: what a device has, 10^9 bytes each; None: nothing is said of what fits.
    """
    sizes, load = found.sizes, found.load
    console.print(
        f"{sizes.base:,} frozen numbers, {sizes.trained:,} trained; {load.rows} rows of {load.tokens} tokens on each "
        f"of {load.devices} devices, a prefix of {load.prefix} in each layer, {load.dtype_bytes} bytes a number",
        highlight=False,
    )
    table = Table("on each device")
    columns: dict[str, Costs] = {"alone, or DDP": found.alone}
    if load.devices > 1:
        columns[f"FSDP2 over {load.devices}"] = found.sharded
    for name in columns:
        table.add_column(name, justify="right")
    for key, words in ROWS.items():
        table.add_row(words, *[size(getattr(costs, key)) for costs in columns.values()])
    table.add_section()
    for checkpointing, words in ((False, "a training step"), (True, "the same, checkpointed")):
        cells = []
        for costs in columns.values():
            whole = costs.total(checkpointing)
            fits = "" if gigabytes is None else ", fits" if whole <= gigabytes * 1e9 else ", too much"
            cells.append(f"{size(whole)}{fits}")
        table.add_row(words, *cells, style="bold")
    console.print(table)
    if load.devices > 1:
        sent = found.sent
        console.print(
            f"sent by each device in a step: DDP {size(sent['ddp'])}, FSDP2 {size(sent['fsdp2'])}", highlight=False
        )
    console.print("by formula; kernels, fragmentation and what a library holds come on top: docs/scale.md", style="dim")
