"""What every prompt gives to attention: keys and values in front of a layer's own, each with a log-gate.

    softmax([scale q K' + log g, scale q k' + mask]) [V; v]

A log-gate of 0 is an ordinary token, minus infinity removes it exactly. A `Prefix` has keys and values of its own;
they carry no rotary phase, so they are a set: any of them can be dropped, and every layer has its own number.
A `SoftPrompt` has embeddings in front of the text, of which the model itself makes keys and values, once per step.

Letters: `P` prefix tokens, `H` key/value heads, `D` head size, `L` attention layers ("slots"), `T` tasks,
`E` width of the input embeddings, `B` rows, `S` tokens of a text,
`G` distinct tasks present in the batch (1 for a prompt that all tasks share).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from peml.errors import PemlError


@dataclass(frozen=True)
class AttentionSlot:
    """Key/value shape of one attention layer: H heads of size D."""

    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers that one prefix token stores in this layer: key and value."""
        return 2 * self.num_heads * self.head_dim


@dataclass(frozen=True)
class ModelShape:
    """What a prompt has to fit: the attention layers of a model, and the width E of its input embeddings."""

    slots: tuple[AttentionSlot, ...]
    embedding_dim: int


class LayerPrefix(NamedTuple):
    """Learned tokens of one layer, for the tasks present.

    Shapes:
        keys, values: `[G, H, P, D]`, or `[B, H, P, D]` of a prompt that reads the rows.
        log_gate: `[P]`, or None when every gate is 0.
    """

    keys: Tensor
    values: Tensor
    log_gate: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """P."""
        return self.keys.shape[2]

    def side_by_side(self) -> SideBySide:
        """Those of all G tasks in one, `[1, H, G P, D]`: for rows that pack several tasks."""
        groups, heads, tokens, size = self.keys.shape
        keys, values = (t.transpose(0, 1).reshape(1, heads, groups * tokens, size) for t in self[:2])
        return SideBySide(keys, values, None if self.log_gate is None else self.log_gate.repeat(groups))


class SideBySide(LayerPrefix):
    """The prefixes of all tasks present, one beside the other, of which a token sees its own task's."""


class Prompt(nn.Module, ABC):
    """The trainable tensors of one prompt."""

    needs_task: ClassVar[bool] = False
    task_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of parameters with one row per task, `[T, ...]`."""
    generated: ClassVar[bool] = False
    """Whether all layers' prefixes hang on one graph, which reentrant checkpointing cannot walk repeatedly."""

    def architecture_parameters(self) -> list[nn.Parameter]:
        """Parameters that choose a structure; they get an optimiser group of their own."""
        return []

    def penalties(self) -> Mapping[str, Tensor]:
        """Terms to add to the loss, weighted, by name."""
        return {}

    def set_progress(self, fraction: float) -> None:
        """Told at the start of each step how much of the training is done, from 0 to 1."""


class Prefix(Prompt):
    """A prompt with keys and values of its own."""

    @abstractmethod
    def forward(self, present: Sequence[int] | None) -> list[LayerPrefix | None]:
        """One prefix per attention slot (None: no tokens there), computed once per step.

        Args:
            present: the distinct tasks in the batch; None only if the prompt needs no task.
        """


class Texts(NamedTuple):
    """The texts of a batch, for a prompt that reads them.

    Args:
        embedded: `[B, S, E]`.
        mask: `[B, S]`, which tokens to read.
        group: `[B]`, place of each row's task among those present.
    """

    embedded: Tensor
    mask: Tensor
    group: Tensor


class SoftPrompt(Prompt):
    """A prompt of input embeddings, which the model reads as if they stood before the text."""

    generated = True
    reads_input: ClassVar[bool] = False
    """Whether every row has a prompt of its own, made from its text."""

    @abstractmethod
    def forward(self, present: Sequence[int] | None, texts: Texts | None = None) -> Tensor:
        """Embeddings of the prompt, `[G, P, E]`, or `[B, P, E]` if it reads the texts.

        Args:
            present: the distinct tasks in the batch; None only if the prompt needs no task.
            texts: the batch; None unless the prompt reads it.
        """

    @abstractmethod
    def start_from(self, words: Tensor) -> None:
        """Begin at these embeddings of words, `[P, E]`."""


@dataclass(frozen=True)
class PromptConfig(ABC):
    """Settings of a prompt; builds its `Prompt` for the attention slots of a model."""

    prompt_learning_rate: ClassVar[float]
    """For AdamW, where a recipe gives none."""
    task_rate_factor: ClassVar[float] = 1.0
    """Learning rate of what belongs to single tasks, over that of the rest."""
    architecture_learning_rate: ClassVar[float] = 3e-3
    """For parameters that choose a structure; our choice."""

    @property
    def needs_task(self) -> bool:
        """Whether the prefix differs by task."""
        return False

    @property
    def at_input(self) -> bool:
        """Whether it is made of input embeddings, not of keys and values."""
        return False

    def fitted(self, shape: ModelShape) -> PromptConfig:
        """The settings as they are on a model of this shape, where they depend on it; these are stored."""
        return self

    @abstractmethod
    def build(self, shape: ModelShape, num_tasks: int) -> Prompt:
        """The prompt of a model of this shape."""

    @abstractmethod
    def num_parameters(self, shape: ModelShape, num_tasks: int) -> int:
        """Trainable numbers, by the paper's formula."""


@dataclass(frozen=True)
class WordPromptConfig(PromptConfig):
    """Settings of a prompt that can begin at words of the model's vocabulary; names as in PEFT's prompt tuning.

    Args:
        prompt_tuning_init: "sample_vocab" (words drawn at random), "text" (those of a text, repeated or cut to the
            length), or "random" (no words: small normal numbers).
        prompt_tuning_init_text: the text.
        tokenizer_name_or_path: what makes tokens of it; None: the base model's own.
    """

    num_virtual_tokens: int | tuple[int, ...]
    prompt_tuning_init: Literal["sample_vocab", "text", "random"] = field(default="sample_vocab", kw_only=True)
    prompt_tuning_init_text: str | None = field(default=None, kw_only=True)
    tokenizer_name_or_path: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.prompt_tuning_init not in ("sample_vocab", "text", "random"):
            raise PemlError(
                f"prompt.prompt_tuning_init must be sample_vocab, text or random, not {self.prompt_tuning_init!r}"
            )
        if (self.prompt_tuning_init == "text") != bool(self.prompt_tuning_init_text):
            raise PemlError('prompt.prompt_tuning_init_text goes with prompt_tuning_init="text", and not without')


def check_length(num_virtual_tokens: int) -> None:
    """Refuse a prompt without tokens.

    Raises:
        PemlError: naming the setting.
    """
    if num_virtual_tokens < 1:
        raise PemlError(f"prompt.num_virtual_tokens must be 1 or more, not {num_virtual_tokens}")
