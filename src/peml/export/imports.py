"""A prompt that stock PEFT has trained, as one of ours.

Letters: `T` tasks, `L` attention layers, `H` key/value heads, `P` tokens, `D` head size, `E` width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from peml.config import PemlConfig
from peml.errors import PemlError
from peml.export.phases import check_decoder, check_turning, moved, turns
from peml.export.stock import PREFIXES, Source, Stock, read_stock
from peml.prompts import AttentionSlot, LayerPrefix, MultitaskPrompt, PrefixTuning, PromptConfig, PromptTuning


@torch.no_grad()
def from_peft(
    base: PreTrainedModel,
    source: Source | Mapping[str, Source],
    task_names: Sequence[str] = (),
    adapter_name: str = "default",
) -> PeftModel:
    """Attach a prompt trained by stock PEFT to a base model, as a PEML adapter that can be trained on.

        K = R(-P) K', V = V'      of PREFIX_TUNING and CARTRIDGE: the inverse of what `to_peft_prompt` does

    PREFIX_TUNING and CARTRIDGE become `PrefixTuning`, PROMPT_TUNING becomes `PromptTuning`, MULTITASK_PROMPT_TUNING
    becomes `MultitaskPrompt`; logits are those of PEFT, to rounding, while no sliding window hides its prefix. Of a
    projected prefix PEFT saves the table alone, and so it is a table here. Tokens that a CARTRIDGE froze are trained
    like the others.

    Args:
        base: the plain model that the adapter was trained on; a model of `source` no longer serves that afterwards.
        source: the adapter's folder, or a model that has it active; or one for each task, by the task's name, which
            become one prompt per task.
        task_names: names of the tasks, in the order of PEFT's `task_ids`; not with one source per task.
        adapter_name: what to call it in the model.

    Raises:
        PemlError: no such adapter, or it does not fit the model or the names; the model is left as it was.
    """
    if not isinstance(base, PreTrainedModel):
        raise PemlError(f"base must be a plain transformers model, not {type(base).__name__}")
    if isinstance(task_names, str):
        raise PemlError(f"task_names must be a list of names, not the text {task_names!r}")
    if isinstance(source, Mapping):
        if task_names:
            raise PemlError("one source per task names the tasks already: leave out task_names=")
        task_names, stocks = list(source), [read_stock(one) for one in source.values()]
    else:
        stocks = [read_stock(source)]
    config = PemlConfig(
        task_names=list(task_names),
        prompt=_prompt(stocks, len(task_names), isinstance(source, Mapping)),
        task_type="CAUSAL_LM",
    )
    first = stocks[0]
    check_decoder(base)
    if first.kind in PREFIXES:
        check_turning(base)
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    model = get_peft_model(base, config, adapter_name=adapter_name)
    try:
        prompt, slots = model.base_model.prompt, base.prompt_host.slots
        dtype = torch.promote_types(first.tensors["prompt_embeddings"].dtype, torch.float32)
        prompt.to(dtype)
        check_decoder(base)
        if first.kind in PREFIXES:
            layers = _layers([_embeddings(stock, dtype, _width(slots)) for stock in stocks], slots)
            prompt.fill(moved(layers, turns(base), -layers[0].num_tokens))
        else:
            width = base.get_input_embeddings().weight.shape[1]
            tokens = torch.stack([_embeddings(stock, dtype, width) for stock in stocks])
            if first.kind == "prompt_tuning":
                prompt.tokens.copy_(tokens)
            else:
                prompt.shared.copy_(tokens[0])
                prompt.by_token.copy_(first.tensors["prefix_task_cols"])
                prompt.by_feature.copy_(first.tensors["prefix_task_rows"])
    except BaseException:
        model.base_model.unload()
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad
        raise
    return model


def _prompt(stocks: Sequence[Stock], num_tasks: int, per_task: bool) -> PromptConfig:
    """Settings of our prompt for these adapters.

    Raises:
        PemlError: they are of several types or lengths, or have another number of tasks.
    """
    if not stocks:
        raise PemlError("source names no task: give a folder for each")
    first = stocks[0]
    p = first.tensors["prompt_embeddings"].shape[0]
    for stock in stocks:
        tokens = stock.tensors["prompt_embeddings"].shape[0]
        if (stock.kind, tokens) != (first.kind, p):
            raise PemlError(
                f"{stock.name} is {stock.kind.upper()} of {tokens} tokens and {first.name} is {first.kind.upper()} of "
                f"{p}: prompts of one adapter must be alike"
            )
    if first.kind in PREFIXES:
        return PrefixTuning(p, per_task=per_task)
    if first.kind == "prompt_tuning":
        return PromptTuning(p, per_task=per_task, prompt_tuning_init="random")
    tasks, _, ranks = first.tensors["prefix_task_cols"].shape
    if per_task:
        raise PemlError(f"{first.name} holds {tasks} tasks itself: give it alone, with task_names=")
    if tasks != num_tasks:
        raise PemlError(f"{first.name} has {tasks} tasks, and task_names= {num_tasks}: name each, in their order")
    return MultitaskPrompt(p, num_ranks=ranks, prompt_tuning_init="random")


def _width(slots: Sequence[AttentionSlot]) -> int:
    """Numbers of one prefix token in all layers."""
    return sum(slot.width for slot in slots)


def _embeddings(stock: Stock, dtype: torch.dtype, width: int) -> Tensor:
    found = stock.tensors["prompt_embeddings"]
    if found.shape[1] != width:
        raise PemlError(
            f"{stock.name} has {found.shape[1]} numbers per token where this model needs {width}: give the base model "
            f"that it was trained on ({stock.config.base_model_name_or_path})"
        )
    return found.to(dtype)


def _layers(embeddings: Sequence[Tensor], slots: Sequence[AttentionSlot]) -> list[LayerPrefix]:
    """Keys and values `[T or 1, H, P, D]` per layer, of tables `[P, L 2 H D]`."""
    if len(set(slots)) > 1:
        raise PemlError("the layers of this model differ in their heads, where PEFT's prefix is one shape for all")
    slot = slots[0]
    tables = torch.stack(list(embeddings))
    # [T, P, L 2 H D] -> [L, 2, T, H, P, D]
    both = tables.view(*tables.shape[:2], len(slots), 2, slot.num_heads, slot.head_dim).permute(2, 3, 0, 4, 1, 5)
    return [LayerPrefix(keys, values) for keys, values in both]
