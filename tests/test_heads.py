"""Heads of encoders against a loop over rows, alone and with every kind of prompt."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForFeatureExtraction, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertForMaskedLM, BertModel, LlamaModel, PreTrainedModel, T5Model, TrainingArguments

import peml
import zoo
from models import TASKS, adapt, assert_same, gradients, shake
from peml import PemlError, routing
from peml.heads import Heads, apart, pooled
from peml.inspection import inspect_folder
from peml.training.groups import parameter_groups

LABELS = (3, 1, 2)
HEADS = Heads(num_labels=LABELS, means=(0.0, 2.5, 0.0), scales=(1.0, 1.5, 1.0), dropout=0.0)
NAS = peml.PrefixNAS(num_virtual_tokens=3, width=8, embedding_dim=6, head_rank=4, gate_init=0.5, budget_tokens=2.0)
PROMPTS = {
    "none": None,
    "prefix": peml.PrefixTuning(num_virtual_tokens=3),
    "prefix-per-task": peml.PrefixTuning(num_virtual_tokens=2, per_task=True),
    "nas": NAS,
    "soft": peml.PromptTuning(num_virtual_tokens=2, per_task=True),
    "mpt": peml.MultitaskPrompt(num_virtual_tokens=2),
    "attempt": peml.Attempt(num_virtual_tokens=2, num_sources=2),
}
ADAPTERS = {"none": None, "lora": peml.LoRA(r=2), "mtl": peml.MTLLoRA(r=2), "experts": peml.MoELoRA(r=2, num_experts=2)}
ROWS = ["sst2", "rte", "cola", "rte"]
NAMES = ("input_ids", "token_type_ids", "attention_mask")


def encoder() -> PreTrainedModel:
    torch.manual_seed(0)
    model = BertModel(zoo.FAMILIES["bert"].config()).double().eval()
    shake(model.parameters(), 0.2)
    return model


def built(
    adapter: str = "lora", prompt: str = "none", heads: Heads = HEADS, base: PreTrainedModel | None = None
) -> PeftModel:
    model = adapt(base or encoder(), adapter=ADAPTERS[adapter], prompt=PROMPTS[prompt], heads=heads).double()
    shake((p for p in model.parameters() if p.requires_grad), 0.2)
    return model


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:], mask[3, 2:] = 0, 0
    types = torch.zeros_like(mask)
    types[:3, 2:] = 1  # the last row is a single text
    return {"input_ids": torch.randint(2, 60, (4, 6)), "attention_mask": mask, "token_type_ids": types}


def by_loop(model: PeftModel, given: dict[str, Tensor], tasks: list[str], heads: Heads) -> list[Tensor]:
    """One row after the other, each text by itself, with the task's own weights cut out."""
    own, answers = model.base_model.heads, []
    for ids, types, mask, name in zip(*(given[key] for key in NAMES), tasks, strict=True):
        ids, types = ids[mask.bool()], types[mask.bool()]
        texts = [(ids, types)]
        if heads.pairs == "apart":
            second = torch.cat([ids[:1], ids[types == 1]])
            texts = [(part, torch.zeros_like(part)) for part in (ids[types == 0], second if len(second) > 1 else ids)]
        vectors = []
        for text, kinds in texts:
            said = model(
                input_ids=text[None], token_type_ids=kinds[None], tasks=name, output_hidden_states=True
            ).hidden_states
            own_vectors = []
            for layer in heads.layers or (-1,):
                words = said[layer][0, -len(text) :]  # behind soft tokens
                vector = {"mean": words.mean(0), "first": words[0], "last": words[-1]}[heads.pooling]
                own_vectors.append(vector / vector.square().mean().sqrt())
            vectors.append(own_vectors)
        if heads.pairs == "apart":
            both = zip(*vectors, strict=True)
            vectors = [[part for a, b in both for part in (a, b, (a - b).abs(), a * b)]]
        t, text = TASKS.index(name), torch.cat(vectors[0])
        if heads.hidden:
            text = torch.tanh(own.hidden_weight[t] @ text + own.hidden_bias[t])
        logits = own.weight[t, : heads.num_labels[t]] @ text + own.bias[t, : heads.num_labels[t]]
        answers.append(heads.means[t] + heads.scales[t] * logits if heads.num_labels[t] == 1 else logits)
    return answers


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("pairs", ["joined", "apart"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("prompt", ["none", "prefix", "soft"])
@pytest.mark.parametrize("layers", [None, (-1,), (0, -1, 1)])
def test_heads_equal_a_loop_over_rows_in_outputs_and_gradients(
    pooling: str, pairs: str, hidden: bool, prompt: str, layers: tuple[int, ...] | None
) -> None:
    heads = Heads(LABELS, pooling, layers, pairs, hidden, 0.0, HEADS.means, HEADS.scales)  # type: ignore[arg-type]
    model, given = built("mtl", prompt, heads), batch()
    output, wanted = model(**given, tasks=ROWS), by_loop(model, given, ROWS, heads)
    for row, answer, name in zip(output.logits, wanted, ROWS, strict=True):
        count = LABELS[TASKS.index(name)]
        torch.testing.assert_close(row[:count], answer, rtol=1e-9, atol=1e-9)
        assert bool((row[count:] == -math.inf).all())
    sum((row[: len(a)] ** 2).sum() for row, a in zip(output.logits, wanted, strict=True)).backward()
    found = gradients(model)
    sum((a**2).sum() for a in wanted).backward()
    assert_same(found, gradients(model), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("pairs", ["joined", "apart"])
@torch.no_grad()
def test_a_mixed_batch_equals_its_tasks_and_its_rows_one_by_one(adapter: str, prompt: str, pairs: str) -> None:
    heads = Heads(LABELS, pairs=pairs, dropout=0.0, means=HEADS.means, scales=HEADS.scales)  # type: ignore[arg-type]
    model, given = built(adapter, prompt, heads), batch()
    mixed = model(**given, tasks=ROWS).logits
    for i, name in enumerate(ROWS):
        length = int(given["attention_mask"][i].sum())
        row = {key: value[i : i + 1, :length] for key, value in given.items()}
        alone = model(**row, tasks=name).logits[0]
        torch.testing.assert_close(mixed[i], alone, rtol=1e-9, atol=1e-9)


def test_losses_are_cross_entropies_of_own_classes_and_squares_in_units_of_the_scale() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.double)
    tasks, targets = [2, 0, 1, 0], torch.tensor([1.0, 2.0, 4.0, 0.0])
    for row, task in zip(logits, tasks, strict=True):
        row[LABELS[task] :] = -math.inf
    logits.requires_grad_()
    for smoothing in (0.0, 0.2):
        found = HEADS.losses(logits, targets, tasks, smoothing)
        wanted = torch.stack(
            [
                F.cross_entropy(logits[0, :2].float(), torch.tensor(1), label_smoothing=smoothing),
                F.cross_entropy(logits[1].float(), torch.tensor(2), label_smoothing=smoothing),
                ((logits[2, 0].float() - 4.0) / 1.5) ** 2,
                F.cross_entropy(logits[3].float(), torch.tensor(0), label_smoothing=smoothing),
            ]
        )
        torch.testing.assert_close(found, wanted)
        (slope,) = torch.autograd.grad(found.sum(), logits)
        (right,) = torch.autograd.grad(wanted.sum(), logits)
        assert bool(slope.isfinite().all())
        torch.testing.assert_close(slope, right)


@pytest.mark.parametrize("adapter", ["lora", "mtl"])
def test_a_task_gets_no_gradient_of_another(adapter: str) -> None:
    model = built(adapter, "soft", Heads(LABELS, hidden=True))
    logits = model(**batch(), tasks="cola").logits
    logits[:, :2].sum().backward()
    own = model.base_model.heads
    for name in own.task_parameters:
        grad = own.get_parameter(name).grad
        assert not bool(grad[:2].any()) and bool(grad[2].any())


@pytest.mark.parametrize("prompt", ["none", "nas", "soft"])
def test_saved_and_loaded_heads_are_the_same_bit_for_bit(tmp_path: Path, prompt: str) -> None:
    encoder().float().save_pretrained(tmp_path / "base")
    given, base = batch(), BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    config = peml.PemlConfig(
        task_names=TASKS, adapter=ADAPTERS["mtl"], prompt=PROMPTS[prompt], heads=HEADS, task_type="FEATURE_EXTRACTION"
    )
    model = get_peft_model(base, config).eval()
    shake((p for p in model.parameters() if p.requires_grad), 0.2)
    with torch.no_grad():
        before = model(**given, tasks=ROWS).logits
    model.save_pretrained(tmp_path / "adapter")
    plain = BertModel.from_pretrained(tmp_path / "base")
    for again in (
        PeftModel.from_pretrained(plain, tmp_path / "adapter"),
        AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter"),
    ):
        with torch.no_grad():
            assert torch.equal(again.eval()(**given, tasks=ROWS).logits, before)
        assert again.peft_config["default"].heads == HEADS
    count = sum(p.numel() for p in model.base_model.heads.parameters())
    assert inspect_folder(tmp_path / "adapter").parameters["heads"] == count == HEADS.num_parameters(24)


@pytest.mark.parametrize("pairs", ["joined", "apart"])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_number_of_parameters_is_that_of_the_formula(hidden: bool, pairs: str) -> None:
    heads = Heads(LABELS, pairs=pairs, hidden=hidden)  # type: ignore[arg-type]
    assert sum(p.numel() for p in heads.build(24).parameters()) == heads.num_parameters(24)


@torch.no_grad()
def test_another_task_changes_no_other_by_a_bit() -> None:
    model, given = (
        built("mtl", "prefix-per-task", Heads(LABELS, hidden=True, means=HEADS.means, scales=HEADS.scales)),
        batch(),
    )
    before = model(**given, tasks=ROWS).logits
    with pytest.raises(PemlError, match="has heads: give num_labels="):
        model.base_model.add_task("new")
    model.base_model.add_task("new", num_labels=5)
    after = model(**given, tasks=ROWS).logits
    assert torch.equal(after[:, :3], before) and bool((after[:, 3:] == -math.inf).all())
    assert bool(model(**given, tasks="new").logits.isfinite().all())
    assert model.peft_config["default"].heads.num_labels == (*LABELS, 5)
    model.base_model.add_task("value", num_labels=1, scale=(7.0, 2.0))
    assert model.peft_config["default"].heads.scale_of(4) == (7.0, 2.0)
    assert torch.equal(model(**given, tasks=ROWS).logits[:, :3], before)


@torch.no_grad()
def test_disabled_merged_and_deleted() -> None:
    base, given = encoder(), batch()
    plain = base(**given).last_hidden_state
    model = built("mtl", base=base)
    whole = model(**given, tasks="rte").logits
    with model.disable_adapter():
        output = model(**given)
        assert torch.equal(output.last_hidden_state, plain) and "logits" not in output
    model.base_model.select_task("rte")
    model.merge_adapter()
    torch.testing.assert_close(model(**given).logits, whole)
    with pytest.raises(PemlError, match="heads cannot be folded"):
        model.merge_and_unload()
    model.unmerge_adapter()
    bare = model.base_model.unload()
    assert torch.equal(bare(**given).last_hidden_state, plain) and not hasattr(bare, "head_host")


@torch.no_grad()
def test_two_adapters_have_heads_of_their_own() -> None:
    model, given = built("lora"), batch()
    first = model(**given, tasks=ROWS).logits
    model.add_adapter("other", peml.PemlConfig(task_names=["a"], heads=Heads((4,))))
    assert torch.equal(model(**given, tasks=ROWS).logits, first)
    model.set_adapter("other")
    assert model(**given, tasks="a").logits.shape == (4, 4)
    model.set_adapter("default")
    assert torch.equal(model(**given, tasks=ROWS).logits, first)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**given, tasks=ROWS).logits, first)


def test_what_heads_cannot_do_is_said() -> None:
    model, given = built("lora"), batch()
    with pytest.raises(PemlError, match="has a head per task: pass tasks= with one of rte, sst2, cola"):
        model(**given)
    pair = built("lora", heads=Heads(LABELS, pairs="apart"))
    with pytest.raises(PemlError, match="wants input_ids= and token_type_ids="):
        pair(input_ids=given["input_ids"], tasks="rte")
    for tasks in (["rte", "cola"], [*ROWS, "rte"]):
        with pytest.raises(PemlError, match=f"`tasks=` has {len(tasks)} entries but the batch has 4 rows"):
            pair(**given, tasks=tasks)
    with pytest.raises(PemlError, match="one task per row, not one per token"):
        pair(**given, tasks=[["rte"] * 6] * 4)
    with pytest.raises(PemlError, match="counts the positions of both texts itself: leave position_ids out"):
        pair(**given, position_ids=torch.arange(6)[None], tasks=ROWS)
    with pytest.raises(PemlError, match=r"wants an attention_mask of .rows, tokens., not .4, 1, 6, 6."):
        pair(**given | {"attention_mask": torch.ones(4, 1, 6, 6)}, tasks=ROWS)
    for given_labels, scale, message in (
        (0, (0.0, 1.0), "heads.num_labels must"),
        (1, (0.0, 0.0), "heads.scales must"),
    ):
        with pytest.raises(PemlError, match=message):
            model.base_model.add_task("new", num_labels=given_labels, scale=scale)
    assert model.peft_config["default"].task_names == TASKS
    with pytest.raises(PemlError, match="unknown task 'mnli'"):
        model(**given, tasks="mnli")
    with pytest.raises(PemlError, match="one task per row, not one per token"):
        model(**given, tasks=[["rte"] * 6] * 4)
    assert routing.current() is None
    with pytest.raises(PemlError, match="BertForMaskedLM has a head of its own"):
        adapt(BertForMaskedLM(zoo.FAMILIES["bert"].config()), adapter=peml.LoRA(r=2), heads=HEADS)
    with pytest.raises(PemlError, match="T5Model is an encoder-decoder"):
        adapt(T5Model(zoo.FAMILIES["t5"].config()), adapter=peml.LoRA(r=2), heads=HEADS)
    for heads, message in (
        (Heads((2, 3)), r"heads.num_labels has 2 entries for 3 tasks"),
        (Heads((2, 0, 1)), "must be 1 .a number. or the number of classes"),
        (Heads(LABELS, layers=(1, 1)), r"heads.layers needs one or more layers, each once, not .1, 1."),
        (Heads(LABELS, layers=(0, 3)), "heads.layers names layer 3, but BertModel has 0 to 2, and -3 to -1"),
        (Heads(LABELS, dropout=1.0), "heads.dropout must be 0 or more and below 1"),
        (Heads(LABELS, scales=(1.0, 0.0, 1.0)), "heads.scales must be above 0"),
    ):
        with pytest.raises(PemlError, match=message):
            adapt(encoder(), adapter=peml.LoRA(r=2), heads=heads)
    with pytest.raises(PemlError, match="heads.pooling must be mean or first or last, not 'max'"):
        peml.PemlConfig(task_names=["a"], heads=Heads((2,), pooling="max"))  # type: ignore[arg-type]


@torch.no_grad()
def test_a_decoder_is_read_at_its_last_token_whichever_side_is_padded() -> None:
    torch.manual_seed(0)
    base = LlamaModel(zoo.FAMILIES["llama"].config()).double().eval()
    model = built("mtl", "prefix", Heads(LABELS, pooling="last"), base)
    ids = torch.randint(2, 60, (1, 4))
    alone = model(input_ids=ids, tasks="rte").logits
    for left in (True, False):
        padding, size = torch.zeros(1, 3, dtype=torch.long), 3
        wide = torch.cat([padding, ids] if left else [ids, padding], 1)
        mask = torch.ones_like(wide)
        mask[:, :size] = 0 if left else 1
        mask[:, -size:] = 1 if left else 0
        torch.testing.assert_close(
            model(input_ids=wide, attention_mask=mask, tasks="rte").logits, alone, rtol=1e-9, atol=1e-9
        )


def test_pooling_of_a_text_without_padding() -> None:
    states = torch.randn(2, 3, 4)
    for pooling, wanted in (("mean", states.mean(1)), ("first", states[:, 0]), ("last", states[:, 2])):
        size = wanted.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(pooled(states, None, pooling), wanted / size)  # type: ignore[arg-type]


def test_the_last_token_of_a_long_text_in_half_precision() -> None:
    states = torch.randn(2, 301, 4).bfloat16()
    mask = torch.ones(2, 301)
    mask[0, 258:] = 0
    wanted = F.rms_norm(torch.stack([states[0, 257], states[1, 300]]), (4,))
    for kind in (torch.bool, torch.long, torch.float):
        assert torch.equal(pooled(states, mask.to(kind), "last"), wanted)


def test_texts_are_taken_apart_whichever_side_is_padded_and_where_no_row_is_a_pair() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [0, 0, 0, 5, 9, 4], [5, 1, 2, 3, 4, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    types = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    call, pairs = apart({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    assert pairs.tolist() == [0, 1]
    texts = [row[kept.bool()].tolist() for row, kept in zip(call["input_ids"], call["attention_mask"], strict=True)]
    assert texts == [[5, 6], [5, 9], [5, 1, 2, 3, 4, 8], [5, 7, 8], [5, 4]]
    assert not bool(call["token_type_ids"].any())
    call, pairs = apart({"input_ids": ids[2:], "token_type_ids": types[2:]})
    assert len(pairs) == 0 and torch.equal(call["input_ids"], ids[2:])
    for kind in (torch.bool, torch.float):
        again, pairs = apart({"input_ids": ids, "attention_mask": mask.to(kind), "token_type_ids": types})
        assert pairs.tolist() == [0, 1] and again["attention_mask"].sum().item() == 15


def test_dropout_is_drawn_in_training_alone() -> None:
    model, given = built("lora", heads=Heads(LABELS, dropout=0.5)), batch()
    assert torch.equal(model(**given, tasks=ROWS).logits, model(**given, tasks=ROWS).logits)
    model.train()
    first = model(**given, tasks=ROWS).logits
    assert not torch.equal(model(**given, tasks=ROWS).logits, first)


@pytest.mark.parametrize("hidden", [False, True])
def test_heads_learn_the_slower_the_more_they_see(tmp_path: Path, hidden: bool) -> None:
    """A step of Adam moves each weight by the rate, and a logit by that times the features."""
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.3)
    for layers, pairs, seen in ((None, "joined", 24), ((0, 1, 2), "apart", 3 * 4 * 24)):
        model = built(heads=Heads(LABELS, layers=layers, pairs=pairs, hidden=hidden))
        assert model.base_model.heads.num_features == seen
        for given, wanted in (({}, 0.05 / seen), ({"heads": 0.7}, 0.7)):
            groups = {g["name"]: g["lr"] for g in parameter_groups(model.base_model, arguments, given)}
            assert groups == {"adapter": 0.3, "heads": pytest.approx(wanted)}
