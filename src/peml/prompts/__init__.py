"""Prompts: learned keys and values for attention, one file per paper. Needs neither transformers nor peft."""

from peml.prompts.architecture import Architecture
from peml.prompts.attempt import Attempt
from peml.prompts.base import (
    AttentionSlot,
    LayerPrefix,
    ModelShape,
    Prefix,
    Prompt,
    PromptConfig,
    SoftPrompt,
    Texts,
    WordPromptConfig,
)
from peml.prompts.multitask import MultitaskPrompt
from peml.prompts.prefix import PrefixTable, PrefixTuning, ProjectedPrefix
from peml.prompts.prefix_nas import PrefixGenerator, PrefixNAS
from peml.prompts.prompt_tuning import PromptTuning

PROMPTS: dict[str, type[PromptConfig]] = {
    config.__name__: config for config in (PrefixTuning, PrefixNAS, PromptTuning, MultitaskPrompt, Attempt)
}
"""Every prompt by the name that is stored with it."""

__all__ = [
    "PROMPTS",
    "Architecture",
    "Attempt",
    "AttentionSlot",
    "LayerPrefix",
    "ModelShape",
    "MultitaskPrompt",
    "Prefix",
    "PrefixGenerator",
    "PrefixNAS",
    "PrefixTable",
    "PrefixTuning",
    "ProjectedPrefix",
    "Prompt",
    "PromptConfig",
    "PromptTuning",
    "SoftPrompt",
    "Texts",
    "WordPromptConfig",
]
