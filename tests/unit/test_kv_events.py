"""KV events arrive once and in order, whatever ZMQ loses; what the worker no longer has comes as a snapshot."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import aclosing

from common import kv_events
from common.errors import Unavailable
from common.kv_events import KvEventStream, Lost, RemovedBlocks, Snapshot, Update
from common.messages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheSnapshot,
    KvEventBatch,
    SnapshotRequest,
    StoredBlocks,
)
from common.own_cache import OwnCache
from common.prefix_index import PrefixIndex
from tests.lossy import LossyProxy

import msgspec
import pytest
import zmq
import zmq.asyncio
from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import Context


class Publisher:
    """Speaks the protocol of SGLang's and vLLM's publishers, and can lose what it is told to lose."""

    def __init__(self, *, keeps: int) -> None:
        context = zmq.asyncio.Context.instance()
        self._live, self._replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self.live, self.replay = (
            f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}" for socket in (self._live, self._replay)
        )
        self._keeps = keeps
        self.answers = True
        self.events: list[BlockStored | BlockRemoved | AllBlocksCleared] = [AllBlocksCleared()]
        self._sent: list[tuple[int, bytes]] = []
        self.next = 0
        self._answering = asyncio.create_task(self._answer())

    async def send(self, *, lost: bool = False) -> None:
        payload = msgspec.msgpack.encode(KvEventBatch(timestamp=float(self.next), events=self.events))
        self._sent = [*self._sent, (self.next, payload)][-self._keeps :]
        if not lost:
            await self._live.send_multipart([b"topic", self.next.to_bytes(8, "big"), payload])
        self.next += 1

    async def garble(self) -> None:
        await self._live.send_multipart([b"topic", self.next.to_bytes(8, "big"), msgspec.msgpack.encode("what?")])
        self.next += 1

    async def _answer(self) -> None:
        while True:
            client, _, start = await self._replay.recv_multipart()
            if not self.answers:
                continue
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

    def __init__(self, items: AsyncIterator[Update | Lost]) -> None:
        self._items = items

    async def read(self, count: int) -> list[int | str]:
        out: list[int | str] = []
        while len(out) < count:
            item = await asyncio.wait_for(anext(self._items), 30)
            out.append("lost" if isinstance(item, Lost) else item.sequence)
        return out


def play(scenario: Scenario, *, keeps: int = 1000, snapshot: Callable[[Publisher], Snapshot] | None = None) -> None:
    async def run() -> None:
        publisher = Publisher(keeps=keeps)
        stream = KvEventStream(publisher.live, publisher.replay, snapshot and snapshot(publisher))
        try:
            async with aclosing(stream.__aiter__()) as items:  # type: ignore[type-var]
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


def snapshots(publisher: Publisher) -> Snapshot:
    """A worker that knows all that it has sent."""

    async def snapshot() -> AsyncIterator[CacheSnapshot]:
        for _part in range(2):
            yield CacheSnapshot(sequence=publisher.next - 1, chains=[])

    return snapshot


def no_snapshots(publisher: Publisher) -> Snapshot:
    async def snapshot() -> AsyncIterator[CacheSnapshot]:
        raise Unavailable("not now")
        yield

    return snapshot


def test_with_a_snapshot_a_late_reader_begins_there() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        for _ in range(5):
            await publisher.send()
        assert await reader.read(3) == ["lost", 4, 4]
        await publisher.send()
        assert await reader.read(1) == [5]

    play(scenario, keeps=1, snapshot=snapshots)


def test_with_a_snapshot_a_gap_that_cannot_be_filled_is_bridged() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(3) == ["lost", 0, 0]
        for _ in range(4):
            await publisher.send(lost=True)
        await publisher.send()
        assert await reader.read(3) == ["lost", 5, 5]

    play(scenario, keeps=1, snapshot=snapshots)


def test_without_the_snapshot_that_was_hoped_for_it_begins_with_what_there_is() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        for _ in range(5):
            await publisher.send()
        assert await reader.read(4) == ["lost", "lost", 3, 4]

    play(scenario, keeps=2, snapshot=no_snapshots)


def test_blocks_get_names_without_a_sign_and_hashed_tokens() -> None:
    async def run() -> None:
        publisher = Publisher(keeps=10)
        stored = BlockStored(
            block_hashes=[-1, b"\0" * 24 + b"\1" * 8], parent_block_hash=-2, token_ids=[1, 2], block_size=1
        )
        publisher.events = [stored, BlockRemoved(block_hashes=[-1])]
        async with aclosing(KvEventStream(publisher.live, publisher.replay).__aiter__()) as items:  # type: ignore[type-var]
            await publisher.send()
            update = await asyncio.wait_for(anext(items), 30)
        publisher.close()
        assert isinstance(update, Update)
        added, removed = update.changes
        assert isinstance(added, StoredBlocks)
        assert added.parent == 2**64 - 2
        assert added.names == [2**64 - 1, 0x0101010101010101]
        assert added.hashes == compute_block_hash_for_seq([1, 2], 1)
        assert removed == RemovedBlocks([2**64 - 1])

    asyncio.run(run())


def random_event(cache: dict[tuple[int, ...], None], chance: random.Random) -> BlockStored | BlockRemoved:
    """Something that an engine with blocks of one token and this cache, by prefix, may do next."""
    leaves = [prefix for prefix in cache if not any(other[:-1] == prefix for other in cache)]
    if leaves and chance.random() < 0.4:  # engines evict the ends of chains first
        leaf = chance.choice(leaves)
        del cache[leaf]
        return BlockRemoved(block_hashes=[hash(leaf)])
    tokens = [chance.randrange(3) for _ in range(chance.randrange(1, 6))]
    prefixes = [tuple(tokens[: length + 1]) for length in range(len(tokens))]
    cache.update(dict.fromkeys(prefixes))
    return BlockStored(
        block_hashes=[hash(prefix) for prefix in prefixes], parent_block_hash=None, token_ids=tokens, block_size=1
    )


async def exhaust(items: AsyncIterator[object]) -> None:
    async for _ in items:
        pass


def equal(index: PrefixIndex, cache: Collection[tuple[int, ...]]) -> bool:
    """Whether the index has just these prefixes of tokens."""
    names = {name for chain in index.chains(1) for name in chain.names}
    return names == {hash(prefix) % 2**64 for prefix in cache} and index.blocks(1) == len(names)


def test_of_a_worker_that_no_longer_answers_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"IDLE_SECONDS": 0.05, "REPLAY_SECONDS": 0.05, "SILENT_ATTEMPTS": 3}.items():
        monkeypatch.setattr(kv_events, name, value)

    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(3) == ["lost", 0, 0]
        publisher.answers = False
        assert await reader.read(1) == ["lost"]
        await publisher.send(lost=True)
        publisher.answers = True
        assert (await reader.read(4))[-3:] == ["lost", 1, 1]

    play(scenario, snapshot=snapshots)


@pytest.mark.parametrize("seed", range(4))
def test_over_a_bad_network_the_index_becomes_what_the_worker_has(seed: int) -> None:
    """Messages are lost, doubled, late and out of order, those of the replay too, and the worker keeps few of them."""

    async def run() -> None:
        chance, cache = random.Random(seed), dict[tuple[int, ...], None]()
        publisher = Publisher(keeps=100)
        proxy = LossyProxy(publisher.live, publisher.replay, seed=seed)
        own, index = OwnCache(publisher.live, publisher.replay), PrefixIndex()
        stream = KvEventStream(proxy.events, proxy.replay, lambda: own.snapshot(SnapshotRequest(), Context()))
        tasks = [asyncio.create_task(own.follow()), asyncio.create_task(exhaust(index.follow(1, stream)))]
        try:
            for number in range(600):
                publisher.events = [random_event(cache, chance)]
                await publisher.send()
                await asyncio.sleep(0.2 if number == 300 else 0.001)
            proxy.bad = False
            async with asyncio.timeout(30):
                while not equal(index, cache):
                    await asyncio.sleep(0.05)
            assert proxy.dropped > 20
        finally:
            for task in tasks:
                task.cancel()
            proxy.close()
            publisher.close()

    asyncio.run(run())
