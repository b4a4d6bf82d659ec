"""Multitask prompt tuning (MPT): one prompt for all tasks, times a low-rank matrix per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peml.errors import PemlError
from peml.prompts.base import (
    LayerPrefix,
    ModelShape,
    Prefix,
    Prompt,
    SoftPrompt,
    Texts,
    WordPromptConfig,
    check_length,
)


@dataclass(frozen=True)
class MultitaskPrompt(WordPromptConfig):
    """Train one prompt that every task multiplies by a low-rank matrix of its own.

        Q_t = Q .* (U_t V_t)                         at the input, as in the paper
        K_tl = K_l .* (U_tl V_tl), V_tl likewise     with deep=True

    Paper: Wang et al. 2023, arXiv:2303.02861, section 3.1, with rank 1; the way it is trained there is the regime
    `distil_then_adapt`.
    Departures, our choice: U_t and V_t begin near R^(-1/2), so that U_t V_t begins near 1; small normal factors, as in
    PEFT, multiply prompt and gradient by some 4e-4. Any rank; the deep form.

    Args:
        num_virtual_tokens: P.
        num_ranks: R.
        deep: learn keys and values in every layer instead of embeddings at the input.
        prompt_tuning_init, prompt_tuning_init_text, tokenizer_name_or_path: the words that Q, or K and V, begin at.

    Shapes:
        Q (P, E), U (T, P, R), V (T, R, E); deep, per layer: (2, P, H D), (T, 2, P, R), (T, 2, R, H D).

    Raises:
        PemlError: no token, a rank below 1, an unknown init, or a text without its init.
    """

    prompt_learning_rate: ClassVar[float] = 5e-2  # our choice: 0.1 and 0.03 were best on two small models, see LOG.md
    task_rate_factor: ClassVar[float] = 4 / 3  # 0.4 against 0.3 in the paper's adaptation to target tasks

    num_virtual_tokens: int = 100
    num_ranks: int = 1
    deep: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.num_virtual_tokens)
        if self.num_ranks < 1:
            raise PemlError(f"prompt.num_ranks must be 1 or more, not {self.num_ranks}")

    @property
    def needs_task(self) -> bool:
        """Always: every task has factors of its own."""
        return True

    @property
    def at_input(self) -> bool:
        """Whether it is made of input embeddings, not of keys and values."""
        return not self.deep

    def build(self, shape: ModelShape, num_tasks: int) -> Prompt:
        """The shared prompt and the factors of every task."""
        kind = DeepMultitaskTokens if self.deep else MultitaskTokens
        return kind(self, shape, num_tasks)

    def num_parameters(self, shape: ModelShape, num_tasks: int) -> int:
        """P E + T R (P + E); deep: the same with H D for E, twice per layer."""
        p, widths = self.num_virtual_tokens, [shape.embedding_dim]
        if self.deep:
            widths = [slot.width // 2 for slot in shape.slots for _ in ("keys", "values")]
        return sum(p * width + num_tasks * self.num_ranks * (p + width) for width in widths)


class MultitaskTokens(SoftPrompt):
    """Embeddings of the prompt, shared, and their factors, stacked over tasks."""

    needs_task = True
    task_parameters = ("by_token", "by_feature")

    def __init__(self, config: MultitaskPrompt, shape: ModelShape, num_tasks: int) -> None:
        super().__init__()
        p, r, width = config.num_virtual_tokens, config.num_ranks, shape.embedding_dim
        self.shared = nn.Parameter(torch.randn(p, width) * 0.02)
        self.by_token = nn.Parameter(near_one(num_tasks, p, r, rank=r))
        self.by_feature = nn.Parameter(near_one(num_tasks, r, width, rank=r))

    def forward(self, present: Sequence[int] | None, texts: Texts | None = None) -> Tensor:
        """Q .* (U_t V_t) of the tasks present."""
        assert present is not None
        rows = list(present)
        return self.shared * (self.by_token[rows] @ self.by_feature[rows])

    @torch.no_grad()
    def start_from(self, words: Tensor) -> None:
        """Begin at these words."""
        self.shared.copy_(words)


class DeepMultitaskTokens(Prefix):
    """Keys and values of every layer, shared, and their factors, stacked over tasks."""

    needs_task = True
    generated = True

    def __init__(self, config: MultitaskPrompt, shape: ModelShape, num_tasks: int) -> None:
        super().__init__()
        self.slots = shape.slots
        p, r = config.num_virtual_tokens, config.num_ranks
        self.shared, self.by_token, self.by_feature = (nn.ParameterDict() for _ in range(3))
        for layer, slot in enumerate(shape.slots):
            width = slot.width // 2
            self.shared[str(layer)] = nn.Parameter(torch.randn(2, p, width) * 0.02)
            self.by_token[str(layer)] = nn.Parameter(near_one(num_tasks, 2, p, r, rank=r))
            self.by_feature[str(layer)] = nn.Parameter(near_one(num_tasks, 2, r, width, rank=r))
        factors = [f"{name}.{layer}" for name in ("by_token", "by_feature") for layer in range(len(shape.slots))]
        self.task_parameters = tuple(factors)  # type: ignore[misc]

    def forward(self, present: Sequence[int] | None) -> list[LayerPrefix | None]:
        """Keys and values of the tasks present."""
        assert present is not None
        rows, layers = list(present), []
        for layer, slot in enumerate(self.slots):
            key = str(layer)
            both = self.shared[key] * (self.by_token[key][rows] @ self.by_feature[key][rows])
            # [G, 2, P, H D] -> [2, G, H, P, D]
            both = both.view(*both.shape[:3], slot.num_heads, slot.head_dim).permute(1, 0, 3, 2, 4)
            layers.append(LayerPrefix(both[0], both[1]))
        return list(layers)

    @torch.no_grad()
    def fill(self, layers: Sequence[LayerPrefix | None]) -> None:
        """Begin at keys and values computed elsewhere, `[1, H, P, D]` per layer."""
        for layer, prefix in enumerate(layers):
            assert prefix is not None
            both = torch.stack([prefix.keys[0], prefix.values[0]])
            self.shared[str(layer)].copy_(both.transpose(1, 2).flatten(2))


def near_one(*shape: int, rank: int) -> Tensor:
    """Factors whose product over `rank` is about 1, no two of them alike."""
    return torch.randn(shape) * 0.02 + 1 / math.sqrt(rank)
