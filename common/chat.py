"""OpenAI's chat completions API: what a client may send, and what it gets.

The request is checked here, in one place, by pydantic; its field names and limits are those of OpenAI's API reference
(https://platform.openai.com/docs/api-reference/chat/create), with `top_k`, `min_p` and `ignore_eos` as SGLang and vLLM
add them. To support a field, give it a type here and pass it on in processor.py.
"""

from typing import Any, Literal

from common.errors import InvalidRequest
from common.messages import Usage

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

STOP_STRINGS = 4  # OpenAI's limit


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}


class TextPart(_Body):
    type: Literal["text"]
    text: str


class _Open(BaseModel):
    """What this pipeline does not know of it, the chat template may."""

    model_config = ConfigDict(strict=True, extra="allow")


class FunctionCall(_Open):
    name: str
    arguments: str


class ToolCall(_Open):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Open):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind is not None and kind != "text":
                raise PydanticCustomError(
                    "unsupported", "content of type {kind} is not supported: send text only", {"kind": kind}
                )
        return content

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "a {role} message needs content", {"role": self.role})
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; there is none to leave out


class ChatCompletionRequest(_Body):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | list[str] | None = None
    ignore_eos: bool = False

    # Part of the API and not of this pipeline: taken where they change nothing about the answer, refused where they do.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: "ResponseFormat | None" = None
    modalities: list[Literal["text"]] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > STOP_STRINGS:
            raise PydanticCustomError("too_long", "at most {limit} stop strings are allowed", {"limit": STOP_STRINGS})
        if "" in strings:
            raise PydanticCustomError("empty", "a stop string must not be empty")
        return stop

    @model_validator(mode="after")
    def _agree(self) -> "ChatCompletionRequest":
        if self.stream_options and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is only allowed when stream is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "max_tokens", "max_tokens and max_completion_tokens say different things: send one"
            )
        return self

    @classmethod
    def parse(cls, body: Any) -> "ChatCompletionRequest":
        """Check `body`, decoded JSON. Raises InvalidRequest, which names the field and what is wrong with it."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise _explain(error) from error

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class ResponseFormat(_Body):
    type: Literal["text"]


_UNSUPPORTED = {"n", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "response_format", "modalities",
                "store"}  # fmt: skip

_UNION_ARMS = ("str", "list[str]", "list[TextPart]")  # that pydantic names in a path as if they were fields


def _explain(error: ValidationError) -> InvalidRequest:
    """The fault that pydantic found deepest in the body, in the words of an API."""
    fault = max(error.errors(include_url=False), key=lambda fault: len(fault["loc"]))
    unknown = fault["loc"][-1:] if fault["type"] == "extra_forbidden" else ()
    path = [part for part in fault["loc"][: -len(unknown) or None] if part not in _UNION_ARMS] + [*unknown]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    message = f"{param}: {fault['msg']}" if param else fault["msg"]
    if unknown:
        message = f"unknown field {param!r}"
    elif fault["type"] == "model_type" and not param:
        message = "the request body must be a JSON object"
    elif path and path[0] in _UNSUPPORTED:
        message = f"{param} = {fault['input']!r:.80} is not supported by this pipeline"
    code = "missing_required_parameter" if fault["type"] == "missing" else None
    return InvalidRequest(message, param=param or None, code=code)


# The answer. Structures of msgspec, because one is made for every few tokens.


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None


class Routing(msgspec.Struct, kw_only=True):
    """Who answers, on the first chunk; the frontend turns it into response headers."""

    worker_id: str
    overlap_blocks: int


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One server-sent event of a streamed answer. The last one, with no choices, has the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    routing: Routing | msgspec.UnsetType = msgspec.UNSET


class AssistantMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(msgspec.Struct, kw_only=True):
    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str | None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """An answer that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None


class ModelCard(msgspec.Struct, kw_only=True):
    """A model, as GET /v1/models lists it."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "inference"
    context_length: int  # tokens of prompt and answer together


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]
