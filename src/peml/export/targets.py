"""Which stock formats can carry an adapter, and why not where they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peml.config import PemlConfig
from peml.prompts import PrefixNAS, PrefixTuning

NOT_FOLDABLE = "its experts are mixed by the input of each token: no weight and no plain LoRA equals that"


@dataclass(frozen=True)
class Target:
    """A format outside of peml.

    Args:
        name: what it is.
        possible: whether this adapter fits into it.
        remark: how to get there, or what stands in the way.
    """

    name: str
    possible: bool
    remark: str


def export_targets(config: PemlConfig, lengths: Sequence[int] | None = None, unit_gates: bool = False) -> list[Target]:
    """Formats that could carry this adapter.

    Args:
        config: the adapter's configuration.
        lengths: prefix tokens per layer, for an adapter with a prompt.
        unit_gates: whether all gates of the prefix are 1.
    """
    return [_merged(config), _lora(config), _prefix(config, lengths, unit_gates)]


def _merged(config: PemlConfig) -> Target:
    name = "merged checkpoint"
    if config.prompt is not None:
        return Target(name, False, "a learned prefix does not fold into weights; merge_adapter() folds the rest")
    assert config.adapter is not None
    if not config.adapter.foldable:
        return Target(name, False, NOT_FOLDABLE)
    if config.adapter.needs_task:
        return Target(name, True, "one per task: select_task(...), then merge_and_unload()")
    return Target(name, True, "one for all tasks: merge_and_unload()")


def _lora(config: PemlConfig) -> Target:
    name = "stock LoRA adapter"
    if config.adapter is None:
        return Target(name, False, "there is no low-rank part")
    if not config.adapter.foldable:
        return Target(name, False, NOT_FOLDABLE)
    without = ", without the prefix" if config.prompt is not None else ""
    each = "one per task: select_task(...), then " if config.adapter.needs_task else "one for all tasks: "
    rank = config.adapter.folded_rank(len(config.task_names))
    return Target(name, True, f"{each}peft.save_as_lora(folder, model, rank={rank}){without}")


def _prefix(config: PemlConfig, lengths: Sequence[int] | None, unit_gates: bool) -> Target:
    name = "stock prefix (PREFIX_TUNING)"
    if not isinstance(config.prompt, PrefixTuning | PrefixNAS):
        return Target(name, False, "there is no prefix")
    if config.adapter is not None:
        return Target(name, False, "PEFT cannot carry LoRA and a prefix in one adapter; merge the LoRA part first")
    if lengths is not None and len(set(lengths)) > 1:
        return Target(name, False, "the prefix has another length in each layer")
    if isinstance(config.prompt, PrefixNAS) and not unit_gates:
        return Target(name, False, 'the tokens carry gates; train with prompt.gate_after "unit"')
    each = "one per task" if config.prompt.needs_task else "one for all tasks"
    return Target(name, True, f"{each}, exact with keys rotated to their positions")
