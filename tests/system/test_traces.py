"""Real processes and a collector: all spans of a request are one tree, ours and those of Dynamo's runtime."""

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.otlp import RUNTIME, Collector, Span, collecting
from tests.system.conftest import REPOSITORY, Pipeline, Process, until
from tests.system.test_readme import code

import pytest

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROGRAMS = {"frontend", "processor", "router", "engine"}
STAGES = ["template and tokenizer", "find_worker", "generate", "queue and prefill", "decode"]  # as they begin
CLOCKS = 5e6  # nanoseconds by which the runtime's clock and ours may differ


class Traced(Pipeline):
    """The pipeline, with a collector."""

    def __init__(self, folder: Path, collector: Collector) -> None:
        super().__init__(folder)
        self.collector = collector
        self.env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        self.engines: dict[str, Process] = {}

    def run_engine(self, name: str, *options: str) -> None:
        """Start an engine."""
        self.engines[name] = self.start("engine", "--worker-id", name, *options, name=f"engine-{name}")

    def tree(self, trace_id: str, *, services: set[str] = PROGRAMS, parent: str = "") -> Span:
        """The one root of a trace, once all its spans are there."""

        def whole() -> Span | None:
            spans, roots = self.collector.spans(trace_id), self.collector.roots(trace_id)
            known = {span.service for span in spans}
            ours = {span.service for span in spans if span.by_runtime}
            if len(roots) == 1 and roots[0].parent_id == parent and known == services == ours:
                return roots[0]
            return None

        try:
            root: Span = until(whole, f"one tree over {services}", timeout=30)
        except AssertionError:
            lines = [line for root in self.collector.roots(trace_id) for line in root.lines()]
            raise AssertionError("\n".join(["no one tree:", *lines])) from None
        return root


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """The pipeline with two simulated engines."""
    with collecting() as collector:
        pipeline = Traced(tmp_path_factory.mktemp("traced"), collector)
        try:
            for name in ("0", "1"):
                pipeline.run_engine(name, "--backend", "mocker")
            for program in ("router", "processor", "frontend"):
                pipeline.start(program)
            pipeline.wait_for_instances(processor=1, router=1, engine=2)
            yield pipeline
        finally:
            pipeline.close()


def everything(span: Span) -> list[Span]:
    """A span and all below it, in the order in which they began."""
    found = [span, *(below for child in span.children for below in everything(child))]
    return sorted(found, key=lambda span: span.begin)


def named(root: Span, name: str) -> list[Span]:
    return [span for span in everything(root) if span.name == name]


def check_stages(root: Span, stages: list[str]) -> None:
    """Those of the processor, in this order, each within the one that it hangs below."""
    process = next(span for span in root.children if span.service == "processor")
    assert process.name == "inference.processor.process"
    assert [span.name for span in everything(process) if span.service == "processor"][1:] == stages
    for span in everything(root):
        if not span.by_runtime:
            for child in span.children:
                assert span.begin - CLOCKS <= child.begin <= span.end + CLOCKS, (span.name, child.name)
                assert child.by_runtime or child.end <= span.end + CLOCKS, (span.name, child.name)
    for asked in named(root, "find_worker"):
        assert [(child.service, child.name) for child in asked.children] == [("router", "inference.router.find_worker")]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_is_one_tree_over_four_processes(traced: Traced, streamed: bool) -> None:
    answer = traced.ask(stream=streamed)
    root = traced.tree(answer.headers["x-trace-id"])
    assert root.name == "POST /v1/chat/completions"
    assert root.attributes["request_id"] == answer.headers["x-request-id"]
    check_stages(root, STAGES)
    generate, decode = named(root, "generate")[0], named(root, "decode")[0]
    assert generate.attributes["worker"] == answer.headers["x-worker-id"]
    assert decode.attributes["tokens"] == 16
    assert decode.end - decode.begin > (generate.end - generate.begin) / 2, "most of the time went into 15 tokens"


def test_the_runtime_has_a_span_for_each_hop(traced: Traced) -> None:
    root = traced.tree(traced.ask().headers["x-trace-id"])
    received = [span for span in everything(root) if span.name == "handle_payload" and span.service != "frontend"]
    assert sorted(span.attributes["endpoint"] for span in received) == ["find_worker", "generate", "process"]
    assert {span.name for span in everything(root) if span.by_runtime} == set(RUNTIME)


def test_the_callers_trace_goes_on(traced: Traced) -> None:
    answer = traced.ask(headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
    assert answer.headers["x-trace-id"] == TRACE
    check_stages(traced.tree(TRACE, parent=CALLER), STAGES)


def test_a_trace_that_the_caller_does_not_sample_leaves_no_span(traced: Traced) -> None:
    unsampled = TRACE[::-1]
    answer = traced.ask(headers={"traceparent": f"00-{unsampled}-{CALLER}-00"})
    assert answer.headers["x-trace-id"] == unsampled
    traced.tree(traced.ask().headers["x-trace-id"])  # a later one is there
    assert unsampled not in traced.collector.traces()


def test_several_answers_hang_in_one_tree(traced: Traced) -> None:
    root = traced.tree(traced.ask(n=2).headers["x-trace-id"])
    assert len(named(root, "generate")) == len(named(root, "decode")) == len(named(root, "find_worker")) == 2


def test_a_mistake_of_the_caller_is_told(traced: Traced) -> None:
    answer = traced.ask(max_tokens=10_000_000)
    assert answer.status_code == 400
    root = traced.tree(answer.headers["x-trace-id"], services=PROGRAMS - {"engine"})
    assert root.attributes["http.response.status_code"] == 400
    assert root.error == answer.json()["error"]["message"]
    assert named(root, "inference.processor.process")[0].error == root.error


def test_a_caller_that_hangs_up_is_told_of(traced: Traced) -> None:
    body = {"model": traced.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5000, "stream": True}
    with traced.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
        trace_id = response.headers["x-trace-id"]
    root = traced.tree(trace_id)
    assert root.attributes["http.response.status_code"] == 499
    assert named(root, "decode")[0].error == "the caller went away"


def test_every_stage_writes_the_trace_into_its_log(traced: Traced) -> None:
    trace_id = traced.ask().headers["x-trace-id"]
    for program in PROGRAMS - {"engine"}:
        process = next(process for process in traced.processes if process.log.stem == program)
        process.wait_for(f"trace_id={trace_id}")


def test_what_stages_ask_each_other_begins_no_trace(traced: Traced) -> None:
    with traced.client() as client:
        for path in ("/workers", "/v1/models", "/health"):
            assert "x-trace-id" not in client.get(path).headers

    def roots() -> set[str]:
        return {span.name for trace in traced.collector.traces() for span in traced.collector.roots(trace)}

    until(lambda: roots() == {"POST /v1/chat/completions"}, "nothing but requests")


def test_an_engine_that_dies_in_the_middle_is_a_migration(traced: Traced) -> None:
    """The last test that needs two engines."""
    body = {"model": traced.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "stream": True}
    with traced.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(9):
            next(lines)
        traced.engines.pop(lost := response.headers["x-worker-id"]).signal(signal.SIGKILL)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    root = traced.tree(response.headers["x-trace-id"])
    check_stages(root, [*STAGES, "find_worker", "migration", *STAGES[3:]])
    attempt, migration = named(root, "generate")[0], named(root, "migration")[0]
    before, after = (span.attributes["tokens"] for span in named(root, "decode"))
    assert attempt.error
    assert migration.error is None
    assert attempt.attributes["worker"] == lost != migration.attributes["worker"]
    assert migration.attributes["tokens_before"] == before > 0
    assert before + after == 300


def test_the_runtimes_own_log_stays_quiet(traced: Traced) -> None:
    for log in traced.folder.glob("*.log"):
        if log.stem not in ("nats", "etcd"):
            for line in log.read_text().splitlines():
                assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w-]+: ", line), f"{log.name}: {line}"


def test_the_last_spans_are_sent_when_a_program_ends(traced: Traced) -> None:
    trace_id = traced.ask().headers["x-trace-id"]
    frontend = next(process for process in traced.processes if process.log.stem == "frontend")
    frontend.signal()
    assert frontend.exit_code() == 0
    sent = {span.name for span in traced.collector.spans(trace_id) if span.service == "frontend"}
    assert sent == {"POST /v1/chat/completions", *RUNTIME}


def test_an_engine_in_python_has_a_span_of_ours(tmp_path: Path) -> None:
    """The README's own; of the simulated ones above, which are all Rust, there is the runtime's."""
    (tmp_path / "parrot.py").write_text(code("### Write your own engine"))
    with collecting() as collector:
        pipeline = Traced(tmp_path, collector)
        try:
            pipeline.run("parrot", sys.executable, str(tmp_path / "parrot.py"), env={"PYTHONPATH": str(REPOSITORY)})
            for program in ("router", "processor", "frontend"):
                pipeline.start(program)
            pipeline.wait_for_instances(processor=1, router=1, engine=1)
            services = PROGRAMS - {"engine"} | {"parrot"}
            root = pipeline.tree(pipeline.ask().headers["x-trace-id"], services=services)
            check_stages(root, STAGES)
            [engine] = named(root, "inference.engine.generate")
            assert engine in named(root, "generate")[0].children
        finally:
            pipeline.close()


def test_a_collector_that_is_not_there_breaks_nothing(tmp_path: Path) -> None:
    with collecting() as gone:
        address = gone.address
    pipeline = Pipeline(tmp_path)
    pipeline.env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    try:
        engine = pipeline.start("engine", "--backend", "mocker")
        programs = [engine, *(pipeline.start(program) for program in ("router", "processor", "frontend"))]
        pipeline.wait_for_instances(processor=1, router=1, engine=1)
        assert [pipeline.ask().status_code for _ in range(5)] == [200] * 5
        for program in programs[1:]:
            program.wait_for(f"no OpenTelemetry collector takes traces at {address}")
        for program in programs:
            program.signal()
            assert program.exit_code() == 0
            assert program.text.count("no OpenTelemetry collector") == (program is not engine)
            assert "Traceback" not in program.text
            assert "opentelemetry_sdk" not in program.text
    finally:
        pipeline.close()
