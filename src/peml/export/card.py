"""The card of an export: what it is, how well it does, how it was trained, how to load it, and what it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from peml.export.formats import FORMATS
from peml.training.recipe import Recipe

LOADING = {
    "lora": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{place}")""",
    "merged": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{place}")""",
    "prefix": """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}"{pinned})
model = PeftModel.from_pretrained(model, "{place}/prefix")""",
    "kv": """from load_kv import load  # beside this card

model = load("{base}", "{place}"{pinned})""",
}
"""How each format is loaded; for a causal language model."""


def card(
    form: str,
    recipe: Recipe,
    metrics: Mapping[str, Any],
    tasks: Sequence[str],
    folders: Sequence[str],
    own_base: bool,
    limits: Sequence[str],
    dtype: str,
    auto: str = "AutoModelForCausalLM",
) -> str:
    """The text of `README.md`.

    Args:
        form: a key of `FORMATS`.
        recipe: of the run.
        metrics: its `metrics.json`.
        tasks: what is exported.
        folders: of the tasks, where each has one of its own.
        own_base: whether the base model lies in the export too.
        limits: what to mind, from the lint.
        dtype: of the weights of a checkpoint.
        auto: transformers' class that loads the base.
    """
    # A folder of somebody's machine is no name on the Hub.
    named = recipe.model.count("/") == 1 and not recipe.model.startswith((".", "/", "~"))
    hub = recipe.model if named and not Path(recipe.model).exists() else None
    data = ModelCardData(
        base_model=hub,
        library_name="transformers" if form == "merged" else "peft",
        tags=["peml", "multi-task"],
    )
    place = "FOLDER/" + folders[0] if folders else "FOLDER"
    base = f"{place}/base" if own_base else recipe.model
    own = ", ".join(f"`{folder}` of {task}" for folder, task in zip(folders, tasks, strict=bool(folders)))
    loading = LOADING[form].format(place=place, base=base, pinned=_pinned(recipe, form, own_base))
    loading = loading.replace("ModelForCausalLM", auto.removeprefix("Auto"))
    lines = [
        "---", data.to_yaml(), "---", "",
        f"# {recipe.model}, {recipe.method}, {len(tasks)} task{'s' * (len(tasks) != 1)}", "",
        f"Exported by peml as `{form}`: {FORMATS[form]}. peml itself is not needed to use it.", "",
        "## Loading", "",
        "```python", loading, "```", "",
        f"Each task has a folder of its own: {own}." if own else f"One, of {', '.join(tasks)}.", "",
        "## Tasks", "",
        *_scores(metrics, tasks), "",
        "## Recipe", "",
        "```yaml", recipe.to_yaml().strip(), "```", "",
        "## Limits", "",
        *[f"- {limit}" for limit in limits],
        f"- Weights are stored in {dtype}." if form in ("merged", "prefix") else "- Weights are stored in float32.",
        "- The scores above are of the adapter before its export, on the run's own evaluation rows.",
        "- Licence and limits of the base model and of the data hold here too.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _pinned(recipe: Recipe, form: str, own_base: bool) -> str:
    """The revision of the base, where one is loaded by name; a LoRA says it itself."""
    wanted = recipe.revision is not None and form in ("prefix", "kv") and not own_base
    return f', revision="{recipe.revision}"' if wanted else ""


def _scores(metrics: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    after = metrics.get("after", {})
    rows = [
        f"| {task} | {name} | {value:.3f} | {after[task].get('n', 0):.0f} |"
        for task in tasks
        for name, value in after.get(task, {}).items()
        if name not in ("n", "loss", "score")
    ]
    if not rows:
        return ["The run has no scores."]
    return ["| task | metric | score | rows |", "|---|---|---|---|", *rows]
