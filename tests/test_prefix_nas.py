"""The generator, its search and what becomes of it."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor

import peml
import references
from models import adapt, gradients, probe_loss, shake, tiny, tokens
from peml import PemlError
from peml.prompts import AttentionSlot, ModelShape, PrefixGenerator, PrefixNAS
from peml.prompts.generator import UNLED
from peml.prompts.objective import undecided
from peml.prompts.operations import DEFAULT_OPERATIONS, OPERATIONS, operation_multiply_adds, operation_parameters

SLOTS = (AttentionSlot(2, 3), AttentionSlot(1, 5), AttentionSlot(2, 3))
SHAPE = ModelShape(SLOTS, 24)
SMALL = PrefixNAS(
    num_virtual_tokens=5, num_cells=2, width=9, embedding_dim=4, head_rank=3, budget_tokens=2.0, exact_budget=False
)


def generator(shaken: bool = True, **changes) -> PrefixGenerator:
    prompt = dataclasses.replace(SMALL, **changes).build(SHAPE, num_tasks=3).double()
    if shaken:
        shake(prompt.parameters(), 0.4)
    return prompt


def compare(left, right, exactly: bool = False) -> None:
    tolerance = 0 if exactly else 1e-12
    for one, other in zip(left, right, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            for part in range(2):
                torch.testing.assert_close(one[part], other[part], rtol=tolerance, atol=tolerance)
            gates = [
                torch.zeros(p.num_tokens, dtype=torch.float64) if p.log_gate is None else p.log_gate
                for p in (one, other)
            ]
            torch.testing.assert_close(*gates, rtol=tolerance, atol=tolerance)


# Operations


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("p", "h"), [(5, 9), (1, 3), (4, 8)])
def test_every_operation(name: str, p: int, h: int) -> None:
    """Builds, equals its naive version, gives a gradient to all it has, and has what its formula says."""
    operation = OPERATIONS[name](p, h).double()
    shake(operation.parameters(), 0.3)
    hidden = torch.randn(p, h, dtype=torch.float64, requires_grad=True)
    found = operation(hidden)
    own = dict(operation.named_parameters())
    expected = references.OPERATIONS[name](hidden, own)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found.shape == (p, h)
    assert sum(parameter.numel() for parameter in own.values()) == operation_parameters(name, p, h)
    if name == "none":
        assert not found.any()
        return
    trained = [hidden, *own.values()]
    left, right = (torch.autograd.grad(probe_loss(y), trained, retain_graph=True) for y in (found, expected))
    for one, other, parameter in zip(left, right, trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        # With a single token a softmax is 1 whatever its score; a narrow relu may be closed.
        assert one.any() or p == 1 or name == "res_bottleneck" or "relu" in name, parameter.shape


def test_the_default_operations_are_one_of_each_family() -> None:
    assert set(DEFAULT_OPERATIONS) < set(OPERATIONS) - {"none"} and PrefixNAS().operations == DEFAULT_OPERATIONS
    families = [re.sub(r"_.*|\d", "", name) for name in DEFAULT_OPERATIONS]
    assert len(OPERATIONS) == 21 and families.count("mlp") == 2 and len(set(families)) == len(families) - 1


@pytest.mark.parametrize("operations", [tuple(OPERATIONS), ("identity",), ("none", "linear")])
def test_any_set_of_operations_trains(operations: tuple[str, ...]) -> None:
    model = adapt(tiny(), prompt=dataclasses.replace(SMALL, operations=operations))
    probe_loss(model(input_ids=tokens()).logits).backward()
    found = gradients(model)
    for name in ("seed", "into", "head_in", "head_out", "token_gate", "layer_gate"):
        assert found[f"base_model.model.prompt_host.peml_prompt.default.{name}"].any(), name


def test_the_formula_of_the_defaults() -> None:
    """Search of LLaMA-2-7B: head 16.8 M, one whole cell 2.89 M; 16 tokens deploy 4.2 M numbers."""
    shape, config = ModelShape((AttentionSlot(32, 128),) * 32, 4096), PrefixNAS()
    head = 512 * 64 + 64 * 32 * 8192
    cell = sum(operation_parameters(name, 32, 512) for name in config.operations)
    assert round(head / 1e6, 1) == 16.8 and round(cell / 1e6, 2) == 2.89
    assert operation_parameters("mlp_gelu_h", 32, 512) == 524_288
    rest = 32 * 256 + 256 * 512 + 2 * len(config.operations) + 32 * 32 + 32 + 32 + 2 * 32
    assert config.num_parameters(shape, 8) == head + 2 * cell + rest
    assert peml.PrefixTuning(16).num_parameters(shape, 8) == 16 * 32 * 8192 == 4_194_304
    assert peml.PrefixTuning(20).num_parameters(shape, 8) == 32 * 163_840
    assert peml.PrefixTuning(20, per_task=True).num_parameters(shape, 8) == 8 * 32 * 163_840


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"operations": ("identity",)}, {"num_cells": 3}, {"operations": tuple(OPERATIONS)}, {"head_rank": (2, 4)},
        {"search_tokens": False}, {"search_layers": False}, {"gate_init": None}, {"architecture": "random:1"},
        {"normalize_kv": False},
    ],
)  # fmt: skip
def test_the_count_is_the_formula(changes: dict) -> None:
    config = dataclasses.replace(SMALL, **changes)
    assert sum(p.numel() for p in config.build(SHAPE, 3).parameters()) == config.num_parameters(SHAPE, 3)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_fresh_generator_has_the_scales_of_its_formula(normalized: bool) -> None:
    """Maps one over the root of their rows, alpha 0.001: so that no operation leads from the start.

    E is of size 1 as what operations are made for; E and the head 0.02 where the head sets the size of keys and values.
    """
    config = PrefixNAS(256, 2, 128, 256, 64, operations=("linear", "mlp_gelu_2h"), normalize_kv=normalized)
    prompt = config.build(SHAPE, 1)
    scales = {
        "seed": 1.0 if normalized else 0.02,
        "into": 256**-0.5,
        "head_in": 128**-0.5 if normalized else 0.02,
        "head_out": 64**-0.5 if normalized else 0.02,
        "cells.0.0.weight": 128**-0.5,
        "cells.1.1.out": 256**-0.5,
    }
    for name, scale in scales.items():
        assert float(prompt.get_parameter(name).detach().std()) == pytest.approx(scale, rel=0.1), name
    wide = PrefixNAS(4, 100, 4, 4, 1).build(SHAPE, 1)
    assert float(wide.alpha.detach().std()) == pytest.approx(1e-3, rel=0.15)


# The search


@pytest.mark.parametrize("gate_after", ["keep", "unit"])
@pytest.mark.parametrize("end_to_end", [False, True])
@torch.no_grad()
def test_one_hot_weights_and_binary_gates_are_the_derived_network(gate_after: str, end_to_end: bool) -> None:
    """No gap at all between the end of such a search and what is deployed."""
    config = dataclasses.replace(SMALL, gate_after=gate_after, budget_tokens=5.0)
    if end_to_end:
        model = adapt(tiny(), prompt=config)
        prompt, batch = model.base_model.prompt, tokens()
        run = lambda: model(input_ids=batch).logits  # noqa: E731
    else:
        prompt = generator(gate_after=gate_after, budget_tokens=5.0)
        run = lambda: prompt(None)  # noqa: E731
    chosen = torch.randint(len(config.operations), (2,))
    prompt.alpha.fill_(-1e5).scatter_(1, chosen[:, None], 1e5)
    is_open = torch.rand_like(prompt.token_gate) < 0.5
    is_open[0, 0] = True
    prompt.token_gate.copy_(torch.where(is_open, 1e5, -1e5))
    prompt.layer_gate.fill_(1e5)
    before = run()
    prompt.derive()
    assert prompt.architecture().operations == tuple(config.operations[c] for c in chosen)
    assert prompt.architecture().lengths == tuple(is_open.sum(1).tolist())
    after = run()
    if end_to_end:
        torch.testing.assert_close(after, before, rtol=1e-13, atol=1e-13)
        return
    for layer, (supernet, derived) in enumerate(zip(before, after, strict=True)):
        tokens_kept = is_open[layer].nonzero().flatten()
        if derived is None:
            assert not len(tokens_kept)
            continue
        # Products of another shape may round differently in the last place.
        for part in range(2):
            torch.testing.assert_close(derived[part], supernet[part][:, :, tokens_kept], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            derived.log_gate, prompt.strength[layer].expand(len(tokens_kept)), rtol=0, atol=1e-14
        )


def numerical(function, parameter: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function."""
    out = torch.zeros_like(parameter)
    flat, values = parameter.data.view(-1), out.view(-1)
    for i in range(flat.numel()):
        before = flat[i].item()
        ends = []
        for value in (before + step, before - step):
            flat[i] = value
            with torch.no_grad():
                ends.append(float(function()))
        flat[i] = before
        values[i] = (ends[0] - ends[1]) / (2 * step)
    return out


@pytest.mark.parametrize("relaxation", ["softmax", "gumbel", "sigmoid"])
@pytest.mark.parametrize("name", ["entropy", "cost", "parameters", "time"])
def test_penalties_against_finite_differences(name: str, relaxation: str) -> None:
    """And against the formula."""
    prompt = generator(
        budget_tokens=0.05, parameter_budget=100, time_budget=1e-4, entropy_weight=0.3, cost_weight=2.0,
        parameter_weight=0.5, time_weight=0.7, head_rank=(2, 3), relaxation=relaxation,
    )  # fmt: skip
    prompt.set_progress(0.8)
    term = prompt.penalties()[name]
    alpha, head, beta, gamma = (p.detach() for p in prompt.architecture_parameters())
    tau = 1.0 if relaxation == "gumbel" else 1.0 * (0.1 / 1.0) ** 0.8
    weigh = torch.sigmoid if relaxation == "sigmoid" else lambda a: torch.softmax(a / tau, dim=-1)
    weights, ranks = weigh(alpha), weigh(head)
    gates, layers = torch.sigmoid(beta), torch.sigmoid(gamma)
    if name == "entropy":
        if relaxation == "sigmoid":
            rows = [(row * (1 - row)).mean() for row in (*weights, ranks)]
        else:
            rows = [-(row * row.log()).sum() for row in (*weights, ranks)]
        open_gates = sum(-(g * g.log() + (1 - g) * (1 - g).log()).mean() for g in (gates, layers))
        expected = 0.3 * (2 * 0.8 - 1) * (torch.stack(rows).mean() + open_gates)
    elif name == "cost":
        widths = torch.tensor([slot.width for slot in SLOTS], dtype=torch.float64)
        cost = (layers[:, None] * gates * widths[:, None]).sum()
        expected = 2.0 * (cost / (0.05 * widths.sum()) - 1)
    elif name == "parameters":
        sizes = torch.tensor([operation_parameters(o, 5, 9) for o in SMALL.operations], dtype=torch.float64)
        heads = sum(weight * q * (9 + 34) for weight, q in zip(ranks, (2, 3), strict=True))
        expected = 0.5 * ((5 * 4 + 4 * 9 + (weights * sizes).sum() + heads) / 100 - 1)
    else:
        runs = torch.tensor([operation_multiply_adds(o, 5, 9) for o in SMALL.operations], dtype=torch.float64)
        expected = 0.7 * ((weights * runs).sum() / 1e6 / 1e-4 - 1)
    assert term > 0
    torch.testing.assert_close(term, expected, rtol=1e-7, atol=1e-9)
    trained = prompt.architecture_parameters()
    found = torch.autograd.grad(term, trained, allow_unused=True)
    for parameter, gradient in zip(trained, found, strict=True):
        wanted = numerical(lambda: prompt.penalties()[name], parameter)
        if name == "entropy" and parameter is prompt.token_gate:
            # What would change the cost is taken out: the same step of all tokens that undoes it.
            price = numerical(prompt.expected_cost, parameter)
            assert wanted.sum().abs() > 1e-3
            wanted = wanted - wanted.sum() * price / price.sum()
            assert (gradient.sum().abs() < 1e-9) and gradient.any()
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
    assert any(g is not None and g.any() for g in found), "a declared loss without a gradient"


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"relaxation": "gumbel"}, {"relaxation": "sigmoid"}, {"gate_relaxation": "straight_through"},
        {"exact_budget": True}, {"search_tokens": False}, {"search_layers": False}, {"head_rank": (2, 3)},
    ],
)  # fmt: skip
def test_every_declared_term_has_a_gradient_from_the_start(changes: dict) -> None:
    """With open gates the cost is above the default budget; the entropy counts from the second half on."""
    prompt = (
        PrefixNAS(8, 2, 9, 4, **{"head_rank": 3, "budget_tokens": 4.0, "exact_budget": False} | changes)
        .build(SHAPE, 1)
        .double()
    )
    prompt.config = dataclasses.replace(prompt.config, parameter_budget=1, time_budget=1e-9)
    prompt.set_progress(0.6)
    terms = prompt.penalties()
    priced = {"cost"} if "exact_budget" not in changes else set()
    assert set(terms) == {"entropy", "parameters", "time"} | priced
    for name, term in terms.items():
        found = torch.autograd.grad(term, prompt.architecture_parameters(), allow_unused=True, retain_graph=True)
        assert any(g is not None and g.any() for g in found), name


def test_the_cost_at_the_start_is_what_open_tokens_cost() -> None:
    prompt = PrefixNAS(exact_budget=False).build(SHAPE, 1)
    assert prompt.expected_cost().item() == pytest.approx(32 * 0.8808 * 0.9820 / 16, rel=1e-3)
    assert prompt.penalties()["cost"] > 0.7


def test_penalties_rest_where_they_should() -> None:
    """No cost within the budget, no entropy in the first half, nothing once the search is over."""
    prompt = generator(budget_tokens=5.0)
    prompt.set_progress(0.4)
    assert set(prompt.penalties()) == {"entropy", "cost"}
    assert prompt.penalties()["cost"] == 0 and prompt.penalties()["entropy"] == 0
    prompt.set_progress(0.51)
    assert prompt.penalties()["entropy"] > 0
    halfway, end = (prompt.set_progress(f) or prompt.penalties()["entropy"] / undecided(prompt) for f in (0.75, 1.0))
    torch.testing.assert_close(2 * halfway, end)
    prompt.derive()
    assert prompt.penalties() == {} and prompt.traces() == {}


def test_the_temperature_falls_exponentially() -> None:
    prompt = generator(temperature=(2.0, 0.02))
    for fraction, tau in ((0.0, 2.0), (0.5, 0.2), (1.0, 0.02)):
        prompt.set_progress(fraction)
        torch.testing.assert_close(prompt.cell_weights(), torch.softmax(prompt.alpha / tau, dim=-1))


def test_warm_up_holds_the_architecture() -> None:
    """Its gradient is zero, not absent: data-parallel training waits for every parameter."""
    model = adapt(tiny(), prompt=dataclasses.replace(SMALL, warmup_fraction=0.3, budget_tokens=0.1))
    prompt, batch = model.base_model.prompt, tokens()
    for fraction, moves in ((0.0, False), (0.29, False), (0.3, True), (0.9, True)):
        prompt.set_progress(fraction)
        loss = probe_loss(model(input_ids=batch).logits) + sum(prompt.penalties().values())
        loss.backward()
        for parameter in prompt.architecture_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()) == moves
        assert prompt.seed.grad.any()
        model.zero_grad()


def test_a_loop_that_forgets_to_lead_the_search_is_told_once() -> None:
    led, forgotten = generator(), generator()
    led.set_progress(0.1)
    for _ in range(UNLED):
        led(None)
    with torch.no_grad():
        for _ in range(UNLED):
            forgotten(None)
    for _ in range(UNLED - 1):
        forgotten(None)
    with pytest.warns(UserWarning, match="nobody leads the search"):
        forgotten(None)
    for _ in range(UNLED):
        forgotten(None)


@pytest.mark.parametrize("training", ["search", "warm-up"])
def test_every_parameter_gets_a_gradient(training: str) -> None:
    model = adapt(tiny(), prompt=SMALL)
    model.base_model.prompt.set_progress(0.5 if training == "search" else 0.0)
    probe_loss(model(input_ids=tokens()).logits).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Its end


@pytest.mark.parametrize("gate_after", ["keep", "unit"])
@pytest.mark.parametrize("threshold", [None, 0.01, 0.9])
@pytest.mark.parametrize("budget", [0.1, 1.0, 2.5, 5.0])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_deriving(gate_after: str, threshold, budget: float, spread: float) -> None:
    """Against a loop: threshold, then budget in order of gate, never empty, never above the budget."""
    prompt = generator(gate_after=gate_after, gate_threshold=threshold, budget_tokens=budget)
    shake([prompt.token_gate, prompt.layer_gate], spread)
    (own, layers), config = prompt.gates(), prompt.config
    limit = {"keep": 0.05, "unit": 0.5}[gate_after] if threshold is None else threshold
    total = budget * sum(slot.width for slot in SLOTS)
    gates = (own * layers[:, None]).tolist()
    places = sorted(((gates[layer][j], layer, j) for layer in range(3) for j in range(5)), reverse=True)
    wanted: list[tuple[int, int]] = []
    spent = 0
    for _, layer, j in places:
        if min(own[layer, j], layers[layer]) < limit:
            continue
        if spent + SLOTS[layer].width > total:
            break
        spent += SLOTS[layer].width
        wanted.append((layer, j))
    wanted = wanted or [places[0][1:]]
    best = prompt.alpha.argmax(1).tolist()
    assert not prompt.architecture().derived
    prompt.derive()
    found = prompt.architecture()
    assert found.derived and not prompt.searching
    assert sorted((layer, j) for layer, row in enumerate(found.tokens) for j in row) == sorted(wanted)
    assert found.operations == tuple(config.operations[c] for c in best)
    outputs = prompt(None)
    assert tuple(0 if layer is None else layer.num_tokens for layer in outputs) == found.lengths
    for layer, row in enumerate(found.tokens):
        if row:
            remaining = torch.ones(len(row)) if gate_after == "unit" else torch.tensor([gates[layer][j] for j in row])
            expected = remaining.double().log() + prompt.strength[layer]
            torch.testing.assert_close(outputs[layer].log_gate, expected, rtol=1e-6, atol=1e-6)
    again = prompt.state_dict()
    prompt.derive()
    assert all(torch.equal(again[key], value) for key, value in prompt.state_dict().items())


def test_a_search_that_has_not_begun_gives_every_layer_as_much() -> None:
    """All gates are open and equal: the budget is dealt out in turns, not to the first layers."""
    prompt = generator(shaken=False, budget_tokens=2.0)
    prompt.derive()
    assert prompt.architecture().tokens == ((0, 1),) * 3


@pytest.mark.parametrize(("layers", "lengths"), [(True, (5, 5, 0)), (False, (5, 5, 5))])
def test_lengths_that_are_not_searched_stay_whole(layers: bool, lengths: tuple[int, ...]) -> None:
    """Without token gates layers go as a whole; without either nothing goes, whatever the budget."""
    prompt = generator(shaken=False, search_tokens=False, search_layers=layers, budget_tokens=4.0)
    assert prompt.token_gate is None and (prompt.layer_gate is not None) == layers
    if layers:
        with torch.no_grad():
            prompt.layer_gate[2] -= 1
    assert ("cost" in prompt.penalties()) == layers
    prompt.derive()
    assert prompt.architecture().lengths == lengths


@pytest.mark.parametrize("tokens", [True, False])
def test_one_stays_though_every_gate_is_closed(tokens: bool) -> None:
    """The one most wanted, in spite of threshold and budget: a layer as a whole where layers go as a whole."""
    prompt = generator(shaken=False, search_tokens=tokens, budget_tokens=0.1)
    with torch.no_grad():
        prompt.layer_gate.copy_(torch.tensor([-3.0, -1.0, -2.0]))
        if tokens:
            prompt.token_gate.fill_(-1.0)[1, 2] = -0.5
    prompt.derive()
    assert prompt.architecture().tokens == ((), (2,) if tokens else tuple(range(5)), ())


def test_a_closed_layer_goes_as_a_whole() -> None:
    prompt = generator(budget_tokens=5.0, gate_threshold=0.5)
    with torch.no_grad():
        prompt.layer_gate[1] = -0.1  # below 0.5, with every token of it open
        prompt.token_gate[0, 0] = 0.0  # a gate of 0.5 is not below it
    prompt.derive()
    assert 0 in prompt.architecture().tokens[0]
    assert prompt.architecture().lengths[1] == 0 and prompt(None)[1] is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gates_stay_where_they_were_after_the_search(set_to_none: bool) -> None:
    """Fine-tuning afterwards trains the generator, not the gates nor the choice, whatever momentum they have."""
    model = adapt(tiny(), prompt=SMALL)
    prompt = model.base_model.prompt
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    probe_loss(model(input_ids=tokens()).logits).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    prompt.derive()
    before, strength = prompt.gates(), prompt.strength.detach().clone()
    for _ in range(2):
        probe_loss(model(input_ids=tokens()).logits).backward()
        assert all(p.grad is None or not p.grad.any() for p in prompt.architecture_parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert all(map(torch.equal, prompt.gates(), before)) and not torch.equal(prompt.strength, strength)


def test_loading_a_state_reads_the_structure_anew() -> None:
    found, fresh = generator(), generator()
    found.derive()
    assert fresh.searching
    fresh.load_state_dict(found.state_dict())
    assert not fresh.searching and fresh.architecture() == found.architecture()
    compare(fresh(None), found(None), exactly=True)
    again = generator()
    found.load_state_dict(again.state_dict())
    assert found.searching


@pytest.mark.parametrize("state", ["search", "keep", "unit"])
@torch.no_grad()
def test_collapsing_keeps_what_the_generator_gives(state: str) -> None:
    prompt = generator(gate_after="unit" if state == "unit" else "keep")
    if state != "search":
        prompt.derive()
    config, table = prompt.collapse()
    compare(table(None), prompt(None), exactly=True)
    assert config.gated and not config.per_task
    assert config.num_virtual_tokens == prompt.architecture().lengths
    assert sum(p.numel() for p in table.parameters()) == config.num_parameters(SHAPE, 3)


@pytest.mark.parametrize("gate_after", ["keep", "unit"])
@torch.no_grad()
def test_collapsing_a_model(gate_after: str) -> None:
    """Derives first where the search is open; afterwards there is no generator any more, and a task is no task."""
    model, batch = adapt(tiny(), peml.LoRA(r=2), dataclasses.replace(SMALL, gate_after=gate_after)), tokens()
    model.base_model.prompt.derive()
    expected = model(input_ids=batch).logits
    model.base_model.collapse_prompt()
    torch.testing.assert_close(model(input_ids=batch).logits, expected, rtol=1e-12, atol=1e-12)
    assert isinstance(model.peft_config["default"].prompt, peml.PrefixTuning)
    assert not any("cells" in name or "alpha" in name for name in model.state_dict())
    with pytest.raises(PemlError, match="no generated prefix"):
        model.base_model.collapse_prompt()
    open_search = adapt(tiny(), prompt=SMALL)
    open_search.base_model.collapse_prompt()
    assert sum(open_search.peft_config["default"].prompt.num_virtual_tokens) <= 4


def test_an_inactive_or_frozen_prompt_collapses_frozen() -> None:
    model = adapt(tiny(), prompt=SMALL)
    model.requires_grad_(False)
    model.base_model.collapse_prompt()
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_without_strength_unit_gates_are_none_at_all() -> None:
    """What stock formats and flash attention can hold."""
    prompt = generator(gate_after="unit", gate_init=None)
    assert prompt.strength is None and prompt(None)[0].log_gate is not None
    prompt.derive()
    assert all(layer is None or layer.log_gate is None for layer in prompt(None))
    assert not prompt.collapse()[0].gated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be 1 or more"),
        ({"num_cells": 0}, "num_cells must be 1 or more"),
        ({"temperature": (1.0, 0.0)}, "above 0"),
        ({"temperature": (1.0,)}, "a start and an end"),
        ({"warmup_fraction": 1.0}, r"\[0, 1\)"),
        ({"budget_tokens": 0.0}, "budget_tokens must be above 0"),
        ({"gate_after": "hard"}, "keep or unit, not 'hard'"),
        ({"relaxation": "hard"}, "softmax, gumbel or sigmoid, not 'hard'"),
        ({"gate_relaxation": "hard"}, "sigmoid or straight_through, not 'hard'"),
        ({"head_rank": ()}, "head_rank must be 1 or more"),
        ({"head_rank": (4, 4)}, "several that differ"),
        ({"skip_dropout": 1.0}, r"skip_dropout must be in \[0, 1\)"),
        ({"budget_mb": 1.0}, "budget_tokens and prompt.budget_mb are two budgets"),
        ({"budget_tokens": None, "budget_percent": 0.0}, "budget_percent must be above 0"),
        ({"budget_context": 0}, "budget_context must be 1 or more"),
        ({"operation_times": (1.0,)}, "for each of 9 operations"),
        ({"time_budget": 0.0}, "time_budget must be above 0"),
        ({"architecture": "found.json"}, 'an architecture or "random:SEED", not .found.json.'),
        ({"operations": ()}, "one or more distinct"),
        ({"operations": ("linear", "linear")}, "one or more distinct"),
        ({"operations": ("linaer",)}, "unknown 'linaer'"),
    ],
)
def test_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(PemlError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_only_closing_gates_removes_the_prefix() -> None:
    """Far below any float the log-gate stays finite."""
    prompt = generator()
    with torch.no_grad():
        prompt.token_gate.fill_(-1e30)
    gates = prompt.log_gates()
    assert gates.half().isfinite().all() and not gates.exp().any()
    assert prompt.penalties()["cost"].isfinite()
