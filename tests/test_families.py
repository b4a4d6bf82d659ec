"""Every model family with every feature: each cell equals a slow reference, or says that it cannot.

`docs/families.md` is rendered from the tables here: `python tests/test_families.py` writes it.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import families
import peml
from families import (
    NEW,
    TABLES,
    asked,
    asked_padded,
    batched,
    made,
    padded,
    prefix_of,
    targets,
    texts,
)
from family_table import ATTENTIONS, CELLS, NO_SDPA, page
from models import assert_same, gradients, probe_loss
from peml import PemlError
from zoo import ENCODERS, FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SEARCHED = peml.PrefixNAS(num_virtual_tokens=3, num_cells=1, width=8, embedding_dim=4, head_rank=4, gate_init=0.5)
ROW_TASKS = ["cola", "rte"]


def cells(feature: str):
    """Parametrise over the cells of a feature that work."""
    return pytest.mark.parametrize(
        ("family", "attention"),
        [of(f, a) for f in FAMILIES for a in ATTENTIONS if (f, a, feature) not in CELLS],
    )


def of(family: str, *others: str):
    """Parameters of a test, skipped where the family's weights are absent."""
    return pytest.param(family, *others, marks=FAMILIES[family].marks)


prompts = pytest.mark.parametrize("prompt", TABLES)
few_prompts = pytest.mark.parametrize("prompt", ["shared", "per task, gated"])


# What is compared.


@cache
@torch.no_grad()
def expected_logits(family: str, prompt: str, row: int, task: str) -> Tensor:
    prefix = prefix_of(made(family, "eager", prompt), task)
    return families.logits(family, texts()[row], prefix, targets(family)[row])


@cache
@torch.no_grad()
def expected_greedy(family: str, prompt: str) -> Tensor:
    model = made(family, "eager", prompt)
    rows = zip(texts(), ROW_TASKS, strict=True)
    return torch.stack([families.greedy(family, row, prefix_of(model, task), NEW) for row, task in rows])


def close(found: Tensor, wanted: Tensor, attention: str) -> None:
    """Eager functions take their softmax in single precision."""
    tolerance = 1e-9 if attention == "sdpa" else 2e-5
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def generated(model: PeftModel, **settings) -> Tensor:
    """The new tokens of the two texts, padded on the left; for an encoder on the right."""
    ids, mask = padded(texts(), "right" if model.config.is_encoder_decoder else "left")
    call = {"max_new_tokens": NEW, "do_sample": False, "tasks": ROW_TASKS} | settings
    return new_tokens(model, ids, mask, **call)


def new_tokens(model: PeftModel, ids: Tensor, mask: Tensor | None = None, **call) -> Tensor:
    """Without the text, or without the token that a decoder starts with."""
    found = model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **call)
    return found[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :]


# The cells.


@cells("forward")
@prompts
@torch.no_grad()
def test_forward(family: str, attention: str, prompt: str) -> None:
    model = made(family, attention, prompt)
    for i, (row, target, task) in enumerate(zip(texts(), targets(family), ROW_TASKS, strict=True)):
        call = asked(family, row, target)
        found = model(**call, tasks=task)[0][0]
        close(found, expected_logits(family, prompt, i, task), attention)
        with model.disable_adapter():
            assert not torch.allclose(model(**call)[0][0], found, rtol=1e-2, atol=1e-2)


@cells("gradients")
@pytest.mark.parametrize("prompt", ["per task, gated", "searched"])
def test_gradients(family: str, attention: str, prompt: str) -> None:
    """In a padded batch, of the prefix and of the gates that a search trains."""
    model = made(family, attention, SEARCHED if prompt == "searched" else prompt)
    call, mask = asked_padded(family, side_of(family))
    logits = model(**call, tasks=ROW_TASKS)[0]
    sum(probe_loss(row[kept]) for row, kept in zip(logits, mask, strict=True)).backward()
    found = gradients(model)
    for row, target, task in zip(texts(), targets(family), ROW_TASKS, strict=True):
        probe_loss(families.logits(family, row, prefix_of(model, task), target)).backward()
    wanted = gradients(model)
    assert all(gradient.any() for gradient in wanted.values())
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name in wanted:
        close(found[name] / largest, wanted[name] / largest, attention)


def side_of(family: str) -> str:
    """The left where the family can."""
    return "right" if (family, "eager", "left padding") in CELLS or not FAMILIES[family].decoder else "left"


@cells("checkpointing")
def test_checkpointing(family: str, attention: str) -> None:
    """Equal to the ordinary backward pass, and each layer does run twice."""
    model = made(family, attention, "per task, gated").train()
    call, mask = asked_padded(family, side_of(family))
    found, calls = [], []
    layer = next(module for module in model.modules() if hasattr(module, "_peml_slot"))
    layer.register_forward_pre_hook(lambda *args: calls.append(1))
    for _ in range(2):
        logits = model(**call, tasks=ROW_TASKS)[0]
        probe_loss(logits[mask]).backward()
        found.append(gradients(model))
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    assert len(calls) == 3
    assert_same(*found)


@cells("left padding")
@few_prompts
@torch.no_grad()
def test_left_padding(family: str, attention: str, prompt: str) -> None:
    check_padding(family, attention, prompt, "left")


@cells("right padding")
@few_prompts
@torch.no_grad()
def test_right_padding(family: str, attention: str, prompt: str) -> None:
    check_padding(family, attention, prompt, "right")


def check_padding(family: str, attention: str, prompt: str, side: str) -> None:
    call, mask = asked_padded(family, side)
    logits = made(family, attention, prompt)(**call, tasks=ROW_TASKS)[0]
    for i, task in enumerate(ROW_TASKS):
        close(logits[i][mask[i]], expected_logits(family, prompt, i, task), attention)


@cells("greedy")
@few_prompts
def test_greedy(family: str, attention: str, prompt: str) -> None:
    assert torch.equal(generated(made(family, attention, prompt)), expected_greedy(family, prompt))


@cells("sampling")
def test_sampling(family: str, attention: str) -> None:
    """The draws of a seed, with a cache and without."""
    check_sampling(made(family, attention, "per task, gated"))


def check_sampling(model: PeftModel, **settings) -> None:
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        runs.append(generated(model, do_sample=True, use_cache=use_cache, **settings))
    assert torch.equal(*runs)


@cells("beams")
@few_prompts
def test_beams(family: str, attention: str, prompt: str) -> None:
    check_beams(made(family, attention, prompt), 1)


def check_beams(model: PeftModel, returned: int) -> None:
    """Rows together and padded, through the cache, against each alone without one."""
    settings = {"num_beams": 3, "num_return_sequences": returned}
    found = generated(model, **settings)
    for i, (row, task) in enumerate(zip(texts(), ROW_TASKS, strict=True)):
        call = {"max_new_tokens": NEW, "do_sample": False, "use_cache": False, "tasks": task} | settings
        alone = new_tokens(model, row[None], **call)
        assert torch.equal(found[i * returned : (i + 1) * returned], alone)


@cells("return sequences")
def test_return_sequences(family: str, attention: str) -> None:
    model = made(family, attention, "per task, gated")
    check_beams(model, 2)
    check_sampling(model, num_return_sequences=2)


@cells("static cache")
@few_prompts
def test_static_cache(family: str, attention: str, prompt: str) -> None:
    model = made(family, attention, prompt)
    found = generated(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected_greedy(family, prompt))


@cells("prompt lookup")
@few_prompts
def test_prompt_lookup(family: str, attention: str, prompt: str) -> None:
    """A text that repeats itself, so that the guesses are sometimes right."""
    model, row = made(family, attention, prompt), texts()[0][:3].repeat(3)
    new = 8 if FAMILIES[family].encoder else NEW  # guesses are taken from what the decoder has written
    call = {"max_new_tokens": new, "do_sample": False, "tasks": "cola"}
    found = new_tokens(model, row[None], prompt_lookup_num_tokens=2, **call)
    assert torch.equal(found[0], families.greedy(family, row, prefix_of(model, "cola"), new))


@cells("packing")
@few_prompts
@torch.no_grad()
def test_packing(family: str, attention: str, prompt: str) -> None:
    """Each text as if it were alone."""
    model, (first, second) = made(family, attention, prompt), texts()
    ids = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
    positions = [torch.cat([torch.arange(len(row)) for row in rows]) for rows in ((first, second), (second, first))]
    logits = model(input_ids=ids, position_ids=torch.stack(positions), use_cache=False, tasks=ROW_TASKS).logits
    for i, (task, order) in enumerate(zip(ROW_TASKS, ((0, 1), (1, 0)), strict=True)):
        wanted = [expected_logits(family, prompt, row, task) for row in order]
        close(logits[i], torch.cat(wanted), attention)


@cells("continuous batching")
def test_continuous_batching(family: str, attention: str) -> None:
    """One task at a time."""
    model = made(family, attention, "per task, gated")
    model.base_model.select_task("cola")
    wanted = [families.greedy(family, row, prefix_of(model, "cola"), NEW).tolist() for row in texts()]
    assert batched(model) == wanted
    assert torch.equal(generated(model, tasks="cola"), torch.tensor(wanted)), "and the model is as it was"


# The cells that do not work say why.


def refusals(feature: str):
    """Parametrise over the cells of a feature that are refused."""
    found = [of(f, a) for (f, a, name), cell in CELLS.items() if cell.refusal and name == feature]
    return pytest.mark.parametrize(("family", "attention"), found)


@refusals("packing")
def test_packing_is_refused(family: str, attention: str) -> None:
    model, row = made(family, attention, "shared"), texts()[1]
    call = asked(family, row, targets(family)[0]) | {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    call |= {"use_cache": False} if FAMILIES[family].decoder else {}
    with pytest.raises(PemlError, match=CELLS[family, attention, "packing"].refusal):
        model(**call)
    with torch.no_grad():
        model(**call | {"position_ids": torch.arange(6)[None]})
        with model.disable_adapter():
            packed = model(**call)[0][0]
            alone = model(**call | {"input_ids": row[None, 3:], "position_ids": torch.arange(3)[None]})[0][0]
    packed = packed if FAMILIES[family].encoder else packed[3:]
    assert not torch.allclose(packed, alone, rtol=1e-2, atol=1e-2), "the model itself packs now: let it"


@refusals("continuous batching")
def test_continuous_batching_is_refused(family: str, attention: str) -> None:
    model = made(family, attention, "shared")
    with pytest.raises(PemlError, match=CELLS[family, attention, "continuous batching"].refusal):
        batched(model)


def test_every_refusal_is_tested() -> None:
    assert {feature for (_, _, feature), cell in CELLS.items() if cell.refusal} == {"packing", "continuous batching"}


@pytest.mark.parametrize("family", sorted({family for (family, _, _), cell in CELLS.items() if cell is NO_SDPA}))
def test_without_sdpa(family: str) -> None:
    """Where the table says so, transformers has none."""
    with pytest.raises(ValueError, match="does not support"):
        families.build(family, "sdpa")


@pytest.mark.parametrize("family", [of(name) for name in ENCODERS])
def test_encoders_do_not_generate(family: str) -> None:
    assert not families.build(family, "sdpa").can_generate()


@torch.no_grad()
def test_bert_counts_padding() -> None:
    """The plain model too gives another answer when padded on the left."""
    model, (ids, mask) = families.build("bert", "sdpa"), padded(texts(), "left")
    alone = model(input_ids=texts()[0][None]).logits[0]
    assert not torch.allclose(model(input_ids=ids, attention_mask=mask).logits[0, -4:], alone, rtol=1e-2, atol=1e-2)


# The page.


def test_the_page_is_what_is_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/test_families.py"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
