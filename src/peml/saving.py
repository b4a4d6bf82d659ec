"""What an adapter's file must hold: its keys, and whether they fit a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peml.errors import PemlError

OURS = "peml_adapter|peml_prompt|peml_head"
"""Names of the modules that hold what belongs to an adapter."""


def without_adapter_name(key: str, adapter_name: str) -> str:
    """The key that a tensor has in the file, where adapters have no name.

    Prompts nest their parameters, so the name is not at the fixed depth that PEFT expects.
    """
    return re.sub(rf"\.({OURS})\.{re.escape(adapter_name)}(?=\.)", r".\1", key)


def gathered(model: nn.Module) -> dict[str, Tensor] | None:
    """A state of the model in which what an adapter's file holds is whole; None: it is whole already.

    Under FSDP2 every process has a part of each parameter, and putting them together is work for all of them: one that
    does not call this leaves the others waiting. The base's weights stay in parts, because no file of ours holds them.
    """
    kept = re.compile(rf"\.({OURS}|modules_to_save)\.")
    state: dict[str, Tensor] = model.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return None
    return {
        key: value.full_tensor().cpu() if isinstance(value, DTensor) and kept.search(key) else value
        for key, value in state.items()
    }


def check_fit(model: nn.Module, adapter_name: str, given: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly those of this adapter on this base; PEFT would only warn.

    Raises:
        PemlError: another shape, a missing or an unexpected tensor.
    """
    mark = re.compile(rf"\.({OURS})\.{re.escape(adapter_name)}\.")
    own = {key: value for key, value in model.state_dict().items() if mark.search(key)}
    shapes = [k for k, v in own.items() if k in given and given[k].shape != v.shape]
    if shapes:
        key = shapes[0]
        raise PemlError(
            f"this adapter was trained on another base model: {key} is {list(given[key].shape)} in the file "
            f"but {list(own[key].shape)} here; load it onto the base model that its adapter_config.json names"
        )
    missing, extra = sorted(own.keys() - given.keys()), sorted(k for k in given if mark.search(k) and k not in own)
    extra += [k for k in given if "peml_" in k and k not in own and k not in extra]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which this model has not"
        raise PemlError(
            f"this adapter does not fit the model: the file {what} ({len(missing)} missing, {len(extra)} unexpected); "
            "load it onto the base model that its adapter_config.json names"
        )
