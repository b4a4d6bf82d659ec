"""Low-rank adapters of the linear layers, one file per paper. Needs neither transformers nor peft."""

from peml.adapters.base import Adapter, AdapterConfig
from peml.adapters.lora import LoRA, LoRAAdapter
from peml.adapters.mtl_lora import MTLLoRA, MTLLoRAAdapter

ADAPTERS: dict[str, type[AdapterConfig]] = {config.__name__: config for config in (LoRA, MTLLoRA)}
"""Every adapter by the name that is stored with it."""

__all__ = ["ADAPTERS", "Adapter", "AdapterConfig", "LoRA", "LoRAAdapter", "MTLLoRA", "MTLLoRAAdapter"]
