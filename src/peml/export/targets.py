"""Which stock formats can carry an adapter, and why not where they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peml.config import PemlConfig
from peml.prompts import Attempt, MultitaskPrompt, PrefixNAS, PrefixTuning

NOT_FOLDABLE = "its experts are mixed by the input of each token: no weight and no plain LoRA equals that"
MADE_FROM_TEXT = "its prompt is made from every text anew"


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


def export_targets(
    config: PemlConfig, lengths: Sequence[int] | None = None, unit_gates: bool = False, searching: bool = False
) -> list[Target]:
    """Formats that could carry this adapter.

    Args:
        config: the adapter's configuration.
        lengths: prefix tokens per layer, for an adapter with a prompt.
        unit_gates: whether all gates of the prefix are 1.
        searching: whether the search for it is still open.
    """
    found = [_merged(config), _lora(config), _prefix(config, lengths, unit_gates, searching), _tokens(config)]
    if config.heads is None:
        return found
    return [
        replace(target, remark=f"{target.remark}, without the heads") if target.possible else target for target in found
    ]


def _merged(config: PemlConfig) -> Target:
    name = "merged checkpoint"
    if config.heads is not None:
        return Target(name, False, "heads do not fold into weights; merge_adapter() folds the rest")
    if config.prompt is not None:
        return Target(name, False, "a learned prefix does not fold into weights; merge_adapter() folds the rest")
    assert config.adapter is not None
    if not config.adapter.foldable:
        return Target(name, False, NOT_FOLDABLE)
    if config.adapter_needs_task:
        return Target(name, True, "one per task: select_task(...), then merge_and_unload()")
    return Target(name, True, "one for all tasks: merge_and_unload()")


def _lora(config: PemlConfig) -> Target:
    name = "stock LoRA adapter"
    if config.adapter is None:
        return Target(name, False, "there is no low-rank part")
    if not config.adapter.foldable:
        return Target(name, False, NOT_FOLDABLE)
    without = ", without the prefix" if config.prompt is not None else ""
    each = "one per task: select_task(...), then " if config.adapter_needs_task else "one for all tasks: "
    rank = config.adapter.folded_rank(len(config.task_names))
    return Target(name, True, f"{each}peft.save_as_lora(folder, model, rank={rank}){without}")


def _prefix(config: PemlConfig, lengths: Sequence[int] | None, unit_gates: bool, searching: bool) -> Target:
    name, prompt = "stock prefix (PREFIX_TUNING, CARTRIDGE)", config.prompt
    if prompt is None:
        return Target(name, False, "there is no prefix")
    if isinstance(prompt, Attempt):
        return Target(name, False, MADE_FROM_TEXT)
    if (beside := _beside(config)) is not None:
        return Target(name, False, beside)
    if searching:
        return Target(name, False, "the search for the prefix is not over")
    if lengths is not None and len(set(lengths)) > 1:
        return Target(name, False, "the prefix has another length in each layer")
    if not unit_gates and (isinstance(prompt, PrefixNAS) or (isinstance(prompt, PrefixTuning) and prompt.gated)):
        return Target(
            name, False, 'the tokens carry gates; train with prompt.gate_after "unit" and prompt.gate_init null'
        )
    each = ", task) one per task" if prompt.needs_task else ") one for all tasks"
    if prompt.at_input:
        return Target(name, True, f'export.to_peft_prompt(model, folder{each}, with kind="prefix_tuning"')
    return Target(name, True, f"export.to_peft_prompt(model, folder{each}, for rotary decoders")


def _tokens(config: PemlConfig) -> Target:
    name, prompt = "stock tokens (PROMPT_TUNING)", config.prompt
    if isinstance(prompt, Attempt):
        return Target(name, False, MADE_FROM_TEXT)
    if prompt is None or not prompt.at_input:
        return Target(name, False, "there are no tokens at the input")
    if (beside := _beside(config)) is not None:
        return Target(name, False, beside)
    each = ", task) one per task" if prompt.needs_task else ") one for all tasks"
    whole = "; without task= one MULTITASK_PROMPT_TUNING" if isinstance(prompt, MultitaskPrompt) else ""
    return Target(name, True, f"export.to_peft_prompt(model, folder{each}{whole}")


def _beside(config: PemlConfig) -> str | None:
    """What keeps a prompt from being an adapter by itself."""
    if config.adapter is None and not config.modules_to_save:
        return None
    return "PEFT has no type for a prompt and more; with that merged, to_peft_prompt(..., prompt_only=True) writes it"
