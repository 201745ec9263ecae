"""One HTTP request and its answer: their id, what ends them early, and their line in the log."""

import asyncio
import logging
import re
import string
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Protocol
from urllib.parse import quote

from common import tracing
from common.errors import Cancelled, Internal, InvalidRequest, NotFound, PipelineError, Unavailable
from common.http.runtime_parent import RuntimeParent
from common.log import log_request, names
from common.messages import Usage
from common.openai_api import ChatCompletionChunk, Routing
from common.openai_request import GenerationRequest, explain

from dynamo.runtime import Context
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from msgspec import UNSET
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

MAX_WHAT = 200  # characters of a path that are logged
MAX_NAMES, MAX_NAME = 20, 40  # ignored fields that a header names, and characters of each
ANSWER_HEADERS = [
    *("x-request-id", "x-trace-id", "x-worker-id", "x-kv-overlap-blocks", "x-routed-by", "x-ignored-fields"),
    "retry-after",
]
METADATA = ("x-session-id", "x-priority")  # headers that go along to every stage

# Of one word, so that no id can look like another field of a log line.
_REQUEST_ID = re.compile(r"[!#-~]{0,128}"), "at most 128 printable ASCII characters without spaces and quotes"
_PRIORITY = re.compile(r"-?\d{1,9}"), "an integer of at most nine digits"

InProgress = Callable[[Context], AbstractContextManager[None]]


class Observer(Protocol):
    """Watches requests for an answer of a model."""

    def on_start(self, exchange: "Exchange") -> None:
        """One has come, and its body is what it should be: `exchange.completion_request`."""

    def on_first(self, exchange: "Exchange") -> None:
        """The first chunk of its answer is there: `exchange.routing`."""

    def on_end(self, exchange: "Exchange") -> None:
        """It is over, also one that never began because it is refused: `exchange.status`."""


class Exchange:
    """A request, and what is known of it so far."""

    def __init__(self, scope: Scope, send: Send, observers: Sequence[Observer] = ()) -> None:
        # The runtime tells requests apart by their context's id, so that is never the caller's choice.
        context_id = self.request_id = uuid.uuid4().hex
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.error: BaseException | None = None
        try:
            self.request_id = self._checked("x-request-id", *_REQUEST_ID) or context_id
            self._checked("x-priority", *_PRIORITY)
        except InvalidRequest as error:
            self.error = error
        metadata = {name: self.headers[name] for name in METADATA if name in self.headers}
        if traceparent := tracing.checked_traceparent(self.headers.get("traceparent", "")):
            metadata["traceparent"] = traceparent
        self.context = Context(context_id, {"x-request-id": self.request_id, **metadata})
        self.send = send
        self.path: str = scope["path"]
        self.what = f"{scope['method']} {scope['raw_path'].decode('latin-1')}"[:MAX_WHAT]
        self._observers = observers
        self.began = time.perf_counter()
        self.first: float | None = None  # when the first chunk came
        self.chunks = 0
        self.completion_request: GenerationRequest | None = None  # once its body is known to be one
        self.ignored: list[str] = []  # fields of its body that nobody here knows
        self.routing: Routing | None = None
        self.usage: Usage | None = None
        self._finish_reasons: dict[int, str | None] = {}  # of each answer, once it is over

    def _checked(self, name: str, pattern: re.Pattern[str], says: str) -> str:
        """The value of a header, or "". Raises InvalidRequest if it is not what that may be."""
        value: str | None = self.headers.get(name)
        if value is not None and not pattern.fullmatch(value):
            raise InvalidRequest(f"{name} must be {says}", param=name)
        return value or ""

    @classmethod
    def of(cls, request: Request) -> "Exchange":
        """The one that a request belongs to."""
        exchange: Exchange = request.scope["exchange"]
        return exchange

    @property
    def id_headers(self) -> list[tuple[bytes, bytes]]:
        """The response headers that say which request and which trace this is."""
        headers = [(b"x-request-id", self.request_id.encode("ascii"))]
        if trace := tracing.trace_id(self.context):
            headers.append((b"x-trace-id", trace.encode("ascii")))
        return headers

    @property
    def answer_headers(self) -> dict[str, str]:
        """The response headers that say who answers, and what of the request was ignored."""
        names = [quote(name[:MAX_NAME], safe="._") for name in self.ignored[:MAX_NAMES]]
        headers = {"x-ignored-fields": ",".join(names)} if names else {}
        if self.routing:
            headers["x-worker-id"] = quote(self.routing.worker_id, safe=string.punctuation)  # it can have any name
            headers["x-kv-overlap-blocks"] = str(self.routing.overlap_blocks)
            if self.routing.by_load:
                headers["x-routed-by"] = "load"
        return headers

    @property
    def finish_reason(self) -> str | None:
        """Why the answers are over; None while one is not."""
        reasons = set(self._finish_reasons.values())
        answers = self.completion_request.answers if self.completion_request else 1
        if None in reasons or len(self._finish_reasons) < answers:
            return None
        return ",".join(sorted(map(str, reasons)))

    def begin(self, completion_request: GenerationRequest, ignored: list[str]) -> None:
        """It asks for this. ignored: the names of its fields that nobody here knows."""
        self.completion_request, self.ignored = completion_request, ignored
        for observer in self._observers:
            observer.on_start(self)

    def noted(self, chunk: ChatCompletionChunk) -> ChatCompletionChunk:
        """The chunk, once what it says is remembered. Raises Internal if it says nonsense."""
        self.chunks += 1
        if chunk.routing:
            self.routing, chunk.routing = chunk.routing, UNSET  # the headers say it, unless it came too late for that
        for choice in chunk.choices:
            self._finish_reasons[choice.index] = choice.finish_reason
        if chunk.usage:
            self.usage = Usage.received(chunk.usage)
        if self.first is None:
            self.first = time.perf_counter()
            for observer in self._observers:
                observer.on_first(self)
        return chunk

    def check_finished(self) -> None:
        """Raises Internal if the answers are over and one has not said why."""
        if self.finish_reason is None:
            raise Internal("the processor ended its answer without a finish_reason")

    @asynccontextmanager
    async def stopped_on_disconnect(self, request: Request) -> AsyncIterator[None]:
        """Stop the request if the client hangs up while the block runs: nobody else looks for that."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.context.stop_generating()

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()

    def end(self) -> None:
        """It is over. What is answered without a chunk, like a list of models, is not worth a word."""
        if self.error is None and self.first is None:
            return
        self._log()
        for observer in self._observers:
            observer.on_end(self)

    def _log(self) -> None:
        routing, usage, first, now = self.routing, self.usage, self.first, time.perf_counter()
        details = usage.prompt_tokens_details if usage else None
        log_request(
            log,
            self.context,
            self.what,
            status=self.status,
            worker=routing and routing.worker_id,
            overlap_blocks=routing and routing.overlap_blocks,
            migrations=(routing and routing.migrations) or None,
            prompt_tokens=usage and usage.prompt_tokens,
            cached_tokens=details and details.cached_tokens,
            completion_tokens=usage and usage.completion_tokens,
            finish_reason=self.finish_reason,
            ttft_ms=None if first is None else round((first - self.began) * 1000, 1),
            duration_ms=round((now - self.began) * 1000, 1),
            error=str(self.error) if self.error and self.status != Cancelled.http_status else None,
        )

    @property
    def status(self) -> int:
        """The HTTP status, or of what began as 200, the one that its error would have had."""
        if isinstance(self.error, asyncio.CancelledError):
            return Cancelled.http_status
        if isinstance(self.error, HTTPException):
            return self.error.status_code
        return getattr(self.error, "http_status", 500) if self.error else 200


class Exchanges:
    """The outermost layer of the application: begins and ends an Exchange for every request.

    The start of every response passes through here to get its x-request-id; what streams after it need not, and goes
    out through `Exchange.send`.
    """

    def __init__(
        self,
        app: ASGIApp,
        in_progress: InProgress,
        observers: Sequence[Observer] = (),
        runtime_parent: RuntimeParent | None = None,
    ) -> None:
        self._app = app
        self._in_progress = in_progress
        self._observers = observers
        self._runtime_parent = runtime_parent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope["exchange"] = Exchange(scope, send, self._observers)
        # What only looks, and may do so every second, is not worth a trace.
        with tracing.span(exchange.what, exchange.context, kind="server", root=scope["method"] == "POST") as stage:
            if self._runtime_parent:
                exchange.context = await self._runtime_parent.given(exchange.context, stage)
            await self._answer(exchange, scope, receive, send)
            attributes = {"http.request.method": scope["method"], "http.response.status_code": exchange.status}
            stage.note(request_id=exchange.request_id, **attributes)
            stage.fail(exchange.error)
        # Each of these leads back to the exchange: with them all that was asked for, megabytes perhaps, would be kept
        # until the next garbage collection, which counts objects and not bytes.
        exchange.error = None
        del scope["exchange"]

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *exchange.id_headers]
            await send(message)

        app: ASGIApp = error_response(exchange.error) if isinstance(exchange.error, PipelineError) else self._app
        if exchange.headers.get("expect", "100-continue").lower() != "100-continue":
            exchange.error = HTTPException(417)
            app = error_response(InvalidRequest("no such expectation can be met: leave the expect header out"), 417)
        with self._in_progress(exchange.context):
            try:
                await app(scope, receive, send_with_id)
            except Exception as error:
                exchange.error = error
                log.exception("%s failed", names(exchange.context))
            except asyncio.CancelledError as error:  # the server closes, and this is not done
                exchange.error = error
                if not started:
                    await error_response(Unavailable("this server is being stopped"))(scope, receive, send_with_id)
            finally:
                exchange.context.stop_generating()
                exchange.end()


def error_response(error: PipelineError, status: int | None = None) -> JSONResponse:
    """OpenAI's answer to an error."""
    return JSONResponse(error.body, status or error.http_status, error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form, and leave it to the Exchange."""

    def on_pipeline_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PipelineError)
        Exchange.of(request).error = error
        return error_response(error)

    def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = [{**fault, "loc": fault["loc"][1:]} for fault in error.errors()]  # without "body" or "header"
        return on_pipeline_error(request, explain(faults))

    def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, PipelineError):  # of our own body's decoding
            return on_pipeline_error(request, error.__cause__)
        Exchange.of(request).error = error
        kind = NotFound if error.status_code == 404 else InvalidRequest
        return error_response(kind(f"{request.method} {request.url.path}: {error.detail}"), error.status_code)

    def on_fault(request: Request, error: Exception) -> Response:
        return error_response(Internal(f"{type(error).__name__}: {error}"))

    app.add_exception_handler(PipelineError, on_pipeline_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_fault)
