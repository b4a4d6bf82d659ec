"""Keys that move along a text: a stock prefix takes positions, ours takes none.

    R(a) q . R(b) k depends on b - a alone, hence q at i with k at j  =  q at i + n with R(n) k at j + n

A prefix of P tokens in PEFT stands at positions 0 .. P-1 and the text begins at P, so that a key of ours is turned by
P to go there, and by -P to come back. Which numbers of a head turn, how fast, and in which pairs, differs by model and
by layer. It is not read from the model's code but found: the model itself turns keys where soft tokens move.

Letters: `H` key/value heads, `P` tokens, `D` head size, `F` frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peml.attention import changing_rope, evaluating, is_rotary, soft
from peml.errors import PemlError
from peml.prompts import LayerPrefix
from peml.routing import Forward

_SHIFT, _TOKENS = 17, 6
"""Positions that the probe moves by, far enough to tell frequencies apart, and how many tokens it has."""


class Turn(NamedTuple):
    """How a layer turns its keys.

    Args:
        frequencies: `[F]`, radians per position; none in a layer without positions.
        paired: whether neighbours turn together; otherwise a number of the first half with one of the second.
    """

    frequencies: Tensor
    paired: bool = False

    def by(self, keys: Tensor, positions: int) -> Tensor:
        """Keys `[..., D]`, moved by so many positions; computed in double precision."""
        f = len(self.frequencies)
        turned, rest = torch.split(keys.double(), [2 * f, keys.shape[-1] - 2 * f], dim=-1)
        angle = self.frequencies.to(keys.device) * positions
        cos, sin = angle.cos(), angle.sin()
        x, y = (turned[..., 0::2], turned[..., 1::2]) if self.paired else (turned[..., :f], turned[..., f:])
        x, y = x * cos - y * sin, y * cos + x * sin
        turned = torch.stack([x, y], dim=-1).flatten(-2) if self.paired else torch.cat([x, y], dim=-1)
        return torch.cat([turned, rest], dim=-1).to(keys.dtype)


def check_decoder(model: Any) -> None:
    """Refuse a model whose text PEFT would not put a prompt in front of as we do.

    Raises:
        PemlError: it has an encoder.
    """
    host = getattr(model, "prompt_host", None)  # which knows better, once there is one
    encoder = soft.encodes_first(model) or not model.can_generate() if host is None else soft.sees_ahead(model, host)
    if encoder:
        raise PemlError(
            f"{type(model).__name__} is no decoder, and prompts of stock PEFT are read and written for those"
        )


def check_turning(model: nn.Module) -> None:
    """Refuse a model in which a prefix cannot be moved.

    Raises:
        PemlError: it is not rotary, or its rotary positions change with the length of the text.
    """
    name, kind = type(model).__name__, changing_rope(model)
    if not is_rotary(model):
        raise PemlError(
            f"{name} has no rotary positions: with a stock prefix of P tokens its text begins at position P, with ours "
            "at 0, and no keys make up for that; a prompt at the input (PromptTuning) can go both ways"
        )
    if kind is not None:
        raise PemlError(
            f"the rotary positions of {name} ({kind}) change with the length of the text, which a stock prefix makes "
            "longer: no keys make up for that"
        )


@torch.no_grad()
def turns(model: Any) -> list[Turn]:
    """How each attention layer of a model turns its keys; its attention must go through the twin.

    Raises:
        PemlError: the model cannot move a prefix, or turns keys in a way of its own.
    """
    check_turning(model)
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.shape[0], (_TOKENS,), generator=generator)
    words = embeddings[ids.to(embeddings.device)][None]
    with evaluating(model):
        here, there = (soft.run(model, words, Forward(model=model), first) for first in (0, _SHIFT))
    kinds = list(_kinds(model))
    # The two runs differ by rounding, which grows with depth; a wrong kind by 0.1 or more.
    bound = 1e-2 if torch.finfo(embeddings.dtype).bits >= 32 else 1e-1
    found = []
    for slot in range(len(here)):
        fitting = [kind for kind in kinds if 2 * len(kind.frequencies) <= here[slot].keys.shape[-1]]
        errors = [_distance(kind.by(here[slot].keys, _SHIFT), there[slot].keys) for kind in fitting]
        best = min(range(len(errors)), key=errors.__getitem__)
        if errors[best] > bound:
            raise PemlError(
                f"{type(model).__name__} turns the keys of attention layer {slot} by position in a way that is not "
                f"known here (off by {errors[best]:.1e}): a stock prefix cannot be made of ours, nor ours of it"
            )
        found.append(fitting[best])
    return found


def moved(layers: list[LayerPrefix], kinds: list[Turn], positions: int) -> list[LayerPrefix]:
    """The keys of every layer, moved by so many positions."""
    return [layer._replace(keys=kind.by(layer.keys, positions)) for layer, kind in zip(layers, kinds, strict=True)]


def _kinds(model: nn.Module) -> Iterator[Turn]:
    """No turning at all, and every set of frequencies in the model, in both pairings."""
    yield Turn(torch.zeros(0, dtype=torch.float64))
    seen: set[tuple[float, ...]] = set()
    for name, buffer in model.named_buffers():
        frequencies = buffer.detach().double().cpu()
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq") or frequencies.ndim != 1:
            continue
        if (key := tuple(frequencies.tolist())) not in seen:
            seen.add(key)
            yield Turn(frequencies)
            yield Turn(frequencies, paired=True)


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).norm() / right.double().norm())
