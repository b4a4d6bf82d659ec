"""Every task of the published suites: from files as they are published, from the Hub's rows, rendered and measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sklearn import metrics as sklearn_metrics

import suite_files
from peml.errors import PemlError
from peml.evaluation import average, measure, suite_averages
from peml.tasks import SUITES, Example, SuiteSource, Task, encode, encode_choices, encode_prompts, suite_tasks
from peml.tasks.encode_heads import encode_heads
from peml.tasks.encode_seq2seq import encode_seq2seq
from peml.tasks.suites.table import table
from peml.training.entries import OwnEntry, SuiteEntry, build_tasks
from suite_files import FILES, HUB, write_suite
from test_tasks import word_tokenizer

PUBLISHED = list(FILES)
EVERY = [(suite, name) for suite in PUBLISHED for name in SUITES[suite].tasks()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the files of each suite."""
    return {suite: write_suite(suite, tmp_path_factory.mktemp(suite)) for suite in PUBLISHED}


def task_of(suite: str, name: str, folder: Path | None) -> Task:
    (task,) = suite_tasks(suite, [name], path=None if folder is None else str(folder))
    return task


# ------------------------------------------------------------------------------------------------- loading


def test_the_suites_are_those_of_the_papers() -> None:
    sizes = {name: len(suite.tasks()) for name, suite in SUITES.items() if name != "toy"}
    assert sizes == {"glue": 9, "superglue": 8, "mmlu": 57, "commonsense": 8, "commonsense_instruct": 8}
    groups = {name: len(members) for name, members in SUITES["mmlu"].groups.items()}
    assert groups == {"stem": 18, "humanities": 13, "social_sciences": 12, "other": 14}


@pytest.mark.parametrize(("suite", "name"), EVERY)
def test_every_task_loads_from_files_as_they_are_published(folders: dict[str, Path], suite: str, name: str) -> None:
    task = task_of(suite, name, folders[suite])
    for split in ("train", "eval"):
        examples = task.examples(split)
        assert examples
        for example in examples:
            assert str(folders[suite]) in example.origin and Path(example.origin.rpartition(":")[0]).is_file()
            assert "{" not in example.prompt and example.answer
            assert len(example.texts) in ((1, 2) if suite == "glue" else (0, 2))
    held_out = task.examples("eval")
    perfect = measure(task, [e.answer if e.value is None else repr(e.value) for e in held_out], held_out)
    if len({e.answer for e in held_out}) > 1 or not {"matthews", "f1", "pearson"} & set(task.metrics):
        assert perfect["score"] == 1.0


@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite in HUB for name in HUB[suite]])
def test_rows_of_the_hub_read_as_those_of_the_files(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, suite: str, name: str
) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(path: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list([dict(HUB[suite][name])])

    monkeypatch.setattr(datasets, "load_dataset", load)
    here = task_of(suite, name, folders[suite]).examples("train")[0]
    remote = task_of(suite, name, None)
    (there,) = remote.examples("train")
    assert replace(there, origin="", group="") == replace(here, origin="", group="")
    source = remote.source
    assert isinstance(source, SuiteSource)
    assert there.origin == f"{source}/{source.published.train}:1"
    assert [example.group for example in remote.examples("eval")] == (
        ["matched", "mismatched"] if name == "mnli" else [here.group]
    )
    published = source.published
    splits = [published.train, *published.eval.values()]
    assert asked == [(published.hub, published.config, split, None) for split in splits]


@pytest.mark.parametrize("suite", ["glue", "superglue", "mmlu", "commonsense"])
def test_a_copy_of_the_hubs_files_is_a_folder_too(tmp_path: Path, suite: str) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, row in HUB[suite].items():
        source = SUITES[suite].tasks()[name].source
        assert isinstance(source, SuiteSource) and source.published.hub is not None
        folder = tmp_path / (source.published.config or source.published.hub.rpartition("/")[2])
        folder.mkdir(exist_ok=True)
        for split in (source.published.train, *source.published.eval.values()):
            rows = pyarrow.Table.from_pylist([dict(row)])
            for shard in range(2):
                pyarrow.parquet.write_table(rows, folder / f"{split}-0000{shard}-of-00002.parquet")
        task = task_of(suite, name, tmp_path)
        assert len(task.examples("train")) == 2 and len(task.examples("eval")) == 2 * len(source.published.eval)


def test_every_rendering_is_as_it_was_reviewed() -> None:
    reviewed = json.loads(suite_files.SNAPSHOT.read_text(encoding="utf-8"))
    assert suite_files.snapshot() == reviewed, "run tests/suite_files.py, read the difference and commit it"


def test_the_table_of_the_documentation_is_that_of_the_suites() -> None:
    text = suite_files.DOCS.read_text(encoding="utf-8")
    assert text.partition(suite_files.BEGIN)[2].partition(suite_files.END)[0] == table()


def test_what_is_missing_is_listed(tmp_path: Path) -> None:
    with pytest.raises(
        PemlError, match=r"task 'rte': no file with eval rows in .*; looked for RTE/dev\.tsv, glue_rte/"
    ):
        task_of("glue", "rte", tmp_path).examples("eval")
    with pytest.raises(PemlError, match="task 'rte': `path` .*nowhere is not a folder"):
        task_of("glue", "rte", tmp_path / "nowhere").examples("eval")
    with pytest.raises(PemlError, match="task 'siqa' is published as files only: give their folder"):
        task_of("commonsense_instruct", "siqa", None).examples("train")
    with pytest.raises(PemlError, match="toy/mood is made up on the spot and reads no files: leave out `path`"):
        suite_tasks("toy", ["mood"], path=str(tmp_path))


@pytest.mark.parametrize(
    ("suite", "name", "file", "content", "message"),
    [
        ("glue", "cola", "CoLA/train.tsv", "ab\t1\t\tGood.\nab\t1\n", r"train\.tsv:2: the row has 2 values, but .* 4"),
        ("glue", "cola", "CoLA/train.tsv", "", r"train\.tsv is empty"),
        ("glue", "rte", "RTE/train.tsv", "index\tsentence1\n0\tA.\n", r"train\.tsv:2: task 'rte': .* lacks"),
        ("superglue", "multirc", "MultiRC/train.jsonl", '{"idx": 1}\n', r"jsonl:1: the row is not as it is published"),
        (
            "superglue",
            "record",
            "ReCoRD/train.jsonl",
            '{"passage": {"text": "A", "entities": [{"start": 0, "end": 0}]}, '
            '"qas": [{"query": "@placeholder", "answers": [{"text": "B"}]}]}\n',
            r"not as it is published \(KeyError: 'an answer among the entities'\)",
        ),
        ("commonsense", "piqa", "piqa/train-labels.lst", "1\n", r"labels\.lst has 1 answers, but .* has 2 rows"),
        ("commonsense", "piqa", "piqa/train-labels.lst", "1\n2\n", r"jsonl:2: .* \(IndexError: answer 3 of 2\)"),
        (
            "commonsense",
            "arc_easy",
            "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Train.jsonl",
            '{"question": {"stem": "Q", "choices": [{"text": "a", "label": "A"}]}, "answerKey": "E"}\n',
            r"jsonl:1: the row is not as it is published \(ValueError",
        ),
        ("commonsense_instruct", "piqa", "piqa/train.json", '[{"instruction": "x"}]', r"json:1: .*Answer format"),
        (
            "mmlu",
            "virology",
            "val/virology_val.csv",
            "Q?,a,b,c,d,E\n",
            r"csv:1: task 'virology': the answer 'E' is not",
        ),
    ],
)
def test_damaged_files_are_named_with_their_line(
    tmp_path: Path, suite: str, name: str, file: str, content: str, message: str
) -> None:
    write_suite(suite, tmp_path)
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(PemlError, match=message):
        task_of(suite, name, tmp_path).examples("train")


def test_labels_may_lie_in_a_file_that_is_absent_only_if_the_rows_have_them(tmp_path: Path) -> None:
    write_suite("commonsense", tmp_path)
    (tmp_path / "winogrande_1.1/train_xl-labels.lst").unlink()
    assert task_of("commonsense", "winogrande", tmp_path).examples("train")
    (tmp_path / "piqa/train-labels.lst").unlink()
    with pytest.raises(PemlError, match=r"train-labels\.lst does not exist; it must hold the answers"):
        task_of("commonsense", "piqa", tmp_path).examples("train")


def test_a_recipe_names_folder_limit_and_examples(folders: dict[str, Path]) -> None:
    entry = SuiteEntry(suite="glue", path=str(folders["glue"]), include=["cola", "rte"], limit_train=1)
    assert [len(task.examples("train")) for task in build_tasks(entry, 0)] == [1, 1]
    groups = SuiteEntry(suite="mmlu", path=str(folders["mmlu"]), include=["stem"], exclude=["astronomy"], few_shot=2)
    tasks = build_tasks(groups, 0)
    assert len(tasks) == 17 and all(task.few_shot == 2 for task in tasks)


def test_own_tasks_have_groups_several_answers_and_templates(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"Q{n}", "a": ["one", "1"], "g": n % 2}) + "\n" for n in range(6)), encoding="utf-8"
    )
    entry = OwnEntry.model_validate(
        {
            "name": "own",
            "path": str(path),
            "eval_path": str(path),
            "kind": "generate",
            "prompt": ["{{ q }}:", "{{ q }} is"],
            "answer": "{{ a[0] }}",
            "references": "a",
            "group": "g",
            "metrics": ["exact_match", "exact_match/1", "squad_f1"],
            "score": ["squad_f1"],
            "few_shot": 1,
        }
    )
    (task,) = build_tasks(entry, 0)
    examples = task.examples("eval")
    assert len(examples) == 5 and all(e.references == ("one", "1") and len(e.cuts) == 1 for e in examples)
    values = measure(task, ["1" if e.group == "1" else "two" for e in examples], examples)
    assert values["exact_match/1"] == 1.0 and 0 < values["exact_match"] == values["score"] < 1
    with pytest.raises(PemlError, match="field 'g' must hold a list of right answers, not [01]"):
        replace(task, references="g").examples("eval")


# ---------------------------------------------------------------------------- templates and shots in a prompt


def test_training_rows_take_templates_by_a_draw_of_their_own(folders: dict[str, Path]) -> None:
    cola = task_of("glue", "cola", folders["glue"])
    task = replace(cola, prompt=["first {{ sentence }}", "second {{ sentence }}"])
    rows = [{"sentence": f"Sentence {n}.", "label": 1} for n in range(200)]
    drawn = [task.example(row, f"o:{n}", "train").prompt for n, row in enumerate(rows)]
    assert 60 < sum(prompt.startswith("first") for prompt in drawn) < 140
    again = [task.example(row, "elsewhere", "train").prompt for row in reversed(rows)]
    assert again[::-1] == drawn
    assert all(task.example(row, "o").prompt.startswith("first") for row in rows)
    other = replace(task, source=replace(task.source, seed=1))
    assert [other.example(row, "o", "train").prompt for row in rows] != drawn
    for prompt, message in (
        ([], "must be a template"),
        (["{{ a", "b"], "not a valid Jinja"),
        (["a", " "], "not empty"),
    ):
        with pytest.raises(PemlError, match=f"task 'cola': `prompt` .*{message}"):
            replace(cola, prompt=prompt)


def test_shots_stand_in_front_in_the_same_words(folders: dict[str, Path]) -> None:
    task = replace(task_of("mmlu", "virology", folders["mmlu"]), few_shot=2)
    (example,) = task.examples("eval")
    options = "\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    asked = ["Which, of virology, is dev 1?", "Which, of virology, is dev 2?", "Which, of virology, is test 1?"]
    assert example.prompt == f"{asked[0]}{options} B\n\n{asked[1]}{options} C\n\n{asked[2]}{options}"
    assert [example.prompt[cut:] for cut in example.cuts] == [
        f"{asked[1]}{options} C\n\n{asked[2]}{options}",
        example.question,
    ]
    with pytest.raises(PemlError, match="`few_shot` must be at most 5, the examples there are, not 6"):
        replace(task, few_shot=6).examples("eval")
    with pytest.raises(PemlError, match="task 'virology': `few_shot` must not be negative"):
        replace(task, few_shot=-1)


def test_shots_of_the_hub_have_a_split_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, config: str | None, *, split: str, revision: str | None) -> Any:
        row = {"question": f"From {split}?", "subject": config, "choices": ["a", "b", "c", "d"], "answer": 2}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (example,) = replace(task_of("mmlu", "virology", None), few_shot=1).examples("eval")
    options = "\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert example.prompt == f"From dev?{options} C\n\nFrom test?{options}"


def test_training_rows_that_are_shown_are_not_trained_on(folders: dict[str, Path]) -> None:
    task = replace(task_of("glue", "cola", folders["glue"]), few_shot=1)
    (example,) = task.examples("train")
    assert len(example.cuts) == 1 and example.question not in example.prompt[: example.cuts[0]]
    assert {e.prompt[: e.cuts[0]] for e in task.examples("eval")} == {example.prompt[: example.cuts[0]]}
    with pytest.raises(PemlError, match="`few_shot` 2 leaves none of the 2 training rows"):
        replace(task, few_shot=2).examples("train")


def test_the_earliest_shots_go_first_and_the_question_stays() -> None:
    tokenizer = word_tokenizer("bos")
    shot = "the cat sat Team : yes "
    example = Example("t", shot * 2 + "the red mat Team :", "no", ("yes", "no"), "o", cuts=(len(shot), 2 * len(shot)))
    whole, question = len(encode(tokenizer, example, 100).input_ids), len(["the", "red", "mat", "Team", ":"]) + 2
    for max_length in range(question, whole + 2):
        encoded = encode(tokenizer, example, max_length)
        shots = 2 - (max_length < whole) - (max_length < whole - 6)
        assert len(encoded.input_ids) == whole - 6 * (2 - shots), max_length
        assert encoded.truncated == (shots < 2)
        assert encoded.labels[:-1] == [-100] * (len(encoded.input_ids) - 1)
        assert tokenizer.decode(encoded.input_ids).split() == ["<s>", *(shot * shots + "the red mat Team : no").split()]
        (choices,) = encode_choices(tokenizer, [example], max_length)
        assert [choice.input_ids[:-1] for choice in choices] == [encoded.input_ids[:-1]] * 2
    (prompt,) = encode_prompts(tokenizer, [example], question + 2, 3)
    assert (
        tokenizer.decode(prompt.input_ids).split() == ["<s>", *["the", "red", "mat", "Team", ":"]] and prompt.truncated
    )


def test_an_encoder_decoder_drops_shots_and_heads_read_the_question() -> None:
    tokenizer = word_tokenizer("eos")
    shot = "the cat sat Team : yes "
    example = Example("t", shot * 2 + "the red mat Team :", "no", ("yes", "no"), "o", cuts=(len(shot), 2 * len(shot)))
    for max_length, shots in ((18, 2), (17, 1), (12, 1), (11, 0), (6, 0)):
        (encoded,) = encode_seq2seq(tokenizer, [example], max_length)
        said = tokenizer.decode(encoded.input_ids).split()
        assert said == [*(shot * shots + "the red mat Team :").split(), "</s>"]
        assert encoded.truncated == (shots < 2)
    (read,) = encode_heads(tokenizer, [example], 50)
    assert tokenizer.decode(read.input_ids).split() == [*["the", "red", "mat", "Team", ":"], "</s>"]


# --------------------------------------------------------------------------------------- metrics and averages


def rows_of(task: Task, count: int) -> list[Example]:
    choices = task.choices if isinstance(task.choices, tuple) else ("x", "y")
    return [
        Example(task.name, "p", choices[n % len(choices)], choices, f"o:{n}", group=f"g{n // 3}") for n in range(count)
    ]


def test_multirc_is_measured_by_answers_and_by_questions() -> None:
    task = task_of("superglue", "multirc", None)
    truth = ["yes", "no", "yes", "no", "yes", "no", "no", "yes"]
    guess = ["yes", "no", "yes", "yes", "yes", "no", "no", "no"]
    rows = [Example("multirc", "p", a, ("no", "yes"), "o", group=g) for a, g in zip(truth, "aaabbccc", strict=True)]
    values = measure(task, guess, rows)
    assert values["f1"] == pytest.approx(sklearn_metrics.f1_score(truth, guess, pos_label="yes"))
    assert values["group_exact_match"] == pytest.approx(1 / 3)  # all of a; not b, not c
    assert values["score"] == pytest.approx((values["f1"] + 1 / 3) / 2)


def test_record_takes_the_best_of_several_right_answers() -> None:
    task = task_of("superglue", "record", None)
    right = [("Oslo", "The Oslo team"), ("Rome",), ("New York City",), ("Ann",)]
    rows = [Example("record", "p", several[0], (), "o", references=several) for several in right]
    values = measure(task, ["the oslo team!", "Paris", "York", "a Ann"], rows)
    # Words in common: all; none; 1 of 1 and 1 of 3, so 2 / (1 + 3); all.
    assert values["squad_f1"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert values["squad_exact_match"] == pytest.approx(2 / 4)


def test_cb_is_the_mean_of_accuracy_and_macro_f1() -> None:
    task = task_of("superglue", "cb", None)
    truth = ["yes", "yes", "no", "maybe", "no"]
    guess = ["yes", "no", "no", "maybe", "maybe"]
    values = measure(task, guess, [Example("cb", "p", a, ("no", "maybe", "yes"), "o") for a in truth])
    f1 = sklearn_metrics.f1_score(truth, guess, average="macro")
    assert values["macro_f1"] == pytest.approx(f1) and values["score"] == pytest.approx((0.6 + f1) / 2)


def test_mnli_measures_both_parts_and_what_is_there() -> None:
    task = task_of("glue", "mnli", None)
    rows = [
        Example("mnli", "p", "yes", ("no", "maybe", "yes"), "o", group=group)
        for group in ("matched", "matched", "matched", "matched", "mismatched")
    ]
    values = measure(task, ["yes", "no", "no", "no", "yes"], rows)
    assert values == {
        "accuracy": 0.4,
        "accuracy/matched": 0.25,
        "accuracy/mismatched": 1.0,
        "score": 0.625,
    }
    alone = measure(task, ["yes", "no", "no", "no"], rows[:4])
    assert alone == {"accuracy": 0.25, "accuracy/matched": 0.25, "score": 0.25}


def test_metrics_that_cannot_be_are_refused() -> None:
    task = task_of("glue", "cola", None)
    for fields, message in (
        ({"score": ("f1",)}, "`score` has 'f1', which is not among the metrics"),
        ({"metrics": ("group_exact_match",)}, "`metrics` has 'group_exact_match', which needs `group`"),
        ({"metrics": ("accuracy/x",)}, "`metrics` has 'accuracy/x', which needs `group`"),
        ({"metrics": ("acuracy/x",), "group": "g"}, "`metrics` has 'acuracy/x', which is unknown"),
    ):
        with pytest.raises(PemlError, match=f"task 'cola': {message}"):
            replace(task, **{"score": (), **fields})
    none = replace(task, score=(), metrics=("accuracy/x",), group="part")
    with pytest.raises(PemlError, match="task 'cola': no row belongs to a group"):
        measure(none, ["yes"], [Example("cola", "p", "yes", ("no", "yes"), "o", group="y")])
    misspelt = replace(task, score=(), metrics=("accuracy/x", "accuracy"), group="part")
    with pytest.raises(PemlError, match=r"task 'cola': no row belongs to a group that its score \('accuracy/x',\)"):
        measure(misspelt, ["yes"], [Example("cola", "p", "yes", ("no", "yes"), "o", group="y")])


def test_a_task_counts_the_mean_of_its_score_metrics() -> None:
    scored = {name: task.score for name, task in SUITES["glue"].tasks().items()}
    assert scored["cola"] == ("matthews",) and scored["rte"] == ("accuracy",)
    assert scored["mrpc"] == scored["qqp"] == ("accuracy", "f1") and scored["stsb"] == ("pearson", "spearman")
    tasks = {name: task_of("glue", name, None) for name in ("cola", "mrpc")}
    results = {"cola": {"matthews": 0.5, "accuracy": 0.9}, "mrpc": {"accuracy": 0.7, "f1": 0.8}}
    assert average(results, tasks) == pytest.approx((0.5 + 0.75) / 2)


def test_glue_and_superglue_average_over_tasks() -> None:
    """The published scores of BERT-large and of T5-11B, task by task, give their published averages."""
    bert = {
        "cola": {"matthews": 60.5, "accuracy": 0.0},
        "sst2": {"accuracy": 94.9},
        "mrpc": {"f1": 89.3, "accuracy": 85.4},
        "stsb": {"pearson": 87.6, "spearman": 86.5},
        "qqp": {"f1": 72.1, "accuracy": 89.3},
        "mnli": {"accuracy/matched": 86.7, "accuracy/mismatched": 85.9},
        "qnli": {"accuracy": 92.7},
        "rte": {"accuracy": 70.1},
        "wnli": {"accuracy": 65.1},
    }
    tasks = SUITES["glue"].tasks()
    assert suite_averages(bert, tasks)["glue"] == pytest.approx(80.5, abs=0.05)
    bert.pop("wnli")
    assert suite_averages(bert, tasks) == {}
    t5 = {
        "boolq": {"accuracy": 91.0},
        "cb": {"macro_f1": 93.0, "accuracy": 96.4},
        "copa": {"accuracy": 94.8},
        "multirc": {"f1": 88.2, "group_exact_match": 62.3},
        "record": {"squad_f1": 93.3, "squad_exact_match": 92.5},
        "rte": {"accuracy": 92.5},
        "wic": {"accuracy": 76.1},
        "wsc": {"accuracy": 93.8},
    }
    assert suite_averages(t5, SUITES["superglue"].tasks())["superglue"] == pytest.approx(88.9, abs=0.05)


def test_mmlu_averages_over_questions() -> None:
    tasks = SUITES["mmlu"].tasks()
    results = {name: {"accuracy": float(n % 2), "n": float(1 + n)} for n, name in enumerate(tasks)}
    found = suite_averages(results, tasks)
    assert list(found) == ["mmlu", "mmlu/stem", "mmlu/humanities", "mmlu/social_sciences", "mmlu/other"]
    assert found["mmlu"] == pytest.approx(sum(range(2, 58, 2)) / sum(range(1, 58)))
    assert found["mmlu/stem"] == pytest.approx(sum(range(2, 19, 2)) / sum(range(1, 19)))
    only = {name: results[name] for name in SUITES["mmlu"].groups["other"]}
    assert list(suite_averages(only, tasks)) == ["mmlu/other"]
    assert suite_averages({"mood": {"accuracy": 1.0, "n": 1.0}}, SUITES["toy"].tasks()) == {}


# ------------------------------------------------------------------------------------------------ shared data

LAID_OUT = {
    "glue": {
        "cola": (8551, 1043),
        "sst2": (10000, 872),
        "mrpc": (3668, 408),
        "stsb": (5749, 1500),
        "qqp": (8999, 1000),
        "mnli": (8999, 1000),
        "qnli": (8999, 1000),
        "rte": (2490, 277),
        "wnli": (635, 71),
    },
    "superglue": {
        "boolq": (32, 3270),
        "cb": (250, 56),
        "multirc": (27243, 4848),
        "record": (32, 0),
        "rte": (2490, 277),
    },
    "commonsense": {
        "boolq": (32, 3270),
        "piqa": (0, 1838),
        "siqa": (10000, 1954),
        "hellaswag": (1000, 1000),
        "winogrande": (10234, 1267),
    },
    "commonsense_instruct": {
        "boolq": (9427, 3270),
        "piqa": (0, 1838),
        "siqa": (0, 1954),
        "winogrande": (0, 1267),
        "arc_challenge": (1119, 1172),
        "openbookqa": (4957, 500),
    },
}


@pytest.mark.data
@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite, tasks in LAID_OUT.items() for name in tasks])
def test_real_rows_load_and_count(shared_path: Callable[[str], Path], suite: str, name: str) -> None:
    root = shared_path("INDEX.md").parent
    task = task_of(suite, name, root)
    for split, count in zip(("train", "eval"), LAID_OUT[suite][name], strict=True):
        if count:
            examples = task.examples(split)
            assert len(examples) == count
            # Classes of a fixed list all occur; a template that read the wrong field would give one.
            if isinstance(task.choices, tuple) and count > 40:
                assert {example.answer for example in examples} == set(task.choices)
        else:
            with pytest.raises(PemlError, match=f"no file with {split} rows"):
                task.examples(split)


@pytest.mark.data
def test_the_real_rows_of_mmlu_are_told_apart_by_subject(shared_path: Callable[[str], Path]) -> None:
    root = shared_path("mmlu/val.jsonl").parent.parent
    tasks = suite_tasks("mmlu", path=str(root))
    assert sum(1 for task in tasks for _ in task.source.rows("eval")) == 1529
    assert all(len(task.source.shots(5)) == 5 for task in tasks)
    (anatomy,) = (replace(task, few_shot=5) for task in tasks if task.name == "anatomy")
    assert all(example.prompt.count("Answer:") == 6 for example in anatomy.examples("eval"))
