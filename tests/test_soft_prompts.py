"""Prompts at the input: equal to prepending, at every kind of position; where they begin; what they refuse."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ElectraConfig,
    ElectraForPreTraining,
    ModernBertForSequenceClassification,
    PreTrainedModel,
)

import families
import peml
import zoo
from models import TASKS, adapt, gradients, llama, tiny, tokens
from peml.prompts import ModelShape, Texts
from workshop import tiny_tokenizer, write_model

SOFT_FAMILIES = [name for name in zoo.DECODERS if name not in ("gpt_oss", "gemma2")]


def prepended(base: PreTrainedModel, prompt: Tensor, row: Tensor) -> Tensor:
    """Logits of a text behind a prompt, in the unmodified model."""
    text = base.get_input_embeddings()(row[None])
    return base(inputs_embeds=torch.cat([prompt[None], text], dim=1)).logits[0, len(prompt) :]


@pytest.mark.parametrize("family", [name for name in SOFT_FAMILIES if zoo.FAMILIES[name].windows == (None,)])
@torch.no_grad()
def test_the_run_equals_prepending(family: str) -> None:
    """With the text moved behind the prompt: rotary positions only see differences, up to their rounding."""
    base = families.build(family, "sdpa")
    plain = copy.deepcopy(base)
    model = adapt(base, prompt=peml.PromptTuning(3, per_task=True))
    for row, task in zip(families.texts(), ("cola", "rte"), strict=True):
        found = model(input_ids=row[None], tasks=task).logits[0]
        prompt = model.base_model.prompt.tokens[TASKS.index(task)]
        torch.testing.assert_close(found, prepended(plain, prompt, row), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, plain(input_ids=row[None]).logits[0], atol=1e-2)


@pytest.mark.parametrize("family", SOFT_FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_every_family_pads_generates_and_caches(family: str, attention: str) -> None:
    """Against each text alone and uncached; in a window the prompt stays visible, as a prefix does."""
    model = families.made(family, attention, "soft, per task")
    rows, tasks = families.texts(), ["cola", "rte"]
    ids, mask = families.padded(rows, "left")
    for side in ("left", "right"):
        ids, mask = families.padded(rows, side)
        logits = model(input_ids=ids, attention_mask=mask, tasks=tasks).logits
        for b, row in enumerate(rows):
            alone = model(input_ids=row[None], tasks=tasks[b]).logits[0]
            torch.testing.assert_close(logits[b][mask[b].bool()], alone, rtol=1e-9, atol=1e-9)
    ids, mask = families.padded(rows, "left")
    settings = {"max_new_tokens": 3, "do_sample": False}
    wanted = []
    for row, task in zip(rows, tasks, strict=True):
        for _ in range(3):
            row = torch.cat([row, model(input_ids=row[None], tasks=task, use_cache=False).logits[0, -1:].argmax(-1)])
        wanted.append(row[-3:])
    for extra in ({}, {"cache_implementation": "static", "disable_compile": True}):
        found = model.generate(ids, attention_mask=mask, tasks=tasks, **settings, **extra)[:, -3:]
        assert torch.equal(found, torch.stack(wanted)), extra


def test_the_prompt_of_a_sliding_window_is_never_out_of_sight() -> None:
    model = families.made("mistral", "sdpa", "soft, per task")
    row = torch.randint(4, 60, (1, 12))
    near = model(input_ids=row, tasks="rte").logits[0, -1]
    far = model(input_ids=row, tasks="cola").logits[0, -1]
    assert (near - far).abs().max() > 1e-3


def test_it_equals_prompt_tuning_of_peft() -> None:
    """The same soft tokens; PEFT makes the text longer, and cuts the logits off again in nothing."""
    base = tiny()
    theirs = get_peft_model(
        copy.deepcopy(base), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    ).eval()
    ours = adapt(base, prompt=peml.PromptTuning(4))
    batch = tokens(3, 5)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(ours.base_model.prompt.tokens[0])
        logits = theirs(input_ids=batch).logits[:, 4:]
        torch.testing.assert_close(ours(input_ids=batch).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_prompt_is_run_once_per_task_present_whatever_the_rows() -> None:
    model, seen = adapt(tiny(), peml.MTLLoRA(r=2), peml.PromptTuning(3)), []
    layer = model.base_model.model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    model(input_ids=tokens(6, 5), tasks=["rte", "cola"] * 3)
    assert seen == [(2, 3), (6, 5)]
    seen.clear()
    shared = adapt(tiny(), peml.LoRA(r=2), peml.PromptTuning(3))
    shared.base_model.model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2]))
    shared.generate(tokens(2, 4), max_new_tokens=3, do_sample=False, tasks=["rte", "cola"])
    assert seen == [(1, 3), (2, 4), (2, 1), (2, 1)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_continuous_batching(family: str) -> None:
    """The tokens of each request alone, whatever the task that went before."""
    model = families.made(family, "sdpa", "soft, per task")
    for task in ("cola", "rte"):
        model.base_model.select_task(task)
        for row, found in zip(families.texts(), families.batched(model), strict=True):
            settings = {"max_new_tokens": families.NEW, "do_sample": False, "eos_token_id": -1}
            assert found == model.generate(row[None], **settings)[0, len(row) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_steps_through_a_cache_go_on_where_the_text_was(family: str) -> None:
    """Without mask and positions, which models count by themselves."""
    model, row = families.made(family, "sdpa", "soft, per task"), torch.randint(4, 60, (2, 7))
    whole = model(input_ids=row, tasks=["cola", "rte"]).logits
    cache, parts = None, []
    for span in (slice(0, 4), slice(4, 5), slice(5, 7)):
        out = model(input_ids=row[:, span], past_key_values=cache, use_cache=True, tasks=["cola", "rte"])
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_the_prompt_is_run_without_the_mask_of_the_text() -> None:
    """Align-LoRA averages over tokens that are no padding: of the text, in whatever length."""
    model = adapt(tiny(), peml.LoRA(r=2, align="kl"), peml.PromptTuning(3)).train()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model(input_ids=tokens(2, 5), attention_mask=mask, tasks=["rte", "cola"]).logits.sum().backward()
    assert model.base_model.penalties()["align"].isfinite()
    # One loss per layer: the run of the prompt, whose tokens are of no task, has none.
    assert len(model.base_model._feature_losses) == len(model.base_model._banks())


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model = adapt(tiny(), prompt=peml.PromptTuning(3)).train()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(peml.PemlError, match="use_reentrant"):
        model(input_ids=tokens(2, 4)).logits.sum().backward()


def test_rows_are_not_routed_by_adapter_names() -> None:
    """PEFT would drop the argument, and every row would go through the active adapter."""
    model = adapt(tiny(), prompt=peml.PromptTuning(3))
    model.add_adapter("other", peml.PemlConfig(task_names=TASKS, prompt=peml.PromptTuning(3)))
    for call in (model, model.generate):
        with pytest.raises(peml.PemlError, match="adapter_names= routes no PEML adapter"):
            call(input_ids=tokens(2, 4), adapter_names=["other", "default"])


def test_another_models_layers_do_not_take_the_prefix() -> None:
    first, second = (adapt(tiny(), prompt=peml.PrefixTuning(2)) for _ in range(2))
    inner = second.base_model.model.model

    def call(module, args, kwargs):
        inner(input_ids=tokens(1, 3))

    first.base_model.model.model.register_forward_pre_hook(call, with_kwargs=True)
    with pytest.raises(peml.PemlError, match="outside its model's forward"):
        first(input_ids=tokens(2, 4))


@pytest.mark.parametrize("prompt", [peml.PromptTuning(2), peml.PrefixTuning(2)], ids=lambda p: type(p).__name__)
@torch.no_grad()
def test_packed_rows_want_no_cache(prompt: peml.prompts.PromptConfig) -> None:
    model, positions = adapt(tiny(), prompt=prompt), torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(peml.PemlError, match="while it fills a cache: pass use_cache=False"):
        model(input_ids=tokens(1, 5), position_ids=positions)
    model(input_ids=tokens(1, 5), position_ids=positions, use_cache=False)


# Where they begin.


@pytest.mark.parametrize("prompt", [peml.PromptTuning(5), peml.MultitaskPrompt(5)], ids=lambda p: type(p).__name__)
def test_they_begin_at_words(prompt: peml.prompts.WordPromptConfig) -> None:
    base = tiny().float()
    vocabulary = base.get_input_embeddings().weight
    found = adapt(base, prompt=prompt, shaken=False).base_model.prompt
    tensor = found.shared if isinstance(prompt, peml.MultitaskPrompt) else found.tokens[0]
    assert all((vocabulary == token).all(-1).any() for token in tensor)
    assert len({tuple(token.tolist()) for token in tensor}) > 1


def test_they_begin_at_a_text(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    base = llama().from_pretrained(path)
    settings = {"prompt_tuning_init": "text", "prompt_tuning_init_text": "big cat"}
    ids = tiny_tokenizer()("big cat", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    model = adapt(base, prompt=peml.PromptTuning(5, **settings), shaken=False)
    words = base.get_input_embeddings()(torch.tensor([*ids, *ids, ids[0]]))
    assert torch.equal(model.base_model.prompt.tokens[0], words)
    model.save_pretrained(tmp_path / "adapter")
    # The weights lie in the file: the tokenizer is not asked for again.
    (path / "tokenizer.json").unlink()
    again = PeftModel.from_pretrained(llama().from_pretrained(path), tmp_path / "adapter")
    assert torch.equal(again.base_model.prompt.tokens, model.base_model.prompt.tokens)
    with pytest.raises(peml.PemlError, match="tokenizer_name_or_path"):
        adapt(llama().from_pretrained(path), prompt=peml.PromptTuning(5, **settings))


@torch.no_grad()
def test_a_deep_multitask_prompt_begins_at_the_keys_and_values_of_words(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    base = llama().from_pretrained(path).double()
    plain, ids = copy.deepcopy(base), tiny_tokenizer()("big red cat", add_special_tokens=False)["input_ids"]
    settings = {"prompt_tuning_init": "text", "prompt_tuning_init_text": "big red cat"}
    model = adapt(base, peml.MTLLoRA(r=2), peml.MultitaskPrompt(3, deep=True, **settings), shaken=False)
    prompt = model.base_model.prompt
    for factors in (*prompt.by_token.values(), *prompt.by_feature.values()):
        factors.fill_(1.0)
    row = torch.tensor([5, 9, 7, 11])
    whole = plain(input_ids=torch.tensor([[*ids, *row.tolist()]])).logits[0, 3:]
    torch.testing.assert_close(model(input_ids=row[None], tasks="rte").logits[0], whole, rtol=1e-4, atol=1e-5)


def test_a_further_task_begins_at_words() -> None:
    model = adapt(tiny().float(), prompt=peml.PromptTuning(4, per_task=True))
    model.base_model.add_task("wnli")
    vocabulary, tokens_of = model.get_input_embeddings().weight, model.base_model.prompt.tokens
    assert tokens_of.shape[0] == 4 and all((vocabulary == token).all(-1).any() for token in tokens_of[3])


def test_words_are_those_of_the_base_model() -> None:
    """An adapter that is there already has no say in keys and values of words."""
    base = tiny()
    found = []
    for adapter in (None, peml.LoRA(r=2)):
        model = adapt(copy.deepcopy(base), adapter, peml.PrefixTuning(2))
        torch.manual_seed(4)
        prompt = peml.MultitaskPrompt(3, deep=True)
        model.add_adapter("deep", peml.PemlConfig(task_names=TASKS, prompt=prompt))
        found.append(model.base_model.model.prompt_host.peml_prompt["deep"].shared["1"].detach())
    assert torch.equal(*found) and found[0].abs().max() > 0.1


def test_factors_begin_near_one() -> None:
    for r in (1, 3):
        prompt = peml.MultitaskPrompt(6, num_ranks=r).build(ModelShape((), 32), 4)
        assert (prompt.by_token @ prompt.by_feature - 1).abs().max() < 0.2
        assert prompt([0, 2]).shape == (2, 6, 32)


# ATTEMPT: a prompt for every text.


def attending(temperature: float = 1.0) -> PeftModel:
    model = adapt(tiny(), prompt=peml.Attempt(3, num_sources=2, projection_dim=4, temperature=temperature))
    model.base_model.prompt.sources.copy_(torch.randn_like(model.base_model.prompt.sources))
    return model


def test_padding_and_answers_are_not_read() -> None:
    model, batch = attending(), tokens(2, 6)
    read = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    other = batch.clone()
    other[:, 3:] = 5
    first, second = (model(input_ids=b, tasks="rte", input_mask=read).logits for b in (batch, other))
    assert torch.equal(first[:, :3], second[:, :3])
    whole = model(input_ids=batch, tasks="rte", input_mask=torch.ones(2, 6)).logits
    assert not torch.allclose(whole[:, :3], first[:, :3])


def test_far_above_every_score_the_mixture_is_the_mean() -> None:
    prompt = attending(temperature=1e9).base_model.prompt
    texts = Texts(torch.randn(2, 4, 24).double(), torch.ones(2, 4).bool(), torch.tensor([0, 1]))
    own = prompt.tokens[:2]
    mean = (prompt.sources.sum(0) + own) / 3
    torch.testing.assert_close(prompt([0, 1], texts), own + mean, rtol=1e-6, atol=1e-6)


def test_sources_are_frozen_and_saved(tmp_path: Path) -> None:
    model = attending()
    model(input_ids=tokens(2, 4), tasks=["rte", "cola"], input_mask=torch.ones(2, 4)).logits.square().sum().backward()
    assert model.base_model.prompt.sources.grad is None
    assert not any("sources" in name for name in gradients(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny().float(), tmp_path)
    assert torch.equal(again.base_model.prompt.sources, model.base_model.prompt.sources.float())


@torch.no_grad()
def test_generation_reads_the_text_it_goes_on_from() -> None:
    """Beams, padding and steps keep the prompt that the text had when generation began."""
    model, rows = attending(), families.texts()
    ids, mask = families.padded(rows, "left")
    found = model.generate(ids, attention_mask=mask, tasks=["cola", "rte"], max_new_tokens=3, do_sample=False)[:, -3:]
    for b, (row, task) in enumerate(zip(rows, ("cola", "rte"), strict=True)):
        text, read = row[None], torch.ones(1, len(row))
        for _ in range(3):
            logits = model(input_ids=text, tasks=task, input_mask=read, use_cache=False).logits
            text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            read = torch.nn.functional.pad(read, (0, 1))
        assert torch.equal(found[b], text[0, -3:])
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, tasks=["cola", "rte"], **beams)[:, -3:]
    for b, (row, task) in enumerate(zip(rows, ("cola", "rte"), strict=True)):
        alone = model.generate(row[None], tasks=task, **beams)[:, -3:]
        assert torch.equal(together[2 * b : 2 * b + 2], alone)


def test_what_cannot_be_read_is_refused() -> None:
    model, batch = attending(), tokens(2, 4)
    with pytest.raises(peml.PemlError, match="pass input_mask="):
        model(input_ids=batch, tasks="rte")
    with pytest.raises(peml.PemlError, match="some token to read in every row"):
        model(input_ids=batch, tasks="rte", input_mask=torch.zeros(2, 4))
    cache = model(input_ids=batch, tasks="rte", input_mask=torch.ones(2, 4), use_cache=True).past_key_values
    padded = batch.clone()
    padded[0, :2] = 1
    with pytest.raises(peml.PemlError, match="holds padding: pass attention_mask="):
        model.generate(padded, tasks="rte", max_new_tokens=1)
    model(input_ids=batch, tasks="rte", input_mask=[[1] * 4] * 2)
    with pytest.raises(peml.PemlError, match="call generate"):
        model(input_ids=batch[:, :1], tasks="rte", past_key_values=cache, input_mask=torch.ones(2, 1))
    with pytest.raises(peml.PemlError, match="several texts"):
        model(input_ids=batch, tasks="rte", input_mask=torch.ones(2, 4), position_ids=torch.tensor([[0, 1, 0, 1]] * 2))


# Encoders: the prompt goes through the model with the text.


@pytest.mark.parametrize("family", [name for name in zoo.ENCODERS if not zoo.FAMILIES[name].package])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_in_an_encoder_they_stand_behind_the_first_token(family: str, attention: str) -> None:
    base = families.build(family, attention)
    plain = copy.deepcopy(base)
    model = adapt(base, prompt=peml.PromptTuning(3, per_task=True))
    rows, tasks = families.texts(), ["cola", "rte"]
    ids, mask = families.padded(rows, "right")
    logits = model(input_ids=ids, attention_mask=mask, tasks=tasks).logits
    assert logits.shape[:2] == ids.shape
    for b, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        text = plain.get_input_embeddings()(row[None])
        prompt = model.base_model.prompt.tokens[TASKS.index(task)][None]
        # RoBERTa and its kin count from behind the number of the padding token.
        first = 2 if "roberta" in family else 0
        positions = torch.arange(first, first + 3 + len(row))[None]
        whole = plain(
            inputs_embeds=torch.cat([text[:, :1], prompt, text[:, 1:]], dim=1), position_ids=positions
        ).logits[0]
        wanted = torch.cat([whole[:1], whole[4:]])
        torch.testing.assert_close(logits[b, : len(row)], wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(input_ids=row[None], tasks=task).logits[0], wanted, rtol=1e-9, atol=1e-9)


def test_outputs_of_an_encoder_are_as_if_there_were_no_prompt() -> None:
    """Hidden states, labels by token, answers by position; classifiers read the first token."""
    config = tiny("bert").config
    config.num_labels = 2
    fresh = functools.partial(copy.deepcopy, config)
    batch, adapter = tokens(2, 6), {"prompt": peml.PromptTuning(3)}
    by_token = adapt(BertForTokenClassification(fresh()).double(), **adapter)
    labels = torch.randint(0, 2, (2, 6))
    out = by_token(input_ids=batch, labels=labels, output_hidden_states=True)
    assert out.logits.shape == (2, 6, 2) and all(state.shape[1] == 6 for state in out.hidden_states)
    wanted = torch.nn.functional.cross_entropy(out.logits.view(-1, 2), labels.view(-1))
    torch.testing.assert_close(out.loss, wanted)
    answers = adapt(BertForQuestionAnswering(fresh()).double(), **adapter)
    out = answers(input_ids=batch)
    assert out.start_logits.shape == out.end_logits.shape == (2, 6)
    assert all(part.shape == (2, 6) for part in answers(input_ids=batch, return_dict=False))
    with pytest.raises(peml.PemlError, match="leave out start_positions="):
        answers(input_ids=batch, start_positions=torch.tensor([0, 2]), end_positions=torch.tensor([1, 5]))
    replaced = ElectraConfig(
        vocab_size=67, embedding_size=24, hidden_size=24, num_hidden_layers=1, num_attention_heads=3
    )
    assert adapt(ElectraForPreTraining(replaced).double(), **adapter)(input_ids=batch).logits.shape == (2, 6)
    pooling = ModernBertForSequenceClassification(zoo.FAMILIES["modernbert"].config())
    pooling.config.classifier_pooling = "mean"
    with pytest.raises(peml.PemlError, match="it would pool the soft tokens too"):
        adapt(pooling.double(), **adapter)
    rows = adapt(BertForSequenceClassification(fresh()).double(), **adapter)
    one, other = (rows(input_ids=ids).logits for ids in (batch, batch.flip(1)))
    assert one.shape == (2, 2) and not torch.allclose(one, other)
    assert isinstance(rows(input_ids=batch, return_dict=False)[0], Tensor)
    base = adapt(tiny("bert"), prompt=peml.PromptTuning(3))
    assert base(input_ids=batch, return_dict=False)[0].shape[1] == 6
    # A type per token: soft tokens have the first one's.
    types = torch.tensor([[1, 0, 0, 1, 1, 1]] * 2)
    plain, prompt = base.base_model.model, base.base_model.prompt.tokens
    found = base(input_ids=batch, token_type_ids=types).logits
    text = plain.get_input_embeddings()(batch)
    with base.disable_adapter():
        whole = plain(
            inputs_embeds=torch.cat([text[:, :1], prompt.expand(2, -1, -1), text[:, 1:]], dim=1),
            token_type_ids=torch.cat([types[:, :1].expand(-1, 4), types[:, 1:]], dim=1),
        ).logits
    torch.testing.assert_close(found, torch.cat([whole[:, :1], whole[:, 4:]], dim=1), rtol=1e-9, atol=1e-9)


def test_encoders_refuse_what_would_be_wrong() -> None:
    model, batch = adapt(tiny("bert"), prompt=peml.PromptTuning(4, per_task=True)), tokens(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(peml.PemlError, match="pad rows on the right"):
        model(input_ids=batch, attention_mask=mask, tasks="rte")
    with pytest.raises(peml.PemlError, match="rows x tokens"):
        model(input_ids=batch, attention_mask=torch.ones(2, 1, 5, 5), tasks="rte")
    with pytest.raises(peml.PemlError, match="pack several tasks"):
        model(input_ids=batch, tasks=[["rte"] * 5, ["cola"] * 5])
    with pytest.raises(peml.PemlError, match="64 positions: a text of 61 tokens"):
        model(input_ids=tokens(1, 61), tasks="rte")
    attempt = adapt(tiny("bert"), prompt=peml.Attempt(2, num_sources=1, projection_dim=3))
    attempt(input_ids=batch, tasks="rte")  # no answer stands in its text: there is nothing to leave out


# What is refused.


def test_models_that_cannot_are_named() -> None:
    base = tiny()
    base.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(peml.PemlError, match=r"dynamic.*length of the text"):
        adapt(base, prompt=peml.PromptTuning(3))
    # Refused whole: nothing of it is left in the model.
    assert "peml" not in base.config._attn_implementation and not hasattr(base, "prompt_host")


def test_learned_positions_run_out_by_name() -> None:
    model = adapt(tiny("gpt2"), prompt=peml.PromptTuning(10))
    model(input_ids=tokens(1, 54))
    with pytest.raises(peml.PemlError, match="64 positions: a text of 55 tokens and a prompt of 10"):
        model(input_ids=tokens(1, 55))
    model(input_ids=tokens(1, 80), position_ids=torch.arange(80)[None] % 40, use_cache=False)  # two texts in a row
    model.generate(tokens(1, 50), max_new_tokens=5, do_sample=False)
    with pytest.raises(peml.PemlError, match="64 positions: a text of 55 tokens and a prompt of 10"):
        model.generate(tokens(1, 50), max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "prompt.num_virtual_tokens must be 1 or more"),
        ({"prompt_tuning_init": "text"}, "prompt_tuning_init_text goes with"),
        ({"prompt_tuning_init_text": "words"}, "prompt_tuning_init_text goes with"),
        ({"prompt_tuning_init": "best"}, "sample_vocab, text or random"),
    ],
)
@pytest.mark.parametrize("kind", [peml.PromptTuning, peml.MultitaskPrompt, peml.Attempt])
def test_settings_are_checked(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(peml.PemlError, match=message):
        kind(**settings)


def test_ranks_and_sources_are_checked() -> None:
    with pytest.raises(peml.PemlError, match="num_ranks must be 1 or more"):
        peml.MultitaskPrompt(3, num_ranks=0)
    with pytest.raises(peml.PemlError, match="num_sources must be 1 or more"):
        peml.Attempt(3, num_sources=0)
    with pytest.raises(peml.PemlError, match="temperature must be above 0"):
        peml.Attempt(3, temperature=0)
