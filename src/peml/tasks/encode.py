"""From an example to token ids: prompt, one blank, answer, with the loss on the answer alone.

Prompt and answer are tokenised together, as a reader would see them, because many tokenisers join the blank
with the word behind it. The answer begins where the ids of the prompt alone end; if a token spans that
border, it begins with that token. What is too long loses the *beginning* of its prompt, never of its answer:
whole examples first, the earliest before the others, and only then tokens of the question.

Training, scoring of options and generation all come through here, so that they cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.tasks.task import Example

IGNORED = -100
"""The label of positions without a loss, as PyTorch and transformers have it."""


Form = Literal["causal", "seq2seq", "heads"]
"""How a model answers: it goes on with the prompt, it writes after having read it, or it has a head for each task."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example.

    Attributes:
        input_ids: a leading special token if the tokeniser has one, the prompt, and for `causal` the answer.
        labels: `causal`: the ids of the answer, -100 elsewhere; `labels[i]` belongs to `input_ids[i]` (not shifted).
            `seq2seq`: the ids of the answer. `heads`: none.
        truncated: whether the prompt lost its beginning.
        token_type_ids: segment of each token, for models that want it.
        target: what a head should say: the number of a class, or a value.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    token_type_ids: list[int] | None = None
    target: float | None = None


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Encoded:
    """One example for training; a written answer ends with the tokeniser's end token, a choice does not.

    Choices are scored without it, and some base models have hardly seen their end token: a loss on it would
    drown that of the answer.
    """
    return encode_all(tokenizer, [example], max_length)[0]


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """`encode` for many examples, tokenised at once."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    groups = _encode(tokenizer, examples, [(example.answer,) for example in examples], end, max_length)
    return [group[0] for group in groups]


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[list[Encoded]]:
    """Every choice of every example as its answer, without end token; without choices, the right answer.

    The choices of one example share border and cut: their scores are only comparable given the same context.
    """
    return _encode(tokenizer, examples, [e.choices or (e.answer,) for e in examples], [], max_length)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, max_new_tokens: int
) -> list[Encoded]:
    """Prompts for generation, cut so that `max_new_tokens` more tokens stay within `max_length`."""
    lead = _leading_ids(tokenizer)
    encoded = []
    room = max_length - max_new_tokens - len(lead)
    fitted = with_fewer_shots(tokenizer, examples, [""] * len(examples), [room] * len(examples))
    prompts = _tokenize(tokenizer, [example.prompt for example in fitted])
    for example, prompt, whole in zip(fitted, prompts, examples, strict=True):
        if room < 1:
            raise _too_long(example, len(lead) + 1, max_new_tokens, "new tokens", max_length)
        ids = lead + prompt[-room:]
        encoded.append(Encoded(ids, [IGNORED] * len(ids), len(prompt) > room or example is not whole))
    return encoded


def with_fewer_shots(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], endings: Sequence[str], rooms: Sequence[int]
) -> list[Example]:
    """The examples without so many of the first shots of their prompts that prompt and ending fit into its room.

    An example that fits, or has no shots, is itself; one that is too long without shots is cut elsewhere.
    """
    fitted = list(examples)
    pending = [i for i, example in enumerate(fitted) if example.cuts]
    while pending:
        lengths = map(len, _tokenize(tokenizer, [fitted[i].prompt + endings[i] for i in pending]))
        pending = [i for i, length in zip(pending, lengths, strict=True) if length > rooms[i] and fitted[i].cuts]
        for i in pending:
            cut, *later = fitted[i].cuts
            fitted[i] = replace(fitted[i], prompt=fitted[i].prompt[cut:], cuts=tuple(at - cut for at in later))
    return fitted


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    answers: Sequence[tuple[str, ...]],
    end: list[int],
    max_length: int,
) -> list[list[Encoded]]:
    lead = _leading_ids(tokenizer)
    longest = [" " + max(group, key=len) for group in answers]
    rooms = [max_length - len(lead) - (0 if example.choices else len(end)) for example in examples]
    fitted = with_fewer_shots(tokenizer, examples, longest, rooms)
    prompts = _tokenize(tokenizer, [example.prompt for example in fitted])
    texts = [f"{e.prompt} {answer}" for e, group in zip(fitted, answers, strict=True) for answer in group]
    wholes = iter(_tokenize(tokenizer, texts))
    groups = [
        _encode_one(example, lead, prompt, [next(wholes) + ([] if example.choices else end) for _ in group], max_length)
        for example, prompt, group in zip(fitted, prompts, answers, strict=True)
    ]
    return [
        group if example is whole else [replace(encoded, truncated=True) for encoded in group]
        for group, example, whole in zip(groups, fitted, examples, strict=True)
    ]


def _encode_one(
    example: Example, lead: list[int], prompt: list[int], wholes: list[list[int]], max_length: int
) -> list[Encoded]:
    border = min(_common_prefix(prompt, whole) for whole in wholes)
    context = wholes[0][:border]
    endings = [whole[border:] for whole in wholes]
    longest = max(map(len, endings))
    room = max_length - len(lead) - longest
    if room < 1:
        raise _too_long(example, len(lead) + len(context), longest, "tokens of answer", max_length)
    if not min(map(len, endings)) or not lead + context:
        raise PemlError(
            f"{example.origin}: task {example.task!r}: the prompt or the answer has no token of its own "
            "for this tokenizer; reword it or use another model"
        )
    kept = lead + context[-room:]
    return [Encoded(kept + ending, [IGNORED] * len(kept) + ending, truncated=len(context) > room) for ending in endings]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # Not verbose: prompts above the model's length are cut here, so the tokenizer need not warn of them.
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokeniser puts in front; those that it puts at the end are left out."""
    return _special_ids(tokenizer)[0]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens that the tokeniser puts in front of a text, and behind it."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    added = len(full) - len(bare)
    front = next((n for n in range(added + 1) if full[n : n + len(bare)] == bare), 0)
    return full[:front], full[front + len(bare) :]


def _common_prefix(first: list[int], second: list[int]) -> int:
    if second[: len(first)] == first:  # nearly always, and much faster
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _too_long(example: Example, before: int, after: int, what: str, max_length: int) -> PemlError:
    return PemlError(
        f"{example.origin}: task {example.task!r}: {after} {what} after {before} tokens of prompt, of "
        f"which at least one must stay, do not fit into `max_length` {max_length}; raise it or ask for less"
    )
