"""SuperGLUE (arXiv:1905.00537): eight tasks of language understanding; the prompts are our own wordings.

Of two choices the positive class, that of `f1`, is the last. The test sets are not used: their labels are hidden.
The two diagnostic sets, AX-b and AX-g, have no training rows and are no part of the benchmark's average.
"""

from collections.abc import Mapping
from typing import Any

from peml.tasks.files import Row
from peml.tasks.suites.published import Expand, Layout, Published

_NO_YES = {"choices": ("no", "yes"), "labels": {"0": "no", "1": "yes", "false": "no", "true": "yes"}}


def options(row: Row) -> list[Row]:
    """COPA: both alternatives as one list."""
    return [row | {"options": [row["choice1"], row["choice2"]]}]


def each_answer(row: Row) -> list[Row]:
    """MultiRC: one row for each answer that is to be judged, with the question that it belongs to."""
    passage = row["passage"]
    return [
        {
            "paragraph": passage["text"],
            "question": question["question"],
            "answer": answer["text"],
            "label": answer["label"],
            "about": f"{row['idx']}-{question['idx']}",
        }
        for question in passage["questions"]
        for answer in question["answers"]
    ]


def each_answer_of_the_hub(row: Row) -> list[Row]:
    """MultiRC: rows are single answers already; the question is named in their index."""
    return [row | {"about": f"{row['idx']['paragraph']}-{row['idx']['question']}"}]


def each_query(row: Row) -> list[Row]:
    """ReCoRD: one row for each query, with the names that may fill its gap and all that are right."""
    text = row["passage"]["text"]
    # The end of an entity is the place of its last letter.
    named = [text[entity["start"] : entity["end"] + 1] for entity in row["passage"]["entities"]]
    return [
        record
        for query in row["qas"]
        for record in one_query(
            {
                "passage": text,
                "query": query["query"],
                "entities": named,
                "answers": [answer["text"] for answer in query["answers"]],
            }
        )
    ]


def one_query(row: Row) -> list[Row]:
    """ReCoRD: the names once each, and the right one to train on; right answers are among the names, as published."""
    right = list(dict.fromkeys(text.strip() for text in row["answers"]))
    names = [name for name in dict.fromkeys(name.strip() for name in row["entities"]) if name]
    answer = next((text for text in right if text in names), None)
    if answer is None:
        raise KeyError("an answer among the entities")
    return [row | {"entities": names, "answers": right, "answer": answer}]


def flat(row: Row) -> list[Row]:
    """WSC: both spans beside the text."""
    return [row | row["target"]]


_TASKS: Mapping[str, dict[str, Any]] = {
    "boolq": {
        "prompt": "{{ passage }}\nQuestion: {{ question }}?\nAnswer:",
        "texts": ("{{ question }}", "{{ passage }}"),
        **_NO_YES,
    },
    "cb": {
        "prompt": "Premise: {{ premise }}\nHypothesis: {{ hypothesis }}\n"
        "Question: Does the hypothesis follow from the premise: yes, maybe or no?\nAnswer:",
        "texts": ("{{ premise }}", "{{ hypothesis }}"),
        "choices": ("no", "maybe", "yes"),
        "labels": {
            "0": "yes",
            "1": "no",
            "2": "maybe",
            "entailment": "yes",
            "contradiction": "no",
            "neutral": "maybe",
        },
        "metrics": ("accuracy", "macro_f1"),
        "score": ("accuracy", "macro_f1"),
    },
    "copa": {
        "prompt": "{{ premise }}\nQuestion: {% if question == 'cause' %}What was the cause"
        "{% else %}What happened as a result{% endif %}?\nAnswer:",
        "answer": "{{ options[label | int] }}",
        "choices": "options",
    },
    "multirc": {
        "prompt": "{{ paragraph }}\nQuestion: {{ question }}\nAnswer: {{ answer }}\nIs this answer right?",
        "texts": ("{{ paragraph }}", "{{ question }} {{ answer }}"),
        **_NO_YES,
        "group": "about",
        "metrics": ("f1", "group_exact_match"),
        "score": ("f1", "group_exact_match"),
    },
    "record": {
        "prompt": "{{ passage }}\nSentence: {{ query }}\nQuestion: Which name is to be put for @placeholder?\nAnswer:",
        "answer": "answer",
        "choices": "entities",
        "references": "answers",
        "metrics": ("squad_f1", "squad_exact_match"),
        "score": ("squad_f1", "squad_exact_match"),
    },
    "rte": {
        "prompt": "Premise: {{ premise }}\nHypothesis: {{ hypothesis }}\n"
        "Question: Does the hypothesis follow from the premise?\nAnswer:",
        "texts": ("{{ premise }}", "{{ hypothesis }}"),
        "choices": ("no", "yes"),
        "labels": {"0": "yes", "1": "no", "entailment": "yes", "not_entailment": "no"},
    },
    "wic": {
        "prompt": "Sentence 1: {{ sentence1 }}\nSentence 2: {{ sentence2 }}\n"
        'Question: Does "{{ word }}" mean the same in both sentences?\nAnswer:',
        "texts": ("{{ word }}: {{ sentence1 }}", "{{ sentence2 }}"),
        **_NO_YES,
    },
    "wsc": {
        "prompt": '{{ text }}\nQuestion: Does "{{ span2_text }}" stand for "{{ span1_text }}"?\nAnswer:',
        "texts": ("{{ text }}", "{{ span2_text }}: {{ span1_text }}"),
        **_NO_YES,
    },
}

# Folder in the official archive, and what makes the Hub's rows of its rows.
_ARCHIVE: Mapping[str, tuple[str, Expand | None]] = {
    "boolq": ("BoolQ", None),
    "cb": ("CB", None),
    "copa": ("COPA", options),
    "multirc": ("MultiRC", each_answer),
    "record": ("ReCoRD", each_query),
    "rte": ("RTE", None),
    "wic": ("WiC", None),
    "wsc": ("WSC", flat),
}
_HUB: Mapping[str, Expand] = {"copa": options, "multirc": each_answer_of_the_hub, "record": one_query}


def _published(name: str) -> Published:
    folder, expand = _ARCHIVE[name]
    lower = f"superglue_{name}"
    archive = Layout(
        train=(f"{folder}/train.jsonl", f"{lower}/train.jsonl", f"{lower}/train_fewglue32.jsonl"),
        eval=(f"{folder}/val.jsonl", f"{lower}/val.jsonl", f"{lower}/dev.jsonl"),
        expand=expand,
    )
    return Published("aps/super_glue", name, expand=_HUB.get(name), layouts=(archive,))


SUPERGLUE: Mapping[str, tuple[dict[str, Any], Published]] = {
    name: ({"kind": "choose", "answer": "label", **row}, _published(name)) for name, row in _TASKS.items()
}
