"""One new token per row, every row of its own task: what serving pays per step, and what it costs to switch tasks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle

from benchmarks import naive, peers
from benchmarks.harness import Case, Variant
from benchmarks.options import PRESENT, TASKS, add_dtype, mixed_rows
from benchmarks.sites import Site, layer_site
from peml import adapters

WIDTHS, BATCHES = (2048, 4096), (8, 32)
DEPTH = 4
ROUNDS = 51


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--width", type=int, action="append", help="one or more (2048 and 4096)")
    parser.add_argument("--rows", type=int, action="append", help="rows of the batch, one or more (8 and 32)")
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"layers in a row, each of its own weight ({DEPTH})")
    add_dtype(parser, "bf16")


def cases(options: Namespace) -> Iterator[Case]:
    """Mixed batches of every size, then switching."""
    widths = [16] if options.quick else options.width or WIDTHS
    for width in widths:
        for rows in options.rows or BATCHES:
            yield _case("Decoding, mixed tasks", _site(options, width, rows), _mixed)
    for width in widths:
        yield _case("Switching tasks, over one decoding step", _site(options, width, min(BATCHES)), _switching)


def _site(options: Namespace, width: int, rows: int) -> Site:
    return layer_site(
        width, width, rows, options.dtype, ids=mixed_rows(rows), num_tasks=TASKS, train=False, depth=options.depth
    )


def _case(title: str, site: Site, variants: Callable[[Site], list[Variant]]) -> Case:
    x = site.args[0]
    settings = {"d": x.shape[-1], "rows": x.shape[0], "dtype": str(x.dtype).removeprefix("torch.")}
    settings |= {"layers": len(site.base.blocks), "T": TASKS, "present": PRESENT}
    title = f"{title}, d={x.shape[-1]}, b={x.shape[0]}"
    return Case(title, [*site.floors(), *variants(site)], False, x.nbytes, settings, ROUNDS)


def _mixed(site: Site) -> list[Variant]:
    """The same work in several ways; PEFT's one adapter for all rows does less, and is a bound."""
    mixed, one = peers.peft_mixed(site), replace(peers.peft_lora(site), name="PEFT LoRA, not mixed")
    return [
        mixed,
        one,
        peers.naive(site, "T LoRAs, gather + bmm", naive.GatherLoRA),
        peers.naive(site, "MTL-LoRA as published", naive.MTLLoRA),
        site.peml("peml LoRA", adapters.LoRA(r=8), one.name),
        site.peml("peml SingleTaskLoRA", adapters.SingleTaskLoRA(r=8), mixed.name),
        site.peml("peml MTL-LoRA", adapters.MTLLoRA(r=8, num_up=3), mixed.name),
    ]


def _switching(site: Site) -> list[Variant]:
    """The switch alone: unmerged, what follows is the step above; merged, it is the floor's."""
    task = cycle(range(2))
    live = site.attach(adapters.MTLLoRA(r=8, num_up=3)).eval()
    folded = site.attach(adapters.MTLLoRA(r=8, num_up=3)).eval()
    # The base model has the methods: PEFT's wrapper hands on what it does not know itself.
    folded.base_model.select_task(0)
    folded.base_model.merge_adapter()

    def select() -> None:
        live.base_model.select_task(next(task))

    def refold() -> None:
        folded.base_model.unmerge_adapter()
        folded.base_model.select_task(next(task))
        folded.base_model.merge_adapter()

    peft_live, peft_folded = peers.peft_switching(site), peers.peft_switching(site)
    peft_folded.base_model.merge_adapter()

    def set_adapter() -> None:
        peft_live.set_adapter(f"task{next(task)}")

    def add_and_subtract() -> None:
        peft_folded.base_model.unmerge_adapter()
        peft_folded.set_adapter(f"task{next(task)}")
        peft_folded.base_model.merge_adapter()

    return [
        Variant("PEFT LoRA, set_adapter", set_adapter, "peer"),
        Variant("PEFT LoRA, unmerge and merge", add_and_subtract, "peer"),
        Variant("peml MTL-LoRA, select_task", select, "peml", against="PEFT LoRA, set_adapter"),
        Variant("peml MTL-LoRA, unmerge and merge", refold, "peml", against="PEFT LoRA, unmerge and merge"),
    ]
