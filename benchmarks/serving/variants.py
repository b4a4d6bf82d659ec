"""What is served: a Llama with random weights, bare, adapted, merged; and PEFT's mixed batches without a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import peft
import torch
import uvicorn
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peml
from benchmarks.serving.load import Job
from peml.serving import Limits
from peml.serving.app import Service, build_app
from peml.serving.engine import Engine

SHAPES: dict[str, dict[str, int]] = {
    "192/6L": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
               "num_key_value_heads": 2, "vocab_size": 4096},
    "512/4L": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
               "num_key_value_heads": 8, "vocab_size": 4096},
    "1024/8L": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
                "num_key_value_heads": 8, "vocab_size": 4096},
    "tiny": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 64},
}  # fmt: skip
RANK, TOKENS = 8, 16
LORA, PREFIX = peml.LoRA(r=RANK), peml.PrefixTuning(num_virtual_tokens=TOKENS)


def base(shape: str) -> Any:
    """The frozen model."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=512, tie_word_embeddings=True, **SHAPES[shape])  # type: ignore[arg-type]
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapted(shape: str, tasks: Sequence[str], adapter: Any, prompt: Any, merge: bool = False) -> Any:
    """The model with an adapter away from its start."""
    config = peml.PemlConfig(task_names=list(tasks), adapter=adapter, prompt=prompt, task_type="CAUSAL_LM")
    model = get_peft_model(base(shape), config)
    _shake(model)
    if merge:
        model.base_model.merge_adapter()
    return model


def by_names(shape: str, tasks: Sequence[str]) -> Any:
    """PEFT's own: a LoRA for each task, chosen row by row."""
    model: Any = get_peft_model(base(shape), peft.LoraConfig(r=RANK, target_modules="all-linear"), tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, peft.LoraConfig(r=RANK, target_modules="all-linear"))
    _shake(model)
    return model.eval()


@torch.no_grad()
def _shake(model: Any) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "peml" in name or "lora" in name:
            parameter.add_(0.02 * torch.randn_like(parameter))


class Bare:
    """A model without an adapter where the engine wants one with: every task is the base."""

    def __init__(self, model: Any, tasks: Sequence[str]) -> None:
        begin = model.init_continuous_batching
        model.init_continuous_batching = lambda *args, tasks_of=None, **kwargs: begin(*args, **kwargs)
        config = SimpleNamespace(task_names=list(tasks))
        self.base_model = SimpleNamespace(model=model, config_in_force=config, kept=nullcontext)
        self.eval = model.eval


class Ids:
    """Stands in for the reader of prompts: they come as ids."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = {name: SimpleNamespace(name=name, max_new_tokens=1) for name in tasks}
        self.ids = {name: number for number, name in enumerate(tasks)}
        self.models = list(tasks)

    def task(self, model: str, task: str | None) -> Any:
        """The task that a request names."""
        return self.tasks[model]


class Served:
    """A server in a thread of its own, on a free port of the loopback."""

    def __init__(self, model: Any, tasks: Sequence[str], shape: str) -> None:
        words = {f"w{i} ": i for i in range(SHAPES[shape]["vocab_size"])}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0 ")))
        engine = Engine(model, [], cache_tokens=4096, max_batch_tokens=512)
        reader: Any = Ids(tasks)
        app = build_app(Service(model, tokenizer, reader, engine, Limits()))
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise RuntimeError("the server has not begun")
            time.sleep(0.01)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """End it."""
        self.server.should_exit = True
        self.thread.join()


@torch.no_grad()
def together(model: Any, work: Sequence[Job], batch: int, named: bool) -> None:
    """Plain `generate` of padded batches, in which every row waits for the longest."""
    for start in range(0, len(work), batch):
        part = work[start : start + batch]
        width = max(len(job.ids) for job in part)
        ids = torch.tensor([[0] * (width - len(job.ids)) + job.ids for job in part])
        mask = torch.tensor([[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in part])
        names = {"adapter_names": [job.model for job in part]} if named else {}
        new = max(job.max_tokens for job in part)
        model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new,
            pad_token_id=0, eos_token_id=None, **names,
        )  # fmt: skip
