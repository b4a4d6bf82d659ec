"""Models that answer in other ways than by going on: encoder-decoders write, encoders have heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

import peml
from peml import PemlError
from peml.evaluation import evaluate_tasks, generate_answers
from peml.evaluation.scoring import log_likelihoods
from peml.regimes import train
from peml.tasks import Example
from peml.tasks.encode_heads import encode_heads
from peml.tasks.encode_seq2seq import encode_seq2seq, encode_seq2seq_choices
from peml.training.data import Collator, TaskRows, call_of
from peml.training.folder import RunFolder
from peml.training.loss import balanced, by_task, row_counts, row_losses
from peml.training.probing import INVERSE_STRENGTHS, probe_heads
from peml.training.recipe import load_recipe
from peml.training.run import open_run
from peml.training.trainer import MultiTaskTrainer
from peml.training.workbench import form_of, prepare
from workshop import recipe, rows, tiny_tokenizer

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Texts end with the end token, and nothing stands in front."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.pad_token = "<unk>"
    return tokenizer


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0,
        decoder_start_token_id=2, pad_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def write_t5(folder: Path) -> Path:
    t5().save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    return folder


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """A token in front of and behind every text, and a segment for each."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.pad_token = "<unk>"
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def write_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=2, **SMALL)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def example(prompt: str, answer: str, task: str = "size", **more: Any) -> Example:
    return Example(task, prompt, answer, more.pop("choices", ("yes", "no")), "here:1", **more)


EXAMPLES = {
    "size": [example("big red cat big ?", "yes"), example("small blue dog big ?", "no")],
    "color": [example("big red cat color :", "red cat tree", "color", choices=())],
}


def test_the_loss_of_an_encoder_decoder_is_its_own() -> None:
    tokenizer, base = t5_tokenizer(), t5()
    data = TaskRows.encode(tokenizer, EXAMPLES, 16, "seq2seq")
    batch = Collator(2, "seq2seq")([data[i] for i in range(3)])
    assert batch["tasks"] == [0, 0, 1] and "input_mask" not in batch
    model = get_peft_model(base, peml.PemlConfig(task_names=["size", "color"], adapter=peml.LoRA(r=2)))
    logits = model(**call_of("seq2seq", base, batch)).logits
    sums, counts = (
        by_task(values, batch["tasks"], 2)
        for values in (row_losses("seq2seq", logits, batch["labels"]), row_counts("seq2seq", batch["labels"]))
    )
    assert counts.tolist() == [4, 4]  # an answer of one word and the end, twice; of three words and the end
    loss = balanced("task_mean", sums, counts)
    own = []
    for name in ("size", "color"):
        picked = [i for i, task in enumerate(batch["tasks"]) if data.task_names[task] == name]
        given = {key: batch[key][picked] for key in ("input_ids", "attention_mask", "labels")}
        own.append(model(**given, tasks=name).loss)
    torch.testing.assert_close(loss, torch.stack(own).mean())


@pytest.mark.parametrize("form", ["heads", "seq2seq"])
def test_labels_are_smoothed_whatever_answers(tmp_path: Path, form: Any) -> None:
    tokenizer, base, heads = t5_tokenizer(), t5(), None
    if form == "heads":
        config = BertConfig(vocab_size=len(bert_tokenizer()), pad_token_id=2, **SMALL)
        tokenizer, base, heads = bert_tokenizer(), BertModel(config), peml.Heads((2,))
    config = peml.PemlConfig(task_names=["size"], adapter=peml.LoRA(r=2), heads=heads)
    data = TaskRows.encode(tokenizer, {"size": EXAMPLES["size"]}, 16, form)
    trainer = MultiTaskTrainer(
        get_peft_model(base, config).eval(),
        TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True),
        train_dataset=data,
    )
    batch = Collator(2, form)([data[i] for i in range(2)])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    targets = batch["labels"].long().flatten()
    wanted = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, -2), targets, label_smoothing=0.2)
    torch.testing.assert_close(loss, wanted)


@torch.no_grad()
def test_choices_of_an_encoder_decoder_are_scored_as_its_loss_says() -> None:
    tokenizer, base = t5_tokenizer(), t5()
    flat = [encoded for group in encode_seq2seq_choices(tokenizer, EXAMPLES["size"], 16) for encoded in group]
    scores = log_likelihoods(base, tokenizer, flat, None, batch_size=3, form="seq2seq")
    for encoded, score in zip(flat, scores, strict=True):
        labels = torch.tensor([encoded.labels])
        loss = base(input_ids=torch.tensor([encoded.input_ids]), labels=labels).loss
        assert score == pytest.approx(-float(loss) * labels.numel(), rel=1e-5)


@torch.no_grad()
def test_an_encoder_decoder_writes_as_it_does_row_by_row() -> None:
    tokenizer, base = t5_tokenizer(), t5()
    examples = [example(p, "red", "color", choices=()) for p in ("big", "small blue dog color :", "red cat")]
    found = generate_answers(
        base, tokenizer, examples, max_length=16, max_new_tokens=5, batch_size=3, tasks_kwarg=False, form="seq2seq"
    )
    for one, answer in zip(examples, found, strict=True):
        ids = base.generate(**tokenizer(one.prompt, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        assert tokenizer.decode(ids[0, 1:], skip_special_tokens=True).split("\n")[0].strip() == answer


def test_settings_for_summaries_do_not_change_an_answer() -> None:
    tokenizer, base = t5_tokenizer(), t5()
    for parameter in base.parameters():
        parameter.data.mul_(2)

    def answers() -> list[str]:
        examples = [example(p, "red", "color", choices=()) for p in ("big", "small blue dog color :")]
        return generate_answers(
            base, tokenizer, examples, max_length=16, max_new_tokens=8, batch_size=2, tasks_kwarg=False, form="seq2seq"
        )

    plain = answers()
    assert plain[0] == "big" * 8
    for name, value in (
        ("no_repeat_ngram_size", 1),
        ("encoder_no_repeat_ngram_size", 1),
        ("encoder_repetition_penalty", 5.0),
    ):
        setattr(base.generation_config, name, value)
        assert answers() == plain
    for parameter in base.parameters():
        parameter.data.zero_()
    base.lm_head.weight.data[1] = 1.0
    base.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(1), len(tokenizer)).float())
    base.generation_config.min_length = 6
    assert answers() == ["", ""]


def test_a_long_text_loses_its_beginning_and_a_long_answer_is_refused() -> None:
    tokenizer = t5_tokenizer()
    long = example("big small red blue cat dog", "tree", choices=())
    (encoded,) = encode_seq2seq(tokenizer, [long], 4)
    assert tokenizer.decode(encoded.input_ids) == " blue cat dog</s>" and encoded.truncated
    with pytest.raises(PemlError, match=r"here:1: task 'size': an answer of 4 tokens does not fit `max_length` 3"):
        encode_seq2seq(tokenizer, [example("big", "red blue cat", choices=())], 3)


def settings(folder: Path, kind: str, **changes: Any) -> Path:
    """A recipe for an encoder (`bert`) or an encoder-decoder (`t5`), with its files."""
    data = recipe(folder)
    (write_bert if kind == "bert" else write_t5)(folder / "model")
    size, color = data["tasks"]
    if kind == "bert":
        color |= {"kind": "classify", "choices": ["blue", "red"], "texts": ["{{ text }}", "color ?"]}
        color.pop("max_new_tokens")
        count = {**size, "name": "count", "kind": "regress", "answer": "{{ text | length }}"}
        count.pop("choices")
        count.pop("labels")
        data["tasks"] = [size, color, count]
        # Heads begun as regressions have nothing left to learn of these rows.
        data["train"] |= {"probe_rows": 0, "head_learning_rate": 1e-2}
    data |= {"method": "mtl-lora", "set": {"adapter.r": 4}}
    data["train"] |= {"learning_rate": 1e-2, "max_steps": 60, "save_steps": 30}
    data |= changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_recipe_trains_an_encoder_and_an_encoder_decoder(tmp_path: Path, kind: str) -> None:
    folder = train(settings(tmp_path, kind), tmp_path / "run")
    metrics = folder.read_metrics()
    assert ("before" in metrics) == (kind == "t5")
    assert metrics["after"]["size"]["accuracy"] > 0.8
    losses = metrics["train_loss"]["size"]
    assert losses["last"] < losses["first"] / 2
    bench, model = open_run(folder.path)
    assert form_of(bench.model) == {"bert": "heads", "t5": "seq2seq"}[kind]
    assert bench.evaluate(model) == metrics["after"]
    if kind == "bert":
        assert metrics["parameters"]["heads"] == 3 * 2 * (2 * 24 + 1)
        assert metrics["after"]["count"]["pearson"] > 0.5
        config = model.peft_config["default"]
        lengths = [len(row["text"]) for row in rows(60, seed=1)]
        assert config.heads.num_labels == (2, 2, 1)
        assert config.heads.means[2] == pytest.approx(sum(lengths) / 60)


def test_heads_begin_as_regressions_on_what_the_encoder_says(tmp_path: Path) -> None:
    path = settings(tmp_path, "bert", set={"adapter.r": 2, "heads.pairs": "joined"})
    bench = prepare(load_recipe(path))
    model = get_peft_model(bench.model, bench.config()).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    object.__setattr__(bench.recipe, "train", bench.recipe.train | {"probe_rows": 60})
    assert model.peft_config["default"].heads.layers == (1, 2)
    probe_heads(model, bench, ["size", "count"])
    for name, examples in bench.train.items():
        rows = encode_heads(bench.tokenizer, examples, bench.max_length)
        with torch.no_grad():
            outputs = [model(input_ids=torch.tensor([row.input_ids]), tasks=name) for row in rows]
        features = torch.cat([output.features for output in outputs]).double().numpy()
        logits = torch.cat([output.logits for output in outputs]).double()
        targets = [row.target for row in rows]
        if name == "size":
            fitted = [make_pipeline(StandardScaler(), LogisticRegression(C=c)) for c in INVERSE_STRENGTHS]
            wanted = [torch.from_numpy(one.fit(features, targets).predict_log_proba(features)) for one in fitted]
            found = logits.log_softmax(1)
            chosen = min(range(len(wanted)), key=lambda i: float((wanted[i] - found).abs().max()))
            # Features that tell the classes apart want little strength.
            assert INVERSE_STRENGTHS[chosen] == max(INVERSE_STRENGTHS)
            wanted = wanted[chosen]
            torch.testing.assert_close(logits.log_softmax(1), wanted, rtol=1e-3, atol=1e-4)
        elif name == "count":
            alphas = [1 / strength for strength in INVERSE_STRENGTHS]
            fitted = make_pipeline(StandardScaler(), RidgeCV(alphas)).fit(features, targets)
            wanted = torch.from_numpy(fitted.predict(features))
            # Penalised in units of the scale, which moves nothing but the penalty's unit.
            torch.testing.assert_close(logits[:, 0], wanted, rtol=1e-3, atol=1e-3)
        else:
            at = list(bench.tasks).index(name)
            heads = model.base_model.heads
            assert torch.equal(heads.weight[at], before["base_model.model.head_host.peml_head.default.weight"][at])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("head_host" in name for name in changed)


def test_a_recipe_reads_pairs_apart_where_the_tokenizer_tells_them_apart(tmp_path: Path) -> None:
    path = settings(tmp_path, "bert", set={"adapter.r": 4, "heads.pairs": "apart"})
    with pytest.raises(PemlError, match=r"set.heads.pairs cannot be apart: the tokenizer of .* use joined"):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    names = tmp_path / "model" / "tokenizer_config.json"
    kept = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    names.write_text(json.dumps(json.loads(names.read_text()) | kept))
    run = train(path, tmp_path / "run")
    bench, model = open_run(run.path)
    assert run.read_metrics()["after"]["color"]["accuracy"] > 0.8
    assert bench.evaluate(model) == run.read_metrics()["after"]
    assert model.base_model.heads.weight.shape == (3, 2, 2 * 4 * 24)


def test_heads_resume_bit_for_bit(tmp_path: Path) -> None:
    path = settings(tmp_path, "bert", method="peml", set=recipe(tmp_path)["set"] | {"heads.hidden": True})
    whole = train(path, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    for name in ("recipe.yaml", "log.jsonl"):
        (tmp_path / "cut" / name).write_bytes((whole.path / name).read_bytes())
    shutil.copytree(whole.checkpoints / "checkpoint-30", tmp_path / "cut" / "checkpoints" / "checkpoint-30")
    train(path, tmp_path / "cut", resume=True)
    first, second = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (whole.path, tmp_path / "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_pairs_are_joined_by_the_tokenizer_and_prompts_stand_alone() -> None:
    tokenizer = bert_tokenizer()
    pair = example("", "no", texts=("big red cat", "small dog"))
    single = example("one ? big", "yes")
    first, second, third = encode_heads(tokenizer, [pair, single, pair], 16)
    joined = tokenizer("big red cat", "small dog")
    assert first.input_ids == third.input_ids == joined["input_ids"]
    assert first.token_type_ids == joined["token_type_ids"] and first.target == 1.0 and not first.truncated
    assert second.input_ids == tokenizer("one ? big")["input_ids"] and second.target == 0.0
    cut = encode_heads(tokenizer, [pair, single], 6)
    assert tokenizer.decode(cut[0].input_ids) == "<s>big red</s>small</s>" and cut[0].truncated
    assert tokenizer.decode(encode_heads(tokenizer, [single], 4)[0].input_ids) == "<s> ? big</s>"
    with pytest.raises(PemlError, match="`max_length` 3 is too small"):
        encode_heads(tokenizer, [pair], 3)


def test_what_an_encoder_cannot_answer_is_said_before_anything_is_written(tmp_path: Path) -> None:
    path = settings(tmp_path, "bert")
    data = yaml.safe_load(path.read_text())
    data["tasks"][1] = recipe(tmp_path)["tasks"][1]
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(PemlError, match="task 'color' writes its answers, but the model is an encoder"):
        train(path, tmp_path / "run")
    path = settings(tmp_path, "t5", set={"heads.hidden": True})
    with pytest.raises(PemlError, match="set.heads is for encoders"):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def added(folder: Path, **changes: Any) -> Path:
    """A file with one task more."""
    task = recipe(folder)["tasks"][0] | {"name": "small", "prompt": "{{ text }} small ?"} | changes
    task["labels"] = {True: "no", False: "yes"}
    path = folder / "new.yaml"
    path.write_text(yaml.safe_dump({"tasks": [task], "train": {"max_steps": 20}}), encoding="utf-8")
    return path


@pytest.mark.parametrize("method", ["mtl-lora", "lora"])
def test_a_task_added_to_an_encoder_leaves_the_others_bit_equal(tmp_path: Path, method: str) -> None:
    changes = {} if method == "mtl-lora" else {"set": {"adapter.r": 2}}
    run = train(settings(tmp_path, "bert", method=method, **changes), tmp_path / "run")
    _, before = open_run(run.path)
    grown = peml.train(peml.regimes.grown_recipe(run.path, added(tmp_path), "shared"), tmp_path / "grown")
    bench, after = open_run(grown.path)
    assert list(bench.tasks) == ["size", "color", "count", "small"]
    batch = bert_tokenizer()(["big red cat", "small dog", "blue tree"], return_tensors="pt", padding=True)
    names = ["count", "size", "color"]
    with torch.no_grad():
        first, second = (model(**batch, tasks=names).logits for model in (before, after))
    assert torch.equal(first, second[:, : first.shape[1]])
    old, new = (RunFolder(folder.path).read_metrics() for folder in (run, grown))
    for name in ("size", "color", "count"):
        assert old["after"][name] == new["after"][name]
    assert new["train_loss"]["small"]["last"] < new["train_loss"]["small"]["first"]
    assert new["data"]["rows"]["small"][0] == 60 and new["data"]["rows"]["size"][0] == 0


@pytest.mark.parametrize("method", ["mtl-lora", "single-task", "prefix"])
def test_a_task_added_to_a_language_model_leaves_the_others_bit_equal(tmp_path: Path, method: str) -> None:
    from workshop import write_recipe

    own = {"adapter.r": 2} if method != "prefix" else {"prompt.num_virtual_tokens": 3, "prompt.per_task": True}
    run = train(write_recipe(tmp_path, method=method, set=own), tmp_path / "run")
    _, before = open_run(run.path)
    path = added(tmp_path)
    whole = peml.regimes.grown_recipe(run.path, path, "shared")
    grown = peml.train(whole, tmp_path / "grown")
    with pytest.raises(PemlError, match="already holds files"):
        peml.train(whole, tmp_path / "grown")
    assert peml.train(whole, tmp_path / "grown", resume=True).finished
    assert load_recipe(grown.recipe).how.run == str(run.path)
    _, after = open_run(grown.path)
    ids = torch.randint(3, 20, (2, 6))
    with torch.no_grad():
        first, second = (model(input_ids=ids, tasks=["color", "size"]).logits for model in (before, after))
        assert torch.equal(first, second)
        fresh = model_of(whole, before, ids)
        assert not torch.equal(after(input_ids=ids, tasks="small").logits, fresh)


def model_of(whole: Any, before: Any, ids: torch.Tensor) -> torch.Tensor:
    """Outputs of the new task before it is trained."""
    before.base_model.add_task("small")
    return before(input_ids=ids, tasks="small").logits


def test_growing_says_what_is_wrong(tmp_path: Path) -> None:
    from workshop import write_recipe

    run = train(write_recipe(tmp_path, method="lora", set={"adapter.r": 2}), tmp_path / "run")
    grown = peml.regimes.grown_recipe
    with pytest.raises(PemlError, match="all parameters of this adapter are shared"):
        peml.train(grown(run.path, added(tmp_path), "shared"), tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
    both = peml.train(grown(run.path, added(tmp_path), "none"), tmp_path / "grown")
    assert set(both.read_metrics()["train_loss"]) == {"size", "color", "small"}
    with pytest.raises(PemlError, match="'size' is there twice"):
        grown(run.path, added(tmp_path, name="size"), "shared")
    with pytest.raises(PemlError, match="regime.freeze: input should be 'shared' or 'none'|regime: freeze"):
        grown(run.path, added(tmp_path), "all")
    with pytest.raises(PemlError, match='init must be "identity", "mean" or "copy:TASK"'):
        peml.train(grown(run.path, added(tmp_path), "shared", "zero"), tmp_path / "other")
    (tmp_path / "new.yaml").write_text("method: peml\ntasks: []\n")
    with pytest.raises(PemlError, match=r"new.yaml: method cannot change when tasks are added"):
        grown(run.path, tmp_path / "new.yaml", "shared")
    for text, message in (
        ("tasks:\n", "tasks must be a list, not None"),
        ("tasks: {name: new}\n", "tasks must be a list, not {'name': 'new'}"),
        ("tasks: []\ntrain: 5\n", "train must be a mapping, not 5"),
    ):
        (tmp_path / "new.yaml").write_text(text)
        with pytest.raises(PemlError, match=f"new.yaml: {message}"):
            grown(run.path, tmp_path / "new.yaml", "shared")
    with pytest.raises(PemlError, match="there is no recipe .*nothing.yaml"):
        grown(run.path, tmp_path / "nothing.yaml", "shared")
    with pytest.raises(PemlError, match="is not a folder"):
        grown(tmp_path / "nowhere", added(tmp_path), "shared")
    with pytest.raises(PemlError, match="is the run that is grown"):
        peml.train(grown(run.path, added(tmp_path), "none"), run.path)


@pytest.mark.parametrize("freeze", ["shared", "none"])
def test_a_run_with_sources_grows_by_what_its_adapter_has(tmp_path: Path, freeze: str) -> None:
    from workshop import write_recipe

    size, color = recipe(tmp_path)["tasks"]
    regime = {"name": "distil_then_adapt", "sources": ["size", "color"], "targets": ["third"], "shots": 20}
    tasks = [size, color, size | {"name": "third"}]
    short = recipe(tmp_path)["train"] | {"max_steps": 2}
    own = {"prompt.num_virtual_tokens": 3}
    path = write_recipe(tmp_path, method="mpt", set=own, tasks=tasks, regime=regime, train=short)
    run = peml.train(path, tmp_path / "run")
    grown = peml.train(peml.regimes.grown_recipe(run.path, added(tmp_path), freeze), tmp_path / "grown")
    counts = {"third": [20 if freeze == "none" else 0, 20], "small": [60, 20]}
    assert grown.read_metrics()["data"]["rows"] == counts


def test_a_grown_run_may_be_counted_in_epochs(tmp_path: Path) -> None:
    run = train(settings(tmp_path, "bert"), tmp_path / "run")
    path = added(tmp_path)
    new = yaml.safe_load(path.read_text())
    new["train"] = {"num_train_epochs": 2}
    length = new["tasks"][0] | {"name": "length", "kind": "regress", "answer": "{{ text | length }}"}
    new["tasks"] = [{key: length[key] for key in length if key not in ("choices", "labels")}]
    path.write_text(yaml.safe_dump(new))
    whole = peml.regimes.grown_recipe(run.path, path, "shared")
    grown = peml.train(whole, tmp_path / "grown")
    log = [yaml.safe_load(line) for line in (grown.path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2 * 8  # 60 rows in batches of 8
    heads = open_run(grown.path)[1].peft_config["default"].heads
    assert heads.num_labels == (2, 2, 1, 1) and heads.scale_of(3) == heads.scale_of(2) != (0.0, 1.0)


def test_evaluation_of_heads_counts_and_scores(tmp_path: Path) -> None:
    run = train(settings(tmp_path, "bert"), tmp_path / "run")
    bench, model = open_run(run.path)
    found = evaluate_tasks(model, bench.tokenizer, bench.eval, bench.tasks, max_length=32, batch_size=7, form="heads")
    for name, examples in bench.eval.items():
        right, total = 0, 0.0
        for row in examples:
            (encoded,) = encode_heads(bench.tokenizer, [row], 32)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([encoded.input_ids]), tasks=name).logits[0]
            if row.choices:
                right += row.choices[int(logits[: len(row.choices)].argmax())] == row.answer
                total -= float(logits[: len(row.choices)].log_softmax(0)[row.choices.index(row.answer)])
        if bench.tasks[name].choices:
            assert found[name]["accuracy"] == right / len(examples)
            assert found[name]["loss"] == pytest.approx(total / len(examples), rel=1e-5)
