"""What is in a run or adapter folder, read from its files alone: no base model is loaded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from peml.config import PemlConfig, part_to_dict
from peml.errors import PemlError
from peml.export.lint import Finding, foreseen
from peml.picture import draw, draw_traces, read_traces
from peml.prompts import STRUCTURE, Architecture, PrefixNAS, PrefixTuning, architecture_in
from peml.training.folder import WEIGHTS, RunFolder, check_adapter, size_of, write_text

_PROMPT = "base_model.model.prompt_host.peml_prompt."
_BUFFERS = {"choice", "head_choice", "kept", "progress"}


@dataclass(frozen=True)
class Inspection:
    """The contents of an adapter folder.

    Args:
        path: the adapter's folder.
        config: its configuration.
        parameters: trained numbers by part.
        architecture: of a searched prefix.
        lengths: prefix tokens per attention layer.
        exports: what its files say of each format of `peml export`.
        bytes: size on disk.
        metrics: `metrics.json` of the run, if the folder is that of a run.
    """

    path: Path
    config: PemlConfig
    parameters: dict[str, int]
    architecture: Architecture | None
    lengths: tuple[int, ...] | None
    exports: dict[str, Finding]
    bytes: int
    metrics: dict[str, Any]


def inspect_folder(path: str | Path) -> Inspection:
    """Read a run folder or an adapter folder.

    Raises:
        PemlError: there is no PEML adapter in it.
    """
    path = Path(path)
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    weights = check_adapter(folder)
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, PemlConfig)
    parameters = Counter[str]()
    try:
        with safe_open(str(weights), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                part = _part(key)
                if part is not None:
                    parameters[part] += math.prod(tensors.get_slice(key).get_shape())
            architecture = _architecture(config, tensors)
            unit = _unit_gates(config, tensors)
    except (SafetensorError, IndexError) as error:
        raise PemlError(f"{weights} does not fit its adapter_config.json ({error}): train or copy it again") from None
    lengths = architecture.lengths if architecture else _table_lengths(config)
    metrics = RunFolder(path).read_metrics()
    return Inspection(
        path=folder,
        config=config,
        parameters=dict(parameters),
        architecture=architecture,
        lengths=lengths,
        exports=foreseen(config, lengths, unit, architecture is not None and not architecture.derived),
        bytes=size_of(folder),
        metrics=metrics,
    )


def _part(key: str) -> str | None:
    if ".peml_adapter." in key:
        return "adapter"
    if ".peml_head." in key:
        return "heads"
    if not key.startswith(_PROMPT):
        return "other"
    name = key.removeprefix(_PROMPT).split(".")[0]
    if name in _BUFFERS or name.startswith("log_gate"):
        return None
    return "architecture" if name in STRUCTURE else "prompt"


def _architecture(config: PemlConfig, tensors: Any) -> Architecture | None:
    if not isinstance(config.prompt, PrefixNAS):
        return None
    stored = set(tensors.keys())
    state = {name: tensors.get_tensor(_PROMPT + name) for name in STRUCTURE if _PROMPT + name in stored}
    try:
        return architecture_in(config.prompt, state)
    except KeyError as error:
        raise SafetensorError(f"there is no {error} of the search in it") from None


def _unit_gates(config: PemlConfig, tensors: Any) -> bool:
    """Whether no token of the prefix weighs less than an ordinary one."""
    if isinstance(config.prompt, PrefixNAS):
        return not config.prompt.deploys_gates and config.prompt.gate_init is None
    gates = [key for key in tensors.keys() if key.startswith(f"{_PROMPT}log_gate")]  # noqa: SIM118  (not a mapping)
    return not any(bool(tensors.get_tensor(key).any()) for key in gates)


def _table_lengths(config: PemlConfig) -> tuple[int, ...] | None:
    prompt = config.prompt
    if not isinstance(prompt, PrefixTuning):
        return None
    given = prompt.num_virtual_tokens
    return (given,) if isinstance(given, int) else given


def show(found: Inspection, console: Console) -> None:
    """Print an inspection."""
    config = found.config
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("folder", Text(str(found.path)))
    table.add_row("base model", Text(str(config.base_model_name_or_path)))
    table.add_row("tasks", Text(", ".join(config.task_names)))
    table.add_row("adapter", Text(_settings(config.adapter)))
    if config.groups is not None:
        table.add_row("groups", Text("\n".join(map(str, config.groups))))
        active = found.metrics.get("active_parameters")
        if active:
            table.add_row("active", f"{max(active.values()):,} of the adapter's parameters for a task, at most")
    table.add_row("prompt", Text(_settings(config.prompt)))
    if config.heads is not None:
        table.add_row("heads", Text(_settings(config.heads)))
    if found.architecture is not None:
        table.add_row("architecture", architecture_view(found.architecture))
    elif found.lengths is not None:
        each = f"{found.lengths[0]} in every layer" if len(found.lengths) == 1 else ", ".join(map(str, found.lengths))
        table.add_row("prefix length", each)
    total = sum(found.parameters.values())
    parts = ", ".join(f"{name} {n:,}" for name, n in found.parameters.items())
    table.add_row("parameters", f"{total:,} ({parts})")
    table.add_row("on disk", f"{found.bytes / 1e6:.2f} MB")
    for when, value in found.metrics.get("average", {}).items():
        table.add_row(f"average {when}", f"{value:.3f}")
    exports = Text()
    for form, finding in found.exports.items():
        exports.append("no   " if finding.stops else "yes  ", style="red" if finding.stops else "green")
        exports.append(f"--to {form}: {finding.text}\n")
    exports.rstrip()
    table.add_row("export to", exports)
    console.print(table)


def draw_pictures(found: Inspection, path: str | Path) -> list[Path]:
    """Draw what a run's search has found, `architecture.svg`, and how it went, `search.svg`, unless they are there.

    A picture that is older than the adapter is drawn again. Without a model there are no bytes in it, see
    `peml.picture.draw`. In an adapter's folder nothing is drawn.

    Args:
        found: from `inspect_folder`.
        path: the run's folder.

    Returns:
        The files that there are.
    """
    run = RunFolder(path)
    if found.architecture is None or not run.is_run:
        return []
    architecture, search = run.picture, run.curves
    trained = (found.path / WEIGHTS).stat().st_mtime
    if not architecture.exists() or architecture.stat().st_mtime < trained:
        write_text(architecture, draw(found.architecture, tasks=found.config.task_names))
    curves = read_traces(run.log)
    if curves and (not search.exists() or search.stat().st_mtime < trained):
        write_text(search, draw_traces(curves))
    return [architecture, search] if curves else [architecture]


def architecture_view(architecture: Architecture) -> Group:
    """Cells and prefix lengths as text; one bar per layer."""
    state = "" if architecture.derived else " (search not finished)"
    lines = [Text(f"cells  {' -> '.join(architecture.operations)}{state}")]
    for layer, length in enumerate(architecture.lengths):
        lines.append(Text(f"layer {layer:>2}  {'#' * length}{' ' if length else ''}{length}"))
    return Group(*lines)


def _settings(part: Any) -> str:
    stored = part_to_dict(part)
    if stored is None:
        return "none"
    kind = stored.pop("type")
    if stored.get("architecture") is not None:
        stored["architecture"] = "given"  # it has a row of its own

    def shown(value: Any) -> str:
        return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list | tuple) else str(value)

    return f"{kind}  " + ", ".join(f"{k} {shown(v)}" for k, v in stored.items() if v is not None)
