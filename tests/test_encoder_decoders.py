"""What only encoder-decoders have: an encoder that is called by itself, three kinds of attention, targets from labels."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import (
    BartForSequenceClassification,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LongT5Config,
    LongT5ForConditionalGeneration,
    PreTrainedModel,
    T5ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import families
import peml
import zoo
from families import asked_padded, made, padded, prefix_of, targets, texts
from models import TASKS, adapt, assert_same, gradients, shake
from peml import PemlError

ROW_TASKS = ["cola", "rte"]
few = pytest.mark.parametrize("family", ["t5", "bart"])


def base_of(model: PeftModel) -> PreTrainedModel:
    return model.base_model.model


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_slots_are_the_encoder_then_each_layer_of_the_decoder() -> None:
    """The order of the lengths that are given one by one: own, cross, own, cross after the encoder's."""
    base = families.build("bart", "sdpa")
    model = adapt(base, prompt=peml.PrefixTuning((1, 2, 3, 4, 5)))
    order = {name: module._peml_slot[0] for name, module in base.named_modules() if hasattr(module, "_peml_slot")}
    assert sorted(order, key=order.get) == [
        "model.encoder.layers.0.self_attn",
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.encoder_attn",
        "model.decoder.layers.1.self_attn",
        "model.decoder.layers.1.encoder_attn",
    ]
    assert [(slot.num_heads, slot.head_dim) for slot in base.prompt_host.slots] == [(3, 8)] + [(4, 6)] * 4
    assert [layer.num_tokens for layer in model.base_model.prompt(None)] == [1, 2, 3, 4, 5]


@few
@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
@torch.no_grad()
def test_a_prefix_in_one_kind_of_attention(family: str, kind: str) -> None:
    encoder, slots = zoo.FAMILIES[family].encoder, zoo.FAMILIES[family].slots
    kinds = ["encoder"] * encoder + ["decoder", "cross"] * ((slots - encoder) // 2)
    base = families.build(family, "sdpa")
    model = adapt(base, prompt=peml.PrefixTuning(tuple(2 * (kind == found) for found in kinds), per_task=True))
    for row, target, task in zip(texts(), targets(family), TASKS, strict=False):
        layers = model.base_model.prompt([TASKS.index(task)])
        none = torch.zeros(2).double()
        prefix = [None if layer is None else (layer.keys[0], layer.values[0], none) for layer in layers]
        found = model(input_ids=row[None], decoder_input_ids=target[None], tasks=task).logits[0]
        close(found, families.logits(family, row, prefix, target))


@few
@torch.no_grad()
def test_closed_gates_are_no_prefix(family: str) -> None:
    model, (call, mask) = made(family, "sdpa", "gated"), asked_padded(family, "right")
    for buffer in model.base_model.prompt.buffers():
        buffer.fill_(-1e4)
    found = model(**call, tasks=ROW_TASKS).logits
    with model.disable_adapter():
        torch.testing.assert_close(found[mask], model(**call).logits[mask], rtol=1e-12, atol=1e-12)


@few
def test_labels(family: str) -> None:
    """Targets made from labels by the model itself: the loss and its gradients are those of the targets."""
    model, labels = made(family, "sdpa", "per task, gated").train(), torch.stack([row[:3] for row in targets(family)])
    ids, mask = padded(texts(), "right")
    shifted = base_of(model).prepare_decoder_input_ids_from_labels(labels)
    given = {"input_ids": ids, "attention_mask": mask, "tasks": ROW_TASKS}
    model(**given, labels=labels).loss.backward()
    found = gradients(model)
    logits = model(**given, decoder_input_ids=shifted).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert_same(found, gradients(model))


@few
def test_the_encoder_keeps_its_prefix_when_attention_is_switched(family: str) -> None:
    """`generate` calls it before anything else of the model."""
    model, row = made(family, "sdpa", "shared"), texts()[1]
    wanted = families.logits(family, row, prefix_of(model, "cola"), torch.tensor([3]))
    base_of(model).set_attn_implementation("sdpa")
    settings = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    found = model.generate(row[None], max_new_tokens=2, tasks="cola", **settings).logits[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)  # it gives single precision


@few
@pytest.mark.parametrize("part", ["get_encoder", "get_decoder"])
@torch.no_grad()
def test_a_part_whose_attention_is_switched_keeps_its_prefix(family: str, part: str) -> None:
    model, row, target = made(family, "sdpa", "gated"), texts()[1], targets(family)[1]
    wanted = families.logits(family, row, prefix_of(model, "cola"), target)
    call = {"input_ids": row[None], "decoder_input_ids": target[None]}
    for name in ("eager", "sdpa"):
        getattr(base_of(model), part)().set_attn_implementation(name)
        torch.testing.assert_close(model(**call).logits[0], wanted, rtol=1e-5, atol=1e-5)
    getattr(base_of(model), part)().set_attn_implementation("by_loops")
    with pytest.raises(PemlError, match="switched to attention 'by_loops', which cannot take its prefix"):
        model(**call)


@few
@torch.no_grad()
def test_an_encoder_called_alone_would_lose_its_prefix(family: str) -> None:
    model, row = made(family, "sdpa", "per task"), texts()[0]
    for encode in (base_of(model).get_encoder(), base_of(model).encoder if family == "t5" else base_of(model).model):
        with pytest.raises(PemlError, match="outside its model's forward"):
            encode(input_ids=row[None])
        with pytest.raises(PemlError, match="outside its model's forward"), model.base_model.routed("rte"):
            encode(input_ids=row[None])


@few
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_an_adapter_and_a_prefix_per_task(family: str, settings: dict) -> None:
    """The decoder is called with more rows than there are tasks, and with no text that says how many."""
    base = families.build(family, "sdpa")
    model = adapt(base, peml.MTLLoRA(r=2), peml.PrefixTuning(2, per_task=True))
    ids, mask = padded(texts(), "right")
    call = {"max_new_tokens": 4, "do_sample": False} | settings
    found = model.generate(ids, attention_mask=mask, tasks=ROW_TASKS, **call)
    each = settings.get("num_return_sequences", 1)
    for i, (row, task) in enumerate(zip(texts(), ROW_TASKS, strict=True)):
        alone = model.generate(row[None], tasks=task, use_cache=False, **call)
        assert torch.equal(found[i * each : (i + 1) * each], alone)


@pytest.mark.parametrize("family", zoo.ENCODER_DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_decoder_that_is_given_its_first_words(family: str, attention: str, cache: str) -> None:
    """Several queries against a cache that is longer than they are."""
    model, row = made(family, attention, "gated"), texts()[1]
    first, prefix = torch.cat([torch.tensor([3]), targets(family)[0]]), prefix_of(model, "cola")
    grown = first
    with torch.no_grad():
        for _ in range(3):
            grown = torch.cat([grown, families.logits(family, row, prefix, grown)[-1:].argmax(-1)])
    settings = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True, "tasks": "cola"}
    settings |= {"cache_implementation": "static"} if cache == "static" else {}
    found = model.generate(row[None], decoder_input_ids=first[None], **settings)
    assert torch.equal(found[0], grown)


@torch.no_grad()
def test_classifiers_that_want_an_end_of_text() -> None:
    """The model looks for it already when its attention layers are counted."""
    for family, kind in (("t5", T5ForSequenceClassification), ("bart", BartForSequenceClassification)):
        config = zoo.FAMILIES[family].config()
        config.eos_token_id = 2
        base = kind(config).double().eval()
        shake(base.parameters(), 0.2)
        model = adapt(base, prompt=peml.PrefixTuning(2, per_task=True))
        assert len(base.prompt_host.slots) == zoo.FAMILIES[family].slots
        ids, mask = padded([torch.cat([row, torch.tensor([2])]) for row in texts()], "right")
        found = model(input_ids=ids, attention_mask=mask, tasks=ROW_TASKS).logits
        alone = model(input_ids=ids[:1, :5], tasks=ROW_TASKS[0]).logits
        close(found[:1], alone)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids[:1, :5]).logits, alone, rtol=1e-2, atol=1e-2)


@few
@torch.no_grad()
def test_a_prompt_at_the_input_stands_before_the_text(family: str) -> None:
    """Each row alone, with its prompt prepended by hand, and everything computed anew for each token."""
    base = families.build(family, "sdpa")
    plain = copy.deepcopy(base)
    model = adapt(base, prompt=peml.PromptTuning(3, per_task=True))
    rows, new = texts(), 4
    ids, mask = padded(rows, "right")
    decoded, wanted = torch.tensor([[2, 5, 9]] * 2), []
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoded, tasks=ROW_TASKS).logits
    settings = {"max_new_tokens": new, "do_sample": False, "tasks": ROW_TASKS}
    for i, (row, task) in enumerate(zip(rows, ROW_TASKS, strict=True)):
        prompt = model.base_model.prompt.tokens[TASKS.index(task)][None]
        whole = torch.cat([prompt, plain.get_input_embeddings()(row[None])], dim=1)
        close(logits[i : i + 1], plain(inputs_embeds=whole, decoder_input_ids=decoded[:1]).logits)
        written = torch.tensor([[plain.generation_config.decoder_start_token_id]])
        for _ in range(new):
            step = plain(inputs_embeds=whole, decoder_input_ids=written, use_cache=False).logits[:, -1]
            written = torch.cat([written, step.argmax(-1, keepdim=True)], dim=1)
        wanted.append(written[0])
    for extra in ({}, {"cache_implementation": "static", "disable_compile": True}):
        found = model.generate(ids, attention_mask=mask, **settings, **extra)
        assert torch.equal(found[:, : new + 1], torch.stack(wanted)), extra
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = model.generate(ids, attention_mask=mask, **settings, **beams)
    for i, (row, task) in enumerate(zip(rows, ROW_TASKS, strict=True)):
        alone = model.generate(row[None], **settings | {"tasks": task}, **beams)
        assert torch.equal(together[2 * i : 2 * i + 2, : alone.shape[1]], alone)


@few
def test_a_prompt_at_the_input_trains(family: str) -> None:
    """Checkpointed or not, with an adapter that differs by task, and from labels."""
    model = adapt(families.build(family, "sdpa"), peml.MTLLoRA(r=2), peml.MultitaskPrompt(3))
    ids, mask = padded(texts(), "right")
    results = []
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, labels=ids[:, :3].contiguous(), tasks=ROW_TASKS).loss.backward()
        results.append(gradients(model))
        model.train()
        base_of(model).activation_checkpointing_enable()
    assert_same(*results)
    absent = TASKS.index("sst2")
    for name, gradient in results[0].items():
        if "by_token" in name or "by_feature" in name:
            assert not gradient[absent].any() and gradient[TASKS.index("rte")].any()
    reading = adapt(families.build(family, "sdpa"), prompt=peml.Attempt(2, num_sources=1, projection_dim=3))
    found = reading.generate(ids, attention_mask=mask, tasks=ROW_TASKS, max_new_tokens=3, do_sample=False, num_beams=2)
    alone = reading.generate(texts()[0][None], tasks=ROW_TASKS[0], max_new_tokens=3, do_sample=False, num_beams=2)
    assert torch.equal(found[:1, : alone.shape[1]], alone)


def test_prompts_at_the_input_that_are_refused() -> None:
    base = families.build("marian", "sdpa")
    if not peml.attention.takes_embeddings(base):
        with pytest.raises(PemlError, match="does not read embeddings as it reads tokens; use PrefixTuning"):
            adapt(base, prompt=peml.PromptTuning(2))
        assert base.config._attn_implementation == "sdpa"
    model = adapt(families.build("t5", "sdpa"), prompt=peml.PromptTuning(2))
    ids = texts()[0][None]
    with pytest.raises(PemlError, match="outside its model's forward"):
        base_of(model).get_encoder()(input_ids=ids)
    read = base_of(model).get_encoder()
    with model.disable_adapter():
        bare = read(input_ids=ids)
    for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(PemlError, match="puts a prompt of 2 before the text"):
            model(encoder_outputs=bare, decoder_input_ids=ids, **mask)
        with pytest.raises(PemlError, match="puts a prompt of 2 before the text"):
            model.generate(encoder_outputs=bare, max_new_tokens=2, **mask)
    mask = {"attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    whole = model(input_ids=ids, **mask)
    again = model(encoder_outputs=(whole.encoder_last_hidden_state,), **mask)
    close(again.logits, whole.logits)
    with pytest.raises(PemlError, match="mask of rows x tokens"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 4, 4), decoder_input_ids=ids)


def test_models_that_would_be_reached_in_part_or_not_at_all() -> None:
    long = LongT5ForConditionalGeneration(LongT5Config(**zoo.T5))
    with pytest.raises(PemlError, match="LongT5ForConditionalGeneration cannot take a prefix: its encoder has an att"):
        adapt(long, prompt=peml.PrefixTuning(2))
    config = WhisperConfig(**zoo.BART, max_source_positions=8, max_target_positions=8)
    with pytest.raises(PemlError, match="WhisperForConditionalGeneration cannot take a prefix: a forward with two tok"):
        adapt(WhisperForConditionalGeneration(config), prompt=peml.PrefixTuning(2))
    assert not long.config._attn_implementation.startswith("peml")


def test_two_models_in_one() -> None:
    """An encoder and a decoder that were made for themselves."""
    parts = [BertConfig(**zoo.BERT) for _ in range(2)]
    base = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts)).double().eval()
    base.config.decoder_start_token_id, base.config.pad_token_id = 3, 1
    base.generation_config.decoder_start_token_id, base.generation_config.pad_token_id = 3, 1
    model = adapt(base, prompt=peml.PrefixTuning(2, per_task=True))
    assert len(base.prompt_host.slots) == 6
    ids, mask = padded(texts(), "right")
    call = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    found = model.generate(ids, attention_mask=mask, tasks=ROW_TASKS, **call)
    for i, (row, task) in enumerate(zip(texts(), ROW_TASKS, strict=True)):
        assert torch.equal(found[i], model.generate(row[None], tasks=task, use_cache=False, **call)[0])


def test_an_assistant() -> None:
    """Guesses of a plain model, checked by the one with the prefix."""
    model, row = made("t5", "sdpa", "gated"), texts()[1]
    guesses = families.build("mt5", "sdpa")
    settings = {"max_new_tokens": 6, "do_sample": False, "tasks": "cola", "assistant_model": guesses}
    found = model.generate(row[None], **settings)
    assert torch.equal(found[0, 1:], families.greedy("t5", row, prefix_of(model, "cola"), 6))
