"""KV events arrive once and in order, whatever ZMQ loses, as long as the worker still has them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing

from common.kv_events import KvEventStream, Lost
from common.messages import AllBlocksCleared, KvEventBatch

import msgspec
import zmq
import zmq.asyncio


class Publisher:
    """Speaks the protocol of SGLang's and vLLM's publishers, and can lose what it is told to lose."""

    def __init__(self, *, keeps: int) -> None:
        context = zmq.asyncio.Context.instance()
        self._live, self._replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self.addresses = [
            f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}" for socket in (self._live, self._replay)
        ]
        self._keeps = keeps
        self._sent: list[tuple[int, bytes]] = []
        self._next = 0
        self._answering = asyncio.create_task(self._answer())

    async def send(self, *, lost: bool = False) -> None:
        payload = msgspec.msgpack.encode(KvEventBatch(timestamp=float(self._next), events=[AllBlocksCleared()]))
        self._sent = [*self._sent, (self._next, payload)][-self._keeps :]
        if not lost:
            await self._live.send_multipart([b"topic", self._next.to_bytes(8, "big"), payload])
        self._next += 1

    async def garble(self) -> None:
        await self._live.send_multipart([b"topic", self._next.to_bytes(8, "big"), msgspec.msgpack.encode("what?")])
        self._next += 1

    async def _answer(self) -> None:
        while True:
            client, _, start = await self._replay.recv_multipart()
            for number, payload in self._sent:
                if number >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart([client, b"", number.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", (-1).to_bytes(8, "big", signed=True), b""])

    def close(self) -> None:
        self._answering.cancel()
        self._live.close(0)
        self._replay.close(0)


Scenario = Callable[[Publisher, "Reader"], Coroutine[None, None, None]]


class Reader:
    """Collects what a stream gives out: the number of a batch, or "lost"."""

    def __init__(self, items: AsyncIterator[KvEventBatch | Lost]) -> None:
        self._items = items

    async def read(self, count: int) -> list[int | str]:
        out: list[int | str] = []
        while len(out) < count:
            item = await asyncio.wait_for(anext(self._items), 30)
            out.append("lost" if isinstance(item, Lost) else int(item.timestamp))
        return out


def play(scenario: Scenario, *, keeps: int = 1000) -> None:
    async def run() -> None:
        publisher = Publisher(keeps=keeps)
        try:
            async with aclosing(KvEventStream(*publisher.addresses).__aiter__()) as items:  # type: ignore[type-var]
                await scenario(publisher, Reader(items))
        finally:
            publisher.close()

    asyncio.run(run())


def test_a_late_reader_gets_everything_from_the_beginning() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        for _ in range(5):
            await publisher.send()
        assert await reader.read(5) == [0, 1, 2, 3, 4]
        await publisher.send()
        assert await reader.read(1) == [5]

    play(scenario)


def test_a_gap_is_filled() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(1) == [0]
        for lost in (True, True, False):
            await publisher.send(lost=lost)
        assert await reader.read(3) == [1, 2, 3]

    play(scenario)


def test_the_last_events_are_not_missed_either() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(1) == [0]
        await publisher.send(lost=True)
        assert await reader.read(1) == [1]

    play(scenario)


def test_a_gap_that_cannot_be_filled_is_said() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(1) == [0]
        for _ in range(4):
            await publisher.send(lost=True)
        await publisher.send()
        assert await reader.read(3) == ["lost", 4, 5]

    play(scenario, keeps=2)


def test_events_that_nobody_knows_are_lost_ones() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(1) == [0]
        await publisher.garble()
        await publisher.send()
        assert await reader.read(2) == ["lost", 2]

    play(scenario)


def test_many() -> None:
    count = 500

    async def scenario(publisher: Publisher, reader: Reader) -> None:
        for number in range(count):
            await publisher.send(lost=number % 7 == 3)
        assert await reader.read(count) == list(range(count))

    play(scenario)
