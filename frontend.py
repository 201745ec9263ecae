"""Frontend: the pipeline's door, an OpenAI-compatible HTTP server.

    POST /v1/chat/completions               streamed or not
    GET  /v1/models  /workers  /health  /live
    inference.frontend.chat_completions     the same for other Dynamo components, always streamed

It gives each request its id, passes it to a processor, and writes what comes back as server-sent events or as one JSON
body. When the client hangs up, it stops the request, wherever that is by then.

It knows nothing about models, tokens or workers.

In production Dynamo this is `python -m dynamo.frontend` (lib/llm/src/http/service), a Rust server that has the
processor and the router in the same process.
"""

import argparse
import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from common.chat import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ModelCard,
    ModelList,
    Routing,
)
from common.errors import Cancelled, Internal, InvalidRequest, NotFound, Overloaded, PipelineError, Unavailable
from common.messages import DescribeRequest, RouterStatus, Usage, WorkersRequest
from common.program import Program, parser, run
from common.remote import Remote

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 2**20  # the largest message that launch.sh lets through NATS
MAX_DEPTH = 64  # of lists and objects in a body: more than any conversation needs, less than any library minds
MAX_REQUEST_ID = 128
TOO_DEEP = f"the request body is nested more than {MAX_DEPTH} levels deep"
CLOSE_SECONDS = 1.0  # for connections that are still busy once the requests have been answered or cut off

STAGES = {
    "processor": "inference.processor.process",
    "router": "inference.router.find_worker",
    "engine": "inference.engine.generate",
}


class Frontend:
    """Answers HTTP requests with what the processors make of them."""

    def __init__(
        self,
        program: Program,
        processors: Remote[ChatCompletionChunk],
        describe: Remote[ModelCard],
        routers: Remote[RouterStatus],
        stages: dict[str, Remote[Any]],
    ) -> None:
        self._program = program
        self._processors = processors
        self._describe = describe
        self._routers = routers
        self._stages = stages

    def app(self) -> web.Application:
        """The HTTP server's routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[answers_in_json])
        app.on_response_prepare.append(add_request_id)
        app.router.add_post("/v1/chat/completions", self.post_chat_completions)
        app.router.add_get("/v1/models", self.get_models)
        app.router.add_get("/workers", self.get_workers)
        app.router.add_get("/health", self.get_health)
        app.router.add_get("/live", self.get_live)
        return app

    async def chat_completions(
        self, request: dict[str, object], context: Context
    ) -> AsyncGenerator[ChatCompletionChunk]:
        """Yield the answer to a chat completion request, chunk by chunk; a last chunk has the usage."""
        try:
            async with aclosing(self._processors.stream(request, context)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Cancelled as error:
            if self._program.stopping:
                raise Unavailable("this server is being stopped and could not wait for the rest") from error
            raise

    async def post_chat_completions(self, http: web.Request) -> web.StreamResponse:
        context = Context(http["context_id"], {"x-request-id": http["request_id"]})
        with self._program.in_progress(context):
            body = await json_body(http)
            request = ChatCompletionRequest.parse(body)
            record = Record(http["request_id"])
            try:
                async with aclosing(record.watch(self.chat_completions(body, context))) as chunks:
                    if request.stream:
                        return await send_events(http, request, chunks)
                    return await send_whole(chunks)
            except BaseException as error:
                record.error = error
                raise
            finally:
                context.stop_generating()
                record.write()

    async def get_models(self, http: web.Request) -> web.Response:
        card = await self._describe.call(DescribeRequest())
        return json_response(ModelList(data=[card]))

    async def get_workers(self, http: web.Request) -> web.Response:
        """What each router knows of the workers."""
        instances = self._routers.instance_ids()
        if not instances:
            raise Unavailable("no router is running; try again in a moment")
        calls = (self._routers.call(WorkersRequest(), instance_id) for instance_id in instances)
        return json_response({"routers": await asyncio.gather(*calls)})

    async def get_health(self, http: web.Request) -> web.Response:
        """Whether a request would be answered: 200 if every stage has an instance, else 503."""
        instances = {stage: len(remote.instance_ids()) for stage, remote in self._stages.items()}
        healthy = all(instances.values()) and not self._program.stopping
        body = {"status": "healthy" if healthy else "unhealthy", "instances": instances}
        return web.json_response(body, status=200 if healthy else 503)

    async def get_live(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "live"})


async def send_events(
    http: web.Request, request: ChatCompletionRequest, chunks: AsyncIterator[ChatCompletionChunk]
) -> web.StreamResponse:
    """Write the answer as server-sent events. Once the first one is out, an error can only be one of them."""
    include_usage = request.stream_options is not None and request.stream_options.include_usage
    first = await anext(chunks)
    response = web.StreamResponse(
        headers={"content-type": "text/event-stream", "cache-control": "no-cache", **routing_headers(first)}
    )
    await response.prepare(http)
    try:
        await response.write(event(first))
        async for chunk in chunks:
            if chunk.choices or include_usage:
                await response.write(event(chunk))
        await response.write(b"data: [DONE]\n\n")
    except PipelineError as error:
        await response.write(event(error.body))
    await response.write_eof()
    return response


async def send_whole(chunks: AsyncIterator[ChatCompletionChunk]) -> web.Response:
    """Collect the answer and return it as one JSON body."""
    first = await anext(chunks)
    parts: list[str] = []
    finish_reason: str | None = None
    usage: Usage | None = None

    def add(chunk: ChatCompletionChunk) -> None:
        nonlocal finish_reason, usage
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            finish_reason = choice.finish_reason or finish_reason
        usage = chunk.usage or usage

    add(first)
    async for chunk in chunks:
        add(chunk)
    message = AssistantMessage(content="".join(parts))
    completion = ChatCompletion(
        id=first.id,
        created=first.created,
        model=first.model,
        choices=[Choice(message=message, finish_reason=finish_reason)],
        usage=usage,
    )
    return json_response(completion, headers=routing_headers(first))


class Record:
    """What the log says about a request, in one line."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._began = time.perf_counter()
        self._first: float | None = None
        self._routing: Routing | None = None
        self._usage: Usage | None = None
        self._finish_reason: str | None = None
        self.error: BaseException | None = None

    async def watch(self, chunks: AsyncGenerator[ChatCompletionChunk]) -> AsyncGenerator[ChatCompletionChunk]:
        """Pass the chunks on, and remember what they say."""
        async with aclosing(chunks):
            try:
                async for chunk in chunks:
                    self._note(chunk)
                    yield chunk
            except PipelineError as error:
                self.error = error
                raise

    def _note(self, chunk: ChatCompletionChunk) -> None:
        if self._first is None:
            self._first = time.perf_counter()
        self._routing = chunk.routing or self._routing
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            self._finish_reason = choice.finish_reason or self._finish_reason

    def write(self) -> None:
        """Log the request as key=value pairs."""
        status = 200 if self.error is None else getattr(self.error, "http_status", 499)
        fields: dict[str, object] = {"request_id": self._request_id, "status": status}
        if self._routing:
            fields |= {"worker": self._routing.worker_id, "overlap_blocks": self._routing.overlap_blocks}
        if self._usage:
            fields["prompt_tokens"] = self._usage.prompt_tokens
            if self._usage.prompt_tokens_details:
                fields["cached_tokens"] = self._usage.prompt_tokens_details.cached_tokens
            fields["completion_tokens"] = self._usage.completion_tokens
        if self._finish_reason:
            fields["finish_reason"] = self._finish_reason
        if self._first is not None:
            fields["ttft_ms"] = round((self._first - self._began) * 1000, 1)
        fields["duration_ms"] = round((time.perf_counter() - self._began) * 1000, 1)
        if isinstance(self.error, PipelineError):
            fields["error"] = json.dumps(self.error.message)
        log.info("request %s", " ".join(f"{name}={value}" for name, value in fields.items()))


def event(data: object) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def json_response(data: object, **options: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), content_type="application/json", **options)


def routing_headers(chunk: ChatCompletionChunk) -> dict[str, str]:
    """The response headers that say who answers, taken out of the first chunk."""
    routing, chunk.routing = chunk.routing, msgspec.UNSET
    if not routing:
        return {}
    return {"x-worker-id": routing.worker_id, "x-kv-overlap-blocks": str(routing.overlap_blocks)}


async def json_body(http: web.Request) -> dict[str, object]:
    try:
        body = msgspec.json.decode(await http.read(), type=dict[str, object])
    except web.RequestPayloadError as error:
        raise InvalidRequest("the request body is not encoded as content-encoding or transfer-encoding say") from error
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request body must be a JSON object: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest(TOO_DEEP) from error
    check_portable(body)
    return body


def check_portable(value: object, depth: int = MAX_DEPTH) -> None:
    """Raises InvalidRequest for JSON that no message can carry."""
    if isinstance(value, dict | list):
        if not depth:
            raise InvalidRequest(TOO_DEEP)
        for child in value.values() if isinstance(value, dict) else value:
            check_portable(child, depth - 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise InvalidRequest("the request body has an integer of more than 64 bits")


def request_id_of(http: web.Request) -> str:
    """The caller's id for this request, or a new one."""
    request_id = http.headers.get("x-request-id", "")
    if len(request_id) > MAX_REQUEST_ID or not request_id.isascii() or not (request_id + "x").isprintable():
        raise InvalidRequest(f"x-request-id must be at most {MAX_REQUEST_ID} printable ASCII characters")
    return request_id or str(http["context_id"])


@web.middleware
async def answers_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, and every error OpenAI's body."""
    # The runtime tells requests apart by their context's id, so that is never the caller's choice.
    request["context_id"] = request["request_id"] = uuid.uuid4().hex
    try:
        request["request_id"] = request_id_of(request)
        return await handler(request)
    except PipelineError as error:
        retry = {"retry-after": "1"} if isinstance(error, (Unavailable, Overloaded)) else {}
        return web.json_response(error.body, status=error.http_status, headers=retry)
    except web.HTTPException as error:
        kind = NotFound if error.status == 404 else InvalidRequest
        body = kind(f"{request.method} {request.path}: {error.reason}").body
        return web.json_response(body, status=error.status)
    except ConnectionError:  # the client hung up while we wrote
        raise
    except Exception as error:
        log.exception("request %s failed", request["request_id"])
        return web.json_response(Internal(f"{type(error).__name__}: {error}").body, status=500)


async def add_request_id(http: web.Request, response: web.StreamResponse) -> None:
    # aiohttp answers an Expect header that it does not know before any middleware runs.
    response.headers["x-request-id"] = http.get("request_id") or uuid.uuid4().hex


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int) -> AsyncIterator[None]:
    """Serve HTTP while the block runs."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except (OSError, OverflowError) as error:  # the latter is said of a port that no machine has
        raise SystemExit(f"cannot listen on {host}:{port} (--host, --port): {error}") from error
    log.info("listening on http://%s:%d", host, port)
    try:
        yield
    finally:
        await runner.cleanup()


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    processors = await Remote.connect(runtime, args.processor, ChatCompletionChunk)
    describe = await Remote.connect(runtime, "inference.processor.describe", ModelCard)
    routers = await Remote.connect(runtime, "inference.router.workers", RouterStatus)
    paths = STAGES | {"processor": args.processor}
    stages = {stage: await Remote.connect(runtime, path, object) for stage, path in paths.items()}
    program = Program(runtime, args)
    frontend = Frontend(program, processors, describe, routers, stages)
    # Around the program: while that waits for the requests in progress, they still have their connections.
    async with listening(frontend.app(), args.host, args.port), program:
        program.add("inference.frontend.chat_completions", frontend.chat_completions, dict[str, object])
        await program.serve()
        await program.needs(*stages.values())
        await program.stopped()


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument(
        "--processor", default=STAGES["processor"], help="endpoint that gets the requests, to put a stage in between"
    )
    run(main, options.parse_args())
