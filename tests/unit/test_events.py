"""What programs tell of requests: to nobody nothing, under load of some only, everywhere of the same ones."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, cast

from common import events
from common.errors import InvalidRequest
from common.events import (
    REQUESTS_PER_SECOND,
    Answering,
    Asked,
    Decided,
    Ended,
    Events,
    Feed,
    Moved,
    RequestEvent,
    Started,
    WatchRequest,
)
from common.messages import WorkerCost

import pytest
from dynamo.runtime import Context

INSTANCE = 2**63 + 1
COST = WorkerCost(worker_id="w1", overlap_blocks=1, expected_blocks=1, prefill_blocks=0.0, decode_blocks=0.0, cost=1.25)
ONE_OF_EACH: list[RequestEvent] = [
    Started(frontend=str(INSTANCE), model="m", prompt="once upon"),
    Asked(processor=str(INSTANCE), tokens=20, blocks=1),
    Decided(router=str(INSTANCE), policy="kv", worker_id="w1", prompt_blocks=1.25, overlap_blocks=1, costs=[COST]),
    Answering(worker_id="w1"),
    Moved(worker_id="w1", tokens=3, reason="it died"),
    Ended(status=200, worker_id="w1", completion_tokens=3, finish_reason="stop", seconds=0.5),
]


async def never() -> None:
    await asyncio.Event().wait()


class Watcher:
    """Reads a feed by hand."""

    def __init__(self, feed: Feed) -> None:
        self.context = Context()
        self.messages = cast(AsyncGenerator[Events], feed.watch(WatchRequest(), self.context))

    async def next(self) -> Events:
        return await asyncio.wait_for(anext(self.messages), 30)


def watched(work: Callable[[Feed, Watcher], Any]) -> None:
    """Do something with a feed that somebody watches."""

    async def play() -> None:
        feed = Feed(INSTANCE, never)
        watcher = Watcher(feed)
        async with aclosing(watcher.messages):
            assert (await watcher.next()).events == []
            await work(feed, watcher)

    asyncio.run(play())


def told_of(feed: Feed, requests: int, prefix: str = "request") -> set[str]:
    return {name for number in range(requests) if feed.teller(name := f"{prefix}-{number}")}


class Clock:
    """A time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = staticmethod(time.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(events, "time", clock)
    return clock


def test_nothing_is_made_while_nobody_watches() -> None:
    feed = Feed(INSTANCE, never)
    assert feed.teller("request") is None

    async def leave(feed: Feed, watcher: Watcher) -> None:
        assert feed.teller("request") is not None
        await watcher.messages.aclose()
        assert feed.teller("request") is None

    watched(leave)


def test_it_ends_for_those_who_watch_when_the_program_leaves() -> None:
    async def play() -> None:
        leaving = asyncio.Event()
        watcher = Watcher(Feed(INSTANCE, leaving.wait))
        assert (await watcher.next()).events == []
        leaving.set()
        with pytest.raises(StopAsyncIteration):
            for _ in range(3):
                await watcher.next()
        assert not watcher.context.is_stopped()

    asyncio.run(play())


def test_a_watcher_reads_what_is_told_under_the_id_of_its_request() -> None:
    async def tell(feed: Feed, watcher: Watcher) -> None:
        teller = feed.teller("request")
        assert teller
        for event in ONE_OF_EACH:
            teller(event)
        assert (await watcher.next()).events == ONE_OF_EACH
        assert {event.request_id for event in ONE_OF_EACH} == {"request"}
        assert (await watcher.next()).events == []

    watched(tell)


def test_what_happens_while_a_message_is_sent_is_in_the_next_one() -> None:
    async def tell(feed: Feed, watcher: Watcher) -> None:
        teller = feed.teller("request")
        assert teller
        teller(Answering(worker_id="before"))
        message = await watcher.next()  # and now it is being sent
        teller(Answering(worker_id="meanwhile"))
        assert [cast(Answering, event).worker_id for event in message.events] == ["before"]
        assert [cast(Answering, event).worker_id for event in (await watcher.next()).events] == ["meanwhile"]

    watched(tell)


def test_every_event_comes_over_the_wire_as_what_it_was() -> None:
    for event in ONE_OF_EACH:
        event.request_id = "request"
    assert Events.decode(Events(events=ONE_OF_EACH).encode()).events == ONE_OF_EACH


@pytest.mark.parametrize("fault", [{"event": "vanished"}, {"event": "asked", "tokens": "many"}, {"event": "moved"}])
def test_what_is_no_event_is_refused(fault: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Events.decode({"events": [fault]})


def test_all_are_told_of_while_there_are_few(clock: Clock) -> None:
    async def ask(feed: Feed, watcher: Watcher) -> None:
        for second in range(5):
            assert len(told_of(feed, REQUESTS_PER_SECOND, f"request-{second}")) == REQUESTS_PER_SECOND
            clock.now += 1
        assert (await watcher.next()).share == 1

    watched(ask)


@pytest.mark.parametrize("requests", [100, 500, 5000])
def test_under_load_a_share_is_told_of_and_the_watcher_hears_which(clock: Clock, requests: int) -> None:
    async def ask(feed: Feed, watcher: Watcher) -> None:
        for second in range(3):
            told = told_of(feed, requests, f"request-{second}")
            clock.now += 1
        assert 0 < len(told) <= 2 * REQUESTS_PER_SECOND
        share = (await watcher.next()).share
        assert len(told) / requests == pytest.approx(share, rel=0.7)

    watched(ask)


def test_programs_with_the_same_load_tell_of_the_same_requests_and_idler_ones_of_more(clock: Clock) -> None:
    async def ask(feed: Feed, watcher: Watcher) -> None:
        twin, idler = Feed(INSTANCE + 1, never), Feed(INSTANCE + 2, never)
        watchers = [Watcher(twin), Watcher(idler)]
        for each in watchers:
            await each.next()
        for one, requests in ((feed, 400), (twin, 400), (idler, 100)):  # the last second's load decides
            told_of(one, requests, "before")
        clock.now += 1
        ids = [f"request-{number}" for number in range(40)]
        told = [{name for name in ids if one.teller(name)} for one in (feed, twin, idler)]
        assert told[0] == told[1] < told[2]
        for each in watchers:
            await each.messages.aclose()

    watched(ask)


def test_after_a_rest_a_single_request_is_told_of_again(clock: Clock) -> None:
    async def ask(feed: Feed, watcher: Watcher) -> None:
        told_of(feed, 5000)
        clock.now += 600
        assert len(told_of(feed, 10, "later")) == 10

    watched(ask)


def test_a_watcher_that_does_not_read_costs_a_bounded_memory() -> None:
    async def tell(feed: Feed, watcher: Watcher) -> None:
        teller = feed.teller("request")
        assert teller
        for _ in range(3 * events.ROOM):
            teller(Answering())
        assert len((await watcher.next()).events) == events.ROOM

    watched(tell)


def test_the_stream_ends_with_its_context() -> None:
    async def stop(feed: Feed, watcher: Watcher) -> None:
        watcher.context.stop_generating()
        assert [message async for message in watcher.messages] == []
        assert feed.teller("request") is None

    watched(stop)
