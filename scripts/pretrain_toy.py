"""Pre-train the small model that ships with the package, on the plain text of the invented world.

Run it from a checkout, with the package installed: `python scripts/pretrain_toy.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peml.tasks.toy import documents

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "src" / "peml" / "assets" / "toy-llama"
VOCABULARY = 1024
POSITIONS = 256
TOKENS = 2048
PEAK_RATE = 2e-3
HELD_OUT = "held-out"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a sample of the corpus.

    The space before a word belongs to the word and the bytes cover every text, so an answer can be
    appended to a prompt without changing the prompt's tokens, and nothing is ever unknown.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(40_000, f"{seed}:tokenizer"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a fresh Llama decoder with grouped-query attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.04,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, count: int, seed: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of about `TOKENS` tokens, each of rows of similar length.

    Most rows are one document and some are several: a lone document is what teaches the model to look
    things up in it, and the longer rows teach it the positions that a prompt behind a prefix will have.
    """
    rng = Random(f"toy-rows:{seed}")
    texts = documents(max(3000, count * TOKENS // 8), seed)
    ready: list[dict[str, torch.Tensor]] = []
    for _ in range(count):
        if not ready:
            rows = []
            for many in rng.choices((1, 2, 3), (8, 2, 1), k=1024):
                parts = tokenizer([next(texts) for _ in range(many)]).input_ids
                rows.append([token for part in parts for token in (*part, tokenizer.eos_token_id)])
            rows.sort(key=len)
            while rows:
                size = max(1, TOKENS // len(rows[-1]))
                ready.append(_padded(rows[-size:], tokenizer.pad_token_id))
                del rows[-size:]
            rng.shuffle(ready)
        yield ready.pop()


def _padded(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Return rows as one batch; padding is on the right, where no earlier token can see it."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == pad, -100)}


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: a short warm-up, then a cosine to a twentieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return PEAK_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Return the mean loss per token on documents that were not trained on."""
    model.eval()
    losses = [model(**batch).loss.item() for batch in batches(tokenizer, 16, f"{seed}:{HELD_OUT}")]
    model.train()
    return sum(losses) / len(losses)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> list[list[float]]:
    """Train in place and return the loss curve as (step, mean loss since the last point) pairs."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    curve: list[list[float]] = []
    recent: list[float] = []
    model.train()
    for step, batch in enumerate(batches(tokenizer, steps, f"{seed}:train")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            curve.append([step + 1, round(sum(recent) / len(recent), 4)])
            recent.clear()
            print(f"step {step + 1:5d}  loss {curve[-1][1]:.4f}", flush=True)
    return curve


def save(output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
    """Write the model and tokenizer as a standard model folder, with the record of how it was made."""
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(output)
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    text = json.dumps({**record, "sha256": digest}, indent=1) + "\n"
    (output / "training_record.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Train the tokenizer and the model, and write them to the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters()} parameters")
    curve = train(model, tokenizer, args.steps, args.seed)
    # The loss is that of the weights as they are stored, not of those that were trained.
    loss = held_out_loss(model.to(torch.bfloat16).float(), tokenizer, args.seed)
    record = {
        "script": "scripts/pretrain_toy.py",
        "seed": args.seed,
        "steps": args.steps,
        "tokens": args.steps * TOKENS,
        "parameters": model.num_parameters(),
        "peak_learning_rate": PEAK_RATE,
        "held_out_loss": round(loss, 4),
        "loss_curve": curve,
        "seconds": round(time.perf_counter() - started),
        "threads": args.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    save(args.output, model, tokenizer, record)
    print(f"held-out loss {loss:.4f}, {record['seconds']} s, written to {args.output}")


if __name__ == "__main__":
    main()
