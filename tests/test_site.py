"""The documentation builds, every link in it leads somewhere, and every recipe in it can be read."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from peml.training import Recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])


class Links(HTMLParser):
    """What a page points to, and the places in it that can be pointed to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets |= {value for key, value in attrs if key in ("href", "src") and value}
        self.places |= {value for key, value in attrs if key == "id" and value}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return folder


def test_it_is_filled_and_fetches_nothing(site: Path) -> None:
    page = (site / "reference" / "recipe.html").read_text(encoding="utf-8")
    assert all(f"<code>{key}</code>" in page for key in Recipe.model_fields)
    for html in site.rglob("*.html"):
        text = html.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img)[^>]*?(?:src|href)="(https?:[^"]*)"', text)
        assert not fetched, f"{html.name} fetches {fetched}"
        assert not re.search("<!-- (facts|numbers):", text), f"{html.name} was not filled"
    page = (site / "methods" / "mtl-lora.html").read_text(encoding="utf-8")
    assert "131,608: R I + E R O" in page and "../results/search-toy.html" in page and 'id="peml.MTLLoRA"' in page
    assert "<svg" in (site / "axes.html").read_text(encoding="utf-8")


def test_no_link_is_dead(site: Path) -> None:
    # 404.html is read at any address, and points from the root of the site.
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    dead, found = [], 0
    for path, page in pages.items():
        for target in page.targets:
            to = urlsplit(target)
            if to.scheme or to.netloc:
                continue
            found += 1
            file = (path.parent / unquote(to.path)).resolve() if to.path else path
            file = file / "index.html" if file.is_dir() else file
            place = unquote(to.fragment)
            if not file.exists() or (place and file in pages and place not in pages[file].places):
                dead.append(f"{path.relative_to(site)}: {target}")
    assert found > 1000 and not dead, dead


def recipes() -> list[tuple[str, dict]]:
    """YAML blocks that have a model and tasks."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
            data = yaml.safe_load(block)
            if isinstance(data, dict) and {"model", "tasks"} <= set(data):
                found.append((page.name, data))
    return found


@pytest.mark.parametrize(("page", "data"), recipes(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_recipe_can_be_read(page: str, data: dict) -> None:
    assert Recipe.model_validate(data).config().task_names


def test_there_are_recipes_to_read() -> None:
    assert {page for page, _ in recipes()} >= {"README.md", "index.md"}
