"""Files of a split in a folder, and reading that goes on after a bad line."""

from pathlib import Path

import pytest

from peml.errors import PemlError
from peml.tasks import HubSource
from peml.tasks.files import scan_file


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
