"""A report as one HTML file: no script, nothing that is fetched, light and dark, as narrow as a phone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from peml.compare.words import seconds_words
from peml.picture.svg import STYLE
from peml.report.charts import Dot, curves, dots, ends_of, gain_dot, scatter, shares
from peml.report.reproduce import command, failures, recipe_text, summary, versions
from peml.report.tables import Cell, Table, losses_first, measured, tables_of

_PAGE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 16px 64px;max-width:1160px;background:var(--paper);color:var(--ink);
font:15px/1.5 Inter,"Helvetica Neue",Helvetica,Arial,sans-serif}
h1,h2,p,li{overflow-wrap:anywhere}
h1{font-size:24px;margin:0 0 8px}h2{font-size:17px;margin:40px 0 8px}p{max-width:75ch;margin:8px 0}
.note{color:var(--quiet);font-size:13px}
.wide{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:600;border-bottom-color:var(--quiet)}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
td:first-child{max-width:44vw;overflow:hidden;text-overflow:ellipsis}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:20px 28px;margin:12px 0}
.panels svg{width:100%;max-width:440px;height:auto;display:block}
.pictures img{width:100%;max-width:760px;height:auto;border:1px solid var(--line)}
.pictures figure{margin:12px 0}figcaption{font-size:13px;color:var(--quiet)}
pre{background:var(--faint);padding:12px;overflow-x:auto;font-size:12px;line-height:1.45}
details{margin:8px 0}summary{cursor:pointer}
.bar{stroke:var(--main);stroke-width:2;fill:none}.thin{stroke:var(--soft);stroke-width:1.5;fill:none}
.seed{stroke:var(--quiet);stroke-width:1;fill:none;opacity:.7}.axis{stroke:var(--quiet);fill:none}
.dot{fill:var(--main);stroke:var(--paper);stroke-width:1}.ring{fill:var(--paper);stroke:var(--main);stroke-width:1.5}
.own{stroke:var(--main);stroke-width:1.8;fill:none;stroke-linejoin:round}.other{stroke:var(--line);stroke-width:1;fill:none}
.part0{fill:var(--main)}.part1{fill:var(--mark)}.part2{fill:var(--soft)}.part3{fill:var(--quiet)}.part4{fill:var(--line)}
@media print{details{display:block}.panels svg{break-inside:avoid}}
"""


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the browser may fetch: nothing, whatever a name in the tables looks like."""


def page(contents: Mapping[str, Any]) -> str:
    """The whole report.

    Args:
        contents: as `contents_of` has it.
    """
    body = [f"<h1>Comparison</h1><p>{escape(summary(contents))}</p>"]
    if failed := failures(contents):
        body.append("<h2>Failed</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in failed) + "</ul>")
    tables = {table.title: _table(table) for table in tables_of(contents)}
    order = list(tables)
    body.append(tables.pop(order[0]))
    if rows := measured(contents):
        body += [_gains(contents, rows), _tasks(contents, rows), tables.pop(order[1]), _costs(rows)]
        body += [tables.pop("What training costs"), tables.pop("What running costs", ""), _losses(contents)]
    body += [*tables.values(), _pictures(contents), _again(contents)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{STYLE}{_PAGE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f'<tbody>{rows}</tbody></table></div><p class="note">{escape(table.note)}</p>'
    )


def _cell(cell: Cell) -> str:
    words = escape(cell.words)
    return f"<td>{f'<strong>{words}</strong>' if cell.strong else words}</td>"


def _panels(title: str, note: str, panels: Sequence[str]) -> str:
    if not panels:
        return ""
    return f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p><div class="panels">{"".join(panels)}</div>'


def _gains(contents: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    lines: dict[str, list[Dot]] = {}
    for row in rows:
        if row["versus"]:
            tests = row["versus"]["tasks"]
            lines[row["name"]] = [gain_dot("average", row["versus"]["average"])]
            lines[row["name"]] += [gain_dot(task, tests[task]) for task in losses_first(row)]
    # One axis for all methods, so that a glance compares them.
    reach = [end for own in lines.values() for end in ends_of(own)]
    panels = [dots(name, own, zero=True, reach=reach) for name, own in lines.items()]
    note = (
        f"Score less that of {contents['baseline']}, with its {contents['level']:.0%} interval over rows and seeds; "
        "ticks are seeds. What a method loses comes first. Filled: the difference stands after its test."
    )
    return _panels(f"Gain over {contents['baseline']} by task", note, panels)


def _tasks(contents: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    frozen = contents["frozen"] or {"average": None, "tasks": {}}
    panels = [_scores("average over tasks", [(row["name"], row["average"]) for row in rows], frozen["average"])]
    for task in contents["tasks"]:
        name = task["name"]
        own = [(row["name"], row["tasks"][name]) for row in rows if name in row["tasks"]]
        if own:
            panels.append(_scores(f"{name} ({', '.join(task['score'])})", own, frozen["tasks"].get(name)))
    dashed = " The dashed line is the frozen model." if contents["frozen"] else ""
    return _panels("Scores", f"Mean over seeds, the interval over rows and seeds; ticks are seeds.{dashed}", panels)


def _scores(title: str, own: Sequence[tuple[str, Mapping[str, Any]]], frozen: float | None) -> str:
    lines = [Dot(name, s["mean"], s["interval"], s["values"], True, f"{s['mean']:.3f}") for name, s in own]
    return dots(title, lines, line=frozen)


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    def points(cost: Any) -> list[tuple[str, float, float, Sequence[float] | None]]:
        return [(row["name"], cost(row), row["average"]["mean"], row["average"]["interval"]) for row in rows]

    def whole(row: Mapping[str, Any]) -> float:
        return float(sum(row["cost"]["seconds"].values()))

    names = {"stages": "earlier stages", "discretisation": "measured at its end"}
    order = ("tuning", "search", "discretisation", "stages", "training")
    bars = [(r["name"], [(names.get(p, p), r["cost"]["seconds"][p]) for p in order]) for r in rows]
    panels = [
        scatter("Average against what is trained", points(lambda r: r["parameters"]["trained"]), "trained numbers"),
        scatter("Average against what is deployed", points(lambda r: r["cost"]["deployed"]), "deployed numbers"),
        scatter("Average against time", points(whole), "time of a run, with search and tuning", seconds_words),
        shares(bars, [seconds_words(whole(row)) for row in rows]),
    ]
    return _panels("What it costs", "Axes of costs go by factors; means over seeds.", panels)


def _losses(contents: Mapping[str, Any]) -> str:
    found: Mapping[str, Any] = contents["curves"]
    panels = [curves(name, own, [c for other, c in found.items() if other != name]) for name, own in found.items()]
    note = "Mean training loss over seeds; the other methods are quiet. Penalties of a search are in it."
    return _panels("Training", note, panels)


def _pictures(contents: Mapping[str, Any]) -> str:
    figures = []
    for name, svg in contents["pictures"].items():
        data = base64.b64encode(svg.encode()).decode()
        caption = f"{escape(name)}, first seed"
        alt = escape(f"Architecture found by {name}", quote=True)
        figures.append(
            f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _again(contents: Mapping[str, Any]) -> str:
    return (
        f"<h2>To make it again</h2><pre>{escape(command(contents))}</pre>"
        f"<details><summary>recipe.yaml</summary><pre>{escape(recipe_text(contents))}</pre></details>"
        f'<p class="note">{escape(versions(contents))}</p>'
    )
