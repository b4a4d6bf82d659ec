"""Pages of methods: one for each, every class in one place, and their numbers are those of the code and of the records."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
import yaml

import peml
from peml.methods import METHODS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # what makes the site is not installed with the package

import filling  # noqa: E402
import method_costs  # noqa: E402
import method_facts  # noqa: E402
import method_numbers  # noqa: E402
import records  # noqa: E402

PAGES = ROOT / "docs" / "methods"
HEADINGS = ["When to use it", "A recipe", "What it costs", "Our numbers"]
DIAGRAMS = ("axes", "routing", "prefix")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_in_the_same_order(name: str) -> None:
    text = (PAGES / f"{method_facts.page_of(name)}.md").read_text(encoding="utf-8")
    for kind in ("facts", "numbers"):
        (marker,) = re.findall(rf"<!-- {kind}: (.*?) -->", text)
        assert name in marker.split() and set(marker.split()) <= set(METHODS)
    headings = re.findall(r"^## (.*)$", text, flags=re.M)
    assert headings[:4] == HEADINGS and headings[-1] == "What is our choice" and len(headings) == 6
    assert re.search(r"^(The paper's n|The papers' n|N)umbers", headings[4])
    assert text.index("```text") < text.index("## When") and "```yaml" in text


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"methods/{page.name}\n" in text for page in PAGES.glob("*.md"))


def test_every_class_is_described_once() -> None:
    found = [name for page in PAGES.glob("*.md") for name in re.findall(r"^::: peml\.(\w+)$", page.read_text(), re.M)]
    parts = [part for row in METHODS.values() for part in (row.adapter, row.prompt) if part is not None]
    assert sorted(found) == sorted({type(part).__name__ for part in parts})
    for part in parts:
        page = (PAGES / f"{method_facts.home_of(part)}.md").read_text(encoding="utf-8")
        assert f"::: peml.{type(part).__name__}\n" in page


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.adapter and row.regime == "joint"])
def test_sizes_are_those_of_the_module(name: str) -> None:
    adapter = METHODS[name].adapter
    with torch.device("meta"):
        built = [adapter.build(4096, 4096, tasks) for tasks in (8, 9)]
    one, more = (sum(p.numel() for p in module.parameters()) for module in built)
    text = method_facts.facts([name])
    assert f"| trained on one linear | {one:,}: " in text and f"| trained in the model | {one * 128:,} |" in text
    assert (f"| one task more | {more - one:,} on one linear" in text) == (more > one)


def test_sizes_of_groups() -> None:
    # 11 layers in the lowest third, 10 in the middle, 11 at the top; 4 linears, 4 clusters, 8 tasks.
    assert f"{4 * 8 * 8192 * (11 + 10 * 4 + 11 * 8):,}, with 4 clusters of 2 tasks" in method_facts.facts(
        ["progressive"]
    )
    own = peml.CGCLoRA().num_parameters(4096, 4096, 2)
    assert f"{4 * own * 128:,}, with 4 clusters of 2 tasks" in method_facts.facts(["one-plus-n"])


def test_sizes_of_prompts() -> None:
    assert "| trained in the prompt | 5,242,880: " in method_facts.facts(["prefix"])  # 20 tokens, 2 x 4096, 32 layers
    mpt = method_facts.facts(["mpt"])
    assert f"{100 * 4096 + 8 * (100 + 4096):,}: " in mpt and "| one task more | 4,196 in the prompt |" in mpt
    searched = method_facts.facts(["peml"])
    assert "keys and values of 16 tokens in every layer, 4,194,304 numbers, 8.4 MB in bf16" in searched
    assert "rank 8 for all tasks" in searched and "rank 8 for each task" in method_facts.facts(["peml+mtl"])
    assert "every text makes its own" in method_facts.facts(["attempt"])


def test_defaults_are_those_of_the_row() -> None:
    assert "`lora_alpha` 32" in method_facts.facts(["align-lora"]) and "`lora_alpha` 16" in method_facts.facts(["lora"])
    both = method_facts.facts(["poly", "mhr"])
    assert "`n_splits` 1" in both and "`n_splits` 4" in both and "| `method: mhr` | |" in both


def test_every_row_of_the_committed_records_belongs_to_a_method() -> None:
    found = list(method_numbers.scores())
    assert {score.method for score in found} <= set(METHODS) and len(found) > 20
    assert set(method_costs.PARTS.values()) <= set(METHODS)
    for name in METHODS:  # and none of the records of cost has a variant that is nobody's
        assert method_numbers.numbers([name])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of records, with none in it."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path


def write(folder: Path, name: str, record: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / f"{name}.md").write_text(f"# Heading of {name}\n", encoding="utf-8")


def test_without_records_it_says_so(folder: Path) -> None:
    assert method_numbers.numbers(["attempt"]) == "Its scores were not measured yet.\n"
    text = method_numbers.numbers(["mtl-lora"])
    assert "Not run yet" in text and "`python -m benchmarks.quality toy`" in text and "|" not in text


def test_scores_of_a_search(folder: Path) -> None:
    rows = [
        {"way": "LoRA, rank-matched", "average": [50.0, 60.0], "tasks": {"a": [40.0, 60.0], "b": [60.0, 60.0]}},
        {"way": "MTL-LoRA", "average": [53.0, 61.0], "tasks": {"a": [50.0, 64.0], "b": [56.0, 58.0]}},
    ]
    write(folder, "search-toy", {"rows": [row | {"trained": 1234} for row in rows]})
    line = "| [Eight toy tasks](../results/search-toy.md), 2 | MTL-LoRA | 57.0 ± 5.7 | +2.0 ± 1.4 | a +7.0 | b -3.0 | 1,234 |"
    assert line in method_numbers.numbers(["mtl-lora"])
    assert "| LoRA, rank-matched | 55.0 ± 7.1 |  |  |  | 1,234 |" in method_numbers.numbers(["lora"])


def test_a_row_of_no_method_is_refused(folder: Path) -> None:
    write(folder, "search-toy", {"rows": [{"way": "a new one", "average": [1.0], "tasks": {"a": [1.0]}, "trained": 1}]})
    with pytest.raises(KeyError, match="a new one"):
        method_numbers.numbers(["lora"])


def test_scores_of_our_own_comparisons(folder: Path) -> None:
    def row(name: str, method: str, values: list[float], **changes: object) -> dict:
        own = {"name": name, "method": method, "average": {"values": values}, "versus": None, "other_rows": False}
        return own | {"parameters": {"trained": 5000}} | changes

    versus = {"average": {"values": [0.02], "stands": True}, "tasks": {"a": {"gain": 0.05}, "b": {"gain": -0.01}}}
    rows = [
        row("lora", "lora", [0.5, 0.6]),
        row("random architecture", "peml", [0.52], versus=versus),
        row("peml", "peml", []) | {"average": None},
    ]
    write(folder, "quality-toy", {"methods": rows})
    text = method_numbers.numbers(["peml"])
    line = "| [Heading of quality-toy](../results/quality-toy.md), 1 | random architecture | 52.0 | **+2.0** | a +5.0 | b -1.0 | 5,000 |"
    assert line in text and text.count("quality-toy.md") == 1
    assert "benchmarks.quality toy`" not in text and "benchmarks.quality text`" in text


def test_costs(folder: Path) -> None:
    def case(title: str, median: float, **changes: object) -> dict:
        row = {"ratio": {"median": median}, "within_aa": False, "against": None, "versus": None}
        floor = row | {"name": "floor", "kind": "floor", "peak_bytes": 100}
        own = row | {"name": "peml MTL-LoRA", "kind": "peml", "peak_bytes": 125} | changes
        return {"title": title, "train": True, "settings": {}, "rows": [floor, own]}

    beside = {"against": "as published", "versus": {"median": 0.9}}
    write(folder, "layers", {"cases": [case("Linear, MTL-LoRA", 1.1, **beside)]})
    write(folder, "layers-fp32", {"cases": [case("Linear, MTL-LoRA", 1.2, peak_bytes=150, **beside)]})
    line = "| [One linear, forward and backward](../results/layers.md) | MTL-LoRA | 1.10 to 1.20 | 1.25 to 1.50 | 0.90 of as published |"
    assert line in method_numbers.numbers(["mtl-lora"])
    assert "layers" not in method_numbers.numbers(["lora"])


def test_pages_are_filled() -> None:
    text = filling.filled("before\n\n<!-- facts: poly mhr -->\n\n<!-- numbers: hydra-lora -->\n\nafter")
    assert text.startswith("before\n\n| `method: poly` | |") and text.endswith("after") and "<!--" not in text


@pytest.mark.parametrize("name", DIAGRAMS)
def test_diagrams_are_inlined_in_the_colour_of_the_text(name: str) -> None:
    text = filling.drawn(f"before\n\n![What it shows](images/{name}.svg)\n\nafter")
    assert "<style>" not in text and 'fill="currentColor"' in text and text.count("\n\n") == 2
    image = ElementTree.fromstring(re.search(r"<svg.*</svg>", text, flags=re.S)[0])
    label = image.get("aria-labelledby").split()
    parts = [image.find(f"{{http://www.w3.org/2000/svg}}{tag}") for tag in ("title", "desc")]
    assert [part.get("id") for part in parts] == label and all(part.text for part in parts)


def test_other_pictures_stay_as_they_are() -> None:
    text = "![Found](images/architecture.svg)"
    assert filling.drawn(text) == text


def test_recipes_name_the_page_s_method() -> None:
    for name in METHODS:
        text = (PAGES / f"{method_facts.page_of(name)}.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
        assert method_facts.page_of(yaml.safe_load(block)["method"]) == method_facts.page_of(name)
