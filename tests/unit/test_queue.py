"""Prompts wait until the worker that is best for them has room, and not for ever."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any

from common.errors import Cancelled, Overloaded, Unavailable
from common.messages import FindWorkerRequest
from common.routing import queue as module
from common.routing.fleet import Fleet
from common.routing.policy import Weights, choose, kv
from common.routing.prefix_index import sequence_hashes
from common.routing.queue import AGEING, LONGEST, NEWS_SECONDS, Find, Queue, QueueOptions, Waiting
from common.routing.worker import Lease, Prompt, Worker
from tests.unit.stand_ins import BLOCK_SIZE, identity, worker_info

import pytest

ROOM = 10  # blocks that a worker may have to compute and still gets more
UNIQUE = count(1)


class Scene:
    """A queue before some workers, and a clock that is set by hand."""

    def __init__(self, workers: int = 1, max_waiting: float = 30.0) -> None:
        self.now = 1000.0
        self.fleet = Fleet()
        for number in range(1, workers + 1):
            self.fleet.add(Worker(number, worker_info(number), lambda: self.now))
        self.queue = Queue(
            QueueOptions(ROOM * BLOCK_SIZE, max_waiting),
            self.fleet.workers.values,
            partial(choose, policy=kv, weights=Weights()),
            lambda: self.now,
        )
        self.leases: dict[Lease, ExitStack] = {}
        self.names: dict[Waiting, str] = {}

    def prompt(self, blocks: int, **fields: Any) -> Find:
        hashes = [next(UNIQUE) for _ in range(blocks)]
        wanted = {"model": identity().encode(), "local_hashes": hashes, "tokens": blocks * BLOCK_SIZE, **fields}
        request = FindWorkerRequest.decode(wanted)
        return partial(self.fleet.candidates, request, Prompt(sequence_hashes(hashes), blocks))

    def come(self, name: str, blocks: int, **fields: Any) -> bool:
        """Whether a prompt has to wait that comes now."""
        find = self.prompt(blocks, **fields)
        waiting = self.queue.admit(find)
        self.names[waiting] = name
        return not waiting.candidates

    def next(self) -> str | None:
        """Whose turn it is."""
        waiting = self.queue.next()
        return self.names[waiting] if waiting else None

    def order(self) -> list[str]:
        """In which order they go if there is room for all."""
        for lease in list(self.leases):
            self.end(lease)
        names = []
        while name := self.next():
            names.append(name)
        return names

    def work(self, number: int, blocks: int) -> Lease:
        """Give a worker something to compute; it has just stored something, so what it has is believed."""
        worker = self.fleet.workers[number]
        stack = ExitStack()
        hashes = sequence_hashes([next(UNIQUE) for _ in range(blocks)])
        lease = stack.enter_context(worker.lease(Prompt(hashes, blocks), 0))
        self.leases[lease] = stack
        worker.on_stored([0])
        return lease

    def store(self, number: int, lease: Lease, blocks: int) -> None:
        """A worker has computed so many blocks of a prompt."""
        self.fleet.workers[number].on_stored(lease.prompt.sequence_hashes[:blocks])

    def end(self, lease: Lease) -> None:
        self.leases.pop(lease).close()


class TestTurns:
    def test_a_prompt_waits_only_while_its_worker_has_much_to_compute(self) -> None:
        scene = Scene()
        assert not scene.come("first", 50)
        lease = scene.work(1, 50)
        assert scene.come("second", 1)
        scene.store(1, lease, 39)
        assert scene.next() is None
        scene.store(1, lease, 41)
        assert scene.next() == "second"
        assert scene.next() is None
        assert len(scene.queue) == 0

    def test_it_need_not_wait_for_others_than_the_best(self) -> None:
        scene = Scene(workers=2)
        scene.work(1, 50)
        assert not scene.come("free", 20)

    def test_it_waits_for_the_one_that_has_its_beginning_if_that_is_sooner(self) -> None:
        scene = Scene(workers=2)
        lease = scene.work(1, ROOM + 1)
        find = scene.prompt(40)
        hashes = find()[0].prompt.sequence_hashes
        cached = ExitStack()
        cached.enter_context(scene.fleet.workers[1].lease(Prompt(hashes, 40), 40))
        waiting = scene.queue.admit(find)
        assert not waiting.candidates
        assert scene.queue.next() is None
        scene.store(1, lease, 5)
        assert scene.queue.next() is waiting

    def test_the_shortest_goes_first(self) -> None:
        scene = Scene()
        scene.work(1, 50)
        for name, blocks in (("long", 30), ("short", 2), ("middle", 9)):
            assert scene.come(name, blocks)
        assert scene.order() == ["short", "middle", "long"]

    def test_with_time_a_long_one_counts_as_shorter(self) -> None:
        scene = Scene()
        scene.work(1, 50)
        assert scene.come("long", 30)
        scene.now += 31 * BLOCK_SIZE / AGEING
        assert scene.come("short", 2)
        assert scene.order() == ["long", "short"]

    def test_after_half_of_the_time_that_it_may_wait_nobody_new_goes_before_it(self) -> None:
        scene = Scene(max_waiting=0.2)
        scene.work(1, 50)
        assert scene.come("very long", 10_000)
        scene.now += 0.1
        assert scene.come("short", 1)
        assert scene.order() == ["very long", "short"]

    def test_priorities_come_first(self) -> None:
        scene = Scene()
        scene.work(1, 50)
        for name, priority in (("common", 0), ("urgent", 1), ("idle", -1)):
            assert scene.come(name, 5, priority=priority)
        assert scene.order() == ["urgent", "common", "idle"]

    def test_a_session_with_many_does_not_push_back_those_with_few(self) -> None:
        scene = Scene()
        scene.work(1, 50)
        for number in range(4):
            assert scene.come(f"many {number}", 5, session="many")
        for number in range(2):
            assert scene.come(f"few {number}", 6, session="few")
        assert scene.come("alone", 12)
        assert scene.order() == ["many 0", "few 0", "many 1", "few 1", "alone", "many 2", "many 3"]

    def test_what_has_begun_goes_on_at_once(self) -> None:
        scene = Scene()
        scene.work(1, 50)
        assert not scene.come("on its second worker", 100, begun=True)

    def test_nobody_waits_if_there_is_to_be_no_queue(self) -> None:
        scene = Scene()
        scene.queue._options = QueueOptions(0)
        scene.work(1, 50)
        assert not scene.come("any", 100)

    def test_a_worker_without_news_gets_one_prompt_a_second(self) -> None:
        """The word that a prefill is done may be lost."""
        scene = Scene()
        scene.work(1, 50)
        assert scene.come("first", 1)
        assert scene.come("second", 1)
        scene.now += NEWS_SECONDS + 0.01
        assert scene.next() == "first"
        scene.work(1, 1)
        assert scene.next() is None
        scene.now += NEWS_SECONDS + 0.01
        assert scene.next() == "second"

    def test_a_worker_that_never_says_what_it_stored_is_not_waited_for(self) -> None:
        scene = Scene()
        scene.work(1, 50)
        scene.fleet.workers[1].stored_at = None
        assert not scene.come("any", 1)

    def test_one_for_whom_nobody_is_left_is_told_so(self) -> None:
        scene = Scene()
        scene.work(1, 50)
        assert scene.come("any", 1)
        scene.fleet.forget(1)
        scene.fleet.add(Worker(2, worker_info(2, model=identity("other")), lambda: scene.now))
        assert scene.next() == "any"


class TestRefusal:
    def crowd(self, blocks: int) -> Scene:
        """A worker that computes 10 blocks a second, and so many that wait."""
        scene = Scene(max_waiting=4.0)
        lease = scene.work(1, 100)
        scene.now += 2.0
        scene.store(1, lease, 20)
        assert scene.fleet.workers[1].pace == pytest.approx(10)
        for _ in range(blocks):
            assert scene.come("one", 1)
        return scene

    def test_what_would_wait_too_long_is_refused_and_told_when_to_come_again(self) -> None:
        scene = self.crowd(20)
        assert scene.come("last", 29)
        with pytest.raises(Overloaded, match=r"more to do than they can: 21 prompts wait.*again in 3 s") as refused:
            scene.come("too much", 1)
        assert refused.value.headers == {"retry-after": "3"}
        assert refused.value.code == "overloaded"

    def test_only_those_count_that_go_before_it(self) -> None:
        scene = self.crowd(21)
        assert scene.come("urgent", 1, priority=1)

    def test_more_workers_compute_more(self) -> None:
        scene = self.crowd(21)
        scene.fleet.add(Worker(2, worker_info(2), lambda: scene.now))
        scene.work(2, 50)
        assert scene.come("any", 1)

    def test_a_queue_has_an_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "LONGEST", 3)
        assert LONGEST > 1000
        scene = Scene()
        scene.work(1, 50)
        for _ in range(3):
            assert scene.come("one", 1)
        with pytest.raises(Overloaded):
            scene.come("too much", 1)


class TestPace:
    def test_it_counts_only_the_time_in_which_there_is_something_to_compute(self) -> None:
        scene = Scene()
        worker = scene.fleet.workers[1]
        assert worker.pace is None
        for _ in range(3):
            lease = scene.work(1, 30)
            scene.now += 1.0
            scene.store(1, lease, 10)
            scene.now += 2.0
            scene.store(1, lease, 30)
            scene.end(lease)
            scene.now += 100.0
        assert worker.pace == pytest.approx(10)

    def test_it_is_that_of_late(self) -> None:
        scene = Scene()
        for seconds in (10, 1):
            for _ in range(100):
                lease = scene.work(1, 10)
                scene.now += seconds
                scene.store(1, lease, 10)
                scene.end(lease)
        assert scene.fleet.workers[1].pace == pytest.approx(10, rel=0.05)


def play(scenario: Callable[[Scene], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        scene = Scene(**options)
        await scenario(scene)
        assert len(scene.queue) == 0
        for _ in range(3):
            await asyncio.sleep(module.POLL_SECONDS)
        assert scene.queue._serving is None or scene.queue._serving.done()

    asyncio.run(run())


class TestWaiting:
    def wait(self, scene: Scene, blocks: int, is_over: Callable[[], bool] = lambda: False) -> asyncio.Task[Any]:
        find = scene.prompt(blocks)
        return asyncio.create_task(scene.queue.turn(find, is_over))

    def test_whoever_has_its_turn_chooses_before_the_next(self) -> None:
        async def scenario(scene: Scene) -> None:
            chosen = []

            async def go(blocks: int) -> None:
                find = scene.prompt(blocks)
                turn = await scene.queue.turn(find, lambda: False)
                assert turn.seconds == scene.now - 1000
                assert turn.best is turn.candidates[0]
                chosen.append((blocks, turn.best.worker.prefill_blocks))
                scene.work(1, blocks)

            first = scene.work(1, 50)
            tasks = [asyncio.create_task(go(blocks)) for blocks in (7, 6, 5)]
            await asyncio.sleep(0)
            scene.store(1, first, 50)
            while len(chosen) < 2:
                await asyncio.sleep(0.001)
            assert chosen == [(5, 0), (6, 5)]
            await asyncio.sleep(3 * module.POLL_SECONDS)
            assert len(chosen) == 2
            scene.now += NEWS_SECONDS + 1
            await asyncio.gather(*tasks)
            assert chosen[2] == (7, 11)

        play(scenario)

    def test_one_that_nobody_waits_for_any_more_goes(self) -> None:
        async def scenario(scene: Scene) -> None:
            scene.work(1, 50)
            gone = asyncio.Event()
            waiting = self.wait(scene, 1, gone.is_set)
            await asyncio.sleep(0)
            gone.set()
            scene.now += 1.0
            with pytest.raises(Cancelled):
                await waiting

        play(scenario)

    def test_one_that_waited_for_too_long_is_refused(self) -> None:
        async def scenario(scene: Scene) -> None:
            scene.work(1, 50)
            waiting = self.wait(scene, 1)
            await asyncio.sleep(0)
            scene.now += 0.5
            scene.fleet.workers[1].on_stored([0])
            await asyncio.sleep(3 * module.POLL_SECONDS)
            assert not waiting.done()
            scene.now += 0.6
            scene.fleet.workers[1].on_stored([0])
            with pytest.raises(Overloaded, match="try again in 1 s"):
                await waiting

        play(scenario, max_waiting=1.0)

    def test_a_handler_that_is_cancelled_leaves_nothing(self) -> None:
        async def scenario(scene: Scene) -> None:
            scene.work(1, 50)
            waiting = [self.wait(scene, 1) for _ in range(3)]
            await asyncio.sleep(0)
            assert len(scene.queue) == 3
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

        play(scenario)

    def test_the_last_worker_leaves(self) -> None:
        async def scenario(scene: Scene) -> None:
            scene.work(1, 50)
            waiting = self.wait(scene, 1)
            await asyncio.sleep(0)
            scene.fleet.forget(1)
            scene.fleet.add(Worker(2, worker_info(2, model=identity("other"))))
            with pytest.raises(Unavailable):
                await waiting

        play(scenario)
