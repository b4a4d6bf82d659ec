"""Tiny random models, built from configurations, with sizes that are odd on purpose."""

from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import peml

torch.set_num_threads(1)  # models this small only lose by more

VOCABULARY = 67
TASKS = ["rte", "sst2", "cola"]

# Without an end token every row generates to the full length; token 1 pads.
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}


def llama(attention: str = "sdpa", layers: int = 2) -> PreTrainedModel:
    """Heads of 6 numbers, two of them sharing keys and values."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **IDS,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def qwen3(attention: str = "sdpa", layers: int = 2) -> PreTrainedModel:
    """A head size of 10 that does not follow from the width, and normalised queries and keys."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=20, intermediate_size=28, num_hidden_layers=layers, num_attention_heads=3,
        num_key_value_heads=1, head_dim=10, max_position_embeddings=64, **IDS,
    )  # fmt: skip
    return Qwen3ForCausalLM._from_config(config, attn_implementation=attention)


def gpt2(attention: str = "sdpa", layers: int = 2) -> PreTrainedModel:
    """`Conv1D` layers with biases and learned positions."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=36, n_layer=layers, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, **IDS,
    )  # fmt: skip
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def bert(attention: str = "sdpa", layers: int = 2) -> PreTrainedModel:
    """An encoder: attention in both directions."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=28, num_hidden_layers=layers, num_attention_heads=3,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
    )  # fmt: skip
    return BertForMaskedLM._from_config(config, attn_implementation=attention)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "bert": bert}
DECODERS = [name for name in FAMILIES if name != "bert"]


def tiny(family: str = "llama", attention: str = "sdpa", layers: int = 2) -> PreTrainedModel:
    """A model in double precision whose weights are far from zero, so that paths cannot agree by accident."""
    model = FAMILIES[family](attention, layers).double().eval()
    shake(model.parameters(), 0.2)
    return model


def shake(parameters, size: float) -> None:
    """Add noise in place."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * size)


def adapt(
    base: nn.Module, adapter=None, prompt=None, tasks=TASKS, after=None, shaken: bool = True, **settings
) -> PeftModel:
    """Attach an adapter, in the precision of the model and away from its neutral start."""
    dtype = next(base.parameters()).dtype
    config = peml.PemlConfig(task_names=list(tasks), adapter=adapter, prompt=prompt, **settings)
    model = get_peft_model(base, config).to(dtype)
    if shaken:
        shake((p for p in model.parameters() if p.requires_grad), 0.3)
    if after is not None:
        after(model.base_model)
    return model.eval()


def tokens(rows: int = 3, length: int = 5) -> Tensor:
    """Random ids, without the padding token."""
    return torch.randint(2, VOCABULARY, (rows, length))


def probe_loss(logits: Tensor) -> Tensor:
    """A scalar that depends on every logit, each with a weight of its own."""
    weight = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view(logits.shape)
    return (logits * weight).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, and zeros where there is none; the model's are cleared."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], atol: float = 1e-10, rtol: float = 1e-9) -> None:
    """Two sets of gradients are equal."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
