"""Following what a worker publishes on ZMQ: its KV events, in order and without gaps, and its load.

ZMQ's publish/subscribe loses messages: those sent before a subscriber was there, and those that a slow one has no room
for. KV events carry sequence numbers and workers send the recent ones again on a second socket, so nothing is lost
that the worker still has.
"""

import logging
from collections.abc import AsyncIterator, Iterator

from common.messages import KvEventBatch, LoadStat

import msgspec
import zmq
import zmq.asyncio

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # after this long without events, ask whether the last ones were lost
REPLAY_SECONDS = 5.0  # a worker that does not answer a replay request for so long will not

_END_OF_REPLAY = -1


class Lost:
    """Events are gone for good: what was known of this worker's cache is no longer true."""


class KvEventStream:
    """One worker's KV events, from the oldest that it still has."""

    def __init__(self, events: str, replay: str) -> None:
        self._events = events
        self._replay = replay
        self._next = 0  # the sequence number of the next batch to give out
        self._decoder = msgspec.msgpack.Decoder(KvEventBatch)

    async def __aiter__(self) -> AsyncIterator[KvEventBatch | Lost]:
        """Yield every batch once, in order; `Lost` where there is a gap that cannot be filled."""
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.SUB) as live, context.socket(zmq.DEALER) as replay:
            for socket, address in ((live, self._events), (replay, self._replay)):
                socket.set(zmq.LINGER, 0)
                socket.set(zmq.RCVHWM, 0)
                socket.connect(address)
            live.subscribe(b"")
            behind = True
            while True:
                if behind:
                    async for item in self._catch_up(replay):
                        yield item
                behind = not await live.poll(IDLE_SECONDS * 1000)
                if behind:
                    continue
                _, number, payload = await live.recv_multipart()
                sequence = int.from_bytes(number, "big")
                if sequence > self._next:
                    async for item in self._catch_up(replay):
                        yield item
                for item in self._take(sequence, payload):
                    yield item

    async def _catch_up(self, replay: zmq.asyncio.Socket) -> AsyncIterator[KvEventBatch | Lost]:
        """Ask for everything from the next batch on, and yield what comes."""
        while await replay.poll(0):  # the rest of an earlier answer
            await replay.recv_multipart()
        await replay.send_multipart([b"", self._next.to_bytes(8, "big")])
        while await replay.poll(REPLAY_SECONDS * 1000):
            number, payload = (await replay.recv_multipart())[-2:]  # SGLang from 0.5.23 on puts the topic before them
            sequence = int.from_bytes(number, "big", signed=True)
            if sequence == _END_OF_REPLAY:
                return
            for item in self._take(sequence, payload):
                yield item
        log.warning("%s does not answer", self._replay)

    def _take(self, sequence: int, payload: bytes) -> Iterator[KvEventBatch | Lost]:
        """What to give out for a batch that came."""
        if sequence < self._next:
            return
        if sequence > self._next:
            if self._next:  # not the oldest ones of a worker that has run for long
                log.warning("%s: events %d to %d are lost", self._events, self._next, sequence - 1)
            yield Lost()
        self._next = sequence + 1
        yield self._decode(payload)

    def _decode(self, payload: bytes) -> KvEventBatch | Lost:
        try:
            return self._decoder.decode(payload)
        except msgspec.DecodeError as error:
            log.error("%s: events that this program does not know (%s) are lost", self._events, error)
            return Lost()


async def load_stats(address: str) -> AsyncIterator[LoadStat]:
    """A worker's load, whenever it publishes it."""
    decoder = msgspec.msgpack.Decoder(LoadStat)
    with zmq.asyncio.Context.instance().socket(zmq.SUB) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(address)
        socket.subscribe(b"")
        while True:
            _, _, payload = await socket.recv_multipart()
            yield decoder.decode(payload)


async def publish_load(address: str, stats: AsyncIterator[LoadStat]) -> None:
    """Publish `stats` at `address`, framed as SGLang does."""
    with zmq.asyncio.Context.instance().socket(zmq.PUB) as socket:
        socket.set(zmq.LINGER, 0)
        socket.bind(address)
        sequence = 0
        async for stat in stats:
            body = msgspec.msgpack.encode(stat)
            await socket.send_multipart([b"load", sequence.to_bytes(8, "big"), body])
            sequence += 1
