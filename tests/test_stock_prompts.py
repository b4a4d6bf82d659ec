"""Prompts to stock PEFT and back: logits of both libraries on one plain base model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values, initialize_kv_prefix_from_text
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import peml
from models import TASKS, adapt, shake, tiny, tokens
from peml import PemlError
from peml.export import from_peft, to_peft_prompt
from workshop import tiny_tokenizer

CLOSE = {"rtol": 0.0, "atol": 1e-5}
"""Transformers rounds rotations to single precision."""

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 1,
}  # fmt: skip


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1} | changes))


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)  # fmt: skip
GEMMA3 = SIZES | {
    "num_key_value_heads": 1, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
}  # fmt: skip

ROTARY: dict[str, Any] = {
    "llama": lambda: tiny("llama"),
    "qwen3": lambda: tiny("qwen3"),
    "linear": lambda: llama(**rope("linear", factor=2.0)),
    "llama3": lambda: llama(**LLAMA3),
    "yarn": lambda: llama(**YARN),
    "neox, part of a head": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, rotary_pct=0.25)),
    "phi, part of a head": lambda: PhiForCausalLM(PhiConfig(**SIZES, partial_rotary_factor=0.5)),
    "cohere, neighbours": lambda: CohereForCausalLM(CohereConfig(**SIZES)),
    "gemma3, two frequencies": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3)),
    "smollm3, a layer without": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(**SIZES, num_key_value_heads=1, no_rope_layers=[1, 0], use_sliding_window=False)
    ),
}


def made(name: str) -> PreTrainedModel:
    model = ROTARY[name]().double().eval()
    if name not in ("llama", "qwen3"):
        shake(model.parameters(), 0.2)
    return model


def stock(base: nn.Module, folder: Path) -> PeftModel:
    """PEFT's own reading of a folder, with the numbers as exact as they lie there."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).double().eval()
    assert model.peft_config["default"].peft_type.value != "PEML"
    model.prompt_encoder["default"]._load_adapter_state_dict(load_file(folder / "adapter_model.safetensors"))
    return model


def fresh_stock(base: nn.Module, config: Any) -> PeftModel:
    """A prompt in PEFT, away from where it starts."""
    model = get_peft_model(copy.deepcopy(base), config).double().eval()
    shake([p for name, p in model.named_parameters() if "prompt_encoder" in name], 0.5)
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: Tensor, **kwargs: Any) -> Tensor:
    return model(input_ids=batch, **kwargs).logits[:, -batch.shape[1] :]


def largest(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


# Keys and values.


@pytest.mark.parametrize("kind", ["prefix_tuning", "cartridge"])
@pytest.mark.parametrize("family", ROTARY)
def test_a_prefix_goes_to_peft_and_comes_back(family: str, kind: str, tmp_path: Path) -> None:
    base, batch = made(family), tokens(2, 5)
    plain = logits(base, batch)
    model = adapt(copy.deepcopy(base), prompt=peml.PrefixTuning(4))
    expected = logits(model, batch)
    folder = to_peft_prompt(model, tmp_path / "stock", kind=kind)
    assert folder == tmp_path / "stock"
    assert sorted(f.name for f in folder.iterdir() if f.name != "README.md") == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == kind.upper()
    theirs = stock(base, folder)
    torch.testing.assert_close(logits(theirs, batch), expected, **CLOSE)
    assert largest(plain, expected) > 0.1
    back = from_peft(base, folder, task_names=TASKS)
    torch.testing.assert_close(logits(back, batch), expected, **CLOSE)
    assert back.peft_config["default"].prompt == peml.PrefixTuning(4)
    for key, value in model.base_model.prompt.state_dict().items():
        torch.testing.assert_close(back.base_model.prompt.state_dict()[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ROTARY)
def test_a_prefix_of_peft_is_the_same_here(family: str, tmp_path: Path) -> None:
    """With padding, which PEFT must be told positions for; it adds the length of its prefix to them."""
    base, batch = made(family), tokens(3, 6)
    mask = torch.ones_like(batch)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    theirs = fresh_stock(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    expected = logits(theirs, batch, attention_mask=mask, position_ids=positions)
    theirs.save_pretrained(tmp_path)
    ours = from_peft(base, tmp_path, task_names=["a"])
    found = logits(ours, batch, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


def test_both_libraries_generate_the_same(tmp_path: Path) -> None:
    base, batch = tiny(), tokens(2, 4)
    model = adapt(copy.deepcopy(base), prompt=peml.PrefixTuning(3))
    expected = model.generate(input_ids=batch, max_new_tokens=8, do_sample=False)
    theirs = stock(base, to_peft_prompt(model, tmp_path / "stock"))
    assert torch.equal(theirs.generate(input_ids=batch, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("prefix_projection", [False, True])
def test_a_live_model_can_be_taken_over(prefix_projection: bool) -> None:
    """Of a projected prefix, the table."""
    base, batch = tiny(), tokens(2, 5)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=prefix_projection, token_dim=12,
        num_attention_heads=2, encoder_hidden_size=5,
    )  # fmt: skip
    theirs = fresh_stock(base, config)
    expected = logits(theirs, batch)
    ours = from_peft(base, theirs, task_names=TASKS)
    torch.testing.assert_close(logits(ours, batch), expected, **CLOSE)
    assert all(p.requires_grad for p in ours.base_model.prompt.parameters())
    torch.testing.assert_close(logits(theirs, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("projected", [False, True])
def test_each_task_has_an_adapter_of_its_own(projected: bool, tmp_path: Path) -> None:
    prompt = peml.PrefixTuning(2, per_task=True, prefix_projection=projected, encoder_hidden_size=6)
    base, batch = tiny("qwen3"), tokens(3, 5)
    model = adapt(copy.deepcopy(base), prompt=prompt)
    for task in TASKS:
        theirs = stock(base, to_peft_prompt(model, tmp_path / task, task))
        torch.testing.assert_close(logits(theirs, batch), logits(model, batch, tasks=task), **CLOSE)
    expected = logits(model, batch, tasks=TASKS)
    back = from_peft(base, {task: tmp_path / task for task in TASKS})
    torch.testing.assert_close(logits(back, batch, tasks=TASKS), expected, **CLOSE)
    assert back.peft_config["default"].task_names == TASKS
    with pytest.raises(PemlError, match="differs by task: pass task= with one of rte, sst2, cola"):
        to_peft_prompt(model, tmp_path / "none")
    with pytest.raises(PemlError, match="wnli"):
        to_peft_prompt(model, tmp_path / "none", "wnli")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("collapsed", [False, True])
def test_a_searched_prefix_with_open_gates_and_one_length(collapsed: bool, tmp_path: Path) -> None:
    """As the refusals of the next test say that it can be had."""
    settings: dict[str, Any] = {"gate_threshold": 0.0, "budget_tokens": 4, "gate_after": "unit", "gate_init": None}
    base, batch = tiny(), tokens(2, 5)
    model = adapt(copy.deepcopy(base), prompt=peml.PrefixNAS(4, 1, 8, 4, 4, **settings))
    model.base_model.prompt.derive()
    if collapsed:
        model.base_model.collapse_prompt()
    theirs = stock(base, to_peft_prompt(model, tmp_path / "stock"))
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), **CLOSE)


def test_what_no_stock_prefix_holds(tmp_path: Path) -> None:
    nas = peml.PrefixNAS(4, 1, 8, 4, 4, budget_tokens=4, gate_threshold=0.0)
    gated = adapt(tiny(), prompt=nas)
    lengths = adapt(tiny(), prompt=peml.PrefixTuning((2, 0)))
    encoder = ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, global_attn_every_n_layers=1, cls_token_id=2, sep_token_id=3, reference_compile=False)
    )
    long = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0})
    refused = [
        (gated, "the search for this prefix is not over: .* collapse_prompt"),
        (lengths, "has 2, 0 tokens in its layers, and PEFT one number for all: train PrefixTuning"),
        (adapt(tiny("gpt2"), prompt=peml.PrefixTuning(2)), "GPT2LMHeadModel has no rotary positions: .*PromptTuning"),
        (adapt(long, prompt=peml.PrefixTuning(2)), "of LlamaForCausalLM .dynamic. change with the length"),
        (adapt(encoder, prompt=peml.PrefixTuning(2)), "ModernBertForMaskedLM is no decoder"),
        (adapt(tiny("bert"), prompt=peml.PromptTuning(2)), "BertForMaskedLM is no decoder"),
        (adapt(tiny(), peml.LoRA(r=2)), "this adapter has no prompt: .*save_as_lora"),
        (adapt(tiny(), peml.LoRA(r=2), peml.PrefixTuning(2)), "has LoRA beside its prompt, .* prompt_only=True"),
        (adapt(tiny(), prompt=peml.PrefixTuning(2), modules_to_save=["lm_head"]), "has lm_head beside its prompt"),
        (adapt(tiny(), prompt=peml.PrefixTuning(2), task_type="SEQ_CLS"), "CAUSAL_LM only, not SEQ_CLS"),
        (get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])), "there is no PEML adapter to export"),
    ]
    for model, message in refused:
        with pytest.raises(PemlError, match=message):
            to_peft_prompt(model, tmp_path / "stock")
        assert not list(tmp_path.iterdir())
    gated.base_model.prompt.derive()
    with pytest.raises(PemlError, match='has gates, .* prompt.gate_after "unit"'):
        to_peft_prompt(gated, tmp_path / "stock")
    gated.base_model.collapse_prompt()
    with pytest.raises(PemlError, match='has gates, .* prompt.gate_after "unit"'):
        to_peft_prompt(gated, tmp_path / "stock")


def test_the_prompt_alone_goes_with_a_merged_base(tmp_path: Path) -> None:
    base, batch = tiny(), tokens(2, 5)
    model = adapt(copy.deepcopy(base), peml.MTLLoRA(r=2), peml.PrefixTuning(3))
    expected = logits(model, batch, tasks="sst2")
    with torch.no_grad():
        for path, (down, up) in model.base_model.fold("sst2").items():
            base.get_submodule(path).weight += up.T @ down
    theirs = stock(base, to_peft_prompt(model, tmp_path / "stock", prompt_only=True))
    torch.testing.assert_close(logits(theirs, batch), expected, **CLOSE)


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_at_the_input_can_become_a_prefix(family: str, per_task: bool, tmp_path: Path) -> None:
    """With the adapter that is merged beside it; in GPT-2 too, whose text has made room for it already."""
    base, batch = tiny(family), tokens(2, 5)
    model = adapt(copy.deepcopy(base), peml.LoRA(r=2), peml.PromptTuning(3, per_task=per_task))
    expected = logits(model, batch, tasks="cola")
    folder = to_peft_prompt(model, tmp_path / "stock", "cola", kind="cartridge", prompt_only=True)
    with torch.no_grad():
        for path, (down, up) in model.base_model.fold().items():
            weight = base.get_submodule(path).weight
            weight += (up.T @ down).T if family == "gpt2" else up.T @ down
    torch.testing.assert_close(logits(stock(base, folder), batch), expected, **CLOSE)


# A passage, by PEFT's helpers and by ours.


def test_a_passage_is_the_same_by_both_ways(tmp_path: Path) -> None:
    """PEFT reads the passage at 0 .. P-1 and the text from P on; ours at -P .. -1, and the text from 0 on."""
    tokenizer = tiny_tokenizer(list("abcde"))
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    base, batch, passage = tiny(), tokens(2, 5), "a b c d e a"
    ids = torch.tensor([tokenizer(passage)["input_ids"]])
    prompt = peml.PrefixTuning(
        6,
        prompt_tuning_init="text",
        prompt_tuning_init_text=passage,
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
    )
    ours = adapt(copy.deepcopy(base), prompt=prompt, shaken=False)
    theirs = fresh_stock(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    initialize_kv_prefix_from_text(theirs, tokenizer, text=passage, use_chat_template=False)
    imported = from_peft(copy.deepcopy(base), theirs, task_names=TASKS)
    for key, value in ours.base_model.prompt.state_dict().items():
        torch.testing.assert_close(imported.base_model.prompt.state_dict()[key], value, rtol=0, atol=1e-5)
    with torch.no_grad():
        cache = base(input_ids=ids, use_cache=True).past_key_values
        whole = base(input_ids=torch.cat([ids.expand(2, -1), batch], dim=1)).logits[:, 6:]
    initialize_kv_prefix_from_past_key_values(theirs, past_key_values=cache)
    again = from_peft(base, theirs, task_names=TASKS)
    for model in (ours, theirs, imported, again):
        torch.testing.assert_close(logits(model, batch), whole, rtol=0, atol=5e-5)


# Tokens at the input.


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_prompt_tuning_goes_both_ways(family: str, tmp_path: Path) -> None:
    base, batch = tiny(family), tokens(2, 5)
    theirs = fresh_stock(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_peft(copy.deepcopy(base), tmp_path / "theirs", task_names=TASKS)
    assert ours.peft_config["default"].prompt == peml.PromptTuning(4, prompt_tuning_init="random")
    torch.testing.assert_close(logits(from_peft(copy.deepcopy(base), theirs, ["a"]), batch), expected, **CLOSE)
    folder = to_peft_prompt(ours, tmp_path / "back")
    torch.testing.assert_close(logits(stock(base, folder), batch), logits(ours, batch), **CLOSE)
    theirs_again = load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["prompt_embeddings"], theirs_again)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_prompt_per_task_goes_both_ways(family: str, tmp_path: Path) -> None:
    base, batch = tiny(family), tokens(3, 5)
    model = adapt(copy.deepcopy(base), prompt=peml.PromptTuning(3, per_task=True, prompt_tuning_init="random"))
    for task in TASKS:
        theirs = stock(base, to_peft_prompt(model, tmp_path / task, task))
        torch.testing.assert_close(logits(theirs, batch), logits(model, batch, tasks=task), **CLOSE)
    back = from_peft(base, {task: tmp_path / task for task in TASKS})
    assert torch.equal(back.base_model.prompt.tokens, model.base_model.prompt.tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_multitask_prompt_goes_both_ways(ranks: int, family: str, tmp_path: Path) -> None:
    base, batch = tiny(family), tokens(4, 5)
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=3, num_ranks=ranks
    )  # fmt: skip
    theirs = fresh_stock(base, config)
    ids = torch.tensor([2, 0, 1, 2])
    expected = logits(theirs, batch, task_ids=ids)
    names = [TASKS[i] for i in ids]
    ours = from_peft(copy.deepcopy(base), theirs, task_names=TASKS)
    torch.testing.assert_close(logits(ours, batch, tasks=names), expected, **CLOSE)
    assert largest(expected[0], logits(theirs, batch, task_ids=torch.tensor([0] * 4))[0]) > 1e-2
    whole = stock(base, to_peft_prompt(ours, tmp_path / "whole"))
    torch.testing.assert_close(logits(whole, batch, task_ids=ids), expected, **CLOSE)
    again = from_peft(copy.deepcopy(base), tmp_path / "whole", task_names=TASKS)
    torch.testing.assert_close(logits(again, batch, tasks=names), expected, **CLOSE)
    for task, name in enumerate(TASKS):
        one = stock(base, to_peft_prompt(ours, tmp_path / name, name))
        assert one.peft_config["default"].peft_type.value == "PROMPT_TUNING"
        rows = [i for i in range(4) if ids[i] == task]
        torch.testing.assert_close(logits(one, batch)[rows], expected[rows], **CLOSE)


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (peml.PromptTuning(2), {"kind": "lora"}, "kind must be one of prefix_tuning, cartridge, prompt_tuning, multi"),
        (peml.PromptTuning(2), {"kind": "multitask_prompt_tuning"}, "PromptTuning is no multitask prompt"),
        (peml.PrefixTuning(2), {"kind": "prompt_tuning"}, "PrefixTuning is keys and values, not tokens at the input"),
        (peml.MultitaskPrompt(2), {"kind": "multitask_prompt_tuning", "task": "rte"}, "holds all tasks: leave out"),
        (peml.MultitaskPrompt(2), {"kind": "prompt_tuning"}, "differs by task"),
        (peml.MultitaskPrompt(2, deep=True), {"kind": "multitask_prompt_tuning"}, "is no multitask prompt at the"),
        (peml.Attempt(2), {}, "Attempt makes a prompt of every text"),
    ],
)
def test_types_that_a_prompt_is_not(prompt: Any, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PemlError, match=message):
        to_peft_prompt(adapt(tiny(), prompt=prompt), tmp_path / "stock", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_deep_multitask_prompt_becomes_one_prefix_per_task(tmp_path: Path) -> None:
    base, batch = tiny(), tokens(2, 5)
    model = adapt(copy.deepcopy(base), prompt=peml.MultitaskPrompt(2, num_ranks=2, deep=True))
    theirs = stock(base, to_peft_prompt(model, tmp_path / "stock", "cola"))
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch, tasks="cola"), **CLOSE)


# Folders.


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(tiny(), prompt=peml.PrefixTuning(2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(PemlError, match="full already holds something: give a folder that is new or empty"):
        to_peft_prompt(model, tmp_path / "full")
    with pytest.raises(PemlError, match=r"mine.txt already holds something"):
        to_peft_prompt(model, tmp_path / "full" / "mine.txt")
    with pytest.raises(PemlError, match="cannot be made .*: give another folder"):
        to_peft_prompt(model, tmp_path / "full" / "mine.txt" / "below")
    (tmp_path / "empty").mkdir()
    to_peft_prompt(model, tmp_path / "empty")
    to_peft_prompt(model, tmp_path / "new" / "below")

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("peml.export.stock.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        to_peft_prompt(model, tmp_path / "broken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "new"]


def test_the_training_state_is_left_alone(tmp_path: Path) -> None:
    model = adapt(tiny(), prompt=peml.PrefixTuning(2)).train()
    model.base_model.model.lm_head.eval()
    before = [module.training for module in model.modules()]
    to_peft_prompt(model, tmp_path / "stock")
    assert [module.training for module in model.modules()] == before


def saved(base: nn.Module, config: Any, folder: Path) -> Path:
    fresh_stock(base, config).save_pretrained(folder)
    return folder


def prefix_of(p: int) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p)


def test_adapters_that_cannot_be_taken_over(tmp_path: Path) -> None:
    base = tiny()
    two, three = (saved(base, prefix_of(p), tmp_path / str(p)) for p in (2, 3))
    lora = saved(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), tmp_path / "lora")
    learned = saved(tiny("gpt2"), prefix_of(2), tmp_path / "gpt2")
    wide = saved(tiny("qwen3"), prefix_of(2), tmp_path / "qwen3")
    multi = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=3)
    many = saved(base, multi, tmp_path / "multi")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "no weights").mkdir()
    (tmp_path / "no weights" / "adapter_config.json").write_bytes((two / "adapter_config.json").read_bytes())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "adapter_config.json").write_bytes((two / "adapter_config.json").read_bytes())
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    for source, names, message in (
        (empty, ["a"], "empty has no adapter_config.json"),
        (tmp_path / "no weights", ["a"], "no weights has no adapter_model.safetensors"),
        (tmp_path / "torn", ["a"], "adapter_model.safetensors cannot be read"),
        (lora, ["a"], "is of type LORA, which is no prompt that peml can take over: PREFIX_TUNING, CARTRIDGE"),
        (wide, ["a"], "qwen3 has 40 numbers per token where this model needs 48"),
        (many, ["a"], "multi has 3 tasks, and task_names= 1"),
        ({"a": many}, (), "multi holds 3 tasks itself: give it alone"),
        ({"a": two, "b": three}, (), "3 is PREFIX_TUNING of 3 tokens and .*2 is PREFIX_TUNING of 2"),
        ({"a": two}, ["a"], "leave out task_names="),
        ({}, (), "source names no task"),
        (two, (), "task_names is empty"),
    ):
        with pytest.raises(PemlError, match=message):
            from_peft(base, source, task_names=names)
        assert not hasattr(base, "prompt_host") and not base.config._attn_implementation.startswith("peml")
        assert all(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(PemlError, match="GPT2LMHeadModel has no rotary positions"):
        from_peft(tiny("gpt2"), learned, ["a"])
    tokens_of = saved(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), tmp_path / "prompt")
    with pytest.raises(PemlError, match="BertForMaskedLM is no decoder"):
        from_peft(tiny("bert"), tokens_of, ["a"])
    with pytest.raises(PemlError, match="base must be a plain transformers model, not PeftModel"):
        from_peft(adapt(tiny(), peml.LoRA(r=2)), two, ["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_task_cols": (3, 1, 1)}, r"prefix_task_cols is \[3, 1, 1\], not \(3, 4, 1\)"),
        ({"prefix_task_rows": (1, 1, 24)}, r"prefix_task_rows is \[1, 1, 24\], not \(3, 1, 24\)"),
        ({"prefix_task_cols": (3, 4)}, "prefix_task_cols is"),
        ({"prompt_embeddings": (96,)}, "prompt_embeddings is .*, not tokens x numbers"),
        ({"prompt_embeddings": None}, "prompt_embeddings does not hold finite numbers"),
    ],
)
def test_weights_are_not_made_to_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Broadcasting would give every token, or every task, the same factors."""
    to_peft_prompt(adapt(tiny(), prompt=peml.MultitaskPrompt(4)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, shape in changes.items():
        tensors[key] = torch.full_like(tensors[key], torch.nan) if shape is None else torch.ones(shape)
    save_file(tensors, file)
    with pytest.raises(PemlError, match=message):
        from_peft(tiny(), tmp_path, TASKS)


def test_what_is_no_adapter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(tiny(), prompt=peml.PrefixTuning(2))
    for text in ("", "[]", "{}", '{"peft_type": "FOO"}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(PemlError, match="is no configuration of PEFT|is of type"):
            from_peft(tiny(), tmp_path, ["a"])
    with pytest.raises(PemlError, match="source must be a folder or a PeftModel, not NoneType"):
        from_peft(tiny(), None, ["a"])
    with pytest.raises(PemlError, match="must be a list of names, not the text 'abc'"):
        from_peft(tiny(), tmp_path, "abc")
    with model.disable_adapter(), pytest.raises(PemlError, match="switched off here"):
        to_peft_prompt(model, tmp_path / "off")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_peft_prompt(model, "~/stock") == tmp_path / "stock" and (tmp_path / "stock").is_dir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    to_peft_prompt(model, ".")
    assert (tmp_path / "here" / "adapter_config.json").is_file()


def test_keys_that_turn_in_a_way_of_their_own_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is asked, not believed: what it does with positions must be what its frequencies say."""
    from transformers.models.llama import modeling_llama

    apply = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: apply(q, k, cos * cos, sin))
    base = tiny()
    model = adapt(base, prompt=peml.PrefixTuning(2))
    with pytest.raises(PemlError, match="LlamaForCausalLM turns the keys of attention layer 0 by position in a way"):
        to_peft_prompt(model, tmp_path / "stock")


def test_half_precision_and_back(tmp_path: Path) -> None:
    """Turned in double precision and stored in single: the way there and back rounds the keys twice."""
    model = adapt(tiny().bfloat16(), prompt=peml.PrefixTuning(3), shaken=False).eval()
    model.base_model.prompt.float()
    to_peft_prompt(model, tmp_path / "stock")
    back = from_peft(tiny().bfloat16(), tmp_path / "stock", ["a"])
    for key, value in model.base_model.prompt.state_dict().items():
        found = back.base_model.prompt.state_dict()[key]
        assert found.dtype == value.dtype == torch.float32
        torch.testing.assert_close(found, value, rtol=0, atol=1e-8)
