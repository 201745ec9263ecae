"""Every message that crosses a process, except the OpenAI API, which is in chat.py.

On Dynamo's request plane a message travels as the plain dictionary of its structure; on ZMQ as MessagePack. Fields that
a structure does not name are ignored when it is read, so each side can be upgraded first.
"""

from typing import Any

import msgspec


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Base of the structures below: built with keywords, and sent without the fields that hold their default."""


# Router: inference.router.find_worker


class FindWorkerRequest(Message):
    """Asks for the worker that should run a prompt."""

    block_hashes: list[int]  # `compute_block_hash_for_seq` of the prompt: one per full block
    tokens: int  # the prompt's length
    block_size: int  # tokens in a block, as used for block_hashes
    model: str
    tokenizer: str | None = None  # its fingerprint; None if the caller does not know
    token_ids: list[int] | None = None  # the prompt itself, which only Dynamo's own KvRouter needs
    excluded: list[int] = []  # instances that already failed this request
    explain: bool = False  # answer with the cost of every worker


class WorkerCost(Message):
    """Why a worker was chosen or not. All in blocks."""

    worker_id: str
    cached: int  # leading blocks of the prompt in its KV cache
    expected: int  # leading blocks of the prompt in its cache or about to be computed there for another request
    prefill: float  # waiting to be computed there
    decode: float  # held by requests in progress there
    cost: float


class RoutingDecision(Message):
    """The chosen worker. It counts the request as its load until the stream that brought this message ends."""

    instance_id: int
    worker_id: str  # the worker's own name for itself, for people
    overlap_blocks: int  # leading blocks of the prompt that this worker has in its KV cache
    cost: float  # in blocks; see cost.py
    context_length: int | None = None  # tokens of prompt and answer together; None if the worker did not say
    reasons: list[WorkerCost] = []  # for each candidate, if asked to explain


# Router: inference.router.workers


class WorkersRequest(Message):
    """Asks a router what it knows of the workers."""


class WorkerStatus(Message, omit_defaults=False):
    """What a router knows of a worker."""

    instance_id: int
    worker_id: str
    status: str  # "joined", "silent" (announces nothing: routed to by load alone) or "refused"
    reason: str | None = None  # why it was refused
    total_blocks: int | None = None  # KV blocks that fit
    cached_blocks: int = 0  # KV blocks that it holds, by its events
    prefill_blocks: float = 0.0  # waiting to be computed
    decode_blocks: float = 0.0  # held by requests in progress
    requests: int = 0  # in progress, of those that this router sent there
    routed_requests: int = 0  # that this router sent there since the worker joined
    routed_blocks: float = 0.0  # of their prompts,
    overlap_blocks: int = 0  # and of those, the ones that were cached there
    events: int = 0  # batches of KV events received
    lost: int = 0  # times that events were lost for good or the cache was read anew
    last_event_seconds: float | None = None  # since the last one came
    event_lag_seconds: float | None = None  # that it took to come, if the clocks of both machines agree


class RouterStatus(Message, omit_defaults=False):
    """A router's view."""

    router: int  # its instance
    policy: str
    workers: list[WorkerStatus]


# Engine: inference.engine.describe


class DescribeRequest(Message):
    """Asks a worker or a processor what it is."""


class WorkerInfo(Message):
    """What a worker announces about itself: enough to route to it and to follow its cache."""

    instance_id: int
    worker_id: str
    model: str
    block_size: int  # tokens in a KV block
    total_blocks: int  # KV blocks that fit
    context_length: int  # tokens of prompt and answer together
    kv_events: str  # ZMQ address of its KV events
    kv_replay: str  # ZMQ address that sends past KV events again
    load: str  # ZMQ address of its load
    tokenizer: str | None = None  # its fingerprint; None if there is no file to take it from


# Engine: inference.engine.cache


class SnapshotRequest(Message):
    """Asks a worker for everything that is in its KV cache."""


class StoredBlocks(Message):
    """A chain of blocks in a KV cache, each the parent of the next."""

    parent: int | None  # name of the block before the first; None if that begins a prompt
    names: list[int]  # the engine's own names of the blocks in their place in the sequence, 64 bits without a sign
    hashes: list[int]  # `compute_block_hash_for_seq` of each block's tokens


class CacheSnapshot(Message):
    """Part of a worker's KV cache. All parts of one answer are of the same moment."""

    sequence: int  # of the last batch of KV events that is in it; -1 if none
    chains: list[StoredBlocks]  # parents before their children


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


class GenerateRequest(msgspec.Struct, kw_only=True):
    """A tokenized prompt (Dynamo's `PreprocessedRequest`). Sent whole: Dynamo's workers require its fields."""

    token_ids: list[int]
    model: str
    stop_conditions: StopConditions
    sampling_options: SamplingOptions
    output_options: dict[str, Any] = {}
    eos_token_ids: list[int] = []
    annotations: list[str] = []


class PromptTokensDetails(Message):
    cached_tokens: int | None = None


class Usage(Message, omit_defaults=False):
    """Token counts, in the shape that OpenAI and Dynamo share."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class EngineOutput(Message):
    """The next tokens of an answer (Dynamo's `LLMEngineOutput`)."""

    token_ids: list[int] = []  # the new ones only
    finish_reason: str | dict[str, Any] | None = None  # on the last item
    completion_usage: Usage | None = None  # on the first and the last item


# ZMQ: three frames, [topic, sequence number (8 bytes, big-endian), MessagePack of the body]. The bodies are those of
# SGLang (srt/disaggregation/kv_events.py, srt/managers/scheduler_components/load_publisher.py); vLLM's KV events and
# those of Dynamo's mocker are the same.


class BlockStored(msgspec.Struct, tag="BlockStored"):
    """Blocks that are now in the cache: a chain, each the parent of the next."""

    block_hashes: list[int | bytes]  # the engine's own names for the blocks, in their place in the sequence
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
    events: list[KvEvent]
    dp_rank: int | None = None


class LoadStat(msgspec.Struct, array_like=True, tag="LoadStat"):
    """How busy a worker is: sent when it changes and at least every second."""

    running_requests: int
    waiting_requests: int
    used_tokens: int  # KV cache held by running requests, in tokens
    total_tokens: int  # the KV cache's capacity, in tokens
    dp_rank: int | None = None
    waiting_prefill_tokens: int = 0  # prompt tokens of waiting requests that are not cached
