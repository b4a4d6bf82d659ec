"""From an example to token ids: what the model reads, then the answer, with the loss on the answer alone.

`peml.tasks.script` says which texts these are. They are tokenised together, as a reader would see them, because
many tokenisers join the blank with the word behind it. The answer begins where the ids of the context alone end;
if a token spans that border, it begins with that token. What is too long loses the *beginning* of its prompt, never
of its answer: whole examples first, the earliest before the others, and only then tokens of the question. A chat
template's head (the system's turn) stays.

Training, scoring of options and generation all come through `pieces`, so that they cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.tasks.example import Example
from peml.tasks.script import Script, count_tokens, script, tokenize, with_fewer_shots

IGNORED = -100
"""The label of positions without a loss, as PyTorch and transformers have it."""


Form = Literal["causal", "seq2seq", "heads"]
"""How a model answers: it goes on with the prompt, it writes after having read it, or it has a head for each task."""


Use = Literal["answer", "choices", "prompt"]


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


@dataclass(frozen=True)
class Pieces:
    """Token ids of one example before anything is cut.

    Attributes:
        example: which it is.
        fixed: what stays in front: the leading special tokens, or the head of the chat template.
        context: what may lose its beginning.
        endings: each answer, with its end token if it has one.
    """

    example: Example
    fixed: list[int]
    context: list[int]
    endings: list[list[int]]

    def cut(self, max_length: int) -> list[Encoded]:
        """The example with each of its answers, which share border and cut.

        Raises:
            PemlError: an answer leaves no room for a token of context, or has no token of its own.
        """
        longest = max(map(len, self.endings))
        room = max_length - len(self.fixed) - longest
        if room < 1:
            raise self._too_long(longest, "tokens of answer", max_length)
        if not min(map(len, self.endings)) or not self.fixed + self.context:
            raise PemlError(
                f"{self.example.origin}: task {self.example.task!r}: the prompt or the answer has no token of its own "
                "for this tokenizer; reword it or use another model"
            )
        kept, lost = self.fixed + self.context[-room:], len(self.context) > room
        return [Encoded(kept + ending, [IGNORED] * len(kept) + ending, truncated=lost) for ending in self.endings]

    def cut_prompt(self, max_length: int, max_new_tokens: int) -> Encoded:
        """The context alone, so that `max_new_tokens` more tokens stay within `max_length`.

        Raises:
            PemlError: no token of context would stay.
        """
        room = max_length - max_new_tokens - len(self.fixed)
        if room < 1:
            raise self._too_long(max_new_tokens, "new tokens", max_length)
        kept = self.fixed + self.context[-room:]
        return Encoded(kept, [IGNORED] * len(kept), len(self.context) > room)

    def _too_long(self, after: int, what: str, max_length: int) -> PemlError:
        before = len(self.fixed) + len(self.context)
        least = f"the first {len(self.fixed)} and one more" if self.example.turns else "at least one"
        return PemlError(
            f"{self.example.origin}: task {self.example.task!r}: {after} {what} after {before} tokens of prompt, of "
            f"which {least} must stay, do not fit into `max_length` {max_length}; raise it or ask for less"
        )


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Encoded:
    """One example for training; a written answer ends with the tokeniser's end token, a choice does not.

    Choices are scored without it, and some base models have hardly seen their end token: a loss on it would
    drown that of the answer.
    """
    return encode_all(tokenizer, [example], max_length)[0]


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """`encode` for many examples, tokenised at once."""
    return [rows[0] for rows in _encode(tokenizer, examples, "answer", max_length)]


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[list[Encoded]]:
    """Every choice of every example as its answer, without end token; without choices, the right answer.

    The choices of one example share border and cut: their scores are only comparable given the same context.
    """
    return _encode(tokenizer, examples, "choices", max_length)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, max_new_tokens: int
) -> list[Encoded]:
    """Prompts for generation, cut so that `max_new_tokens` more tokens stay within `max_length`."""
    return [rows[0] for rows in _encode(tokenizer, examples, "prompt", max_length, max_new_tokens)]


def _encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], use: Use, max_length: int, new: int = 0
) -> list[list[Encoded]]:
    lead = len(_leading_ids(tokenizer))
    rooms = [max_length - new - lead - int(use == "answer" and not example.choices) for example in examples]
    endings = [max(_answers(example, use), key=len, default="") for example in examples]
    fitted = with_fewer_shots(tokenizer, examples, endings, rooms)
    made = pieces(tokenizer, fitted, use)
    cut = [[each.cut_prompt(max_length, new)] if use == "prompt" else each.cut(max_length) for each in made]
    return [
        rows if example is whole else [replace(row, truncated=True) for row in rows]
        for rows, example, whole in zip(cut, fitted, examples, strict=True)
    ]


def token_counts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], use: Use) -> list[int]:
    """Tokens of each example with its longest answer, as `pieces` would have them, in a third of the time."""
    lead, scripts = len(_leading_ids(tokenizer)), [script(tokenizer, example) for example in examples]
    answers = [_answers(example, use) for example in examples]
    ended = [use == "answer" and not example.choices for example in examples]
    counts = iter(count_tokens(tokenizer, _texts(scripts, answers, ended)))
    last = {end: len(_last(tokenizer, end)) for end in {each.end for each in scripts}}
    return [
        max(next(counts) for _ in group) + (0 if example.turns else lead) + (last[each.end] if closed else 0)
        for example, each, group, closed in zip(examples, scripts, answers, ended, strict=True)
    ]


def end_ids(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> set[int]:
    """Tokens that end a written answer: the tokeniser's own, and the chat template's where that is another."""
    ends = {script(tokenizer, example).end for example in examples[:1] if example.turns}
    own = tokenizer.eos_token_id
    return {end for text in ends if (end := _one_token(tokenizer, text)) is not None} | ({own} - {None})


def pieces(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], use: Use) -> list[Pieces]:
    """Token ids of examples, tokenised at once and not cut yet.

    Args:
        tokenizer: the tokeniser.
        examples: what to encode.
        use: `answer`: with the right answer, as in training; `choices`: with every choice, without end; `prompt`:
            without an answer, for generation.

    Raises:
        PemlError: a conversation, and the tokeniser has no chat template for it.
    """
    lead, scripts = _leading_ids(tokenizer), [script(tokenizer, example) for example in examples]
    answers = [_answers(example, use) for example in examples]
    contexts = tokenize(tokenizer, [each.context for each in scripts])
    heads = iter(tokenize(tokenizer, [each.head for each in scripts if each.head]))
    ended = [use == "answer" and not example.choices for example in examples]
    wholes = iter(tokenize(tokenizer, _texts(scripts, answers, ended)))
    last = {end: _last(tokenizer, end) for end in {each.end for each in scripts}}
    made = []
    for example, each, context, group, closed in zip(examples, scripts, contexts, answers, ended, strict=True):
        mine = [next(wholes) + (last[each.end] if closed else []) for _ in group]
        border = min((_common_prefix(context, whole) for whole in mine), default=len(context))
        begin = min(border, _common_prefix(next(heads), context)) if each.head else 0
        # What a chat template writes has its own special tokens already.
        fixed = context[:begin] if example.turns else lead
        made.append(Pieces(example, fixed, context[begin:border], [whole[border:] for whole in mine]))
    return made


def _texts(scripts: Sequence[Script], answers: Sequence[tuple[str, ...]], ended: Sequence[bool]) -> list[str]:
    return [
        each.context + each.glue + answer + each.end * closed
        for each, group, closed in zip(scripts, answers, ended, strict=True)
        for answer in group
    ]


def _answers(example: Example, use: Use) -> tuple[str, ...]:
    if use == "prompt":
        return ()
    return (use == "choices" and example.choices) or (example.answer,)


def _last(tokenizer: PreTrainedTokenizerBase, end: str) -> list[int]:
    """What follows the end of a written answer: the end token, unless the chat template has put one token there."""
    if tokenizer.eos_token_id is None or _one_token(tokenizer, end) is not None:
        return []
    return [tokenizer.eos_token_id]


def _one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    ids = tokenize(tokenizer, [text.strip()])[0]
    return ids[0] if len(ids) == 1 else None


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
