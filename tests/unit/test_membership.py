"""Engines are followed as they join, work and leave; what goes wrong with their events costs them no work."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

from common.engines.announcement import Announcement
from common.messages import CACHE, DESCRIBE_WORKER, GENERATE, BlockStored
from common.remote import Remote
from common.routing import membership
from common.routing.fleet import Fleet
from common.routing.membership import Membership
from common.routing.worker import Worker
from tests.unit.stand_ins import Handler, LocalClient, worker_info
from tests.unit.test_kv_events import Publisher

import pytest
from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import Context

TOKENS = [1, 2, 3]
BLOCKS = BlockStored(block_hashes=[10, 20, 30], parent_block_hash=None, token_ids=TOKENS, block_size=1)


class Scene:
    """An engine, and a router that learns of it. The engine gives no snapshot while `reachable` is false."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.reachable = True
        self.publisher = Publisher(keeps=10)
        self._announcement = Announcement(self.publisher.info)
        engines, describe, cache = (
            cast(Any, LocalClient({1: handler})) for handler in (self._describe, self._describe, self._snapshot)
        )
        self._membership = Membership(
            self.fleet,
            engines=Remote(GENERATE, engines),
            describe=Remote(DESCRIBE_WORKER, describe),
            cache=Remote(CACHE, cache),
        )
        work = (self._announcement.follow(), self._membership.follow())
        self._tasks = [asyncio.create_task(coroutine) for coroutine in work]

    async def _describe(self, body: Any, context: Context) -> AsyncIterator[Any]:
        yield self.publisher.info.encode()

    async def _snapshot(self, body: Any, context: Context) -> AsyncIterator[Any]:
        if not self.reachable:
            raise Exception("Unavailable: it died")
        async for part in self._announcement.snapshot(cast(Any, None), context):
            yield part.encode()

    async def publish(self, event: BlockStored) -> None:
        self.publisher.events = [event]
        await self.publisher.send()

    async def until(self, overlaps: dict[int, int]) -> None:
        """Return once this is what the router knows of the prompt."""
        async with asyncio.timeout(30):
            while self.fleet.index.overlaps(compute_block_hash_for_seq(TOKENS, 1)) != overlaps:
                await asyncio.sleep(0.01)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.publisher.close()


def play(scenario: Callable[[Scene], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "AGAIN_SECONDS", 0.02)

    async def run() -> None:
        scene = Scene()
        try:
            await scenario(scene)
            assert [status.status for status in scene.fleet.status()] == ["joined"]
        finally:
            scene.close()

    asyncio.run(run())


def test_a_worker_that_gives_no_snapshot_yet_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(scene: Scene) -> None:
        scene.reachable = False
        await scene.publish(BLOCKS)
        async with asyncio.timeout(30):
            while "worker w1 gives no snapshot of its cache yet: it died" not in caplog.text:
                await asyncio.sleep(0.01)
        await scene.until({})
        scene.reachable = True
        await scene.until({1: 3})

    play(scenario, monkeypatch)


def test_an_event_that_the_index_fails_at_does_not_cost_the_worker_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.publish(BLOCKS)
        await scene.until({1: 3})
        scene.fleet.index._tree.remove_worker(1)  # so that the tree can place nothing after its blocks
        await scene.publish(BlockStored(block_hashes=[40], parent_block_hash=30, token_ids=[4], block_size=1))
        await scene.until({1: 3})
        assert scene.fleet.index.blocks(1) == 4

    play(scenario, monkeypatch)


def test_a_worker_that_does_not_answer_hangs_if_others_do_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody answers, it is what carries the questions that is down."""
    monkeypatch.setattr(membership, "ASK_SECONDS", 0.01)
    monkeypatch.setattr(membership, "THERE_SECONDS", 0.05)
    hanging: set[int] = set()

    def answer(number: int) -> Handler:
        async def describe(body: Any, context: Context) -> AsyncIterator[Any]:
            while number in hanging:
                await asyncio.sleep(0.01)
            yield worker_info(number).encode()

        return describe

    async def run() -> None:
        nobody = cast(Any, LocalClient({}))
        describe = cast(Any, LocalClient({number: answer(number) for number in (1, 2)}))
        fleet = Fleet()
        for number in (1, 2, 3):  # the third has no such endpoint
            fleet.add(Worker(number, worker_info(number) if number < 3 else None))
        following = Membership(
            fleet,
            engines=Remote(GENERATE, nobody),
            describe=Remote(DESCRIBE_WORKER, describe),
            cache=Remote(CACHE, nobody),
        )
        asking = asyncio.create_task(following.follow())

        def silent() -> set[int]:
            return {number for number, worker in fleet.workers.items() if worker.silent_since is not None}

        hanging.update({1, 2})
        await asyncio.sleep(0.5)
        assert silent() == set()
        for now_hanging in ({1}, set[int]()):
            hanging.intersection_update(now_hanging)
            async with asyncio.timeout(30):
                while silent() != now_hanging:
                    await asyncio.sleep(0.01)
        asking.cancel()

    asyncio.run(run())
