"""Align-LoRA's loss against its formulas, and its way into training."""

import copy

import pytest
import torch
from torch import Tensor

import peml
from models import TASKS, adapt, assert_same, gradients, probe_loss, tiny, tokens
from peml import PemlError
from peml.adapters.align import BANDWIDTHS, divergence
from peml.routing import Route

IDS = [0, 2, 0, 2, 2, 0]


def features() -> Tensor:
    """Six rows of four tokens, R 3, each task with a mean and a spread of its own."""
    z = torch.randn(6, 4, 3, dtype=torch.float64)
    return z * torch.tensor([1.0, 0, 1.7])[IDS].view(-1, 1, 1) + torch.tensor([0.0, 0, 0.8])[IDS].view(-1, 1, 1)


def gaussian_kl(mean_i: float, var_i: float, mean_j: float, var_j: float) -> float:
    p, q = (torch.distributions.Normal(m, v**0.5) for m, v in ((mean_i, var_i), (mean_j, var_j)))
    return float(torch.distributions.kl_divergence(p, q))


def naive_kl(a: Tensor, b: Tensor) -> float:
    total = 0.0
    for r in range(a.shape[1]):
        (m, v), (n, w) = ((z[:, r].mean(), z[:, r].var(unbiased=False) + 1e-8) for z in (a, b))
        total += (gaussian_kl(m, v, n, w) + gaussian_kl(n, w, m, v)) / 2
    return total


def naive_mmd(a: Tensor, b: Tensor) -> float:
    def mean(u: Tensor, v: Tensor) -> float:
        values = [sum(float(torch.exp(-((x - y) ** 2).sum() / (2 * s))) for s in BANDWIDTHS) for x in u for y in v]
        return sum(values) / len(values)

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


NAIVE = {"kl": naive_kl, "mmd": naive_mmd}


@pytest.mark.parametrize("kind", NAIVE)
@pytest.mark.parametrize("padded", [False, True])
def test_pooled_over_valid_tokens(kind: str, padded: bool) -> None:
    z, mask = features(), torch.ones(6, 4)
    if padded:
        mask[1:, 3] = 0
    groups = [torch.stack([z[b, s] for b in range(6) for s in range(4) if IDS[b] == t and mask[b, s]]) for t in (0, 2)]
    found = divergence(z, Route.of(IDS, TASKS), mask if padded else None, kind, per_position=False)
    torch.testing.assert_close(float(found), NAIVE[kind](*groups), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", NAIVE)
def test_position_by_position(kind: str) -> None:
    z = features()
    by_position = [
        NAIVE[kind](*(torch.stack([z[b, s] for b in range(6) if IDS[b] == t]) for t in (0, 2))) for s in range(4)
    ]
    found = divergence(z, Route.of(IDS, TASKS), None, kind, per_position=True)
    torch.testing.assert_close(float(found), sum(by_position) / 4, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", NAIVE)
def test_three_tasks_are_averaged_over_pairs(kind: str) -> None:
    z, ids = features(), [0, 1, 2, 0, 1, 2]
    route = Route.of(ids, TASKS)
    pairs = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        rows = [b for b in range(6) if ids[b] in (i, j)]
        pairs.append(divergence(z[rows], Route.of([ids[b] for b in rows], TASKS), None, kind, False))
    torch.testing.assert_close(divergence(z, route, None, kind, False), torch.stack(pairs).mean())


@pytest.mark.parametrize("kind", NAIVE)
@pytest.mark.parametrize("per_position", [False, True])
def test_equal_features_have_no_distance_and_order_does_not_matter(kind: str, per_position: bool) -> None:
    z = features()
    same = torch.cat([z, z])
    route = Route.of([0] * 6 + [1] * 6, TASKS)
    torch.testing.assert_close(float(divergence(same, route, None, kind, per_position)), 0.0, rtol=0, atol=1e-6)
    order = [3, 1, 5, 0, 4, 2]
    shuffled = Route.of([IDS[i] for i in order], TASKS)
    torch.testing.assert_close(
        divergence(z[order], shuffled, None, kind, per_position),
        divergence(z, Route.of(IDS, TASKS), None, kind, per_position),
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("kind", NAIVE)
def test_too_few_samples_are_no_loss_not_nan(kind: str) -> None:
    z = features().requires_grad_()
    one_token = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    for tasks, mask, per_position in (("rte", None, False), ([0, 1], None, True), ([0, 1], one_token, False)):
        loss = divergence(z[:2], Route.of(tasks, TASKS), mask, kind, per_position)
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, z)
        assert not gradient.any()
    packed = Route.of([[0, 0, 1, 1], [2, 2, 1, 1]], TASKS)
    assert divergence(z[:2], packed, None, kind, False).isfinite()
    assert divergence(z.half() * 300, Route.of(IDS, TASKS), None, kind, False).isfinite()


def aligned(kind: str = "kl", **settings):
    model = adapt(tiny(), peml.LoRA(r=3, align=kind, align_weight=0.7, **settings))
    return model.train()


@pytest.mark.parametrize("kind", NAIVE)
def test_the_term_reaches_down_but_not_up_of_its_own_layer(kind: str) -> None:
    model, batch = aligned(kind), tokens(6)
    model(input_ids=batch, tasks=[TASKS[i] for i in IDS])
    losses = model.base_model._feature_losses
    assert len(losses) == 14
    own = model.base_model.model.model.layers[0].self_attn.q_proj.peml_adapter["default"]
    losses[0].backward(retain_graph=True)
    assert own.down.grad.any() and own.up.grad is None
    model.zero_grad()
    (term,) = model.base_model.penalties().values()
    torch.testing.assert_close(term, 0.7 * torch.stack(losses).mean())
    term.backward()
    found = gradients(model)
    assert all(found[name].any() for name in found if name.endswith("down"))


def test_padding_does_not_enter() -> None:
    model, batch = aligned(), tokens(6)
    mask = torch.ones_like(batch)
    mask[::2, -2:] = 0
    terms = []
    for _ in range(2):
        model(input_ids=batch, attention_mask=mask, tasks=[TASKS[i] for i in IDS])
        terms.append(model.base_model.penalties()["align"])
        batch = torch.where(mask.bool(), batch, 7)
    torch.testing.assert_close(*terms)


def test_checkpointing_counts_each_layer_once_and_right() -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = aligned()
        batch = tokens(6)
        if checkpointed:
            model.base_model.model.activation_checkpointing_enable()
        logits = model(input_ids=batch, tasks=[TASKS[i] for i in IDS]).logits
        terms = model.base_model.penalties()["align"]
        (probe_loss(logits) + terms).backward()
        assert len(model.base_model._feature_losses) == 14
        results.append(gradients(model))
    assert_same(*results, atol=1e-12)


def test_where_it_cannot_work_it_says_so() -> None:
    model, batch = aligned(), tokens(4)
    with pytest.raises(PemlError, match="tasks="):
        model(input_ids=batch)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(PemlError, match="use_reentrant"):
        model(input_ids=batch, tasks=["rte", "cola"] * 2)
    with pytest.raises(PemlError, match="align_weight"):
        peml.LoRA(align="kl", align_weight=0)
    with pytest.raises(PemlError, match="adapter.align must be none, kl or mmd"):
        peml.LoRA(align="wasserstein")


def test_it_is_a_plain_lora_without_training() -> None:
    torch.manual_seed(0)
    model, batch = aligned().eval(), tokens(4)
    logits = model(input_ids=batch).logits
    assert model.base_model.penalties() == {}
    torch.manual_seed(0)
    plain = adapt(tiny(), peml.LoRA(r=3))
    assert torch.equal(plain(input_ids=batch).logits, logits)


def test_a_model_can_be_copied_after_a_step_and_used_without_its_adapter() -> None:
    model, batch = aligned(), tokens(4)
    model(input_ids=batch, tasks=["rte", "cola"] * 2)
    twin = copy.deepcopy(model)
    assert twin.base_model.penalties() == {} and model.base_model.penalties()
    with model.disable_adapter():
        model(input_ids=batch)
    model.merge_adapter()
    model(input_ids=batch)
    assert model.base_model.penalties() == {}


class Detr(torch.nn.Module):
    """Queries and keys read one input, values another."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, torch.nn.Linear(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(2 * x)


def test_features_are_counted_once_and_of_the_input_that_was_read() -> None:
    model = adapt(Detr().double(), peml.LoRA(r=2, align="kl"), target_modules="all-linear").train()
    x = torch.randn(6, 4, 7).double()
    route = Route.of(IDS, TASKS)
    model(x, tasks=[TASKS[i] for i in IDS])
    found = [float(loss.detach()) for loss in model.base_model._feature_losses]
    layers = [getattr(model.base_model.model, name).peml_adapter["default"] for name in ("q_proj", "k_proj", "v_proj")]
    inputs = (x, x, 2 * x)
    wanted = [
        float(divergence((i @ a.down.T).detach(), route, None, "kl", False))
        for a, i in zip(layers, inputs, strict=True)
    ]
    assert found == pytest.approx(wanted)


def test_a_mask_of_another_shape_is_left_out() -> None:
    z, route = features(), Route.of(IDS, TASKS)
    other = torch.zeros(6, 9)
    assert torch.equal(divergence(z, route, other, "kl", False), divergence(z, route, None, "kl", False))
    assert divergence(z[:, 0], route, torch.ones(6, 4), "kl", False).isfinite()
