"""A prompt of ours as an adapter of stock PEFT.

Letters: `L` attention layers, `H` key/value heads, `P` tokens, `D` head size, `E` width of the input embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from peml.attention import evaluating
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.export.phases import check_decoder, check_turning, moved, turns
from peml.export.stock import KINDS, PREFIXES, write_stock
from peml.prompts import LayerPrefix, MultitaskPrompt, PrefixGenerator, SoftPrompt
from peml.routing import Route
from peml.tuner import PemlModel


@torch.no_grad()
def to_peft_prompt(
    model: PeftModel | PemlModel,
    folder: str | Path,
    task: str | int | None = None,
    *,
    kind: str | None = None,
    prompt_only: bool = False,
    base_folder: str | Path | None = None,
    shifted_base: bool = False,
) -> Path:
    """Write the active adapter's prompt as a stock PEFT adapter, which plain PEFT loads onto the plain base model.

        K' = R(P) K, V' = V      prefix_tuning and cartridge: PEFT's prefix stands at 0 .. P-1, and its text begins at P
        Q_t                      prompt_tuning: a task's own, multiplied out

    Logits are those of ours, to rounding; in layers with a sliding window as long as prompt and text fit into it,
    because ours stays visible and PEFT's does not. Any prompt that is not made from the text can be written as a
    prefix, one at the input too. In stock PEFT a left-padded forward needs position ids; `generate` makes them.

    Args:
        model: with the adapter.
        folder: new or empty.
        task: name or id, for a prompt that differs by task; leave it out for a multitask prompt as a whole.
        kind: "prefix_tuning", "cartridge", "prompt_tuning" or "multitask_prompt_tuning"; None: what the prompt is,
            that is "prefix_tuning" for keys and values.
        prompt_only: write the prompt though the adapter has more than it, for a base that the rest is merged into.
        base_folder: what to name as the base model; None: the adapter's own.
        shifted_base: the base that it goes with has its learned positions moved by P already, see
            `peml.export.positions`: keys stay as they are.

    Returns:
        The folder, with `adapter_config.json` and `adapter_model.safetensors`; nothing is there if it fails.

    Raises:
        PemlError: the prompt does not fit the format; the message says what stands against it and how to get there.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    config = tuner.config_in_force if isinstance(tuner, PemlModel) else None
    if config is None:
        raise PemlError("there is no PEML adapter to export: give the model that get_peft_model returned")
    host = getattr(getattr(tuner, "model", None), "prompt_host", None)
    if host is not None and host.active() is None and config.prompt is not None:
        raise PemlError("the adapter is switched off here: export it outside disable_adapter()")
    assert isinstance(tuner, PemlModel)
    kind = _checked(tuner, config, task, kind, prompt_only)
    present = None if task is None else Route.of(task, config.task_names).present
    base, prompt = str(base_folder or config.base_model_name_or_path or "") or None, tuner.prompt
    if kind in PREFIXES:
        layers = prefix_layers(tuner, present, turned=not shifted_base)
        _, heads, p, size = layers[0].keys.shape
        shape = {"num_virtual_tokens": p, "num_layers": len(layers), "token_dim": heads * size}
        # Whether PEFT froze tokens while it trained is none of the result's business.
        frozen = {"num_frozen_tokens": 0} if kind == "cartridge" else {}
        write_stock(
            folder, kind, {"prompt_embeddings": flat(layers)}, base, num_attention_heads=heads, **shape, **frozen
        )
        return Path(folder).expanduser()
    tensors, settings = {}, {}
    if kind == "multitask_prompt_tuning":
        tensors = {"prefix_task_cols": prompt.by_token, "prefix_task_rows": prompt.by_feature}
        settings = {"num_tasks": len(config.task_names), "num_ranks": prompt.by_token.shape[-1]}
        tokens = prompt.shared
    else:
        tokens = prompt(present)[0]
    p, width = tokens.shape
    tensors = {"prompt_embeddings": tokens, **tensors}
    write_stock(folder, kind, tensors, base, num_virtual_tokens=p, token_dim=width, **settings)
    return Path(folder).expanduser()


def flat(layers: Sequence[LayerPrefix]) -> Tensor:
    """Keys and values `[1, H, P, D]` per layer as PEFT keeps them, `[P, L 2 H D]`."""
    both = torch.stack([tensor[0] for layer in layers for tensor in (layer.keys, layer.values)])
    both = both.to(torch.promote_types(both.dtype, torch.float32))
    return both.permute(2, 0, 1, 3).flatten(1)


def _checked(tuner: PemlModel, config: PemlConfig, task: str | int | None, kind: str | None, prompt_only: bool) -> str:
    """The type to write.

    Raises:
        PemlError: this adapter cannot become one.
    """
    if config.prompt is None:
        raise PemlError("this adapter has no prompt: for its low-rank part use peft.save_as_lora()")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise PemlError(f"a prompt is exported for task_type CAUSAL_LM only, not {config.task_type}")
    check_decoder(tuner.model)
    beside = [] if config.adapter is None else [type(config.adapter).__name__]
    beside += config.modules_to_save or []
    if beside and not prompt_only:
        raise PemlError(
            f"the adapter has {' and '.join(beside)} beside its prompt, and PEFT has no type for both: merge that into "
            "the base model, and pass prompt_only=True for the prompt that goes with the merged one"
        )
    prompt, own = tuner.prompt, type(config.prompt).__name__
    if isinstance(prompt, SoftPrompt) and prompt.reads_input:
        raise PemlError(f"{own} makes a prompt of every text: no stock adapter can do that")
    multitask = isinstance(config.prompt, MultitaskPrompt) and config.prompt.at_input
    if kind is None:
        whole = "multitask_prompt_tuning" if multitask and task is None else "prompt_tuning"
        kind = whole if isinstance(prompt, SoftPrompt) else "prefix_tuning"
    if kind not in KINDS:
        raise PemlError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "multitask_prompt_tuning":
        if not multitask:
            raise PemlError(f"{own} is no multitask prompt at the input: leave out kind=, or give another")
        if task is not None:
            raise PemlError('kind="multitask_prompt_tuning" holds all tasks: leave out task=')
        return kind
    if kind not in PREFIXES and not isinstance(prompt, SoftPrompt):
        raise PemlError(f'{own} is keys and values, not tokens at the input: give kind="prefix_tuning" or "cartridge"')
    by_task = config.prompt.needs_task or (kind in PREFIXES and config.prompt.at_input and config.needs_task)
    if by_task and task is None:
        raise PemlError(f"this prompt differs by task: pass task= with one of {', '.join(config.task_names)}")
    return kind


def check_searched(tuner: PemlModel) -> None:
    """Refuse a prefix whose search is still open."""
    if isinstance(tuner.prompt, PrefixGenerator) and tuner.prompt.searching:
        raise PemlError("the search for this prefix is not over: finish its training, or call collapse_prompt()")


def found_layers(tuner: PemlModel, present: Sequence[int] | None) -> tuple[list[LayerPrefix | None], int]:
    """What every layer gets, and how far the text moves to make room for it."""
    prompt = tuner.prompt
    if not isinstance(prompt, SoftPrompt):
        return prompt(present), 0
    forward = tuner.open_forward(None if present is None else present[0], None)
    assert forward.prefix is not None
    return [forward.prefix[slot] for slot in range(len(forward.prefix))], forward.offset


def prefix_layers(tuner: PemlModel, present: Sequence[int] | None, turned: bool = True) -> list[LayerPrefix]:
    """Keys and values of every layer, `[1, H, P, D]`, turned to where PEFT has them, or as they are.

    Raises:
        PemlError: they are more than PEFT's format can hold.
    """
    base = tuner.model
    check_searched(tuner)
    with evaluating(tuner):
        found, offset = found_layers(tuner, present)
        lengths = [0 if layer is None else layer.num_tokens for layer in found]
        if len(set(lengths)) > 1:
            raise PemlError(
                f"the prefix has {', '.join(map(str, lengths))} tokens in its layers, and PEFT one number for all: "
                "train PrefixTuning with one, or PrefixNAS with gate_threshold 0 and budget_tokens of "
                "num_virtual_tokens"
            )
        layers = [layer for layer in found if layer is not None]
        if any(layer.log_gate is not None and bool(layer.log_gate.any()) for layer in layers):
            raise PemlError(
                'the prefix has gates, which PEFT knows nothing of: train with prompt.gate_after "unit", '
                "prompt.gate_init null and some steps after the search (train.finetune_fraction)"
            )
        _check_order(tuner, len(layers))
        positions = lengths[0] - offset
        if positions and turned:
            check_turning(base)
            with tuner.ablated("adapter"):
                layers = moved(layers, turns(base), positions)
    return layers


def _check_order(tuner: PemlModel, num_slots: int) -> None:
    """Refuse a model whose attention layers are not, one by one, the layers of its cache."""
    base, name = tuner.model, type(tuner.model).__name__
    indices = [
        getattr(module, "layer_idx", None)
        for module in base.modules()
        if getattr(module, "_peml_slot", None) is not None
    ]
    layers = base.config.get_text_config().num_hidden_layers
    if indices != list(range(layers)) or len(set(tuner.model.prompt_host.slots)) > 1 or num_slots != layers:
        raise PemlError(
            f"{name} has {num_slots} attention layers of its own among {layers}, or layers that differ in their heads: "
            "PEFT's prefix is one shape for all layers"
        )
