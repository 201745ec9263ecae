"""OpenAI's chat completions API: what a client may send, and what it gets.

The request is checked here, in one place, by pydantic; its field names and limits are those of OpenAI's API reference
(https://platform.openai.com/docs/api-reference/chat/create), with `top_k`, `min_p` and `ignore_eos` as SGLang and vLLM
add them. To support a field, give it a type here and pass it on in processor.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from common.errors import InvalidRequest
from common.messages import DescribeRequest, EndpointSpec, Message, TokenMessage, Usage

from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

STOP_STRINGS = 4  # OpenAI's limit


class _Body(Message):
    """What a client may send: nothing that is not named here, and null is not given."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class _Open(Message):
    """What this pipeline does not know of it, the chat template may."""

    model_config = ConfigDict(strict=True, extra="allow")


class FunctionCall(_Open):
    """What the model wanted to call."""

    name: str
    arguments: str


class ToolCall(_Open):
    """A call in an earlier answer of the model."""

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
    """How to stream."""

    include_usage: bool = False
    # Padding against traffic analysis; there is none to leave out.
    include_obfuscation: bool = False


class ChatCompletionRequest(_Body):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "pipeline-chat",
                    "messages": [{"role": "user", "content": "What does the router do?"}],
                    "max_tokens": 64,
                    "stream": False,
                }
            ]
        }
    )

    model: str = Field(description="One of those that GET /v1/models lists.")
    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far, the oldest first.")
    stream: bool = Field(False, description="Answer with server-sent events as the tokens come.")
    stream_options: StreamOptions | None = None

    max_tokens: int | None = Field(None, ge=1, description="Tokens of the answer; by default what the context holds.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same by OpenAI's newer name.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="-1 and 0 are all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | list[str] | None = Field(None, description=f"Up to {STOP_STRINGS} strings that end the answer.")
    ignore_eos: bool = Field(False, description="Go on after the model's end token.")

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
    user: str | None = Field(None, description="The session for routing, if nothing else names one.")
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = Field(None, description="The session for routing, unless x-session-id names it.")

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
    def decode(cls, body: Any) -> Self:
        """Check `body`, decoded JSON. Raises InvalidRequest, which names the field and what is wrong with it."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise explain(error.errors(include_url=False)) from error

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class ResponseFormat(_Body):
    """The form of the answer."""

    type: Literal["text"]


_UNSUPPORTED = {"n", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "response_format", "modalities",
                "store"}  # fmt: skip

_UNION_ARMS = ("str", "list[str]", "list[TextPart]")  # that pydantic names in a path as if they were fields


def explain(faults: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The fault that pydantic found deepest in a body, in the words of an API."""
    fault = max(faults, key=lambda fault: len(fault["loc"]))
    unknown = fault["loc"][-1:] if fault["type"] == "extra_forbidden" else ()
    path = [part for part in fault["loc"][: -len(unknown) or None] if part not in _UNION_ARMS] + [*unknown]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    message = f"{param}: {fault['msg']}" if param else fault["msg"]
    if unknown:
        message = f"unknown field {param!r}"
    elif not param and fault["type"] == "missing":
        message = "the request body is not valid JSON: it is empty"
    elif not param and fault["type"] in ("model_type", "model_attributes_type"):
        message = "the request body must be a JSON object"
    elif path and path[0] in _UNSUPPORTED:
        message = f"{param} = {fault['input']!r:.80} is not supported by this pipeline"
    code = "missing_required_parameter" if fault["type"] == "missing" and param else None
    return InvalidRequest(message, param=param or None, code=code)


# The answer, in chunks or whole.


class Delta(TokenMessage, kw_only=True, omit_defaults=True):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(TokenMessage, kw_only=True):
    """The one answer of a chunk."""

    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None


class Routing(TokenMessage, kw_only=True):
    """Who answers, on the first chunk; the frontend turns it into response headers."""

    worker_id: str
    overlap_blocks: int


class ChatCompletionChunk(TokenMessage, kw_only=True):
    """One server-sent event of a streamed answer. The last one, with no choices, has the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: dict[str, Any] | UnsetType = UNSET  # a Usage
    routing: Routing | UnsetType = UNSET


class AssistantMessage(Message):
    """The whole answer of the model."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Message):
    """The one answer of a completion."""

    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str | None


class ChatCompletion(Message):
    """An answer that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None


class ModelCard(Message):
    """A model, as GET /v1/models lists it."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "inference"
    context_length: int = Field(description="Tokens of prompt and answer together.")


class ModelList(Message):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(Message):
    """What went wrong."""

    message: str = Field(description="What happened, and what to do about it.")
    type: str = Field(description="invalid_request_error, rate_limit_error, service_unavailable or server_error")
    param: str | None = Field(description="The field of the request that is at fault.")
    code: str | None = Field(description="For programs: model_not_found, context_length_exceeded, no_worker, …")


class ErrorBody(Message):
    """Every error, in OpenAI's form; after the first event of a stream, as an event."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "the model 'm' does not exist; this pipeline serves 'pipeline-chat'",
                        "type": "invalid_request_error",
                        "param": "model",
                        "code": "model_not_found",
                    }
                }
            ]
        }
    )

    error: ErrorDetail


PROCESS = EndpointSpec("processor", "process", ChatCompletionRequest, ChatCompletionChunk)
DESCRIBE_MODEL = EndpointSpec("processor", "describe", DescribeRequest, ModelCard)
CHAT_COMPLETIONS = EndpointSpec("frontend", "chat_completions", ChatCompletionRequest, ChatCompletionChunk)
