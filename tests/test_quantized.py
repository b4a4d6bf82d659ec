"""Adapters on a quantised base, torchao's int8 weights: it trains, saves, folds, generates, and refuses to merge.

In a run of its own (`make test`), because importing such a library slows and disturbs everything else.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

import peml
from models import TASKS, probe_loss, tokens
from peml import PemlError
from peml.bank import BankLinear

torchao = pytest.importorskip("torchao", reason="torchao is not installed: run `make test`")
pytestmark = pytest.mark.quantized


def quantized_llama() -> torch.nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


ADAPTERS = [peml.LoRA(r=3), peml.MTLLoRA(r=3), peml.adapters.MoELoRA(r=4, num_experts=2), peml.adapters.Poly(r=2)]


def adapted(base: torch.nn.Module, adapter, prompt=None) -> PeftModel:
    config = peml.PemlConfig(task_names=TASKS, adapter=adapter, prompt=prompt)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_it_equals_the_adapter_on_the_dequantised_base(adapter, tmp_path) -> None:
    base = quantized_llama()
    plain = copy.deepcopy(base)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    batch, tasks = tokens(), ["rte", "cola", "rte"]
    model = adapted(base, adapter, peml.PrefixTuning(num_virtual_tokens=2))
    banks = [m for m in model.modules() if isinstance(m, BankLinear)]
    assert len(banks) == 14 and {bank.quantized for bank in banks} == {"torchao"}
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True).eval()
    results = []
    for one in (model, twin):
        logits = one(input_ids=batch, tasks=tasks).logits
        probe_loss(logits).backward()
        results.append((logits, {n: p.grad for n, p in one.named_parameters() if p.requires_grad}))
    (left, grads), (right, wanted) = results
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert grads.keys() == wanted.keys() and all(g is not None for g in grads.values())
    for name in grads:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].abs().max()))
    again = PeftModel.from_pretrained(quantized_llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=batch, tasks=tasks).logits, model(input_ids=batch, tasks=tasks).logits)
    generated = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), tasks=tasks, max_new_tokens=3)
    assert generated.shape == (3, 8)


def test_checkpointing_and_a_training_step() -> None:
    model, batch = adapted(quantized_llama(), peml.MTLLoRA(r=3)), tokens()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.base_model.model.activation_checkpointing_enable()
            model.enable_input_require_grads()
            model.train()
        probe_loss(model(input_ids=batch, tasks=TASKS).logits).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_merging_is_refused_by_name_and_folding_is_not() -> None:
    model = adapted(quantized_llama(), peml.MTLLoRA(r=3))
    model.base_model.select_task("rte")
    with pytest.raises(PemlError, match=r"q_proj is quantised \(torchao\).*load the base model unquantised"):
        model.merge_adapter()
    with pytest.raises(PemlError, match="quantised"):
        model.merge_and_unload()
    assert not any(m.merged for m in model.modules() if isinstance(m, BankLinear))
    assert len(model.base_model.fold("rte")) == 14
