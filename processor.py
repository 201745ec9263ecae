"""Processor: turns conversations into tokens, and tokens into answers.

    inference.processor.process     chat completion request -> chat completion chunks
    inference.processor.describe    which model this is

For each request it renders the model's chat template, tokenizes, asks the router for a worker, streams tokens from that
worker, and turns them back into text up to a stop string. If the worker dies on the way, another one continues from the
last token.

It knows nothing about HTTP, and of the workers only what the router tells it. It serves one model; for several, run
several.

In production Dynamo this is the preprocessor, the backend and the migration operator (lib/llm/src/preprocessor.rs,
backend.rs and migration.rs), which are stages of the frontend's process.
"""

import argparse
import asyncio
import hashlib
import logging
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from common.coalescer import Coalescer
from common.errors import Cancelled, Internal, InvalidRequest, NotFound, Unavailable
from common.messages import (
    FIND_WORKER,
    GENERATE,
    DescribeRequest,
    EngineOutput,
    FindWorkerRequest,
    GenerateRequest,
    ModelIdentity,
    PromptTokensDetails,
    RoutingDecision,
    StopConditions,
    Usage,
)
from common.model import add_options, identify, resolve_model
from common.openai_api import (
    DESCRIBE_MODEL,
    PROCESS,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChunkChoice,
    Delta,
    ModelCard,
    Routing,
)
from common.remote import Remote
from common.service import Service, parser, request_id, run
from common.text.chat_model import ChatModel
from common.text.detokenizer import Detokenizer
from common.text.stop_strings import StopStrings

from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

log = logging.getLogger(__name__)

MIGRATIONS = 3  # times that a request may move to another worker
ROUTER_SECONDS = 5.0  # to wait for a router that is restarting
THREAD_CHARACTERS = 4096  # a conversation from this length on is encoded beside the event loop
MAX_SESSION = 128  # characters of a session's name that routers keep; a longer one is hashed


class Generation:
    """The tokens of one request: its prompt, the answer so far, and the workers that failed it."""

    def __init__(self, request: ChatCompletionRequest, prompt: list[int]) -> None:
        self.request = request
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.decision: RoutingDecision | None = None  # who answers now
        self.failed: list[int] = []
        self.finished = False

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    def add(self, output: EngineOutput) -> None:
        """Take in what a worker says."""
        self.tokens += output.token_ids
        self.finished = output.finish_reason is not None

    def limit(self, context_length: int) -> int:
        """How many tokens the answer may have. Raises InvalidRequest if the context does not hold them."""
        wanted = self.request.token_limit or 1
        if self.prompt_tokens + wanted > context_length:
            raise InvalidRequest(
                f"This model's maximum context length is {context_length} tokens. However, you requested "
                f"{self.prompt_tokens + wanted} tokens ({self.prompt_tokens} in the messages, {wanted} in the "
                "completion). Please reduce the length of either.",
                code="context_length_exceeded",
                param="messages",
            )
        return self.request.token_limit or context_length - self.prompt_tokens


class Processor:
    """Answers chat completion requests for one model."""

    def __init__(
        self,
        model: ChatModel,
        identity: ModelIdentity,
        *,
        router: Remote[FindWorkerRequest, RoutingDecision],
        engines: Remote[GenerateRequest, EngineOutput],
        coalescer: Coalescer,
    ) -> None:
        self._model = model
        self._identity = identity
        self._router = router
        self._engines = engines
        self._coalescer = coalescer
        self._created = int(time.time())

    async def describe(self, request: DescribeRequest, context: Context) -> AsyncIterator[ModelCard]:
        """Yield the card of the model."""
        yield ModelCard(id=self._model.name, created=self._created, context_length=self._model.context_length)

    async def process(self, request: ChatCompletionRequest, context: Context) -> AsyncIterator[ChatCompletionChunk]:
        """Yield the answer to a chat completion request, chunk by chunk; a last chunk has the usage.

        Raises NotFound for another model, InvalidRequest for what does not fit into it, Unavailable if no router or
        worker is left, Internal if a worker breaks the protocol.
        """
        if request.model != self._model.name:
            raise NotFound(
                f"the model {request.model!r} does not exist; this processor serves {self._model.name!r}",
                code="model_not_found",
                param="model",
            )
        prompt = await self._encode(request)
        generation = Generation(request, prompt)
        answer = Answer(self._model, request, context.id(), len(prompt))
        async with aclosing(self._coalescer.coalesced(self._generate(generation, context))) as outputs:
            async for output in outputs:
                if chunk := answer.add(output, generation.decision):
                    yield chunk
                if answer.finish_reason:
                    break
        yield answer.usage()
        counts = f"prompt_tokens={len(prompt)} completion_tokens={answer.tokens} migrations={len(generation.failed)}"
        log.info("request_id=%s finish_reason=%s %s", request_id(context), answer.finish_reason, counts)

    async def _encode(self, request: ChatCompletionRequest) -> list[int]:
        """The prompt's token ids. A short one is encoded before a thread would have begun."""
        if sum(len(message.text) for message in request.messages) < THREAD_CHARACTERS:
            return self._model.encode(request.messages)
        return await asyncio.to_thread(self._model.encode, request.messages)

    async def _generate(self, generation: Generation, context: Context) -> AsyncGenerator[EngineOutput]:
        """Yield what a worker generates; if it fails, what another one generates from there on."""
        while not generation.finished:
            wanted = self._find_worker(generation, context)
            async with self._router.open(wanted, context, retry_seconds=ROUTER_SECONDS) as decision:
                generation.decision = decision
                async with aclosing(self._attempt(generation, decision, context)) as outputs:
                    async for output in outputs:
                        yield output

    async def _attempt(
        self, generation: Generation, decision: RoutingDecision, context: Context
    ) -> AsyncGenerator[EngineOutput]:
        """Yield what this worker generates. If it fails on the way, that is noted in `generation`."""
        limit = generation.limit(min(self._model.context_length, decision.context_length or sys.maxsize))
        if generation.generated >= limit:  # only the word that the answer is finished was lost
            generation.finished = True
            yield EngineOutput(finish_reason="length")
            return
        request = self._generate_request(generation, limit - generation.generated)
        try:
            async with aclosing(self._engines.stream(request, context, [decision.instance_id])) as outputs:
                async for output in outputs:
                    if output.finish_reason == "cancelled":
                        raise _gave_up(decision, context)
                    if output.finish_reason:
                        output.finish_reason = _finish_reason(output.finish_reason)
                    generation.add(output)
                    yield output
                    if generation.finished:
                        return
            if context.is_stopped():
                raise Cancelled("the caller went away")
            raise Internal("it ended its stream without a finish_reason")
        except Unavailable as error:
            generation.failed.append(decision.instance_id)
            message = "request_id=%s migrates from worker %s after %d tokens: %s"
            log.warning(message, request_id(context), decision.worker_id, generation.generated, error)
            if len(generation.failed) > MIGRATIONS:
                raise
        except Internal as error:
            raise Internal(f"worker {decision.worker_id} failed: {error}") from error

    def _find_worker(self, generation: Generation, context: Context) -> FindWorkerRequest:
        request, metadata = generation.request, context.metadata
        return FindWorkerRequest(
            model=self._identity,
            local_hashes=compute_block_hash_for_seq(generation.tokens, self._identity.block_size),
            tokens=len(generation.tokens),
            request_id=request_id(context),
            session=_session(metadata.get("x-session-id") or request.prompt_cache_key or request.user),
            priority=_priority(metadata.get("x-priority") or "0"),
            excluded=generation.failed,
        )

    def _generate_request(self, generation: Generation, max_tokens: int) -> GenerateRequest:
        request = generation.request
        return GenerateRequest(
            token_ids=generation.tokens,
            model=self._model.name,
            stop_conditions=StopConditions(max_tokens=max_tokens, ignore_eos=request.ignore_eos),
            sampling_options=self._model.sampling(
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k or None,
                min_p=request.min_p,
                seed=request.seed,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
            ),
            eos_token_ids=self._model.eos_token_ids,
        )


class Answer:
    """One answer on its way from tokens to chunks."""

    def __init__(self, model: ChatModel, request: ChatCompletionRequest, request_id: str, prompt_tokens: int) -> None:
        self._model = model
        self._ends = frozenset() if request.ignore_eos else frozenset(model.eos_token_ids)
        self._detokenizer = Detokenizer(model.tokenizer)
        self._stops = StopStrings(request.stop_strings)
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._prompt_tokens = prompt_tokens
        self._prompt_details: PromptTokensDetails | None = None  # some workers say nothing of it
        self._begun = False
        self.tokens = 0
        self.finish_reason: str | None = None

    def add(self, output: EngineOutput, decision: RoutingDecision | None) -> ChatCompletionChunk | None:
        """The chunk for an engine's output; None if no character is complete yet. Sets `finish_reason` at the end.

        decision: who answers, which the first chunk says.
        """
        if not self._begun and output.completion_usage:
            self._prompt_details = Usage.received(output.completion_usage).prompt_tokens_details
        # With stop strings one by one, to know which token completed it: those after it do not count.
        pieces = [[token_id] for token_id in output.token_ids] if self._stops.strings else [output.token_ids]
        text = "".join(map(self._add_tokens, pieces))
        if self._stops.found:
            self.finish_reason = "stop"
        elif output.finish_reason:
            self.finish_reason = str(output.finish_reason)
            text += self._stops.add(self._detokenizer.flush())
            text += self._stops.flush()
        if not (text or self.finish_reason) and self._begun:
            return None
        delta = Delta(content=text) if self._begun else Delta(role="assistant", content=text)
        chunk = self._chunk([ChunkChoice(delta=delta, finish_reason=self.finish_reason)])
        if not self._begun and decision:
            chunk.routing = Routing(worker_id=decision.worker_id, overlap_blocks=decision.overlap_blocks)
        self._begun = True
        return chunk

    def usage(self) -> ChatCompletionChunk:
        """The chunk that follows the answer."""
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self.tokens,
            total_tokens=self._prompt_tokens + self.tokens,
            prompt_tokens_details=self._prompt_details,
        )
        chunk = self._chunk([])
        chunk.usage = usage.encode()
        return chunk

    def _add_tokens(self, token_ids: Sequence[int]) -> str:
        if self._stops.found:  # the engine was faster than we
            return ""
        self.tokens += len(token_ids)
        return self._stops.add(self._detokenizer.add([token for token in token_ids if token not in self._ends]))

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self._id, created=self._created, model=self._model.name, choices=choices)


def _finish_reason(reason: str | dict[str, object]) -> str:
    """A worker's reason to end, as OpenAI names it. Raises Internal if it is a failure."""
    match reason:
        case "stop" | "eos":
            return "stop"
        case "length" | "content_filter":
            return str(reason)
        case _:
            raise Internal(f"it ended with {reason}")


def _session(name: str | None) -> str | None:
    """A session's name as routers keep it."""
    if name is None or len(name) <= MAX_SESSION:
        return name
    return hashlib.sha256(name.encode()).hexdigest()


def _priority(text: str) -> int:
    """A request's priority. Raises InvalidRequest if it is none."""
    try:
        return int(text)
    except ValueError as error:
        raise InvalidRequest("x-priority must be an integer", param="x-priority") from error


def _gave_up(decision: RoutingDecision, context: Context) -> Cancelled | Unavailable:
    """Why a worker ended a request before its time."""
    if context.is_stopped():
        return Cancelled("the caller went away")
    return Unavailable(f"worker {decision.worker_id} stopped in the middle of an answer")


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    resolved = resolve_model(args.model)
    identity = identify(resolved, name=args.model_name, block_size=args.block_size)
    describe, process = runtime.endpoint(DESCRIBE_MODEL.path), runtime.endpoint(PROCESS.path)
    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    engines = Remote(GENERATE, await runtime.endpoint(GENERATE.path).client())
    processor = Processor(
        ChatModel(resolved, identity.name),
        identity,
        router=router,
        engines=engines,
        coalescer=Coalescer(args.coalesce_ms),
    )
    async with Service(runtime, drain_seconds=args.drain_seconds) as service:
        service.add(describe, DESCRIBE_MODEL, processor.describe)
        service.add(process, PROCESS, processor.process)
        await service.serve()
        await service.wait_for(router, engines)
        await service.stopped()


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__)
    add_options(options)
    Coalescer.add_option(options)
    return options


if __name__ == "__main__":
    sys.exit(run(main, arguments().parse_args()))
