"""MTL-LoRA of the `adapters` package (AdapterHub), on a Llama: `python -m benchmarks.adapterhub`.

It pins a transformers of its own, older than this package needs, so it runs in an environment of its own: torch and
adapters, without this package. The naive MTL-LoRA, on the same linears, stands in both records and links them.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import command, naive
from benchmarks.harness import Case, Variant
from benchmarks.options import PRESENT, ROWS, TASKS, add_llama_shape, llama_shape, mixed_rows
from benchmarks.sites import VOCABULARY, Site, llama, llama_site

# Its Llama has no place for an adapter in the gate and output projections.
LINEARS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def cases(options: Namespace) -> Iterator[Case]:
    """Training, then inference."""
    size, length = llama_shape(options)
    for train in (True, False):
        torch.manual_seed(options.seed)
        site = llama_site(llama(**size), ROWS, length, options.dtype, ids=mixed_rows(), num_tasks=TASKS, train=train)
        site = replace(site, targets=LINEARS)
        peer = site.variant("MTL-LoRA as published", naive.naive_model(site, naive.MTLLoRA), "peer")
        settings = {**size, "vocabulary": VOCABULARY, "dtype": options.dtype, "rows": ROWS, "length": length}
        settings |= {"T": TASKS, "present": PRESENT, "linears": "q, k, v, up, down"}
        title = f"Llama {'training step' if train else 'inference'}, five linears"
        variants = [*site.floors(), peer, adapterhub(site, peer.name)]
        yield Case(title, variants, train, site.kwargs["inputs_embeds"].nbytes, settings)


def adapterhub(site: Site, against: str) -> Variant:
    """One adapter per task, which share their projections; diagonal transform, since the full one cannot be built."""
    import adapters
    from adapters.composition import MultiTask

    model = site.copy()
    adapters.init(model)
    config = adapters.MTLLoRAConfig(
        r=8, alpha=16, n_up_projection=3, init_weights="bert", attn_matrices=["q", "k", "v"],
        selfattn_lora=True, intermediate_lora=True, output_lora=True,
    )  # fmt: skip
    names = [f"task{i}" for i in range(site.num_tasks)]
    for name in names:
        model.add_adapter(name, config=config)
    model.share_parameters(adapter_names=names)
    model.train_adapter(MultiTask(*names))
    # It makes fp32 weights, but does not cast what they meet.
    model.to(site.dtype)
    found = site.variant("AdapterHub MTL-LoRA", model, "peer", against, task_ids=torch.tensor(site.ids))
    return replace(found, setting="MTLLoRAConfig(r=8, alpha=16, n_up_projection=3)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = ArgumentParser(prog="python -m benchmarks.adapterhub", description=__doc__)
    command.add_options(parser)
    add_llama_shape(parser)
    command.execute("adapterhub", cases, parser.parse_args(arguments), ["benchmarks.adapterhub", *arguments])
    return 0


if __name__ == "__main__":
    sys.exit(main())
