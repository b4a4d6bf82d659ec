"""The kernel against ordinary autograd: every kind of core, groups of layers, dropout, precision, what is kept."""

import pytest
import torch
from torch import Tensor

from peml import kernel
from peml.kernel import Branch, low_rank, low_rank_reference

CORES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "shared": ((), (2, 3)),
    "shared, flat": ((), (6,)),
    "shared, deep": ((), (2, 2, 3)),
    "by row": ((2,), (2, 3)),
    "by row, flat": ((6,), (6,)),
    "by row, deep": ((2,), (2, 2, 3)),
    "by row, beams": ((2,), (4, 3)),
    "by token": ((2, 3), (2, 3)),
    "one token": ((1,), (1, 1)),
}
"""Dimensions in front of the core, and of x."""


def branch(lead: tuple[int, ...], diagonal: bool, frozen: bool = True, bias: bool = True, out: int = 5) -> Branch:
    """I 7, R 3, Q 4 (or 3, if diagonal)."""
    q = 3 if diagonal else 4
    tensors = [
        torch.randn(out, 7) if frozen else None,
        torch.randn(out) if frozen and bias else None,
        torch.randn(3, 7),
        torch.randn(q, out),
        torch.randn(*lead, 3) if diagonal else torch.randn(*lead, q, 3),
    ]
    return Branch(*[None if t is None else t.double() for t in tensors], diagonal)


def trained(x: Tensor, branches: list[Branch]) -> list[Tensor]:
    return [x, *(t for b in branches for t in (b.down, b.up, b.core))]


def copies(x: Tensor, branches: list[Branch]) -> tuple[Tensor, list[Branch]]:
    clone = lambda t: t.clone().requires_grad_() if isinstance(t, Tensor) else t  # noqa: E731
    return clone(x), [Branch(b.weight, b.bias, clone(b.down), clone(b.up), clone(b.core), b.diagonal) for b in branches]


def compare(x: Tensor, branches: list[Branch], dropped: Tensor | None = None, **options: float) -> None:
    """Outputs and all gradients; `dropped` is what the update reads instead of x, relative to x."""
    (one, ours), (two, theirs) = copies(x, branches), copies(x, branches)
    outputs = low_rank(one, ours, **options)[:-1]
    if dropped is None:
        expected = [low_rank_reference(two, b) for b in theirs]
    else:
        expected = []
        for b in theirs:
            update = low_rank_reference(two * dropped, b._replace(weight=None, bias=None))
            expected.append(torch.nn.functional.linear(two, b.weight, b.bias) + update)
    loss = lambda ys: sum((y * torch.sin(y + i)).sum() for i, y in enumerate(ys))  # noqa: E731
    found = torch.autograd.grad(loss(outputs), trained(one, ours))
    wanted = torch.autograd.grad(loss(expected), trained(two, theirs))
    for left, right in zip([*outputs, *found], [*expected, *wanted], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        if dropped is None:
            for left, right in zip(low_rank(x, branches), expected, strict=False):
                torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("frozen", "bias"), [(True, True), (True, False), (False, False)])
def test_one_layer_equals_autograd(core: str, diagonal: bool, frozen: bool, bias: bool) -> None:
    lead, shape = CORES[core]
    compare(torch.randn(*shape, 7).double(), [branch(lead, diagonal, frozen, bias)])


@pytest.mark.parametrize("core", CORES)
def test_a_group_equals_its_layers(core: str) -> None:
    """Different widths, ranks, kinds of core; with and without bias."""
    lead, shape = CORES[core]
    group = [branch(lead, False), branch((), True, bias=False, out=2), branch(lead, True, out=4)]
    compare(torch.randn(*shape, 7).double(), group)


def test_an_input_that_is_not_contiguous() -> None:
    x = torch.randn(3, 2, 7).double().transpose(0, 1)
    compare(x, [branch((2,), False), branch((2,), True)])
    compare(torch.randn(2, 3, 14).double()[..., ::2], [branch((2,), False)])


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("needed", ["x", "down", "up", "core"])
def test_only_what_is_needed_gets_a_gradient(lead: tuple[int, ...], needed: str) -> None:
    x, own = torch.randn(2, 3, 7).double(), branch(lead, False)
    named = {"x": x, "weight": own.weight, "bias": own.bias, "down": own.down, "up": own.up, "core": own.core}
    named[needed].requires_grad_()
    low_rank(x, [own])[0].sum().backward()
    assert [name for name, t in named.items() if t.grad is not None] == [needed]


def test_an_output_that_nobody_uses() -> None:
    """Siblings whose result is dropped, as by a model that ends early."""
    x, group = torch.randn(2, 3, 7).double(), [branch((2,), False), branch((2,), True)]
    (one, ours), (two, theirs) = copies(x, group), copies(x, group)
    low_rank(one, ours)[1].square().sum().backward()
    low_rank_reference(two, theirs[1]).square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-11, atol=1e-11)
    assert ours[0].up.grad is None and not ours[0].down.grad.any()


def test_hidden_features_come_out_with_a_gradient() -> None:
    """H of all layers, side by side: losses on features hang on it."""
    x, group = torch.randn(2, 3, 7).double(), [branch((2,), False), branch((), True)]
    (one, ours), (two, theirs) = copies(x, group), copies(x, group)
    *outputs, hidden = low_rank(one, ours)
    wanted = torch.cat([two @ b.down.T for b in theirs], dim=-1)
    torch.testing.assert_close(hidden, wanted, rtol=1e-12, atol=1e-12)
    (sum(y.sum() for y in outputs) + hidden.pow(3).sum()).backward()
    (sum(low_rank_reference(two, b).sum() for b in theirs) + wanted.pow(3).sum()).backward()
    for left, right in zip(trained(one, ours), trained(two, theirs), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 2)])
def test_gradcheck(lead: tuple[int, ...], diagonal: bool) -> None:
    x, own = torch.randn(2, 2, 7).double(), branch(lead, diagonal)
    for t in trained(x, [own]):
        t.requires_grad_()

    def function(x: Tensor, down: Tensor, up: Tensor, core: Tensor) -> tuple[Tensor, ...]:
        return tuple(low_rank(x, [own._replace(down=down, up=up, core=core)]))

    assert torch.autograd.gradcheck(function, trained(x, [own]))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x, own = torch.randn(2, 3, 7).double().requires_grad_(), branch((), False)
    (gradient,) = torch.autograd.grad(low_rank(x, [own])[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_an_output_may_be_changed_in_place() -> None:
    """Models do that to queries and keys."""
    x, group = torch.randn(2, 3, 7).double().requires_grad_(), [branch((), False), branch((), True)]
    first, second, _ = low_rank(x, group)
    first.mul_(2)
    second.add_(1)
    (found,) = torch.autograd.grad(first.sum() + second.sum(), x)
    wanted = 2 * low_rank_reference(x, group[0]).sum() + low_rank_reference(x, group[1]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(wanted, x)[0])


# Dropout


def test_dropout_is_one_mask_for_all_layers_in_both_directions() -> None:
    x, group = torch.randn(2, 3, 7).double(), [branch((2,), False), branch((), True)]
    torch.manual_seed(3)
    plan = kernel._Plan((), 0.4, int(torch.randint(2**62, ())))
    kept, probability = kernel._kept(plan, x.view(-1, 7))
    torch.manual_seed(3)
    compare(x, group, dropped=kept.double().view(x.shape) / probability, dropout=0.4)
    with torch.no_grad():
        torch.manual_seed(3)
        first = low_rank(x, group, 0.4)[0]
        again = low_rank(x, group, 0.4)[0]
        torch.manual_seed(3)
        repeated = low_rank(x, group, 0.4)[0]
    assert torch.equal(first, repeated) and not torch.equal(first, again)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_dropout_drops_as_often_as_it_says(dropout: float) -> None:
    kept, probability = kernel._kept(kernel._Plan((), dropout, 5), torch.empty(700, 701))
    assert kept.shape == (700, 701) and kept.dtype == torch.bool
    assert abs(probability - (1 - dropout)) < 1e-4
    assert abs(float(kept.float().mean()) - probability) < 3e-3
    neighbours = (kept[:, 1:] & kept[:, :-1]).float().mean()
    assert abs(float(neighbours) - probability**2) < 4e-3


# Precision and memory


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_half_precision_keeps_full_precision_gradients(lead: tuple[int, ...], diagonal: bool) -> None:
    x, own = torch.randn(2, 40, 7), branch(lead, diagonal)
    exact = own._replace(**{n: getattr(own, n).float() for n in ("weight", "bias", "down", "up", "core")})
    half = exact._replace(weight=exact.weight.bfloat16(), bias=exact.bias.bfloat16())
    (one, ours), (two, theirs) = copies(x.bfloat16(), [half]), copies(x, [exact])
    y, wanted = low_rank(one, ours)[0], low_rank_reference(two, theirs[0])
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    for left, right in zip(trained(one, ours), trained(two, theirs), strict=True):
        assert left.grad.dtype == left.dtype
        assert (left.grad.float() - right.grad).norm() < 0.03 * right.grad.norm()


def saved_bytes(function) -> int:
    """Bytes of all storages that backward keeps, each once."""
    storages: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        function()
    return sum(storages.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_x_and_its_features_are_kept(dropout: float) -> None:
    """Whatever the number of layers, and with dropout no mask."""
    x = torch.randn(2, 50, 7).double().requires_grad_()
    group = [branch((2,), False), branch((), True), branch((2,), True)]
    own = sum(t.untyped_storage().nbytes() for b in group for t in b[:5] if t is not None)
    kept = saved_bytes(lambda: low_rank(x, group, dropout)) - own
    assert kept == 8 * 100 * (7 + 3 * 3) + (8 if dropout else 0)  # a seed
