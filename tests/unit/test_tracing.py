"""Spans of a request, within a process; between processes they are tested in tests/system/test_traces.py."""

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from common import tracing
from common.engines.ports import free_ports
from common.errors import Cancelled, Internal, Unavailable
from common.log import names
from common.messages import EngineOutput
from tests.unit.door import CHAT, Door, raises
from tests.unit.test_processor import PROMPT, Pipeline

import pytest
from dynamo.runtime import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


def request(traceparent: str | None = TRACEPARENT) -> Context:
    return Context("x", {"x-request-id": "mine", **({"traceparent": traceparent} if traceparent else {})})


class Recorded:
    """The spans that have ended."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}

    def parent(self, name: str) -> str:
        """The name of the span that the one of this name hangs below; or its parent's id if that is not here."""
        parent = self.spans[name].parent
        if parent is None:
            return ""
        ids = {span.context.span_id: span.name for span in self.spans.values()}
        return ids.get(parent.span_id, f"{parent.span_id:016x}")

    def error(self, name: str) -> str | None:
        status = self.spans[name].status
        return None if status.is_ok or status.is_unset else status.description


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    exporter = InMemorySpanExporter()
    with tracing.recording(SimpleSpanProcessor(exporter)):
        yield Recorded(exporter)


class TestOff:
    @pytest.mark.parametrize("program", ["frontend", "processor", "router", "engine"])
    def test_nothing_of_opentelemetrys_sdk_is_imported(self, program: str) -> None:
        code = f"import sys, {program}; print([name for name in sys.modules if name.startswith('opentelemetry.')])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "sdk" not in done.stdout
        assert "exporter" not in done.stdout

    def test_a_span_is_always_the_same_nothing(self) -> None:
        first, second = tracing.span("a", request()), tracing.span("b", Context(), root=True, worker="w")
        assert first is second
        with first as stage:
            stage.note(tokens=1)
            stage.fail(Internal("no"))
            assert not stage.sampled

    def test_the_stream_of_a_worker_is_handed_on_as_it_is(self) -> None:
        async def outputs() -> AsyncGenerator[EngineOutput]:
            yield EngineOutput()

        stream = outputs()
        with tracing.span("a", request()) as stage:
            assert stage.until_first(stream) is stream

    def test_the_callers_traceparent_goes_along_and_names_the_trace(self) -> None:
        pipeline = Pipeline([EngineOutput(token_ids=[2], finish_reason="stop").encode()])
        pipeline.ask({"traceparent": TRACEPARENT})
        for context in (*pipeline.router.contexts, *pipeline.engines.contexts):
            assert context.metadata["traceparent"] == TRACEPARENT
            assert tracing.trace_id(context) == TRACE


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_environment_asks_for_traces(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], wanted: bool
) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracing.wanted() is wanted


def test_the_runtime_is_imported_quietly_and_leaves_the_environment_as_it_was() -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "DYN"))},
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_ports(1)[0]}",
        "DYNAMO_SKIP_PYTHON_LOG_INIT": "1",
    }
    code = "import os, sys; before = dict(os.environ); import common; print(os.environ == before, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    same, *modules = done.stdout.split()
    assert same == "True"
    assert "dynamo._core" in modules
    assert done.stderr == ""


@pytest.mark.parametrize(
    "header",
    [
        "",
        TRACE,
        TRACEPARENT.upper(),
        f"ff-{TRACE}-{CALLER}-01",
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"{TRACEPARENT}\n",
        f"{TRACEPARENT} trace_id=forged",
    ],
)
class TestATraceparentThatIsNone:
    def test_counts_as_none(self, header: str) -> None:
        assert tracing.checked_traceparent(header) is None
        assert tracing.traceparent_of(request(header)) is None
        assert tracing.trace_id(request(header)) is None

    def test_the_frontend_passes_it_over(self, header: str) -> None:
        if "\n" in header:
            return  # which no HTTP client sends
        door = Door()
        answer = door.post(headers={"traceparent": header})
        assert answer.status_code == 200
        assert "x-trace-id" not in answer.headers
        assert "traceparent" not in door.processors.contexts[0].metadata


class TestASpan:
    def test_hangs_below_the_one_that_the_context_names(self, recorded: Recorded) -> None:
        context = request()
        with tracing.span("outer", context), tracing.span("inner", context, worker="w"):
            assert tracing.trace_id(context) == TRACE
        assert (recorded.parent("outer"), recorded.parent("inner")) == (CALLER, "outer")
        assert recorded.spans["inner"].attributes == {"worker": "w"}
        assert {f"{span.context.trace_id:032x}" for span in recorded.spans.values()} == {TRACE}

    def test_what_follows_hangs_beside_it(self, recorded: Recorded) -> None:
        context = request()
        with tracing.span("first", context):
            pass
        with tracing.span("second", context):
            pass
        assert recorded.parent("second") == CALLER
        assert context.metadata["traceparent"] == TRACEPARENT

    def test_below_a_leaf_hangs_nothing(self, recorded: Recorded) -> None:
        context = request()
        with tracing.span("leaf", context, leaf=True), tracing.span("inner", context):
            pass
        assert recorded.parent("inner") == CALLER

    def test_needs_a_parent_unless_it_is_a_root(self, recorded: Recorded) -> None:
        context = request(None)
        with tracing.span("nobody asked", context):
            pass
        with tracing.span("root", context, root=True), tracing.span("inner", context):
            pass
        assert recorded.spans.keys() == {"root", "inner"}
        assert (recorded.parent("root"), recorded.parent("inner")) == ("", "root")
        assert tracing.trace_id(context), "the log has yet to be written"

    def test_that_nobody_samples_is_named_all_the_same(self, recorded: Recorded) -> None:
        context = request(f"00-{TRACE}-{CALLER}-00")
        with tracing.span("outer", context) as stage:
            assert not stage.sampled
            name = context.metadata["traceparent"]
        assert name.startswith(f"00-{TRACE}-")
        assert name.endswith("-00")
        assert not recorded.spans

    def test_the_sampler_is_opentelemetrys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
        exporter = InMemorySpanExporter()
        with tracing.recording(SimpleSpanProcessor(exporter)), tracing.span("root", request(None), root=True) as stage:
            assert not stage.sampled
        assert not exporter.get_finished_spans()

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (Unavailable("no engine is running"), "no engine is running"),
            (asyncio.CancelledError(), "CancelledError"),
            (Cancelled("the caller went away"), "the caller went away"),
        ],
    )
    def test_an_error_that_leaves_it_is_its_status(
        self, recorded: Recorded, error: BaseException, message: str
    ) -> None:
        with pytest.raises(type(error)), tracing.span("work", request()):
            raise error
        assert recorded.error("work") == message

    def test_a_generator_that_is_closed_in_it_has_not_failed(self, recorded: Recorded) -> None:
        async def work(context: Context) -> AsyncGenerator[int]:
            with tracing.span("work", context):
                yield 1

        async def take_one() -> None:
            items = work(request())
            await anext(items)
            await items.aclose()

        asyncio.run(take_one())
        assert recorded.error("work") is None


class TestARequest:
    TOKENS = ({"token_ids": [2]}, {"token_ids": [3], "finish_reason": "stop"})

    def test_has_its_stages_in_the_processor(self, recorded: Recorded) -> None:
        pipeline = Pipeline(list(self.TOKENS))
        pipeline.ask({"traceparent": TRACEPARENT})
        assert {name: recorded.parent(name) for name in recorded.spans} == {
            "template and tokenizer": CALLER,
            "find_worker": CALLER,
            "generate": CALLER,
            "queue and prefill": "generate",
            "decode": "generate",
        }
        known = {"worker": "w1", "overlap_blocks": 1, "prompt_tokens": len(PROMPT), "tokens_before": 0}
        assert recorded.spans["generate"].attributes == known
        assert recorded.spans["decode"].attributes == {"tokens": 2}

    def test_tells_router_and_engine_what_they_hang_below(self, recorded: Recorded) -> None:
        told = []

        async def tells(body: Any, context: Context) -> AsyncIterator[Any]:
            told.append(context.metadata["traceparent"])
            yield {"token_ids": [3], "finish_reason": "stop"}

        pipeline = Pipeline([])
        pipeline.engines.handlers = {1: tells}
        pipeline.ask({"traceparent": TRACEPARENT})
        assert told == [f"00-{TRACE}-{recorded.spans['generate'].context.span_id:016x}-01"]

    def test_a_worker_that_dies_is_a_failed_attempt_and_a_migration(self, recorded: Recorded) -> None:
        Pipeline([{"token_ids": [2]}, Unavailable("it died")], [{"token_ids": [3], "finish_reason": "stop"}]).ask(
            {"traceparent": TRACEPARENT}
        )
        assert recorded.error("generate") == "it died"
        assert recorded.error("migration") is None
        attributes = recorded.spans["migration"].attributes
        assert attributes
        assert (attributes["worker"], attributes["tokens_before"]) == ("w2", 1)
        assert recorded.spans["migration"].parent == recorded.spans["generate"].parent

    def test_the_question_for_a_worker_is_a_span_that_ends_with_the_answer(self, recorded: Recorded) -> None:
        Pipeline([{"token_ids": [2], "finish_reason": "stop"}]).ask({"traceparent": TRACEPARENT})
        asked, answered = recorded.spans["find_worker"], recorded.spans["generate"]
        assert asked.end_time and answered.start_time and asked.end_time <= answered.start_time


class TestHTTP:
    def test_a_request_begins_a_trace_and_is_told_its_name(self, recorded: Recorded) -> None:
        answer = Door().post()
        span = recorded.spans[f"POST {CHAT}"]
        assert answer.headers["x-trace-id"] == f"{span.context.trace_id:032x}"
        assert span.parent is None
        assert span.attributes
        assert span.attributes["http.response.status_code"] == 200
        assert span.attributes["request_id"] == answer.headers["x-request-id"]

    def test_or_goes_on_with_the_callers(self, recorded: Recorded) -> None:
        door = Door()
        assert door.post(headers={"traceparent": TRACEPARENT}).headers["x-trace-id"] == TRACE
        assert recorded.parent(f"POST {CHAT}") == CALLER

    def test_an_error_is_its_status(self, recorded: Recorded) -> None:
        assert Door(raises(Unavailable("no engine is running"))).post().status_code == 503
        assert recorded.error(f"POST {CHAT}") == "no engine is running"

    def test_a_look_at_the_health_is_no_trace(self, recorded: Recorded) -> None:
        assert "x-trace-id" not in Door().get("/live").headers
        assert not recorded.spans

    def test_the_callers_trace_is_named_also_without_an_exporter(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "common")
        answer = Door().post(headers={"traceparent": TRACEPARENT, "x-request-id": "mine"})
        assert answer.headers["x-trace-id"] == TRACE
        assert f"request_id=mine trace_id={TRACE} status=200" in caplog.text


def test_a_line_of_the_log_names_the_trace_if_there_is_one() -> None:
    assert names(request()) == f"request_id=mine trace_id={TRACE}"
    assert names(request(None)) == "request_id=mine"


class Exporter:
    """Fails as often as it is told, then succeeds."""

    def __init__(self, failures: int) -> None:
        self._failures = failures

    def export(self, spans: Any) -> SpanExportResult:
        self._failures -= 1
        return SpanExportResult.FAILURE if self._failures >= 0 else SpanExportResult.SUCCESS


def test_a_collector_that_is_not_there_is_missed_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    caplog.set_level(logging.INFO, "common")
    exporter: Any = Exporter(failures=3)
    plainly = tracing.Plainly(exporter)
    for _ in range(5):
        plainly.export([])
    assert [record.getMessage() for record in caplog.records] == [
        "no OpenTelemetry collector takes traces at http://collector:4318: they are lost until one does",
        "traces are sent again",
    ]


def test_a_program_does_not_wait_for_a_collector_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.1)
    with tracing.exporting():
        with tracing.span("root", request(None), root=True):
            pass
        began = time.monotonic()
    assert time.monotonic() - began < 30
