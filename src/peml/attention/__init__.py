"""Learned keys and values inside the attention function of unmodified transformers models.

A twin of the model's attention implementation is registered with `AttentionInterface`, and of its mask function with
`AttentionMaskInterface` (without the second, the padding mask would be dropped silently). The twin puts the prefix of
the open `Forward` in front of the layer's keys and values and calls the original. The cache never holds the prefix,
real tokens keep their positions, and gradient checkpointing, packing, static caches and beams work as without it.
"""

from peml.attention.front import check_outputs, fronted, lengthened, shortened, widened
from peml.attention.host import PromptHost, evaluating, install, uninstall
from peml.attention.soft import changing_rope, check_soft, check_words, encodes_first, is_rotary, takes_embeddings
from peml.attention.switch import check_paging, engage, hosts_prompts, named_for_paging, packs
from peml.attention.twin import TWIN, attend

__all__ = [
    "TWIN",
    "PromptHost",
    "attend",
    "changing_rope",
    "check_outputs",
    "check_paging",
    "check_soft",
    "check_words",
    "encodes_first",
    "engage",
    "evaluating",
    "fronted",
    "hosts_prompts",
    "install",
    "is_rotary",
    "lengthened",
    "named_for_paging",
    "packs",
    "shortened",
    "takes_embeddings",
    "uninstall",
    "widened",
]
