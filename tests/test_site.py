"""The documentation builds, every link in it leads somewhere, and every recipe in it can be read."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peml.training import Recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    page = (tmp_path / "site" / "reference" / "recipe.html").read_text(encoding="utf-8")
    assert all(f"<code>{key}</code>" in page for key in Recipe.model_fields)
    for html in (tmp_path / "site").rglob("*.html"):
        text = html.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img)[^>]*?(?:src|href)="(https?:[^"]*)"', text)
        assert not fetched, f"{html.name} fetches {fetched}"
        assert not re.search("<!-- (facts|numbers):", text), f"{html.name} was not filled"
    page = (tmp_path / "site" / "methods" / "mtl-lora.html").read_text(encoding="utf-8")
    assert "131,608: R I + E R O" in page and "../results/search-toy.html" in page and 'id="peml.MTLLoRA"' in page
    assert "<svg" in (tmp_path / "site" / "axes.html").read_text(encoding="utf-8")


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
