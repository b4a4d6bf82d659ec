"""The four formats, each as the files of one task (or of all, where nothing differs by task).

lora     lora_A = down', lora_B = up'^T, alpha = r: the pair of `fold`, no decomposition
merged   W + up'^T down', summed in single precision and rounded once
prefix   a stock prompt adapter, and the base with the low-rank part merged in where there is one
kv       the stock LoRA, and keys, values and log-gates of every layer for `load_kv.py`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from peml.attention import evaluating
from peml.errors import PemlError
from peml.export.positions import move_positions, position_table
from peml.export.prompts import found_layers, to_peft_prompt
from peml.routing import Route
from peml.tuner import PemlModel

FORMATS = {
    "lora": "stock PEFT LoRA: PEFT, vLLM, SGLang, llama.cpp's converter",
    "merged": "full checkpoint: whatever loads the base model",
    "prefix": "stock prompt adapter beside the merged checkpoint: PEFT",
    "kv": "stock LoRA, keys and values of the prefix, and a loader on transformers and PEFT",
}
"""What `peml export --to` can write."""


@torch.no_grad()
def write_lora(tuner: PemlModel, folder: Path, task: str | None) -> None:
    """The low-rank part for one task as a stock LoRA."""
    config = tuner.config_in_force
    assert config is not None
    pairs = tuner.fold(task)
    modules = dict(tuner.model.named_modules())
    turned = {path for path in pairs if isinstance(getattr(modules[path], "base_layer", None), Conv1D)}
    if turned and len(turned) < len(pairs):
        raise PemlError("this model mixes Linear and Conv1D layers, which one stock LoRA cannot: use --to merged")
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = down.float().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = up.T.float().cpu().contiguous()
    rank = next(iter(pairs.values()))[0].shape[0]
    LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=_targets(list(pairs), modules),
        fan_in_fan_out=bool(turned), task_type=config.task_type, inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path, revision=config.revision,
    ).save_pretrained(str(folder))  # fmt: skip
    save_file(tensors, str(folder / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})


def write_merged(
    tuner: PemlModel, tokenizer: PreTrainedTokenizerBase, folder: Path, task: str | None, dtype: torch.dtype
) -> Any:
    """The base model with the low-rank part for one task in its weights; the adapter is used up by it.

    Returns:
        The merged model, its weights as they were written.
    """
    config = tuner.config_in_force
    assert config is not None
    if config.adapter is not None:
        tuner.select_task(task if config.adapter_needs_task else None)
        tuner.merge_adapter()
    model: Any = tuner._unload()
    save_model(model, tokenizer, folder, dtype)
    return model


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint in shards, with its tokenizer; the model keeps the rounded weights, in single precision."""
    # Parameters alone: the frequencies of rotary positions are not stored, and must not be rounded.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder), max_shard_size="5GB")
    tokenizer.save_pretrained(str(folder))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def write_prefix(
    tuner: PemlModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    final: Path,
    task: str | None,
    dtype: torch.dtype,
) -> Any:
    """The prompt as a stock adapter in `prefix/`, and in `base/` the model it goes on, if that is not the plain one.

    Args:
        tuner: used up by it.
        tokenizer: goes beside the base.
        folder: where it is written.
        final: where it will lie in the end, which the adapter says of its base.
        task: name; None: for all.
        dtype: of the base's weights.

    Returns:
        The base model as it was written, or None where the adapter goes on the plain one.
    """
    config = tuner.config_in_force
    assert config is not None and config.prompt is not None
    by_task = config.prompt.needs_task or (config.needs_task and config.prompt.at_input)
    learned = not config.prompt.at_input and position_table(tuner.model) is not None
    merged = config.adapter is not None or bool(config.modules_to_save)
    to_peft_prompt(
        tuner,
        folder / "prefix",
        task if by_task else None,
        prompt_only=True,
        base_folder=final / "base" if merged or learned else None,
        shifted_base=learned,
    )
    if not merged and not learned:
        return None
    num_tokens = json.loads((folder / "prefix" / "adapter_config.json").read_text())["num_virtual_tokens"]
    if config.adapter is not None:
        tuner.select_task(task if config.adapter_needs_task else None)
        tuner.merge_adapter()
    model: Any = tuner._unload()
    if learned:
        move_positions(model, num_tokens)
    save_model(model, tokenizer, folder / "base", dtype)
    return model


@torch.no_grad()
def write_kv(tuner: PemlModel, folder: Path, task: str | None) -> None:
    """The low-rank part as a stock LoRA in `lora/`, and the prefix in `prefix_kv.safetensors`."""
    config = tuner.config_in_force
    assert config is not None
    route = None if task is None else Route.of(task, config.task_names)
    with evaluating(tuner):
        found, _ = found_layers(tuner, None if route is None else route.present)
    names = {
        module._peml_slot[0]: name for name, module in tuner.model.named_modules() if hasattr(module, "_peml_slot")
    }
    tensors: dict[str, Tensor] = {}
    layers: dict[str, str] = {}
    for slot, layer in enumerate(found):
        if layer is None or not layer.num_tokens:
            continue
        layers[str(slot)] = names[slot]
        gate = layer.keys.new_zeros(layer.num_tokens) if layer.log_gate is None else layer.log_gate
        for part, tensor in (("key", layer.keys[0]), ("value", layer.values[0]), ("log_gate", gate)):
            tensors[f"layers.{slot}.{part}"] = tensor.float().cpu().contiguous()
    metadata = {"format": "pt", "key_phase": "none", "layers": json.dumps(layers)}
    save_file(tensors, str(folder / "prefix_kv.safetensors"), metadata=metadata)
    if config.adapter is not None:
        (folder / "lora").mkdir()
        write_lora(tuner, folder / "lora", task)


def adapted(model: PeftModel) -> PemlModel:
    """The tuner of a model with an adapter of ours."""
    tuner = model.base_model
    assert isinstance(tuner, PemlModel)
    return tuner


def _targets(paths: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
    """Last names of the layers, where these mean no other; else their paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    meant = {
        name.removesuffix(".base_layer")
        for name, module in modules.items()
        if "weight" in module._parameters and name.removesuffix(".base_layer").rpartition(".")[2] in short
    }
    return short if meant <= set(paths) else sorted(paths)
