"""The structure that a prefix search finds, and its file: what is transferred to other tasks and other models."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from peml.errors import PemlError
from peml.prompts.operations import check_known

if TYPE_CHECKING:
    from peml.prompts.base import ModelShape
    from peml.prompts.prefix_nas import PrefixNAS

FORMAT, VERSION = "peml-arch", 1


STRUCTURE = ("choice", "head_choice", "kept", "alpha", "head_alpha", "token_gate", "layer_gate")
"""Tensors of a generator's state that say its architecture."""


@dataclass(frozen=True)
class Architecture:
    """What a search found; all that another training needs to do without one.

    Args:
        operations: one name per cell.
        tokens: kept tokens per attention layer.
        derived: whether the search is over; otherwise the operations are those of the largest weight so far.
        num_virtual_tokens: P of the search: tokens are numbered from 0 to P - 1.
        width, embedding_dim: h and d_e of the generator.
        head_rank: q of its head.
        relaxation: of the search.
        candidates: operations that each cell chose from; empty where nothing was searched.
        alpha: their architecture parameters, one row per cell, to look at.
        gates: of all tokens, one row per layer, from 0 to 1, to look at.
        origin: where it was found: base model, tasks, seed, steps, gap and cost of the search.

    Raises:
        PemlError: sizes below 1, tokens that are not in the order of 0 .. P - 1, no token, an unknown operation.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    operations: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    derived: bool
    num_virtual_tokens: int
    width: int
    embedding_dim: int
    head_rank: int
    relaxation: str | None = None
    candidates: tuple[str, ...] = ()
    alpha: tuple[tuple[float, ...], ...] = ()
    gates: tuple[tuple[float, ...], ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "width", "embedding_dim", "head_rank"):
            if getattr(self, name) < 1:
                raise PemlError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not self.operations:
            raise PemlError("operations must name one for each cell")
        check_known(self.operations, "operations")
        for layer, row in enumerate(self.tokens):
            if list(row) != sorted(set(row)) or (row and not 0 <= row[0] <= row[-1] < self.num_virtual_tokens):
                raise PemlError(
                    f"tokens of layer {layer} must be distinct numbers below {self.num_virtual_tokens}, in order, "
                    f"not {list(row)}"
                )
        if not any(self.tokens):
            raise PemlError("tokens must keep one in some layer")
        self._check_views()

    def _check_views(self) -> None:
        for name, rows, number, each, size in (
            ("alpha", self.alpha, len(self.operations), "cells", len(self.candidates)),
            ("gates", self.gates, len(self.tokens), "layers", self.num_virtual_tokens),
        ):
            if rows and (len(rows) != number or any(len(row) != size for row in rows)):
                raise PemlError(f"{name} must have {size} numbers for each of {number} {each}, or be empty")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Prefix length per layer."""
        return tuple(len(row) for row in self.tokens)

    @property
    def used(self) -> tuple[int, ...]:
        """Tokens that some layer keeps."""
        return tuple(sorted({token for row in self.tokens for token in row}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as in the file."""
        whole = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self), "lengths": self.lengths}
        plain: dict[str, Any] = json.loads(json.dumps(whole))
        return plain

    @classmethod
    def from_dict(cls, data: Any, source: str = "architecture") -> Architecture:
        """The inverse of `to_dict`.

        Args:
            data: a mapping.
            source: what an error names, e.g. the file.

        Raises:
            PemlError: naming the source and the key that is missing, unknown or wrong.
        """
        if not isinstance(data, Mapping):
            raise PemlError(f"{source} must be a mapping of an architecture, not {type(data).__name__}")
        fields = {key: value for key, value in data.items() if key not in ("format", "version", "lengths")}
        if data.get("format", FORMAT) != FORMAT:
            raise PemlError(f"{source}: format is {data['format']!r}, and an architecture's is {FORMAT!r}")
        if data.get("version", VERSION) != VERSION:
            raise PemlError(f"{source}: version is {data['version']!r}, and this peml reads {VERSION}: update it")
        try:
            # As text, because strict types know that JSON has lists alone.
            found: Architecture = _adapter().validate_json(json.dumps(fields))
            json.dumps(found.origin, allow_nan=False)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise PemlError(f"{source}: {f'{key}: ' if key else ''}{_sentence(first)}") from None
        except (TypeError, ValueError) as error:
            raise PemlError(f"{source} is no plain JSON ({error})") from None
        return found

    def save(self, path: str | Path) -> Path:
        """Write the file in one step."""
        path = Path(path).expanduser()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Architecture:
        """Read a file.

        Raises:
            PemlError: there is none, or naming the key that is damaged.
        """
        path = Path(path).expanduser()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PemlError(f"there is no architecture file {path}") from None
        except OSError as error:
            raise PemlError(f"{path} cannot be read ({error.strerror}): give an architecture file") from None
        except (ValueError, RecursionError) as error:
            raise PemlError(f"{path} is not JSON ({error}): give an architecture file of peml") from None
        if isinstance(data, dict) and data.get("format") is None:
            raise PemlError(f"{path}: format is missing, and an architecture's is {FORMAT!r}")
        return cls.from_dict(data, str(path))

    def resampled(self, num_layers: int) -> Architecture:
        """The same for a model of another depth: every layer takes the tokens of the one at its relative depth.

        Should all that have any be skipped, the tokens of the longest go to the layer at its relative depth.
        """
        before = len(self.tokens)
        if num_layers == before:
            return self
        source = [int((layer + 0.5) * before / num_layers) for layer in range(num_layers)]
        if not any(self.tokens[layer] for layer in source):
            longest = max(range(before), key=lambda layer: len(self.tokens[layer]))
            source[int((longest + 0.5) * num_layers / before)] = longest
        gates = tuple(self.gates[layer] for layer in source) if self.gates else ()
        return dataclasses.replace(self, tokens=tuple(self.tokens[layer] for layer in source), gates=gates)

    @classmethod
    def random(cls, config: PrefixNAS, shape: ModelShape, seed: int) -> Architecture:
        """One drawn from the space of a search and within its budget: the control that a search has to beat.

        Operations and the rank of the head are uniform; so are the lengths, over all that use up the budget.

        Args:
            config: the search.
            shape: of the model.
            seed: of the draw alone; torch's generator is left as it is.
        """
        draw = random.Random(seed)
        p, widths = config.num_virtual_tokens, [slot.width for slot in shape.slots]
        lengths = _random_lengths(config.lengths_allowed(), widths, config.budget(shape), draw)
        return cls(
            operations=tuple(draw.choice(config.operations) for _ in range(config.num_cells)),
            tokens=tuple(tuple(sorted(draw.sample(range(p), length))) for length in lengths),
            derived=True,
            num_virtual_tokens=p,
            width=config.width,
            embedding_dim=config.embedding_dim,
            head_rank=draw.choice(config.ranks),
            origin={"random": seed},
        )


def _random_lengths(allowed: Sequence[int], widths: Sequence[int], budget: float, draw: random.Random) -> list[int]:
    """Lengths drawn uniformly among those of the largest cost within the budget; at least one token."""

    @cache
    def ways(layer: int) -> dict[int, int]:
        """Of the layers from this one on: how many choices of lengths have each cost."""
        if layer == len(widths):
            return {0: 1}
        found: dict[int, int] = {}
        for cost, number in ways(layer + 1).items():
            for length in allowed:
                total = cost + length * widths[layer]
                if total <= budget:
                    found[total] = found.get(total, 0) + number
        return found

    left = max(ways(0), default=0)
    if left == 0:
        # Not even one fits: then the cheapest that there is, in some layer, as a search keeps one.
        length, cheapest = min(n for n in allowed if n), min(widths)
        place = draw.choice([layer for layer, width in enumerate(widths) if width == cheapest])
        return [length if layer == place or 0 not in allowed else 0 for layer in range(len(widths))]
    lengths = []
    for layer, width in enumerate(widths):
        options = [n for n in allowed if left - n * width in ways(layer + 1)]
        weights = [ways(layer + 1)[left - n * width] for n in options]
        lengths.append(draw.choices(options, [w / sum(weights) for w in weights])[0])
        left -= lengths[-1] * width
    return lengths


@cache
def _adapter() -> TypeAdapter[Architecture]:
    return TypeAdapter(Architecture)


def _sentence(problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return "is no key of an architecture"
    return f"{problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def architecture_in(config: PrefixNAS, state: Mapping[str, Tensor]) -> Architecture:
    """The architecture that a generator's state holds; of its tensors those in `STRUCTURE` are read.

    Args:
        config: of the generator.
        state: by name; those that a search does not have are missing.
    """
    if config.found is not None:
        return config.found
    own = {name: state[name].detach().cpu().double() for name in STRUCTURE if name in state}
    choice, head_choice = own["choice"].long().tolist(), int(own["head_choice"])
    derived = choice[0] >= 0
    if not derived:
        choice = own["alpha"].argmax(-1).tolist()
        head_choice = int(own["head_alpha"].argmax()) if "head_alpha" in own else 0
    gates = own["kept"].new_ones(own["kept"].shape)
    if "token_gate" in own:
        gates = gates * torch.sigmoid(own["token_gate"])
    if "layer_gate" in own:
        gates = gates * torch.sigmoid(own["layer_gate"])[:, None]
    return Architecture(
        operations=tuple(config.operations[o] for o in choice),
        tokens=tuple(tuple(row.nonzero().flatten().tolist()) for row in own["kept"]),
        derived=derived,
        num_virtual_tokens=config.num_virtual_tokens,
        width=config.width,
        embedding_dim=config.embedding_dim,
        head_rank=config.ranks[head_choice],
        relaxation=config.relaxation,
        candidates=config.operations,
        alpha=_rounded(own["alpha"]),
        # Shifted to an exact budget they are other ones, which only a model of this shape can say.
        gates=_rounded(gates) if derived or not config.exact else (),
    )


def _rounded(rows: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 6) for value in row) for row in rows.tolist())
