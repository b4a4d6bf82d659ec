"""A task turns raw rows into examples: a prompt, the right answer and, where there is a choice, the options.

A plain task is data: two templates, a table of labels and the names of its metrics. Where its rows come from
is `peml.tasks.source`; how an example becomes token ids is `peml.tasks.encode`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Literal, get_args

from jinja2 import TemplateSyntaxError

from peml.errors import PemlError
from peml.tasks.conversation import Turns, read_row
from peml.tasks.example import Example, after
from peml.tasks.files import Row
from peml.tasks.metrics import METRICS
from peml.tasks.render import as_text, check_characters, compiled, field_of, render
from peml.tasks.source import Source, Split

Kind = Literal["choose", "generate", "classify", "regress"]

DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = {
    "choose": ("accuracy",),
    "classify": ("accuracy",),
    "generate": ("exact_match",),
    "regress": ("pearson", "spearman"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the rows of one task are asked, answered and measured.

    Attributes:
        name: what the task is called in `tasks=`, in recipes and in reports.
        kind: `choose` (one of several options), `classify` (one of the same few classes for every row), `generate`
            (any text) or `regress` (a number). Language models score the options, and write texts and numbers;
            encoders have a head for each task, which takes the last two and fixed options.
        prompt: Jinja template over the fields of a row; `row["odd name"]` reaches a field by any name. Of several
            templates, a training row takes one by a draw that depends on nothing but the row, and evaluation the
            first (our choice: scores stay comparable). Without it, and without `answer`, rows are as TRL has them: see
            `peml.tasks.conversation`.
        answer: name of the field with the answer, or a Jinja template if it contains `{{` or `{%`.
        texts: Jinja templates of what an encoder reads, one or a pair; none: the prompt as a whole.
        choices: the options; or the name of the field that holds those of each row (a list or a mapping).
        labels: raw answer, in lower case -> choice: `{"0": "negative", "1": "positive"}`, `{"true": "yes"}`.
        metrics: names from `peml.tasks.metrics`; `accuracy/x` is the accuracy over the rows of group `x`.
        score: those of the metrics whose mean is the task's score, of which averages over tasks are made; none: the
            first.
        max_new_tokens: longest answer that a `generate` task may write.
        length_normalization: divide the score of an option by its length in bytes.
        chat: whether the prompt is asked as a user's turn of the chat template, as conversations always are.
        group: name of the field that says which rows are measured together; None: there is none.
        references: name of the field that lists every right answer, where there may be several.
        few_shot: answered examples in front of each prompt, from rows that are neither trained nor measured on.
        suite: name of the suite that the task belongs to.
        source: where the rows come from.
    """

    name: str
    kind: Kind
    prompt: str | tuple[str, ...] | None = None
    answer: str | None = None
    source: Source
    choices: tuple[str, ...] | str | None = None
    texts: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    max_new_tokens: int = 16
    length_normalization: bool = False
    chat: bool | None = None
    group: str | None = None
    references: str | None = None
    few_shot: int = 0
    suite: str = ""

    def __post_init__(self) -> None:
        """Check every field, and turn lists and raw labels into their proper types."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise PemlError(f"`name` of a task must be a text that is not empty, not {self.name!r}")
        if self.kind not in get_args(Kind):
            raise self._mistake("kind", f"must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        for key, given in (("prompt", self.prompt), ("answer", self.answer)):
            if given is None and (self.prompt is not None or self.answer is not None):
                raise self._mistake(
                    key, "is missing: give both `prompt` and `answer`, or neither for rows as TRL has them"
                )
        if not isinstance(self.prompt, str | None):
            object.__setattr__(self, "prompt", tuple(self.prompt))
        if not self.prompts and self.prompt is not None:
            raise self._mistake("prompt", "must be a template, or a list of some")
        for template in self.prompts:
            self._check_template("prompt", template)
        if self.answer is not None:
            self._check_template("answer", self.answer)
        object.__setattr__(self, "texts", (self.texts,) if isinstance(self.texts, str) else tuple(self.texts))
        if len(self.texts) > 2:
            raise self._mistake("texts", f"are one text or a pair, not {len(self.texts)}")
        for template in self.texts:
            self._check_template("texts", template)
        object.__setattr__(self, "choices", self._checked_choices())
        object.__setattr__(self, "labels", self._checked_labels())
        object.__setattr__(self, "metrics", self._checked_metrics())
        object.__setattr__(self, "score", self._checked_score())
        if self.few_shot < 0:
            raise self._mistake("few_shot", f"must not be negative, but is {self.few_shot}")
        if self.max_new_tokens < 1:
            raise self._mistake("max_new_tokens", f"must be at least 1, not {self.max_new_tokens}")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates of the prompt; none where rows bring their own."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt or ()

    def examples(self, split: Split, count: int | None = None) -> list[Example]:
        """The examples of a split, all or the first `count`; the first bad row stops with an error that names it."""
        try:
            shots = self.shots()
            kept = {shot.origin for shot in shots}
            rows = ((row, origin) for row, origin in self.source.rows(split) if origin not in kept)
            chosen = list(islice(rows, count))
        except PemlError as error:
            if repr(self.name) in str(error):
                raise
            raise PemlError(f"{error} (task {self.name!r})") from error
        return [after(shots, self.example(row, origin, split)) for row, origin in chosen]

    def stream(self, split: Split, *, start: int = 0, number: int = 0) -> Iterator[Example]:
        """Examples of one pass over a split, each made when it is asked for; see `Source.stream`."""
        if self.few_shot:
            raise self._mistake("few_shot", "does not go with rows that are streamed")
        return (
            self.example(row, origin, split) for row, origin in self.source.stream(split, start=start, number=number)
        )

    def shots(self) -> list[Example]:
        """The answered examples in front of each prompt."""
        rows = self.source.shots(self.few_shot) if self.few_shot else []
        return [self.example(row, origin) for row, origin in rows]

    def example(self, row: Row, origin: str, split: Split = "eval") -> Example:
        """The example that a raw row makes; `origin` names the row in errors."""
        where = f"{origin}: task {self.name!r}"
        turns, prompt, raw = self._asked(row, where, split)
        texts = tuple(render(text, row, f"{where}: `texts`").strip() for text in self.texts)
        answer, value = self.labels.get(raw.lower(), raw), None
        if not answer:
            raise PemlError(f"{where}: the answer ({self.answer!r}) is empty; fill it in or drop the row")
        if self.kind == "regress":
            value, answer = self._number(answer, where)
        choices = self._choices(row, where)
        if choices and answer not in choices:
            raise PemlError(
                f"{where}: the answer {answer!r} is not among the choices {_listed(choices)}; "
                "correct the row, or map its raw value to a choice with `labels`"
            )
        for key, text in (
            ("prompt", prompt),
            ("answer", answer),
            *(("choices", choice) for choice in choices),
            *(("texts", text) for text in texts),
        ):
            check_characters(text, f"{where}: `{key}`")
        group = ""
        # Training measures nothing, so its rows need not say; those held out of it are then measured as a whole.
        if self.group is not None and (self.group in row or (split == "eval" and not self._of_training)):
            group = as_text(field_of(row, self.group, f"{where}: `group`"), f"{where}: field {self.group!r}")
        references = self._references(row, where)
        return Example(self.name, prompt, answer, choices, origin, texts, value, group, references, turns=turns)

    def question(self, row: Row, origin: str) -> Example:
        """The example of a row without its answer, to be answered; the template of `answer` is not looked at.

        Raises:
            PemlError: rows of this task bring their own prompts, or this one lacks a field of the template.
        """
        if self.prompt is None:
            raise self._mistake("prompt", "is missing, because its rows are conversations: give one, not fields")
        where = f"{origin}: task {self.name!r}"
        prompt, choices = self._prompt(row, where, "eval"), self._choices(row, where)
        check_characters(prompt, f"{where}: `prompt`")
        turns: Turns = (("user", prompt.strip()),) if self.chat else ()
        return Example(self.name, prompt, "", choices, origin, turns=turns)

    @property
    def _of_training(self) -> bool:
        """Whether rows that are measured on are training rows, and may do without the part that they belong to."""
        kinds = {METRICS[name.partition("/")[0]].kind for name in self.metrics}
        return self.source.held_out is not None and "group" not in kinds

    def _asked(self, row: Row, where: str, split: Split) -> tuple[Turns, str, str]:
        """The prompt as turns, if it is a conversation, and as plain text; and the raw answer."""
        if self.answer is None:
            turns, prompt, raw = read_row(row, where)
        else:
            turns, prompt, raw = (), self._prompt(row, where, split), self._answer(self.answer, row, where)
        if turns and self.chat is False:
            raise PemlError(
                f"{where}: the row is a conversation, which needs the chat template; leave out `chat: false`"
            )
        return turns or ((("user", prompt.strip()),) if self.chat else ()), prompt, raw

    def _prompt(self, row: Row, where: str, split: Split) -> str:
        prompt = render(self.prompts[0], row, f"{where}: `prompt`").rstrip()
        if split == "train" and len(self.prompts) > 1:
            # What is drawn depends on the row alone: not on its place, on other rows or on the machine.
            said = f"{self.source.seed}:{prompt}".encode("utf-8", "surrogatepass")
            drawn = int.from_bytes(blake2b(said, digest_size=8).digest(), "big") % len(self.prompts)
            prompt = render(self.prompts[drawn], row, f"{where}: `prompt`").rstrip()
        if not prompt:
            raise PemlError(f"{where}: `prompt` is empty for this row; put some text into the template or drop the row")
        return prompt

    def _references(self, row: Row, where: str) -> tuple[str, ...]:
        if self.references is None:
            return ()
        listed = field_of(row, self.references, f"{where}: `references`")
        if not isinstance(listed, list | tuple) or not listed:
            raise PemlError(f"{where}: field {self.references!r} must hold a list of right answers, not {listed!r}")
        return tuple(as_text(item, f"{where}: field {self.references!r}") for item in listed)

    def _number(self, answer: str, where: str) -> tuple[float, str]:
        try:
            value = float(answer)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise PemlError(f"{where}: the answer must be a number, not {answer!r}")
        # A language model writes it: one place behind the point says enough, and as few tokens as can be.
        return value, f"{value:.1f}"

    def _answer(self, template: str, row: Row, where: str) -> str:
        if "{{" in template or "{%" in template:
            return render(template, row, f"{where}: `answer`").strip()
        return as_text(field_of(row, template, f"{where}: `answer`"), f"{where}: field {template!r}")

    def _choices(self, row: Row, where: str) -> tuple[str, ...]:
        if self.choices is None or isinstance(self.choices, tuple):
            return self.choices or ()
        here = f"{where}: field {self.choices!r}"
        value = field_of(row, self.choices, f"{where}: `choices`")
        options = list(value.values()) if isinstance(value, Mapping) else value
        if not isinstance(options, list | tuple):
            raise PemlError(f"{here} must hold a list of choices, not {value!r}")
        choices = tuple(as_text(option, here) for option in options)
        if problem := _choices_problem(choices):
            raise PemlError(f"{here} {problem}, not {_listed(choices)}")
        return choices

    def _check_template(self, key: str, template: str) -> None:
        if not isinstance(template, str) or not template.strip():
            raise self._mistake(key, "must be a text that is not empty")
        try:
            compiled(template)
        except TemplateSyntaxError as error:
            raise self._mistake(key, f"is not a valid Jinja template (line {error.lineno}: {error.message})") from error

    def _checked_choices(self) -> tuple[str, ...] | str | None:
        if self.kind in ("generate", "regress"):
            if self.choices:
                raise self._mistake(
                    "choices", f"do not go with kind {self.kind!r}; leave them out or use kind 'choose'"
                )
            return None
        if not self.choices:
            raise self._mistake("choices", "are missing: give a list, or the name of the field that holds them")
        if isinstance(self.choices, str):
            if self.kind == "classify":
                raise self._mistake("choices", "must be one fixed list for kind 'classify'; use 'choose' for a field")
            return self.choices
        if any(isinstance(choice, bool) for choice in self.choices):
            raise self._mistake(
                "choices", "must be texts: put them in quotes, because YAML reads yes and no as booleans"
            )
        choices = tuple(str(choice).strip() for choice in self.choices)
        if problem := _choices_problem(choices):
            raise self._mistake("choices", f"{problem}, not {_listed(choices)}")
        return choices

    def _checked_labels(self) -> dict[str, str]:
        labels: dict[str, str] = {}
        for raw, to in self.labels.items():
            key = as_text(raw, f"task {self.name!r}: `labels`").lower()
            if labels.setdefault(key, str(to)) != str(to):
                raise self._mistake(
                    "labels", f"maps {key!r} to {labels[key]!r} and to {str(to)!r}; case does not count"
                )
        for raw, choice in labels.items():
            if isinstance(self.choices, tuple) and choice not in self.choices:
                known = _listed(self.choices)
                raise self._mistake("labels", f"maps {raw!r} to {choice!r}, which is not among the choices {known}")
        return labels

    def _checked_metrics(self) -> tuple[str, ...]:
        metrics = (self.metrics,) if isinstance(self.metrics, str) else tuple(self.metrics)
        fixed = isinstance(self.choices, tuple)
        for name in metrics:
            base, _, part = name.partition("/")
            if base not in METRICS:
                raise self._mistake("metrics", f"has {name!r}, which is unknown; choose from {', '.join(METRICS)}")
            if METRICS[base].kind == "label" and not fixed:
                raise self._mistake(
                    "metrics", f"has {name!r}, which needs kind 'choose' with one fixed list of choices"
                )
            if base == "f1" and fixed and len(self.choices or ()) != 2:
                raise self._mistake("metrics", "has 'f1', which needs exactly two choices; use 'macro_f1' for more")
            if (part or METRICS[base].kind == "group") and self.group is None:
                raise self._mistake("metrics", f"has {name!r}, which needs `group`, the field that names a row's group")
        return metrics or DEFAULT_METRICS[self.kind]

    def _checked_score(self) -> tuple[str, ...]:
        score = (self.score,) if isinstance(self.score, str) else tuple(self.score)
        for name in score:
            if name not in self.metrics:
                raise self._mistake("score", f"has {name!r}, which is not among the metrics {_listed(self.metrics)}")
        return score or self.metrics[:1]

    def _mistake(self, key: str, sentence: str) -> PemlError:
        return PemlError(f"task {self.name!r}: `{key}` {sentence}")


def _choices_problem(choices: tuple[str, ...]) -> str | None:
    if len(choices) < 2:
        return "must be at least two choices"
    if not all(choices):
        return "must not have an empty choice"
    if len(set(choices)) < len(choices):
        return "must be distinct choices"
    return None


def _listed(choices: tuple[str, ...]) -> str:
    return "[" + ", ".join(map(repr, choices)) + "]"
