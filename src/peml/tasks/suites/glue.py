"""GLUE (arXiv:1804.07461): nine tasks on sentences and pairs of sentences; the prompts are our own wordings.

Of two choices the positive class, that of `f1`, is the last. `texts` are paired as in BERT (arXiv:1810.04805).
The test sets are not used: their labels are hidden.
"""

from collections.abc import Mapping
from typing import Any

from peml.tasks.suites.published import Layout, Published

_PAIR = "Sentence 1: {{ sentence1 }}\nSentence 2: {{ sentence2 }}\n"
_BOTH = ("{{ sentence1 }}", "{{ sentence2 }}")
_NO_YES = {"choices": ("no", "yes"), "labels": {"0": "no", "1": "yes"}}
# The Hub numbers the classes, the files name them.
_ENTAILMENT = {
    "choices": ("no", "yes"),
    "labels": {"0": "yes", "1": "no", "entailment": "yes", "not_entailment": "no"},
}

_TASKS: Mapping[str, dict[str, Any]] = {
    "cola": {
        "prompt": "Sentence: {{ sentence }}\nQuestion: Is this sentence grammatical?\nAnswer:",
        "texts": ("{{ sentence }}",),
        **_NO_YES,
        "metrics": ("matthews", "accuracy"),
    },
    "sst2": {
        "prompt": "Review: {{ sentence }}\nQuestion: Is the review negative or positive?\nAnswer:",
        "texts": ("{{ sentence }}",),
        "choices": ("negative", "positive"),
        "labels": {"0": "negative", "1": "positive"},
    },
    "mrpc": {
        "prompt": _PAIR + "Question: Do both sentences say the same?\nAnswer:",
        "texts": _BOTH,
        **_NO_YES,
        "metrics": ("accuracy", "f1"),
        "score": ("accuracy", "f1"),
    },
    "stsb": {
        "prompt": _PAIR + "Question: How similar are both sentences, from 0.0 to 5.0?\nAnswer:",
        "texts": _BOTH,
        "kind": "regress",
        "metrics": ("pearson", "spearman"),
        "score": ("pearson", "spearman"),
    },
    "qqp": {
        "prompt": "Question 1: {{ question1 }}\nQuestion 2: {{ question2 }}\n"
        "Question: Do both questions ask the same?\nAnswer:",
        "texts": ("{{ question1 }}", "{{ question2 }}"),
        **_NO_YES,
        "metrics": ("accuracy", "f1"),
        "score": ("accuracy", "f1"),
    },
    "mnli": {
        "prompt": "Premise: {{ premise }}\nHypothesis: {{ hypothesis }}\n"
        "Question: Does the hypothesis follow from the premise: yes, maybe or no?\nAnswer:",
        "texts": ("{{ premise }}", "{{ hypothesis }}"),
        "choices": ("no", "maybe", "yes"),
        "labels": {
            "0": "yes",
            "1": "maybe",
            "2": "no",
            "entailment": "yes",
            "neutral": "maybe",
            "contradiction": "no",
        },
        "group": "part",
        "metrics": ("accuracy", "accuracy/matched", "accuracy/mismatched"),
        "score": ("accuracy/matched", "accuracy/mismatched"),
    },
    "qnli": {
        "prompt": "Question: {{ question }}\nText: {{ sentence }}\nDoes the text answer the question?\nAnswer:",
        "texts": ("{{ question }}", "{{ sentence }}"),
        **_ENTAILMENT,
    },
    "rte": {
        "prompt": _PAIR + "Question: Does sentence 2 follow from sentence 1?\nAnswer:",
        "texts": _BOTH,
        **_ENTAILMENT,
    },
    "wnli": {
        "prompt": _PAIR + "Question: Is sentence 2 true if sentence 1 is?\nAnswer:",
        "texts": _BOTH,
        **_NO_YES,
    },
}

# Folder in the official archive, and what its tables call the Hub's fields.
_TABLES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "cola": ("CoLA", {"columns": ("source", "label", "source_annotation", "sentence")}),
    "sst2": ("SST-2", {}),
    "mrpc": ("MRPC", {"fields": {"label": "Quality", "sentence1": "#1 String", "sentence2": "#2 String"}}),
    "stsb": ("STS-B", {"fields": {"label": "score"}}),
    "qqp": ("QQP", {"fields": {"label": "is_duplicate"}, "ragged": True}),
    "mnli": ("MNLI", {"fields": {"label": "gold_label", "premise": "sentence1", "hypothesis": "sentence2"}}),
    "qnli": ("QNLI", {}),
    "rte": ("RTE", {}),
    "wnli": ("WNLI", {}),
}

# What JSON lines with one pair of names for every task call the Hub's fields.
_LINES: Mapping[str, dict[str, str]] = {
    "stsb": {"label": "score"},
    "qqp": {"question1": "sentence1", "question2": "sentence2"},
    "mnli": {"premise": "sentence1", "hypothesis": "sentence2"},
    "qnli": {"question": "sentence1", "sentence": "sentence2"},
}


def _published(name: str) -> Published:
    folder, how = _TABLES[name]
    parts = {"matched": "validation_matched", "mismatched": "validation_mismatched"} if name == "mnli" else {}
    tables = Layout(
        train=(f"{folder}/train.tsv",),
        eval=() if parts else (f"{folder}/dev.tsv",),
        parts={part: (f"{folder}/dev_{part}.tsv",) for part in parts},
        **how,
    )
    rows = (f"glue_{name}/dev.jsonl", f"glue_{name}/dev_subset.jsonl")
    lines = Layout(
        train=(f"glue_{name}/train.jsonl",),
        eval=() if parts else rows,
        parts={"matched": rows} if parts else {},
        fields=_LINES.get(name, {}),
    )
    return Published("nyu-mll/glue", name, eval=parts or {"": "validation"}, layouts=(tables, lines))


GLUE: Mapping[str, tuple[dict[str, Any], Published]] = {
    name: ({"kind": "choose", "answer": "label", **row}, _published(name)) for name, row in _TASKS.items()
}
