"""The training of `flat_loop.py` with the library: the same rows and model, in the end the same weights, bit for bit.

What stands there in the open (batches, rates, the search's progress, loss by task, clipping) is done here by
`MultiTaskTrainer`, which is transformers' Trainer. From a file, with a folder, checkpoints and scores, it is
`peml train toy`. Run it from a checkout: `python examples/with_trainer.py --steps 300`.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments

import peml
from peml.evaluation import average, evaluate_tasks
from peml.tasks import suite_tasks
from peml.training.data import Collator, TaskRows
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
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=4e-3,
            optim="adamw_torch",
            seed=seed,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = peml.MultiTaskTrainer(
            model,
            arguments,
            train_dataset=rows,
            prompt_learning_rate=4e-3,
            architecture_learning_rate=2e-2,
            data_collator=Collator(tokenizer.pad_token_id),
        )
        trainer.train()
    return model


def main(steps: int, seed: int = 0) -> float:
    """Train and measure; returns the average score on held-out rows."""
    model = train(steps, seed)
    tokenizer, _ = load_base(Recipe(model="toy", tasks=["toy"]))
    tasks = {task.name: task for task in suite_tasks("toy")}
    held_out = {name: task.examples("eval") for name, task in tasks.items()}
    results = evaluate_tasks(model, tokenizer, held_out, tasks, max_length=LENGTH, batch_size=128)
    for name, scores in results.items():
        print(f"{name:12s} {next(iter(scores.values())):.3f}")
    return average(results, tasks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(f"average {main(given.steps, given.seed):.3f}")
