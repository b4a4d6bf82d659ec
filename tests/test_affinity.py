"""Affinities between tasks: gradients by hand, clusters, what is written, and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import TrainingArguments

import peml
from models import TASKS, adapt, tiny
from peml import PemlError
from peml.affinity import Affinity, How, cluster, find_affinity, write_affinity
from peml.affinity.measure import Measured, _draws, measure
from peml.affinity.transfer import transfer
from peml.regimes import train
from peml.tasks.encode import IGNORED, Encoded
from peml.training import MultiTaskTrainer
from peml.training.data import Collator, TaskRows
from peml.training.recipe import Recipe
from workshop import recipe, write_model, write_recipe

ROWS = 5


def bench(tmp_path: Path) -> tuple[PeftModel, TaskRows, MultiTaskTrainer]:
    """Five rows of each of three tasks, an answer of two tokens at the end of each, and a LoRA away from its start."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name in TASKS:
        ids = torch.randint(2, 60, (ROWS, 6), generator=generator).tolist()
        rows[name] = [Encoded(own, [*[IGNORED] * 4, *own[4:]], False) for own in ids]
    model, data = adapt(tiny(), peml.LoRA(r=2)), TaskRows(rows)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    return model, data, MultiTaskTrainer(model, arguments, train_dataset=data, data_collator=Collator(1))


def loss_of(model: PeftModel, data: TaskRows, task: int) -> Tensor:
    """Mean over the answer tokens of all rows of a task, one row at a time."""
    own = [row for row, of in zip(data.rows, data.row_tasks, strict=True) if of == task]
    losses = []
    for row in own:
        logits = model(input_ids=torch.tensor([row.input_ids]), tasks=TASKS[task]).logits[0]
        losses += [F.cross_entropy(logits[i - 1].float(), torch.tensor(row.input_ids[i])) for i in (4, 5)]
    return torch.stack(losses).mean()


def test_cosines_are_those_of_gradients_by_hand(tmp_path: Path) -> None:
    """Every batch has all rows of its task, so their order does not matter."""
    model, data, trainer = bench(tmp_path)
    found = measure(trainer, data, batches=2, batch_rows=9)
    ups = {name: p for name, p in model.named_parameters() if name.endswith(".up")}
    flat: dict[str, list[Tensor]] = {"": [], "model.layers.0": [], "model.layers.1": []}
    for task in range(3):
        grads = dict(zip(ups, torch.autograd.grad(loss_of(model, data, task), [*ups.values()]), strict=True))
        for place, own in flat.items():
            own.append(torch.cat([g.flatten() for name, g in grads.items() if place in name]))
    for place, rows in flat.items():
        wanted = torch.tensor(
            [[float(F.cosine_similarity(a, b, dim=0)) for b in rows] for a in rows], dtype=torch.double
        )
        torch.testing.assert_close(found.blocks[place] if place else found.cosines, wanted, rtol=1e-5, atol=1e-6)
    assert float(found.spread.max()) < 1e-6 and list(found.blocks) == ["model.layers.0", "model.layers.1"]
    assert found.depths == {"model.layers.0": 0.25, "model.layers.1": 0.75}


def test_agreement_is_the_cosine_of_two_halves_by_hand(tmp_path: Path) -> None:
    model, data, trainer = bench(tmp_path)
    found = measure(trainer, data, batches=4, batch_rows=2)
    ups = [p for name, p in model.named_parameters() if name.endswith(".up")]
    halves: list[list[Tensor]] = [[], []]
    for task in range(3):
        for half in (0, 1):
            mean = torch.zeros(())
            for picked in list(_draws(data, 4, 2, trainer.args.seed))[half::2]:
                one = TaskRows({TASKS[0]: [data.rows[i] for i in picked[task]]})
                mean = mean + torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, one, 0), ups)])
            halves[half].append(mean)
    wanted = F.cosine_similarity(torch.stack(halves[0]), torch.stack(halves[1])).double()
    assert found.agreement is not None and wanted.min() < 0.9
    torch.testing.assert_close(found.agreement, wanted, rtol=1e-4, atol=1e-5)
    every = measure(trainer, data, batches=2, batch_rows=9).agreement
    assert every is not None and every.min() > 1 - 1e-6
    assert measure(trainer, data, batches=1, batch_rows=9).agreement is None


def test_lookahead_is_a_step_and_a_loss_by_hand(tmp_path: Path) -> None:
    model, data, trainer = bench(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = measure(trainer, data, batches=1, batch_rows=9, step=0.01)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    own = [p for p in model.parameters() if p.requires_grad]
    length = 0.01 * sum(float(p.detach().square().sum()) for p in own) ** 0.5
    with torch.no_grad():
        start = [float(loss_of(model, data, task)) for task in range(3)]
    for task in range(3):
        grads = torch.autograd.grad(loss_of(model, data, task), own)
        eta = length / sum(float(g.square().sum()) for g in grads) ** 0.5
        with torch.no_grad():
            for p, g in zip(own, grads, strict=True):
                p.sub_(eta * g)
            gains = [1 - float(loss_of(model, data, other)) / start[other] for other in range(3)]
            for name, p in model.named_parameters():
                p.copy_(before[name])
        assert found.lookahead is not None
        np.testing.assert_allclose(found.lookahead[task], gains, rtol=1e-3, atol=1e-6)
        assert gains[task] > 0


FAMILIES = np.array([[1, 0.6, -0.3, -0.2], [0.6, 1, -0.4, -0.3], [-0.3, -0.4, 1, 0.5], [-0.2, -0.3, 0.5, 1]])


def test_clusters_and_their_silhouette() -> None:
    order = [0, 2, 1, 3]
    found = cluster(FAMILIES[np.ix_(order, order)], ["a", "c", "b", "d"])
    assert found.clusters == (("a", "b"), ("c", "d"))
    # By hand: (b - a) / max(a, b), a the distance within, b the mean distance to the others.
    pairs = [(0.4, (1.3 + 1.2) / 2), (0.4, (1.4 + 1.3) / 2), (0.5, (1.3 + 1.4) / 2), (0.5, (1.2 + 1.3) / 2)]
    assert found.score == pytest.approx(np.mean([(b - a) / b for a, b in pairs]))
    assert found.scores.keys() == {2, 3} and found.order in (tuple("abcd"), tuple("abdc"), tuple("cdab"), tuple("bacd"))
    heights = [height for *_, height in found.merges]
    assert heights == pytest.approx([0.4, 0.5, 1.3])
    assert cluster(FAMILIES, list("abcd"), 4).clusters == (("a",), ("b",), ("c",), ("d",))
    assert cluster(FAMILIES, list("abcd"), 1).clusters == (tuple("abcd"),)


def test_without_structure_there_is_one_cluster() -> None:
    flat = np.full((4, 4), 0.3) + 0.02 * np.arange(16).reshape(4, 4) / 16
    assert cluster(flat, list("abcd")).clusters == (tuple("abcd"),)
    assert cluster([[1, 0.1], [0.1, 1]], ["a", "b"]).clusters == (("a", "b"),)
    assert cluster([[1, -0.1], [-0.1, 1]], ["a", "b"]).clusters == (("a",), ("b",))
    # No two of them agree.
    contrary = np.full((3, 3), -0.4)
    assert cluster(contrary, list("abc")).clusters == (("a",), ("b",), ("c",))
    # A tie is no reason for another number of groups than was asked for.
    tied = cluster(np.full((4, 4), 0.5), list("abcd"))
    assert tied.clusters == (tuple("abcd"),)
    assert [len(cluster(np.full((4, 4), 0.5), list("abcd"), n).clusters) for n in (1, 2, 3, 4)] == [1, 2, 3, 4]
    for number, affinity, message in (
        (5, FAMILIES, "number of tasks, 4, not 5"),
        (None, FAMILIES * np.nan, "no number"),
    ):
        with pytest.raises(PemlError, match=message):
            cluster(affinity, list("abcd"), number)


def test_an_affinity_is_written_read_and_drawn(tmp_path: Path) -> None:
    rows = FAMILIES.tolist()
    blocks = {"layers.0": np.eye(4).tolist(), "layers.1": rows, "layers.2": rows}
    own = Affinity(list("abcd"), rows, rows, blocks, rows, "cosine", cluster(rows, list("abcd")), {}, {"total": 1.0})
    write_affinity(own, tmp_path / "new")
    assert Affinity.load(tmp_path / "new", list("badc")) == own
    assert own.between(0.0, 0.3, 4).clusters == (("a",), ("b",), ("c",), ("d",))
    assert own.between(0.4, 1.0).clusters == (("a", "b"), ("c", "d"))
    assert own.between(0.0, 0.3).clusters == (tuple("abcd"),)
    # The whole depth is what was clustered, not the mean of the blocks.
    other = replace(own, blocks={place: np.eye(4).tolist() for place in blocks})
    assert other.between(0.0, 1.0) is own.clustering and len(other.between(0.0, 1.0, 3).clusters) == 3
    assert other.between(0.3, 1.0).clusters == (tuple("abcd"),)
    # Blocks of two stacks, of which one has but its upper half adapted, and a layer outside of them.
    flat = np.eye(4).tolist()
    blocks = {"enc.0": flat, "enc.1": rows, "dec.1": rows, "head": flat}
    depths = {"enc.0": 0.25, "enc.1": 0.75, "dec.1": 0.75, "head": None}
    two = replace(own, blocks=blocks, depths=depths)
    two.save(tmp_path / "two.json")
    assert Affinity.load(tmp_path / "two.json") == two
    assert two.between(0.5, 1.0).clusters == (("a", "b"), ("c", "d"))
    assert two.between(0.0, 0.5).clusters == (tuple("abcd"),)
    picture = ElementTree.parse(tmp_path / "new" / "affinity.svg").getroot()
    words = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("0.60") == 2 and words.count("-0.30") == 4 and "4 tasks in 2 clusters" in words
    with pytest.raises(PemlError, match="is of the tasks a, b, c, d"):
        Affinity.load(tmp_path / "new", ["a"])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(PemlError, match="is no file of peml affinity"):
        Affinity.load(tmp_path / "bad.json")
    with pytest.raises(PemlError, match="there is no"):
        Affinity.load(tmp_path / "none.json")


def test_a_step_into_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    whole = Recipe.model_validate(recipe(tmp_path))
    found: list[Measured] = []

    def spoilt(*args: Any, **settings: Any) -> Measured:
        found.append(measure(*args, **settings))
        assert found[-1].lookahead is not None
        return replace(found[-1], lookahead=found[-1].lookahead * float("nan"))

    monkeypatch.setattr("peml.affinity.run.measure", spoilt)
    with pytest.raises(PemlError, match="give a shorter step"):
        find_affinity(whole, How(1, 1, 2, lookahead=0.1))
    assert found


def test_wrong_measurements_are_refused() -> None:
    for settings, message in (
        ({"batches": 0}, "batches must be 1"),
        ({"lookahead": 0.0}, "lookahead must be above 0"),
        ({"by": "x"}, "cosine or lookahead"),
        ({"by": "lookahead"}, "need it measured"),
    ):
        with pytest.raises(PemlError, match=message):
            How(**settings)


def test_the_command_leaves_a_measurement(peml: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    path, out = write_recipe(tmp_path), tmp_path / "out"
    options = [
        "--output",
        out,
        "--warmup",
        "3",
        "--batches",
        "2",
        "--rows",
        "4",
        "--lookahead",
        "0.01",
        "--clusters",
        "2",
    ]
    code, said, _ = peml("affinity", path, *options)
    assert code == 0 and "cluster 1  size" in said and "cluster 2  color" in said and "warm-up" in said
    found = Affinity.load(out)
    assert found.tasks == ["size", "color"] and found.settings["adapter"] == {"adapter.r": 2}
    assert (
        found.seconds["total"] > 0
        and found.bill["training"]["steps"] == 3
        and next(iter(found.blocks)).endswith("layers.0")
    )
    assert np.allclose(np.diag(found.cosines), 1) and found.lookahead is not None
    code, _, errors = peml("affinity", path, "--output", out)
    assert code == 2 and "add --overwrite" in errors


def test_the_base_is_left_as_it_was(tmp_path: Path) -> None:
    from peml.training.workbench import prepare

    write_model(tmp_path / "model")
    whole = Recipe.model_validate(recipe(tmp_path))
    work = prepare(whole)
    before = {key: value.clone() for key, value in work.model.state_dict().items()}
    first, again = (find_affinity(whole, How(2, 1, 4), workbench=work) for _ in range(2))
    assert first.cosines == again.cosines
    assert before.keys() == work.model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in work.model.state_dict().items())
    with pytest.raises(PemlError, match="number of tasks, 2, not 3"):
        find_affinity(whole, How(clusters=3, warmup_steps=10**9), workbench=work)
    one = Recipe.model_validate(recipe(tmp_path, tasks=recipe(tmp_path)["tasks"][:1]))
    with pytest.raises(PemlError, match="this recipe has one, size"):
        find_affinity(one, How())


@pytest.mark.slow
def test_transfer_is_a_difference_of_scores(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    data = recipe(tmp_path, method="lora", set={"adapter.r": 2}, mixing={"by": "equal"})
    third = data["tasks"][0] | {"name": "third"}
    whole = Recipe.model_validate(data | {"tasks": [*data["tasks"], third], "train": data["train"] | {"max_steps": 6}})
    told: list[str] = []
    record = transfer(whole, tmp_path / "out", train, seeds=[0], leave_one_out=True, report=told.append)
    scores = record["scores"]
    assert len(told) == 7 and json.loads((tmp_path / "out" / "transfer.json").read_text()) == record
    for task in ("size", "color", "third"):
        assert record["transfer"][task]["mean"] == scores["all"][task][0] - scores[f"alone-{task}"][task][0]
        for other in {"size", "color", "third"} - {task}:
            wanted = scores["all"][task][0] - scores[f"without-{other}"][task][0]
            assert record["partners"][task][other] == {"mean": wanted, "spread": None, "by_seed": [wanted]}
    steps = {run: json.loads((tmp_path / "out" / f"{run}-0" / "metrics.json").read_text())["steps"] for run in scores}
    assert steps["all"] == 6 and steps["alone-size"] == 2 and steps["without-size"] == 4


def test_transfer_takes_no_scores_of_another_recipe(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    data = recipe(tmp_path, method="lora", set={"adapter.r": 2})
    # What saves and chooses checkpoints goes with a run of full length.
    chosen = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 1}
    whole = Recipe.model_validate(data | {"train": data["train"] | {"max_steps": 2} | chosen})
    record = transfer(whole, tmp_path / "out", train, seeds=[0])
    before = (tmp_path / "out" / "all-0" / "metrics.json").stat().st_mtime_ns
    again = transfer(whole, tmp_path / "out", train, seeds=[0], leave_one_out=True)
    assert again["scores"] == record["scores"] and record["partners"] == {}
    # Of two tasks the one is the other's only partner.
    own = again["transfer"]
    assert again["partners"] == {"size": {"color": own["size"]}, "color": {"size": own["color"]}}
    assert (tmp_path / "out" / "all-0" / "metrics.json").stat().st_mtime_ns == before
    other = whole.model_copy(update={"train": {**whole.train, "learning_rate": 1.0}})
    with pytest.raises(PemlError, match=r"all-0 was trained with another recipe \(train.learning_rate differs\)"):
        transfer(other, tmp_path / "out", train, seeds=[0])


def test_transfer_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    data = recipe(tmp_path)
    grouped = Recipe.model_validate(data | {"method": "lora", "set": {}, "regime": "one_plus_n"})
    with pytest.raises(PemlError, match="one_plus_n: leave it out"):
        transfer(grouped, tmp_path, train)
    epochs = {key: value for key, value in data["train"].items() if key != "max_steps"} | {"num_train_epochs": 1}
    with pytest.raises(PemlError, match=r"give train\.max_steps"):
        transfer(Recipe.model_validate(data | {"train": epochs}), tmp_path, train)
