"""`peml export`: what others load without peml is the model that was trained, or is refused with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peml
from export_kit import PLAIN, write_run
from peml import PemlError
from peml.export import FORMATS, export_run, lint, push
from peml.export.card import card
from peml.export.check import Checked, Order, answers, check_fresh
from peml.export.lint import tied_layer
from peml.methods import METHODS
from peml.training import load_recipe, open_adapter
from workshop import write_model, write_recipe

GATES, OTHER_LENGTHS = "the prefix has gates", "in its layers, and PEFT one number for all"
NO_PROMPT, LOST = "it has no prompt", "its prompt would be lost"
NOT_FOLDED, NO_LORA = "its experts are mixed by the input of each token", "it has no low-rank part"
FROM_TEXT, BEHIND = "its prompt is made from every text anew", "its text stands behind the tokens of the prompt"
ORDINARY = " with ordinary tokens"
"""Behind a method: its search ends with tokens that have no gates, the same number in every layer."""


class Cell(NamedTuple):
    """One method in one format, on one family: it works, or is refused."""

    family: str
    method: str
    form: str
    refusal: str | None


def cells() -> Iterator[Cell]:
    searched = [name + ORDINARY for name in ("prefix-nas", "peml", "peml+mtl")]
    for family in ("llama", "gpt2"):
        for method in (*METHODS, *searched):
            row = METHODS[method.removesuffix(ORDINARY)]
            for form in FORMATS:
                yield Cell(family, method, form, _refusal(family, method, row, form))


def _refusal(family: str, method: str, row: Any, form: str) -> str | None:
    if row.adapter is not None and not row.adapter.foldable:
        return NOT_FOLDED
    if form in ("lora", "merged"):
        return None if row.prompt is None else LOST
    if row.prompt is None:
        return NO_PROMPT
    if method == "attempt":
        return FROM_TEXT
    if form == "prefix" and isinstance(row.prompt, peml.PrefixNAS) and not method.endswith(ORDINARY):
        return GATES
    if form == "kv" and family == "gpt2" and row.prompt.at_input:
        return BEHIND
    return None


CELLS = list(cells())


def run_of(folder: Path, cell: Cell) -> Path:
    method = cell.method.removesuffix(ORDINARY)
    place = folder / cell.family / cell.method
    return (
        place / "run"
        if place.exists()
        else write_run(place, method, PLAIN if method != cell.method else {}, cell.family)
    )


def order_of(run: Path, form: str, folder: Path, task: str | None) -> Order:
    """A comparison of one task of an export with its adapter."""
    place = folder / (task or "")
    base = place / "base" if (place / "base").exists() else run.parent / "model"
    return Order(form, place / ("prefix" if form == "prefix" else ""), str(base), answers(open_adapter(run)[2], task))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_refused_is_said_before_anything_is_written(family: str, tmp_path: Path) -> None:
    """The lint of every cell, on the adapter in memory."""
    mine = [cell for cell in CELLS if cell.family == family]
    for method in dict.fromkeys(cell.method for cell in mine):
        tuner = open_adapter(run_of(tmp_path, next(c for c in mine if c.method == method)))[2].base_model
        for cell in (cell for cell in mine if cell.method == method):
            found = lint(tuner, cell.form)
            stops = "; ".join(finding.text for finding in found if finding.stops)
            assert (cell.refusal or "") in stops and bool(stops) == (cell.refusal is not None), cell


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_method_in_every_format(family: str, tmp_path: Path) -> None:
    """One fresh process for all: starting it takes longer than what it does."""
    orders: dict[Cell, Order] = {}
    for cell in (cell for cell in CELLS if cell.family == family):
        run = run_of(tmp_path, cell)
        output = run.parent / cell.form
        if cell.refusal is not None:
            with pytest.raises(PemlError, match=cell.refusal):
                export_run(run, cell.form, output=output)
            assert not output.exists()
            continue
        done = export_run(run, cell.form, output=output)
        orders[cell] = order_of(run, cell.form, output, done.tasks[-1])
    found = dict(zip(orders, check_fresh(list(orders.values())), strict=True))
    assert not {cell: each for cell, each in found.items() if not each.passed or each.difference > 1e-5}
    # What was exported is far from the plain model: nothing agrees by doing nothing.
    plain = write_model(tmp_path / "plain") if family == "llama" else None
    if plain is not None:
        lora = next(cell for cell in orders if (cell.method, cell.form) == ("lora", "merged"))
        there = orders[lora]._replace(form="merged", folder=plain)
        assert check_fresh([there])[0].difference > 0.1


def test_a_prefix_of_several_lengths_goes_to_kv_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lora+prefix", {"prompt.num_virtual_tokens": [2, 0]})
    with pytest.raises(PemlError, match=OTHER_LENGTHS):
        export_run(run, "prefix")
    done = export_run(run, "kv", check=True)
    assert done.checks[None].passed and done.folder == run / "export" / "kv"
    with safe_open(str(done.folder / "prefix_kv.safetensors"), framework="pt") as file:
        assert json.loads(file.metadata()["layers"]) == {"0": "model.layers.0.self_attn"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "form"),
    [("opt", "lora+prefix", "prefix"), ("opt", "lora+prefix", "kv"), ("t5", "lora", "lora"), ("t5", "lora", "merged")],
)
def test_other_models(family: str, method: str, form: str, tmp_path: Path) -> None:
    done = export_run(write_run(tmp_path, method, family=family), form, check=True)
    assert done.checks[None].passed


def test_one_task_of_several(tmp_path: Path) -> None:
    run = write_run(tmp_path, "mtl-lora")
    done = export_run(run, "lora", ["color"])
    assert done.folder == run / "export" / "lora-color" and done.tasks == ["color"]
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and "q_proj" in config["target_modules"]
    tensors = load_file(done.folder / "adapter_model.safetensors")
    fold = open_adapter(run)[2].base_model.fold("color")
    down, up = fold["model.layers.1.mlp.up_proj"]
    name = "base_model.model.model.layers.1.mlp.up_proj"
    torch.testing.assert_close(tensors[f"{name}.lora_A.weight"], down)
    torch.testing.assert_close(tensors[f"{name}.lora_B.weight"], up.T)
    text = (done.folder / "README.md").read_text()
    assert "library_name: peft" in text and "| color | exact_match | 0.500 | 20 |" in text and "size" in text
    assert "method: mtl-lora" in text and "| size |" not in text


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_loads_what_is_there(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders as they are called, the class of the model, and the revision of its base."""
    recipe = load_recipe(write_run(tmp_path, "lora") / "recipe.yaml")
    recipe = recipe.model_copy(update={"model": "me/base", "revision": "v2"})
    text = card(form, recipe, {}, ["a b/c"], ["a_b_c"], False, [], "float32", "AutoModelForSeq2SeqLM")
    assert "FOLDER/a_b_c" in text and "`a_b_c` of a b/c" in text and "ForCausalLM" not in text
    assert ("ForSeq2SeqLM.from_pretrained" in text) == (form != "kv")
    assert ('revision="v2"' in text) == (form in ("prefix", "kv")) and "base_model: me/base" in text
    # A folder is no name on the Hub, though it may look like one.
    monkeypatch.chdir(tmp_path)
    Path("me/base").mkdir(parents=True)
    text = card(form, recipe, {}, ["a", "b"], [], False, [], "float32")
    assert "base_model" not in text and "One, of a, b." in text


def test_the_revision_of_the_base_goes_along(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lora")
    write_recipe(tmp_path, method="lora", set={"adapter.r": 4}, revision="v2").replace(run / "recipe.yaml")
    config = json.loads((export_run(run, "lora").folder / "adapter_config.json").read_text())
    assert config["revision"] == "v2"


@pytest.mark.slow
def test_a_checkpoint_in_half_precision_is_rounded_once(tmp_path: Path) -> None:
    """From a sum in single precision; and it is checked against what rounding makes of it."""
    run = write_run(tmp_path, "lora")
    done = export_run(run, "merged", dtype="bfloat16", check=True)
    assert done.checks[None].passed
    _, _, model = open_adapter(run)
    model.base_model.merge_adapter()
    for name, tensor in load_file(done.folder / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        own = dict(model.base_model.model.named_parameters())
        wanted = own.get(name, own.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(tensor, wanted.bfloat16()), name
    assert (done.folder / "tokenizer.json").exists()


@pytest.mark.slow
def test_an_export_that_is_another_model_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, "lora")

    def spoilt(orders: list[Order]) -> list[Checked]:
        file = orders[0].folder / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({key: tensor * 1.01 for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
        return check_fresh(orders)

    monkeypatch.setattr("peml.export.run.check_fresh", spoilt)
    with pytest.raises(PemlError, match="is not the model that it was made from"):
        export_run(run, "lora", check=True)
    assert not list((run / "export").iterdir())


@pytest.mark.slow
def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    order = order_of(write_run(tmp_path, "lora"), "lora", tmp_path / "nothing", None)
    with pytest.raises(PemlError, match="does not load without peml"):
        check_fresh([order])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"form": "gguf"}, "--to gguf is unknown: choose lora, merged, prefix, kv"),
        ({"tasks": ["rte"]}, "--task rte: the run has the tasks size, color"),
        ({"dtype": "int8"}, "--dtype int8 is unknown"),
        ({"output": "."}, "already holds something"),
    ],
)
def test_bad_input(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, "mtl-lora")
    with pytest.raises(PemlError, match=message):
        export_run(run, **{"form": "lora", **wrong})
    assert not (run / "export").exists()


@pytest.mark.slow
def test_modules_that_were_trained_whole(tmp_path: Path) -> None:
    """They fold into a checkpoint; vLLM refuses them in a LoRA, and so does the lint."""
    run = write_run(tmp_path, "lora", {"modules_to_save": ["lm_head"]})
    with pytest.raises(PemlError, match=r"whole modules \(lm_head\)"):
        export_run(run, "lora")
    assert export_run(run, "merged", check=True).checks[None].passed


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_weights_that_two_layers_share(tmp_path: Path) -> None:
    """Merged into the head, the low-rank part would be in the embedding, too; beside it, it is the head's alone."""
    write_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "model")
    run = write_run(tmp_path, "lora", {"target_modules": ["lm_head", "q_proj"]})
    with pytest.raises(PemlError, match="lm_head shares its weights with another layer, .* use --to lora"):
        export_run(run, "merged")
    assert not (run / "export").exists()
    assert (
        "lm_head" in json.loads((export_run(run, "lora").folder / "adapter_config.json").read_text())["target_modules"]
    )
    # The same model with other targets is none of it.
    shutil.rmtree(run)
    assert tied_layer(open_adapter(write_run(tmp_path, "lora"))[2].base_model) is None


def test_the_hub_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **kwargs: sent.update(repo=repo, **kwargs))

    def upload(self: HfApi, **kwargs: Any) -> str:
        sent.update(kwargs, files=sorted(path.name for path in Path(kwargs["folder_path"]).iterdir()))
        return "there"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    done = export_run(write_run(tmp_path, "lora"), "lora")
    assert push(done.folder, "me/it") == "there"
    assert sent["repo"] == sent["repo_id"] == "me/it" and sent["private"]
    assert sent["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]

    def refuse(self: HfApi, **kwargs: Any) -> str:
        raise OSError("no network here")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(PemlError, match="me/it: the Hub did not take it"):
        push(done.folder, "me/it")


def test_the_command(peml: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    run = write_run(tmp_path, "lora")
    code, out, _ = peml("export", run, "--to", "lora", "--check")
    assert code == 0 and "loads without peml; logits differ by" in out and "the same greedy answers" in out
    assert "note: the same for all tasks" in out and (run / "export" / "lora" / "README.md").exists()


# The page.

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
BEGIN, END = "<!-- Written by tests/test_export_run.py, from the parameters of its tests. -->", "<!-- End. -->"


def table() -> str:
    """Methods x formats, and notes for what is refused."""
    notes: dict[str, int] = {}
    lines = [BEGIN, "", f"| | {' | '.join(FORMATS)} |", f"|---|{'---|' * len(FORMATS)}"]
    for method in dict.fromkeys(cell.method for cell in CELLS):
        columns = []
        for form in FORMATS:
            refusals = {c.family: c.refusal for c in CELLS if (c.method, c.form) == (method, form)}
            marks = {
                family: "yes" if why is None else f"no [{notes.setdefault(why, len(notes) + 1)}]"
                for family, why in refusals.items()
            }
            same = len(set(marks.values())) == 1
            columns.append(marks["llama"] if same else f"rotary {marks['llama']}, learned positions {marks['gpt2']}")
        lines.append(f"| {method} | {' | '.join(columns)} |")
    return "\n".join([*lines, "", *(f"{number}. {why}." for why, number in notes.items()), "", END])


def test_the_page_is_what_is_tested() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), "run: python tests/test_export_run.py"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(head + table() + rest.partition(END)[2], encoding="utf-8")


@pytest.mark.parametrize("form", ["lora", "merged", "prefix"])
def test_a_plain_lora_in_groups_is_exported_by_task(form: str, tmp_path: Path) -> None:
    """The method needs no task, its groups do."""
    groups = [{"until": 0.5, "groups": "all"}, {"until": 1, "groups": "each"}]
    method = "lora+prefix" if form == "prefix" else "lora"
    run = write_run(tmp_path, method, {"groups": groups})
    done = export_run(run, form)
    assert done.tasks == ["size", "color"]
    assert not any("the same for all tasks" in finding.text for finding in lint(open_adapter(run)[2].base_model, form))
    fold, name = open_adapter(run)[2].base_model, "model.layers.1.mlp.up_proj"
    plain = load_file(run.parent / "model" / "model.safetensors")[f"{name}.weight"]
    for task in done.tasks:
        down, up = fold.fold(task)[name]
        place = done.folder / str(task)
        if form == "lora":
            written = load_file(place / "adapter_model.safetensors")
            own = {key: written[f"base_model.model.{name}.{key}.weight"] for key in ("lora_A", "lora_B")}
            torch.testing.assert_close(own["lora_B"] @ own["lora_A"], up.T @ down)
        else:
            written = load_file((place if form == "merged" else place / "base") / "model.safetensors")
            torch.testing.assert_close(written[f"{name}.weight"] - plain, up.T @ down, rtol=1e-3, atol=1e-5)
