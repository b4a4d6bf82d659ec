"""What a model is worth on each task: its metrics, and the loss of the right answers."""

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import islice

from rich.progress import Progress
from torch import nn
from transformers import PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.evaluation.heads import head_answers
from peml.evaluation.scoring import ENCODE_CHOICES, Advance, best_choice, generate_answers, log_likelihoods
from peml.tasks.encode import IGNORED, Form
from peml.tasks.example import Example
from peml.tasks.metrics import Answers, compute
from peml.tasks.suites import SUITES
from peml.tasks.task import Task


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples_by_task: Mapping[str, Sequence[Example]],
    tasks: Mapping[str, Task],
    *,
    max_length: int,
    batch_size: int,
    form: Form = "causal",
    tasks_kwarg: bool = True,
    progress: Progress | None = None,
    answers: MutableMapping[str, Answers] | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of each task, with its `score`, `n`, the number of examples, and `loss`.

    The loss is the mean of -log p(token | what precedes) over the tokens of the right answers; of heads, the mean over
    rows of what they are trained on.

    Args:
        model: a language model, or an encoder with heads; it keeps its training mode.
        tokenizer: its tokeniser.
        examples_by_task: what to evaluate on.
        tasks: the tasks by name; they say how their examples are answered and measured.
        max_length: longest sequence in tokens.
        batch_size: sequences per batch.
        form: how the model answers.
        tasks_kwarg: whether the model takes `tasks=[name per row]`; a plain model does not.
        progress: shows one line per task, if given.
        answers: filled with what was answered to the rows of each task, if given.
    """
    for name, examples in examples_by_task.items():
        if name not in tasks:
            raise PemlError(f"task {name!r} has examples but is not among the tasks {', '.join(tasks)}")
        if not examples:
            raise PemlError(f"task {name!r} has no examples to evaluate on; give it some or leave it out")
    results = {}
    for name, examples in examples_by_task.items():
        advance = _advance(progress, tasks[name], examples, form)
        if form == "heads":
            predictions, loss = head_answers(
                model, tokenizer, examples, max_length=max_length, batch_size=batch_size, progress=advance
            )
        else:
            predictions, loss = _answers(
                model, tokenizer, examples, tasks[name], form, max_length, batch_size, tasks_kwarg, advance
            )
        if answers is not None:
            answers[name] = answers_of(tasks[name], predictions, examples)
        results[name] = measure(tasks[name], predictions, examples) | {
            "n": float(len(examples)),
            "loss": loss,
        }
    return results


def score(values: Mapping[str, float], task: Task) -> float:
    """What one task counts in averages: the mean of its `score` metrics, those that its rows could be measured by."""
    names = score_names(values, task)
    return sum(values[name] for name in names) / len(names)


def score_names(values: Mapping[str, float], task: Task) -> list[str]:
    """The metrics that the score of a task is the mean of; of rows that belong to no part, the first of the whole."""
    return [name for name in task.score if name in values] or [next(name for name in task.metrics if name in values)]


def average(results: Mapping[str, Mapping[str, float]], tasks: Mapping[str, Task]) -> float:
    """Mean over the tasks of the score of each."""
    if not results:
        raise PemlError("there are no results to average")
    return sum(score(values, tasks[name]) for name, values in results.items()) / len(results)


def suite_averages(results: Mapping[str, Mapping[str, float]], tasks: Mapping[str, Task]) -> dict[str, float]:
    """The average of every suite, and of every group of one, whose tasks are all there, as its authors define it.

    GLUE and SuperGLUE: the mean over tasks, of two metrics their mean first. MMLU: over all questions alike.
    """
    averages = {}
    for name, suite in SUITES.items():
        there = {task: values for task, values in results.items() if tasks[task].suite == name}
        if not there or suite.average is None:
            continue
        groups = {f"{name}/{group}": members for group, members in suite.groups.items()}
        for group, members in ({name: tuple(suite.tasks())} | groups).items():
            if not set(members) <= set(there):
                continue
            weights = [there[task]["n"] if suite.average == "rows" else 1.0 for task in members]
            scores = [score(there[task], tasks[task]) for task in members]
            averages[group] = sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)
    return averages


def answers_of(task: Task, predictions: Sequence[str], examples: Sequence[Example]) -> Answers:
    """What was answered to the rows of a task, beside what would have been right."""
    return Answers(
        predictions,
        [e.answer if e.value is None else repr(e.value) for e in examples],
        task.choices if isinstance(task.choices, tuple) else (),
        [e.group for e in examples],
        [e.references for e in examples],
    )


def measure(task: Task, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The metrics of a task, and `score`, what it counts in averages.

    A metric of a group that none of the rows belongs to is left out.
    """
    answers = answers_of(task, predictions, examples)
    there = {example.group for example in examples}
    names = [name for name in task.metrics if "/" not in name or name.partition("/")[2] in there]
    if not names:
        raise PemlError(f"task {task.name!r}: no row belongs to a group that its metrics {task.metrics} measure")
    if not set(names) & set(task.score) and task.source.held_out is None:
        raise PemlError(f"task {task.name!r}: no row belongs to a group that its score {task.score} is made of")
    try:
        values = {name: compute(name, answers) for name in names}
    except PemlError as error:
        raise PemlError(f"task {task.name!r}: {error}") from error
    return values | {"score": score(values, task)}


def _answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    form: Form,
    max_length: int,
    batch_size: int,
    tasks_kwarg: bool,
    advance: Advance | None,
) -> tuple[list[str], float]:
    """Predicted texts and the loss; one pass gives both where the right answer is among the options."""
    groups = ENCODE_CHOICES[form](tokenizer, examples, max_length)
    flat = [encoded for group in groups for encoded in group]
    names = [task.name] * len(flat) if tasks_kwarg else None
    values = iter(log_likelihoods(model, tokenizer, flat, names, form=form, batch_size=batch_size, progress=advance))
    scores = [list(islice(values, len(group))) for group in groups]

    right = [e.choices.index(e.answer) if e.choices else 0 for e in examples]
    gain = sum(row[i] for row, i in zip(scores, right, strict=True))
    tokens = sum(label != IGNORED for group, i in zip(groups, right, strict=True) for label in group[i].labels)
    if task.kind in ("choose", "classify"):
        best = [best_choice(e, row, task.length_normalization) for e, row in zip(examples, scores, strict=True)]
        predictions = [e.choices[i] for e, i in zip(examples, best, strict=True)]
    else:
        predictions = generate_answers(
            model,
            tokenizer,
            examples,
            max_length=max_length,
            max_new_tokens=task.max_new_tokens,
            form=form,
            batch_size=batch_size,
            tasks_kwarg=tasks_kwarg,
            # A model that was not taught to stop goes on in a new line, unless answers have several.
            one_line=not any("\n" in example.answer for example in examples),
            progress=advance,
        )
    return predictions, -gain / tokens


def _advance(progress: Progress | None, task: Task, examples: Sequence[Example], form: Form) -> Advance | None:
    if progress is None:
        return None
    # Heads read a row once; a generated answer costs two passes: one for its loss, one to write it.
    total = len(examples) if form == "heads" else sum(len(example.choices) or 2 for example in examples)
    line = progress.add_task(task.name, total=total)
    return lambda count: progress.advance(line, count)
