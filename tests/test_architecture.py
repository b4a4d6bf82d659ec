"""Architectures: the file, other depths, random ones, and trainings that begin with one."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from models import adapt, shake, tiny, tokens
from peml import PemlError, PrefixNAS
from peml.export import to_peft_prompt
from peml.inspection import inspect_folder
from peml.prompts import Architecture, AttentionSlot, ModelShape
from peml.regimes import train
from peml.training import load_recipe, open_run
from workshop import recipe, write_recipe

SLOTS = (AttentionSlot(2, 3), AttentionSlot(1, 5), AttentionSlot(2, 3))
SHAPE = ModelShape(SLOTS, 24)
SMALL = PrefixNAS(num_virtual_tokens=5, num_cells=2, width=9, embedding_dim=4, head_rank=3, budget_tokens=2.0)


def derived(shape: ModelShape = SHAPE, **changes):
    prompt = dataclasses.replace(SMALL, **changes).build(shape, 1).double()
    shake(prompt.parameters(), 1.0)
    prompt.derive()
    return prompt


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    found = dataclasses.replace(
        derived(head_rank=(2, 3)).architecture(), origin={"base": "toy", "tasks": ["a"], "search": {"wall_s": 0.5}}
    )
    path = found.save(tmp_path / "found.json")
    assert Architecture.load(path) == found and Architecture.from_dict(found.to_dict()) == found
    stored = json.loads(path.read_text())
    assert stored == found.to_dict() and stored["format"] == "peml-arch" and stored["version"] == 1
    assert stored["lengths"] == [len(row) for row in stored["tokens"]] and stored["derived"] is True
    assert len(found.alpha) == 2 and len(found.gates) == 3 and found.candidates == SMALL.operations
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


GOOD = {
    "format": "peml-arch", "version": 1, "operations": ["linear", "conv3"], "tokens": [[0, 2], [], [1]],
    "derived": True, "num_virtual_tokens": 5, "width": 9, "embedding_dim": 4, "head_rank": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": "gguf"}, "format is 'gguf'"),
        ({"format": None}, "format is missing"),
        ({"version": 2}, "version is 2, .* update it"),
        ({"tokens": ...}, "tokens: is missing"),
        ({"tokens": [[0, "x"]]}, "tokens.0.1: .*integer, not 'x'"),
        ({"tokens": [[2, 0]]}, "tokens of layer 0 must be distinct numbers below 5, in order, not .2, 0."),
        ({"tokens": [[0], [5]]}, "tokens of layer 1 must be"),
        ({"tokens": [[], []]}, "tokens must keep one"),
        ({"operations": []}, "operations must name one"),
        ({"operations": ["linaer"]}, "operations has unknown 'linaer'; .* peml.prompts.OPERATIONS"),
        ({"operations": "linear"}, "operations: .* not 'linear'"),
        ({"width": 0}, "width must be 1 or more, not 0"),
        ({"width": 9.5}, "width: .*integer, not 9.5"),
        ({"derived": 1}, "derived: .*boolean, not 1"),
        ({"gates": [[float("nan")]]}, "gates.0.0: "),
        ({"gates": [[0.5] * 5]}, "gates must have 5 numbers for each of 3 layers, or be empty"),
        ({"gates": [[0.5] * 4] * 3}, "gates must have 5 numbers"),
        ({"candidates": ["linear", "conv3"], "alpha": [[0.1, 0.2]]}, "alpha must have 2 numbers for each of 2 cells"),
        ({"alpha": [[0.1], [0.1]]}, "alpha must have 0 numbers"),
        ({"origin": {"gap": float("nan")}}, "no plain JSON .*not JSON compliant"),
        ({"widht": 9}, "widht: is no key of an architecture"),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    data = {key: value for key, value in (GOOD | damage).items() if value is not ...}
    path.write_text(json.dumps({k: v for k, v in data.items() if (k, v) != ("format", None)}))
    with pytest.raises(PemlError, match=message) as refused:
        Architecture.load(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "must be a mapping"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON"), (None, "there is no")],
)
def test_what_is_no_architecture_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PemlError, match=message):
        Architecture.load(path)
    with pytest.raises(PemlError, match="cannot be read"):
        Architecture.load(tmp_path)


def test_a_search_that_is_not_over_is_none_to_import(tmp_path: Path) -> None:
    """It holds every token of every layer, whatever the budget: nobody has chosen them."""
    still_open = SMALL.build(SHAPE, 1).architecture()
    assert not still_open.derived and still_open.lengths == (5, 5, 5)
    with pytest.raises(PemlError, match=r"a search that is not over.*derive\(\)"):
        PrefixNAS(architecture=still_open)
    path = still_open.save(tmp_path / "open.json")
    with pytest.raises(PemlError, match="a search that is not over"):
        load_recipe(write_recipe(tmp_path, architecture=str(path))).config()


def test_gates_of_an_exact_budget_are_known_at_its_end() -> None:
    """Before it they are shifted by what only a model of this shape can say."""
    prompt = dataclasses.replace(SMALL, exact_budget=True).build(SHAPE, 1).double()
    assert prompt.architecture().gates == ()
    prompt.derive()
    torch.testing.assert_close(
        torch.tensor(prompt.architecture().gates).double(),
        prompt.gates()[0] * torch.sigmoid(prompt.layer_gate)[:, None],
        rtol=0,
        atol=1e-6,
    )


# Other models


def test_another_depth_takes_the_layers_at_its_relative_depth() -> None:
    tokens = tuple((layer,) if layer else () for layer in range(4))
    gates = tuple((layer / 10,) * 5 for layer in range(4))
    found = Architecture(("linear",), tokens, True, 5, 9, 4, 3, gates=gates)
    assert found.resampled(4) is found
    assert found.resampled(8).tokens == ((), (), (1,), (1,), (2,), (2,), (3,), (3,))
    assert found.resampled(2).tokens == ((1,), (3,)) and found.resampled(2).gates == (gates[1], gates[3])
    only = dataclasses.replace(found, tokens=((4,), (), (), ()))
    assert only.resampled(2).tokens == ((4,), ())  # at the middles of halves there is nothing
    skipped = dataclasses.replace(found, tokens=((0,), (), (1, 2), (), (3,)), gates=())
    assert skipped.resampled(2).tokens == ((), (1, 2)), "the longest, to the layer at its relative depth"


def test_other_heads_and_depths_are_accepted() -> None:
    found = derived().architecture()
    for family, layers in (("llama", 2), ("qwen3", 4)):
        model = adapt(tiny(family, layers=layers), prompt=PrefixNAS(architecture=found))
        prompt = model.base_model.prompt
        assert prompt.architecture() == found.resampled(layers) == model.peft_config["default"].prompt.architecture
        model(input_ids=tokens())


# What an imported architecture builds


@torch.no_grad()
def test_with_its_weights_it_is_the_derived_network() -> None:
    """Nothing else is there, and the count is the formula."""
    found = derived(gate_after="unit", gate_threshold=0.0, budget_tokens=5.0, head_rank=(2, 3))
    config = PrefixNAS(architecture=found.architecture())
    assert found.architecture().used == tuple(range(5))
    prompt = config.build(SHAPE, 1).double()
    assert not prompt.searching and prompt.architecture_parameters() == [] and prompt.penalties() == {}
    assert not {"alpha", "head_alpha", "token_gate", "layer_gate"} & set(prompt.state_dict())
    assert sum(p.numel() for p in prompt.parameters()) == config.num_parameters(SHAPE, 1)
    rank = found.architecture().head_rank
    for name in ("seed", "into", "strength", "log_size"):
        getattr(prompt, name).copy_(getattr(found, name))
    prompt.head_in.copy_(found.head_in[:, :rank])
    prompt.head_out.copy_(found.head_out[:rank])
    for cell, old, chosen in zip(prompt.cells, found.cells, found.choice.tolist(), strict=True):
        assert len(cell) == 1
        cell[0].load_state_dict(old[chosen].state_dict())
    for one, other in zip(prompt(None), found(None), strict=True):
        for part, expected in zip(one, other, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)


def test_only_kept_tokens_have_rows_and_only_layers_with_tokens_columns() -> None:
    found = Architecture(("lowrank_mul",), ((1, 4), (), (4,)), True, 9, 6, 4, 3)
    prompt = PrefixNAS(architecture=found).build(SHAPE, 1)
    assert prompt.seed.shape == (2, 4) and prompt.cells[0][0].by_token.shape == (2,)
    assert prompt.head_out.shape == (3, 24)
    first, second, third = prompt(None)
    assert second is None and (first.num_tokens, third.num_tokens) == (2, 1)
    torch.testing.assert_close(first.log_gate.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(third.log_gate.exp().sum(), torch.tensor(1.0))
    assert prompt.architecture() is prompt.config.architecture


def test_it_is_stored_with_the_adapter(tmp_path: Path) -> None:
    found = derived(ModelShape(SLOTS[:2], 24)).architecture()
    model = adapt(tiny().float(), prompt=PrefixNAS(architecture=found))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())["prompt"]["architecture"]
    assert Architecture.from_dict(stored) == found
    seen = inspect_folder(tmp_path)
    assert seen.architecture == found and "architecture" not in seen.parameters
    assert not any("alpha" in key or "gate" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "units"),
    [
        ({}, False), ({"gate_after": "unit"}, True), ({"gate_relaxation": "straight_through"}, True),
        ({"search_layers": False}, False), ({"search_tokens": False}, False), ({"architecture": "random:1"}, True),
        ({"search_tokens": False, "search_layers": False}, True), ({"gate_after": "unit", "gate_init": 2.0}, False),
    ],
)  # fmt: skip
def test_inspection_and_model_agree_on_what_stock_peft_can_hold(changes: dict, units: bool, tmp_path: Path) -> None:
    settings = {"gate_init": None, "gate_threshold": 0.0, "budget_tokens": 5.0} | changes
    model = adapt(tiny().float(), prompt=dataclasses.replace(SMALL, **settings), shaken=False, task_type="CAUSAL_LM")
    model.base_model.prompt.derive()
    model.save_pretrained(tmp_path / "adapter")
    found = inspect_folder(tmp_path / "adapter").exports["prefix"]
    assert found.stops != units, found.text
    if units:
        to_peft_prompt(model, tmp_path / "stock")
    else:
        with pytest.raises(PemlError, match="the prefix has gates"):
            to_peft_prompt(model, tmp_path / "stock")


# Random ones


@pytest.mark.parametrize(("slots", "tokens", "budget"), [(SLOTS, 2, 1.3), (SLOTS[:1] * 3, 2, 0.7)])
def test_random_architectures_use_up_the_budget_uniformly(slots: tuple, tokens: int, budget: float) -> None:
    """Against all vectors of lengths of the largest cost within the budget."""
    config = dataclasses.replace(SMALL, num_virtual_tokens=tokens, budget_tokens=budget, head_rank=(2, 3))
    widths = [slot.width for slot in slots]
    every = list(itertools.product(range(tokens + 1), repeat=3))
    costs = {each: sum(n * w for n, w in zip(each, widths, strict=True)) for each in every}
    most = max(cost for cost in costs.values() if cost <= budget * sum(widths))
    allowed = {each for each, cost in costs.items() if cost == most}
    drawn = [Architecture.random(config, ModelShape(slots, 24), seed) for seed in range(1800)]
    counts = Counter(found.lengths for found in drawn)
    assert set(counts) == allowed and len(allowed) > 1
    assert max(counts.values()) < 1.35 * min(counts.values())
    assert {found.operations[0] for found in drawn} == set(config.operations)
    assert {found.head_rank for found in drawn} == {2, 3}
    assert drawn[5] == Architecture.random(config, ModelShape(slots, 24), 5) and drawn[5].origin == {"random": 5}


def test_lengths_are_uniform_as_a_whole_not_layer_by_layer() -> None:
    """Three tokens for three layers of up to two: seven ways, of which a first layer of one token begins three."""
    config = dataclasses.replace(SMALL, num_virtual_tokens=2, budget_tokens=1.0)
    shape = ModelShape((AttentionSlot(1, 1),) * 3, 24)
    counts = Counter(Architecture.random(config, shape, seed).lengths for seed in range(2100))
    assert len(counts) == 7 and max(counts.values()) < 1.3 * min(counts.values())


def test_an_open_search_says_what_leads() -> None:
    prompt = dataclasses.replace(SMALL, head_rank=(2, 3, 4)).build(SHAPE, 1)
    with torch.no_grad():
        prompt.alpha[0, 3], prompt.alpha[1, 5], prompt.head_alpha[1] = 1.0, 1.0, 1.0
    found = prompt.architecture()
    assert found.operations == (SMALL.operations[3], SMALL.operations[5]) and found.head_rank == 3
    prompt.derive()
    assert (prompt.architecture().operations, prompt.architecture().head_rank) == (found.operations, 3)


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({"budget_tokens": 5.0}, {(5, 5, 5)}),
        ({"budget_tokens": 0.01}, {(0, 1, 0)}),
        ({"search_tokens": False, "budget_tokens": 3.6}, {(5, 0, 5)}),
        ({"search_tokens": False, "search_layers": False}, {(5, 5, 5)}),
    ],
)
def test_random_architectures_at_the_edges(changes: dict, lengths: set) -> None:
    config = dataclasses.replace(SMALL, **changes)
    assert {Architecture.random(config, SHAPE, seed).lengths for seed in range(20)} == lengths


def test_a_random_one_is_drawn_for_the_model_and_leaves_the_seed_alone() -> None:
    config = dataclasses.replace(SMALL, architecture="random:3")
    before = torch.random.get_rng_state()
    found = config.fitted(SHAPE).architecture
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found == Architecture.random(SMALL, SHAPE, 3) and config.fitted(SHAPE).fitted(SHAPE).architecture == found
    assert sum(p.numel() for p in config.build(SHAPE, 1).parameters()) == config.num_parameters(SHAPE, 1)


# Recipes


FOUND = Architecture(("linear", "mlp_silu_h/4"), ((0, 2), (3,)), True, 4, 8, 6, 4, origin={"seed": 7})


def test_a_recipe_holds_what_the_file_held(tmp_path: Path) -> None:
    path = FOUND.save(tmp_path / "found.json")
    loaded = load_recipe(write_recipe(tmp_path, architecture=str(path)))
    path.unlink()
    again = tmp_path / "resolved.yaml"
    again.write_text(loaded.to_yaml(), encoding="utf-8")
    assert load_recipe(again).to_yaml() == loaded.to_yaml()
    assert load_recipe(again).config().prompt.architecture == FOUND == loaded.config().prompt.architecture
    assert yaml.safe_load(loaded.to_yaml())["architecture"]["origin"] == {"seed": 7}
    with pytest.raises(PemlError, match=r"recipe.yaml: there is no architecture file .*found.json"):
        load_recipe(tmp_path / "recipe.yaml")
    chosen = load_recipe(again, architecture="random:4")
    assert chosen.config().prompt.architecture == "random:4"


def test_a_method_without_a_search_takes_none(tmp_path: Path) -> None:
    data = recipe(tmp_path, method="lora", set={}, architecture="random:1")
    with pytest.raises(PemlError, match="method 'lora' has none: use peml"):
        load_recipe(write_recipe(tmp_path, **data))


def test_a_training_with_it_searches_nothing_and_needs_no_file(tmp_path: Path) -> None:
    path = FOUND.save(tmp_path / "found.json")
    arguments = recipe(tmp_path)["train"] | {"max_steps": 4, "save_steps": 2}
    loaded = load_recipe(write_recipe(tmp_path, architecture=str(path), train=arguments))
    path.unlink()
    folder = train(loaded, tmp_path / "run")
    metrics = folder.read_metrics()
    assert "architecture" not in metrics["parameters"] and "architecture" not in metrics["learning_rates"]
    assert Architecture.from_dict(metrics["architecture"]) == FOUND
    _, model = open_run(tmp_path / "run")
    assert model.base_model.prompt.architecture() == FOUND
    # As if it had been killed after its last checkpoint.
    folder.metrics.unlink()
    train(load_recipe(folder.recipe), tmp_path / "run", resume=True)
    assert folder.finished


def test_the_command_line_takes_one(peml, tmp_path: Path) -> None:
    path = FOUND.save(tmp_path / "found.json")
    arguments = recipe(tmp_path)["train"] | {"max_steps": 2}
    command = ("train", write_recipe(tmp_path, train=arguments), "--output", tmp_path / "run", "--architecture", path)
    assert peml(*command)[0] == 0
    assert Architecture.from_dict(load_recipe(tmp_path / "run" / "recipe.yaml").architecture) == FOUND
