"""Soft tokens in an encoder: there they see the text, so they go through the model with it, row by row.

They stand behind the first token, which classifiers read, and outputs by token are given without them. The encoder of
an encoder-decoder model has them in front of the text, and the decoder attends to what becomes of them.

Letters: `P` soft tokens, `S` tokens of the text, `E` width of the input embeddings, `B` rows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peml.errors import PemlError

IGNORED = -100
"""Label of a token without a loss, as in PyTorch."""


def lengthened(model: nn.Module, call: dict[str, Any], front: Tensor) -> dict[str, Any]:
    """The arguments of a call with soft tokens behind the first token of every row.

    Args:
        model: the encoder with its head.
        call: its arguments by name.
        front: `[B, P, E]`.

    Raises:
        PemlError: rows that are padded on the left, a mask that is not `[B, S]`, or too long a text.
    """
    name, p = type(model).__name__, front.shape[1]
    embedded = call.pop("inputs_embeds", None)
    ids = call.pop("input_ids", None)
    if embedded is None:
        embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]
    rows, length = embedded.shape[:2]
    mask = call.get("attention_mask")
    if mask is None:
        mask = torch.ones(rows, length, dtype=torch.long, device=embedded.device)
    if mask.ndim != 2:
        raise PemlError(f"{name} has a prompt at its input: its mask has to be rows x tokens, not {list(mask.shape)}")
    if not bool(mask[:, 0].all()):
        raise PemlError(f"{name} has a prompt behind its first token: pad rows on the right")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and length + p + _first_position(model, None) > limit:
        raise PemlError(f"{name} has {limit} positions: a text of {length} tokens and a prompt of {p} do not fit")
    call["inputs_embeds"] = _insert(embedded, front.to(embedded.device, embedded.dtype))
    call["attention_mask"] = _insert(mask, mask.new_ones(rows, p))
    if isinstance(types := call.get("token_type_ids"), Tensor):
        call["token_type_ids"] = _insert(types, types[:, :1].expand(-1, p))
    labels = call.get("labels")
    if isinstance(labels, Tensor) and labels.shape == (rows, length) and not labels.is_floating_point():
        call["labels"] = _insert(labels, labels.new_full((rows, p), IGNORED))
    if call.get("start_positions") is not None or call.get("end_positions") is not None:
        raise PemlError(
            f"{name} with a prompt at its input would count the soft tokens among the answers: leave out "
            "start_positions= and end_positions=, and compute the loss from the logits"
        )
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        given = call.get("position_ids")
        text = torch.arange(length, device=embedded.device)[None] if given is None else given
        first, own = text[:, :1], torch.arange(1, p + 1, device=embedded.device)[None]
        call["position_ids"] = torch.cat([first, first + own, text[:, 1:] + p], dim=1) + _first_position(model, given)
    return call


def fronted(encoder: nn.Module, call: dict[str, Any], front: Tensor) -> dict[str, Any]:
    """The arguments of a call of an encoder with soft tokens in front of every row.

    Args:
        encoder: of an encoder-decoder model.
        call: its arguments by name; the mask may be that of the whole already.
        front: `[B, P, E]`.
    """
    embedded, ids, p = call.pop("inputs_embeds", None), call.pop("input_ids", None), front.shape[1]
    if embedded is None:
        embedded = encoder.get_input_embeddings()(ids)  # type: ignore[operator]
    front = front.to(embedded.device, embedded.dtype).expand(embedded.shape[0], -1, -1)
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape[-1] == embedded.shape[1]:
        call = widened(call, p)
    return call | {"inputs_embeds": torch.cat([front, embedded], dim=1)}


def check_outputs(call: dict[str, Any], num_tokens: int) -> None:
    """Refuse outputs of an encoder that has not read the soft tokens.

    Raises:
        PemlError: the caller gives such outputs, or no mask to tell.
    """
    mask, outputs = call.get("attention_mask"), call.get("encoder_outputs")
    if outputs is None:
        return
    read = outputs[0].shape[1]
    if not isinstance(mask, Tensor) or mask.shape[-1] + num_tokens != read:
        raise PemlError(
            f"encoder_outputs= has {read} tokens, and this adapter puts a prompt of {num_tokens} before the text: give "
            "outputs that its own encoder made in a call with the prompt, and the attention_mask of the text"
        )


def widened(call: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """The arguments of a call with soft tokens visible in the mask of the text.

    Raises:
        PemlError: a mask that is not `[B, S]`.
    """
    mask = call.get("attention_mask")
    if not isinstance(mask, Tensor):
        return call
    if mask.ndim != 2:
        raise PemlError(f"a model with a prompt at its input takes a mask of rows x tokens, not {list(mask.shape)}")
    return call | {"attention_mask": torch.cat([mask.new_ones(mask.shape[0], num_tokens), mask], dim=1)}


def _first_position(model: nn.Module, given: Tensor | None) -> int:
    """Where positions begin that nobody gave: behind the padding token's number in RoBERTa and its kin."""
    counts = any(hasattr(part, "create_position_ids_from_input_ids") for part in model.modules())
    return int(model.config.pad_token_id) + 1 if counts and given is None else 0  # type: ignore[union-attr, arg-type]


def _insert(text: Tensor, front: Tensor) -> Tensor:
    return torch.cat([text[:, :1], front.expand(text.shape[0], *front.shape[1:]), text[:, 1:]], dim=1)


def shortened(output: Any, length: int, num_tokens: int, num_labels: int | None = None) -> Any:
    """Outputs without the soft tokens: whatever has a place per token.

    Args:
        output: of the model, `ModelOutput` or tuple.
        length: S + P.
        num_tokens: P.
        num_labels: of a classifier.
    """

    def cut(value: Any, name: str = "") -> Any:
        if isinstance(value, tuple) and name != "attentions":
            return tuple(cut(part) for part in value)
        by_token = isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[1] == length
        # As many classes as tokens: scores of a classifier.
        if by_token and (value.ndim == 3 or length != num_labels or name in ("start_logits", "end_logits")):
            return torch.cat([value[:, :1], value[:, 1 + num_tokens :]], dim=1)
        return value

    if isinstance(output, tuple):
        return cut(output)
    for name in list(output.keys()):
        output[name] = cut(output[name], name)
    return output
