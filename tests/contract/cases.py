"""Every adapter with every prompt, in small configurations: the tests of this folder run over all of them.

The list is made from the package's tables: a new method is in the contract as soon as it has a small configuration
here, and fails the first test below as long as it has none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel

import peml
from models import TASKS, adapt, tiny
from peml import PemlModel

Adjust = Callable[[PemlModel], None]


def open_and_close(model: PemlModel) -> None:
    """Spread the gates, so that a search has something to delete."""
    with torch.no_grad():
        model.prompt.token_gate.add_(torch.randn_like(model.prompt.token_gate) * 2)
    model.prompt.set_progress(0.4)


def derived(model: PemlModel) -> None:
    open_and_close(model)
    model.prompt.derive()


def collapsed(model: PemlModel) -> None:
    open_and_close(model)
    model.collapse_prompt()


def sized(model: PemlModel) -> None:
    """Sources that are not all but zero."""
    model.prompt.sources.copy_(torch.randn_like(model.prompt.sources))


SMALL_NAS: dict[str, Any] = {
    "num_virtual_tokens": 4, "num_cells": 2, "width": 10, "embedding_dim": 6, "head_rank": 4, "gate_init": 0.5,
    "budget_tokens": 2.5,
}  # fmt: skip

FOUND = peml.prompts.Architecture(
    operations=("conv3", "mlp_gelu_h"), tokens=((0, 3), (1,)), derived=True, num_virtual_tokens=4, width=10,
    embedding_dim=6, head_rank=3,
)  # fmt: skip

SMALL_ADAPTERS: dict[str, peml.adapters.AdapterConfig | None] = {
    "none": None,
    "LoRA": peml.LoRA(r=3, lora_alpha=5),
    "LoRA-rs": peml.LoRA(r=3, lora_alpha=2, use_rslora=True),
    "MTLLoRA": peml.MTLLoRA(r=3, num_up=2, lora_alpha=4),
    "MTLLoRA-diag-random": peml.MTLLoRA(r=2, temperature=0.7, lambda_kind="diag", routing_init="random"),
    "SingleTaskLoRA": peml.SingleTaskLoRA(r=3, lora_alpha=2, use_rslora=True),
    "MultiLoRA": peml.MultiLoRA(r=2, lora_alpha=3, num_parallel=2),
    "MoELoRA": peml.MoELoRA(r=6, lora_alpha=4, num_experts=3, task_dim=4),
    "CGCLoRA": peml.CGCLoRA(r=6, num_common=2, num_specific=1, lora_alpha=4, task_dim=4, temperature=0.7),
    "CGCLoRA-per-task": peml.CGCLoRA(r=3, num_common=1, num_specific=2, gate="per_task", task_dim=3),
    "CGCLoRA-table-total": peml.CGCLoRA(r=10, num_common=2, num_specific=1, gate="table", rank_mode="total"),
    "Poly": peml.Poly(r=2, num_skills=3),
    "MHR": peml.Poly(r=3, num_skills=2, n_splits=2),
    "CPoly": peml.CPoly(r=2, num_common=2, num_specific=2, lora_alpha=3),
    "HydraLoRA": peml.HydraLoRA(r=2, num_heads=3, lora_alpha=4),
}

WITH_ALL_PROMPTS = ("none", "LoRA", "LoRA-rs", "MTLLoRA", "MTLLoRA-diag-random")
"""These meet every prompt. Prompt and adapter do not touch each other, so the rest meets the largest one only."""

SMALL_PROMPTS: dict[str, tuple[peml.prompts.PromptConfig | None, Adjust | None]] = {
    "none": (None, None),
    "PrefixTuning": (peml.PrefixTuning(num_virtual_tokens=3), None),
    "PrefixTuning-lengths": (peml.PrefixTuning(num_virtual_tokens=(0, 3)), None),
    "PrefixTuning-per-task": (peml.PrefixTuning(num_virtual_tokens=(2, 3), per_task=True), None),
    "PrefixTuning-projected": (peml.PrefixTuning(3, prefix_projection=True, encoder_hidden_size=5), None),
    "PrefixTuning-projected-per-task": (
        peml.PrefixTuning(2, per_task=True, prefix_projection=True, encoder_hidden_size=5),
        None,
    ),
    "PromptTuning": (peml.PromptTuning(3), None),
    "PromptTuning-per-task": (peml.PromptTuning(2, per_task=True, prompt_tuning_init="random"), None),
    "MultitaskPrompt": (peml.MultitaskPrompt(3), None),
    "MultitaskPrompt-rank2": (peml.MultitaskPrompt(2, num_ranks=2), None),
    "MultitaskPrompt-deep": (peml.MultitaskPrompt(3, num_ranks=2, deep=True), None),
    "Attempt": (peml.Attempt(3, num_sources=2, projection_dim=5, temperature=0.7), sized),
    "PrefixNAS": (peml.PrefixNAS(**SMALL_NAS), open_and_close),
    "PrefixNAS-keep": (peml.PrefixNAS(**SMALL_NAS), derived),
    "PrefixNAS-unit": (peml.PrefixNAS(**SMALL_NAS, gate_after="unit", gate_threshold=0.2), derived),
    "PrefixNAS-collapsed": (peml.PrefixNAS(**SMALL_NAS), collapsed),
    "PrefixNAS-gumbel": (peml.PrefixNAS(**SMALL_NAS, relaxation="gumbel"), open_and_close),
    "PrefixNAS-sigmoid": (peml.PrefixNAS(**SMALL_NAS, relaxation="sigmoid"), open_and_close),
    "PrefixNAS-straight": (peml.PrefixNAS(**SMALL_NAS, gate_relaxation="straight_through"), open_and_close),
    "PrefixNAS-straight-keep": (peml.PrefixNAS(**SMALL_NAS, gate_relaxation="straight_through"), derived),
    "PrefixNAS-priced": (peml.PrefixNAS(**SMALL_NAS, exact_budget=False), open_and_close),
    "PrefixNAS-priced-keep": (peml.PrefixNAS(**SMALL_NAS, exact_budget=False), derived),
    "PrefixNAS-any-size": (peml.PrefixNAS(**SMALL_NAS, normalize_kv=False), open_and_close),
    "PrefixNAS-ranks": (peml.PrefixNAS(**SMALL_NAS | {"head_rank": (2, 4, 1)}), open_and_close),
    "PrefixNAS-ranks-keep": (peml.PrefixNAS(**SMALL_NAS | {"head_rank": (2, 4, 1)}), derived),
    "PrefixNAS-fixed": (peml.PrefixNAS(**SMALL_NAS, search_tokens=False, search_layers=False), None),
    "PrefixNAS-imported": (peml.PrefixNAS(gate_init=0.5, architecture=FOUND), None),
    "PrefixNAS-random": (peml.PrefixNAS(**SMALL_NAS, architecture="random:3"), None),
}

SEARCHES = tuple(name for name in SMALL_PROMPTS if name.startswith("PrefixNAS-"))
"""Variants of one prompt: they meet two adapters."""


GROUPS: dict[str, Any] = {
    "": None,
    "clusters": [["rte", "cola"], ["sst2"]],
    "progressive": [{"until": 0.5, "groups": [["cola"], ["sst2", "rte"]]}, {"until": 1, "groups": "each"}],
    "shared-below": [{"until": 0.5, "groups": "all"}, {"until": 1, "groups": [["rte"], ["sst2", "cola"]]}],
}
"""Which tasks share an adapter: in all of the two layers, and by depth."""


@dataclass(frozen=True)
class Case:
    """One point of the product."""

    adapter_name: str
    prompt_name: str
    groups_name: str = ""

    @property
    def name(self) -> str:
        return f"{self.adapter_name}+{self.prompt_name}" + (f"@{self.groups_name}" if self.groups_name else "")

    @property
    def groups(self) -> Any:
        return GROUPS[self.groups_name]

    @property
    def adapter_needs_task(self) -> bool:
        return self.adapter is not None and (self.adapter.needs_task or self.groups is not None)

    @property
    def adapter(self) -> Any:
        return SMALL_ADAPTERS[self.adapter_name]

    @property
    def prompt(self) -> Any:
        return SMALL_PROMPTS[self.prompt_name][0]

    @property
    def needs_task(self) -> bool:
        return self.adapter_needs_task or (self.prompt is not None and self.prompt.needs_task)

    @property
    def drawn(self) -> bool:
        """Whether weights are drawn at random in training."""
        searched = self.prompt_name in ("PrefixNAS-gumbel", "PrefixNAS-straight")
        return isinstance(self.adapter, peml.Poly | peml.CPoly) or searched

    @property
    def generated(self) -> bool:
        """Whether all layers' prefixes come from one graph."""
        table = self.prompt_name.startswith("PrefixTuning") and "projected" not in self.prompt_name
        return not table and self.prompt_name != "none" and "collapsed" not in self.prompt_name

    @property
    def at_input(self) -> bool:
        """Whether the model makes the prefix, of embeddings."""
        return self.prompt is not None and self.prompt.at_input

    def rounding(self, family: str = "llama") -> dict[str, float]:
        """Bounds for gradients of rows that share a run of a prompt, against rows apart.

        RMS norms compute in single precision, on their way back too.
        """
        return {"atol": 1e-5, "rtol": 1e-4} if self.at_input and family != "gpt2" else {"atol": 1e-8}

    @property
    def reads_input(self) -> bool:
        """Whether every text has a prompt of its own."""
        return isinstance(self.prompt, peml.Attempt)

    def check_steps(self) -> None:
        """Skip what compares with a text that grows, and its prompt with it."""
        if self.reads_input:
            pytest.skip("made from the text as it is when generation begins: see test_soft_prompts.py")

    def build(self, family: str = "llama", tasks: list[str] = TASKS, **options: Any) -> PeftModel:
        base = options.pop("base", None)
        base = tiny(family) if base is None else base
        options.setdefault("groups", self.groups)
        return adapt(base, self.adapter, self.prompt, tasks, SMALL_PROMPTS[self.prompt_name][1], **options)


CASES = [
    Case(a, p)
    for a in SMALL_ADAPTERS
    for p in SMALL_PROMPTS
    if (a, p) != ("none", "none")
    and (a in WITH_ALL_PROMPTS or p in ("none", "PrefixNAS"))
    and (a in ("none", "MTLLoRA") or p not in SEARCHES)
]
# Groups know nothing of prompts: one meets them.
CASES += [
    Case(a, "none", g)
    for a in SMALL_ADAPTERS
    for g in ("clusters", "progressive")
    if a not in ("none", "CGCLoRA-table-total")
]
CASES += [Case("LoRA", "none", "shared-below"), Case("MTLLoRA", "PrefixTuning-per-task", "clusters")]

# For other model families and for slow checks: every adapter and every prompt at least once, alone and together.
FEW = [
    Case("LoRA", "none"),
    Case("MTLLoRA", "none"),
    Case("none", "PrefixTuning-lengths"),
    Case("none", "PrefixNAS"),
    Case("MTLLoRA", "PrefixNAS-keep"),
    Case("none", "PrefixNAS-imported"),
    Case("MTLLoRA-diag-random", "PrefixTuning-per-task"),
    Case("LoRA", "PrefixTuning-projected-per-task"),
    Case("none", "PromptTuning"),
    Case("MTLLoRA", "PromptTuning"),
    Case("LoRA", "MultitaskPrompt"),
    Case("none", "MultitaskPrompt-deep"),
    Case("LoRA", "none", "progressive"),
    Case("CGCLoRA", "none", "clusters"),
    *(Case(a, "none") for a in SMALL_ADAPTERS if a not in WITH_ALL_PROMPTS and not a.startswith("CGCLoRA-")),
]

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
few_cases = pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
