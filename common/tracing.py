"""Traces: where the time of a request went, as one tree of OpenTelemetry spans over all programs.

    with span("template and tokenizer", context):
        ...

OTEL_EXPORTER_OTLP_ENDPOINT turns it on, and OpenTelemetry's other variables apply. Without it nothing of OpenTelemetry
is imported. What remains then is that a caller's `traceparent` goes along to every stage and stands in the log.

A span hangs below the one that `traceparent` in its Context's metadata names. A Context goes from stage to stage with
its metadata, so nothing else has to be passed on. The runtime has spans of its own for each hop; they hang below the
same root, see common/http/runtime_parent.py.
"""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, TypeVar, cast

if TYPE_CHECKING:
    from dynamo.runtime import Context
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

Item = TypeVar("Item")

FLUSH_SECONDS = 2.0  # for the last spans of a program that ends

# W3C Trace Context. One that is not so counts as none.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})")

# The runtime reads these when it is imported. Of what hangs below a sampled span of ours it exports spans, and nothing
# else: it would begin a trace for each question that stages ask each other.
_RUNTIME_VARIABLES = {
    "OTEL_EXPORT_ENABLED": "1",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",  # as ours; its own default is another
    "OTEL_TRACES_SAMPLE_RATIO": "0",
    "OTEL_BSP_SCHEDULE_DELAY": "1000",  # milliseconds between its exports
}
# Its log has the same filter as its spans. A field in braces is one that a log line must have and a span need not; of
# two such rules that fit, the later in the alphabet counts. So these let the spans of each hop pass and no log line.
_SPANS_ONLY = (
    "off,request_span[{spans}]=info,request_span[{message}]=off,dynamo_runtime::logging[{spans}]=info,"
    "opentelemetry_sdk[{error}]=off"
)


def wanted() -> bool:
    """Whether the environment asks for traces."""
    environment = os.environ
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def import_runtime() -> None:
    """Import the runtime so that it exports its spans, but keeps its log quiet, unless DYN_LOG says what to log.

    What it reads then is not left in the environment: programs that this one starts would find it there.
    """
    variables = {**_RUNTIME_VARIABLES, "OTEL_SERVICE_NAME": program(), "DYN_LOG": _SPANS_ONLY}
    before = {name: os.environ.get(name) for name in (*variables, "DYNAMO_SKIP_PYTHON_LOG_INIT")}
    os.environ.pop("DYNAMO_SKIP_PYTHON_LOG_INIT", None)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    try:
        with _silence() if before["DYN_LOG"] is None else nullcontext():
            import dynamo._core  # noqa: F401
    finally:
        for name, was in before.items():
            os.environ.pop(name, None)
            if was is not None:
                os.environ[name] = was


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is written to stderr: a filter with fields makes the runtime warn, four times over nine lines, that log
    lines for each token would now be slow. There are none."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def program() -> str:
    """What this program is called, in the log and in traces."""
    name = os.path.basename(sys.argv[0])
    if name == "-m":  # as long as the module is looked for
        name = sys.orig_argv[sys.orig_argv.index("-m") + 1].rpartition(".")[2]
    return name.removesuffix(".py")


def checked_traceparent(header: str) -> str | None:
    """A `traceparent` header if it is a valid one."""
    return header if _TRACEPARENT.fullmatch(header) else None


def traceparent_of(context: "Context") -> str | None:
    """What the spans of a request hang below: a span of ours, or else of another Dynamo program that sent it."""
    headers = None if "traceparent" in context.metadata else context.trace_headers()
    found = headers["traceparent"] if headers else context.metadata.get("traceparent")
    return checked_traceparent(found or "")


def trace_id(context: "Context") -> str | None:
    """The trace that a request belongs to, if its caller or we have begun one."""
    match = _TRACEPARENT.fullmatch(context.metadata.get("traceparent") or "")
    return match[1] if match else None


class Stage:
    """A span that has begun, or none."""

    def __init__(self, span: "Span | None" = None) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """Its name for what hangs below it. Only of one that has begun."""
        assert self._span
        own = self._span.get_span_context()
        sampled = own.trace_flags & 1  # the runtime rejects a traceparent with the flags of later versions
        return f"00-{own.trace_id:032x}-{own.span_id:016x}-{sampled:02x}"

    @property
    def sampled(self) -> bool:
        """Whether it will be exported."""
        return self._span is not None and self._span.is_recording()

    def note(self, **attributes: str | int | float) -> None:
        """Add what became known on the way."""
        if self._span:
            self._span.set_attributes(attributes)

    def fail(self, error: BaseException | None) -> None:
        """Mark it as failed if there is an error."""
        if self._span and error:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, str(error) or type(error).__name__))

    def end(self) -> None:
        """End it before its block does."""
        if self._span:
            self._span.end()
            self._span = None

    def until_first(self, items: AsyncGenerator[Item]) -> AsyncGenerator[Item]:
        """The same items; the span ends with the first, if those that follow only keep a stream open."""
        return _until_first(self, items) if self._span else items


async def _until_first(stage: Stage, items: AsyncGenerator[Item]) -> AsyncGenerator[Item]:
    async with aclosing(items):
        async for item in items:
            stage.end()
            yield item


Kind = Literal["internal", "server", "client"]

_NO_STAGE = nullcontext(Stage())
_tracer: "Tracer | None" = None


def on() -> bool:
    """Whether this program records spans."""
    return _tracer is not None


def span(
    name: str,
    context: "Context",
    *,
    kind: Kind = "internal",
    root: bool = False,
    leaf: bool = False,
    **attributes: str | int | float,
) -> AbstractContextManager[Stage]:
    """A span for as long as the block runs. What is begun or asked of others with `context` meanwhile hangs below it.
    An error that leaves the block is its status; a generator that is closed in it is none.

    root: begin a trace if there is none yet; leaf: hang nothing below.
    """
    if _tracer is None or not (root or traceparent_of(context)):
        return _NO_STAGE
    return _begun(name, context, kind, leaf, attributes)


@contextmanager
def _begun(
    name: str, context: "Context", kind: Kind, leaf: bool, attributes: dict[str, str | int | float]
) -> Generator[Stage]:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    assert _tracer
    before = traceparent_of(context)
    parent = TraceContextTextMapPropagator().extract({"traceparent": before} if before else {})
    stage = Stage(_tracer.start_span(name, parent, SpanKind[kind.upper()], attributes))
    if not leaf:
        own = context.metadata["traceparent"] = stage.traceparent
    try:
        yield stage
    except GeneratorExit:
        raise
    except BaseException as error:
        stage.fail(error)
        raise
    finally:
        if not leaf:
            context.metadata["traceparent"] = before or own
        stage.end()


@contextmanager
def exporting() -> Iterator[None]:
    """Record spans and export them while the block runs, if they are wanted; then send the last ones."""
    if not wanted():
        yield
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # It writes a line and a traceback for each batch that it cannot send; we say it once.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
    try:
        with recording(BatchSpanProcessor(cast("SpanExporter", Plainly(OTLPSpanExporter())))):
            yield
    finally:  # the runtime cannot be told to send its last ones, only be given the time
        delay = os.environ.get("OTEL_BSP_SCHEDULE_DELAY") or _RUNTIME_VARIABLES["OTEL_BSP_SCHEDULE_DELAY"]
        time.sleep(min(FLUSH_SECONDS, float(delay) / 1000 + 0.1))


class Plainly:
    """An exporter of spans that says in one line that it cannot send them, and when it can again."""

    def __init__(self, exporter: "SpanExporter") -> None:
        self._exporter = exporter
        self._failed = False

    def export(self, spans: Sequence["ReadableSpan"]) -> "SpanExportResult":
        result = self._exporter.export(spans)
        failed = result.name == "FAILURE"
        if failed and not self._failed:
            address = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
            log.warning("no OpenTelemetry collector takes traces at %s: they are lost until one does", address)
        elif self._failed and not failed:
            log.info("traces are sent again")
        self._failed = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


@contextmanager
def recording(processor: "SpanProcessor") -> Iterator[None]:
    """Record spans while the block runs, and hand them to `processor` as they end."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    global _tracer
    name = os.environ.get("OTEL_SERVICE_NAME") or program()
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("inference-pipeline")
    try:
        yield
    finally:
        _tracer = None
        last = threading.Thread(target=provider.shutdown, daemon=True)  # it would wait half a minute
        last.start()
        last.join(FLUSH_SECONDS)
