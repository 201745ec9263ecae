"""Processor: turns conversations into tokens, and tokens into answers.

    inference.processor.process       chat completion request -> chat completion chunks
    inference.processor.complete      text completion request -> the same
    inference.processor.tokenize      text or conversation -> token ids
    inference.processor.detokenize    token ids -> text
    inference.processor.describe      which model this is

For each request it renders the model's chat template, tokenizes, asks the router for a worker, streams tokens from that
worker, and turns them back into text up to a stop string. If the worker dies on the way, another one continues from the
last token. Several answers to one prompt are several streams, on one worker.

It knows nothing about HTTP, and of the workers only what the router tells it. It serves one model; for several, run
several.

In production Dynamo this is the preprocessor, the backend and the migration operator (lib/llm/src/preprocessor.rs,
backend.rs and migration.rs), which are stages of the frontend's process.
"""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from common.coalescer import Coalescer
from common.errors import Cancelled, Internal, InvalidRequest, Lost, NotFound, Unavailable
from common.events import WATCH_PROCESSOR, Asked, Feed, Moved
from common.log import log_request, names, request_id
from common.messages import (
    FIND_WORKER,
    GENERATE,
    WORKERS,
    DescribeRequest,
    EngineOutput,
    GenerateRequest,
    ModelIdentity,
    RoutingDecision,
)
from common.model import add_options, identify, resolve_model
from common.openai_api import (
    COMPLETE,
    DESCRIBE_MODEL,
    DETOKENIZE,
    PROCESS,
    TOKENIZE,
    ChatCompletionChunk,
    ModelCard,
    Text,
    Tokens,
)
from common.openai_request import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    characters,
)
from common.remote import Remote, linked
from common.service import Service, parser, run
from common.text.answer import Answer
from common.text.chat_model import ChatModel
from common.text.generation import Generation, best, check_ids, generations_of, resume, routing_of, usage_of
from common.text.limits import Limits
from common.text.merged import merged
from common.text.reasoning import Reasoning
from common.text.routers import Routers
from common.text.schemas import checked
from common.text.tool_calls import constraint_of, tool_calls_of
from common.tracing import span

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker
from msgspec import UNSET
from msgspec.structs import replace

log = logging.getLogger(__name__)

Result = TypeVar("Result")

VICTIMS = 2  # workers that died before they had made a token of a request
ACK_SECONDS = 1.0  # for a worker to take a request, if there are others
THREAD_CHARACTERS = 4096  # a text from this length on is encoded beside the event loop


class Processor:
    """Answers chat completion requests for one model."""

    def __init__(
        self,
        model: ChatModel,
        identity: ModelIdentity,
        *,
        routers: Routers,
        engines: Remote[GenerateRequest, EngineOutput],
        coalescer: Coalescer,
        feed: Feed,
        migration_limit: int = 3,
    ) -> None:
        self._model = model
        self._identity = identity
        self._routers = routers
        self._engines = engines
        self._coalescer = coalescer
        self._feed = feed
        self._migration_limit = migration_limit
        self._created = int(time.time())
        self._fingerprint = f"fp_{identity.tokenizer or identity.name}"[:24]

    async def describe(self, request: DescribeRequest, context: Context) -> AsyncIterator[ModelCard]:
        """Yield the card of the model."""
        yield ModelCard(id=self._model.name, created=self._created, context_length=self._model.context_length)

    async def process(self, request: ChatCompletionRequest, context: Context) -> AsyncIterator[ChatCompletionChunk]:
        """Yield the answers to a chat completion request, chunk by chunk; a last chunk has the usage.

        Raises NotFound for another model, InvalidRequest for what does not fit into it, Unavailable if no router or
        worker is left, Internal if a worker breaks the protocol.
        """
        self._check_model(request)
        parsers = self._model.parsers
        constraint = await checked(constraint_of(request, parsers.tool_calls))
        text, prompt = await _aside(
            context,
            characters(request.messages),
            self._prompt,
            request.messages,
            request.template_tools,
            request.template_variables,
            answer=request.add_generation_prompt is not False,
            go_on=request.continue_final_message,
        )
        completion = self._completion(f"chatcmpl-{context.id()}")
        generations = generations_of(request, [prompt], constraint)
        answers = [
            Answer(
                self._model,
                request,
                completion,
                index=index,
                reasoning=Reasoning(parsers.reasoning, text) if parsers.reasoning and not constraint else None,
                tool_calls=tool_calls_of(request, parsers.tool_calls),
                old_calls=bool(request.functions),
            )
            for index in range(len(generations))
        ]
        async with aclosing(self._answers(generations, answers, completion, context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def complete(self, request: CompletionRequest, context: Context) -> AsyncIterator[ChatCompletionChunk]:
        """Yield the answers to a text completion request, as `process` does: for each prompt those to it, in order."""
        self._check_model(request)
        constraint = await checked(request.constraint)
        prompts = [await self._encode(each, context) if isinstance(each, str) else each for each in request.prompts]
        for prompt in prompts:
            check_ids(prompt, self._model.tokenizer.get_vocab_size())
        completion = self._completion(f"cmpl-{context.id()}")
        generations = generations_of(request, prompts, constraint)
        begins = [self._model.tokenizer.decode(each.tokens) if request.echo else "" for each in generations]
        answers = [
            Answer(self._model, request, completion, index=index, begin=begin) for index, begin in enumerate(begins)
        ]
        stream = self._answers(generations, answers, completion, context)
        if request.drafts > request.choices:
            stream = best(stream, answers, request.drafts, request.choices)
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                yield chunk

    async def tokenize(self, request: TokenizeRequest, context: Context) -> AsyncIterator[Tokens]:
        """Yield the tokens of a text or a conversation."""
        if request.messages:
            conversation = (request.messages, request.tools or (), request.chat_template_kwargs)
            answer = request.add_generation_prompt
            _, tokens = await _aside(context, characters(request.messages), self._prompt, *conversation, answer=answer)
        else:
            tokens = await self._encode(request.prompt or "", context, special=request.add_special_tokens)
        strings = [self._model.texts.text_of(token) for token in tokens] if request.return_token_strs else None
        yield Tokens(count=len(tokens), max_model_len=self._model.context_length, tokens=tokens, token_strs=strings)

    async def detokenize(self, request: DetokenizeRequest, context: Context) -> AsyncIterator[Text]:
        """Yield the text of tokens."""
        yield Text(prompt=self._model.tokenizer.decode(request.tokens, skip_special_tokens=False))

    def _check_model(self, request: GenerationRequest) -> None:
        if request.model != self._model.name:
            raise NotFound(
                f"the model {request.model!r} does not exist; this processor serves {self._model.name!r}",
                code="model_not_found",
                param="model",
            )

    def _prompt(self, *conversation: Any, **options: Any) -> tuple[str, list[int]]:
        """What `ChatModel.render` makes of a conversation, and its token ids."""
        text = self._model.render(*conversation, **options)
        return text, self._model.encode(text)

    async def _encode(self, text: str, context: Context, *, special: bool = True) -> list[int]:
        """The token ids of a text that no template has written."""
        return await _aside(context, len(text), self._model.encode, text, add_special_tokens=special, param="prompt")

    def _completion(self, name: str) -> ChatCompletionChunk:
        """What all chunks of the answers to a request have in common."""
        now = int(time.time())
        return ChatCompletionChunk(
            id=name, created=now, model=self._model.name, system_fingerprint=self._fingerprint, choices=[]
        )

    async def _answers(
        self,
        generations: Sequence[Generation],
        answers: Sequence[Answer],
        completion: ChatCompletionChunk,
        context: Context,
    ) -> AsyncGenerator[ChatCompletionChunk]:
        """Yield the chunks of all answers as they come, then the usage."""
        record = "x-record" in context.metadata
        resume(generations, answers)
        async with AsyncExitStack() as stack:
            contexts = [await stack.enter_async_context(linked(context, answer.index)) for answer in answers]
            streams = [self._answer(*each) for each in zip(generations, answers, contexts, strict=True)]
            async with aclosing(merged(streams)) as chunks:
                async for chunk in chunks:
                    if record and chunk.routing:
                        chunk.routing.prompt = generations[0].blocks(self._identity.block_size)
                    yield chunk
        usage = usage_of(generations, answers)
        routing = routing_of(generations, self._identity.block_size)
        yield replace(completion, usage=usage.encode(), routing=routing or UNSET)
        log_request(
            log,
            context,
            finish_reason=",".join(sorted({str(answer.finish_reason) for answer in answers})),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            migrations=routing.migrations if routing else 0,
        )

    async def _answer(
        self, generation: Generation, answer: Answer, context: Context
    ) -> AsyncGenerator[ChatCompletionChunk]:
        """Yield the chunks of one answer, if it has not ended before it came here."""
        if answer.finish_reason:
            generation.decided.set()
            return
        async with aclosing(self._coalescer.coalesced(self._generate(generation, context))) as outputs:
            async for output in outputs:
                if chunk := answer.add(output, generation.decision):
                    yield chunk
                if answer.finish_reason:
                    return

    async def _generate(self, generation: Generation, context: Context) -> AsyncGenerator[EngineOutput]:
        """Yield what a worker generates; if it fails, what another one generates from there on."""
        if generation.request.token_limit == 0:
            yield EngineOutput(finish_reason="length")
            return
        if generation.beside:
            await generation.beside.decided.wait()
        tell = generation.tell = None if generation.beside else self._feed.teller(request_id(context))
        while not generation.finished:
            wanted = generation.find_worker_request(self._identity, context)
            if tell:
                tell(Asked(processor=self._feed.instance_id, tokens=wanted.tokens, blocks=len(wanted.local_hashes)))
            async with self._routers.lease(wanted, context) as decision:
                generation.check(decision)
                generation.decision = decision
                generation.decided.set()
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
        before = generation.generated
        request = generation.generate_request(self._model, limit - before)
        stream = self._stream(request, context, decision.instance_id)
        try:
            async with aclosing(generation.traced(stream, context)) as outputs:
                async for output in outputs:
                    if output.finish_reason == "cancelled":
                        raise Unavailable(f"worker {decision.worker_id} stopped in the middle of an answer")
                    if output.finish_reason:
                        output.finish_reason = _finish_reason(output.finish_reason)
                    generation.add(output)
                    yield output
                    if generation.finished:
                        return
            raise Internal("it ended its stream without a finish_reason")
        except Unavailable as error:
            if context.is_stopped():
                raise Cancelled("the caller went away") from error
            if isinstance(error, Lost) and generation.generated == before:
                generation.victims += 1
            if generation.victims >= VICTIMS:
                text = "the engines that had this request died of it, or of something else: it gets no other one"
                raise InvalidRequest(text, code="engines_lost") from error
            if generation.constraint and generation.generated:  # another worker's grammar would begin anew
                message = f"worker {decision.worker_id} was lost in the midst of a form that no other can go on with"
                raise Unavailable(f"{message}; try again: {error}") from error
            generation.failed.append(decision.instance_id)
            message = "%s migrates from worker %s after %d tokens: %s"
            log.warning(message, names(context), decision.worker_id, generation.generated, error)
            if generation.tell:
                generation.tell(Moved(worker_id=decision.worker_id, tokens=generation.generated, reason=str(error)))
            if len(generation.failed) > self._migration_limit:
                raise
        except Internal as error:
            raise Internal(f"worker {decision.worker_id} failed: {error}") from error

    def _stream(self, request: GenerateRequest, context: Context, instance_id: int) -> AsyncGenerator[EngineOutput]:
        """What a worker answers, for as long as there is hope."""
        return self._engines.stream(
            request,
            context,
            [instance_id],
            hopeless=self._routers.hopeless(instance_id),
            ack_seconds=ACK_SECONDS if len(self._engines.instance_ids()) > 1 else None,
            is_heard=self._routers.is_heard,
        )


async def _aside(context: Context, characters: int, work: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """Do work on a text: a long one beside the event loop, a short one before a thread would have begun."""
    with span("template and tokenizer", context):
        if characters < THREAD_CHARACTERS:
            return work(*args, **options)
        return await asyncio.to_thread(work, *args, **options)


def _finish_reason(reason: str | dict[str, object]) -> str:
    """A worker's reason to end, as OpenAI names it. Raises Internal if it is a failure."""
    match reason:
        case "stop" | "eos":
            return "stop"
        case "length" | "content_filter":
            return str(reason)
        case _:
            raise Internal(f"it ended with {reason}")


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    resolved = resolve_model(args.model)
    identity = identify(resolved, name=args.model_name, block_size=args.block_size)
    specs = (DESCRIBE_MODEL, PROCESS, COMPLETE, TOKENIZE, DETOKENIZE, WATCH_PROCESSOR)
    describe, process, complete, tokenize, detokenize, events = (runtime.endpoint(spec.path) for spec in specs)
    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    status = Remote(WORKERS, await runtime.endpoint(WORKERS.path).client())
    engines = Remote(GENERATE, await runtime.endpoint(GENERATE.path).client())
    model = ChatModel(
        resolved,
        identity.name,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        allow_special_tokens=args.allow_special_tokens,
    )
    log.info("parsers: tool_calls=%s reasoning=%s", *model.parsers)
    async with Service(runtime, drain_seconds=args.drain_seconds) as service:
        feed = Feed(process.connection_id(), service.stopped)
        processor = Processor(
            model,
            identity,
            routers=Routers(router, status, engines.instance_ids, Limits.of(args)),
            engines=engines,
            coalescer=Coalescer(args.coalesce_ms),
            feed=feed,
            migration_limit=args.migration_limit,
        )
        service.add(events, WATCH_PROCESSOR, feed.watch)
        service.add(describe, DESCRIBE_MODEL, processor.describe)
        service.add(tokenize, TOKENIZE, processor.tokenize)
        service.add(detokenize, DETOKENIZE, processor.detokenize)
        service.add(complete, COMPLETE, processor.complete)
        service.add(process, PROCESS, processor.process)
        await service.serve()
        await service.wait_for(router, engines)
        await service.stopped()


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__)
    add_options(options)
    Coalescer.add_option(options)
    Limits.add_options(options)
    options.add_argument(
        "--migration-limit", type=int, default=3, help="times that a request may move to another worker"
    )
    for name in ("--tool-call-parser", "--reasoning-parser"):
        options.add_argument(name, default="auto", help="SGLang's for this model; auto: by its chat template; or none")
    options.add_argument(
        "--allow-special-tokens", action="store_true", help="let clients write special tokens into their messages"
    )
    return options


if __name__ == "__main__":
    sys.exit(run(main, arguments().parse_args()))
