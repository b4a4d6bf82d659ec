"""The records in `benchmarks/results`, and what they are called on other pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

TITLES = {
    "search-toy": "Eight toy tasks",
    "search-encoder": "Six GLUE tasks, encoder",
    "encoder": "Eight GLUE tasks, encoder",
    "sharing-toy": "Contrary toy tasks",
    "sharing-encoder": "Eight GLUE tasks, shared or not",
    "transfer-toy": "Halves of the toy tasks",
    "mpt-toy": "Toy tasks, few rows",
    "mpt-real": "Small Llama, few rows",
}


def read(name: str) -> dict[str, Any]:
    """A record; empty: there is none."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def title_of(record: str) -> str:
    """What a record is about: as named here, or as its own heading says."""
    path = RESULTS / f"{record}.md"
    if record in TITLES or not path.exists():
        return TITLES.get(record, record)
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
