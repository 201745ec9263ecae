"""Frontend: the pipeline's door, an OpenAI-compatible HTTP server.

    POST /v1/chat/completions  /v1/completions      streamed or not
    POST /tokenize  /detokenize
    GET  /v1/models  /v1/models/{id}  /workers  /health  /health/ready  /live  /metrics  /docs
    inference.frontend.chat_completions             the first for other Dynamo components, always streamed

It checks each request, gives it its id, passes it to a processor of the model that it names, and writes what comes back
as server-sent events or as one JSON body. When the client hangs up, it stops the request, wherever that is by then.

It knows nothing about tokens or workers, and of models only who serves them.

In production Dynamo this is `python -m dynamo.frontend` (lib/llm/src/http/service), a Rust server that has the
processor and the router in the same process.
"""

import argparse
import logging
import os
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from common.errors import Cancelled, Internal, InvalidRequest, Overloaded, Unavailable
from common.events import WATCH_FRONTEND, WATCH_PROCESSOR, WATCH_ROUTER, Feed
from common.http import demo, page
from common.http.access import Guard, guard
from common.http.body import JsonRoute
from common.http.canary import Canary
from common.http.event_stream import EventStream
from common.http.events import RequestEvents
from common.http.exchange import ANSWER_HEADERS, Exchange, Exchanges, Observer, add_error_handlers
from common.http.forms import ChatForm, Form, TextForm
from common.http.metrics import FrontendMetrics
from common.http.openapi import PARAMETERS, answer, describe_answers, errors
from common.http.processors import Processors
from common.http.recorder import Recorder
from common.http.runtime_parent import RuntimeParent
from common.http.server import listening
from common.http.status import Status
from common.http.watch import Watch
from common.messages import DIE, FIND_WORKER, GENERATE, WORKERS
from common.openai_api import (
    CHAT_COMPLETIONS,
    COMPLETE,
    DESCRIBE_MODEL,
    DETOKENIZE,
    PROCESS,
    TOKENIZE,
    ChatCompletion,
    ChatCompletionChunk,
    ModelCard,
    ModelList,
    Text,
    TextCompletion,
    Tokens,
)
from common.openai_request import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from common.remote import Remote
from common.service import Service, parser, run

import msgspec
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

log = logging.getLogger(__name__)

NOTED_FIELDS = 1000  # unknown fields that the log has named


class Frontend:
    """Answers HTTP requests with what the processors make of them."""

    def __init__(
        self,
        service: Service,
        *,
        processors: Processors,
        complete: Remote[CompletionRequest, ChatCompletionChunk],
        tokenize: Remote[TokenizeRequest, Tokens],
        detokenize: Remote[DetokenizeRequest, Text],
        stage: Remote[ChatCompletionRequest, ChatCompletionChunk] | None = None,
        keepalive_seconds: float = 0.0,
        strict_fields: bool = False,
    ) -> None:
        """stage: one of your own that requests pass through before the processors; keepalive_seconds: how long a
        client that waits hears nothing, 0 for ever; strict_fields: refuse fields that nobody here knows."""
        self._service = service
        self._processors = processors
        self._complete = complete
        self._tokenize = tokenize
        self._detokenize = detokenize
        self._chat: Remote[ChatCompletionRequest, ChatCompletionChunk] = stage or processors.process
        self._keepalive_seconds = keepalive_seconds
        self._strict_fields = strict_fields
        self._noted_fields: set[str] = set()

    def app(
        self,
        cors_origins: Sequence[str] = (),
        routes: Sequence[APIRouter] = (),
        observers: Sequence[Observer] = (),
        runtime_parent: RuntimeParent | None = None,
        guard: Guard | None = None,
    ) -> ASGIApp:
        """The HTTP application, with more paths than its own, and with those who watch its requests. runtime_parent: of
        the spans that the runtime has of a request; guard: lets those pass who may use it."""
        app = FastAPI(title="Inference pipeline", description=__doc__)
        app.router.route_class = JsonRoute
        add_error_handlers(app)
        describe_answers(app)
        for path, handler, body in (
            ("/v1/chat/completions", self.post_chat_completions, ChatCompletion),
            ("/v1/completions", self.post_completions, TextCompletion),
        ):
            app.add_api_route(
                path,
                handler,
                methods=["POST"],
                response_model=None,
                responses={**answer(body), **errors(400, 404, 413, 500, 503)},
                openapi_extra=PARAMETERS,
            )
        app.add_api_route("/tokenize", self.post_tokenize, methods=["POST"], responses=errors(400, 404, 503))
        app.add_api_route("/detokenize", self.post_detokenize, methods=["POST"], responses=errors(400, 404, 503))
        app.add_api_route("/v1/models", self.get_models)
        app.add_api_route("/v1/models/{model:path}", self.get_model, responses=errors(404, 503))
        for more in routes:
            app.include_router(more)
        exchanges = Exchanges(guard(app) if guard else app, self._service.in_progress, observers, runtime_parent)
        if not cors_origins:
            return exchanges
        return CORSMiddleware(  # around all, for a page is to read errors too
            exchanges,
            allow_origins=cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=ANSWER_HEADERS,
        )

    def chat_completions(
        self, completion_request: ChatCompletionRequest, context: Context
    ) -> AsyncGenerator[ChatCompletionChunk]:
        """Yield the answer to a chat completion request, chunk by chunk; a last chunk has the usage.

        Raises PipelineError, as `Processors.find` and `Remote.stream` do.
        """
        return self._answer(self._chat, completion_request, context)

    async def _answer(
        self, remote: Remote[Any, ChatCompletionChunk], completion_request: GenerationRequest, context: Context
    ) -> AsyncGenerator[ChatCompletionChunk]:
        if self._service.lost:
            raise Unavailable("this server is being stopped; try again in a moment")
        stream = self._processors.stream(completion_request, context, remote)
        answered = False
        try:
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    answered = True
                    yield chunk
            if not answered:
                raise Internal("the processor answered nothing")
        except Cancelled as error:
            if self._service.stopping:
                raise Unavailable("this server is being stopped and could not wait for the rest") from error
            raise

    async def post_chat_completions(self, request: Request, completion_request: ChatCompletionRequest) -> Response:
        """Answer a conversation, as OpenAI's API does."""
        return await self._respond(request, completion_request, self._chat, ChatForm())

    async def post_completions(self, request: Request, completion_request: CompletionRequest) -> Response:
        """Go on with a text, as OpenAI's older API does."""
        return await self._respond(request, completion_request, self._complete, TextForm())

    async def _respond(
        self,
        request: Request,
        completion_request: GenerationRequest,
        remote: Remote[Any, ChatCompletionChunk],
        form: Form,
    ) -> Response:
        exchange = Exchange.of(request)
        completion_request.resume = None  # which only a frontend may say
        exchange.begin(completion_request, self._ignored(completion_request))
        chunks = self._answer(remote, completion_request, exchange.context)
        if completion_request.stream:
            return EventStream(
                chunks,
                exchange,
                form,
                include_usage=completion_request.include_usage,
                keepalive_seconds=self._keepalive_seconds,
            )
        async with exchange.stopped_on_disconnect(request):
            answer = [exchange.noted(chunk) async for chunk in chunks]
        exchange.check_finished()
        body = msgspec.json.encode(form.whole(answer))
        return Response(body, media_type="application/json", headers=exchange.answer_headers)

    def _ignored(self, completion_request: GenerationRequest) -> list[str]:
        """The fields that nobody here knows, which the log names once. Raises InvalidRequest if none may be sent."""
        ignored = completion_request.ignored
        if ignored and self._strict_fields:
            raise InvalidRequest(f"unknown field {ignored[0]!r}", param=ignored[0])
        for name in ignored:
            if name not in self._noted_fields and len(self._noted_fields) < NOTED_FIELDS:
                self._noted_fields.add(name)
                log.info("a request has the field %r, which nobody here knows; it is ignored", name[:100])
        return ignored

    async def post_tokenize(self, tokenize_request: TokenizeRequest) -> Tokens:
        """The tokens of a text or a conversation."""
        return await self._tokenize.call(tokenize_request, await self._instance(tokenize_request.model))

    async def post_detokenize(self, detokenize_request: DetokenizeRequest) -> Text:
        """The text of tokens."""
        return await self._detokenize.call(detokenize_request, await self._instance(detokenize_request.model))

    async def _instance(self, model: str | None) -> int:
        """A processor of a model, which need not be named where there is one only."""
        names = [model] if model else [card.id for card in await self._processors.models()]
        if len(names) > 1:
            raise InvalidRequest(f"name the model: this pipeline serves {', '.join(names)}", param="model")
        return next(iter(await self._processors.find(names[0] if names else "")))

    async def get_models(self) -> ModelList:
        """The models of all processors."""
        return ModelList(data=await self._processors.models())

    async def get_model(self, model: str) -> ModelCard:
        """One of them."""
        return next(iter((await self._processors.find(model)).values()))


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    Overloaded.http_status = args.overload_status
    endpoint, events = runtime.endpoint(CHAT_COMPLETIONS.path), runtime.endpoint(WATCH_FRONTEND.path)
    process = Remote(PROCESS, await runtime.endpoint(PROCESS.path).client())
    describe = Remote(DESCRIBE_MODEL, await runtime.endpoint(DESCRIBE_MODEL.path).client())
    complete = Remote(COMPLETE, await runtime.endpoint(COMPLETE.path).client())
    tokenize = Remote(TOKENIZE, await runtime.endpoint(TOKENIZE.path).client())
    detokenize = Remote(DETOKENIZE, await runtime.endpoint(DETOKENIZE.path).client())
    workers = Remote(WORKERS, await runtime.endpoint(WORKERS.path).client())
    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    engine = Remote(GENERATE, await runtime.endpoint(GENERATE.path).client())
    specs = (WATCH_FRONTEND, WATCH_PROCESSOR, WATCH_ROUTER)
    feeds = [Remote(spec, await runtime.endpoint(spec.path).client()) for spec in specs]
    stages: dict[str, Remote[Any, Any]] = {"processor": process, "router": router, "engine": engine}
    stage = None
    if args.processor != PROCESS.path:
        client = await runtime.endpoint(args.processor).client()
        stage = stages[args.processor] = Remote(PROCESS.at(args.processor), client)
    service = Service(runtime, drain_seconds=args.drain_seconds)
    processors = Processors(process, describe, moves=args.migration_limit, seconds=args.processor_seconds)
    frontend = Frontend(
        service,
        processors=processors,
        complete=complete,
        tokenize=tokenize,
        detokenize=detokenize,
        stage=stage,
        keepalive_seconds=args.keepalive_seconds,
        strict_fields=args.strict_fields,
    )
    status = Status(stages, workers, processors, Canary(processors, complete, stage), lambda: service.stopping)
    # What is seen of the pipeline from outside, beside the path of requests.
    feed = Feed(endpoint.connection_id(), service.stopped)
    hello = {"frontend": feed.instance_id, "prompts": args.show_prompts, "demo": args.demo}
    metrics = FrontendMetrics(service.registry, processors.serves)
    routes = [status.routes(), Watch(feeds, status, service.stopped, hello).routes(), page.routes(), metrics.routes()]
    if args.demo:
        routes.append(demo.routes(Remote(DIE, await runtime.endpoint(DIE.path).client())))
    observers: list[Observer] = [RequestEvents(feed, show_prompts=args.show_prompts), metrics]
    if args.record:
        observers.append(Recorder(args.record))
    guarding = guard(args.api_keys_file, args.host, args.client_requests)
    app = frontend.app(args.cors_origin, routes, observers, RuntimeParent(runtime, service), guarding)
    async with service, listening(app, args.host, args.port, service.stopped, reuse_port=args.reuse_port):
        service.add(events, WATCH_FRONTEND, feed.watch)
        service.add(endpoint, CHAT_COMPLETIONS, frontend.chat_completions)
        await service.serve()
        await service.wait_for(*stages.values())
        await service.stopped()
        if service.lost:  # nobody will be found any more
            processors.seconds = 0.0
        await service.drain()  # while the requests in progress have their connections


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
    options.add_argument("--api-keys-file", type=os.path.abspath, help="file of keys, one a line: clients need one")
    options.add_argument("--client-requests", type=int, default=2000, help="of one client in progress; 0: any number")
    options.add_argument(
        "--keepalive-seconds", type=float, default=15.0, help="a client that waits hears of it so often; 0: never"
    )
    options.add_argument("--migration-limit", type=int, default=3, help="times that a request may move to another one")
    options.add_argument(
        "--processor-seconds", type=float, default=30.0, help="to wait for a processor if none is there"
    )
    options.add_argument(
        "--overload-status", type=int, choices=[429, 503, 529], default=503, help="when the engines have too much to do"
    )
    options.add_argument("--strict-fields", action="store_true", help="refuse fields that nobody here knows")
    options.add_argument("--demo", action="store_true", help="let engines be killed from the page")
    options.add_argument("--record", type=os.path.abspath, help="file to write a trace of the traffic to, without text")
    options.add_argument("--show-prompts", action="store_true", help="let those who watch read their first words")
    return options


if __name__ == "__main__":
    sys.exit(run(main, arguments().parse_args()))
