"""Where the variants are attached: a frozen module with its inputs, and a fresh copy of it for every variant.

Copies, because variants that share one weight would find it in the cache that the one before has filled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import FLOOR, TWIN, Outputs, Variant

if TYPE_CHECKING:
    from peml.adapters import AdapterConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = 1000
"""Small, or the head, which no adapter touches, would hide the differences."""


class Stack(nn.Module):
    """Linear layers in a row, as a model has them: each of its own weight."""

    def __init__(self, width: int, out: int, depth: int = 1) -> None:
        super().__init__()
        widths = [width] + [out] * depth
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(i, o, bias=False)}) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["proj"](x)
        return x


class Siblings(nn.Module):
    """Projections of one input, e.g. queries, keys and values, called one after the other as transformers does."""

    def __init__(self, width: int, outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.names = tuple(outputs)
        for name, out in outputs.items():
            setattr(self, name, nn.Linear(width, out, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in self.names)


class Block(nn.Module):
    """A group of siblings inside a model, where PEFT looks for them."""

    def __init__(self, width: int, outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.block = Siblings(width, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.block(x)


def llama(width: int, layers: int, heads: int, intermediate: int, kv_heads: int | None = None) -> nn.Module:
    """A Llama with random weights; `kv_heads`: of keys and values, where they are fewer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=2048, use_cache=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


@dataclass(frozen=True)
class Site:
    """A frozen module, its inputs and the tasks of its rows.

    Args:
        base: never run itself; variants get copies.
        targets: `target_modules`, as PEFT takes them.
        args, kwargs: of the call.
        ids: task of every row.
        num_tasks: T; `ids` need not use them all.
        train: gradients flow through `args` and `kwargs` that require them, and dropout is on.
        outputs: what of the module's output is looked at.
        calls: what of the module is called; itself, unless said otherwise.
    """

    base: nn.Module
    targets: list[str] | str | None
    ids: list[int]
    num_tasks: int
    train: bool
    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Callable[[Any], Outputs] = lambda output: output
    calls: Callable[[Any], Callable[..., Any]] = lambda module: module

    def __post_init__(self) -> None:
        self.base.requires_grad_(False)

    def copy(self) -> nn.Module:
        """The frozen module once more, in memory of its own."""
        return copy.deepcopy(self.base)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return next(self.base.parameters()).dtype

    def variant(self, name: str, module: nn.Module, kind: Any, against: str | None = None, **call: Any) -> Variant:
        """Calls of `module` with this site's inputs and the keywords `call`."""
        module.train(self.train)
        shake(module)
        args, kwargs, outputs, run = self.args, {**self.kwargs, **call}, self.outputs, self.calls(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        inputs = [t for t in (*args, *self.kwargs.values()) if t.requires_grad]
        return Variant(
            name,
            lambda: outputs(run(*args, **kwargs)),
            kind,
            leaves=(*trained, *inputs),
            held=(*module.parameters(), *module.buffers()),
            against=against,
        )

    def floors(self) -> list[Variant]:
        """The frozen module and its twin."""
        return [self.variant(name, self.copy(), "floor") for name in (FLOOR, TWIN)]

    def attach(self, adapter: AdapterConfig | None, num_tasks: int | None = None, **config: Any) -> nn.Module:
        """A copy with a peml adapter."""
        # Imported here: the environment of adapterhub.py, which needs the rest of this file, has neither.
        from peft import get_peft_model

        import peml

        names = [f"task{i}" for i in range(num_tasks or self.num_tasks)]
        # Their own list: PEFT writes into the one that it is given.
        targets = list(self.targets) if isinstance(self.targets, list) else self.targets
        settings = peml.PemlConfig(task_names=names, adapter=adapter, target_modules=targets, **config)
        return get_peft_model(self.copy(), settings)

    def peml(
        self,
        name: str,
        adapter: AdapterConfig,
        against: str | None = None,
        num_tasks: int | None = None,
        **config: Any,
    ) -> Variant:
        """A peml adapter; every row names its task, whether or not the method uses it."""
        module = self.attach(adapter, num_tasks, **config)
        found = self.variant(name, module, "peml", against, tasks=self.ids)
        return replace(found, setting=repr(adapter))


def shake(module: nn.Module) -> None:
    """Move trainable weights off their zero start, so that no gradient is exactly zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def rows_of_tasks(rows: int, present: Sequence[int]) -> list[int]:
    """A task for each row, unsorted: `present` in a fixed mixed order, repeated."""
    mixed = [*present[::2], *present[1::2]]
    return [mixed[i % len(mixed)] for i in range(rows)]


def layer_site(
    width: int, out: int, tokens: int, dtype: str, *, ids: list[int], num_tasks: int, train: bool, depth: int = 1
) -> Site:
    """A stack of linears on `tokens` tokens in as many rows as there are `ids`."""
    base = Stack(width, out, depth).to(DTYPES[dtype])
    x = torch.randn(len(ids), tokens // len(ids), width, dtype=DTYPES[dtype]).requires_grad_(train)
    return Site(base, ["proj"], ids, num_tasks, train, args=(x,))


def group_site(
    width: int, outputs: Mapping[str, int], tokens: int, dtype: str, *, ids: list[int], num_tasks: int
) -> Site:
    """Sibling projections of one input, with gradients."""
    base = Block(width, outputs).to(DTYPES[dtype])
    x = torch.randn(len(ids), tokens // len(ids), width, dtype=DTYPES[dtype]).requires_grad_()
    return Site(base, list(outputs), ids, num_tasks, True, args=(x,))


def llama_site(
    base: nn.Module, rows: int, length: int, dtype: str, *, ids: list[int], num_tasks: int, train: bool
) -> Site:
    """A Llama on embeddings. With gradients these require one, so that the floor too runs backward to its first layer.

    Otherwise the frozen floor would stop at the head, and every adapter would be charged for the base's own backward.
    """
    base = base.to(DTYPES[dtype])
    embedded = torch.randn(rows, length, base.config.hidden_size, dtype=DTYPES[dtype])
    if not train:
        return Site(
            base, "all-linear", ids, num_tasks, False, kwargs={"inputs_embeds": embedded}, outputs=lambda o: o.logits
        )
    labels = torch.randint(base.config.vocab_size, (rows, length))
    kwargs = {"inputs_embeds": embedded.requires_grad_(), "labels": labels}
    return Site(base, "all-linear", ids, num_tasks, True, kwargs=kwargs, outputs=lambda o: o.loss)
