"""lm-eval on a run: its numbers are ours on the same template, and every request has its task's route."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from export_kit import draw_run, write_run
from peml.errors import PemlError
from peml.evaluation.scoring import ENCODE_CHOICES, generate_answers, log_likelihoods
from peml.harness import Routes, measure_run, read_routes
from peml.training import RunFolder, open_run
from workshop import write_rows


def needs_it(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs lm-eval."""
    absent = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, which `make` installs apart")
    return pytest.mark.harness(absent(test))


SIZE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{ text }} big ?",
    "doc_to_choice": ["yes", "no"],
    "doc_to_target": "{{ 0 if big else 1 }}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
COLOR = {
    "output_type": "generate_until",
    "doc_to_text": "{{ text }} color :",
    "doc_to_target": "{{ color }}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_tasks(folder: Path, **tasks: dict[str, Any]) -> Path:
    """YAML tasks of lm-eval over the rows that the run is measured on."""
    to = folder / "tasks"
    to.mkdir(exist_ok=True)
    rows = {"test": str(folder / "eval.jsonl"), "train": str(folder / "train.jsonl")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": rows, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "train",
    }
    for name, own in tasks.items():
        (to / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | shared | own), encoding="utf-8")
    return to


def asked(results: dict[str, Any], task: str) -> list[float]:
    """Log-likelihoods of every option of every row, in order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [float(pair[0][0]) for sample in samples for pair in sample["resps"]]


def ours(run: Path, task: str, route: str) -> list[float]:
    """The same by our own scoring."""
    bench, model = open_run(run)
    groups = ENCODE_CHOICES[bench.form](bench.tokenizer, bench.eval[task], bench.max_length)
    flat = [each for group in groups for each in group]
    return log_likelihoods(model, bench.tokenizer, flat, [route] * len(flat), batch_size=8, form=bench.form)


@needs_it
@pytest.mark.parametrize(
    ("method", "family"),
    [("peml+mtl", "llama"), ("lora", "llama"), ("mpt", "llama"), ("peml", "gpt2")],
)
def test_its_numbers_are_ours_on_the_same_template(method: str, family: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, method, family=family)
    # The same rows under a name of their own, answered by the other task.
    tasks = write_tasks(tmp_path, size=SIZE, also_size=SIZE, color=COLOR)
    results = measure_run(
        run, ["size", "also_size", "color"], tasks=tasks, routes={"also_*": "color"}, batch_size=4, log_samples=True
    )
    bench, model = open_run(run)
    scores = bench.evaluate(model, None)
    assert results["results"]["size"]["acc,none"] == scores["size"]["accuracy"]
    assert asked(results, "size") == pytest.approx(ours(run, "size", "size"), abs=1e-4)
    other = ours(run, "size", "color")
    assert asked(results, "also_size") == pytest.approx(other, abs=1e-4)
    if method in ("peml+mtl", "mpt"):
        assert max(abs(a - b) for a, b in zip(asked(results, "size"), other, strict=True)) > 1e-2, "routes differ"
    written = generate_answers(
        model, bench.tokenizer, bench.eval["color"], max_length=bench.max_length, max_new_tokens=3, batch_size=4,
        tasks_kwarg=True, form=bench.form,
    )  # fmt: skip
    samples = sorted(results["samples"]["color"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0].strip() for sample in samples] == written
    kept = json.loads(RunFolder(run).harness.read_text())
    assert kept["results"]["size"]["acc,none"] == scores["size"]["accuracy"] and "samples" not in kept
    assert kept["config"]["peml_routes"] == {"also_*": "color"} and kept["n-samples"]["size"]["effective"] == 20


def real_tasks(model: str, shared_path: Callable[[str], Path]) -> list[dict[str, Any]]:
    """Tasks with choices for a model that was trained."""
    if model == "toy":
        return [{"suite": "toy", "include": ["mood", "entailment", "odd"], "limit_train": 20, "limit_eval": 40}]
    pair = "{{ sentence1 }}\nDoes it follow that {{ sentence2 }}\nAnswer:"
    rte = {"labels": {"entailment": "yes", "not_entailment": "no"}, "choices": ["no", "yes"], "prompt": pair}
    same = "First: {{ sentence1 }}\nSecond: {{ sentence2 }}\nDo they say the same? Answer:"
    mrpc = {"labels": {"0": "not at all", "1": "yes"}, "choices": ["yes", "not at all"], "prompt": same}
    files = {name: {"path": str(shared_path(f"glue_{name}/train.jsonl")), "limit_train": 20,
                    "eval_path": str(shared_path(f"glue_{name}/dev.jsonl")), "limit_eval": 40} for name in ("rte", "mrpc")}  # fmt: skip
    return [
        {"name": name, "kind": "choose", "answer": "label", **files[name], **own}
        for name, own in (("rte", rte), ("mrpc", mrpc))
    ]


@needs_it
@pytest.mark.parametrize("model", ["toy", pytest.param("stories3M-hf", marks=pytest.mark.data)])
def test_its_numbers_are_ours_on_trained_models(model: str, tmp_path: Path, shared_path: Callable[[str], Path]) -> None:
    base = model if model == "toy" else str(shared_path(f"models/{model}"))
    data = {"model": base, "tasks": real_tasks(model, shared_path), "method": "mtl-lora", "train": {"max_length": 400}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data | {"set": {"adapter.r": 4}}), encoding="utf-8")
    # About as far as a training goes: the farther, the more single precision differs.
    run = draw_run(tmp_path / "recipe.yaml", tmp_path / "run", noise=0.05)
    bench, adapted = open_run(run)
    own: dict[str, dict[str, Any]] = {}
    for name, examples in bench.eval.items():
        rows = [{"prompt": e.prompt, "options": list(e.choices), "right": e.choices.index(e.answer)} for e in examples]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        kwargs = {
            "data_files": dict.fromkeys(("train", "test"), str(tmp_path / f"{name}.jsonl")),
            "cache_dir": str(tmp_path / "cache"),
        }
        own[name] = SIZE | {"dataset_kwargs": kwargs, "doc_to_text": "{{ prompt }}", "doc_to_choice": "options"}
        own[name] |= {"doc_to_target": "right"}
    results = measure_run(run, list(own), tasks=write_tasks(tmp_path, **own), log_samples=True)
    scores = bench.evaluate(adapted, None)
    for name in own:
        assert results["results"][name]["acc,none"] == scores[name]["accuracy"]
        assert asked(results, name) == pytest.approx(ours(run, name, name), abs=1e-4)


@needs_it
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_mixed_requests_keep_their_routes_and_their_order(family: str, tmp_path: Path) -> None:
    import peml.harness.model as harness

    model = harness.PemlLM(str(write_run(tmp_path, "mtl-lora", family=family)), batch_size=3)
    from lm_eval.api.instance import Instance

    def ask(task: str, word: str, number: int) -> Instance:
        return Instance("loglikelihood", {}, ("red cat", f" {word}"), number, metadata=(task, number, 1))

    mixed = [ask(task, word, i) for i, task in enumerate(["size", "color"] * 4) for word in ("yes", "no", "red")]
    together = model.loglikelihood(mixed, disable_tqdm=True)
    alone = [model.loglikelihood([one], disable_tqdm=True)[0] for one in mixed]
    assert [pair[0] for pair in together] == pytest.approx([pair[0] for pair in alone], abs=1e-5)
    # lm-eval computes rows with the same context once: not across tasks.
    assert abs(together[0][0] - together[3][0]) > 1e-2
    texts = [Instance("loglikelihood_rolling", {}, ("red cat is big",), i, metadata=(t, i, 1)) for i, t in enumerate(("size", "color"))]  # fmt: skip
    first, second = model.loglikelihood_rolling(texts, disable_tqdm=True)
    assert abs(first - second) > 1e-2
    with pytest.raises(PemlError, match="does not say which task it is of"):
        model.loglikelihood([Instance("loglikelihood", {}, ("a", " b"), 0)], disable_tqdm=True)


@needs_it
def test_the_name_peml_is_known_to_lm_eval_itself(tmp_path: Path) -> None:
    """Its own function, and its own command line."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    run = write_run(tmp_path, "mtl-lora")
    tasks = write_tasks(tmp_path, its_size=SIZE)
    found = lm_eval.simple_evaluate(
        model="peml",
        model_args=f"run={run},route=its_size=size",
        tasks=["its_size"],
        limit=5,
        num_fewshot=2,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    assert found["n-samples"]["its_size"]["effective"] == 5 and found["config"]["model"] == "peml"


@pytest.mark.slow
@needs_it
def test_its_own_command_line(tmp_path: Path) -> None:
    pytest.importorskip("pytablewriter", reason="needs all that lm-eval needs")
    run = write_run(tmp_path, "mtl-lora")
    tasks = write_tasks(tmp_path, size=SIZE)
    done = subprocess.run(
        [sys.executable, "-m", "peml.harness", "run", "--model", "peml", "--model_args", f"run={run}", "--tasks",
         str(tasks / "size.yaml"), "--limit", "5", "--output_path", str(tmp_path / "out")],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|size" in done.stdout and list((tmp_path / "out").rglob("results_*.json"))


@needs_it
def test_the_command(peml: Callable[..., Any], tmp_path: Path) -> None:
    run = write_run(tmp_path, "mtl-lora")
    tasks = write_tasks(tmp_path, size=SIZE, its_size=SIZE, broken=SIZE | {"doc_to_text": "{{ text"})
    shared = ("evaluate", run, "--harness-tasks", tasks)
    code, out, _ = peml(*shared, "--harness", "size, its_*", "--harness-route", "its_size=size", "--harness-limit", 4)
    assert code == 0 and out.count("acc") == 2 and "its_size" in out and "harness.json" in out
    assert not RunFolder(run).evaluation.exists()
    before = RunFolder(run).harness.read_text()
    for arguments, says in (
        (["--harness", "its_size"], "task 'its_size' of lm-eval has no route: the adapter has the tasks size, color"),
        (["--harness", "broken", "--harness-route", "broken=size"], "broken could not be loaded|broken"),
        (["--harness", "size", "--harness-limit", 0], "--harness-limit must be 1 or more, not 0"),
        (["--harness", "size", "--harness-tasks", tmp_path / "none"], "none is not a folder"),
        (["--harness", "size", "--ablate", "all"], "--ablate and --harness are two measurements"),
        ([], "go with --harness NAMES"),
    ):
        code, _, err = peml(*shared, *arguments)
        assert code == 2 and any(part in " ".join(err.split()) for part in says.split("|")), err
    assert RunFolder(run).harness.read_text() == before


@needs_it
def test_what_it_cannot_measure_is_said(tmp_path: Path) -> None:
    import peml.harness.model as harness

    with pytest.raises(PemlError, match="made from the text, without the answers"):
        model = harness.PemlLM(str(write_run(tmp_path / "attempt", "attempt")))
        model.loglikelihood([], disable_tqdm=True)
    with pytest.raises(PemlError, match="does not go with use_cache"):
        model.set_cache_hook(None)
    run = write_run(tmp_path / "lora", "lora")
    with pytest.raises(PemlError, match="model peml takes run=FOLDER"):
        harness.PemlLM(str(run), pretrained="gpt2")
    with pytest.raises(PemlError, match="route a=rte: the adapter has the tasks size, color"):
        harness.PemlLM(str(run), route="a=rte")


def test_lm_eval_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(PemlError, match=r"needs lm-eval 0.4.13 or newer: pip install 'peml\[lm-eval\]'"):
        measure_run(tmp_path, ["size"])


def test_routes() -> None:
    names = ("rte", "mmlu", "sst2")
    routes = Routes(read_routes("glue_rte = rte; mmlu_*=mmlu;*=sst2;sst2=rte"), names)
    found = {name: routes.task_of(name) for name in ("glue_rte", "rte", "mmlu_law", "wnli", "sst2")}
    assert found == {"glue_rte": "rte", "rte": "rte", "mmlu_law": "mmlu", "wnli": "sst2", "sst2": "rte"}
    assert read_routes(["a=b", "c=d"]) == {"a": "b", "c": "d"} and read_routes("") == {}
    with pytest.raises(PemlError, match="task 'wnli' of lm-eval has no route"):
        Routes({}, names).task_of("wnli")
    for given, says in (("a", "must be HARNESS_TASK=TASK"), ("a=b;a=c", "two routes, to b and to c"), ("=b", "must")):
        with pytest.raises(PemlError, match=says):
            read_routes(given)
