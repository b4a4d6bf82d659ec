"""Blocks of code in the documentation, and what its pages take for granted: a small model under a large one's name."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, PreTrainedModel

import peml
from export_kit import write_run
from peml.cli import app
from peml.export import to_peft_prompt
from peml.serving import open_service
from serving_kit import served
from workshop import tiny_tokenizer, write_model

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))])
PAGES += [ROOT / "benchmarks" / "README.md", ROOT / "SECURITY.md"]


ADDRESS = "http://127.0.0.1:8000"
"""Of the server in the documentation."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; `marker` is what an HTML comment right above says to the tests: `<!-- test: skip REASON -->`."""

    page: str
    line: int
    language: str
    marker: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def says(self, word: str) -> str | None:
        """What follows a word of the marker; None: it has not got it."""
        head, _, rest = self.marker.partition(" ")
        return rest if head == word else None


def blocks(language: str = "") -> list[Block]:
    """Of all pages, in their order."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        fence = r"^(?:<!-- test: (?P<marker>[^\n]*) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$"
        for match in re.finditer(fence, text, flags=re.M | re.S):
            line = text.count("\n", 0, match.start("text"))
            page = str(path.relative_to(ROOT))
            found.append(Block(page, line, match["language"], match["marker"] or "", match["text"]))
    return [block for block in found if language in ("", block.language)]


def by_page(language: str) -> dict[str, list[Block]]:
    """Blocks of a language, by page."""
    found: dict[str, list[Block]] = {}
    for block in blocks(language):
        found.setdefault(block.page, []).append(block)
    return found


TUTORIAL = "docs/tutorial.md"
"""The page whose blocks are run in order, commands and Python alike, and whose outputs are compared."""


def run_tutorial(folder: Path, run: Callable[[list[str]], None], output: Callable[[], str]) -> None:
    """Every block of the tutorial, in the current folder.

    Args:
        folder: which that is.
        run: runs the words of a command, its program first.
        output: what was printed since it was called last.
    """
    namespace: dict[str, Any] = {}
    printed = ""
    for block in (block for block in blocks() if block.page == TUTORIAL):
        if (name := block.says("file")) is not None:
            (folder / name).write_text(block.text, encoding="utf-8")
        elif block.says("output") is not None:
            assert printed == block.text, f"{block}: {printed}"
        elif block.says("skip") is not None:
            continue
        elif block.language == "bash":
            for words in commands(block):
                run(words)
            printed = output()
        elif block.language == "python":
            asks = ADDRESS in block.text
            with served(open_service(folder / "runs" / "first")) if asks else nullcontext() as server:
                address = f"http://127.0.0.1:{server.port}" if server else ADDRESS
                text = "\n" * block.line + block.text.replace(ADDRESS, address)
                exec(compile(text, str(ROOT / block.page), "exec", dont_inherit=True), namespace)
            printed = output()


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each line of a shell block, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def parse(words: list[str], whole: bool = True) -> None:
    """Read the arguments of `peml` as the command line does, without running anything.

    Args:
        words: behind `peml`.
        whole: whether what is needed must be there.
    """
    command: Any = typer.main.get_command(app)
    context, name = command.make_context("peml", [], resilient_parsing=True), "peml"
    while hasattr(command, "commands") and words:
        name, command, words = command.resolve_command(context, words)
    command.make_context(name, list(words), parent=context, resilient_parsing=not whole)
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    for word in words:  # resilient parsing passes over options that there are none of
        assert not word.startswith("--") or word.partition("=")[0] in known, f"peml {name} has no option {word}"


def fragments(text: str) -> list[dict[str, Any]]:
    """Parts of recipes in a block: one, or where it has a key twice, each line by itself."""
    lines = [line for line in text.splitlines() if line.strip()]
    keys = [line.partition(":")[0] for line in lines if re.match(r"\w", line)]
    apart = len(set(keys)) < len(keys)
    return [yaml.safe_load(part) for part in (lines if apart else [text])]


def base(folder: Path) -> PreTrainedModel:
    """A tiny Llama with its tokenizer beside it."""
    return AutoModelForCausalLM.from_pretrained(write_model(folder / "tiny"))


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, len(tiny_tokenizer()), (rows, 5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_encoder(folder: Path) -> Path:
    config = BertConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def adapted(folder: Path, tasks: tuple[str, ...] = ("rte", "sst2"), **parts: Any) -> PeftModel:
    return get_peft_model(base(folder), peml.PemlConfig(task_names=list(tasks), task_type="CAUSAL_LM", **parts))


class Mine(peml.prompts.Operation):
    """An operation that a reader might write."""

    def forward(self, hidden_PI: torch.Tensor) -> torch.Tensor:
        return hidden_PI


class Trainer:
    """What a callback is added to."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.callbacks = model, []

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)


def readme(folder: Path) -> dict[str, Any]:
    return {"batch": batch(), "inputs": batch(2)}


def from_peft(folder: Path) -> dict[str, Any]:
    rows = [{"text": text, "task": "rte"} for text in ("big red cat", "small dog", "blue tree yes")] * 3
    return {"batch": batch(), "rows": Dataset.from_list(rows)}


def adapters(folder: Path) -> dict[str, Any]:
    return {"model": adapted(folder, adapter=peml.MTLLoRA(r=4))}


def prompts(folder: Path) -> dict[str, Any]:
    prefix = peml.PrefixTuning(3)
    for name in ("sst2-prefix", "their-adapter"):
        to_peft_prompt(adapted(folder, prompt=prefix), folder / name, "sst2")
    return {"model": adapted(folder, prompt=prefix), "base": base(folder), "another_base": base(folder)}


def encoders(folder: Path) -> dict[str, Any]:
    return {"peml": peml, "get_peft_model": get_peft_model, "AutoModel": AutoModel, "batch": batch()}


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server that has the tasks of the page."""
    task = {"name": "sst2", "path": "none.jsonl", "kind": "choose", "choices": ["good", "bad"], "answer": "label"}
    task["prompt"] = "{{ sentence }}\nSentiment:"
    run = write_run(folder, "lora", tasks=[task])
    with served(open_service(run)) as server:
        yield f"http://127.0.0.1:{server.port}"


def growing(folder: Path) -> dict[str, Any]:
    return {"model": adapted(folder, adapter=peml.MTLLoRA(r=4))}


def regimes(folder: Path) -> dict[str, Any]:
    return {"trainer": Trainer(adapted(folder, prompt=searched()))}


def searched() -> peml.PrefixNAS:
    return peml.PrefixNAS(num_virtual_tokens=4, width=8, embedding_dim=8, head_rank=4, budget_tokens=2)


def search(folder: Path) -> dict[str, Any]:
    model = adapted(folder, prompt=searched())
    given = {"peml": peml, "MyOperation": Mine, "config": searched(), "replace": dataclasses.replace, "model": model}
    return given | {"step": 1, "search_steps": 2, "loss": torch.zeros(())}


def understanding(folder: Path) -> dict[str, Any]:
    return {"peml": peml}


GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": readme,
    "docs/encoders.md": encoders,
    "docs/from-peft.md": from_peft,
    "docs/how-to/add-a-task.md": growing,
    "docs/methods/adapters.md": adapters,
    "docs/methods/prompts.md": prompts,
    "docs/search-regimes.md": regimes,
    "docs/search.md": search,
    "docs/sharing.md": understanding,
}
"""What a page has at hand before its first line of Python."""


def write_orders(path: Path, count: int = 200) -> Path:
    """Rows as the README has them, of words that the small model knows."""
    rng = random.Random(0)
    things = {"kitchen": ["bread", "soup", "tea"], "garden": ["tulip", "lily"], "tools": ["hammer", "chisel"]}
    shelves = rng.choices([*things], k=count)
    lines = [
        json.dumps({"text": f"lena bought {rng.choice(things[shelf])} today", "shelf": shelf}) for shelf in shelves
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tickets(path: Path, count: int = 200) -> Path:
    """Rows as the first page has them."""
    rng = random.Random(0)
    words = {"billing": ["invoice", "refund", "price"], "hardware": ["screen", "cable", "fan"], "account": ["password"]}
    rows = [(rng.choice(words[team]), team) for team in rng.choices([*words], k=count)]
    lines = [json.dumps({"text": f"My {word} is wrong", "team": team, "urgent": "yes"}) for word, team in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
