"""Bytes of a training step by formula; `docs/scale.md` derives them, and tests hold them to what is measured.

All of them are ours: sums over what autograd keeps and what optimisers and collectives are defined to do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

FP32 = 4
"""Bytes of a number of an adapter: PEFT keeps adapters in single precision, and so do gradients and Adam."""

ADAM_STATES = 2
"""Means of the gradient and of its square."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a decoder with gated or plain feed-forward blocks.

    Args:
        layers, hidden, intermediate, vocab: as transformers' configurations have them.
        query, key: numbers of a token's queries, and of its keys (and as many values), in one layer.
        gated: whether the feed-forward block has a gate (SwiGLU), and so four wide tensors in place of two.
    """

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    query: int
    key: int
    gated: bool = True

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """Read it from a model's configuration."""
        text: Any = config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        wide = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        # Blocks with a gate call it silu, or gelu of one of two halves; those without have one of the older names.
        gated = getattr(text, "hidden_act", "") in ("silu", "gelu_pytorch_tanh", "swish")
        return cls(text.num_hidden_layers, text.hidden_size, wide, text.vocab_size, heads * size, groups * size, gated)


@dataclasses.dataclass(frozen=True)
class Load:
    """What one device does in a step.

    Args:
        rows: B, rows of a batch on the device.
        tokens: S, of each row.
        prefix: P, keys and values before them in each layer.
        prefixes: how many there are: 1, or one for each task.
        dtype_bytes: of a number of the base's weights and activations.
        devices: N.
    """

    rows: int
    tokens: int
    prefix: int = 0
    prefixes: int = 1
    dtype_bytes: int = 2
    devices: int = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Counts of numbers: of the frozen base, of its largest layer, and of what is trained."""

    base: int
    layer: int
    trained: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bytes on one device."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    cache: int

    def total(self, checkpointing: bool) -> int:
        """Of a training step; the cache is of generation, and not in it."""
        kept = self.checkpointed if checkpointing else self.activations
        return self.weights + self.adapter + self.gradients + self.optimizer + kept


def memory(shape: Shape, sizes: Sizes, load: Load, sharded: bool = False) -> Costs:
    """Bytes that one device holds.

        weights      W b               sharded: W b / N + layer b
        adapter      4 A               gradients 4 A, optimizer 8 A; each / N where sharded
        activations  L a + head        checkpointed  L B S h b + a + head
        cache        2 L key b (B S + P prefixes)

    with a the bytes that autograd keeps of one layer (`layer_activations`), and head those of the logits.

    Args:
        shape: of the model.
        sizes: of weights and adapter.
        load: of a step.
        sharded: FSDP2 over all devices, of the base and the adapter; else each device has all of them.
    """
    parts = load.devices if sharded else 1
    own = -(-sizes.trained // parts)
    weights = -(-sizes.base // parts) + (sizes.layer if sharded else 0)
    one, head = layer_activations(shape, load), head_activations(shape, load)
    begin = load.rows * load.tokens * shape.hidden * load.dtype_bytes
    cache = 2 * shape.layers * shape.key * (load.rows * load.tokens + load.prefix * load.prefixes)
    return Costs(
        weights=weights * load.dtype_bytes,
        adapter=own * FP32,
        gradients=own * FP32,
        optimizer=own * FP32 * ADAM_STATES,
        activations=shape.layers * one + head,
        checkpointed=shape.layers * begin + one + head,
        cache=cache * load.dtype_bytes,
    )


def layer_activations(shape: Shape, load: Load) -> int:
    """Bytes that autograd keeps of one layer whose linears are frozen and have a low-rank adapter.

        B S [b (2 h + 3 query + 2 key + m I) + 8 h] + 2 b B P key,   m = 4 with a gate, 2 without

    The inputs of both groups of linears (2 h), queries, the output of attention and what the output projection reads
    of it (3 query), keys and values with the prefix before them, the wide tensors of the feed-forward block, and the
    inputs of both norms in single precision (8 h).
    """
    b = load.dtype_bytes
    wide = (4 if shape.gated else 2) * shape.intermediate
    token = b * (2 * shape.hidden + 3 * shape.query + 2 * shape.key + wide) + 2 * FP32 * shape.hidden
    return load.rows * load.tokens * token + 2 * b * load.rows * load.prefix * shape.key


def head_activations(shape: Shape, load: Load) -> int:
    """Bytes of the logits of all positions, and of the last norm's input: `B S (b V + 4 h)`."""
    return load.rows * load.tokens * (load.dtype_bytes * shape.vocab + FP32 * shape.hidden)


def communication(sizes: Sizes, load: Load) -> dict[str, int]:
    """Bytes that one device sends in a step, by ring collectives.

        DDP    2 (N - 1) / N  4 A
        FSDP2  (N - 1) / N (2 W b + 3 * 4 A)

    DDP reduces the gradients to all. FSDP2 gathers base and adapter for the forward pass and again for the backward
    pass, and reduces the adapter's gradients and scatters them. What is
    frozen has no gradient, and is never sent by DDP.
    """
    share = (load.devices - 1) / load.devices
    gathered = 2 * (sizes.base * load.dtype_bytes + sizes.trained * FP32)
    return {
        "ddp": round(share * 2 * sizes.trained * FP32),
        "fsdp2": round(share * (gathered + sizes.trained * FP32)),
    }
