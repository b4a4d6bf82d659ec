"""What each of the model families should compute with a prefix, and what they are given.

The reference is the unmodified model with an attention written out in loops: no cache, no padding, no packing, one row
at a time. It knows the windows from the table here, not from the masks that transformers makes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle, islice

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

import peml
import references
from models import TASKS, VOCABULARY, adapt, shake
from zoo import FAMILIES, NO_DROPOUT, weights


def build(name: str, attention: str) -> PreTrainedModel:
    """The model, the same weights for every attention implementation."""
    torch.manual_seed(list(FAMILIES).index(name))
    family = FAMILIES[name]
    if family.package is not None:
        path = weights(family.package)
        return family.model.from_pretrained(path, attn_implementation=attention, **NO_DROPOUT).double().eval()
    model = family.model._from_config(family.config(), attn_implementation=attention).double().eval()
    shake(model.parameters(), 0.2)
    return model


@cache
def _plain(name: str) -> PreTrainedModel:
    model = build(name, "eager")
    AttentionInterface.register("by_loops", lambda *args, **kwargs: _BY_LOOPS(*args, **kwargs))
    AttentionMaskInterface.register("by_loops", lambda *args, **kwargs: None)
    model.set_attn_implementation("by_loops")
    return model.requires_grad_(False)


_BY_LOOPS: Callable[..., tuple[Tensor, None]]


def visible(name: str, layer: int, queries: int, keys: int) -> Tensor:
    """Which of the text's tokens each query sees in a layer."""
    family = FAMILIES[name]
    window = family.windows[layer % len(family.windows)]
    # Of an encoder-decoder: the encoder's own, then by turns the decoder's own and those that read the encoder.
    causal = family.decoder and layer >= family.encoder and (not family.encoder or (layer - family.encoder) % 2 == 0)
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for q in range(queries):
        for k in range(keys):
            if causal:
                seen[q, k] = k <= q and (window is None or q - k < window)
            else:
                seen[q, k] = window is None or abs(q - k) <= window
    return seen


def logits(name: str, row: Tensor, prefix: Sequence[references.Prefix | None], target: Tensor | None = None) -> Tensor:
    """Logits `[S, V]` of one text (of an encoder-decoder: of the target), alone and unpadded."""
    global _BY_LOOPS
    layers = iter(range(10**6))

    def attend(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, position_bias=None, **kwargs):
        layer = next(layers)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        seen = visible(name, layer, query.shape[2], key.shape[2])[None]
        bias = None if position_bias is None else position_bias[0]
        return references.attention(query, key, value, seen, scaling, [prefix[layer]], softcap, s_aux, bias), None

    _BY_LOOPS = attend
    return _plain(name)(**asked(name, row, target))[0][0]


def greedy(name: str, row: Tensor, prefix: Sequence[references.Prefix | None], new: int) -> Tensor:
    """The `new` most probable tokens after a text, one after the other, everything computed anew for each."""
    grown = torch.tensor([3]) if FAMILIES[name].encoder else row
    with torch.no_grad():
        for _ in range(new):
            text = (row, prefix, grown) if FAMILIES[name].encoder else (grown, prefix)
            grown = torch.cat([grown, logits(name, *text)[-1:].argmax(-1)])
    return grown[-new:]


# A model with a prefix, and what it is given.

PROMPTS = {
    "shared": peml.PrefixTuning(3),
    "gated": peml.PrefixTuning((2, 3), gated=True),
    "per task": peml.PrefixTuning((3, 2), per_task=True),
    "soft, per task": peml.PromptTuning(3, per_task=True),
    "per task, gated": peml.PrefixTuning(2, per_task=True, gated=True),
}
TABLES = [name for name, prompt in PROMPTS.items() if isinstance(prompt, peml.PrefixTuning)]
"""Those whose keys and values the slow reference can be given."""
NEW = 3
"""Tokens that are generated."""


def made(family: str, attention: str, prompt: str | peml.PrefixNAS) -> PeftModel:
    """The same weights for every attention implementation, and gates that are not 0."""
    base = build(family, attention)
    torch.manual_seed(6)
    wanted = PROMPTS[prompt] if isinstance(prompt, str) else prompt
    if isinstance(wanted.num_virtual_tokens, tuple):
        lengths = islice(cycle(wanted.num_virtual_tokens), FAMILIES[family].slots)
        wanted = replace(wanted, num_virtual_tokens=tuple(lengths))
    model = adapt(base, prompt=wanted)
    for buffer in model.base_model.prompt.buffers():
        if buffer.is_floating_point() and isinstance(prompt, str):
            buffer.copy_(-torch.rand(buffer.shape) * 2)
    return model


def texts() -> list[Tensor]:
    """Two texts, both longer than every window."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator) for length in (4, 6)]


def targets(name: str) -> list[Tensor | None]:
    """What the decoder of an encoder-decoder is given for the two texts: the longer for the shorter."""
    if not FAMILIES[name].encoder:
        return [None, None]
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator) for length in (5, 3)]


def asked(name: str, row: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    """What a model is called with for one text."""
    call = {"input_ids": row[None]}
    return call if target is None else call | {"decoder_input_ids": target[None]}


def asked_padded(name: str, side: str) -> tuple[dict[str, Tensor], Tensor]:
    """What a model is called with for the two texts, and which of the tokens that it answers for are no padding."""
    ids, mask = padded(texts(), side)
    call = {"input_ids": ids, "attention_mask": mask}
    if FAMILIES[name].encoder:
        ids, mask = padded(targets(name), side)
        call |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return call, mask.bool()


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, S]`."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side=side)
    return torch.nn.utils.rnn.pad_sequence(rows, True, 1, padding_side=side), mask


def prefix_of(model: PeftModel, task: str) -> list[references.Prefix | None]:
    """Keys, values and log-gates of each layer: what the attention has to take in."""
    found = []
    for layer in model.base_model.prompt([TASKS.index(task)]):
        gate = torch.zeros(layer.num_tokens).double() if layer.log_gate is None else layer.log_gate
        found.append((layer.keys[0], layer.values[0], gate))
    return found


SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
"""Without a limit a CPU's whole memory becomes a cache."""


def batched(model: PeftModel) -> list[list[int]]:
    """The new tokens of the two texts, as requests of different lengths."""
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=1)
    requests = [row.tolist() for row in texts()]
    found = model.generate_batch(requests, generation_config=settings, continuous_batching_config=SMALL)
    return [answer.generated_tokens for answer in found.values()]
