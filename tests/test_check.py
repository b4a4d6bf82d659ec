"""`peml tasks check`: files damaged in every way we know, what it counts, and its exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from transformers import LlamaConfig

from chat import CHATML, chat_tokenizer
from peml.errors import PemlError
from peml.tasks import Task
from peml.tasks.source import FileSource
from peml.training.check import check_task, check_tasks
from peml.training.lengths import Reader

GOOD = {"text": "a", "team": "x", "ends": ["p", "q"], "end": "p", "n": 1.5}
CHOOSE = {"kind": "choose", "prompt": "{{ text }}", "answer": "team", "choices": ["x", "y"]}
FIELD = {"kind": "choose", "prompt": "{{ text }}", "answer": "end", "choices": "ends"}
REGRESS = {"kind": "regress", "prompt": "{{ text }}", "answer": "n"}
GENERATE = {"kind": "generate", "prompt": "{{ text }}", "answer": "team"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def lines(*rows: Any) -> bytes:
    """A jsonl file with two good rows in front, so that the first of `rows` is in line 3."""
    whole = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in (GOOD, GOOD, *rows))
    return b"".join(row + b"\n" for row in whole)


def talk(*rows: Any) -> bytes:
    return lines(*rows).replace(json.dumps(GOOD).encode(), json.dumps({"messages": [USER, ASSISTANT]}).encode())


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


# name of the file, its content, the task on it, the lines that are bad, words of the first complaint
DAMAGED: dict[str, tuple[str, bytes, dict[str, Any], list[int | None], str]] = {
    "not UTF-8": ("a.jsonl", lines(b'{"text": "\xff"}', GOOD), CHOOSE, [3], "not UTF-8"),
    "UTF-16": ("a.jsonl", '{"x": 1}\n'.encode("utf-16"), CHOOSE, [1, 2], "not UTF-8"),
    "not JSON": ("a.jsonl", lines(b"{text: 1}", GOOD, b"]"), CHOOSE, [3, 5], "not valid JSON"),
    "JSON that is no object": ("a.jsonl", lines([1], GOOD, "text"), CHOOSE, [3, 5], "must be a JSON object"),
    "a last line cut off": ("a.jsonl", lines(GOOD)[:-9], CHOOSE, [3], "it may be cut off"),
    "a blank line": ("a.jsonl", lines(b"", GOOD, b" ", GOOD), CHOOSE, [3, 5], "the line is blank"),
    "a missing field": (
        "a.jsonl",
        lines(without("text"), GOOD, without("team")),
        CHOOSE,
        [3, 5],
        "'text' is undefined",
    ),
    "a null": ("a.jsonl", lines(GOOD | {"text": None}), CHOOSE, [3], r"is empty \(null\)"),
    "an empty answer": (
        "a.jsonl",
        lines(GOOD | {"team": " "}, GOOD | {"team": None}),
        CHOOSE,
        [3, 4],
        "is empty; fill",
    ),
    "an answer among no choices": ("a.jsonl", lines(GOOD | {"team": "z"}), CHOOSE, [3], "'z' is not among the choices"),
    "an unknown label": ("a.jsonl", lines(GOOD | {"team": 7}), CHOOSE | {"labels": {0: "x"}}, [3], "'7' is not among"),
    "too few and too many columns": ("a.csv", b"text,team\na,x\na\na,x\na,x,y\n", CHOOSE, [3, 5], "has 1 values"),
    "a quote left open": ("a.csv", b'text,team\na,x\n"a,x\na,x\n', CHOOSE, [3], "cannot be read"),
    "text behind a quote": ("a.csv", b'text,team\na,x\n"a" b,x\na,x\n', CHOOSE, [3], "cannot be read"),
    "a column named twice": ("a.csv", b"text,text\na,x\n", CHOOSE, [1], "each by a name of its own"),
    "no header": ("a.csv", b"a,x\nb,y\nc,x\n", CHOOSE, [2, 3], "'text' is undefined"),
    "columns of another table": ("a.tsv", b"text\tteam\na\tx\na\n", CHOOSE, [3], "has 1 values"),
    "an empty file": ("a.jsonl", b"", CHOOSE, [None], "is empty"),
    "a header alone": ("a.csv", b"text,team\n", CHOOSE, [None], "is empty"),
    "a wrong suffix": ("a.txt", b"a", CHOOSE, [None], "has the suffix '.txt'"),
    "a JSON list cut off": ("a.json", b'[\n{"text": "a", "team": "x"},\n{"text"', CHOOSE, [3], "not valid JSON"),
    "lines in place of a list": ("a.json", b'{"text": "a"}\n{"text": "b"}\n', CHOOSE, [2], "use the suffix .jsonl"),
    "a broken parquet": ("a.parquet", b"PAR1 and then nothing", CHOOSE, [None], "is not a parquet file"),
    "not a number": (
        "a.jsonl",
        lines(b'{"text": "a", "n": NaN}', GOOD | {"n": "1e999"}),
        REGRESS,
        [3, 4],
        "is empty; fill",
    ),
    "text for a number": ("a.jsonl", lines(GOOD | {"n": "high"}), REGRESS, [3], "must be a number, not 'high'"),
    "half a surrogate pair": ("a.jsonl", lines(GOOD | {"text": "\ud800"}), CHOOSE, [3], "half of a surrogate pair"),
    "choices that are no list": ("a.jsonl", lines(GOOD | {"ends": "p"}), FIELD, [3], "must hold a list of choices"),
    "choices that are the same": ("a.jsonl", lines(GOOD | {"ends": ["p", "p"]}), FIELD, [3], "must be distinct"),
    "one choice": ("a.jsonl", lines(GOOD | {"ends": ["p"]}), FIELD, [3], "at least two"),
    "a list for a text": ("a.jsonl", lines(GOOD | {"team": ["x"]}), GENERATE, [3], "must hold a text"),
    "no assistant": ("a.jsonl", talk({"messages": [USER]}), {}, [3], "the last turn must be the assistant's"),
    "a role nobody has": (
        "a.jsonl",
        talk({"messages": [USER | {"role": "human"}, ASSISTANT]}, {"messages": [ASSISTANT, ASSISTANT]}),
        {},
        [3, 4],
        "the role 'human'",
    ),
    "turns that are no objects": ("a.jsonl", talk({"messages": ["a", "b"]}), {}, [3], "must be an object with `role`"),
    "an answer that cannot fit": (
        "a.jsonl",
        lines(GOOD | {"team": "z" * 90}),
        GENERATE,
        [3],
        "do not fit into `max_le",
    ),
    "a conversation that cannot fit": (
        "a.jsonl",
        talk({"messages": [USER, ASSISTANT | {"content": "z" * 90}]}),
        {},
        [3],
        "do not fit into `max_length` 80",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a configuration; no weights."""
    folder = tmp_path_factory.mktemp("model")
    chat_tokenizer(CHATML).save_pretrained(folder)
    LlamaConfig(vocab_size=300, max_position_embeddings=80).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, model: Path | str, *tasks: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "method": "lora", "tasks": list(tasks)}), encoding="utf-8")
    return path


@pytest.mark.parametrize("damage", DAMAGED)
def test_every_damage_is_found_in_its_line(tmp_path: Path, model: Path, damage: str) -> None:
    name, content, task, bad, words = DAMAGED[damage]
    path, good = tmp_path / name, tmp_path / "good.jsonl"
    path.write_bytes(content)
    good.write_bytes(talk() if not task else lines())
    (found,) = check_tasks(
        write_recipe(tmp_path, model, {"name": "it", "path": str(path), "eval_path": str(good), **task})
    ).tasks
    assert [(problem.file, problem.line) for problem in found.problems] == [(str(path), line) for line in bad]
    with pytest.raises(AssertionError, match=words):  # pytest shows the message where the words are missing
        raise AssertionError(found.problems[0].message)


def test_a_folder_of_damaged_files_exits_with_2_and_names_every_line(tmp_path: Path, model: Path, peml: Any) -> None:
    entries = []
    for number, (name, content, task, _, _) in enumerate(DAMAGED.values()):
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(content)
        entries.append({"name": f"t{number}", "path": str(path), "eval_fraction": 0.3, **task})
    for entry in entries:
        if Path(entry["path"]).suffix == ".txt":
            del entry["eval_fraction"]
    entries.append({"name": "absent", "path": str(tmp_path / "rows.jsonl"), **CHOOSE})
    assert len(entries) > 20
    code, out, errors = peml("tasks", "check", write_recipe(tmp_path, model, *entries))
    assert code == 2 and "Traceback" not in errors
    assert "rows.jsonl does not exist; did you mean" in out and "(task 'absent')" in out
    for (_, _, _, bad, _), entry in zip(DAMAGED.values(), entries, strict=False):
        for line in bad:
            assert f"error: {entry['path']}{'' if line is None else f':{line}:'}" in out, (entry, line)
    assert out.count("error: ") == 1 + sum(len(bad) for _, _, _, bad, _ in DAMAGED.values())
    code, out, _ = peml("tasks", "check", tmp_path / "recipe.yaml", "--json")
    data = json.loads(out)
    assert code == 2 and data["clean"] is False and data["max_length"] == 80
    assert [[problem["line"] for problem in task["problems"]] for task in data["tasks"]] == [
        *(bad for _, _, _, bad, _ in DAMAGED.values()),
        [None],
    ]


def test_a_clean_recipe_exits_with_0(tmp_path: Path, model: Path, peml: Any) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(*[GOOD | {"text": f"a{n}", "n": n} for n in range(18)]))
    (tmp_path / "talk.jsonl").write_bytes(
        talk(*[{"messages": [USER | {"content": f"{n}"}, ASSISTANT]} for n in range(18)])
    )
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([GOOD | {"text": f"a{n}"} for n in range(20)]), tmp_path / "rows.parquet"
    )
    kinds = {"choose": CHOOSE, "field": FIELD, "regress": REGRESS, "generate": GENERATE | {"chat": True}}
    entries = [{"name": name, "path": str(tmp_path / "rows.jsonl"), **kind} for name, kind in kinds.items()]
    entries.append({"name": "talk", "path": str(tmp_path / "talk.jsonl")})
    entries.append({"name": "parquet", "path": str(tmp_path / "rows.parquet"), **CHOOSE, "limit_train": 5})
    code, out, _ = peml("tasks", "check", write_recipe(tmp_path, model, *entries))
    assert code == 0 and "107 good rows, no problem" in " ".join(out.split()) and "error" not in out
    assert "note: choose: 1 training rows repeat another one" in out and "no training row answers 'y'" in out
    code, out, _ = peml("tasks", "check", tmp_path / "recipe.yaml", "--json")
    data = json.loads(out)
    assert code == 0 and data["clean"] is True
    assert [task["rows"] for task in data["tasks"]][-1] == {"train": 5, "eval": 2}


def test_of_each_file_only_so_many_are_shown(tmp_path: Path, model: Path, peml: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*[b"not"] * 30))
    recipe = write_recipe(tmp_path, model, {"name": "it", "path": str(path), **CHOOSE})
    code, out, _ = peml("tasks", "check", recipe, "--show", "3")
    assert code == 2 and out.count("error: ") == 3 and f"and 27 more in {path}" in out and "30 problems" in out
    _, out, _ = peml("tasks", "check", recipe, "--show", "3", "--json")
    (task,) = json.loads(out)["tasks"]
    assert len(task["problems"]) == 3 and task["count"] == 30


# ---------------------------------------------------------------------------------------------- what it counts


def task_on(folder: Path, train: list[Any], evaluation: list[Any], **fields: Any) -> Task:
    for name, rows in (("train", train), ("eval", evaluation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = FileSource(train=folder / "train.jsonl", eval=folder / "eval.jsonl")
    given = CHOOSE | {"choices": ("x", "y", "z")} | fields
    return Task(name="it", source=source, **given)


def test_rows_that_ask_the_same_are_counted(tmp_path: Path) -> None:
    train = [{"text": text, "team": team} for text, team in (("a b", "x"), ("A  b", "x"), ("a b", "y"), ("c", "y"))]
    evaluation = [{"text": "C", "team": "x"}, {"text": "d", "team": "x"}]
    found = check_task(task_on(tmp_path, train, evaluation))
    assert found.duplicates == {"repeated": 1, "contradictory": 1, "leaked": 1}
    assert found.answers == {"train": {"x": 2, "y": 2, "z": 0}, "eval": {"x": 2, "y": 0, "z": 0}}
    notes = "\n".join(found.notes)
    for words in (
        rf"1 training rows repeat another one, first {tmp_path}/train.jsonl:2 as {tmp_path}/train.jsonl:1",
        rf"answer otherwise, first {tmp_path}/train.jsonl:3 as {tmp_path}/train.jsonl:1",
        rf"what a training row asks, first {tmp_path}/eval.jsonl:1 as {tmp_path}/train.jsonl:4",
        "no training row answers 'z'",
    ):
        assert words in notes
    assert not found.problems


def test_rows_that_are_asked_by_different_templates_are_compared(tmp_path: Path) -> None:
    rows = [{"text": f"a{n}", "team": "xyz"[n % 3]} for n in range(20)]
    found = check_task(task_on(tmp_path, rows + rows[:2], rows, prompt=("{{ text }}", "Q: {{ text }}")))
    assert found.duplicates == {"repeated": 2, "contradictory": 0, "leaked": 20}


def test_the_same_text_with_other_choices_is_another_question(tmp_path: Path) -> None:
    rows = [{"text": "a", "ends": ends, "team": ends[0]} for ends in (["p", "q"], ["r", "s"])]
    found = check_task(task_on(tmp_path, rows, rows[:1], choices="ends"))
    assert found.duplicates == {"repeated": 0, "contradictory": 0, "leaked": 1}
    assert found.answers["train"] == {"choice 1": 2}


def test_lengths_and_cuts_are_those_of_training_and_evaluation(tmp_path: Path) -> None:
    rows = [{"text": "t" * n, "team": "u" * (1 + n % 3)} for n in range(2, 62)]
    reader = Reader(chat_tokenizer(), "causal", 40)
    task = task_on(tmp_path, rows, rows, kind="generate", choices=None, max_new_tokens=2)
    found = check_task(task, reader)
    # Each byte is a token: <s>, the text, a blank, the answer, </s>; evaluation writes no end.
    lengths = sorted(n + 4 + n % 3 for n in range(2, 62))
    assert (found.lengths["train"].longest, found.lengths["train"].cut) == (lengths[-1], sum(n > 40 for n in lengths))
    assert lengths[29] <= found.lengths["train"].median <= lengths[30]
    assert found.lengths["eval"].cut == sum(n + 1 + 2 > 40 for n in range(2, 62))
    assert found.lengths["eval"].unwritable == sum(2 + n % 3 > 2 for n in range(2, 62))
    assert not found.problems and any("cannot be written" in note for note in found.notes)
    chosen = check_task(task_on(tmp_path, rows, rows, choices=("u", "uu", "uuu")), reader)
    assert chosen.lengths["eval"].longest == 61 + 5 and chosen.lengths["train"].longest == max(
        n + 3 + n % 3 for n in range(2, 62)
    )


def test_rows_that_a_shorter_choice_always_wins_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"a{n}", "team": team} for n, team in enumerate(("1", "10", "2", "10"))]
    task, reader = task_on(tmp_path, rows, rows, choices=("1", "10", "2")), Reader(chat_tokenizer(), "causal", 40)
    found = check_task(task, reader)
    assert found.lengths["eval"].outdone == 2 and not found.problems
    assert any("2 eval rows cannot be answered right" in note for note in found.notes)
    assert check_task(replace(task, length_normalization=True), reader).lengths["eval"].outdone == 0
    assert check_task(task, replace(reader, form="seq2seq")).lengths["eval"].outdone == 0


def test_a_model_that_cannot_read_conversations_is_one_problem(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT]}] * 50
    task = task_on(tmp_path, rows, rows, kind="generate", prompt=None, answer=None, choices=None)
    (problem,) = check_task(task, Reader(chat_tokenizer(None), "causal", 40)).problems
    assert problem.line is None and "has no chat template" in problem.message


def test_an_encoder_refuses_what_its_heads_cannot_answer(tmp_path: Path) -> None:
    rows = [{"text": "a", "team": "x"}, {"text": "b", "team": "y"}]
    reader = Reader(chat_tokenizer(), "heads", 40)
    (problem,) = check_task(task_on(tmp_path, rows, rows, kind="generate", choices=None), reader).problems
    assert "writes its answers, but the model is an encoder" in problem.message
    assert check_task(task_on(tmp_path, rows, rows), reader).lengths["train"].longest == 2


def test_without_a_tokenizer_the_rest_is_checked(tmp_path: Path, peml: Any) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(*[GOOD] * 10))
    recipe = write_recipe(
        tmp_path, tmp_path / "nowhere", {"name": "it", "path": str(tmp_path / "rows.jsonl"), **CHOOSE}
    )
    code, out, _ = peml("tasks", "check", recipe)
    assert code == 0 and "no lengths: model: the tokenizer of" in out
    code, _, errors = peml("tasks", "check", recipe, "--model", tmp_path / "elsewhere")
    assert code == 2 and "elsewhere could not be loaded" in errors and len(errors.strip().split("\n")) == 1


def test_training_stops_at_the_first_problem_and_names_the_task(tmp_path: Path) -> None:
    task = task_on(tmp_path, [{"text": "a", "team": "x"}], [{"text": "a", "team": "w"}, {"text": 1}])
    with pytest.raises(PemlError, match=r"eval.jsonl:1: task 'it': the answer 'w' is not among"):
        task.examples("eval")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(PemlError, match=r"train.jsonl does not exist; did you mean .*\(task 'it'\)$"):
        task.examples("train")
