"""Named points of the three axes: adapter x prompt x regime. A row is two lines, never a class."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from peml.adapters import (
    AdapterConfig,
    CGCLoRA,
    CPoly,
    HydraLoRA,
    LoRA,
    MoELoRA,
    MTLLoRA,
    MultiLoRA,
    Poly,
    SingleTaskLoRA,
)
from peml.config import PemlConfig, changed
from peml.errors import PemlError
from peml.heads import Heads
from peml.prompts import Attempt, MultitaskPrompt, PrefixNAS, PrefixTuning, PromptConfig, PromptTuning


@dataclass(frozen=True)
class Method:
    """A named combination.

    Args:
        adapter, prompt: what is attached; None: nothing.
        regime: how the parts are trained.
        summary: what it is and where it comes from, in one line.
    """

    adapter: AdapterConfig | None
    prompt: PromptConfig | None
    regime: str
    summary: str

    @property
    def folds(self) -> str:
        """Whether the adapter is a plain LoRA, to merge and to export: once, per task, or not at all."""
        if self.adapter is None:
            return "-"
        if not self.adapter.foldable:
            return "no"
        return "per task" if self.adapter.needs_task else "once"


METHODS: dict[str, Method] = {
    "lora": Method(LoRA(), None, "joint", "one low-rank update for all tasks (arXiv:2106.09685)"),
    "align-lora": Method(LoRA(lora_alpha=32, align="kl"), None, "joint", "LoRA with features alike (arXiv:2508.05078)"),
    "single-task": Method(SingleTaskLoRA(), None, "joint", "a LoRA of its own for every task"),
    "mtl-lora": Method(MTLLoRA(), None, "joint", "low-rank update with a transform per task (arXiv:2410.09437)"),
    "multi-lora": Method(MultiLoRA(), None, "joint", "parallel LoRAs, scaled per feature (arXiv:2311.11501)"),
    "moe-lora": Method(MoELoRA(), None, "joint", "experts under a gate that sees the task (arXiv:2310.18339)"),
    "cgc-lora": Method(CGCLoRA(), None, "joint", "common experts and own ones per task (arXiv:2402.01684)"),
    "one-plus-n": Method(CGCLoRA(), None, "one_plus_n", "CGC-LoRA by cluster of tasks (arXiv:2402.01684)"),
    "progressive": Method(LoRA(), None, "progressive", "LoRA split by depth: all, clusters, each (arXiv:2509.19602)"),
    "poly": Method(Poly(), None, "joint", "tasks average the factors of skills (arXiv:2202.13914)"),
    "mhr": Method(Poly(n_splits=4), None, "joint", "the same by slices of the features (arXiv:2211.03831)"),
    "c-poly": Method(CPoly(), None, "joint", "common skills and own ones per task (arXiv:2312.03248)"),
    "hydra-lora": Method(HydraLoRA(), None, "joint", "up-projections mixed by token (arXiv:2404.19245)"),
    "prefix": Method(None, PrefixTuning(), "joint", "free keys and values in every layer (arXiv:2101.00190)"),
    "prompt-tuning": Method(None, PromptTuning(), "joint", "soft tokens before the text (arXiv:2104.08691)"),
    "mpt": Method(None, MultitaskPrompt(), "distil_then_adapt", "one prompt times factors per task (arXiv:2303.02861)"),
    "attempt": Method(None, Attempt(), "distil_then_adapt", "prompts mixed by the text (arXiv:2205.11961)"),
    "lora+prefix": Method(LoRA(), PrefixTuning(), "joint", "both, the baseline that PEML has to beat"),
    "prefix-nas": Method(None, PrefixNAS(), "joint", "a searched prefix alone"),
    "peml": Method(LoRA(), PrefixNAS(), "joint", "LoRA and a searched prefix, trained together (arXiv:2605.14055)"),
    "peml+mtl": Method(MTLLoRA(), PrefixNAS(), "joint", "a searched prefix with MTL-LoRA in place of LoRA"),
}
"""Every method that a recipe can name."""


WHERE = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fuse_mlp",
    "groups",
)
"""Fields of `PemlConfig` that a recipe can set beside those of adapter and prompt."""


def method(
    name: str, task_names: Sequence[str], settings: Mapping[str, Any] | None = None, **config: Any
) -> PemlConfig:
    """The configuration of a named method.

    Args:
        name: a key of `METHODS`.
        task_names: names of the tasks.
        settings: changes by dotted key, e.g. `{"adapter.r": 16, "prompt.num_virtual_tokens": 32}`.
        config: further fields of `PemlConfig`, e.g. `target_modules`.

    Raises:
        PemlError: an unknown method or setting.
    """
    row = named(name)
    parts: dict[str, Any] = {"adapter": row.adapter, "prompt": row.prompt, "heads": config.pop("heads", None)}
    by_axis: dict[str, dict[str, Any]] = {"adapter": {}, "prompt": {}, "heads": {}}
    for key, value in (settings or {}).items():
        axis, dot, setting = str(key).partition(".")
        if dot and axis in by_axis:
            by_axis[axis][setting] = value
        elif key in by_axis and isinstance(value, Mapping):
            by_axis[key] |= value
        elif key in WHERE:
            config[key] = value
        else:
            raise PemlError(
                f"set.{key} is unknown: write adapter.NAME, prompt.NAME, heads.NAME, or one of {', '.join(WHERE)}"
            )
    if by_axis["heads"] and parts["heads"] is None:
        parts["heads"] = Heads()  # for how many classes, the tasks will say
    for axis, changes in by_axis.items():
        if changes and parts[axis] is None:
            raise PemlError(f"set.{axis}.{next(iter(changes))} does not apply: method {name!r} has no {axis}")
        if changes:
            parts[axis] = changed(f"set.{axis}", parts[axis], changes)
    if isinstance(task_names, str):
        raise PemlError(f"task_names must be a list of names, not the text {task_names!r}")
    return PemlConfig(task_names=list(task_names), **parts, **config)


def methods() -> dict[str, Method]:
    """All named methods."""
    return dict(METHODS)


def named(name: str) -> Method:
    """One row of the table.

    Raises:
        PemlError: there is no such method; the message lists them and the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        did_you_mean = f"did you mean {near[0]}? " if near else ""
        raise PemlError(f"unknown method {name!r}: {did_you_mean}there are {', '.join(METHODS)}")
    return METHODS[name]


def trainable_parameters(config: PemlConfig, model: PreTrainedModel) -> int:
    """Numbers that `config` would train on `model`, counted on a copy without memory; `model` is not touched."""
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
        # The random state is left as it was: counting must not change what a seed gives.
        with torch.random.fork_rng(devices=[]):
            wrapped = get_peft_model(empty, copy.deepcopy(config), low_cpu_mem_usage=True)
    return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def match_params(config: PemlConfig, model: PreTrainedModel, budget: int) -> PemlConfig:
    """The same method with the rank (or prefix length) whose trainable parameters come nearest to `budget`.

    Args:
        config: what to resize; its rank is solved for, or its prefix length if it has no adapter.
        model: the base model, whose layers decide what a rank costs.
        budget: trainable numbers to aim for.

    Raises:
        PemlError: even the smallest size is more than twice the budget.
    """
    key = "r" if config.adapter is not None else "num_virtual_tokens"
    # Experts that share a rank evenly allow its multiples alone.
    step = 1 if config.adapter is None else config.adapter.rank_step(len(config.task_names))

    if config.adapter is None and isinstance(getattr(config.prompt, key), tuple):
        raise PemlError("a prefix with a length of its own in each layer cannot be resized: give one number")

    def resized(steps: int) -> PemlConfig:
        new = copy.deepcopy(config)
        if config.adapter is not None:
            new.adapter = config.adapter.resized(steps * step)
        else:
            assert config.prompt is not None
            new.prompt = changed("prompt", config.prompt, {key: steps})
        return new

    def cost(steps: int) -> int:
        return trainable_parameters(resized(steps), model)

    low, high = 1, 2
    while cost(high) < budget and high < 2**16:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < budget else (low, middle)
    if cost(high) < budget / 2:
        raise PemlError(
            f"even {key} {high * step} trains only {cost(high):,} parameters: the budget of {budget:,} is out of reach"
        )
    best = min((low, high), key=lambda steps: abs(cost(steps) - budget))
    if cost(best) > 2 * budget:
        raise PemlError(
            f"{key} {step} already trains {cost(best):,} parameters, more than twice the budget of {budget:,}"
        )
    return resized(best)
