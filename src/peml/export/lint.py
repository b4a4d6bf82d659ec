"""What will not work outside of peml, said before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from peml.attention import changing_rope, encodes_first
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.export.formats import FORMATS
from peml.export.positions import position_table
from peml.export.prompts import check_searched, prefix_layers
from peml.prompts import Attempt, PrefixNAS, PrefixTuning
from peml.routing import Route
from peml.tuner import PemlModel

VLLM_RANK = 16
"""vLLM's `--max-lora-rank` where nobody sets it."""


class Finding(NamedTuple):
    """One thing to know of an export.

    Args:
        stops: whether it cannot be made.
        text: what, and what to do.
    """

    stops: bool
    text: str


def lint(tuner: PemlModel, form: str) -> list[Finding]:
    """What stands against writing the active adapter in a format, and what to mind when it is used.

    Args:
        tuner: with the adapter.
        form: a key of `FORMATS`.

    Raises:
        PemlError: an unknown format.
    """
    if form not in FORMATS:
        raise PemlError(f"--to {form} is unknown: choose {', '.join(FORMATS)}")
    config = tuner.config_in_force
    assert config is not None
    found = [Finding(True, text) for text in _obstacles(tuner, config, form)]
    return found or [Finding(False, text) for text in _remarks(tuner, config, form)]


def foreseen(
    config: PemlConfig, lengths: Sequence[int] | None = None, unit_gates: bool = False, searching: bool = False
) -> dict[str, Finding]:
    """What an adapter's files alone say of each format: what stands against it, or how many exports there will be.

    The lint itself knows the base model and may find more: layers that share weights, positions of another kind.

    Args:
        config: the adapter's.
        lengths: prefix tokens per layer, or the same for all; None: it has no table of them.
        unit_gates: whether all gates of the prefix are 1.
        searching: whether the search for it is still open.
    """
    many = "one for each task" if config.needs_task else "one for all tasks"
    found = {}
    for form in FORMATS:
        against = _against(config, form)
        if not against and form in ("prefix", "kv"):
            against = _against_prefix(config, form, lengths, unit_gates, searching)
        found[form] = Finding(bool(against), "; ".join(against) or many)
    return found


def _against(config: PemlConfig, form: str) -> list[str]:
    """What no base model changes."""
    if config.heads is not None:
        return ["its heads answer for whole texts, which no stock format holds: use it with peml"]
    found = []
    adapter, prompt = config.adapter, config.prompt
    if adapter is not None and not adapter.foldable:
        found.append(
            "its experts are mixed by the input of each token: no weight and no plain LoRA equals that: serve it with "
            "`peml serve`"
        )
    if form in ("lora", "merged"):
        if prompt is not None:
            found.append("its prompt would be lost, which folds into no weights: use --to prefix, or --to kv")
        elif adapter is None:
            found.append("it has no low-rank part")
    elif prompt is None:
        found.append("it has no prompt: use --to lora, or --to merged")
    if form in ("lora", "kv") and config.modules_to_save:
        saved = ", ".join(config.modules_to_save)
        found.append(f"it trained whole modules ({saved}), which vLLM refuses in a LoRA: use --to merged or prefix")
    if not found and isinstance(prompt, Attempt):
        found.append("its prompt is made from every text anew: serve it with peml")
    return found


def _against_prefix(
    config: PemlConfig, form: str, lengths: Sequence[int] | None, unit_gates: bool, searching: bool
) -> list[str]:
    """What the tables of a prefix say, which the lint of a model finds where it computes them."""
    prompt = config.prompt
    if searching:
        return ["the search for the prefix is not over: finish its training"]
    if form == "kv":
        return []
    if lengths is not None and len(set(lengths)) > 1:
        return ["the prefix has another length in each layer: use --to kv"]
    if not unit_gates and (isinstance(prompt, PrefixNAS) or (isinstance(prompt, PrefixTuning) and prompt.gated)):
        return ['the prefix has gates: use --to kv, or train with prompt.gate_after "unit" and prompt.gate_init null']
    return []


def _obstacles(tuner: PemlModel, config: PemlConfig, form: str) -> list[str]:
    found = _against(config, form)
    if config.heads is not None:
        return found
    prompt = config.prompt
    if form in ("merged", "prefix") and (tied := tied_layer(tuner)) is not None:
        way = "lora" if prompt is None else "kv"
        found.append(f"{tied} shares its weights with another layer, which merging would change too: use --to {way}")
    if not found and prompt is not None:
        found += _obstacles_of_prompt(tuner, config, form)
    return found


def tied_layer(tuner: PemlModel) -> str | None:
    """A layer with a low-rank part whose weights are another layer's too, as a head's may be the embedding's."""
    names: dict[int, list[str]] = {}
    for name, parameter in tuner.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = (name for each in names.values() if len(each) > 1 for name in each if ".base_layer." in name)
    return next((name.partition(".base_layer.")[0] for name in shared), None)


def _obstacles_of_prompt(tuner: PemlModel, config: PemlConfig, form: str) -> list[str]:
    model, prompt = tuner.model, config.prompt
    assert prompt is not None
    if encodes_first(model):
        return ["stock prompts are written for decoders, and this model has an encoder"]
    try:
        if form == "kv":
            check_searched(tuner)
            return _obstacles_of_kv(model, prompt.at_input)
        if not prompt.at_input:
            learned = position_table(model) is not None
            by_task = prompt.needs_task
            present = Route.of(0, config.task_names).present if by_task else None
            prefix_layers(tuner, present, turned=not learned)
    except PemlError as error:
        return [str(error)]
    return []


def _obstacles_of_kv(model: Any, at_input: bool) -> list[str]:
    found = []
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        found.append("its attention is soft-capped, which the loader's SDPA cannot do: use --to prefix")
    if at_input and position_table(model) is not None:
        found.append("its text stands behind the tokens of the prompt, in learned positions: use --to prefix")
    if at_input and changing_rope(model) is not None:
        found.append("its positions change with the length of the text: use --to prefix")
    return found


def _remarks(tuner: PemlModel, config: PemlConfig, form: str) -> list[str]:
    found = []
    if config.adapter is not None and form in ("lora", "kv"):
        rank = config.adapter.folded_rank(len(config.task_names))
        if form == "lora" and rank > VLLM_RANK:
            found.append(f"rank {rank}: start vLLM with --max-lora-rank {rank} or the next that it offers")
    if form == "lora" and config.adapter is not None and not config.adapter_needs_task:
        found.append("the same for all tasks: one adapter, and one LoRA id where it is served")
    if form == "prefix" and config.prompt is not None and not config.prompt.at_input:
        found.append("in a direct call with left padding PEFT wants position_ids; `generate` makes them")
        if getattr(tuner.model.config.get_text_config(), "sliding_window", None):
            found.append("a layer with a sliding window forgets PEFT's prefix in texts longer than the window")
    if form in ("prefix", "kv"):
        found.append("vLLM, SGLang and llama.cpp load no key/value prefix: serve it with PEFT, or with `peml serve`")
    return found
