"""Low-rank adapters of the linear layers, one file per paper. Needs neither transformers nor peft."""

from peml.adapters.base import Adapter, AdapterConfig
from peml.adapters.c_poly import CPoly, CPolyAdapter
from peml.adapters.cgc_lora import CGCLoRA, CGCLoRAAdapter
from peml.adapters.grouped import GroupedAdapter
from peml.adapters.hydra_lora import HydraLoRA, HydraLoRAAdapter
from peml.adapters.lora import LoRA, LoRAAdapter
from peml.adapters.moe_lora import MoELoRA, MoELoRAAdapter
from peml.adapters.mtl_lora import MTLLoRA, MTLLoRAAdapter
from peml.adapters.multi_lora import MultiLoRA, MultiLoRAAdapter
from peml.adapters.poly import MHRAdapter, Poly, PolyAdapter
from peml.adapters.single_task import SingleTaskLoRA, SingleTaskLoRAAdapter

_KINDS: tuple[type[AdapterConfig], ...] = (
    LoRA,
    SingleTaskLoRA,
    MTLLoRA,
    MultiLoRA,
    MoELoRA,
    CGCLoRA,
    Poly,
    CPoly,
    HydraLoRA,
)

ADAPTERS: dict[str, type[AdapterConfig]] = {kind.__name__: kind for kind in _KINDS}
"""Every adapter by the name that is stored with it."""

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterConfig",
    "CGCLoRA",
    "CGCLoRAAdapter",
    "CPoly",
    "CPolyAdapter",
    "GroupedAdapter",
    "HydraLoRA",
    "HydraLoRAAdapter",
    "LoRA",
    "LoRAAdapter",
    "MHRAdapter",
    "MTLLoRA",
    "MTLLoRAAdapter",
    "MoELoRA",
    "MoELoRAAdapter",
    "MultiLoRA",
    "MultiLoRAAdapter",
    "Poly",
    "PolyAdapter",
    "SingleTaskLoRA",
    "SingleTaskLoRAAdapter",
]
