"""What N clusters on one base hold in memory: `python -m benchmarks.clusters`.

For N = 1, 2, 4 and 8 clusters of two tasks, each with a CGC-LoRA of its own: bytes of all weights (unique storages),
against one base and N adapters, and against N copies of the base with one each; and what a forward of a batch in which
all clusters have rows allocates at its peak. Exact numbers, the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

import peml
from benchmarks.memory import peak_bytes
from benchmarks.options import LLAMAS
from benchmarks.record import environment
from benchmarks.sites import VOCABULARY, llama, rows_of_tasks

RESULTS = Path(__file__).parent / "results"
ROWS, LENGTH = 16, 64
MIB = 2**20


def held(model: nn.Module) -> int:
    """Bytes of all weights, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


def measured(clusters: int) -> dict[str, int]:
    """Bytes with so many clusters."""
    torch.manual_seed(0)
    base = llama(**LLAMAS["512/4L"])
    of_base = held(base)
    names = [f"task{i}" for i in range(2 * clusters)]
    groups = [names[2 * k : 2 * k + 2] for k in range(clusters)]
    config = peml.PemlConfig(task_names=names, adapter=peml.CGCLoRA(r=8), target_modules="all-linear", groups=groups)
    model = get_peft_model(base, config).eval()
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    tasks = rows_of_tasks(ROWS, range(len(names)))
    with torch.no_grad():
        peak = peak_bytes(lambda: model(input_ids=ids, tasks=tasks).logits)
    return {"clusters": clusters, "base": of_base, "all": held(model), "peak": peak}


def main() -> None:
    found = [measured(clusters) for clusters in (1, 2, 4, 8)]
    one = found[0]["all"] - found[0]["base"]
    lines = [
        "| clusters | weights, MiB | one base + N adapters, MiB | N copies of the base, MiB | peak of a forward, MiB |",
        "|---|---|---|---|---|",
    ]
    for own in found:
        n, base = own["clusters"], own["base"]
        values = (own["all"], base + n * one, n * (base + one), own["peak"])
        lines.append(f"| {n} | {' | '.join(f'{value / MIB:.2f}' for value in values)} |")
    head = (
        f"# Clusters on one base\n\nLlama of 4 layers of width 512 in fp32, CGC-LoRA r 8 in all projections, two tasks "
        f"a cluster; forward of {ROWS} rows of {LENGTH} tokens over all clusters.\n\n"
    )
    text = "\n".join(lines)
    (RESULTS / "clusters.md").write_text(f"{head}{text}\n", encoding="utf-8")
    record = environment(torch.get_num_threads()) | {"rows": ROWS, "length": LENGTH, "clusters": found}
    (RESULTS / "clusters.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
