"""Whatever an engine does with its cache, and in whatever order it says so: what is known of it is what a plain account
of the blocks says."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from itertools import product

from common.engines.announcement import Announcement
from common.engines.cache_account import CacheAccount
from common.kv_events import Change, KvEventStream, RemovedBlocks
from common.messages import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, SnapshotRequest, StoredBlocks
from common.routing.prefix_index import PrefixIndex
from tests.unit.stand_ins import tree_blocks
from tests.unit.test_kv_events import Publisher, exhaust, hurry

import pytest
from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import Context
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

WORKERS = (1, 2, 3)
LOCAL_HASHES = (101, 102)
PROMPTS = list(product(LOCAL_HASHES, repeat=4))

# The same examples each time, however slow the machine is.
always_the_same = settings(
    derandomize=True, deadline=None, database=None, max_examples=150, suppress_health_check=list(HealthCheck)
)


class PlainCache:
    """Blocks by id, each with its parent's id and its local hash: slow, and plainly right."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, int]] = {}

    def apply(self, change: Change) -> None:
        match change:
            case StoredBlocks():
                parents = [change.parent_id, *change.block_ids]
                for number, block_id in enumerate(change.block_ids):
                    self.blocks[block_id] = parents[number], change.local_hashes[number]
            case RemovedBlocks():
                self.blocks = {name: block for name, block in self.blocks.items() if name not in change.block_ids}
            case AllBlocksCleared():
                self.blocks.clear()

    def overlap(self, prompt: Iterable[int]) -> int:
        ends: set[int | None] = {None}
        for number, wanted in enumerate(prompt):
            ends = {
                name for name, (parent, local_hash) in self.blocks.items() if parent in ends and local_hash == wanted
            }
            if not ends:
                return number
        return len(PROMPTS[0])


block_ids = some.integers(1, 7)
# Any block may come after any other, or be another one than before: more than engines do, and so all that they do.
anything = some.builds(
    lambda parent, blocks: StoredBlocks(parent_id=parent, block_ids=list(blocks), local_hashes=list(blocks.values())),
    some.none() | block_ids,
    some.dictionaries(block_ids, some.sampled_from(LOCAL_HASHES), min_size=1, max_size=4),
)


def part_of_a_prompt(tokens: list[int], beginning: int, salt: int) -> StoredBlocks:
    """The blocks of a prompt from one on, by the names that an engine gives to whole prefixes. With another salt the
    same tokens have another name."""
    names = [hash((salt, *tokens[: length + 1])) % 2**64 for length in range(len(tokens))]
    beginning = min(beginning, len(tokens) - 1)
    parent = names[beginning - 1] if beginning else None
    return StoredBlocks(parent_id=parent, block_ids=names[beginning:], local_hashes=tokens[beginning:])


prompts = some.builds(
    part_of_a_prompt,
    some.lists(some.sampled_from(LOCAL_HASHES), min_size=1, max_size=5),
    some.integers(0, 2),
    some.integers(0, 1),
)


def changes(stored: some.SearchStrategy[StoredBlocks]) -> some.SearchStrategy[Change]:
    """Blocks stored, blocks of such chains removed in any order, all cleared."""
    removed = stored.flatmap(lambda chain: some.permutations(chain.block_ids)).map(RemovedBlocks)
    return some.one_of(stored, stored, removed, removed, some.just(AllBlocksCleared()))


def histories(stored: some.SearchStrategy[StoredBlocks]) -> some.SearchStrategy[list[tuple[int, Change]]]:
    """What workers say one after another."""
    return some.lists(some.tuples(some.sampled_from(WORKERS), changes(stored)), max_size=25)


@always_the_same
@given(histories(anything) | histories(prompts))
def test_the_index_finds_what_is_there(history: list[tuple[int, Change]]) -> None:
    index, caches = PrefixIndex(), {worker: PlainCache() for worker in WORKERS}
    for worker, change in history:
        index.apply(worker, change)
        caches[worker].apply(change)
    compare(index, caches)


def in_batches(stored: some.SearchStrategy[StoredBlocks]) -> some.SearchStrategy[list[tuple[int, list[Change]]]]:
    """The same, several things at a time."""
    return some.lists(some.tuples(some.sampled_from(WORKERS), some.lists(changes(stored), max_size=8)), max_size=8)


@always_the_same
@given(in_batches(anything) | in_batches(prompts))
def test_what_is_taken_in_together_is_as_good_as_one_after_the_other(history: list[tuple[int, list[Change]]]) -> None:
    together, apart = PrefixIndex(), PrefixIndex()
    caches = {worker: PlainCache() for worker in WORKERS}
    for worker, batch in history:
        stored = [sequence_hash for change in batch for sequence_hash in apart.apply(worker, change)]
        assert together.apply(worker, *batch) == stored
        for change in batch:
            caches[worker].apply(change)
        compare(together, caches)
    compare(apart, caches)
    assert together.applied == apart.applied


@always_the_same
@given(histories(anything) | histories(prompts), some.integers(1, 4))
def test_a_snapshot_is_as_good_as_the_history(history: list[tuple[int, Change]], most: int) -> None:
    accounts, caches = {worker: CacheAccount() for worker in WORKERS}, {worker: PlainCache() for worker in WORKERS}
    for worker, change in history[: len(history) // 2]:
        accounts[worker].apply(change)
        caches[worker].apply(change)
    index = PrefixIndex()
    for worker, account in accounts.items():
        for part in account.parts(most):
            assert sum(len(chain.block_ids) for chain in part) <= most
            index.apply(worker, *part)
    for worker, change in history[len(history) // 2 :]:
        index.apply(worker, change)
        caches[worker].apply(change)
    compare(index, caches)


Step = tuple[Change, bool] | str  # a change and whether its event is lost on the way, or something else


class Scene:
    """An engine's events, the account that it keeps of them, and a router that follows it. Each can start again."""

    def __init__(self) -> None:
        self.worker = 0
        self._publishers: list[Publisher] = []
        self.cache = PlainCache()
        self.index = PrefixIndex()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start_worker(self) -> None:
        """It has an empty cache, counts from 0 again, and is another worker for who follows it."""
        for publisher in self._publishers:
            publisher.close()
        self.publisher = Publisher(keeps=1000)
        self._publishers = [self.publisher]
        self.worker += 1
        self.cache.blocks.clear()
        self._announcement = Announcement(self.publisher.info)
        self._start("account", self._announcement.follow())
        self.index.forget(self.worker - 1)
        self._follow()

    def start_router(self) -> None:
        self.index = PrefixIndex()
        self._follow()

    def _follow(self) -> None:
        account = self._announcement
        events = KvEventStream(
            self.publisher.live, self.publisher.replay, lambda: account.snapshot(SnapshotRequest(), Context())
        )
        self._start("router", exhaust(self.index.follow(self.worker, events)))

    def _start(self, name: str, work: Coroutine[None, None, None]) -> None:
        if name in self._tasks:
            self._tasks[name].cancel()
        self._tasks[name] = asyncio.create_task(work)

    async def play(self, step: Step) -> None:
        match step:
            case "worker starts again":
                await self.start_worker()
            case "router starts again":
                self.start_router()
            case "worker stops":
                self.publisher.fall_silent()
            case "worker goes on":
                self.publisher.answer_again()
            case (change, lost):
                self.cache.apply(change)
                self.publisher.events = [event(change)]
                await self.publisher.send(lost=lost)
        await asyncio.sleep(0.003)

    async def end(self) -> None:
        """Return once the router knows what is there, with nothing to be waited for."""
        self.publisher.answer_again()
        wanted = {prompt: self.cache.overlap(prompt) for prompt in PROMPTS}
        async with asyncio.timeout(30):
            while self._overlaps() != wanted or self.index.blocks(self.worker) != len(self.cache.blocks):
                await asyncio.sleep(0.005)

    def _overlaps(self) -> dict[Sequence[int], int]:
        hashes = {prompt: compute_block_hash_for_seq(list(prompt), 1) for prompt in PROMPTS}
        return {prompt: self.index.overlaps(hashes[prompt]).get(self.worker, 0) for prompt in PROMPTS}

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self.publisher.close()


def event(change: Change) -> KvEvent:
    """How an engine with blocks of one token says it."""
    match change:
        case StoredBlocks():
            return BlockStored(
                block_hashes=[*change.block_ids],
                parent_block_hash=change.parent_id,
                token_ids=change.local_hashes,
                block_size=1,
            )
        case RemovedBlocks():
            return BlockRemoved(block_hashes=[*change.block_ids])
        case AllBlocksCleared():
            return change


happenings = ["worker stops", "worker goes on", "router starts again", "worker starts again"]
steps = some.lists(some.tuples(changes(prompts), some.booleans()) | some.sampled_from(happenings), max_size=20)


@settings(always_the_same, max_examples=60)
@given(steps)
def test_a_router_comes_to_know_what_is_there_whatever_happens_meanwhile(steps: list[Step]) -> None:
    async def run() -> None:
        scene = Scene()
        await scene.start_worker()
        try:
            for step in steps:
                await scene.play(step)
            await scene.end()
        finally:
            scene.close()

    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        asyncio.run(run())


def compare(index: PrefixIndex, caches: dict[int, PlainCache]) -> None:
    for prompt in PROMPTS:
        overlaps = {worker: cache.overlap(prompt) for worker, cache in caches.items()}
        assert index.overlaps(prompt) == {worker: overlap for worker, overlap in overlaps.items() if overlap}
    for worker, cache in caches.items():
        assert index.blocks(worker) == len(cache.blocks)
        assert tree_blocks(index, worker) <= cache.blocks.keys()  # and the tree has no others
