"""Soft tokens in front of the text: run through the model once per step, their keys and values become a prefix.

In a causal model nothing after them changes what they are, so that one run per task present serves all rows. Rotary
models have them at positions -P .. -1, and the text where it always is: attention sees differences of positions only.
Models with learned positions have them at 0 .. P-1, and the text begins at P.

Letters: `P` soft tokens, `E` width of the input embeddings, `G` tasks present, `B` rows.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from peml import routing
from peml.attention.host import PromptHost, evaluating
from peml.errors import PemlError
from peml.prompts.base import LayerPrefix, WordPromptConfig
from peml.routing import Forward

_ROTARY: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_rotary(model: nn.Module) -> bool:
    """Whether attention turns queries and keys by their positions."""
    # Every forward asks, and to walk a large model takes as long as a layer.
    if model not in _ROTARY:
        _ROTARY[model] = any("Rotary" in type(part).__name__ for part in model.modules())
    return _ROTARY[model]


def check_soft(model: nn.Module, host: PromptHost) -> None:
    """Refuse a model in which a run over the soft tokens alone is not what prepending them would give.

    Raises:
        PemlError: saying what stands against it, and what to use instead.
    """
    name, instead = type(model).__name__, "use PrefixTuning, or MultitaskPrompt with deep=True"
    if sees_ahead(model, host):
        # The soft tokens go through it with the text.
        if getattr(model.config, "classifier_pooling", None) == "mean" and hasattr(model, "classifier"):
            raise PemlError(f"{name} cannot take a prompt at its input: it would pool the soft tokens too; {instead}")
        if not takes_embeddings(model):
            raise PemlError(
                f"{name} cannot take a prompt at its input: it does not read embeddings as it reads tokens; {instead}"
            )
        return
    if is_rotary(model):
        kind = changing_rope(model)
        if kind is not None:
            raise PemlError(
                f"{name} cannot take a prompt at its input: its rotary positions ({kind}) change with the "
                f"length of the text; {instead}"
            )
    elif "position_ids" not in inspect.signature(type(model).forward).parameters or any(
        hasattr(part, "create_position_ids_from_input_ids") for part in model.modules()
    ):
        raise PemlError(f"{name} cannot take a prompt at its input: it counts positions by itself; {instead}")


def sees_ahead(model: nn.Module, host: PromptHost) -> bool:
    """Whether what reads the text sees all of it at once: encoders, alone or before a decoder."""
    return not host.causal or encodes_first(model)


def encodes_first(model: nn.Module) -> bool:
    """Whether an encoder reads the text, and a decoder writes."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@torch.no_grad()
def takes_embeddings(model: nn.Module) -> bool:
    """Whether embeddings given in place of tokens are taken as they are; Marian's encoder would scale tokens only."""
    assert isinstance(model, PreTrainedModel)
    reader = model.get_encoder() if encodes_first(model) else model.base_model
    if model.device.type == "meta":
        return True
    ids = torch.tensor([[2, 3]], device=model.device)
    with evaluating(model):
        by_token = reader(input_ids=ids)[0]
        embedded = reader(inputs_embeds=model.get_input_embeddings()(ids))[0]
    return torch.allclose(by_token, embedded, rtol=1e-3, atol=1e-4)


def check_words(model: nn.Module, config: WordPromptConfig) -> None:
    """Refuse words that a prompt cannot begin at, before anything is attached.

    Raises:
        PemlError: keys and values of words cannot be computed ahead, or a text cannot be turned into tokens.
    """
    if config.prompt_tuning_init == "text":
        word_ids(model, config, 1)
    if config.prompt_tuning_init == "random" or config.at_input:
        return
    inner = getattr(model, "base_model", model)
    if encodes_first(model):
        what = "its decoder reads more than words"
    elif "position_ids" not in inspect.signature(type(inner).forward).parameters:
        what = "it counts positions by itself"
    else:
        return
    raise PemlError(
        f'{type(model).__name__} cannot begin a prefix at words: {what}; set prompt.prompt_tuning_init to "random"'
    )


def changing_rope(model: nn.Module) -> str | None:
    """The kind of rotary positions that change with the length of the text, if these do."""
    kinds = _rope_types(getattr(getattr(model, "config", None), "rope_parameters", None)) & {"dynamic", "longrope"}
    return min(kinds, default=None)


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return own.union(*(_rope_types(value) for value in parameters.values()))


def position_offset(model: nn.Module, num_tokens: int) -> int:
    """How far the text moves to make room for soft tokens."""
    return 0 if is_rotary(model) else num_tokens


def run(model: nn.Module, tokens: Tensor, forward: Forward, first: int | None = None) -> dict[int, LayerPrefix]:
    """Keys and values that every attention layer computes for soft tokens.

    Args:
        model: whose attention goes through the twin.
        tokens: `[G, P, E]`, a row per task present; or `[B, P, E]`, a row per text.
        forward: with the route of the rows of `tokens`, and its cores.
        first: position of the first token; None: where a prompt stands.

    Returns:
        By attention slot, keys and values `[G, H, P, D]`.
    """
    assert isinstance(model, PreTrainedModel)
    rows, p, _ = tokens.shape
    if first is None:
        first = 0 if position_offset(model, p) else -p
    embeddings = model.get_input_embeddings().weight
    collected: dict[int, LayerPrefix] = {}
    inside = replace(
        forward, prefix={}, collected=collected, rows=rows, lengths=(p,), handed={}, prepared=None,
        losses=None, mask=None, generated=True,
    )  # fmt: skip
    if model.training:
        routing.bind_checkpointing(model)
    with routing.opened(inside):
        # Without the head, which would compute logits of the soft tokens.
        model.base_model(
            inputs_embeds=tokens.to(embeddings.device, embeddings.dtype),
            position_ids=torch.arange(first, first + p, device=embeddings.device)[None],
            use_cache=False,
        )
    return collected


def word_ids(model: nn.Module, config: WordPromptConfig, num_tokens: int) -> Tensor | None:
    """Ids of the words that a prompt begins at, `[P]`; None: at no words.

    Raises:
        PemlError: there is no tokenizer, or the text has no tokens.
    """
    if config.prompt_tuning_init == "random":
        return None
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    if config.prompt_tuning_init == "sample_vocab":
        return torch.randint(embeddings.weight.shape[0], (num_tokens,))
    path = config.tokenizer_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer(config.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # hub, network and tokenizer classes fail in their own ways
        raise PemlError(
            f"prompt.prompt_tuning_init_text needs a tokenizer, and {path or 'this model'!r} has none that loads: set "
            "prompt.tokenizer_name_or_path"
        ) from error
    if not ids:
        raise PemlError("prompt.prompt_tuning_init_text has no tokens")
    if max(ids) >= embeddings.weight.shape[0]:
        raise PemlError("prompt.tokenizer_name_or_path: this tokenizer has more tokens than the model")
    return torch.tensor((ids * (num_tokens // len(ids) + 1))[:num_tokens])
