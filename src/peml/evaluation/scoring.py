"""How a model answers: by scoring the options it may choose from, or by writing.

An option is scored by its log-likelihood after the prompt, log p(" " + option | prompt), summed over its
tokens. With length normalisation the sum is divided by the option's length in UTF-8 bytes (lm-eval's
`acc_norm` counts characters: the same for ASCII). Batches are formed by length and do not change the answers.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from peml.attention import evaluating
from peml.errors import PemlError
from peml.tasks.encode import IGNORED, Encoded, Form, encode_choices, encode_prompts, end_ids
from peml.tasks.encode_seq2seq import encode_seq2seq, encode_seq2seq_choices
from peml.tasks.example import Example

ENCODE_CHOICES: Mapping[Form, Callable[..., list[list[Encoded]]]] = {
    "causal": encode_choices,
    "seq2seq": encode_seq2seq_choices,
}
"""How the choices of an example become token ids, by how the model answers."""

Advance = Callable[[int], object]
"""Called with the number of sequences that were just finished."""


def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    batch_size: int,
    tasks_kwarg: bool,
    length_normalization: bool = False,
    progress: Advance | None = None,
) -> list[int]:
    """Index of the likeliest choice of each example; the first of equals.

    Args:
        model: a causal language model.
        tokenizer: its tokeniser.
        examples: examples with choices.
        max_length: longest sequence in tokens; longer prompts lose their beginning.
        batch_size: sequences, i.e. rows times options, per forward pass.
        tasks_kwarg: whether the model is called with `tasks=[name per row]`.
        length_normalization: divide each log-likelihood by the bytes of its option.
        progress: told how many sequences are done.
    """
    for example in examples:
        if not example.choices:
            raise PemlError(f"{example.origin}: task {example.task!r} has no choices to score; generate its answer")
    groups = encode_choices(tokenizer, examples, max_length)
    names = [e.task for e, group in zip(examples, groups, strict=True) for _ in group] if tasks_kwarg else None
    flat = [encoded for group in groups for encoded in group]
    scores = iter(log_likelihoods(model, tokenizer, flat, names, batch_size=batch_size, progress=progress))
    return [best_choice(e, list(islice(scores, len(e.choices))), length_normalization) for e in examples]


def best_choice(example: Example, scores: Sequence[float], length_normalization: bool = False) -> int:
    """Index of the choice with the highest log-likelihood, per byte if `length_normalization`."""
    lengths = [len(c.encode("utf-8")) if length_normalization else 1 for c in example.choices]
    values = [score / length for score, length in zip(scores, lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__)


def log_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    tasks: Sequence[str] | None,
    *,
    batch_size: int,
    form: Form = "causal",
    progress: Advance | None = None,
) -> list[float]:
    """Sum of the log-probabilities of each sequence's labelled tokens; `tasks` names the task of each."""
    pad = pad_id(tokenizer)
    device = next(model.parameters()).device
    scores = [0.0] * len(encoded)
    keeps_logits = _accepts_logits_to_keep(model)
    with evaluating(model), torch.no_grad():  # inference mode would taint what the model caches
        for picked in _batches([len(e.input_ids) for e in encoded], batch_size):
            rows = [encoded[i] for i in picked]
            width = max(len(row.input_ids) for row in rows)
            # The last logits of a text that goes on predict nothing that is known, so labels move one to the left.
            answers = [row.labels[int(form == "causal") :] for row in rows]
            targets = _padded(answers, width if form == "causal" else max(map(len, answers)), IGNORED, device)
            batch: dict[str, Any] = {
                "input_ids": _padded([row.input_ids for row in rows], width, pad, device),
                "attention_mask": _padded([[1] * len(row.input_ids) for row in rows], width, 0, device),
            }
            if tasks is not None:
                batch["tasks"] = [tasks[i] for i in picked]
            if form == "seq2seq":
                batch["decoder_input_ids"] = _bare(model).prepare_decoder_input_ids_from_labels(targets)
            elif tasks is not None:
                # A prompt that is made from the text must not see the answers that it is to rank.
                batch["input_mask"] = _padded(
                    [[int(label == IGNORED) for label in row.labels] for row in rows], width, 0, device
                )
            at_row, at_column = torch.nonzero(targets != IGNORED, as_tuple=True)
            target = targets[at_row, at_column]
            if keeps_logits and form == "causal":
                # Logits over a large vocabulary are by far the largest tensor: only answer positions get any.
                batch["logits_to_keep"], at_column = torch.unique(at_column, return_inverse=True)
            logits = model(**batch).logits[at_row, at_column].float()
            gains = logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)
            sums = torch.zeros(len(rows), dtype=torch.float64)
            sums.index_add_(0, at_row.cpu(), gains.cpu().double())
            for i, value in zip(picked, sums.tolist(), strict=True):
                scores[i] = value
            if progress:
                progress(len(picked))
    return scores


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
    tasks_kwarg: bool,
    one_line: bool = True,
    form: Form = "causal",
    progress: Advance | None = None,
) -> list[str]:
    """Greedy continuation of each prompt up to the end token or, by default, the end of its first line.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokeniser.
        examples: their prompts are continued; their answers are not looked at.
        max_length: longest sequence in tokens, new ones included; longer prompts lose their beginning.
        max_new_tokens: longest answer.
        batch_size: prompts per batch.
        tasks_kwarg: whether the model is called with `tasks=[name per row]`.
        one_line: whether a line break ends an answer.
        form: how the model answers: an encoder-decoder writes its answer apart from the prompt.
        progress: told how many prompts are done.
    """
    if form == "seq2seq":
        encoded = encode_seq2seq(tokenizer, examples, max_length)
    else:
        encoded = encode_prompts(tokenizer, examples, max_length, max_new_tokens)
    prompts, goes_on = [row.input_ids for row in encoded], form == "causal"
    device = next(model.parameters()).device
    ends = sorted(end_ids(tokenizer, examples) | _end_ids(model))
    # Said in full, because models come with settings of their own (sampling, penalties; BART's were for summaries).
    settings = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "min_length": 0,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "eos_token_id": ends or None,
        "pad_token_id": pad_id(tokenizer),
        "stopping_criteria": StoppingCriteriaList([_AtNewline(tokenizer)] if one_line else []),
    }
    generate: Callable[..., Any] = getattr(model, "generate")  # noqa: B009  (nn.Module does not declare it)
    answers = [""] * len(prompts)
    with evaluating(model), torch.no_grad():  # inference mode would taint what the model caches
        for picked in _batches([len(prompt) for prompt in prompts], batch_size):
            width = max(len(prompts[i]) for i in picked)
            output = generate(
                input_ids=_padded([prompts[i] for i in picked], width, pad_id(tokenizer), device, left=goes_on),
                attention_mask=_padded([[1] * len(prompts[i]) for i in picked], width, 0, device, left=goes_on),
                **settings,
                **({"tasks": [examples[i].task for i in picked]} if tasks_kwarg else {}),
            )
            for i, ids in zip(picked, output[:, width if goes_on else 1 :].tolist(), strict=True):
                text = _until_end(tokenizer, ids, ends)
                answers[i] = (text.split("\n", 1)[0] if one_line else text).strip()
            if progress:
                progress(len(picked))
    return answers


class _AtNewline(StoppingCriteria):
    """Ends a row whose newest token holds a line break."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        newest = self.tokenizer.batch_decode(input_ids[:, -1:])
        return torch.tensor(["\n" in text for text in newest], device=input_ids.device)


def _until_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: list[int]) -> str:
    # Cut before decoding: what follows the end is padding, which need not be a special token.
    stop = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    text: Any = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return str(text)


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length; the longest first, so that too large a batch fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _padded(rows: list[list[int]], width: int, value: int, device: torch.device, left: bool = False) -> Tensor:
    filled = [[value] * (width - len(row)) + row if left else row + [value] * (width - len(row)) for row in rows]
    return torch.tensor(filled, device=device)


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do where the attention mask hides it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)


def _end_ids(model: nn.Module) -> set[int]:
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = known if isinstance(known, list) else [known]
    return {i for i in listed if isinstance(i, int)}


def _accepts_logits_to_keep(model: nn.Module) -> bool:
    inner = getattr(model, "get_base_model", lambda: model)()
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
