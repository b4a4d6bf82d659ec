"""Groups of tasks by depth: what they are, and one cluster apart from the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import peml
from models import TASKS, adapt, gradients, probe_loss, tiny, tokens
from peml import PemlError
from peml.adapters import GroupedAdapter
from peml.groups import Level, depth_of, level_at, read_groups

CLUSTERS = [["rte", "cola"], ["sst2"]]
DEEP = [{"until": 0.3, "groups": "all"}, {"until": 0.6, "groups": CLUSTERS}, {"until": 1, "groups": "each"}]


def logits(model: PeftModel, batch: torch.Tensor, *tasks: str) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch, tasks=list(tasks)).logits


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("rte", "must be a list"),
        ([], "must be a list"),
        ([["rte", "sst2"]], "leaves out cola"),
        ([["rte", "sst2"], ["rte", "cola"]], "has task 'rte' twice"),
        ([["rte", "mnli"], ["sst2", "cola"]], "names 'mnli', which is no task here; there are rte, sst2, cola"),
        ([["rte"], []], "give lists of task names"),
        ([{"until": 0.5, "groups": "all"}], "ascend from above 0 to 1, not 0.5"),
        ([{"until": 1, "groups": "all"}, {"until": 0.5, "groups": "each"}], "not 1, 0.5"),
        ([{"until": 0, "groups": "all"}, {"until": 1, "groups": "each"}], "not 0, 1"),
        ([{"until": True, "groups": "all"}], "share of the depth"),
        ([{"groups": "all"}], "give lists of task names, or a list of"),
    ],
)
def test_wrong_groups_are_refused(raw: object, message: str) -> None:
    with pytest.raises(PemlError, match=message):
        peml.PemlConfig(task_names=TASKS, adapter=peml.LoRA(), groups=raw)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"prompt": peml.PrefixTuning(2)}, "there is none"),
        ({"adapter": peml.LoRA(align="kl")}, "adapter.align compares all tasks"),
        ({"adapter": peml.CGCLoRA(r=10, num_common=2, rank_mode="total")}, 'use "active"'),
    ],
)
def test_adapters_that_groups_cannot_part_are_refused(parts: dict, message: str) -> None:
    with pytest.raises(PemlError, match=message):
        peml.PemlConfig(task_names=TASKS, groups=CLUSTERS, **parts)


def test_a_layer_has_the_groups_of_its_depth() -> None:
    levels = read_groups(DEEP, TASKS)
    assert [level_at(levels, depth).partition(TASKS) for depth in (None, 0.3, 0.4, 0.61)] == [
        ((0, 1, 2),), ((0, 1, 2),), ((0, 2), (1,)), ((0,), (1,), (2,)),
    ]  # fmt: skip
    model = tiny("llama", layers=4)
    assert depth_of(model, "model.layers.2.mlp.up_proj") == 2.5 / 4 and depth_of(model, "lm_head") is None
    model = adapt(model, peml.LoRA(r=2), groups=DEEP)
    found = [
        getattr(layer.self_attn.q_proj.peml_adapter["default"], "groups", None) for layer in model.model.model.layers
    ]
    assert found == [None, ((0, 2), (1,)), ((0,), (1,), (2,)), ((0,), (1,), (2,))]
    assert model.peft_config["default"].to_dict()["groups"] == [
        {"until": 0.3, "groups": "all"}, {"until": 0.6, "groups": CLUSTERS}, {"until": 1.0, "groups": "each"},
    ]  # fmt: skip


@pytest.mark.parametrize("method", [peml.LoRA(r=2), peml.CGCLoRA(r=4), peml.HydraLoRA(r=2)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_group_is_the_method_without_groups(method: object, family: str) -> None:
    batch = tokens(3, 5)
    found = []
    for groups in (None, [TASKS]):
        torch.manual_seed(3)
        model = adapt(tiny(family), method, groups=groups)
        out = model(input_ids=batch, tasks=["rte", "sst2", "rte"]).logits
        probe_loss(out).backward()
        found.append((out, gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, found[1][1][name]) for name, a in found[0][1].items())


def test_a_group_for_each_task_is_single_task_lora() -> None:
    batch, tasks = tokens(3, 5), ["cola", "sst2", "rte"]
    grouped, single = (
        adapt(tiny(), peml.LoRA(r=2), groups=[[t] for t in TASKS]),
        adapt(tiny(), peml.SingleTaskLoRA(r=2)),
    )
    base = {k: v for k, v in grouped.state_dict().items() if "peml_" not in k}
    single.load_state_dict(base, strict=False)
    with torch.no_grad():
        for name, parameter in single.named_parameters():
            if "peml_" in name:
                path, _, key = name.rpartition(".")
                rows = [grouped.get_parameter(f"{path}.members.{task}.{key}") for task in range(3)]
                parameter.copy_(torch.stack(rows))
    out = [model(input_ids=batch, tasks=tasks).logits for model in (grouped, single)]
    torch.testing.assert_close(*out, rtol=1e-12, atol=1e-12)
    probe_loss(out[0]).backward(), probe_loss(out[1]).backward()
    found = gradients(grouped)
    for name, gradient in gradients(single).items():
        path, _, key = name.rpartition(".")
        for task in range(3):
            torch.testing.assert_close(found[f"{path}.members.{task}.{key}"], gradient[task], rtol=1e-9, atol=1e-10)


def test_total_and_active_numbers() -> None:
    model = adapt(tiny(layers=4), peml.CGCLoRA(r=4, num_common=1, num_specific=1, gate="table"), groups=DEEP)
    layers = [m for m in model.modules() if isinstance(m, peml.bank.BankLinear)]
    active = 0
    for layer in layers:
        # A common and an own expert of rank 2, and two logits, wherever a layer lies.
        active += 4 * (layer.in_features + layer.out_features) + 2
    assert model.base_model.active_parameters() == dict.fromkeys(TASKS, active)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > active


def test_a_task_joins_the_groups_of_another(tmp_path: Path) -> None:
    model, batch = adapt(tiny(layers=4), peml.CGCLoRA(r=4), groups=DEEP), tokens(3, 5)
    before = logits(model, batch, *TASKS)
    model.base_model.add_task("mnli", "copy:sst2", beside="rte")
    assert torch.equal(logits(model, batch, *TASKS), before)
    levels = model.peft_config["default"].groups
    assert [level.groups for level in levels] == ["all", (("rte", "cola", "mnli"), ("sst2",)), "each"]
    assert model.base_model.cluster_of("mnli") == ["rte", "cola", "mnli"]
    layers = model.model.model.layers
    rows = layers[1].mlp.up_proj.peml_adapter["default"].members
    assert torch.equal(rows[0].embedding[2], rows[1].embedding[0])
    top = layers[3].mlp.up_proj.peml_adapter["default"]
    assert top.groups == ((0,), (1,), (2,), (3,)) and torch.equal(top.members[3].down, top.members[1].down)
    model.float().save_pretrained(tmp_path)
    found = logits(model, batch, "mnli", "sst2", "mnli")
    base = model.unload()
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again, batch, "mnli", "sst2", "mnli"), found)
    with pytest.raises(PemlError, match="beside is a task .* not 'x'"):
        again.base_model.add_task("new", beside="x")


def trained(model: PeftModel, tasks: list[str], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0)
    for _ in range(steps):
        probe_loss(model(input_ids=tokens(len(tasks), 5), tasks=tasks).logits).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", [peml.LoRA(r=2), peml.CGCLoRA(r=4), peml.MTLLoRA(r=2)])
def test_one_cluster_is_trained_started_afresh_and_removed_alone(method: object) -> None:
    """Bit by bit: the other cluster never moves."""
    model, batch = adapt(tiny(), method, groups=CLUSTERS), tokens(3, 5)
    tuner, kept = model.base_model, logits(model, batch, "sst2", "sst2", "sst2")
    others = logits(model, batch, "rte", "cola", "rte")
    tuner.freeze_others(tuner.cluster_of("cola"))
    trained(model, ["rte", "cola", "sst2"])
    assert torch.equal(logits(model, batch, "sst2", "sst2", "sst2"), kept)
    moved = logits(model, batch, "rte", "cola", "rte")
    assert not torch.allclose(moved, others)
    tuner.restart(["rte", "cola"])
    assert torch.equal(logits(model, batch, "sst2", "sst2", "sst2"), kept)
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=batch).logits
    assert torch.equal(logits(model, batch, "rte", "cola", "rte"), plain)
    tuner.remove_tasks(["rte", "cola"])
    assert model.peft_config["default"].task_names == ["sst2"]
    assert torch.equal(logits(model, batch, "sst2", "sst2", "sst2"), kept)
    assert not any(isinstance(module, GroupedAdapter) for module in model.modules())


def trainable(model: PeftModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_clusters_are_trained_one_after_the_other() -> None:
    """What one of them has frozen is trained for the next, whatever tasks come and go in between."""
    model = adapt(tiny(), peml.CGCLoRA(r=4), groups=CLUSTERS)
    tuner, of_all = model.base_model, trainable(model)
    tuner.freeze_others(["rte", "cola"])
    first = trainable(model)
    tuner.freeze_others(["sst2"])
    assert trainable(model) == of_all - first and first
    tuner.freeze_others(["rte", "cola"])
    assert trainable(model) == first
    tuner.add_task("mnli", beside="sst2")
    tuner.remove_tasks(["cola"])
    with model.disable_adapter():
        pass
    assert trainable(model) == first
    tuner.add_task("new")
    tuner.freeze_others(["new"])
    new = trainable(model)
    assert new and all(".members.2." in name for name in new)
    with model.disable_adapter():
        pass
    assert trainable(model) == new


@pytest.mark.parametrize("method", [peml.LoRA(r=2), peml.CGCLoRA(r=4), peml.Poly(r=2)])
def test_a_task_is_removed_from_its_group(method: object, tmp_path: Path) -> None:
    for groups in (None, CLUSTERS, [["cola"], ["rte", "sst2"]]):
        model, batch = adapt(tiny(), method, peml.PrefixTuning(2, per_task=True), groups=groups), tokens(2, 5)
        before = logits(model, batch, "cola", "sst2")
        model.base_model.remove_tasks(["rte"])
        assert model.peft_config["default"].task_names == ["sst2", "cola"]
        assert torch.equal(logits(model, batch, "cola", "sst2"), before)
        with pytest.raises(PemlError, match="unknown task 'rte'"):
            logits(model, batch, "rte", "sst2")
        model.float().save_pretrained(tmp_path)
        found = logits(model, batch, "cola", "sst2")
        again = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
        assert torch.equal(logits(again, batch, "cola", "sst2"), found)


def test_a_head_is_removed_with_its_task() -> None:
    heads = peml.Heads((2, 3, 1), pooling="mean", means=(0, 0, 2.0), scales=(1, 1, 3.0))
    model, batch = adapt(tiny("bert").bert, peml.LoRA(r=2), heads=heads, groups=CLUSTERS), tokens(2, 5)
    before = logits(model, batch, "sst2", "cola")
    model.base_model.remove_tasks(["rte"])
    assert torch.equal(logits(model, batch, "sst2", "cola"), before)
    assert model.peft_config["default"].heads.num_labels == (3, 1)


def test_what_cannot_be_done_to_a_cluster_is_refused() -> None:
    tuner = adapt(tiny(), peml.LoRA(r=2), groups=CLUSTERS).base_model
    for call, message in (
        (lambda: tuner.freeze_others(["rte"]), "nothing in this adapter works for rte alone"),
        (lambda: tuner.restart(["rte"]), "no group of this adapter has rte alone"),
        (lambda: tuner.restart("rte"), "give a list of tasks"),
        (lambda: tuner.remove_tasks(TASKS), "an adapter needs a task"),
        (lambda: tuner.remove_tasks(["x"]), "rte, sst2, cola, not 'x'"),
    ):
        with pytest.raises(PemlError, match=message):
            call()
    tuner.select_task("rte")
    tuner.merge_adapter()
    with pytest.raises(PemlError, match="unmerge_adapter"):
        tuner.remove_tasks(["rte"])


def test_a_level_grows_and_shrinks() -> None:
    level = Level(1.0, (("a", "b"), ("c",)))
    assert level.with_task("d", None).groups == (("a", "b"), ("c",), ("d",))
    assert level.with_task("d", "c").groups == (("a", "b"), ("c", "d"))
    assert level.without(["c"]).groups == (("a", "b"),) and Level(1.0, "each").without(["c"]).groups == "each"


def test_four_clusters_are_one_base_and_four_adapters() -> None:
    """In one forward over all clusters each row is what its cluster gives it alone."""
    names = [f"t{i}" for i in range(8)]
    clusters = [names[i : i + 2] for i in range(0, 8, 2)]
    base = tiny()
    before = sum(p.numel() for p in base.parameters())
    one = sum(p.numel() for p in adapt(tiny(), peml.CGCLoRA(r=4), tasks=names[:2]).parameters() if p.requires_grad)
    model, batch = adapt(base, peml.CGCLoRA(r=4), tasks=names, groups=clusters), tokens(8, 5)
    assert sum(p.numel() for p in model.parameters()) == before + 4 * one
    mixed = logits(model, batch, *names)
    for number, cluster in enumerate(clusters):
        rows = slice(2 * number, 2 * number + 2)
        torch.testing.assert_close(mixed[rows], logits(model, batch[rows], *cluster), rtol=1e-11, atol=1e-11)
        # Alone in a model of its own.
        alone = adapt(tiny(), peml.CGCLoRA(r=4), tasks=cluster)
        state = model.state_dict()
        own = {k: v for k, v in state.items() if "peml_" not in k}
        mark = f".members.{number}."
        own |= {k.replace(mark, "."): v for k, v in state.items() if mark in k}
        alone.load_state_dict(own)
        torch.testing.assert_close(mixed[rows], logits(alone, batch[rows], *cluster), rtol=1e-11, atol=1e-11)


def test_what_was_looked_up_without_gradients_serves_with_them() -> None:
    """A block may hold both an evaluation and a training step."""
    model, batch = adapt(tiny(), peml.CGCLoRA(r=4), groups=CLUSTERS), tokens(3, 5)
    with model.base_model.routed(["rte", "sst2", "cola"]):
        with torch.inference_mode():
            expected = model(input_ids=batch).logits.clone()
        out = model(input_ids=batch).logits
        probe_loss(out).backward()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
