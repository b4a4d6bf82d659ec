"""Prompt tuning: soft tokens in front of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peml.prompts.base import ModelShape, SoftPrompt, Texts, WordPromptConfig, check_length


@dataclass(frozen=True)
class PromptTuning(WordPromptConfig):
    """Train embeddings that the model reads as if they stood in front of the text.

        model([Q; embed(x)]), with Q free parameters

    Paper: Lester et al. 2021, arXiv:2104.08691, section 2.
    Computed otherwise, with the same result in causal models of full attention: the model runs over Q alone, once per
    step and task, and its keys and values are a prefix; text does not get longer, nor do the logits. In layers with a
    sliding window Q stays in sight, as a prefix does, where a prepended prompt would not.
    Init: words of the vocabulary, as in the paper.

    Args:
        num_virtual_tokens: P.
        per_task: one prompt per task instead of one that all tasks share.
        prompt_tuning_init, prompt_tuning_init_text, tokenizer_name_or_path: the words to begin at.

    Shapes:
        Q (T or 1, P, E).

    Raises:
        PemlError: no token, an unknown init, or a text without its init.
    """

    prompt_learning_rate: ClassVar[float] = 5e-2  # our choice: 0.1 and 0.03 were best on two small models, see LOG.md

    num_virtual_tokens: int = 100
    per_task: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.num_virtual_tokens)

    @property
    def needs_task(self) -> bool:
        """Whether the prompt differs by task."""
        return self.per_task

    @property
    def at_input(self) -> bool:
        """Whether it is made of input embeddings, not of keys and values."""
        return True

    def build(self, shape: ModelShape, num_tasks: int) -> SoftTokens:
        """The embeddings, for a model of this shape."""
        return SoftTokens(self, shape, num_tasks)

    def num_parameters(self, shape: ModelShape, num_tasks: int) -> int:
        """P E, times T if per task."""
        return self.num_virtual_tokens * shape.embedding_dim * (num_tasks if self.per_task else 1)


class SoftTokens(SoftPrompt):
    """One prompt, or one per task, stacked."""

    def __init__(self, config: PromptTuning, shape: ModelShape, num_tasks: int) -> None:
        super().__init__()
        self.needs_task = config.per_task  # type: ignore[misc]
        groups = num_tasks if config.per_task else 1
        self.tokens = nn.Parameter(torch.randn(groups, config.num_virtual_tokens, shape.embedding_dim) * 0.02)
        if config.per_task:
            self.task_parameters = ("tokens",)  # type: ignore[misc]

    def forward(self, present: Sequence[int] | None, texts: Texts | None = None) -> Tensor:
        """Q of the tasks present."""
        if not self.needs_task:
            return self.tokens
        assert present is not None
        return self.tokens[list(present)]

    @torch.no_grad()
    def start_from(self, words: Tensor) -> None:
        """Begin at these words, every task's prompt at the same."""
        self.tokens.copy_(words)
