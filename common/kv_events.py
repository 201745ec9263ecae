"""Following what a worker publishes on ZMQ: its KV events, without gaps, and its load.

ZMQ's publishers drop messages: those sent before a subscriber was there, and those that a slow one has no room for. So
KV events carry sequence numbers, workers send the recent ones again on a second socket, and give a snapshot of their
cache to who needs older ones. What cannot be had in any of these ways is said, never guessed.

Silence is no loss: a worker that was stopped for a while has its cache and its recent events when it goes on.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass

from common.messages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheSnapshot,
    KvEvent,
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
REPLAY_SECONDS = 1.0  # without another message of an answer, and it is over, or was never begun
FRUITLESS_ATTEMPTS = 3  # answers in a row without what is missing: it is gone; one answer can lose messages too
SILENT_ATTEMPTS = 30  # in a row without any answer: do without
AT_ONCE = 16 * 1024  # bytes of batches that are taken in together, some 2 ms of work, before others have their turn
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
    """What changed in a worker's cache, in this order. After it, everything up to batch `sequence` is known."""

    sequence: int
    changes: list[Change]
    lag: float | None  # seconds from the worker's clock to ours, of the last one; None for a snapshot
    batches: int = 0  # that were read for it: those that had come; none for a snapshot, which is no event


class Lost:
    """Events are gone for good: what was known of this worker's cache is no longer true."""


class KvEventStream:
    """One worker's KV events. It begins with a snapshot of the cache if there is somebody to give it, else with the
    oldest event that the worker still has. One that starts again counts from 0 again: it needs another stream."""

    def __init__(self, events: str, replay: str, snapshot: Snapshot | None = None) -> None:
        self._events = events
        self._replay = replay
        self._snapshot = snapshot
        self._next = 0  # the sequence number of the next batch to give out
        self._silent = 0  # attempts in a row that had no answer
        self._left_out = 0  # events that could not be read
        self._batches = msgspec.msgpack.Decoder(KvEventBatch)
        self._changes = msgspec.msgpack.Decoder(KvEvent)
        self.up_to_date = False  # whether all is given out that was there at the beginning

    async def __aiter__(self) -> AsyncIterator[Update | Lost]:
        """Yield every change once, in order; `Lost` where all that was said before no longer holds. Raises
        PipelineError if a snapshot is needed and cannot be had."""
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.SUB) as live, context.socket(zmq.DEALER) as replay:
            for socket, address in ((live, self._events), (replay, self._replay)):
                socket.set(zmq.LINGER, 0)
                socket.set_hwm(0)
                socket.connect(address)
            live.subscribe(b"")
            arrived: zmq.Socket[bytes] = zmq.Socket.shadow(live)  # the same, without a future for each message
            async for part in self._read_snapshot():
                yield part
            async for item in self._catch_up(replay, {}):
                yield item
            self.up_to_date = True
            while True:
                batches = _received(arrived) if await live.poll(IDLE_SECONDS * 1000) else {}
                idle = not batches
                if update := self._take(batches):
                    yield update
                if idle or batches:
                    async for item in self._catch_up(replay, batches):
                        yield item

    async def _catch_up(self, replay: zmq.asyncio.Socket, batches: dict[int, bytes]) -> AsyncIterator[Update | Lost]:
        """Yield what is missing up to now, and with it the batches that came too early."""
        fruitless = 0
        while fruitless < FRUITLESS_ATTEMPTS:
            before = self._next
            answer, complete = await self._ask(replay)
            batches |= answer
            while update := self._take(batches):
                yield update
                await asyncio.sleep(0)  # an answer can be long
            if complete and not batches:
                return
            if self._next > before:  # SGLang's and the mocker's sockets drop what is beyond the first 1,000 or so
                fruitless = 0
            elif complete or answer:
                fruitless += 1
            elif self._silent % SILENT_ATTEMPTS:
                return  # it may only be stopped; what came will be in its answer
            else:
                break
        if batches or self._snapshot:
            async for item in self._start_over(batches):
                yield item

    async def _start_over(self, batches: dict[int, bytes]) -> AsyncIterator[Update | Lost]:
        """What is missing cannot be had: yield that nothing holds any more, and the whole cache if it can be had, or
        else what is left."""
        if self._next:  # not the oldest ones of a worker that has run for long
            log.warning("%s: events from %d on cannot be had", self._events, self._next)
        yield Lost()
        if not self._snapshot:
            self._next = min(batches)
        async for part in self._read_snapshot():
            yield part
        while update := self._take(batches):
            yield update

    async def _ask(self, replay: zmq.asyncio.Socket) -> tuple[dict[int, bytes], bool]:
        """Ask for everything from the next batch on. Return what comes, and whether it came to its end."""
        batches: dict[int, bytes] = {}
        while await replay.poll(0):  # the rest of an earlier answer
            await replay.recv_multipart()
        await replay.send_multipart([b"", self._next.to_bytes(8, "big")])
        while await replay.poll(REPLAY_SECONDS * 1000):
            self._silent = 0
            *_, number, payload = await replay.recv_multipart()  # SGLang from 0.5.23 on puts the topic before them
            sequence = int.from_bytes(number, "big", signed=True)
            if sequence == END_OF_REPLAY:
                return batches, True
            batches[sequence] = payload
        if not batches:
            self._silent += 1
            if self._silent == 1:
                log.warning("%s does not answer", self._replay)
        return batches, False

    async def _read_snapshot(self) -> AsyncIterator[Update]:
        """Yield the whole cache, as the worker itself knows it."""
        if self._snapshot:
            async for part in self._snapshot():
                self._next = part.sequence + 1
                yield Update(part.sequence, list(part.chains), lag=None)

    def _take(self, batches: dict[int, bytes]) -> Update | None:
        """What the batches say that are next, AT_ONCE of them. Leaves those that are beyond a gap."""
        first, changes, lag, size = self._next, list[Change](), None, 0
        while size < AT_ONCE and (payload := batches.pop(self._next, None)) is not None:
            self._next += 1
            size += len(payload)
            lag = self._read(payload, changes)
        for sequence in [sequence for sequence in batches if sequence < self._next]:
            del batches[sequence]
        return Update(self._next - 1, changes, lag, self._next - first) if self._next > first else None

    def _read(self, payload: bytes, changes: list[Change]) -> float | None:
        """Add to `changes` what a batch says, and return its lag. What this program does not understand is left out:
        the rest is true all the same."""
        try:
            batch = self._batches.decode(payload)
        except msgspec.DecodeError as error:
            self._leave_out(error)
            return None
        for event in batch.events:
            try:
                changes.append(_change(self._changes.decode(event)))
            except (msgspec.DecodeError, ValueError, OverflowError) as error:
                self._leave_out(error)
        return time.time() - batch.timestamp

    def _leave_out(self, error: Exception) -> None:
        self._left_out += 1
        if self._left_out == 1:
            log.error("%s: events that this program does not understand are left out: %s", self._events, error)


def _received(socket: zmq.Socket[bytes]) -> dict[int, bytes]:
    """The batches that have come, AT_ONCE of them, by sequence number."""
    batches, size = dict[int, bytes](), 0
    with suppress(zmq.Again):
        while size < AT_ONCE:
            *_, number, payload = socket.recv_multipart(zmq.NOBLOCK)
            batches[int.from_bytes(number, "big")] = payload
            size += len(payload)
    return batches


def _change(event: KvEvent) -> Change:
    """An event with block ids without a sign, and the blocks' tokens hashed. Raises ValueError or OverflowError if it
    makes no sense."""
    match event:
        case BlockStored():
            local_hashes = compute_block_hash_for_seq(event.token_ids, event.block_size)
            block_ids = [_unsigned(block_id) for block_id in event.block_hashes]
            if len(local_hashes) != len(block_ids):
                raise ValueError(f"{len(block_ids)} blocks with tokens for {len(local_hashes)}")
            if len(set(block_ids)) < len(block_ids):
                raise ValueError("a block comes after itself")
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
