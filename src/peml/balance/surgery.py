"""Balance of gradients: how the gradients of tasks that pull apart become one step.

Each needs only the inner products of the gradients, `G_tu = g_t . g_u`, and answers with one factor per task; c_t is
the task's share of the loss, and the factors are c themselves where nothing is done. Only what tasks share is touched:
a parameter of a single task has no conflicts, and gets its plain weighted gradient.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from peml.balance.base import Balance, Rule


class PCGrad(Balance):
    """Take out of each gradient what opposes another.

        h_t = c_t g_t      for u in random order: if h_t . g_u < 0:  h_t -= (h_t . g_u / |g_u|^2) g_u      g = sum_t h_t

    Paper: arXiv:2001.06782, algorithm 1; through torchjd.
    """

    needs_gradients: ClassVar[bool] = True

    def build(self, num_tasks: int) -> PCGradRule:
        """The rule."""
        return PCGradRule(num_tasks)


class PCGradRule(Rule):
    """Has no state: its order is drawn from the seed of the step."""

    def combine(self, gramian: Tensor, shares: Tensor, seed: int) -> Tensor:
        """Projected, one after the other."""
        from torchjd.aggregation import PCGradWeighting

        weighted = shares[:, None] * gramian * shares
        with torch.random.fork_rng(devices=[]):
            # Not `torch.manual_seed`, which would seed the dropout of every GPU as well, and for good.
            torch.default_generator.manual_seed(seed)
            factors: Tensor = PCGradWeighting()(weighted)
        return factors * shares


class CAGrad(Balance):
    """The direction near the mean that helps the worst task most.

        max_d min_t h_t . d   with |d - h_0| <= c |h_0|,  h_t = k c_t g_t,  h_0 their mean
        d = (h_0 + (c |h_0| / |h_w|) h_w) / (1 + c^2),  w on the simplex: min h_w . h_0 + c |h_0| |h_w|

    Paper: arXiv:2110.14048, equations 3 to 5; the division keeps the step's size, as in the released code. The problem
    on the simplex is solved with scipy, since torchjd's version needs a solver of its own.

    Args:
        c: radius in which the direction may leave the mean; 0 is the mean itself.
    """

    needs_gradients: ClassVar[bool] = True

    c: float = Field(0.5, ge=0, lt=1)

    def build(self, num_tasks: int) -> CAGradRule:
        """The rule."""
        return CAGradRule(self, num_tasks)


class CAGradRule(Rule):
    """Has no state."""

    def __init__(self, settings: CAGrad, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.c = settings.c

    def combine(self, gramian: Tensor, shares: Tensor, seed: int) -> Tensor:
        """The mean, and a part of the worst mixture."""
        k = len(shares)
        inner = (k**2 * shares[:, None] * gramian * shares).numpy()
        scale = inner.trace() / k
        if k < 2 or scale <= 0:
            return shares
        inner = inner / scale
        mean = np.full(k, 1 / k)
        radius = self.c * np.sqrt(max(mean @ inner @ mean, 0.0))
        worst = _on_simplex(inner, inner @ mean, radius)
        length = np.sqrt(max(worst @ inner @ worst, 0.0))
        factors = mean + (radius / length if length > 1e-6 else 0.0) * worst
        return torch.from_numpy(factors * k / (1 + self.c**2)) * shares


def _on_simplex(inner: np.ndarray, linear: np.ndarray, radius: float) -> np.ndarray:
    """Argmin of `linear . w + radius |h_w|` over the simplex."""
    from scipy.optimize import minimize

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        along = inner @ w
        length = np.sqrt(max(w @ along, 0.0) + 1e-12)
        return float(linear @ w + radius * length), linear + radius * along / length

    k = len(linear)
    constraint = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(k)}
    start = np.full(k, 1 / k)
    found = minimize(value, start, jac=True, method="SLSQP", bounds=[(0, 1)] * k, constraints=constraint, tol=1e-12)
    w = np.clip(found.x, 0, None)
    return np.asarray(w / w.sum())


class AlignedMTL(Balance):
    """Make the gradients orthogonal and of one size, as near to themselves as can be.

        G = V diag(lambda) V^T      factors = sqrt(lambda_min) V diag(lambda)^{-1/2} V^T c

    so that the system of gradients has condition number 1. Paper: arXiv:2305.19000, algorithm 1; through torchjd.

    Args:
        scale: the eigenvalue that all become: the least one, as in the paper, the median, or their mean ("rmse").
    """

    needs_gradients: ClassVar[bool] = True

    scale: Literal["min", "median", "rmse"] = "min"

    def build(self, num_tasks: int) -> AlignedMTLRule:
        """The rule."""
        return AlignedMTLRule(self, num_tasks)


class AlignedMTLRule(Rule):
    """Has no state."""

    def __init__(self, settings: AlignedMTL, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.scale = settings.scale

    def combine(self, gramian: Tensor, shares: Tensor, seed: int) -> Tensor:
        """The shares, in the aligned system."""
        from torchjd.aggregation import AlignedMTLWeighting

        factors: Tensor = AlignedMTLWeighting(shares, scale_mode=self.scale)(gramian)
        return factors


class NashMTL(Balance):
    """The bargain in which no task gains a per cent more than the others lose.

        G a = c / a,  a > 0        the minimum of a^T G a / 2 - sum_t c_t log a_t

    Paper: arXiv:2202.01017, equation 3, there with c = 1 and a sequence of convex problems; our choices: damped Newton
    steps, which this convex problem needs no more than, and the length of the plain gradient, because the bargain's own
    depends on the number of tasks alone and learning rates would lose their meaning.
    """

    needs_gradients: ClassVar[bool] = True

    def build(self, num_tasks: int) -> NashMTLRule:
        """The rule."""
        return NashMTLRule(num_tasks)


class NashMTLRule(Rule):
    """Has no state."""

    def combine(self, gramian: Tensor, shares: Tensor, seed: int) -> Tensor:
        """The bargain, as long as the plain gradient."""
        k, inner, parts = len(shares), gramian.numpy(), shares.numpy()
        scale = inner.trace() / k
        if scale <= 0:
            return shares
        # A little on the diagonal: gradients that cancel exactly have no bargain, and a task without one wants all.
        inner = inner / scale + 1e-6 * np.eye(k)
        a = np.sqrt(parts / inner.diagonal())
        for _ in range(100):
            slope = inner @ a - parts / a
            move = np.linalg.solve(inner + np.diag(parts / a**2), -slope)
            decrement = np.sqrt(max(-slope @ move, 0.0) / parts.min())
            a = a + move / (1 + decrement)
            if decrement < 1e-12:
                break
        lengths = [np.sqrt(max(x @ inner @ x, 0.0)) for x in (parts, a)]
        return torch.from_numpy(a * lengths[0] / lengths[1])
