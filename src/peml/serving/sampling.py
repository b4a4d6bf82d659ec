"""The next token of a request: the likeliest, or drawn at a temperature from the likeliest few.

    p_i ~ exp(z_i / temperature), over the top_k likeliest tokens, of these the smallest set whose probabilities reach
    top_p, and of this the tokens with p_i >= min_p max_j p_j

Log-probabilities that are reported are the model's own, log softmax(z), whatever it was drawn from (our choice: they
then compare between requests).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TOP = 20
"""Alternatives that can be asked for at most, as in OpenAI's chat completions."""


@dataclass
class Sampling:
    """How one request chooses its tokens.

    Args:
        temperature: 0 takes the likeliest token; above, draws.
        top_p: share of the probability that is drawn from, in (0, 1].
        top_k: tokens that are drawn from, the likeliest; 0 or less: all.
        min_p: least share of the likeliest token's probability, in [0, 1].
        seed: of the draws; None: another every time.
        top_logprobs: alternatives reported beside each token; None: no log-probabilities at all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    top_logprobs: int | None = None
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Begin the draws."""
        if self.temperature > 0:
            self.generator = torch.Generator()
            self.generator.seed() if self.seed is None else self.generator.manual_seed(self.seed)


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Args:
        id: of the vocabulary.
        logprob: the model's own, natural; None: not asked for.
        top: the likeliest tokens and theirs.
        finish: why it is the last one, `stop` or `length`; None: it is not.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


def choose(scores: Tensor, how: Sampling) -> int:
    """The next token of one request, of its scores `[V]`."""
    if how.temperature <= 0:
        return int(scores.argmax())
    # On the host: a generator belongs to one device, and a seed means the same draws on each.
    exact = scores.double().cpu()
    # From the likeliest down: divided by a tiny temperature, scores of themselves would be infinite.
    scaled = (exact - exact.max()) / how.temperature
    if 0 < how.top_k < len(scaled):
        scaled[scaled < scaled.topk(how.top_k).values[-1]] = -torch.inf
    probabilities = torch.softmax(scaled, dim=-1)
    if how.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # The first token always stays, and the one that reaches the share.
        dropped = order[ordered.cumsum(0) - ordered >= how.top_p]
        probabilities[dropped] = 0
    probabilities[probabilities < how.min_p * probabilities.max()] = 0
    return int(torch.multinomial(probabilities, 1, generator=how.generator))


def logprobs_of(scores: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability of a token and those of the likeliest."""
    own = torch.log_softmax(scores.float(), dim=-1)
    top = own.topk(min(count, len(own)))
    return float(own[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
