"""Files of a split in a folder, reading that goes on after a bad line, and streams of rows."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from peml.errors import PemlError
from peml.tasks import FileSource, HubSource, Source, Task
from peml.tasks.files import scan_file
from peml.training.entries import OwnEntry, build_tasks


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def scanned(path: Path) -> list[object]:
    """Rows as they are, problems as the line they name."""
    return [int(origin.rpartition(":")[2]) if isinstance(row, PemlError) else row for row, origin in scan_file(path)]


def test_jsonl_is_read_on_after_every_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"x": 1}\nnot\n\xff\n\n[1]\n{"x": 2}\n{"x":')
    assert scanned(path) == [{"x": 1}, 2, 3, 4, 5, {"x": 2}, 7]
    *_, (problem, _) = scan_file(path)
    assert "the file ends here, so it may be cut off" in str(problem)


def test_csv_is_read_on_after_every_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'x,y\n1,2\n1\n"a\nb",3\n\xe9,1\n"a" b,1\n5,6\n"open,7\n8,9\n')
    assert scanned(path) == [
        {"x": "1", "y": "2"},
        3,
        {"x": "a\nb", "y": "3"},
        6,
        7,
        {"x": "5", "y": "6"},
        9,
        {"x": "8", "y": "9"},
    ]


def test_a_quote_left_open_costs_its_line_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'x,y\n"1,2\n3,4\n"5",6\n')
    assert scanned(path) == [2, {"x": "3", "y": "4"}, {"x": "5", "y": "6"}]


def test_a_value_of_a_table_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f'x,y\n"{"a " * 100_000}",1\n')
    ((row, _),) = scan_file(path)
    assert isinstance(row, dict) and len(row["x"]) == 200_000


def test_a_folder_without_evaluation_rows_holds_some_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "".join(f'{{"n": "{n}"}}\n' for n in range(20)))
    entry = {"name": "it", "path": str(tmp_path), "kind": "generate", "prompt": "{{ n }}", "answer": "n"}
    (task,) = build_tasks(OwnEntry.model_validate(entry), 0)
    assert len(task.examples("train")) == 18 and len(task.examples("eval")) == 2
    write(tmp_path / "valid.jsonl", '{"n": "of its own"}\n')
    (task,) = build_tasks(OwnEntry.model_validate(entry), 0)
    assert [example.answer for example in task.examples("eval")] == ["of its own"]


def test_what_goes_with_a_folder_is_refused_for_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"n": "1"}\n')
    entry = {"name": "it", "path": str(path), "kind": "generate", "prompt": "{{ n }}", "answer": "n"}
    with pytest.raises(PemlError, match=r"tasks\[it\]: `split` goes with a folder or a Hub id, not with the file"):
        build_tasks(OwnEntry.model_validate(entry | {"split": {"eval": "test"}}), 0)


def test_a_file_that_cannot_be_read_at_all_is_one_problem(tmp_path: Path) -> None:
    for path in (
        tmp_path / "none.jsonl",
        tmp_path,
        write(tmp_path / "a.txt", "x"),
        write(tmp_path / "a.jsonl", ""),
        write(tmp_path / "a.parquet", "x"),
    ):
        ((problem, origin),) = scan_file(path)
        assert isinstance(problem, PemlError) and origin == str(path) and str(problem).startswith(str(path))


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["train/a.jsonl", "train/b.jsonl"],
    ],
)
def test_a_split_may_have_several_files(tmp_path: Path, names: list[str]) -> None:
    files = [write(tmp_path / name, f'{{"n": {number}}}\n') for number, name in enumerate(names)]
    rows = list(HubSource(path=str(tmp_path)).rows("train"))
    assert rows == [({"n": number}, f"{file}:1") for number, file in enumerate(files)]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.jsonl", '{"n": 1}\n')
    write(tmp_path / "train-00002-of-00003.jsonl", '{"n": 1}\n')
    with pytest.raises(PemlError, match="the shards train-.*-of-00003 are not complete: that of number 00001"):
        list(HubSource(path=str(tmp_path)).rows("train"))


# ------------------------------------------------------------------------------------------------------ streams


def numbers(rows: Iterable[tuple[dict[str, object], str]]) -> list[object]:
    return [row["n"] for row, _ in rows]


@pytest.fixture(params=["file", "shards", "datasets"])
def streamed(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """The numbers 0 to 49 for training and 50 to 54 for evaluation."""
    rows = [f'{{"n": {n}}}\n' for n in range(55)]
    if request.param == "file":
        train = write(tmp_path / "train.jsonl", "".join(rows[:50]))
        return FileSource(train=train, eval=write(tmp_path / "eval.jsonl", "".join(rows[50:])), seed=1)
    if request.param == "shards":
        write(tmp_path / "train-00000-of-00002.jsonl", "".join(rows[:20]))
        write(tmp_path / "train-00001-of-00002.jsonl", "".join(rows[20:50]))
        write(tmp_path / "validation.jsonl", "".join(rows[50:]))
    else:
        write(tmp_path / "train_of_mine.jsonl", "".join(rows[:50]))
        write(tmp_path / "validation_of_mine.jsonl", "".join(rows[50:]))
    return HubSource(path=str(tmp_path), seed=1)


def test_a_stream_has_each_row_once_and_goes_on_anywhere(streamed: Source) -> None:
    whole = numbers(streamed.stream("train", buffer=10))
    assert sorted(whole) == list(range(50)) and whole != sorted(whole)
    assert whole == numbers(streamed.stream("train", buffer=10))
    assert whole[17:] == numbers(streamed.stream("train", start=17, buffer=10))
    assert whole != numbers(streamed.stream("train", number=1, buffer=10))
    assert whole != numbers(replace(streamed, seed=2).stream("train", buffer=10))
    assert numbers(streamed.stream("eval")) == list(range(50, 55))
    assert sorted(numbers(replace(streamed, limit_train=7).stream("train"))) == list(range(7))
    row, origin = next(iter(streamed.stream("train")))
    assert (row, origin) in list(streamed.rows("train"))


def test_a_stream_reads_no_more_than_its_buffer(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(20)) + "broken\n")
    source = FileSource(train=path, eval=path)
    stream = source.stream("train", buffer=5)
    first = [next(stream)[0]["n"] for _ in range(15)]
    assert max(first) <= 19 and len(set(first)) == 15
    with pytest.raises(PemlError, match="rows.jsonl:21: the line is not valid JSON"):
        list(stream)


def test_a_stream_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"n": 1}\n')
    with pytest.raises(PemlError, match="a stream cannot be split: give it evaluation rows of its own"):
        FileSource(train=path).stream("train")
    task = Task(name="it", kind="generate", prompt="{{ n }}", answer="n", source=FileSource(train=path, eval=path))
    assert [example.answer for example in task.stream("train")] == ["1"]
    with pytest.raises(PemlError, match="task 'it': `few_shot` does not go with rows that are streamed"):
        replace(task, few_shot=1).stream("train")
