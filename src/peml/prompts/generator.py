"""The generator of a searched prefix: seed, relaxed cells, head, gates, and what becomes of them.

Letters: `P` prefix tokens, `L` attention layers, `h` width, `q` rank of the head, `C` cells, `O` operations,
`H` key/value heads, `D` head size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from peml.prompts import cost, objective, relaxation
from peml.prompts.architecture import Architecture, architecture_in
from peml.prompts.base import LayerPrefix, ModelShape, Prefix
from peml.prompts.operations import OPERATIONS
from peml.prompts.prefix import PrefixTable, PrefixTuning
from peml.prompts.relaxation import Weights

if TYPE_CHECKING:
    from peml.prompts.prefix_nas import PrefixNAS

TOKEN_GATE_OPEN, LAYER_GATE_OPEN = 2.0, 4.0
"""Initial logits of gates: sigmoid(2) = 0.88 and sigmoid(4) = 0.98, our choice: open, and free to move."""

UNLED = 200
"""Training steps after which a search that nobody leads is spoken of: our choice."""


class Structure(NamedTuple):
    """What is decided, as plain numbers.

    Args:
        choice: operation of each cell; -1: open.
        rank: of the head.
        kept: tokens of each layer, as indices on the device.
    """

    choice: list[int]
    rank: int
    kept: list[Tensor]


class PrefixGenerator(Prefix):
    """Seed, cells and head of the generator, with its architecture parameters.

    The derived structure is kept in buffers (`choice`, `head_choice`, `kept`), so that a checkpoint taken at any moment
    says by itself whether the search is over and what it found. After a search the operations that were not chosen stay
    in memory and in checkpoints, without gradients: optimisers hold on to them. `collapse` drops them, and an imported
    architecture never has them.

    Relaxations that draw do so once in each forward of a training, outside of checkpointed layers, so that
    recomputation sees the same draw. Processes of a parallel training draw by themselves; an operation that no process
    has drawn has no gradient in that step.
    """

    generated = True

    def __init__(self, config: PrefixNAS, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        self.shape, self.slots = shape, shape.slots
        found, p, h, layers = config.found, config.num_seeds, config.width, len(shape.slots)
        self.columns = config.columns(shape)
        self.seed = nn.Parameter(torch.randn(p, config.embedding_dim) * (1.0 if config.normalize_kv else 0.02))
        self.into = nn.Parameter(torch.randn(config.embedding_dim, h) / math.sqrt(config.embedding_dim))
        self.cells = nn.ModuleList(
            nn.ModuleList(OPERATIONS[name](p, h) for name in names) for names in config.candidates
        )
        rank = max(config.ranks)
        scales = (h**-0.5, rank**-0.5) if config.normalize_kv else (0.02, 0.02)
        self.head_in = nn.Parameter(torch.randn(h, rank) * scales[0])
        self.head_out = nn.Parameter(torch.randn(rank, sum(self.columns)) * scales[1])
        self.log_size = nn.Parameter(torch.zeros(layers, 2)) if config.normalize_kv else None
        lengths = [p] * layers if found is None else [max(1, length) for length in found.lengths]
        self.strength, self.alpha, self.head_alpha, self.token_gate, self.layer_gate = (None,) * 5
        if config.gate_init is not None:
            self.strength = nn.Parameter(torch.tensor([-math.log(n) - config.gate_init for n in lengths]))
        if found is None:
            self.alpha = nn.Parameter(torch.randn(config.num_cells, len(config.operations)) * 1e-3)
            if len(config.ranks) > 1:
                self.head_alpha = nn.Parameter(torch.randn(len(config.ranks)) * 1e-3)
            if config.search_tokens:
                self.token_gate = nn.Parameter(torch.full((layers, p), TOKEN_GATE_OPEN))
            if config.search_layers:
                self.layer_gate = nn.Parameter(torch.full((layers,), LAYER_GATE_OPEN))
        kept = torch.ones(layers, p, dtype=torch.bool)
        if found is not None:
            kept = torch.tensor([[token in row for token in found.used] for row in found.tokens])
        self.register_buffer("choice", torch.full((config.num_cells,), -1 if found is None else 0))
        self.register_buffer("head_choice", torch.tensor(-1 if len(config.ranks) > 1 else 0))
        self.register_buffer("kept", kept)
        self.register_buffer("progress", torch.zeros(()))
        self._warming_up = False
        self._unled: int | None = 0
        self._derived: Structure | None = None
        self._constants: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    choice: Tensor
    head_choice: Tensor
    kept: Tensor
    progress: Tensor
    strength: nn.Parameter | None
    alpha: nn.Parameter | None
    head_alpha: nn.Parameter | None
    token_gate: nn.Parameter | None
    layer_gate: nn.Parameter | None

    @property
    def searching(self) -> bool:
        """Whether the architecture is still open."""
        return self._structure().choice[0] < 0

    def _structure(self) -> Structure:
        """Read from the buffers once on each device: to read them in every step would make it wait."""
        if self._derived is None or self._derived.kept[0].device != self.kept.device:
            tokens = [row.nonzero().flatten() for row in self.kept]
            rank = self.config.ranks[int(self.head_choice)]
            self._derived = Structure(self.choice.tolist(), rank, tokens)
        return self._derived

    def constant(self, name: str, numbers: Callable[[], Sequence[float]]) -> Tensor:
        """Numbers that never change, as a tensor that is moved to the device once.

        Args:
            name: of the tensor.
            numbers: called for it once on each device.
        """
        known, device = self._constants.get(name), self.seed.device
        if known is None or (known.device, known.dtype) != (device, self._precise):
            known = self._constants[name] = torch.tensor(numbers(), dtype=self._precise, device=device)
        return known

    @property
    def _precise(self) -> torch.dtype:
        """Of the search: single precision at least, because in half of it closed gates are 0 and widths infinite."""
        return torch.promote_types(self.seed.dtype, torch.float32)

    def architecture_parameters(self) -> list[nn.Parameter]:
        """alpha, that of the head, beta, gamma: those that are searched."""
        own = (self.alpha, self.head_alpha, self.token_gate, self.layer_gate)
        return [parameter for parameter in own if parameter is not None]

    def set_progress(self, fraction: float) -> None:
        """Move the temperature, and hold the architecture still during warm-up."""
        self.progress.fill_(fraction)
        self._warming_up = fraction < self.config.warmup_fraction
        self._unled = None

    def _notice_that_nobody_leads(self) -> None:
        """Warn, once, where a loop trains the search and never says how far it is."""
        # A counter inside of a compiled graph would have it compiled anew.
        if self._unled is None or torch.compiler.is_compiling():
            return
        if not (self.training and self.searching and torch.is_grad_enabled()):
            return
        self._unled += 1
        if self._unled == UNLED:
            self._unled = None
            warnings.warn(
                f"{UNLED} steps, and nobody leads the search of the prefix: it will never end. Use peml's trainers, "
                "`SearchCallback` of peml.training, or set_progress and derive of the prompt",
                stacklevel=2,
            )

    def _open(self, parameter: Tensor) -> Tensor:
        parameter = parameter.to(self._precise)
        if not self.searching:
            return parameter.detach()
        # Multiplying by zero, not detaching: every parameter then has a gradient, which data-parallel training needs.
        return parameter.detach() + 0.0 * parameter if self._warming_up else parameter

    @property
    def _draws(self) -> bool:
        return self.training and self.searching

    def temperature(self) -> Tensor:
        """tau; falls exponentially with progress."""
        return relaxation.temperature(self.config.temperature, self.progress)

    # The cells and the head

    def cell_weights(self) -> Tensor:
        """`a`, `[C, O]`, without noise."""
        assert self.alpha is not None
        return relaxation.probabilities(self.config.relaxation, self._open(self.alpha), self.temperature())

    def rank_weights(self) -> Tensor:
        """The same of the head's rank, `[candidates]`."""
        if self.head_alpha is None:
            return self.seed.new_ones(1, dtype=self._precise)
        return relaxation.probabilities(self.config.relaxation, self._open(self.head_alpha), self.temperature())

    def _relaxed(self, alpha: Tensor) -> Weights:
        weights = relaxation.relaxed(self.config.relaxation, self._open(alpha), self.temperature(), self._draws)
        return weights._replace(values=weights.values.to(self.seed.dtype))

    def hidden(self) -> Tensor:
        """`H_C [P, h]`: the cells, relaxed during the search, one operation each afterwards."""
        hidden: Tensor = self.seed @ self.into
        choice = self._structure().choice
        weights = self._relaxed(self.alpha) if self.searching and self.alpha is not None else None
        dropout = self.config.skip_dropout
        # On the host only if it is wanted: reading progress would wait for the device.
        dropout = dropout * (1 - float(self.progress)) if dropout and self._draws else 0.0
        for c, cell in enumerate(self.cells):
            assert isinstance(cell, nn.ModuleList)
            hidden = cell[choice[c]](hidden) if weights is None else relaxation.mixed(cell, hidden, weights, c, dropout)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """`H P_h Q`, `[P, sum of 2 H D]`, with the first q columns of the largest head."""
        if not self.searching or self.head_alpha is None:
            rank = self._structure().rank
            return hidden @ self.head_in[:, :rank] @ self.head_out[:rank]
        # Heads share columns, so that their weighted sum is one product: a column counts in all that are wide enough.
        ranks, weights = self.constant("ranks", lambda: self.config.ranks), self._relaxed(self.head_alpha[None])
        within = torch.arange(self.head_in.shape[1], device=hidden.device) < ranks[:, None]
        return (hidden @ self.head_in * (weights.values[0] @ within.to(hidden.dtype))) @ self.head_out

    # The gates

    def gate_logits(self) -> tuple[Tensor | None, Tensor | None]:
        """Logits beta `[L, P]`, shifted to an exact budget, and gamma `[L]`; None: fixed open."""
        tokens, layers = (None if p is None else self._open(p) for p in (self.token_gate, self.layer_gate))
        if tokens is not None and self.config.exact and self.searching:
            open_layers = tokens.new_ones(len(tokens)) if layers is None else torch.sigmoid(layers)
            tokens = tokens + cost.common_shift(tokens, open_layers, self.widths(), self.config.budget(self.shape))
        return tokens, layers

    def gates(self) -> tuple[Tensor, Tensor]:
        """`sigmoid(beta) [L, P]` and `sigmoid(gamma) [L]`: how much of each token is deployed."""
        tokens, layers = self.gate_logits()
        ones = self.seed.new_ones(self.kept.shape)
        return (
            ones if tokens is None else torch.sigmoid(tokens),
            ones[:, 0] if layers is None else torch.sigmoid(layers),
        )

    def log_gates(self, draw: bool | None = None) -> Tensor:
        """`log sigmoid(beta) + log sigmoid(gamma) + s`, `[L, P]`, as attention gets them.

        Args:
            draw: whether relaxations that draw do so; None: while it is trained and searched.
        """
        draw = self._draws if draw is None else draw
        total = self.seed.new_zeros(self.kept.shape, dtype=self._precise)
        if self.searching or self.config.deploys_gates:
            tokens, layers = self.gate_logits()
            for logits in (tokens, None if layers is None else layers[:, None]):
                if logits is not None:
                    total = total + relaxation.log_gate(self.config.gate_relaxation, logits, self.temperature(), draw)
        if self.strength is not None:
            total = total + self.strength[:, None]
        # A closed token is one that softmax rounds away exactly; infinity would turn into NaN in some kernels.
        return total.clamp_min(-1e4)

    def widths(self) -> Tensor:
        """Numbers that a token stores in each layer, `[L]`."""
        return self.constant("widths", lambda: [slot.width for slot in self.slots])

    def forward(self, present: Sequence[int] | None) -> list[LayerPrefix | None]:
        """Keys, values and gates of every layer, from one run of the generator."""
        self._notice_that_nobody_leads()
        flat, kept = self.head(self.hidden()), self._structure().kept
        searched = self.token_gate is not None or self.layer_gate is not None
        gated = self.strength is not None or (searched and self.searching) or self.config.deploys_gates
        log_gates = self.log_gates() if gated else None
        layers: list[LayerPrefix | None] = []
        for layer, (block, slot) in enumerate(zip(torch.split(flat, self.columns, 1), self.slots, strict=True)):
            tokens = kept[layer]
            if not len(tokens):
                layers.append(None)
                continue
            gate = None if log_gates is None else log_gates[layer]
            if len(tokens) < block.shape[0]:
                block, gate = block.index_select(0, tokens), None if gate is None else gate.index_select(0, tokens)
            # [P, 2 H D] -> [2, 1, H, P, D]
            both = block.view(-1, 2, slot.num_heads, slot.head_dim).permute(1, 2, 0, 3).unsqueeze(1)
            if self.log_size is not None:
                both = self._sized(both, self.log_size[layer])
            layers.append(LayerPrefix(both[0], both[1], gate))
        return layers

    def _sized(self, both: Tensor, log_size: Tensor) -> Tensor:
        """Keys and values `[2, 1, H, P, D]` at the size of their layer, whatever size the head has made them."""
        precise = both.to(self._precise)
        rms = precise.square().mean(-1, keepdim=True).add(1e-12).sqrt()
        sized: Tensor = precise / rms * log_size.to(self._precise).exp().view(2, 1, 1, 1, 1)
        return sized.to(both.dtype)

    # The search

    def expected_cost(self) -> Tensor:
        """Deployed numbers over their budget."""
        return cost.expected(*self.gates(), self.widths()) / self.config.budget(self.shape)

    def penalties(self) -> Mapping[str, Tensor]:
        """Entropy and costs of the open architecture, weighted; nothing once it is derived."""
        return objective.penalties(self) if self.searching else {}

    def traces(self) -> dict[str, float]:
        """Where the search is, for the log; nothing once it is over."""
        return objective.traces(self) if self.searching else {}

    @torch.no_grad()
    def derive(self) -> None:
        """Close the search: argmax per cell (Eq. 7) and head, and tokens as in `cost.kept`.

        Our choice: the tokens that a layer keeps weigh together as much as all did, by its strength.
        """
        if not self.searching:
            return
        weight = self.log_gates(draw=False).logsumexp(1)
        tokens, layers = self.gates()
        units = tokens.shape[1] if self.token_gate is not None else 1
        if self.token_gate is not None or self.layer_gate is not None:
            budget = self.config.budget(self.shape)
            self.kept.copy_(cost.kept(tokens, layers, self.widths(), budget, self.config.threshold, units))
        if self.token_gate is not None and self.config.exact:
            shifted, _ = self.gate_logits()
            assert shifted is not None
            self.token_gate.copy_(shifted)  # the gates stay what they are, without a budget to shift them to
        assert self.alpha is not None
        self.choice.copy_(self.alpha.argmax(-1))
        if self.head_alpha is not None:
            self.head_choice.copy_(self.head_alpha.argmax())
        for parameter in self.architecture_parameters():
            # Of zero, not of none, an optimiser with momentum would still move what has been decided.
            parameter.grad = None
        self._derived = None
        if self.strength is not None:
            left = self.log_gates(draw=False).masked_fill(~self.kept, -math.inf).logsumexp(1)
            self.strength.add_(torch.where(self.kept.any(1), weight - left, 0.0))

    def architecture(self) -> Architecture:
        """Operation per cell and tokens per layer, as they stand or were derived."""
        return architecture_in(self.config, self.state_dict())

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
