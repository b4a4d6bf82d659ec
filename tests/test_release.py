"""What is shipped: one version, a wheel that works outside the tree, and public signatures that change on purpose only."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import tomllib

import peml

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests" / "snapshots" / "api.json"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def signatures() -> dict[str, str]:
    """Of every public name: its parameters and defaults."""
    found = {}
    for name in sorted(peml.__all__):
        value = getattr(peml, name)
        plain = isinstance(value, type) and issubclass(value, Exception)
        text = "an exception" if plain else str(inspect.signature(value))
        found[name] = re.sub(r" at 0x[0-9a-f]+", "", text)
    return found


def test_signatures_are_those_that_were_agreed_on() -> None:
    """A change here is one for users: CONTRIBUTING.md says how.

    To accept it: `python tests/test_release.py`.
    """
    assert signatures() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_there_is_one_version() -> None:
    quoted = f'"{PROJECT["version"]}"'
    assert not [path for path in (ROOT / "src").rglob("*.py") if quoted in path.read_text(encoding="utf-8")]
    assert version("peml") == PROJECT["version"]
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", log, flags=re.M)
    assert not released or released[0] == PROJECT["version"]


@pytest.mark.slow
def test_the_wheel_works_outside_the_tree(tmp_path: Path) -> None:
    """As `make release-check`, but with the libraries that are here."""
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("peml-*.whl")
    assert wheel.name.startswith(f"peml-{PROJECT['version']}-")
    held = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"peml/assets/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes and recipes | {"peml/py.typed", "peml/assets/toy-llama/model.safetensors"} <= held
    assert {"peml/assets/playground.html", "peml/tasks/toy/__init__.py"} <= held
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)

    recipe = {
        "model": "toy",
        "tasks": [{"suite": "toy", "include": ["mood"], "limit_train": 32, "limit_eval": 8}],
        "method": "lora",
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 64},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    for command in (["demo", "--help"], ["plan", "toy"], ["train", "recipe.yaml", "--output", "run"]):
        done = subprocess.run(
            [sys.executable, "-m", "peml", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    where = [sys.executable, "-c", "import peml; print(peml.__file__)"]
    file = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(file.strip()).is_relative_to(tmp_path) and (tmp_path / "run" / "adapter").is_dir()


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(signatures(), indent=1) + "\n", encoding="utf-8")
