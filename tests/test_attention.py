"""The twin of the attention function by itself, and a prefix against a cache that holds it."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import peml
import references
from models import TASKS, adapt, gpt2, llama, probe_loss, qwen3, shake, tiny, tokens
from peml import PemlError, attention, routing
from peml.attention import PromptHost, attend, twin
from peml.attention.scores import attend_one
from peml.prompts import AttentionSlot, LayerPrefix, ModelShape
from peml.routing import Forward, Route

B, H, KV, D, P = 3, 4, 2, 6, 3


class Layer(nn.Module):
    """What the attention function sees of an attention layer."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_key_value_groups = H // KV
        host = PromptHost(ModelShape((AttentionSlot(KV, D),), 24), "sdpa", is_causal)
        host.peml_prompt["default"] = nn.Identity()
        host.set_adapter("default")
        self._peml_slot = (0, host)


def tensors(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, H, queries, D), (B, KV, keys, D), (B, KV, keys, D))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def prefix(groups: int = 1, gated: bool = True, p: int = P) -> LayerPrefix:
    keys, values = (torch.randn(groups, KV, p, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate = -torch.rand(p, dtype=torch.float64) * 3
    return LayerPrefix(keys, values, gate.requires_grad_() if gated else None)


def by_loop(layer: LayerPrefix, route: Route | None, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float):
    gate = torch.zeros(layer.num_tokens, dtype=torch.float64) if layer.log_gate is None else layer.log_gate
    rows = [0] * B if route is None else route.groups(B, q.device).tolist() * (B if len(route.ids) == 1 else 1)
    return references.attention(q, k, v, visible, scaling, [(layer.keys[g], layer.values[g], gate) for g in rows])


VISIBLE = {
    "causal": lambda s, k: torch.ones(s, k, dtype=torch.bool).tril(k - s).expand(B, s, k),
    "padded": lambda s, k: (
        torch.ones(s, k, dtype=torch.bool).tril(k - s).expand(B, s, k)
        & (torch.arange(k) >= torch.tensor([0, 2, 1])[:, None, None])
    ),
}


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (2, 5), (1, 1)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_formula(visible: str, queries: int, keys: int, gated: bool, scaling, kind: str, grad: bool) -> None:
    """softmax([scale q K' + log g, scale q k' + mask]) [V; v], with every way of giving the mask."""
    q, k, v = tensors(queries, keys)
    layer, seen = prefix(gated=gated), VISIBLE[visible](queries, keys)
    mask = (
        seen[:, None]
        if kind == "bool"
        else torch.zeros(seen[:, None].shape, dtype=q.dtype).masked_fill(~seen[:, None], -1e9)
    )
    with torch.set_grad_enabled(grad), routing.opened(Forward(None, {0: layer})):
        output, _ = attend("sdpa", Layer(), q, k, v, mask, scaling=scaling)
    alive = seen.any(-1)
    expected = by_loop(layer, None, q, k, v, seen, D**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(output[alive], expected[alive], rtol=1e-9, atol=1e-9)
    if not grad:
        return
    trained = [t for t in (q, k, v, *layer) if t is not None]
    found = torch.autograd.grad(probe_loss(output[alive]), trained)
    wanted = torch.autograd.grad(probe_loss(expected[alive]), trained)
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_no_mask(implementation: str, is_causal: bool, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To SDPA it means causal where the layer is, to the eager function that everything is visible."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(f"{__name__}.eager_attention_forward", modeling_llama.eager_attention_forward, raising=False)
    q, k, v = tensors(5, 5)
    layer = prefix(gated=gated)
    with routing.opened(Forward(None, {0: layer})):
        output, _ = attend(implementation, Layer(is_causal), q, k, v, None, scaling=0.5, dropout=0.0)
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen = seen.tril() if is_causal and implementation == "sdpa" else seen
    tolerance = 1e-9 if implementation == "sdpa" else 1e-6
    expected = by_loop(layer, None, q, k, v, seen.expand(B, 5, 5), 0.5)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


def test_a_longer_static_cache_without_a_mask() -> None:
    """Prefill of a static cache: the keys after the queries are empty places."""
    q, k, v = tensors(3, 5)
    layer = prefix()
    with routing.opened(Forward(None, {0: layer})):
        output, _ = attend("sdpa", Layer(), q, k, v, None)
    seen = torch.ones(3, 5, dtype=torch.bool).tril().expand(B, 3, 5)
    torch.testing.assert_close(output, by_loop(layer, None, q, k, v, seen, D**-0.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tasks", [["c", "a", "c"], ["b"], "a"])
def test_a_prefix_per_task(queries: int, grad: bool, tasks) -> None:
    route = Route.of(tasks, ["a", "b", "c"])
    q, k, v = tensors(queries, 4)
    layer = prefix(groups=len(route.present), gated=False)
    with torch.set_grad_enabled(grad), routing.opened(Forward(route, {0: layer})):
        output, _ = attend("sdpa", Layer(), q, k, v, VISIBLE["causal"](queries, 4)[:, None])
    expected = by_loop(layer, route, q, k, v, VISIBLE["causal"](queries, 4), D**-0.5)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tasks", [["c", "a", "c"], ["a", "b", "c"], ["b", "b", "a"]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_one_query_with_long_prefixes_per_task(tasks, padded: bool, gated: bool) -> None:
    """Rows are brought together by task, and put back: long enough for that, unlike in the test above."""
    route, p = Route.of(tasks, ["a", "b", "c"]), twin.WORTH_SORTING
    q, k, v = tensors(1, 4)
    layer = prefix(groups=len(route.present), gated=gated, p=p)
    seen = VISIBLE["padded" if padded else "causal"](1, 4)
    with routing.opened(Forward(route, {0: layer})):
        tables, rows = twin._tables(layer, q)
        output, _ = attend("sdpa", Layer(), q, k, v, seen[:, None])
    assert rows is not None and tables[0].data_ptr() == layer.keys.data_ptr()
    torch.testing.assert_close(output, by_loop(layer, route, q, k, v, seen, D**-0.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tasks", [None, ["c", "a", "c"]])
@torch.no_grad()
def test_one_query_in_half_precision(dtype: torch.dtype, tolerance: float, tasks) -> None:
    """Scores of hundreds of tokens are summed in fp32, a closed gate and a row of nothing but padding included."""
    route, p = None if tasks is None else Route.of(tasks, ["a", "b", "c"]), 300
    q, k, v = (t.to(dtype) for t in tensors(1, 5))
    layer = prefix(groups=1 if route is None else len(route.present), p=p)
    gate = layer.log_gate.masked_fill(torch.arange(p) % 3 == 0, -1e4)
    layer = LayerPrefix(layer.keys.to(dtype), layer.values.to(dtype), gate)
    seen = VISIBLE["padded"](1, 5).clone()
    seen[1] = False
    with routing.opened(Forward(route, {0: layer})):
        output, _ = attend("sdpa", Layer(), q, k, v, seen[:, None])
    exact = LayerPrefix(layer.keys.double(), layer.values.double(), gate)
    expected = by_loop(exact, route, q.double(), k.double(), v.double(), seen, D**-0.5)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv", [1, 2, 4])
@torch.no_grad()
def test_one_query_copies_neither_prefix_nor_cache(kv: int) -> None:
    """The largest tensor made on the way is that of the scores, whatever the number of rows."""
    rows, p, size, keys = 16, 64, 32, 48
    q, cache = torch.randn(rows, H, 1, size), [torch.randn(rows, kv, keys, size) for _ in range(2)]
    table = tuple(torch.randn(1, p, kv, size).transpose(1, 2) for _ in range(2))
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.append(result.untyped_storage().nbytes() // 4 if isinstance(result, Tensor) else 0)
            return result

    with Watch():
        attend_one(q, *cache, torch.ones(rows, 1, 1, keys, dtype=torch.bool), 0.1, table, None)
    # Views of what is given have its storage; everything else is a new tensor.
    given = {t.untyped_storage().nbytes() // 4 for t in (*cache, *table)}
    assert max(size for size in made if size not in given) == rows * H * (p + keys)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("trained", [True, False])
def test_the_prefix_is_a_set(queries: int, trained: bool) -> None:
    """Any order of its tokens, and a token whose gate is closed might as well not be there: exactly."""
    q, k, v = (t.detach() for t in tensors(queries, 4))
    layer, mask = prefix(), VISIBLE["causal"](queries, 4)[:, None]

    def run(keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
        gate = gate.detach().requires_grad_(trained)
        with torch.set_grad_enabled(trained), routing.opened(Forward(None, {0: LayerPrefix(keys, values, gate)})):
            return attend("sdpa", Layer(), q, k, v, mask)[0]

    whole, order = run(*layer), [2, 0, 1]
    permuted = run(layer.keys[:, :, order], layer.values[:, :, order], layer.log_gate[order])
    torch.testing.assert_close(permuted, whole, rtol=1e-12, atol=1e-12)
    closed = layer.log_gate.detach().clone()
    closed[1] = -1e4
    dropped = run(layer.keys[:, :, [0, 2]], layer.values[:, :, [0, 2]], layer.log_gate[[0, 2]])
    torch.testing.assert_close(run(layer.keys, layer.values, closed), dropped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_closed_gates_are_finite_in_half_precision(dtype: torch.dtype, trained: bool) -> None:
    """With a row that is nothing but padding, too."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors(4, 4))
    layer = prefix()
    gate = torch.tensor([-1e4, -2.0, -1e4]).requires_grad_(trained)
    seen = VISIBLE["causal"](4, 4).clone()
    seen[1] = False
    with routing.opened(Forward(None, {0: LayerPrefix(layer.keys, layer.values, gate)})):
        output, _ = attend("sdpa", Layer(), q, k, v, seen[:, None])
    output.float().square().sum().backward()
    assert output.isfinite().all()
    for tensor in (q, k, v, layer.keys, layer.values) + ((gate,) if trained else ()):
        assert tensor.grad.isfinite().all()


def test_dropout_is_not_lost_on_one_query() -> None:
    """Monte-Carlo dropout: one query, no gradient, and still noise."""
    q, k, v = (t.detach() for t in tensors(1, 4))
    with torch.no_grad(), routing.opened(Forward(None, {0: prefix()})):
        draws = [attend("sdpa", Layer(), q, k, v, None, dropout=0.5)[0] for _ in range(2)]
    assert not torch.equal(*draws)


def test_a_layer_outside_its_model_says_so() -> None:
    with pytest.raises(PemlError, match="outside its model's forward"):
        attend("sdpa", Layer(), *tensors(2, 2), None)


@pytest.mark.parametrize("build", [llama, qwen3])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_prefix_equals_a_cache_that_holds_it(build, padded: bool) -> None:
    """The older way, with explicit position ids, on rotary models."""
    base = build().double().eval()
    plain = copy.deepcopy(base)
    model, batch = adapt(base, prompt=peml.PrefixTuning(P)), tokens(2, 5)
    mask = torch.ones(2, 5, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    table, cache = model.base_model.prompt, DynamicCache(config=plain.config)
    for layer in range(2):
        keys, values = (part[str(layer)].transpose(1, 2).expand(2, -1, -1, -1) for part in (table.keys, table.values))
        cache.update(keys.clone(), values.clone(), layer)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = torch.cat([torch.ones(2, P, dtype=torch.long), mask], dim=1)
    expected = plain(input_ids=batch, attention_mask=whole, position_ids=positions, past_key_values=cache).logits
    found = model(input_ids=batch, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-10, atol=1e-10)


def test_slots_follow_the_keys_not_the_config() -> None:
    for base, slot in ((llama(), (2, 6)), (qwen3(), (1, 10)), (gpt2(), (4, 9))):
        model = adapt(base, prompt=peml.PrefixTuning(2))
        assert [(s.num_heads, s.head_dim) for s in model.base_model.model.prompt_host.slots] == [slot] * 2


def test_the_cache_is_the_users() -> None:
    """It never holds the prefix, and its length is that of the text."""
    model, batch = adapt(tiny(), prompt=peml.PrefixTuning(P)), tokens(1, 5)
    out = model(input_ids=batch, use_cache=True)
    assert out.past_key_values.get_seq_length() == 5
    assert out.past_key_values.layers[0].keys.shape == (1, 2, 5, 6)


@torch.no_grad()
def test_a_sliding_window_never_evicts_the_prefix() -> None:
    """Generation far beyond the window equals a loop without a cache, and the prefix counts to the end."""
    config = Qwen3Config(
        vocab_size=67, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=3, head_dim=10,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=3, pad_token_id=1, bos_token_id=None,
        layer_types=["sliding_attention"] * 2, eos_token_id=None,
    )  # fmt: skip
    base = Qwen3ForCausalLM(config).double().eval()
    shake(base.parameters(), 0.2)
    first, batch = tokens(1, 8), tokens(1, 8)
    batch[:, 1:] = first[:, 1:]
    batch[:, 0] = (first[:, 0] + 1) % 60 + 2
    assert torch.equal(base(input_ids=first).logits[:, -1], base(input_ids=batch).logits[:, -1]), "no window here"
    model = adapt(base, prompt=peml.PrefixTuning(P))
    row = batch
    for _ in range(5):
        row = torch.cat([row, model(input_ids=row, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(batch, max_new_tokens=5, do_sample=False), row)
    before = model(input_ids=batch).logits[:, -1]
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=batch).logits[:, -1], before)


def test_installing_twice_over_a_life() -> None:
    """Attach, unload, attach again: the implementation comes back each time."""
    base = tiny()
    for _ in range(2):
        host = attention.install(base)
        assert base.config._attn_implementation == "peml_sdpa" and len(host.slots) == 2 and host.causal
        attention.uninstall(base, host)
        assert base.config._attn_implementation == "sdpa"
    assert not attention.install(tiny("bert")).causal


def test_gates_start_as_stated() -> None:
    """The whole prefix weighs as much as e^-c tokens of equal score, times how far gates are open."""
    prompt = peml.PrefixNAS(num_virtual_tokens=16, gate_init=2.0, exact_budget=False).build(
        ModelShape((AttentionSlot(KV, D),), 24), len(TASKS)
    )
    weight = prompt.log_gates().exp().sum().item()
    is_open = 1 / (1 + math.exp(-2)) / (1 + math.exp(-4))
    assert weight == pytest.approx(math.exp(-2.0) * is_open, rel=1e-5)
