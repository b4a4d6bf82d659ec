"""Suites: tables of ready-made tasks. A task is a row of a table; adding one needs no code.

The prompts of `glue` are our own wordings. Of two choices, the positive class (that of `f1`) is the last.
"""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from peml.errors import PemlError
from peml.tasks.source import HubSource, ToySource
from peml.tasks.task import Task

_PAIR = "Sentence 1: {{ sentence1 }}\nSentence 2: {{ sentence2 }}\n"
_ENTAILMENT_FIRST = {"0": "yes", "1": "no"}

# prompt, choices, labels, metrics; all from the Hub data set `nyu-mll/glue`, fields as there.
_GLUE: Mapping[str, dict[str, Any]] = {
    "cola": {
        "prompt": "Sentence: {{ sentence }}\nQuestion: Is this sentence grammatical?\nAnswer:",
        "choices": ("no", "yes"),
        "labels": {"0": "no", "1": "yes"},
        "metrics": ("matthews", "accuracy"),
    },
    "sst2": {
        "prompt": "Review: {{ sentence }}\nQuestion: Is the review negative or positive?\nAnswer:",
        "choices": ("negative", "positive"),
        "labels": {"0": "negative", "1": "positive"},
    },
    "mrpc": {
        "prompt": _PAIR + "Question: Do both sentences say the same?\nAnswer:",
        "choices": ("no", "yes"),
        "labels": {"0": "no", "1": "yes"},
        "metrics": ("accuracy", "f1"),
    },
    "qqp": {
        "prompt": "Question 1: {{ question1 }}\nQuestion 2: {{ question2 }}\n"
        "Question: Do both questions ask the same?\nAnswer:",
        "choices": ("no", "yes"),
        "labels": {"0": "no", "1": "yes"},
        "metrics": ("accuracy", "f1"),
    },
    "mnli": {
        "prompt": "Premise: {{ premise }}\nHypothesis: {{ hypothesis }}\n"
        "Question: Does the hypothesis follow from the premise: yes, maybe or no?\nAnswer:",
        "choices": ("no", "maybe", "yes"),
        "labels": {"0": "yes", "1": "maybe", "2": "no"},
        "eval": "validation_matched",
    },
    "qnli": {
        "prompt": "Question: {{ question }}\nText: {{ sentence }}\nDoes the text answer the question?\nAnswer:",
        "choices": ("no", "yes"),
        "labels": _ENTAILMENT_FIRST,
    },
    "rte": {
        "prompt": _PAIR + "Question: Does sentence 2 follow from sentence 1?\nAnswer:",
        "choices": ("no", "yes"),
        "labels": _ENTAILMENT_FIRST,
    },
    "wnli": {
        "prompt": _PAIR + "Question: Is sentence 2 true if sentence 1 is?\nAnswer:",
        "choices": ("no", "yes"),
        "labels": {"0": "no", "1": "yes"},
    },
}


def _glue_tasks() -> dict[str, Task]:
    tasks = {}
    for name, row in _GLUE.items():
        fields = dict(row)
        source = HubSource(path="nyu-mll/glue", name=name, eval=fields.pop("eval", "validation"))
        tasks[name] = Task(name=name, kind="choose", answer="label", source=source, **fields)
    return tasks


def _toy_tasks() -> dict[str, Task]:
    from peml.tasks.toy.suite import TOY_TASKS

    return {
        toy.name: Task(
            name=toy.name,
            kind=toy.kind,
            prompt=toy.prompt,
            answer=toy.answer,
            choices=toy.choices or None,
            metrics=(toy.metric,),
            source=ToySource(task=toy.name),
        )
        for toy in TOY_TASKS.values()
    }


SUITES: Mapping[str, Callable[[], dict[str, Task]]] = {"glue": _glue_tasks, "toy": _toy_tasks}


def suite_tasks(suite: str, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None) -> list[Task]:
    """Tasks of a suite: all of them, or those of `include` in its order, without those of `exclude`."""
    if suite not in SUITES:
        raise PemlError(f"there is no suite {suite!r}; {_instead(suite, SUITES)}")
    tasks = SUITES[suite]()
    for key, names in (("include", include or ()), ("exclude", exclude or ())):
        if isinstance(names, str):
            raise PemlError(f"suite {suite!r}: `{key}` must be a list of task names, not the text {names!r}")
        for name in names:
            if name not in tasks:
                raise PemlError(f"suite {suite!r}: `{key}` names the unknown task {name!r}; {_instead(name, tasks)}")
    wanted = list(tasks) if include is None else list(dict.fromkeys(include))
    chosen = [tasks[name] for name in wanted if name not in (exclude or ())]
    if not chosen:
        raise PemlError(f"suite {suite!r}: `include` and `exclude` leave no task; it has {', '.join(tasks)}")
    return chosen


def _instead(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(str(name).lower(), known, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}there are {', '.join(known)}"
