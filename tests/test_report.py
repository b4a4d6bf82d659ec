"""A report: what it says, that it fetches nothing, and how it looks in a browser."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peml.compare import CompareFolder
from peml.compare.folder import COMPARED
from peml.compare.words import (
    average_words,
    bytes_words,
    count_words,
    gain_words,
    p_words,
    rounded,
    seconds_words,
    signed,
)
from peml.errors import PemlError
from peml.picture import draw
from peml.prompts import Architecture
from peml.report import report
from peml.report.charts import Dot, dots, fitted, marks_between, scatter, shares
from peml.report.contents import contents_of, loss_curve
from peml.report.markdown import markdown
from peml.report.page import page
from peml.report.tables import losses_first, tables_of

NAMES = ("lora", "lora+prefix", "peml", "<b>&", "mtl-lora", "moe-lora", "poly", "mhr", "c-poly", "hydra-lora", "prefix", "single-task")  # fmt: skip


def summary(values: list[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {"values": values, "mean": mean, "sd": 0.01, "interval": [mean - 0.03, mean + 0.03]}


def contents(methods: int = 3, seeds: int = 3, tasks: int = 2) -> dict[str, Any]:
    """A comparison that nobody ran."""
    rng = random.Random(0)
    names = [f"task{i}" for i in range(tasks)]
    rows, curves = [], {}
    for place, name in enumerate(NAMES[:methods]):
        scores = {task: [0.5 + 0.03 * place + 0.1 * rng.random() for _ in range(seeds)] for task in names}
        average = [sum(own[s] for own in scores.values()) / tasks for s in range(seeds)]
        test = {
            "values": [0.01, 0.02, 0.03][:seeds],
            "gain": 0.02,
            "interval": [0.01, 0.03],
            "p": 0.001,
            "adjusted": 0.002,
        }
        lost = test | {"gain": -0.04, "interval": [-0.06, 0.01], "adjusted": 0.4, "stands": False}
        versus = {"seeds": list(range(seeds)), "average": test | {"stands": True}}
        versus["tasks"] = {task: lost if i else test | {"stands": True} for i, task in enumerate(names)}
        seconds = {
            "search": 10.0 * (name == "peml"),
            "discretisation": 0.0,
            "training": 60.0,
            "tuning": 0.0,
            "stages": 0.0,
        }
        rows.append(
            {
                "name": name, "folder": name, "method": "lora", "set": {}, "sized": {"adapter.r": 7, "adapter.lora_alpha": 14.0},
                "seeds": list(range(seeds)), "parameters": {"trained": 6000 + 10 * place, "deviation": 0.001 * place},
                "average": summary(average), "tasks": {task: summary(own) for task, own in scores.items()},
                "versus": versus if place else None, "rank": 1.0 + place, "other_rows": False,
                "run": {},
                "cost": {
                    "parts": {}, "deployed": 5000, "adapter_bytes": 24000, "peak_memory_bytes": 5e8, "seconds": seconds,
                    "seconds_per_step": 0.05, "device_hours": 0.02, "devices": {"kind": "cpu threads", "count": 1},
                    "inference": None,
                },
            }
        )  # fmt: skip
        curves[name] = [(step, 3.0 / (1 + step / 100) + 0.01 * place) for step in range(0, 600, 10)]
    return {
        "format": "peml-compare", "recipe": {"model": "toy", "train": {"max_steps": 600}, "note": "<script>"},
        "baseline": "lora", "budget": 6000, "seeds": list(range(seeds)), "level": 0.95, "resamples": 1000,
        "tasks": [{"name": task, "metrics": ["accuracy"], "score": ["accuracy"], "n": 200} for task in names],
        "frozen": {"average": 0.4, "tasks": dict.fromkeys(names, 0.4)}, "methods": rows,
        "jobs": [{"name": f"{n}, seed {s}", "kind": "train", "method": n, "seed": s, "state": "done", "error": None} for n in NAMES[:methods] for s in range(seeds)],
        "environment": {"python": "3", "torch": "2"}, "curves": curves, "pictures": {}, "architectures": {},
    }  # fmt: skip


def searched(given: dict[str, Any]) -> dict[str, Any]:
    """With architectures, as a search leaves them."""
    from test_picture import found

    architecture: Architecture = found()
    several = [architecture.to_dict() | {"lost": None if seed else -0.5} for seed in given["seeds"]]
    return given | {"pictures": {"peml": draw(architecture)}, "architectures": {"peml": several}}


def test_tables_say_what_was_found_and_stress_what_stands() -> None:
    given = contents()
    quality, tasks, training, *rest = tables_of(given)
    assert rest == [] and [row[0].words for row in quality.rows] == ["lora", "lora+prefix", "peml"]
    lora, _, peml = quality.rows
    assert peml[1].words == average_words(given["methods"][2]["average"]) and peml[1].strong and peml[3].strong
    assert lora[3].words == "baseline" and not any(cell.strong for cell in lora)
    assert peml[4].words == "0.002" and peml[6].words == "6,020" and peml[7].words == "+0.2%" and peml[8].words == "r 7"
    assert tasks.rows[0][2].strong and not tasks.rows[1][2].strong, "the second task's difference does not stand"
    assert training.rows[2][6].words == "10 s" and training.rows[0][9].words == "0.02"
    assert losses_first(given["methods"][2]) == ["task1", "task0"]
    given["methods"][0]["cost"]["inference"] = {
        "rows": 8, "length": 64, "tokens": 16, "rounds": 15, "memory": {"one task": 1.1, "mixed batch": 1.1, "bytes": 5},
        "prefill": {"base again": 1.01, "one task": 1.2, "mixed batch": 1.3, "seconds": 0.1},
    }  # fmt: skip
    running = tables_of(given)[3]
    assert [cell.words for cell in running.rows[0]] == ["lora", "1.200", "1.300", "", "", "1.100", "1.100", "1.010"]
    parts = {
        "prompt": [
            {"average": 0.1, "tasks": {"task0": 0.3, "task1": -0.1}},
            {"average": 0.0, "tasks": {"task0": 0.1, "task1": -0.1}},
        ]
    }
    ablations = tables_of(given | {"ablations": {"peml": parts}})[-1]
    assert [cell.words for cell in ablations.rows[0]] == ["peml", "prompt", "+0.050", "+0.200", "-0.100", "2"]
    search = tables_of(searched(given))[-1]
    assert len(search.rows) == 3 and [row[5].words for row in search.rows] == ["-0.50", "-", "-"]


def test_markdown_has_every_table_and_what_failed() -> None:
    given = contents()
    given["jobs"][0] |= {"state": "failed", "error": "out of | memory"}
    text = markdown(given)
    for table in tables_of(given):
        assert f"## {table.title}" in text
        for row in table.rows:
            assert all((f"**{cell.words}**" if cell.strong else cell.words) in text for cell in row if cell.words)
    assert "- lora, seed 0: out of | memory" in text and "```\npeml compare recipe.yaml\n```" in text
    assert text.index("| task1 | -0.040") < text.index("| task0 | **+0.020")


def test_losses_that_stand_are_said_at_once() -> None:
    given = contents()
    assert "Above lora on average: lora+prefix, peml." in markdown(given) and "on single tasks" not in markdown(given)
    given["methods"][2]["versus"]["tasks"]["task1"]["stands"] = True
    given["methods"][1]["versus"]["average"] |= {"gain": -0.1}
    text = markdown(given)
    assert (
        "Above lora on average: peml. Below lora on average: lora+prefix. Below lora on single tasks: peml (task1)."
        in text
    )


def test_a_comparison_may_be_counted_in_epochs() -> None:
    given = contents()
    assert "3 seeds, 600 steps on toy." in markdown(given)
    assert "3 seeds, 2.5 epochs on toy." in markdown(
        given | {"recipe": {"model": "toy", "train": {"num_train_epochs": 2.5}}}
    )


def test_charts_of_gains_have_one_axis() -> None:
    given = contents()
    given["methods"][1]["versus"]["average"] |= {"gain": 0.2, "interval": [0.1, 0.3]}
    gains = page(given).split("Gain over lora by task")[1].split("<h2>")[0]
    zeros = re.findall(r'd="M([\d.]+) [\d.]+L[\d.]+ [\d.]+" class="axis"', gains)
    assert len(zeros) == 2 and len(set(zeros)) == 1


def test_one_seed_claims_nothing() -> None:
    given = contents(seeds=1)
    for row in given["methods"]:
        row["average"]["sd"] = None
        if row["versus"]:
            row["versus"]["average"] |= {"p": None, "adjusted": None, "stands": False}
    assert "One seed tests nothing" in markdown(given) and " ± " not in tables_of(given)[0].rows[0][1].words
    assert tables_of(given)[0].rows[1][4].words == "-"


def test_nothing_that_was_measured_is_no_report_that_breaks() -> None:
    given = contents()
    for row in given["methods"]:
        row |= {"average": None, "versus": None, "cost": None, "tasks": {}}
    given |= {"curves": {}, "frozen": None}
    assert "<svg" not in page(given) and "Score on held-out rows" in markdown(given)


def test_the_page_is_whole_and_fetches_nothing() -> None:
    html = page(searched(contents(4)))
    for row in contents(4)["methods"]:
        assert escape(row["name"]) in html
    # What a name or a recipe says is text, never markup.
    assert "<script" not in html and "<b>" not in html
    assert not re.findall(r"https?://", html) and "url(" not in html and "@import" not in html
    assert set(re.findall(r'(?:src|href)="([^"]{0,20})', html)) == {"data:image/svg+xml;b"}
    assert "prefers-color-scheme:dark" in html and 'name="viewport"' in html
    # Two charts of gains have a line at zero each, and what does not stand is a ring.
    assert html.count('class="axis"') == 3 and html.count('class="ring"') == 3


def test_twelve_methods_five_seeds_eight_tasks_are_small() -> None:
    html = page(searched(contents(12, 5, 8)))
    assert 20_000 < len(html.encode()) < 3_000_000


def test_a_dot_is_where_its_value_is() -> None:
    svg = dots("x", [Dot("a", 0.5, (0.4, 0.6)), Dot("b", 0.75, (0.7, 0.8), (0.7, 0.8))], line=0.4)
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    ends = [float(x) for x in re.findall(r'd="M([\d.]+) [\d.]+L([\d.]+) [\d.]+" class="bar"', svg)[0]]
    assert places[0] == pytest.approx(sum(ends) / 2, abs=0.02)
    scale = (ends[1] - ends[0]) / 0.2
    assert places[1] - places[0] == pytest.approx(0.25 * scale, abs=0.02)
    assert svg.count('class="seed"') == 2 and svg.count('class="limit"') == 1
    # One value alone has an axis too.
    assert "nan" not in dots("x", [Dot("a", 1.0)]) and "nan" not in scatter("x", [("a", 5.0, 1.0, None)], "y")


def test_labels_of_a_scatter_do_not_cover_each_other() -> None:
    svg = scatter("x", [(f"method {i}", 1000.0, 0.5, (0.4, 0.6)) for i in range(6)], "numbers")
    lines = [float(y) for y in re.findall(r'y="([\d.]+)" class="small over"', svg)]
    assert len(lines) == 6 and all(b - a >= 10 for a, b in pairwise(lines))


def test_marks_are_round_and_within() -> None:
    assert marks_between(0.42, 0.71, 3) == [0.5, 0.6, 0.7] and marks_between(-0.031, 0.02, 3) == [-0.02, 0.0, 0.02]
    assert marks_between(0.5, 0.5, 3) == [0.5] and marks_between(0, 100, 4) == [0, 50, 100]
    assert fitted("a", 100) == "a" and fitted("a" * 50, 60).endswith("…")


def test_ticks_of_times_that_are_close_are_told_apart() -> None:
    svg = scatter("x", [("a", 0.7, 0.5, None), ("b", 1.7, 0.6, None)], "time", seconds_words)
    ticks = re.findall(r'class="small quiet"[^>]*>([^<]* s)<', svg)
    assert ticks == ["1 s", "1.5 s"]


def test_without_runs_of_the_baseline_nothing_is_called_so() -> None:
    given = contents()
    given["methods"][0] |= {"average": None, "versus": None, "cost": None, "tasks": {}}
    for row in given["methods"][1:]:
        row["versus"] = None
    assert [row[3].words for row in tables_of(given)[0].rows] == ["-", "-"]
    text = markdown(given)
    assert "no run shares a seed with another method: nothing is tested" in text and "told apart" not in text
    assert "<svg" in page(given)


def test_names_are_no_markup_in_markdown_either() -> None:
    given = contents(4)
    given["jobs"][0] |= {"state": "failed", "error": "<img src=x>"}
    text = markdown(given)
    assert "| &lt;b>&amp; |" in text and "<b>" not in text and "<img" not in text


def test_five_kinds_of_time_have_five_colours() -> None:
    parts = [(name, 1.0) for name in ("tuning", "search", "discretisation", "stages", "training")]
    drawn = re.findall(r'class="(part\d)"', shares([("a", parts)], ["5 s"]))
    assert len(drawn) == 10 and len(set(drawn)) == 5 and all(f".{name}{{" in page(contents()) for name in drawn)


def test_words() -> None:
    assert count_words(999_900) == "1 M" and count_words(999_400) == "999 k" and count_words(1.24e9) == "1.24 G"
    assert bytes_words(2e13) == "20,000 GB" and seconds_words(4e7) == "11,111 h" and rounded(0.0123) == "0.0123"
    assert count_words(1234567) == "1.23 M" and count_words(12) == "12" and bytes_words(2.5e6) == "2.5 MB"
    assert seconds_words(0.0123) == "12.3 ms" and seconds_words(7200) == "2 h" and seconds_words(120) == "2 min"
    assert signed(-0.0001) == "0.000" and signed(0.02) == "+0.020"
    assert gain_words({"gain": 0.1, "interval": None}) == "+0.100" and gain_words(None) == ""
    assert p_words({"adjusted": 0.0001}) == "<0.001" and p_words({"adjusted": None}) == "-"


def test_losses_are_means_over_seeds_thinned_out(tmp_path: Path) -> None:
    for seed in (0, 1):
        lines = [json.dumps({"step": step, "loss": step + seed}) for step in range(1, 200)]
        extra = [
            json.dumps({"step": 0.5, "loss": 9}),
            "{",
            json.dumps({"step": 3, "eval": 1}),
            json.dumps({"step": 400, "loss": float("nan")}),
        ]
        (tmp_path / f"{seed}.jsonl").write_text("\n".join(lines + extra[seed:]) + "\n")
    curve = loss_curve([tmp_path / "0.jsonl", tmp_path / "1.jsonl", tmp_path / "none.jsonl"])
    assert len(curve) == 50 and curve[-1] == (199.0, 199.5) and all(loss == step + 0.5 for step, loss in curve)
    assert loss_curve([]) == []


def test_a_report_is_written_beside_its_comparison(tmp_path: Path) -> None:
    with pytest.raises(PemlError, match="holds no comparison"):
        report(tmp_path)
    (tmp_path / "recipe.yaml").write_text(COMPARED)
    with pytest.raises(PemlError, match="was stopped: call `peml compare` again, it goes on"):
        report(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(contents()))
    html, text, data = report(tmp_path)
    assert (html.name, text.name, data.name) == ("report.html", "report.md", "report.json")
    assert json.loads(data.read_text())["budget"] == 6000 and html.read_text().startswith("<!doctype html>")
    assert report(tmp_path, tmp_path / "new" / "x.html")[1] == tmp_path / "new" / "x.md"
    with pytest.raises(PemlError, match=r"ends in \.html, not"):
        report(tmp_path, tmp_path / "x.pdf")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(PemlError, match="results.json is damaged"):
        report(tmp_path)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """<!doctype html><body><iframe style="width:360px;height:800px;border:0"></iframe><pre id="out"></pre><script>
const frame = document.querySelector("iframe")
frame.onload = () => {
  const page = frame.contentDocument, inner = frame.contentWindow
  const clipped = [...page.querySelectorAll("svg text")].filter(text => {
    const box = text.getBBox(), whole = text.ownerSVGElement.viewBox.baseVal
    return box.x < -1 || box.x + box.width > whole.width + 1 || box.y + box.height > whole.height + 1
  }).map(text => text.textContent)
  document.getElementById("out").textContent = JSON.stringify({
    wide: page.documentElement.scrollWidth, svgs: page.querySelectorAll("svg").length, clipped,
    fetched: inner.performance.getEntriesByType("resource").filter(own => !own.name.startsWith("data:")).length,
    images: [...page.images].map(image => image.naturalWidth), size: inner.getComputedStyle(page.body).fontSize,
  })
}
frame.srcdoc = REPORT
</script>"""


def shown(html: str, tmp_path: Path) -> dict[str, Any]:
    """What a browser as wide as a phone makes of a page."""
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("REPORT", json.dumps(html).replace("</", "<\\/")), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    seen = re.search(r'<pre id="out">(.+?)</pre>', done.stdout)
    assert seen is not None, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(seen[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is absent")
def test_a_browser_shows_it_on_a_phone(tmp_path: Path) -> None:
    """No sideways scrolling of the page, no text beyond its chart, every picture there, nothing fetched."""
    found = shown(page(searched(contents(12, 5, 8))), tmp_path)
    assert found["wide"] <= 360 and found["fetched"] == 0 and found["svgs"] == 11 + 9 + 4 + 12
    assert found["images"] and all(found["images"]) and found["clipped"] == [] and found["size"] == "15px"


def test_runs_of_a_search_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "peml" / "0"
    folder.mkdir(parents=True)
    gap = {"lost": {"average": 1.5}}
    own = {"architecture": {"operations": ["a"], "tokens": [[0]]}, "search": {"gap": gap}}
    (folder / "metrics.json").write_text(json.dumps(own))
    (folder / "architecture.svg").write_text("<svg/>")
    (folder / "evaluation.json").write_text(json.dumps({"contributions": {"prompt": {"average": 1, "tasks": {}}}}))
    rows = [{"name": "peml", "folder": "peml", "seeds": [0]}, {"name": "lora", "folder": "lora", "seeds": []}]
    (tmp_path / "results.json").write_text(json.dumps({"format": "peml-compare", "methods": rows}))
    found = contents_of(CompareFolder(tmp_path))
    assert found["architectures"] == {"peml": [{"operations": ["a"], "tokens": [[0]], "lost": 1.5}]}
    assert found["pictures"] == {"peml": "<svg/>"} and found["curves"] == {}
    assert found["ablations"] == {"peml": {"prompt": [{"average": 1, "tasks": {}}]}}
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(PemlError, match=r"evaluation.json is damaged .*: evaluate the run again"):
        contents_of(CompareFolder(tmp_path))


LONG = (
    "lora",
    "a very long name of a method that someone has given to it, with commas",
    "并行适配器方法与前缀搜索的组合",
    "a-name-in-one-piece-" * 3,
)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is absent")
def test_long_names_and_wide_letters_stay_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_report.NAMES", LONG)
    given = contents(4)
    new = {"task0": "a task whose name is much too long for any panel of a phone", "task1": "任务" * 15}
    for task in given["tasks"]:
        task |= {"name": new[task["name"]], "score": ["squad_exact_match", "squad_f1"]}
    for row in given["methods"]:
        for own in (row, row["versus"] or row):
            own["tasks"] = {new.get(name, name): value for name, value in own["tasks"].items()}
    found = shown(page(given), tmp_path)
    assert found["wide"] <= 360, found
    assert found["clipped"] == []
