"""Prefix tuning: keys and values in every attention layer, free or made by a small network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from peml.errors import PemlError
from peml.prompts.base import LayerPrefix, ModelShape, Prefix, WordPromptConfig


@dataclass(frozen=True)
class PrefixTuning(WordPromptConfig):
    """Train keys and values that every query of a layer can attend to.

        attention(q, [K_l; k], [V_l; v]) in layer l, with K_l, V_l free parameters
        [K_1, V_1, .. K_L, V_L] = tanh(E W_1 + b_1) W_2 + b_2      with prefix_projection=True

    Paper: Li and Liang 2021, arXiv:2101.00190, section 4.2 for the table and 4.3 for the network; P-tuning v2,
    arXiv:2110.07602, for training the table alone.
    Departures: no position is taken by the prefix and its keys carry no rotary phase. With a prefix per task every
    task has an E of its own and the network is shared, our choice: it is most of the parameters. The network is what
    is saved; `collapse_prompt()` leaves the table.
    Init: normal with standard deviation 0.02; with the network as in PEFT, PyTorch's own of embeddings and linear
    layers. Such tokens take attention mass from the start, as in the paper: this prompt does not begin as the
    identity. From words: what the frozen model computes for them at positions -P .. -1 of a rotary model, so that it
    begins as if they stood in front of the text; at 0 .. P-1 of a model with learned positions, where the text begins
    at 0 too and only the content is that of the words. A layer with fewer tokens than the longest keeps the last.

    Args:
        num_virtual_tokens: P, one number for all layers or one per attention layer (0: none there). An encoder-decoder
            has its encoder's layers first, then of each layer of the decoder its self- and its cross-attention.
        per_task: one prefix per task instead of one that all tasks share.
        gated: carry fixed log-gates, as a prefix that was found by a search and collapsed to a table does.
        prefix_projection: make the table by a network.
        encoder_hidden_size: m, its width; of the paper's code for tables to text.
        prompt_tuning_init, prompt_tuning_init_text, tokenizer_name_or_path: the words to begin at.

    Shapes:
        keys and values of layer l: (T or 1, P, H, D); E (T or 1, P, E), W_1 (E, m), W_2 (m, sum of 2 H D over layers).

    Raises:
        PemlError: a negative length, no token at all, lengths that do not match the model's layers, or a network with
            a length per layer, gates or words.
    """

    num_virtual_tokens: int | tuple[int, ...] = 20
    per_task: bool = False
    gated: bool = False
    prefix_projection: bool = False
    encoder_hidden_size: int = 512
    prompt_tuning_init: Literal["sample_vocab", "text", "random"] = field(default="random", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_virtual_tokens, int):
            object.__setattr__(self, "num_virtual_tokens", tuple(self.num_virtual_tokens))
        lengths = self.num_virtual_tokens
        lengths = (lengths,) if isinstance(lengths, int) else lengths
        if min(lengths, default=0) < 0 or sum(lengths) == 0:
            raise PemlError(f"prompt.num_virtual_tokens must be above 0 in some layer, not {self.num_virtual_tokens}")
        if self.prefix_projection:
            self._check_projection()

    def _check_projection(self) -> None:
        if self.encoder_hidden_size < 1:
            raise PemlError(f"prompt.encoder_hidden_size must be 1 or more, not {self.encoder_hidden_size}")
        if not isinstance(self.num_virtual_tokens, int):
            raise PemlError("prompt.num_virtual_tokens must be one number for all layers with prompt.prefix_projection")
        if self.gated:
            raise PemlError("prompt.gated goes with a table, not with prompt.prefix_projection")
        if self.prompt_tuning_init != "random":
            raise PemlError(
                f'prompt.prompt_tuning_init "{self.prompt_tuning_init}" sets keys and values, which the network of '
                "prompt.prefix_projection cannot begin at: choose one of the two"
            )

    @property
    def prompt_learning_rate(self) -> float:  # type: ignore[override]
        """The paper's for its network, 5e-5; a free table takes a hundred times as much."""
        return 5e-5 if self.prefix_projection else 5e-3

    @property
    def needs_task(self) -> bool:
        """Whether the prefix differs by task."""
        return self.per_task

    def lengths(self, num_slots: int) -> tuple[int, ...]:
        """Prefix tokens per layer.

        Raises:
            PemlError: the configured lengths are for another number of layers.
        """
        given = self.num_virtual_tokens
        if isinstance(given, int):
            return (given,) * num_slots
        if len(given) != num_slots:
            raise PemlError(
                f"prompt.num_virtual_tokens has {len(given)} lengths but the model has {num_slots} attention layers"
            )
        return given

    def build(self, shape: ModelShape, num_tasks: int) -> PrefixTable | ProjectedPrefix:
        """The table of keys and values for these layers, or the network that makes it."""
        return (ProjectedPrefix if self.prefix_projection else PrefixTable)(self, shape, num_tasks)

    def num_parameters(self, shape: ModelShape, num_tasks: int) -> int:
        """2 P H D summed over layers, times T if per task; network: (T or 1) P E + (E + 1) m + (m + 1) sum 2 H D."""
        if self.prefix_projection:
            assert isinstance(self.num_virtual_tokens, int)
            m, width = self.encoder_hidden_size, sum(slot.width for slot in shape.slots)
            seeds = self.num_virtual_tokens * shape.embedding_dim * (num_tasks if self.per_task else 1)
            return seeds + (shape.embedding_dim + 1) * m + (m + 1) * width
        total = sum(p * slot.width for p, slot in zip(self.lengths(len(shape.slots)), shape.slots, strict=True))
        return total * (num_tasks if self.per_task else 1)


class PrefixTable(Prefix):
    """Keys and values as parameters of their own per layer, so that any kind of checkpointing can walk them."""

    def __init__(self, config: PrefixTuning, shape: ModelShape, num_tasks: int) -> None:
        super().__init__()
        self.needs_task = config.per_task  # type: ignore[misc]
        self.lengths = config.lengths(len(shape.slots))
        groups = num_tasks if config.per_task else 1
        self.keys = nn.ParameterDict()
        self.values = nn.ParameterDict()
        self.gated = config.gated
        for layer, (p, slot) in enumerate(zip(self.lengths, shape.slots, strict=True)):
            if p == 0:
                continue
            size = (groups, p, slot.num_heads, slot.head_dim)
            self.keys[str(layer)] = nn.Parameter(torch.randn(size) * 0.02)
            self.values[str(layer)] = nn.Parameter(torch.randn(size) * 0.02)
            if config.gated:
                self.register_buffer(f"log_gate_{layer}", torch.zeros(p))
        if config.per_task:
            layers = [str(layer) for layer, p in enumerate(self.lengths) if p]
            names = [f"{kind}.{layer}" for kind in ("keys", "values") for layer in layers]
            self.task_parameters = tuple(names)  # type: ignore[misc]

    def forward(self, present: Sequence[int] | None) -> list[LayerPrefix | None]:
        """The stored tokens of each layer, of the tasks present if there is a prefix per task."""
        return [self._layer(layer, present) if p else None for layer, p in enumerate(self.lengths)]

    def _layer(self, layer: int, present: Sequence[int] | None) -> LayerPrefix:
        gate: Tensor | None = getattr(self, f"log_gate_{layer}") if self.gated else None
        keys, values = self.keys[str(layer)], self.values[str(layer)]
        if self.needs_task:
            assert present is not None
            # Stacking views keeps each layer's graph free of saved tensors, which reentrant checkpointing needs.
            keys, values = (torch.stack([table[t] for t in present]) for table in (keys, values))
        return LayerPrefix(keys.transpose(1, 2), values.transpose(1, 2), gate)

    @torch.no_grad()
    def fill(self, layers: Sequence[LayerPrefix | None]) -> None:
        """Take over keys, values and gates computed elsewhere, of one prefix or of every task's.

        Of more tokens than a layer has it keeps the last, which are those next to the text.
        """
        for layer, (prefix, p) in enumerate(zip(layers, self.lengths, strict=True)):
            if prefix is None or p == 0:
                continue
            self.keys[str(layer)].copy_(prefix.keys[:, :, -p:].transpose(1, 2))
            self.values[str(layer)].copy_(prefix.values[:, :, -p:].transpose(1, 2))
            if prefix.log_gate is not None:
                getattr(self, f"log_gate_{layer}").copy_(prefix.log_gate)


class ProjectedPrefix(Prefix):
    """Embeddings of the prefix, one set or one per task, and the network that makes all keys and values of them."""

    generated = True

    def __init__(self, config: PrefixTuning, shape: ModelShape, num_tasks: int) -> None:
        super().__init__()
        assert isinstance(config.num_virtual_tokens, int)
        self.needs_task = config.per_task  # type: ignore[misc]
        self.shape = shape
        groups = num_tasks if config.per_task else 1
        self.embedding = nn.Parameter(torch.randn(groups, config.num_virtual_tokens, shape.embedding_dim))
        self.into, self.into_bias = _linear(shape.embedding_dim, config.encoder_hidden_size)
        self.out, self.out_bias = _linear(config.encoder_hidden_size, sum(slot.width for slot in shape.slots))
        if config.per_task:
            self.task_parameters = ("embedding",)  # type: ignore[misc]

    def forward(self, present: Sequence[int] | None) -> list[LayerPrefix | None]:
        """Keys and values of every layer, from one run of the network."""
        seeds: Tensor = self.embedding
        if self.needs_task:
            assert present is not None
            seeds = seeds[list(present)]
        flat = torch.tanh(seeds @ self.into + self.into_bias) @ self.out + self.out_bias
        blocks = torch.split(flat, [slot.width for slot in self.shape.slots], -1)
        layers: list[LayerPrefix | None] = []
        for block, slot in zip(blocks, self.shape.slots, strict=True):
            # [G, P, 2 H D] -> [2, G, H, P, D]
            both = block.view(*block.shape[:2], 2, slot.num_heads, slot.head_dim).permute(2, 0, 3, 1, 4)
            layers.append(LayerPrefix(both[0], both[1]))
        return layers

    @torch.no_grad()
    def collapse(self) -> tuple[PrefixTuning, PrefixTable]:
        """Run the network a last time and keep only its keys and values, as a plain prefix table."""
        groups, p, _ = self.embedding.shape
        config = PrefixTuning(p, per_task=self.needs_task)
        table = PrefixTable(config, self.shape, groups).to(self.embedding.device, self.embedding.dtype)
        table.fill(self(range(groups)))
        return config, table


def _linear(fan_in: int, fan_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight `[I, O]` and bias as PyTorch begins those of a linear layer: uniform within fan_in^(-1/2)."""
    bound = fan_in**-0.5
    weight, bias = torch.empty(fan_in, fan_out), torch.empty(fan_out)
    return nn.Parameter(weight.uniform_(-bound, bound)), nn.Parameter(bias.uniform_(-bound, bound))
