"""Merging in unusual orders and places: what is put back is what was there."""

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import peml
from models import TASKS, adapt, shake, tiny, tokens
from peml import PemlError


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "peml_" not in n}


@torch.no_grad()
def test_two_adapters_merged_one_after_the_other() -> None:
    model = adapt(tiny(), peml.LoRA(r=2))
    model.add_adapter("b", peml.PemlConfig(task_names=["x"], adapter=peml.LoRA(r=2)))
    model.double()
    shake((p for n, p in model.named_parameters() if ".b." in n), 0.3)
    before, tuner = weights(model), model.base_model
    deltas = [
        {n: m.get_delta_weight(a) for n, m in model.named_modules() if hasattr(m, "peml_adapter")}
        for a in ("default", "b")
    ]
    tuner.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        tuner.merge_adapter(adapter_names=["b"])
    for name, module in model.named_modules():
        if hasattr(module, "peml_adapter"):
            wanted = before[f"{name}.base_layer.weight"] + deltas[0][name] + deltas[1][name]
            torch.testing.assert_close(module.base_layer.weight.data, wanted)
    tuner.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())


def test_layers_that_share_a_weight_are_not_merged() -> None:
    base = tiny()
    first, second = (layer.self_attn for layer in base.model.layers)
    second.q_proj.weight = first.q_proj.weight
    model = adapt(base, peml.LoRA(r=2))
    before = weights(model)
    with pytest.raises(PemlError, match="share one weight"):
        model.merge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())


def test_a_cast_while_merged_holds_for_what_is_put_back() -> None:
    model = adapt(tiny(), peml.LoRA(r=2))
    before = weights(model)
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    assert {p.dtype for p in weights(model).values()} == {torch.bfloat16}
    assert all(torch.equal(p, before[n].bfloat16()) for n, p in weights(model).items())


def test_autocast_does_not_round_what_is_folded() -> None:
    model = adapt(tiny(), peml.MTLLoRA(r=2))
    tuner = model.base_model
    tuner.select_task("rte")
    plain, layer = tuner.fold(), tuner._banks()[0]
    delta = layer.get_delta_weight("default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.get_delta_weight("default"), delta)
        folded = tuner.fold()
    assert all(torch.equal(a, b) for path in plain for a, b in zip(plain[path], folded[path], strict=True))


def test_frozen_shared_parameters_stay_frozen() -> None:
    """PEFT trains everything again when an adapter is switched back on."""
    model = adapt(tiny(), peml.MTLLoRA(r=2))
    model.base_model.freeze_shared()
    wanted = [n for n, p in model.named_parameters() if p.requires_grad]
    with model.disable_adapter():
        pass
    assert [n for n, p in model.named_parameters() if p.requires_grad] == wanted
    assert all(name.endswith(("transform", "routing")) for name in wanted)


SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_heads_of_peft_task_types(kind: str) -> None:
    """PEFT adds names of heads by itself, which a model need not have."""
    base = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)),
    }[kind]()
    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    config = peml.PemlConfig(task_names=TASKS, adapter=peml.LoRA(r=2), task_type="SEQ_CLS", target_modules=targets)
    model = get_peft_model(base, config)
    model(input_ids=tokens().clamp(max=30), labels=torch.tensor([0, 1, 2])).loss.backward()
    head = {"bert": "classifier", "llama": "score"}[kind]
    assert any(head in n and p.grad is not None and p.grad.any() for n, p in model.named_parameters())
    with pytest.raises(PemlError, match="modules_to_save names 'skore'"):
        get_peft_model(tiny(), peml.PemlConfig(task_names=TASKS, adapter=peml.LoRA(r=2), modules_to_save=["skore"]))
