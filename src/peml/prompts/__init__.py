"""Prompts: learned keys and values for attention, one file per paper. Needs neither transformers nor peft."""

from peml.prompts.architecture import Architecture
from peml.prompts.base import AttentionSlot, LayerPrefix, ModelShape, Prefix, Prompt, PromptConfig, SoftPrompt, Texts
from peml.prompts.prefix import PrefixTable, PrefixTuning
from peml.prompts.prefix_nas import PrefixGenerator, PrefixNAS

PROMPTS: dict[str, type[PromptConfig]] = {config.__name__: config for config in (PrefixTuning, PrefixNAS)}
"""Every prompt by the name that is stored with it."""

__all__ = [
    "PROMPTS",
    "Architecture",
    "AttentionSlot",
    "LayerPrefix",
    "ModelShape",
    "Prefix",
    "PrefixGenerator",
    "PrefixNAS",
    "PrefixTable",
    "PrefixTuning",
    "Prompt",
    "PromptConfig",
    "SoftPrompt",
    "Texts",
]
