"""OpenAI's API, the half that clients get; what they send is in openai_request.py.

The processor makes chunks of chat completions, whatever was asked for; the frontend makes of them what the client
wants: events, one body, or text completions.
"""

from typing import Any, Literal

from common.messages import DescribeRequest, EndpointSpec, Message, TokenMessage
from common.openai_request import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, Field

# The answer, in chunks or whole.


class FunctionDelta(TokenMessage, kw_only=True, omit_defaults=True):
    """What a chunk adds to a call of a function."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(TokenMessage, kw_only=True, omit_defaults=True):
    """What a chunk adds to a tool call; the first of each has its id and name."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(TokenMessage, kw_only=True, omit_defaults=True):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionDelta | None = None  # a tool call, for those who sent `functions`


class TopLogprob(TokenMessage, kw_only=True):
    """How likely a token was: its natural logarithm. A token that is no whole character has its bytes only."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, kw_only=True):
    """How likely a token of the answer was, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(TokenMessage, kw_only=True):
    """Those of the tokens of a chunk, or of the whole answer."""

    content: list[TokenLogprob]
    refusal: None = None


class ChunkChoice(TokenMessage, kw_only=True):
    """What a chunk adds to one of the answers."""

    index: int = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET  # that this takes in; for the frontend, which may have to resume


class PromptBlocks(TokenMessage, kw_only=True):
    """A prompt as routers know it."""

    tokens: int
    block_size: int  # tokens
    local_hashes: list[int]  # `compute_block_hash_for_seq` of each full block, its tokens alone


class Routing(TokenMessage, kw_only=True, omit_defaults=True):
    """Who answers, on the first chunk, which the frontend turns into response headers; and who did, on the last."""

    worker_id: str
    overlap_blocks: int
    overlap_tokens: int | None = None  # what those blocks hold, on the last chunk
    migrations: int = 0  # moves from a worker that failed to this one
    cached_tokens: int | None = None  # of the prompt, by the worker's own account, if that came with the first chunk
    by_load: bool = False  # whether no router chose it, because none answered
    prompt: PromptBlocks | None = None  # on the first chunk, for a frontend that records traffic


class ChatCompletionChunk(TokenMessage, kw_only=True):
    """One server-sent event of a streamed answer. The last one, with no choices, has the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChunkChoice]
    usage: dict[str, Any] | UnsetType | None = UNSET  # a Usage
    routing: Routing | UnsetType = UNSET


class AssistantMessage(TokenMessage, kw_only=True):
    """The whole answer of the model."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET


class Choice(TokenMessage, kw_only=True):
    """One of the answers of a completion."""

    index: int = 0
    message: AssistantMessage
    logprobs: Logprobs | None = None
    finish_reason: str | None


class ChatCompletion(TokenMessage, kw_only=True):
    """An answer that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[Choice]
    usage: dict[str, Any] | None


class TextLogprobs(TokenMessage, kw_only=True):
    """Those of a text completion. Its tokens, their logprobs, the likeliest in their places, and where in the text each
    begins: characters from the start of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TokenMessage, kw_only=True):
    """What a chunk adds to one of the answers of a text completion, or the whole of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(TokenMessage, kw_only=True):
    """The answer of POST /v1/completions, or one server-sent event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[TextChoice]
    usage: dict[str, Any] | UnsetType | None = UNSET


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


class Tokens(Message):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Message):
    """The answer of POST /detokenize."""

    prompt: str


PROCESS = EndpointSpec("processor", "process", ChatCompletionRequest, ChatCompletionChunk, alive=True)
COMPLETE = EndpointSpec("processor", "complete", CompletionRequest, ChatCompletionChunk, alive=True)
TOKENIZE = EndpointSpec("processor", "tokenize", TokenizeRequest, Tokens)
DETOKENIZE = EndpointSpec("processor", "detokenize", DetokenizeRequest, Text)
DESCRIBE_MODEL = EndpointSpec("processor", "describe", DescribeRequest, ModelCard)
CHAT_COMPLETIONS = EndpointSpec("frontend", "chat_completions", ChatCompletionRequest, ChatCompletionChunk)
