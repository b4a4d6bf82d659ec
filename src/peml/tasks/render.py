"""Filling in templates: what a row says, as text, or an error that names the row."""

import math
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, Undefined, UndefinedError, meta
from jinja2.sandbox import SandboxedEnvironment

from peml.errors import PemlError
from peml.tasks.files import Row

_EMPTY = "a field that it asks for is empty (null)"


class _Null(Undefined):
    """A field that is null: false and equal to none, but no text, not even for a filter."""

    __str__ = __repr__ = __iter__ = __len__ = Undefined._fail_with_undefined_error

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)


_NULL = _Null(hint=_EMPTY)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _marked(value: Any) -> Any:
    """A value whose nulls, however deep, are no text to any filter."""
    if _is_null(value):
        return _NULL
    if isinstance(value, dict):
        return {key: _marked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner) for inner in value]
    return value


def _as_json(value: Any) -> None:
    if not isinstance(value, _Null):
        raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _present(value: Any) -> Any:
    # Jinja would write "None", "nan" and Python's names of things into the prompt, and the model would learn that.
    if _is_null(value):
        raise UndefinedError(_EMPTY)
    if isinstance(value, bytes):
        raise UndefinedError("a field that it asks for holds bytes, not a text")
    if callable(value) and not isinstance(value, Undefined):
        raise UndefinedError(f"there is no such field, only Python's own {getattr(value, '__name__', value)!r}")
    return value


_JINJA = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, finalize=_present)
_JINJA.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": _as_json}
_JINJA.tests["none"] = lambda value: value is None or isinstance(value, _Null)


@lru_cache(maxsize=1024)
def compiled(source: str) -> Template:
    """The template, read once."""
    return _JINJA.from_string(source)


def fields_of(template: str) -> list[str]:
    """Fields that a template asks for, in the order of the alphabet; none where it takes the row as a whole."""
    return sorted(meta.find_undeclared_variables(_JINJA.parse(template)) - {"row"})


def render(template: str, row: Row, where: str) -> str:
    """The template filled in with the fields of a row, which `row` holds too."""
    try:
        fields = _marked(row)
        return compiled(template).render({"row": fields, **fields})
    except UndefinedError as error:
        known = ", ".join(map(str, row)) or "none"
        raise PemlError(f"{where} asks for what the row lacks ({error}); its fields are: {known}") from error
    except Exception as error:  # a template is the user's code and may fail in any way
        raise PemlError(f"{where} cannot be filled in for this row ({type(error).__name__}: {error})") from error


def field_of(row: Row, name: str, where: str) -> Any:
    """A field of a row that a task asks for by name."""
    if name not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise PemlError(f"{where} names the field {name!r}, which the row lacks; its fields are: {fields}")
    return row[name]


def as_text(value: Any, where: str) -> str:
    """A plain value as text; null is empty, and so is NaN, which stands for it in tables."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if _is_null(value):
        return ""
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise PemlError(f"{where} must hold a text, a number or true/false, not a {type(value).__name__}")


def check_characters(text: str, where: str) -> None:
    """Refuse text that no tokeniser and no file can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PemlError(
            f"{where} has half of a surrogate pair at character {error.start + 1}; repair the row"
        ) from error
