"""`python -m benchmarks.serving`: throughput, latency and memory of one server for all tasks; see the folder's README.

Every round loads every variant once, in an order drawn anew. What is compared are ratios of one round, of seconds of a
core, which other work on the machine stretches least.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import peml
from benchmarks.harness import FLOOR, TWIN, Ratio
from benchmarks.record import environment
from benchmarks.serving import variants
from benchmarks.serving.load import Reading, closed, jobs, opened
from benchmarks.serving.memory import of_children

TASKS = [f"t{i}" for i in range(8)]
PEML, MIXED, LORA_ALONE, MERGED = (
    "LoRA + prefix, one task",
    "LoRA + prefix, 8 tasks",
    "LoRA, 8 tasks",
    "--merge, 8 tasks",
)
OWN = "MTL-LoRA + prefix per task, 8 tasks"
OWN_SINGLE = "MTL-LoRA + prefix per task, one task"
PLAIN, NAMES = "generate, base", "generate, PEFT adapter_names, 8 tasks"
CALLERS, OPEN = 16, (FLOOR, PEML, MIXED)
OTHERS = 10_000
"""Beyond the rounds: what is added to the seed of a load whose prompts the server has not read in another one."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--shape", choices=list(variants.SHAPES), nargs="+", default=["192/6L", "512/4L"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16, help="of each load (16)")
    parser.add_argument("--new", type=int, default=24, help="tokens of an answer (24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes whose memory is read")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--remark", default="", help="put above the tables")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, nothing written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.quick:
        options.shape, options.rounds, options.requests, options.new = ["tiny"], 1, 4, 2
    parts = [measure(shape, options) for shape in options.shape]
    if not options.no_memory:
        for part in parts:
            part["memory_mib"] = of_children(part["shape"])
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--remark" in given:
        del given[given.index("--remark") : given.index("--remark") + 2]
    command = " ".join(["python -m benchmarks.serving", *given])
    data = {
        "name": "serving", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": command,
        "seed": options.seed, **environment(1), "system": platform.platform(), "remark": options.remark, "parts": parts,
    }  # fmt: skip
    text = markdown(data)
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "serving.json").write_text(json.dumps(data, indent=1) + "\n")
        (options.out / "serving.md").write_text(text)


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All variants of one model, round by round."""
    per_task = peml.PrefixTuning(num_virtual_tokens=variants.TOKENS, per_task=True)
    shared = variants.adapted(shape, TASKS, variants.LORA, variants.PREFIX)
    own = variants.adapted(shape, TASKS, peml.MTLLoRA(r=variants.RANK), per_task)
    served = {
        name: variants.Served(model, TASKS, shape)
        for name, model in {
            FLOOR: variants.Bare(variants.base(shape), TASKS),
            TWIN: variants.Bare(variants.base(shape), TASKS),
            PEML: shared,
            OWN: own,
            LORA_ALONE: variants.adapted(shape, TASKS, variants.LORA, None),
            MERGED: variants.adapted(shape, TASKS, variants.LORA, variants.PREFIX, merge=True),
        }.items()
    }
    served |= {MIXED: served[PEML], OWN_SINGLE: served[OWN]}
    words = variants.SHAPES[shape]["vocab_size"]

    def work(name: str, seed: int) -> list[Any]:
        tasks = TASKS[:1] if name in (PEML, OWN_SINGLE) else TASKS
        return jobs(options.requests, tasks, words, (16, 48), options.new, seed)

    def batches(model: Any, named: bool) -> Callable[[int], Reading]:
        def load(seed: int) -> Reading:
            start, wall = time.process_time(), time.perf_counter()
            variants.together(model, work(NAMES, seed), CALLERS, named)
            return Reading(time.process_time() - start, time.perf_counter() - wall, [], [])

        return load

    loads: dict[str, Callable[[int], Reading]] = {
        name: lambda seed, name=name, server=server: closed(server.port, work(name, seed), CALLERS)  # type: ignore[misc]
        for name, server in served.items()
    }
    loads[PLAIN] = batches(variants.base(shape), False)
    loads[NAMES] = batches(variants.by_names(shape, TASKS), True)
    try:
        for load in loads.values():
            load(-1)
        # No server reads a prompt twice: the bare one would find it in its cache.
        rate = 0.5 * options.requests / loads[FLOOR](-2).wall_seconds
        loads |= {
            f"{name}, open": lambda seed, name=name: opened(served[name].port, work(name, OTHERS + seed), rate, seed)  # type: ignore[misc]
            for name in OPEN
        }
        order, readings = random.Random(options.seed), {name: [] for name in loads}  # type: ignore[var-annotated]
        for number in range(options.rounds):
            names = list(loads)
            order.shuffle(names)
            for name in names:
                readings[name].append(loads[name](number))
                print(f"{shape} round {number} {name}: {readings[name][-1].server_seconds:.2f} s", file=sys.stderr)
    finally:
        for server in {id(each): each for each in served.values()}.values():
            server.stop()
    rows = {name: row(own, readings[f"{FLOOR}, open" if name.endswith(", open") else FLOOR], options)
            for name, own in readings.items()}  # fmt: skip
    mixed = {
        "LoRA + prefix": _ratio(readings[PEML], readings[MIXED]),
        "MTL-LoRA + prefix per task": _ratio(readings[OWN_SINGLE], readings[OWN]),
    }
    return {
        "shape": shape, "rounds": options.rounds, "requests": options.requests, "new_tokens": options.new,
        "callers": CALLERS, "open_rate_per_second": rate, "rank": variants.RANK, "prefix_tokens": variants.TOKENS,
        "rows": rows, "mixed_over_single": mixed,
    }  # fmt: skip


def row(readings: Sequence[Reading], floor: Sequence[Reading], options: argparse.Namespace) -> dict[str, Any]:
    """One variant: throughput over the floor's of the same round, and latencies in seconds."""
    tokens = options.requests * options.new
    found: dict[str, Any] = {
        "throughput": _ratio(floor, readings),
        "wall": statistics.median(b.wall_seconds / a.wall_seconds for a, b in zip(readings, floor, strict=True)),
        "tokens_per_core_second": statistics.median(tokens / each.server_seconds for each in readings),
        "server_seconds": [round(each.server_seconds, 4) for each in readings],
        "wall_seconds": [round(each.wall_seconds, 4) for each in readings],
    }
    if readings[0].whole:
        found |= {
            "p50": statistics.median(_share(each.whole, 0.5) for each in readings),
            "p95": statistics.median(_share(each.whole, 0.95) for each in readings),
            "first": statistics.median(_share(each.first, 0.5) for each in readings),
            "p50_over_floor": statistics.median(
                _share(a.whole, 0.5) / _share(b.whole, 0.5) for a, b in zip(readings, floor, strict=True)
            ),
        }
    return found


def _ratio(floor: Sequence[Reading], readings: Sequence[Reading]) -> list[float]:
    """Median and quartiles of throughput over that of the floor."""
    found = Ratio.of([each.server_seconds for each in floor], [each.server_seconds for each in readings])
    return [found.median, found.q1, found.q3]


def _share(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def markdown(data: dict[str, Any]) -> str:
    """The record as tables."""
    machine, versions = data["machine"], data["versions"]
    lines = [
        "# serving", "",
        f"{data['date'][:10]}, {machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread, "
        f"{machine['vector_units']}; " + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f"; seed {data['seed']}.",
        f"Command: `{data['command']}`.", "",
        "Throughput is in seconds of a core that the server's process spent, its callers not counted, which other "
        "work on the machine stretches least: the median of ratios to the frozen base of the same round, with "
        "quartiles; what the base again differs by is no difference. Latencies are of the wall clock. fp32, random "
        "weights.",
        *(["", data["remark"]] if data["remark"] else []),
    ]  # fmt: skip
    for part in data["parts"]:
        lines += [
            "", f"## Llama {part['shape']}", "",
            f"{part['requests']} requests of 16 to 48 tokens and {part['new_tokens']} new ones, {part['callers']} at a "
            f"time (closed loop), or {part['open_rate_per_second']:.2f} a second by a Poisson process (open loop: half "
            f"of what the base answered); LoRA r {part['rank']}, prefix of {part['prefix_tokens']}; "
            f"{part['rounds']} rounds.",
            "", "| variant | throughput / base | quartiles | by the wall clock | p50 s | p95 s | first token s |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, row in part["rows"].items():
            median, q1, q3 = row["throughput"]
            late = [f"{row[key]:.2f}" if key in row else "" for key in ("p50", "p95", "first")]
            name = name.replace(FLOOR, "frozen base")
            lines.append(f"| {name} | {median:.2f} | {q1:.2f}-{q3:.2f} | {row['wall']:.2f} | {' | '.join(late)} |")
        said = (f"{name} {r[0]:.2f} ({r[1]:.2f}-{r[2]:.2f})" for name, r in part["mixed_over_single"].items())
        lines += ["", f"Mixed tasks over one task: {'; '.join(said)}."]
        if "memory_mib" in part:
            lines += ["", *memory(part["memory_mib"])]
    return "\n".join(lines) + "\n"


def memory(found: dict[str, dict[str, float]]) -> list[str]:
    """What processes hold; eight of one kind share the libraries."""
    merged, one, eight = (found[kind] for kind in ("merged", "one task", "eight tasks"))
    all_ = 8 * merged["own"] + merged["rss"] - merged["own"]
    rows = [
        ("one server, one task", one["rss"], one["own"]),
        ("one server, eight tasks", eight["rss"], eight["own"]),
        ("one process, merged", merged["rss"], merged["own"]),
        ("eight such processes (their own memory eight times, what they share once)", all_, 8 * merged["own"]),
    ]
    return [
        "| memory after requests | resident MiB | of these not shared | / one server, one task |", "|---|---|---|---|",
        *(f"| {name} | {rss:.0f} | {own:.0f} | {rss / one['rss']:.2f} |" for name, rss, own in rows),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
