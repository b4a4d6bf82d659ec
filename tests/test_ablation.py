"""What is switched off is off, what is put back is as it was, and contributions are differences of scores."""

import json
from pathlib import Path

import pytest
import torch

import peml
from models import TASKS, adapt, tiny, tokens
from peml import PemlError
from peml.evaluation import ablate, ablation_record, parts_there, read_parts
from peml.regimes import train
from peml.tasks import suite_tasks
from peml.training import RunFolder
from peml.training.run import open_run
from test_heads import batch, built
from workshop import write_recipe

NAS = peml.PrefixNAS(num_virtual_tokens=3, width=8, embedding_dim=6, head_rank=4)
PROMPTS = {
    "prefix": peml.PrefixTuning(num_virtual_tokens=3),
    "nas": NAS,
    "soft": peml.PromptTuning(num_virtual_tokens=2),
    "mpt": peml.MultitaskPrompt(num_virtual_tokens=2),
}


def outputs(model, ids, **given):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("adapter", ["lora", "mtl"])
def test_parts_are_off_inside_and_on_again_afterwards(prompt: str, adapter: str) -> None:
    own = {"lora": peml.LoRA(r=2), "mtl": peml.MTLLoRA(r=2)}[adapter]
    base, ids = tiny(), tokens()
    plain = outputs(base, ids)
    model = adapt(base, adapter=own, prompt=PROMPTS[prompt])
    tuner = model.base_model
    whole = outputs(model, ids, tasks=TASKS)
    found = {}
    for part in ("prompt", "adapter", "both"):
        with tuner.ablated(part):
            found[part] = outputs(model, ids, tasks=TASKS)
        assert torch.equal(outputs(model, ids, tasks=TASKS), whole)
    torch.testing.assert_close(found["both"], plain, rtol=0, atol=1e-12)
    for one, other in ((whole, found["prompt"]), (whole, found["adapter"]), (found["prompt"], found["adapter"])):
        assert (one - other).abs().max() > 1e-3
    for part in ("prompt", "adapter"):
        assert (found[part] - plain).abs().max() > 1e-3


def test_both_inside_one_leaves_that_one_off() -> None:
    model = adapt(tiny(), adapter=peml.LoRA(r=2), prompt=PROMPTS["prefix"])
    ids = tokens()
    with model.base_model.ablated("adapter"):
        without = outputs(model, ids)
        with model.base_model.ablated("both"):
            pass
        assert torch.equal(outputs(model, ids), without)


@pytest.mark.parametrize("adapter", ["lora", "mtl"])
def test_a_merged_adapter_is_taken_out_and_merged_again(adapter: str) -> None:
    base, ids = tiny(), tokens()
    plain = outputs(base, ids)
    own = {"lora": peml.LoRA(r=2), "mtl": peml.MTLLoRA(r=2)}[adapter]
    model = adapt(base, adapter=own, prompt=PROMPTS["prefix"])
    tuner = model.base_model
    tuner.select_task("rte")
    tuner.merge_adapter()
    merged = outputs(model, ids)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with tuner.ablated("both"):
        torch.testing.assert_close(outputs(model, ids), plain, rtol=0, atol=0)
    with pytest.raises(RuntimeError), tuner.ablated("adapter"):
        raise RuntimeError
    assert torch.equal(outputs(model, ids), merged)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_heads_stay_when_everything_else_is_off() -> None:
    model = built(prompt="prefix")
    given = batch() | {"tasks": ["sst2", "rte", "cola", "rte"]}
    with torch.no_grad():
        whole = model(**given).logits
        with model.base_model.ablated("both"):
            bare = model(**given).logits
            for parameter in model.base_model.heads.parameters():
                parameter.mul_(2)
            doubled = model(**given).logits
    seen = bare.isfinite() & (bare != 0)
    assert seen.any() and (whole[seen] - bare[seen]).abs().max() > 1e-3
    assert not torch.equal(bare[seen], doubled[seen]), "the heads' own parameters are in force"


def test_names_of_parts() -> None:
    assert read_parts(" prompt, adapter ,") == ["prompt", "adapter"] and read_parts("") == []
    both = adapt(tiny(), adapter=peml.LoRA(r=2), prompt=PROMPTS["prefix"]).base_model
    alone = adapt(tiny(), adapter=peml.LoRA(r=2)).base_model
    assert parts_there(["all"], both.config_in_force) == ["prompt", "adapter", "both"]
    assert parts_there(["both", "all"], both.config_in_force) == ["both", "prompt", "adapter"]
    assert parts_there(["all"], alone.config_in_force) == ["adapter"]
    with pytest.raises(PemlError, match="--ablate takes prompt, adapter, both and all, not 'prefix'"):
        read_parts("prefix")
    with pytest.raises(PemlError, match="--ablate prompt: this run has not got that; it has adapter"):
        parts_there(["prompt"], alone.config_in_force)
    with (
        pytest.raises(PemlError, match="no part 'heads' to switch off: choose prompt, adapter, both"),
        both.ablated("heads"),
    ):
        pass


def test_contributions_are_what_is_lost_without() -> None:
    tasks = {task.name: task for task in suite_tasks("glue", ["rte", "mrpc"])}

    def scores(rte: float, accuracy: float, f1: float) -> dict[str, dict[str, float]]:
        return {"rte": {"accuracy": rte, "n": 4.0}, "mrpc": {"accuracy": accuracy, "f1": f1, "n": 9.0}}

    results = {
        "whole": scores(0.75, 0.5, 1.0),
        "without prompt": scores(0.5, 0.5, 0.5),
        "without both": scores(1, 0, 0),
    }
    found = ablation_record(results, tasks)
    assert found["contributions"] == {
        "prompt": {"tasks": {"rte": 0.25, "mrpc": 0.25}, "average": 0.25},
        "both": {"tasks": {"rte": -0.25, "mrpc": 0.75}, "average": 0.25},
    }
    assert found["average"] == {"whole": 0.75, "without prompt": 0.5, "without both": 0.5}
    assert found["without prompt"] is results["without prompt"]


def test_a_run_is_measured_without_its_parts(tmp_path: Path) -> None:
    run = train(write_recipe(tmp_path), tmp_path / "run")
    bench, model = open_run(run.path)
    results = ablate(model.base_model, lambda: bench.evaluate(model), ["prompt", "adapter", "both"])
    metrics = RunFolder(run.path).read_metrics()
    assert results["whole"] == metrics["after"] and results["without both"] == metrics["before"]
    record = ablation_record(results, bench.tasks)
    gained = metrics["average"]["after"] - metrics["average"]["before"]
    assert record["contributions"]["both"]["average"] == pytest.approx(gained, abs=1e-12)
    json.dumps(record)
