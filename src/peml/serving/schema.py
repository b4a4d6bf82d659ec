"""What requests may say: OpenAI's names and defaults, and a few fields of ours.

What would change the answer is honoured or refused by its name; what changes none is taken without a word.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from peml.serving.sampling import TOP

NEUTRAL: dict[str, Any] = {
    "audio": None, "best_of": 1, "echo": False, "frequency_penalty": 0, "function_call": "none", "functions": [],
    "logit_bias": {}, "modalities": ["text"], "presence_penalty": 0, "repetition_penalty": 1,
    "response_format": {"type": "text"}, "suffix": "", "tool_choice": "none", "tools": [],
}  # fmt: skip
"""Values that change nothing, of parameters that are not honoured."""

SILENT = (
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
)  # fmt: skip
"""OpenAI's parameters that change no answer."""

Ids = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]
Row = dict[str, Any]


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool = False


class Generation(BaseModel):
    """What completions and chats have in common.

    Args:
        model: a task, or the id of the adapter.
        task: the task, where `model` is the adapter's id.
        temperature: 0, our default and not OpenAI's, is what the scores of a run were measured with.
        top_k: tokens that are drawn from, the likeliest, as in vLLM; 0 and -1: all.
        min_p: least probability of a token that is drawn, in shares of the likeliest's, as in vLLM.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    task: str | None = None
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=8)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _honoured(self) -> Generation:
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in SILENT and value != NEUTRAL.get(name):
                raise ValueError(f"`{name}` is not supported: leave it out")
        if len(self.stops) > 4:
            raise ValueError("`stop` takes four texts at most")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Generation):
    """`/v1/completions`.

    Args:
        prompt: a text or its ids, or several.
        fields: in place of a prompt, what the task's own template is filled in with; or several.
    """

    prompt: StrictStr | Ids | Annotated[list[StrictStr], Field(min_length=1)] | list[Ids] | None = None
    fields: Row | Annotated[list[Row], Field(min_length=1)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)

    @model_validator(mode="after")
    def _asks(self) -> Completion:
        if (self.prompt is None) == (self.fields is None):
            raise ValueError("give `prompt`, or `fields` for the task's own template")
        if len(self.asked) > 64:
            raise ValueError("64 prompts are the most of one request")
        return self

    @property
    def asked(self) -> list[Any]:
        """Texts, ids or rows, one per prompt."""
        given: Any = self.prompt if self.fields is None else self.fields
        if isinstance(given, list) and not isinstance(given[0], int):
            return given
        return [given]


class Part(BaseModel):
    """A piece of a message; texts alone."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Generation):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP)


class Classify(BaseModel):
    """`/v1/classify`: choices, scored.

    Args:
        model: a task, or the id of the adapter.
        task: the task, where `model` is the adapter's id.
        input: the prompt.
        fields: in its place, what the task's own template is filled in with.
        choices: to choose from; None: the task's.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    task: str | None = None
    input: str | None = None
    fields: Row | None = None
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=256)] | None = None

    @model_validator(mode="after")
    def _asks(self) -> Classify:
        if (self.input is None) == (self.fields is None):
            raise ValueError("give `input`, or `fields` for the task's own template")
        return self
