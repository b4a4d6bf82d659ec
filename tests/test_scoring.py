"""Option scoring, greedy answers and whole evaluations, against one-by-one loops without any batching."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peml.errors import PemlError
from peml.evaluation import average, evaluate_tasks, generate_answers, score_choices
from peml.evaluation.scoring import log_likelihoods
from peml.tasks import Answers, Encoded, Example, FileSource, Task, encode_choices
from workshop import tiny_tokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "red",
    "blue",
    "green",
    "is",
    "it",
    "team",
    "yes",
    "no",
    "maybe",
    ":",
    "?",
]
LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(WORDS)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=4 + 2 * len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # large, so that predictions are far from uniform
        bos_token_id=0,
        eos_token_id=1,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


class Routed(nn.Module):
    """A model that insists on `tasks`, one per row, and hides which arguments its inner model takes."""

    def __init__(self, inner: LlamaForCausalLM) -> None:
        super().__init__()
        self.inner = inner
        self.generation_config = inner.generation_config
        self.calls: list[list[str]] = []

    def _note(self, tasks: list[str], input_ids: torch.Tensor) -> None:
        assert len(tasks) == len(input_ids)
        self.calls.append(tasks)

    def forward(self, *, input_ids: torch.Tensor, tasks: list[str], **kwargs: Any) -> Any:
        self._note(tasks, input_ids)
        assert "logits_to_keep" not in kwargs
        return self.inner(input_ids=input_ids, **kwargs)

    def generate(self, *, input_ids: torch.Tensor, tasks: list[str], **kwargs: Any) -> Any:
        self._note(tasks, input_ids)
        return self.inner.generate(input_ids=input_ids, **kwargs)


def questions(count: int = 13) -> list[Example]:
    """Prompts and options of many lengths."""
    made = []
    for n in range(count):
        prompt = " ".join(WORDS[(n * 5 + i * 3) % len(WORDS)] for i in range(1 + n % 9))
        choices = ("yes", "no", "the red cat") if n % 2 else ("maybe blue", "green is it")
        made.append(Example("odd" if n % 2 else "even", prompt, choices[n % 2], choices, f"rows:{n + 1}"))
    return made


def naive(model: LlamaForCausalLM, encodings: Sequence[Encoded]) -> list[float]:
    """Log-likelihoods of the labelled tokens: row by row, no padding, double precision."""
    double = deepcopy(model).double().eval()
    sums = []
    for encoded in encodings:
        with torch.no_grad():
            logs = double(input_ids=torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
        sums.append(float(sum(logs[i - 1, label] for i, label in enumerate(encoded.labels) if label != -100)))
    return sums


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("routed", [False, True])
def test_log_likelihoods_equal_a_naive_loop(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int, routed: bool
) -> None:
    examples = questions()
    flat = [e for group in encode_choices(tokenizer, examples, LENGTH) for e in group]
    truth = naive(model, flat)
    names = [e.task for e in examples for _ in e.choices] if routed else None
    scores = log_likelihoods(Routed(model) if routed else model, tokenizer, flat, names, batch_size=batch_size)
    assert scores == pytest.approx(truth, abs=2e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_best_choice_is_that_of_a_naive_loop(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, normalize: bool
) -> None:
    examples = questions()
    truth = []
    for example, group in zip(examples, encode_choices(tokenizer, examples, LENGTH), strict=True):
        scores = naive(model, group)
        if normalize:
            scores = [score / len(choice) for score, choice in zip(scores, example.choices, strict=True)]
        truth.append(scores.index(max(scores)))
    for batch_size in (1, 7):
        assert truth == score_choices(
            model,
            tokenizer,
            examples,
            max_length=LENGTH,
            batch_size=batch_size,
            tasks_kwarg=False,
            length_normalization=normalize,
        )
    assert len(set(truth)) > 1


def test_length_normalization_counts_bytes() -> None:
    from peml.evaluation.scoring import best_choice

    example = Example("t", "p", "é", ("é", "abc"), "o")
    assert best_choice(example, [-2.0, -3.5]) == 0
    assert best_choice(example, [-2.0, -3.5], length_normalization=True) == 0
    assert best_choice(example, [-2.0, -2.9], length_normalization=True) == 1
    assert best_choice(example, [-1.0, -1.0]) == 0  # the first of equals


def test_each_row_is_sent_with_its_task(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    routed, examples = Routed(model), questions(6)
    done: list[int] = []
    score_choices(routed, tokenizer, examples, max_length=LENGTH, batch_size=4, tasks_kwarg=True, progress=done.append)
    assert sorted(name for call in routed.calls for name in call) == ["even"] * 6 + ["odd"] * 9
    assert sum(done) == 15 and max(done) == 4


def naive_answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], count: int = 6) -> str:
    """Greedy continuation by whole forward passes, one token at a time."""
    new: list[int] = []
    model.eval()
    while len(new) < count:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token]):
            break
        new.append(token)
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], **kwargs: Any
) -> list[str]:
    given: dict[str, Any] = {"max_length": LENGTH, "max_new_tokens": 6, "batch_size": 5, "tasks_kwarg": False}
    return generate_answers(model, tokenizer, examples, **(given | kwargs))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_generated_answers_equal_a_naive_loop(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    examples = questions()
    truth = [naive_answer(model, tokenizer, tokenizer(e.prompt)["input_ids"]) for e in examples]
    assert answers(model, tokenizer, examples, batch_size=batch_size) == truth
    assert len(set(truth)) > 3


@pytest.mark.parametrize("stop", ["</s>", "\n"])
def test_an_answer_ends_at_the_end_token_or_the_line(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stop: str
) -> None:
    """The output layer is tilted so that some rows stop early and others do not."""
    token = tokenizer.convert_tokens_to_ids(stop)
    with torch.no_grad():
        model.lm_head.weight[token] *= 3
    examples = questions()
    truth = [naive_answer(model, tokenizer, tokenizer(e.prompt)["input_ids"]) for e in examples]
    found = answers(model, tokenizer, examples)
    assert found == truth and all(stop not in answer for answer in found)
    assert len({len(answer.split()) for answer in found}) > 1


def test_answers_of_several_lines_go_on_if_asked(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("\n")] *= 3
    lines = answers(model, tokenizer, questions(), one_line=False)
    assert [line.split("\n")[0] for line in lines] != lines
    seen = generated_by_evaluation(model, tokenizer, "red\nmat")
    assert "\n" in seen and "\n" not in generated_by_evaluation(model, tokenizer, "red mat")


def generated_by_evaluation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, answer: str) -> str:
    """What an evaluation lets the model write when the right answers look like `answer`."""
    examples = [Example("write", e.prompt, answer, (), e.origin) for e in questions()]
    written: list[str] = []

    def listen(name: str, given: Answers) -> float:
        written.extend(given.predictions)
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peml.evaluation.evaluate.compute", listen)
        evaluate_tasks(model, tokenizer, {"write": examples}, TASKS, max_length=LENGTH, batch_size=4, tasks_kwarg=False)
    return "|".join(written)


def test_the_models_own_sampling_settings_do_not_matter(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = answers(model, tokenizer, questions())
    model.generation_config.update(
        do_sample=True, temperature=2.0, top_k=3, num_beams=2, repetition_penalty=1.7, max_length=7
    )
    assert answers(model, tokenizer, questions()) == plain


def test_generation_is_sent_with_its_tasks_and_leaves_room(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    routed, examples = Routed(model), questions(7)
    done: list[int] = []
    found = answers(routed, tokenizer, examples, tasks_kwarg=True, progress=done.append)
    assert found == answers(model, tokenizer, examples) and done == [5, 2]
    assert sorted(name for call in routed.calls for name in call) == ["even"] * 4 + ["odd"] * 3
    long = questions(9)[8]
    ids = tokenizer(long.prompt)["input_ids"]
    assert len(ids) == 10
    cut = answers(model, tokenizer, [long], max_length=9, max_new_tokens=4)
    assert cut == [naive_answer(model, tokenizer, ids[:1] + ids[-4:], 4)]


@pytest.mark.parametrize("training", [True, False])
def test_every_module_keeps_its_mode(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, training: bool
) -> None:
    routed, examples = Routed(model), questions(3)
    routed.train(training)
    model.model.norm.train(not training)
    before = [module.training for module in routed.modules()]

    def score(tasks_kwarg: bool) -> list[int]:
        return score_choices(routed, tokenizer, examples, max_length=LENGTH, batch_size=2, tasks_kwarg=tasks_kwarg)

    assert score(True) == score(True)  # dropout was off
    assert answers(routed, tokenizer, examples, tasks_kwarg=True) == answers(model, tokenizer, examples)
    with pytest.raises(TypeError, match="tasks"):  # also after a failure
        score(False)
    assert [module.training for module in routed.modules()] == before
    assert torch.is_grad_enabled()


def test_examples_without_choices_cannot_be_scored(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example("t", "the cat", "red", (), "rows:3")
    with pytest.raises(PemlError, match="rows:3: task 't' has no choices to score"):
        score_choices(model, tokenizer, [example], max_length=LENGTH, batch_size=2, tasks_kwarg=False)


# --------------------------------------------------------------------------------------- whole evaluations


def task(name: str, **fields: Any) -> Task:
    given: dict[str, Any] = {
        "kind": "choose",
        "prompt": "{{ p }}",
        "answer": "a",
        "source": FileSource(train="rows.jsonl"),
    }
    return Task(name=name, **(given | fields))


TASKS = {
    "odd": task("odd", choices=("yes", "no", "the red cat"), metrics=("macro_f1", "accuracy")),
    "even": task("even", choices="options"),
    "write": task("write", kind="generate", max_new_tokens=3),
}


def by_task() -> dict[str, list[Example]]:
    examples = questions()
    groups = {name: [e for e in examples if e.task == name] for name in ("odd", "even")}
    return groups | {"write": [Example("write", e.prompt, "red mat", (), e.origin) for e in examples[:5]]}


@pytest.mark.parametrize("routed", [False, True])
def test_an_evaluation_has_metrics_size_and_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, routed: bool
) -> None:
    groups = by_task()
    with Progress(disable=True) as progress:
        results = evaluate_tasks(
            Routed(model) if routed else model,
            tokenizer,
            groups,
            TASKS,
            max_length=LENGTH,
            batch_size=4,
            tasks_kwarg=routed,
            progress=progress,
        )
        assert [line.description for line in progress.tasks] == ["odd", "even", "write"]
        assert progress.finished
    assert [list(values) for values in results.values()] == [
        ["macro_f1", "accuracy", "score", "n", "loss"],
        ["accuracy", "score", "n", "loss"],
        ["exact_match", "score", "n", "loss"],
    ]
    for name, examples in groups.items():
        right = [
            group[e.choices.index(e.answer) if e.choices else 0]
            for e, group in zip(examples, encode_choices(tokenizer, examples, LENGTH), strict=True)
        ]
        tokens = sum(label != -100 for encoded in right for label in encoded.labels)
        assert results[name]["loss"] == pytest.approx(-sum(naive(model, right)) / tokens, abs=1e-4)
        assert results[name]["n"] == len(examples)
    picked = score_choices(model, tokenizer, groups["even"], max_length=LENGTH, batch_size=3, tasks_kwarg=False)
    hits = [e.choices[i] == e.answer for e, i in zip(groups["even"], picked, strict=True)]
    assert results["even"]["accuracy"] == sum(hits) / len(hits)
    first = [results["odd"]["macro_f1"], results["even"]["accuracy"], results["write"]["exact_match"]]
    assert average(results, TASKS) == pytest.approx(sum(first) / 3)


def test_evaluations_without_sense_are_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def run(groups: dict[str, list[Example]], tasks: dict[str, Task] = TASKS) -> None:
        evaluate_tasks(model, tokenizer, groups, tasks, max_length=LENGTH, batch_size=4, tasks_kwarg=False)

    with pytest.raises(PemlError, match="task 'odd' has no examples to evaluate on"):
        run({"odd": []})
    with pytest.raises(PemlError, match="task 'other' has examples but is not among the tasks odd, even, write"):
        run({"other": questions(1)})
    with pytest.raises(PemlError, match="no results to average"):
        average({}, TASKS)
    words = task("write", kind="generate", metrics=("pearson",))
    with pytest.raises(PemlError, match="task 'write': a correlation needs answers that are numbers, not 'red mat'"):
        run({"write": by_task()["write"]}, {"write": words})


@pytest.mark.data
def test_a_real_model_prefers_sense_and_writes_a_story(shared_path: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_path("models/stories3M-hf")
    real = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    its = AutoTokenizer.from_pretrained(path, local_files_only=True)
    examples = [
        Example("t", "Once upon a", "time", ("cat", "time", "Tim and the"), "o:1"),
        Example("t", "The sun was very hot. Tom drank some cold", "water", ("water", "stone"), "o:2"),
    ]
    assert score_choices(real, its, examples, max_length=64, batch_size=4, tasks_kwarg=False) == [1, 0]
    start = [
        Example("t", "Once upon a time", "x", (), "o:1"),
        Example("t", "One day, a big dog", "x", (), "o:2"),
    ]
    both = generate_answers(real, its, start, max_length=64, max_new_tokens=10, batch_size=2, tasks_kwarg=False)
    alone = [
        generate_answers(real, its, [e], max_length=64, max_new_tokens=10, batch_size=1, tasks_kwarg=False)[0]
        for e in start
    ]
    assert both == alone and both[0].startswith(", there was a little girl named Lily")
