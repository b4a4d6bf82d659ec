"""From an example to token ids for an encoder-decoder: what it reads, and what it writes.

Answers end with the tokeniser's end token, choices too: these models have always been taught to write it.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.tasks.encode import Encoded, _special_ids
from peml.tasks.example import Example
from peml.tasks.script import script, tokenize, with_fewer_shots


def encode_seq2seq(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """The right answer of every example; both texts have room for `max_length` tokens of their own.

    Raises:
        PemlError: an answer that does not fit, or has no tokens.
    """
    return [group[0] for group in _encode(tokenizer, examples, [(e.answer,) for e in examples], max_length)]


def encode_seq2seq_choices(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[list[Encoded]]:
    """Every choice of every example as its answer; without choices, the right answer."""
    return _encode(tokenizer, examples, [e.choices or (e.answer,) for e in examples], max_length)


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    answers: Sequence[tuple[str, ...]],
    max_length: int,
) -> list[list[Encoded]]:
    front, back = _special_ids(tokenizer)
    room = max_length - len(front) - len(back)
    fitted = with_fewer_shots(tokenizer, examples, [""] * len(examples), [room] * len(examples))
    prompts = tokenize(tokenizer, [script(tokenizer, example).context for example in fitted])
    targets = iter(tokenizer(text_target=[a for group in answers for a in group], verbose=False)["input_ids"])
    encoded = []
    for example, whole, prompt, group in zip(fitted, examples, prompts, answers, strict=True):
        labels = [next(targets) for _ in group]
        longest = max(map(len, labels))
        # What a chat template writes has its own special tokens already.
        before = [] if example.turns else front
        room = max_length - len(before) - len(back)
        if room < 1 or longest > max_length:
            raise PemlError(
                f"{example.origin}: task {example.task!r}: an answer of {longest} tokens does not fit `max_length` "
                f"{max_length}; raise it or ask for less"
            )
        ids = before + prompt[-room:] + back
        encoded.append([Encoded(ids, own, len(prompt) > room or example is not whole) for own in labels])
    return encoded
