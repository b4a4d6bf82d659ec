"""Tiny files in the published formats of every suite, and the same rows as the Hub has them; all rows are our own.

`PYTHONPATH=src:tests python tests/suite_files.py` writes what the tests compare with: the snapshot of all renderings,
and the table of docs/tasks.md. Read the difference before you commit it.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peml.tasks import SUITES, suite_tasks
from peml.tasks.suites.table import table

ROOT = Path(__file__).parent.parent
SNAPSHOT = ROOT / "tests" / "snapshots" / "suites.json"
DOCS = ROOT / "docs" / "tasks.md"
BEGIN, END = "<!-- table of suites -->\n", "<!-- end of table -->\n"

Rows = Sequence[Mapping[str, Any]]


def _tsv(*lines: Sequence[object]) -> str:
    return "".join("\t".join(map(str, line)) + "\n" for line in lines)


def _jsonl(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _pair(label: str, *lines: Sequence[object]) -> str:
    return _tsv(("index", "sentence1", "sentence2", label), *((i, *line) for i, line in enumerate(lines)))


_MNLI = ("index", "promptID", "pairID", "genre", "s1_bp", "s2_bp", "s1_p", "s2_p", "sentence1", "sentence2", "label1")


def _mnli(*lines: tuple[str, str, str]) -> str:
    filled = [(i, 1, 2, "fiction", "(", "(", "S", "S", p, h, label, label) for i, (p, h, label) in enumerate(lines)]
    return _tsv((*_MNLI, "gold_label"), *filled)


_STSB = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score")
_MRPC = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
_QQP = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")

GLUE_FILES = {
    "CoLA/train.tsv": _tsv(("ab12", 1, "", "The kettle sings."), ("ab12", 0, "*", "Kettle the sings.")),
    "CoLA/dev.tsv": _tsv(("ab12", 0, "*", 'He "said.'), ("ab12", 1, "", "He sat.")),
    "SST-2/train.tsv": _tsv(("sentence", "label"), ("a warm little film", 1), ("dull", 0)),
    "SST-2/dev.tsv": _tsv(("sentence", "label"), ("no spark at all", 0), ("fine", 1)),
    "MRPC/train.tsv": "\ufeff"
    + _tsv(_MRPC, (1, 7, 8, 'He said "yes .', "He agreed ."), (0, 7, 9, "It rains .", "He left .")),
    "MRPC/dev.tsv": "\ufeff" + _tsv(_MRPC, (0, 1, 2, "One .", "Two ."), (1, 1, 2, "One .", "1 .")),
    "STS-B/train.tsv": _tsv(
        _STSB, (0, "g", "f", 2012, 1, "none", "none", "A cat sleeps.", "A cat is asleep.", "4.750")
    ),
    "STS-B/dev.tsv": _tsv(_STSB, (0, "g", "f", 2012, 1, "none", "none", "A cat sleeps.", "It rains.", "0.200")),
    "QQP/train.tsv": _tsv(
        _QQP, (1, 2, 3, "How old is it?", "What is its age?", 1), (2, 4), (3, 5, 6, "Who?", "Why?", 0)
    ),
    "QQP/dev.tsv": _tsv(_QQP, (1, 2, 3, "Where?", "When?", 0), (4, 5, 6, "Where?", "In what place?", 1)),
    "MNLI/train.tsv": _mnli(("It rains.", "It is wet.", "entailment"), ("It rains.", "It is May.", "neutral")),
    "MNLI/dev_matched.tsv": _mnli(("It rains.", "The sun is out.", "contradiction")),
    "MNLI/dev_mismatched.tsv": _mnli(("Call me.", "Use the phone.", "entailment"), ("Call.", "Now.", "neutral")),
    "QNLI/train.tsv": _tsv(
        ("index", "question", "sentence", "label"),
        (0, "Who made it?", "Ann made it.", "entailment"),
        (1, "When?", "Ann made it.", "not_entailment"),
    ),
    "QNLI/dev.tsv": _tsv(("index", "question", "sentence", "label"), (0, "Why?", "It rains.", "not_entailment")),
    "RTE/train.tsv": _pair(
        "label", ("Ann lives in Oslo.", "Ann lives in Norway.", "entailment"), ("A.", "B.", "not_entailment")
    ),
    "RTE/dev.tsv": _pair("label", ("Ann left.", "Ann is here.", "not_entailment")),
    "WNLI/train.tsv": _pair("label", ("The cup fell because it was round.", "The cup was round.", 1), ("A.", "B.", 0)),
    "WNLI/dev.tsv": _pair("label", ("Ann saw Eve when she left.", "Ann left.", 0)),
}
_YES, _NO = "entailment", "not_entailment"
GLUE_HUB = {
    "cola": {"sentence": "The kettle sings.", "label": 1, "idx": 0},
    "sst2": {"sentence": "a warm little film", "label": 1, "idx": 0},
    "mrpc": {"sentence1": 'He said "yes .', "sentence2": "He agreed .", "label": 1, "idx": 0},
    "stsb": {"sentence1": "A cat sleeps.", "sentence2": "A cat is asleep.", "label": 4.75, "idx": 0},
    "qqp": {"question1": "How old is it?", "question2": "What is its age?", "label": 1, "idx": 0},
    "mnli": {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "idx": 0},
    "qnli": {"question": "Who made it?", "sentence": "Ann made it.", "label": 0, "idx": 0},
    "rte": {"sentence1": "Ann lives in Oslo.", "sentence2": "Ann lives in Norway.", "label": 0, "idx": 0},
    "wnli": {
        "sentence1": "The cup fell because it was round.",
        "sentence2": "The cup was round.",
        "label": 1,
        "idx": 0,
    },
}

_MULTIRC = {
    "idx": 3,
    "version": 1.1,
    "passage": {
        "text": "Ann baked bread. Eve ate it.",
        "questions": [
            {
                "idx": 5,
                "question": "Who baked?",
                "answers": [{"idx": 0, "text": "Ann", "label": 1}, {"idx": 1, "text": "Eve", "label": 0}],
            },
            {"idx": 6, "question": "What was eaten?", "answers": [{"idx": 2, "text": "Bread", "label": 1}]},
        ],
    },
}
_RECORD = {
    "source": "us",
    "idx": 0,
    "passage": {
        "text": "Oslo beat Rome.\n@highlight\nThe Oslo team won",
        "entities": [{"start": 0, "end": 3}, {"start": 10, "end": 13}, {"start": 31, "end": 34}],
    },
    "qas": [
        {
            "idx": 0,
            "query": "The win of @placeholder was narrow.",
            "answers": [{"start": 0, "end": 3, "text": "Oslo"}, {"start": 27, "end": 39, "text": "The Oslo team"}],
        },
        {"idx": 1, "query": "@placeholder lost.", "answers": [{"start": 10, "end": 13, "text": "Rome"}]},
    ],
}
_COPA = {"premise": "The glass broke.", "choice1": "It fell.", "choice2": "It was blue.", "idx": 0}
_WIC = {
    "word": "bank",
    "sentence1": "The bank of the river.",
    "sentence2": "The bank lends.",
    "idx": 0,
    "start1": 4,
    "start2": 4,
    "end1": 8,
    "end2": 8,
}
_WSC = {"text": "Ann thanked Eve because she helped.", "idx": 0}
_SPANS = {"span1_index": 2, "span1_text": "Eve", "span2_index": 4, "span2_text": "she"}
_BOOLQ = {"question": "is tea a drink", "passage": "Tea -- Tea is drunk hot."}

SUPERGLUE_FILES = {
    "BoolQ/train.jsonl": _jsonl({**_BOOLQ, "idx": 0, "label": True}),
    "BoolQ/val.jsonl": _jsonl({"question": "is it raining", "passage": "The sun is out.", "idx": 0, "label": False}),
    "CB/train.jsonl": _jsonl(
        {"premise": "B: I think it rains.", "hypothesis": "it rains", "label": "neutral", "idx": 0}
    ),
    "CB/val.jsonl": _jsonl(
        {"premise": "It rains.", "hypothesis": "it rains", "label": "entailment", "idx": 0},
        {"premise": "It rains.", "hypothesis": "it is dry", "label": "contradiction", "idx": 1},
    ),
    "COPA/train.jsonl": _jsonl({**_COPA, "question": "cause", "label": 0}),
    "COPA/val.jsonl": _jsonl(
        {
            "premise": "It fell.",
            "choice1": "It flew.",
            "choice2": "It broke.",
            "question": "effect",
            "label": 1,
            "idx": 0,
        }
    ),
    "MultiRC/train.jsonl": _jsonl(_MULTIRC),
    "MultiRC/val.jsonl": _jsonl(_MULTIRC),
    "ReCoRD/train.jsonl": _jsonl(_RECORD),
    "ReCoRD/val.jsonl": _jsonl(_RECORD),
    "RTE/train.jsonl": _jsonl({"premise": "Ann lives in Oslo.", "hypothesis": "Ann lives.", "label": _YES, "idx": 0}),
    "RTE/val.jsonl": _jsonl({"premise": "Ann left.", "hypothesis": "Ann is here.", "label": _NO, "idx": 0}),
    "WiC/train.jsonl": _jsonl({**_WIC, "label": False}),
    "WiC/val.jsonl": _jsonl({**_WIC, "sentence2": "Sit on the bank.", "label": True}),
    "WSC/train.jsonl": _jsonl({**_WSC, "label": True, "target": _SPANS}),
    "WSC/val.jsonl": _jsonl({**_WSC, "label": False, "target": {**_SPANS, "span1_text": "Ann", "span1_index": 0}}),
}
SUPERGLUE_HUB = {
    "boolq": {**_BOOLQ, "idx": 0, "label": 1},
    "cb": {"premise": "B: I think it rains.", "hypothesis": "it rains", "label": 2, "idx": 0},
    "copa": {**_COPA, "question": "cause", "label": 0},
    "multirc": {
        "paragraph": "Ann baked bread. Eve ate it.",
        "question": "Who baked?",
        "answer": "Ann",
        "idx": {"paragraph": 3, "question": 5, "answer": 0},
        "label": 1,
    },
    "record": {
        "passage": "Oslo beat Rome.\n@highlight\nThe Oslo team won",
        "query": "The win of @placeholder was narrow.",
        "entities": ["Oslo", "Rome", "Oslo"],
        "entity_spans": {"text": ["Oslo", "Rome", "Oslo"], "start": [0, 10, 31], "end": [4, 14, 35]},
        "answers": ["Oslo", "The Oslo team"],
        "idx": {"passage": 0, "query": 0},
    },
    "rte": {"premise": "Ann lives in Oslo.", "hypothesis": "Ann lives.", "label": 0, "idx": 0},
    "wic": {**_WIC, "label": 0},
    "wsc": {**_WSC, **_SPANS, "label": 1},
}


def _mmlu() -> dict[str, str]:
    def line(*values: str) -> str:
        return ",".join(f'"{value}"' if "," in value else value for value in values) + "\n"

    files = {}
    for subject in SUITES["mmlu"].tasks():
        for split in ("dev", "val", "test"):
            count = 5 if split == "dev" else 1
            files[f"{split}/{subject}_{split}.csv"] = "".join(
                line(f"Which, of {subject}, is {split} {n}?", "one", "two", "three", "four", "ABCD"[n % 4])
                for n in range(1, count + 1)
            )
    return files


_QUESTION = {"stem": "What is hot?", "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]}
_NUMBERED = {"stem": "What is cold?", "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]}
_HELLASWAG = {
    "ind": 4,
    "activity_label": "Baking",
    "ctx_a": "Ann kneads.",
    "ctx_b": "she",
    "ctx": "Ann kneads. she",
    "split": "train",
    "split_type": "indomain",
    "endings": ["bakes it.", "flies.", "flies.", "sings."],
    "source_id": "x~1",
}
_SIQA = {
    "context": "Ann fell.",
    "question": "How does she feel?",
    "answerA": "hurt",
    "answerB": "glad",
    "answerC": "rich",
}
_PIQA = {"goal": "Boil water.", "sol1": "Use ice.", "sol2": "Use a stove."}
_WINOGRANDE = {"qID": "Q-1", "sentence": "Ann paid Eve as _ worked.", "option1": "Ann", "option2": "Eve"}
_ARC, _OBQA = "ARC-V1-Feb2018-2/", "OpenBookQA-V1-Sep2018/Data/Main/"

COMMONSENSE_FILES = {
    "boolq/train.jsonl": _jsonl({**_BOOLQ, "title": "Tea", "answer": True}),
    "boolq/dev.jsonl": _jsonl({"question": "is it dry", "passage": "It rains.", "title": "Rain", "answer": False}),
    "piqa/train.jsonl": _jsonl(_PIQA, {"goal": "Rest.", "sol1": "Sit.", "sol2": "Sit."}),
    "piqa/train-labels.lst": "1\n0\n",
    "piqa/valid.jsonl": _jsonl({"goal": "Dry hands.", "sol1": "Use a towel.", "sol2": "Use rain."}),
    "piqa/valid-labels.lst": "0",
    "socialiqa-train-dev/train.jsonl": _jsonl(_SIQA),
    "socialiqa-train-dev/train-labels.lst": "1\n",
    "socialiqa-train-dev/dev.jsonl": _jsonl({**_SIQA, "context": "Ann won."}),
    "socialiqa-train-dev/dev-labels.lst": "2\n",
    "hellaswag_train.jsonl": _jsonl({**_HELLASWAG, "label": 0}),
    "hellaswag_val.jsonl": _jsonl({**_HELLASWAG, "label": 3}),
    "winogrande_1.1/train_xl.jsonl": _jsonl({**_WINOGRANDE, "answer": "2"}),
    "winogrande_1.1/train_xl-labels.lst": "2\n",
    "winogrande_1.1/dev.jsonl": _jsonl({**_WINOGRANDE, "sentence": "Ann owed Eve as _ was late.", "answer": "1"}),
    **{
        f"{_ARC}{name}/{name}-{split}.jsonl": _jsonl({"id": "m1", "question": asked, "answerKey": key})
        for name in ("ARC-Easy", "ARC-Challenge")
        for split, asked, key in (("Train", _QUESTION, "B"), ("Test", _NUMBERED, "1"))
    },
    f"{_OBQA}train.jsonl": _jsonl({"id": "7", "question": _QUESTION, "answerKey": "B"}),
    f"{_OBQA}test.jsonl": _jsonl({"id": "8", "question": _QUESTION, "answerKey": "A"}),
}
_COLUMNS = {"text": ["ice", "fire"], "label": ["A", "B"]}
COMMONSENSE_HUB = {
    "boolq": {**_BOOLQ, "answer": True},
    "piqa": {**_PIQA, "label": 1},
    "siqa": {**_SIQA, "label": "1"},
    "hellaswag": {**_HELLASWAG, "label": "0"},
    "winogrande": {key: value for key, value in _WINOGRANDE.items() if key != "qID"} | {"answer": "2"},
    "arc_easy": {"id": "m1", "question": "What is hot?", "choices": _COLUMNS, "answerKey": "B"},
    "arc_challenge": {"id": "m1", "question": "What is hot?", "choices": _COLUMNS, "answerKey": "B"},
    "openbookqa": {"id": "7", "question_stem": "What is hot?", "choices": _COLUMNS, "answerKey": "B"},
}


def _instructed() -> dict[str, str]:
    formats = {
        "boolq": (
            "true/false",
            "true",
            "Please answer the following question with true or false, question: is tea hot?",
        ),
        "piqa": ("solution1/solution2", "solution2", "Please choose: Boil water.\n\nSolution1: ice\n\nSolution2: fire"),
        "social_i_qa": ("answer1/answer2/answer3", "answer3", "Ann fell. Why?\n\nAnswer1: a Answer2: b Answer3: c"),
        "hellaswag": ("ending1/ending2/ending3/ending4", "ending1", "Ann kneads.\n\nEnding1: a Ending2: b"),
        "winogrande": ("option1/option2", "option2", "Ann paid Eve as _ worked.\n\nOption1: Ann Option2: Eve"),
        "ARC-Easy": ("answer1/answer2/answer3/answer4", "answer4", "What is hot?\n\nAnswer1: a Answer2: b"),
        "ARC-Challenge": ("answer1/answer2/answer3/answer4/answer5", "answer5", "What is hot?\n\nAnswer1: a"),
        "openbookqa": ("answer1/answer2/answer3/answer4", "answer1", "What is hot?\n\nAnswer1: a Answer2: b"),
    }
    files = {}
    for folder, (offered, answer, asked) in formats.items():
        gap = " " if folder == "winogrande" else "\n\n"
        row = {
            "instruction": f"{asked}{gap}Answer format: {offered}",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        files |= {f"{folder}/{split}.json": json.dumps([row], indent=2) for split in ("train", "test")}
    return files


FILES: Mapping[str, Mapping[str, str]] = {
    "glue": GLUE_FILES,
    "superglue": SUPERGLUE_FILES,
    "mmlu": _mmlu(),
    "commonsense": COMMONSENSE_FILES,
    "commonsense_instruct": _instructed(),
}
HUB: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "glue": GLUE_HUB,
    "superglue": SUPERGLUE_HUB,
    "mmlu": {
        "virology": {
            "question": "Which, of virology, is val 1?",
            "subject": "virology",
            "choices": ["one", "two", "three", "four"],
            "answer": 1,
        }
    },
    "commonsense": COMMONSENSE_HUB,
}
"""The first training row of each task, as the Hub has it."""


def write_suite(suite: str, folder: Path) -> Path:
    """The files of a suite, in `folder`."""
    for name, content in FILES[suite].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8", newline="")
    return folder


def rendered(suite: str, folder: Path, include: Iterable[str] | None = None) -> dict[str, Any]:
    """Every example of the suite's tasks, without what is empty."""
    result: dict[str, Any] = {}
    for task in suite_tasks(suite, None if include is None else list(include), path=str(folder)):
        for split in ("train", "eval"):
            for number, example in enumerate(task.examples(split), 1):
                said = {
                    "prompt": example.prompt,
                    "answer": example.answer,
                    "choices": example.choices,
                    "texts": example.texts,
                    "value": example.value,
                    "group": example.group,
                    "references": example.references,
                }
                kept = {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
                result[f"{suite}/{task.name}, {split} {number}"] = {
                    key: value for key, value in kept.items() if value not in ("", [], None)
                }
    return result


SHOWN = {"mmlu": ("virology", "abstract_algebra")}
"""Tasks whose renderings are written down, where the others are the same but for the subject."""


def snapshot() -> dict[str, Any]:
    """The renderings of all suites."""
    whole: dict[str, Any] = {}
    for suite in FILES:
        with tempfile.TemporaryDirectory() as folder:
            whole |= rendered(suite, write_suite(suite, Path(folder)), SHOWN.get(suite))
    return whole


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(snapshot(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
