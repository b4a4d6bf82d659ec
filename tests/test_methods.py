"""The table of methods, changes to them, and equal budgets."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peml import CGCLoRA, LoRA, MTLLoRA, PemlConfig, PemlError, PrefixNAS, PrefixTuning, match_params, method, methods
from peml.methods import METHODS, trainable_parameters

SMALL = {f"prompt.{key}": 8 for key in ("width", "embedding_dim", "head_rank", "num_virtual_tokens")}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def test_peml_is_lora_and_a_searched_prefix_trained_jointly() -> None:
    row = methods()["peml"]
    assert isinstance(row.adapter, LoRA) and isinstance(row.prompt, PrefixNAS) and row.regime == "joint"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_attaches_and_counts_what_it_trains(name: str) -> None:
    settings = SMALL if isinstance(METHODS[name].prompt, PrefixNAS) else {}
    config, base = method(name, ["a", "b"], settings), llama()
    predicted = trainable_parameters(config, base)
    model = get_peft_model(base, config)
    assert predicted == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_counting_leaves_model_and_random_state_alone() -> None:
    base = llama()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    state = torch.get_rng_state()
    trainable_parameters(method("peml", ["a"], SMALL), base)
    assert torch.equal(torch.get_rng_state(), state)
    assert base.config._attn_implementation == "sdpa"
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "mtl-lora", "lora+prefix", "peml", "prefix"])
def test_budgets_are_matched_by_rank_or_length(name: str) -> None:
    base = llama()
    budget = trainable_parameters(method("peml", ["a", "b", "c"], SMALL | {"adapter.r": 6}), base)
    settings = SMALL if name == "peml" else {}
    sized = match_params(method(name, ["a", "b", "c"], settings), base, budget)
    per_step = trainable_parameters(match_params(sized, base, budget), base)
    assert abs(per_step - budget) / budget < 0.12
    # No neighbouring size comes nearer.
    part = sized.adapter or sized.prompt
    key = "r" if sized.adapter is not None else "num_virtual_tokens"
    axis = "adapter" if sized.adapter is not None else "prompt"
    for size in (getattr(part, key) - 1, getattr(part, key) + 1):
        if size < 1:
            continue
        other = method(name, ["a", "b", "c"], settings | {f"{axis}.{key}": size})
        assert abs(trainable_parameters(other, base) - budget) >= abs(per_step - budget)


def test_a_matched_rank_keeps_the_scale() -> None:
    sized = match_params(method("lora", ["a"], {"adapter.r": 4, "adapter.lora_alpha": 12.0}), llama(), 30_000)
    assert isinstance(sized.adapter, LoRA) and sized.adapter.r != 4
    assert sized.adapter.scaling == pytest.approx(3.0)


def ranks(name: str) -> tuple[int, int]:
    """A rank to start from, and the one that costs as much as another 17 steps."""
    adapter = METHODS[name].adapter
    assert adapter is not None
    step = adapter.rank_step(3)
    return 2 * step, 17 * step


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.adapter and not row.prompt])
def test_every_adapter_is_matched(name: str) -> None:
    """The budget of a rank is answered by that rank, and the scale stays."""
    base, (small, large) = llama(), ranks(name)
    budget = trainable_parameters(method(name, ["a", "b", "c"], {"adapter.r": large}), base)
    start = method(name, ["a", "b", "c"], {"adapter.r": small})
    sized, before = match_params(start, base, budget).adapter, start.adapter
    assert sized.r == large and type(sized) is type(before)  # type: ignore[union-attr]
    if hasattr(sized, "lora_alpha"):
        assert sized.scaling == pytest.approx(before.scaling)  # type: ignore[union-attr]
    else:
        assert sized.scaling == pytest.approx(1 / large)  # type: ignore[union-attr]
    # Between two sizes it is the nearer one, and experts still share the rank evenly.
    near = match_params(start, base, round(budget * 1.01)).adapter
    assert near is not None and near.r == large  # type: ignore[attr-defined]


def test_a_total_rank_is_matched_in_steps_of_all_experts() -> None:
    start = method("cgc-lora", ["a", "b", "c"], {"adapter.rank_mode": "total", "adapter.r": 6})
    sized = match_params(start, llama(), 30_000).adapter
    assert isinstance(sized, CGCLoRA) and sized.r > 6 and sized.r % (3 + 3) == 0
    with pytest.raises(PemlError, match="r 6 already trains .* more than twice the budget of 100"):
        match_params(start, llama(), 100)


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(PemlError, match=r"r 1 already trains .* more than twice the budget of 10"):
        match_params(method("lora", ["a"]), llama(), 10)


def test_settings_change_a_copy() -> None:
    config = method(
        "peml+mtl", ["a"], {"adapter.lambda_kind": "diag", "prompt.temperature": [2, 0.5]}, modules_to_save=["x"]
    )
    assert isinstance(config.adapter, MTLLoRA) and config.adapter.lambda_kind == "diag"
    assert isinstance(config.prompt, PrefixNAS) and config.prompt.temperature == (2, 0.5)
    assert config.modules_to_save == ["x"]
    assert METHODS["peml+mtl"].adapter == MTLLoRA()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter.ranks": 3}, r"set.adapter.ranks is not a setting of LoRA .*did you mean r|set.adapter.ranks is not"),
        ({"prompt.width": 2.5}, "set.prompt.width must be a whole number, not 2.5"),
        ({"prompt.gate_after": "soft"}, "set.prompt.gate_after must be keep or unit, not 'soft'"),
        ({"prompt.operations": ["linear", "fft"]}, "prompt.operations has unknown 'fft'; choose from none, identity"),
        ({"prompt.temperature": [1.0, 0.0]}, "prompt.temperature needs a start and an end above 0"),
        ({"regime": "joint"}, "set.regime is unknown"),
        ({"task_names": ["b"]}, "set.task_names is unknown"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        method("peml", ["a"], settings)


def test_configs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(PemlError, match="task_names is empty"):
        PemlConfig(adapter=LoRA())
    with pytest.raises(PemlError, match="task_names repeats a"):
        PemlConfig(task_names=["a", "b", "a"], adapter=LoRA())
    with pytest.raises(PemlError, match="nothing to train"):
        PemlConfig(task_names=["a"])
    with pytest.raises(PemlError, match="adapter must be one of LoRA, .*, HydraLoRA, not PrefixTuning"):
        PemlConfig(task_names=["a"], adapter=PrefixTuning())  # type: ignore[arg-type]
