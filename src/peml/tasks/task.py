"""A task turns raw rows into examples: a prompt, the right answer and, where there is a choice, the options.

A plain task is data: two templates, a table of labels and the names of its metrics. Where its rows come from
is `peml.tasks.source`; how an example becomes token ids is `peml.tasks.encode`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from peml.errors import PemlError
from peml.tasks.conversation import Turns, read_row
from peml.tasks.files import Row
from peml.tasks.metrics import METRICS
from peml.tasks.source import Source, Split

Kind = Literal["choose", "generate", "classify", "regress"]

DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = {
    "choose": ("accuracy",),
    "classify": ("accuracy",),
    "generate": ("exact_match",),
    "regress": ("pearson", "spearman"),
}


def _present(value: Any) -> Any:
    # Jinja would write "None" and "nan" into the prompt, and the model would be trained on that.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UndefinedError("a field that it asks for is empty (null)")
    return value


_JINJA = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, finalize=_present)


@dataclass(frozen=True)
class Example:
    """One row as text: what the model reads, what it should answer, and where the row came from.

    Attributes:
        task: name of the task.
        prompt: text before the answer, without trailing white space.
        answer: text of the right answer; one of `choices` if there are any.
        choices: options to choose from; empty for a task that generates.
        origin: file and line (or data set and row) for messages, as in `data/tickets.jsonl:12`.
        texts: what an encoder with heads reads, one text or a pair; none: the prompt.
        value: the number behind the answer of a task that regresses.
        turns: the prompt as a conversation, which the tokeniser's chat template renders; none: it is plain text.
    """

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...]
    origin: str
    texts: tuple[str, ...] = ()
    value: float | None = None
    turns: Turns = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the rows of one task are asked, answered and measured.

    Attributes:
        name: what the task is called in `tasks=`, in recipes and in reports.
        kind: `choose` (one of several options), `classify` (one of the same few classes for every row), `generate`
            (any text) or `regress` (a number). Language models score the options, and write texts and numbers;
            encoders have a head for each task, which takes the last two and fixed options.
        prompt: Jinja template over the fields of a row; `row["odd name"]` reaches a field by any name. Without it,
            and without `answer`, rows are as TRL has them: see `peml.tasks.conversation`.
        answer: name of the field with the answer, or a Jinja template if it contains `{{`.
        texts: Jinja templates of what an encoder reads, one or a pair; none: the prompt as a whole.
        choices: the options; or the name of the field that holds those of each row (a list or a mapping).
        labels: raw answer, in lower case -> choice: `{"0": "negative", "1": "positive"}`, `{"true": "yes"}`.
        metrics: names from `peml.tasks.metrics`; the first is the one that averages over tasks are made of.
        max_new_tokens: longest answer that a `generate` task may write.
        length_normalization: divide the score of an option by its length in bytes.
        chat: whether the prompt is asked as a user's turn of the chat template, as conversations always are.
        source: where the rows come from.
    """

    name: str
    kind: Kind
    prompt: str | None = None
    answer: str | None = None
    source: Source
    choices: tuple[str, ...] | str | None = None
    texts: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    max_new_tokens: int = 16
    length_normalization: bool = False
    chat: bool | None = None

    def __post_init__(self) -> None:
        """Check every field, and turn lists and raw labels into their proper types."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise PemlError(f"`name` of a task must be a text that is not empty, not {self.name!r}")
        if self.kind not in get_args(Kind):
            raise self._mistake("kind", f"must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        for key, template in (("prompt", self.prompt), ("answer", self.answer)):
            if template is None and (self.prompt or self.answer):
                raise self._mistake(
                    key, "is missing: give both `prompt` and `answer`, or neither for rows as TRL has them"
                )
            if template is not None:
                self._check_template(key, template)
        object.__setattr__(self, "texts", (self.texts,) if isinstance(self.texts, str) else tuple(self.texts))
        if len(self.texts) > 2:
            raise self._mistake("texts", f"are one text or a pair, not {len(self.texts)}")
        for template in self.texts:
            self._check_template("texts", template)
        object.__setattr__(self, "choices", self._checked_choices())
        object.__setattr__(self, "labels", self._checked_labels())
        object.__setattr__(self, "metrics", self._checked_metrics())
        if self.max_new_tokens < 1:
            raise self._mistake("max_new_tokens", f"must be at least 1, not {self.max_new_tokens}")

    def examples(self, split: Split) -> list[Example]:
        """All examples of a split; the first bad row stops with an error that names it."""
        return [self.example(row, origin) for row, origin in self._rows(split)]

    def _rows(self, split: Split) -> Iterator[tuple[Row, str]]:
        try:
            yield from self.source.rows(split)
        except PemlError as error:
            raise PemlError(f"{error} (task {self.name!r})") from error

    def example(self, row: Row, origin: str) -> Example:
        """The example that a raw row makes; `origin` names the row in errors."""
        where = f"{origin}: task {self.name!r}"
        turns, prompt, raw = self._asked(row, where)
        texts = tuple(_render(text, row, f"{where}: `texts`").strip() for text in self.texts)
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
            _check_characters(text, f"{where}: `{key}`")
        return Example(self.name, prompt, answer, choices, origin, texts, value, turns)

    def _asked(self, row: Row, where: str) -> tuple[Turns, str, str]:
        """The prompt as turns, if it is a conversation, and as plain text; and the raw answer."""
        if self.prompt is None or self.answer is None:
            turns, prompt, raw = read_row(row, where)
        else:
            prompt = _render(self.prompt, row, f"{where}: `prompt`").rstrip()
            if not prompt:
                raise PemlError(
                    f"{where}: `prompt` is empty for this row; put some text into the template or drop the row"
                )
            turns, raw = (), self._answer(self.answer, row, where)
        if turns and self.chat is False:
            raise PemlError(
                f"{where}: the row is a conversation, which needs the chat template; leave out `chat: false`"
            )
        return turns or ((("user", prompt.strip()),) if self.chat else ()), prompt, raw

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
        if "{{" in template:
            raw = _render(template, row, f"{where}: `answer`").strip()
        else:
            raw = _as_text(_field(row, template, f"{where}: `answer`"), f"{where}: field {template!r}")
        return raw

    def _choices(self, row: Row, where: str) -> tuple[str, ...]:
        if self.choices is None or isinstance(self.choices, tuple):
            return self.choices or ()
        here = f"{where}: field {self.choices!r}"
        value = _field(row, self.choices, f"{where}: `choices`")
        options = list(value.values()) if isinstance(value, Mapping) else value
        if not isinstance(options, list | tuple):
            raise PemlError(f"{here} must hold a list of choices, not {value!r}")
        choices = tuple(_as_text(option, here) for option in options)
        if problem := _choices_problem(choices):
            raise PemlError(f"{here} {problem}, not {_listed(choices)}")
        return choices

    def _check_template(self, key: str, template: str) -> None:
        if not isinstance(template, str) or not template.strip():
            raise self._mistake(key, "must be a text that is not empty")
        try:
            _template(template)
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
        labels = {_as_text(raw, f"task {self.name!r}: `labels`").lower(): str(to) for raw, to in self.labels.items()}
        for raw, choice in labels.items():
            if isinstance(self.choices, tuple) and choice not in self.choices:
                known = _listed(self.choices)
                raise self._mistake("labels", f"maps {raw!r} to {choice!r}, which is not among the choices {known}")
        return labels

    def _checked_metrics(self) -> tuple[str, ...]:
        metrics = (self.metrics,) if isinstance(self.metrics, str) else tuple(self.metrics)
        fixed = isinstance(self.choices, tuple)
        for name in metrics:
            if name not in METRICS:
                raise self._mistake("metrics", f"has {name!r}, which is unknown; choose from {', '.join(METRICS)}")
            if METRICS[name].kind == "label" and not fixed:
                raise self._mistake(
                    "metrics", f"has {name!r}, which needs kind 'choose' with one fixed list of choices"
                )
            if name == "f1" and fixed and len(self.choices or ()) != 2:
                raise self._mistake("metrics", "has 'f1', which needs exactly two choices; use 'macro_f1' for more")
        return metrics or DEFAULT_METRICS[self.kind]

    def _mistake(self, key: str, sentence: str) -> PemlError:
        return PemlError(f"task {self.name!r}: `{key}` {sentence}")


@lru_cache(maxsize=1024)
def _template(source: str) -> Template:
    return _JINJA.from_string(source)


def _render(template: str, row: Row, where: str) -> str:
    try:
        return _template(template).render({"row": row, **row})
    except UndefinedError as error:
        fields = ", ".join(map(str, row)) or "none"
        raise PemlError(f"{where} asks for what the row lacks ({error}); its fields are: {fields}") from error
    except Exception as error:  # a template is the user's code and may fail in any way
        raise PemlError(f"{where} cannot be filled in for this row ({type(error).__name__}: {error})") from error


def _field(row: Row, name: str, where: str) -> Any:
    if name not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise PemlError(f"{where} names the field {name!r}, which the row lacks; its fields are: {fields}")
    return row[name]


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise PemlError(f"{where} must hold a text, a number or true/false, not a {type(value).__name__}")


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PemlError(
            f"{where} has half of a surrogate pair at character {error.start + 1}; repair the row"
        ) from error


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
