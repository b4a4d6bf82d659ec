"""A comparison: equal budgets, jobs that can be killed, and a table that says what stands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from peml import Recipe
from peml.compare import CompareFolder, compare, runners
from peml.compare.costs import measure_costs
from peml.compare.folder import Job
from peml.compare.plan import plan
from peml.compare.results import parameters_of
from peml.compare.runners import LocalRunner, RayRunner, share
from peml.compare.show import results_table
from peml.compare.words import average_words, count_words
from peml.compare.worker import work
from peml.errors import PemlError
from peml.methods import trainable_parameters
from peml.report.contents import contents_of
from peml.report.reproduce import summary
from peml.training import RunFolder
from peml.training.recipe import load_recipe
from peml.training.workbench import prepare
from peml.tuning.folder import TuneFolder
from workshop import recipe, write_model, write_recipe


class Here:
    """Jobs in this process, one after the other."""

    def __init__(self, stop_after: int | None = None, fail: Sequence[str] = (), by: int | None = None) -> None:
        self.stop_after, self.fail, self.by = stop_after, fail, by
        self.seen: list[tuple[str, str]] = []
        self.closed, self.places = False, 1

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        kind, source, output = command[0], Path(command[1]), Path(command[2])
        if len(self.seen) == self.stop_after:
            if self.by is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.by)
        self.seen.append((kind, f"{output.parent.name}/{output.name}"))
        future: Future[int] = Future()
        if self.seen[-1][1] in self.fail:
            log.write_text("Traceback\nerror: it was not to be\n")
            future.set_result(2)
            return future
        work(kind, source, output)
        future.set_result(0)
        return future

    def close(self) -> None:
        self.closed = True


def small(folder: Path, **changes: Any) -> Path:
    train = recipe(folder)["train"] | {"max_steps": 3, "save_strategy": "no", **changes.pop("train", {})}
    return write_recipe(folder, evaluate_before=False, train=train, **changes)


THREE = ["lora", "lora+prefix", "peml"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompareFolder]:
    """Three methods with two seeds each, for the tests that only read them."""
    folder = tmp_path_factory.mktemp("compared")
    path = small(folder)
    return path, compare(path, folder / "out", methods=THREE, seeds=2, runner=Here())


def test_every_method_gets_the_same_rows_steps_and_budget(compared: tuple[Path, CompareFolder]) -> None:
    path, folder = compared
    results = folder.read_results()
    assert [row["name"] for row in results["methods"]] == THREE and results["baseline"] == "lora"
    bench = prepare(load_recipe(path))
    budget = trainable_parameters(bench.config(), bench.model)
    assert results["budget"] == budget
    for row in results["methods"]:
        runs = [RunFolder(folder.path / row["folder"] / str(seed)) for seed in (0, 1)]
        metrics = [run.read_metrics() for run in runs]
        trained = {sum(own["parameters"].values()) for own in metrics}
        assert trained == {row["parameters"]["trained"]}
        assert row["parameters"]["deviation"] == pytest.approx(row["parameters"]["trained"] / budget - 1)
        assert abs(row["parameters"]["deviation"]) < 0.1
        assert [own["steps"] for own in metrics] == [3, 3] and not row["other_rows"]
        assert row["average"]["values"] == [own["average"]["after"] for own in metrics]
        low, high = row["average"]["interval"]
        assert low <= row["average"]["mean"] <= high
    data = [{str(RunFolder(folder.path / name / str(s)).read_metrics()["data"]) for name in THREE} for s in (0, 1)]
    assert [len(own) for own in data] == [1, 1]
    lora, both, own = results["methods"]
    assert lora["versus"] is None and lora["sized"]["adapter.r"] > both["sized"]["adapter.r"] > 2 and own["sized"] == {}
    # The scale alpha / r stays what it is in the method.
    assert lora["sized"]["adapter.lora_alpha"] / lora["sized"]["adapter.r"] == 2.0
    gains = [b - a for a, b in zip(lora["average"]["values"], own["average"]["values"], strict=True)]
    assert own["versus"]["average"]["values"] == pytest.approx(gains)
    assert (
        own["cost"]["deployed"] < own["parameters"]["trained"]
        and lora["cost"]["deployed"] == lora["parameters"]["trained"]
    )
    assert own["cost"]["adapter_bytes"] > 4 * own["parameters"]["trained"]
    assert all(job["state"] == "done" for job in results["jobs"]) and len(results["recipes"]) == 6


def test_a_comparison_that_is_finished_changes_nothing(compared: tuple[Path, CompareFolder]) -> None:
    path, folder = compared
    before = folder.read_results()
    again = Here()
    compare(path, folder.path, methods=THREE, seeds=2, runner=again)
    assert again.seen == [] and again.closed and folder.read_results() == before


def test_the_table_on_the_terminal(compared: tuple[Path, CompareFolder], tmp_path: Path) -> None:
    results = compared[1].read_results()
    with (tmp_path / "screen").open("w") as screen:
        Console(file=screen, width=80).print(results_table(results))
    shown = (tmp_path / "screen").read_text()
    for row in results["methods"]:
        assert row["name"] in shown and count_words(row["parameters"]["trained"]) in shown
    assert "against lora" in shown and average_words(results["methods"][2]["average"]) in shown


def without_clock(results: dict[str, Any]) -> Any:
    """All that does not hang on the clock, or on what else was trained in the same process."""
    clock = ("seconds", "seconds_per_step", "device_hours", "peak_memory_bytes")
    if isinstance(results, dict):
        return {key: without_clock(value) for key, value in results.items() if key not in clock}
    return [without_clock(value) for value in results] if isinstance(results, list) else results


def test_interrupted_it_does_what_is_left_and_ends_the_same(
    compared: tuple[Path, CompareFolder], tmp_path: Path
) -> None:
    path, whole = compared
    first = Here(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        compare(path, tmp_path / "out", methods=THREE, seeds=2, runner=first)
    assert first.closed and first.seen == [("train", f"{name}/0") for name in THREE], "seed by seed"
    stopped = CompareFolder(tmp_path / "out").read_results()
    assert [job["state"] for job in stopped["jobs"]] == ["done"] * 3 + ["open"] * 3
    for now, later in zip(stopped["methods"], whole.read_results()["methods"], strict=True):
        assert now["seeds"] == [0] and now["average"]["values"] == later["average"]["values"][:1]
    # Of a run that was killed while it began, nothing but transformers' folder may be there.
    (tmp_path / "out" / "lora" / "1" / "checkpoints").mkdir(parents=True)
    second = Here()
    folder = compare(path, tmp_path / "out", methods=THREE, seeds=2, runner=second)
    assert second.seen == [("train", f"{name}/1") for name in THREE]
    assert without_clock(folder.read_results()) == without_clock(whole.read_results())


def test_sigterm_leaves_results_too(tmp_path: Path) -> None:
    path = small(tmp_path, compare={"methods": ["lora", "mtl-lora"], "seeds": 1})
    before = signal.getsignal(signal.SIGTERM)
    runner = Here(stop_after=1, by=signal.SIGTERM)
    with (tmp_path / "screen").open("w") as screen, pytest.raises(SystemExit) as ended:
        compare(path, tmp_path / "out", runner=runner, console=Console(file=screen, width=400))
    assert ended.value.code == 143 and runner.closed and signal.getsignal(signal.SIGTERM) is before
    results = CompareFolder(tmp_path / "out").read_results()
    assert [job["state"] for job in results["jobs"]] == ["done", "open"]
    assert results["methods"][0]["average"] is not None and results["methods"][1]["average"] is None
    assert "stopped with 1 of 2 jobs finished" in (tmp_path / "screen").read_text()
    assert "1 of 2 jobs are still to be done" in summary(contents_of(CompareFolder(tmp_path / "out")))
    again = Here()
    results = compare(path, tmp_path / "out", runner=again).read_results()
    assert again.seen == [("train", "mtl-lora/0")] and {job["state"] for job in results["jobs"]} == {"done"}


def test_a_failed_job_is_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    path = small(tmp_path, compare={"methods": ["lora", "mtl-lora"], "seeds": 2})
    folder = compare(path, tmp_path / "out", runner=Here(fail=["mtl-lora/1"]))
    jobs = {job["name"]: job for job in folder.read_results()["jobs"]}
    assert [job["state"] for job in jobs.values()] == ["done", "done", "done", "failed"]
    assert jobs["mtl-lora, seed 1"]["error"] == "it was not to be"
    row = folder.read_results()["methods"][1]
    assert row["seeds"] == [0] and row["versus"]["seeds"] == [0] and row["versus"]["average"]["p"] is None
    assert not row["versus"]["average"]["stands"], "nothing stands without a test"
    again = Here()
    folder = compare(path, tmp_path / "out", runner=again)
    assert again.seen == [("train", "mtl-lora/1")]
    assert all(job["state"] == "done" for job in folder.read_results()["jobs"])


def test_all_may_fail(tmp_path: Path) -> None:
    path = small(tmp_path, compare={"methods": ["lora", "mtl-lora"], "seeds": 1})
    results = compare(path, tmp_path / "out", runner=Here(fail=["lora/0", "mtl-lora/0"])).read_results()
    assert [row["average"] for row in results["methods"]] == [None, None] and results["frozen"] is None
    assert results_table(results).row_count == 2


def test_another_recipe_is_refused_in_an_old_folder(compared: tuple[Path, CompareFolder], tmp_path: Path) -> None:
    path, folder = compared
    shutil.copytree(folder.path, tmp_path / "out")
    changed = load_recipe(path, train={**load_recipe(path).train, "learning_rate": 2e-2})
    runner = Here()
    with pytest.raises(
        PemlError, match=r"the run in .*lora/0 was made with another recipe \(train.learning_rate differs\)"
    ):
        compare(changed, tmp_path / "out", methods=THREE, seeds=2, runner=runner)
    assert runner.seen == []
    # More seeds, or other methods, are no other recipe.
    compare(path, tmp_path / "out", methods=["lora", "mtl-lora", "peml"], seeds=1, runner=runner)
    assert runner.seen == [("train", "mtl-lora/0")]


def test_what_a_method_has_of_its_own(tmp_path: Path) -> None:
    own = {
        "lora": {"train": {"learning_rate": 5e-3}},
        "LoRA at rank 2": {"method": "lora", "set": {"adapter.r": 2}, "match": False},
        "random": {"method": "peml", "architecture": "random"},
        "first the prefix": {"method": "peml", "regime": {"name": "sequential", "order": "prompt_first"}},
        "peml": {},
    }
    path = small(tmp_path, compare={"methods": own, "budget": "peml", "baseline": "peml", "seeds": 2})
    found = plan(load_recipe(path))
    entries = {entry.name: entry for entry in found.entries}
    assert found.baseline == "peml" and found.seeds == (0, 1)
    assert entries["lora"].recipe(0).train["learning_rate"] == 5e-3
    assert entries["peml"].recipe(0).train["learning_rate"] == 1e-2
    assert entries["LoRA at rank 2"].recipe(0).set == {"adapter.r": 2} and entries["LoRA at rank 2"].sized == {}
    assert entries["LoRA at rank 2"].folder == "LoRA-at-rank-2"
    drawn = [entries["random"].recipe(seed) for seed in (0, 1)]
    assert [own.architecture for own in drawn] == ["random:0", "random:1"]
    assert [own.seed for own in drawn] == [0, 1]
    assert entries["first the prefix"].recipe(1).how.name == "sequential"
    assert entries["lora"].recipe(0).how.name == "joint" and "prompt.width" not in entries["lora"].recipe(0).set
    assert entries["peml"].recipe(0).set["prompt.width"] == 8 and entries["peml"].parameters == found.budget
    assert entries["lora"].recipe(0).compare is None


def test_the_budget_may_be_a_number_and_then_holds_for_all(tmp_path: Path) -> None:
    path = small(tmp_path, compare={"methods": ["lora", "peml"], "budget": 6000})
    found = plan(load_recipe(path))
    assert found.budget == 6000 and all("adapter.r" in entry.sized for entry in found.entries)
    assert all(abs(entry.parameters - 6000) < 300 for entry in found.entries)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["lora"]}, "two or more different methods, not lora"),
        ({"methods": ["lora", "lora2"]}, "compare.methods.lora2: unknown method 'lora2'; did you mean|unknown method"),
        ({"methods": {"lora": {"rank": 1}, "peml": {}}}, "compare.methods.lora: unknown key rank"),
        ({"methods": {"lora": {"set": {"adapter.rr": 1}}, "peml": {}}}, "compare.methods.lora: set.adapter.rr"),
        ({"methods": {"lora": {"train": {"max_steps": 1}}, "peml": {}}}, "train.max_steps must be the same for all"),
        ({"methods": {"lora": {"train": {"seed": 1}}, "peml": {}}}, "train.seed must be the same for all methods"),
        ({"methods": 3}, "compare.methods must be a list of names or a mapping"),
        ({"methods": ["lora", "peml"], "baseline": "poly"}, "the baseline 'poly' is not among the methods lora, peml"),
        ({"methods": ["lora", "peml"], "budget": "poly"}, "compare.budget names 'poly', which is not among"),
        ({"methods": ["lora", "peml"], "budget": 0}, "compare.budget must be 1 or more"),
        ({"methods": ["lora", "peml"], "budget": 20}, "compare.methods.lora: .*more than twice the budget"),
        ({"methods": ["lora", "peml"], "seedz": 3}, "unknown key compare.seedz; did you mean seeds"),
        ({"methods": {"a b": {"method": "lora"}, "a-b": {"method": "lora"}}}, "would have one folder"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        compare(small(tmp_path, compare=section), tmp_path / "out", runner=Here())
    assert not (tmp_path / "out").exists()


def test_folders_of_something_else_are_left_alone(compared: tuple[Path, CompareFolder], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(PemlError, match="is not empty and holds no comparison"):
        compare(compared[0], tmp_path / "out", methods=THREE, runner=Here())
    with pytest.raises(PemlError, match="letter.txt is a file"):
        compare(compared[0], tmp_path / "out" / "letter.txt", methods=THREE, runner=Here())
    with pytest.raises(PemlError, match="holds no comparison: there is no results.json"):
        CompareFolder.existing(tmp_path / "out")
    assert sorted(part.name for part in (tmp_path / "out").iterdir()) == ["letter.txt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(PemlError, match="start it without `accelerate launch`"):
            compare(compared[0], tmp_path / "new", methods=THREE)
    for key, value in (("seeds", 0), ("workers", 0), ("threads", 0), ("trials", -1)):
        with pytest.raises(PemlError, match=f"--{key} must be"):
            compare(compared[0], tmp_path / "new", methods=THREE, **{key: value})  # type: ignore[arg-type]


class InTurn(Here):
    """Jobs in a thread, one after the other in the order in which they come."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ThreadPoolExecutor(1)

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        return self.pool.submit(lambda: Here.submit(self, command, log).result())


@pytest.mark.slow
def test_all_methods_have_their_first_seed_before_one_has_its_second(tmp_path: Path) -> None:
    path = small(
        tmp_path,
        tune={"held_out": 12, "pruner": "none", "steps": 1},
        compare={"methods": {"lora": {"match": False}, "mtl-lora": {"match": False}}, "seeds": 2, "trials": 1},
    )
    runner = InTurn()
    compare(path, tmp_path / "out", runner=runner)
    assert [name for _, name in runner.seen] == [
        *("lora/tune", "mtl-lora/tune"), *("lora/0", "mtl-lora/0"), *("lora/1", "mtl-lora/1"),
    ]  # fmt: skip


@pytest.mark.slow
def test_tuning_leaves_the_budget_alone_and_is_in_the_bill(tmp_path: Path) -> None:
    path = small(
        tmp_path,
        tune={"held_out": 12, "pruner": "none", "steps": 2},
        compare={"methods": ["lora", "peml"], "seeds": 1, "trials": 2},
    )
    found = plan(load_recipe(path))
    lora, own = found.entries
    assert set(lora.ranges or ()) == {"train.learning_rate"}
    kept = {"prompt.entropy_weight", "prompt.cost_weight", "prompt.temperature", "train.prompt_learning_rate"}
    assert kept <= set(own.ranges or ()) and not {"adapter.r", "prompt.width"} & set(own.ranges or ())
    runner = Here()
    folder = compare(path, tmp_path / "out", runner=runner)
    assert runner.seen == [("tune", "lora/tune"), ("tune", "peml/tune"), ("train", "lora/0"), ("train", "peml/0")]
    for row in folder.read_results()["methods"]:
        tuned = load_recipe(tmp_path / "out" / row["folder"] / "0.yaml").tuned
        assert tuned is not None and tuned.trials == 2
        assert row["cost"]["seconds"]["tuning"] == pytest.approx(tuned.wall_seconds)
    again = Here()
    compare(path, tmp_path / "out", runner=again)
    assert again.seen == []
    ranges = {"adapter.r": [2, 4]}
    other = load_recipe(path, compare={"methods": {"lora": {"tune": ranges}, "peml": {}}, "trials": 2})
    with pytest.raises(PemlError, match="compare.methods.lora: tuning adapter.r would change how much is trained"):
        plan(other)


def test_costs_are_measured_beside_the_base(compared: tuple[Path, CompareFolder], tmp_path: Path) -> None:
    folder = compared[1]
    measure_costs(folder.path / "lora" / "0", tmp_path / "costs.json", rounds=1)
    found = json.loads((tmp_path / "costs.json").read_text())
    for what in ("prefill", "token"):
        assert found[what]["seconds"] > 0 and all(found[what][k] > 0 for k in ("base again", "one task", "mixed batch"))
    # The weights are fp32, and so is what LoRA adds to them.
    trained = folder.read_results()["methods"][0]["parameters"]["trained"]
    assert found["memory"]["one task"] == pytest.approx(1 + 4 * trained / found["memory"]["bytes"], rel=1e-3)


def test_costs_are_jobs_behind_the_first_runs(
    compared: tuple[Path, CompareFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = compared
    shutil.copytree(folder.path, tmp_path / "out")
    monkeypatch.setattr("peml.compare.costs.measure_costs", lambda run, output: output.write_text(json.dumps(str(run))))
    runner = Here(fail=["peml/costs.json"])
    results = compare(path, tmp_path / "out", methods=THREE, seeds=2, costs=True, runner=runner).read_results()
    assert runner.seen == [("costs", f"{name}/costs.json") for name in THREE]
    measured = [row["cost"]["inference"] for row in results["methods"]]
    assert measured == [str(tmp_path / "out" / name / "0") for name in THREE[:2]] + [None]
    assert [job["name"] for job in results["jobs"] if job["state"] == "failed"] == ["costs of peml"]


def test_threads_are_shared_and_processes_end_with_their_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert [share(workers) for workers in (1, 3, 16)] == [8, 2, 1]
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS'], sys.argv[1:]); sys.exit(7)"
    real = subprocess.Popen
    monkeypatch.setattr(runners.subprocess, "Popen", lambda command, **rest: real([sys.executable, "-c", code, *command[3:]], **rest))  # fmt: skip
    runner = LocalRunner(2, 3)
    futures = [runner.submit(["train", str(n), "out"], tmp_path / f"{n}.log") for n in range(3)]
    assert [future.result(timeout=60) for future in futures] == [7, 7, 7]
    assert (tmp_path / "1.log").read_text() == "3 ['train', '1', 'out']\n"
    sleeper = "import time; time.sleep(600)"
    monkeypatch.setattr(
        runners.subprocess, "Popen", lambda command, **rest: real([sys.executable, "-c", sleeper], **rest)
    )
    future = runner.submit(["train", "x", "out"], tmp_path / "x.log")
    while not runner.running:
        time.sleep(0.01)
    runner.close()
    assert future.result(timeout=60) == -signal.SIGKILL


def test_ray_runs_the_same_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: what is asked of Ray, not what Ray does."""
    asked: dict[str, Any] = {}

    class Remote:
        def __init__(self, function: Any) -> None:
            self.function = function

        def remote(self, *arguments: Any) -> Any:
            asked["arguments"] = arguments
            future: Future[int] = Future()
            future.set_result(0)
            return type("Reference", (), {"future": lambda self: future})()

    class Stand:
        def init(self, **settings: Any) -> None:
            asked["init"] = settings

        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 2.0}

        def remote(self, **options: Any) -> Any:
            asked["options"] = options
            return Remote

        def shutdown(self) -> None:
            asked["closed"] = True

    with pytest.raises(PemlError, match=r"--ray needs Ray: pip install 'peml\[ray\]'"):
        RayRunner("auto", 1)
    monkeypatch.setitem(sys.modules, "ray", Stand())
    runner = RayRunner("auto", 2)
    assert runner.submit(["train", "a", "b"], tmp_path / "log").result() == 0
    runner.close()
    assert asked["init"]["address"] == "auto" and asked["closed"]
    assert asked["options"] == {"num_cpus": 2, "num_gpus": 0.0, "max_retries": 0}
    assert asked["arguments"] == (["train", "a", "b"], str(tmp_path / "log"), 2)


@pytest.mark.slow
def test_killed_with_its_jobs_it_goes_on(tmp_path: Path) -> None:
    """The command itself, in a process that is killed; its jobs end with it."""
    write_model(tmp_path / "model")
    path = small(tmp_path, compare={"methods": ["lora", "mtl-lora"], "seeds": 2}, train={"max_steps": 20})
    command = [sys.executable, "-m", "peml", "compare", str(path), "--output", str(tmp_path / "out"), "--threads", "1"]
    # The record says how many threads its process has, and this one may have been given fewer.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    begun = tmp_path / "out" / "mtl-lora" / "0" / "log.jsonl"
    deadline = time.monotonic() + 240
    while not begun.exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    finished = (tmp_path / "out" / "lora" / "0" / "metrics.json").stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while _working(tmp_path / "out"):
        assert time.monotonic() < deadline, "a job outlived the command"
        time.sleep(0.2)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 4 jobs are finished already" in done.stdout
    assert (tmp_path / "out" / "lora" / "0" / "metrics.json").stat().st_mtime_ns == finished
    whole = compare(path, tmp_path / "whole", threads=1)
    assert without_clock(whole.read_results()) == without_clock(CompareFolder(tmp_path / "out").read_results())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_what_it_has(tmp_path: Path, number: int, status: int) -> None:
    """The command itself, and a signal that reaches only it."""
    write_model(tmp_path / "model")
    path = small(tmp_path, compare={"methods": ["lora", "mtl-lora"], "seeds": 1}, train={"max_steps": 200})
    command = [sys.executable, "-m", "peml", "compare", str(path), "--output", str(tmp_path / "out"), "--threads", "1"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = tmp_path / "out" / "mtl-lora" / "0" / "log.jsonl"
    deadline = time.monotonic() + 240
    try:
        while not begun.exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        first.send_signal(number)
        out, err = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == status and "Traceback" not in err, err
    assert "stopped with 1 of 2 jobs finished" in " ".join(out.split()) and "--resume" not in err
    assert not _working(tmp_path / "out")
    results = CompareFolder(tmp_path / "out").read_results()
    assert [job["state"] for job in results["jobs"]] == ["done", "open"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 of 2 jobs are finished already" in done.stdout, done.stderr


def _working(folder: Path) -> list[str]:
    """Processes whose command names the folder, where the system lists them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command and "peml.compare.worker" in command and str(os.getpid()) not in entry.parts:
            found.append(command)
    return found


def test_a_recipe_keeps_its_section(tmp_path: Path) -> None:
    data = recipe(
        tmp_path, compare={"methods": {"lora": {"train": {"learning_rate": 1e-3}}, "peml": None}, "trials": 3}
    )
    own = Recipe.model_validate(data)
    assert own.compare is not None and own.compare.methods["lora"].train == {"learning_rate": 1e-3}
    again = Recipe.model_validate(yaml.safe_load(own.to_yaml()))
    assert again.compare == own.compare and json.dumps(yaml.safe_load(own.to_yaml())["compare"])


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_models_that_answer_otherwise_are_compared_too(tmp_path: Path, kind: str) -> None:
    from test_forms import settings

    path = settings(tmp_path, kind, evaluate_before=False, compare={"methods": ["lora", "mtl-lora"], "seeds": 1})
    short = load_recipe(path, train={**load_recipe(path).train, "max_steps": 2, "save_strategy": "no"})
    folder = compare(short, tmp_path / "out", runner=Here())
    lora, other = folder.read_results()["methods"]
    assert other["parameters"]["deviation"] == 0 and abs(lora["parameters"]["deviation"]) < 0.1
    # Heads, where there are any, are trained by all and count.
    assert ("heads" in lora["cost"]["parts"]) == (kind == "bert")
    assert sum(lora["cost"]["parts"].values()) == lora["parameters"]["trained"]
    measure_costs(folder.path / "lora" / "0", tmp_path / "costs.json", rounds=1)
    found = json.loads((tmp_path / "costs.json").read_text())
    assert found["prefill"]["mixed batch"] > 0 and ("token" in found) == (kind == "t5")
    assert ("memory" in found) == (kind == "bert")


def test_the_section_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    section = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["compare"]
    found = plan(load_recipe(small(tmp_path, compare=section | {"trials": 1})))
    assert {entry.name for entry in found.entries} == set(section["methods"]) and len(found.seeds) == 5
    ranges = {entry.name: set(entry.ranges or ()) for entry in found.entries}
    assert ranges["peml"] == {"train.learning_rate"} and "adapter.r" not in ranges["LoRA at PEML's rank"]


def test_the_size_of_a_drawn_architecture_is_that_of_each_seed(tmp_path: Path) -> None:
    own = {"peml": {}, "random": {"method": "peml", "architecture": "random"}}
    path = small(tmp_path, compare={"methods": own, "seeds": 4})
    found = plan(load_recipe(path))
    drawn, bench = found.entry("random").drawn, prepare(load_recipe(path))
    assert set(drawn) == {0, 1, 2, 3} and len(set(drawn.values())) > 1 and found.entry("peml").drawn == {}
    for seed in drawn:
        recipe = found.entry("random").recipe(seed)
        assert drawn[seed] == trainable_parameters(replace(bench, recipe=recipe).config(), bench.model)
    counted = parameters_of(found.entry("random"), [1, 3], 6000)
    assert counted["trained"] == round((drawn[1] + drawn[3]) / 2)
    assert abs(counted["deviation"]) == pytest.approx(max(abs(drawn[s] / 6000 - 1) for s in (1, 3)))


def test_runs_from_before_a_tuning_are_not_taken_for_tuned_ones(tmp_path: Path) -> None:
    path = small(tmp_path, tune={"held_out": 12, "steps": 2}, compare={"methods": ["lora", "mtl-lora"], "seeds": 1})
    folder = compare(path, tmp_path / "out", runner=Here())
    runner = Here()
    with pytest.raises(PemlError, match=r"the run in .*lora/0 was trained before all 2 trials of its tuning"):
        compare(path, folder.path, trials=2, runner=runner)
    # And a tuning with more trials than the others would get is no equal one.
    tuned = plan(load_recipe(path), trials=2)
    new = CompareFolder(tmp_path / "new")
    new.create(tuned)
    for entry in tuned.entries:
        tuning = TuneFolder(new.tuning(entry).output)
        tuning.create(new.tuned_recipe(tuned, entry))
        tuning.write_best(entry.recipe(0))
        tuning.write_summary({"trials": [{}] * 5})
    with pytest.raises(PemlError, match=r"lora was tuned with 5 trials in .*, and 2 are asked for"):
        compare(path, new.path, trials=2, runner=runner)
    new.tuning(tuned.entries[0]).output.joinpath("trials.json").write_text("{")
    with pytest.raises(PemlError, match=r"trials.json is damaged \(JSONDecodeError\): remove .*lora/tune"):
        compare(path, new.path, trials=2, runner=runner)
    assert runner.seen == []


def test_rows_that_have_changed_are_compared_with_no_others(tmp_path: Path) -> None:
    path = small(tmp_path, compare={"methods": ["lora", "mtl-lora"]})
    folder = compare(path, tmp_path / "out", seeds=1, runner=Here())
    rows_file = tmp_path / "train.jsonl"
    rows_file.write_text("".join(reversed(rows_file.read_text().splitlines(keepends=True))))
    runner = Here()
    with pytest.raises(PemlError, match=r"the rows of .*size.* have changed since the comparison in .*out began"):
        compare(path, folder.path, seeds=2, runner=runner)
    assert runner.seen == []
    folder.rows.write_text("{")
    with pytest.raises(PemlError, match=r"rows.json is damaged"):
        compare(path, folder.path, seeds=2, runner=runner)


@pytest.mark.parametrize(
    ("key", "value"), [("eval_steps", 1), ("save_steps", 1), ("eval_strategy", "epoch"), ("bf16", True)]
)
def test_no_method_chooses_its_weights_on_other_terms(tmp_path: Path, key: str, value: Any) -> None:
    path = small(tmp_path, compare={"methods": {"lora": {}, "peml": {"train": {key: value}}}})
    with pytest.raises(PemlError, match=rf"compare.methods.peml: .*train.{key} must be the same for all methods"):
        plan(load_recipe(path))


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps", "max_length"])
def test_what_decides_the_rows_is_tuned_for_no_method(tmp_path: Path, key: str) -> None:
    ranges = {f"train.{key}": [2, 4]}
    path = small(tmp_path, compare={"methods": {"lora": {"tune": ranges}, "peml": {}}, "trials": 2})
    with pytest.raises(PemlError, match=f"compare.methods.lora: .*train.{key} must be the same for all methods"):
        plan(load_recipe(path))
    own = small(tmp_path, tune={"ranges": ranges}, compare={"methods": ["lora", "peml"], "trials": 2})
    with pytest.raises(PemlError, match=f"compare.methods.peml: train.{key} must be the same for all methods"):
        plan(load_recipe(own))


def test_a_run_that_cannot_be_read_is_said_and_the_rest_compared(
    compared: tuple[Path, CompareFolder], tmp_path: Path
) -> None:
    path, folder = compared
    shutil.copytree(folder.path, tmp_path / "out")
    (tmp_path / "out" / "peml" / "1" / "predictions.json").write_text("{")
    results = compare(path, tmp_path / "out", methods=THREE, seeds=2, runner=Here()).read_results()
    assert [row["seeds"] for row in results["methods"]] == [[0, 1], [0, 1], [0]]
    failed = [job for job in results["jobs"] if job["state"] == "failed"]
    assert [job["name"] for job in failed] == ["peml, seed 1"]
    assert "predictions.json is damaged" in failed[0]["error"] and "remove" in failed[0]["error"]


def test_records_that_a_job_left_damaged_stop_no_other(tmp_path: Path) -> None:
    class Spoils(Here):
        def submit(self, command: Sequence[str], log: Path) -> Future[int]:
            future = super().submit(command, log)
            if self.seen[-1][1] == "lora/0":
                (Path(command[2]) / "metrics.json").write_text("{")
            return future

    path = small(tmp_path, compare={"methods": ["lora", "mtl-lora"], "seeds": 1})
    results = compare(path, tmp_path / "out", runner=Spoils()).read_results()
    assert [job["state"] for job in results["jobs"]] == ["failed", "done"]
    assert "metrics.json is damaged" in results["jobs"][0]["error"] and results["methods"][1]["versus"] is None


def test_a_job_that_was_killed_is_not_blamed_on_its_last_words(tmp_path: Path) -> None:
    job = Job("train", "lora", 0, tmp_path / "lora" / "0", tmp_path / "lora" / "0.yaml")
    job.log.parent.mkdir()
    job.log.write_text("a warning of no importance\n")
    assert job.failure(1) == "a warning of no importance"
    assert job.failure(-9).startswith("it was killed by signal 9, as Linux does where memory runs out")
    assert str(job.log) in job.failure(-15) and "memory" not in job.failure(-15)
