"""Every block of code in the documentation does what it says: Python runs, commands exist, recipes and JSON are read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tomllib
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import docs_kit as kit
from docs_kit import Block, blocks, by_page
from peml.adapters import ADAPTERS
from peml.cli import main
from peml.methods import METHODS
from peml.prompts import OPERATIONS
from peml.training import Recipe
from workshop import write_model, write_recipe

LANGUAGES = {"python", "bash", "yaml", "json", "text"}
PROJECT = tomllib.loads((kit.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (kit.ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


def test_every_block_says_what_it_is() -> None:
    assert [f"{block}: ```{block.language}" for block in blocks() if block.language not in LANGUAGES] == []


def test_every_marker_is_known() -> None:
    heads = {block.marker.split(" ")[0] for block in blocks()}
    assert heads <= {"", "skip", "run", "file", "output"}
    assert all(len(block.says("skip") or "a reason that is long") > 10 for block in blocks())


@pytest.fixture
def small_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of the Hub by their names, tiny."""
    folders = {"Qwen/Qwen3-0.6B": lambda: write_model(tmp_path / "causal")}
    folders["bert-base-uncased"] = lambda: kit.write_encoder(tmp_path / "encoder")
    for kind in (AutoModel, AutoModelForCausalLM, AutoTokenizer):

        def load(name: str, *args: Any, own: Callable[..., Any] = kind.from_pretrained, **kwargs: Any) -> Any:
            return own(folders[name]() if name in folders else name, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", load)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL trains in bf16 on a GPU unless it is told otherwise, and for three passes."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'peml[trl]'")
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, bf16=False, use_cpu=True, max_steps=2))


# TRL 1.16 fills in an old name of transformers 5.23 by itself.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", sorted({*by_page("python")} - {kit.TUTORIAL}))
def test_python_runs(page: str, small_hub: None, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is one program, from its first block to its last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peml.prompts.OPERATIONS", dict(OPERATIONS))
    namespace = kit.GIVEN[page](tmp_path) if page in kit.GIVEN else {}
    # A page that calls a server gets one.
    calls = any(kit.ADDRESS in block.text for block in by_page("python")[page])
    skipped = []
    server = kit.serving(tmp_path) if calls else nullcontext(kit.ADDRESS)
    # What a page adds to the tables of methods is taken out again.
    with patch.dict(ADAPTERS), patch.dict(METHODS), server as address:
        for block in by_page("python")[page]:
            if reason := block.says("skip"):
                skipped.append(f"{block}: {reason}")
                continue
            # Line numbers of the page in tracebacks.
            text = "\n" * block.line + block.text.replace(kit.ADDRESS, address)
            exec(compile(text, str(kit.ROOT / page), "exec", dont_inherit=True), namespace)
    if skipped:
        pytest.skip("; ".join(skipped))


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From top to bottom, in one folder; what it prints is what the page shows."""
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, " ".join(words)

    kit.run_tutorial(tmp_path, run, lambda: capsys.readouterr().out)


def parse_launch(words: list[str]) -> None:
    """`accelerate launch --config_file FILE ... -m peml COMMAND`, as accelerate reads it and then we do."""
    asked = launch_command_parser().parse_args(words)
    assert asked.module and asked.training_script == "peml", words
    assert asked.config_file is None or (kit.ROOT / asked.config_file).is_file(), asked.config_file
    kit.parse(asked.training_script_args)


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands_exist(block: Block) -> None:
    if block.says("skip") and block.page != kit.TUTORIAL:
        pytest.skip(f"{block}: {block.says('skip')}")
    for words in kit.commands(block):
        while words and "=" in words[0]:  # VARIABLE=value before a command
            words = words[1:]
        program, *rest = words
        if program == "peml":
            kit.parse(rest)
        elif words[:2] == ["accelerate", "launch"]:
            parse_launch(words[2:])
        elif program == "make":
            assert {word for word in rest if "=" not in word} <= TARGETS, words
        elif words[:2] == ["pip", "install"]:
            extra = re.fullmatch(r"peml(?:\[(\w[\w-]*)\])?", words[2])
            assert extra and extra[1] in {None, *PROJECT["optional-dependencies"]}, words
        elif words[:2] == ["python", "-m"]:
            file = words[2].replace(".", "/")
            assert (kit.ROOT / f"{file}.py").exists() or (kit.ROOT / file / "__main__.py").exists(), words
        else:
            assert program in {"git", "cd", "source"}, f"{block}: nothing is known of {program}"


def inline() -> list[tuple[str, str]]:
    """Commands of ours within sentences, and in tables."""
    found = [(path, code) for path in kit.PAGES for code in re.findall(r"`(peml [^`\n]*)`", path.read_text("utf-8"))]
    return [(str(path.relative_to(kit.ROOT)), code.replace("\\|", "|")) for path, code in found]


@pytest.mark.parametrize(("page", "command"), inline())
def test_commands_in_sentences_exist(page: str, command: str) -> None:
    words = re.sub(r"\.\.\.|\[|\]|\|\S+", " ", command).split()
    if words[1] != "COMMAND":
        kit.parse(words[1:], whole=False)


SUITES = [{"suite": "glue", "include": ["mnli", "rte", "sst2", "cola"]}]


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(block: Block) -> None:
    if reason := block.says("skip"):
        pytest.skip(f"{block}: {reason}")
    for part in kit.fragments(block.text):
        tasks = SUITES
        if named := part.get("mixing", {}).get("weights"):
            tasks = [{"suite": "glue", "include": [*named]}]
        if isinstance(part.get("regime"), dict) and "sources" in part["regime"]:
            names = {*part["regime"]["sources"], *part["regime"]["targets"]}
            tasks = [
                {"suite": "glue", "include": sorted(names - {"cb"})},
                {"suite": "superglue", "include": ["cb"]},
            ]
        whole = {"model": "some/model", "tasks": tasks, "method": "peml"} | part
        assert Recipe.model_validate(whole).config().task_names


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


def recipes_of(page: str) -> list[Block]:
    return [block for block in by_page("yaml").get(page, []) if block.says("file")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page, own in by_page("bash").items() if page != kit.TUTORIAL and any(b.says("run") for b in own)],
)
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that holds the page's own recipe, or a small one, and rows as the first page has them."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "data").mkdir()
    kit.write_orders(tmp_path / "orders.jsonl")
    for folder in (tmp_path, tmp_path / "data"):
        kit.write_tickets(folder / "tickets.jsonl")
    for block in recipes_of(page):
        # What a page does in minutes is done in a few steps here.
        text = re.sub(r"max_steps: \d+", "max_steps: 10", block.text)
        (tmp_path / str(block.says("file"))).write_text(text, encoding="utf-8")
    for block in by_page("bash")[page]:
        for words in kit.commands(block) if block.says("run") else ():
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code, f"{block}: {' '.join(words)}"


def test_the_table_of_results_is_that_of_the_record() -> None:
    text = (kit.ROOT / "README.md").read_text(encoding="utf-8")
    name = re.search(r"<!-- test: rows of (\S+) -->", text)
    assert name
    record = table((kit.ROOT / name[1]).read_text(encoding="utf-8"))
    shown = table(text[name.end() :])
    columns = {column: record[""].index(column) for column in ("average", "PEML minus it", "p", "trained")}
    heads, *rows = shown.items()
    assert heads[1] == [*columns] and len(rows) >= 8
    for row, values in rows:
        assert values == [record[row][place] for place in columns.values()], row


def table(text: str) -> dict[str, list[str]]:
    """The first table of a text, by its first column."""
    lines = re.search(r"(?:^\|.*\|$\n)+", text, flags=re.M)
    assert lines
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]
    return {row[0]: row[1:] for row in cells if not set(row[0]) & {"-"} or row[0].strip("-")}
