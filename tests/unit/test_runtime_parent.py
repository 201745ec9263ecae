"""How the frontend gets the runtime to hang its spans below ours, before a NATS of a few lines."""

import asyncio
import json
import logging
import struct
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

from common import tracing
from common.engines.ports import free_ports
from common.http import runtime_parent
from common.http.runtime_parent import RuntimeParent

import pytest
from dynamo.runtime import Context
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Frontend:
    """Runtime, service and endpoint of it in one."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def connection_id(self) -> int:
        return 0xABC

    def endpoint(self, path: str) -> "Frontend":
        assert path == "inference.frontend.trace"
        return self

    def add_served(self, endpoint: "Frontend", spec: object, serve: object) -> None:
        assert endpoint is self

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))


@asynccontextmanager
async def running() -> AsyncIterator[RuntimeParent]:
    frontend: Any = Frontend()
    parent = RuntimeParent(frontend, frontend)
    await asyncio.sleep(0)
    try:
        yield parent
    finally:
        for task in frontend.tasks:
            task.cancel()
        await asyncio.gather(*frontend.tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # connections close at the loop's next turn


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime_parent, "SECONDS", 30.0)  # on a busy machine
    with tracing.recording(SimpleSpanProcessor(InMemorySpanExporter())):
        yield


class Nats:
    """Hands requests to an endpoint."""

    def __init__(self, parent: RuntimeParent) -> None:
        self._parent = parent
        self.subjects: list[str] = []
        self.headers: list[str] = []
        self.connections = 0
        self.options: dict[str, Any] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(b"INFO {}\r\nPING\r\n")
        async for line in reader:
            command, *words = line.decode().split(maxsplit=1 if line.startswith(b"CONNECT") else -1)
            if command == "CONNECT":
                self.options = json.loads(words[0])
            if command == "HPUB":
                subject, _, header_size, size = words
                message = await reader.readexactly(int(size) + 2)
                header, body = message[: int(header_size)], message[int(header_size) : -2]
                what, says, checksum = struct.unpack(">QQQ", body[:24])
                assert (len(body), says, checksum) == (24 + what + says, 1, 0)
                control = json.loads(body[24 : 24 + what])
                info = json.loads(control["connection_info"]["info"])
                _, answers = await asyncio.open_connection(*info["address"].split(":"))
                answers.close()
                self.subjects.append(subject)
                self.headers.append(header.decode())
                async for _ in self._parent._arrived({}, Context(control["id"])):
                    raise AssertionError("an answer")
        writer.close()


@asynccontextmanager
async def nats(parent: RuntimeParent, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Nats]:
    fake = Nats(parent)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("NATS_SERVER", f"nats://me:secret@127.0.0.1:{port}")
    yield fake
    server.close()


def request(flags: str = "01") -> Context:
    return Context("x", {"x-request-id": "mine", "traceparent": TRACEPARENT[:-2] + flags})


def test_a_request_goes_on_as_the_one_that_the_runtime_received(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running() as parents, nats(parents, monkeypatch) as fake:
            for _ in range(2):
                context = request()
                with tracing.span("root", context) as stage:
                    child = await parents.given(context, stage)
                    assert child is not context
                    assert child.id() == "x"
                    assert dict(child.metadata.items()) == {"x-request-id": "mine", "traceparent": stage.traceparent}
                    assert fake.headers[-1] == f"NATS/1.0\r\ntraceparent: {stage.traceparent}\r\n\r\n"
            assert fake.subjects == ["inference_frontend.trace-abc"] * 2
            assert fake.connections == 1
            assert (fake.options["user"], fake.options["pass"]) == ("me", "secret")

    asyncio.run(main())


def test_what_nobody_samples_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running() as parents, nats(parents, monkeypatch) as fake:
            context = request(flags="00")
            with tracing.span("root", context) as stage:
                assert await parents.given(context, stage) is context
            assert not fake.connections

    asyncio.run(main())


def test_without_an_answer_requests_go_on_and_the_next_ones_do_not_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "common")
    monkeypatch.setenv("NATS_SERVER", f"127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr(runtime_parent, "SECONDS", 0.2)

    async def main() -> None:
        async with running() as parents:
            for _ in range(3):
                context = request()
                with tracing.span("root", context) as stage:
                    assert await parents.given(context, stage) is context

    asyncio.run(main())
    assert len(caplog.records) == 1
    assert "without the runtime's spans" in caplog.text
