"""What a search adds to the loss, and what it tells the log.

    lam_H [mean_c H(a_c) + mean_lj h(sigmoid(beta_lj)) + mean_l h(sigmoid(gamma_l))] + lam_KV relu(KV / budget - 1)
    + lam_P relu(Par / budget - 1) + lam_T relu(Time / budget - 1)

`H`, `h` are categorical and binary entropies, in nats. With independent weights a zero-one loss takes the place of `H`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peml.prompts import cost, relaxation
from peml.prompts.operations import operation_multiply_adds, operation_parameters

if TYPE_CHECKING:
    from peml.prompts.generator import PrefixGenerator


def undecided(generator: PrefixGenerator) -> Tensor:
    """How open the choices still are: of cells and head on average, plus gates of tokens, plus gates of layers.

    Gates of tokens are drawn apart by it, not closed: an exact budget sees to that, or else `cost.at_equal_cost`.
    """
    measure = relaxation.zero_one if generator.config.relaxation == "sigmoid" else relaxation.entropy
    cells = measure(generator.cell_weights())
    if generator.head_alpha is not None:
        cells = torch.cat([cells, measure(generator.rank_weights()[None])])
    total = cells.mean()
    tokens, layers = generator.gate_logits()
    if tokens is not None:
        if not generator.config.exact:
            level = tokens.new_ones(len(tokens)) if layers is None else torch.sigmoid(layers)
            tokens = cost.at_equal_cost(tokens, level, generator.widths())
        total = total + relaxation.binary_entropy(tokens).mean()
    if layers is not None:
        total = total + relaxation.binary_entropy(layers).mean()
    return total


def expected_parameters(generator: PrefixGenerator) -> Tensor:
    """`Par`: of the whole generator, as its choices stand."""
    config, p, h = generator.config, generator.config.num_seeds, generator.config.width
    cells = generator.constant("parameters", lambda: [operation_parameters(name, p, h) for name in config.operations])
    heads = generator.constant("heads", lambda: [config.head_parameters(generator.shape, q) for q in config.ranks])
    return config.fixed_parameters() + (generator.cell_weights() @ cells).sum() + generator.rank_weights() @ heads


def expected_time(generator: PrefixGenerator) -> Tensor:
    """`Time` of one run of the cells, as their choices stand: millions of multiply-adds, or as the user measured it."""
    config, p, h = generator.config, generator.config.num_seeds, generator.config.width
    times = generator.constant(
        "times", lambda: config.operation_times or [operation_multiply_adds(o, p, h) / 1e6 for o in config.operations]
    )
    return (generator.cell_weights() @ times).sum()


def penalties(generator: PrefixGenerator) -> dict[str, Tensor]:
    """Weighted terms of an open search, by name; only those that some searched parameter can lower."""
    config = generator.config
    ramp = (2 * generator.progress - 1).clamp(0, 1)
    terms = {"entropy": config.entropy_weight * ramp * undecided(generator)}
    if (config.search_tokens or config.search_layers) and not config.exact:
        terms["cost"] = config.cost_weight * torch.relu(generator.expected_cost() - 1)
    if config.parameter_budget is not None:
        excess = expected_parameters(generator) / config.parameter_budget - 1
        terms["parameters"] = config.parameter_weight * torch.relu(excess)
    if config.time_budget is not None:
        terms["time"] = config.time_weight * torch.relu(expected_time(generator) / config.time_budget - 1)
    return terms


@torch.no_grad()
def traces(generator: PrefixGenerator) -> dict[str, float]:
    """Numbers of an open search, by name.

    Returns:
        entropy: of a cell's choice, on average, in nats.
        gate: mean over all tokens.
        tokens/L: expected length of layer L.
        temperature: tau.
        leading/C: weight of the leading operation of cell C.
        rank: expected rank of the head, where it is searched.
        cost: expected keys and values over their budget.
        strength: mean of s, where there is one.
    """
    tokens, layers = generator.gates()
    gates, weights = tokens * layers[:, None], generator.cell_weights()
    shares = weights / weights.sum(-1, keepdim=True)
    found = {
        "entropy": relaxation.entropy(shares).mean(),
        "gate": gates.mean(),
        "temperature": generator.temperature(),
        "cost": generator.expected_cost(),
    }
    if generator.head_alpha is not None:
        ranks = generator.rank_weights()
        found["rank"] = ranks @ generator.constant("ranks", lambda: generator.config.ranks) / ranks.sum()
    if generator.strength is not None:
        found["strength"] = generator.strength.mean()
    found |= {f"tokens/{layer}": row.sum() for layer, row in enumerate(gates)}
    found |= {f"leading/{c}": row.max() for c, row in enumerate(weights)}
    # One transfer from the device, not one for each.
    return dict(zip(found, torch.stack([value.float() for value in found.values()]).tolist(), strict=True))
