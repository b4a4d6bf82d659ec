"""Which texts a language model reads and writes for an example, before anything is tokenised.

A plain example is its prompt, one blank, its answer. A conversation is rendered by the tokeniser's chat template
up to the generation prompt; the answer follows as the assistant's turn, up to what ends the turn. White space
behind that end is left out: nothing is read after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.tasks.conversation import Turns
from peml.tasks.example import Example

PROBE = "Qzx7Answer7xzQ"
"""Stands in for the answer while the chat template is asked what it puts around one."""


@dataclass(frozen=True)
class Script:
    """The texts of one example.

    Attributes:
        context: what the model reads before it answers; generation begins behind it.
        glue: between context and answer.
        end: behind a written answer, by the chat template; a plain example has none but the tokeniser's end token.
        head: the beginning of `context` that stays when it is too long: all before the first turn's own text.
    """

    context: str
    glue: str = " "
    end: str = ""
    head: str = ""


def script(tokenizer: PreTrainedTokenizerBase, example: Example) -> Script:
    """The texts of an example for a tokeniser.

    Raises:
        PemlError: a conversation, and the tokeniser has no chat template, or one that refuses it.
    """
    if not example.turns:
        return Script(example.prompt)
    if not tokenizer.chat_template:
        raise PemlError(
            f"task {example.task!r} is a conversation, and the model's tokenizer has no chat template: use a model "
            "that was tuned for chat, or plain texts (`prompt` and `answer` templates, without `chat: true`)"
        )
    context = _rendered(tokenizer, example, example.turns, open_=True)
    whole = _rendered(tokenizer, example, (*example.turns, ("assistant", PROBE)), open_=False)
    before, found, end = whole.rpartition(PROBE)
    if not found:
        raise PemlError(
            f"task {example.task!r}: the model's chat template leaves the assistant's turn out: use another"
        )
    # Some templates open the turn in one way and write it in another (an empty thought, a channel): the answer
    # goes where generation begins, or behind what the template always puts there.
    extra = before.removeprefix(context) if before.startswith(context) else ""
    if extra.strip(" "):
        context, extra = context + extra, ""
    return Script(context, extra, end.rstrip(), _head(context, example.turns))


def _rendered(tokenizer: PreTrainedTokenizerBase, example: Example, turns: Turns, *, open_: bool) -> str:
    conversation = [{"role": role, "content": content} for role, content in turns]
    try:
        # Our choice: models that can think aloud answer at once, because the rows have no thoughts to learn.
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=open_, enable_thinking=False
        )
    except Exception as error:  # a template is a program of the model's authors and may refuse in any way
        reason = " ".join(str(error).split())
        raise PemlError(
            f"{example.origin}: task {example.task!r}: the model's chat template refuses the conversation ({reason})"
        ) from error
    return str(text)


def _head(context: str, turns: Turns) -> str:
    system = turns[0][1] if turns[0][0] == "system" else ""
    first = next((content for role, content in turns if role != "system"), "")
    at = context.find(first, context.find(system) + len(system))
    return context[: max(at, 0)]


def with_fewer_shots(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], endings: Sequence[str], rooms: Sequence[int]
) -> list[Example]:
    """The examples without so many of the first shots of their prompts that prompt and ending fit into its room.

    An example that fits, or has no shots, is itself; one that is too long without shots is cut elsewhere.
    """
    fitted = list(examples)
    pending = [i for i, example in enumerate(fitted) if example.cuts]
    while pending:
        scripts = [script(tokenizer, fitted[i]) for i in pending]
        texts = [
            each.context + each.glue * bool(endings[i]) + endings[i] for i, each in zip(pending, scripts, strict=True)
        ]
        lengths = count_tokens(tokenizer, texts)
        pending = [i for i, length in zip(pending, lengths, strict=True) if length > rooms[i] and fitted[i].cuts]
        for i in pending:
            cut, *later = fitted[i].cuts
            fitted[i] = fitted[i].asked(fitted[i].prompt[cut:], tuple(at - cut for at in later))
    return fitted


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without special ones of the tokeniser's own."""
    if not texts:
        return []
    # Not verbose: prompts above the model's length are cut later, so the tokenizer need not warn of them.
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """How many ids each text has."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return [len(ids) for ids in tokenize(tokenizer, texts)]
    # Without the offsets, and without the ids becoming Python's.
    return [len(encoding) for encoding in inner.encode_batch_fast(texts, add_special_tokens=False)]
