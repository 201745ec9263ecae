"""Frontend: the pipeline's door, an OpenAI-compatible HTTP server.

    POST /v1/chat/completions               streamed or not
    GET  /v1/models  /v1/models/{id}  /workers  /health  /live  /docs
    inference.frontend.chat_completions     the same for other Dynamo components, always streamed

It gives each request its id, passes it to a processor of the model that it names, and writes what comes back as
server-sent events or as one JSON body. When the client hangs up, it stops the request, wherever that is by then.

It knows nothing about tokens or workers, and of models only who serves them.

In production Dynamo this is `python -m dynamo.frontend` (lib/llm/src/http/service), a Rust server that has the
processor and the router in the same process.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from common.errors import Cancelled, Internal, PipelineError, Unavailable
from common.http.body import JsonRoute
from common.http.exchange import Exchange, Exchanges, add_error_handlers
from common.http.openapi import ANSWER, PARAMETERS, errors
from common.http.processors import Processors
from common.http.server import listening
from common.messages import (
    FIND_WORKER,
    GENERATE,
    WORKERS,
    Message,
    RouterStatus,
    WorkersRequest,
)
from common.openai_api import (
    CHAT_COMPLETIONS,
    DESCRIBE_MODEL,
    PROCESS,
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ModelCard,
    ModelList,
)
from common.remote import Remote
from common.service import Service, parser, run

import msgspec
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from msgspec import UNSET
from starlette.types import Message as ASGIMessage
from starlette.types import Receive, Scope, Send

ROUTER_SECONDS = 2.0  # for a router to say what it knows
CLIENT_SECONDS = 60.0  # for a client to take what it is sent; what waits for it fills the processor's connection to us


class WorkersReport(Message):
    """The answer of GET /workers."""

    routers: list[RouterStatus]


class Health(Message):
    """The answer of GET /health."""

    status: str
    instances: dict[str, int]


class Frontend:
    """Answers HTTP requests with what the processors make of them."""

    def __init__(
        self,
        service: Service,
        *,
        processors: Processors,
        routers: Remote[WorkersRequest, RouterStatus],
        stages: Mapping[str, Remote[Any, Any]],
        stage: Remote[ChatCompletionRequest, ChatCompletionChunk] | None = None,
    ) -> None:
        """stages: what must have an instance for this pipeline to be healthy; stage: one of your own that requests
        pass through before the processors."""
        self._service = service
        self._processors = processors
        self._routers = routers
        self._stages = stages
        self._stage = stage

    def app(self, cors_origins: Sequence[str] = ()) -> Exchanges:
        """The HTTP application."""
        app = FastAPI(title="Inference pipeline", description=__doc__)
        app.router.route_class = JsonRoute
        add_error_handlers(app)
        app.add_api_route(
            "/v1/chat/completions",
            self.post_chat_completions,
            methods=["POST"],
            response_model=ChatCompletion,
            responses={**ANSWER, **errors(400, 404, 413, 429, 500, 503)},
            openapi_extra=PARAMETERS,
        )
        app.add_api_route("/v1/models", self.get_models)
        app.add_api_route("/v1/models/{model:path}", self.get_model, responses=errors(404, 503))
        app.add_api_route("/workers", self.get_workers, responses=errors(503))
        app.add_api_route("/health", self.get_health, response_model=Health, responses={503: {"model": Health}})
        app.add_api_route("/live", self.get_live)
        if cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "x-worker-id", "x-kv-overlap-blocks", "retry-after"],
            )
        return Exchanges(app, self._service.in_progress)

    async def chat_completions(
        self, completion_request: ChatCompletionRequest, context: Context
    ) -> AsyncGenerator[ChatCompletionChunk]:
        """Yield the answer to a chat completion request, chunk by chunk; a last chunk has the usage.

        Raises PipelineError, as `Processors.find` and `Remote.stream` do.
        """
        if self._service.stopping:
            raise Unavailable("this server is being stopped; try again in a moment")
        found = await self._processors.find(completion_request.model)
        if self._stage:
            stream = self._stage.stream(completion_request, context)
        else:
            stream = self._processors.process.stream(completion_request, context, list(found))
        try:
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Cancelled as error:
            if self._service.stopping:
                raise Unavailable("this server is being stopped and could not wait for the rest") from error
            raise

    async def post_chat_completions(
        self,
        request: Request,
        completion_request: ChatCompletionRequest,
    ) -> Response:
        """Answer a conversation, as OpenAI's API does."""
        exchange = Exchange.of(request)
        chunks = self.chat_completions(completion_request, exchange.context)
        try:
            async with exchange.stopped_on_disconnect(request):
                exchange.note(first := await anext(chunks))
                if not completion_request.stream:
                    completion = await collect(first, chunks, exchange)
                    return JSONResponse(completion.model_dump(), headers=exchange.routing_headers)
        except StopAsyncIteration:
            raise Internal("the processor answered nothing") from None
        return EventStream(first, chunks, exchange, include_usage=completion_request.include_usage)

    async def get_models(self) -> ModelList:
        """The models of all processors."""
        return ModelList(data=await self._processors.models())

    async def get_model(self, model: str) -> ModelCard:
        """One of them."""
        return next(iter((await self._processors.find(model)).values()))

    async def get_workers(self) -> WorkersReport:
        """What each router knows of the workers."""
        instances = self._routers.instance_ids()
        if not instances:
            raise Unavailable("no router is running; try again in a moment", code="no_router")
        answers = await asyncio.gather(*map(self._ask_router, instances))
        if not (routers := [answer for answer in answers if answer]):
            raise Unavailable("no router answers; try again in a moment", code="no_router")
        return WorkersReport(routers=routers)

    async def _ask_router(self, instance_id: int) -> RouterStatus | None:
        """What one router knows; None if it does not say, because it has died or hangs."""
        with suppress(PipelineError, TimeoutError):
            async with asyncio.timeout(ROUTER_SECONDS):
                return await self._routers.call(WorkersRequest(), instance_id)
        return None

    async def get_health(self) -> Response:
        """Whether a request would be answered: 200 if every stage has an instance, else 503."""
        instances = {name: len(remote.instance_ids()) for name, remote in self._stages.items()}
        healthy = all(instances.values()) and not self._service.stopping
        health = Health(status="healthy" if healthy else "unhealthy", instances=instances)
        return JSONResponse(health.model_dump(), 200 if healthy else 503)

    async def get_live(self) -> dict[str, str]:
        """Whether this process runs."""
        return {"status": "live"}


class EventStream(Response):
    """The answer as server-sent events. Once the first one is out, an error can only be one of them."""

    def __init__(
        self,
        first: ChatCompletionChunk,
        rest: AsyncIterator[ChatCompletionChunk],
        exchange: Exchange,
        *,
        include_usage: bool,
    ) -> None:
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", **exchange.routing_headers}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._exchange = exchange
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._first.routing = UNSET  # which the headers have said
        async with self._exchange.stopped_on_disconnect(Request(scope, receive)):
            try:
                await self._write_events()
                await self._write(body(b"", more=False))
            except TimeoutError:
                self._exchange.error = Cancelled(f"the client took nothing for {CLIENT_SECONDS:g} s")

    async def _write_events(self) -> None:
        try:
            await self._write(event(self._first))
            async for chunk in self._rest:
                self._exchange.note(chunk)
                if chunk.choices or self._include_usage:
                    await self._write(event(chunk))
            self._exchange.check_finished()
            await self._write(body(b"data: [DONE]\n\n"))
        except PipelineError as error:
            self._exchange.error = error
            await self._write(event(error.body))

    async def _write(self, part: ASGIMessage) -> None:
        """Send a part past the layers of the application, of which each would cost time per event.

        Raises TimeoutError if the client does not take it.
        """
        async with asyncio.timeout(CLIENT_SECONDS):
            await self._exchange.send(part)


async def collect(
    first: ChatCompletionChunk, rest: AsyncIterator[ChatCompletionChunk], exchange: Exchange
) -> ChatCompletion:
    """The answer as one body. Raises PipelineError, as the chunks do."""
    chunks = [first]
    async for chunk in rest:
        exchange.note(chunk)
        chunks.append(chunk)
    exchange.check_finished()
    choices = [choice for chunk in chunks for choice in chunk.choices]
    message = AssistantMessage(content="".join(choice.delta.content or "" for choice in choices))
    return ChatCompletion(
        id=first.id,
        created=first.created,
        model=first.model,
        choices=[Choice(message=message, finish_reason=exchange.finish_reason)],
        usage=exchange.usage,
    )


def event(data: object) -> ASGIMessage:
    """A server-sent event, as a part of a response's body."""
    return body(b"data: " + msgspec.json.encode(data) + b"\n\n")


def body(part: bytes, *, more: bool = True) -> ASGIMessage:
    """A part of a response's body, with more to follow or not."""
    return {"type": "http.response.body", "body": part, "more_body": more}


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    endpoint = runtime.endpoint(CHAT_COMPLETIONS.path)
    process = Remote(PROCESS, await runtime.endpoint(PROCESS.path).client())
    describe = Remote(DESCRIBE_MODEL, await runtime.endpoint(DESCRIBE_MODEL.path).client())
    workers = Remote(WORKERS, await runtime.endpoint(WORKERS.path).client())
    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    engine = Remote(GENERATE, await runtime.endpoint(GENERATE.path).client())
    stages: dict[str, Remote[Any, Any]] = {"processor": process, "router": router, "engine": engine}
    stage = None
    if args.processor != PROCESS.path:
        client = await runtime.endpoint(args.processor).client()
        stage = stages[args.processor] = Remote(PROCESS.at(args.processor), client)
    service = Service(runtime, drain_seconds=args.drain_seconds)
    processors = Processors(process, describe)
    frontend = Frontend(service, processors=processors, routers=workers, stages=stages, stage=stage)
    app = frontend.app(args.cors_origin)
    # Around the service: while that waits for the requests in progress, they still have their connections.
    async with listening(app, args.host, args.port, reuse_port=args.reuse_port), service:
        service.add(endpoint, CHAT_COMPLETIONS, frontend.chat_completions)
        await service.serve()
        await service.wait_for(*stages.values())
        await service.stopped()


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--reuse-port", action="store_true", help="share the port with other frontends that do")
    options.add_argument(
        "--processor", default=PROCESS.path, help="endpoint that gets the requests, to put a stage in between"
    )
    options.add_argument(
        "--cors-origin", action="append", default=[], help="origin whose pages may call this server; * for all"
    )
    return options


if __name__ == "__main__":
    sys.exit(run(main, arguments().parse_args()))
