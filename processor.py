"""Processor: turns conversations into tokens, and tokens into answers.

    inference.processor.process     chat completion request -> chat completion chunks
    inference.processor.describe    which model this is

For each request it renders the model's chat template, tokenizes, asks the router for a worker, streams tokens from that
worker, and turns them back into text up to a stop string. If the worker dies on the way, another one continues from the
last token.

It knows nothing about HTTP, and of the workers only what the router tells it.

In production Dynamo this is the preprocessor, the backend and the migration operator (lib/llm/src/preprocessor.rs,
backend.rs and migration.rs), which are stages of the frontend's process.
"""

import argparse
import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from common.chat import ChatCompletionChunk, ChatCompletionRequest, ChunkChoice, Delta, ModelCard, Routing
from common.detokenizer import Detokenizer
from common.errors import Cancelled, Internal, InvalidRequest, NotFound, Unavailable
from common.messages import (
    DescribeRequest,
    EngineOutput,
    FindWorkerRequest,
    GenerateRequest,
    PromptTokensDetails,
    RoutingDecision,
    StopConditions,
    Usage,
)
from common.model import Agreement, ChatModel, add_options, locate
from common.program import Program, parser, request_id, run
from common.remote import Remote
from common.stop_strings import StopStrings

from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

log = logging.getLogger(__name__)

MIGRATIONS = 3  # times that a request may move to another worker
ROUTER_PATIENCE = 5.0  # seconds to wait for a router that is restarting


class Processor:
    """Answers chat completion requests."""

    def __init__(
        self,
        model: ChatModel,
        agreement: Agreement,
        router: Remote[RoutingDecision],
        engines: Remote[EngineOutput],
        *,
        send_tokens: bool,
    ) -> None:
        self._model = model
        self._agreement = agreement
        self._send_tokens = send_tokens
        self._router = router
        self._engines = engines
        self._created = int(time.time())

    async def describe(self, request: DescribeRequest, context: Context) -> AsyncIterator[ModelCard]:
        """Yield the card of the model."""
        yield ModelCard(id=self._model.name, created=self._created, context_length=self._model.context_length)

    async def process(self, body: dict[str, object], context: Context) -> AsyncIterator[ChatCompletionChunk]:
        """Yield the answer to a chat completion request, chunk by chunk; a last chunk has the usage."""
        request = ChatCompletionRequest.parse(body)
        if request.model != self._model.name:
            raise NotFound(
                f"the model {request.model!r} does not exist; this pipeline serves {self._model.name!r}",
                code="model_not_found",
                param="model",
            )
        prompt = await asyncio.to_thread(self._model.encode, request.messages)
        answer = Answer(self._model, request, context.id(), len(prompt))
        async with aclosing(self._generate(request, prompt, context)) as outputs:
            async for decision, output in outputs:
                if chunk := answer.add(decision, output):
                    yield chunk
                if answer.finish_reason:
                    break
        yield answer.usage()

    async def _generate(
        self, request: ChatCompletionRequest, prompt: list[int], context: Context
    ) -> AsyncGenerator[tuple[RoutingDecision, EngineOutput]]:
        """Yield what the worker generates; if it fails, what another one generates from there on."""
        tokens = list(prompt)
        failed: list[int] = []
        while True:
            async with self._router.open(self._find_worker(tokens, failed), patience=ROUTER_PATIENCE) as decision:
                limit = self._token_limit(request, len(prompt), decision)
                generate = self._engine_request(request, tokens, limit - (len(tokens) - len(prompt)))
                try:
                    async with aclosing(self._engines.stream(generate, context, decision.instance_id)) as outputs:
                        async for output in outputs:
                            if output.finish_reason == "cancelled":
                                break
                            tokens += output.token_ids
                            yield decision, output
                            if output.finish_reason:
                                return
                    if context.is_stopped():
                        raise Cancelled("the caller went away")
                    raise Unavailable(f"worker {decision.worker_id} stopped in the middle of an answer")
                except Unavailable as error:
                    failed.append(decision.instance_id)
                    if len(failed) > MIGRATIONS:
                        raise
                    message = "request %s leaves worker %s after %d tokens: %s"
                    log.warning(
                        message, request_id(context), decision.worker_id, len(tokens) - len(prompt), error.message
                    )
            if len(tokens) - len(prompt) >= limit:  # only the word that it is finished was lost
                yield decision, EngineOutput(finish_reason="length")
                return

    def _find_worker(self, tokens: list[int], failed: list[int]) -> FindWorkerRequest:
        return FindWorkerRequest(
            block_hashes=compute_block_hash_for_seq(tokens, self._agreement.block_size),
            tokens=len(tokens),
            block_size=self._agreement.block_size,
            model=self._agreement.model,
            tokenizer=self._agreement.tokenizer,
            token_ids=tokens if self._send_tokens else None,
            excluded=failed,
        )

    def _token_limit(self, request: ChatCompletionRequest, prompt_tokens: int, decision: RoutingDecision) -> int:
        """How many tokens the answer may have. Raises InvalidRequest if the worker cannot hold so many."""
        context_length = min(self._model.context_length, decision.context_length or self._model.context_length)
        asked = request.token_limit or 1
        if prompt_tokens + asked > context_length:
            raise InvalidRequest(
                f"This model's maximum context length is {context_length} tokens. However, you requested "
                f"{prompt_tokens + asked} tokens ({prompt_tokens} in the messages, {asked} in the completion). "
                "Please reduce the length of either.",
                code="context_length_exceeded",
                param="messages",
            )
        return request.token_limit or context_length - prompt_tokens

    def _engine_request(self, request: ChatCompletionRequest, tokens: list[int], max_tokens: int) -> GenerateRequest:
        return GenerateRequest(
            token_ids=tokens,
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
        self._tokens = 0
        self._prompt_details: PromptTokensDetails | None = None  # some workers say nothing of it
        self._begun = False
        self.finish_reason: str | None = None

    def add(self, decision: RoutingDecision, output: EngineOutput) -> ChatCompletionChunk | None:
        """The chunk for an engine's output; None if no character is complete yet. Sets `finish_reason` at the end."""
        if not self._begun and output.completion_usage:
            self._prompt_details = output.completion_usage.prompt_tokens_details
        text = "".join(map(self._add_token, output.token_ids))
        if self._stops.found:
            self.finish_reason = "stop"
        elif output.finish_reason:
            self.finish_reason = _finish_reason(output.finish_reason)
            text += self._stops.add(self._detokenizer.flush())
            text += self._stops.flush()
        if not (text or self.finish_reason) and self._begun:
            return None
        delta = Delta(content=text) if self._begun else Delta(role="assistant", content=text)
        chunk = self._chunk([ChunkChoice(delta=delta, finish_reason=self.finish_reason)])
        if not self._begun:
            chunk.routing = Routing(worker_id=decision.worker_id, overlap_blocks=decision.overlap_blocks)
            self._begun = True
        return chunk

    def usage(self) -> ChatCompletionChunk:
        """The chunk that follows the answer."""
        chunk = self._chunk([])
        chunk.usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._tokens,
            total_tokens=self._prompt_tokens + self._tokens,
            prompt_tokens_details=self._prompt_details,
        )
        return chunk

    def _add_token(self, token_id: int) -> str:
        if self._stops.found:  # the engine was faster than we
            return ""
        self._tokens += 1
        return "" if token_id in self._ends else self._stops.add(self._detokenizer.add(token_id))

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self._id, created=self._created, model=self._model.name, choices=choices)


def _finish_reason(reason: str | dict[str, object]) -> str:
    """A worker's reason to end, as OpenAI names it."""
    match reason:
        case "stop" | "eos":
            return "stop"
        case "length" | "content_filter":
            return str(reason)
        case _:
            raise Internal(f"the worker failed: {reason}")


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    located = locate(args.model)
    agreement = Agreement.of(located, args)
    model = ChatModel(located, agreement.model)
    router = await Remote.connect(runtime, "inference.router.find_worker", RoutingDecision)
    engines = await Remote.connect(runtime, "inference.engine.generate", EngineOutput)
    processor = Processor(model, agreement, router, engines, send_tokens=args.send_tokens)
    async with Program(runtime, args) as program:
        program.add("inference.processor.describe", processor.describe, DescribeRequest)
        program.add("inference.processor.process", processor.process, dict[str, object])
        await program.serve()
        await program.needs(router, engines)
        await program.stopped()


if __name__ == "__main__":
    options = parser(__doc__)
    add_options(options)
    options.add_argument(
        "--send-tokens", action="store_true", help="send the router the prompt too, which its --policy dynamo needs"
    )
    run(main, options.parse_args())
