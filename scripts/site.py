"""Pages of the documentation that are made from the code, so that they cannot tell another story: a hook of mkdocs."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import griffe
import typer
from filling import drawn, filled
from method_facts import home_of, page_of
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from peml.cli import app
from peml.methods import METHODS
from peml.training import arguments
from peml.training.entries import OwnEntry, SuiteEntry
from peml.training.ranges import Range, Tune
from peml.training.recipe import MixingSection, Recipe
from peml.training.regime import REGIMES

OWN_SETTINGS = {
    "dtype": "of the base's weights",
    "attn_implementation": "of transformers; left out: the model's own choice",
    "max_length": "tokens of a row, prompt and answer",
    "prompt_learning_rate": "of the prompt; left out: the prompt's own default",
    "task_prompt_learning_rate": "of what a prompt has for single tasks",
    "architecture_learning_rate": "of what a search decides",
    "head_learning_rate": "of heads; left out: 0.05 / numbers that a head sees",
    "probe_rows": "rows of each task on which heads are fitted before the training",
    "finetune_fraction": "share of the steps that follows a search",
    "after_search": "`finetune` for that share, or `keep` what there is",
    "measure_gap": "whether the score is measured right before and behind the end of a search",
    "early_stopping_patience": "measurements without a gain after which the training ends",
    "early_stopping_threshold": "what counts as a gain",
}


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


RESULTS: Mapping[str, Mapping[str, str]] = {
    "What methods reach": {
        "quality-toy": "All methods, toy tasks",
        "quality-encoder": "Thirteen methods, GLUE",
        "quality-text": "Text to text",
        "encoder": "A longer training, GLUE",
        "mpt-toy": "MPT, toy tasks",
        "mpt-real": "MPT, real tasks",
        "balance": "Balances of losses",
    },
    "Whether searching matters": {
        "search-toy": "Toy tasks",
        "search-encoder": "GLUE",
        "transfer-toy": "Transfer",
        "bill-toy": "The bill",
        "searching": "Time and memory of a step",
    },
    "Which tasks share": {
        "sharing-toy": "Contrary families",
        "sharing-encoder": "GLUE",
        "affinity-bill": "The bill of affinity",
        "clusters": "Memory of clusters",
    },
    "What methods cost": {
        "every": "Every method",
        "layers": "One linear",
        "layers-fp32": "One linear, fp32",
        "groups": "Several of one input",
        "end-to-end": "A whole model",
        "end-to-end-fp32": "A whole model, fp32",
        "tasks": "Number of tasks",
        "decode": "Decoding",
        "merged": "Folded weights",
        "prefix": "A prefix",
        "prefix-decode": "A prefix, decoding",
        "soft": "Soft tokens",
        "serving": "Serving",
    },
}
"""Records of benchmarks/results, by what they answer, with their names in the navigation."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add what was measured to the navigation."""
    made = {path.stem for path in (BENCHMARKS / "results").glob("*.md")}
    if nowhere := made - {name for titles in RESULTS.values() for name in titles}:
        raise ValueError(f"scripts/site.py has no title for the records {sorted(nowhere)}")
    shown: list[dict[str, Any]] = [{"All benchmarks": "results/index.md"}]
    for group, titles in RESULTS.items():
        shown.append({group: [{title: f"results/{name}.md"} for name, title in titles.items() if name in made]})
    config.nav.append({"Results": shown})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages."""
    pages = {"reference/recipe.md": recipe_page(), "reference/cli.md": cli_page(), "methods/index.md": methods_page()}
    # The index of what was measured, and every record as it lies beside the code that made it.
    pages["results/index.md"] = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for path in sorted((BENCHMARKS / "results").glob("*.md")):
        # Tables are wide: without the list of headings beside them there is more room.
        pages[f"results/{path.name}"] = "---\nhide: [toc]\n---\n" + path.read_text(encoding="utf-8")
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what a page of a method leaves to its code and to the records, and diagrams in the page's own colours."""
    made = filled(markdown)
    if made != markdown:
        # Tables are wide: without the list of headings beside them there is more room.
        page.meta["hide"] = ["toc"]
    return drawn(made).replace(" ± ", "\u00a0±\u00a0")


def recipe_page() -> str:
    """Every key of a recipe."""
    parts = [
        "# Keys of a recipe\n",
        "A recipe is a YAML file. What it does not know it refuses, with the nearest name that it does.\n",
        *section("The file", Recipe),
        *section("`tasks`: a suite", SuiteEntry),
        *section("`tasks`: rows of your own", OwnEntry),
        *section("`mixing`", MixingSection),
        "## `train`\n",
        "Everything that transformers' `TrainingArguments` has, under its name, and:\n",
        "| key | values | default | |\n|---|---|---|---|",
    ]
    for name, kind in arguments.OWN.items():
        default = arguments.DEFAULTS.get(name)
        parts.append(f"| `{name}` | {cell(kind)} | {code(default)} | {OWN_SETTINGS[name]} |")
    others = {name: value for name, value in arguments.DEFAULTS.items() if name not in arguments.OWN}
    parts += ["\nDefaults that are not transformers':", ", ".join(f"`{k}: {v}`" for k, v in others.items()) + ".\n"]
    for name, regime in REGIMES.items():
        parts += section(f"`regime: {name}`", regime)
    parts += [*section("`tune`", Tune), *section("A range of `tune`", Range)]
    return "\n".join(parts) + "\n"


def section(title: str, model: type[BaseModel]) -> Iterator[str]:
    """A heading, the sentence of a model, and its keys."""
    yield f"## {title}\n"
    text, arguments_ = docstring(model)
    yield f"{text}\n"
    keys = {name: field for name, field in model.model_fields.items() if name != "name" or model is OwnEntry}
    if not keys:
        return
    yield "| key | values | default | |\n|---|---|---|---|"
    for name, field in keys.items():
        default = field.get_default(call_default_factory=True)
        shown = "needed" if default is PydanticUndefined else code(default)
        yield f"| `{name}` | {cell(field.annotation)} | {shown} | {arguments_.get(name, '')} |"
    yield ""


def docstring(thing: type) -> tuple[str, dict[str, str]]:
    """Its text, and what it says of its arguments by name."""
    found: dict[str, str] = {}
    texts = []
    for part in griffe.Docstring(inspect.getdoc(thing) or "").parse("google", warnings=False):
        if part.kind is griffe.DocstringSectionKind.text:
            texts.append(part.value)
        elif part.kind is griffe.DocstringSectionKind.parameters:
            for argument in part.value:
                for name in argument.name.split(","):
                    found[name.strip()] = " ".join(argument.description.split()).replace("|", "\\|")
    # Several names before one colon are not Google's form, and come out as text of the argument before.
    for line in inspect.getdoc(thing).splitlines() if inspect.getdoc(thing) else []:
        head, colon, rest = line.strip().partition(": ")
        if colon and ", " in head and all(name.isidentifier() for name in head.split(", ")):
            found |= {name: rest.replace("|", "\\|") for name in head.split(", ")}
    return "\n\n".join(texts), found


def cell(kind: Any) -> str:
    """A type as a reader wants it."""
    if typing.get_origin(kind) is typing.Annotated:
        return cell(typing.get_args(kind)[0])
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(cell(each) for each in typing.get_args(kind) if each is not type(None)))
    plain = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(plain) or (isinstance(plain, type) and issubclass(plain, BaseModel)):
        return "a section"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", list: "list", dict: "mapping"}
    return names.get(plain, "text")


def code(value: Any) -> str:
    """A default."""
    if isinstance(value, BaseModel):
        return "its own defaults"
    if dataclasses.is_dataclass(value):
        return f"`{type(value).__name__.lower()}`"
    return "" if value is None or value in ({}, []) else f"`{value}`"


def cli_page() -> str:
    """Every command."""
    parts = ["# Commands\n", "`peml COMMAND --help` says the same.\n"]
    for name, command in commands(typer.main.get_command(app), "peml"):
        parts += [f"## `{name}`\n", f"{command.help or ''}\n"]
        rows = [row for parameter in command.params if (row := parameter_row(parameter))]
        if rows:
            parts += ["| | | default |\n|---|---|---|", *rows, ""]
    return "\n".join(parts) + "\n"


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Commands and those below them, with their whole names."""
    below: Mapping[str, click.Command] = getattr(command, "commands", {})
    if not below:
        yield name, command
    for own, each in below.items():
        yield from commands(each, f"{name} {own}")


def parameter_row(parameter: click.Parameter) -> str | None:
    """One option or argument."""
    if parameter.name == "help":
        return None
    option = isinstance(parameter, click.Option) or parameter.param_type_name == "option"
    name = ", ".join(f"`{each}`" for each in parameter.opts) if option else f"`{str(parameter.name).upper()}`"
    default = parameter.default
    shown = "needed" if parameter.required else "" if default in (None, False) or callable(default) else f"`{default}`"
    return f"| {name} | {getattr(parameter, 'help', None) or ''} | {shown} |"


def methods_page() -> str:
    """Every method that a recipe can name."""
    lines = [
        "# Methods\n",
        "A method is an adapter, a prompt, and how they are trained. `method: NAME` in a recipe; `set:` changes what "
        "it has, by `adapter.NAME` and `prompt.NAME`. Which when: [adapters](adapters.md), [prompts](prompts.md).\n",
        "| name | adapter | prompt | regime | a plain LoRA in the end | what it is |\n|---|---|---|---|---|---|",
    ]
    for name, row in METHODS.items():
        own = [
            "" if part is None else f"[{type(part).__name__}]({home_of(part)}.md#peml.{type(part).__name__})"
            for part in (row.adapter, row.prompt)
        ]
        link = f"[`{name}`]({page_of(name)}.md)"
        lines.append(f"| {link} | {own[0]} | {own[1]} | {row.regime} | {row.folds} | {row.summary} |")
    return "\n".join(lines) + "\n"
