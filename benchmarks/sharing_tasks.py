"""Two families of tasks that contradict each other on one surface cue, for `benchmarks.sharing`.

Every text praises or blames something. In one family praise is answered with "up", in the other with "down"; tasks of a
family differ in what is spoken of and how it is said. A task of one family and its twin of the other have the same
texts and the same prompt, and no text names a task: what decides is the family alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from peml.tasks.toy.world import BLAME, NAMES, PLACES, PRAISE

FORMS: dict[str, tuple[tuple[str, ...], str]] = {
    "meals": (("soup", "bread", "feast", "tea"), "{name} found that the {topic} in the {place} was {word} ."),
    "shows": (("song", "story", "play"), "the {topic} in the {place} was {word} ."),
    "trips": (("walk", "picnic", "room"), "{name} said the {topic} was {word} ."),
}
FAMILIES = ("straight", "turned")
TASKS = [f"{form}-{family}" for family in FAMILIES for form in FORMS]


def family_of(task: str) -> str:
    return task.rpartition("-")[2]


def write_families(folder: Path, seed: int, train_rows: int, eval_rows: int) -> list[dict[str, Any]]:
    """Files of all tasks, and their entries for a recipe; no text of an evaluation is trained on, by any task."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for task in TASKS:
        form, family = task.split("-")
        for split, count in (("eval", eval_rows), ("train", train_rows)):
            rows = [
                {"text": text, "answer": "up" if good == (family == "straight") else "down"}
                for text, good in texts(form, seed, eval_rows, train_rows)[split]
            ]
            assert len(rows) == count
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{task}-{split}.jsonl").write_text(lines, encoding="utf-8")
        entries.append(
            {
                "name": task, "kind": "choose",
                "path": str(folder / f"{task}-train.jsonl"), "eval_path": str(folder / f"{task}-eval.jsonl"),
                "prompt": "{{ text }} mood :", "choices": ["up", "down"], "answer": "answer",
            }
        )  # fmt: skip
    return entries


def texts(form: str, seed: int, eval_rows: int, train_rows: int) -> dict[str, list[tuple[str, bool]]]:
    """Distinct texts, half of them praise, for each split."""
    rng, topics, pattern = Random(f"{form} {seed}"), *FORMS[form]
    found: dict[str, bool] = {}
    while len(found) < eval_rows + train_rows:
        good = len(found) % 2 == 0
        text = pattern.format(
            name=rng.choice(NAMES), topic=rng.choice(topics), place=rng.choice(PLACES),
            word=rng.choice(PRAISE if good else BLAME),
        )  # fmt: skip
        found.setdefault(text, good)
    rows = list(found.items())
    return {"eval": rows[:eval_rows], "train": rows[eval_rows:]}
