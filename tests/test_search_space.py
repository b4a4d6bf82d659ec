"""Relaxations, budgets and costs of a search."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peml
from models import adapt, probe_loss, shake, tiny, tokens
from peml import PemlError, PrefixNAS
from peml.prompts import AttentionSlot, ModelShape, PrefixGenerator, cost, relaxation
from peml.prompts.operations import OPERATIONS, Operation, operation_multiply_adds, operation_parameters

SLOTS = (AttentionSlot(2, 3), AttentionSlot(1, 5), AttentionSlot(2, 3))
SHAPE = ModelShape(SLOTS, 24)
SMALL = PrefixNAS(num_virtual_tokens=5, num_cells=2, width=9, embedding_dim=4, head_rank=3, budget_tokens=2.0)
WIDTHS = torch.tensor([12.0, 10.0, 12.0], dtype=torch.float64)


def generator(**changes) -> PrefixGenerator:
    prompt = dataclasses.replace(SMALL, **changes).build(SHAPE, num_tasks=3).double()
    shake(prompt.parameters(), 0.4)
    return prompt


def flat(prompt: PrefixGenerator) -> Tensor:
    """Everything a forward gives, in a row."""
    return torch.cat([part.flatten() for layer in prompt(None) for part in layer])


# Gumbel


def test_only_the_drawn_operation_runs() -> None:
    prompt = generator(relaxation="gumbel").train()
    calls: list[int] = []
    for cell in prompt.cells:
        for o, operation in enumerate(cell):
            operation.register_forward_hook(lambda *_, o=o: calls.append(o))
    seen = set()
    for _ in range(60):
        calls.clear()
        prompt(None)
        assert len(calls) == len(prompt.cells)
        seen.update(calls)
    assert seen == set(range(9)), "drawn anew in each forward"
    prompt.eval()
    calls.clear()
    prompt(None)
    assert calls == prompt.alpha.argmax(1).tolist()


def test_draws_have_the_probabilities_of_a_softmax() -> None:
    """Whatever the temperature; forward one-hot exactly, backward that of the noisy softmax."""
    alpha = torch.tensor([[0.3, -1.0, 0.9]], dtype=torch.float64, requires_grad=True)
    for tau in (0.1, 5.0):
        draws = torch.stack([relaxation.relaxed("gumbel", alpha, torch.tensor(tau), True).values for _ in range(4000)])
        assert set(draws.detach().unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(draws.mean(0), torch.softmax(alpha, -1), rtol=0, atol=0.04)
    torch.manual_seed(3)
    weights = relaxation.relaxed("gumbel", alpha, torch.tensor(0.7), True)
    torch.manual_seed(3)
    noise = -torch.empty_like(alpha).exponential_().log()
    soft = torch.softmax((torch.log_softmax(alpha, -1) + noise) / 0.7, -1)
    assert weights.chosen == soft.argmax(-1).tolist()
    probe = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    found, wanted = (torch.autograd.grad((x * probe).sum(), alpha)[0] for x in (weights.values, soft))
    torch.testing.assert_close(found, wanted)


def test_the_gradient_of_a_drawn_operation_is_its_formula() -> None:
    """What the cell gives is the operation that was drawn; alpha feels it through its noisy softmax."""
    prompt = generator(relaxation="gumbel", num_cells=1).train()
    entered = (prompt.seed @ prompt.into).detach()
    for seed in range(3):
        torch.manual_seed(seed)
        found = prompt.hidden()
        torch.manual_seed(seed)
        noise = -torch.empty(1, 9, dtype=torch.float64).exponential_().log()
        soft = torch.softmax(torch.log_softmax(prompt.alpha, -1) + noise, -1)[0]
        drawn = int(soft.argmax())
        alone = prompt.cells[0][drawn](entered).detach()
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-14)
        left, right = (torch.autograd.grad(probe_loss(x), prompt.alpha)[0] for x in (found, soft[drawn] * alone))
        assert left.any()
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_noise_that_is_not_finite_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.0, math.inf, 1.0])
    monkeypatch.setattr(Tensor, "exponential_", lambda self: self.fill_(next(values)))
    weights = relaxation.relaxed("gumbel", torch.zeros(1, 2), torch.tensor(1.0), True)
    assert weights.values.isfinite().all() and next(values, None) is None


# Gates that are drawn


def test_a_gate_of_zero_excludes_its_token() -> None:
    """But for a part in 10^9 of its weight; and its logit still has a gradient, which deleting it could not give."""
    config = dataclasses.replace(SMALL, gate_relaxation="straight_through", gate_init=None)
    model = adapt(tiny(), prompt=config)
    prompt, batch = model.base_model.prompt, tokens()
    with torch.no_grad():
        prompt.token_gate[:, 1:3] = -1.0
    logits = model(input_ids=batch).logits
    probe_loss(logits).backward()
    assert prompt.token_gate.grad[:, 1:3].abs().min() > 1e-6
    with torch.no_grad():
        prompt.kept[:, 1:3] = False
    prompt._derived = None
    torch.testing.assert_close(model(input_ids=batch).logits, logits, rtol=1e-7, atol=1e-5)


def test_gates_are_drawn_with_their_probability_in_training_alone() -> None:
    prompt = generator(gate_relaxation="straight_through", gate_init=None, exact_budget=False)
    quiet = prompt.eval().log_gates()
    wanted = (prompt.token_gate > 0) & (prompt.layer_gate > 0)[:, None]
    assert torch.equal(quiet == 0, wanted) and torch.equal(quiet, prompt.log_gates())
    with torch.no_grad():
        prompt.layer_gate.fill_(50.0)
        prompt.token_gate.copy_(torch.linspace(-2, 2, 15).view(3, 5))
    drawn = torch.stack([prompt.train().log_gates().detach().exp() for _ in range(3000)])
    torch.testing.assert_close(drawn.mean(0), torch.sigmoid(prompt.token_gate.detach()), rtol=0, atol=0.04)
    prompt.derive()
    assert all(layer is None or layer.log_gate is None for layer in prompt(None)), "those that remain are 1"


def test_the_gradient_of_a_drawn_gate_is_its_formula() -> None:
    """Of a logistic step of temperature tau, over what the token weighs now."""
    beta = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    tau, probe = torch.tensor(0.3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.manual_seed(7)
    log = relaxation.log_gate("straight_through", beta, tau, draw=True)
    torch.manual_seed(7)
    first, second = (-torch.empty_like(beta).exponential_().log() for _ in range(2))
    moved = (beta + first - second).detach()
    weight = torch.full_like(moved, 1e-9).masked_fill(moved > 0, 1.0)
    assert 0 < (moved > 0).sum() < 15
    torch.testing.assert_close(log, weight.log())
    step = torch.sigmoid(moved / tau)
    found = torch.autograd.grad((log * probe).sum(), beta)[0]
    torch.testing.assert_close(found, probe * step * (1 - step) / tau / weight)


# Collapse to skip


def test_dropout_on_skips_falls_to_nothing() -> None:
    prompt = generator(operations=("identity",), skip_dropout=0.5, gate_init=None)
    whole = flat(prompt.eval())
    prompt.set_progress(0.5)
    shares = []
    for fraction in (0.0, 0.5, 1.0):
        prompt.set_progress(fraction)
        hidden = torch.stack([prompt.train().hidden() for _ in range(400)])
        shares.append(float((hidden == 0).double().mean()))
    # Two cells in a row, each drops a number with p (1 - progress).
    assert shares == pytest.approx([0.75, 1 - 0.75**2, 0.0], abs=0.03)
    assert torch.equal(flat(prompt.eval()), whole)
    other = generator(operations=("linear",), skip_dropout=0.5).train()
    assert torch.equal(flat(other), flat(other)), "other operations keep all they give"


# The head


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "gumbel", "sigmoid"])
def test_a_head_whose_rank_is_decided_is_that_head(kind: str) -> None:
    prompt = generator(
        head_rank=(1, 3, 2), relaxation=kind, operations=("linear",), gate_threshold=0.0, budget_tokens=5.0
    )
    prompt.head_alpha.copy_(torch.tensor([-1e5, -1e5, 1e5]))
    prompt.alpha.fill_(1e5)
    before = flat(prompt)
    prompt.derive()
    assert prompt.architecture().head_rank == 2
    torch.testing.assert_close(flat(prompt), before, rtol=1e-12, atol=1e-14)


def test_a_drawn_rank_runs_alone_and_its_gradient_knows_the_others() -> None:
    """Forward the head that was drawn, backward that of all under the weights of the noisy softmax."""
    prompt, ranks = generator(head_rank=(1, 3, 2), relaxation="gumbel").train(), (1, 3, 2)
    hidden, seen = torch.randn(5, 9, dtype=torch.float64), set()
    heads = torch.stack([hidden @ prompt.head_in[:, :q] @ prompt.head_out[:q] for q in ranks]).detach()
    for seed in range(12):
        torch.manual_seed(seed)
        found = prompt.head(hidden)
        torch.manual_seed(seed)
        noise = -torch.empty(1, 3, dtype=torch.float64).exponential_().log()[0]
        soft = torch.softmax(torch.log_softmax(prompt.head_alpha, -1) + noise, -1)
        drawn = int(soft.argmax())
        torch.testing.assert_close(found, heads[drawn], rtol=1e-12, atol=1e-14)
        wanted = probe_loss(torch.tensordot(soft, heads, dims=1))
        left, right = (torch.autograd.grad(loss, prompt.head_alpha)[0] for loss in (probe_loss(found), wanted))
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
        seen.add(drawn)
    assert seen == {0, 1, 2}


# Budgets


def test_the_budget_in_three_units() -> None:
    width = 34
    given = {"budget_tokens": 3.0, "budget_mb": 3 * width * 2 / 1e6, "budget_percent": 0.3, "budget_context": 1000}
    for name in ("budget_tokens", "budget_mb", "budget_percent"):
        config = PrefixNAS(**{key: value for key, value in given.items() if key in (name, "budget_context")})
        assert config.budget(SHAPE) == pytest.approx(3 * width)
    assert PrefixNAS().budget(SHAPE) == 16 * width
    # LLaMA-2-7B: 16 tokens are 4.2 M numbers, 8.4 MB in bfloat16.
    llama = ModelShape((AttentionSlot(32, 128),) * 32, 4096)
    assert PrefixNAS(budget_mb=8.388608).budget(llama) == pytest.approx(PrefixNAS().budget(llama)) == 4_194_304


def test_a_budget_of_whole_tokens_is_not_short_of_one() -> None:
    """In binary 0.7 % of 1000 is a little less than 7; and a gate that is as good as closed still is not deployed."""
    for n in range(1, 33):
        for given in ({"budget_percent": n / 10, "budget_context": 1000}, {"budget_mb": n * 34 * 2 / 1e6}):
            config = PrefixNAS(
                num_virtual_tokens=32, width=4, embedding_dim=2, head_rank=1, operations=("none",), **given
            )
            assert config.budget(SHAPE) >= n * 34
            if n in (7, 29):
                prompt = config.build(SHAPE, 1)
                prompt.derive()
                assert prompt.architecture().lengths == (n, n, n)


@pytest.mark.parametrize("budget", [0.3, 2.0, 4.5])
def test_an_exact_budget_is_met_and_differentiable(budget: float) -> None:
    """The gradient of the shift, by the implicit function theorem, against finite differences of a new solution."""
    beta = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    gamma = (torch.randn(3, dtype=torch.float64) + 3).requires_grad_()
    numbers = budget * float(WIDTHS.sum()) * 0.8

    def shifted() -> Tensor:
        layers = torch.sigmoid(gamma)
        return beta + cost.common_shift(beta, layers, WIDTHS, numbers)

    gates = torch.sigmoid(shifted())
    assert cost.expected(gates, torch.sigmoid(gamma), WIDTHS).item() == pytest.approx(numbers, rel=1e-10)
    probe = torch.randn(3, 5, dtype=torch.float64)

    def loss() -> Tensor:
        return (torch.sigmoid(shifted()) * probe).sum()

    found = torch.autograd.grad(loss(), (beta, gamma))
    for parameter, gradient in zip((beta, gamma), found, strict=True):
        wanted = torch.zeros_like(parameter)
        for i in range(parameter.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                    ends.append(float(loss()))
                    parameter.view(-1)[i] -= step
            wanted.view(-1)[i] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)
        assert gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_budget_above_everything_opens_all_gates(dtype: torch.dtype) -> None:
    beta = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    shift = cost.common_shift(beta, torch.ones(3, dtype=dtype), WIDTHS.to(dtype), 1e9)
    assert torch.sigmoid(beta + shift).min() >= 1 - 1e-12
    assert torch.autograd.grad(shift, beta, allow_unused=True)[0].isfinite().all()


@torch.no_grad()
def test_an_exact_budget_is_what_is_deployed() -> None:
    """To the token; the gates that remain are those of the search."""
    prompt = generator(exact_budget=True, budget_tokens=2.0)
    expected = prompt.expected_cost()
    assert float(expected) == pytest.approx(1.0) and "cost" not in prompt.penalties()
    gates = prompt.gates()[0].clone()
    before, strength = prompt.log_gates().clone(), prompt.strength.clone()
    prompt.derive()
    taken_over = prompt.strength - strength
    lengths = prompt.architecture().lengths
    spent = sum(n * float(w) for n, w in zip(lengths, WIDTHS, strict=True))
    assert 68 - 12 < spent <= 68
    torch.testing.assert_close(prompt.gates()[0], gates)
    for layer, row in enumerate(prompt.architecture().tokens):
        if row:
            found = prompt(None)[layer].log_gate
            torch.testing.assert_close(found, before[layer, list(row)] + taken_over[layer])
            # What goes is not missed: attention gives the layer's prefix as much as before.
            torch.testing.assert_close(found.exp().sum(), before[layer].exp().sum())
            assert taken_over[layer] > 0 or len(row) == 5
        else:
            assert taken_over[layer] == 0


# One's own operation, and times


class Shift(Operation):
    """H + v."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width)
        self.by = nn.Parameter(torch.randn(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.by


def test_an_operation_of_ones_own_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PemlError, match="unknown 'shift'; .* into peml.prompts.OPERATIONS first"):
        PrefixNAS(operations=("shift",))
    monkeypatch.setitem(peml.prompts.OPERATIONS, "shift", Shift)
    before = torch.random.get_rng_state()
    assert operation_parameters("shift", 5, 9) == 9 and operation_multiply_adds("shift", 5, 9) == 45
    assert torch.equal(torch.random.get_rng_state(), before)
    config = dataclasses.replace(SMALL, operations=("linear", "shift"))
    prompt = config.build(SHAPE, 1)
    assert sum(p.numel() for p in prompt.parameters()) == config.num_parameters(SHAPE, 1)
    with torch.no_grad():
        prompt.alpha[:, 1] = 1.0
    prompt.derive()
    assert prompt.architecture().operations == ("shift", "shift")


@pytest.mark.parametrize("name", OPERATIONS)
def test_multiply_adds_are_those_of_the_products(name: str) -> None:
    """Counted by torch, which sees products of matrices and convolutions; `lowrank_mul` has neither."""
    from torch.utils.flop_counter import FlopCounterMode

    operation, hidden = OPERATIONS[name](6, 8), torch.randn(6, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        operation(hidden)
    expected = 2 * 6 * 8 if name == "lowrank_mul" else counter.get_total_flops() // 2
    assert operation_multiply_adds(name, 6, 8) == expected


def test_every_operation_can_be_measured() -> None:
    """Also `none`, which has no backward pass; and no draw of the training changes."""
    before = torch.random.get_rng_state()
    seconds = dataclasses.replace(SMALL, operations=tuple(OPERATIONS)).measure_operations()
    assert set(seconds) == set(OPERATIONS) and min(seconds.values()) > 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_measured_times_stand_in_for_multiply_adds() -> None:
    config = dataclasses.replace(SMALL, operations=("identity", "linear", "self_attn"))
    seconds = config.measure_operations()
    assert list(seconds) == list(config.operations) and min(seconds.values()) > 0
    measured = dataclasses.replace(config, operation_times=tuple(seconds.values()), time_budget=min(seconds.values()))
    prompt = measured.build(SHAPE, 1).double()
    weights = prompt.cell_weights()
    wanted = (weights * torch.tensor(list(seconds.values()), dtype=torch.float64)).sum() / min(seconds.values()) - 1
    torch.testing.assert_close(prompt.penalties()["time"], 0.1 * wanted)


# Precision, and what a device waits for


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relaxation", ["softmax", "gumbel", "sigmoid"])
@pytest.mark.parametrize("gates", ["sigmoid", "straight_through"])
def test_a_search_in_half_precision_stays_finite(dtype: torch.dtype, relaxation: str, gates: str) -> None:
    """A weight of 1e-9 and a count of 10^5 parameters are beyond float16; the search is computed in float32."""
    shape = ModelShape((AttentionSlot(2, 3), AttentionSlot(200, 200)), 24)
    config = dataclasses.replace(
        SMALL, relaxation=relaxation, gate_relaxation=gates, head_rank=(2, 3), width=300, parameter_budget=1000,
        time_budget=1e-3,
    )  # fmt: skip
    prompt = config.build(shape, 1).to(dtype)
    prompt.set_progress(0.9)
    with torch.no_grad():
        prompt.alpha[0, 0] = 6.0
        prompt.token_gate[:, 1:3] = -30.0
    layers, terms = prompt(None), prompt.penalties()
    assert layers[0].keys.dtype == dtype
    weights = [layer.log_gate.exp() for layer in layers]  # as attention weighs: of a closed token next to nothing
    parts = [part.float() for layer in layers for part in layer[:2]] + weights
    (sum(part.sum() for part in parts) + sum(terms.values())).backward()
    assert all(part.isfinite().all() for layer in layers for part in layer)
    assert all(term.isfinite() for term in terms.values()), terms
    assert all(parameter.grad.isfinite().all() for parameter in prompt.architecture_parameters())
    exact = prompt.double().penalties()
    for name, term in terms.items():
        assert float(term.detach()) == pytest.approx(float(exact[name].detach()), rel=2e-2), name


class Traffic(TorchDispatchMode):
    """Numbers that go from Python to tensors, or back: with a GPU each of them is a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            self.seen.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("relaxation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("state", ["search", "derived", "imported"])
def test_a_step_never_waits_for_the_device(relaxation: str, state: str) -> None:
    changes = {"head_rank": (2, 3), "parameter_budget": 10, "time_budget": 1e-4, "relaxation": relaxation}
    if state == "imported":
        changes["architecture"] = "random:1"
    prompt = generator(**changes)
    if state == "derived":
        prompt.derive()

    def step() -> None:
        prompt.set_progress(0.7)
        loss = sum(part.sum() for layer in prompt(None) if layer is not None for part in layer)
        (loss + sum(prompt.penalties().values())).backward()

    step()
    with Traffic() as traffic:
        step()
    assert traffic.seen == []
    if state != "search":
        assert any(0 < len(row) < 5 for row in prompt.architecture().tokens), "some tokens are picked"
    # What was moved once goes along, in whatever precision.
    assert prompt.widths().dtype == torch.float64 and prompt.float().widths().dtype == torch.float32
    assert prompt.to("meta").widths().device.type == "meta"


# The log


def test_traces_say_where_the_search_is() -> None:
    prompt = generator(head_rank=(2, 3))
    prompt.set_progress(0.5)
    found = prompt.traces()
    (own, layers), weights = prompt.gates(), prompt.cell_weights()
    gates = own * layers[:, None]
    assert set(found) == {
        "entropy", "gate", "temperature", "cost", "rank", "strength", "tokens/0", "tokens/1", "tokens/2", "leading/0",
        "leading/1",
    }  # fmt: skip
    expected = {
        "entropy": -(weights * weights.log()).sum(1).mean(),
        "gate": gates.mean(),
        "temperature": 0.1**0.5,
        "cost": (gates.sum(1) * WIDTHS).sum() / 68,
        "rank": prompt.rank_weights() @ torch.tensor([2.0, 3.0], dtype=torch.float64),
        "strength": prompt.strength.mean(),
        "tokens/1": gates[1].sum(),
        "leading/0": weights[0].max(),
    }
    assert found == pytest.approx(
        {**found, **{key: float(torch.as_tensor(value).detach()) for key, value in expected.items()}}
    )
    prompt.derive()
    assert prompt.traces() == {}


@pytest.mark.parametrize("changes", [{"relaxation": "gumbel"}, {"gate_relaxation": "straight_through"}, {}])
def test_the_same_seed_finds_the_same_architecture(changes: dict) -> None:
    found = []
    for seed in (0, 0):
        torch.manual_seed(seed)
        prompt = dataclasses.replace(SMALL, **changes).build(SHAPE, 1).train()
        optimizer = torch.optim.Adam(prompt.parameters(), lr=0.05)
        for step in range(12):
            prompt.set_progress(step / 12)
            loss = sum(part.sin().sum() for layer in prompt(None) for part in layer)
            (loss + sum(prompt.penalties().values())).backward()
            optimizer.step()
            optimizer.zero_grad()
        prompt.derive()
        found.append(prompt.architecture())
    assert found[0] == found[1]
