"""One request from ids to text: generated, cut at a stop text, timed, counted."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from peml.serving.engine import Engine
from peml.serving.limits import Limits, Refused
from peml.serving.metrics import Metrics
from peml.serving.prompts import Decoder
from peml.serving.sampling import Sampling, Token


@dataclass(frozen=True)
class Order:
    """What one answer is asked for.

    Args:
        model: the id, for the counters.
        task: id of the task.
        ids: of the prompt.
        max_tokens: of the answer.
        sampling: how tokens are chosen.
        stops: texts that end it.
    """

    model: str
    task: int
    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stops: Sequence[str] = ()


@dataclass
class Piece:
    """Some text of an answer, and the tokens that it came with.

    Args:
        text: new and certain.
        tokens: new; those of an end are not text.
        finish: why the answer is over; None: it goes on.
    """

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


class Answering:
    """Answers orders on an engine.

    Args:
        engine: that generates.
        tokenizer: of the model.
        limits: of the server.
        metrics: told of tokens and times.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, limits: Limits, metrics: Metrics) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.limits = limits
        self.metrics = metrics

    def check(self, order: Order) -> None:
        """Refuse an order that is too long, before it waits for anything.

        Raises:
            Refused: naming what it has and what there is.
        """
        if order.max_tokens > self.limits.max_tokens:
            raise Refused(
                400, f"max_tokens is {order.max_tokens}, and this server writes {self.limits.max_tokens} at most",
                "max_tokens_too_large",
            )  # fmt: skip
        needed, room = len(order.ids) + order.max_tokens, self.engine.longest
        if needed > room:
            raise Refused(
                400, f"the prompt has {len(order.ids)} tokens and the answer up to {order.max_tokens}: together more "
                f"than {room}", "context_length_exceeded",
            )  # fmt: skip
        vocabulary = self.engine.vocabulary
        if any(not 0 <= number < vocabulary for number in order.ids):
            raise Refused(400, f"prompt: ids go from 0 to {vocabulary - 1}", "invalid_request")

    async def stream(self, order: Order) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer; the last one says why it is over.

        Raises:
            TimeoutError: it took too long.
        """
        decoder, begun, waiting = Decoder(self.tokenizer, order.stops), time.perf_counter(), True
        self.metrics.tokens.labels(order.model, "prompt").inc(len(order.ids))
        tokens = self.engine.generate(order.ids, order.task, order.max_tokens, order.sampling, self.limits.seconds)
        try:
            async for token in tokens:
                if waiting:
                    self.metrics.first.observe(time.perf_counter() - begun)
                    waiting = False
                self.metrics.tokens.labels(order.model, "answer").inc()
                text = "" if token.finish == "stop" else decoder.add(token.id)
                finish = "stop" if decoder.stopped else token.finish
                if finish is not None and not decoder.stopped:
                    text += decoder.end()
                yield Piece(text, [token], finish)
                if finish is not None:
                    break
        finally:
            await tokens.aclose()
            self.metrics.whole.observe(time.perf_counter() - begun)

    async def whole(self, order: Order) -> Piece:
        """An answer in one piece."""
        answer = Piece("")
        async for piece in self.stream(order):
            answer.text += piece.text
            answer.tokens += piece.tokens
            answer.finish = piece.finish
        return answer
