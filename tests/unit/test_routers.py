"""While no router answers, workers are found without one."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from common.errors import Cancelled, Overloaded, Unavailable
from common.messages import (
    FIND_WORKER,
    WORKERS,
    Failure,
    FindWorkerRequest,
    RouterStatus,
    RoutingDecision,
    WorkerStatus,
)
from common.remote import Remote
from common.text import routers as module
from common.text.limits import Limits
from common.text.routers import Routers
from tests.unit.stand_ins import LocalClient, identity

import pytest
from dynamo.runtime import Context


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(module, "RESTART_SECONDS", 0.3)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr("common.remote.ACK_SECONDS", 0.1)
    monkeypatch.setattr("common.remote.SUSPECT_SECONDS", 0.3)
    monkeypatch.setattr("common.patience.LOOK_SECONDS", 0.01)


class Scene:
    """Two routers that take turns at workers 1 to 3, until they hang, and one who asks them."""

    def __init__(self, count: int = 2, limits: Limits | None = None) -> None:
        self.hanging: set[int] = set()
        self.refusing = False
        self.busy_seconds = 0.0  # how long prompts wait in routers for their turn
        self.there = [1, 2, 3]
        self.decided: list[tuple[int, int]] = []  # by which router, which worker
        self.contexts: list[Context] = []
        client: Any = LocalClient({number: self._router(number) for number in range(count)})
        self.client: LocalClient = client
        status: Any = LocalClient({number: self._status(number) for number in range(2)})
        self.workers: list[WorkerStatus] = []
        self.routers = Routers(
            Remote(FIND_WORKER, client), Remote(WORKERS, status), lambda: self.there, limits or Limits()
        )

    def _router(self, number: int) -> Any:
        async def find(body: Any, context: Context) -> AsyncIterator[Any]:
            self.contexts.append(context)
            while number in self.hanging:
                await asyncio.sleep(0.005)
            await asyncio.sleep(self.busy_seconds)
            if self.refusing:
                yield Failure.of(Overloaded("full")).encode()
                return
            excluded = FindWorkerRequest.decode(body).excluded
            worker = [one for one in self.there if one not in excluded][len(self.decided) % 3]
            self.decided.append((number, worker))
            decision = RoutingDecision(instance_id=worker, worker_id=f"w{worker}", overlap_blocks=2, cost=1.0)
            yield decision.encode()
            await context.async_killed_or_stopped()

        return find

    def _status(self, number: int) -> Any:
        async def status(body: Any, context: Context) -> AsyncIterator[Any]:
            while number in self.hanging:
                await asyncio.sleep(0.005)
            yield RouterStatus(router=1, policy="kv", workers=self.workers).encode()

        return status

    async def given_up(self, instance_id: int, silence: float, begun: bool = True) -> str | None:
        """Why a worker is given up after so long a silence, once routers have had the time to say something."""
        hopeless = self.routers.hopeless(instance_id)
        hopeless(silence, begun)
        await asyncio.sleep(0.05)
        return hopeless(silence, begun)

    async def ask(self, context: Context | None = None, **fields: Any) -> RoutingDecision:
        """A decision that is let go at once."""
        async with self.routers.lease(wanted(**fields), context or Context("x")) as decision:
            return decision

    async def meet_all(self) -> None:
        """Have each worker named once."""
        for _ in range(3):
            await self.ask()


def wanted(**fields: Any) -> FindWorkerRequest:
    return FindWorkerRequest.decode({"model": identity().encode(), "local_hashes": [1], "tokens": 20, **fields})


def play(scenario: Callable[[Scene], Awaitable[None]], count: int = 2) -> None:
    async def run() -> None:
        await scenario(Scene(count))

    asyncio.run(run())


def test_routers_are_asked_in_turn_and_each_lease_ends_with_its_block() -> None:
    async def scenario(scene: Scene) -> None:
        for _ in range(4):
            decision = await scene.ask()
            assert (decision.overlap_blocks, decision.by_load) == (2, False)
        assert [router for router, _ in scene.decided].count(0) == 2
        assert all(context.is_stopped() for context in scene.contexts)

    play(scenario)


def test_whom_it_is_for_goes_along_and_its_id_does_not() -> None:
    """The runtime tells requests apart by the id of their context."""

    async def scenario(scene: Scene) -> None:
        await scene.ask(Context("mine", {"x-request-id": "mine", "x-session-id": "s"}))
        (context,) = scene.contexts
        assert dict(context.metadata) == {"x-request-id": "mine", "x-session-id": "s"}
        assert context.id() != "mine"

    play(scenario)


def test_one_that_lets_a_prompt_wait_but_answers_otherwise_does_not_hang() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.meet_all()
        scene.busy_seconds = 0.5
        decision = await scene.ask()
        assert not decision.by_load
        assert len(scene.decided) == 4

    play(scenario, count=1)


def test_one_that_does_not_even_take_a_prompt_is_left_for_the_other_by_a_processor_that_is_new_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.remote.random.randrange", lambda _: 1)  # it is the first router's turn

    async def scenario(scene: Scene) -> None:
        direct = scene.client.direct

        async def take(body: Any, instance_id: int, **options: Any) -> AsyncIterator[Any]:
            if instance_id == 0:
                await asyncio.sleep(5)
            return await direct(body, instance_id, **options)

        scene.client.direct = take  # type: ignore[method-assign, assignment]
        async with asyncio.timeout(3):
            await scene.ask()
        assert [router for router, _ in scene.decided] == [1]

    play(scenario)


def test_of_two_routers_the_one_that_hangs_is_left_for_the_other() -> None:
    async def scenario(scene: Scene) -> None:
        scene.hanging = {0}
        for _ in range(6):
            assert not (await scene.ask()).by_load
        assert [router for router, _ in scene.decided] == [1] * 6
        assert len(scene.contexts) <= 8  # it is not asked each time

    play(scenario)


def test_if_all_hang_the_known_worker_with_the_fewest_requests_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.meet_all()
        scene.hanging = {0, 1}
        async with AsyncExitStack() as stack:
            decisions = [
                await stack.enter_async_context(scene.routers.lease(wanted(), Context(f"x{number}")))
                for number in range(6)
            ]
            workers = sorted(decision.instance_id for decision in decisions)
            assert workers == [1, 1, 2, 2, 3, 3]
            assert {(decision.by_load, decision.overlap_blocks) for decision in decisions} == {(True, 0)}
        assert len(caplog.records) == 1
        scene.hanging = set()
        await asyncio.sleep(0.4)
        assert not (await scene.ask()).by_load
        assert len(caplog.records) == 2

    caplog.set_level(logging.INFO, "common.text.routers")
    play(scenario)


def test_nor_is_one_taken_that_has_failed_or_left_and_another_answer_s_worker_is_kept() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.meet_all()
        scene.hanging = {0, 1}
        assert (await scene.ask(excluded=[1, 2])).instance_id == 3
        assert (await scene.ask(beside=2)).instance_id == 2
        scene.there = [1]
        assert {(await scene.ask()).instance_id for _ in range(5)} == {1}

    play(scenario)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_if_no_worker_is_known_routers_are_waited_for_but_not_for_ever(count: int) -> None:
    async def scenario(scene: Scene) -> None:
        scene.hanging = {0, 1}
        with pytest.raises(Unavailable) as error:
            await scene.ask()
        assert error.value.code == "no_router"

    play(scenario, count)


def test_one_that_comes_back_in_time_decides() -> None:
    async def scenario(scene: Scene) -> None:
        scene.hanging = {0}
        asyncio.get_running_loop().call_later(0.15, scene.hanging.clear)
        assert (await scene.ask()).instance_id == 1

    play(scenario, 1)


def test_what_a_router_refuses_no_other_is_asked() -> None:
    async def scenario(scene: Scene) -> None:
        scene.refusing = True
        with pytest.raises(Overloaded):
            await scene.ask()
        assert len(scene.contexts) == 1

    play(scenario)


def test_a_caller_that_goes_away_ends_the_wait() -> None:
    async def scenario(scene: Scene) -> None:
        scene.hanging = {0, 1}
        context = Context("x")
        asyncio.get_running_loop().call_later(0.05, context.stop_generating)
        with pytest.raises(Cancelled):
            await scene.ask(context)

    play(scenario)


def worker(number: int, silent_seconds: float | None = None, model: str = "m") -> WorkerStatus:
    name = f"w{number}"
    one = WorkerStatus(instance_id=number, worker_id=name, status="joined", model=identity(model))
    one.silent_seconds = silent_seconds
    return one


class TestWorkersThatAreGivenUp:
    """After a silence, and for a reason."""

    def test_one_that_routers_say_hangs_if_another_could_take_over(self) -> None:
        async def scenario(scene: Scene) -> None:
            scene.workers = [worker(1, silent_seconds=9.0), worker(2)]
            assert await scene.given_up(1, 3.0) == "it hangs, by what a router knows"
            assert await scene.given_up(2, 3.0) is None
            assert await scene.given_up(1, 1.0) is None  # it has just said something

        play(scenario)

    @pytest.mark.parametrize("others", [[], [worker(2, 9.0)], [worker(2, model="other")]])
    def test_but_not_if_nobody_could(self, others: list[WorkerStatus]) -> None:
        async def scenario(scene: Scene) -> None:
            scene.workers = [worker(1, silent_seconds=9.0), *others]
            assert await scene.given_up(1, 1000.0) is None

        play(scenario)

    def test_one_that_has_left_and_is_silent(self) -> None:
        async def scenario(scene: Scene) -> None:
            scene.there = [2]
            assert "no longer registered" in str(await scene.given_up(1, 3.0))
            assert await scene.given_up(1, 1.0) is None  # it drains

        play(scenario)

    def test_one_that_exceeds_its_limit_before_or_after_the_first_token(self) -> None:
        async def run() -> None:
            scene = Scene(limits=Limits(first_token=100.0, next_token=10.0))
            assert await scene.given_up(1, 50.0, begun=False) is None
            assert await scene.given_up(1, 50.0) == "it has said nothing for 50 s"
            assert await scene.given_up(1, 101.0, begun=False) == "it has said nothing for 101 s"

        asyncio.run(run())


def test_a_worker_that_a_router_has_heard_of_lately_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no router answers, nobody can say."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)

    async def scenario(scene: Scene) -> None:
        scene.workers = [
            WorkerStatus(instance_id=number, worker_id="w", status="joined", heard_seconds=seconds)
            for number, seconds in ((1, 0.0), (2, 3.0), (3, None))
        ]
        assert [await scene.routers.is_heard(number) for number in (1, 2, 3, 4)] == [True, False, False, False]
        scene.hanging.update({0, 1})
        assert await scene.routers.is_heard(1) is None

    play(scenario)
