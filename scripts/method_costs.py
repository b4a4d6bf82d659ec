"""What a page of a method says of time and memory, from the records in `benchmarks/results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from records import read

PARTS = {
    "LoRA": "lora",
    "SingleTaskLoRA": "single-task",
    "MTL-LoRA": "mtl-lora",
    "MTLLoRA": "mtl-lora",
    "MultiLoRA": "multi-lora",
    "MoELoRA": "moe-lora",
    "CGCLoRA": "cgc-lora",
    "Poly": "poly",
    "CPoly": "c-poly",
    "PrefixTuning": "prefix",
    "PrefixNAS searching": "prefix-nas",
    "PrefixNAS derived": "prefix-nas",
    "PromptTuning": "prompt-tuning",
    "MultitaskPrompt": "mpt",
    "LoRA + prefix by a network": "lora+prefix",
    "PEML": "peml",
}
"""The method of each of our variants in the records of cost, by what stands before a comma; others have their name."""

COSTS = ("every", "layers", "groups", "end-to-end", "tasks", "decode", "prefix", "prefix-decode", "soft", "searching")
KINDS = {"Linear": "One linear, forward and backward", "Group": "Sibling linears, forward and backward"}


def costs(names: Sequence[str]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Our variants in the records of cost: by record, question and variant, of all cases and types of numbers."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in COSTS:
        for path in (record, f"{record}-fp32"):
            for case in read(path).get("cases", ()):
                question = case["title"].split(":")[0].split(", d=")[0].split(", width")[0]
                kind, _, of = question.partition(", ")
                question = KINDS.get(kind.split()[0], question)
                if "floor" in case["settings"]:
                    question += f", over {case['settings']['floor']}"
                for row in case["rows"]:
                    # The record of searches has other methods of ours as peers.
                    if row["kind"] != "peml" and (row["kind"] != "peer" or record != "searching"):
                        continue
                    variant = row["name"].removeprefix("peml ")
                    if variant.startswith("T="):
                        question, variant = f"Four tasks in a batch, of 4 to 256: {of}", kind
                    part = variant.split(",")[0]
                    if PARTS.get(part, part) in names:
                        own = {**row, "case": case}
                        found.setdefault((record, question, variant), []).append(own)
    return found


def cost_table(found: Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]]) -> str:
    """Time and memory over the frozen model."""
    lines = ["| cost | variant | time | peak memory | beside |", "|---|---|---|---|---|"]
    for (record, question, variant), rows in found.items():
        time = span([row["ratio"]["median"] for row in rows])
        time += " (within A/A)" if all(row["within_aa"] for row in rows) else ""
        # Without gradients it is a ratio of small buffers, since weights are not counted.
        trained = [row for row in rows if row["case"]["train"]]
        peaks = [row["peak_bytes"] / row["case"]["rows"][0]["peak_bytes"] for row in trained]
        against = [row for row in rows if row["versus"]]
        beside = span([row["versus"]["median"] for row in against])
        beside += f" of {against[0]['against'].removeprefix('peml ')}" if against else ""
        lines.append(f"| [{question}](../results/{record}.md) | {variant} | {time} | {span(peaks)} | {beside} |")
    note = (
        "Ratios to the frozen model or layer of the same run, on a CPU, the smallest and the largest over the shapes "
        "and types of numbers of the record."
    )
    return "\n".join([*lines, "", note, ""])


def span(values: Sequence[float]) -> str:
    """Smallest and largest."""
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
