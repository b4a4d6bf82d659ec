"""The alternatives on a site: PEFT's adapters at their best, and the naive loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model

from benchmarks.harness import Variant
from benchmarks.naive import Naive, naive_model
from benchmarks.sites import Site

# PEFT would otherwise keep bf16 adapters in fp32 and cast the activations, several times as slow.
AT_ITS_BEST = {"autocast_adapter_dtype": False}


def peft_lora(site: Site, dropout: float = 0.0, r: int = 8) -> Variant:
    """PEFT's LoRA, one adapter for all rows."""
    name = "PEFT LoRA" + (f", dropout {dropout}" if dropout else "")
    config = _lora_config(site, r, dropout)
    return replace(site.variant(name, get_peft_model(site.copy(), config, **AT_ITS_BEST), "peer"), setting=f"r={r}")


def peft_mixed(site: Site, r: int = 8) -> Variant:
    """PEFT's LoRA with an adapter of its own for each task, named row by row; inference only."""
    names = [f"task{i}" for i in range(site.num_tasks)]
    model = get_peft_model(site.copy(), _lora_config(site, r), adapter_name=names[0], **AT_ITS_BEST)
    for name in names[1:]:
        model.add_adapter(name, _lora_config(site, r), **AT_ITS_BEST)
    rows = [names[i] for i in site.ids]
    return replace(site.variant("PEFT LoRA, adapter_names", model, "peer", adapter_names=rows), setting=f"r={r}")


def peft_poly(site: Site, r: int = 8, num_skills: int = 4, num_tasks: int | None = None) -> Variant:
    """PEFT's Poly."""
    config = PolyConfig(
        r=r, n_tasks=num_tasks or site.num_tasks, n_skills=num_skills, n_splits=1, target_modules=_targets(site)
    )
    # Without PEFT's outermost wrapper, which hands task ids on for some kinds of model only.
    model = get_peft_model(site.copy(), config, **AT_ITS_BEST).base_model
    found = site.variant("PEFT Poly", model, "peer", task_ids=torch.tensor(site.ids))
    return replace(found, setting=f"r={r}, n_skills={num_skills}")


def naive(
    site: Site, name: str, kind: type[Naive], against: str | None = None, num_tasks: int | None = None, **settings: Any
) -> Variant:
    """A published method, written down as published."""
    variant = site.variant(name, naive_model(site, kind, num_tasks, **settings), "peer", against)
    return replace(variant, setting=f"{kind.__name__} {settings or ''}".strip())


def peft_switching(site: Site, r: int = 8) -> PeftModel:
    """A model with two PEFT LoRAs, `task0` in force."""
    model = get_peft_model(site.copy(), _lora_config(site, r), adapter_name="task0", **AT_ITS_BEST)
    model.add_adapter("task1", _lora_config(site, r), **AT_ITS_BEST)
    return model.eval()


def _lora_config(site: Site, r: int, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=16, lora_dropout=dropout, target_modules=_targets(site), init_lora_weights=False)


def _targets(site: Site) -> list[str] | str:
    # A list of their own: PEFT writes into what it is given.
    return site.targets if isinstance(site.targets, str) else list(site.targets)
