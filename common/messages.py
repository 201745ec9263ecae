"""Every message that crosses a process, and every endpoint that takes one; the OpenAI API is in openai_request.py
and openai_api.py.

On Dynamo's request plane a message travels as a dictionary of the fields that were given; on ZMQ as MessagePack.
Fields that a message does not name are ignored when it is read, so either side can be upgraded first.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, Literal, Protocol, Self, TypeVar

from common.errors import KINDS, Internal, InvalidRequest, PipelineError, StartupError

import msgspec
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

NAMESPACE = "inference"

# 64 bits, which JavaScript would round: in JSON a string.
InstanceId = Annotated[int, PlainSerializer(str, return_type=str, when_used="json")]


class Message(BaseModel):
    """Base of the messages on the request plane."""

    model_config = ConfigDict(extra="ignore")

    def encode(self) -> dict[str, Any]:
        """The message as the runtime sends it."""
        return self.model_dump(exclude_unset=True)

    @classmethod
    def decode(cls, body: Any) -> Self:
        """The message that came as `body`. Raises InvalidRequest, which names the first field that is wrong."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            field = ".".join(map(str, fault["loc"]))
            raise InvalidRequest(f"invalid {cls.__name__}: {field}: {fault['msg']}") from error


class StructMessage(msgspec.Struct, kw_only=True):
    """Base of the messages that are many. msgspec makes, sends and reads them in a tenth of the time that pydantic
    takes, which is 9 µs for a token on its way through processor and frontend."""

    def encode(self) -> dict[str, Any]:
        """The message as the runtime sends it."""
        encoded: dict[str, Any] = msgspec.to_builtins(self)
        return encoded

    @classmethod
    def decode(cls, body: Any) -> Self:
        """The message that came as `body`. Raises InvalidRequest, which names the first field that is wrong."""
        try:
            return msgspec.convert(body, cls)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"invalid {cls.__name__}: {error}") from error


class TokenMessage(StructMessage, kw_only=True):
    """Base of those of which there is one for every few tokens of an answer."""


class Wire(Protocol):
    """What Message and StructMessage share."""

    def encode(self) -> dict[str, Any]: ...

    @classmethod
    def decode(cls, body: Any) -> Self: ...


Request = TypeVar("Request", bound=Wire)
Answer = TypeVar("Answer", bound=Wire)
Item = TypeVar("Item")


@dataclass(slots=True, frozen=True)
class EndpointSpec(Generic[Request, Answer]):
    """What Dynamo's endpoint of this name takes, and what the stream consists of that it answers with."""

    component: str
    name: str
    request: type[Request]
    answer: type[Answer]
    alive: bool = False  # whether the stream says that it goes on while there is nothing else to say

    @property
    def path(self) -> str:
        """Its name as `runtime.endpoint` takes it."""
        return f"{NAMESPACE}.{self.component}.{self.name}"

    def at(self, path: str) -> "EndpointSpec[Request, Answer]":
        """The same where another component serves it: at "namespace.component.endpoint" in this namespace.

        Raises StartupError if that is no such path.
        """
        match path.split("."):
            case [namespace, component, name] if namespace == NAMESPACE and component and name:
                return replace(self, component=component, name=name)
        raise StartupError(f"no endpoint is called {path!r}: give one like {NAMESPACE}.guard.process")


# An item of a stream that only says that whoever sends it lives, while there is nothing else to say.
ALIVE: dict[str, Any] = {}


class ErrorFields(Message):
    """A PipelineError on its way through the pipeline."""

    kind: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_seconds: int | None = None


class Failure(Message):
    """The last message of a stream that failed. A handler's exception would lose its type on the way, and the runtime
    would print it with a traceback, although most are mistakes of a client."""

    error: ErrorFields
    # How a worker of Dynamo's protocol says it, for Dynamo's own frontend.
    token_ids: list[int] = []
    finish_reason: dict[str, str] | None = None

    @classmethod
    def of(cls, error: PipelineError) -> "Failure":
        fields = ErrorFields.model_validate(error, from_attributes=True)
        return cls(error=fields, token_ids=[], finish_reason={"error": error.message})

    @property
    def exception(self) -> PipelineError:
        kind, error = KINDS.get(self.error.kind, PipelineError), self.error
        return kind(error.message, code=error.code, param=error.param, retry_seconds=error.retry_seconds)


class ModelIdentity(Message):
    """What a request and a worker must have in common, or no prompt would ever be found in a cache."""

    model_config = ConfigDict(frozen=True)

    name: str  # what clients call the model
    block_size: int  # tokens in a KV block
    tokenizer: str | None = None  # its fingerprint; None if unknown

    def mismatch(self, other: "ModelIdentity") -> str | None:
        """What is different about `other`; None if nothing is."""
        if other.name != self.name:
            return f"serves {other.name}"
        if other.block_size != self.block_size:
            return f"has KV blocks of {other.block_size} tokens (--block-size)"
        if self.tokenizer != other.tokenizer and None not in (self.tokenizer, other.tokenizer):
            return f"has a different tokenizer, {other.tokenizer} and not {self.tokenizer} (--model)"
        return None


# Router: inference.router.find_worker


class FindWorkerRequest(Message):
    """Asks for the worker that should run a prompt."""

    model: ModelIdentity
    local_hashes: list[int]  # `compute_block_hash_for_seq` of the prompt: of each full block, its tokens alone
    tokens: int  # the prompt's length
    request_id: str | None = None
    session: str | None = None  # requests of one session have much in common
    priority: int = 0  # higher is more urgent
    excluded: list[InstanceId] = Field(default_factory=list)  # instances that already failed this request
    beside: InstanceId | None = None  # one that has this prompt already: the worker of another answer to it
    begun: bool = False  # whether a part of the answer is there already: then it does not wait in a queue
    explain: bool = False  # answer with the cost of every worker


class WorkerCost(StructMessage, kw_only=True):
    """Why a worker was chosen or not. All in blocks."""

    worker_id: str
    overlap_blocks: int  # leading blocks of the prompt in its KV cache
    expected_blocks: int  # leading blocks in its cache or about to be computed there for another request
    prefill_blocks: float  # waiting to be computed there
    decode_blocks: float  # held by requests in progress there
    cost: float  # by the router's policy; 0 if that names none


class RoutingDecision(StructMessage, kw_only=True, omit_defaults=True):
    """The chosen worker. It counts the request as its load until the stream that brought this message ends."""

    instance_id: int
    worker_id: str  # the worker's own name for itself, for people
    overlap_blocks: int  # leading blocks of the prompt that this worker has in its KV cache
    cost: float  # in blocks; 0 if the policy names none
    context_length: int | None = None  # tokens of prompt and answer together; None if the worker did not say
    simulated: bool = False
    reasons: list[WorkerCost] = []  # for each candidate, if asked to explain
    by_load: bool = False  # whether no router chose it, because none answered


FIND_WORKER = EndpointSpec("router", "find_worker", FindWorkerRequest, RoutingDecision)


# Router: inference.router.workers


class WorkersRequest(Message):
    """Asks a router what it knows of the workers."""


class WorkerStatus(Message):
    """What a router knows of a worker."""

    instance_id: InstanceId
    worker_id: str
    status: Literal["joined", "silent", "refused"]  # silent: announces nothing, so it is routed to by load alone
    model: ModelIdentity | None = None
    reason: str | None = None  # why it was refused, or gets no requests
    total_blocks: int | None = None  # KV blocks that fit
    cached_blocks: int = 0  # KV blocks that it holds, by its events
    prefill_blocks: float = 0.0  # waiting to be computed
    decode_blocks: float = 0.0  # held by requests in progress
    requests: int = 0  # in progress, of those that this router sent there
    routed_requests: int = 0  # that this router sent there since the worker joined
    routed_blocks: float = 0.0  # of their prompts
    overlap_blocks: int = 0  # of those, the ones that were cached there
    events: int = 0  # batches of KV events received
    lost: int = 0  # times that events were lost for good, and the cache was read again
    silent_seconds: float | None = None  # since it was heard of, once it is taken for hanging
    heard_seconds: float | None = None  # since the last report or KV event; None if none has come
    last_event_seconds: float | None = None  # since the last one came
    event_lag_seconds: float | None = None  # that it took to come, if the clocks of both machines agree


class RouterStatus(Message):
    """A router's view."""

    router: InstanceId
    policy: str
    workers: list[WorkerStatus]
    waiting: int = 0  # prompts in its queues
    unserved: list[str] = []  # what requests asked for that no engine fits, and why


WORKERS = EndpointSpec("router", "workers", WorkersRequest, RouterStatus)


# Engine: inference.engine.describe


class DescribeRequest(Message):
    """Asks a worker or a processor what it is."""


class WorkerInfo(Message):
    """What a worker announces about itself: enough to route to it and to follow its cache."""

    instance_id: InstanceId
    worker_id: str
    model: ModelIdentity
    total_blocks: int  # KV blocks that fit
    context_length: int  # tokens of prompt and answer together
    simulated: bool = False  # its tokens are made up, so they have no likelihood and obey no grammar
    kv_events: str  # ZMQ address of its KV events
    kv_replay: str  # ZMQ address that sends past KV events again
    load: str  # ZMQ address of its load


DESCRIBE_WORKER = EndpointSpec("engine", "describe", DescribeRequest, WorkerInfo)


# Engine: inference.engine.die, in a demo


class DieRequest(Message):
    """Asks an engine to die as if its machine had: with SIGKILL, in the middle of everything."""


class Die(Message):
    """Never comes."""


DIE = EndpointSpec("engine", "die", DieRequest, Die)


# Engine: inference.engine.cache


class SnapshotRequest(Message):
    """Asks a worker for everything that is in its KV cache."""


class StoredBlocks(StructMessage, kw_only=True):
    """A chain of blocks in a KV cache, each the parent of the next."""

    parent_id: int | None  # the block before the first; None if that begins a prompt
    block_ids: list[int]  # the engine's own, for a block in its place in the sequence: 64 bits without a sign
    local_hashes: list[int]  # `compute_block_hash_for_seq` of each block's tokens


class CacheSnapshot(StructMessage, kw_only=True):
    """Part of a worker's KV cache. All parts of one answer are of the same moment."""

    sequence: int  # of the last batch of KV events that is in it; -1 if none
    chains: list[StoredBlocks]


CACHE = EndpointSpec("engine", "cache", SnapshotRequest, CacheSnapshot)


# Engine: inference.engine.generate. Dynamo's own worker protocol: the names are those of its `PreprocessedRequest` and
# `LLMEngineOutput` (lib/llm/src/protocols/common), so that Dynamo's workers can serve this pipeline and ours can serve
# Dynamo's frontend.


class StopConditions(Message):
    """When to stop, in tokens. Stop strings are text and so the processor's business."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None


class SamplingOptions(Message):
    """How to choose the next token; None leaves it to the engine."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # by token id; not known to Dynamo
    guided_decoding: dict[str, Any] | None = None  # one of json, regex, choice, grammar and structural_tag


class OutputOptions(Message):
    """What to report besides the tokens."""

    logprobs: int | None = None  # how many of the likeliest tokens beside each; None: no logprobs at all


class GenerateRequest(Message):
    """A tokenized prompt (Dynamo's `PreprocessedRequest`)."""

    token_ids: list[int]
    model: str
    stop_conditions: StopConditions
    sampling_options: SamplingOptions
    output_options: OutputOptions = OutputOptions()
    eos_token_ids: list[int] = Field(default_factory=list)
    annotations: list[str] = Field(default_factory=list)

    def encode(self) -> dict[str, Any]:
        """Whole: Dynamo's workers require its fields."""
        return self.model_dump()


class PromptTokensDetails(Message):
    """What is known of the prompt's tokens."""

    cached_tokens: int | None = None


class CompletionTokensDetails(Message):
    """What is known of the answer's tokens."""

    reasoning_tokens: int | None = None


class Usage(Message):
    """Token counts, in the shape that OpenAI and Dynamo share."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None

    @classmethod
    def received(cls, body: Any) -> Self:
        """What a worker or a processor says at the end. Raises Internal if that is no usage."""
        try:
            return cls.decode(body)
        except InvalidRequest as error:
            raise Internal(f"a stage answered with an {error}") from error


class EngineOutput(TokenMessage, kw_only=True, omit_defaults=True):
    """The next tokens of an answer (Dynamo's `LLMEngineOutput`)."""

    token_ids: list[int] = []  # the new ones only
    log_probs: list[float] | None = None  # of each token, its natural logarithm
    top_logprobs: list[list[dict[str, Any]]] | None = None  # of each token, the likeliest: {token_id, logprob, …}
    finish_reason: str | dict[str, Any] | None = None  # on the last item
    completion_usage: dict[str, Any] | None = None  # a Usage, on the first and the last item

    def extend(self, later: "EngineOutput") -> None:
        """Take in the output that follows this one."""
        self.token_ids += later.token_ids
        self.log_probs = _joined(self.log_probs, later.log_probs)
        self.top_logprobs = _joined(self.top_logprobs, later.top_logprobs)
        self.finish_reason = later.finish_reason
        self.completion_usage = later.completion_usage or self.completion_usage

    def encode(self) -> dict[str, Any]:
        """With its tokens, even if there are none: Dynamo's frontend requires them."""
        return {"token_ids": self.token_ids, **super().encode()}

    @classmethod
    def decode(cls, body: Any) -> Self:
        """As any message, but one that says nothing in fields that nobody knows is refused: they are misspelt."""
        output = super().decode(body)
        if not output.token_ids and not output.finish_reason and (unknown := body.keys() - _LLM_ENGINE_OUTPUT):
            raise InvalidRequest(f"invalid EngineOutput: there are no fields {', '.join(sorted(unknown))}")
        return output


def _joined(first: list[Item] | None, second: list[Item] | None) -> list[Item] | None:
    return [*(first or ()), *second] if second else first


# The fields of Dynamo's LLMEngineOutput, version 1.6.1.
_LLM_ENGINE_OUTPUT = {
    *("token_ids", "tokens", "text", "output_type", "content_parts", "cum_log_probs", "log_probs", "top_logprobs"),
    *("finish_reason", "stop_reason", "index", "completion_usage", "disaggregated_params", "encoder_result"),
    *("worker_trace_link", "extra_args", "engine_data", "routing_data"),
}


GENERATE = EndpointSpec("engine", "generate", GenerateRequest, EngineOutput)


# ZMQ: three frames, [topic, sequence number (8 bytes, big-endian), MessagePack of the body]. The bodies are those of
# SGLang (srt/disaggregation/kv_events.py, srt/managers/scheduler_components/load_publisher.py); vLLM's KV events and
# those of Dynamo's mocker are the same.


class BlockStored(msgspec.Struct, tag="BlockStored"):
    """Blocks that are now in the cache: a chain, each the parent of the next."""

    block_hashes: list[int | bytes]  # what we call block_ids: the engine's own, for a block in its place
    parent_block_hash: int | bytes | None  # None: the first block starts a sequence
    token_ids: list[int]  # the tokens of all of them
    block_size: int


class BlockRemoved(msgspec.Struct, tag="BlockRemoved"):
    """Blocks that are no longer in the cache."""

    block_hashes: list[int | bytes]


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared"):
    """The cache is empty."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEventBatch(msgspec.Struct, array_like=True):
    """What changed in a worker's KV cache in one step of its scheduler."""

    timestamp: float
    events: list[msgspec.Raw]  # of KvEvent, read one by one, so that one that nobody knows does not spoil the others
    dp_rank: int | None = None


class LoadStat(msgspec.Struct, array_like=True, tag="LoadStat"):
    """How busy a worker is: sent when it changes and at least every second."""

    running_requests: int
    waiting_requests: int
    used_tokens: int  # KV cache held by running requests, in tokens
    total_tokens: int  # the KV cache's capacity, in tokens
    dp_rank: int | None = None
    waiting_prefill_tokens: int = 0  # prompt tokens of waiting requests that are not cached
