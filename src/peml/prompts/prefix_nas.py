"""PrefixNAS: a prefix from a generator whose structure and length are found while it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peml.errors import PemlError
from peml.prompts.architecture import Architecture
from peml.prompts.base import LayerPrefix, ModelShape, Prefix, PromptConfig
from peml.prompts.operations import (
    DEFAULT_OPERATIONS,
    OPERATIONS,
    check_operations,
    operation_parameters,
)
from peml.prompts.prefix import PrefixTable, PrefixTuning

LAYER_GATE_OPEN = 4.0
"""Initial logit of a layer's gate: sigmoid(4) = 0.98, our choice."""


@dataclass(frozen=True)
class PrefixNAS(PromptConfig):
    """Generate one prefix for all tasks, and search the generator's operations and each layer's length meanwhile.

        H_0 = E W_in                    H_c = sum_o softmax(alpha_c / tau)_o op_o(H_{c-1})
        K_l, V_l = H_C P_h Q_l          log g_lj = log sigmoid(beta_lj) + log sigmoid(gamma_l)
        loss += lam_H (mean entropy of cells and gates) + lam_KV relu(KV / budget - 1) + lam_P relu(Par / budget - 1)

    Paper: PEML, arXiv:2605.14055: relaxation by softmax, final architecture by argmax (Eq. 7), trained together with
    LoRA (Algorithm 1). Operations, widths, lengths, head, regularisers and rates are our reconstruction.
    Near-identity start, our choice: beta = -log P - c gives the whole prefix the weight of e^-c tokens.

    Args:
        num_virtual_tokens: P, the most tokens a layer can keep.
        num_cells: C, cells in a row.
        width: h of the generator.
        embedding_dim: d_e of the seed E.
        head_rank: q of the factorised head.
        operations: candidates of each cell; the order breaks ties.
        temperature: tau at the start and at the end; annealed exponentially.
        warmup_fraction: share of the training in which the architecture does not move.
        entropy_weight: lam_H at the end; ramped from 0 over the second half.
        cost_weight: lam_KV.
        budget_tokens: deployed tokens per layer, on average, that cost nothing.
        parameter_weight: lam_P.
        parameter_budget: generator parameters that cost nothing; None: no such term.
        gate_init: c of the near-identity start; larger is closer to the base model.
        gate_after: "keep" deploys the remaining gates as they are, "unit" sets them to 1.
        gate_threshold: gates below it are deleted: relative to the largest gate for "keep", absolute for "unit";
            None: 0.05 for keep, 0.5 for unit.

    Shapes:
        E (P, d_e), W_in (d_e, h), alpha (C, operations), P_h (h, q), Q (q, sum of 2 H D over layers),
        beta (L, P), gamma (L,).

    Raises:
        PemlError: a size below 1, an unknown operation, a temperature of 0, a bad `gate_after`.
    """

    prompt_learning_rate: ClassVar[float] = 1e-3

    num_virtual_tokens: int = 32
    num_cells: int = 2
    width: int = 512
    embedding_dim: int = 256
    head_rank: int = 64
    operations: tuple[str, ...] = DEFAULT_OPERATIONS
    temperature: tuple[float, float] = (1.0, 0.1)
    warmup_fraction: float = 0.15
    entropy_weight: float = 0.1
    cost_weight: float = 1.0
    budget_tokens: float = 16.0
    parameter_weight: float = 0.1
    parameter_budget: int | None = None
    gate_init: float = 2.0
    gate_after: Literal["keep", "unit"] = "keep"
    gate_threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))
        object.__setattr__(self, "temperature", tuple(self.temperature))
        for name in ("num_virtual_tokens", "num_cells", "width", "embedding_dim", "head_rank"):
            if getattr(self, name) < 1:
                raise PemlError(f"prompt.{name} must be 1 or more, not {getattr(self, name)}")
        if len(self.temperature) != 2 or min(self.temperature) <= 0:
            raise PemlError(f"prompt.temperature needs a start and an end above 0, not {list(self.temperature)}")
        if not 0 <= self.warmup_fraction < 1:
            raise PemlError(f"prompt.warmup_fraction must be in [0, 1), not {self.warmup_fraction}")
        for name in ("entropy_weight", "cost_weight", "parameter_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise PemlError(f"prompt.{name} must be 0 or more, not {getattr(self, name)}")
        if self.parameter_budget is not None and self.parameter_budget < 1:
            raise PemlError(f"prompt.parameter_budget must be 1 or more, not {self.parameter_budget}")
        if self.gate_threshold is not None and not 0 <= self.gate_threshold <= 1:
            raise PemlError(f"prompt.gate_threshold must be in [0, 1], not {self.gate_threshold}")
        if not self.budget_tokens > 0:
            raise PemlError(f"prompt.budget_tokens must be above 0, not {self.budget_tokens}")
        if self.gate_after not in ("keep", "unit"):
            raise PemlError(f"prompt.gate_after must be keep or unit, not {self.gate_after!r}")
        check_operations(self.operations)

    @property
    def threshold(self) -> float:
        """Gate below which a token is deleted, as a share of the largest gate if gates are kept."""
        if self.gate_threshold is not None:
            return self.gate_threshold
        return 0.05 if self.gate_after == "keep" else 0.5

    def build(self, shape: ModelShape, num_tasks: int) -> PrefixGenerator:
        """The generator for these layers."""
        return PrefixGenerator(self, shape)

    def num_parameters(self, shape: ModelShape, num_tasks: int) -> int:
        """P d_e + d_e h + C sum ops + h q + q sum 2 H D + C |O| + L P + L."""
        p, h, cells = self.num_virtual_tokens, self.width, self.num_cells
        generator = p * self.embedding_dim + self.embedding_dim * h
        generator += cells * sum(operation_parameters(o, p, h) for o in self.operations)
        head = h * self.head_rank + self.head_rank * sum(slot.width for slot in shape.slots)
        return generator + head + cells * len(self.operations) + len(shape.slots) * (p + 1)


class PrefixGenerator(Prefix):
    """Seed, cells and head of the generator, with its architecture parameters.

    The derived structure is kept in buffers (`choice`, `kept`), so that a checkpoint taken at any moment says by
    itself whether the search is over and what it found.
    """

    generated = True

    def __init__(self, config: PrefixNAS, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        self.shape, self.slots = shape, shape.slots
        p, h, layers = config.num_virtual_tokens, config.width, len(shape.slots)
        self.seed = nn.Parameter(torch.randn(p, config.embedding_dim) * 0.02)
        self.into = nn.Parameter(torch.randn(config.embedding_dim, h) / math.sqrt(config.embedding_dim))
        self.cells = nn.ModuleList(
            nn.ModuleList(OPERATIONS[name](p, h) for name in config.operations) for _ in range(config.num_cells)
        )
        self.head_in = nn.Parameter(torch.randn(h, config.head_rank) * 0.02)
        self.head_out = nn.Parameter(torch.randn(config.head_rank, sum(s.width for s in shape.slots)) * 0.02)
        self.alpha = nn.Parameter(torch.randn(config.num_cells, len(config.operations)) * 1e-3)
        self.token_gate = nn.Parameter(torch.full((layers, p), -math.log(p) - config.gate_init))
        self.layer_gate = nn.Parameter(torch.full((layers,), LAYER_GATE_OPEN))
        self.register_buffer("choice", torch.full((config.num_cells,), -1))
        self.register_buffer("kept", torch.ones(layers, p, dtype=torch.bool))
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        self._warming_up = False
        self._derived: tuple[list[int], list[list[int]]] | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    choice: Tensor
    kept: Tensor
    progress: Tensor

    @property
    def searching(self) -> bool:
        """Whether the architecture is still open."""
        return self._structure()[0][0] < 0

    def _structure(self) -> tuple[list[int], list[list[int]]]:
        """Chosen operation per cell (-1: open) and kept tokens per layer, read from the buffers once."""
        if self._derived is None:
            tokens = [row.nonzero().flatten().tolist() for row in self.kept.cpu()]
            self._derived = (self.choice.tolist(), tokens)
        return self._derived

    def architecture_parameters(self) -> list[nn.Parameter]:
        """alpha, beta, gamma."""
        return [self.alpha, self.token_gate, self.layer_gate]

    def set_progress(self, fraction: float) -> None:
        """Move the temperature, and hold the architecture still during warm-up."""
        self.progress.fill_(fraction)
        self._warming_up = fraction < self.config.warmup_fraction

    def cell_weights(self) -> Tensor:
        """`softmax(alpha / tau)`, `[C, operations]`; tau falls exponentially with progress."""
        start, end = self.config.temperature
        tau = start * (end / start) ** self.progress
        return torch.softmax(self._open(self.alpha) / tau.to(self.alpha.dtype), dim=-1)

    def log_gates(self) -> Tensor:
        """`log sigmoid(beta) + log sigmoid(gamma)`, `[L, P]`."""
        log_sigmoid = nn.functional.logsigmoid
        gates = log_sigmoid(self._open(self.token_gate)) + log_sigmoid(self._open(self.layer_gate))[:, None]
        # A closed token is one that softmax rounds away exactly; infinity would turn into NaN in some kernels.
        return gates.clamp_min(-1e4)

    def _open(self, parameter: Tensor) -> Tensor:
        if not self.searching:
            return parameter.detach()
        # Multiplying by zero, not detaching: every parameter then has a gradient, which data-parallel training needs.
        return parameter.detach() + 0.0 * parameter if self._warming_up else parameter

    def hidden(self) -> Tensor:
        """`H_C [P, h]`: the cells, relaxed during the search, one operation each afterwards."""
        choice, _ = self._structure()
        hidden = self.seed @ self.into
        weights = self.cell_weights() if self.searching else None
        for c, cell in enumerate(self.cells):
            assert isinstance(cell, nn.ModuleList)
            if weights is None:
                hidden = cell[choice[c]](hidden)
            else:
                outputs = torch.stack([operation(hidden) for operation in cell])
                hidden = torch.tensordot(weights[c], outputs, dims=1)
        return hidden

    def forward(self, present: Sequence[int] | None) -> list[LayerPrefix | None]:
        """Keys, values and gates of every layer, from one run of the generator."""
        flat = self.hidden() @ self.head_in @ self.head_out
        log_gates = self.log_gates()
        _, kept = self._structure()
        fixed = not self.searching and self.config.gate_after == "unit"
        layers: list[LayerPrefix | None] = []
        for layer, (block, slot) in enumerate(
            zip(torch.split(flat, [s.width for s in self.slots], 1), self.slots, strict=True)
        ):
            tokens = kept[layer]
            if not tokens:
                layers.append(None)
                continue
            gate = log_gates[layer]
            if len(tokens) < block.shape[0]:
                block, gate = block[tokens], gate[tokens]
            # [P, 2 H D] -> [2, 1, H, P, D]
            both = block.view(-1, 2, slot.num_heads, slot.head_dim).permute(1, 2, 0, 3).unsqueeze(1)
            layers.append(LayerPrefix(both[0], both[1], None if fixed else gate))
        return layers

    def penalties(self) -> Mapping[str, Tensor]:
        """Entropy and cost of the open architecture, weighted; nothing once it is derived."""
        if not self.searching:
            return {}
        config, gates = self.config, self.log_gates().exp()
        ramp = (2 * self.progress - 1).clamp(0, 1).to(gates.dtype)
        widths = torch.tensor([s.width for s in self.slots], dtype=gates.dtype, device=gates.device)
        budget = config.budget_tokens * widths.sum()
        cost = (gates.sum(1) * widths).sum() / budget
        terms = {
            "entropy": config.entropy_weight * ramp * self.entropy(),
            "cost": config.cost_weight * torch.relu(cost - 1),
        }
        if config.parameter_budget is not None:
            terms["parameters"] = config.parameter_weight * torch.relu(self._expected() / config.parameter_budget - 1)
        return terms

    def entropy(self) -> Tensor:
        """Mean categorical entropy of the cells plus mean binary entropy of the token gates, in nats."""
        log_weights = self.cell_weights().clamp_min(1e-12).log()
        cells = -(log_weights.exp() * log_weights).sum(-1).mean()
        logits = self._open(self.token_gate)
        p = torch.sigmoid(logits)
        logsigmoid = nn.functional.logsigmoid
        tokens = -(p * logsigmoid(logits) + (1 - p) * logsigmoid(-logits)).mean()
        return cells + tokens

    def _expected(self) -> Tensor:
        config = self.config
        sizes = [float(operation_parameters(o, config.num_virtual_tokens, config.width)) for o in config.operations]
        weights = self.cell_weights()
        return (weights * torch.tensor(sizes, dtype=weights.dtype, device=weights.device)).sum()

    @torch.no_grad()
    def derive(self) -> None:
        """Close the search: argmax per cell (Eq. 7), and delete tokens whose gate is below the threshold.

        Our choice: where gates are kept the threshold is relative to the largest one, because a near-identity start
        holds every gate far below any absolute threshold, and a short search would delete everything; where gates
        become 1 it is absolute. Tokens that still exceed the budget go in order of gate: a half-open token costs a
        whole one once deployed. At least one token stays, in the layer that wants it most.
        """
        gates = self.log_gates().exp().double()
        scale = gates.max() if self.config.gate_after == "keep" else 1.0
        kept = gates >= self.config.threshold * scale
        kept.view(-1)[gates.argmax()] = True
        widths = torch.tensor([[slot.width] for slot in self.slots], device=gates.device).expand_as(gates).double()
        order = torch.where(kept, gates, -1.0).flatten().argsort(descending=True, stable=True)
        fits = widths.flatten()[order].cumsum(0) <= self.config.budget_tokens * widths[:, 0].sum()
        fits[0] = True
        kept &= torch.zeros_like(kept).flatten().scatter(0, order, fits).view_as(kept)
        self.choice.copy_(self.alpha.argmax(-1))
        self.kept.copy_(kept)
        self._derived = None

    def architecture(self) -> Architecture:
        """Operation per cell and tokens per layer, as they would be (or were) derived."""
        chosen, kept = self._structure()
        if self.searching:
            chosen = self.alpha.argmax(-1).tolist()
        names = self.config.operations
        return Architecture(tuple(names[c] for c in chosen), tuple(tuple(row) for row in kept), not self.searching)

    @torch.no_grad()
    def collapse(self) -> tuple[PrefixTuning, PrefixTable]:
        """Run the generator a last time and keep only its keys, values and gates, as a plain prefix table."""
        layers = self(None)
        gated = any(prefix is not None and prefix.log_gate is not None for prefix in layers)
        lengths = tuple(0 if prefix is None else prefix.num_tokens for prefix in layers)
        config = PrefixTuning(num_virtual_tokens=lengths, gated=gated)
        table = PrefixTable(config, self.shape, num_tasks=1).to(self.seed.device, self.seed.dtype)
        table.fill(layers)
        return config, table


def _forget(generator: PrefixGenerator, keys: object) -> None:
    """Read the structure anew after loading; a function of the module, not a lambda, because that can be pickled."""
    generator._derived = None
