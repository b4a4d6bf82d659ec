"""Results as JSON and as a Markdown table, with all that is needed to repeat them."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Ratio, Result, Row

VERSION = 1
PACKAGES = ("torch", "transformers", "peft", "peml", "adapters")
MIB = 2**20


def environment(threads: int) -> dict[str, Any]:
    """Machine and versions."""
    return {
        "machine": {
            "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": threads,
            "vector_units": torch.backends.cpu.get_cpu_capability(),
            "bf16": bf16_support(_cpu_field("flags").split()),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def bf16_support(flags: Sequence[str]) -> str:
    """How the CPU multiplies bf16: without units for it, ratios in bf16 say little about machines that have them."""
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), "emulated")


def _cpu_field(name: str) -> str:
    """A field of the first core in /proc/cpuinfo, or nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def record(name: str, command: str, seed: int, threads: int, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that was measured, as plain data; cases as `case_of` gives them."""
    return {
        "format": "peml-benchmark",
        "version": VERSION,
        "name": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        **environment(threads),
        "cases": list(cases),
    }


def case_of(result: Result) -> dict[str, Any]:
    """One case as plain data."""
    case = result.case
    return {
        "title": case.title,
        "settings": dict(case.settings),
        "train": case.train,
        "unit_bytes": case.unit_bytes,
        "rounds": result.rounds,
        "aa_spread": result.spread,
        "rows": [_row(row, result.spread) for row in result.rows],
    }


def _row(row: Row, spread: float) -> dict[str, Any]:
    return {
        "name": row.variant.name,
        "kind": row.variant.kind,
        "setting": row.variant.setting,
        "ratio": asdict(row.ratio),
        "within_aa": row.ratio.within(spread),
        "against": row.variant.against,
        "versus": None if row.versus is None else asdict(row.versus),
        "versus_within_aa": None if row.versus is None else row.versus.within(spread),
        "saved_bytes": row.saved,
        "peak_bytes": row.peak,
        "seconds": [round(reading, 7) for reading in row.seconds],
    }


def markdown(data: dict[str, Any]) -> str:
    """The record as one table per case."""
    machine, versions = data["machine"], data["versions"]
    lines = [
        f"# {data['name']}",
        "",
        f"{data['date'][:10]}, {machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s), "
        f"{machine['vector_units']}, bf16: {machine['bf16']}.",
        ", ".join(f"{name} {number}" for name, number in versions.items()) + f"; seed {data['seed']}.",
        f"Command: `{data['command']}`.",
    ]
    for case in data["cases"]:
        lines += ["", *table(case)]
    return "\n".join(lines) + "\n"


def table(case: dict[str, Any]) -> list[str]:
    """One case: times as ratios to its floor, memory in units of its input and in MiB."""
    spread, unit = case["aa_spread"], case["unit_bytes"]
    what = "forward and backward" if case["train"] else "forward without gradients"
    settings = "".join(f", {key} {value}" for key, value in case["settings"].items())
    lines = [
        f"## {case['title']}",
        "",
        f"{what[0].upper()}{what[1:]}{settings}; {case['rounds']} rounds, A/A spread {spread:.3f}.",
        "",
        "| variant | time / floor | quartiles | minima | compared with | saved / x | saved MiB | peak / x | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in case["rows"]:
        name = f"**{row['name']}**" if row["kind"] == "peml" else row["name"]
        ratio = Ratio(**row["ratio"])
        mark = " (within A/A)" if row["within_aa"] and row["kind"] != "floor" else ""
        cells = [
            name,
            f"{_number(ratio.median)}{mark}",
            f"{_number(ratio.q1)}-{_number(ratio.q3)}",
            _number(ratio.minima),
            _versus(row),
            *_memory(row["saved_bytes"], unit),
            *_memory(row["peak_bytes"], unit),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _versus(row: dict[str, Any]) -> str:
    if row["versus"] is None:
        return ""
    mark = " (within A/A)" if row["versus_within_aa"] else ""
    return f"{_number(row['versus']['median'])} of {row['against']}{mark}"


def _number(ratio: float) -> str:
    """Two decimals, and more where two would leave nothing."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.4f}"


def _memory(size: int | None, unit: int) -> tuple[str, str]:
    return ("", "") if size is None else (f"{size / unit:.2f}", f"{size / MIB:.2f}")


def write(data: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """NAME.json and NAME.md, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{data['name']}.json", folder / f"{data['name']}.md"
    for path, text in zip(paths, (_json(data), markdown(data)), strict=True):
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(path)
    return paths


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of one value, that value."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _json(data: dict[str, Any]) -> str:
    """Indented, but with the readings of a variant on one line."""
    text = json.dumps(data, indent=1)
    return re.sub(r"\[\s+([\d.e,\s-]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"
