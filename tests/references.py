"""Every method once more, slow and obvious: loops over rows, tokens, heads, tasks and experts.

Nothing here imports the package. Each function takes tensors by the names that they have in a checkpoint, and the
settings of the method, and follows the equation of the paper. The last part runs a whole unmodified model with these
functions in place of its linear layers and its attention.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, Any]
Prefix = tuple[Tensor, Tensor, Tensor]
"""Keys and values `[H, P, D]` and log-gates `[P]` of one layer."""


# Adapters: what is added to `W x` for one token of one task.


def lora(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """s B A x, with s = alpha / r or alpha / sqrt r."""
    r = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(r) if settings["use_rslora"] else r)
    update = 0
    for i in range(r):
        update = update + scale * tensors["up"][i] * (tensors["down"][i] @ x_I)
    return update


def mtl_lora(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """s [sum_i softmax(omega_t / tau)_i B_i] Lambda_t A x."""
    scale = settings["lora_alpha"] / settings["r"]
    hidden = tensors["down"] @ x_I
    transform = tensors["transform"][task]
    hidden = transform @ hidden if settings["lambda_kind"] == "full" else transform * hidden
    scores = [torch.exp(omega / settings["temperature"]) for omega in tensors["routing"][task]]
    update = 0
    for i, score in enumerate(scores):
        update = update + scale * score / sum(scores) * (tensors["up"][i].T @ hidden)
    return update


def _expert(x_I: Tensor, down_RI: Tensor, up_RO: Tensor) -> Tensor:
    """B A x, rank by rank."""
    return sum(up * (down @ x_I) for down, up in zip(down_RI, up_RO, strict=True))


def _shares(scores: Sequence[Tensor]) -> list[Tensor]:
    return [torch.exp(score) / sum(torch.exp(other) for other in scores) for score in scores]


def _selected(logits_K: Tensor) -> list[Tensor]:
    """Skills in evaluation: sigmoids that are made to sum to 1."""
    zeta = [1 / (1 + torch.exp(-logit)) for logit in logits_K]
    return [z / (sum(zeta) + 1e-12) for z in zeta]


def single_task_lora(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """LoRA with the task's own A and B."""
    return lora(x_I, {"down": tensors["down"][task], "up": tensors["up"][task]}, settings, task)


def multi_lora(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """s sum_i c_i * B_i A_i x."""
    update = 0
    for i in range(settings["num_parallel"]):
        output = _expert(x_I, tensors["down"][i], tensors["up"][i])
        update = update + settings["lora_alpha"] / settings["r"] * tensors["scale"][i] * output
    return update


def moe_lora(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """alpha / r sum_i softmax(W_g e_t)_i B_i A_i x, r the rank of all experts together."""
    shares = _shares([row @ tensors["embedding"][task] for row in tensors["gate"]])
    update = 0
    for i, share in enumerate(shares):
        output = _expert(x_I, tensors["down"][i], tensors["up"][i])
        update = update + settings["lora_alpha"] / settings["r"] * share * output
    return update


def cgc_lora(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """s [sum_i g_i B_i A_i x + sum_j g_{E+j} B_tj A_tj x], g = softmax(W_g e_t / tau) over the task's E + F experts."""
    if settings["gate"] == "table":
        scores = list(tensors["routing"][task])
    else:
        gate = tensors["gate"][task] if settings["gate"] == "per_task" else tensors["gate"]
        scores = [row @ tensors["embedding"][task] for row in gate]
    shares = _shares([score / settings["temperature"] for score in scores])
    update = 0
    for i, share in enumerate(shares):
        if i < settings["num_common"]:
            output = _expert(x_I, tensors["down"][i], tensors["up"][i])
        else:
            j = i - settings["num_common"]
            output = _expert(x_I, tensors["down_specific"][task, j], tensors["up_specific"][task, j])
        update = update + settings["lora_alpha"] / settings["r"] * share * output
    return update


def poly(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """1/r B_t A_t x with A_t, B_t averaged over skills, slice by slice of the features."""
    splits, skills, r = settings["n_splits"], settings["num_skills"], settings["r"]
    slices = x_I.view(splits, -1)
    hidden = 0
    for q in range(splits):
        z = _selected(tensors["routing"][task, q])
        hidden = hidden + sum(z[k] * tensors["down"][q, k] for k in range(skills)) @ slices[q]
    outputs = []
    for q in range(splits):
        z = _selected(tensors["routing"][task, q])
        outputs.append(sum(z[k] * tensors["up"][q, k] for k in range(skills)).T @ hidden / r)
    return torch.cat(outputs)


def c_poly(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """s [sum_i z_i B_i A_i x + sum_j w_j B_tj A_tj x]."""
    scale, update = settings["lora_alpha"] / settings["r"], 0
    if settings["num_common"]:
        for i, weight in enumerate(_selected(tensors["routing"][task])):
            update = update + scale * weight * _expert(x_I, tensors["down"][i], tensors["up"][i])
    for j in range(settings["num_specific"]):
        output = _expert(x_I, tensors["down_specific"][task, j], tensors["up_specific"][task, j])
        update = update + scale * tensors["weight_specific"][task, j] * output
    return update


def hydra_lora(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
    """s sum_i softmax(W_r x)_i B_i A x."""
    update = 0
    for i, share in enumerate(_shares([row @ x_I for row in tensors["router"]])):
        scale = settings["lora_alpha"] / settings["r"]
        update = update + scale * share * _expert(x_I, tensors["down"], tensors["up"][i])
    return update


Update = Callable[[Tensor, Tensors, Settings, int], Tensor]


def grouped(update: Update, groups: Sequence[Sequence[int]]) -> Update:
    """The update of the task's group, which counts its own tasks."""

    def of_group(x_I: Tensor, tensors: Tensors, settings: Settings, task: int) -> Tensor:
        for number, group in enumerate(groups):
            if task in group:
                mark = f"members.{number}."
                own = {key[len(mark) :]: value for key, value in tensors.items() if key.startswith(mark)}
                return update(x_I, own, settings, list(group).index(task))
        raise AssertionError(task)

    return of_group


ADAPTERS: dict[str, Update] = {
    "LoRA": lora,
    "SingleTaskLoRA": single_task_lora,
    "MTLLoRA": mtl_lora,
    "MultiLoRA": multi_lora,
    "MoELoRA": moe_lora,
    "CGCLoRA": cgc_lora,
    "Poly": poly,
    "CPoly": c_poly,
    "HydraLoRA": hydra_lora,
}


# Prompts: keys, values and log-gates of every layer for one task.


def prefix_tuning(tensors: Tensors, settings: Settings, shapes: Sequence[tuple[int, int]], task: int):
    """Free keys and values per layer; log-gates 0, or those that a collapsed search left behind."""
    lengths = settings["num_virtual_tokens"]
    lengths = [lengths] * len(shapes) if isinstance(lengths, int) else lengths
    layers = []
    for layer, length in enumerate(lengths):
        if length == 0:
            layers.append(None)
            continue
        if settings["prefix_projection"]:
            layers.append(_projected(tensors, settings, shapes, task, layer))
            continue
        row = task if settings["per_task"] else 0
        keys, values = tensors[f"keys.{layer}"][row], tensors[f"values.{layer}"][row]
        gate = tensors[f"log_gate_{layer}"] if settings["gated"] else torch.zeros(length, dtype=keys.dtype)
        layers.append((keys.transpose(0, 1), values.transpose(0, 1), gate))
    return layers


def _projected(tensors: Tensors, settings: Settings, shapes: Sequence[tuple[int, int]], task: int, layer: int):
    """Token by token: tanh(e W_1 + b_1) W_2 + b_2, of which a layer's part is its key's heads, then its value's."""
    first = sum(2 * heads * size for heads, size in shapes[:layer])
    heads, size = shapes[layer]
    keys, values = [], []
    for seed in tensors["embedding"][task if settings["per_task"] else 0]:
        hidden = torch.tanh(seed @ tensors["into"] + tensors["into_bias"])
        token = (hidden @ tensors["out"] + tensors["out_bias"])[first : first + 2 * heads * size]
        keys.append(torch.stack([token[h * size : (h + 1) * size] for h in range(heads)]))
        values.append(torch.stack([token[(heads + h) * size : (heads + h + 1) * size] for h in range(heads)]))
    gate = torch.zeros(len(keys), dtype=keys[0].dtype)
    return torch.stack(keys, dim=1), torch.stack(values, dim=1), gate


def prompt_tuning(tensors: Tensors, settings: Settings, task: int, text: Tensor) -> Tensor:
    """Q, or Q_t."""
    return tensors["tokens"][task if settings["per_task"] else 0]


def multitask_prompt(tensors: Tensors, settings: Settings, task: int, text: Tensor) -> Tensor:
    """Q .* sum over ranks of u v'."""
    u, v = tensors["by_token"][task], tensors["by_feature"][task]
    factor = sum(torch.outer(u[:, r], v[r]) for r in range(settings["num_ranks"]))
    return tensors["shared"] * factor


def attempt(tensors: Tensors, settings: Settings, task: int, text: Tensor) -> Tensor:
    """Q_t + sum_j a_j Q_j over the sources and Q_t itself."""
    own = tensors["tokens"][task]
    x = torch.stack([text[:, e].max() for e in range(text.shape[1])])
    hidden = tensors["down"] @ x
    h = tensors["up"] @ (hidden / (1 + torch.exp(-hidden)))
    h = (h - h.mean()) / torch.sqrt(h.var(unbiased=False) + 1e-5) * tensors["norm_weight"] + tensors["norm_bias"]
    candidates = [*tensors["sources"], own]
    scores = [torch.exp(candidate.max(0).values @ h / settings["temperature"]) for candidate in candidates]
    return own + sum(score / sum(scores) * candidate for score, candidate in zip(scores, candidates, strict=True))


def deep_multitask(tensors: Tensors, settings: Settings, shapes: Sequence[tuple[int, int]], task: int):
    """K .* (u v') and V .* (u v') in every layer."""
    layers = []
    for layer, (heads, size) in enumerate(shapes):
        both = []
        for kind in range(2):
            u, v = tensors[f"by_token.{layer}"][task, kind], tensors[f"by_feature.{layer}"][task, kind]
            factor = sum(torch.outer(u[:, r], v[r]) for r in range(settings["num_ranks"]))
            flat = tensors[f"shared.{layer}"][kind] * factor
            both.append(torch.stack([flat[:, h * size : (h + 1) * size] for h in range(heads)]))
        layers.append((*both, torch.zeros(settings["num_virtual_tokens"], dtype=both[0].dtype)))
    return layers


def prefix_nas(tensors: Tensors, settings: Settings, shapes: Sequence[tuple[int, int]], task: int):
    """Seed, cells and head; before the search is over every candidate counts by its weight, afterwards the chosen one."""
    found, searching = settings["architecture"], bool(tensors["choice"][0] < 0)
    start, end = settings["temperature"]
    temperature = start * math.exp(math.log(end / start) * float(tensors["progress"]))
    hidden = tensors["seed"] @ tensors["into"]
    for c in range(settings["num_cells"]):
        outputs = []
        for o, name in enumerate(settings["operations"] if found is None else [found["operations"][c]]):
            mark = f"cells.{c}.{o}."
            own = {key[len(mark) :]: value for key, value in tensors.items() if key.startswith(mark)}
            outputs.append(OPERATIONS[name](hidden, own))
        if searching:
            weights = _relaxed(tensors["alpha"][c], settings["relaxation"], temperature)
            hidden = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
        else:
            hidden = outputs[int(tensors["choice"][c])]
    ranks = [settings["head_rank"]] if isinstance(settings["head_rank"], int) else settings["head_rank"]
    made = [hidden @ tensors["head_in"][:, :q] @ tensors["head_out"][:q] for q in ranks]
    if searching and len(ranks) > 1:
        weights = _relaxed(tensors["head_alpha"], settings["relaxation"], temperature)
        flat = sum(weight * output for weight, output in zip(weights, made, strict=True))
    else:
        flat = made[int(tensors["head_choice"])]
    layers, column = [], 0
    exact = settings["exact_budget"] and settings["search_tokens"]
    shift = _shift(tensors, settings, shapes) if searching and exact else 0.0
    for layer, (heads, size) in enumerate(shapes):
        tokens = [j for j in range(len(hidden)) if tensors["kept"][layer, j]]
        if not tokens:
            # Of an architecture that was given, a layer without tokens has no part of the head.
            column += 2 * heads * size if found is None else 0
            layers.append(None)
            continue
        block = flat[:, column : column + 2 * heads * size]
        column += 2 * heads * size
        both = []
        for n in range(2):
            rows = []
            for h in range(heads):
                first = (n * heads + h) * size
                vectors = [block[j, first : first + size] for j in tokens]
                if settings["normalize_kv"]:
                    grown = torch.exp(tensors["log_size"][layer, n])
                    vectors = [vector / ((vector * vector).mean() + 1e-12).sqrt() * grown for vector in vectors]
                rows.append(torch.stack(vectors))
            both.append(torch.stack(rows))
        keys, values = both
        gates = []
        for j in tokens:
            log_gate = torch.zeros((), dtype=keys.dtype)
            soft = settings["gate_relaxation"] == "sigmoid"
            if searching or (settings["gate_after"] == "keep" and soft):
                own = [tensors[name] for name in ("token_gate", "layer_gate") if name in tensors]
                logits = [row[layer] if row.dim() == 1 else row[layer, j] + shift for row in own]
                gate = sum((_log_gate(logit, soft, temperature) for logit in logits), log_gate)
                log_gate = gate if searching else gate.detach()
            gates.append(log_gate + (tensors["strength"][layer] if "strength" in tensors else 0.0))
        layers.append((keys, values, torch.stack(gates)))
    return layers


def _relaxed(alpha: Tensor, kind: str, temperature: float) -> list[Tensor]:
    """Weights of the candidates, without noise; where one is drawn, it is 1 with a gradient as if soft, the rest gone."""
    if kind == "sigmoid":
        return [1 / (1 + torch.exp(-a)) for a in alpha]
    scores = [torch.exp(a / temperature) for a in alpha]
    soft = [score / sum(scores) for score in scores]
    if kind == "softmax":
        return soft
    best = max(range(len(soft)), key=lambda o: float(soft[o].detach()))
    return [weight + (1 - weight).detach() if o == best else torch.zeros_like(weight) for o, weight in enumerate(soft)]


def _log_gate(logit: Tensor, soft: bool, temperature: float) -> Tensor:
    if soft:
        return torch.log(torch.sigmoid(logit))
    weight = 1.0 if logit > 0 else 1e-9
    gate = torch.sigmoid(logit / temperature)
    return math.log(weight) + (gate - gate.detach()) / weight


def _shift(tensors: Tensors, settings: Settings, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """The root, found by halving, and then steps of Newton's method whose every number has its derivative."""
    beta = tensors["token_gate"]
    widths = [2 * heads * size for heads, size in shapes]
    budget = settings["budget_tokens"] * sum(widths)

    def excess(b: Tensor) -> Tensor:
        rows = [torch.sigmoid(beta[layer] + b).sum() * width for layer, width in enumerate(widths)]
        if "layer_gate" in tensors:
            rows = [torch.sigmoid(gamma) * row for gamma, row in zip(tensors["layer_gate"], rows, strict=True)]
        return sum(rows) - budget

    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if float(excess(torch.tensor(middle)).detach()) > 0 else (middle, high)
    b = torch.tensor(low, dtype=beta.dtype, requires_grad=True)
    for _ in range(3):
        b = b - excess(b) / torch.autograd.grad(excess(b), b, create_graph=True)[0]
    return b


def _rows(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda hidden: torch.stack([function(row) for row in hidden])


def _bottleneck(hidden: Tensor, own: Tensors) -> Tensor:
    def token(h: Tensor) -> Tensor:
        update = torch.clamp(h @ own["into"], min=0) @ own["out"]
        normal = (update - update.mean()) / torch.sqrt(update.var(unbiased=False) + 1e-5)
        return h + normal * own["scale"] + own["shift"]

    return _rows(token)(hidden)


def _mlp(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensors], Tensor]:
    return lambda hidden, own: _rows(lambda h: activation(h @ own["into"]) @ own["out"])(hidden)


def _convolution(hidden: Tensor, own: Tensors) -> Tensor:
    mixed, size = [], own["depth"].shape[2]
    for j in range(len(hidden)):
        places = [(k, j + k - size // 2) for k in range(size)]
        neighbours = [(k, i) for k, i in places if 0 <= i < len(hidden)]
        mixed.append(sum(own["depth"][:, 0, k] * hidden[i] for k, i in neighbours) @ own["point"])
    return torch.stack(mixed)


def _attention(hidden: Tensor, own: Tensors) -> Tensor:
    out = []
    for h in hidden:
        scores = [torch.exp((h @ own["query"]) @ (g @ own["key"]) / math.sqrt(len(h))) for g in hidden]
        mixed = sum(score / sum(scores) * (g @ own["value"]) for score, g in zip(scores, hidden, strict=True))
        out.append(h + mixed @ own["out"])
    return torch.stack(out)


OPERATIONS: dict[str, Callable[[Tensor, Tensors], Tensor]] = {
    "none": lambda hidden, own: 0 * hidden,
    "identity": lambda hidden, own: hidden,
    "linear": lambda hidden, own: _rows(lambda h: h @ own["weight"])(hidden),
    **{f"mlp_tanh_{m}": _mlp(lambda x: 2 / (1 + torch.exp(-2 * x)) - 1) for m in ("h/4", "h", "2h")},
    **{f"mlp_gelu_{m}": _mlp(lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2) for m in ("h/4", "h", "2h")},
    **{f"mlp_relu_{m}": _mlp(lambda x: torch.clamp(x, min=0)) for m in ("h/4", "h", "2h")},
    **{f"mlp_silu_{m}": _mlp(lambda x: x / (1 + torch.exp(-x))) for m in ("h/4", "h", "2h")},
    "res_bottleneck": _bottleneck,
    "conv3": _convolution,
    "conv5": _convolution,
    "self_attn": _attention,
    "gated": lambda hidden, own: _rows(lambda h: 1 / (1 + torch.exp(-(h @ own["gate"]))) * (h @ own["weight"]))(hidden),
    "lowrank_mul": lambda hidden, own: torch.stack(
        [h * own["by_token"][j] * own["by_feature"] for j, h in enumerate(hidden)]
    ),
}

PROMPTS: dict[str, Callable[..., list[Prefix | None]]] = {
    "PrefixTuning": prefix_tuning,
    "PrefixNAS": prefix_nas,
    "MultitaskPrompt": deep_multitask,
}

SOFT: dict[str, Callable[..., Tensor]] = {
    "PromptTuning": prompt_tuning,
    "MultitaskPrompt": multitask_prompt,
    "Attempt": attempt,
}
"""Prompts at the input: `[P, E]` of one task and one text `[S, E]`."""


# A whole model.


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scaling: float,
    prefix: Sequence[Prefix | None],
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax([cap(scale q K') + log g, cap(scale q k') + bias + mask]) [V; v], by row, by head, by query.

    A cap c makes of a score x the score c tanh(x / c); a sink is a score of its head that has no value; the bias is
    that of the positions of query and key, of which a prefix has none.

    Shapes:
        query `[B, H, S, D]`, key and value `[B, H_kv, K, D]`, visible `[B, S, K]`, sinks `[H]`, bias `[H, S, K]`
        -> `[B, S, H, D]`.
    """

    def score(q: Tensor, k: Tensor) -> Tensor:
        return q @ k if softcap is None else softcap * torch.tanh(q @ k / softcap)

    rows, heads, length, _ = query.shape
    shared = heads // key.shape[1]
    output = []
    for b in range(rows):
        for s in range(length):
            for h in range(heads):
                q = query[b, h, s] * scaling
                scores, values = [], []
                if prefix[b] is not None:
                    keys, stored, gate = prefix[b]
                    for j in range(keys.shape[1]):
                        scores.append(score(q, keys[h // shared, j]) + gate[j])
                        values.append(stored[h // shared, j])
                for k in range(key.shape[2]):
                    if visible[b, s, k]:
                        offset = 0 if bias is None else bias[h, s, k]
                        scores.append(score(q, key[b, h // shared, k]) + offset)
                        values.append(value[b, h // shared, k])
                if sinks is not None:
                    scores.append(sinks[h])
                    values.append(torch.zeros_like(value[b, 0, 0]))
                weights = torch.softmax(torch.stack(scores), dim=0)
                output.append(sum(w * v for w, v in zip(weights, values, strict=True)))
    return torch.stack(output).view(rows, length, heads, -1)


class ReferenceLinear(nn.Module):
    """A linear layer that computes token after token, each with the update of its own task."""

    def __init__(self, base: nn.Module, update: Callable[[Tensor, int], Tensor], tasks_BS: Sequence[Sequence[int]]):
        super().__init__()
        transposed = isinstance(base, Conv1D)
        self.weight_OI = base.weight.detach().T if transposed else base.weight.detach()
        self.bias = None if base.bias is None else base.bias.detach()
        self.update, self.tasks_BS = update, tasks_BS

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for row, tasks in zip(x, self.tasks_BS, strict=True):
            for token, task in zip(row, tasks, strict=True):
                y = self.weight_OI @ token + self.update(token, task)
                out.append(y if self.bias is None else y + self.bias)
        return torch.stack(out).view(*x.shape[:-1], -1)


def run(
    base: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    visible_BSK: Tensor,
    updates: Mapping[str, Callable[[Tensor, int], Tensor]],
    prefixes: Callable[[int], list[Prefix | None]] | None,
    tasks_BS: Sequence[Sequence[int]],
) -> Tensor:
    """Logits of `base` with updated linear layers (by module name) and with a prefix in every attention layer."""
    model = copy.deepcopy(base)
    for name, update in updates.items():
        parent, _, child = name.rpartition(".")
        target = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, ReferenceLinear(target, update, tasks_BS))
    by_row = [None if prefixes is None else prefixes(tasks[0]) for tasks in tasks_BS]
    calls = iter(range(10**6))

    def attend(module, query, key, value, mask, scaling=None, **kwargs):
        layer = next(calls)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        prefix = [None if row is None else row[layer] for row in by_row]
        return attention(query, key, value, visible_BSK, scaling, prefix), None

    AttentionInterface.register("reference", attend)
    AttentionMaskInterface.register("reference", lambda *args, **kwargs: None)
    model.set_attn_implementation("reference")
    return model(**inputs).logits
