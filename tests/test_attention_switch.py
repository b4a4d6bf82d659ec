"""A prefix is never lost without a word: other implementations, batches of requests, positions of other conventions."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

import families
import peml
import zoo
from families import batched, made, padded, prefix_of, texts
from models import VOCABULARY, adapt, shake, tiny
from peml import PemlError, attention


@pytest.mark.parametrize("start", ["sdpa", "eager"])
@torch.no_grad()
def test_another_implementation_keeps_the_prefix(start: str) -> None:
    model, row = made("llama", start, "gated"), texts()[0]
    wanted = families.logits("llama", row, prefix_of(model, "cola"))
    base: PreTrainedModel = model.base_model.model
    for name in ("eager", "sdpa", "peml_eager", "peml_sdpa"):
        base.set_attn_implementation(name)
        torch.testing.assert_close(model(input_ids=row[None]).logits[0], wanted, rtol=1e-5, atol=1e-5)
        assert base.config._attn_implementation == f"peml_{name.removeprefix('peml_')}"
    assert model.unload().config._attn_implementation == "sdpa"


@torch.no_grad()
def test_soft_tokens_are_run_after_a_switch_too() -> None:
    """They are what their keys and values come from, before the text is read."""
    model, row = adapt(families.build("llama", "sdpa"), prompt=peml.PromptTuning(3)), texts()[0]
    wanted = model(input_ids=row[None]).logits
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=row[None]).logits, wanted, rtol=1e-2, atol=1e-2)
    call = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for name in ("eager", "sdpa"):
        model.base_model.model.set_attn_implementation(name)
        torch.testing.assert_close(model(input_ids=row[None]).logits, wanted, rtol=1e-5, atol=1e-5)
        model.base_model.model.set_attn_implementation(name)
        found = model.generate(row[None], **call).logits[0]
        torch.testing.assert_close(found.double(), wanted[:, -1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_implementation_without_a_twin_is_refused() -> None:
    model, row = made("llama", "sdpa", "shared"), texts()[0]
    base: PreTrainedModel = model.base_model.model
    AttentionInterface.register("somebodys_own", ALL_ATTENTION_FUNCTIONS["sdpa"])
    base.set_attn_implementation("somebodys_own")
    with pytest.raises(PemlError, match="switched to attention 'somebodys_own', which cannot take its prefix"):
        model(input_ids=row[None])
    base.set_attn_implementation("sdpa")
    model(input_ids=row[None])


def test_soft_capping_under_sdpa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers refuses it for Gemma 2 already, but not for every model that can be soft-capped."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    base = families.build("gemma2", "sdpa")
    with pytest.raises(PemlError, match="soft-caps its scores"):
        adapt(base, prompt=peml.PrefixTuning(2))
    assert base.config._attn_implementation == "sdpa"


def test_continuous_batching_wants_one_task() -> None:
    """Its steps run in another thread, where no `tasks=` and no block is known."""
    model = made("llama", "sdpa", "per task")
    with pytest.raises(PemlError, match="one task at a time: call select_task"), model.base_model.routed("rte"):
        batched(model)
    with pytest.raises(PemlError, match="cannot route by `tasks=`"):
        model.generate_batch([[2, 3]], tasks="rte")
    assert model.base_model.model.config._attn_implementation == "peml_sdpa"


@pytest.mark.parametrize("part", ["prompt", "adapter"])
def test_requests_of_one_task_leave_nothing_to_the_next(part: str) -> None:
    """Continuous batching shares keys and values between prompts that begin alike; those of another task are others."""
    if part == "prompt":
        model = made("llama", "sdpa", "per task")
        shake(model.base_model.prompt.parameters(), 4.0)
    else:
        model = adapt(families.build("llama", "sdpa"), peml.SingleTaskLoRA(r=2))
    row = texts()[0].repeat(10)[:40]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, page_size=8, allow_block_sharing=True)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=1)
    base, found = model.base_model.model, []
    model.base_model.select_task("rte")
    with base.continuous_batching_context_manager(settings, continuous_batching_config=small) as manager:
        for task in ("rte", "cola"):
            model.base_model.select_task(task)
            request = manager.add_request(row.tolist(), max_new_tokens=3)
            found.append(manager.get_result(request, timeout=20).generated_tokens)
    assert small.allow_block_sharing and found[0] != found[1]
    for task, tokens in zip(("rte", "cola"), found, strict=True):
        plain = {"do_sample": False, "max_new_tokens": 3, "use_cache": False, "tasks": task}
        alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **plain)[0, 40:]
        assert tokens == alone.tolist()


def test_continuous_batching_without_the_prefix() -> None:
    """Switched off, it is the plain model's; and an adapter without a prompt is left alone."""
    model = made("llama", "sdpa", "shared")
    none = [None] * 2
    wanted = [families.greedy("llama", row, none, 3).tolist() for row in texts()]
    with model.disable_adapter():
        assert batched(model) == wanted
    assert batched(adapt(families.build("llama", "sdpa"), peml.LoRA(r=2), shaken=False)) == wanted


@torch.no_grad()
def test_models_that_count_their_own_positions() -> None:
    """RoBERTa starts behind the number of its padding token, as a decoder too."""
    config = RobertaConfig(**zoo.BERT, is_decoder=True)
    base = RobertaForCausalLM._from_config(config, attn_implementation="sdpa").double().eval()
    shake(base.parameters(), 0.2)
    model, (ids, mask) = adapt(base, prompt=peml.PrefixTuning(3)), padded(texts(), "left")
    assert model.base_model.model.prompt_host.causal
    found = model(input_ids=ids, attention_mask=mask).logits
    for row, logits in zip(texts(), found, strict=True):
        alone = model(input_ids=row[None]).logits[0]
        torch.testing.assert_close(logits[-len(row) :], alone, rtol=1e-9, atol=1e-9)


def test_a_class_that_inherits_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own attention class has no eager function beside it: its parent's is meant."""
    base, row = tiny("llama", "eager"), torch.randint(4, VOCABULARY, (1, 5))
    wanted = base(input_ids=row).logits
    for layer in base.model.layers:
        layer.self_attn.__class__ = type("Own", (type(layer.self_attn),), {"__module__": __name__})
    host = attention.install(base)
    assert len(host.slots) == 2
    attention.uninstall(base, host)
    torch.testing.assert_close(base(input_ids=row).logits, wanted)
