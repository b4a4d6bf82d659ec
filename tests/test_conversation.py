"""Conversations: rows as TRL has them, and the chat template in training, scoring and generation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from chat import CHATML, INSTRUCT, OPEN_THOUGHT, PLAIN, TEMPLATES, chat_tokenizer
from peml.errors import PemlError
from peml.evaluation import generate_answers, score_choices
from peml.tasks import IGNORED, Example, FileSource, Task, encode, encode_all, encode_choices, encode_prompts
from peml.training.recipe import Recipe
from workshop import write_rows

TURNS = (("system", "Be short."), ("user", "How are you?"), ("assistant", "Well."), ("user", "And the cat?"))


def task(**fields: Any) -> Task:
    return Task(**({"name": "talk", "kind": "generate", "source": FileSource(train="talk.jsonl")} | fields))


def read(row: dict[str, Any], **fields: Any) -> Example:
    return task(**fields).example(row, "talk.jsonl:3")


def said(turns: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def talk(turns: Any = TURNS, answer: str = "Fine.", choices: tuple[str, ...] = ()) -> Example:
    return Example("talk", "...", answer, choices, "talk.jsonl:3", turns=tuple(turns))


# ---------------------------------------------------------------------------------------------------- rows


def test_the_last_turn_is_the_answer() -> None:
    whole = (*TURNS, ("assistant", " Fine. "))
    for row in (
        {"messages": said(whole)},
        {"prompt": said(TURNS), "completion": said(whole[-1:])},
        {"prompt": said(TURNS), "completion": said(whole[-1:]), "messages": "ignored"},
        {"prompt": "of another kind", "messages": said(whole), "tools": None},
    ):
        example = read(row)
        assert (example.turns, example.answer) == (TURNS, "Fine.")
        assert example.prompt == "system: Be short.\nuser: How are you?\nassistant: Well.\nuser: And the cat?"
    assert read({"messages": said((*TURNS[1:2], whole[-1]))}).prompt == "How are you?"


def test_plain_prompt_and_completion_are_a_plain_example() -> None:
    example = read({"prompt": "2 + 2 = ", "completion": " 4\n"})
    assert (example.prompt, example.answer, example.turns) == ("2 + 2 =", "4", ())
    assert read({"prompt": "2 + 2 =", "completion": "4"}, chat=True).turns == (("user", "2 + 2 ="),)


def test_answers_of_conversations_are_chosen_and_measured_as_others() -> None:
    row = {"messages": said((("user", "Is it?"), ("assistant", "1")))}
    example = read(row, kind="choose", choices=("no", "yes"), labels={"1": "yes"})
    assert (example.answer, example.choices) == ("yes", ("no", "yes"))
    with pytest.raises(PemlError, match=r"talk.jsonl:3: task 'talk': the answer '1' is not among"):
        read(row, kind="choose", choices=("no", "yes"))
    assert read(row, kind="regress").value == 1.0


def test_a_template_becomes_a_users_turn() -> None:
    fields = {"prompt": "Say {{ x }}\n", "answer": "y"}
    assert read({"x": "hi", "y": "ho"}, **fields, chat=True).turns == (("user", "Say hi"),)
    assert read({"x": "hi", "y": "ho"}, **fields).turns == ()


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "the row has neither `messages` nor `prompt` and `completion`, .* its fields are: text"),
        ({"messages": []}, "`messages` must be a list of turns, .* not an empty list"),
        ({"messages": "a"}, "`messages` must be a list of turns, .* not a str"),
        ({"messages": None}, "`messages` must be a list of turns, .* not a NoneType"),
        ({"messages": [USER]}, "the last turn must be the assistant's, which is the answer, not the user's"),
        ({"messages": [USER, USER, ASSISTANT]}, "turn 2 must be the assistant's, not the user's"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "turn 1 must be the user's, not the assistant's"),
        ({"messages": [ASSISTANT]}, "turn 1 must be the user's"),
        ({"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]}, "turn 2 must be the assistant's"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "turn 1 has the role 'bot'; only texts of system, user, ass"),
        ({"messages": [USER, {"role": "tool", "content": "a"}, ASSISTANT]}, "turn 2 has the role 'tool'; only texts"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [1]}]}, "turn 2 has tool calls; only texts of"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "turn 2: `content` is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "turn 2: `content` must be a text, not a None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]},
            "`content` must be a text, not a l",
        ),
        ({"messages": [{"from": "human", "value": "a"}]}, "turn 1 must be an object with `role` and `content`"),
        ({"messages": ["a"]}, "turn 1 must be an object with `role` and `content`"),
        ({"messages": [USER, ASSISTANT], "tools": [{}]}, "`tools` are not supported"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "must both be texts, or both be lists of turns"),
        ({"prompt": [USER], "completion": [ASSISTANT, USER]}, "`completion` must be one turn of the assistant, not 2"),
        ({"prompt": [USER], "completion": []}, "`completion` must be a list of turns"),
        ({"prompt": " ", "completion": "a"}, "`prompt` is empty"),
        ({"prompt": "a", "completion": "\n"}, "`completion` is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ASSISTANT]}, "`prompt` has half of a surrogate pair"),
    ],
)
def test_bad_conversations_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PemlError, match=rf"^talk\.jsonl:3: task 'talk': .*{message}"):
        read(row)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(PemlError, match=r"the row is a conversation, .* leave out `chat: false`"):
        read({"messages": [USER, ASSISTANT]}, chat=False)
    with pytest.raises(
        PemlError, match=r"task 'talk': `answer` is missing: give both `prompt` and `answer`, or neither"
    ):
        task(prompt="{{ x }}")


# ------------------------------------------------------------------------------------------------- token ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_ids_are_the_chat_templates_own(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    encoded = encode(tokenizer, talk(), 400)
    whole = tokenizer.apply_chat_template(said((*TURNS, ("assistant", "Fine."))), tokenize=True)["input_ids"]
    begun = tokenizer.apply_chat_template(said(TURNS), add_generation_prompt=True, enable_thinking=False)["input_ids"]
    answered = tokenizer.decode([i for i in encoded.labels if i != IGNORED])
    assert not encoded.truncated and tokenizer.bos_token_id not in encoded.input_ids[1:]
    if name == "open thought":  # the answer goes where generation begins
        assert encoded.input_ids[: len(begun)] == begun and answered == "Fine.<|im_end|>"
    elif name == "plain":  # nothing ends a turn, so the tokenizer's end token does
        assert encoded.input_ids == [*whole[:-1], tokenizer.eos_token_id] and answered == " Fine.</s>"
    else:
        rest = tokenizer.decode(whole[len(encoded.input_ids) :])
        assert encoded.input_ids == whole[: len(encoded.input_ids)] and not rest.strip()
        assert answered == (" Fine. </s>" if name == "instruct" else "Fine.<|im_end|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_scoring_and_generation_agree(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    trained = encode(tokenizer, talk(), 400)
    (prompt,) = encode_prompts(tokenizer, [talk()], 400, 8)
    context = [i for i, label in zip(trained.input_ids, trained.labels, strict=True) if label == IGNORED]
    assert prompt.input_ids == context
    right, wrong = encode_choices(tokenizer, [talk(choices=("Fine.", "Ill."))], 400)[0]
    assert right.input_ids == trained.input_ids[: len(right.input_ids)]
    assert right.labels == trained.labels[: len(right.labels)]
    assert wrong.input_ids[: len(context)] == context
    assert tokenizer.decode([i for i in wrong.labels if i != IGNORED]).strip() == "Ill."
    chosen = encode(tokenizer, talk(choices=("Fine.", "Ill.")), 400)
    assert chosen == right, "a choice is trained as it is scored"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_conversation_keeps_its_system_turn_and_its_answer(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    example = talk([TURNS[0], ("user", "word " * 40 + "end?")])
    whole = encode(tokenizer, example, 1000)
    cut = encode(tokenizer, example, len(whole.input_ids) - 50)
    assert len(cut.input_ids) == len(whole.input_ids) - 50 and cut.truncated
    head = tokenizer.decode(whole.input_ids).index("word")
    assert tokenizer.decode(cut.input_ids)[:head] == tokenizer.decode(whole.input_ids)[:head]
    assert "Be short." in tokenizer.decode(cut.input_ids[:head])
    assert tokenizer.decode(cut.input_ids)[head:] == tokenizer.decode(whole.input_ids)[head + 50 :]
    assert [i for i in cut.labels if i != IGNORED] == [i for i in whole.labels if i != IGNORED]
    (prompt,) = encode_prompts(tokenizer, [example], len(whole.input_ids) - 50, 10)
    assert len(prompt.input_ids) == len(whole.input_ids) - 60 and prompt.truncated


def test_an_answer_that_does_not_fit_is_refused_not_cut() -> None:
    tokenizer = chat_tokenizer()
    with pytest.raises(PemlError, match=r"talk.jsonl:3: .* 31 tokens of answer .* `max_length` 40; raise it"):
        encode(tokenizer, talk(answer="x" * 30), 40)


def test_a_text_that_occurs_in_the_system_turn_too_is_found_behind_it() -> None:
    tokenizer = chat_tokenizer()
    example = talk([("system", "aaa aaa"), ("user", "aaa"), ("assistant", "b"), ("user", "c" * 90)])
    cut = encode(tokenizer, example, 80)
    assert "aaa aaa" in tokenizer.decode(cut.input_ids)


def test_plain_and_conversation_mix_in_one_call() -> None:
    tokenizer = chat_tokenizer(CHATML)
    plain = replace(talk(), turns=(), prompt="Hello")
    both = encode_all(tokenizer, [plain, talk(), plain], 300)
    assert both == [encode(tokenizer, each, 300) for each in (plain, talk(), plain)]
    assert tokenizer.decode(both[0].input_ids) == "<s>Hello Fine.</s>"


def test_answered_examples_come_in_the_users_turn_and_the_first_go_first(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"x": f"word{n}", "y": "yes"} for n in range(30)])
    shots = task(source=FileSource(train=path), prompt="{{ x }}?", answer="y", few_shot=3, chat=True)
    example = shots.examples("eval")[0]
    assert example.turns == (("user", example.prompt),) and example.prompt.count("yes") == 3
    tokenizer = chat_tokenizer()
    whole = encode(tokenizer, example, 400)
    cut = encode(tokenizer, example, len(whole.input_ids) - 1)
    text = tokenizer.decode(cut.input_ids)
    assert cut.truncated and text.count("? yes") == 2 and text.startswith("<|im_start|>user\nword")
    (prompt,) = encode_prompts(tokenizer, [example], len(whole.input_ids) - 1, 4)
    assert tokenizer.decode(prompt.input_ids) == text[: -len("yes<|im_end|>")]
    with pytest.raises(PemlError, match="`few_shot` does not go with rows of several turns"):
        turns = said((*TURNS, ("assistant", "x")))
        talks = write_rows(tmp_path / "talk.jsonl", [{"messages": turns}] * 30)
        task(source=FileSource(train=talks), few_shot=2).examples("eval")


def test_a_model_without_a_chat_template_is_refused_by_task() -> None:
    for call in (
        lambda tokenizer: encode(tokenizer, talk(), 300),
        lambda tokenizer: encode_choices(tokenizer, [talk()], 300),
        lambda tokenizer: encode_prompts(tokenizer, [talk()], 300, 8),
    ):
        with pytest.raises(PemlError, match="task 'talk' is a conversation, .* no chat template: use a model that was"):
            call(chat_tokenizer(None))


def test_a_template_that_refuses_is_quoted() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(PemlError, match=r"talk.jsonl:3: .* refuses the conversation \(System role not supported\)"):
        encode(chat_tokenizer(template + INSTRUCT), talk(), 300)
    with pytest.raises(PemlError, match="leaves the assistant's turn out"):
        encode(chat_tokenizer("{{ messages[0].content }}"), talk(), 300)


# ------------------------------------------------------------------------------------------------ whole models


def model_for(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


@pytest.mark.parametrize("template", [CHATML, INSTRUCT, OPEN_THOUGHT, PLAIN])
def test_what_was_trained_is_generated_up_to_the_end_of_the_turn(template: str) -> None:
    """The end of ChatML's turn is not the tokenizer's end token: generation has to be told."""
    tokenizer = chat_tokenizer(template)
    model = model_for(tokenizer)
    examples = [talk([("user", word)], answer) for word, answer in (("cat", "meow"), ("dog", "woof"))]
    rows = encode_all(tokenizer, examples, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        for row in rows:
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    settings = {"max_length": 64, "batch_size": 2, "tasks_kwarg": False}
    answers = generate_answers(model, tokenizer, examples, max_new_tokens=8, one_line=False, **settings)
    assert answers == ["meow", "woof"]
    chosen = [replace(each, choices=("meow", "woof")) for each in examples]
    assert score_choices(model, tokenizer, chosen, **settings) == [0, 1]


# --------------------------------------------------------------------------------------------------- recipes


def own(path: Path, name: str = "talk", **fields: Any) -> Task:
    recipe = {"model": "toy", "tasks": [{"name": name, "path": str(path), **fields}], "method": "lora"}
    return Recipe.model_validate(recipe).build_tasks()[0]


def test_a_recipe_needs_no_more_than_the_path_of_a_conversation(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "talk.jsonl", [{"messages": [USER, ASSISTANT]}] * 20)
    task = own(path)
    assert task.kind == "generate" and task.metrics == ("exact_match",)
    assert [example.turns for example in task.examples("eval")] == [(("user", "a"),)] * 2


def test_chat_is_said_for_a_task_or_for_all(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"x": "a", "y": "b"}] * 20)
    fields: dict[str, Any] = {"name": "talk", "path": str(path), "kind": "generate", "prompt": "{{ x }}", "answer": "y"}
    entries = [fields, fields | {"name": "plain", "chat": False}, {"suite": "toy", "include": ["mood"]}]
    recipe = Recipe.model_validate({"model": "toy", "tasks": entries, "method": "lora", "chat": True})
    assert [task.chat for task in recipe.build_tasks()] == [True, False, True]
    assert recipe.build_tasks()[2].examples("eval")[0].turns[0][0] == "user"
    assert own(**fields | {"path": path}, chat=True).chat is True and own(**fields | {"path": path}).chat is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "{{ x }}"}, r"tasks\[talk\]: the key kind is missing"),
        ({"kind": "generate", "prompt": "{{ x }}"}, r"tasks\[talk\]: the key answer is missing"),
        ({"kind": "generate", "answer": "x"}, r"tasks\[talk\]: the key prompt is missing"),
        ({"choices": ["a", "b"]}, r"tasks\[talk\]: the key kind is missing: choices go with kind choose or classify"),
    ],
)
def test_what_a_recipe_lacks_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        own(tmp_path / "rows.jsonl", **fields)
