"""Prefix tuning: the network that makes its table, and words that it begins at."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

import peml
from models import TASKS, VOCABULARY, adapt, probe_loss, tiny, tokens
from peml import PemlError
from peml.attention import check_words
from peml.prompts import AttentionSlot, ModelShape, ProjectedPrefix
from workshop import recipe, tiny_tokenizer, write_model

PROJECTED = peml.PrefixTuning(4, prefix_projection=True, encoder_hidden_size=7)
PASSAGE = "a b c d e a"


def test_the_count_at_full_size() -> None:
    """LLaMA-2-7B at m 512: the last layer alone has 134 million numbers."""
    shape = ModelShape((AttentionSlot(32, 128),) * 32, 4096)
    head = 512 * 2 * 32 * 4096
    assert head == 134_217_728
    expected = 20 * 4096 + (4096 * 512 + 512) + head + 2 * 32 * 4096
    assert peml.PrefixTuning(20, prefix_projection=True).num_parameters(shape, 8) == expected
    per_task = peml.PrefixTuning(20, per_task=True, prefix_projection=True)
    assert per_task.num_parameters(shape, 8) == expected + 7 * 20 * 4096


def test_the_network_begins_as_in_peft() -> None:
    """Embeddings with variance 1, weights and biases uniform within fan_in^(-1/2)."""
    prompt = peml.PrefixTuning(50, prefix_projection=True, encoder_hidden_size=64).build(
        ModelShape((AttentionSlot(4, 8),) * 2, 100), 1
    )
    assert isinstance(prompt, ProjectedPrefix)
    assert 0.95 < float(prompt.embedding.detach().std()) < 1.05
    for parameter, fan_in in ((prompt.into, 100), (prompt.into_bias, 100), (prompt.out, 64), (prompt.out_bias, 64)):
        bound = fan_in**-0.5
        assert float(parameter.detach().abs().max()) <= bound < 1.2 * float(parameter.detach().abs().max())


@pytest.mark.parametrize("per_task", [False, True])
def test_collapsing_leaves_the_table(per_task: bool) -> None:
    prompt = peml.PrefixTuning(4, per_task=per_task, prefix_projection=True, encoder_hidden_size=7)
    model, batch = adapt(tiny(), peml.LoRA(r=2), prompt), tokens()
    expected = model(input_ids=batch, tasks=TASKS).logits.detach()
    model.base_model.collapse_prompt()
    torch.testing.assert_close(model(input_ids=batch, tasks=TASKS).logits, expected, rtol=1e-12, atol=1e-12)
    assert model.peft_config["default"].prompt == peml.PrefixTuning(4, per_task=per_task)
    probe_loss(model(input_ids=batch, tasks="rte").logits).backward()
    tables = list(model.base_model.prompt.parameters())
    assert tables and all(table.requires_grad and table.grad is not None for table in tables)
    with pytest.raises(PemlError, match="no generated prefix"):
        model.base_model.collapse_prompt()


def test_a_task_can_be_added_to_the_network() -> None:
    model = adapt(tiny(), prompt=peml.PrefixTuning(2, per_task=True, prefix_projection=True, encoder_hidden_size=3))
    batch = tokens(2, 4)
    expected = model(input_ids=batch, tasks="cola").logits
    model.base_model.add_task("new", init="copy:cola")
    assert torch.equal(model(input_ids=batch, tasks="cola").logits, expected)
    assert torch.equal(model(input_ids=batch, tasks="new").logits, expected)
    model.base_model.collapse_prompt()
    torch.testing.assert_close(model(input_ids=batch, tasks="new").logits, expected, rtol=1e-12, atol=1e-12)


def test_the_rate_depends_on_the_network() -> None:
    assert (peml.PrefixTuning().prompt_learning_rate, PROJECTED.prompt_learning_rate) == (5e-3, 5e-5)


def test_a_recipe_can_ask_for_the_network() -> None:
    config = peml.method("lora+prefix", ["a"], {"prompt.prefix_projection": True, "prompt.encoder_hidden_size": 8})
    assert config.prompt == peml.PrefixTuning(prefix_projection=True, encoder_hidden_size=8)


def test_a_run_trains_the_network_and_stores_it(tmp_path: Path) -> None:
    """What is saved is what is trained; the table is made on demand."""
    changes: dict[str, Any] = {"prompt.prefix_projection": True, "prompt.encoder_hidden_size": 5}
    write_model(tmp_path / "model")
    data = recipe(tmp_path, method="lora+prefix", set=changes, train={"max_steps": 2, "max_length": 32})
    folder = peml.train(peml.Recipe.model_validate(data), tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model, batch = PeftModel.from_pretrained(base, folder.adapter), torch.arange(2, 7)[None]
    assert isinstance(model.base_model.prompt, ProjectedPrefix)
    expected = model(input_ids=batch).logits
    model.base_model.collapse_prompt()
    torch.testing.assert_close(model(input_ids=batch).logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": (2, 3)}, "one number for all layers with prompt.prefix_projection"),
        ({"encoder_hidden_size": 0}, "prompt.encoder_hidden_size must be 1 or more, not 0"),
        ({"gated": True}, "prompt.gated goes with a table"),
        ({"prompt_tuning_init": "sample_vocab"}, '"sample_vocab" sets keys and values, which the network'),
    ],
)
def test_what_the_network_cannot_do(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        peml.PrefixTuning(prefix_projection=True, **settings)


# Words to begin at.


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    tiny_tokenizer(list("abcde")).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def ids_of(text: str) -> Tensor:
    return torch.tensor([tiny_tokenizer(list("abcde"))(text, add_special_tokens=False)["input_ids"]])


def fresh(base: PreTrainedModel, prompt: peml.PrefixTuning, **settings: Any) -> nn.Module:
    return adapt(base, prompt=prompt, shaken=False, **settings)


def text(length: int | tuple[int, ...], tokenizer: str, **settings: Any) -> peml.PrefixTuning:
    return peml.PrefixTuning(
        length, prompt_tuning_init="text", prompt_tuning_init_text=PASSAGE, tokenizer_name_or_path=tokenizer, **settings
    )


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_prefix_of_a_passage_is_the_passage(family: str, per_task: bool, tokenizer: str) -> None:
    """To what transformers rounds rotations to, single precision."""
    base, batch, ids = tiny(family), tokens(3, 5), ids_of(PASSAGE)
    whole = torch.cat([ids.expand(3, -1), batch], dim=1)
    expected = base(input_ids=whole).logits[:, ids.shape[1] :]
    without = base(input_ids=batch).logits
    model = fresh(base, text(6, tokenizer, per_task=per_task))
    found = model(input_ids=batch, tasks=["rte", "cola", "rte"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((without - expected).abs().max()) > 0.1


@torch.no_grad()
def test_a_text_is_repeated_or_cut(tokenizer: str) -> None:
    base, batch = tiny(), tokens(2, 4)
    for length in (3, 8):
        whole = torch.cat([ids_of(PASSAGE)] * 2, dim=1)[:, :length]
        expected = base(input_ids=torch.cat([whole.expand(2, -1), batch], dim=1)).logits[:, length:]
        model = fresh(base, text(length, tokenizer))
        torch.testing.assert_close(model(input_ids=batch).logits, expected, rtol=0, atol=1e-4)
        base = model.unload()


@torch.no_grad()
def test_shorter_layers_keep_the_last_words(tokenizer: str) -> None:
    base = tiny()
    long = fresh(copy.deepcopy(base), text(6, tokenizer)).base_model.prompt
    short = fresh(base, text((2, 6), tokenizer)).base_model.prompt
    assert torch.equal(short.keys["0"], long.keys["0"][:, -2:])
    assert torch.equal(short.values["1"], long.values["1"])


@torch.no_grad()
def test_an_encoder_begins_at_words_too() -> None:
    """What it makes of the words by themselves: nothing says where they would stand among the others."""
    torch.manual_seed(3)
    prompt = fresh(tiny("bert"), peml.PrefixTuning((0, 3), prompt_tuning_init="sample_vocab")).base_model.prompt
    assert list(prompt.keys) == ["1"] and float(prompt.keys["1"].std()) > 0.1


@torch.no_grad()
def test_words_of_the_vocabulary() -> None:
    """Every prefix token is what some word gives: in the first layer a value has neither position nor context."""
    base = tiny("gpt2")
    layer = base.transformer.h[0]
    prompt = fresh(base, peml.PrefixTuning(3, prompt_tuning_init="sample_vocab")).base_model.prompt
    embedded = base.transformer.wte.weight[:, None] + base.transformer.wpe.weight[:3]
    values = layer.attn.c_attn(layer.ln_1(embedded))[..., -36:]
    distance = (values - prompt.values["0"].flatten(2)[0]).abs().amax(-1)
    assert distance.shape == (VOCABULARY, 3) and float(distance.amin(0).max()) < 1e-6


def test_a_stored_prefix_does_not_ask_for_its_words_again(tokenizer: str, tmp_path: Path) -> None:
    model, batch = fresh(tiny(), text(4, tokenizer)), tokens(2, 4)
    expected = model(input_ids=batch).logits
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    for file in Path(tokenizer).iterdir():
        file.unlink()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").double()
    torch.testing.assert_close(loaded(input_ids=batch).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tuning_init": "text"}, "goes with"),
        ({"prompt_tuning_init_text": "a"}, "goes with"),
        ({"prompt_tuning_init": "words"}, "must be sample_vocab, text or random, not 'words'"),
    ],
)
def test_words_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        peml.PrefixTuning(3, **settings)


def test_an_encoder_decoder_has_no_words_to_begin_at() -> None:
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(
        PemlError, match='T5ForConditionalGeneration cannot begin .*prompt.prompt_tuning_init to "random"'
    ):
        check_words(T5ForConditionalGeneration(config), peml.PrefixTuning(3, prompt_tuning_init="sample_vocab"))


@pytest.mark.parametrize("kind", [peml.PrefixTuning, peml.PromptTuning, peml.MultitaskPrompt])
def test_a_missing_tokenizer_is_named(kind: Any) -> None:
    """Before the model is touched."""
    prompt = kind(3, prompt_tuning_init="text", prompt_tuning_init_text="a", tokenizer_name_or_path="no/such/tokenizer")
    base, batch = tiny(), tokens(1, 3)
    expected, names = base(input_ids=batch).logits, [name for name, _ in base.named_modules()]
    with pytest.raises(PemlError, match="'no/such/tokenizer' has none that loads"):
        get_peft_model(base, peml.PemlConfig(task_names=TASKS, adapter=peml.LoRA(r=2), prompt=prompt))
    assert [name for name, _ in base.named_modules()] == names
    assert base.config._attn_implementation == "sdpa" and torch.equal(base(input_ids=batch).logits, expected)
