"""Tasks and their rows: files, hold-out, templates, suites, token ids; every complaint about bad input."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peml.errors import PemlError
from peml.tasks import (
    Example,
    FileSource,
    HubSource,
    SuiteSource,
    Task,
    ToySource,
    encode,
    encode_all,
    encode_choices,
    encode_prompts,
    suite_tasks,
)
from peml.tasks.render import render
from peml.tasks.source import Source, Split

# ---------------------------------------------------------------------------------------------------- files


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def read(path: Path) -> list[tuple[dict[str, Any], str]]:
    return list(FileSource(train=path, eval=path).rows("train"))


def test_jsonl_splits_at_newlines_only_and_counts_lines(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c\x0bd\x1ce"
    path = write(tmp_path / "rows.jsonl", f'{{"x": "{odd[:1]}{odd[1:4]}"}}\r\n{{"x": 2}}\n\n \n')
    assert read(path) == [({"x": odd[:4]}, f"{path}:1"), ({"x": 2}, f"{path}:2")]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"x": "1"}\n'), ("a.csv", "x\n1\n"), ("a.json", '[{"x": "1"}]')):
        assert [row for row, _ in read(write(tmp_path / name, "\ufeff" + content))] == [{"x": "1"}]


def test_csv_rows_are_named_after_their_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'text,team\n"two\nlines, quoted",a\n\nplain,b\n')
    assert read(path) == [
        ({"text": "two\nlines, quoted", "team": "a"}, f"{path}:2"),
        ({"text": "plain", "team": "b"}, f"{path}:5"),
    ]


def test_tsv_keeps_quotation_marks(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", 'text\tlabel\n"so he said\t0\nand left"\t1\n')
    assert [row["text"] for row, _ in read(path)] == ['"so he said', 'and left"']


def test_json_and_parquet_hold_lists_of_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"x": 1, "y": ["a", "b"]}, {"x": 2, "y": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(tmp_path / "rows.json", json.dumps(rows))
    for name in ("rows.parquet", "rows.json"):
        assert read(tmp_path / name) == [(row, f"{tmp_path / name}:{i}") for i, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"x": 1}\n{"x": \n', "a.jsonl:2: the line is not valid JSON"),
        ("a.jsonl", '{"x": 1}\n[1]\n', r"a.jsonl:2: the row must be a JSON object .* not \[1\]"),
        ("a.jsonl", '{"x": 1}\n\n{"x": 1}\n', "a.jsonl:2: the line is blank"),
        ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n', "a.jsonl:2: byte 8 of the line is not UTF-8"),
        ("a.jsonl", '{"x": 1}\n{"x": 1, "x": 2}\n', r"a.jsonl:2: .*the field 'x' is there twice"),
        ("a.json", '[{"x": 1, "x": 2}]', r"a.json: .*the field 'x' is there twice"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: the line is not valid JSON"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "\n\n", "a.jsonl is empty"),
        ("a.json", " ", "a.json is empty"),
        ("a.json", "[]", "a.json is empty"),
        ("a.json", '[{"x": 1},\n{"x" 1}]', "a.json:2: the file is not valid JSON"),
        ("a.json", '{"x": 1}', "a.json: the file must be a list of objects; .* suffix .jsonl"),
        ("a.json", '[{"x": 1}, "y"]', 'a.json:2: the row must be a JSON object .* not "y"'),
        ("a.csv", "x,y\n1,2\n1,2,3\n", "a.csv:3: the row has 3 values, but the header has 2"),
        ("a.csv", "x,y\n1\n", "a.csv:2: the row has 1 values, but the header has 2"),
        ("a.csv", "x,x\n1,2\n", "a.csv:1: the first line must name every column"),
        ("a.csv", "x,\n1,2\n", "a.csv:1: the first line must name every column"),
        ("a.csv", 'x,y\n1,2\n"1,2\n3,4\n', "a.csv:3: the row cannot be read"),
        ("a.csv", b"x,y\n1,\xe9\n", "a.csv:2: byte 3 of the line is not UTF-8"),
        ("a.csv", "x,y\n", "a.csv is empty"),
        ("a.tsv", "x\ty\n1\n", "a.tsv:2: the row has 1 values, but the header has 2"),
        ("a.parquet", "x", "a.parquet is not a parquet file"),
        (
            "a.txt",
            "x",
            r"a.txt has the suffix '.txt', but rows are read from .jsonl, .json, .csv, .tsv, .parquet",
        ),
        ("a", "x", "a has the suffix ''"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(PemlError, match=message):
        read(write(tmp_path / name, content))


def test_a_missing_file_brings_near_misses(tmp_path: Path) -> None:
    write(tmp_path / "tickets.jsonl", '{"x": 1}\n')
    with pytest.raises(PemlError, match=r"ticket\.jsonl does not exist; did you mean tickets\.jsonl\?"):
        read(tmp_path / "ticket.jsonl")
    with pytest.raises(PemlError, match=r"zzz does not exist; its folder has tickets\.jsonl"):
        read(tmp_path / "zzz")
    with pytest.raises(PemlError, match=r"there is no folder .*nowhere either"):
        read(tmp_path / "nowhere" / "rows.jsonl")
    with pytest.raises(PemlError, match="is a folder; name a file in it"):
        read(tmp_path)


# -------------------------------------------------------------------------------------- hold-out and limits


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    return write(tmp_path / "numbers.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(100)))


def numbers(source: Source, split: Split) -> list[int]:
    return [row["n"] for row, _ in source.rows(split)]


def test_one_file_is_split_without_overlap_the_same_way_each_time(numbered: Path) -> None:
    source = FileSource(train=numbered, eval_fraction=0.2, seed=4)
    train, held_out = numbers(source, "train"), numbers(source, "eval")
    assert len(held_out) == 20 and sorted(train + held_out) == list(range(100))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert numbers(FileSource(train=numbered, eval_fraction=0.2, seed=4), "eval") == held_out
    assert numbers(FileSource(train=numbered, eval_fraction=0.2, seed=5), "eval") != held_out
    assert len(numbers(FileSource(train=numbered), "eval")) == 10
    assert len(numbers(FileSource(train=numbered, eval_fraction=0.001), "eval")) == 1
    assert len(numbers(FileSource(train=numbered, eval_fraction=0.999), "train")) == 1


def test_limits_draw_nested_samples_within_the_split(numbered: Path) -> None:
    whole = FileSource(train=numbered, seed=1)
    few, more = (numbers(replace(whole, limit_train=n), "train") for n in (10, 30))
    assert len(few) == 10 and set(few) < set(more) < set(numbers(whole, "train"))
    assert more == sorted(more) and more != numbers(whole, "train")[:30]
    assert numbers(replace(whole, limit_train=10_000), "train") == numbers(whole, "train")
    assert set(numbers(replace(whole, limit_eval=3), "eval")) < set(numbers(whole, "eval"))


def test_bad_options_of_a_source_are_refused(numbered: Path, tmp_path: Path) -> None:
    for fields, message in (
        ({"limit_train": 0}, "`limit_train` must be at least 1, not 0"),
        ({"limit_eval": -1}, "`limit_eval` must be at least 1, not -1"),
        ({"eval_fraction": 1.0}, "`eval_fraction` must lie between 0 and 1, not 1.0"),
        ({"eval_fraction": 0.5, "eval": numbered}, "`eval_fraction` must be left out"),
        ({"seed": -1}, "`seed` must not be negative"),
    ):
        with pytest.raises(PemlError, match=f"numbers.jsonl: .*{message}"):
            FileSource(train=numbered, **fields)
    with pytest.raises(PemlError, match=r"one\.jsonl: one row is too few to hold some out"):
        numbers(FileSource(train=write(tmp_path / "one.jsonl", '{"n": 1}\n')), "eval")


def test_a_local_folder_stands_in_for_a_hub_data_set(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"n": 1}\n')
    write(tmp_path / "dev.csv", "n\n2\n")
    source = HubSource(path=str(tmp_path))
    assert list(source.rows("train")) == [({"n": 1}, f"{tmp_path / 'train.jsonl'}:1")]
    assert list(source.rows("eval")) == [({"n": "2"}, f"{tmp_path / 'dev.csv'}:2")]
    named = HubSource(path=str(tmp_path.parent), name=tmp_path.name)
    assert list(named.rows("eval")) == list(source.rows("eval"))


def test_a_folder_laid_out_for_datasets_goes_through_load_dataset(tmp_path: Path) -> None:
    write(tmp_path / "train_of_mine.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(20)))
    source = HubSource(path=str(tmp_path), eval=None, limit_train=5)
    rows = list(source.rows("train"))
    assert len(rows) == 5 and all(origin == f"{tmp_path}/train:{row['n'] + 1}" for row, origin in rows)
    whole = list(replace(source, limit_train=None, eval="train").rows("train"))
    assert whole == [({"n": n}, f"{tmp_path}/train:{n + 1}") for n in range(20)]


def test_a_hub_data_set_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(PemlError, match="nobody/nothing/config: the split 'validation' could not be loaded"):
        list(HubSource(path="nobody/nothing", name="config").rows("eval"))
    write(tmp_path / "train.jsonl", '{"n": 1}\n')
    with pytest.raises(PemlError, match=r"the split 'validation' could not be loaded .* validation\.jsonl"):
        list(HubSource(path=str(tmp_path)).rows("eval"))


# ------------------------------------------------------------------------------------------- rows to examples

TICKET = {"text": "No ink.", "team": "1", "sure": True, "note": None, "odd name": "x", "ends": ["a", "b"]}


def make(**fields: Any) -> Task:
    given: dict[str, Any] = {
        "name": "tickets",
        "kind": "choose",
        "prompt": "{{ text }}\nTeam: ",
        "answer": "team",
        "choices": ["billing", "hardware"],
        "labels": {0: "billing", 1: "hardware"},
        "source": FileSource(train="tickets.jsonl"),
    }
    return Task(**(given | fields))


def ask(row: Mapping[str, Any] = TICKET, **fields: Any) -> Example:
    return make(**fields).example(dict(row), "tickets.jsonl:12")


def test_a_row_becomes_an_example() -> None:
    choices = ("billing", "hardware")
    assert ask() == Example("tickets", "No ink.\nTeam:", "hardware", choices, "tickets.jsonl:12")
    assert make().metrics == ("accuracy",) and make().choices == choices


@pytest.mark.parametrize(("raw", "key"), [(True, "true"), (1, 1), ("YES", "yes"), (1.5, "1.5"), (" 1 ", "1")])
def test_labels_map_raw_values_of_any_plain_type(raw: Any, key: Any) -> None:
    assert ask({"text": "t", "team": raw}, labels={key: "billing"}).answer == "billing"


@pytest.mark.parametrize(
    "template",
    [
        "{{ row['note'] | upper }}",
        "{{ 'a' ~ row['note'] }}",
        "{{ deep.null | trim }}",
        "{{ deep.list | join(' ') }}",
        "{{ deep }}",
    ],
)
def test_no_filter_makes_a_text_of_a_null(template: str) -> None:
    row = TICKET | {"deep": {"null": None, "list": ["a", None]}}
    with pytest.raises(PemlError, match=r"is empty \(null\)"):
        render(template, row, "prompt")
    assert render("{{ deep | tojson }} {{ deep.list[0] }}", row, "prompt") == '{"list": ["a", null], "null": null} a'


def test_templates_may_ask_whether_a_field_is_null() -> None:
    for template in (
        "{% if note %}x{% else %}y{% endif %}",
        "{{ 'y' if note is none else 'x' }}",
        "{{ 'y' if note == none else 'x' }}",
        "{{ note or 'y' }}",
        "{{ note | default('y', true) }}",
    ):
        assert ask(prompt=template).prompt == "y"
    assert ask(prompt="{{ row | tojson }}").prompt.count("null") == 1


def test_an_answer_may_be_a_template_of_statements_alone() -> None:
    assert ask(answer="{% if sure %}hardware{% else %}billing{% endif %}").answer == "hardware"


def test_choices_may_come_from_the_row() -> None:
    row = {"text": "t", "ends": ["run", "eat"], "label": 1, "table": {"A": "x", "B": "y"}, "key": "B"}
    picked = ask(row, choices="ends", answer="{{ ends[label] }}", labels={})
    assert (picked.choices, picked.answer) == (("run", "eat"), "eat")
    assert ask(row, choices="table", answer="{{ table[key] }}", labels={}).answer == "y"


def test_a_generate_task_has_no_choices() -> None:
    task = make(kind="generate", choices=None, labels={}, answer="text")
    example = task.example(TICKET, "o")
    assert (example.answer, example.choices, task.metrics) == ("No ink.", (), ("exact_match",))


def test_templates_reach_odd_names_and_nested_fields() -> None:
    row = {"odd name": "x", "passage": {"text": "deep"}, "team": "billing"}
    assert ask(row, prompt="{{ row['odd name'] }} {{ passage.text }}").prompt == "x deep"


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"team": "1"},
            {},
            r"`prompt` asks for what the row lacks \('text' is undefined\); its fields are: team",
        ),
        ({"text": "t"}, {}, "`answer` names the field 'team', which the row lacks; its fields are: text"),
        (TICKET, {"answer": "{{ label }}"}, r"`answer` asks for what the row lacks \('label' is undefined\)"),
        (
            TICKET,
            {"choices": "options", "labels": {}},
            "`choices` names the field 'options', which the row lacks",
        ),
        (
            TICKET,
            {"choices": "text", "labels": {}},
            "field 'text' must hold a list of choices, not 'No ink.'",
        ),
        (
            {"text": "t", "team": "1", "c": ["a"]},
            {"choices": "c", "labels": {}},
            "'c' must be at least two choices",
        ),
        ({"text": "t", "team": "1", "c": ["a", "a"]}, {"choices": "c", "labels": {}}, "'c' must be distinct"),
        (
            {"text": "t", "team": "1", "c": ["a", ""]},
            {"choices": "c", "labels": {}},
            "'c' must not have an empty",
        ),
        (
            {"text": "t", "team": "1", "c": ["a", []]},
            {"choices": "c", "labels": {}},
            "'c' must hold a text, a num",
        ),
        (
            {"text": "t", "team": "7"},
            {},
            r"answer '7' is not among the choices \['billing', .* with `labels`",
        ),
        ({"text": "t", "team": float("nan")}, {}, r"the answer \('team'\) is empty"),
        (TICKET, {"prompt": "{{ text.title }}"}, "there is no such field, only Python's own 'title'"),
        ({"text": None, "team": "1"}, {"prompt": "Q: {{ text | trim }}"}, r"it asks for is empty \(null\)"),
        ({"text": float("nan"), "team": "1"}, {"prompt": "{{ 'Q: ' ~ text }}"}, r"it asks for is empty \(null\)"),
        ({"text": b"t", "team": "1"}, {}, "holds bytes, not a text"),
        ({"text": "t", "team": -1}, {}, "the answer '-1' is not among the choices"),
        ({"text": "t", "team": None}, {}, r"the answer \('team'\) is empty"),
        ({"text": "t", "team": " "}, {}, r"the answer \('team'\) is empty"),
        (
            {"text": "t", "team": ["1"]},
            {},
            "field 'team' must hold a text, a number or true/false, not a list",
        ),
        ({"text": " \n", "team": "1"}, {"prompt": "{{ text }}"}, "`prompt` is empty for this row"),
        ({"text": "\ud800", "team": "1"}, {}, "`prompt` has half of a surrogate pair at character 1"),
        (TICKET, {"prompt": "{{ 1 // 0 }}"}, "`prompt` cannot be filled in for this row .ZeroDivisionError"),
        (
            TICKET,
            {"prompt": "{{ text.__class__.__mro__ }}"},
            "`prompt`",
        ),  # the sandbox keeps Python out of reach
    ],
)
def test_bad_rows_are_named_with_origin_and_task(row: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PemlError, match=rf"^tickets\.jsonl:12: task 'tickets': .*{message}"):
        ask(row, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "sort"}, "`kind` must be one of choose, generate, classify, regress, not 'sort'"),
        ({"prompt": "{{ text "}, r"`prompt` is not a valid Jinja template \(line 1: "),
        ({"answer": "{{ a b }}"}, "`answer` is not a valid Jinja template"),
        ({"prompt": " "}, "`prompt` must be a text that is not empty"),
        ({"choices": None}, "`choices` are missing"),
        ({"choices": []}, "`choices` are missing"),
        ({"choices": ["a"], "labels": {}}, r"`choices` must be at least two choices, not \['a'\]"),
        ({"choices": ["a", " a"], "labels": {}}, "`choices` must be distinct choices"),
        ({"choices": ["a", ""], "labels": {}}, "`choices` must not have an empty choice"),
        (
            {"choices": [True, False], "labels": {}},
            "`choices` must be texts: put them in quotes, because YAML",
        ),
        ({"kind": "generate"}, "`choices` do not go with kind 'generate'"),
        (
            {"labels": {"0": "sales"}},
            r"`labels` maps '0' to 'sales', which is not among the choices \['billing'",
        ),
        ({"labels": {"A": "billing", "a": "hardware"}}, "`labels` maps 'a' to 'billing' and to 'hardware'; case does"),
        ({"metrics": ("bleu",)}, "`metrics` has 'bleu', which is unknown; choose from accuracy, exact_match"),
        ({"metrics": "rouge"}, "`metrics` has 'rouge'"),
        (
            {"choices": "ends", "labels": {}, "metrics": ("matthews",)},
            "'matthews', which needs kind 'choose' with",
        ),
        (
            {"kind": "generate", "choices": None, "metrics": ("f1",)},
            "'f1', which needs kind 'choose' with one",
        ),
        (
            {"choices": ["a", "b", "c"], "labels": {}, "metrics": ("f1",)},
            "'f1', which needs exactly two choices",
        ),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, not 0"),
    ],
)
def test_bad_tasks_are_named_with_their_key(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PemlError, match=f"^task 'tickets': .*{message}"):
        make(**fields)


def test_a_task_needs_a_name() -> None:
    with pytest.raises(PemlError, match="`name` of a task must be a text that is not empty, not ' '"):
        make(name=" ")


def test_a_task_reads_its_own_examples(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '{"text": "a", "team": 0}\n{"text": "b", "team": 2}\n')
    task = make(source=FileSource(train=path, eval=path))
    with pytest.raises(PemlError, match=r"t\.jsonl:2: task 'tickets': the answer '2'"):
        task.examples("train")
    assert [e.answer for e in replace(task, labels={"0": "billing", "2": "hardware"}).examples("eval")] == [
        "billing",
        "hardware",
    ]


# ------------------------------------------------------------------------------------------------- suites


def test_toy_suite_makes_examples_of_every_task() -> None:
    pytest.importorskip("peml.tasks.toy")
    tasks = suite_tasks("toy")
    assert len({task.name for task in tasks}) == len(tasks) > 1
    for task in tasks:
        assert isinstance(task.source, ToySource)
        small = replace(task, source=replace(task.source, train_rows=20, eval_rows=10))
        train, held_out = small.examples("train"), small.examples("eval")
        assert (len(train), len(held_out)) == (20, 10)
        assert train[2].origin == f"toy/{task.name}:3"
        assert not {e.prompt for e in train} & {e.prompt for e in held_out}


def test_an_impossible_toy_source_is_named() -> None:
    pytest.importorskip("peml.tasks.toy")
    with pytest.raises(PemlError, match=r"toy/nothing: .*unknown toy task"):
        list(ToySource(task="nothing").rows("train"))


def test_glue_suite_reads_like_the_hub_data() -> None:
    tasks = {task.name: task for task in suite_tasks("glue")}
    assert list(tasks) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    fields = [
        "sentence",
        "sentence1",
        "sentence2",
        "question",
        "question1",
        "question2",
        "premise",
        "hypothesis",
    ]
    stsb = tasks.pop("stsb")
    assert stsb.example({"sentence1": "a", "sentence2": "b", "label": 3.75}, "o").value == 3.75
    for task in tasks.values():
        row: dict[str, Any] = {name: f"<{name}>" for name in fields} | {"part": "matched"}
        answers = [task.example(row | {"label": n}, "o").answer for n in range(len(task.choices or ()))]
        assert sorted(answers) == sorted(task.choices or ())
        with pytest.raises(PemlError, match="the answer '-1' is not among"):  # the hidden labels of GLUE's test sets
            task.example(row | {"label": -1}, "o")
    assert [tasks["rte"].labels[raw] for raw in "01"] == ["yes", "no"]
    assert tasks["cola"].metrics[0] == "matthews"
    assert tasks["mrpc"].metrics == ("accuracy", "f1")
    assert tasks["mrpc"].choices == ("no", "yes") and tasks["mrpc"].labels["1"] == "yes"  # f1 asks for the last
    source = tasks["mnli"].source
    assert isinstance(source, SuiteSource) and (source.published.hub, source.published.config) == (
        "nyu-mll/glue",
        "mnli",
    )
    assert list(source.published.eval.values()) == ["validation_matched", "validation_mismatched"]


def test_tasks_of_a_suite_are_chosen_by_name() -> None:
    assert [task.name for task in suite_tasks("glue", ["rte", "cola", "rte"])] == ["rte", "cola"]
    assert "rte" not in [task.name for task in suite_tasks("glue", exclude=["rte"])]
    for call, message in (
        (("glu",), "there is no suite 'glu'; did you mean 'glue'. there are glue, superglue, mmlu"),
        (
            ("glue", ["rt"]),
            "suite 'glue': `include` names the unknown task 'rt'; did you mean 'rte'. there are cola",
        ),
        (("glue", None, ["SST-2"]), "`exclude` names the unknown task 'SST-2'; did you mean 'sst2'"),
        (("glue", "rte"), "`include` must be a list of task names, not the text 'rte'"),
        (("glue", ["rte"], ["rte"]), "`include` and `exclude` leave no task"),
        (("glue", []), "leave no task"),
    ):
        with pytest.raises(PemlError, match=message):
            suite_tasks(*call)


# ----------------------------------------------------------------------------------------------- token ids


def word_tokenizer(special: str = "none") -> PreTrainedTokenizerFast:
    """Words with the blank before them, as in most causal models; `special` says what it adds itself."""
    words = [
        "<s>",
        "</s>",
        "<unk>",
        *(
            b + w
            for w in ["the", "cat", "sat", "on", "mat", "red", "blue", "Team", ":", "yes", "no"]
            for b in ("", " ")
        ),
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_next")
    template = {"bos": "<s> $A", "both": "<s> $A </s>", "eos": "$A </s>", "none": "$A"}[special]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Joins a colon with a `yes` behind it, so that a token may span the border of prompt and answer."""
    words = ["<end>", "<unk>", ": yes", ":", " yes", " no", "the", " cat"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r": yes|:| ?\w+"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


def question(prompt: str = "the cat sat on the", answer: str = "red mat", *choices: str) -> Example:
    return Example("colours", prompt, answer, choices, "colours.jsonl:3")


@pytest.mark.parametrize("special", ["none", "bos", "both", "eos"])
def test_training_ids_are_prompt_then_answer_then_end(special: str) -> None:
    tokenizer = word_tokenizer(special)
    encoded = encode(tokenizer, question(), 32)
    lead = [tokenizer.bos_token_id] if special in ("bos", "both") else []
    prompt = tokenizer("the cat sat on the", add_special_tokens=False)["input_ids"]
    answer = tokenizer(" red mat", add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    assert encoded.input_ids == lead + prompt + answer + end
    assert encoded.labels == [-100] * len(lead + prompt) + answer + end
    assert not encoded.truncated
    chosen = encode(tokenizer, question("the cat sat on the", "red mat", "red mat", "blue"), 32)
    assert chosen.labels == [-100] * len(lead + prompt) + answer, "a choice is trained as it is scored"


@pytest.mark.parametrize("special", ["none", "bos"])
def test_a_long_prompt_loses_its_beginning_only(special: str) -> None:
    tokenizer = word_tokenizer(special)
    whole = encode(tokenizer, question(), 32)
    lead = 1 if special == "bos" else 0
    for max_length in range(lead + 4, len(whole.input_ids)):
        cut = encode(tokenizer, question(), max_length)
        kept = max_length - lead
        assert cut.truncated and cut.input_ids == whole.input_ids[:lead] + whole.input_ids[-kept:]
        assert [i for i in cut.labels if i != -100] == [i for i in whole.labels if i != -100]
    message = rf"colours\.jsonl:3: task 'colours': 3 tokens of answer after {lead + 5} .* `max_length` {lead + 3};"
    with pytest.raises(PemlError, match=message):
        encode(tokenizer, question(), lead + 3)


def test_choices_have_no_end_and_share_their_context() -> None:
    tokenizer = word_tokenizer("bos")
    example = question("the cat sat on the", "blue", "blue", "red mat")
    (short, long), (alone,) = encode_choices(tokenizer, [example, question()], 6)
    assert short.input_ids[:-1] == long.input_ids[:-2] and short.truncated and long.truncated
    assert len(long.input_ids) == 6 and tokenizer.eos_token_id not in short.input_ids + long.input_ids
    assert alone.labels[-2:] == long.labels[-2:]


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    tokenizer = merging_tokenizer()
    joined, end = tokenizer.convert_tokens_to_ids([": yes", "<end>"])
    assert encode(tokenizer, question("the cat:", "yes"), 8).labels == [-100, -100, joined, end]
    yes, no = encode_choices(tokenizer, [question("the cat:", "no", "yes", "no")], 8)[0]
    assert tokenizer.convert_ids_to_tokens([i for i in yes.labels if i != -100]) == [": yes"]
    assert tokenizer.convert_ids_to_tokens([i for i in no.labels if i != -100]) == [
        ":",
        " no",
    ]  # the same context


def test_an_answer_that_leaves_no_context_is_refused() -> None:
    with pytest.raises(PemlError, match=r"colours\.jsonl:3: task 'colours': .* no token of its own"):
        encode(merging_tokenizer(), question(":", "yes"), 8)


def test_prompts_leave_room_for_the_answer() -> None:
    tokenizer = word_tokenizer("both")
    (whole,) = encode_prompts(tokenizer, [question()], 16, 8)
    assert len(whole.input_ids) == 6 and not whole.truncated  # no end token, or generation would be over
    (cut,) = encode_prompts(tokenizer, [question()], 12, 8)
    assert cut.input_ids == [whole.input_ids[0], *whole.input_ids[-3:]] and cut.truncated
    with pytest.raises(PemlError, match=r"colours\.jsonl:3: .* 8 new tokens .* `max_length` 9"):
        encode_prompts(tokenizer, [question()], 9, 8)


def test_many_examples_encode_as_each_alone() -> None:
    tokenizer = word_tokenizer("bos")
    words = ["the", "cat", "sat", "on", "mat", "red", "blue"]
    examples = [question(" ".join(words[: 1 + n % 7]), words[n % 5]) for n in range(3000)]
    batch = encode_all(tokenizer, examples, 8)
    assert [encode(tokenizer, e, 8) for e in examples[:40]] == batch[:40]
    assert encode_all(tokenizer, [], 8) == []


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.data
@pytest.mark.parametrize("name", ["sst2", "cola", "mrpc", "wnli"])
def test_glue_tasks_read_real_rows(shared_path: Callable[[str], Path], name: str) -> None:
    folder = shared_path(f"glue_{name}/dev.jsonl").parent
    task = replace(suite_tasks("glue", [name])[0], source=HubSource(path=str(folder)))
    lines = (folder / "dev.jsonl").read_bytes().count(b"\n")
    examples = task.examples("eval")
    assert len(examples) in (lines, lines + 1)
    assert {example.answer for example in examples} == set(task.choices or ())


@pytest.mark.data
def test_files_of_other_shapes_read_too(shared_path: Callable[[str], Path]) -> None:
    boolq = shared_path("superglue_boolq/dev.jsonl")
    task = make(
        name="boolq",
        prompt="{{ passage }}\n{{ question }}?\nAnswer:",
        choices=["no", "yes"],
        labels={"false": "no", "true": "yes"},
        answer="label",
        source=FileSource(train=boolq, eval=boolq, limit_eval=100),
    )
    assert len(task.examples("train")) == 3270 and len(task.examples("eval")) == 100
    mmlu = shared_path("mmlu/val.jsonl")
    task = replace(
        task,
        prompt="{{ question }}",
        choices=("A", "B", "C", "D"),
        labels={},
        answer="answer",
        source=FileSource(train=mmlu, eval=mmlu),
    )
    assert len(task.examples("train")) == 1529  # its odd line separators are no ends of rows
    swag = shared_path("hellaswag/dev_original_fields_1k.jsonl")
    task = replace(
        task,
        prompt="{{ ctx }}",
        choices="endings",
        answer="{{ endings[label | int] }}",
        source=FileSource(train=swag, eval_fraction=0.3),
    )
    assert (len(task.examples("train")), len(task.examples("eval"))) == (700, 300)


@pytest.mark.data
def test_real_rows_encode_within_the_length(shared_path: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_path("models/stories3M-hf"), local_files_only=True)
    source = FileSource(train=shared_path("glue_rte/dev.jsonl"), eval=shared_path("glue_rte/dev.jsonl"))
    labels = {"entailment": "yes", "not_entailment": "no"}
    task = replace(suite_tasks("glue", ["rte"])[0], source=source, labels=labels)
    examples = task.examples("eval")
    for example, encoded in zip(examples, encode_all(tokenizer, examples, 96), strict=True):
        assert len(encoded.input_ids) <= 96 and encoded.input_ids[0] == tokenizer.bos_token_id
        answer = [i for i in encoded.labels if i != -100]
        assert tokenizer.decode(answer).strip() == example.answer
