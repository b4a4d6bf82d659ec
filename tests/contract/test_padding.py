"""Padded and packed rows: what stands beside a text must not change it."""

import pytest
import torch
from cases import CASES, FEW, Case, cases, few_cases
from transformers import BertConfig, LlamaConfig, LlamaForSequenceClassification

import peml
from models import DECODERS, FAMILIES, adapt, assert_same, gradients, tiny, tokens

PAIRS = [("llama", case) for case in CASES] + [(f, case) for f in FAMILIES if f != "llama" for case in FEW]
pairs = pytest.mark.parametrize("family, case", PAIRS, ids=lambda value: getattr(value, "name", value))


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@pairs
@pytest.mark.parametrize("grad", [True, False])
def test_right_padding(family: str, case: Case, grad: bool) -> None:
    model, batch = case.build(family), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    batch[mask == 0] = 1
    with torch.set_grad_enabled(grad):
        logits = model(input_ids=batch, attention_mask=mask, tasks=["rte", "cola"]).logits
        close(logits[:1, :4], model(input_ids=batch[:1, :4], tasks="rte").logits)
        close(logits[1:], model(input_ids=batch[1:], tasks="cola").logits)


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family, case in PAIRS if family in DECODERS and case.prompt is not None],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("positions", ["derived", "given"])
def test_left_padding(family: str, case: Case, positions: str) -> None:
    model, batch = case.build(family), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    batch[mask == 0] = 1
    given = {} if positions == "derived" else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with torch.no_grad():
        logits = model(input_ids=batch, attention_mask=mask, tasks=["rte", "cola"], **given).logits
        close(logits[:1, 2:], model(input_ids=batch[:1, 2:], tasks="rte").logits)
        close(logits[1:], model(input_ids=batch[1:], tasks="cola").logits)


@torch.no_grad()
def test_left_padding_by_position_and_by_embeddings() -> None:
    """A mask that is given without its name, and inputs that are not ids."""
    model, batch = adapt(tiny(), prompt=peml.PrefixTuning(3)), tokens(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    alone = model(input_ids=batch[:, 2:]).logits
    close(model.base_model.model(batch, mask).logits[:, 2:], alone)
    embedded = model.get_input_embeddings()(batch)
    close(model(inputs_embeds=embedded, attention_mask=mask).logits[:, 2:], alone)


@torch.no_grad()
def test_left_padding_where_the_model_cannot_generate() -> None:
    """A decoder with a classifier on top counts positions like any other decoder."""
    config = LlamaConfig(
        vocab_size=67, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1
    )
    base = LlamaForSequenceClassification(config).double().eval()
    model, batch = adapt(base, peml.LoRA(r=2), peml.PrefixTuning(3), target_modules=["q_proj"]), tokens(1, 6)
    batch[:, :2] = 1
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    close(model(input_ids=batch, attention_mask=mask).logits, model(input_ids=batch[:, 2:]).logits)


@pytest.mark.parametrize(
    ("family", "case", "attention"),
    [(family, case, "sdpa") for family, case in PAIRS if family in DECODERS]
    + [(family, case, "eager") for family in DECODERS for case in FEW],
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_packed_rows_do_not_leak(family: str, case: Case, attention: str) -> None:
    """Documents that share a row (positions start again, no mask) equal documents alone."""
    case.check_steps()
    model, batch = case.build(base=tiny(family, attention)), tokens(1, 7)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    logits = model(input_ids=batch, position_ids=positions, tasks="cola", use_cache=False).logits
    close(logits[:, :4], model(input_ids=batch[:, :4], tasks="cola").logits)
    close(logits[:, 4:], model(input_ids=batch[:, 4:], tasks="cola").logits)


@cases
def test_packed_rows_with_a_task_per_token(case: Case) -> None:
    """Each document through its own task, and behind the prefix of its own task."""
    case.check_steps()
    model, batch = case.build(), tokens(2, 7)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2)
    tasks = [["rte"] * 4 + ["cola"] * 3, ["sst2"] * 4 + ["rte"] * 3]
    call = {"input_ids": batch, "position_ids": positions, "use_cache": False}
    logits = model(**call, tasks=tasks).logits
    for row in range(2):
        for span in (slice(0, 4), slice(4, 7)):
            alone = model(input_ids=batch[row : row + 1, span], tasks=tasks[row][span.start]).logits
            close(logits[row : row + 1, span], alone)
    with torch.no_grad():
        close(model(**call, tasks=[tasks[0]]).logits[:1], logits[:1])


@few_cases
def test_task_per_token_gradients(case: Case) -> None:
    """The same task for every token is the task of the row."""
    model, batch, found = case.build(), tokens(2, 5), []
    for tasks in (["rte", "cola"], [["rte"] * 5, ["cola"] * 5]):
        model(input_ids=batch, tasks=tasks).logits.square().sum().backward()
        found.append(gradients(model))
    assert_same(*found)


def test_encoders_keep_their_positions() -> None:
    """Counting from the mask is for decoders only."""
    model = adapt(tiny("bert"), prompt=peml.PrefixTuning(3))
    assert isinstance(model.base_model.model.config, BertConfig)
    seen = []
    embeddings = model.base_model.model.bert.embeddings
    embeddings.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    model(input_ids=tokens(2, 4), attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    assert seen == [None]
