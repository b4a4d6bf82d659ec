"""Parts of the server by themselves: the draw of a token, and text that comes in pieces."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from chat import chat_tokenizer
from peml import PemlError
from peml.serving.prompts import Decoder, Reader
from peml.serving.sampling import Sampling, choose, logprobs_of
from peml.tasks.encode import encode_prompts
from peml.training import load_recipe
from workshop import write_recipe


def naive(scores: list[float], temperature: float, top_p: float, top_k: int, min_p: float) -> list[float]:
    """Probabilities by loops: of the likeliest few those that reach the share, without the unlikely among them."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: top_k if top_k > 0 else len(scores)]
    weights = {i: math.exp(scores[i] / temperature) for i in order}
    whole, kept, total = sum(weights.values()), [], 0.0
    for index in order:
        if total >= top_p:
            break
        kept.append(index)
        total += weights[index] / whole
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(scores))]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [(1.0, 1.0, 0, 0.0), (0.5, 1.0, -1, 0.0), (2.0, 0.7, 0, 0.0), (1.0, 0.05, 0, 0.0), (1.5, 0.999, 0, 0.0),
     (2.0, 1.0, 3, 0.0), (2.0, 1.0, 9, 0.0), (2.0, 1.0, 0, 0.4), (2.0, 0.8, 4, 0.5), (1.0, 1.0, 1, 1.0)],
)  # fmt: skip
def test_draws_have_their_probabilities(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    scores = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0])
    how, count = Sampling(temperature, top_p, top_k, min_p, seed=0), 4000
    drawn = torch.bincount(torch.tensor([choose(scores, how) for _ in range(count)]), minlength=5) / count
    wanted = naive(scores.tolist(), temperature, top_p, top_k, min_p)
    for found, share in zip(drawn.tolist(), wanted, strict=True):
        # Five standard deviations; a token outside the share is never drawn.
        assert abs(found - share) <= 5 * math.sqrt(share * (1 - share) / count) + 1e-12


def test_seeds() -> None:
    scores = torch.zeros(50)

    def draws(seed: int | None) -> list[int]:
        how = Sampling(1.0, seed=seed)
        return [choose(scores, how) for _ in range(20)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)
    assert choose(torch.tensor([0.0, 2.0, 1.0]), Sampling()) == 1


def test_a_temperature_close_to_nought_takes_the_likeliest() -> None:
    """Scores divided by it would be infinite."""
    assert choose(torch.tensor([1.0, 9.0, 8.9]), Sampling(temperature=1e-308)) == 1


def test_logprobs_are_of_the_model() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0])
    own, top = logprobs_of(scores, 0, 2)
    total = math.log(sum(map(math.exp, (1, 2, 3))))
    assert own == pytest.approx(1 - total)
    assert [number for number, _ in top] == [1, 2] and top[0][1] == pytest.approx(3 - total)


def test_conversations_are_read_as_in_training(tmp_path: Path) -> None:
    """The chat template for a task that was trained with it, plain text for another."""
    tokenizer = chat_tokenizer()
    row, turns = {"text": "red cat", "big": True, "color": "red"}, (("user", "red cat color :"),)
    for chat in (True, False):
        (tmp_path / str(chat)).mkdir()
        tasks = {task.name: task for task in load_recipe(write_recipe(tmp_path / str(chat), chat=chat)).build_tasks()}
        reader, task = Reader(tokenizer, tasks, "run", needs_task=False), tasks["color"]
        wanted = [each.input_ids for each in encode_prompts(tokenizer, [task.example(row, "here")], 512, 8)]
        assert reader.encoded([reader.chat(task, turns)]) == wanted
        assert reader.encoded([reader.example(task, {"text": "red cat"})]) == wanted
        assert ("<|im_start|>" in tokenizer.decode(wanted[0])) == chat
        # Without a task the model's template decides.
        assert "<|im_start|>" in tokenizer.decode(reader.encoded([reader.chat(None, turns)])[0])
    with pytest.raises(PemlError, match="has no tokens"):
        Reader(tiny_tokenizer_without_start(), tasks, "run", needs_task=False).encoded([reader.example(None, "")])


def tiny_tokenizer_without_start() -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


TEXT = "naïve 東京 🙂🏽 " + "plain words and more of them " * 9 + "Ω"


@pytest.mark.parametrize("stops", [(), ("more",), ("zzz", "words an!")], ids=str)
def test_text_in_pieces(stops: tuple[str, ...]) -> None:
    """Never half a character, nor a part of a stop text that came true; together all of it."""
    tokenizer = chat_tokenizer()
    decoder = Decoder(tokenizer, stops)
    pieces = []
    for number in tokenizer(TEXT, add_special_tokens=False)["input_ids"]:
        pieces.append(decoder.add(number))
        assert "\ufffd" not in pieces[-1]
        if decoder.stopped:
            break
    if not decoder.stopped:
        pieces.append(decoder.end())
    wanted = TEXT.partition("more")[0] if "more" in stops else TEXT
    assert "".join(pieces) == wanted and decoder.stopped == ("more" in stops)


def test_a_stop_text_over_several_tokens() -> None:
    """Held back while it may still come true, given when it does not."""
    tokenizer = chat_tokenizer()
    for text, stop in (("ababac.", "abac"), ("aaab.", "aab"), ("xyxyx", "yxz"), ("end", "nd")):
        decoder, said = Decoder(tokenizer, [stop]), ""
        for number in tokenizer(text, add_special_tokens=False)["input_ids"]:
            said += decoder.add(number)
            assert stop not in said
            if decoder.stopped:
                break
        said += "" if decoder.stopped else decoder.end()
        assert said == text.partition(stop)[0]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """What Llama 2, Mistral and Gemma have: a character that is no word of theirs is one token for each byte."""
    words = ["<unk>", "</s>", "\u2581hi", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.mark.parametrize("stops", [(), ("!",)], ids=str)
def test_characters_of_several_byte_tokens(stops: tuple[str, ...]) -> None:
    tokenizer, text = byte_fallback_tokenizer(), "\U0001f642\u6771\u00e9\U0001f642"
    ids = [2, *(4 + byte for byte in text.encode()), 2, 3]
    decoder = Decoder(tokenizer, stops)
    pieces = [decoder.add(number) for number in ids]
    assert not any("\ufffd" in piece for piece in pieces) and decoder.stopped == bool(stops)
    assert "".join(pieces) == f"hi{text} hi" + "!" * (not stops) and text[:1] in pieces


def test_bytes_that_are_no_text() -> None:
    """A model may write any; in the end they are what the tokenizer makes of them."""
    tokenizer, rng = chat_tokenizer(), random.Random(0)
    for _ in range(20):
        ids = [rng.randrange(3, len(tokenizer)) for _ in range(150)]
        decoder = Decoder(tokenizer)
        said = "".join([decoder.add(number) for number in ids]) + decoder.end()
        assert said == tokenizer.decode(ids, skip_special_tokens=True)
