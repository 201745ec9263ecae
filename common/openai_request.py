"""OpenAI's API, the half that clients send; what they get is in openai_api.py.

A request is checked here, once, by pydantic. Names and limits are those of OpenAI's API reference
(https://platform.openai.com/docs/api-reference), with the fields that SGLang and vLLM add. To support a field, give it
a type here and pass it on in processor.py. Fields that have no type here are ignored; `ignored` names them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from common.errors import InvalidRequest
from common.messages import Message

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

STOP_STRINGS = 4  # OpenAI's limit
MAX_CHOICES = 128  # OpenAI's limit of n
MAX_ANSWERS = 1024  # of a request with several prompts
MAX_LOGPROBS = 20  # OpenAI's limit of top_logprobs
ANY = "*"  # in the place of a function's name, where it can be any
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def _refuse(value: Any) -> Any:
    raise PydanticCustomError("unsupported", "not supported")


Unsupported = Annotated[None, BeforeValidator(_refuse)]  # would change the answer, so it cannot be ignored


class _Open(Message):
    """What a client may send, and what this pipeline does not know of it, the chat template may. Null is not given."""

    model_config = ConfigDict(strict=True, extra="allow", serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}


class _Body(_Open):
    """What a client may send, where what this pipeline does not know is for nobody."""

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and have no type here, such as `stream_options.colour`."""
        bodies = ((name, getattr(self, name)) for name in sorted(self.model_fields_set))
        nested = (f"{name}.{inner}" for name, body in bodies if isinstance(body, _Body) for inner in body.ignored)
        return [*(self.model_extra or ()), *nested]


class ContentPart(_Open):
    """A part of a message's content."""

    type: str
    text: str = ""
    refusal: str = ""

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        if self.type not in ("text", "refusal"):
            kind = {"kind": self.type[:40]}
            raise PydanticCustomError("part", "content of type {kind} is not supported: send text only", kind)
        if self.type not in self.model_fields_set:
            raise PydanticCustomError("part", "it has no field {kind}", {"kind": self.type})
        return self


class FunctionCall(_Open):
    """What the model wanted to call."""

    name: str
    arguments: str

    @property
    def template_form(self) -> dict[str, Any]:
        """As chat templates want it: arguments as an object. What is none stays as it was sent."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except ValueError:
            arguments = self.arguments
        return {**self.model_dump(exclude_none=True), "arguments": arguments}


class ToolCall(_Open):
    """A call in an earlier answer of the model."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Open):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "a {role} message needs content", {"role": self.role})
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text or part.refusal for part in self.content)
        return self.content or ""

    @property
    def template_form(self) -> dict[str, Any]:
        """The message as chat templates want it."""
        message = self.model_dump(exclude_none=True) | {"content": self.text}
        if self.tool_calls:
            calls = zip(message["tool_calls"], self.tool_calls, strict=True)
            message["tool_calls"] = [{**call, "function": sent.function.template_form} for call, sent in calls]
        return message


def characters(messages: Sequence[ChatMessage]) -> int:
    """How long a conversation is, about."""
    return sum(len(message.text) for message in messages)


class StreamOptions(_Body):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis, of which there is none to leave out


class JsonSchema(_Body):
    """A named JSON schema."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None  # either way the answer is valid


class ResponseFormat(_Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "type json_schema and the field json_schema go together")
        return self


class StructuredOutputs(_Body):
    """The form of the answer, as vLLM has it."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = Field(default=None, description="In EBNF, as xgrammar reads it.")


class Function(_Open):
    """What a tool is called, and the JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        default=None, description="Whether a call that the model chooses to make is forced to be valid"
    )


class Tool(_Open):
    """What the model may call."""

    type: Literal["function"] = "function"
    function: Function


class FunctionChoice(_Open):
    """The function that must be called."""

    name: str


class ToolChoice(_Open):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: FunctionChoice


class AnswerSoFar(Message):
    """What a client has of an answer."""

    index: int
    token_ids: list[int]  # whose text was sent; what was held back is not among them
    finish_reason: str | None = None


class Resume(Message):
    """Asks a processor to go on where another one was lost. Only frontends send it."""

    answers: list[AnswerSoFar]  # those that have begun
    cached_tokens: int | None = None  # of the prompt, by the account of the worker that began


class GenerationRequest(_Body):
    """What requests for chat and for completions have in common."""

    PROMPT: ClassVar[str]  # the field that has the prompt

    model: str = Field(description="One of those that GET /v1/models lists.")
    stream: bool = Field(False, description="Answer with server-sent events as the tokens come.")
    stream_options: StreamOptions | None = None

    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers to each prompt.")
    max_tokens: int | None = Field(None, ge=0, description="Tokens of the answer; by default what the context holds.")
    min_tokens: int | None = Field(None, ge=0, description="Before these, no end token is chosen.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="-1 and 0 are all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    logit_bias: dict[str, float] | None = Field(None, description="For token ids, what is added to their logits.")
    stop: str | list[str] | None = Field(None, description=f"Up to {STOP_STRINGS} strings that end the answer.")
    stop_token_ids: list[int] | None = Field(None, max_length=64, description="Tokens that end the answer.")
    ignore_eos: bool = Field(False, description="Go on after the model's end token.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text: the default.")

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None
    json_schema: str | None = Field(None, description="SGLang's name of guided_json.")
    regex: str | None = Field(None, description="SGLang's name of guided_regex.")
    ebnf: str | None = Field(None, description="SGLang's name of guided_grammar.")

    user: str | None = Field(None, description="The session for routing, if nothing else names one.")
    prompt_cache_key: str | None = Field(None, description="The session for routing, unless x-session-id names it.")

    resume: SkipJsonSchema[Resume | None] = None  # of what another processor has answered; clients cannot say it

    # Part of the API and without effect here.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None
    store: bool | None = None

    # Part of the API, or of others that clients are written for, and not of this pipeline.
    include_stop_str_in_output: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None
    prompt_logprobs: Unsupported = None

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > STOP_STRINGS:
            raise PydanticCustomError("too_long", "at most {limit} stop strings are allowed", {"limit": STOP_STRINGS})
        if "" in strings:
            raise PydanticCustomError("empty", "a stop string must not be empty")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, logit_bias: dict[str, float]) -> dict[str, float]:
        for token_id, bias in logit_bias.items():
            if not re.fullmatch(r"[0-9]{1,9}", token_id) or not -100 <= bias <= 100:
                raise PydanticCustomError("logit_bias", "it needs token ids, each with a number from -100 to 100")
        return logit_bias

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is only allowed when stream is true")
        if self.top_p == 0 and self.temperature != 0:
            raise PydanticCustomError("top_p", "top_p must be greater than 0, unless temperature is 0")
        if len(self._constraints) > 1:
            raise PydanticCustomError("constraints", "the answer can have one form only: send one of the fields for it")
        return self

    @classmethod
    def decode(cls, body: Any) -> Self:
        """Check `body`, decoded JSON. Raises InvalidRequest, which names the field and what is wrong with it."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise explain(error.errors(include_url=False)) from error

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def drafts(self) -> int:
        """How many are made of which these are chosen."""
        return self.choices

    @property
    def answers(self) -> int:
        """How many answers it gets."""
        return self.choices

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each; None for no logprobs at all."""
        return None

    @property
    def constraint(self) -> dict[str, Any] | None:
        """The form that the answer must have, as Dynamo's workers take it (`GuidedDecodingOptions`): one of `json`, a
        schema, `regex`, `choice`, a list of strings, and `grammar`. Raises InvalidRequest for a schema that is no JSON.
        """
        return next(iter(self._constraints), None)

    @property
    def _constraints(self) -> list[dict[str, Any]]:
        form, outputs = self.response_format, self.structured_outputs or StructuredOutputs()
        form_schema = form.json_schema.schema_ if form and form.json_schema else None
        json_object = {"type": "object"} if (form and form.type == "json_object") or outputs.json_object else None
        schemas = (form_schema, json_object, outputs.json_, self.guided_json, self.json_schema)
        return [
            *({"json": _parsed(schema)} for schema in schemas if schema is not None),
            *({"regex": regex} for regex in (outputs.regex, self.guided_regex, self.regex) if regex is not None),
            *({"choice": choice} for choice in (outputs.choice, self.guided_choice) if choice is not None),
            *({"grammar": text} for text in (outputs.grammar, self.guided_grammar, self.ebnf) if text is not None),
        ]


class ChatCompletionRequest(GenerationRequest):
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

    PROMPT = "messages"
    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far, the oldest first.")
    max_completion_tokens: int | None = Field(None, ge=0, description="max_tokens by OpenAI's newer name.")
    logprobs: bool | None = Field(None, description="Report how likely each token was.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="And so many others in its place.")

    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one answer may have several calls: the default."
    )
    functions: list[Function] | None = Field(None, description="Tools by their old name.")
    function_call: Literal["none", "auto"] | FunctionChoice | None = None

    reasoning_effort: str | None = Field(None, description="For chat templates that know it.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")
    add_generation_prompt: bool | None = Field(None, description="Begin an answer after the last message: the default.")
    continue_final_message: bool = Field(False, description="Go on with the last message, which is the assistant's.")

    # As in the base class.
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _chat_agrees(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "max_tokens", "max_tokens and max_completion_tokens say different things: send one"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        if self.continue_final_message and (self.add_generation_prompt or self.messages[-1].role != "assistant"):
            raise PydanticCustomError(
                "continue",
                "continue_final_message needs an assistant message at the end, and no add_generation_prompt after it",
            )
        names = {function.name for function in self.known_functions}
        if self.must_call and self.must_call not in names and not (self.must_call == ANY and names):
            raise PydanticCustomError("tool_choice", "tool_choice wants a call, but no such tool is among the tools")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def known_functions(self) -> list[Function]:
        """What the model may call, by whichever name it was sent."""
        return [tool.function for tool in self.tools or ()] or self.functions or []

    @property
    def callable_functions(self) -> list[Function]:
        """The same without what this request forbids to call."""
        choice = self.tool_choice or self.function_call
        return [] if choice == "none" else self.known_functions

    @property
    def template_tools(self) -> list[Tool]:
        """What the chat template is to tell the model of."""
        return [Tool(function=function) for function in self.callable_functions]

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is to know besides."""
        effort = {"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {}
        return effort | (self.chat_template_kwargs or {})

    @property
    def must_call(self) -> str | None:
        """The name of the function that must be called, or ANY if any will do; None if there need be no call."""
        match self.tool_choice or self.function_call:
            case ToolChoice() as choice:
                return choice.function.name
            case FunctionChoice() as choice:
                return choice.name
            case "required":
                return ANY
        return None


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    PROMPT = "prompt"
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text or token ids, one prompt or several"
    )
    echo: bool = Field(False, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Report how likely so many tokens were.")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Make so many, and answer with the n likeliest")
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _completion_agrees(self) -> Self:
        if self.drafts < self.choices:
            raise PydanticCustomError("best_of", "best_of must not be less than n")
        if self.stream and self.drafts > self.choices:
            raise PydanticCustomError("best_of", "what is best is known at the end only: best_of cannot be streamed")
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError("echo", "echo with logprobs is not supported: the prompt's are not known")
        if not self.prompts:
            raise PydanticCustomError("empty", "prompt must not be empty")
        if len(self.prompts) * self.drafts > MAX_ANSWERS:
            raise PydanticCustomError("answers", "at most {limit} answers can be asked for", {"limit": MAX_ANSWERS})
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @property
    def drafts(self) -> int:
        return self.best_of or self.choices

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.choices

    @property
    def token_limit(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(_Body):
    """The body of POST /tokenize, as vLLM has it: text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "send either prompt or messages")
        return self


class DetokenizeRequest(_Body):
    """The body of POST /detokenize, as vLLM has it."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


def _parsed(schema: dict[str, Any] | str) -> dict[str, Any]:
    """A JSON schema, which may come as text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise PydanticCustomError("json", "the schema is not valid JSON: {error}", {"error": str(error)}) from error
    if not isinstance(schema, dict):
        raise PydanticCustomError("json", "the schema must be a JSON object")
    return schema


_UNSUPPORTED = {"modalities", "include_stop_str_in_output", "use_beam_search", "suffix"}

# How names begin that pydantic puts in a path as if they were fields: those of the arms of unions.
_UNION_ARMS = re.compile(r"str$|list\[|dict\[|literal\[|function-|ToolChoice$|FunctionChoice$")


def explain(faults: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The fault that pydantic found deepest in a body, in the words of an API."""
    fault = max(faults, key=lambda fault: len(fault["loc"]))
    path = [part for part in fault["loc"] if not _UNION_ARMS.match(str(part))]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    message = f"{param}: {fault['msg']}" if param else fault["msg"]
    if not param and fault["type"] == "missing":
        message = "the request body is not valid JSON: it is empty"
    elif not param and fault["type"] in ("model_type", "model_attributes_type"):
        message = "the request body must be a JSON object"
    elif path and (fault["type"] == "unsupported" or path[0] in _UNSUPPORTED):
        message = f"{param} = {fault['input']!r:.80} is not supported by this pipeline"
    code = "missing_required_parameter" if fault["type"] == "missing" and param else None
    return InvalidRequest(message, param=param or None, code=code)
