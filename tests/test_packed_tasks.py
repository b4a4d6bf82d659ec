"""Texts of several tasks in one row: each sees the prefix of its own task, and in continuous batching too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import families
import peml
from models import TASKS, adapt, assert_same, gradients, probe_loss, shake, tiny, tokens
from peml import PemlError
from peml.methods import METHODS

PROMPTS: dict[str, tuple[Any, Any]] = {
    "per task": (None, peml.PrefixTuning(3, per_task=True)),
    "per task, gated": (peml.LoRA(r=2), peml.PrefixTuning((3, 1), per_task=True, gated=True)),
    "soft, per task": (peml.MTLLoRA(r=2), peml.PromptTuning(2, per_task=True)),
    "shared, adapter by task": (peml.MTLLoRA(r=2), peml.PrefixTuning(3)),
    "no prompt": (peml.SingleTaskLoRA(r=2), None),
}
ADAPTERS = list({type(row.adapter): row.adapter for row in METHODS.values() if row.adapter is not None}.values())
LENGTHS, OF = (4, 1, 6), ("rte", "cola", "rte")


def made(kind: str, attention: str = "sdpa", family: str = "llama") -> Any:
    return adapt(tiny(family, attention), *PROMPTS[kind])


def packed() -> tuple[list[torch.Tensor], dict[str, Any]]:
    texts = [tokens(1, length) for length in LENGTHS]
    return texts, {
        "input_ids": torch.cat(texts, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "tasks": [[task for task, length in zip(OF, LENGTHS, strict=True) for _ in range(length)]],
        "use_cache": False,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_packed_rows_equal_their_texts(kind: str, attention: str) -> None:
    """Outputs and gradients; transformers' eager attention and its rotations are in single precision."""
    model, (texts, row) = made(kind, attention), packed()
    exact = attention == "sdpa" and "soft" not in kind
    close = {"rtol": 1e-8, "atol": 1e-9} if exact else {"rtol": 1e-5, "atol": 2e-5}
    steep = close if exact else {"rtol": 5e-3, "atol": 5e-3}
    found = model(**row).logits
    probe_loss(found).backward()
    whole = gradients(model)
    alone = torch.cat([model(input_ids=text, tasks=task).logits for text, task in zip(texts, OF, strict=True)], dim=1)
    torch.testing.assert_close(found, alone, **close)
    probe_loss(alone).backward()
    assert_same(whole, gradients(model), **steep)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_rows_of_other_implementations_are_refused() -> None:
    model, (_, row) = made("per task"), packed()
    model.base_model.model.set_attn_implementation("flex_attention")
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(PemlError, match=r'pack several tasks.*set_attn_implementation\("sdpa"\)'),
    ):
        model(**row)


def batched(model: Any, requests: list[tuple[str, list[int]]], new: int) -> list[list[int]]:
    """Tokens of requests of several tasks, in one manager."""
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=1)
    base, tasks = model.base_model.model, dict(enumerate(task for task, _ in requests))
    manager = base.init_continuous_batching(
        generation_config=settings, continuous_batching_config=families.SMALL, tasks_of=lambda name: tasks[int(name)]
    )
    # Before it starts, so that they share batches for certain.
    for number, (_, ids) in enumerate(requests):
        manager.add_request(ids, request_id=str(number), max_new_tokens=new)
    manager.start()
    try:
        answers = [manager.get_result(timeout=20) for _ in requests]
    finally:
        manager.stop(block=True, hard_stop=True)
    found = {int(answer.request_id): answer.generated_tokens for answer in answers}
    return [found[number] for number in range(len(requests))]


@pytest.mark.parametrize(
    ("kind", "family"), [*((kind, "llama") for kind in PROMPTS), ("soft, per task", "gpt2"), ("per task", "gpt2")]
)
@torch.no_grad()
def test_requests_of_different_tasks_share_a_batch(kind: str, family: str) -> None:
    """The tokens of each request alone; with the prefixes kept, and without."""
    model, new = made(kind, family=family), 5
    requests = [(TASKS[number % 3], tokens(1, 3 + number)[0].tolist()) for number in range(7)]
    plain = {"do_sample": False, "max_new_tokens": new}
    wanted = [
        model.generate(torch.tensor([ids]), tasks=task, **plain)[0, len(ids) :].tolist() for task, ids in requests
    ]
    assert batched(model, requests, new) == wanted
    with model.base_model.kept():
        assert batched(model, requests, new) == wanted
    assert model.base_model._kept is None


@torch.no_grad()
def test_a_kept_prompt_is_computed_once() -> None:
    """And stays what it was, whatever happens to the weights meanwhile."""
    model, (texts, row) = made("soft, per task"), packed()
    wanted, seen = model(**row).logits, []
    layer = model.base_model.model.model.layers[0]
    with model.base_model.kept():
        layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
        torch.testing.assert_close(model(**row).logits, wanted)
        assert seen == [(1, sum(LENGTHS))]
        torch.testing.assert_close(model(input_ids=texts[0], tasks="rte").logits, wanted[:, :4])
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=texts[0]).logits, wanted[:, :4])
        shake([model.base_model.prompt.tokens], 1.0)
        torch.testing.assert_close(model(**row).logits, wanted)
        with pytest.raises(PemlError, match="a prompt per task: pass tasks="):
            model(input_ids=texts[0])
    assert not torch.allclose(model(**row).logits, wanted)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
@torch.no_grad()
def test_what_is_kept_fits_every_route(adapter: Any) -> None:
    """Rows of one token, many enough to be sorted by their prefix, whose tasks change from call to call."""
    model = adapt(tiny(), adapter, peml.PrefixTuning(8, per_task=True))
    ids, calls = (
        tokens(64, 1),
        [["rte"] * 40 + ["sst2"] * 24, ["sst2"] * 40 + ["rte"] * 24, "cola", ["cola", "rte"] * 32],
    )
    wanted = [model(input_ids=ids, tasks=tasks).logits for tasks in calls]
    with model.base_model.kept():
        for tasks, logits in zip(calls, wanted, strict=True):
            torch.testing.assert_close(model(input_ids=ids, tasks=tasks).logits, logits)
        found = model.base_model._kept.prepared
        # One entry for q, k, v, one for gate and up, two more, in each of the layers; none where the bank differs.
        if isinstance(adapter, peml.LoRA | peml.MTLLoRA | peml.MoELoRA | peml.MultiLoRA):
            assert len(found) % 4 == 0 < len(found)
        if isinstance(adapter, peml.SingleTaskLoRA | peml.HydraLoRA):
            assert found is None
        with model.base_model.ablated("both"):
            assert not torch.allclose(model(input_ids=ids, tasks="rte").logits, wanted[2])
        torch.testing.assert_close(model(input_ids=ids, tasks=calls[0]).logits, wanted[0])


def test_gradients_inside_are_those_outside() -> None:
    model = adapt(tiny(), peml.MTLLoRA(r=2), None)
    found, ids = [], tokens(2, 4)
    for kept in (False, True):
        model.zero_grad()
        with model.base_model.kept() if kept else nullcontext():
            model(input_ids=ids, tasks=["rte", "sst2"]).logits.square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_a_prompt_made_from_the_text_is_not_batched() -> None:
    model = adapt(tiny(), prompt=peml.Attempt(2, num_sources=1, projection_dim=3))
    with pytest.raises(PemlError, match="cannot serve a prompt that is made from the text"):
        model.base_model.model.init_continuous_batching(tasks_of=lambda name: 0)
