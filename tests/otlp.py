"""An OpenTelemetry collector: it keeps the spans that it is sent.

.venv/bin/python -m tests.otlp [PORT]    listens on port 4318, and prints each trace as a tree
"""

import gzip
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

SETTLED_SECONDS = 6.0  # exporters send every five
RUNTIME = ("client_request", "router.route_request", "handle_payload")  # what Dynamo's runtime calls its spans


@dataclass
class Span:
    """A span as it was received."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begin: int  # nanoseconds since 1970, as the end
    end: int
    error: str | None
    attributes: dict[str, Any]
    children: list["Span"] = field(default_factory=list, repr=False)

    @property
    def by_runtime(self) -> bool:
        """Whether it is none of ours."""
        return self.name in RUNTIME

    def lines(self, depth: int = 0) -> Iterator[str]:
        """Itself and what hangs below, for people."""
        error = f" ERROR {self.error}" if self.error is not None else ""
        yield f"{'  ' * depth}{self.service}: {self.name} {(self.end - self.begin) / 1e6:.1f} ms{error}"
        for child in sorted(self.children, key=lambda child: child.begin):
            yield from child.lines(depth + 1)


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        kind = pair.value.WhichOneof("value")
        return getattr(pair.value, kind) if kind else None

    return {pair.key: value(pair) for pair in pairs}


def _received(service: str, span: WireSpan) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        begin=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        error=span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
        attributes=_attributes(span.attributes),
    )


class Collector:
    """The spans so far."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self._spans: defaultdict[str, dict[str, Span]] = defaultdict(dict)
        self._lock = threading.Lock()

    def take(self, body: bytes) -> None:
        """Keep what an exporter sent."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _attributes(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    received = _received(service, span)
                    with self._lock:
                        self._spans[received.trace_id][received.span_id] = received

    def traces(self) -> set[str]:
        """The ids of the traces that a span came of."""
        with self._lock:
            return set(self._spans)

    def spans(self, trace_id: str) -> list[Span]:
        """The spans of a trace, each with those that hang below it."""
        with self._lock:
            spans = dict(self._spans[trace_id])
        for span in spans.values():
            span.children = [child for child in spans.values() if child.parent_id == span.span_id]
        return list(spans.values())

    def roots(self, trace_id: str) -> list[Span]:
        """Those of a trace whose parent is not among them."""
        spans = self.spans(trace_id)
        known = {span.span_id for span in spans}
        return [span for span in spans if span.parent_id not in known]


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """A collector that listens while the block runs; 0: on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                collector.take(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    collector = Collector(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main(port: int = 4318) -> None:
    """Print every trace, once no more spans of it come."""
    counts: dict[str, int] = {}
    printed: set[str] = set()
    with collecting(port) as collector:
        while True:
            time.sleep(SETTLED_SECONDS)
            for trace_id in collector.traces() - printed:
                before, counts[trace_id] = counts.get(trace_id), len(collector.spans(trace_id))
                if counts[trace_id] == before:
                    printed.add(trace_id)
                    print(f"trace {trace_id}")
                    for root in collector.roots(trace_id):
                        print(*root.lines(1), sep="\n", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
