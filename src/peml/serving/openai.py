"""Answers in the form of OpenAI's API, whole and as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from peml.serving.answers import Piece
from peml.serving.sampling import Token

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens, counted."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Completions:
    """The form of `/v1/completions`.

    Args:
        tokenizer: names tokens in log-probabilities.
        wanted: whether these are asked for.
    """

    whole, part = "text_completion", "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wanted: bool) -> None:
        self.tokenizer = tokenizer
        self.wanted = wanted
        self._lengths: dict[int, int] = {}

    def first(self, index: int) -> dict[str, Any] | None:
        """What comes before all text in a stream."""
        return None

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole answer."""
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(index, piece.tokens) if self.wanted else None,
            "finish_reason": piece.finish,
        }

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """A part of one."""
        return self.choice(index, piece)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        names = [name_of(self.tokenizer, token.id) for token in tokens]
        # In a stream a piece goes on where the last one ended.
        offsets = [self._lengths.get(index, 0)]
        for name in names:
            offsets.append(offsets[-1] + len(name))
        self._lengths[index] = offsets[-1]
        top = [{name_of(self.tokenizer, number): value for number, value in token.top} for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets[:-1],
        }


class Chats(Completions):
    """The form of `/v1/chat/completions`."""

    whole, part = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def first(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(index, piece.tokens) if self.wanted else None,
            "finish_reason": piece.finish,
        }

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """A part of one."""
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text or piece.finish is None else {},
            "logprobs": self._logprobs(index, piece.tokens) if self.wanted else None,
            "finish_reason": piece.finish,
        }

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "content": [
                self._entry(token.id, token.logprob) | {"top_logprobs": [self._entry(*each) for each in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }

    def _entry(self, number: int, value: float | None) -> dict[str, Any]:
        name = name_of(self.tokenizer, number)
        return {"token": name, "logprob": value, "bytes": list(name.encode("utf-8"))}


def name_of(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """A token as text."""
    return str(tokenizer.decode([number], clean_up_tokenization_spaces=False))
