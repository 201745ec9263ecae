"""Following what a worker publishes on ZMQ: its KV events, without gaps, and its load.

ZMQ's publishers drop messages: those sent before a subscriber was there, and those that a slow one has no room for. So
KV events carry sequence numbers, workers send the recent ones again on a second socket, and give a snapshot of their
cache to who needs older ones. What cannot be had in any of these ways is said, never guessed.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from common.errors import PipelineError
from common.messages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheSnapshot,
    KvEventBatch,
    LoadStat,
    StoredBlocks,
)

import msgspec
import zmq
import zmq.asyncio
from dynamo.llm import compute_block_hash_for_seq

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # after this long without events, ask whether the last ones were lost
REPLAY_SECONDS = 1.0  # a worker that does not answer a replay request for so long will not
REPLAY_ATTEMPTS = 3  # the answer can lose messages too
SILENT_ATTEMPTS = 5  # without any answer, and nothing is known of the worker any more
END_OF_REPLAY = -1

_UNSIGNED = 2**64


@dataclass(slots=True, frozen=True)
class RemovedBlocks:
    """Blocks that are no longer in the cache."""

    block_ids: list[int]


Change = StoredBlocks | RemovedBlocks | AllBlocksCleared
Snapshot = Callable[[], AsyncIterator[CacheSnapshot]]


@dataclass(slots=True, frozen=True)
class Update:
    """What changed in a worker's cache. After it, everything up to batch `sequence` is known."""

    sequence: int
    changes: list[Change]
    lag: float | None  # seconds from the worker's clock to ours; None for a snapshot, which is no event


class Lost:
    """Events are gone for good: what was known of this worker's cache is no longer true."""


class KvEventStream:
    """One worker's KV events. It begins with a snapshot of the cache if the worker gives any, else with the oldest
    event that the worker still has."""

    def __init__(self, events: str, replay: str, snapshot: Snapshot | None = None) -> None:
        self._events = events
        self._replay = replay
        self._snapshot = snapshot
        self._next = 0  # the sequence number of the next batch to give out
        self._silent = 0  # attempts in a row that had no answer
        self._decoder = msgspec.msgpack.Decoder(KvEventBatch)
        self.up_to_date = False  # whether all is given out that was there at the beginning

    async def __aiter__(self) -> AsyncIterator[Update | Lost]:
        """Yield every change once, in order; `Lost` where all that was said before no longer holds."""
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.SUB) as live, context.socket(zmq.DEALER) as replay:
            for socket, address in ((live, self._events), (replay, self._replay)):
                socket.set(zmq.LINGER, 0)
                socket.set(zmq.RCVHWM, 0)
                socket.connect(address)
            live.subscribe(b"")
            if self._snapshot:
                async for update in self._read(self._snapshot):
                    yield update
            async for item in self._catch_up(replay):
                yield item
            self.up_to_date = True
            while True:
                if not await live.poll(IDLE_SECONDS * 1000):
                    async for item in self._check(replay):
                        yield item
                    continue
                _, number, payload = await live.recv_multipart()
                sequence = int.from_bytes(number, "big")
                if sequence > self._next:
                    async for item in self._catch_up(replay, (sequence, payload)):
                        yield item
                elif sequence == self._next:
                    yield self._take(sequence, payload)

    async def _check(self, replay: zmq.asyncio.Socket) -> AsyncIterator[Update | Lost]:
        """Nothing came for a while: yield what was missed, or that nothing is known of the worker any more."""
        before = self._silent
        async for item in self._catch_up(replay):
            yield item
        if before < SILENT_ATTEMPTS <= self._silent:
            yield Lost()
        elif before >= SILENT_ATTEMPTS > self._silent and self._snapshot:
            async for item in self._start_over(self._snapshot):
                yield item

    async def _catch_up(
        self, replay: zmq.asyncio.Socket, came: tuple[int, bytes] | None = None
    ) -> AsyncIterator[Update | Lost]:
        """Yield what is missing up to now, and with it the batch that `came` too early."""
        batches = dict([came] if came else ())
        for _ in range(REPLAY_ATTEMPTS):
            batches |= await self._replayed(replay)
            for item in self._take_all(batches):
                yield item
            if not batches:
                return
        if self._next:  # not the oldest ones of a worker that has run for long
            log.warning("%s: events %d to %d are lost", self._events, self._next, min(batches) - 1)
        if self._snapshot:
            async for item in self._start_over(self._snapshot):
                yield item
        if not self._snapshot:
            self._next = min(batches)
            yield Lost()
        for item in self._take_all(batches):
            yield item

    async def _replayed(self, replay: zmq.asyncio.Socket) -> dict[int, bytes]:
        """Ask for everything from the next batch on, and return what comes."""
        batches: dict[int, bytes] = {}
        while await replay.poll(0):  # the rest of an earlier answer
            await replay.recv_multipart()
        await replay.send_multipart([b"", self._next.to_bytes(8, "big")])
        while await replay.poll(REPLAY_SECONDS * 1000):
            number, payload = (await replay.recv_multipart())[-2:]  # SGLang from 0.5.23 on puts the topic before them
            sequence = int.from_bytes(number, "big", signed=True)
            if sequence == END_OF_REPLAY:
                self._silent = 0
                return batches
            batches[sequence] = payload
        self._silent += 1
        if self._silent in (1, SILENT_ATTEMPTS):
            log.warning("%s does not answer", self._replay)
        return batches

    async def _start_over(self, snapshot: Snapshot) -> AsyncIterator[Update | Lost]:
        """Yield that nothing holds any more, and then the whole cache."""
        yield Lost()
        async for item in self._read(snapshot):
            yield item

    async def _read(self, snapshot: Snapshot) -> AsyncIterator[Update]:
        """Yield the whole cache, as the worker itself knows it."""
        try:
            async for part in snapshot():
                self._next = part.sequence + 1
                yield Update(part.sequence, list(part.chains), lag=None)
        except PipelineError as error:
            log.warning("%s: no snapshot of the cache, so only new blocks will be known: %s", self._events, error)
            self._snapshot = None

    def _take_all(self, batches: dict[int, bytes]) -> Iterator[Update | Lost]:
        """Give out the batches that are next, and leave those that are beyond a gap."""
        while self._next in batches:
            yield self._take(self._next, batches[self._next])
        for sequence in [sequence for sequence in batches if sequence < self._next]:
            del batches[sequence]

    def _take(self, sequence: int, payload: bytes) -> Update | Lost:
        self._next = sequence + 1
        try:
            batch = self._decoder.decode(payload)
            changes = list(map(_change, batch.events))
        except (msgspec.DecodeError, ValueError) as error:
            log.error("%s: events that this program does not know (%s) are lost", self._events, error)
            return Lost()
        return Update(sequence, changes, lag=time.time() - batch.timestamp)


def _change(event: BlockStored | BlockRemoved | AllBlocksCleared) -> Change:
    """An event with block ids as the tree takes them, and the blocks' tokens hashed."""
    match event:
        case BlockStored():
            local_hashes = compute_block_hash_for_seq(event.token_ids, event.block_size)
            block_ids = [_unsigned(block_id) for block_id in event.block_hashes]
            if len(local_hashes) != len(block_ids):
                raise ValueError(f"{len(block_ids)} blocks with tokens for {len(local_hashes)}")
            parent_id = None if event.parent_block_hash is None else _unsigned(event.parent_block_hash)
            return StoredBlocks(parent_id=parent_id, block_ids=block_ids, local_hashes=local_hashes)
        case BlockRemoved():
            return RemovedBlocks([_unsigned(block_id) for block_id in event.block_hashes])
        case AllBlocksCleared():
            return event


def _unsigned(block_id: int | bytes) -> int:
    """A block's id as 64 bits without a sign. SGLang's have a sign, vLLM's may be longer bytes."""
    return int.from_bytes(block_id[-8:], "big") if isinstance(block_id, bytes) else block_id % _UNSIGNED


async def load_stats(address: str) -> AsyncIterator[LoadStat]:
    """A worker's load, whenever it publishes it."""
    decoder = msgspec.msgpack.Decoder(LoadStat)
    with zmq.asyncio.Context.instance().socket(zmq.SUB) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(address)
        socket.subscribe(b"")
        while True:
            _, _, payload = await socket.recv_multipart()
            try:
                stat = decoder.decode(payload)
            except msgspec.DecodeError as error:
                log.error("%s: a load report that this program does not know (%s) is ignored", address, error)
            else:
                yield stat
