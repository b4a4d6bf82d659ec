"""The contract once more in single and in half precision, within stated bounds of the same weights in double."""

import copy

import pytest
import torch
from cases import CASES, Case
from peft import PeftModel
from torch import Tensor

from models import TASKS, gradients, probe_loss, shake, tiny, tokens

BOUNDS = {
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (0.03, 0.06),
    torch.float16: (0.003, 0.008),
}
"""Relative error, in norm, of the logits and of all gradients together. Half precision rounds each number to 1 part in
256 (bfloat16) or 2048 (float16), in every layer; the bound on gradients is that of the base model's own, doubled."""

precise_cases = pytest.mark.parametrize(
    "case",
    [c for c in CASES if (c.adapter is not None and c.prompt is None) or c.name == "LoRA+PrefixNAS"],
    ids=lambda case: case.name,
)
precisions = pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def pair(case: Case, dtype: torch.dtype) -> tuple[PeftModel, PeftModel]:
    """A model whose base is in `dtype` with adapters in single precision, and its exact copy in double."""
    base = tiny().to(dtype)
    model = case.build(base=base, shaken=False)
    for module in model.modules():
        if hasattr(module, "peml_adapter") or hasattr(module, "peml_prompt"):
            for part in (getattr(module, "peml_adapter", None), getattr(module, "peml_prompt", None)):
                if part is not None:
                    part.float()
    shake((p for p in model.parameters() if p.requires_grad), 0.1)
    return model, copy.deepcopy(model).double()


def error(found: dict[str, Tensor] | Tensor, wanted: dict[str, Tensor] | Tensor) -> float:
    """Norm of the difference over the norm, of all tensors as one."""
    if isinstance(found, Tensor):
        return float((found.double() - wanted).norm() / wanted.norm())
    assert found.keys() == wanted.keys()
    left, right = (torch.cat([t.double().flatten() for t in d.values()]) for d in (found, wanted))
    return float((left - right).norm() / right.norm())


@precise_cases
@precisions
def test_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    model, exact = pair(case, dtype)
    batch, tasks = tokens(4, 6), ["sst2", "cola", "sst2", "rte"]
    outputs, grads = [], []
    for one in (model, exact):
        logits = one(input_ids=batch, tasks=tasks).logits
        probe_loss(logits.double()).backward()
        outputs.append(logits.detach())
        grads.append(gradients(one))
    assert outputs[0].dtype == dtype and all(g.dtype == torch.float32 for g in grads[0].values())
    bound, bound_of_gradients = BOUNDS[dtype]
    assert error(*outputs) < bound
    assert error(*grads) < bound_of_gradients


@precise_cases
@precisions
@torch.no_grad()
def test_mixed_folded_and_merged(case: Case, dtype: torch.dtype) -> None:
    """A mixed batch is its tasks apart, and a merged model is the unmerged one, as far as the precision goes."""
    model, exact = pair(case, dtype)
    batch, tasks, bound = tokens(3, 6), ["sst2", "cola", "rte"], BOUNDS[dtype][0]
    mixed, wanted = (one(input_ids=batch, tasks=tasks).logits for one in (model, exact))
    apart = torch.cat([model(input_ids=batch[i : i + 1], tasks=task).logits for i, task in enumerate(tasks)])
    assert error(mixed, wanted) < bound and error(apart, wanted) < bound
    if not case.adapter.foldable:
        return
    for i, task in enumerate(TASKS):
        model.base_model.select_task(task)
        model.merge_adapter()
        row = tasks.index(task)
        assert error(model(input_ids=batch[row : row + 1]).logits, wanted[row : row + 1]) < bound, i
        model.unmerge_adapter()


@precise_cases
@precisions
def test_checkpointed_is_not_to_be_told_from_plain(case: Case, dtype: torch.dtype) -> None:
    """The same operations in the same order: no bound is needed."""
    model, _ = pair(case, dtype)
    batch, results = tokens(3, 5), []
    model.train()
    for checkpointed in (False, True):
        if checkpointed:
            model.base_model.model.activation_checkpointing_enable()
        torch.manual_seed(0)
        logits = model(input_ids=batch, tasks=TASKS).logits
        probe_loss(logits.double()).backward()
        results.append((logits.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
