"""A report as Markdown: the tables, and how to make them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peml.compare.words import gain_words, p_words
from peml.report.reproduce import command, failures, recipe_text, summary, versions
from peml.report.tables import Cell, Table, losses_first, measured, tables_of


def markdown(contents: Mapping[str, Any]) -> str:
    """The whole report.

    Args:
        contents: as `contents_of` has it.
    """
    parts = ["# Comparison", _plain(summary(contents))]
    for table in tables_of(contents):
        parts += [f"## {table.title}", _table(table), _plain(table.note)]
    gains = [_gains(contents, row) for row in measured(contents) if row["versus"]]
    if gains:
        parts += [f"## Gain over {_plain(contents['baseline'])} by task", "What a method loses comes first.", *gains]
    if failed := failures(contents):
        parts += ["## Failed", "\n".join(f"- {_plain(line)}" for line in failed)]
    parts += ["## To make it again", f"```\n{command(contents)}\n```", f"```yaml\n{recipe_text(contents)}```"]
    return "\n\n".join([*parts, versions(contents)]) + "\n"


def _gains(contents: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    tests = row["versus"]["tasks"]
    rows = [
        [Cell(task), Cell(gain_words(tests[task]), tests[task]["stands"]), Cell(p_words(tests[task]))]
        for task in losses_first(row)
    ]
    return _table(Table("", "", (row["name"], f"gain, {contents['level']:.0%}", "p"), rows))


def _table(table: Table) -> str:
    lines = [_line(table.header), "|---|" + "---:|" * (len(table.header) - 1)]
    lines += [
        _line([f"**{cell.words}**" if cell.strong and cell.words else cell.words for cell in row]) for row in table.rows
    ]
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(words: object) -> str:
    """On one line, and no markup: Markdown takes HTML as it comes."""
    return " ".join(str(words).split()).replace("&", "&amp;").replace("<", "&lt;")
