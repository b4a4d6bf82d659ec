"""Prompts: learned keys and values for attention, one file per paper. Needs neither transformers nor peft."""

from peml.prompts.architecture import STRUCTURE, Architecture, architecture_in
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
from peml.prompts.generator import PrefixGenerator
from peml.prompts.multitask import MultitaskPrompt
from peml.prompts.operations import OPERATIONS, Operation
from peml.prompts.prefix import PrefixTable, PrefixTuning, ProjectedPrefix
from peml.prompts.prefix_nas import PrefixNAS
from peml.prompts.prompt_tuning import PromptTuning

PROMPTS: dict[str, type[PromptConfig]] = {
    config.__name__: config for config in (PrefixTuning, PrefixNAS, PromptTuning, MultitaskPrompt, Attempt)
}
"""Every prompt by the name that is stored with it."""

__all__ = [
    "OPERATIONS",
    "PROMPTS",
    "STRUCTURE",
    "Architecture",
    "Attempt",
    "AttentionSlot",
    "LayerPrefix",
    "ModelShape",
    "MultitaskPrompt",
    "Operation",
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
    "architecture_in",
]
