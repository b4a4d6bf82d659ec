"""PrefixNAS: a prefix from a generator whose structure and length are found while it is trained."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peml.errors import PemlError
from peml.prompts.architecture import Architecture
from peml.prompts.base import ModelShape, PromptConfig
from peml.prompts.cost import BYTES
from peml.prompts.generator import PrefixGenerator
from peml.prompts.operations import DEFAULT_OPERATIONS, check_operations, measured_seconds, operation_parameters

DEFAULT_BUDGET = 16.0
"""Tokens per layer, on average, where no budget is given; our choice."""


@dataclass(frozen=True)
class PrefixNAS(PromptConfig):
    """Generate one prefix for all tasks, and search the generator's operations and each layer's length meanwhile.

        H_0 = E W_in                    H_c = sum_o a_{c,o} op_o(H_{c-1}),  a_c = relax(alpha_c)
        K_l, V_l = e^n_l rms_norm(H_C P_h Q_l)    log g_lj = log sigmoid(beta_lj) + log sigmoid(gamma_l) + s_l
        loss += lam_H (mean entropy of choices and gates)
                + lam_KV relu(KV / budget - 1) + lam_P relu(Par / budget - 1) + lam_T relu(Time / budget - 1)

    Paper: PEML, arXiv:2605.14055: relaxation by softmax, final architecture by argmax (Eq. 7), trained together with
    LoRA (Algorithm 1). Operations, widths, lengths, head, regularisers and rates are our reconstruction.
    Our choice: gates say alone what is deployed, and begin open; the strength s, trained with the weights and never
    searched, makes the near-identity start: at -log P - c the whole prefix weighs as much as e^-c tokens. Each head's
    key and value of a token has the root mean square e^n, about that of a model's own: the head alone makes them a
    tenth of it, and such tokens never come to count (LOG.md).
    A loop without peml's trainers leads the search itself, see docs/search.md.

    Args:
        num_virtual_tokens: P, the most tokens a layer can keep.
        num_cells: C, cells in a row.
        width: h of the generator.
        embedding_dim: d_e of the seed E.
        head_rank: q of the factorised head; several: searched among them, each with the first columns of the largest.
        operations: candidates of each cell; the order breaks ties.
        temperature: tau at the start and at the end; annealed exponentially.
        warmup_fraction: share of the training in which the architecture does not move.
        entropy_weight: lam_H at the end; ramped from 0 over the second half.
        cost_weight: lam_KV.
        budget_tokens: deployed tokens per layer, on average, that cost nothing; 16 where no budget is given.
        parameter_weight: lam_P.
        parameter_budget: generator parameters that cost nothing; None: no such term.
        normalize_kv: give keys and values a trained size per layer (n, from 0), whatever size the head gives them.
        gate_init: c of the near-identity start; larger is closer to the base model; None: no strength at all, so that
            tokens begin as ordinary ones.
        gate_after: "keep" deploys the remaining gates as they are, "unit" sets them to 1; the strength stays.
        gate_threshold: tokens whose gate, or whose layer's gate, is below it are deleted; None: 0.05 of gates that are
            kept, so that the budget decides among those that are not closed, and 0.5 of those that become 1.
        relaxation: of operations and head: "softmax", "gumbel" (one is drawn and runs) or "sigmoid" (each by itself).
        gate_relaxation: "sigmoid", or "straight_through" (drawn, 0 or 1; those that remain are deployed as 1).
        search_tokens: whether each layer's length is searched; otherwise it is P.
        search_layers: whether layers can be switched off as a whole.
        skip_dropout: at the start, of what `identity` gives while it is searched; falls to 0 at the end.
        budget_mb: the same budget in megabytes (10^6 bytes) of deployed keys and values in bfloat16.
        budget_percent: the same in per cent of the key/value cache of a text.
        budget_context: tokens of that text.
        exact_budget: shift all token gates by a common number so that the expected cost is the budget in every step;
            at the end tokens go by order alone. There is no cost term then. Otherwise, or where tokens are not
            searched, cost above the budget is a term of the loss; its gradient, the same for all tokens, is so much
            larger than those that tell them apart that an optimiser like Adam hardly does (LOG.md).
        time_weight: lam_T.
        time_budget: what one run of the cells may take, in millions of multiply-adds, or in the unit of
            `operation_times`; None: no such term.
        operation_times: of every operation, e.g. from `measure_operations()`; None: multiply-adds by formula.
        architecture: one that was found, as an `Architecture` or its mapping, or "random:SEED": nothing is searched
            then, and its cells, sizes and tokens take the place of the settings above.

    Shapes:
        E (P, d_e), W_in (d_e, h), alpha (C, operations), P_h (h, q), Q (q, sum of 2 H D over layers),
        n (L, 2), beta (L, P), gamma (L,), s (L,).

    Raises:
        PemlError: a size below 1, an unknown operation, a temperature of 0, two budgets, a bad architecture.
    """

    prompt_learning_rate: ClassVar[float] = 1e-3

    num_virtual_tokens: int = 32
    num_cells: int = 2
    width: int = 512
    embedding_dim: int = 256
    head_rank: int | tuple[int, ...] = 64
    operations: tuple[str, ...] = DEFAULT_OPERATIONS
    temperature: tuple[float, float] = (1.0, 0.1)
    warmup_fraction: float = 0.15
    entropy_weight: float = 0.1
    cost_weight: float = 1.0
    budget_tokens: float | None = None
    parameter_weight: float = 0.1
    parameter_budget: int | None = None
    normalize_kv: bool = True
    gate_init: float | None = 0.0
    gate_after: Literal["keep", "unit"] = "keep"
    gate_threshold: float | None = None
    relaxation: Literal["softmax", "gumbel", "sigmoid"] = "softmax"
    gate_relaxation: Literal["sigmoid", "straight_through"] = "sigmoid"
    search_tokens: bool = True
    search_layers: bool = True
    skip_dropout: float = 0.0
    budget_mb: float | None = None
    budget_percent: float | None = None
    budget_context: int = 2048
    exact_budget: bool = True
    time_weight: float = 0.1
    time_budget: float | None = None
    operation_times: tuple[float, ...] | None = None
    architecture: str | Architecture | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("operations", "temperature", "head_rank", "operation_times"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        self._take_architecture()
        self._check_sizes()
        self._check_search()
        self._check_budgets()
        check_operations(self.operations)

    def _take_architecture(self) -> None:
        given = self.architecture
        if isinstance(given, str):
            if not re.fullmatch(r"random:\d+", given):
                raise PemlError(f'prompt.architecture must be an architecture or "random:SEED", not {given!r}')
            return
        if isinstance(given, Mapping):
            object.__setattr__(self, "architecture", Architecture.from_dict(given, "prompt.architecture"))
        if (found := self.found) is not None:
            if not found.derived:
                raise PemlError(
                    "prompt.architecture is that of a search that is not over, which has chosen nothing yet: finish "
                    "it, or call derive() of its prompt, and save the architecture again"
                )
            object.__setattr__(self, "num_cells", len(found.operations))
            for name in ("num_virtual_tokens", "width", "embedding_dim", "head_rank"):
                object.__setattr__(self, name, getattr(found, name))

    def _check_sizes(self) -> None:
        for name in ("num_virtual_tokens", "num_cells", "width", "embedding_dim", "budget_context"):
            if getattr(self, name) < 1:
                raise PemlError(f"prompt.{name} must be 1 or more, not {getattr(self, name)}")
        if min(self.ranks, default=0) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise PemlError(f"prompt.head_rank must be 1 or more, or several that differ, not {self.head_rank}")

    def _check_search(self) -> None:
        if len(self.temperature) != 2 or min(self.temperature) <= 0:
            raise PemlError(f"prompt.temperature needs a start and an end above 0, not {list(self.temperature)}")
        for name in ("warmup_fraction", "skip_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise PemlError(f"prompt.{name} must be in [0, 1), not {getattr(self, name)}")
        if self.gate_threshold is not None and not 0 <= self.gate_threshold <= 1:
            raise PemlError(f"prompt.gate_threshold must be in [0, 1], not {self.gate_threshold}")
        for name, known in (
            ("gate_after", ("keep", "unit")),
            ("relaxation", ("softmax", "gumbel", "sigmoid")),
            ("gate_relaxation", ("sigmoid", "straight_through")),
        ):
            if getattr(self, name) not in known:
                raise PemlError(
                    f"prompt.{name} must be {', '.join(known[:-1])} or {known[-1]}, not {getattr(self, name)!r}"
                )

    def _check_budgets(self) -> None:
        for name in ("entropy_weight", "cost_weight", "parameter_weight", "time_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise PemlError(f"prompt.{name} must be 0 or more, not {getattr(self, name)}")
        budgets = ("budget_tokens", "budget_mb", "budget_percent")
        given = [name for name in budgets if getattr(self, name) is not None]
        if len(given) > 1:
            raise PemlError(f"prompt.{given[0]} and prompt.{given[1]} are two budgets for one thing: give one")
        if self.parameter_budget is not None and self.parameter_budget < 1:
            raise PemlError(f"prompt.parameter_budget must be 1 or more, not {self.parameter_budget}")
        for name in (*given, *(["time_budget"] if self.time_budget is not None else [])):
            if not getattr(self, name) > 0:
                raise PemlError(f"prompt.{name} must be above 0, not {getattr(self, name)}")
        times = self.operation_times
        if times is not None and (len(times) != len(self.operations) or min(times) < 0):
            raise PemlError(
                f"prompt.operation_times needs a number of 0 or more for each of {len(self.operations)} operations, "
                f"not {list(times)}"
            )

    @property
    def found(self) -> Architecture | None:
        """The architecture that takes the place of a search, if it is known by now."""
        return self.architecture if isinstance(self.architecture, Architecture) else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Candidates for the rank of the head."""
        return (self.head_rank,) if isinstance(self.head_rank, int) else tuple(self.head_rank)

    @property
    def candidates(self) -> tuple[tuple[str, ...], ...]:
        """Operations that each cell has: all, or the one that was found."""
        if self.found is not None:
            return tuple((name,) for name in self.found.operations)
        return (self.operations,) * self.num_cells

    @property
    def num_seeds(self) -> int:
        """Rows of E: P, or the tokens that some layer of a found architecture keeps."""
        return self.num_virtual_tokens if self.found is None else len(self.found.used)

    @property
    def exact(self) -> bool:
        """Whether gates are shifted to the budget: there are gates of tokens, and it is wanted."""
        return self.exact_budget and self.search_tokens

    @property
    def threshold(self) -> float:
        """Gate below which a token or layer is deleted; none with an exact budget, which counts tokens alone."""
        if self.exact:
            return 0.0
        if self.gate_threshold is not None:
            return self.gate_threshold
        return 0.05 if self.gate_after == "keep" and self.gate_relaxation == "sigmoid" else 0.5

    @property
    def deploys_gates(self) -> bool:
        """Whether tokens that remain keep the gates of their search; drawn ones are 1, once those of 0 are deleted."""
        searched = self.found is None and (self.search_tokens or self.search_layers)
        return searched and self.gate_after == "keep" and self.gate_relaxation == "sigmoid"

    def lengths_allowed(self) -> tuple[int, ...]:
        """Lengths that a search can end with in a layer."""
        if self.search_tokens:
            return tuple(range(self.num_virtual_tokens + 1))
        return (0, self.num_virtual_tokens) if self.search_layers else (self.num_virtual_tokens,)

    def budget(self, shape: ModelShape) -> float:
        """Deployed numbers that cost nothing."""
        width = sum(slot.width for slot in shape.slots)
        if self.budget_mb is not None:
            numbers = self.budget_mb * 1e6 / BYTES
        elif self.budget_percent is not None:
            numbers = self.budget_percent / 100 * self.budget_context * width
        else:
            numbers = (DEFAULT_BUDGET if self.budget_tokens is None else self.budget_tokens) * width
        # Rounding errors of 0.7 % of 1000 must not cost the last of 7 tokens.
        return float(f"{numbers:.12g}")

    def columns(self, shape: ModelShape) -> list[int]:
        """Numbers that the head makes for a token of each layer: of layers without tokens none."""
        if self.found is None:
            return [slot.width for slot in shape.slots]
        return [slot.width if row else 0 for slot, row in zip(shape.slots, self.found.tokens, strict=True)]

    def fitted(self, shape: ModelShape) -> PrefixNAS:
        """The same with its architecture as this model can have it: drawn if it is random, and of as many layers."""
        found = self.found
        if isinstance(self.architecture, str):
            found = Architecture.random(
                dataclasses.replace(self, architecture=None), shape, int(self.architecture.partition(":")[2])
            )
        return self if found is None else dataclasses.replace(self, architecture=found.resampled(len(shape.slots)))

    def build(self, shape: ModelShape, num_tasks: int) -> PrefixGenerator:
        """The generator for these layers."""
        return PrefixGenerator(self.fitted(shape), shape)

    def num_parameters(self, shape: ModelShape, num_tasks: int) -> int:
        """P d_e + d_e h + sum ops + h q + q sum 2 H D + 3 L; of a search C |O| + candidates of q + L P + L beside."""
        own = self.fitted(shape)
        p, h, layers = own.num_seeds, own.width, len(shape.slots)
        cells = sum(operation_parameters(name, p, h) for names in own.candidates for name in names)
        total = own.fixed_parameters() + cells + own.head_parameters(shape, max(own.ranks))
        total += (0 if own.gate_init is None else layers) + 2 * layers * own.normalize_kv
        if own.found is not None:
            return total
        total += own.num_cells * len(own.operations) + (len(own.ranks) if len(own.ranks) > 1 else 0)
        return total + layers * (p * own.search_tokens + own.search_layers)

    def fixed_parameters(self) -> int:
        """Of the seed and of W_in."""
        return self.num_seeds * self.embedding_dim + self.embedding_dim * self.width

    def head_parameters(self, shape: ModelShape, rank: int) -> int:
        """Of a head of this rank."""
        return rank * (self.width + sum(self.columns(shape)))

    def measure_operations(self, device: str = "cpu") -> dict[str, float]:
        """Seconds of each operation for P tokens of width h, forward and backward, on this machine as it is now."""
        return measured_seconds(self.operations, self.num_virtual_tokens, self.width, device)
