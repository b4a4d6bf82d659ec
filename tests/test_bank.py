"""The layer that hosts a bank: its equation, its precision, its base layer; siblings; the paper's counts."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peml
import references
from models import TASKS, adapt, shake, tiny, tokens
from peml import PemlError, routing
from peml.bank import BankLinear
from peml.routing import Forward, Route


def test_what_is_saved_does_not_grow_with_tasks_or_experts() -> None:
    """Cores apart: no copy of the bank per row."""

    def saved(num_tasks: int, num_up: int) -> int:
        layer = bank(nn.Linear(16, 16), peml.MTLLoRA(r=2, num_up=num_up), [str(t) for t in range(num_tasks)])
        sizes: list[int] = []
        own = {id(p) for p in layer.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.append(t.numel() if t.numel() > 200 and id(t) not in own else 0) or t, lambda t: t
            ),
            routing.opened(Forward(Route.of([0, 1, 0, 1], layer.task_names["default"]))),
        ):
            layer(torch.randn(4, 8, 16, requires_grad=True))
        return sum(sizes)

    assert saved(2, 1) == saved(50, 1)


def bank(linear: nn.Module, config, tasks=TASKS) -> BankLinear:
    linear.requires_grad_(False)
    out_features = linear.weight.shape[1] if isinstance(linear, Conv1D) else linear.out_features
    in_features = linear.weight.shape[0] if isinstance(linear, Conv1D) else linear.in_features
    layer = BankLinear(linear, "path.of.layer")
    adapter = config.build(in_features, out_features, len(tasks)).to(linear.weight.dtype)
    shake(adapter.parameters(), 0.5)
    layer.update_layer("default", adapter, tuple(tasks))
    layer.set_adapter("default")
    return layer


@pytest.mark.parametrize(
    "config", [peml.LoRA(r=3, use_rslora=True), peml.MTLLoRA(r=3, lambda_kind="diag"), peml.MTLLoRA(r=2)]
)
@pytest.mark.parametrize("linear", [lambda: nn.Linear(7, 5), lambda: nn.Linear(7, 5, bias=False), lambda: Conv1D(5, 7)])
def test_a_layer_equals_its_equation(config, linear) -> None:
    """For rows of tokens and for rows alone; the weight update too."""
    import dataclasses

    layer = bank(linear().double(), config)
    tensors = {name: p.detach() for name, p in layer.peml_adapter["default"].named_parameters()}
    update = references.ADAPTERS[type(config).__name__]
    ids = [2, 0]
    for shape in ((2, 3, 7), (2, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        with routing.opened(Forward(Route.of(ids, TASKS))):
            y = layer(x)
        by_token = x if x.ndim == 3 else x[:, None]
        expected = references.ReferenceLinear(
            layer.base_layer, lambda v, t: update(v, tensors, dataclasses.asdict(config), t),
            [[t] * by_token.shape[1] for t in ids],
        )(by_token)  # fmt: skip
        torch.testing.assert_close(y, expected.view(y.shape), rtol=1e-10, atol=1e-10)
    for task in range(3):
        layer.selected_task["default"] = task
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.base_layer.weight.shape
        delta = delta.T if isinstance(layer.base_layer, Conv1D) else delta
        columns = [update(e, tensors, dataclasses.asdict(config), task) for e in torch.eye(7, dtype=torch.float64)]
        torch.testing.assert_close(delta, torch.stack(columns, dim=1), rtol=1e-10, atol=1e-10)


def test_diagonal_equals_full_with_a_diagonal_matrix() -> None:
    full, diagonal = (bank(nn.Linear(7, 5), peml.MTLLoRA(r=3, lambda_kind=kind)) for kind in ("full", "diag"))
    one, other = full.peml_adapter["default"], diagonal.peml_adapter["default"]
    with torch.no_grad():
        one.transform.copy_(torch.diag_embed(other.transform))
        for name in ("down", "up", "routing"):
            getattr(one, name).copy_(getattr(other, name))
    for task in range(3):
        route = Route.of(task, TASKS)
        assert torch.equal(one.core(one.core_tensors(), route), other.core(other.core_tensors(), route))


class Doubling(nn.Linear):
    """A linear layer of someone else's, whose output is not `W x + b`: stands in for quantised ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_other_linear_layers_compute_their_own_output() -> None:
    torch.manual_seed(1)
    layer = bank(Doubling(7, 5).double(), peml.LoRA(r=2))
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    update = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(update, x @ layer.get_delta_weight("default").T, rtol=1e-10, atol=1e-10)
    layer(x).sum().backward()
    assert x.grad.any()
    with pytest.raises(PemlError, match=r"path\.of\.layer is a Doubling"):
        layer.merge()


@pytest.mark.parametrize("how", ["after", "before", "replaced"])
def test_a_hooked_linear_keeps_its_hook(how: str) -> None:
    """`accelerate` replaces the forward of layers whose weights it keeps elsewhere."""
    layer = bank(nn.Linear(7, 5), peml.LoRA(r=2))
    x, linear = torch.randn(2, 7), layer.base_layer
    plain, before = linear(x), layer(x)
    if how == "after":
        linear.register_forward_hook(lambda module, args, output: output + 1)
    elif how == "before":
        linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    else:
        linear.forward = lambda x: plain + 1
    torch.testing.assert_close(layer(x), before - plain + linear(x))


def test_a_base_layer_in_training_gets_its_gradient() -> None:
    layer = bank(nn.Linear(7, 5), peml.LoRA(r=2))
    layer.base_layer.requires_grad_(True)
    layer(torch.randn(2, 7)).sum().backward()
    assert layer.base_layer.weight.grad.any() and layer.base_layer.bias.grad.any()


@pytest.mark.parametrize(
    ("config", "per_linear", "total"),
    [
        (peml.LoRA(r=8), 65_536, 8_388_608),
        (peml.MTLLoRA(r=8, num_up=3), 131_608, 16_845_824),
        (peml.MTLLoRA(r=8, num_up=3, lambda_kind="diag"), 131_160, 16_788_480),
    ],
)
def test_counts_on_llama_2_7b(config, per_linear: int, total: int) -> None:
    """q, k, v, o of 32 layers, 8 tasks: the numbers that the papers' settings give."""
    assert config.num_parameters(4096, 4096, 8) == per_linear
    assert 128 * per_linear == total


def test_a_collapsed_prefix_counts_as_its_table() -> None:
    model = adapt(tiny(), prompt=peml.PrefixNAS(4, 1, 8, 4, 4), after=lambda tuner: tuner.collapse_prompt())
    config, slots = model.peft_config["default"].prompt, model.base_model.model.prompt_host.slots
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == config.num_parameters(slots, 3) == sum(config.num_virtual_tokens[0] * s.width for s in slots)
    model(input_ids=tokens())


@pytest.mark.parametrize("name", ["r", "lora_alpha", "num_up", "temperature"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(PemlError, match=f"adapter.{name} must be above 0, not 0"):
        peml.MTLLoRA(**{name: 0})


# Siblings


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
    assert sizes == [1, 3]


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
    peml.bank.group_siblings(model)
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
