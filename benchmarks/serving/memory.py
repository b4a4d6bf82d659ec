"""What processes that serve hold in memory: `python -m benchmarks.serving.memory KIND SHAPE` is one of them.

A process's own memory is what no other shares: of the rest, the libraries, all processes of a machine have one copy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.serving import variants
from benchmarks.serving.load import closed, jobs

KINDS = {"merged": 1, "one task": 1, "eight tasks": 8}
MIB = 2**20


def of_children(shape: str) -> dict[str, dict[str, float]]:
    """MiB of a process of each kind, one after the other."""
    found = {}
    for kind in KINDS:
        command = [sys.executable, "-m", __spec__.name, kind, shape]
        found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def own(kind: str, shape: str) -> dict[str, float]:
    """MiB of this process after it has served: `rss`, and what is its alone, `own`."""
    tasks = [f"t{i}" for i in range(KINDS[kind])]
    # Every task with a core and a prefix of its own: what one adapter for all would not even need.
    prompt = variants.PREFIX if kind == "merged" else variants.peml.PrefixTuning(variants.TOKENS, per_task=True)
    adapter = variants.LORA if kind == "merged" else variants.peml.MTLLoRA(r=variants.RANK)
    model = variants.adapted(shape, tasks, adapter, prompt, merge=kind == "merged")
    if kind == "merged":
        # A checkpoint that was merged once has no second copy of the weights.
        model = variants.base(shape)
        served = variants.Served(variants.Bare(model, tasks), tasks, shape)
    else:
        served = variants.Served(model, tasks, shape)
    closed(served.port, jobs(16, tasks, variants.SHAPES[shape]["vocab_size"], (16, 48), 4, 0), 8)
    sizes = {"Rss": 0.0, "Private_Clean": 0.0, "Private_Dirty": 0.0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] = int(rest.split()[0]) * 1024 / MIB
    served.stop()
    return {"rss": sizes["Rss"], "own": sizes["Private_Clean"] + sizes["Private_Dirty"]}


if __name__ == "__main__":
    print(json.dumps(own(*sys.argv[1:])))
