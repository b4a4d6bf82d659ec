"""Every balance against a hand computation, on problems of two tasks whose solution is known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import linregress
from torch import Tensor

from peml.balance import BALANCES, Rule, Step, per_sample, shares
from peml.balance.base import Adam
from peml.balance.coba import slope_of
from peml.errors import PemlError
from peml.training.balancing import read_balance, write_balance

HALVES = torch.tensor([0.5, 0.5], dtype=torch.float64)


def rule(by: str, tasks: int = 2, **settings: Any) -> Any:
    return read_balance({"by": by, **settings}).build(tasks)


def step(number: int, losses: list[float], absent: tuple[int, ...] = (), **others: Any) -> Step:
    present = torch.tensor([t not in absent for t in range(len(losses))])
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in others.items()}
    return Step(number, torch.tensor(losses, dtype=torch.float64) * present, present, **tensors)


def combined(by: str, gradients: list[list[float]], parts: Tensor | None = None, **settings: Any) -> Tensor:
    rows = torch.tensor(gradients, dtype=torch.float64)
    parts = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64) if parts is None else parts
    return rule(by, len(rows), **settings).combine(rows @ rows.T, parts, seed=3) @ rows


# Means


@pytest.mark.parametrize("mean", ["task_mean", "task_sample_mean", "token_mean", "sample_mean"])
def test_means_against_words(mean: Any) -> None:
    rows = [(0, [1.0, 2.0, 3.0]), (0, [5.0]), (1, [7.0, 9.0])]  # task, losses of its tokens
    weights = [3.0, 0.5, 2.0]
    losses, counts = torch.tensor([sum(r) for _, r in rows]), torch.tensor([len(r) for _, r in rows])
    losses, counts = per_sample(mean, losses, counts)
    tasks = torch.tensor([task for task, _ in rows])
    sums = torch.zeros(3).index_add_(0, tasks, losses)
    numbers = torch.zeros(3, dtype=torch.long).index_add_(0, tasks, counts)
    given = (shares(mean, numbers, torch.tensor(weights)) * sums / numbers.clamp_min(1)).sum()

    units = [(t, x) for t, r in rows for x in ([sum(r) / len(r)] if "sample" in mean else r)]
    if mean.startswith("task"):
        each = {t: np.mean([x for own, x in units if own == t]) for t in (0, 1)}
        expected = sum(weights[t] * each[t] for t in each) / sum(weights[t] for t in each)
    else:
        expected = sum(weights[t] * x for t, x in units) / sum(weights[t] for t, _ in units)
    assert float(given) == pytest.approx(expected)


# Weights


def test_adam_is_torchs_and_leaves_absent_tasks_alone() -> None:
    ours, values = Adam(3, 0.1, decay=0.01), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    theirs = [torch.nn.Parameter(v.clone()) for v in values]
    optimizer = torch.optim.Adam(theirs, lr=0.1, weight_decay=0.01)
    for i in range(20):
        gradient, present = torch.randn(3).double(), torch.tensor([True, i % 2 == 0, i < 5])
        before = values
        values = ours(values, gradient, present)
        for p, g, here in zip(theirs, gradient, present, strict=True):
            p.grad = g.clone() if here else None
        optimizer.step()
        assert torch.equal(values[~present], before[~present])
    torch.testing.assert_close(values, torch.stack([p.detach() for p in theirs]))


def test_uncertainty_comes_to_rest_where_e_to_the_s_is_the_loss() -> None:
    balance = rule("uncertainty", 3)
    for number in range(1, 3000):
        balance.update(step(number, [4.0, 0.25, 9.0], absent=(2,)))
    torch.testing.assert_close(balance.log_variance[:2].exp(), torch.tensor([4.0, 0.25]).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(balance.weights()[:2], torch.tensor([1 / 8, 2.0]).double(), rtol=1e-3, atol=0)
    assert balance.log_variance[2] == -0.5, "a task that never came is not one without loss"


def test_dwa_weighs_by_the_ratio_of_two_windows() -> None:
    balance = rule("dwa", 3, window=2, temperature=2.0)
    for number, losses in enumerate([[4.0, 2.0, 1.0], [2.0, 2.0, 1.0]], start=1):
        assert torch.equal(balance.weights(), torch.ones(3).double())
        balance.update(step(number, losses, absent=(2,)))
    for number, losses in enumerate([[1.0, 2.0, 1.0], [2.0, 4.0, 1.0]], start=3):
        balance.update(step(number, losses, absent=(2,)))
    expected = 3 * torch.softmax(torch.tensor([1.5 / 3, 3 / 2, 1.0]).double() / 2, 0)
    torch.testing.assert_close(balance.weights(), expected)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_evens_out_weighted_gradients(alpha: float) -> None:
    balance, norms, losses = rule("gradnorm", alpha=alpha), [1.0, 8.0], [0.5, 0.25]
    balance.update(step(1, [1.0, 1.0], norms=norms))
    for number in range(2, 800):
        balance.update(step(number, losses, norms=norms))
    sizes = balance.weights() * torch.tensor(norms)
    rates = torch.tensor(losses) / np.mean(losses)
    # The targets mean(G) r^alpha add up to sum(G) for alpha of 0 and 1 alone; in between one of the two is met.
    targets = sizes.mean() * rates**alpha
    assert float(balance.weights().sum()) == pytest.approx(2)
    assert float(((sizes - targets).abs() / targets).min()) < 0.03
    if alpha == 0:
        torch.testing.assert_close(balance.weights(), torch.tensor([16 / 9, 2 / 9]).double(), rtol=0.03, atol=0)


def test_gradnorm_follows_the_slope_of_its_loss() -> None:
    balance = rule("gradnorm", 3, alpha=1.5)
    balance.first = torch.tensor([2.0, 2.0, 1.0]).double()
    now = step(5, [1.0, 1.5, 0.2], norms=[3.0, 1.0, 0.5])
    seen: list[Tensor] = []
    balance.adam.forward = lambda values, gradient, present: seen.append(gradient) or values
    balance.logits = torch.tensor([0.1, -0.2, 0.3]).double()
    balance.update(now)
    logits = balance.logits.clone().requires_grad_()
    sizes = 3 * torch.softmax(logits, 0) * now.norms
    ratio = now.losses / balance.first
    target = (sizes.mean() * (ratio / ratio.mean()) ** 1.5).detach()
    (sizes - target).abs().sum().backward()
    torch.testing.assert_close(seen[0], logits.grad)


def test_gradnorm_compares_the_tasks_present() -> None:
    own = rule("gradnorm", 3)
    own.update(step(1, [1.0, 1.0, 1.0], absent=(2,), norms=[1.0, 0.8, 0.0]))
    assert own.logits[0] < 0 < own.logits[1] and own.logits[2] == 0


def test_famo_lets_both_logarithms_fall_alike() -> None:
    """L_1 = 100 x^2 / 2, L_2 = y^2 / 2: gradient descent on them, weighed by the rule."""
    balance, x = rule("famo", decay=0.0), torch.tensor([1.0, 1.0], dtype=torch.float64)
    curvature, rates = torch.tensor([100.0, 1.0]).double(), []
    for number in range(1, 1500):
        before = curvature * x**2 / 2
        x = x - 1e-3 * balance.weights(before) * curvature * x
        after = curvature * x**2 / 2
        rates.append((before.log() - after.log()).tolist())
        balance.update(Step(number, before, torch.tensor([True, True]), after=after))
    assert rates[0][0] == pytest.approx(rates[0][1], rel=0.05), "divided by the loss, both are alike from the start"
    scaled = rule("famo", decay=0.0)
    losses, after = torch.tensor([1.0, 1.0]).double(), torch.tensor([0.9, 0.99]).double()
    for number in range(1, 40):
        scaled.update(Step(number, losses, torch.tensor([True, True]), after=after))
    assert scaled.weights(losses)[1] > 0.6, "the one that falls less weighs more"
    assert np.allclose(*np.array(rates[-200:]).T, rtol=0.05)


def test_famo_moves_against_the_softmax() -> None:
    balance = rule("famo", 3)
    seen: list[Tensor] = []
    balance.logits = torch.tensor([0.3, -0.1, 0.7]).double()
    balance.adam.forward = lambda values, gradient, present: seen.append(gradient) or values
    balance.update(step(1, [2.0, 1.0, 1.0], absent=(2,), after=[1.5, 0.9, 1.0]))
    logits = balance.logits[:2].clone().requires_grad_()
    change = torch.tensor([2 / 1.5, 1 / 0.9]).double().log()
    (torch.softmax(logits, 0) * change).sum().backward()
    torch.testing.assert_close(seen[0], torch.cat([logits.grad, torch.zeros(1).double()]), rtol=1e-6, atol=1e-9)
    parts = torch.softmax(balance.logits[:2], 0) / torch.tensor([2.0, 1.0])
    expected = torch.cat([parts / parts.sum(), torch.zeros(1).double()])
    torch.testing.assert_close(balance.weights(torch.tensor([2.0, 1.0, 0.0]).double()), expected)


def test_coba_against_a_plain_reading_of_the_paper() -> None:
    balance = rule("coba", 3, every=1, warmup=4, history=6, tau=5.0)
    random = np.random.default_rng(0)
    curves = np.exp(-np.outer(np.arange(12), [0.3, 0.05, 0.1])) * [3.0, 2.0, 1.0] + random.normal(0, 0.01, (12, 3))
    curves[7:, 2] = np.linspace(0.6, 0.9, 5)  # diverges
    own, steepest = [], []
    for n in range(1, 13):
        balance.update(step(n, [0.0] * 3, held_out=curves[n - 1].tolist()))
        if n < 4:
            assert torch.equal(balance.weights(), torch.ones(3).double())
            continue
        window = (curves[:n] / curves[0])[-6:]
        a = np.array([linregress(range(len(window)), window[:, t]).slope for t in range(3)])
        own.append(a)
        steepest.append(linregress(range(len(window)), window.max(1)).slope)
        soft = lambda v: np.exp(v - v.max()) / np.exp(v - v.max()).sum()  # noqa: E731
        rcs = soft(3 * a / abs(a).sum())
        past = np.array(own[-6:])
        acs = soft(-len(past) * a / abs(past).sum(0))
        m, k = np.array(steepest), len(steepest)
        df = min(k * soft(-5 * k * m / abs(m).sum())[-1], 1)
        w = soft(3 * (df * rcs + (1 - df) * acs))
        if w.min() < 1 / 30:
            w = w * 0.9 + 1 / 30
        np.testing.assert_allclose(balance.weights().numpy(), w, rtol=1e-9)
    assert balance.weights()[2] < balance.weights()[1], "what diverges is turned away from"
    np.testing.assert_allclose(slope_of(torch.tensor([[1.0], [3.0], [5.0]])), [2.0])


# Gradients


def test_pcgrad_adds_what_agrees_and_projects_what_does_not() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    same = combined("pcgrad", [[3.0, 1.0], [3.0, 1.0]], ones)
    torch.testing.assert_close(same, torch.tensor([6.0, 2.0]).double(), rtol=0, atol=0)
    assert torch.equal(combined("pcgrad", [[2.0, 0.0], [0.0, 5.0]], ones), torch.tensor([2.0, 5.0]).double())
    # (1, 0) and (-1, 1): each loses its part along the other.
    torch.testing.assert_close(
        combined("pcgrad", [[1.0, 0.0], [-1.0, 1.0]], ones), torch.tensor([0.5 + 0.0, 0.5 + 1.0]).double()
    )
    zero = combined("pcgrad", [[0.0, 0.0], [-1.0, 1.0]], ones)
    assert torch.equal(zero, torch.tensor([-1.0, 1.0]).double()), "a task that has nothing to say changes nothing"


def test_pcgrad_against_vectors_in_the_same_order() -> None:
    rows, parts = torch.randn(5, 3).double(), torch.rand(5).double()
    given = rule("pcgrad", 5).combine(rows @ rows.T, parts, seed=3) @ rows
    torch.manual_seed(3)
    originals, total = parts[:, None] * rows, torch.zeros(3).double()
    for i in range(5):
        h = originals[i].clone()
        for j in torch.randperm(5).tolist():
            if j != i and h @ originals[j] < 0:
                h -= (h @ originals[j]) / (originals[j] @ originals[j]) * originals[j]
        total += h
    torch.testing.assert_close(given, total)


def test_pcgrad_leaves_the_random_numbers_of_the_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.random.get_rng_state()
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    combined("pcgrad", [[1.0, 0.0], [-1.0, 1.0]])
    assert torch.equal(torch.random.get_rng_state(), before) and not seeded


@pytest.mark.parametrize("second", [[-3.0, 1.0], [0.2, 2.0], [-0.5, 0.3]])
def test_cagrad_finds_the_best_of_the_worst_in_its_ball(second: list[float]) -> None:
    rows, c = torch.tensor([[1.0, 0.5], second]).double(), 0.5
    found = combined("cagrad", rows.tolist(), c=c) * (1 + c**2)
    mean = rows.mean(0)
    assert float((found - mean).norm()) == pytest.approx(c * float(mean.norm()), rel=1e-4)
    angles = torch.linspace(0, 2 * torch.pi, 200_001).double()
    candidates = mean + c * mean.norm() * torch.stack([angles.cos(), angles.sin()], 1)
    best = (candidates @ rows.T).amin(1).max()
    assert float((rows @ found).min()) == pytest.approx(float(best), rel=1e-3, abs=1e-6)


def test_cagrad_without_a_radius_is_the_mean() -> None:
    torch.testing.assert_close(
        combined("cagrad", [[1.0, 0.0], [-3.0, 1.0]], c=0), torch.tensor([-1.0, 0.5]).double(), rtol=1e-9, atol=1e-9
    )


def test_aligned_gradients_have_condition_number_one() -> None:
    rows = torch.tensor([[5.0, 1.0, 0.0], [-2.0, 1.0, 0.3], [0.1, 0.0, 1.0]]).double()
    gramian, balance = rows @ rows.T, rule("aligned_mtl", 3)
    change = torch.stack([balance.combine(gramian, unit, 0) for unit in torch.eye(3).double()], 1)
    aligned = change.T @ rows
    least = torch.linalg.eigvalsh(gramian)[0]
    torch.testing.assert_close(aligned @ aligned.T, least * torch.eye(3).double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(combined("aligned_mtl", [[2.0, 0.0], [0.0, 2.0]]), torch.ones(2).double())


def test_nash_is_the_bargain_and_knows_no_scale() -> None:
    rows, parts = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 1.0, 0.5]]).double(), torch.tensor([0.7, 0.3]).double()
    gramian = rows @ rows.T
    a = rule("nash_mtl").combine(gramian, parts, 0)
    bargain = (gramian @ a) * a / parts
    assert float(bargain.max() / bargain.min()) == pytest.approx(1, rel=1e-4) and bool((a > 0).all())
    assert float(a @ gramian @ a) == pytest.approx(float(parts @ gramian @ parts))
    scaled = torch.tensor([100.0, 1.0]).double()[:, None] * rows
    other = rule("nash_mtl").combine(scaled @ scaled.T, parts, 0) @ scaled
    direction = a @ rows
    assert float(torch.cosine_similarity(other, direction, dim=0)) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(combined("nash_mtl", [[3.0, 1.0], [3.0, 1.0]]), torch.tensor([3.0, 1.0]).double())


@pytest.mark.parametrize("by", [name for name, kind in BALANCES.items() if kind.needs_gradients])
@pytest.mark.parametrize("gradients", [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [-1.0, -2.0]], [[1.0, 2.0]]])
def test_nothing_to_combine_gives_numbers(by: str, gradients: list[list[float]]) -> None:
    """No gradient, gradients that cancel, one task alone."""
    given = combined(by, gradients)
    assert bool(given.isfinite().all())
    if len(gradients) == 1 and by != "cagrad":
        torch.testing.assert_close(given, torch.tensor(gradients[0]).double())


@pytest.mark.parametrize("by", ["equal", "pcgrad", "cagrad", "aligned_mtl", "nash_mtl"])
def test_two_quadratics_that_pull_apart(by: str) -> None:
    """L_1 = 100 (x - 1)^2 / 2 and L_2 = (x + 1)^2 / 2 + y^2 / 2 share x: where each method comes to rest.

    Every x from -1 to 1 is Pareto optimal at y = 0: all methods get there, and only the plain mean at its own minimum.
    """
    x = torch.tensor([-0.9, 2.0], dtype=torch.float64)
    balance = rule(by)
    for number in range(500):
        rows = torch.stack([torch.stack([100 * (x[0] - 1), 0 * x[1]]), torch.stack([x[0] + 1, x[1]])])
        x = x - 0.015 * balance.combine(rows @ rows.T, HALVES, number) @ rows
    assert -1.01 <= float(x[0]) <= 1.01
    if by in ("equal", "pcgrad", "cagrad"):
        assert abs(float(x[1])) < 0.1
    if by == "equal":
        assert float(x[0]) == pytest.approx(99 / 101, abs=1e-3)


# State


@pytest.mark.parametrize("by", BALANCES)
def test_a_restored_rule_goes_on_bit_for_bit(by: str) -> None:
    settings = {"every": 1, "warmup": 2} if by == "coba" else {"window": 3} if by == "dwa" else {}

    def feed(balance: Rule, numbers: range) -> None:
        for n in numbers:
            random = np.random.default_rng(n)
            losses, after, norms, held = random.random((4, 3)).tolist()
            balance.update(step(n, losses, absent=(n % 3,), norms=norms, after=after, held_out=held))

    whole, first, second = (rule(by, 3, **settings) for _ in range(3))
    feed(whole, range(1, 12))
    feed(first, range(1, 6))
    second.restore(first.state())
    feed(second, range(6, 12))
    assert whole.state().keys() == second.state().keys()
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name
    assert torch.equal(whole.weights(), second.weights())


# Settings


@pytest.mark.parametrize("by", BALANCES)
def test_settings_are_read_and_written(by: str) -> None:
    assert read_balance(by) == read_balance({"by": by}) == read_balance(write_balance(read_balance(by)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("fair", "balance.by must be one of equal, uncertainty, .*, not 'fair'"),
        ({"by": "uncertinty"}, "did you mean uncertainty?"),
        ({"by": "dwa", "temperatur": 2}, "balance: unknown key temperatur; did you mean temperature?"),
        ({"by": "dwa", "temperature": 0}, "balance: temperature: input should be greater than 0"),
        ({"by": "pcgrad", "mean": "median"}, "balance: mean: input should be 'task_mean'"),
        ({"by": "cagrad", "c": 1}, "balance: c: input should be less than 1"),
        (["pcgrad"], "balance must be a name"),
    ],
)
def test_bad_settings_are_named(raw: Any, message: str) -> None:
    with pytest.raises(PemlError, match=message):
        read_balance(raw)


def test_every_rule_says_what_it_needs() -> None:
    needs = {name for name, kind in BALANCES.items() if kind.needs_gradients}
    assert needs == {"gradnorm", "famo", "pcgrad", "cagrad", "aligned_mtl", "nash_mtl"}
