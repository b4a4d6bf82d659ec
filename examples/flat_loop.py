"""PEML's training loop written flat: no Trainer, no recipe, nothing hidden.

`with_trainer.py` does the same with the library (`src/peml/training/`), to the same weights, bit for bit; `peml train
toy` does it from a recipe. Run it from a checkout: `python examples/flat_loop.py --steps 300`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count

import torch
from peft import PeftModel, get_peft_model

import peml
from peml.evaluation import average, evaluate_tasks
from peml.mixing import Mixing, MixtureSampler
from peml.tasks import suite_tasks
from peml.training.data import Collator, TaskRows
from peml.training.loss import balanced, by_task, row_counts, row_losses
from peml.training.recipe import Recipe
from peml.training.workbench import load_base

BATCH, LENGTH = 32, 64


def train(steps: int, seed: int = 0) -> PeftModel:
    """The adapted model, trained on the toy tasks."""
    torch.manual_seed(seed)
    tokenizer, base = load_base(Recipe(model="toy", tasks=["toy"]))
    tasks = {task.name: task for task in suite_tasks("toy")}
    rows = TaskRows.encode(tokenizer, {name: task.examples("train") for name, task in tasks.items()}, LENGTH)

    config = peml.PemlConfig(
        task_names=list(tasks),
        adapter=peml.LoRA(r=4, lora_alpha=8),
        prompt=peml.PrefixNAS(num_virtual_tokens=16, width=64, embedding_dim=32, head_rank=32, budget_tokens=8),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    tuner = model.base_model
    rates = {"adapter": 4e-3, "prompt": 4e-3, "architecture": 2e-2}
    optimizer = torch.optim.AdamW(
        [{"params": tuner.parts()[part], "lr": rate} for part, rate in rates.items()], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    batches = drawn(MixtureSampler(rows.row_tasks, Mixing(), seed, BATCH))
    collate, search_steps = Collator(tokenizer.pad_token_id), round(0.9 * steps)

    model.train()
    for step in range(steps):
        # The search: temperature and warm-up follow progress; for the last tenth the architecture is fixed.
        tuner.prompt.set_progress(min(1.0, step / search_steps))
        if step == search_steps:
            tuner.prompt.derive()
        batch = collate([rows[i] for i in next(batches)])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        sums, counts = (
            by_task(values, batch["tasks"], len(tasks))
            for values in (row_losses("causal", logits, labels), row_counts("causal", labels))
        )
        loss = balanced("task_mean", sums, counts)
        loss = loss + sum(tuner.prompt.penalties().values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    return model


def drawn(sampler: MixtureSampler) -> Iterator[list[int]]:
    """Rows of each batch, epoch after epoch; the last batch of an epoch may be smaller."""
    for epoch in count():
        sampler.set_epoch(epoch)
        order = list(sampler)
        yield from (order[start : start + BATCH] for start in range(0, len(order), BATCH))


def main(steps: int, seed: int = 0) -> float:
    """Train and measure; returns the average score on held-out rows."""
    model = train(steps, seed)
    tokenizer, _ = load_base(Recipe(model="toy", tasks=["toy"]))
    tasks = {task.name: task for task in suite_tasks("toy")}
    held_out = {name: task.examples("eval") for name, task in tasks.items()}
    results = evaluate_tasks(model, tokenizer, held_out, tasks, max_length=LENGTH, batch_size=128)
    for name, scores in results.items():
        print(f"{name:12s} {next(iter(scores.values())):.3f}")
    found = model.base_model.prompt.architecture()
    print("cells", " -> ".join(found.operations), " tokens per layer", found.lengths)
    return average(results, tasks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"average {main(arguments.steps, arguments.seed):.3f}")
