"""KV events arrive once and in order, whatever ZMQ loses; what the worker no longer has comes as a snapshot."""

import asyncio
import itertools
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from common import kv_events
from common.engines import publisher as engine_publisher
from common.engines.announcement import Announcement
from common.engines.ports import free_ports
from common.engines.publisher import KvEventPublisher, publish_load
from common.errors import Unavailable
from common.kv_events import Change, KvEventStream, Lost, RemovedBlocks, Snapshot, Update, load_stats
from common.messages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheSnapshot,
    KvEvent,
    LoadStat,
    SnapshotRequest,
    StoredBlocks,
)
from common.routing.prefix_index import PrefixIndex
from tests.lossy import LossyProxy
from tests.unit.stand_ins import identity, tree_blocks, worker_info

import msgspec
import pytest
import zmq
import zmq.asyncio
from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import Context


class Leaky:
    """A socket that sends nothing while it leaks."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.leaks = False

    async def send_multipart(self, frames: Sequence[bytes]) -> None:
        if not self.leaks:
            await self._socket.send_multipart(frames)

    def close(self) -> None:
        self._socket.close(0)


class Publisher(KvEventPublisher):
    """An engine's publisher that loses what it is told to lose, and can fall silent."""

    def __init__(self, *, keeps: int) -> None:
        live, replay = free_ports(2)
        self.live, self.replay = f"tcp://127.0.0.1:{live}", f"tcp://127.0.0.1:{replay}"
        self.info = worker_info(kv_events=self.live, kv_replay=self.replay, model=identity(block_size=1))
        super().__init__(self.info)
        self._leaky = self._live = Leaky(self._live)  # type: ignore[assignment]
        self._kept = deque(maxlen=keeps)
        self.events: list[KvEvent] = [AllBlocksCleared()]
        self._answering = asyncio.create_task(self.answer_replays())

    @property
    def next(self) -> int:
        return self._next

    async def send(self, *, lost: bool = False) -> None:
        self._leaky.leaks = lost
        await self.publish(*self.events)
        self._leaky.leaks = False

    async def garble(self) -> None:
        number, payload = self.next.to_bytes(8, "big"), msgspec.msgpack.encode("what?")
        self._kept.append((self.next, payload))
        self._next += 1
        await self._leaky.send_multipart([b"topic", number, payload])

    def fall_silent(self) -> None:
        self._swap(self._swallow())

    def answer_again(self) -> None:
        self._swap(self.answer_replays())

    def _swap(self, work: Coroutine[None, None, None]) -> None:
        self._answering.cancel()
        self._answering = asyncio.create_task(work)

    async def _swallow(self) -> None:
        while True:
            await self._replay.recv_multipart()

    def close(self) -> None:
        self._answering.cancel()
        self._leaky.close()
        self._replay.close(0)


Scenario = Callable[[Publisher, "Reader"], Coroutine[None, None, None]]


class Reader:
    """Collects what a stream gives out: the number of each batch, of each part of a snapshot, or "lost"."""

    def __init__(self, items: AsyncIterator[Update | Lost]) -> None:
        self._items = items
        self._came: list[int | str] = []

    async def read(self, count: int) -> list[int | str]:
        while len(self._came) < count:
            item = await asyncio.wait_for(anext(self._items), 30)
            if isinstance(item, Lost):
                self._came.append("lost")
            else:
                self._came += range(item.sequence - max(item.batches, 1) + 1, item.sequence + 1)
        out, self._came = self._came[:count], self._came[count:]
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


def test_a_batch_that_nobody_understands_is_left_out() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(1) == [0]
        await publisher.garble()
        await publisher.send()
        assert await reader.read(2) == [1, 2]

    play(scenario)


def test_of_a_batch_what_can_be_understood_is_taken() -> None:
    class Unheard(msgspec.Struct, tag="Unheard"):
        of: int

    async def run() -> None:
        publisher = Publisher(keeps=10)
        odd: list[Any] = [
            Unheard(of=1),
            BlockStored(block_hashes=[1], parent_block_hash=None, token_ids=[-1], block_size=1),
            BlockStored(block_hashes=[1], parent_block_hash=None, token_ids=[1], block_size=0),
            BlockStored(block_hashes=[1, 2], parent_block_hash=None, token_ids=[1], block_size=1),
            BlockStored(block_hashes=[1, 1], parent_block_hash=None, token_ids=[1, 1], block_size=1),
            BlockStored(block_hashes=[1], parent_block_hash=None, token_ids=[(1, 2)], block_size=1),  # type: ignore
        ]
        publisher.events = [BlockRemoved(block_hashes=[5]), *odd, BlockRemoved(block_hashes=[6])]
        async with aclosing(KvEventStream(publisher.live, publisher.replay).__aiter__()) as items:  # type: ignore[type-var]
            await publisher.send()
            update = await asyncio.wait_for(anext(items), 30)
        publisher.close()
        assert isinstance(update, Update)
        assert update.changes == [RemovedBlocks([5]), RemovedBlocks([6])]

    asyncio.run(run())


@pytest.mark.parametrize("at_once", [kv_events.AT_ONCE, 1])
def test_what_has_come_is_given_out_together_but_not_too_much(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "AT_ONCE", at_once)
    removed = [RemovedBlocks([number]) for number in range(20)]

    async def scenario(publisher: Publisher, items: AsyncIterator[Update | Lost]) -> None:
        sizes, changes = list[int](), list[Change]()
        for wave in (removed[:1], removed[1:]):
            for one in wave:
                await publisher.publish_removed(one.block_ids)
            await asyncio.sleep(0.1)
            while not changes or changes[-1] != wave[-1]:
                update = await asyncio.wait_for(anext(items), 30)
                assert isinstance(update, Update)
                sizes.append(update.batches)
                changes += update.changes
        assert changes == removed
        assert sizes == [1] * 20 if at_once == 1 else len(sizes) < 10

    stream(scenario, keeps=100)


def test_many() -> None:
    count = 500

    async def scenario(publisher: Publisher, reader: Reader) -> None:
        for number in range(count):
            await publisher.send(lost=number % 7 == 3)
        assert await reader.read(count) == list(range(count))

    play(scenario)


def test_sockets_that_drop_what_is_too_much_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live events beyond the high water mark are dropped, and so are the middle and the end of a long answer."""
    monkeypatch.setattr(engine_publisher, "QUEUED_BATCHES", 50)
    monkeypatch.setattr(kv_events, "REPLAY_SECONDS", 0.1)
    count = 1500

    async def scenario(publisher: Publisher, reader: Reader) -> None:
        publisher.events = [BlockRemoved(block_hashes=list(range(2000)))]  # so large that the system's buffers fill too
        await publisher.send()
        assert await reader.read(1) == [0]
        for _ in range(count):
            await publisher.send()
        assert await reader.read(count) == list(range(1, count + 1))

    play(scenario, keeps=count + 1)


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


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass in a fiftieth of one."""
    for name in ("IDLE_SECONDS", "REPLAY_SECONDS"):
        monkeypatch.setattr(kv_events, name, 0.02)


def test_with_a_snapshot_a_late_reader_begins_there() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        for _ in range(5):
            await publisher.send()
        assert await reader.read(2) == [4, 4]
        await publisher.send()
        assert await reader.read(1) == [5]

    play(scenario, keeps=1, snapshot=snapshots)


def test_with_a_snapshot_a_gap_that_cannot_be_filled_is_bridged() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(2) == [0, 0]
        for _ in range(4):
            await publisher.send(lost=True)
        await publisher.send()
        assert await reader.read(3) == ["lost", 5, 5]

    play(scenario, keeps=1, snapshot=snapshots)


def test_without_the_snapshot_that_it_needs_it_ends() -> None:
    async def scenario(publisher: Publisher, reader: Reader) -> None:
        with pytest.raises(Unavailable, match="not now"):
            await reader.read(1)

    play(scenario, snapshot=no_snapshots)


def test_block_ids_come_without_a_sign_and_hashed_tokens() -> None:
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
        assert added.parent_id == 2**64 - 2
        assert added.block_ids == [2**64 - 1, 0x0101010101010101]
        assert added.local_hashes == compute_block_hash_for_seq([1, 2], 1)
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
    block_ids = tree_blocks(index, 1)
    return block_ids == {hash(prefix) % 2**64 for prefix in cache} and index.blocks(1) == len(block_ids)


def test_a_worker_that_stops_for_a_while_has_lost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)

    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(1) == [0]
        publisher.fall_silent()
        reading = asyncio.create_task(reader.read(4))
        await asyncio.sleep(0.4)
        for lost in (True, True, False):
            await publisher.send(lost=lost)
        await asyncio.sleep(0.1)
        publisher.answer_again()
        await asyncio.sleep(0.1)
        await publisher.send()
        assert await reading == [1, 2, 3, 4]

    play(scenario)


def test_what_a_worker_will_never_send_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)

    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(1) == [0]
        publisher.fall_silent()
        await publisher.send(lost=True)
        reading = asyncio.create_task(reader.read(2))
        while not reading.done():
            await publisher.send()
            await asyncio.sleep(0.01)
        lost, following = await reading
        assert lost == "lost"
        assert isinstance(following, int)

    play(scenario)


def test_a_worker_whose_events_do_not_come_is_known_by_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)

    async def scenario(publisher: Publisher, reader: Reader) -> None:
        await publisher.send()
        assert await reader.read(2) == [0, 0]
        publisher.fall_silent()
        await publisher.send(lost=True)
        assert await reader.read(3) == ["lost", 1, 1]

    play(scenario, snapshot=snapshots)


@pytest.mark.parametrize("seed", range(4))
def test_over_a_bad_network_the_index_becomes_what_the_worker_has(seed: int) -> None:
    """Messages are lost, doubled, late and out of order, those of the replay too, and the worker keeps few of them."""

    async def run() -> None:
        chance, cache = random.Random(seed), dict[tuple[int, ...], None]()
        publisher = Publisher(keeps=100)
        proxy = LossyProxy(publisher.live, publisher.replay, seed=seed)
        announcement, index = Announcement(publisher.info), PrefixIndex()
        stream = KvEventStream(proxy.events, proxy.replay, lambda: announcement.snapshot(SnapshotRequest(), Context()))
        tasks = [asyncio.create_task(announcement.follow()), asyncio.create_task(exhaust(index.follow(1, stream)))]
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


class TestKvEventPublisher:
    """What an engine that somebody writes publishes with."""

    def test_what_it_publishes_is_read_however_late(self) -> None:
        async def scenario(publisher: Publisher, items: AsyncIterator[Update | Lost]) -> None:
            await publisher.publish_stored([1, 2, 3], [-1, 20, 30])
            await publisher.publish_stored([4], [40], parent_id=30)
            await publisher.publish_removed([40])
            await publisher.publish(AllBlocksCleared(), BlockRemoved(block_hashes=[5]))
            update = await asyncio.wait_for(anext(items), 30)
            assert isinstance(update, Update)
            assert (update.sequence, update.batches) == (3, 4)
            assert update.changes == [
                StoredBlocks(parent_id=None, block_ids=[2**64 - 1, 20, 30], local_hashes=hashes(1, 2, 3)),
                StoredBlocks(parent_id=30, block_ids=[40], local_hashes=hashes(4)),
                RemovedBlocks([40]),
                AllBlocksCleared(),
                RemovedBlocks([5]),
            ]
            await publisher.publish_removed([1])
            live = await asyncio.wait_for(anext(items), 30)
            assert isinstance(live, Update)
            assert live.changes == [RemovedBlocks([1])]

        stream(scenario)

    def test_what_was_long_ago_is_no_longer_kept(self) -> None:
        async def scenario(publisher: Publisher, items: AsyncIterator[Update | Lost]) -> None:
            for block_id in range(5):
                await publisher.publish_removed([block_id])
            assert await Reader(items).read(3) == ["lost", 3, 4]

        stream(scenario, keeps=2)

    def test_it_sends_again_from_the_number_that_is_asked_for(self) -> None:
        async def run() -> None:
            publisher = Publisher(keeps=10)
            for block_id in range(5):
                await publisher.publish_removed([block_id])
            with zmq.asyncio.Context.instance().socket(zmq.DEALER) as socket:
                socket.set(zmq.LINGER, 0)
                socket.connect(publisher.replay)
                for start, numbers in ((3, [3, 4, -1]), (0, [0, 1, 2, 3, 4, -1]), (9, [-1])):
                    await socket.send_multipart([b"", start.to_bytes(8, "big")])
                    answers = [await asyncio.wait_for(socket.recv_multipart(), 30) for _ in numbers]
                    assert [int.from_bytes(number, "big", signed=True) for _, number, _ in answers] == numbers
            publisher.close()

        asyncio.run(run())


def hashes(*tokens: int) -> list[int]:
    return compute_block_hash_for_seq(list(tokens), 1)


def stream(scenario: Callable[[Publisher, AsyncIterator[Update | Lost]], Awaitable[None]], *, keeps: int = 10) -> None:
    async def run() -> None:
        publisher = Publisher(keeps=keeps)
        try:
            items = KvEventStream(publisher.live, publisher.replay).__aiter__()
            async with aclosing(items):  # type: ignore[type-var]
                await scenario(publisher, items)
        finally:
            publisher.close()

    asyncio.run(run())


def test_load_is_read_whenever_it_is_published() -> None:
    async def run() -> None:
        info = worker_info(load=f"tcp://127.0.0.1:{free_ports(1)[0]}")

        async def busier_and_busier() -> AsyncIterator[LoadStat]:
            for requests in itertools.count():
                yield LoadStat(running_requests=requests, waiting_requests=0, used_tokens=16, total_tokens=160)
                await asyncio.sleep(0.005)

        publishing = asyncio.create_task(publish_load(info, busier_and_busier()))
        stats = load_stats(info.load)
        async with aclosing(stats):  # type: ignore[type-var]
            first, second = [await asyncio.wait_for(anext(stats), 30) for _ in range(2)]
        assert second.running_requests == first.running_requests + 1
        assert (first.used_tokens, first.total_tokens) == (16, 160)
        publishing.cancel()

    asyncio.run(run())
