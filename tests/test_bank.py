"""The layer that hosts a bank: its equation, its precision, its base layer; the paper's counts."""

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
    config, shape = model.peft_config["default"].prompt, model.base_model.model.prompt_host.shape
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == config.num_parameters(shape, 3)
    assert trained == sum(config.num_virtual_tokens[0] * s.width for s in shape.slots)
    model(input_ids=tokens())


@pytest.mark.parametrize("name", ["r", "lora_alpha", "num_up", "temperature"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(PemlError, match=f"adapter.{name} must be above 0, not 0"):
        peml.MTLLoRA(**{name: 0})
