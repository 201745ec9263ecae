"""A decision is a lease: load on the worker until the caller is done, or this router is."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, cast

from common.errors import Unavailable
from common.events import Feed
from common.messages import FindWorkerRequest, RoutingDecision, StoredBlocks, WorkersRequest
from common.routing import overlap_watch
from common.routing.fleet import Fleet
from common.routing.metrics import RouterMetrics
from common.routing.policy import POLICIES, Weights
from common.routing.queue import QueueOptions
from common.routing.worker import Prompt, Worker
from router import Router, arguments, choice_by
from tests.unit.stand_ins import identity, worker_info

import pytest
from dynamo.runtime import Context
from prometheus_client import CollectorRegistry

HASHES = [101, 102]


class Settled:
    """A membership that has taken everybody in."""

    async def settled(self) -> None:
        return


class Scene:
    """A router with two workers."""

    def __init__(self, policy: str) -> None:
        self.fleet = Fleet()
        for number in (1, 2):
            self.fleet.add(Worker(number, worker_info(number)))
        self.leaving = asyncio.Event()
        self.registry = CollectorRegistry()
        queues, lease = choice_by(policy, Weights(), QueueOptions(), self.fleet)
        self.router = Router(
            self.fleet,
            cast(Any, Settled()),
            lease,
            policy=policy,
            queues=queues,
            feed=Feed(9, self._stopped),
            metrics=RouterMetrics(self.registry, self.fleet, "9", queues.values()),
            stopped=self._stopped,
        )

    async def _stopped(self) -> None:
        await self.leaving.wait()

    def find(self, context: Context, **fields: Any) -> AsyncGenerator[RoutingDecision]:
        request = {"model": identity().encode(), "local_hashes": HASHES, "tokens": 40, **fields}
        found = self.router.find_worker(FindWorkerRequest.decode(request), context)
        assert isinstance(found, AsyncGenerator)
        return found

    async def decide(self, **fields: Any) -> RoutingDecision:
        """A decision that is let go at once."""
        async with aclosing(self.find(context := Context("x"), **fields)) as decisions:
            decision = await anext(decisions)
            context.stop_generating()
            assert [more async for more in decisions] == []
            return decision

    def loads(self) -> list[int]:
        return [worker.requests for worker in self.fleet.workers.values()]


def play(scenario: Callable[[Scene], Awaitable[None]], policy: str = "kv") -> None:
    async def run() -> None:
        await scenario(Scene(policy))

    asyncio.run(run())


def store(scene: Scene, instance_id: int, local_hashes: Sequence[int] = HASHES) -> None:
    block_ids = list(range(1, len(local_hashes) + 1))
    scene.fleet.index.apply(
        instance_id, StoredBlocks(parent_id=None, block_ids=block_ids, local_hashes=list(local_hashes))
    )


def test_the_cache_decides_and_the_decision_says_so() -> None:
    async def scenario(scene: Scene) -> None:
        store(scene, 2)
        decision = await scene.decide()
        assert (decision.instance_id, decision.worker_id, decision.overlap_blocks) == (2, "w2", 2)
        assert (decision.context_length, decision.reasons) == (1600, [])

    play(scenario)


def test_the_costs_are_explained_if_asked_for() -> None:
    async def scenario(scene: Scene) -> None:
        store(scene, 2)
        decision = await scene.decide(explain=True)
        costs = {reason.worker_id: (reason.overlap_blocks, reason.cost) for reason in decision.reasons}
        assert costs["w2"] == (2, decision.cost)
        assert costs["w1"][1] > decision.cost

    play(scenario)


@pytest.mark.parametrize("end", ["the caller stops it", "the router leaves", "the stream is dropped"])
def test_a_decision_is_load_until_its_stream_ends(end: str) -> None:
    async def scenario(scene: Scene) -> None:
        context = Context("x")
        decisions = scene.find(context)
        await anext(decisions)
        rest = asyncio.ensure_future(anext(decisions, None))
        await asyncio.sleep(0.01)
        assert sum(scene.loads()) == 1
        match end:
            case "the caller stops it":
                context.stop_generating()
            case "the router leaves":
                scene.leaving.set()
            case _:
                rest.cancel()
        await asyncio.wait([rest], timeout=30)
        assert scene.loads() == [0, 0]

    play(scenario)


def test_a_decision_is_sent_again_so_that_a_caller_who_was_gone_when_it_came_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The runtime tells of a caller that left only once something cannot be sent to it."""
    monkeypatch.setattr("router.AGAIN_SECONDS", 0.01)

    async def scenario(scene: Scene) -> None:
        context = Context("x")
        async with aclosing(scene.find(context)) as decisions:
            first, again = await anext(decisions), await anext(decisions)
            assert first == again
            assert sum(scene.loads()) == 1
            context.stop_generating()
            assert [more async for more in decisions] == []
        assert scene.loads() == [0, 0]

    play(scenario)


def test_a_session_comes_back_to_its_worker() -> None:
    async def scenario(scene: Scene) -> None:
        first = await scene.decide(session="s")
        others = {(await scene.decide(session="s")).instance_id for _ in range(10)}
        assert others == {first.instance_id}

    play(scenario, policy="session-affinity")


def test_the_log_has_the_request_s_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(scene: Scene) -> None:
        await scene.decide(request_id="mine")

    play(scenario)
    assert [record.message for record in caplog.records if "request_id=mine worker=w" in record.message]


def test_prompts_that_come_again_and_are_in_no_cache_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(scene: Scene) -> None:
        for _ in range(overlap_watch.REPEATS + 1):
            await scene.decide()

    play(scenario)
    assert f"{overlap_watch.REPEATS} repeated prompts in a row found no cached prefix" in caplog.text


def test_the_status_says_how_many_wait_whatever_their_model() -> None:
    async def scenario(scene: Scene) -> None:
        scene.fleet.add(Worker(3, worker_info(3, model=identity("n"))))
        with ExitStack() as busy:
            for worker in scene.fleet.workers.values():
                busy.enter_context(worker.lease(Prompt(range(1000), 1000), 0))
                worker.on_stored([0])
            waiting = [asyncio.create_task(scene.decide(model=identity(name).encode())) for name in "mmn"]
            await asyncio.sleep(0)
            (status,) = [status async for status in scene.router.workers(WorkersRequest(), Context("x"))]
            assert status.waiting == 3
        decisions = await asyncio.gather(*waiting)
        assert [decision.instance_id == 3 for decision in decisions] == [False, False, True]

    play(scenario)


def test_what_no_engine_fits_is_refused_and_shown() -> None:
    async def scenario(scene: Scene) -> None:
        with pytest.raises(Unavailable, match="no engine fits"):
            await scene.decide(model=identity(block_size=32).encode())
        (status,) = [status async for status in scene.router.workers(WorkersRequest(), Context("x"))]
        assert (status.router, status.policy, len(status.workers)) == (9, "kv", 2)
        assert [text.partition(";")[0] for text in status.unserved] == [
            "no engine fits: you ask for m in blocks of 32 tokens"
        ]
        assert {worker.reason for worker in status.workers} == {"has KV blocks of 16 tokens (--block-size)"}

    play(scenario)


def test_every_policy_can_be_asked_for() -> None:
    for policy in (*POLICIES, "dynamo"):
        assert arguments().parse_args(["--policy", policy]).policy == policy
        assert choice_by(policy, Weights(), QueueOptions(), Fleet())
