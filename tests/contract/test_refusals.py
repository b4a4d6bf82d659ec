"""What goes wrong is said, by name, and leaves nothing behind."""

import threading

import pytest
import torch
from cases import Case, cases, few_cases
from peft import get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peml
from models import TASKS, adapt, tiny, tokens
from peml import PemlError, routing
from peml.bank import BankLinear

WRONG = {
    "unknown name": ("mnli", "unknown task 'mnli'.*rte, sst2, cola"),
    "unknown in a list": (["rte", "mnli"], "unknown task 'mnli'.*rte, sst2, cola"),
    "too large": ([0, 3], "task id 3.*rte, sst2, cola"),
    "negative": (-1, "task id -1.*rte, sst2, cola"),
    "bool": (True, "not bool.*rte, sst2, cola"),
    "float": ([0.0, 1.0], "not float.*rte, sst2, cola"),
    "float tensor": (torch.tensor([0.0, 1.0]), "not float.*rte, sst2, cola"),
    "None in a list": (["rte", None], "not NoneType.*rte, sst2, cola"),
    "too many": (["rte"] * 3, "3 entries but the batch has 2 rows"),
    "too few": (["rte", "cola"], "2 entries but the batch has 4 rows"),
    "empty": ([], "empty"),
    "ragged": ([["rte"], ["rte", "cola"]], "equal length"),
    "mixed": (["rte", ["rte"]], "equal length"),
}


@few_cases
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", ["forward", "generate", "block"])
def test_wrong_tasks(case: Case, wrong: str, call: str) -> None:
    """Refused whether or not the method needs a task: a typo must not go unnoticed."""
    tasks, message = WRONG[wrong]
    model, batch = case.build(), tokens(4 if wrong == "too few" else 2, 3)
    with pytest.raises(PemlError, match=message):
        if call == "forward":
            model(input_ids=batch, tasks=tasks)
        elif call == "generate":
            model.generate(batch, tasks=tasks, max_new_tokens=1)
        else:
            with model.base_model.routed(tasks):
                model(input_ids=batch)
    assert routing.current() is None
    model(input_ids=batch, tasks="rte")


@cases
def test_a_missing_task(case: Case) -> None:
    model, batch = case.build(), tokens(2, 3)
    if not case.needs_task:
        model(input_ids=batch)
        return
    for call in (lambda: model(input_ids=batch), lambda: model.generate(batch, max_new_tokens=1)):
        with pytest.raises(PemlError, match="rte, sst2, cola"):
            call()
        assert routing.current() is None
    with pytest.raises(PemlError, match="rte, sst2, cola"):
        model.base_model.select_task("rte")
        model.base_model.select_task(None)
        model(input_ids=batch)


def test_a_task_per_token_needs_every_token() -> None:
    model = adapt(tiny(), peml.MTLLoRA(r=2))
    with pytest.raises(PemlError, match="4 tokens per row but rows have 5"):
        model(input_ids=tokens(2, 5), tasks=[["rte"] * 4] * 2)


class Interrupt(BaseException):
    """Stands in for Ctrl-C, which is no `Exception`."""


@few_cases
@pytest.mark.parametrize("kind", [RuntimeError, Interrupt])
@pytest.mark.parametrize("call", ["forward", "generate", "block"])
def test_an_exception_leaves_no_route_behind(case: Case, kind: type[BaseException], call: str) -> None:
    """The next call is not routed by what the broken one was given."""
    model, batch = case.build(), tokens(2, 3)

    def fail(*args):
        raise kind

    handle = model.base_model.model.lm_head.register_forward_hook(fail)
    with pytest.raises(kind):
        if call == "forward":
            model(input_ids=batch, tasks="rte")
        elif call == "generate":
            model.generate(batch, tasks="rte", max_new_tokens=1)
        else:
            with model.base_model.routed("rte"):
                model(input_ids=batch)
    handle.remove()
    if kind is RuntimeError or call != "forward":
        assert routing.current() is None
    if case.needs_task:
        with pytest.raises(PemlError, match="rte, sst2, cola"):
            model(input_ids=batch)
    model(input_ids=batch, tasks="rte")
    assert routing.current() is None


@torch.no_grad()
def test_a_model_inside_the_block_of_another() -> None:
    """Teacher and student: neither takes the other's route or prefix, and blocks nest."""
    one, two = (adapt(tiny(), peml.MTLLoRA(r=2), peml.PrefixTuning(2, per_task=True)) for _ in range(2))
    plain, batch = adapt(tiny(), peml.LoRA(r=2)), tokens(2, 4)
    expected = [model(input_ids=batch, tasks=task).logits for model, task in ((one, "rte"), (two, "cola"))]
    unrouted = plain(input_ids=batch).logits
    with one.base_model.routed("rte"):
        with pytest.raises(PemlError, match="rte, sst2, cola"):
            two(input_ids=batch)
        assert torch.equal(plain(input_ids=batch).logits, unrouted)
        with two.base_model.routed("cola"):
            assert torch.equal(one(input_ids=batch).logits, expected[0])
            assert torch.equal(two(input_ids=batch).logits, expected[1])
            assert torch.equal(one(input_ids=batch, tasks="cola").logits, one(input_ids=batch, tasks=2).logits)


def test_a_block_computes_the_prefix_anew() -> None:
    """Several steps of training in one block each see the weights of their step."""
    model, batch = adapt(tiny(), prompt=peml.PrefixNAS(3, 1, 8, 4, 4)), tokens(2, 4)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    with model.base_model.routed("rte"):
        losses = []
        for _ in range(3):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@few_cases
@torch.no_grad()
def test_threads_do_not_see_each_other(case: Case) -> None:
    model, batch = case.build(), tokens(2, 4)
    expected = {task: model(input_ids=batch, tasks=task).logits for task in TASKS}
    wrong, start = [], threading.Barrier(3)

    def work(task: str) -> None:
        with torch.no_grad():
            start.wait()
            for i in range(20):
                try:
                    if i % 2:
                        logits = model(input_ids=batch, tasks=task).logits
                    else:
                        with model.base_model.routed(task):
                            logits = model(input_ids=batch).logits
                    if not torch.equal(logits, expected[task]):
                        wrong.append(task)
                    if case.needs_task:
                        with pytest.raises(PemlError):
                            model(input_ids=batch)
                except BaseException as error:
                    wrong.append(error)
            if routing.current() is not None:
                wrong.append("left behind")

    threads = [threading.Thread(target=work, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@few_cases
def test_threads_can_train(case: Case) -> None:
    """Checkpointed forwards and backwards of two threads at once leave the gradients of one after the other."""
    model, batch = case.build(), tokens(2, 4)
    model.base_model.model.activation_checkpointing_enable()
    model.train()
    if case.drawn:
        # Threads take random numbers from each other; everything else is as in training.
        for module in model.modules():
            module.train(not isinstance(module, peml.adapters.Adapter))

    def step(task: str, found: dict) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = model(input_ids=batch, tasks=task).logits.square().sum()
        found[task] = torch.autograd.grad(loss, parameters, allow_unused=True)

    alone: dict = {}
    together: dict = {}
    for task in TASKS:
        step(task, alone)
    threads = [threading.Thread(target=step, args=(task, together)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for task in TASKS:
        for left, right in zip(alone[task], together[task], strict=True):
            assert (left is None) == (right is None) and (left is None or torch.equal(left, right))


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=67, hidden_size=24, n_layer=1, n_head=3))


def falcon() -> PreTrainedModel:
    config = FalconConfig(vocab_size=67, hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    return FalconForCausalLM(config)


def gptj() -> PreTrainedModel:
    return GPTJForCausalLM(GPTJConfig(vocab_size=67, n_embd=24, n_layer=1, n_head=3, rotary_dim=4))


def gpt_neo() -> PreTrainedModel:
    config = GPTNeoConfig(vocab_size=67, hidden_size=24, num_layers=1, num_heads=3, attention_types=[[["global"], 1]])
    return GPTNeoForCausalLM(config)


def own_attention() -> PreTrainedModel:
    """An attention function that somebody has registered."""
    AttentionInterface.register("somebodys_own", ALL_ATTENTION_FUNCTIONS["sdpa"])
    base = tiny("llama")
    base.set_attn_implementation("somebodys_own")
    return base


@pytest.mark.parametrize("build", [bloom, falcon, gptj, gpt_neo, own_attention])
def test_models_that_cannot_take_a_prefix(build) -> None:
    """Refused by name and left as they were; without a prompt they work."""
    base = build()
    implementation = base.config._attn_implementation
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(PemlError, match=f"{type(base).__name__} "):
        get_peft_model(base, peml.PemlConfig(task_names=TASKS, adapter=peml.LoRA(r=2), prompt=peml.PrefixTuning(2)))
    assert base.config._attn_implementation == implementation
    assert [type(module) for module in base.modules()] == kinds
    assert not base._forward_pre_hooks and "generate" not in vars(base)
    assert all(parameter.requires_grad for parameter in base.parameters())
    if build is own_attention:
        return
    model = adapt(base, peml.MTLLoRA(r=2))
    model(input_ids=tokens(), tasks=["rte", "cola", "rte"]).logits.sum().backward()


def test_lengths_that_do_not_match_the_model() -> None:
    base = tiny()
    with pytest.raises(PemlError, match="3 lengths but the model has 2 attention layers"):
        adapt(base, peml.LoRA(r=2), peml.PrefixTuning((1, 2, 3)))
    assert base.config._attn_implementation == "sdpa" and not any(isinstance(m, BankLinear) for m in base.modules())


def test_targets_that_are_not_linear() -> None:
    base = tiny()
    with pytest.raises(PemlError, match="embed_tokens, a Embedding: only linear layers fit"):
        adapt(base, peml.LoRA(r=2), peml.PrefixTuning(2), target_modules=["embed_tokens"])
    assert base.config._attn_implementation == "sdpa"


class Plain(nn.Module):
    """Not a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_module_that_is_not_of_transformers() -> None:
    model = adapt(Plain().double(), peml.MTLLoRA(r=2), target_modules=["first", "second"])
    x = torch.randn(4, 5, dtype=torch.float64)
    mixed = model(x, tasks=["rte", "cola", "rte", "sst2"])
    for i, task in enumerate(["rte", "cola", "rte", "sst2"]):
        torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1], tasks=task), rtol=1e-12, atol=1e-12)
    with pytest.raises(PemlError, match="2 entries but the batch has 4 rows"):
        model(x, tasks=["rte", "cola"])
    with pytest.raises(PemlError, match="Plain cannot take a prefix: it is not a transformers model"):
        adapt(Plain(), peml.LoRA(r=2), peml.PrefixTuning(2), target_modules=["first"])


def test_a_layer_called_several_times_is_one_slot() -> None:
    """ALBERT runs one layer over and over: its prefix serves every pass, and no parameter is idle."""
    config = AlbertConfig(
        vocab_size=67, embedding_size=8, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = adapt(AlbertForMaskedLM(config).double(), prompt=peml.PrefixTuning(2))
    assert len(model.base_model.model.prompt_host.slots) == 1
    model(input_ids=tokens()).logits.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_probing_changes_no_mode() -> None:
    """A user's frozen submodule stays in evaluation while the rest trains."""
    base = tiny().train()
    base.model.layers[0].mlp.eval()
    modes = [module.training for module in base.modules()]
    model = get_peft_model(base, peml.PemlConfig(task_names=TASKS, prompt=peml.PrefixTuning(2)))
    assert [module.training for module in model.base_model.model.modules()][: len(modes)] == modes


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert"])
@few_cases
def test_the_eager_implementation(family: str, case: Case) -> None:
    """Equal to SDPA, and it can show its attention, prefix first."""
    models = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        models.append(case.build(base=tiny(family, attention)))
    batch, mask = tokens(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    call = {"input_ids": batch, "attention_mask": mask, "tasks": ["cola", "rte"]}
    sdpa, eager = (model(**call).logits for model in models)
    torch.testing.assert_close(sdpa[:, :3], eager[:, :3], rtol=1e-4, atol=1e-5)
    shown = models[1](**call, output_attentions=True).attentions
    if case.prompt is not None:
        extra = [attention.shape[-1] - 5 for attention in shown]
        assert sum(extra) > 0
        torch.testing.assert_close(shown[0].sum(-1), torch.ones_like(shown[0].sum(-1)))
