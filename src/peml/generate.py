"""`peml generate`: answers of a run to prompts of one's own, as its evaluation would have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.evaluation.scoring import ENCODE_CHOICES, best_choice, generate_answers, log_likelihoods
from peml.tasks import Task
from peml.tasks.encode import Form
from peml.tasks.example import Example, after
from peml.tasks.render import check_characters
from peml.training import open_adapter
from peml.training.workbench import form_of, longest_row

Asked = str | Mapping[str, Any]
"""A prompt as it is, or the fields of the task's own template."""


def generate_run(
    run: str | Path,
    task: str,
    asked: Sequence[Asked],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[str]:
    """Answers of a run for one of its tasks: the likeliest choice where it has choices, else greedy text.

    Args:
        run: its folder.
        task: name.
        asked: prompts, or fields of the task's template.
        max_new_tokens: of an answer; None: the task's.
        batch_size: sequences of one batch; answers do not depend on it.
        progress: shows one line, if given.

    Raises:
        PemlError: an unknown task, a field that the template lacks, or an encoder with heads.
    """
    recipe, tokenizer, model = open_adapter(run)
    tasks = {each.name: each for each in recipe.build_tasks()}
    if task not in tasks:
        raise PemlError(f"--task {task}: the run has the tasks {', '.join(tasks)}")
    form = form_of(model.base_model.model)
    if form == "heads":
        raise PemlError(f"{run} is an encoder with heads, which writes nothing: use `peml evaluate`")
    if torch.cuda.is_available():
        model.to("cuda")
    examples = examples_of(tasks[task], asked)
    scored = all(example.choices for example in examples) and bool(examples)
    line = None
    if progress is not None:
        total = sum(len(example.choices) or 1 for example in examples)
        line = progress.add_task(task, total=total)

    def advance(count: int) -> None:
        if progress is not None and line is not None:
            progress.advance(line, count)

    max_length = longest_row(recipe, model.base_model.model.config, tokenizer, form)
    if scored:
        return _chosen(model, tokenizer, tasks[task], examples, form, max_length, batch_size, advance)
    return generate_answers(
        model,
        tokenizer,
        examples,
        max_length=max_length,
        max_new_tokens=max_new_tokens or tasks[task].max_new_tokens,
        batch_size=batch_size,
        tasks_kwarg=True,
        form=form,
        progress=advance,
    )


def examples_of(task: Task, asked: Sequence[Asked]) -> list[Example]:
    """Prompts of a task, as examples without an answer."""
    choices = task.choices if isinstance(task.choices, tuple) else ()
    shots = task.shots()
    found = []
    for number, each in enumerate(asked, 1):
        where = f"prompt {number}"
        if isinstance(each, str):
            check_characters(each, where)
            turns = (("user", each),) if task.chat else ()
            found.append(Example(task.name, each, "", choices, where, turns=turns))
        else:
            found.append(after(shots, task.question(dict(each), where)))
    return found


def read_prompts(path: str | Path) -> list[Asked]:
    """Prompts of a file: a line each, or in a `.jsonl` file a text, or an object with the fields of the template.

    Raises:
        PemlError: no such file, no prompt in it, or a line that is none.
    """
    path = Path(path).expanduser()
    try:
        # A line ends with a line break: other separators of Unicode may stand in a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PemlError(f"{path} cannot be read ({error}): give a file of prompts") from None
    found: list[Asked] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line)
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PemlError(f"{path}:{number} is no JSON ({error}): correct the line") from None
        if not isinstance(value, str | dict):
            raise PemlError(f"{path}:{number} must be a text, or an object with fields, not {line.strip()[:40]}")
        found.append(value)
    if not found:
        raise PemlError(f"{path} holds no prompt: give a line each")
    return found


def _chosen(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    form: Form,
    max_length: int,
    batch_size: int,
    advance: Any,
) -> list[str]:
    groups = ENCODE_CHOICES[form](tokenizer, examples, max_length)
    flat = [row for group in groups for row in group]
    names = [task.name] * len(flat)
    values = iter(log_likelihoods(model, tokenizer, flat, names, batch_size=batch_size, form=form, progress=advance))
    scores = [list(islice(values, len(group))) for group in groups]
    return [
        example.choices[best_choice(example, row, task.length_normalization)]
        for example, row in zip(examples, scores, strict=True)
    ]
