"""What a client may send is bounded before anything else sees it, and so is what it leaves unread."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from common.engines.ports import free_ports
from common.http import protocol
from common.http.protocol import HEADER_BYTES
from common.http.server import listening

import pytest
from starlette.types import ASGIApp

BEGIN = b"POST / HTTP/1.1\r\nhost: x\r\n"
Scenario = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(str(size)))]})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def never() -> None:
    await asyncio.Event().wait()


def play(scenario: Scenario, app: ASGIApp = echo) -> None:
    async def run() -> None:
        (port,) = free_ports(1)
        async with listening(app, "127.0.0.1", port, never):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            await asyncio.wait_for(scenario(reader, writer), 10)
            writer.close()

    asyncio.run(run())


def test_who_has_a_connection_as_the_port_is_left_gets_an_answer() -> None:
    async def run() -> None:
        (port,) = free_ports(1)
        leave = asyncio.Event()
        async with listening(echo, "127.0.0.1", port, leave.wait):
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]  # of which none is accepted yet
            leave.set()
            asking = asyncio.gather(*map(ask_late, clients))
            await asyncio.sleep(0.1)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
        assert [answer[:15] for answer in await asking] == [b"HTTP/1.1 200 OK"] * 5

    async def ask_late(client: socket.socket) -> bytes:
        reader, writer = await asyncio.open_connection(sock=client)
        await asyncio.sleep(0.2)
        writer.write(BEGIN + b"content-length: 1\r\n\r\na")
        answer = await reader.read()
        writer.close()
        return answer

    asyncio.run(run())


@pytest.mark.parametrize("end", [b"\r\n", b""])
def test_headers_without_end_are_refused(end: bytes) -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BEGIN)
        for number in range(100):
            writer.write(b"x-%d: " % number + b"a" * 1000 + end)
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")

    play(scenario)


def test_many_headers_and_a_large_body_are_taken_again_and_again() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            writer.write(BEGIN + b"x-long: " + b"a" * (HEADER_BYTES - 200) + b"\r\ncontent-length: 300000\r\n\r\n")
            writer.write(b"b" * 300_000)
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(6) == b"300000"

    play(scenario)


@pytest.mark.parametrize("sent", [b"", BEGIN, BEGIN + b"content-length: 5\r\n\r\nabc"])
def test_a_request_that_does_not_arrive_ends(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.2)

    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ") or (b"abc" in sent and not answer)

    play(scenario)


def test_a_connection_that_waits_for_its_next_request_may_do_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.2)

    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(BEGIN + b"content-length: 1\r\n\r\na")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(1)
            await asyncio.sleep(0.4)

    play(scenario)


class Answer:
    """Of so many megabytes, sent one by one."""

    def __init__(self, megabytes: int) -> None:
        self._megabytes = megabytes
        self.sent = 0
        self.disconnected = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watching = asyncio.create_task(self._watch(receive))
        while self.sent < self._megabytes and not self.disconnected.is_set():
            self.sent += 1
            await send({"type": "http.response.body", "body": b"a" * 2**20, "more_body": self.sent < self._megabytes})
            await asyncio.sleep(0.01)
        await watching

    async def _watch(self, receive: Any) -> None:
        await receive()  # the rest of the request
        await receive()
        self.disconnected.set()


async def read(reader: asyncio.StreamReader, megabytes: int) -> None:
    """Read an answer. Raises EOFError, or what the connection does, if it ends before."""
    unread = megabytes * 2**20
    while unread > 0:
        if not (part := await reader.read(2**20)):
            raise EOFError
        unread -= part.count(b"a")


@pytest.mark.parametrize("megabytes", [1, 3])
def test_nobody_waits_for_a_client_to_read(megabytes: int) -> None:
    answer = Answer(megabytes)

    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BEGIN + b"\r\n")
        while answer.sent < megabytes:
            await asyncio.sleep(0.01)
        await read(reader, megabytes)

    play(scenario, answer)


def test_a_client_that_is_far_behind_an_answer_that_goes_on_is_hung_up_on() -> None:
    answer = Answer(10**9)

    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BEGIN + b"\r\n")
        await answer.disconnected.wait()
        with pytest.raises((ConnectionError, EOFError)):
            await read(reader, 10**9)

    play(scenario, answer)
    assert answer.sent < 10**9


def test_a_client_that_reads_nothing_of_what_is_complete_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "UNREAD_BYTES", 10**9)
    answer = Answer(40)

    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BEGIN + b"\r\n")
        await answer.disconnected.wait()

    play(scenario, answer)
