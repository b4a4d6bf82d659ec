"""What is saved comes back bit for bit, wherever it is loaded, and only onto the model that it fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, cases, few_cases
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peml
from models import TASKS, adapt, tiny, tokens
from peml import PemlError


@torch.no_grad()
def logits(model, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch, tasks=["cola", "rte", "sst2"]).logits


def saved(case: Case, folder: Path) -> tuple[torch.Tensor, torch.Tensor, Path]:
    """A base model and an adapter on disk; a batch and its logits."""
    base = tiny().float()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model, batch = case.build(base=base), tokens(3, 5)
    model.save_pretrained(folder / "adapter")
    return batch, logits(model, batch), folder / "adapter"


def base_of(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)


@cases
def test_round_trip(case: Case, tmp_path: Path) -> None:
    """Under the same name and another one, with empty weights first, and for further training."""
    batch, expected, folder = saved(case, tmp_path)
    for options in ({}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        model = PeftModel.from_pretrained(base_of(folder), folder, **options)
        assert model.base_model.training == options.get("is_trainable", False)
        assert torch.equal(logits(model.eval(), batch), expected)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert bool(trainable) == options.get("is_trainable", False)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_names"] == TASKS and config["peft_type"] == "PEML" and config["peml_version"]
    read = PeftConfig.from_pretrained(folder)
    assert (read.adapter, read.prompt) == (model.peft_config["default"].adapter, model.peft_config["default"].prompt)
    assert type(read.adapter) is type(case.adapter)


@few_cases
def test_auto_classes(case: Case, tmp_path: Path) -> None:
    """PEFT's, and transformers' own, which knows nothing of tasks but passes them on."""
    batch, expected, folder = saved(case, tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model, batch), expected)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model, batch), expected)
    if case.needs_task:
        with pytest.raises(PemlError, match="rte, sst2, cola"):
            model(input_ids=batch)
    assert model.generate(batch, tasks="rte", max_new_tokens=2).shape == (3, 7)


def test_transformers_own_adapter_methods(tmp_path: Path) -> None:
    """`add_adapter`, `set_adapter`, `disable_adapters` of the base model itself find the right task table."""
    base, batch = tiny().float(), tokens(3, 5)
    plain = base(input_ids=batch).logits
    base.add_adapter(peml.PemlConfig(task_names=["a", "b"], adapter=peml.MTLLoRA(r=2)), "one")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        base.add_adapter(
            peml.PemlConfig(task_names=["x", "a"], adapter=peml.LoRA(r=2), prompt=peml.PrefixTuning(2, True)), "two"
        )
    base(input_ids=batch, tasks="x")
    with pytest.raises(PemlError, match="unknown task 'b'"):
        base(input_ids=batch, tasks="b")
    base.set_adapter("one")
    base(input_ids=batch, tasks="b")
    base.disable_adapters()
    assert torch.equal(base(input_ids=batch).logits, plain)
    base.enable_adapters()
    with pytest.raises(PemlError, match="unknown task 'x'"):
        base(input_ids=batch, tasks="x")


FRESH = """
import sys, torch, warnings
torch.set_num_threads(1)
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
import peml
from peft import AutoPeftModelForCausalLM
folder = sys.argv[1]
model = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter", dtype=torch.float32)
batch, expected = torch.load(folder + "/expected.pt")
with torch.no_grad():
    found = model(input_ids=batch, tasks=["cola", "rte", "sst2"]).logits
assert torch.equal(found, expected), (found - expected).abs().max()
"""


@pytest.mark.parametrize(
    "case",
    [Case("MTLLoRA", "PrefixNAS"), pytest.param(Case("LoRA", "PrefixNAS-collapsed"), marks=pytest.mark.slow)],
    ids=lambda case: case.name,
)
def test_a_fresh_process(case: Case, tmp_path: Path) -> None:
    batch, expected, _ = saved(case, tmp_path)
    torch.save((batch, expected), tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@few_cases
@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_damaged_files_are_refused(case: Case, damage: str, tmp_path: Path) -> None:
    _, _, folder = saved(case, tmp_path)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    key = sorted(weights)[0]
    if damage == "missing":
        del weights[key]
    elif damage == "shape":
        weights[key] = torch.zeros(weights[key].numel() + 1)
    else:
        weights[key + "_more"] = weights[key].clone()
    save_file(weights, file)
    with pytest.raises(PemlError, match={"missing": "lacks", "unexpected": "has", "shape": "another base"}[damage]):
        PeftModel.from_pretrained(base_of(folder), folder)


@few_cases
@pytest.mark.parametrize("other", ["wider", "deeper", "gpt2"])
def test_another_base_is_refused(case: Case, other: str, tmp_path: Path) -> None:
    """Only an adapter without a prompt in its layers fits a deeper model of the same width."""
    _, _, folder = saved(case, tmp_path)
    base = {"wider": lambda: tiny("qwen3"), "deeper": lambda: tiny(layers=3), "gpt2": lambda: tiny("gpt2")}[other]()
    if other == "deeper" and case.groups_name == "progressive":
        # The same layer is at another share of the depth.
        with pytest.raises(PemlError, match="does not fit"):
            PeftModel.from_pretrained(base, folder)
        return
    if other == "deeper" and (case.prompt is None or case.at_input):
        PeftModel.from_pretrained(base, folder)
        return
    # Where no module has the right name it is PEFT that refuses.
    with pytest.raises(PemlError if other == "wider" else ValueError, match=r"base model|layers"):
        PeftModel.from_pretrained(base, folder)


def test_a_search_is_resumed_where_it_was(tmp_path: Path) -> None:
    """Progress, and with it the temperature, is part of the weights; so is the end of the search."""
    model = adapt(tiny().float(), prompt=peml.PrefixNAS(4, 2, 10, 6, 4))
    model.base_model.prompt.set_progress(0.7)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny().float(), tmp_path).base_model.prompt
        prompt = model.base_model.prompt
        assert float(again.progress) == pytest.approx(0.7) and again.searching == prompt.searching
        assert torch.equal(again.cell_weights(), prompt.cell_weights())
        assert again.architecture() == prompt.architecture()
        prompt.derive()


def test_modules_to_save(tmp_path: Path) -> None:
    base = tiny("bert").float()
    base.save_pretrained(tmp_path / "base")
    model = adapt(base, peml.MTLLoRA(r=2), target_modules=["query"], modules_to_save=["predictions"])
    batch, tasks = tokens(2, 4), ["rte", "cola"]
    expected = model(input_ids=batch, tasks=tasks).logits
    model.save_pretrained(tmp_path / "adapter")
    fresh = type(base).from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(again(input_ids=batch, tasks=tasks).logits, expected)
