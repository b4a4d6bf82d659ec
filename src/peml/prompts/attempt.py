"""ATTEMPT: a prompt per text, mixed from frozen prompts of source tasks by attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peml.errors import PemlError
from peml.prompts.base import ModelShape, SoftPrompt, Texts, WordPromptConfig, check_length


@dataclass(frozen=True)
class Attempt(WordPromptConfig):
    """Add to a task's prompt a mixture of itself and of frozen source prompts, weighted by the text.

        x = max_s embed(text)_s         h = LN(W_up SiLU(W_down x))
        a = softmax_j(max_p Q_jp . h / tau), j over sources and the task's own
        Q(text) = Q_t + sum_j a_j Q_j

    Paper: Asai et al. 2022, arXiv:2205.11961, section 3; constants as in its official code.
    Departures: the maximum ignores padding, and the answer: a causal model has both in one text, and is told by
    `input_mask=` which tokens may be read. The attention begins afresh, not from training on the sources.

    Args:
        num_virtual_tokens: P.
        num_sources: m; the regime `distil_then_adapt` trains as many prompts as it has sources and puts them here.
        projection_dim: width of the attention's bottleneck.
        temperature: tau.
        prompt_tuning_init, prompt_tuning_init_text, tokenizer_name_or_path: the words that the tasks' prompts begin at.

    Shapes:
        Q (T, P, E), sources (m, P, E) frozen, W_down (100, E), W_up (E, 100), LN 2 E.

    Raises:
        PemlError: a size below 1, a temperature of 0, an unknown init, or a text without its init.
    """

    prompt_learning_rate: ClassVar[float] = 5e-2  # our choice: 0.1 and 0.03 were best on two small models, see LOG.md

    num_virtual_tokens: int = 100
    num_sources: int = 6
    projection_dim: int = 100
    temperature: float = 2087.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.num_virtual_tokens)
        for name in ("num_sources", "projection_dim"):
            if getattr(self, name) < 1:
                raise PemlError(f"prompt.{name} must be 1 or more, not {getattr(self, name)}")
        if not self.temperature > 0:
            raise PemlError(f"prompt.temperature must be above 0, not {self.temperature}")

    @property
    def needs_task(self) -> bool:
        """Always: every task has a prompt of its own."""
        return True

    @property
    def at_input(self) -> bool:
        """Whether it is made of input embeddings, not of keys and values."""
        return True

    def build(self, shape: ModelShape, num_tasks: int) -> AttendedTokens:
        """Prompts and attention, for a model of this shape."""
        return AttendedTokens(self, shape, num_tasks)

    def num_parameters(self, shape: ModelShape, num_tasks: int) -> int:
        """T P E + 2 E (100 + 1); the sources are frozen."""
        width = shape.embedding_dim
        return num_tasks * self.num_virtual_tokens * width + 2 * width * (self.projection_dim + 1)


class AttendedTokens(SoftPrompt):
    """The tasks' prompts, stacked, the frozen sources, and the attention that all tasks share."""

    needs_task = True
    reads_input = True
    task_parameters = ("tokens",)
    sources: Tensor

    def __init__(self, config: Attempt, shape: ModelShape, num_tasks: int) -> None:
        super().__init__()
        p, width, middle = config.num_virtual_tokens, shape.embedding_dim, config.projection_dim
        self.temperature = config.temperature
        self.tokens = nn.Parameter(torch.randn(num_tasks, p, width) * 0.02)
        self.register_buffer("sources", torch.randn(config.num_sources, p, width) * 0.02)
        self.down = nn.Parameter(torch.randn(middle, width) / math.sqrt(width))
        self.up = nn.Parameter(torch.randn(width, middle) / math.sqrt(middle))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))

    def forward(self, present: Sequence[int] | None, texts: Texts | None = None) -> Tensor:
        """Q of every text, `[B, P, E]`."""
        assert present is not None and texts is not None
        own = self.tokens[list(present)][texts.group]
        weights = self.attention(own, texts)
        mixed = torch.tensordot(weights[:, :-1], self.sources.to(own.dtype), dims=1)
        whole: Tensor = own * (1 + weights[:, -1, None, None]) + mixed
        return whole

    def attention(self, own: Tensor, texts: Texts) -> Tensor:
        """a, `[B, m + 1]`, the task's own prompt last.

        Shapes:
            own: `[B, P, E]`.
        """
        embedded = texts.embedded.to(self.down.dtype)
        x = embedded.masked_fill(~texts.mask[..., None], -torch.inf).amax(1)
        h = F.silu(x @ self.down.T) @ self.up.T
        h = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias)
        of_sources = h @ self.sources.to(h.dtype).amax(1).T
        of_own = (own.amax(1) * h).sum(-1, keepdim=True)
        scores = torch.cat([of_sources, of_own], dim=-1) / self.temperature
        return scores.softmax(-1)

    @torch.no_grad()
    def start_from(self, words: Tensor) -> None:
        """Begin at these words, every task's prompt at the same."""
        self.tokens.copy_(words)
