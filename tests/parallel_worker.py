"""What each process of `test_parallel.py` does; started by torch.distributed.run.

    parallel_worker.py ddp|fsdp FOLDER

Every adapter on a tiny Llama, with tasks of its own on each process. The first process leaves the gradients (ddp) or
the weights after two steps (fsdp) in FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).parent / "contract"))

from cases import GROUPS, SMALL_ADAPTERS

import peml
from models import adapt, gradients, tiny, tokens

PROMPTS = {"none": None, "PrefixNAS": peml.PrefixNAS(4, 2, 10, 6, 4, gate_init=0.5)}
COMBINATIONS = [(a, "none") for a in SMALL_ADAPTERS if a != "none"]
COMBINATIONS += [("MTLLoRA", "PrefixNAS"), ("MTLLoRA", "heads"), ("LoRA", "groups"), ("CGCLoRA", "groups")]
TASKS_BY_RANK = [["rte", "cola"], ["sst2", "sst2"]]


def base_of(prompt: str):
    """With heads, a model without its own."""
    return tiny().model if prompt == "heads" else tiny()


def build(adapter: str, prompt: str, dtype: torch.dtype = torch.float64):
    """The same model in every process, in evaluation: methods that draw at random in training then do not."""
    torch.manual_seed(0)
    heads = peml.Heads((2, 1, 3), pooling="last") if prompt == "heads" else None
    groups = GROUPS["clusters"] if prompt == "groups" else None
    model = adapt(base_of(prompt), SMALL_ADAPTERS[adapter], PROMPTS.get(prompt), heads=heads, groups=groups).to(dtype)
    batch = tokens(4, 5)
    return model, batch


def loss_of(model, batch, tasks):
    """A mean over rows, so that processes with as many rows average to the whole."""
    return model(input_ids=batch, tasks=tasks).logits.nan_to_num(neginf=0.0).square().mean()


def ddp(folder: Path, rank: int) -> None:
    for adapter, prompt in COMBINATIONS:
        model, batch = build(adapter, prompt)
        wrapped = DistributedDataParallel(model)
        loss_of(wrapped, batch[2 * rank : 2 * rank + 2], TASKS_BY_RANK[rank]).backward()
        if rank == 0:
            save_file(gradients(model), folder / f"{adapter}+{prompt}.safetensors")


def fsdp(folder: Path, rank: int) -> None:
    for adapter, prompt in COMBINATIONS:
        model, batch = build(adapter, prompt, torch.float32)
        base = model.base_model.model
        for layer in getattr(base, "model", base).layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
        for _ in range(2):
            loss_of(model, batch[2 * rank : 2 * rank + 2], TASKS_BY_RANK[rank]).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(folder / f"{adapter}+{prompt}", state_dict=state)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    {"ddp": ddp, "fsdp": fsdp}[sys.argv[1]](Path(sys.argv[2]), dist.get_rank())
    dist.destroy_process_group()
