"""What a run cost, and which part of it went into the search of its architecture.

Seconds are those of training, evaluations during it included; loading, and the evaluations before and after, are not
among them. A device-hour is an hour of one GPU, or of one thread where there is none. The parts add up to the total.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from peml.prompts import PrefixGenerator

_ADDED = ("wall_seconds", "device_hours", "steps")
"""Numbers of a part that add up; of its memory the largest counts."""

OWN_PARTS = ("search", "discretisation", "training")
"""Parts of a single training; `training` is what comes after a search, or all of it where there is none."""


def peak_memory(reset: bool = False) -> int:
    """Most bytes that this process has held: of the GPU, or resident where there is none.

    Args:
        reset: count anew from here, which the resident peak of a process cannot.
    """
    if torch.cuda.is_available():
        peak = int(torch.cuda.max_memory_allocated())
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def devices(args: TrainingArguments) -> dict[str, Any]:
    """What an hour is counted of: GPUs, or threads, over all processes."""
    if args.device.type == "cpu":
        return {"kind": "cpu threads", "count": args.world_size * torch.get_num_threads()}
    return {"kind": "gpus", "count": args.world_size}


def bill_of(
    counted: Mapping[str, Any],
    seconds: float,
    steps: int,
    found: Mapping[str, float],
    stages: Mapping[str, Mapping[str, Any]],
    tuned: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The bill of a run.

    Searches and discretisations of earlier stages count among those of the run; `stages` has what else they cost.

    Args:
        counted: as `devices` says it.
        seconds: of the training.
        steps: of the training.
        found: the record of the end of a search; empty: there was none.
        stages: bills of earlier stages.
        tuned: trials that found the settings, with their `wall_seconds` and `device_hours`.
        origin: bill of the search that an imported architecture comes from.
    """

    def part(wall: float, count: int, peak: float = 0) -> dict[str, Any]:
        hours = wall * counted["count"] / 3600
        return {"wall_seconds": wall, "device_hours": hours, "peak_memory_bytes": int(peak), "steps": count}

    searched, step = found.get("derive/search_seconds", 0.0), int(found.get("derive/step", 0))
    looked = found.get("derive/seconds", 0.0)
    parts = {
        "search": part(searched, step, found.get("derive/search_peak_bytes", 0)),
        "discretisation": part(looked, 0, found.get("derive/peak_bytes", 0)),
        # Never below zero, where a run was resumed on another clock.
        "training": part(max(0.0, seconds - searched - looked), steps - step, peak_memory()),
    }
    earlier = {}
    for name, bill in stages.items():
        for own in ("search", "discretisation"):
            parts[own] = _sum(parts[own], bill[own])
        # All stages come from one tuning, which is counted once.
        rest = [given for key, given in _parts(bill).items() if key not in ("search", "discretisation", "tuning")]
        earlier[name] = _sum(*rest)
    tuning = {} if tuned is None else {"tuning": {"peak_memory_bytes": 0, "steps": 0, **tuned}}
    total = _sum(*parts.values(), *earlier.values(), *tuning.values())
    whole = total["wall_seconds"]

    def shared(own: Mapping[str, Any]) -> dict[str, Any]:
        return {**_rounded(own), "share": round(own["wall_seconds"] / whole, 4) if whole else 0.0}

    bill = {"devices": dict(counted)} | {name: shared(own) for name, own in parts.items()}
    if earlier:
        bill["stages"] = {name: shared(own) for name, own in earlier.items()}
    bill |= {name: shared(own) for name, own in tuning.items()}
    bill["total"] = _rounded(total)
    return bill if origin is None else bill | {"origin": dict(origin)}


def search_bill(bill: Mapping[str, Any]) -> dict[str, Any]:
    """What of a bill goes with an architecture to the runs that import it."""
    return {key: bill[key] for key in ("devices", "search", "discretisation", "tuning", "total") if key in bill}


def origin_of(prompt: Any) -> Mapping[str, Any] | None:
    """Where an imported architecture comes from: the bill of its search, or the seed of one that was drawn.

    Empty if neither is known; None if none is imported.
    """
    found = prompt.config.found if isinstance(prompt, PrefixGenerator) else None
    if found is None:
        return None
    bill: Mapping[str, Any] = found.origin.get("bill", {})
    return bill or {key: value for key, value in found.origin.items() if key == "random"}


def bill_line(bill: Mapping[str, Any]) -> str:
    """The bill as one line of text."""
    names = {"discretisation": "measured at discretisation", "training": "training"}
    shown = [
        f"{names.get(name, name)} {own['wall_seconds']:.3g} s ({own['share']:.0%})"
        for name, own in _parts(bill).items()
        if own["wall_seconds"] or name == "training"
    ]
    whole, unit = bill["total"], {"cpu threads": "CPU-thread", "gpus": "GPU"}[bill["devices"]["kind"]]
    peak = whole["peak_memory_bytes"] / 2**30
    line = f"bill: {', '.join(shown)}; {whole['device_hours']:.3g} {unit}-hours, {peak:.2f} GiB at most"
    if "origin" not in bill:
        return line
    origin = bill["origin"]
    if "random" in origin:
        return f"{line}; its architecture is drawn with seed {origin['random']}"
    seconds = origin.get("search", {}).get("wall_seconds")
    before = "a search whose bill is not known" if seconds is None else f"a search of {seconds:.3g} s"
    return f"{line}; its architecture comes from {before}"


def _parts(bill: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """All parts of a bill, which add up to its total."""
    named = {key: bill[key] for key in (*OWN_PARTS, "tuning") if key in bill}
    return named | {f"stage {name}": own for name, own in bill.get("stages", {}).items()}


def _sum(*parts: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {key: sum(own[key] for own in parts) for key in _ADDED}
    return whole | {"peak_memory_bytes": max((own["peak_memory_bytes"] for own in parts), default=0)}


def _rounded(part: Mapping[str, Any]) -> dict[str, Any]:
    places = {"wall_seconds": 3, "device_hours": 6}
    return {key: round(value, places[key]) if key in places else value for key, value in part.items()}
