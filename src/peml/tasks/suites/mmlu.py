"""MMLU (arXiv:2009.03300): multiple-choice questions on 57 subjects in four groups.

The prompt is that of the authors' code without its line about the subject. A task trains on the subject's
`validation` rows and is measured on `test`; `dev` gives the examples in the prompt, five at most. The rows of
`auxiliary_train` belong to no subject, so that no task could train on them: they are not used (our choice).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from peml.tasks.files import Row
from peml.tasks.suites.published import Layout, Published

LETTERS = ("A", "B", "C", "D")

MMLU_GROUPS: Mapping[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "anatomy",
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}


def options(row: Row) -> list[Row]:
    """The four options as one list."""
    return [row | {"choices": [row[letter] for letter in LETTERS]}]


def of_subject(subject: str, row: Row) -> list[Row]:
    """The row if it is on the subject: for files that hold all of them."""
    return options(row) if row["subject"] == subject else []


_FIELDS: Mapping[str, Any] = {
    "kind": "choose",
    "prompt": "{{ question }}\nA. {{ choices[0] }}\nB. {{ choices[1] }}\nC. {{ choices[2] }}\nD. {{ choices[3] }}\n"
    "Answer:",
    "answer": "answer",
    "choices": LETTERS,
    "labels": dict(zip("0123", LETTERS, strict=True)),
}


def _files(subject: str, split: str) -> tuple[str, ...]:
    return tuple(f"{top}{split}/{subject}_{split}.csv" for top in ("", "data/"))


def _published(subject: str) -> Published:
    archive = Layout(
        train=_files(subject, "val"),
        eval=_files(subject, "test"),
        shots=_files(subject, "dev"),
        columns=("question", *LETTERS, "answer"),
        expand=options,
    )
    # Without a test file, `val` is what is measured, and cannot be trained on.
    lines = Layout(
        train=("mmlu/dev.jsonl",),
        eval=("mmlu/val.jsonl",),
        shots=("mmlu/dev.jsonl",),
        expand=partial(of_subject, subject),
    )
    return Published("cais/mmlu", subject, train="validation", eval={"": "test"}, shots="dev", layouts=(archive, lines))


MMLU: Mapping[str, tuple[dict[str, Any], Published]] = {
    subject: (dict(_FIELDS), _published(subject)) for group in MMLU_GROUPS.values() for subject in group
}
