from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from jinja2 import Environment, StrictUndefined
from transformers import AutoModelForCausalLM, AutoTokenizer

import peml.tasks.toy
from peml.tasks.toy import TOY_TASKS, ToyTask, documents, toy_rows, world

FOLDER = Path(peml.tasks.toy.__file__).parents[2] / "assets" / "toy-llama"
JINJA = Environment(undefined=StrictUndefined)
CHOOSE = [name for name, task in TOY_TASKS.items() if task.kind == "choose"]
EVERY = pytest.mark.parametrize("name", TOY_TASKS)

DIGEST = """
import hashlib
from peml.tasks.toy import TOY_TASKS, documents, toy_rows
rows = [toy_rows(name, split, 20, seed=3) for name in TOY_TASKS for split in ("train", "test")]
print(hashlib.sha256(repr([rows, list(documents(50, 3))]).encode()).hexdigest())
"""


def prompt_of(task: ToyTask, row: dict[str, object]) -> str:
    return JINJA.from_string(task.prompt).render(row)


def options_of(task: ToyTask, row: dict[str, Any]) -> list[str]:
    return list(row[task.choices] if isinstance(task.choices, str) else task.choices or ())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_rows_and_corpus_are_the_same_in_every_process() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(FOLDER.parents[2])}
        digests.add(subprocess.check_output([sys.executable, "-c", DIGEST], env=environment))
    assert len(digests) == 1


@EVERY
def test_rows_are_distinct_and_more_rows_of_another_seed_differ(name: str) -> None:
    rows = toy_rows(name, "train", 300)
    assert len({repr(row) for row in rows}) == 300
    assert rows != toy_rows(name, "train", 300, seed=1)


def test_no_text_is_in_both_splits_of_any_task_or_seed() -> None:
    texts: dict[str, set[str]] = {"train": set(), "test": set()}
    for name in TOY_TASKS:
        for split, seen in texts.items():
            for row in (*toy_rows(name, split, 200), *toy_rows(name, split, 200, seed=1)):  # type: ignore[arg-type]
                parts = [value if isinstance(value, list) else [value] for key, value in row.items() if key != "answer"]
                seen.add(" ".join(sorted(part for values in parts for part in values)))
    assert not texts["train"] & texts["test"]


@pytest.mark.parametrize("name", CHOOSE)
def test_answers_and_positions_are_balanced(name: str) -> None:
    task = TOY_TASKS[name]
    places = Counter()
    for row in toy_rows(name, "test", 120):
        options = options_of(task, row)
        assert len(set(options)) == len(options)
        places[options.index(row[task.answer])] += 1  # type: ignore[arg-type]
    assert set(places.values()) == {120 // len(places)}
    assert len(places) >= 2


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown toy task 'nope'; there are mood"):
        toy_rows("nope", "train", 1)
    with pytest.raises(ValueError, match="unknown split"):
        toy_rows("mood", "dev", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not as many as 50000"):
        toy_rows("past", "test", 50_000)


def test_a_flaw_changes_a_clause_and_a_foil_changes_a_restatement() -> None:
    for seed in range(200):
        assert world.clause(Random(seed)) != world.clause(Random(seed), flaw=True)
        assert world.restatement(Random(seed)) != world.restatement(Random(seed), same=False)


def test_the_corpus_has_no_task_format() -> None:
    corpus = " \n ".join(documents(3000))
    for name, task in TOY_TASKS.items():
        ending = task.prompt.rpartition("}}")[2].strip()
        assert ending.endswith(":"), name
        assert f". {ending} " not in corpus


@EVERY
def test_prompts_are_short_and_a_prefix_of_prompt_and_answer(name: str, tokenizer: Any) -> None:
    task = TOY_TASKS[name]
    for row in toy_rows(name, "train", 100):
        prompt = prompt_of(task, row)
        assert prompt == prompt.rstrip()
        for answer in (*options_of(task, row), row[task.answer]):
            ids, whole = (tokenizer(text).input_ids for text in (prompt, f"{prompt} {answer}"))
            assert whole[: len(ids)] == ids
            assert ids[0] == tokenizer.bos_token_id
            assert len(whole) + 1 <= 48


def test_the_tokenizer_reads_and_writes_any_text(tokenizer: Any) -> None:
    for text in ("Naïve café, 東京 — 42%!", "first line\nsecond\tline", "the robin slept ."):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids).strip() == text


def test_the_folder_is_small_and_its_record_is_of_these_weights(model: Any) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8 * 2**20
    record = json.loads((FOLDER / "training_record.json").read_text(encoding="utf-8"))
    assert record["sha256"] == hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert record["parameters"] == model.num_parameters()
    assert record["held_out_loss"] < 1.5
    assert (FOLDER.parents[3] / record["script"]).is_file()


@pytest.mark.parametrize("name", CHOOSE)
@torch.no_grad()
def test_the_frozen_model_is_near_chance(name: str, model: Any, tokenizer: Any) -> None:
    task, right = TOY_TASKS[name], 0
    rows = toy_rows(name, "test", 200)
    for row in rows:
        prompt, options = prompt_of(task, row), options_of(task, row)
        # Every option is one token here, so its score is one entry of the next-token distribution.
        ids = [tokenizer(f"{prompt} {option}").input_ids[-1] for option in options]
        logits = model(input_ids=torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1, ids]
        right += options[int(logits.argmax())] == row[task.answer]
    chance = 1 / len(options)
    assert right / len(rows) < chance + 0.15
