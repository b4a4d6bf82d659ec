"""Commonsense reasoning: eight data sets, asked in their own fields or as the instructions of LLM-Adapters.

LLM-Adapters (arXiv:2304.01933) made the collection; it measures on the test set of ARC and OpenBookQA and on the
validation set of the others, whose test labels are hidden. In the suite `commonsense` every option is named in the
prompt and answered by its letter, as in MMLU (our choice: some rows have equal options, which differ by letter only).
The suite `commonsense_instruct` keeps the collection's instructions and scores the answers that each names.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peml.tasks.files import Row
from peml.tasks.suites.published import Expand, Layout, Published


def _lettered(question: str, options: Sequence[str], right: int) -> list[Row]:
    letters = [chr(ord("A") + number) for number in range(len(options))]
    if not 0 <= right < len(options):
        raise IndexError(f"answer {right + 1} of {len(options)}")
    return [{"question": question, "options": list(options), "letters": letters, "label": letters[right]}]


def piqa(row: Row) -> list[Row]:
    """PIQA: two ways to a goal, from 0."""
    return _lettered(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def siqa(row: Row) -> list[Row]:
    """Social IQa: three answers to a question about a situation, from 1."""
    asked = f"{row['context']} {row['question']}"
    return _lettered(asked, [row["answerA"], row["answerB"], row["answerC"]], int(row["label"]) - 1)


def hellaswag(row: Row) -> list[Row]:
    """HellaSwag: four endings, from 0."""
    return _lettered(f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]))


def winogrande(row: Row) -> list[Row]:
    """WinoGrande: what fills the gap, from 1."""
    return _lettered(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)


def columns(row: Row) -> list[Row]:
    """ARC and OpenBookQA on the Hub: texts and labels of the options in two lists."""
    choices = row["choices"]
    asked = row["question"] if "question" in row else row["question_stem"]
    return _lettered(asked, choices["text"], choices["label"].index(row["answerKey"]))


def nested(row: Row) -> list[Row]:
    """ARC and OpenBookQA in their archives: the options inside of the question."""
    choices = row["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    return _lettered(row["question"]["stem"], [choice["text"] for choice in choices], labels.index(row["answerKey"]))


def named(row: Row) -> list[Row]:
    """Options by letter: `{"A": ..., "B": ...}`."""
    return _lettered(row["question"], list(row["choices"].values()), list(row["choices"]).index(row["answer"]))


_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


def instruction(row: Row) -> list[Row]:
    """LLM-Adapters: the answers that the last line of the instruction allows."""
    found = _FORMAT.search(row["instruction"])
    if found is None:
        raise KeyError("Answer format")
    return [row | {"options": found.group(1).split("/")}]


_ASKED: Mapping[str, str] = {
    "piqa": "Goal: {{ question }}",
    "hellaswag": "Text: {{ question }}",
    "winogrande": "Sentence: {{ question }}",
}
_OPTIONS = "\n{% for option in options %}{{ letters[loop.index0] }}. {{ option }}\n{% endfor %}Answer:"


def _choice(name: str) -> dict[str, Any]:
    return {
        "kind": "choose",
        "prompt": _ASKED.get(name, "Question: {{ question }}") + _OPTIONS,
        "answer": "label",
        "choices": "letters",
    }


def _parts(train: Sequence[str], evaluation: Sequence[str], expand: Expand, **more: Any) -> Layout:
    return Layout(train=tuple(train), eval=tuple(evaluation), expand=expand, **more)


def _arc(name: str) -> Published:
    folders = (f"ARC-V1-Feb2018-2/{name}/", f"{name}/", "")
    train, test = ([f"{folder}{name}-{split}.jsonl" for folder in folders] for split in ("Train", "Test"))
    return Published("allenai/ai2_arc", name, eval={"": "test"}, expand=columns, layouts=(_parts(train, test, nested),))


COMMONSENSE: Mapping[str, tuple[dict[str, Any], Published]] = {
    "boolq": (
        {
            "kind": "choose",
            "prompt": "{{ passage }}\nQuestion: {{ question }}?\nAnswer:",
            "texts": ("{{ question }}", "{{ passage }}"),
            "answer": "answer",
            "choices": ("no", "yes"),
            "labels": {"false": "no", "true": "yes", "0": "no", "1": "yes"},
        },
        Published(
            "google/boolq",
            layouts=(
                Layout(train=("boolq/train.jsonl",), eval=("boolq/dev.jsonl",)),
                Layout(
                    train=("BoolQ/train.jsonl", "superglue_boolq/train.jsonl", "superglue_boolq/train_fewglue32.jsonl"),
                    eval=("BoolQ/val.jsonl", "superglue_boolq/dev.jsonl"),
                    fields={"answer": "label"},
                ),
            ),
        ),
    ),
    "piqa": (
        _choice("piqa"),
        Published(
            "baber/piqa",
            expand=piqa,
            layouts=(
                _parts(
                    [f"{folder}/train.jsonl" for folder in ("piqa", "physicaliqa-train-dev", "piqa_original")],
                    [
                        "piqa/valid.jsonl",
                        "piqa/dev.jsonl",
                        "physicaliqa-train-dev/dev.jsonl",
                        "piqa_original/dev.jsonl",
                    ],
                    piqa,
                    answers="label",
                ),
            ),
        ),
    ),
    "siqa": (
        _choice("siqa"),
        Published(
            "lighteval/siqa",
            expand=siqa,
            layouts=(
                _parts(
                    [f"{folder}/train.jsonl" for folder in ("socialiqa-train-dev", "socialiqa", "siqa_original")],
                    [f"{folder}/dev.jsonl" for folder in ("socialiqa-train-dev", "socialiqa", "siqa_original")],
                    siqa,
                    answers="label",
                ),
            ),
        ),
    ),
    "hellaswag": (
        _choice("hellaswag"),
        Published(
            "Rowan/hellaswag",
            expand=hellaswag,
            layouts=(
                _parts(
                    ["hellaswag_train.jsonl", "hellaswag/hellaswag_train.jsonl", "data/hellaswag_train.jsonl"],
                    [
                        "hellaswag_val.jsonl",
                        "hellaswag/hellaswag_val.jsonl",
                        "data/hellaswag_val.jsonl",
                        "hellaswag/dev_original_fields_1k.jsonl",
                    ],
                    hellaswag,
                ),
                _parts(["hellaswag/train_1k.jsonl"], [], named),
            ),
        ),
    ),
    "winogrande": (
        _choice("winogrande"),
        Published(
            "allenai/winogrande",
            "winogrande_xl",
            expand=winogrande,
            layouts=(
                _parts(
                    ["winogrande_1.1/train_xl.jsonl", "winogrande/train_xl.jsonl", "winogrande_original/train.jsonl"],
                    ["winogrande_1.1/dev.jsonl", "winogrande/dev.jsonl", "winogrande_original/dev.jsonl"],
                    winogrande,
                    answers="answer",
                ),
            ),
        ),
    ),
    "arc_easy": (_choice("arc_easy"), _arc("ARC-Easy")),
    "arc_challenge": (_choice("arc_challenge"), _arc("ARC-Challenge")),
    "openbookqa": (
        _choice("openbookqa"),
        Published(
            "allenai/openbookqa",
            "main",
            eval={"": "test"},
            expand=columns,
            layouts=(
                _parts(
                    [f"{top}Main/train.jsonl" for top in ("OpenBookQA-V1-Sep2018/Data/", "Data/", "")],
                    [f"{top}Main/test.jsonl" for top in ("OpenBookQA-V1-Sep2018/Data/", "Data/", "")],
                    nested,
                ),
            ),
        ),
    ),
}

# Our name and the folder of the collection.
_FOLDERS: Mapping[str, str] = {
    "boolq": "boolq",
    "piqa": "piqa",
    "siqa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}
_INSTRUCTED: Mapping[str, Any] = {
    "kind": "choose",
    "prompt": "{{ instruction }}{% if input %}\n{{ input }}{% endif %}\n\nThe correct answer is",
    "answer": "answer",
    "choices": "options",
}


def _instructions(name: str, folder: str) -> Published:
    return Published(
        None,
        layouts=(
            Layout(
                train=(f"{folder}/train.json", f"commonsense_{name}/train.jsonl"),
                eval=(f"{folder}/test.json", f"commonsense_{name}/test.jsonl"),
                expand=instruction,
            ),
        ),
    )


COMMONSENSE_INSTRUCT: Mapping[str, tuple[dict[str, Any], Published]] = {
    name: (dict(_INSTRUCTED), _instructions(name, folder)) for name, folder in _FOLDERS.items()
}
