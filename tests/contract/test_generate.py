"""Generation: greedy, beams, caches of every kind, each against a loop without any cache."""

import pytest
import torch
from cases import CASES, FEW, Case, cases, few_cases
from peft import PeftModel
from torch import Tensor

import peml
from models import DECODERS, adapt, tiny, tokens

NEW = 4


@torch.no_grad()
def argmax_loop(model: PeftModel, batch: Tensor, tasks: list[str], mask: Tensor | None = None) -> Tensor:
    """Greedy generation without a cache, row by row and without padding."""
    rows = []
    for b, task in enumerate(tasks):
        row = batch[b : b + 1] if mask is None else batch[b : b + 1, mask[b].bool()]
        for _ in range(NEW):
            token = model(input_ids=row, tasks=task, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            row = torch.cat([row, token], dim=1)
        rows.append(row[:, -NEW:])
    return torch.cat(rows)


def generated(model: PeftModel, batch: Tensor, **settings) -> Tensor:
    return model.generate(input_ids=batch, max_new_tokens=NEW, do_sample=False, **settings)[:, batch.shape[1] :]


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", case) for case in CASES] + [(family, case) for family in DECODERS if family != "llama" for case in FEW],
    ids=lambda value: getattr(value, "name", value),
)
def test_greedy(family: str, case: Case) -> None:
    case.check_steps()
    model, batch, tasks = case.build(family), tokens(3, 5), ["cola", "rte", "cola"]
    assert torch.equal(generated(model, batch, tasks=tasks), argmax_loop(model, batch, tasks))


@pytest.mark.parametrize("family", DECODERS)
@few_cases
def test_greedy_with_left_padding(family: str, case: Case) -> None:
    case.check_steps()
    model, batch, tasks = case.build(family), tokens(3, 5), ["cola", "rte", "cola"]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    batch[mask == 0] = 1
    expected = argmax_loop(model, batch, tasks, mask)
    assert torch.equal(generated(model, batch, tasks=tasks, attention_mask=mask), expected)


@few_cases
@pytest.mark.parametrize("padded", [False, True])
def test_static_cache(case: Case, padded: bool) -> None:
    case.check_steps()
    model, batch, tasks = case.build(), tokens(2, 5), ["cola", "rte"]
    mask = torch.ones(2, 5, dtype=torch.long)
    if padded:
        mask[0, :2], batch[0, :2] = 0, 1
    found = generated(
        model, batch, tasks=tasks, attention_mask=mask, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(found, argmax_loop(model, batch, tasks, mask))


@cases
def test_cached_steps_equal_one_pass(case: Case) -> None:
    """Logits of a prompt, then of one token, then of two at once, through a cache of the user's own."""
    case.check_steps()
    model, batch = case.build(), tokens(2, 7)
    tasks = ["sst2", "rte"]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            whole = model(input_ids=batch, tasks=tasks).logits
            cache, parts = None, []
            for span in (slice(0, 4), slice(4, 5), slice(5, 7)):
                out = model(input_ids=batch[:, span], past_key_values=cache, use_cache=True, tasks=tasks)
                cache = out.past_key_values
                parts.append(out.logits)
        assert cache.get_seq_length() == 7
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-10)


@few_cases
@pytest.mark.parametrize("returned", [1, 2])
def test_beams_equal_task_by_task(case: Case, returned: int) -> None:
    model, batch, tasks = case.build(), tokens(3, 4), ["cola", "rte", "cola"]
    beams = {"num_beams": 3, "num_return_sequences": returned}
    together = generated(model, batch, tasks=tasks, **beams)
    for b, task in enumerate(tasks):
        alone = generated(model, batch[b : b + 1], tasks=task, **beams)
        assert torch.equal(together[b * returned : (b + 1) * returned], alone)


@few_cases
def test_sampling_runs_and_repeats(case: Case) -> None:
    model, batch = case.build(), tokens(2, 4)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(
            model.generate(batch, tasks=["rte", "cola"], do_sample=True, num_return_sequences=2, max_new_tokens=3)
        )
    assert torch.equal(*runs) and runs[0].shape == (4, 7)


@few_cases
def test_prompt_lookup_decoding(case: Case) -> None:
    case.check_steps()
    model = case.build()
    batch = tokens(1, 3).repeat(1, 3)
    found = generated(model, batch, tasks="cola", prompt_lookup_num_tokens=2)
    assert torch.equal(found, argmax_loop(model, batch, ["cola"]))


def test_a_block_routes_generation() -> None:
    """`routed` reaches `generate`, and an explicit `tasks=` inside wins."""
    model, batch = adapt(tiny(), peml.MTLLoRA(r=3), peml.PrefixTuning(2, per_task=True)), tokens(2, 4)
    with model.base_model.routed(["rte", "cola"]):
        block = generated(model, batch)
        other = generated(model, batch, tasks="sst2")
    assert torch.equal(block, generated(model, batch, tasks=["rte", "cola"]))
    assert torch.equal(other, generated(model, batch, tasks="sst2"))


def test_generation_leaves_no_graph_and_no_route() -> None:
    model, batch = adapt(tiny(), peml.MTLLoRA(r=3), peml.PrefixNAS(3, 1, 8, 4, 4)), tokens(1, 4)
    out = model.generate(batch, tasks="rte", max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
    assert not out.logits[0].requires_grad
    assert peml.routing.current() is None
    with pytest.raises(peml.PemlError, match="rte, sst2, cola"):
        model.generate(batch, max_new_tokens=2)
    assert peml.routing.current() is None
