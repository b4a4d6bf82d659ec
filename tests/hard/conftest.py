"""What was tried, how often, and what was lost by it: a table in docs/robustness.md, written by `make hard`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

TABLE = os.environ.get("PEML_HARD_TABLE")
BEGIN, END = "<!-- written by make hard -->\n", "<!-- end -->\n"
ROWS: dict[str, tuple[int, str]] = {}

Tried = Callable[..., None]


@pytest.fixture
def tried() -> Tried:
    """Note a thing that was tried, when nothing was found against it."""

    def note(what: str, times: int = 1, outcome: str = "nothing") -> None:
        before, _ = ROWS.get(what, (0, ""))
        ROWS[what] = (before + times, outcome)

    return note


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if TABLE is None or exitstatus:
        return
    page = Path(TABLE)
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    table, _, rest = rest.partition(END)
    # What was not tried this time keeps the row of the last time.
    kept = {row.split(" | ")[0].removeprefix("| "): row for row in table.splitlines() if row.startswith("| ")}
    kept.pop("what was tried", None)
    now = {what: f"| {what} | {times:,} | {outcome} |" for what, (times, outcome) in ROWS.items()}
    lines = ["| what was tried | how often | what was lost |", "|---|---|---|"]
    lines += [row for _, row in sorted((kept | now).items())]
    page.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest, encoding="utf-8")
