"""Layers that read one input, and cores of all layers: what is computed together, and when it is not."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import peml
from models import TASKS, adapt, assert_same, gradients, probe_loss, shake, tiny, tokens
from peml import PemlError, routing
from peml.bank import BankLinear
from peml.routing import Forward, Route
from peml.siblings import group_siblings


def bank(linear: nn.Linear, config) -> BankLinear:
    layer = BankLinear(linear.requires_grad_(False), "path.of.layer")
    layer.update_layer("default", config.build(linear.in_features, linear.out_features, 3), tuple(TASKS))
    layer.set_adapter("default")
    return layer


class Attention(nn.Module):
    """Three layers that read one input, and one that does not; `order` and `read` are what a model might do."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in (("q_proj", 6), ("k_proj", 4), ("v_proj", 4), ("o_proj", 7)):
            setattr(self, name, nn.Linear(7, out))
        self.order = ["q_proj", "k_proj", "v_proj"]
        self.read = lambda name, x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([getattr(self, name)(self.read(name, x)) for name in self.order], dim=-1)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch):
    """The model in double precision, and the sizes of the groups that the kernel computes."""
    sizes: list[int] = []
    original = peml.bank.low_rank

    def spy(x, branches, dropout=0.0):
        sizes.append(len(branches))
        return original(x, branches, dropout)

    monkeypatch.setattr(peml.bank, "low_rank", spy)
    return adapt(Attention().double(), peml.MTLLoRA(r=2), target_modules="all-linear"), sizes


def alone(model, x, task="sst2") -> torch.Tensor:
    """Each layer by itself."""
    inner = model.base_model.model
    with routing.opened(Forward(Route.of(task, TASKS))):
        groups = {name: getattr(inner, name).siblings for name in ("q_proj", "k_proj", "v_proj")}
        for name in groups:
            getattr(inner, name).siblings = None
        y = inner.forward(x)
        for name, group in groups.items():
            getattr(inner, name).siblings = group
    return y


def test_siblings_are_computed_together(attention) -> None:
    model, sizes = attention
    x = torch.randn(2, 3, 7).double()
    y = model(x, tasks="sst2")
    assert sizes == [3]
    torch.testing.assert_close(y, alone(model, x), rtol=1e-12, atol=1e-12)
    assert routing.current() is None


@pytest.mark.parametrize(
    ("change", "sizes_wanted"),
    [
        (lambda m: setattr(m, "order", ["k_proj", "v_proj", "q_proj"]), [1, 1, 3]),  # the first is called last
        (lambda m: setattr(m, "order", ["k_proj"]), [1]),
        (lambda m: setattr(m, "order", ["q_proj", "q_proj", "k_proj", "v_proj"]), [3, 3]),
        (lambda m: setattr(m, "read", lambda name, x: x if name == "q_proj" else x * 2), [3, 1, 1]),  # other inputs
        (lambda m: setattr(m, "read", lambda name, x: x.add_(1)), [3, 1, 1]),  # the same tensor, changed in place
        (lambda m: m.k_proj.register_forward_hook(lambda *a: a[2] + 1), [1, 1, 1]),
        (lambda m: m.k_proj.base_layer.register_forward_hook(lambda *a: a[2] + 1), [1, 1, 1]),
        (lambda m: m.v_proj.base_layer.weight.requires_grad_(), [1, 1, 1]),
    ],
)  # fmt: skip
def test_what_siblings_do_not_share_is_computed_apart(attention, change, sizes_wanted) -> None:
    model, sizes = attention
    change(model.base_model.model)
    x = torch.randn(2, 3, 7).double()
    y = model(x.clone(), tasks="sst2")
    assert sizes == sizes_wanted
    torch.testing.assert_close(y, alone(model, x.clone()), rtol=1e-12, atol=1e-12)


def test_a_layer_called_outside_of_a_model_computes_itself(attention) -> None:
    model, sizes = attention
    with model.base_model.routed("rte"):
        pass
    layer, x = model.base_model.model.q_proj, torch.randn(2, 7).double()
    with routing.opened(Forward(Route.of("rte", TASKS))):
        layer.siblings, group = None, layer.siblings
        expected = layer(x)
        layer.siblings = group
        torch.testing.assert_close(layer(x), expected)
    assert sizes == [1, 1]


def test_a_leader_without_the_active_adapter_leaves_the_others_to_themselves(attention) -> None:
    model, sizes = attention
    config = peml.PemlConfig(task_names=["b"], adapter=peml.LoRA(r=1), target_modules=["k_proj", "v_proj"])
    model.add_adapter("second", config)
    model.set_adapter("second")
    model(torch.randn(2, 3, 7).double())
    assert sizes == [1, 1]


def test_cross_attention_shares_keys_and_values_only() -> None:
    model = nn.Module()
    model.add_module("EncDecAttention", Attention())
    model.add_module("SelfAttention", Attention())
    for parent in list(model.children()):
        for name, linear in list(parent.named_children()):
            setattr(parent, name, bank(linear, peml.LoRA(r=1)))
    group_siblings(model)
    for name, wanted in (("EncDecAttention", 2), ("SelfAttention", 3)):
        parent = getattr(model, name)
        assert len(parent.v_proj.siblings.layers) == wanted and parent.o_proj.siblings is None
    assert model.EncDecAttention.q_proj.siblings is None


def test_cores_of_all_layers_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapt(tiny(), peml.MTLLoRA(r=2)), []
    original = peml.adapters.MTLLoRAAdapter.core
    monkeypatch.setattr(
        peml.adapters.MTLLoRAAdapter, "core", lambda self, *args: calls.append(1) or original(self, *args)
    )
    batch = tokens(3)
    together = model(input_ids=batch, tasks=TASKS).logits
    assert len(calls) == 1
    monkeypatch.setattr(peml.adapters.ahead, "resident", lambda module: False)  # as where weights are sharded
    torch.testing.assert_close(model(input_ids=batch, tasks=TASKS).logits, together, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1 + 14


@torch.no_grad()
def test_generate_prepares_each_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no later call, of other weights or tasks, takes what an earlier one has kept."""
    model, made = adapt(tiny(), peml.MTLLoRA(r=2)), []
    original = peml.bank.prepare
    monkeypatch.setattr(peml.bank, "prepare", lambda *args: made.append(1) or original(*args))
    batch = tokens(3)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generated(tasks) -> torch.Tensor:
        found = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), tasks=tasks, **options)
        sequences, steps = found.sequences, torch.stack(found.logits, dim=1)
        whole = model(input_ids=sequences[:, :-1], tasks=tasks).logits[:, batch.shape[1] - 1 :]
        torch.testing.assert_close(steps, whole.float(), rtol=1e-4, atol=1e-4)
        return steps

    first = generated(TASKS)
    assert len(made) == 8  # two layers of q, k, v; o; gate, up; down
    other = generated(["cola"] * 3)
    shake((p for p in model.parameters() if p.requires_grad), 0.1)
    changed = generated(TASKS)
    model.base_model.model.model.layers[0].self_attn.o_proj.base_layer.weight.mul_(1.1)
    assert len({float(t.sum()) for t in (first, other, changed, generated(TASKS))}) == 4


# What was called with other inputs, or out of order, is noticed at the end of a forward.


def test_groups_that_are_none_are_given_up_after_one_forward(attention) -> None:
    """`k` reads something else (DETR), or `v` comes first (VideoMAE): from the second forward on each is called once."""
    model, sizes = attention
    inner, x = model.base_model.model, torch.randn(2, 3, 7).double()
    inner.read = lambda name, x: x * 2 if name == "v_proj" else x
    for _ in range(2):
        y = model(x, tasks="sst2")
        torch.testing.assert_close(y, alone(model, x), rtol=1e-12, atol=1e-12)
    assert sizes[:2] == [3, 1] and sizes[5:8] == [1, 1, 1]


def test_nothing_is_left_behind(attention) -> None:
    model, _ = attention
    seen = []
    model.base_model.model.v_proj.register_forward_hook(lambda *a: seen.append(routing.current().handed))
    model(torch.randn(2, 3, 7).double(), tasks="sst2")
    assert seen == [{}] and not model.base_model._apart


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7), (0, 7)])
@pytest.mark.parametrize("config", [peml.LoRA(r=2), peml.MTLLoRA(r=2), peml.MoELoRA(r=2, num_experts=2)], ids=str)
def test_an_input_without_rows(shape, config) -> None:
    layer = bank(nn.Linear(7, 5), config)
    x = torch.zeros(shape, requires_grad=True)
    with routing.opened(Forward(Route.of("rte", TASKS))):
        y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 5) and x.grad.shape == shape


# Routes are never guessed.


class Transposing(nn.Module):
    """A model that puts another dimension first, picks tokens from all rows, or lays them in one dimension."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.proj, self.way = nn.Linear(7, 5), way

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        x = inputs_embeds
        if self.way == "flat":
            return self.proj(x.flatten(0, 1)).view(*x.shape[:2], -1)
        return self.proj({"first": x.transpose(0, 1), "picked": x.flatten(0, 1)[:4]}[self.way])


@pytest.mark.parametrize("way", ["first", "picked", "flat"])
def test_a_layer_whose_rows_are_not_the_batch_is_refused(way: str) -> None:
    """Even where the number of rows is a multiple of the number of tasks."""
    model = adapt(Transposing(way).double(), peml.MTLLoRA(r=2), target_modules=["proj"])
    x, tasks = torch.randn(2, 4, 7).double(), ["rte", "cola"]
    if way == "flat":
        apart = torch.cat([model(inputs_embeds=x[i : i + 1], tasks=task) for i, task in enumerate(tasks)])
        torch.testing.assert_close(model(inputs_embeds=x, tasks=tasks), apart)
        return
    with pytest.raises(PemlError, match=r"proj cannot be routed.*exclude_modules"):
        model(inputs_embeds=x, tasks=tasks)
    model(inputs_embeds=x, tasks="rte")


def test_experts_are_refused_for_adapters_that_differ_by_task() -> None:
    config = SwitchTransformersConfig(
        vocab_size=31, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    base = SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(PemlError, match=r"is an expert.*exclude_modules"):
        adapt(base, peml.MTLLoRA(r=2))


# Checkpointing that is not transformers' own.


@pytest.mark.parametrize("adapter", [peml.LoRA(r=2), peml.LoRA(r=2, lora_dropout=0.4), peml.MTLLoRA(r=2)], ids=str)
@pytest.mark.parametrize("preserve_rng_state", [True, False])
def test_torch_checkpoint_wrapper(adapter, preserve_rng_state: bool) -> None:
    """As accelerate wraps layers under FSDP."""
    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = adapt(tiny(), adapter).train()
        layers = model.base_model.model.model.layers
        if wrapped:
            for i, layer in enumerate(layers):
                layers[i] = checkpoint_wrapper(layer, preserve_rng_state=preserve_rng_state)
        torch.manual_seed(1)
        logits = model(input_ids=tokens(), tasks=TASKS).logits
        probe_loss(logits).backward()
        found = gradients(model)
        results.append({name.replace("._checkpoint_wrapped_module", ""): g for name, g in found.items()})
    if preserve_rng_state or not adapter.lora_dropout:
        assert_same(*results, atol=1e-12)
    assert all(g.isfinite().all() for g in results[1].values())


@pytest.mark.parametrize("adapter", [peml.LoRA(r=2), peml.MTLLoRA(r=2)], ids=str)
def test_a_checkpoint_that_nobody_knows_is_named(adapter) -> None:
    model = adapt(tiny(), adapter).train()
    layer = model.base_model.model.model.layers[0]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(inner, *args, use_reentrant=False, **kwargs)
    loss = probe_loss(model(input_ids=tokens(), tasks=TASKS).logits)
    with pytest.raises(PemlError, match="recomputed in backward by a checkpoint that the model does not know"):
        loss.backward()
